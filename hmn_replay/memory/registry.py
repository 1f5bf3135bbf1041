"""The containers by name: the hierarchical memory, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import Container
from hmn_replay.memory.container_layout import ContainerLayout
from hmn_replay.memory.haba import HaBa, HaBaLayout
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout
from hmn_replay.memory.linba import LinBa, LinBaLayout
from hmn_replay.memory.pixels import IDCLayout, PixelContainer, RawLayout

__all__ = ["CONTAINERS", "get_layout_type", "make_container", "read_layout"]

_LAYOUTS: tuple[type[ContainerLayout], ...] = (
    Layout,
    RawLayout,
    IDCLayout,
    HaBaLayout,
    LinBaLayout,
)
_TYPES: dict[str, type[Container]] = {
    "hmn": HierarchicalMemory,
    "raw": PixelContainer,
    "idc": PixelContainer,
    "haba": HaBa,
    "linba": LinBa,
}

CONTAINERS: dict[str, type[ContainerLayout]] = {layout.container: layout for layout in _LAYOUTS}
"""The layout of each container; ``CONTAINERS[name].choose(...)`` fits one to a budget."""


def get_layout_type(container: str) -> type[ContainerLayout]:
    """Return a container's type of layout, or raise :class:`ConfigError` with those there are."""
    if container not in CONTAINERS:
        raise ConfigError(f"container is one of {', '.join(CONTAINERS)}; got {container!r}")
    return CONTAINERS[container]


def make_container(
    layout: ContainerLayout,
    classes: Sequence[int] | Tensor,
    images_per_class: int | Sequence[int],
    *,
    seed: int = 0,
) -> Container:
    """Return a new container of a layout's kind; see :class:`hmn_replay.memory.base.Container`."""
    return _TYPES[layout.container](layout, classes, images_per_class, seed=seed)


def read_layout(text: str) -> tuple[ContainerLayout, int | None, str]:
    """Return the layout, the budget in bytes and the digest that a file's metadata names.

    Raises:
        ValueError: No layout writes such a text.
    """
    words = text.split(" ")
    # The hierarchical memory's files name no container: they were there first.
    name = words[5] if len(words) > 5 and words[5] in CONTAINERS else "hmn"
    return CONTAINERS[name].from_metadata(text)
