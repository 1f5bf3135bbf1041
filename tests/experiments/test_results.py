from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.results import (
    deviation,
    finished,
    make_table,
    percent,
    reset_peak_memory,
    resumed,
    summarise,
)
from hmn_replay.errors import ConfigError
from hmn_replay.runtime import peak_memory_bytes

Matrix = list[list[float | None]]


def test_matrix_is_summarised_as_by_hand() -> None:
    matrix: Matrix = [[0.9, None, None], [0.5, 0.8, None], [0.6, 0.2, 1.0]]
    summary = summarise(matrix, [10, 30, 10])
    assert summary["accuracy_seen"] == pytest.approx(
        [0.9, (0.5 * 10 + 0.8 * 30) / 40, (0.6 * 10 + 0.2 * 30 + 1.0 * 10) / 50]
    )
    assert summary["final_accuracy"] == pytest.approx(0.44)
    assert summary["average_accuracy"] == pytest.approx((0.9 + 0.725 + 0.44) / 3)
    # 0.9 fell to 0.6, and 0.8 to 0.2.
    assert summary["forgetting"] == pytest.approx((0.3 + 0.6) / 2)


def test_forgetting_counts_from_the_best_and_may_be_negative() -> None:
    assert summarise([[0.2, None], [0.7, 0.9]], [1, 1])["forgetting"] == pytest.approx(-0.5)
    matrix: Matrix = [[0.5, None, None], [0.8, 0.6, None], [0.1, 0.6, 0.9]]
    assert summarise(matrix, [1, 1, 1])["forgetting"] == pytest.approx((0.7 + 0.0) / 2)


def test_joint_is_measured_once_and_forgets_nothing() -> None:
    summary = summarise([[None, None], [0.6, 0.8]], [10, 10])
    assert summary == {
        "accuracy_seen": [None, pytest.approx(0.7)],
        "final_accuracy": pytest.approx(0.7),
        "average_accuracy": pytest.approx(0.7),
        "forgetting": None,
    }


def test_unfinished_and_single_rows_have_no_forgetting() -> None:
    summary = summarise([[0.4, None], [None, None]], [5, 5])
    assert summary["accuracy_seen"] == [0.4, None]
    assert (summary["final_accuracy"], summary["forgetting"]) == (None, None)
    assert summarise([[0.4]], [5])["forgetting"] is None


def run_of(final: float, *, forgetting: float | None = 0.25) -> dict[str, Any]:
    return {
        "loss_used": "separated",
        "renew_used": "before",
        "memory_bytes": 2000,
        "memory_images": 30,
        "final_accuracy": final,
        "average_accuracy": 0.75,
        "accuracy_seen": [None if forgetting is None else 0.8, final],
        "forgetting": forgetting,
        "shortcut": {"clean": {"called_new": 0.448}, "codec": {"called_new": 0.006}},
        "train_seconds": 12.0,
        "memory_seconds": 1234.0,
    }


def test_table_ranks_by_mean_and_leaves_failures_out() -> None:
    results: dict[str, dict[str, Any]] = {
        "raw": {"0": run_of(0.5), "1": {"error": "ValueError: no"}},
        "joint": {"0": run_of(0.9, forgetting=None)},
        "hmn": {"0": run_of(0.6), "1": run_of(0.8)},
        "jpeg": {"0": {"error": "ValueError: no"}},
    }
    assert list(finished(results)) == ["joint", "hmn", "raw"]
    lines = make_table(results).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["joint", "hmn", "raw"]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == [
        "hmn",
        "separated",
        "before",
        "2,000",
        "30",
        "70.0 ± 14.1",
        "75.0",
        "25.0",
        "44.8 (0.6)",
        "2",
        "12",
        "1,234",
    ]
    joint = [cell.strip() for cell in lines[2].split("|")]
    assert joint[7:9] == ["-", "-"], "one measurement has neither a mean nor a forgetting"
    assert len({len(line) for line in lines}) == 1


def test_deviation_of_one_value_is_zero() -> None:
    assert deviation([3.0]) == 0.0
    assert deviation([1.0, 3.0]) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("shares", "text"), [([], "-"), ([0.5], "50.0"), ([0.5, 0.52], "51.0 ± 1.4"), ([0.0], "0.0")]
)
def test_a_mean_of_one_value_has_no_deviation(shares: list[float], text: str) -> None:
    assert percent(shares) == text


def test_resuming_wants_the_flag_and_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    earlier = {"configuration": {"epochs": 1}, "versions": {"torch": "2"}, "results": {"raw": {}}}
    path.write_text(json.dumps(earlier))
    with pytest.raises(ConfigError, match="--resume"):
        resumed(earlier, path, resume=False)
    assert resumed({**earlier, "results": {}}, path, resume=True) == earlier
    with pytest.raises(ConfigError, match="of epochs = 1, and now it is 2"):
        resumed({**earlier, "configuration": {"epochs": 2}}, path, resume=True)
    with pytest.raises(ConfigError, match="torch"):
        resumed({**earlier, "versions": {"torch": "3"}}, path, resume=True)
    for damaged in ("{", "[]", "{}", '{"configuration": 3, "versions": {}}'):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="is no file of results"):
            resumed(earlier, path, resume=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_counts_what_was_freed_until_it_is_reset() -> None:
    cpu = torch.device("cpu")
    # Pages of its own: a tensor may lie in what the process has freed and keeps.
    block = mmap.mmap(-1, 64 * 2**20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert peak_memory_bytes(cpu) > len(block)
    block.close()
    before = peak_memory_bytes(cpu)
    reset_peak_memory()
    assert peak_memory_bytes(cpu) < before - 32 * 2**20


def test_table_says_what_a_tuned_network_was_before() -> None:
    results = {"hmn": {"0": run_of(0.6) | {"untuned": {"final_accuracy": 0.5}}}}
    assert "| 60.0 (untuned 50.0) |" in make_table(results)
