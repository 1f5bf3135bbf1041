"""Real images as memories: pixels, fewer pixels, JPEG scans under one header, or lossless WebP."""

from __future__ import annotations

import abc
import contextlib
import copy
import inspect
import io
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hmn_replay.budget import Budget, as_int, largest
from hmn_replay.data.features import FeatureSource, read_data
from hmn_replay.data.images import ImageSource, LabelledImages, joined_names
from hmn_replay.data.lookup import first_in_turn
from hmn_replay.errors import BudgetError, ConfigError, DataError, MemoryFileError
from hmn_replay.memory.base import (
    Codec,
    Memory,
    check_tensors,
    class_specs,
    register_memory,
    warn_of_lost_labeller,
    with_unknown,
)
from hmn_replay.memory.checks import check_classes, check_image_shape
from hmn_replay.memory.file import Record, TensorSpec, as_bytes, integer_dtype, packed_size
from hmn_replay.memory.jpeg import (
    decode_jpeg_scans,
    encode_jpeg_scans,
    read_jpeg_shape,
)
from hmn_replay.memory.names import affordable_names, stored_names_bytes
from hmn_replay.runtime import resolve_device

__all__ = [
    "AnyReal",
    "JPEGMemory",
    "LosslessMemory",
    "RawMemory",
    "RealMemory",
    "SubsampledMemory",
    "check_order",
    "join_numbers",
    "split_numbers",
]

_ENCODED_AT_ONCE = 256
_MAX_FACTOR = 8
# "RIFF", a size, "WEBPVP8L", a size: the same for every lossless WebP, but for its sizes.
_WEBP_HEADER_BYTES = 20

AnyReal = TypeVar("AnyReal", bound="RealMemory")


class _Kept(NamedTuple):
    """An image: its label, its payload, and where it stood in the memory, -1 for a new one."""

    label: int
    payload: bytes
    row: int


class RealMemory(Memory):
    """Real images under a budget, each encoded by itself; the base of the kinds below.

    A memory begins without images; :meth:`extend` adds them. An image once encoded stays as it is,
    byte for byte: it is never encoded a second time.

    A kind with settings of its own names them in :attr:`setting_types`, takes each by that name,
    with a default or without, and keeps it as an attribute of that name. Keepers, replay plugins
    and the command then take it too, the file keeps it, and :meth:`summary` says it.

    Args:
        image_shape: ``(C, H, W)``; C is 1 or 3, H and W are 8 to 224.
        budget: Bytes that the saved file may take. Default: None, no bound.

    Raises:
        ConfigError: Another number of channels, or what is no image shape.
        DataError: Another height or width.

    Attributes:
        payloads: The bytes of every image, in the order of the images.
    """

    has_codec = True
    sizes_differ: ClassVar[bool] = True
    """Whether the payloads of images differ in length."""
    setting_types: ClassVar[Mapping[str, Callable[[str], Any]]] = {}
    """What the class takes beside image shape and budget: name to what reads its word in a file,
    which is its ``str()`` and has no space: such as ``int``, and not ``bool``, of which every word
    is true."""

    def __init__(
        self, image_shape: Sequence[int], *, budget: Budget | int | str | None = None
    ) -> None:
        self._image_shape = self.check_shape(image_shape)
        self.budget_bytes = None if budget is None else Budget.parse(budget).num_bytes
        self.classes = torch.empty(0, dtype=torch.int64)
        self.class_index = torch.empty(0, dtype=torch.int64)
        self.class_names, self.report, self._counts = {}, {}, []
        self.payloads: list[bytes] = []

    @staticmethod
    def check_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return a shape that images of the kind can have, or raise an error that says which."""
        return check_image_shape(image_shape)

    @classmethod
    def required_settings(cls) -> list[str]:
        """Return the names of what the class takes and has no default for, but the image shape."""
        _, *others = inspect.signature(cls).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [each.name for each in others if each.default is each.empty and each.kind in named]

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """Raise a ConfigError for settings that no memory can have, by making one of 8 x 8 pixels.

        A kind that has no images of ``(1, 8, 8)`` makes another here.
        """
        cls((1, 8, 8), **settings).words()

    @abc.abstractmethod
    def encode(self, images: Tensor) -> list[bytes]:
        """Encode images: uint8 ``(N, C, H, W)``, or features, on the CPU to the bytes of each."""

    @abc.abstractmethod
    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        """Decode payloads to what was encoded, on the CPU; DataError where one is damaged."""

    def setting_values(self) -> dict[str, Any]:
        """Return the settings of the memory, by name, as JSON types."""
        return {name: getattr(self, name) for name in self.setting_types}

    def words(self) -> tuple[str, ...]:
        """Return what a memory is made from, for the file's metadata: image shape and settings.

        Raises:
            ConfigError: A setting would not come back from its word in a file.
        """
        words = [join_numbers(self.image_shape)]
        for name, value in self.setting_values().items():
            words.append(str(value))
            if not _comes_back(words[-1], value, self.setting_types[name]):
                raise ConfigError(
                    f"the memory kind {self.kind!r} cannot keep {name}={value!r} in a file: what "
                    f"setting_types has for {name} is to give it back of the word {words[-1]!r}, "
                    "in which there may be no space"
                )
        return tuple(words)

    @classmethod
    def _from_words(
        cls: type[AnyReal], words: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> AnyReal:
        """Return a memory without images that :meth:`words` and :meth:`header` come from."""
        shape, *own = words
        if len(own) != len(cls.setting_types):
            amount = "too many" if len(own) > len(cls.setting_types) else "not enough"
            raise MemoryFileError(
                f"{amount} values of {['image shape', *cls.setting_types]}: {words}"
            )
        read = zip(cls.setting_types.items(), own, strict=True)
        return cls(split_numbers(shape), **{name: reads(word) for (name, reads), word in read})

    def summary(self) -> dict[str, Any]:
        """Return what the memory is, as JSON types; see :meth:`Memory.summary`."""
        return {**super().summary(), **self.setting_values()}

    def header(self) -> bytes:
        """Return the bytes that all images share."""
        return b""

    @property
    def payload_bytes(self) -> int:
        """Bytes of each payload, where they do not differ."""
        return math.prod(self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        return self._image_shape

    def recode(self, images: Tensor) -> Tensor:
        """Return images as the memory would give them back: encoded and decoded, uint8 both."""
        return self._read(self.encode(images))

    def _codec(self) -> Codec:
        return self.recode

    def extend(self, data: ImageSource | FeatureSource, *, order: Tensor | None = None) -> None:
        """Add the classes of some images, as many of every class as fit the budget.

        The images of a class stand in the given order, and those that make room are its last ones:
        the first image of every class stays longest, then the second. Of a class that the memory
        has already, new and old images take turns, so that as many of both stay; one that it has
        to the byte is not added again. A class of which no image is left, or fits, goes.

        Args:
            data: The new images; see :func:`hmn_replay.as_labelled_images`. For a memory of
                features these; see :func:`hmn_replay.as_labelled_features`.
            order: Positions in ``data``, int64 ``(n,)``, each once at most: which images are
                wanted, the first first. Default: all, in their order.

        Raises:
            BudgetError: Not one image fits; the message gives the smallest budget that holds one.
            ConfigError: ``order`` is not as said above, or more than 1000 classes with those of the
                memory.
            DataError: Images of another shape, or that cannot be used; or a label that has another
                name in them than in the memory.
        """
        data = read_data(data, holds_features=self.holds_features)
        if data.image_shape != self.image_shape:
            what = "features" if self.holds_features else "images"
            raise DataError(f"expected {what} of {self.image_shape}, as the memory has; got {data}")
        order = torch.arange(len(data)) if order is None else check_order(order, len(data))
        names = joined_names(self.class_names, data.class_names)
        # The first image of every class, then the second: what is over the budget is the rest.
        labels = data.labels[order]
        order = order[first_in_turn(labels, labels)]
        old, new = self._by_class(), {label: list[_Kept]() for label in labels.unique().tolist()}
        if new:
            check_classes(sorted(old.keys() | new.keys()))  # what a file may have
        known = {each[:2] for label in new for each in old.get(label, ())}
        num_bytes = 0
        for chunk in order.split(_ENCODED_AT_ONCE):
            encoded = self.encode(data.images[chunk])
            for label, payload in zip(data.labels[chunk].tolist(), encoded, strict=True):
                if (label, payload) not in known:
                    new[label].append(_Kept(label, payload, -1))
                    num_bytes += len(payload)
            if self.budget_bytes is not None and num_bytes > self.budget_bytes:
                break
        images = {
            label: _taking_turns(new.get(label, []), old.get(label, []))
            for label in sorted(old.keys() | new.keys())
        }
        names = affordable_names(names, images, self.budget_bytes)
        turns = sorted((i, label) for label, own in images.items() for i in range(len(own)))
        queue = [images[label][i] for i, label in turns]
        if self.budget_bytes is not None:
            queue = queue[: self._most_that_fit(queue, names, self.budget_bytes)]
        kept, counts, rows, columns = self._by_old_places(queue)
        self._set(list(counts), list(counts.values()), [each.payload for each in kept])
        labeller = self._labeller
        self._rearrange_labels(rows, columns)
        warn_of_lost_labeller(labeller, self._labeller)
        self.class_names = {label: name for label, name in names.items() if label in counts}

    def _most_that_fit(self, queue: Sequence[_Kept], names: Mapping[int, str], limit: int) -> int:
        """Return how many of a queue of images fit, by bisection: files grow with their images."""

        def takes(num_images: int) -> int:
            chosen = queue[:num_images]
            classes = sorted({each.label for each in chosen})
            lengths = [len(each.payload) for each in chosen]
            labels: dict[str, TensorSpec] = {}
            if self.richest_labels != "hard":
                _, counts, rows, columns = self._by_old_places(chosen)
                labels = self._label_specs_of(rows, columns, list(counts.values()))
            return self._size(classes, lengths, stored_names_bytes(names, classes), labels)

        if not queue or takes(1) > limit:
            smallest = f"; the smallest that does is {takes(1):,} bytes" if queue else ""
            raise BudgetError(f"a budget of {limit:,} bytes does not hold one image{smallest}")
        return largest(1, len(queue), lambda num_images: takes(num_images) <= limit)

    def _by_old_places(
        self, images: Sequence[_Kept]
    ) -> tuple[list[_Kept], Counter[int], Tensor, list[int]]:
        """Return images class by class, how many a class has, and where both stood, -1 if new."""
        positions = {label: i for i, label in enumerate(self.classes.tolist())}
        kept = sorted(images, key=lambda each: each.label)
        counts = Counter(each.label for each in kept)
        rows = torch.tensor([each.row for each in kept], dtype=torch.int64)
        return kept, counts, rows, [positions.get(label, -1) for label in counts]

    def _size(
        self,
        classes: Sequence[int],
        lengths: Sequence[int],
        names_bytes: int,
        labels: Mapping[str, TensorSpec],
    ) -> int:
        specs = {**class_specs(classes, len(lengths)), **self._specs(lengths), **labels}
        if names_bytes:
            specs["names"] = TensorSpec(torch.uint8, (names_bytes,))
        return packed_size(self.kind, len(lengths), self.budget_bytes, self.words(), specs)

    def bytes_of_one_each(
        self, num_classes: int, budget_bytes: int | None, images: LabelledImages | None = None
    ) -> int:
        """Return the file's bytes with one image of each class, the first that it has.

        A class that is still to come has one as large as they are on average.

        Args:
            num_classes: How many classes there are then, those that are here among them.
            budget_bytes: What the file may take, which decides whether it has class names.
            images: Images to :meth:`extend` the memory by before. Default: none.
        """
        tried = copy.deepcopy(self)
        tried.budget_bytes = None
        if images is not None:
            if {*images.classes.tolist()} - {*tried.classes.tolist()}:
                tried.set_labeller(None)  # it goes where classes come, with a warning then
            tried.extend(images)
        counts = torch.tensor([count for count in tried.images_per_class if count])
        tried.keep(counts.cumsum(0) - counts)
        tried.budget_bytes = budget_bytes
        labels, lengths = tried.classes.tolist(), list(map(len, tried.payloads))
        tried.class_names = affordable_names(tried.class_names, labels, budget_bytes)
        lengths += [math.ceil(sum(lengths) / len(lengths))] * max(0, num_classes - len(labels))
        classes = with_unknown(labels, num_classes)
        return tried._size(classes, lengths, tried.names_bytes, tried.label_specs())

    def _specs(self, lengths: Sequence[int]) -> dict[str, TensorSpec]:
        """Return what the file stores beside labels, counts and names."""
        specs = {"images": TensorSpec(torch.uint8, (sum(lengths),))}
        if self.sizes_differ:
            dtype = integer_dtype(0, max(lengths, default=0))
            specs["lengths"] = TensorSpec(dtype, (len(lengths),))
        if header := self.header():
            specs["header"] = TensorSpec(torch.uint8, (len(header),))
        return specs

    def stored(self) -> dict[str, Tensor]:
        """Return what the file stores; see :meth:`Memory.stored`."""
        lengths = list(map(len, self.payloads))
        specs = self._specs(lengths)
        stored = {"images": as_bytes(b"".join(self.payloads))}
        if "lengths" in specs:
            stored["lengths"] = torch.tensor(lengths, dtype=specs["lengths"].dtype)
        if header := self.header():
            stored["header"] = as_bytes(header)
        return stored

    @classmethod
    def _restore(
        cls: type[AnyReal], record: Record, classes: list[int], counts: list[int]
    ) -> AnyReal:
        tensors = record.tensors
        memory = cls._from_words(record.words, tensors)
        if memory.words() != record.words:
            raise MemoryFileError("its words are written in another way than this package does")
        if memory.sizes_differ:
            lengths = tensors["lengths"].long().tolist() if "lengths" in tensors else []
        else:
            lengths = [memory.payload_bytes] * record.num_images
        if len(lengths) != record.num_images or min(lengths, default=1) < 1:
            raise MemoryFileError("its images and their lengths do not fit each other")
        specs = {**class_specs(classes, record.num_images), **memory._specs(lengths)}
        check_tensors(tensors, specs)
        data, ends = tensors["images"].numpy().tobytes(), list(itertools.accumulate(lengths))
        starts = [0, *ends[:-1]]
        payloads = (data[start:end] for start, end in zip(starts, ends, strict=False))
        memory._set(classes, counts, payloads)
        return memory

    def _set(self, classes: list[int], counts: list[int], payloads: Iterable[bytes]) -> None:
        """Take over images, class by class."""
        device = self.classes.device
        index = torch.arange(len(classes)).repeat_interleave(
            torch.tensor(counts, dtype=torch.int64)
        )
        self.classes = torch.tensor(classes, dtype=torch.int64, device=device)
        self.class_index, self._counts = index.to(device), counts
        self.payloads = list(payloads)

    def _by_class(self) -> dict[int, list[_Kept]]:
        found: dict[int, list[_Kept]] = {label: [] for label in self.classes.tolist()}
        for position, label in enumerate(self.labels.tolist()):
            found[label].append(_Kept(label, self.payloads[position], position))
        return found

    def _decode(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        images = self._read([self.payloads[i] for i in indices.tolist()]).to(self.classes.device)
        if images.dtype != torch.uint8 and not self.holds_features:
            raise ConfigError(
                f"{type(self).__name__}._read returns uint8 images, as they were encoded; got "
                f"{images.dtype}"
            )
        return images if dtype == images.dtype else images.float().div_(255)

    def _keep(self, kept: Tensor) -> None:
        self.payloads = [self.payloads[i] for i in kept.tolist()]

    def to(self: AnyReal, device: str | torch.device) -> AnyReal:
        """Let decoded images be on a device; the encoded ones stay in main memory."""
        target = resolve_device(device)
        self.classes, self.class_index = self.classes.to(target), self.class_index.to(target)
        return self

    def bits(self) -> dict[str, float]:
        """Return the bits that each stored tensor takes in the file, by name."""
        specs = self._specs(list(map(len, self.payloads)))
        return {name: 8.0 * spec.num_bytes for name, spec in specs.items()} | self.label_bits()


@register_memory("raw")
class RawMemory(RealMemory):
    """Real images as uint8 pixels; arguments as for :class:`RealMemory`."""

    sizes_differ = False

    def encode(self, images: Tensor) -> list[bytes]:
        """Return the pixels of each image."""
        return [image.numpy().tobytes() for image in images.contiguous()]

    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        if not payloads:
            return torch.empty((0, *self.image_shape), dtype=torch.uint8)
        return as_bytes(b"".join(payloads)).view(-1, *self.image_shape)


@register_memory("subsampled")
class SubsampledMemory(RealMemory):
    """Real images as uint8 pixels of a coarser grid: means over ``factor`` x ``factor`` pixels.

    They are decoded by bilinear interpolation. The simplest of lossy codes, and what a learned or
    transform code has to be better than.

    Args:
        image_shape: As in :class:`RealMemory`.
        factor: How many pixels of an image one of the grid has, along each side: 2 to 8.
        budget: As in :class:`RealMemory`.

    Raises:
        ConfigError: A value outside these ranges.
    """

    sizes_differ = False
    setting_types: ClassVar = {"factor": int}

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        factor: int = 2,
        budget: Budget | int | str | None = None,
    ) -> None:
        super().__init__(image_shape, budget=budget)
        self.factor = as_int(factor) or 0
        if not 2 <= self.factor <= _MAX_FACTOR:
            raise ConfigError(f"factor is a whole number from 2 to {_MAX_FACTOR}; got {factor!r}")

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of what is stored of an image; a border of less than a cell counts as one.

        The cells are then a little smaller than ``factor``, and overlap.
        """
        channels, height, width = self.image_shape
        return channels, math.ceil(height / self.factor), math.ceil(width / self.factor)

    @property
    def payload_bytes(self) -> int:
        """The bytes of every image."""
        return math.prod(self.grid_shape)

    def encode(self, images: Tensor) -> list[bytes]:
        """Return the pixels of each image's grid."""
        # In float64, so that no image's rounding depends on the others in the batch.
        grids = F.adaptive_avg_pool2d(images.double(), self.grid_shape[1:])
        return [grid.numpy().tobytes() for grid in grids.round().to(torch.uint8)]

    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        if not payloads:
            return torch.empty((0, *self.image_shape), dtype=torch.uint8)
        grids = as_bytes(b"".join(payloads)).view(-1, *self.grid_shape)
        images = torch.empty((len(grids), *self.image_shape), dtype=torch.uint8)
        for own, part in zip(
            images.split(_ENCODED_AT_ONCE), grids.split(_ENCODED_AT_ONCE), strict=True
        ):
            wide = F.interpolate(
                part.double(), size=self.image_shape[1:], mode="bilinear", align_corners=False
            )
            own[:] = wide.round().to(torch.uint8)
        return images


@register_memory("jpeg")
class JPEGMemory(RealMemory):
    """Real images as JPEG scans under one header.

    Args:
        image_shape: As in :class:`RealMemory`.
        quality: libjpeg's, 1 (smallest) to 100 (best).
        subsampling: Of chroma: ``"4:2:0"`` or ``"4:4:4"``. Not used for grey images.
        budget: As in :class:`RealMemory`.

    Raises:
        ConfigError: A value outside these ranges.
    """

    setting_types: ClassVar = {"quality": int, "subsampling": str}

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        quality: int,
        subsampling: str = "4:2:0",
        budget: Budget | int | str | None = None,
    ) -> None:
        super().__init__(image_shape, budget=budget)
        self.quality, self.subsampling = as_int(quality) or 0, subsampling
        blank = torch.zeros((1, *self.image_shape), dtype=torch.uint8)
        self._header, _ = encode_jpeg_scans(blank, quality, subsampling=subsampling)

    def encode(self, images: Tensor) -> list[bytes]:
        """Return the entropy-coded scan of each image."""
        header, scans = encode_jpeg_scans(images, self.quality, subsampling=self.subsampling)
        if header != self._header:
            raise ConfigError(
                "this version of the JPEG library writes another header than the one that the "
                "memory was begun with; extend it where it was made"
            )
        return scans

    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        return decode_jpeg_scans(self._header, payloads)

    def header(self) -> bytes:
        """Return the header that the scans share."""
        return self._header

    @classmethod
    def _from_words(cls, words: Sequence[str], tensors: Mapping[str, Tensor]) -> JPEGMemory:
        memory = super()._from_words(words, tensors)
        memory._header = tensors["header"].numpy().tobytes()
        if read_jpeg_shape(memory._header) != memory.image_shape:
            raise MemoryFileError("its JPEG header is that of images of another shape")
        return memory


@register_memory("lossless")
class LosslessMemory(RealMemory):
    """Real images as lossless WebP, less what every such file begins with."""

    def encode(self, images: Tensor) -> list[bytes]:
        """Return the VP8L payload of each image."""
        from PIL import Image

        payloads = []
        for pixels in images.movedim(1, -1).contiguous().numpy():
            file = io.BytesIO()
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            image.convert("RGB").save(file, "WEBP", lossless=True, quality=100, method=6)
            data = file.getvalue()
            size = int.from_bytes(data[16:20], "little")
            assert data[8:16] == b"WEBPVP8L", "a lossless WebP without alpha or metadata"
            payloads.append(data[_WEBP_HEADER_BYTES : _WEBP_HEADER_BYTES + size])
        return payloads

    def recode(self, images: Tensor) -> Tensor:
        """Return images as they are: nothing is lost."""
        return images

    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        from PIL import Image

        channels, height, width = self.image_shape
        images = np.empty((len(payloads), height, width, channels), np.uint8)
        for position, payload in enumerate(payloads):
            chunk = b"VP8L" + len(payload).to_bytes(4, "little") + payload
            chunk += b"\0" * (len(payload) % 2)
            data = b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
            try:
                with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
                    if image.size != (width, height):
                        raise ValueError(f"its size is {image.size}")
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"lossless image {position} cannot be decoded ({error})") from error
            images[position] = pixels[..., :channels]
        return torch.from_numpy(images).movedim(-1, 1).contiguous()


def _comes_back(word: str, value: Any, reads: Callable[[str], Any]) -> bool:
    """Return whether a setting's word is one word, and is read as the setting."""
    try:
        return word.split() == [word] and bool(reads(word) == value)
    except (ValueError, TypeError):
        return False


def _taking_turns(first: Sequence[_Kept], second: Sequence[_Kept]) -> list[_Kept]:
    """Return one of the first, one of the second, and so on, and then what is left of either."""
    pairs = itertools.zip_longest(first, second)
    return [each for pair in pairs for each in pair if each is not None]


def check_order(order: Any, num_images: int) -> Tensor:
    """Return positions of images, int64 on the CPU, or raise :class:`ConfigError`."""
    positions = torch.empty(0)
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        positions = torch.as_tensor(order).cpu()
    fits = positions.dtype == torch.int64 and positions.ndim == 1 and len(positions) > 0
    if not fits or not 0 <= int(positions.min()) <= int(positions.max()) < num_images:
        raise ConfigError(
            f"an order is int64 positions (n,) in [0, {num_images}), one or more; got {order!r}"
        )
    if len(positions.unique()) < len(positions):
        raise ConfigError("an order has each position once at most; this one has some twice")
    return positions


def join_numbers(shape: Sequence[int]) -> str:
    """Return numbers as a word of a file's metadata."""
    return ",".join(map(str, shape))


def split_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that :func:`join_numbers` joined, or raise a ValueError."""
    return tuple(map(int, text.split(",")))
