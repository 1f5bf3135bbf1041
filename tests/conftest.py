"""Fixtures that several test files share: small data, small layouts, the command."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hmn_replay.data.images import LabelledImages
from hmn_replay.memory import HierarchicalMemory, HMNLayout
from hmn_replay.objectives import OBJECTIVES, ObjectiveFunction
from tests.console import Console
from tests.hub import Hub, serve
from tests.support import hmn_layout


def pytest_configure() -> None:
    """Use one thread, here and in subprocesses, and hear Ctrl-C, which tests send.

    Small tensors gain nothing by more threads, and pytest-xdist starts a process for each core. A
    shell in the background lets its processes ignore Ctrl-C.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that is imported and collected: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def untouched_random_state() -> Iterator[None]:
    """Fail a test in which anything draws from, or seeds, torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.get_rng_state().equal(before), "the global random state has changed"


@pytest.fixture
def make_layout() -> Callable[..., HMNLayout]:
    """Return a function that makes a small layout; any field may be given."""

    def make(
        number_format: str = "int8",
        image_shape: tuple[int, int, int] = (3, 8, 8),
        **fields: Any,
    ) -> HMNLayout:
        return hmn_layout(image_shape, number_format, **fields)

    return make


@pytest.fixture
def make_set() -> Callable[..., LabelledImages]:
    """Return a function that makes a random labelled set with a brightness of its own a class."""

    def make(
        num_images: int = 24,
        image_shape: tuple[int, int, int] = (3, 8, 8),
        labels: tuple[int, ...] = (0, 1, 2),
        seed: int = 0,
    ) -> LabelledImages:
        generator = torch.Generator().manual_seed(seed)
        index = torch.arange(num_images) % len(labels)
        noise = torch.rand(num_images, *image_shape, generator=generator)
        level = (index + 1) / (len(labels) + 1)
        images = (0.3 * noise + 0.7 * level.view(-1, 1, 1, 1)).mul(255).to(torch.uint8)
        return LabelledImages(images, torch.tensor(labels)[index])

    return make


@pytest.fixture
def register_objective() -> Iterator[Callable[[ObjectiveFunction], str]]:
    """Return a function that registers an objective for the length of a test, and names it."""
    names: list[str] = []

    def register(objective: ObjectiveFunction) -> str:
        names.append(f"test-{len(names)}")
        OBJECTIVES.add(names[-1], objective)
        return names[-1]

    yield register
    for name in names:
        OBJECTIVES.remove(name)


@pytest.fixture
def memory_file(make_layout: Callable[..., HMNLayout], tmp_path: Path) -> Path:
    """A memory of nine images that look like digits to nobody."""
    layout = make_layout(image_shape=(1, 8, 8))
    path = tmp_path / "memory.hmn"
    HierarchicalMemory(layout, [0, 1, 7], [4, 3, 2], budget=20_000).save(path)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hugging Face Hub of our own, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Console:
    """Return what runs the command."""
    return Console(capsys)
