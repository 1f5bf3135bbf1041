"""What a trained network says of a memory's images, stored beside them: a fourth tier.

A *soft label* of an image is a row of small integers, one for each class. The classes that the
image most resembles have a *level* of 1 to 7, in steps of 0.75 of a natural logarithm; all others
have level 0, and the probability 0. The levels of a class's images are like each other: how likely
a level is follows from the mean of those that came before in the class, so that a class's prior
costs no byte and an image's correction few.

A *labeller* is a small ConvNet that labels every image anew as it is augmented, with its weights
entropy-coded like a decoder's.

What the range coder works with comes from integer arithmetic alone, as in
:mod:`hmn_replay.memory.entropy`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.errors import ConfigError, MemoryFileError
from hmn_replay.memory import entropy
from hmn_replay.memory.file import as_bytes, check_claims

__all__ = [
    "LABELS",
    "NO_LABELS",
    "LabelBytes",
    "Labeller",
    "SoftLabels",
    "check_takes_labels",
    "expected_bytes",
]

LABELS = ("hard", "soft", "labeller")
"""What a network may learn from: classes, soft labels in the file, or a labeller in the file."""

_TOP_LEVEL = 7
# Natural logarithms from one level to the next.
_STEP = 0.75
# Of few classes all have a level, of many the most likely ones.
_FEW_CLASSES, _NUM_NAMED = 16, 5
# Each symbol has this probability at least.
_LEAST_BITS = 10
_INCREMENT = 4
# Upper bounds of a mean level, in units of 1/32, that have a model of their own.
_MEAN_UNITS = 32
_MEAN_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224)
_NUM_FIRST = 2  # contexts of a class's first images: of its own class, and of others
# Images are coded in blocks, each by what the blocks before have shown.
_BLOCK_SHARE = 8

_WEIGHT_STEP = 0.35
_MAX_DEPTH, _MAX_WIDTH = 8, 512


class LabelBytes(NamedTuple):
    """About how many bytes soft labels or a labeller take: in any case, and for each image."""

    fixed: int = 0
    each: float = 0.0

    def of(self, num_images: int) -> int:
        """Return the bytes for so many images."""
        return math.ceil(self.fixed + self.each * num_images)


NO_LABELS = LabelBytes()
"""Those of hard labels, which a file has in any case."""


def check_takes_labels(*, holds_features: bool) -> None:
    """Raise a :class:`ConfigError` for a memory of features: these have hard labels alone."""
    if holds_features:
        raise ConfigError(
            "labels are what a network says of augmented images; leave them out for features"
        )


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """The soft labels of a memory's images, class by class.

    A row of zeros is a hard label: the image's class alone.

    Attributes:
        levels: uint8 ``(N, K)`` on the CPU, 0 to 7.
        counts: How many of the images, which stand class by class, each class has.
    """

    levels: Tensor
    counts: tuple[int, ...]

    @classmethod
    def hard(cls, counts: Sequence[int]) -> SoftLabels:
        """Return hard labels of so many images of each class."""
        levels = torch.zeros((sum(counts), len(counts)), dtype=torch.uint8)
        return cls(levels, tuple(counts))

    def replaced(self, positions: Tensor, probabilities: Tensor) -> SoftLabels:
        """Return labels of which some are others.

        Args:
            positions: int64 ``(B,)``, of the images whose labels are replaced.
            probabilities: float ``(B, K)``, 0 or more.
        """
        wanted = probabilities.cpu().double().clamp_min(1e-30)
        nearness = (wanted / wanted.amax(dim=1, keepdim=True)).log() / _STEP
        new = (_TOP_LEVEL + nearness).round().clamp(0, _TOP_LEVEL).to(torch.uint8)
        is_named = torch.zeros_like(new, dtype=torch.bool)
        is_named.scatter_(1, wanted.topk(_num_named(wanted.shape[1]), dim=1).indices, True)
        levels = self.levels.clone()
        levels[positions] = new.masked_fill(~is_named, 0)
        return SoftLabels(levels, self.counts)

    def rearranged(self, rows: Tensor, columns: Sequence[int], counts: Sequence[int]) -> SoftLabels:
        """Return the labels of other images and classes.

        Args:
            rows: int64 ``(M,)``, the position that each image had; -1 for a new one, which gets a
                hard label.
            columns: The position that each class had; -1 for a new one.
            counts: How many images each class has.
        """
        picked = torch.tensor(columns, dtype=torch.int64)
        levels = F.pad(self.levels, (0, 1, 0, 1))[rows][:, picked]
        return SoftLabels(levels, tuple(counts))

    @torch.no_grad()
    def probabilities(self, positions: Tensor | None = None) -> Tensor:
        """Return the probabilities of the classes, float32 ``(B, K)``, rows that sum to one.

        Args:
            positions: int64 ``(B,)`` on the CPU. Default: all images.
        """
        counts = torch.tensor(self.counts, dtype=torch.int64)
        index, levels = torch.arange(len(counts)).repeat_interleave(counts), self.levels
        if positions is not None:
            index, levels = index[positions], levels[positions]
        weights = (_STEP * (levels.double() - _TOP_LEVEL)).exp() * (levels > 0)
        own = F.one_hot(index, len(counts)).double()
        weights = torch.where((levels == 0).all(dim=1, keepdim=True), own, weights)
        return (weights / weights.sum(dim=1, keepdim=True)).float()

    @property
    def is_soft(self) -> Tensor:
        """Bool ``(N,)``: which images have more than a hard label."""
        return (self.levels > 0).any(dim=1)

    @functools.cached_property
    def code(self) -> bytes:
        """The labels as the file has them, without counts: a multiple of 4 bytes."""
        writer = entropy.Writer()
        _Coder(self.counts).run(writer, self.levels.numpy().copy())
        return writer.data

    def stored(self) -> dict[str, Tensor]:
        """Return what the file stores, name to tensor; :meth:`restored` reads it."""
        return {"label_code": as_bytes(self.code)}

    def check_claims(self, num_bytes: int) -> None:
        """Raise a MemoryFileError where :meth:`restored` would refuse a file of so many bytes."""
        check_claims(num_bytes, len(self.levels), self.levels.numel())

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], counts: Sequence[int], num_bytes: int
    ) -> SoftLabels | None:
        """Return the labels of a file; None where it has none.

        Args:
            tensors: What the file stores.
            counts: How many images each class has.
            num_bytes: Bytes of all its tensors, which bound how much it may claim.

        Raises:
            MemoryFileError: These are no labels of so many images.
        """
        code = tensors.get("label_code")
        if code is None:
            return None
        num_images, num_classes = sum(counts), len(counts)
        if code.dtype != torch.uint8 or code.ndim != 1:
            raise MemoryFileError("its code of labels is not a row of bytes")
        check_claims(num_bytes, num_images, num_images * num_classes)
        reader = entropy.Reader(code.numpy().tobytes(), "code of labels")
        levels = np.zeros((num_images, num_classes), np.uint8)
        _Coder(counts).run(reader, levels)
        reader.finish()
        return cls(torch.from_numpy(levels), tuple(counts))


def expected_bytes(num_classes: int) -> float:
    """Return about how many bytes a soft label takes, to plan with before there are any."""
    if num_classes <= _FEW_CLASSES:
        return 2.6 * num_classes / 8
    return (8 + 1.3 * math.log2(math.comb(num_classes, _NUM_NAMED))) / 8


def _num_named(num_classes: int) -> int:
    return num_classes if num_classes <= _FEW_CLASSES else _NUM_NAMED


class _Coder:
    """Walks through labels in the order of the code, with a model for what comes next.

    Args:
        counts: How many images each class has.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = np.asarray(counts, np.int64)
        num_classes = len(self.counts)
        self.seen = np.ones((_NUM_FIRST + len(_MEAN_BOUNDS), _TOP_LEVEL + 1), np.int64)
        # Where few of many classes are named, most levels are 0 before any was seen.
        if (num_others := num_classes - _num_named(num_classes)) > 0:
            self.seen[:, 0] = _TOP_LEVEL * num_others // _NUM_NAMED

    def run(self, message: entropy.Writer | entropy.Reader, levels: npt.NDArray[np.uint8]) -> None:
        """Write all labels into a message, or read them from one.

        Args:
            message: The message.
            levels: ``(N, K)``, filled in with what is read.
        """
        starts = np.concatenate([[0], self.counts.cumsum()[:-1]])
        # All is of the smallest type that holds it: a file of few bytes may have K * K values here.
        most = _MEAN_UNITS * _TOP_LEVEL * int(self.counts.max(initial=0))
        sums = np.zeros((len(self.counts),) * 2, np.min_scalar_type(most))
        for first, last in _blocks(int(self.counts.max(initial=0))):
            classes = np.flatnonzero(self.counts > first)
            sizes = np.minimum(self.counts[classes], last) - first
            owners = classes.repeat(sizes)
            offsets = np.arange(len(owners)) - (sizes.cumsum() - sizes).repeat(sizes)
            rows = starts[owners] + first + offsets
            # Of a class that has images here, all those before this block have been coded.
            contexts = self._contexts(sums, classes, first).repeat(sizes, axis=0)
            given = levels[rows]
            found = np.zeros(contexts.shape, np.uint8)
            for context in np.unique(contexts):
                chosen = contexts == context
                found[chosen] = self._code(message, given[chosen], self.seen[context])
            levels[rows] = found
            np.add.at(sums, owners, found)

    @staticmethod
    def _contexts(
        sums: npt.NDArray[Any], classes: npt.NDArray[np.int64], first: int
    ) -> npt.NDArray[np.uint8]:
        """Return which model codes the next levels of some classes: uint8 ``(len(classes), K)``.

        Args:
            sums: ``(K, K)``, the levels of the images that were coded, added up by class.
            classes: The classes.
            first: How many images of each of these were coded.
        """
        if not first:
            return np.eye(len(sums), dtype=np.uint8)[classes]
        means = sums[classes]
        means *= _MEAN_UNITS
        means //= first
        contexts = np.full(means.shape, _NUM_FIRST, np.uint8)
        for bound in _MEAN_BOUNDS:
            contexts += means > bound
        return contexts

    @staticmethod
    def _code(
        message: entropy.Writer | entropy.Reader,
        symbols: npt.NDArray[np.uint8],
        seen: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint8]:
        """Code symbols by how often each was seen, and count them."""
        size, one = len(seen), 1 << entropy.PROBABILITY_BITS
        least = one >> _LEAST_BITS
        counts = least + seen * (one - size * least) // seen.sum()
        counts[seen.argmax()] += one - counts.sum()
        found = message.code(symbols, entropy.categorical(counts)).astype(np.uint8)
        # np.bincount would make them integers of 64 bits.
        seen += _INCREMENT * np.array([np.count_nonzero(found == level) for level in range(size)])
        return found


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Yield the first image of each block of a class, and the one after its last."""
    first = 0
    while first < count:
        last = min(count, first + max(1, first // _BLOCK_SHARE))
        yield first, last
        first = last


class Labeller(nn.Module):
    """A ConvNet small enough for a memory's file, which says what augmented images resemble.

    It is the ConvNet of :func:`hmn_replay.build_network` with quantised weights: blocks of 3 x 3
    convolution, instance normalisation with learned scale and shift, ReLU and average pooling by
    2, and one linear layer. The biases of its convolutions, which the normalisation takes away,
    are left out.

    Args:
        image_shape: ``(C, H, W)``.
        num_classes: Number of logits, one for each of the memory's classes in their order.
        width: Channels of every block, 1 to 512.
        depth: Number of blocks, 1 to 8, of which no pooling leaves less than one pixel.

    Raises:
        ConfigError: A value outside these ranges.
    """

    def __init__(
        self, image_shape: Sequence[int], num_classes: int, width: int, depth: int
    ) -> None:
        super().__init__()
        channels, height, wide = image_shape
        pixels = (height >> depth) * (wide >> depth)
        if not (1 <= width <= _MAX_WIDTH and 1 <= depth <= _MAX_DEPTH and pixels):
            raise ConfigError(
                f"a labeller of {height} x {wide} images has 1 to {_MAX_WIDTH} channels and 1 to "
                f"{_MAX_DEPTH} blocks, as many as there are pixels to pool; got {width} and {depth}"
            )
        self.image_shape, self.width, self.depth = (channels, height, wide), width, depth
        inputs = [channels, *[width] * (depth - 1)]
        shapes = [*((width, size, 3, 3) for size in inputs), (num_classes, width * pixels)]
        plain = [(channels,)] * 2 + [(width,)] * 2 * depth + [(num_classes,)]
        for name, own in (("integers", shapes), ("plain", plain)):
            dtype = torch.int8 if name == "integers" else torch.float16
            for i, shape in enumerate(own):
                self.register_buffer(f"{name}_{i}", torch.zeros(shape, dtype=dtype))
        steps = torch.ones(depth + 1, dtype=torch.float16)
        self.steps: Tensor
        self.register_buffer("steps", steps)

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, image_shape: Sequence[int]) -> Labeller:
        """Return a trained network as a labeller.

        Args:
            network: A ``"convnet"`` of :func:`hmn_replay.build_network`.
            image_shape: ``(C, H, W)`` of its images.

        Raises:
            ConfigError: It is another network, one for images of another shape, or its values are
                beyond those of float16.
        """
        state = {name: value.cpu().float() for name, value in network.state_dict().items()}
        depth = sum(name.endswith(".0.weight") for name in state)
        try:
            blocks = [f"body.stages.{i}" for i in range(depth)]
            weights = [*(state[f"{b}.0.weight"] for b in blocks), state["body.head.1.weight"]]
            plain = [state["mean"].flatten(), state["std"].flatten()]
            for block in blocks:
                plain += [state[f"{block}.1.weight"], state[f"{block}.1.bias"]]
            plain.append(state["body.head.1.bias"])
        except KeyError as error:
            raise ConfigError(f"a labeller is a ConvNet; got {type(network).__name__}") from error
        labeller = cls(image_shape, len(plain[-1]), len(weights[0]), depth)
        fits = weights[-1].shape == labeller._buffer("integers", depth).shape
        if not fits or len(plain[0]) != labeller.image_shape[0]:
            raise ConfigError(f"the network is for images of another shape than {image_shape}")
        for i, values in enumerate(plain):
            getattr(labeller, f"plain_{i}").copy_(values)
        for i, weight in enumerate(weights):
            step = max(float(weight.std(correction=0)) * _WEIGHT_STEP, 1e-4)
            step = max(step, float(weight.abs().max()) / entropy.MAX_INTEGER)
            labeller.steps[i] = step
            integers = (weight / labeller.steps[i].float()).round()
            integers = integers.clamp(-entropy.MAX_INTEGER, entropy.MAX_INTEGER)
            getattr(labeller, f"integers_{i}").copy_(integers)
        values = (value for name, value in labeller.named_buffers() if "integers" not in name)
        if not all(bool(value.isfinite().all()) for value in values):
            raise ConfigError("a labeller's values are float16, finite; the network's are beyond")
        if not bool((labeller._buffer("plain", 1) > 0).all()):
            raise ConfigError(
                "a labeller divides by its standard deviations, in float16; one of the network's "
                "is 0 there"
            )
        return labeller

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self._buffer("integers", self.depth))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32 ``(N, K)``, of float images ``(N, C, H, W)`` in [0, 1]."""
        mean, std = (self._buffer("plain", i).float().view(-1, 1, 1) for i in range(2))
        x = (images.float() - mean) / std
        for i in range(self.depth):
            scale, shift = (self._buffer("plain", 2 + 2 * i + j).float() for j in range(2))
            x = F.conv2d(x, self._weight(i), padding=1)
            x = F.relu(F.group_norm(x, self.width, scale, shift))
            x = F.avg_pool2d(x, 2)
        bias = self._buffer("plain", 2 + 2 * self.depth).float()
        return F.linear(x.flatten(1), self._weight(self.depth), bias)

    def of_classes(self, positions: Tensor) -> Labeller:
        """Return a labeller of some of the classes, int64 ``(K',)``, in their order."""
        last, bias = f"integers_{self.depth}", f"plain_{2 + 2 * self.depth}"
        fewer = Labeller(self.image_shape, len(positions), self.width, self.depth)
        for name, own in self.named_buffers():
            setattr(fewer, name, own[positions.to(own.device)] if name in (last, bias) else own)
        return fewer

    def stored(self) -> dict[str, Tensor]:
        """Return what the file stores, name to tensor; :meth:`restored` reads it."""
        parts = [self._buffer("integers", i).cpu() for i in range(self.depth + 1)]
        levels = [entropy.best_levels(part.abs().float().mean()) for part in parts]
        code = entropy.encode(list(zip(parts, levels, strict=True)))
        plain = [self._buffer("plain", i).flatten() for i in range(3 + 2 * self.depth)]
        head = torch.tensor([self.depth, self.width, *levels], dtype=torch.float16)
        values = torch.cat([head, *(part.cpu() for part in (self.steps, *plain))])
        return {
            "labeller_code": as_bytes(code),
            "labeller_values": values,
        }

    @classmethod
    @torch.no_grad()
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        image_shape: Sequence[int],
        num_classes: int,
        num_bytes: int,
    ) -> Labeller | None:
        """Return the labeller of a file; None where it has none.

        Args:
            tensors: What the file stores.
            image_shape: ``(C, H, W)``.
            num_classes: How many classes the memory has.
            num_bytes: As for :meth:`SoftLabels.restored`.

        Raises:
            MemoryFileError: It is not what :meth:`stored` gives.
            ConfigError: As well.
        """
        code, values = tensors.get("labeller_code"), tensors.get("labeller_values")
        if code is None and values is None:
            return None
        wanted = {"labeller_code": torch.uint8, "labeller_values": torch.float16}
        if any(name not in tensors or tensors[name].dtype != d for name, d in wanted.items()):
            raise MemoryFileError("its labeller is not a code and its values")
        assert code is not None
        assert values is not None
        if code.ndim != 1 or values.ndim != 1 or not bool(values.isfinite().all()):
            raise MemoryFileError("the values of its labeller are not finite rows")
        numbers = [float(value) for value in values[:2]]
        if len(numbers) < 2 or any(number != int(number) for number in numbers):
            raise MemoryFileError("its labeller has no whole number of blocks and channels")
        depth, width = map(int, numbers)
        if not (0 < depth <= _MAX_DEPTH and 0 < width <= _MAX_WIDTH):
            raise MemoryFileError(f"its labeller has {depth} blocks of {width} channels")
        pixels = math.prod(side >> depth for side in image_shape[1:])
        check_claims(num_bytes, 0, width * (9 * width * depth + num_classes * pixels))
        labeller = cls(image_shape, num_classes, width, depth)
        plain = [labeller._buffer("plain", i) for i in range(3 + 2 * labeller.depth)]
        num_weights = labeller.depth + 1
        sizes = [2, num_weights, num_weights, *map(len, plain)]
        if sum(sizes) != len(values):
            raise MemoryFileError(f"its labeller has {len(values)} values; expected {sum(sizes)}")
        _, levels, steps, *rows = values.split(sizes)
        if not bool(((levels == levels.round()) & (levels >= 0)).all()) or not bool(
            (levels < entropy.NUM_LEVELS).all()
        ):
            raise MemoryFileError("an entropy model of its labeller is out of range")
        if not bool((rows[1] > 0).all()):
            raise MemoryFileError("the deviation that its labeller divides by is not positive")
        models = [level.to(torch.uint8) for level in levels]
        integers = [labeller._buffer("integers", i) for i in range(num_weights)]
        shapes = [part.shape for part in integers]
        found = entropy.decode(code.numpy().tobytes(), list(zip(shapes, models, strict=True)))
        for buffer, own in zip([*integers, *plain], [*found, *rows], strict=True):
            buffer.copy_(own)
        labeller.steps.copy_(steps)
        return labeller

    def _buffer(self, name: str, position: int) -> Tensor:
        return self.get_buffer(f"{name}_{position}")

    def _weight(self, position: int) -> Tensor:
        return self._buffer("integers", position).float() * self.steps[position].float()
