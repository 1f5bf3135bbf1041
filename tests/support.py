"""Small containers, and condensation in a tenth of a second, for tests of several modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hmn_replay.condensation.condense import condense
from hmn_replay.data.images import LabelledImages
from hmn_replay.memory.base import Container
from hmn_replay.memory.container_layout import ContainerLayout
from hmn_replay.memory.formats import NumberFormat
from hmn_replay.memory.haba import HaBaLayout
from hmn_replay.memory.layout import Layout
from hmn_replay.memory.linba import LinBaLayout
from hmn_replay.memory.pixels import IDCLayout, RawLayout
from hmn_replay.memory.registry import make_container

AnyContainer = TypeVar("AnyContainer", bound=Container)

HMN_FIELDS: dict[str, Any] = {
    "stride": 4,
    "dataset_channels": 3,
    "feature_channels": 2,
    "class_channels": 2,
    "instance_channels": 2,
    "decoder_channels": (5, 4),
}


def hmn_layout(
    image_shape: tuple[int, int, int] = (3, 8, 8),
    number_format: NumberFormat = "int8",
    **fields: Any,
) -> Layout:
    """Return a small layout, planned for its images if it is entropy-coded; fields may be given."""
    planned = {"image_bytes": 5 if number_format == "entropy" else 0}
    return Layout(image_shape, number_format, **{**HMN_FIELDS, **planned, **fields})


LAYOUTS: dict[str, Callable[..., ContainerLayout]] = {
    "hmn": hmn_layout,
    "raw": RawLayout,
    "idc": IDCLayout,
    "haba": partial(HaBaLayout, num_hallucinators=3),
    "linba": partial(LinBaLayout, num_bases=5),
}
"""From an image shape and a number format to a small layout, by the container's name."""

TINY: dict[str, Any] = {
    "device": "cpu",
    "warm_start_steps": 4,
    "warm_start_batch": 5,
    "outer_steps": 2,
    "inner_steps": 3,
    "real_batch": 3,
    "decoded_batch": 3,
    "network_width": 3,
    "network_images": 8,
    "network_batch": 4,
    "beta_grid": (0.0, 1.0),
    "over_budget": 0.3,
    "pruning_passes": 20,
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


def tiny(data: LabelledImages, layout: ContainerLayout, **options: Any) -> Container:
    budget = options.pop("budget", None)
    if budget is None:
        num_classes = data.num_classes
        budget = layout.file_bytes(num_classes, 3 * num_classes + 1, 10**4)
    return condense(data, budget, layout=layout, **{**TINY, **options})


def made(
    container: str,
    number_format: NumberFormat = "int8",
    image_shape: tuple[int, int, int] = (3, 8, 8),
    classes: Sequence[int] = (7, -3),
    groups: Sequence[int] = (2, 3),
    **options: Any,
) -> Container:
    """Return a small container that every parameter of has a value of its own.

    Args:
        container: Its name.
        number_format: Of its values.
        image_shape: Of an image.
        classes: Its labels.
        groups: For each class, how many groups of images it has.
        **options: ``seed``.
    """
    layout = LAYOUTS[container](image_shape, number_format)
    counts = [layout.group_size * count for count in groups]
    return trained(make_container(layout, classes, counts, **options))


def trained(memory: AnyContainer, seed: int = 0, std: float = 0.3) -> AnyContainer:
    """Give every parameter a value of its own, biases too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    memory.update_scales()
    return memory


def rounded_by_hand(values: Tensor, number_format: NumberFormat, scale: float = 0) -> Tensor:
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
