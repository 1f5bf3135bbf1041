"""Small memories, and condensation in a tenth of a second, for tests of several modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hmn_replay.condensation.condense import condense
from hmn_replay.data.images import LabelledImages
from hmn_replay.distributed import GradientPart, Team
from hmn_replay.errors import ConfigError
from hmn_replay.memory import (
    MEMORIES,
    NUMBER_FORMATS,
    FrequencyLayout,
    HaBaLayout,
    HMNLayout,
    IDCLayout,
    LearnedMemory,
    LinBaLayout,
    Memory,
    MemoryLayout,
    PixelLayout,
    RawMemory,
    RealMemory,
    register_memory,
)

AnyLearned = TypeVar("AnyLearned", bound=LearnedMemory)


def learned_type(kind: str) -> type[LearnedMemory]:
    """Return the class of a memory kind whose images are learned."""
    found = MEMORIES[kind]
    assert issubclass(found, LearnedMemory)
    return found


class CountingBackend:
    """A backend of torch.compile that compiles nothing, and counts what it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return module.forward


KINDS = [kind for kind, own in MEMORIES.items() if not own.holds_features]
"""The memory kinds of images."""

LEARNED = [kind for kind in KINDS if issubclass(MEMORIES[kind], LearnedMemory)]
"""The memory kinds whose images are learned."""

REAL = [kind for kind in KINDS if issubclass(MEMORIES[kind], RealMemory)]
"""The memory kinds of real images."""

PLAIN_FORMATS = [name for name, own in NUMBER_FORMATS.items() if not own.is_coded]
"""The number formats that every learned kind has."""

LEARNED_FORMATS = [
    (kind, name)
    for kind in LEARNED
    for name in NUMBER_FORMATS
    if name in PLAIN_FORMATS or learned_type(kind).codes_entropy
]
"""The learned kinds, each with every number format that it can have."""

HMN_FIELDS: dict[str, Any] = {
    "stride": 4,
    "dataset_channels": 3,
    "feature_channels": 2,
    "class_channels": 2,
    "instance_channels": 2,
    "decoder_channels": (5, 4),
}


def hmn_layout(
    image_shape: tuple[int, int, int] = (3, 8, 8), number_format: str = "int8", **fields: Any
) -> HMNLayout:
    """Return a small layout, planned for its images if it is entropy-coded; fields may be given."""
    planned = {"image_bytes": 5 if NUMBER_FORMATS[number_format].is_coded else 0}
    return HMNLayout(image_shape, number_format, **{**HMN_FIELDS, **planned, **fields})


def frequency_layout(
    image_shape: tuple[int, int, int] = (3, 8, 8), number_format: str = "int8"
) -> FrequencyLayout:
    """Return a small layout, planned for its images if it is entropy-coded."""
    image_bytes = 9 if NUMBER_FORMATS[number_format].is_coded else 0
    return FrequencyLayout(image_shape, number_format, 24, image_bytes)


LAYOUTS: dict[str, Callable[..., MemoryLayout]] = {
    "hmn": hmn_layout,
    "fred": frequency_layout,
    "pixels": PixelLayout,
    "idc": IDCLayout,
    "haba": partial(HaBaLayout, num_hallucinators=3),
    "linba": partial(LinBaLayout, num_bases=5),
}
"""From an image shape and a number format to a small layout, by the memory kind."""

CODECS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 30}, "subsampled": {"factor": 3}}
"""What memories of real images are made with, by the memory kind, beside shape and budget."""


def type_of(layout: MemoryLayout) -> type[LearnedMemory]:
    """Return the memory kind that a layout is one of."""
    return next(own for own in map(learned_type, LEARNED) if own.Layout is type(layout))


def room_for(layout: MemoryLayout, num_classes: int, num_images: int) -> int:
    """Return a budget that holds so many images of planned size, and not one more."""
    return type_of(layout).file_bytes_of(layout, num_classes, num_images, 9999)


TINY: dict[str, Any] = {
    "device": "cpu",
    "warm_start_steps": 4,
    "warm_start_batch": 5,
    "outer_steps": 2,
    "inner_steps": 3,
    "real_batch": 3,
    "decoded_batch": 3,
    "network_width": 3,
    "trained_networks": 0,
    "network_images": 4,
    "network_batch": 4,
    "beta_grid": (0.0, 1.0),
    "over_budget": 0.3,
    "pruning_passes": 10,
    "pruning_width": 3,
}

# What TINY is to other objectives.
TINY_MTT: dict[str, Any] = {
    "objective": "mtt",
    "num_experts": 2,
    "expert_images": 12,
    "expert_batch": 4,
    "expert_learning_rate": 0.05,
    "expert_epochs": 1,
    "max_start_epoch": 1,
    "student_steps": 3,
    "student_batch": 4,
}


def tiny(data: LabelledImages, layout: MemoryLayout, **options: Any) -> LearnedMemory:
    """Condense in a tenth of a second, by default to three images a class and one over."""
    budget = options.pop("budget", None)
    if budget is None:
        budget = room_for(layout, data.num_classes, 3 * data.num_classes + 1)
    options.setdefault("kind", type_of(layout).kind)
    memory = condense(data, budget, layout=layout, **{**TINY, **options})
    assert isinstance(memory, LearnedMemory)
    return memory


def made(
    kind: str,
    number_format: str = "int8",
    image_shape: tuple[int, int, int] = (3, 8, 8),
    classes: Sequence[int] = (7, -3),
    groups: Sequence[int] = (2, 3),
    **options: Any,
) -> LearnedMemory:
    """Return a small learned memory that every parameter of has a value of its own.

    Args:
        kind: The memory kind.
        number_format: Of its values.
        image_shape: Of an image.
        classes: Its labels.
        groups: For each class, how many groups of images it has.
        **options: ``seed`` and ``budget``.
    """
    layout = LAYOUTS[kind](image_shape, number_format)
    counts = [layout.group_size * count for count in groups]
    return trained(learned_type(kind)(layout, classes, counts, **options))


def real(
    kind: str,
    image_shape: tuple[int, int, int] = (3, 8, 8),
    classes: Sequence[int] = (-3, 7),
    counts: Sequence[int] = (2, 3),
    budget: int | None = None,
    seed: int = 0,
    **options: Any,
) -> RealMemory:
    """Return a small memory of real images: coarse ones with some noise.

    Args:
        kind: The memory kind.
        image_shape: Of an image.
        classes: Its labels, ascending.
        counts: For each class, how many images it is offered.
        budget: Of its file.
        seed: Of the images.
        **options: What it is made with instead of :data:`CODECS`.
    """
    found = MEMORIES[kind]
    assert issubclass(found, RealMemory)
    memory = found(image_shape, budget=budget, **{**CODECS.get(kind, {}), **options})
    memory.extend(real_set(image_shape, classes, counts, seed))
    return memory


class PosterMemory(RawMemory):
    """Pixels of a few levels: a kind of a user's that has a setting of its own."""

    setting_types: ClassVar = {"levels": int}

    def __init__(self, image_shape: Sequence[int], *, levels: int = 4, budget: Any = None) -> None:
        super().__init__(image_shape, budget=budget)
        self.levels = levels
        if not 2 <= levels <= 256:
            raise ConfigError(f"levels is 2 to 256; got {levels}")

    def encode(self, images: Tensor) -> list[bytes]:
        step = 256 // self.levels
        return super().encode(images // step * step)


@contextmanager
def registered(memory_type: type[Memory]) -> Iterator[str]:
    """Let a memory class be a kind inside the block; give its name."""
    kind = f"a-{memory_type.__name__.lower()}"
    register_memory(kind)(memory_type)
    try:
        yield kind
    finally:
        MEMORIES.remove(kind)


def real_set(
    image_shape: tuple[int, int, int] = (3, 8, 8),
    classes: Sequence[int] = (-3, 7),
    counts: Sequence[int] = (2, 3),
    seed: int = 0,
) -> LabelledImages:
    """Return labelled images that codecs can make something of: coarse ones with some noise."""
    generator = torch.Generator().manual_seed(seed)
    shape, (_, height, width) = (sum(counts), *image_shape), image_shape
    coarse = torch.randint(
        0, 230, (*shape[:2], -(-height // 4), -(-width // 4)), generator=generator
    )
    coarse = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width]
    images = coarse + torch.randint(0, 25, shape, generator=generator)
    labels = torch.tensor(classes).repeat_interleave(torch.tensor(counts))
    return LabelledImages(images.to(torch.uint8), labels)


def any_memory(kind: str, **options: Any) -> Memory:
    """Return a small memory of any kind; options as of :func:`made` or :func:`real`."""
    return real(kind, **options) if kind in REAL else made(kind, **options)


def trained(memory: AnyLearned, seed: int = 0, std: float = 0.3) -> AnyLearned:
    """Give every parameter a value of its own, biases too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    memory.update_scales()
    return memory


def rounded_by_hand(values: Tensor, number_format: str, scale: float = 0) -> Tensor:
    """Return, as float64, what a tensor with one int8 scale is stored as.

    Args:
        values: float32.
        number_format: The format.
        scale: The int8 scale; 0 for the one that the largest value gives.
    """
    values = values.detach()
    if number_format == "float32":
        return values.double()
    if number_format == "float16":
        return values.half().double()
    scale = scale or max(float(values.abs().max()) / 127, 1e-8)
    scale = float(torch.tensor(scale, dtype=torch.float32))
    steps = [max(-127, min(127, round(float(v / scale)))) for v in values.flatten()]
    return torch.tensor(steps, dtype=torch.double).view_as(values) * scale


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors are the same, zeros of either sign and all."""
    return one.dtype == two.dtype and one.numpy().tobytes() == two.numpy().tobytes()


def upsampled_by_hand(image: Tensor, height: int, width: int) -> Tensor:
    """Return an image ``(C, h, w)`` at another size: bilinear, pixels as squares, in float64."""
    columns = _interpolated_by_hand(image.double(), width)
    return _interpolated_by_hand(columns.transpose(1, 2), height).transpose(1, 2)


def _interpolated_by_hand(image: Tensor, size: int) -> Tensor:
    """Return an image with its last axis brought to a size."""
    given = image.shape[-1]
    values = []
    for position in range(size):
        place = min(max((position + 0.5) * given / size - 0.5, 0), given - 1)
        low = int(place)
        high = min(low + 1, given - 1)
        values.append((1 - place + low) * image[..., low] + (place - low) * image[..., high])
    return torch.stack(values, dim=-1)


class Observer(Team):
    """A single process that calls a function before each message that several would exchange.

    Args:
        **on: By the name of a method, a function of the number of the call, from 1, and its
            arguments: to count steps, to interrupt one, or to look at gradients.
    """

    def __init__(self, **on: Callable[..., None]) -> None:
        self.on, self.calls = on, Counter[str]()

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls[name] += 1
        if name in self.on:
            self.on[name](self.calls[name], *arguments)

    def sum_gradients(self, parts: Iterable[GradientPart]) -> None:
        self._call("sum_gradients", parts)

    def add_up(self, values: Tensor) -> None:
        self._call("add_up", values)

    def sum(self, *values: float) -> list[float]:
        self._call("sum", *values)
        return super().sum(*values)

    def agree(self, decide: Callable[[], Any]) -> Any:
        self._call("agree")
        return super().agree(decide)


def at_call(number: int, action: Callable[[], object]) -> Callable[..., None]:
    """Return what does something at the call of a number, for :class:`Observer`."""

    def called(count: int, *_: object) -> None:
        if count == number:
            action()

    return called


def values_of(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, two, strict=True))


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compare gradients to within a small part of the largest one."""
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 0
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-4, atol=1e-5 * largest)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def make_norm(width: int) -> nn.GroupNorm:
    """Return a normalisation of each channel whose scale and shift are not 1 and 0."""
    norm = nn.GroupNorm(width, width, dtype=torch.double).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * draw(width, seed=90))
    norm.bias.copy_(0.3 * draw(width, seed=91))
    return norm
