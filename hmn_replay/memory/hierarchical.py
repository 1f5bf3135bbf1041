"""The hierarchical memory: three tiers of learnable tensors and one decoder.

Zheng et al. 2024, Section 3.1: image i of class c is

    x[c, i] = D(concat(f_c(m_D), m_C[c], m_I[c, i]))

with the dataset memory m_D, the class memories m_C, the instance memories m_I, one feature
extractor f_c a class and one decoder D. Every one of them counts towards the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hmn_replay.memory.base import Container, noise, ones, zeros
from hmn_replay.memory.entropy import MAX_INTEGER, best_levels, bits
from hmn_replay.memory.formats import Stored, max_abs_scale, round_to_format
from hmn_replay.memory.layout import Layout

__all__ = ["HierarchicalMemory"]

# Components are computed from about so many cells of images: those of 512 images of 4 x 4.
_FITTED_FROM = 8192

# Steps of entropy-coded integers: a decoder's in units of its weights' first deviation. The first
# principal component begins with the deviation below: 8 steps.
_INSTANCE_STEP, _SHARED_STEP, _DECODER_STEP = 0.25, 0.0625, 0.35
_CODED_DEVIATION = 2.0
_STEPS = {
    "class_scale": _SHARED_STEP,
    "extractor_scale": _SHARED_STEP,
    "instance_scale": _INSTANCE_STEP,
}

Activation = Callable[[Tensor], Tensor]


class HierarchicalMemory(Container):
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

    layout: Layout
    class_rows = (
        "class_memory",
        "extractor_weight",
        "extractor_bias",
        "class_scale",
        "extractor_scale",
        "instance_scale",
    )
    group_rows = ("instance_memory",)
    private = ("class_memory", "instance_memory")
    dataset_scale: Tensor
    class_scale: Tensor
    instance_scale: Tensor
    extractor_scale: Tensor
    decoder_scale: Tensor

    def _make_shared(self, generator: torch.Generator) -> None:
        layout = self.layout
        self.dataset_memory = noise(generator, 0.5, layout.dataset_channels, *layout.grid)
        self.class_memory = zeros(0, layout.class_channels, *layout.grid)
        self.instance_memory = zeros(0, *layout.instance_shape)
        self.extractor_weight = zeros(0, layout.feature_channels, layout.dataset_channels)
        self.extractor_bias = zeros(0, layout.feature_channels)
        self.decoder_weights = nn.ParameterList(
            noise(generator, math.sqrt(2 / (9 * i)), o, i, 3, 3) for i, o in layout.convolutions
        )
        self.decoder_biases = nn.ParameterList(zeros(o) for _, o in layout.convolutions)
        self.register_buffer("dataset_scale", torch.full((1, 1, 1), _SHARED_STEP))
        self.register_buffer("class_scale", ones(0, 1, 1, 1))
        self.register_buffer("instance_scale", ones(0, layout.instance_channels, 1, 1))
        self.register_buffer("extractor_scale", ones(0, 1, 1))
        steps = [_DECODER_STEP * math.sqrt(2 / (9 * i)) for i, _ in layout.convolutions]
        self.register_buffer("decoder_scale", torch.tensor(steps, dtype=torch.float32))

    def _new_rows(
        self, generator: torch.Generator, counts: Sequence[int], owner: Tensor
    ) -> dict[str, Tensor]:
        layout, num_classes = self.layout, len(counts)
        class_memory = noise(generator, 0.1, num_classes, layout.class_channels, *layout.grid)
        instance_memory = noise(generator, 0.1, sum(counts), *layout.instance_shape)
        shape = (num_classes, layout.feature_channels, layout.dataset_channels)
        extractor_weight = noise(generator, layout.dataset_channels**-0.5, *shape)
        rows = {
            "class_memory": class_memory,
            "instance_memory": instance_memory,
            "extractor_weight": extractor_weight,
            "extractor_bias": zeros(num_classes, layout.feature_channels),
            "class_scale": max_abs_scale(class_memory, ones(num_classes, 1, 1, 1)),
            "extractor_scale": max_abs_scale(extractor_weight, ones(num_classes, 1, 1)),
            "instance_scale": _class_scales(instance_memory, owner, num_classes),
        }
        if layout.is_coded:
            for name, step in _STEPS.items():
                rows[name] = torch.full_like(rows[name], step)
        return rows

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to every tier; see :meth:`Container.forward`."""
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
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Begin instance memories with the principal components of what their cells cover.

        The decoder, which does not know them yet, is for the steps of the warm start to fit. From
        here rather than from noise, 12,461 images of CIFAR-10 came to 21.3 dB instead of 18.4 in
        300 steps; 941 images to 20.4 instead of 19.5 in 100, and to the same 22.9 in 400. Where
        older images have a decoder already (``first_image`` above 0), new instance memories stay as
        they are.
        """
        if first_image:
            return False
        positions = torch.arange(self.num_images)
        height, width = self.layout.grid
        num_sampled = max(1, _FITTED_FROM // (height * width))
        sample = self._cells(real_images(positions[:: max(1, len(positions) // num_sampled)]))
        *_, components = torch.linalg.svd(sample, full_matrices=False)
        components = components[: self.layout.instance_channels]
        scale = (sample @ components.T).square().mean(dim=0).sqrt().clamp_min(1e-6)
        if self.layout.is_coded:
            # One step for all of them: what a component has less of takes fewer bits.
            scale = scale[:1] / _CODED_DEVIATION
        for chunk in positions.split(self.chunk_size):
            codes = self._cells(real_images(chunk)) @ components.T / scale
            codes = rearrange(codes, "(n h w) c -> n c h w", h=height, w=width)
            self.instance_memory[chunk, : codes.shape[1]] = codes.to(self.instance_memory.device)
        return False

    def _cells(self, images: Tensor) -> Tensor:
        """Return the pixels that each cell of the grid covers, ``(B h w, C stride stride)``."""
        stride, (height, width) = self.layout.stride, self.layout.grid
        beyond = (0, width * stride - images.shape[3], 0, height * stride - images.shape[2])
        padded = F.pad(images - 0.5, beyond)
        return rearrange(padded, "n c (h s) (w t) -> (n h w) (c s t)", s=stride, t=stride)

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        on_cpu = indices.device.type == "cpu"
        activations = (_silu_by_image, _sigmoid_by_image) if on_cpu else (F.silu, torch.sigmoid)
        return self._images(indices, *activations)

    def stored(self) -> dict[str, list[Stored]]:
        """Return what the file's tensors hold, by name; see :meth:`Container.stored`."""
        layout = self.layout
        scaled = {
            "dataset": [(self.dataset_memory, self.dataset_scale)],
            "classes": [(self.class_memory, self.class_scale)],
            "instances": [(self.instance_memory, self.instance_scale[self.class_index])],
            "extractors": [(self.extractor_weight, self.extractor_scale)],
            "decoder": list(zip(self.decoder_weights, self.decoder_scale, strict=True)),
        }
        stored = {
            name: [
                Stored(latent, layout.number_format, scale, self._levels(latent, scale, shape))
                for (latent, scale), shape in zip(parts, layout.level_shapes[name], strict=True)
            ]
            for name, parts in scaled.items()
        }
        biases = [self.extractor_bias, *self.decoder_biases]
        stored["biases"] = [Stored(bias, layout.bias_format) for bias in biases]
        return stored

    def _levels(self, latent: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Return the best models for values as they are; None where nothing is coded."""
        if not self.layout.is_coded:
            return None
        sizes = (latent.detach() / scale).round().abs().clamp(max=MAX_INTEGER)
        alike = [axis for axis, size in enumerate(shape) if size == 1]
        means = sizes.mean(dim=alike, keepdim=True) if len(latent) else sizes.new_zeros(shape)
        return best_levels(means)

    @property
    def private_rate(self) -> float:
        """How much faster class and instance memories learn; see :class:`Container`."""
        # Coded ones by a tenth of a step where others learn by a tenth.
        return 10.0 * (_INSTANCE_STEP if self.layout.is_coded else 1.0)

    @property
    def added_rate(self) -> float:
        """How much faster added classes are fitted to a decoder that stays as it is.

        The images of the second ten classes of CIFAR-100 (300 KiB, entropy-coded) came to 25.4 dB
        in place of 24.8 with ``warm_start_steps=2000``, and to 25.5 with 6000, with or without; in
        int8, those at 100 KiB to 21.4 in place of 21.3 with 1000, and to 21.6 with 4000.
        """
        return 3.0

    def rate(self, indices: Tensor, first_class: int = 0) -> tuple[Tensor, Tensor]:
        """Return how many bits the entropy code spends, with gradients to the values it codes.

        The models are those that are best for the values as they are; since they are best, bits
        have no gradient to them.

        Args:
            indices: int64 ``(B,)``, positions of images.
            first_class: The classes before it have no gradient from what images share.

        Returns:
            Two scalars: the mean bits of these images' instance memories, and the bits of all that
            images share, classes' memories and extractors among it.
        """
        parts = self.stored()
        (instances,) = parts.pop("instances")
        own = instances._replace(
            latent=self.instance_memory[indices],
            scale=self.instance_scale[self.class_index[indices]],
        )
        for name in ("classes", "extractors"):
            (rows,) = parts[name]
            old, new = rows.latent[:first_class], rows.latent[first_class:]
            parts[name] = [rows._replace(latent=torch.cat([old.detach(), new]))]
        shared = [part for of_name in parts.values() for part in of_name if part.levels is not None]
        total = torch.stack([_bits(part) for part in shared]).sum()
        return _bits(own) / len(indices), total

    def scales(self) -> list[Tensor]:
        """Return the int8 scales that the file has, in order."""
        return [
            self.dataset_scale,
            self.class_scale,
            self.extractor_scale,
            self.instance_scale,
            self.decoder_scale,
        ]

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return what no sum in the decoder can exceed, by the triangle inequality."""
        dataset = float(self.dataset_memory.abs().max())
        rows = self.extractor_weight.double().abs().sum(dim=2)
        bound = float((rows * dataset + self.extractor_bias.abs()).max())
        for tier in (self.class_memory, self.instance_memory):
            bound = max(bound, float(tier.abs().max())) if len(tier) else bound
        largest = bound
        for weight, bias in zip(self.decoder_weights, self.decoder_biases, strict=True):
            rows = weight.double().abs().sum(dim=(1, 2, 3))
            bound = float((rows * bound + bias.abs()).max())
            largest = max(largest, bound)
        return largest

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


def _bits(part: Stored) -> Tensor:
    assert part.scale is not None and part.levels is not None
    integers = round_to_format(part.latent, part.number_format, part.scale) / part.scale
    return bits(integers, part.levels).sum()


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


def _class_scales(instance_memory: Tensor, class_index: Tensor, num_classes: int) -> Tensor:
    """Return the int8 scales of the instance memories, one for each class and channel."""
    largest = instance_memory.detach().abs().amax(dim=(2, 3), keepdim=True)
    owner = class_index.view(-1, 1, 1, 1).expand_as(largest)
    shape = (num_classes, *largest.shape[1:])
    largest = largest.new_zeros(shape).scatter_reduce_(0, owner, largest, "amax")
    return max_abs_scale(largest, largest)
