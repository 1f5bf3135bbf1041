"""PSNR of decoded images, against the same written out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hmn_replay.condensation.fidelity import drift_psnr, reconstruction_psnr
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout

MakeLayout = Callable[..., Layout]

# Any: what this module imports is replaced in tests.
fidelity: Any = importlib.import_module("hmn_replay.condensation.fidelity")


@pytest.fixture(params=[2, 512])
def memory(
    request: pytest.FixtureRequest, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> HierarchicalMemory:
    """A memory of seven images, gone through in parts, or at once."""
    monkeypatch.setattr(fidelity, "images_at_once", lambda _: request.param)
    return HierarchicalMemory(make_layout(), [3, 4], [4, 3], seed=1)


def test_each_image_has_a_ratio_of_its_own(memory: HierarchicalMemory) -> None:
    wanted = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images, _ = memory.decode()
    wanted[5] = images[5]
    positions = torch.tensor([6, 2, 5])
    ratios = []
    for position in positions.tolist():
        error = float((images[position].double() - wanted[position].double()).square().mean())
        ratios.append(-10 * math.log10(error) if error else 100)
    found = reconstruction_psnr(memory, positions, wanted.__getitem__)
    assert found == pytest.approx(sum(ratios) / 3, rel=1e-5)


def test_drift_is_that_of_all_pixels(memory: HierarchicalMemory) -> None:
    before, _ = memory.decode(dtype=torch.uint8)
    assert drift_psnr(memory, before) is None
    assert drift_psnr(memory, before[:0]) is None
    changed = before[:5].clone()
    changed[4, 0, 0, 0] ^= 3
    changed[1] = 255 - changed[1]
    error = float((changed.double() - before[:5].double()).square().mean()) / 255**2
    assert drift_psnr(memory, changed) == pytest.approx(-10 * math.log10(error))
