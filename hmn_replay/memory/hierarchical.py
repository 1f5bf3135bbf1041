"""The hierarchical memory: three tiers of learnable tensors and one decoder.

Zheng et al. 2024, Section 3.1: image i of class c is

    x[c, i] = D(concat(f_c(m_D), m_C[c], m_I[c, i]))

with the dataset memory m_D, the class memories m_C, the instance memories m_I, one feature
extractor f_c a class and one decoder D. Every one of them counts towards the budget.

The paper leaves the shapes open. Here the tiers are grids of latents, each covering ``stride`` x
``stride`` pixels of the image; an extractor is a 1 x 1 convolution of the dataset memory with SiLU;
and the decoder is a stack of 3 x 3 convolutions with SiLU and nearest-neighbour upsampling between
them, whose last one makes 2 x 2 pixels of each cell (pixel shuffle), before a sigmoid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import Codec, register_memory
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.memory.layout import PRIVATE_RATE, MemoryLayout, StoredTensor
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.runtime import without_autocast

__all__ = ["HMNLayout", "HierarchicalMemory"]

_MAX_CHANNELS = 512
_SHRINKS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)

# Components are computed from about so many cells of images: those of 512 images of 4 x 4.
_FITTED_FROM = 8192

# An encoder of added images is computed from so many cells of old ones. It sees, beside a cell, so
# many pixels on each side; its weights are kept small by this share of their features' variance.
_ENCODER_FITTED_FROM = 32_768
_AROUND = 4
_RIDGE = 1e-2

# Of the encoder of any images, which goes after what is left of them so often, by such a share.
_CODEC_RIDGE, _CODEC_STEPS, _CODEC_SHARE = 0.1, 2, 0.5
# Steps of gradient descent for images that are encoded to stay, and its rate at first.
_ENCODED_STEPS, _ENCODED_RATE = 30, 0.02

# Steps of entropy-coded integers: a decoder's in units of its weights' first deviation. The first
# principal component begins with the deviation below: 8 steps.
_INSTANCE_STEP, _DECODER_STEP = 0.25, 0.35
_CODED_DEVIATION = 2.0

Activation = Callable[[Tensor], Tensor]


class _Rule(NamedTuple):
    """What :meth:`HierarchicalMemory.layouts` begins with.

    Attributes:
        cells_below: The grid has fewer cells than that along the smaller side.
        pixels_per_value: Values of an image for one of its instance memory.
        widest: Most channels in the decoder.
        narrowest: Those of its finest convolution but the last.
        image_bytes: Bytes planned for an image, if entropy-coded, over the root of its number of
            values.
    """

    cells_below: int
    pixels_per_value: int
    widest: int
    narrowest: int
    image_bytes: float = 0.0


_RULE = _Rule(8, 32, widest=64, narrowest=16)
_CODED_RULE = _Rule(12, 8, widest=48, narrowest=24, image_bytes=1.73)


@dataclass(frozen=True)
class HMNLayout(MemoryLayout):
    """The frozen shape of a hierarchical memory, whatever its number of classes and images.

    The tiers are grids of ``ceil(H / stride) x ceil(W / stride)``; the decoder doubles the grid
    ``log2(stride)`` times, and what extends beyond the image's right and lower border is cut off.

    Args:
        image_shape: ``(C, H, W)`` of a decoded image; C is 1 or 3, H and W are 8 to 224.
        number_format: A name among :data:`~hmn_replay.memory.formats.NUMBER_FORMATS`.
        stride: Image pixels a grid cell, along each side: 2, 4, 8, 16 or 32.
        dataset_channels: Channels of the dataset memory m_D, 1 to 512.
        feature_channels: Channels that a class's extractor f_c makes of m_D, 1 to 512.
        class_channels: Channels of a class memory m_C, 1 to 512.
        instance_channels: Channels of an instance memory m_I, 1 to 512.
        decoder_channels: Output channels of each of the decoder's convolutions but the last,
            coarsest first: log2(stride) of them, each 1 to 512.
        image_bytes: Bytes planned for the code of an image where values are entropy-coded, 1 or
            more: they decide how many images a budget is filled with. 0 with other formats.

    Raises:
        ConfigError: A value outside these ranges.
    """

    stride: int
    dataset_channels: int
    feature_channels: int
    class_channels: int
    instance_channels: int
    decoder_channels: tuple[int, ...]
    image_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride not in (2, 4, 8, 16, 32):
            raise ConfigError(f"stride is 2, 4, 8, 16 or 32; got {self.stride!r}")
        counts = {
            "dataset_channels": self.dataset_channels,
            "feature_channels": self.feature_channels,
            "class_channels": self.class_channels,
            "instance_channels": self.instance_channels,
            **{f"decoder_channels[{i}]": c for i, c in enumerate(self.decoder_channels)},
        }
        for name, count in counts.items():
            if not 1 <= count <= _MAX_CHANNELS:
                raise ConfigError(f"{name} is 1 to {_MAX_CHANNELS}; got {count!r}")
        if len(self.decoder_channels) != self.num_doublings:
            raise ConfigError(
                f"decoder_channels has one entry a doubling, {self.num_doublings} for stride "
                f"{self.stride}; got {self.decoder_channels!r}"
            )
        self._check_image_bytes(self.image_bytes)

    @property
    def image_field(self) -> str:
        """The name of the field that says how large images are."""
        return "image_bytes" if self.is_coded else "instance_channels"

    @property
    def num_doublings(self) -> int:
        """How many times the decoder doubles the grid: log2(stride)."""
        return self.stride.bit_length() - 1

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of every tier's grid."""
        _, height, width = self.image_shape
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    @property
    def convolutions(self) -> list[tuple[int, int]]:
        """``(input, output)`` channels of the decoder's 3 x 3 convolutions, in order.

        The last one makes four values for each colour of a 2 x 2 block of pixels.
        """
        widths = [
            self.feature_channels + self.class_channels + self.instance_channels,
            *self.decoder_channels,
            4 * self.image_shape[0],
        ]
        return list(itertools.pairwise(widths))


@register_memory("hmn")
class HierarchicalMemory(LearnedMemory):
    """A hierarchical memory network (HMN); arguments as for :class:`LearnedMemory`.

    Attributes:
        dataset_memory: m_D, float32 ``(C_D, h, w)``.
        class_memory: m_C, float32 ``(K, C_C, h, w)``.
        instance_memory: m_I, float32 ``(N, C_I, h, w)``.
        extractor_weight: f_c, float32 ``(K, C_F, C_D)``: a 1 x 1 convolution a class.
        extractor_bias: float32 ``(K, C_F)``.
        decoder_weight_0: D, its first 3 x 3 convolution, float32 ``(out, in, 3, 3)``; and so on.
        decoder_bias_0: float32 ``(out,)``; and so on.
    """

    Layout = HMNLayout
    has_codec = True
    default_number_format = "entropy"
    codes_entropy = True
    most_shared = 0.3
    planned_images = 10
    layout: HMNLayout
    dataset_memory: Tensor
    class_memory: Tensor
    instance_memory: Tensor
    extractor_weight: Tensor
    extractor_bias: Tensor

    @classmethod
    def table(cls, layout: HMNLayout) -> tuple[StoredTensor, ...]:
        """Return what is stored: the three tiers, the extractors and the decoder."""
        private = PRIVATE_RATE * (_INSTANCE_STEP if layout.is_coded else 1.0)
        dataset, features = layout.dataset_channels, layout.feature_channels
        tiers = (
            StoredTensor("dataset_memory", "shared", (dataset, *layout.grid), init=0.5),
            StoredTensor(
                "class_memory",
                "class",
                (layout.class_channels, *layout.grid),
                init=0.1,
                model_axes=(0,),
                rate=private,
            ),
            StoredTensor(
                "instance_memory",
                "image",
                (layout.instance_channels, *layout.grid),
                init=0.1,
                scale_axes=(0,),
                step=_INSTANCE_STEP,
                model_axes=(0, 1, 2),
                rate=private,
            ),
            StoredTensor("extractor_weight", "class", (features, dataset), init=dataset**-0.5),
            StoredTensor("extractor_bias", "class", (features,), is_bias=True),
        )
        deviations = [math.sqrt(2 / (9 * inputs)) for inputs, _ in layout.convolutions]
        weights = (
            StoredTensor(
                f"decoder_weight_{i}",
                "shared",
                (outputs, inputs, 3, 3),
                init=deviations[i],
                step=_DECODER_STEP * deviations[i],
            )
            for i, (inputs, outputs) in enumerate(layout.convolutions)
        )
        biases = (
            StoredTensor(f"decoder_bias_{i}", "shared", (outputs,), is_bias=True)
            for i, (_, outputs) in enumerate(layout.convolutions)
        )
        return (*tiers, *weights, *biases)

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> list[HMNLayout]:
        """Return layouts whose tiers and decoder shrink together; the same for every budget."""
        channels, height, width = image_shape
        is_coded = NUMBER_FORMATS[number_format].is_coded
        rule = _CODED_RULE if is_coded else _RULE
        stride = next((s for s in (2, 4, 8, 16) if min(height, width) / s < rule.cells_below), 32)
        num_doublings = stride.bit_length() - 1
        cells = math.ceil(height / stride) * math.ceil(width / stride)
        num_values = channels * height * width
        instance_channels = max(1, round(num_values / rule.pixels_per_value / cells))
        return [
            cls.Layout(
                image_shape,
                number_format,
                stride,
                dataset_channels=max(1, round(4 * shrink)),
                feature_channels=max(1, round(2 * shrink)),
                class_channels=max(1, round(2 * shrink)),
                instance_channels=max(1, round(instance_channels * min(1, 2 * shrink))),
                decoder_channels=tuple(
                    max(4, round(min(rule.widest, rule.narrowest * 2**level) * shrink))
                    for level in reversed(range(num_doublings))
                ),
                image_bytes=math.ceil(math.sqrt(num_values) * rule.image_bytes),
            )
            for shrink in _SHRINKS
        ]

    @classmethod
    def image_work(cls, layout: HMNLayout) -> int:
        """Return how many multiplications decode an image: those of the convolutions."""
        cells, work = math.prod(layout.grid), 0
        for i, (inputs, outputs) in enumerate(layout.convolutions):
            # The grid is doubled between any two of them, but for the last two.
            doublings = min(i, layout.num_doublings - 1)
            work += 9 * inputs * outputs * cells * 4**doublings
        return work

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to every tier; see :meth:`LearnedMemory.forward`."""
        return self._images(indices, F.silu, torch.sigmoid)

    def _images(self, indices: Tensor, silu: Activation, sigmoid: Activation) -> Tensor:
        extractors = self.value("extractor_weight", indices)
        features = torch.einsum("bfd,dhw->bfhw", extractors, self.value("dataset_memory"))
        bias = self.value("extractor_bias", indices)
        features = silu(features + rearrange(bias, "b f -> b f 1 1"))
        tiers = self.value("class_memory", indices), self.value("instance_memory", indices)
        x = torch.cat([features, *tiers], dim=1)
        # On a CPU, the backward pass of such narrow convolutions is a third faster channels-last.
        x = x.contiguous(memory_format=torch.channels_last)
        last = len(self.layout.convolutions) - 1
        for i in range(last + 1):
            weight, bias = self.value(f"decoder_weight_{i}"), self.value(f"decoder_bias_{i}")
            x = F.conv2d(x, weight, bias, padding=1)
            if i < last:
                x = silu(x)
            if i < last - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.pixel_shuffle(x, 2)
        _, height, width = self.layout.image_shape
        return sigmoid(x[..., :height, :width]).contiguous()

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        on_cpu = indices.device.type == "cpu"
        activations = (_silu_by_image, _sigmoid_by_image) if on_cpu else (F.silu, torch.sigmoid)
        return self._images(indices, *activations)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Begin instance memories with what the pixels around their cells say of them.

        The first images of a memory begin with the principal components of what their cells cover;
        the decoder, which does not know them yet, is for the steps of the warm start to fit. Where
        older images have a decoder (``first_image`` above 0), the linear map that comes nearest to
        undoing it, by least squares over these images, encodes the new ones; new classes begin with
        the mean of the older ones' class memories and extractors.
        """
        if first_image:
            self._encode(first_image, real_images)
        else:
            self._begin(real_images)
        return False

    def _begin(self, real_images: Callable[[Tensor], Tensor]) -> None:
        """Set instance memories to the principal components of what their cells cover."""
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

    def _encode(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> None:
        """Set new instance memories to what a linear map makes of windows around their cells."""
        first_class = int(self.class_index[first_image])
        old_index = self.class_index[:first_image]
        one_each = torch.searchsorted(old_index, old_index.unique())
        for name in ("class_memory", "extractor_weight", "extractor_bias"):
            self.get_parameter(name)[first_class:] = self.value(name, one_each).mean(dim=0)
        encoder = self._encoder(torch.arange(first_image), _RIDGE)
        for chunk in torch.arange(first_image, self.num_images).split(self.chunk_size):
            codes = self._codes(real_images(chunk), encoder)
            self.instance_memory[chunk.to(self.instance_memory.device)] = codes

    def _encoder(self, indices: Tensor, ridge: float) -> Tensor:
        """Return the linear map that undoes the decoder best on some images, ``(F + 1, C)``.

        By ridge regression of their instance memories, as they are stored, on the pixels that they
        decode to.
        """
        device, (height, width) = self.instance_memory.device, self.layout.grid
        num_sampled = max(1, _ENCODER_FITTED_FROM // (height * width))
        old = indices[:: max(1, len(indices) // num_sampled)]
        squares = crosses = torch.zeros((), dtype=torch.float64)
        for chunk in old.split(self.chunk_size):
            windows = self._windows(self.decode(chunk)[0].cpu())
            codes = self.value("instance_memory", chunk.to(device))
            codes = rearrange(codes, "n c h w -> (n h w) c")
            squares = squares + windows.T @ windows
            crosses = crosses + windows.T @ codes.cpu().double()
        squares.diagonal().add_(ridge * float(squares.diagonal().mean()))
        encoder: Tensor = torch.linalg.solve(squares, crosses)
        return encoder

    def _codes(self, images: Tensor, encoder: Tensor) -> Tensor:
        """Return the instance memories that a linear map makes of images, ``(N, C_I, h, w)``."""
        height, width = self.layout.grid
        codes = self._windows(images) @ encoder
        codes = rearrange(codes, "(n h w) c -> n c h w", h=height, w=width)
        own: Tensor = codes.to(self.instance_memory)
        return own

    def _inverted(
        self, wanted: Tensor, encoder: Tensor, decode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return instance memories that decode to about some images, ``(N, C_I, h, w)``.

        Args:
            wanted: float32 ``(N, C, H, W)`` in [0, 1], on the CPU.
            encoder: The linear map; see :meth:`_encoder`.
            decode: From instance memories to images, on the CPU.
        """
        grey = self._codes(torch.full((1, *self.image_shape), 0.5), encoder)
        codes = self._codes(wanted, encoder)
        for _ in range(_CODEC_STEPS):
            left = _CODEC_SHARE * (wanted - decode(codes))
            # Of grey, there is nothing in a window but the one at its end.
            codes = codes + self._codes(0.5 + left, encoder) - grey
        return codes

    @torch.no_grad()
    def set_images(self, indices: Tensor, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Set instance memories by a linear map, as :meth:`codec` does, and improve them.

        By some steps of gradient descent on the squared error, where classes are known and nothing
        else moves.
        """
        others = torch.ones(self.num_images, dtype=torch.bool).index_fill(0, indices, False)
        if not bool(others.any()):
            return False
        encoder = self._encoder(others.nonzero().flatten(), _CODEC_RIDGE)
        for chunk in indices.split(self.chunk_size):
            positions = chunk.to(self.classes.device)

            def decode(codes: Tensor, positions: Tensor = positions) -> Tensor:
                self.instance_memory[positions] = codes
                with without_autocast(codes.device):
                    decoded: Tensor = self(positions)
                return decoded.cpu()

            wanted = real_images(chunk)
            codes = self._inverted(wanted, encoder, decode).requires_grad_()
            rate = _ENCODED_RATE * self.tensors["instance_memory"].rate
            optimizer = torch.optim.Adam([codes], betas=(0.9, 0.99))
            wanted = wanted.to(positions.device)
            for step in range(_ENCODED_STEPS):
                optimizer.param_groups[0]["lr"] = rate * (1 - step / _ENCODED_STEPS)
                self.instance_memory[positions] = codes
                with torch.enable_grad(), without_autocast(positions.device):
                    error = (self(positions) - wanted).square().mean(dim=(1, 2, 3)).sum()
                    (gradient,) = torch.autograd.grad(error, self.instance_memory)
                codes.grad = gradient[positions]
                optimizer.step()
            self.instance_memory[positions] = codes
        return True

    @torch.no_grad()
    def _codec(self) -> Codec:
        """Return a function that encodes any images for the decoder, and decodes them.

        The encoder is a linear map like that which the images of added classes begin with, fitted
        to the images that are there. It is applied to the image, and then to what is left of it
        once decoded. An image's class is not asked for: in place of its own class memory and
        extractor, it has the mean of all, as of what a subclass stores beside.
        """
        encoder = self._encoder(torch.arange(self.num_images), _CODEC_RIDGE)
        one_each = torch.searchsorted(self.class_index, self.class_index.unique())
        shown = type(self)(self.layout, [0], 0).to(self.classes.device)
        for name, tensor in self.tensors.items():
            if tensor.rows == "shared":
                shown._replace(name, self.value(name))
            elif tensor.rows == "class":
                shown._replace(name, self.value(name, one_each).mean(dim=0, keepdim=True))
        everything = torch.arange(self.num_images, device=self.classes.device)
        rest = {
            name: self.value(name, everything).mean(dim=0)
            for name, tensor in self.tensors.items()
            if tensor.rows == "image" and name != "instance_memory"
        }

        def decode(codes: Tensor) -> Tensor:
            shown._replace("instance_memory", codes)
            for name, value in rest.items():
                shown._replace(name, value.expand(len(codes), *value.shape))
            shown.class_index = torch.zeros(len(codes), dtype=torch.int64).to(codes.device)
            shown._counts = [len(codes)]
            shown.update_scales()
            with without_autocast(codes.device):
                decoded: Tensor = shown(torch.arange(len(codes), device=codes.device))
            return decoded.cpu()

        @torch.no_grad()
        def recode(images: Tensor) -> Tensor:
            recoded = []
            for chunk in images.split(self.chunk_size):
                codes = shown._inverted(chunk.float() / 255, encoder, decode)
                recoded.append(decode(codes).mul(255).round().to(torch.uint8))
            return torch.cat(recoded)

        return recode

    def _windows(self, images: Tensor) -> Tensor:
        """Return the pixels in and around each cell, and a one: float64 ``(B h w, F + 1)``."""
        stride, (height, width) = self.layout.stride, self.layout.grid
        around = min(stride, _AROUND)
        beyond = width * stride - images.shape[3], height * stride - images.shape[2]
        padding = (around, around + beyond[0], around, around + beyond[1])
        padded = F.pad(images - 0.5, padding)
        windows = F.unfold(padded, stride + 2 * around, stride=stride)
        rows = rearrange(windows, "n f l -> (n l) f").double()
        return F.pad(rows, (0, 1), value=1.0)

    def _cells(self, images: Tensor) -> Tensor:
        """Return the pixels that each cell of the grid covers, ``(B h w, C stride stride)``."""
        stride, (height, width) = self.layout.stride, self.layout.grid
        beyond = (0, width * stride - images.shape[3], 0, height * stride - images.shape[2])
        padded = F.pad(images - 0.5, beyond)
        return rearrange(padded, "n c (h s) (w t) -> (n h w) (c s t)", s=stride, t=stride)

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return what no sum in the decoder can exceed, by the triangle inequality."""
        dataset = float(self.dataset_memory.abs().max())
        rows = self.extractor_weight.double().abs().sum(dim=2)
        bound = float((rows * dataset + self.extractor_bias.abs()).max()) if len(rows) else 0.0
        for tier in (self.class_memory, self.instance_memory):
            bound = max(bound, *map(abs, map(float, tier.aminmax()))) if len(tier) else bound
        largest = bound
        for i in range(len(self.layout.convolutions)):
            weight = self.get_parameter(f"decoder_weight_{i}")
            rows = weight.double().abs().sum(dim=(1, 2, 3))
            bound = float((rows * bound + self.get_parameter(f"decoder_bias_{i}").abs()).max())
            largest = max(largest, bound)
        return largest


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
