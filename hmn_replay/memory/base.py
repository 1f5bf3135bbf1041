"""What every container of images is: labelled images, decoded on demand from learned values.

The loop, the pruning, the file and the replay know containers by this class alone. The hierarchical
memory is one; the containers that it is compared with are in :mod:`hmn_replay.memory.registry`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from hmn_replay.budget import Budget
from hmn_replay.data.lookup import ImageLookup, Images
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.checks import check_classes, check_counts, check_groups, check_indices
from hmn_replay.memory.container_layout import MAX_CLASSES, ContainerLayout
from hmn_replay.memory.decoded import DecodedDataset
from hmn_replay.memory.entropy import encode
from hmn_replay.memory.formats import Stored, quantise, stored_bits
from hmn_replay.runtime import make_generator

__all__ = ["Container", "noise", "ones", "zeros"]

_PIXELS_PER_CHUNK = 2**18
_IMAGES_PER_CHUNK = 256
# Decoded once where all images take no more than this, such as 87,000 of 32 x 32.
_KEPT_BYTES = 2**30


class Container(nn.Module, abc.ABC):
    """Labelled images, decoded on demand from learned values under a budget of bytes.

    Images stand class by class, in the order of :attr:`classes`. The parameters are latent float32
    values; :meth:`forward` and :meth:`decode` see them rounded to the layout's number format, so
    that what is decoded now is what the saved file will give back.

    Args:
        layout: Shapes and number format.
        classes: The labels: 1 to 1000 different integers of 64 bits, in any order.
        images_per_class: How many images each class has: one number for all, or one a class; 0 or
            more, and a multiple of ``layout.group_size``.
        budget: Bytes that the saved file may take, or None for no bound.
        seed: Seed of the initial values.

    Raises:
        ConfigError: Repeated classes, too many of them, or counts that cannot be.
        BudgetError: The images do not fit the budget.

    Attributes:
        classes: int64 ``(K,)``, the label of each class.
        class_index: int64 ``(N,)``, for each image the position of its class in ``classes``.
        budget_bytes: The budget, or None.
        report: How the container was condensed; see :func:`hmn_replay.condense`. Not in the file.
        class_rows: Names of parameters and buffers with one row a class.
        group_rows: Names of those with one row an image, or a group of ``layout.group_size``.
        private: Names of the parameters that few images share, which learn faster.
    """

    class_rows: ClassVar[tuple[str, ...]] = ()
    group_rows: ClassVar[tuple[str, ...]] = ()
    private: ClassVar[tuple[str, ...]] = ()
    layout: ContainerLayout
    classes: Tensor
    class_index: Tensor

    def __init__(
        self,
        layout: ContainerLayout,
        classes: Sequence[int] | Tensor,
        images_per_class: int | Sequence[int],
        *,
        budget: Budget | int | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.report: dict[str, object] = {}
        # Beside class_index, so that nobody has to ask the device for them.
        self._counts: list[int] = []
        labels = check_classes(classes)
        counts = check_counts(images_per_class, len(labels), layout.group_size)
        self.budget_bytes = None if budget is None else Budget.parse(budget).num_bytes
        self._make_shared(make_generator(seed, "memory"))
        self.register_buffer("classes", torch.empty(0, dtype=torch.int64))
        self.register_buffer("class_index", torch.empty(0, dtype=torch.int64))
        self.extend(labels, counts, seed=seed)

    @abc.abstractmethod
    def _make_shared(self, generator: torch.Generator) -> None:
        """Set what all images share, and the rows of classes and groups without any rows."""

    @abc.abstractmethod
    def _new_rows(
        self, generator: torch.Generator, counts: Sequence[int], owner: Tensor
    ) -> dict[str, Tensor]:
        """Return rows to add to ``class_rows`` and ``group_rows``, by name, on the CPU.

        Args:
            generator: Of their values.
            counts: Images of each new class.
            owner: int64, for each new image the position of its class among the new ones.
        """

    @abc.abstractmethod
    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to every learned value.

        Args:
            indices: int64 ``(B,)``, positions of images; repeats are allowed.

        Returns:
            float32 ``(B, C, H, W)`` in [0, 1].
        """

    @abc.abstractmethod
    def stored(self) -> dict[str, list[Stored]]:
        """Return what the file's tensors hold, by name; several parts stand one after another."""

    def scales(self) -> list[Tensor]:
        """Return the int8 scales that the file has, in order."""
        return []

    @abc.abstractmethod
    def largest_sum(self) -> float:
        """Return what no sum in the decoding can exceed, by the triangle inequality."""

    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Set values so that images come near to real ones, where that has a closed form.

        Args:
            first_image: The images before it stay as they are.
            real_images: From positions, int64 ``(B,)``, ``first_image`` or more, to the wanted
                images, float32 ``(B, C, H, W)`` in [0, 1], on the CPU.

        Returns:
            Whether nothing is left for the steps of the warm start to do.
        """
        del first_image, real_images
        return False

    def update_scales(self, first_class: int = 0) -> None:
        """Bring what is kept beside the latent values, or bounds them, in line with them.

        To be called after latent values change, before what is decoded is used; training does.

        Args:
            first_class: Position of a class. Where it is not 0, nothing changes that the images of
                the classes before it are decoded from.
        """

    @property
    def private_rate(self) -> float:
        """How many times faster than what all images share the :attr:`private` values learn."""
        return 10.0

    @property
    def added_rate(self) -> float:
        """How many times faster a warm start of classes that are added to others learns."""
        return 1.0

    def freeze_shared(self) -> None:
        """Let what images of several classes share learn no more."""
        private = {*self.class_rows, *self.group_rows}
        for name, parameter in self.named_parameters():
            if name not in private:
                parameter.requires_grad_(False)

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        """Decode images like :meth:`forward`, to bits that do not depend on the others."""
        images: Tensor = self(indices)
        return images

    @property
    def num_classes(self) -> int:
        """How many classes the container holds."""
        return len(self.classes)

    @property
    def num_images(self) -> int:
        """How many images the container decodes to."""
        return len(self.class_index)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a decoded image."""
        return self.layout.image_shape

    @property
    def chunk_size(self) -> int:
        """How many images are decoded at once: 256 up to 32 x 32, 5 of 224 x 224."""
        fitting = _PIXELS_PER_CHUNK // math.prod(self.image_shape[1:])
        return max(1, min(fitting, _IMAGES_PER_CHUNK))

    @property
    def labels(self) -> Tensor:
        """int64 ``(N,)``, the label of each image."""
        return self.classes[self.class_index]

    @property
    def images_per_class(self) -> list[int]:
        """How many images each class has, in the order of :attr:`classes`."""
        return list(self._counts)

    @property
    def file_bytes(self) -> int:
        """The exact size of the file that :meth:`save` writes."""
        return self.layout.file_bytes(
            self.num_classes, self.num_images, self.budget_bytes, self.code_bytes
        )

    @property
    def code_bytes(self) -> int | None:
        """The size of the code in that file; None where nothing is entropy-coded."""
        coded = self.coded()
        return len(encode(coded)) if coded else None

    @torch.no_grad()
    def coded(self) -> list[tuple[Tensor, Tensor]]:
        """Return the integers that the file has in its code, int8, and their levels, in order."""
        return [
            (quantise(*part[:3]), part.levels)
            for parts in self.stored().values()
            for part in parts
            if part.levels is not None
        ]

    @torch.no_grad()
    def bits(self) -> dict[str, float]:
        """Return the bits that the file has for each learned tensor, by name.

        Of values that are entropy-coded it is the length of their code; what rounds it up to whole
        words, and their models, are not in it.
        """
        return {name: sum(map(stored_bits, parts)) for name, parts in self.stored().items()}

    @property
    def num_floats(self) -> int:
        """The number of learned values: the paper's measure of storage."""
        return self.layout.num_floats(self.num_classes, self.num_images)

    @torch.no_grad()
    def decode(
        self, indices: Tensor | Sequence[int] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Decode images, a bounded number at a time.

        An image's bits do not depend on which others are decoded with it, nor on its place among
        them, nor on a surrounding ``torch.autocast``: every batch is decoded at the same size, the
        last one filled up with repeats. So one image takes as long as a batch, 256 of 32 x 32: ask
        for all at once.

        Args:
            indices: Positions of the images wanted, ``(B,)``; all where None.
            dtype: ``torch.float32``, or ``torch.uint8`` for images rounded to 0 to 255.

        Returns:
            Images ``(B, C, H, W)``, float32 in [0, 1] or uint8, and their labels, int64 ``(B,)``;
            both on the memory's device.

        Raises:
            ConfigError: A position outside ``0 .. N - 1``, a mask, or another dtype.
        """
        if dtype not in (torch.float32, torch.uint8):
            raise ConfigError(f"dtype is torch.float32 or torch.uint8; got {dtype}")
        device = self.classes.device
        if indices is None:
            indices = torch.arange(self.num_images)
        indices = check_indices(indices, self.num_images)
        chunk_size = self.chunk_size
        num_images, num_repeats = len(indices), -len(indices) % chunk_size
        padded = torch.cat([indices, indices[-1:].expand(num_repeats)]).to(device)
        images = torch.empty((num_images, *self.image_shape), dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, num_images, chunk_size):
                decoded = self._decode_chunk(padded[start : start + chunk_size])
                if dtype == torch.uint8:
                    decoded = (decoded * 255).round()
                images[start : start + chunk_size] = decoded[: num_images - start]
        return images, self.labels[padded[:num_images]]

    def decoded(self, dtype: torch.dtype = torch.float32) -> Images:
        """Return all images: decoded now, or whenever they are asked for if that takes over 1 GiB.

        The bits are the same. Until they have been asked for, the memory is to stay as it is.

        Args:
            dtype: As in :meth:`decode`.
        """

        def fetch(positions: Tensor | None) -> Tensor:
            return self.decode(positions, dtype=dtype)[0]

        shape = (self.num_images, *self.image_shape)
        if math.prod(shape) * dtype.itemsize <= _KEPT_BYTES:
            return fetch(None)
        return ImageLookup(fetch, shape, dtype)

    def as_dataset(
        self,
        transform: Callable[[Tensor], object] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> DecodedDataset:
        """Decode everything once, into a data set of ``(image, label)`` pairs.

        Args:
            transform: Applied to an image ``(C, H, W)`` each time that it is read.
            dtype: As in :meth:`decode`.
        """
        images, labels = self.decode(dtype=dtype)
        return DecodedDataset(images.cpu(), labels.cpu(), transform)

    @torch.no_grad()
    def extend(
        self,
        classes: Sequence[int] | Tensor,
        images_per_class: int | Sequence[int],
        *,
        seed: int = 0,
    ) -> None:
        """Add new classes and their images.

        Everything that old images are decoded from keeps its values.

        Args:
            classes: New labels.
            images_per_class: Images of each new class: one number, or one a class.
            seed: Seed of the new initial values.

        Raises:
            ConfigError: A class is there already or comes twice, or a count is below 0, or not in
                whole groups.
            BudgetError: The longer memory does not fit the budget; nothing is changed.
        """
        new = check_classes(classes)
        counts = check_counts(images_per_class, len(new), self.layout.group_size)
        old = set(self.classes.tolist())
        if repeated := sorted(old.intersection(new)):
            raise ConfigError(
                f"classes {repeated} are in the memory already; extend it with new ones only"
            )
        if len(old) + len(new) > MAX_CLASSES:
            raise ConfigError(
                f"a memory holds up to {MAX_CLASSES} classes; got {len(old)} + {len(new)}"
            )
        self._check_budget(len(old) + len(new), self.num_images + sum(counts))
        device = self.classes.device
        generator = make_generator(seed, "classes", len(old))
        owner = torch.arange(len(new)).repeat_interleave(torch.tensor(counts))
        rows = self._new_rows(generator, counts, owner)
        self.classes = torch.cat([self.classes, torch.tensor(new, device=device)])
        self.class_index = torch.cat([self.class_index, (len(old) + owner).to(device)])
        self._counts.extend(counts)
        for name, values in rows.items():
            self._replace(name, torch.cat([getattr(self, name), values.to(device)]))
        if not old:
            self.update_scales()

    @torch.no_grad()
    def keep(self, indices: Tensor | Sequence[int]) -> None:
        """Drop every image but these; no image that stays changes by one bit.

        Args:
            indices: Positions of the images that stay, each once, in any order; they are kept in
                their present order. A class may lose all of its images; the class stays.
                Images that share stored values (``layout.group_size``) stay or go together.

        Raises:
            ConfigError: A position outside ``0 .. N - 1``, one that comes twice, a mask, or a part
                of a group.
        """
        kept = check_indices(indices, self.num_images).sort().values
        if len(kept.unique()) != len(kept):
            raise ConfigError("each index may come once; some come twice or more")
        groups = check_groups(kept, self.layout.group_size)
        kept, groups = kept.to(self.class_index.device), groups.to(self.class_index.device)
        for name in self.group_rows:
            self._replace(name, getattr(self, name)[groups])
        self.class_index = self.class_index[kept]
        self._counts = self.class_index.bincount(minlength=self.num_classes).tolist()

    @torch.no_grad()
    def remove(self, classes: Sequence[int] | Tensor) -> None:
        """Remove classes and all of their images; no image of another class changes by one bit.

        Args:
            classes: Labels that the memory has, each once. One class at least must stay.

        Raises:
            ConfigError: A label that the memory does not have or that comes twice, or no class
                would stay.
        """
        labels = self.classes.tolist()
        gone = set(check_classes(classes))
        if unknown := sorted(gone.difference(labels)):
            raise ConfigError(f"classes {unknown} are not in the memory; it has {labels[:5]} ...")
        stays = [position for position, label in enumerate(labels) if label not in gone]
        if not stays:
            raise ConfigError("a memory holds 1 class or more; remove all but one at most")
        index = self.class_index.cpu()
        self.keep(torch.isin(index, torch.tensor(stays)).nonzero().flatten())
        rows = torch.tensor(stays, device=self.classes.device)
        self.class_index = torch.searchsorted(rows, self.class_index)
        self._counts = [self._counts[position] for position in stays]
        self.classes = self.classes[rows]
        for name in self.class_rows:
            self._replace(name, getattr(self, name)[rows])

    def save(self, path: str | Path) -> None:
        """Write the memory to a file, all at once or not at all.

        Raises:
            BudgetError: The file would be over the budget; nothing is written.
        """
        from hmn_replay.memory.file import save_memory

        save_memory(self, path)

    def _replace(self, name: str, values: Tensor) -> None:
        """Give a parameter or buffer other rows; a parameter is trained or frozen as before."""
        old: Tensor = getattr(self, name)
        if isinstance(old, nn.Parameter):
            values = nn.Parameter(values, old.requires_grad)
        setattr(self, name, values)

    def _check_budget(self, num_classes: int, num_images: int) -> None:
        needed = self.layout.file_bytes(num_classes, num_images, self.budget_bytes)
        if self.budget_bytes is not None and needed > self.budget_bytes:
            raise BudgetError(
                f"{num_images} images of {num_classes} classes take {needed:,} bytes, over the "
                f"budget of {self.budget_bytes:,}; keep fewer images, or raise the budget"
            )


def noise(generator: torch.Generator, std: float, *shape: int) -> nn.Parameter:
    """Return normal float32 values of a standard deviation, to be learned."""
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    return nn.Parameter(values * std)


def zeros(*shape: int) -> nn.Parameter:
    """Return float32 zeros, to be learned."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def ones(*shape: int) -> Tensor:
    """Return float32 ones, such as scales begin with."""
    return torch.ones(shape, dtype=torch.float32)
