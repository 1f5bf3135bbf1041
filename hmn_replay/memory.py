"""The hierarchical memory: three tiers of learnable tensors and one decoder.

Zheng et al. 2024, Section 3.1: image i of class c is

    x[c, i] = D(concat(f_c(m_D), m_C[c], m_I[c, i]))

with the dataset memory m_D, the class memories m_C, the instance memories m_I, one feature
extractor f_c a class and one decoder D. Every one of them counts towards the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hmn_replay.budget import Budget, as_int
from hmn_replay.decoded import DecodedDataset
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.formats import max_abs_scale, round_to_format
from hmn_replay.layout import MAX_CLASSES, Layout
from hmn_replay.runtime import make_generator

__all__ = ["HierarchicalMemory"]

# Images decoded at once: 256 up to 32 x 32, 5 of 224 x 224.
_PIXELS_PER_CHUNK = 2**18
_IMAGES_PER_CHUNK = 256


Activation = Callable[[Tensor], Tensor]


class HierarchicalMemory(nn.Module):
    """A condensed labelled image set, decoded on demand.

    Instance memories stand class by class, in the order of :attr:`classes`. The parameters are
    latent float32 values; :meth:`forward` and :meth:`decode` see them rounded to the layout's
    number format, so that what is decoded now is what the saved file will give back.

    Args:
        layout: Shapes and number format.
        classes: The labels: 1 to 1000 different integers of 64 bits, in any order.
        images_per_class: Instance memories of each class: one number for all, or one a class; 0 or
            more.
        budget: Bytes that the saved file may take, or None for no bound.
        seed: Seed of the initial values.

    Raises:
        ConfigError: Repeated classes, too many of them, or counts below 0.
        BudgetError: The memory does not fit the budget.

    Attributes:
        dataset_memory: m_D, float32 ``(C_D, h, w)``.
        class_memory: m_C, float32 ``(K, C_C, h, w)``.
        instance_memory: m_I, float32 ``(N, C_I, h, w)``.
        extractor_weight: f_c, float32 ``(K, C_F, C_D)``: a 1 x 1 convolution a class.
        extractor_bias: float32 ``(K, C_F)``.
        decoder_weights: D, 3 x 3 convolutions, each float32 ``(out, in, 3, 3)``.
        decoder_biases: each float32 ``(out,)``.
        classes: int64 ``(K,)``, the label of each class.
        class_index: int64 ``(N,)``, for each image the position of its class in ``classes``.
        budget_bytes: The budget, or None.
        report: How the memory was condensed; see :func:`hmn_replay.condense`. Not in the file.
    """

    classes: Tensor
    class_index: Tensor
    dataset_scale: Tensor
    class_scale: Tensor
    instance_scale: Tensor
    extractor_scale: Tensor
    decoder_scale: Tensor

    def __init__(
        self,
        layout: Layout,
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
        labels = _check_classes(classes)
        counts = _check_counts(images_per_class, len(labels))
        self.budget_bytes = None if budget is None else Budget.parse(budget).num_bytes
        generator = make_generator(seed, "memory")
        self.dataset_memory = _noise(generator, 0.5, layout.dataset_channels, *layout.grid)
        self.class_memory = _zeros(0, layout.class_channels, *layout.grid)
        self.instance_memory = _zeros(0, *layout.instance_shape)
        self.extractor_weight = _zeros(0, layout.feature_channels, layout.dataset_channels)
        self.extractor_bias = _zeros(0, layout.feature_channels)
        self.decoder_weights = nn.ParameterList(
            _noise(generator, math.sqrt(2 / (9 * i)), o, i, 3, 3) for i, o in layout.convolutions
        )
        self.decoder_biases = nn.ParameterList(_zeros(o) for _, o in layout.convolutions)
        self.register_buffer("classes", torch.empty(0, dtype=torch.int64))
        self.register_buffer("class_index", torch.empty(0, dtype=torch.int64))
        self.register_buffer("dataset_scale", _ones(1, 1, 1))
        self.register_buffer("class_scale", _ones(0, 1, 1, 1))
        self.register_buffer("instance_scale", _ones(0, layout.instance_channels, 1, 1))
        self.register_buffer("extractor_scale", _ones(0, 1, 1))
        self.register_buffer("decoder_scale", _ones(len(layout.convolutions)))
        self.extend(labels, counts, seed=seed)

    @property
    def num_classes(self) -> int:
        """How many classes the memory holds."""
        return len(self.classes)

    @property
    def num_images(self) -> int:
        """How many images the memory decodes to."""
        return len(self.instance_memory)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a decoded image."""
        return self.layout.image_shape

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
        return self.layout.file_bytes(self.num_classes, self.num_images, self.budget_bytes)

    @property
    def num_floats(self) -> int:
        """The number of learned values of all tiers, extractors and the decoder (paper's rule)."""
        return self.layout.num_floats(self.num_classes, self.num_images)

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to every tier.

        Args:
            indices: int64 ``(B,)``, positions of images; repeats are allowed.

        Returns:
            float32 ``(B, C, H, W)`` in [0, 1].
        """
        return self._images(indices, F.silu, torch.sigmoid)

    def _images(self, indices: Tensor, silu: Activation, sigmoid: Activation) -> Tensor:
        number_format = self.layout.number_format
        classes = self.class_index[indices]
        dataset = round_to_format(self.dataset_memory, number_format, self.dataset_scale)
        extractors = round_to_format(
            self.extractor_weight[classes], number_format, self.extractor_scale[classes]
        )
        features = torch.einsum("bfd,dhw->bfhw", extractors, dataset)
        bias = round_to_format(self.extractor_bias[classes], self.layout.bias_format)
        features = silu(features + rearrange(bias, "b f -> b f 1 1"))
        class_memory = round_to_format(
            self.class_memory[classes], number_format, self.class_scale[classes]
        )
        instance_memory = round_to_format(
            self.instance_memory[indices], number_format, self.instance_scale[classes]
        )
        x = torch.cat([features, class_memory, instance_memory], dim=1)
        layout = self.layout
        last = len(self.decoder_weights) - 1
        # On a CPU, the backward pass of such narrow convolutions is a third faster channels-last.
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (weight, bias) in enumerate(
            zip(self.decoder_weights, self.decoder_biases, strict=True)
        ):
            weight = round_to_format(weight, layout.number_format, self.decoder_scale[i])
            x = F.conv2d(x, weight, round_to_format(bias, layout.bias_format), padding=1)
            if i < last:
                x = silu(x)
            if i < last - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.pixel_shuffle(x, 2)
        _, height, width = layout.image_shape
        return sigmoid(x[..., :height, :width]).contiguous()

    @torch.no_grad()
    def decode(
        self, indices: Tensor | Sequence[int] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Decode images, a bounded number at a time.

        An image's bits do not depend on which others are decoded with it, nor on its place among
        them, nor on a surrounding ``torch.autocast``: every call of the decoder sees a batch of the
        same size, the last one filled up with repeats, and on a CPU activations are taken image by
        image. So one image takes as long as a batch, 256 of 32 x 32: ask for all at once.

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
        device = self.instance_memory.device
        if indices is None:
            indices = torch.arange(self.num_images)
        indices = _check_indices(indices, self.num_images)
        fitting = _PIXELS_PER_CHUNK // math.prod(self.image_shape[1:])
        chunk_size = max(1, min(fitting, _IMAGES_PER_CHUNK))
        num_images, num_repeats = len(indices), -len(indices) % chunk_size
        padded = torch.cat([indices, indices[-1:].expand(num_repeats)]).to(device)
        images = torch.empty((num_images, *self.image_shape), dtype=dtype, device=device)
        on_cpu = device.type == "cpu"
        activations = (_silu_by_image, _sigmoid_by_image) if on_cpu else (F.silu, torch.sigmoid)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, num_images, chunk_size):
                decoded = self._images(padded[start : start + chunk_size], *activations)
                if dtype == torch.uint8:
                    decoded = (decoded * 255).round()
                images[start : start + chunk_size] = decoded[: num_images - start]
        return images, self.labels[padded[:num_images]]

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
    def update_scales(self, first_class: int = 0) -> None:
        """Set the int8 scales so that no latent value is clipped.

        To be called after latent values change, before what is decoded is used; training does.
        The other number formats have no scales.

        Args:
            first_class: Position of a class. Where it is not 0, the scales of the classes before it
                stay as they are, and so do those that all classes share.
        """
        if self.layout.number_format != "int8":
            return
        if not first_class:
            self.dataset_scale = max_abs_scale(self.dataset_memory, self.dataset_scale)
            weights = [weight.flatten() for weight in self.decoder_weights]
            self.decoder_scale = torch.cat([max_abs_scale(w, w.new_ones(1)) for w in weights])
        new = {
            "class_scale": max_abs_scale(self.class_memory, self.class_scale),
            "extractor_scale": max_abs_scale(self.extractor_weight, self.extractor_scale),
            "instance_scale": _class_scales(
                self.instance_memory, self.class_index, self.num_classes
            ),
        }
        for name, scales in new.items():
            kept: Tensor = getattr(self, name)[:first_class]
            setattr(self, name, torch.cat([kept, scales[first_class:]]))

    @torch.no_grad()
    def extend(
        self,
        classes: Sequence[int] | Tensor,
        images_per_class: int | Sequence[int],
        *,
        seed: int = 0,
    ) -> None:
        """Add new classes: their class memories, extractors and instance memories.

        The dataset memory, the decoder and everything of the classes already there keep their
        values, and so do the images that they decode to.

        Args:
            classes: New labels.
            images_per_class: Instance memories of each new class: one number, or one a class.
            seed: Seed of the new initial values.

        Raises:
            ConfigError: A class is there already or comes twice, or a count is below 0.
            BudgetError: The longer memory does not fit the budget; nothing is changed.
        """
        new = _check_classes(classes)
        counts = _check_counts(images_per_class, len(new))
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
        layout, device = self.layout, self.classes.device
        generator = make_generator(seed, "classes", len(old))
        owner = torch.arange(len(new)).repeat_interleave(torch.tensor(counts))
        self.classes = torch.cat([self.classes, torch.tensor(new, device=device)])
        self.class_index = torch.cat([self.class_index, (len(old) + owner).to(device)])
        self._counts.extend(counts)
        grown = {
            "class_memory": _noise(generator, 0.1, len(new), layout.class_channels, *layout.grid),
            "instance_memory": _noise(generator, 0.1, sum(counts), *layout.instance_shape),
            "extractor_weight": _noise(
                generator,
                layout.dataset_channels**-0.5,
                len(new),
                layout.feature_channels,
                layout.dataset_channels,
            ),
            "extractor_bias": _zeros(len(new), layout.feature_channels),
        }
        for name, values in grown.items():
            self._replace(name, torch.cat([getattr(self, name), values.to(device)]))
        new_scales = {
            "class_scale": max_abs_scale(grown["class_memory"], _ones(len(new), 1, 1, 1)),
            "extractor_scale": max_abs_scale(grown["extractor_weight"], _ones(len(new), 1, 1)),
            "instance_scale": _class_scales(grown["instance_memory"], owner, len(new)),
        }
        for name, scales in new_scales.items():
            setattr(self, name, torch.cat([getattr(self, name), scales.to(device)]))
        if not old:
            self.update_scales()

    @torch.no_grad()
    def keep(self, indices: Tensor | Sequence[int]) -> None:
        """Drop every instance memory but these; no image that stays changes by one bit.

        Args:
            indices: Positions of the images that stay, each once, in any order; they are kept in
                their present order. A class may lose all of its images; its class memory stays.

        Raises:
            ConfigError: A position outside ``0 .. N - 1``, one that comes twice, or a mask.
        """
        kept = _check_indices(indices, self.num_images).sort().values
        if len(kept.unique()) != len(kept):
            raise ConfigError("each index may come once; some come twice or more")
        kept = kept.to(self.class_index.device)
        self._replace("instance_memory", self.instance_memory[kept])
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
        gone = set(_check_classes(classes))
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
        for name in ("class_memory", "extractor_weight", "extractor_bias"):
            self._replace(name, getattr(self, name)[rows])
        for name in ("classes", "class_scale", "extractor_scale", "instance_scale"):
            setattr(self, name, getattr(self, name)[rows])

    def save(self, path: str | Path) -> None:
        """Write the memory to a file, all at once or not at all.

        Raises:
            BudgetError: The file would be over the budget; nothing is written.
        """
        from hmn_replay.storage import save_memory

        save_memory(self, path)

    def _replace(self, name: str, values: Tensor) -> None:
        """Give a parameter other values, of another shape; it is trained or frozen as before."""
        requires_grad = self.get_parameter(name).requires_grad
        setattr(self, name, nn.Parameter(values, requires_grad))

    def _check_budget(self, num_classes: int, num_images: int) -> None:
        needed = self.layout.file_bytes(num_classes, num_images, self.budget_bytes)
        if self.budget_bytes is not None and needed > self.budget_bytes:
            raise BudgetError(
                f"{num_images} images of {num_classes} classes take {needed:,} bytes, over the "
                f"budget of {self.budget_bytes:,}; keep fewer images, or raise the budget"
            )


def _silu_by_image(x: Tensor) -> Tensor:
    # On a CPU, the last values of a tensor, and of a thread's share of it, do not fill a SIMD
    # register; the scalar code that takes them has another exp, to the last bit. Alone, an image
    # has always the same last values.
    for image in x:
        F.silu(image, inplace=True)
    return x


def _sigmoid_by_image(x: Tensor) -> Tensor:
    for image in x:
        image.sigmoid_()
    return x


def _noise(generator: torch.Generator, std: float, *shape: int) -> nn.Parameter:
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    return nn.Parameter(values * std)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32)


def _class_scales(instance_memory: Tensor, class_index: Tensor, num_classes: int) -> Tensor:
    """Return the int8 scales of the instance memories, one for each class and channel."""
    largest = instance_memory.detach().abs().amax(dim=(2, 3), keepdim=True)
    owner = class_index.view(-1, 1, 1, 1).expand_as(largest)
    shape = (num_classes, *largest.shape[1:])
    largest = largest.new_zeros(shape).scatter_reduce_(0, owner, largest, "amax")
    return max_abs_scale(largest, largest)


def _check_classes(classes: Sequence[int] | Tensor) -> list[int]:
    given = classes.tolist() if isinstance(classes, Tensor) else classes
    if not isinstance(given, Iterable):
        raise ConfigError(f"classes are a sequence of integers; got {classes!r}")
    given = list(given)
    values = [v for v in map(as_int, given) if v is not None and -(2**63) <= v < 2**63]
    if len(values) < len(given):
        raise ConfigError(f"classes are integers of 64 bits; got {given[:5]}")
    if not 1 <= len(values) <= MAX_CLASSES:
        raise ConfigError(f"a memory holds 1 to {MAX_CLASSES} classes; got {len(values)}")
    if len(set(values)) != len(values):
        raise ConfigError("classes come once each; some come twice or more")
    return values


def _check_indices(indices: Tensor | Sequence[int], num_images: int) -> Tensor:
    try:
        checked = torch.as_tensor(indices).flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"indices are integers; got {indices!r}") from error
    if not len(checked):
        return checked.long()
    if checked.is_floating_point() or checked.dtype == torch.bool:
        raise ConfigError(f"indices are integers; got {checked.dtype}: pass mask.nonzero()")
    first, last = int(checked.min()), int(checked.max())
    if first < 0 or last >= num_images:
        raise ConfigError(
            f"indices are positions from 0 to {num_images - 1}; got {first} to {last}"
        )
    return checked.long()


def _check_counts(images_per_class: int | Sequence[int], num_classes: int) -> list[int]:
    given: list[object]
    try:
        given = list(images_per_class)  # type: ignore[arg-type]
    except TypeError:  # a number, be it a tensor without axes
        given = [images_per_class] * num_classes
    counts = [count for count in map(as_int, given) if count is not None and count >= 0]
    if not len(counts) == len(given) == num_classes:
        raise ConfigError(
            f"images_per_class is an integer of 0 or more, or {num_classes} of them; "
            f"got {images_per_class!r}"
        )
    return counts
