"""Memories of features: what a frozen network makes of images, in the place of the images.

The tiers are those of :mod:`hmn_replay.memory.hierarchical`, and all maps are linear: the features
of image i of class c, ``(C, H, W)``, are

    x[c, i] = s max(D (m_D + m_C[c] + m_I[c, i]) + f_c + b, t)

with the dataset memory m_D, the class memories m_C and the instance memories m_I of a few code
channels; the decoder D, a matrix from code channels to feature channels that is the same at every
position; the offset f_c of each class and the offset b of all; the scale s; and a bound t, which is
0 for features that are never negative, such as those behind a ReLU. Vectors are maps of one
position.

But for the rounding, fitting it has a closed form: offsets are means, and D has the principal
components of what is left, times the width of the steps with which an instance memory takes what is
planned for it. The steps of the warm start then move all of it together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from hmn_replay.data.features import check_feature_shape
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning
from hmn_replay.memory.base import register_memory
from hmn_replay.memory.entropy import best_levels, bits
from hmn_replay.memory.formats import NUMBER_FORMATS, clamp_inwards
from hmn_replay.memory.labels import NO_LABELS, LabelBytes
from hmn_replay.memory.layout import PRIVATE_RATE, MemoryLayout, StoredTensor
from hmn_replay.memory.learned import LearnedMemory

__all__ = ["FeatureLayout", "FeatureMemory"]

_MAX_CODES = 512
_CODES = (96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
# Bytes planned for an image, if entropy-coded, over the root of its number of values.
_IMAGE_BYTES = 0.5
# Planned for a value of an instance memory: more are worth less than another code channel.
_MAX_CODE_BITS = 1.5
# Principal components are computed from about so many values.
_FITTED_FROM = 2**24
# What features may be, and how far from 0 in units of their deviation.
_LARGEST, _SMALLEST, _MOST_UNITS = 1e15, 1e-15, 5e3
_RIDGE = 1e-3
# Widths of the steps of entropy-coded integers: the decoder's in units of its weights' deviation,
# the others' in that of the features.
_CODE_STEP, _TIER_STEP, _CLASS_STEP, _DECODER_STEP = 0.5, 0.125, 0.0625, 0.5
_NO_BOUND = -1e3
_NUM_HALVINGS = 24
# Finer steps would need finer ones of the decoder, too.
_LEAST_STEP = 0.2
# Beyond it, math.exp overflows.
_MAX_LOG_SCALE = 700.0


@dataclass(frozen=True)
class FeatureLayout(MemoryLayout):
    """The frozen shape of a memory of features, whatever its number of classes and images.

    Args:
        image_shape: ``(C, H, W)`` of the features of an image, 262,144 values at most; H and W are
            1 to 224, and 1 for vectors.
        number_format: A name among :data:`~hmn_replay.memory.formats.NUMBER_FORMATS`.
        code_channels: Channels of the tiers, 1 to 512, and no more than C.
        image_bytes: Bytes planned for the code of an image where values are entropy-coded, 1 or
            more: they decide how many images a budget is filled with. 0 with other formats.

    Raises:
        ConfigError: A value outside these ranges.
    """

    code_channels: int
    image_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(_MAX_CODES, self.image_shape[0])
        if not 1 <= self.code_channels <= most:
            raise ConfigError(f"code_channels is 1 to {most}; got {self.code_channels!r}")
        self._check_image_bytes(self.image_bytes)

    @staticmethod
    def check_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return a shape that features can have, or raise :class:`ConfigError`."""
        return check_feature_shape(image_shape)


@register_memory("features")
class FeatureMemory(LearnedMemory):
    """Features of images in three tiers; arguments as for :class:`LearnedMemory`.

    Attributes:
        dataset_memory: m_D, float32 ``(k, H, W)``, of k code channels.
        class_memory: m_C, float32 ``(K, k, H, W)``.
        instance_memory: m_I, float32 ``(N, k, H, W)``.
        class_offset: f_c, float32 ``(K, C)``.
        decoder: D, float32 ``(C, k)``.
        offset: b, float32 ``(C,)``.
        bound: t, float32 ``(1,)``; far below all features where these may be negative.
        log_scale: The logarithm of s, float32 ``(1,)``.
    """

    holds_features = True
    Layout = FeatureLayout
    default_number_format = "entropy"
    codes_entropy = True
    shared_bits = 5.0
    most_shared = 0.5
    planned_images = 5
    largest_image = 8
    settings: ClassVar[Mapping[str, Any]] = {
        "outer_steps": 0,
        "over_budget": 0.0,
        "pruning": "order",
        "warm_start_batch": 1024,
    }
    layout: FeatureLayout
    dataset_memory: Tensor
    class_memory: Tensor
    instance_memory: Tensor
    class_offset: Tensor
    decoder: Tensor
    offset: Tensor
    bound: Tensor
    log_scale: Tensor

    @classmethod
    def table(cls, layout: FeatureLayout) -> tuple[StoredTensor, ...]:
        """Return what is stored: the three tiers, the decoder and the offsets."""
        channels, height, width = layout.image_shape
        codes = (layout.code_channels, height, width)
        private = PRIVATE_RATE * (_CODE_STEP if layout.is_coded else 1.0)
        deviation = channels**-0.5
        return (
            StoredTensor("dataset_memory", "shared", codes, step=_TIER_STEP, model_axes=(0,)),
            StoredTensor(
                "class_memory",
                "class",
                codes,
                step=_TIER_STEP,
                model_axes=(0,),
                rate=private,
            ),
            StoredTensor(
                "instance_memory",
                "image",
                codes,
                init=0.1,
                scale_axes=(0,),
                step=_CODE_STEP,
                model_axes=(0,),
                rate=private,
            ),
            StoredTensor("class_offset", "class", (channels,), step=_CLASS_STEP),
            StoredTensor(
                "decoder",
                "shared",
                (channels, layout.code_channels),
                init=deviation,
                scale_axes=(1,),
                step=_DECODER_STEP * deviation,
                model_axes=(1,),
            ),
            StoredTensor("offset", "shared", (channels,), is_bias=True),
            StoredTensor("bound", "shared", (1,), _no_bound, is_bias=True, rate=0.0),
            StoredTensor("log_scale", "shared", (1,), is_bias=True, rate=0.0),
        )

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> list[FeatureLayout]:
        """Return layouts of fewer and fewer code channels; the same for every budget."""
        channels, height, width = image_shape
        is_coded = NUMBER_FORMATS[number_format].is_coded
        planned = _IMAGE_BYTES * math.sqrt(math.prod(image_shape))

        def image_bytes(codes: int) -> int:
            most = _MAX_CODE_BITS * codes * height * width / 8
            return max(1, math.ceil(min(planned, most))) if is_coded else 0

        counts = sorted({min(count, channels) for count in _CODES}, reverse=True)
        return [cls.Layout(image_shape, number_format, n, image_bytes(n)) for n in counts]

    @classmethod
    def leaves_room(
        cls,
        layout: FeatureLayout,
        budget_bytes: int,
        num_classes: int,
        num_groups: int,
        label_bytes: LabelBytes = NO_LABELS,
        real_images_per_class: int | None = None,
    ) -> bool:
        """Return whether enough is left for images: it is where all real ones fit."""
        if super().leaves_room(layout, budget_bytes, num_classes, num_groups, label_bytes):
            return True
        if real_images_per_class is None:
            return False
        num_images = real_images_per_class * num_classes
        return cls.file_bytes_of(layout, num_classes, num_images, budget_bytes) <= budget_bytes

    @classmethod
    def image_work(cls, layout: FeatureLayout) -> int:
        """Return how many multiplications decode an image: those of the decoder."""
        return math.prod(layout.image_shape) * layout.code_channels

    @property
    def unit(self) -> Tensor:
        """What errors of features are measured in: their deviation, by all channels together."""
        return self.value("log_scale").detach().exp()[0]

    def forward(self, indices: Tensor) -> Tensor:
        """Decode features, with gradients to every tier; see :meth:`LearnedMemory.forward`."""
        codes, decoder = self._codes(indices), self.value("decoder")
        return self._finish(torch.einsum("bkhw,ck->bchw", codes, decoder), indices)

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        # In a product of matrices the order of a sum, and so its last bit, depends on the place.
        codes, decoder = self._codes(indices), self.value("decoder")
        x = codes.new_zeros(len(indices), *self.image_shape)
        for code, column in zip(codes.unbind(1), decoder.unbind(1), strict=True):
            x += code.unsqueeze(1) * column.view(-1, 1, 1)
        return self._finish(x, indices)

    def _codes(self, indices: Tensor) -> Tensor:
        own = self.value("class_memory", indices) + self.value("instance_memory", indices)
        return self.value("dataset_memory") + own

    def _finish(self, x: Tensor, indices: Tensor) -> Tensor:
        offset = self.value("offset") + self.value("class_offset", indices)
        bounded = clamp_inwards(x + offset[:, :, None, None], self.value("bound"))
        return bounded * self.value("log_scale").exp()

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Set offsets to means, the decoder to principal components, and codes to coordinates.

        Where older images have a decoder (``first_image`` above 0), only the offsets of new classes
        and the codes of their images are set.
        """
        positions = torch.arange(first_image, self.num_images)
        if not first_image:
            self._begin(positions, real_images)
        offsets, counts = self.class_offset, self.class_index.bincount(minlength=self.num_classes)
        first_class = int(self.class_index[first_image]) if len(positions) else 0
        offsets[first_class:] = 0
        scale, is_below = self.unit, False
        for chunk in positions.split(self.chunk_size):
            features = real_images(chunk).to(offsets.device) / scale
            index = self.class_index[chunk.to(offsets.device)]
            rows = (features.mean(dim=(2, 3)) - self.value("offset")) / counts[index].unsqueeze(1)
            offsets.index_add_(0, index, rows)
            is_below = is_below or bool((features < self.value("bound") - 1).any())
        if first_image:
            self._warn_of_another_range(offsets[first_class:], first_class, is_below)
        if not first_image:
            self._fit_decoder(positions, real_images)
        self.set_images(positions, real_images)
        return False

    def _warn_of_another_range(self, offsets: Tensor, first_class: int, is_below: bool) -> None:
        """Warn where added features lie outside of what the first ones have left room for."""
        self.update_scales(first_class)
        stored = self._rounded(self.tensors["class_offset"])[first_class:]
        error = float((offsets - stored).abs().max()) if offsets.numel() else 0.0
        if is_below or error > 1:  # a deviation of the first ones
            warnings.warn(
                "added features have another range than the first ones, for which scale and bound "
                "of the memory were made, and are cut off where they leave it: normalise features, "
                "or let the first classes have the whole range",
                HMNReplayWarning,
                stacklevel=9,
            )

    @torch.no_grad()
    def set_images(self, indices: Tensor, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Set codes to what the decoder makes features of that are nearest to real ones."""
        decoder = self.value("decoder").double()
        squares = decoder.T @ decoder
        squares.diagonal().add_(_RIDGE * float(squares.diagonal().mean()) + 1e-9)
        inverse = torch.linalg.solve(squares, decoder.T)
        for chunk in indices.split(self.chunk_size):
            rest = self._rest(chunk, real_images) - self._shared_part(chunk)
            codes = torch.einsum("kc,bchw->bkhw", inverse, rest.double())
            self.instance_memory[chunk.to(decoder.device)] = codes.float()
        return True

    def _begin(self, positions: Tensor, real_images: Callable[[Tensor], Tensor]) -> None:
        """Set the offset and the scale of all features, and their bound."""
        total, squares, least, most = 0, 0.0, math.inf, -math.inf
        sums = torch.zeros(self.image_shape[0], dtype=torch.float64)
        for chunk in positions.split(self.chunk_size):
            features = real_images(chunk).double()
            sums += features.sum(dim=(0, 2, 3))
            squares += float(features.square().sum())
            total += features[:, 0].numel()
            least, most = min(least, float(features.min())), max(most, float(features.max()))
        if max(-least, most) > _LARGEST:
            raise DataError(
                f"features from {least:.3g} to {most:.3g} are too large to be squared in float32: "
                f"scale them to {_LARGEST:.0e} at most"
            )
        mean = sums / total
        variance = (squares / total - float(mean.square().sum())) / len(mean)
        # A unit is their deviation, or more where they hardly deviate from a large mean.
        smallest = max(float(mean.abs().max()) / _MOST_UNITS, _SMALLEST)
        self.log_scale.fill_(math.log(max(math.sqrt(max(variance, 0.0)), smallest)))
        self.offset.copy_(mean / float(self.unit))
        bound = 0.0 if least >= 0 else (2 * least - most) / float(self.unit)
        self.bound.fill_(max(bound, -_MOST_UNITS))
        for name in ("dataset_memory", "class_memory"):
            self.get_parameter(name).zero_()

    def _rest(self, chunk: Tensor, real_images: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what is left of features, in units of their deviation, without all offsets."""
        indices = chunk.to(self.offset.device)
        features = real_images(chunk).to(self.offset) / self.unit
        offset = self.value("offset") + self.value("class_offset", indices)
        return features - offset[:, :, None, None]

    def _shared_part(self, chunk: Tensor) -> Tensor:
        """Return what features have by the dataset memory and the class memories."""
        indices = chunk.to(self.offset.device)
        codes = self.value("dataset_memory") + self.value("class_memory", indices)
        return torch.einsum("bkhw,ck->bchw", codes, self.value("decoder"))

    def _fit_decoder(self, positions: Tensor, real_images: Callable[[Tensor], Tensor]) -> None:
        """Set the decoder to principal components, times the width of a code's steps."""
        height, width = self.image_shape[1:]
        num_values = len(positions) * math.prod(self.image_shape)
        some = positions[:: max(1, num_values // _FITTED_FROM)]
        rows = torch.cat(
            [
                rearrange(self._rest(chunk, real_images), "n c h w -> (n h w) c").double()
                for chunk in some.split(self.chunk_size)
            ]
        )
        count = self.layout.code_channels
        if len(rows) < rows.shape[1]:
            _, deviations, transposed = torch.linalg.svd(rows, full_matrices=False)
            variances, vectors = deviations[:count].square() / len(rows), transposed[:count].T
        else:
            variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
            variances, vectors = variances.flip(0)[:count], vectors.flip(1)[:, :count]
        if self.layout.is_coded:
            step = self._step(rows @ vectors, 8 * self.layout.image_bytes / (height * width))
            components = vectors * (step / _CODE_STEP)
        else:
            components = vectors * variances.clamp_min(1e-12).sqrt()
        self.decoder.zero_()
        self.decoder[:, : components.shape[1]] = components.to(self.decoder)

    def _step(self, coordinates: Tensor, target: float) -> float:
        """Return the width of the steps with which coordinates take so many bits a position."""
        low, high = _LEAST_STEP, max(2 * _LEAST_STEP, float(coordinates.abs().max()))
        for _ in range(_NUM_HALVINGS):
            middle = math.sqrt(low * high)
            sizes = (coordinates / middle).round().abs().mean(dim=0)
            takes = float(bits(sizes, best_levels(sizes)).sum())
            low, high = (low, middle) if takes <= target else (middle, high)
        return high

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return what no sum in the decoding can exceed, by the triangle inequality."""

        def largest(name: str) -> float:
            values = self.get_parameter(name)
            return float(values.abs().max()) if values.numel() else 0.0

        codes = sum(map(largest, ("dataset_memory", "class_memory", "instance_memory")))
        rows = float(self.decoder.double().abs().sum(dim=1).max())
        total = rows * codes + largest("offset") + largest("class_offset") + largest("bound")
        log_scale = float(self.log_scale.double())
        return math.inf if log_scale > _MAX_LOG_SCALE else total * max(1.0, math.exp(log_scale))


def _no_bound(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    del generator
    return torch.full(shape, _NO_BOUND, dtype=torch.float32)
