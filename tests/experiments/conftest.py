"""Fixtures of the experiments' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="package")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of three classes of 16 x 16 pixels, each brighter than the one before."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 60), ("test", 12)):
        labels = np.arange(count) % 3
        pixels = generator.random((count, 16, 16, 3)) * 80 + labels.reshape(-1, 1, 1, 1) * 60
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    np.savez(path, **arrays)
    return path
