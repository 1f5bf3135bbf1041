"""Memories whose images are learned: all that follows from the table of what is stored.

A memory kind declares a table of :class:`~hmn_replay.memory.layout.StoredTensor`. Parameters,
bytes, growth, dropping, scales, bits, learning rates, saving and loading follow from it, so that a
further tier is one more row and what reads it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hmn_replay.budget import Budget, largest
from hmn_replay.data.lookup import num_pixels
from hmn_replay.errors import BudgetError, ConfigError, MemoryFileError, TrainingError
from hmn_replay.memory.base import Memory, check_tensors, class_specs
from hmn_replay.memory.checks import MAX_CLASSES, check_classes, check_counts, check_num_classes
from hmn_replay.memory.entropy import (
    DENSE_LEVEL,
    NUM_LEVELS,
    best_levels,
    bits,
    decode,
    encode,
    least_bits,
    total_bits,
)
from hmn_replay.memory.file import (
    FREE_VALUES,
    MAX_VALUES_PER_BYTE,
    Record,
    TensorSpec,
    as_bytes,
    check_claims,
    packed_size,
)
from hmn_replay.memory.formats import (
    NUMBER_FORMATS,
    NumberFormat,
    max_abs_scale,
    round_to_format,
)
from hmn_replay.memory.labels import NO_LABELS, LabelBytes
from hmn_replay.memory.layout import MemoryLayout, StoredTensor
from hmn_replay.runtime import (
    deterministic_cudnn,
    make_generator,
    resolve_device,
    without_autocast,
)

__all__ = ["AnyLearned", "LearnedMemory"]

_PIXELS_PER_CHUNK = 2**18
_IMAGES_PER_CHUNK = 256
# A trained memory stays below 100.
_MAX_MAGNITUDE = 1e4
# Near the end of float32; what is saved stays so far below that rounding cannot keep it from being
# loaded.
_MAX_SUM_LOADED, _MAX_SUM_SAVED = 1e37, 1e36
# Below that, better images teach less than more of them: less than planned is then spent on each.
_LEAST_IMAGES_PER_CLASS = 5
# A better decoder may take the place of the other images, where a class has few of them.
_SHARE_OF_MOST = 0.95

AnyLearned = TypeVar("AnyLearned", bound="LearnedMemory")


class LearnedMemory(Memory, nn.Module):
    """Labelled images, decoded from learned values.

    The parameters are latent float32 values; :meth:`forward` and :meth:`decode` see them rounded to
    the layout's number format, so that what is decoded now is what the saved file will give back.

    A subclass declares :attr:`Layout`, :meth:`table`, :meth:`layouts` and :meth:`forward`, and is
    registered by :func:`~hmn_replay.memory.base.register_memory`.

    Args:
        layout: Shapes and number format.
        classes: The labels: 1 to 1000 different integers of 64 bits, in any order.
        images_per_class: How many images each class has: one number for all, or one a class; 0 or
            more, and a multiple of ``layout.group_size``.
        budget: Bytes that the saved file may take. Default: None, no bound.
        seed: Seed of the initial values.

    Raises:
        ConfigError: Repeated classes, too many of them, counts that cannot be, or a layout of
            another kind.
        BudgetError: The images do not fit the budget.

    Attributes:
        layout: Shapes and number format.
        tensors: The rows of the table, by name.
    """

    Layout: ClassVar[type[MemoryLayout]] = MemoryLayout
    label_weight: ClassVar[float | None] = 0.5  # learned images teach classes better than real ones
    default_number_format: ClassVar[str] = "int8"
    codes_entropy: ClassVar[bool] = False
    """Whether the kind can be entropy-coded; its layout then has a field ``image_bytes``, the bytes
    planned for an image's code, which is 0 in other number formats."""
    shared_bits: ClassVar[float] = 4.0
    """Bits planned for a value that all images share, or those of a class, if entropy-coded."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of a condensation that the kind has in place of an effort's."""
    # How a layout is chosen; see :meth:`choose_layout`.
    most_shared: ClassVar[float] = 1.0
    """The share of a budget that what all images share may take."""
    planned_images: ClassVar[int] = 1
    """How many images of a class, or groups of them, are to fit beside what all images share."""
    largest_image: ClassVar[int] = 4
    """How many times what is planned for it an image may take."""
    layout: Any

    def __init__(
        self,
        layout: MemoryLayout,
        classes: Sequence[int] | Tensor,
        images_per_class: int | Sequence[int],
        *,
        budget: Budget | int | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layout = self.check_layout(layout)
        self.tensors = {tensor.name: tensor for tensor in self.table(layout)}
        self.report, self.class_names, self._counts = {}, {}, []
        labels = check_classes(classes)
        counts = check_counts(images_per_class, len(labels), layout.group_size)
        self.budget_bytes = None if budget is None else Budget.parse(budget).num_bytes
        generator = make_generator(seed, "memory")
        for name, tensor in self.tensors.items():
            num_rows = None if tensor.rows == "shared" else 0
            setattr(self, name, nn.Parameter(tensor.draw(generator, num_rows)))
            if self._has_scales(tensor):
                scale = torch.ones(tensor.scale_shape(0), dtype=torch.float32)
                self.register_buffer(f"{name}_scale", scale)
        self.register_buffer("classes", torch.empty(0, dtype=torch.int64))
        self.register_buffer("class_index", torch.empty(0, dtype=torch.int64))
        self.add_classes(labels, counts, seed=seed)

    @classmethod
    @abc.abstractmethod
    def table(cls, layout: Any) -> tuple[StoredTensor, ...]:
        """Return what a memory of this layout stores."""

    @classmethod
    @abc.abstractmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> Iterable[Any]:
        """Return the layouts that a budget may be filled with, the preferred one first.

        Args:
            budget_bytes: Bytes of the file.
            image_shape: ``(C, H, W)`` of an image.
            number_format: How values are stored.
        """

    @classmethod
    def choose_layout(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: str | None = None,
        real_images_per_class: int | None = None,
        image_bytes: int | None = None,
        label_bytes: LabelBytes = NO_LABELS,
    ) -> Any:
        """Return the layout for a budget: the first of :meth:`layouts` that leaves enough of it.

        By it, what all images share takes :attr:`most_shared` of the budget at most, and so many
        images fit: :attr:`planned_images` of each class, or 95 % of what the last layout holds
        where that is fewer and the last layout holds 2.5 groups of images a class or more. Where no
        layout does so, it is the last one.
        Images that have no fixed size then take less than it plans where 5 of each class would not
        fit, and up to :attr:`largest_image` times as much where there is room for more images than
        there are real ones.

        Args:
            budget: Bytes of the file.
            image_shape: ``(C, H, W)``.
            num_classes: K, 1 to 1000: how many classes share the budget.
            number_format: How values are stored. Default: :attr:`default_number_format`.
            real_images_per_class: How many real images of a class there are; room for more images
                than that goes to better ones, where the kind can do so. Default: None, not known.
            image_bytes: Bytes planned for the code of an image, 1 or more, where values are
                entropy-coded: more of them for fewer and better images. Default: None, the kind's
                choice.
            label_bytes: What soft labels or a labeller take. Default: hard labels alone.

        Raises:
            BudgetError: The budget does not hold an image of every class, whatever the layout; the
                message gives the smallest budget that does.
            ConfigError: A shape, a number of classes, a number format or ``image_bytes`` outside
                its range.
            DataError: Images of another height or width than a memory can hold.
        """
        shape, num_classes = cls.Layout.check_shape(image_shape), check_num_classes(num_classes)
        limit = Budget.parse(budget).num_bytes
        layouts = cls._layouts(limit, shape, number_format, image_bytes)
        cls.check_layout(layouts[0])

        def room_of(tried: Any) -> int:
            with contextlib.suppress(BudgetError):
                return cls.max_images(tried, limit, num_classes, label_bytes=label_bytes)
            return 0

        planned = cls.planned_images * num_classes
        most_groups = room_of(layouts[-1]) // layouts[-1].group_size
        if 2 * most_groups >= _LEAST_IMAGES_PER_CLASS * num_classes:
            planned = min(planned, int(_SHARE_OF_MOST * most_groups))
        room = (limit, num_classes, planned, label_bytes, real_images_per_class)
        layout = next((one for one in layouts if cls.leaves_room(one, *room)), layouts[-1])

        def num_images(size: int) -> int:
            return room_of(layout.with_images_of(size))

        if layout.image_field is not None:
            size = getattr(layout, layout.image_field)
            if layout.is_coded:
                wanted = _LEAST_IMAGES_PER_CLASS * num_classes
                least = _least_image_bytes(cls.table(layout.with_images_of(1)), wanted)
                size = largest(least, size, lambda tried: num_images(tried) >= wanted)
            if real_images_per_class is not None:
                num_real, most = real_images_per_class * num_classes, cls.largest_image * size
                size = largest(size, most, lambda tried: num_images(tried - 1) > num_real)
            layout = layout.with_images_of(size)
        cls.max_images(layout, limit, num_classes, label_bytes=label_bytes)
        return layout

    @classmethod
    def leaves_room(
        cls,
        layout: Any,
        budget_bytes: int,
        num_classes: int,
        num_groups: int,
        label_bytes: LabelBytes = NO_LABELS,
        real_images_per_class: int | None = None,
    ) -> bool:
        """Return whether a layout leaves room for so many groups; see :meth:`choose_layout`."""
        del real_images_per_class
        num_images = num_groups * layout.group_size
        shared, takes = (
            cls.file_bytes_of(layout, num_classes, count, budget_bytes) for count in (0, num_images)
        )
        takes += label_bytes.of(num_images)
        return bool(shared <= cls.most_shared * budget_bytes and takes <= budget_bytes)

    @classmethod
    def _layouts(
        cls,
        budget_bytes: int,
        image_shape: tuple[int, int, int],
        number_format: str | None,
        image_bytes: int | None,
    ) -> list[Any]:
        """Return :meth:`layouts` with what was asked for; see :meth:`choose_layout`."""
        number_format = number_format or cls.default_number_format
        layouts = list(cls.layouts(budget_bytes, image_shape, number_format))
        if image_bytes is None:
            return layouts
        if not layouts[0].is_coded:
            raise ConfigError(
                f"image_bytes plans the code of an image, which number_format='entropy' has; "
                f"{number_format!r} takes as many bytes for each image: leave image_bytes out"
            )
        return [layout.with_images_of(image_bytes) for layout in layouts]

    @abc.abstractmethod
    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to every learned value.

        Args:
            indices: int64 ``(B,)``, positions of images; repeats are allowed.

        Returns:
            float32 ``(B, C, H, W)`` in [0, 1].
        """

    def largest_sum(self) -> float:
        """Return what no sum in the decoding can exceed, by the triangle inequality.

        Values themselves are at most 10,000. A kind whose decoding multiplies so many of them that
        float32 may not hold the result says here what it comes to. Default: 0, none does.
        """
        return 0.0

    @classmethod
    def image_work(cls, layout: Any) -> int:
        """Return how many multiplications decode an image; 0 where the file's bytes bound them.

        They do where each value that is stored takes a byte or more, and is multiplied once for
        each pixel at most.
        """
        del layout
        return 0

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

    def set_images(self, indices: Tensor, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Set images to what comes near to real ones, as far as the others' decoding allows.

        Nothing changes that other images are decoded from.

        Args:
            indices: int64 ``(B,)``, positions of the images, on the CPU; there are others.
            real_images: As in :meth:`fit`, for these positions.

        Returns:
            Whether the memory's kind can do so; where it cannot, nothing is changed.
        """
        del indices, real_images
        return False

    @property
    def unit(self) -> Tensor | float:
        """What errors of decoded images are measured in: 1, the range of pixels."""
        return 1.0

    # Sizes: what a memory of a layout would take.

    @classmethod
    def check_layout(cls, layout: MemoryLayout) -> Any:
        """Return the layout if it is one of this kind, or raise :class:`ConfigError`."""
        if not isinstance(layout, cls.Layout):
            raise ConfigError(
                f"the layout of memory kind {cls.kind!r} is a {cls.Layout.__name__}; got {layout!r}"
            )
        if layout.is_coded and not cls.codes_entropy:
            plain = [name for name, entry in NUMBER_FORMATS.items() if not entry.is_coded]
            raise ConfigError(
                f"memory kind {cls.kind!r} has one of the number formats {', '.join(plain)}; got "
                f"{layout.number_format!r}"
            )
        return layout

    @classmethod
    def specs(
        cls,
        layout: MemoryLayout,
        classes: int | Sequence[int],
        num_images: int,
        code_bytes: int | None = None,
    ) -> dict[str, TensorSpec]:
        """Return the type and shape of every tensor in the file, class names aside.

        Args:
            layout: Of this kind.
            classes: The labels, or how many classes there are: then labels from 0 on.
            num_images: How many images, a multiple of ``layout.group_size``.
            code_bytes: Size of the code, where values are entropy-coded. Default: as planned.
        """
        labels = list(classes) if isinstance(classes, Sequence) else list(range(classes))
        num_classes, num_rows = len(labels), num_images // layout.group_size
        num_format = layout.format
        values: dict[str, int] = {}
        sizes = {"biases": 0, "values": 0, "scales": 0, "levels": 0}
        for tensor in cls.table(layout):
            count = math.prod(tensor.full_shape(num_classes, num_rows))
            sizes["biases" if tensor.is_bias else "values"] += count
            if tensor.is_bias:
                continue
            values[tensor.rows] = values.get(tensor.rows, 0) + count
            sizes["levels"] += math.prod(tensor.model_shape)
            if num_format.is_integer and tensor.scale is None:
                sizes["scales"] += math.prod(tensor.scale_shape(num_classes))
        specs = class_specs(labels, num_images)
        if sizes["biases"]:
            specs["biases"] = TensorSpec(num_format.of_biases.dtype, (sizes["biases"],))
        if num_format.is_coded:
            if code_bytes is None:
                shared = sum(count for rows, count in values.items() if rows != "image")
                code_bytes = math.ceil(shared * cls.shared_bits / 8)
                code_bytes += cls.planned_image_bytes(layout) * num_images
            specs["levels"] = TensorSpec(torch.uint8, (sizes["levels"],))
            specs["code"] = TensorSpec(torch.uint8, (code_bytes,))
        else:
            specs["values"] = TensorSpec(num_format.dtype, (sizes["values"],))
            if sizes["scales"]:
                specs["scales"] = TensorSpec(torch.float32, (sizes["scales"],))
        return specs

    @classmethod
    def planned_image_bytes(cls, layout: Any) -> int:
        """Return the bytes planned for the code of an image, where values are entropy-coded."""
        return int(layout.image_bytes)

    @classmethod
    def file_bytes_of(
        cls,
        layout: MemoryLayout,
        classes: int | Sequence[int],
        num_images: int,
        budget_bytes: int | None,
        code_bytes: int | None = None,
        names_bytes: int = 0,
        labels: Mapping[str, TensorSpec] | None = None,
    ) -> int:
        """Return the exact size of a memory file, header and all.

        Args:
            layout: As in :meth:`specs`.
            classes: As in :meth:`specs`.
            num_images: As in :meth:`specs`.
            budget_bytes: The budget, which stands in the header.
            code_bytes: As in :meth:`specs`.
            names_bytes: What class names take.
            labels: Soft labels and labeller; see :meth:`Memory.label_specs`. Default: none.
        """
        specs = {**cls.specs(layout, classes, num_images, code_bytes), **(labels or {})}
        if names_bytes:
            specs["names"] = TensorSpec(torch.uint8, (names_bytes,))
        return packed_size(cls.kind, num_images, budget_bytes, layout.words(), specs)

    @classmethod
    def group_bytes(cls, layout: MemoryLayout) -> int:
        """Return the bytes that each further image takes, or each further group of them."""
        size = 100 * layout.group_size
        two, one = (
            sum(spec.num_bytes for spec in cls.specs(layout, 1, count, None).values())
            for count in (2 * size, size)
        )
        return max(1, (two - one) // 100)

    @classmethod
    def max_images(
        cls,
        layout: MemoryLayout,
        budget: Budget | int | str,
        classes: int | Sequence[int],
        names_bytes: int = 0,
        label_bytes: LabelBytes = NO_LABELS,
    ) -> int:
        """Return how many images fit: the largest number within the budget, in whole groups.

        Args:
            layout: As in :meth:`specs`.
            budget: Bytes of the file.
            classes: As in :meth:`specs`.
            names_bytes: What class names take.
            label_bytes: What soft labels or a labeller take. Default: hard labels alone.

        Raises:
            BudgetError: Not even one group of images a class fits; the message gives the smallest
                budget that this layout can do with.
            ConfigError: There are not 1 to 1000 classes, or the layout is not one of this kind.
        """
        cls.check_layout(layout)
        limit = Budget.parse(budget).num_bytes
        classes = list(classes) if isinstance(classes, Sequence) else check_num_classes(classes)
        num_classes = check_num_classes(len(classes) if isinstance(classes, list) else classes)
        size = layout.group_size

        def takes(num_groups: int, budget_bytes: int = limit) -> int:
            num_images = size * num_groups
            return label_bytes.of(num_images) + cls.file_bytes_of(
                layout, classes, num_images, budget_bytes, names_bytes=names_bytes
            )

        smallest = takes(num_classes)
        if smallest > limit:
            # The budget itself stands in the header: one of more digits may take more bytes.
            while (needed := takes(num_classes, smallest)) > smallest:
                smallest = needed
            what = "one image" if size == 1 else f"{size} images, which share stored values,"
            raise BudgetError(
                f"a budget of {limit:,} bytes does not hold {what} of each of {num_classes} "
                f"classes; with this layout the smallest that does is {smallest:,} bytes"
            )
        # The header has more digits now and then, and is padded: the quotient is a start.
        each = cls.group_bytes(layout) + size * label_bytes.each
        num_groups = num_classes + math.floor((limit - smallest) / each)
        while takes(num_groups) > limit:
            num_groups -= 1
        while takes(num_groups + 1) <= limit:
            num_groups += 1
        return size * num_groups

    @classmethod
    def num_floats_of(cls, layout: MemoryLayout, num_classes: int, num_images: int) -> int:
        """Return the number of learned values: the paper's measure of storage."""
        num_rows = num_images // layout.group_size
        shapes = (tensor.full_shape(num_classes, num_rows) for tensor in cls.table(layout))
        return sum(map(math.prod, shapes))

    @property
    def num_floats(self) -> int:
        """The number of learned values: the paper's measure of storage."""
        return self.num_floats_of(self.layout, self.num_classes, self.num_images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a decoded image."""
        shape: tuple[int, int, int] = self.layout.image_shape
        return shape

    @property
    def file_bytes(self) -> int:
        """The exact size of the file that :meth:`save` writes."""
        return self.file_bytes_with(self.num_images, self.code_bytes)

    def file_bytes_with(
        self,
        num_images: int,
        code_bytes: int | None,
        budget_bytes: int | None = None,
        labels: Mapping[str, TensorSpec] | None = None,
    ) -> int:
        """Return the size of the file with another number of images and another size of the code.

        Args:
            num_images: A multiple of ``layout.group_size``.
            code_bytes: Of entropy-coded values; None for what the layout plans.
            budget_bytes: The budget in the header. Default: None, the memory's own.
            labels: Soft labels and labeller; see :meth:`Memory.label_specs`. Default: None, the
                memory's own.
        """
        return self.file_bytes_of(
            self.layout,
            self.classes.tolist(),
            num_images,
            self.budget_bytes if budget_bytes is None else budget_bytes,
            code_bytes,
            self.names_bytes,
            self.label_specs() if labels is None else labels,
        )

    @property
    def images_kept_together(self) -> int:
        """How many images share stored values, and so are kept or dropped together."""
        size: int = self.layout.group_size
        return size

    @property
    def code_bytes(self) -> int | None:
        """The size of the entropy code in the file; None where nothing is coded."""
        return len(encode(self._coded())) if self.layout.is_coded else None

    # Values, as they are stored.

    def value(self, name: str, indices: Tensor | None = None) -> Tensor:
        """Return the values of a stored tensor, rounded, with gradients to its latent values.

        Args:
            name: Of a row of the table.
            indices: int64 ``(B,)``, positions of images: the rows that they are decoded from. Not
                used for what is shared.

        Returns:
            float32, ``(B, *shape)``, or ``shape`` where it is shared.
        """
        tensor = self.tensors[name]
        latent: Tensor = self.get_parameter(name)
        classes = None
        if tensor.rows != "shared":
            assert indices is not None, "which images' rows"
            classes = self.class_index[indices]
            rows = classes if tensor.rows == "class" else indices // self.layout.group_size
            latent = latent[rows]
        return round_to_format(latent, self._format(tensor), self._scale(tensor, classes))

    def _format(self, tensor: StoredTensor) -> NumberFormat:
        """Return the number format of a tensor."""
        own: NumberFormat = self.layout.format
        return own.of_biases if tensor.is_bias else own

    def _has_scales(self, tensor: StoredTensor) -> bool:
        """Return whether int8 scales of a tensor are stored."""
        number_format = self.layout.format
        is_plain = number_format.is_integer and not number_format.is_coded
        return is_plain and not tensor.is_bias and tensor.scale is None

    def _scale(self, tensor: StoredTensor, classes: Tensor | None) -> Tensor | float | None:
        """Return the scale of a tensor, of the rows of some classes unless it is shared."""
        if not self.layout.format.is_integer or tensor.is_bias:
            return None
        if not self._has_scales(tensor):
            return tensor.step if self.layout.is_coded else tensor.scale
        scale = self.get_buffer(f"{tensor.name}_scale")
        return scale if classes is None else scale[classes]

    def _row_classes(self, tensor: StoredTensor) -> Tensor | None:
        """Return the class that each row of a tensor belongs to; None where it is shared."""
        if tensor.rows == "image":
            by_row: Tensor = self.class_index[:: self.layout.group_size]
            return by_row
        if tensor.rows == "class":
            return torch.arange(self.num_classes, device=self.classes.device)
        return None

    @torch.no_grad()
    def _quantised(self, tensor: StoredTensor) -> Tensor:
        """Return what the file stores of a tensor, in its shape."""
        latent = self.get_parameter(tensor.name)
        scale = self._scale(tensor, self._row_classes(tensor))
        return self._format(tensor).quantise(latent, scale)

    def _rounded(self, tensor: StoredTensor) -> Tensor:
        """Return the values that a tensor will be loaded with, in its shape."""
        latent = self.get_parameter(tensor.name)
        scale = self._scale(tensor, self._row_classes(tensor))
        return round_to_format(latent, self._format(tensor), scale)

    def _values(self) -> list[StoredTensor]:
        """Return the tensors that are stored in the number format, in the order of the table."""
        return [tensor for tensor in self.tensors.values() if not tensor.is_bias]

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Set the int8 scales so that no latent value is clipped.

        To be called after latent values change, before what is decoded is used; training does.

        Args:
            first_class: Position of a class. Where it is not 0, nothing changes that the images of
                the classes before it are decoded from.
        """
        for tensor in filter(self._has_scales, self._values()):
            name = f"{tensor.name}_scale"
            if tensor.rows == "shared":
                if not first_class:
                    setattr(self, name, max_abs_scale(self._largest(tensor)))
                continue
            kept = self.get_buffer(name)[:first_class]
            new = max_abs_scale(self._largest(tensor))[first_class:]
            setattr(self, name, torch.cat([kept, new]))

    def _largest(self, tensor: StoredTensor) -> Tensor:
        """Return the largest absolute values of a tensor, of the shape of its scales."""
        latent = self.get_parameter(tensor.name).detach().abs()
        lead = latent.ndim - len(tensor.shape)
        alike = [lead + a for a in range(len(tensor.shape)) if a not in tensor.scale_axes]
        largest = latent.amax(dim=alike, keepdim=True) if alike else latent
        if tensor.rows != "image":
            return largest
        owner = self._row_classes(tensor)
        assert owner is not None
        owner = owner.view(-1, *[1] * len(tensor.shape)).expand_as(largest)
        by_class = largest.new_zeros(tensor.scale_shape(self.num_classes))
        return by_class.scatter_reduce_(0, owner, largest, "amax")

    # Bits, where values are entropy-coded.

    def _levels(self, tensor: StoredTensor, quantised: Tensor) -> Tensor:
        """Return the best entropy models for what the file stores of a tensor."""
        sizes = quantised.abs().float()
        shape = tensor.model_shape
        alike = [axis for axis, size in enumerate(shape) if size == 1]
        if not sizes.numel():
            return best_levels(sizes.new_zeros(shape))
        return best_levels(sizes.mean(dim=alike, keepdim=True) if alike else sizes)

    def _coded(self) -> list[tuple[Tensor, Tensor]]:
        """Return the integers that the file has in its code, int8, and their models, in order."""
        coded = []
        for tensor in self._values():
            stored = self._quantised(tensor)
            coded.append((stored, self._levels(tensor, stored)))
        if sum(own.numel() for own, _ in coded) > FREE_VALUES:
            num_bits = sum(total_bits(own, levels) for own, levels in coded)
            if MAX_VALUES_PER_BYTE * num_bits / 8 < sum(own.numel() for own, _ in coded):
                # Next to nothing but zeros: so many in so few bytes would not be loaded again.
                coded = [(own, levels.clamp_min(DENSE_LEVEL)) for own, levels in coded]
        return coded

    @torch.no_grad()
    def bits(self) -> dict[str, float]:
        """Return the bits that the file has for each stored tensor, by name.

        Of values that are entropy-coded it is the length of their code; what rounds it up to whole
        words, and their models, are not in it.
        """
        found = {}
        for name, tensor in self.tensors.items():
            stored = self._quantised(tensor)
            if self.layout.is_coded and not tensor.is_bias:
                found[name] = total_bits(stored, self._levels(tensor, stored))
            else:
                found[name] = 8.0 * stored.numel() * stored.element_size()
        return found | self.label_bits()

    def rate(self, indices: Tensor, first_class: int = 0) -> tuple[Tensor, Tensor]:
        """Return how many bits the entropy code spends, with gradients to the values it codes.

        The models are those that are best for the values as they are; since they are best, bits
        have no gradient to them.

        Args:
            indices: int64 ``(B,)``, positions of images.
            first_class: The classes before it have no gradient from what images share.

        Returns:
            Two scalars: the mean bits of what these images alone are decoded from, and the bits of
            all that images share, what belongs to classes among it.
        """
        own, shared = self.classes.new_zeros((), dtype=torch.float32), []
        for tensor in self._values():
            latent: Tensor = self.get_parameter(tensor.name)
            if tensor.rows == "image":
                latent = latent[indices // self.layout.group_size]
            elif tensor.rows == "class":
                latent = torch.cat([latent[:first_class].detach(), latent[first_class:]])
            integers = round_to_format(latent, self.layout.format, tensor.step) / tensor.step
            length = bits(integers, self._levels(tensor, self._quantised(tensor))).sum()
            if tensor.rows == "image":
                own = own + length
            else:
                shared.append(length)
        total = torch.stack(shared).sum() if shared else torch.zeros_like(own)
        return own / max(1, len(indices)), total

    # Learning.

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters that are learned, for an optimizer: one group for each rate.

        Each group is a dict with ``"params"`` and ``"factor"``, how many times faster it learns.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, tensor in self.tensors.items():
            parameter = self.get_parameter(name)
            if parameter.requires_grad:
                groups.setdefault(tensor.rate, []).append(parameter)
        return [{"params": params, "factor": rate} for rate, params in sorted(groups.items())]

    def freeze_shared(self) -> None:
        """Let what images of several classes share learn no more."""
        for name, tensor in self.tensors.items():
            if tensor.rows == "shared":
                self.get_parameter(name).requires_grad_(False)

    def rows_of(self, indices: Tensor) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
        """Yield what some images are decoded from: each learned parameter, and which of its rows.

        Args:
            indices: int64 ``(B,)``, positions of images, on the CPU.

        Yields:
            A parameter that requires gradients, and ascending positions of rows, int64 on its
            device, or None for all of it.
        """
        counts = torch.tensor(self._counts)
        rows = {
            "shared": None,
            "class": torch.arange(len(counts)).repeat_interleave(counts)[indices].unique(),
            "image": (indices // self.layout.group_size).unique(),
        }
        for name, tensor in self.tensors.items():
            parameter, own = self.get_parameter(name), rows[tensor.rows]
            if parameter.requires_grad:
                rows_there = None if own is None else own.to(parameter.device, non_blocking=True)
                yield parameter, rows_there

    # Growing and dropping.

    @torch.no_grad()
    def add_classes(
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
            ConfigError: A class is there already or occurs twice, or a count is below 0, or no
                multiple of ``layout.group_size``.
            BudgetError: The longer memory does not fit the budget; nothing is changed.
        """
        new = check_classes(classes)
        size = self.layout.group_size
        counts = check_counts(images_per_class, len(new), size)
        old = self.classes.tolist()
        if repeated := sorted(set(old).intersection(new)):
            raise ConfigError(f"classes {repeated} are in the memory already; add new ones only")
        if len(old) + len(new) > MAX_CLASSES:
            raise ConfigError(
                f"a memory has up to {MAX_CLASSES} classes; got {len(old)} + {len(new)}"
            )
        own = {"_parameters": {**self._parameters}, "_buffers": {**self._buffers}}
        before = {**self.__dict__, **own}
        device = self.classes.device
        generator = make_generator(seed, "classes", len(old))
        owner = torch.arange(len(new)).repeat_interleave(torch.tensor(counts))
        self.classes = torch.cat([self.classes, torch.tensor(new, device=device)])
        self.class_index = torch.cat([self.class_index, (len(old) + owner).to(device)])
        self._counts = [*self._counts, *counts]
        num_old = self.num_images - sum(counts)
        rows = torch.arange(self.num_images)
        columns = [*range(len(old)), *[-1] * len(new)]
        self._rearrange_labels(rows.where(rows < num_old, -1), columns)
        for name, tensor in self.tensors.items():
            if tensor.rows != "shared":
                num_rows = len(new) if tensor.rows == "class" else sum(counts) // size
                rows = tensor.draw(generator, num_rows).to(device)
                self._replace(name, torch.cat([getattr(self, name), rows]))
        self.update_scales(len(old))
        if self.budget_bytes is not None and (needed := self.file_bytes) > self.budget_bytes:
            error = BudgetError(
                f"{self.num_images} images of {self.num_classes} classes take {needed:,} bytes, "
                f"over the budget of {self.budget_bytes:,}; keep fewer images, or raise the budget"
            )
            self.__dict__.update(before)
            raise error

    @torch.no_grad()
    def add_images(self, images_per_class: Sequence[int], *, seed: int = 0) -> Tensor:
        """Add images to classes that are there, each behind those that its class has.

        Everything that the others are decoded from keeps its values.

        Args:
            images_per_class: How many further images each class gets, in the order of the classes.
            seed: Seed of their initial values.

        Returns:
            int64 ``(B,)``, their positions, on the CPU.

        Raises:
            ConfigError: Values have int8 scales, which the others would share; or a count is below
                0, or no multiple of ``layout.group_size``.
        """
        size = self.layout.group_size
        counts = check_counts(images_per_class, self.num_classes, size)
        if self._scale_names():
            raise ConfigError("images are added where none share scales: not where values are int8")
        num_old = self.num_images
        owner = torch.arange(self.num_classes).repeat_interleave(torch.tensor(counts))
        index = torch.cat([self.class_index.cpu(), owner])
        order = index.argsort(stable=True)
        groups = (order[::size] // size).to(self.classes.device)
        generator = make_generator(seed, "images", num_old)
        for name, tensor in self.tensors.items():
            if tensor.rows == "image":
                rows = tensor.draw(generator, sum(counts) // size).to(self.classes.device)
                self._replace(name, torch.cat([getattr(self, name), rows])[groups])
        self.class_index = index[order].to(self.class_index.device)
        self._counts = [have + more for have, more in zip(self._counts, counts, strict=True)]
        self._rearrange_labels(order.where(order < num_old, -1), range(self.num_classes))
        return (order >= num_old).nonzero().flatten()

    def _keep(self, kept: Tensor) -> None:
        size = self.layout.group_size
        groups = kept[::size] // size
        whole = groups.view(-1, 1) * size + torch.arange(size)
        if not whole.flatten().equal(kept):
            raise ConfigError(
                f"{size} images share stored values, and are kept or dropped together; some of "
                "these are without the others"
            )
        groups = groups.to(self.classes.device)
        for name, tensor in self.tensors.items():
            if tensor.rows == "image":
                self._replace(name, getattr(self, name)[groups])

    def _drop_classes(self, stays: Tensor) -> None:
        for name, tensor in self.tensors.items():
            if tensor.rows == "class":
                self._replace(name, getattr(self, name)[stays])
            if tensor.rows != "shared" and self._has_scales(tensor):
                self._replace(f"{name}_scale", getattr(self, f"{name}_scale")[stays])

    def _scale_names(self) -> list[str]:
        return [f"{tensor.name}_scale" for tensor in filter(self._has_scales, self._values())]

    def _replace(self, name: str, values: Tensor) -> None:
        """Give a parameter or buffer other rows; a parameter is trained or frozen as before."""
        old: Tensor = getattr(self, name)
        if isinstance(old, nn.Parameter):
            values = nn.Parameter(values, old.requires_grad)
        setattr(self, name, values)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the memory to a device, as any module; ``"auto"`` is CUDA where there is one."""
        if args[:1] == ("auto",):
            args = (resolve_device(args[0]), *args[1:])
        return nn.Module.to(self, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take over the state of a memory of the same layout, number of classes and of images.

        Soft labels and a labeller, which are no part of it, are dropped.
        """
        result = super().load_state_dict(*args, **kwargs)
        self._counts = self.class_index.bincount(minlength=self.num_classes).tolist()
        # What a network said of the images that were there before.
        self._soft = None
        self.set_labeller(None)
        return result

    # Decoding.

    @property
    def chunk_size(self) -> int:
        """How many images are decoded at once: 256 up to 32 x 32, 5 of 224 x 224."""
        return max(1, min(_PIXELS_PER_CHUNK // num_pixels(self.image_shape), _IMAGES_PER_CHUNK))

    def _decode(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        # Every batch is decoded at the same size, the last one filled up with repeats, so that an
        # image's bits do not depend on the others.
        device, chunk_size = self.classes.device, self.chunk_size
        num_images, num_repeats = len(indices), -len(indices) % chunk_size
        padded = torch.cat([indices, indices[-1:].expand(num_repeats)]).to(device)
        images = torch.empty((num_images, *self.image_shape), dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False), deterministic_cudnn(device):
            for start in range(0, num_images, chunk_size):
                decoded = self._decode_chunk(padded[start : start + chunk_size])
                if not self.holds_features:  # a kind of the user's may leave its range
                    decoded = decoded.clamp(0, 1)
                if dtype == torch.uint8:
                    decoded = (decoded * 255).round()
                images[start : start + chunk_size] = decoded[: num_images - start]
        return images

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        """Decode images like :meth:`forward`, to bits that do not depend on the others."""
        images: Tensor = self(indices)
        return images

    # The file.

    def words(self) -> tuple[str, ...]:
        """Return the layout as words of the file's metadata."""
        words: tuple[str, ...] = self.layout.words()
        return words

    @torch.no_grad()
    def check_values(self) -> None:
        """Raise a TrainingError for values that no file can hold, as after a training diverged."""
        for name, tensor in self.tensors.items():
            # What is loaded is the rounded value; it is to be as good as the latent one.
            if not (_is_bounded(self.get_parameter(name)) and _is_bounded(self._rounded(tensor))):
                raise TrainingError(
                    f"the memory's {name} has values that are not finite or beyond "
                    f"{_MAX_MAGNITUDE:,.0f}: its training diverged; lower the learning rate"
                )
        if not self.largest_sum() <= _MAX_SUM_SAVED:
            raise TrainingError(
                "the memory's values are not finite, or so large that decoding could leave "
                "float32: its training diverged; lower the learning rate"
            )

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return what the file stores: all values one after another, in the order of the table."""
        self.check_values()
        values, biases = self._values(), [t for t in self.tensors.values() if t.is_bias]
        stored: dict[str, Tensor] = {}
        if biases:
            stored["biases"] = _flat([self._quantised(tensor) for tensor in biases])
        if self.layout.is_coded:
            coded = self._coded()
            stored["levels"] = _flat([levels for _, levels in coded])
            stored["code"] = as_bytes(encode(coded))
            try:
                self._check_claims(self.layout, self.num_classes, self.num_images, stored)
            except MemoryFileError as error:
                raise TrainingError(f"the file could not be read again: {error}") from error
            return stored
        stored["values"] = _flat([self._quantised(tensor) for tensor in values])
        if names := self._scale_names():
            stored["scales"] = _flat([self.get_buffer(name) for name in names])
        return stored

    @classmethod
    @torch.no_grad()
    def _restore(
        cls: type[AnyLearned], record: Record, classes: list[int], counts: list[int]
    ) -> AnyLearned:
        layout = cls.check_layout(cls.Layout.from_words(record.words))
        tensors, num_images = record.tensors, record.num_images
        code = tensors.get("code")
        code_bytes = None if code is None else len(code)
        check_tensors(tensors, cls.specs(layout, classes, num_images, code_bytes))
        for name, content in tensors.items():
            if content.is_floating_point() and not _is_bounded(content):
                raise MemoryFileError(f"its {name} are not finite, or far too large")
        counts = check_counts(counts, len(classes), layout.group_size)
        cls._check_claims(layout, len(classes), num_images, tensors)
        if layout.is_coded:
            cls._check_code(layout, len(classes), num_images, tensors)
        # Without images at first: those that it has are not drawn, but read.
        memory = cls(layout, classes, 0)
        memory.class_index = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
        memory._counts = counts
        if "scales" in tensors:
            if float(tensors["scales"].min()) < 1e-9:
                raise MemoryFileError("a scale is not positive")
            buffers = [memory.get_buffer(name) for name in memory._scale_names()]
            scales = _split(tensors["scales"], [buffer.shape for buffer in buffers])
            for buffer, own in zip(buffers, scales, strict=True):
                buffer.copy_(own)
        num_rows = num_images // layout.group_size
        shapes = {t.name: t.full_shape(len(classes), num_rows) for t in cls.table(layout)}
        values = memory._values()
        if layout.is_coded:
            levels = tensors["levels"].split([math.prod(t.model_shape) for t in values])
            shaped = [own.view(t.model_shape) for own, t in zip(levels, values, strict=True)]
            parts = [(shapes[t.name], own) for t, own in zip(values, shaped, strict=True)]
            found = decode(tensors["code"].numpy().tobytes(), parts)
        else:
            found = _split(tensors["values"], [shapes[tensor.name] for tensor in values])
        for tensor, own in zip(values, found, strict=True):
            scale = memory._scale(tensor, memory._row_classes(tensor))
            latent = layout.format.dequantise(own, scale)
            if not _is_bounded(latent):
                raise MemoryFileError(f"its {tensor.name} has values that are far too large")
            memory._replace(tensor.name, latent if layout.format.is_integer else latent.clone())
        biases = [tensor for tensor in memory.tensors.values() if tensor.is_bias]
        parts_of = _split(tensors.get("biases"), [shapes[tensor.name] for tensor in biases])
        for tensor, own in zip(biases, parts_of, strict=True):
            memory._replace(tensor.name, own.float().clone())
        if not memory.largest_sum() <= _MAX_SUM_LOADED:
            raise MemoryFileError("its values are so large that decoding could leave float32")
        return memory

    @classmethod
    def _check_claims(
        cls, layout: MemoryLayout, num_classes: int, num_images: int, tensors: Mapping[str, Tensor]
    ) -> None:
        """Check that tensors are enough bytes for what they are to hold; see the format."""
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        num_values = cls.num_floats_of(layout, num_classes, num_images)
        check_claims(num_bytes, num_images, num_values, cls.image_work(layout))

    @classmethod
    def _check_code(
        cls, layout: MemoryLayout, num_classes: int, num_images: int, tensors: Mapping[str, Tensor]
    ) -> None:
        """Check that a code can hold so many images, before there is room for them."""
        levels = tensors["levels"]
        if len(levels) and int(levels.max()) >= NUM_LEVELS:
            raise MemoryFileError(f"an entropy model has level {NUM_LEVELS} or more")
        values = [tensor for tensor in cls.table(layout) if not tensor.is_bias]
        least = 0.0
        for tensor, own in zip(
            values, levels.split([math.prod(t.model_shape) for t in values]), strict=True
        ):
            shape = tensor.full_shape(num_classes, num_images // layout.group_size)
            least += math.prod(shape) * float(least_bits(own).min())
        if least > 8 * len(tensors["code"]):
            raise MemoryFileError(
                f"its code of {len(tensors['code']):,} bytes is too short for {num_images:,} images"
            )

    def summary(self) -> dict[str, Any]:
        """Return what the memory is, as JSON types; see :meth:`Memory.summary`."""
        layout = dataclasses.asdict(self.layout)
        return {
            **super().summary(),
            "number_format": layout.pop("number_format"),
            "layout": {k: list(v) if isinstance(v, tuple) else v for k, v in layout.items()},
            "num_floats": self.num_floats,
        }

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + f", number_format={self.layout.number_format!r})"


def _flat(parts: Sequence[Tensor]) -> Tensor:
    # Under autocast, torch joins no float16.
    with without_autocast(parts[0].device):
        return torch.cat([part.flatten() for part in parts]).cpu()


def _split(flat: Tensor | None, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Part a row of values into tensors of given shapes."""
    if flat is None:
        return []
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _is_bounded(values: Tensor) -> bool:
    if not values.numel():
        return True
    low, high = map(float, values.aminmax())
    # A comparison with NaN is false, so NaN is not bounded either.
    return low >= -_MAX_MAGNITUDE and high <= _MAX_MAGNITUDE


def _least_image_bytes(table: Iterable[StoredTensor], num_images: int) -> int:
    """Return the fewest bytes that so many entropy-coded images of a table can take each.

    A file of many values has a byte for 64 of them at least.
    """
    values = sum(math.prod(tensor.shape) for tensor in table if tensor.rows == "image")
    if num_images * values <= FREE_VALUES:
        return 1
    return math.ceil(values / MAX_VALUES_PER_BYTE)
