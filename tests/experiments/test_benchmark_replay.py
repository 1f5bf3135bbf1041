"""The benchmark of replay, on next to nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import benchmark_replay

TINY = (
    "warm_start_steps=2 outer_steps=1 inner_steps=1 real_batch=2 decoded_batch=2 network_width=2 "
    "network_images=4 network_batch=4 pruning_passes=4 pruning_width=2 beta_grid=0.5"
)


@pytest.mark.parametrize("part", ["step", "grow"])
def test_it_prints_and_writes_a_ratio(
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = "--classes 2 --images 12 --side 8 --budget 6000 --batch 8 --batch-mem 4 --rounds 1"
    arguments = [part, *sizes.split(), "--experiences", "3", "--device", "cpu"]
    for option in TINY.split():
        arguments += ["--option", option]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--out", str(tmp_path / "out.json")])
    benchmark_replay.main()
    results = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert f"{results['ratio']:.3f}" in printed and results["ratio"] > 0
    assert ("ReplayPlugin" in printed) == (part == "step")
    assert ("experience  3" in printed) == (part == "grow")
