"""HaBa: images as every pair of a stored basis image and a hallucinator (a small network).

Liu et al. 2022, arXiv 2210.16774 ("Dataset Distillation via Factorization"). A hallucinator is a
3 x 3 convolution without padding, an element-wise scale and shift, and a transposed 3 x 3
convolution back to the image's size: 5,568 floats for CIFAR.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.budget import Budget
from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import Container, noise, ones, zeros
from hmn_replay.memory.container_layout import ContainerLayout, check_image_shape, first_that_fits
from hmn_replay.memory.filesize import TensorSpec
from hmn_replay.memory.formats import (
    NumberFormat,
    Stored,
    check_number_format,
    max_abs_scale,
    round_to_format,
)
from hmn_replay.memory.pixels import PIXEL_SCALE, to_unit_interval

__all__ = ["HaBa", "HaBaLayout"]

_MAX_HALLUCINATORS = 64
_WEIGHTS = ("encoder_weight", "scale", "shift", "decoder_weight")


@dataclass(frozen=True)
class HaBaLayout(ContainerLayout):
    """Bases and hallucinators; every basis goes through every hallucinator.

    Args:
        image_shape: ``(C, H, W)``; C is 1 or 3, H and W are 8 to 224.
        number_format: ``"float32"``, ``"float16"`` or ``"int8"``.
        num_hallucinators: 1 to 64, the paper's 5 by default.

    Raises:
        ConfigError: A value outside these ranges.
    """

    container = "haba"
    learned = ("bases", "hallucinators", "biases")
    per_image = "bases"

    image_shape: tuple[int, int, int]
    number_format: NumberFormat
    num_hallucinators: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_hallucinators <= _MAX_HALLUCINATORS:
            raise ConfigError(
                f"num_hallucinators is 1 to {_MAX_HALLUCINATORS}; got {self.num_hallucinators!r}"
            )

    @classmethod
    def choose(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
        real_images_per_class: int | None = None,
    ) -> HaBaLayout:
        """Return the layout with 5 hallucinators, or as many as leave room for a basis a class."""
        shape, number_format = check_image_shape(image_shape), check_number_format(number_format)
        layouts = (cls(shape, number_format, count) for count in (5, 4, 3, 2, 1))
        return first_that_fits(layouts, budget, num_classes)

    @property
    def group_size(self) -> int:
        """How many images a basis is decoded to."""
        return self.num_hallucinators

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of a hallucinator's weights: convolution, scale, shift, transposed convolution."""
        channels, height, width = self.image_shape
        inner, kernel = (channels, height - 2, width - 2), (channels, channels, 3, 3)
        return [kernel, inner, inner, kernel]

    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file."""
        count = self.num_hallucinators
        num_weights = sum(map(math.prod, self.weight_shapes))
        specs = {
            **self._labels(num_classes),
            "bases": TensorSpec(self.values_dtype, (num_images // count, *self.image_shape)),
            "hallucinators": TensorSpec(self.values_dtype, (count * num_weights,)),
            "biases": TensorSpec(self.bias_dtype, (count * 2 * self.image_shape[0],)),
        }
        if self.number_format == "int8":
            specs["scales"] = TensorSpec("F32", (len(_WEIGHTS) * count,))
        return specs

    def _words(self) -> tuple[str, ...]:
        return self.container, str(self.num_hallucinators)

    @classmethod
    def _from_words(
        cls, image_shape: tuple[int, int, int], number_format: NumberFormat, words: Sequence[str]
    ) -> HaBaLayout:
        _, num_hallucinators = words
        return cls(image_shape, number_format, int(num_hallucinators))


class HaBa(Container):
    """Bases and hallucinators; arguments as for :class:`~hmn_replay.memory.base.Container`.

    With h hallucinators, image ``h k + j`` is basis k through hallucinator j.

    Attributes:
        bases: float32 ``(N / h, C, H, W)``, brightness less 0.5, in [-0.5, 0.5].
        encoder_weight: float32 ``(h, C, C, 3, 3)``, convolutions without padding.
        encoder_bias: float32 ``(h, C)``.
        scale: float32 ``(h, C, H - 2, W - 2)``.
        shift: float32 ``(h, C, H - 2, W - 2)``.
        decoder_weight: float32 ``(h, C, C, 3, 3)``: output, input; as convolutions with padding 2.
        decoder_bias: float32 ``(h, C)``.
    """

    group_rows = ("bases",)
    private = ("bases",)
    layout: HaBaLayout
    pixel_scale: Tensor

    def _make_shared(self, generator: torch.Generator) -> None:
        layout = self.layout
        count, channels = layout.num_hallucinators, layout.image_shape[0]
        _, inner, _, _ = layout.weight_shapes
        # Each begins near the identity: a convolution that takes the middle, and one back.
        identity = torch.zeros(channels, channels, 3, 3)
        identity[range(channels), range(channels), 1, 1] = 1
        self.bases = zeros(0, *layout.image_shape)
        self.encoder_weight = noise(generator, 0.05, count, *identity.shape)
        self.encoder_bias = zeros(count, channels)
        self.scale = nn.Parameter(ones(count, *inner))
        self.shift = zeros(count, *inner)
        self.decoder_weight = noise(generator, 0.05, count, *identity.shape)
        self.decoder_bias = zeros(count, channels)
        with torch.no_grad():
            self.encoder_weight.add_(identity)
            self.decoder_weight.add_(identity)
        for name in _WEIGHTS:
            self.register_buffer(f"{name}_scale", ones(count))
        self.register_buffer("pixel_scale", PIXEL_SCALE * ones(), persistent=False)

    def _new_rows(
        self, generator: torch.Generator, counts: Sequence[int], owner: Tensor
    ) -> dict[str, Tensor]:
        num_bases = sum(counts) // self.layout.group_size
        return {
            "bases": noise(generator, 0.2, num_bases, *self.layout.image_shape).clamp(-0.5, 0.5)
        }

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to all of it; see :meth:`Container.forward`."""
        layout = self.layout
        which = indices % layout.num_hallucinators
        basis = self.bases[indices // layout.num_hallucinators]
        x = round_to_format(basis, layout.number_format, self.pixel_scale)
        weights = {name: self._rounded(name)[which] for name in _WEIGHTS}
        encoder_bias, decoder_bias = (
            round_to_format(bias, layout.bias_format)[which]
            for bias in (self.encoder_bias, self.decoder_bias)
        )
        x = _convolve(x, weights["encoder_weight"], encoder_bias)
        x = x * weights["scale"] + weights["shift"]
        x = _convolve(F.pad(x, (2, 2, 2, 2)), weights["decoder_weight"], decoder_bias)
        return to_unit_interval(x + 0.5)

    def _rounded(self, name: str) -> Tensor:
        latent: Tensor = getattr(self, name)
        scale: Tensor = getattr(self, f"{name}_scale")
        shaped = scale.view(-1, *[1] * (latent.ndim - 1))
        return round_to_format(latent, self.layout.number_format, shaped)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Begin with the first real image of each group as its basis, as the paper does.

        The steps of the warm start do the rest: hallucinators learn to pick each image of a group
        out of the basis. 150 images of CIFAR-10 (122,880 bytes, int8) came from 11.6 dB to 25.1
        in 400 steps and to 28.3 in 1,500, and a ConvNet-3 of width 32 from 18 % to 29 %.
        """
        size, device = self.layout.group_size, self.bases.device
        for positions in torch.arange(first_image, self.num_images, size).split(self.chunk_size):
            self.bases[(positions // size).to(device)] = real_images(positions).to(device) - 0.5
        return False

    def stored(self) -> dict[str, list[Stored]]:
        """Return what the file's tensors hold, by name; see :meth:`Container.stored`."""
        values, count = self.layout.number_format, self.layout.num_hallucinators
        return {
            "bases": [Stored(self.bases, values, self.pixel_scale)],
            "hallucinators": [
                Stored(getattr(self, name)[j], values, getattr(self, f"{name}_scale")[j])
                for name in _WEIGHTS
                for j in range(count)
            ],
            "biases": [
                Stored(bias, self.layout.bias_format)
                for bias in (self.encoder_bias, self.decoder_bias)
            ],
        }

    def scales(self) -> list[Tensor]:
        """Return the int8 scales that the file has, in order."""
        return [getattr(self, f"{name}_scale") for name in _WEIGHTS]

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Bring bases back to their range, and set the hallucinators' int8 scales."""
        self.bases.clamp_(-0.5, 0.5)
        if first_class or self.layout.number_format != "int8":
            return
        for name in _WEIGHTS:
            latent: Tensor = getattr(self, name)
            scale = max_abs_scale(latent.flatten(1), latent.new_ones(len(latent), 1)).flatten()
            setattr(self, f"{name}_scale", scale)

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return what no sum in a hallucinator can exceed, by the triangle inequality."""
        pixel = self.bases.abs().max() if len(self.bases) else self.bases.new_zeros(())
        encoded = _largest_outputs(self.encoder_weight, self.encoder_bias, pixel.double())
        scaled = self.scale.abs() * encoded.view(-1, 1, 1, 1) + self.shift.abs()
        scaled = scaled.amax(dim=(1, 2, 3))
        decoded = _largest_outputs(self.decoder_weight, self.decoder_bias, scaled)
        return float(torch.cat([pixel.view(1), encoded, scaled, decoded]).max())


def _largest_outputs(weight: Tensor, bias: Tensor, largest_input: Tensor) -> Tensor:
    """Bound each hallucinator's convolution, float64 ``(h,)``, from the size of its input."""
    rows = weight.double().abs().sum(dim=(2, 3, 4))
    return (rows * largest_input.view(-1, 1) + bias.abs()).amax(dim=1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each image with 3 x 3 weights of its own, without padding.

    Tap by tap: the order of a sum, and so its last bit, is the same wherever the image stands.

    Args:
        x: float ``(B, I, H, W)``.
        weight: float ``(B, O, I, 3, 3)``.
        bias: float ``(B, O)``.

    Returns:
        float ``(B, O, H - 2, W - 2)``.
    """
    height, width = x.shape[2] - 2, x.shape[3] - 2
    y = bias[:, :, None, None]
    for i, top, left in itertools.product(range(x.shape[1]), range(3), range(3)):
        window = x[:, i, None, top : top + height, left : left + width]
        y = y + weight[:, :, i, top, left, None, None] * window
    return y
