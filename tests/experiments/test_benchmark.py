"""Every benchmark at its smallest: what it gives, and that it counts and times what it says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import common, matching, objectives, processes, training
from experiments.benchmarks.command import MODULES, main
from experiments.reference import matching_loss
from hmn_replay.budget import Budget
from hmn_replay.objectives import OBJECTIVES

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmark.py"
CPU = torch.device("cpu")


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a sub-command with --smoke and --json."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, "--smoke", "--json", "--device", "cpu", "--threads", "1"]) == 0
        printed = capsys.readouterr()
        assert printed.err
        lines = printed.out.splitlines()
        assert len(lines) == 1
        results: dict[str, Any] = json.loads(lines[0])
        assert results["command"] == arguments[0]
        assert results["machine"]["device"] == "cpu" and results["machine"]["threads"] == 1
        return results

    return run


def positive_numbers(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(positive_numbers, value.values()))
    return isinstance(value, float | int) and 0 < value < float("inf")


def test_matching_compares_times_gradients_and_memory(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes of their own are tested below; they take seconds to import torch.
    monkeypatch.setattr(matching, "in_fresh_process", lambda function, *rest: function(*rest))
    results = measure("matching")
    names = ("reference", "ours", "ours_bfloat16")
    seconds = {name: results[f"{name}_seconds"] for name in names}
    assert positive_numbers(seconds)
    assert results["ratio"] == pytest.approx(seconds["reference"] / seconds["ours"])
    assert results["ratio_bfloat16"] == pytest.approx(
        seconds["reference"] / seconds["ours_bfloat16"]
    )
    forward = min(
        results["convolution_forward_seconds"][f"float32, {layout}"]
        for layout in ("contiguous", "channels last")
    )
    work = results["work"]["step_flops"] / results["work"]["forward_flops"]
    assert results["peak_fraction"] == pytest.approx(work * forward / seconds["ours"])
    assert positive_numbers(results["peak_fraction_bfloat16"])
    assert positive_numbers(results["peak_fraction_reference"])
    assert results["relative_error_float64"] <= 1e-9
    assert results["relative_error"] <= 2e-3
    assert 1e-9 < results["reference_rounding"] <= 2e-3
    assert 0 < results["relative_error_bfloat16"] < 1
    for name in names:
        before = results["peak_memory_before_bytes"][name]
        assert 2**20 < before <= results["peak_memory_bytes"][name]


def test_training_compares_compiled_steps_with_plain_ones(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "in_fresh_process", lambda function, *rest: function(*rest))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    results = measure("training", "--precision", "float32")
    seconds = {name: results[f"{name}_seconds"] for name in ("eager", "compiled")}
    assert positive_numbers(seconds) and results["precision"] == "float32"
    assert results["ratio"] == pytest.approx(seconds["eager"] / seconds["compiled"])
    for name, value in seconds.items():
        assert results[f"{name}_images_per_second"] == pytest.approx(4 / value)
    assert results["first_compile_seconds"] > 0 and results["cached_compile_seconds"] > 0


def test_work_of_a_step_is_counted_as_torch_counts_it() -> None:
    _, network, (real, labels, decoded, _) = matching.make_inputs(8, 2, 16, CPU)
    work = matching.convolution_work(8, 2, 16)

    def count(task: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            task()
        flops = counter.get_flop_counts()["Global"]
        return sum(number for name, number in flops.items() if "convolution" in str(name))

    assert count(lambda: network(real)) == work["forward_flops"]
    images = decoded.requires_grad_().clone()

    def plain_step() -> None:
        loss = matching_loss(network, real, labels, images, labels)
        torch.autograd.grad(loss, images)

    # Double backward also takes a gradient to the weights, which nobody asked it for.
    assert work["step_flops"] <= count(plain_step) <= 1.1 * work["step_flops"]


def test_objectives_are_all_compared_with_a_forward_pass(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[tuple[str, int]] = []

    def here(function: Any, name: str, *rest: Any) -> int:
        peaks.append((name, function(name, *rest)))
        return 1000 * len(peaks)

    monkeypatch.setattr(objectives, "in_fresh_process", here)
    results = measure("objectives")["objectives"]
    assert list(results) == ["forward", "training", *OBJECTIVES] == [name for name, _ in peaks]
    assert all(peak >= 0 for _, peak in peaks)
    for number, cost in enumerate(results.values(), start=1):
        assert positive_numbers(cost)
        assert cost["peak_memory_bytes"] == 1000 * number
        passes = cost["seconds"] / results["forward"]["seconds"]
        assert cost["forward_passes"] == pytest.approx(passes)


def test_decode_gives_images_a_second(measure: Any) -> None:
    results = measure("decode")
    assert results["file_bytes"] <= 8 * 1024 and results["train_images"] == 4
    for name, count in (("decode", results["num_images"]), ("train", 4)):
        rate = results[f"{name}_images_per_second"]
        assert rate == pytest.approx(count / results[f"{name}_seconds"])
    assert positive_numbers(results["decode_images_per_second"])


def test_replay_takes_turns_with_its_rivals(measure: Any) -> None:
    results = measure("replay")
    medians = results["median_seconds"]
    assert set(medians) == {"HMNReplay", "ReplayPlugin", "none"} and positive_numbers(medians)
    assert results["ratio"] == pytest.approx(medians["HMNReplay"] / medians["ReplayPlugin"])
    assert results["ratio_none"] == pytest.approx(medians["HMNReplay"] / medians["none"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size-mem", "10000"], "lower --batch-size-mem"),
        (["--batch-size", "20"], "lower --batch-size, or raise --images"),
        (["--set", "kind=idc"], "no option 'kind'"),
    ],
)
def test_replay_refuses_what_it_cannot_time(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "--smoke", "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_extend_keeps_everything_but_the_old_classes(measure: Any) -> None:
    results = measure("extend")
    first, last = results["experiences"]
    assert (first["seen"], last["seen"]) == (1, 3)
    assert first["images_per_class"] == last["images_per_class"] == 3
    for row in (first, last):
        assert set(row["phase_seconds"]) == {"warm_start", "matching", "pruning"}
        assert sum(row["phase_seconds"].values()) <= row["seconds"]
        assert positive_numbers(row["phase_seconds"])
    assert results["ratio"] == pytest.approx(last["seconds"] / first["seconds"])


def test_extend_counts_old_and_new_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extend", "--smoke", "--device", "cpu", "--seen", "999"]) == 1
    assert "1000 classes at most" in capsys.readouterr().err


def test_processes_tells_what_more_of_them_would_take(measure: Any) -> None:
    results = measure("processes", "--bandwidth", "2", "--latency", "50")
    assert [row["processes"] for row in results["rows"]] == [1, 2, 5]
    # A step's matching, and the network's two batches.
    memory_bytes, *network_bytes = results["sums_bytes"]
    assert memory_bytes > 0 and network_bytes == [network_bytes[0]] * 2
    for row in results["rows"]:
        size, one = row["processes"], results["rows"][0]
        assert row["step"] == pytest.approx(row["match"] + row["train"] + row["send"])
        assert row["speedup"] == pytest.approx(one["step"] / row["step"])
        # Rings of bytes, and trees of messages: 0, 1 and 3 deep.
        seconds = 2 * (size - 1) / size * sum(results["sums_bytes"]) / 2e9
        depth = {1: 0, 2: 1, 5: 3}[size]
        assert row["send"] == pytest.approx(seconds + 3 * 2 * depth * 50e-6)


def test_processes_counts_what_is_summed() -> None:
    counter = processes.Counter(4)
    values = torch.zeros(5, 3)
    counter.sum_gradients([(values, torch.tensor([4, 0])), (torch.zeros(7), ...)])
    assert counter.sums == [4 * (2 * 3 + 7)]
    assert list(counter.share(range(9))) == [0, 4, 8]


def test_memory_gives_the_peak_of_every_phase(measure: Any) -> None:
    results = measure("memory")
    peaks = [phase["peak_memory_bytes"] for phase in results["phases"].values()]
    # Linux counts resident pages in batches for each CPU, so that two readings differ by a few.
    slack = 2**20
    assert slack < results["peak_memory_before_bytes"] <= peaks[0] + slack
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(peaks))
    assert results["real_bytes"] == 2 * 4 * 3 * 8 * 8
    assert results["values_bytes"] > 0 and results["num_images"] > 2


def test_script_runs_from_anywhere_and_prints_one_object(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "decode", "--smoke", "--json", "--device", "cpu"]
    command += ["--out", "folder/out.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    results = json.loads(output)
    assert results == json.loads((tmp_path / "folder" / "out.json").read_text())
    assert results["settings"]["batch"] == 4


def test_without_json_a_person_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["decode", "--smoke", "--device", "cpu", "--batch", "3"]) == 0
    printed = capsys.readouterr().out
    assert "images/s" in printed and "for 3" in printed and "{" not in printed
    assert torch.get_num_threads() == threads


def test_help_tells_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in MODULES)
    with pytest.raises(SystemExit, match="2"):
        main(["decode", "--rounds", "0"])
    assert "expected 1 or more, got 0" in capsys.readouterr().err


def test_tasks_take_turns_and_their_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    calls: list[str] = []
    durations = {"a": [9.0, 1.0, 5.0, 3.0], "b": [9.0, 2.0, 2.0, 2.5]}

    def task(name: str) -> Callable[[], None]:
        def run() -> None:
            clock[0] += durations[name][len(calls) // 2]
            calls.append(name)

        return run

    monkeypatch.setattr(common, "now", lambda device: clock[0])
    medians = common.interleave({"a": task("a"), "b": task("b")}, 3, CPU)
    assert calls == ["a", "b"] * 4
    assert medians == {"a": 3.0, "b": 2.0}


def test_a_fresh_process_is_another_one() -> None:
    assert common.in_fresh_process(os.getpid) != os.getpid()


def test_noise_has_the_classes_asked_for() -> None:
    images = common.noise((3, 8, 9), 2, 3, first_class=5)
    assert images.labels.tolist() == [5, 5, 5, 6, 6, 6]
    assert images.image_shape == (3, 8, 9)
    assert images.images.min() < 10 and images.images.max() > 245


def test_random_memory_fills_its_budget() -> None:
    memory = common.random_memory("10 KiB", (3, 8, 8), 3)
    counts = memory.images_per_class
    assert max(counts) - min(counts) <= 1
    assert memory.file_bytes <= Budget.parse("10 KiB").num_bytes
    assert (
        memory.file_bytes + 2 * memory.group_bytes(memory.layout) > Budget.parse("10 KiB").num_bytes
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(512, "0.5 KiB"), (122880, "120.0 KiB"), (3 << 20, "3.0 MiB")]
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    assert common.readable(num_bytes) == text
