from __future__ import annotations

import json
import math
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hmn_replay
from experiments import split_cifar100
from experiments.split_cifar100 import main
from hmn_replay.errors import ConfigError, DataError, HMNReplayError

MemoryUse = namedtuple("MemoryUse", "num_bytes, num_images, seconds")


@pytest.fixture
def fake_strategies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put strategies in the place of ours: each is naive, and `broken` fails in experience 2."""
    calls: dict[str, Any] = {"built": [], "trained": []}

    class Fake:
        plugins: tuple[Any, ...] = ()

        def __init__(self, name: str, model: nn.Module) -> None:
            self.name, self.model, self.steps = name, model, 0

        def train(self, experiences: Any) -> None:
            self.steps += 1
            several = isinstance(experiences, list)
            calls["trained"].append((self.name, len(experiences) if several else 1))
            if self.name == "broken" and self.steps == 2:
                raise RuntimeError("this one breaks")

    def build(name: str, model: nn.Module, budget_bytes: int, **settings: Any) -> Fake:
        calls["built"].append((name, settings))
        return Fake(name, model)

    def memory_images(strategy: Fake) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10)

    def memory_use(strategy: Fake) -> MemoryUse:
        return MemoryUse(10**6 if strategy.name == "greedy" else 640, 10, 0.0)

    fake = SimpleNamespace(
        STRATEGIES=("naive", "joint", "broken", "greedy"),
        build=build,
        memory_use=memory_use,
        memory_images=memory_images,
        protocol_used=lambda strategy: {"loss_used": "plain", "renew_used": None},
    )
    monkeypatch.setitem(sys.modules, "strategies", fake)
    return calls


def results_in(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return report


def test_failures_leave_the_others_their_results(
    tmp_path: Path, fake_strategies: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--smoke", "--seed", "0,1", "--out", str(out)]) == 1
    report = results_in(out)
    assert report["seeds"] == [0, 1]
    assert sorted(report["class_order"]["0"]) == list(range(10))
    assert report["class_order"]["0"] != report["class_order"]["1"]
    results = report["results"]
    assert results["broken"]["0"] == {"error": "RuntimeError: this one breaks"}
    assert results["greedy"]["1"]["error"].startswith("BudgetError: greedy stores 1000000 bytes")
    for seed in ("0", "1"):
        (first, unseen), last = results["naive"][seed]["accuracy_matrix"]
        assert 0 <= first <= 1 and unseen is None and None not in last
        assert results["joint"][seed]["accuracy_matrix"][0] == [None, None]
        assert results["joint"][seed]["forgetting"] is None
    assert ("joint", 2) in fake_strategies["trained"]
    printed = capsys.readouterr()
    assert "this one breaks" in printed.err and "failed: broken, greedy" in printed.err
    assert "| naive |" in printed.out.replace("   ", "")
    shortcut = results["naive"]["0"]["shortcut"]
    assert 0 <= shortcut["clean"]["called_new"] <= 1 and shortcut["balanced_share"] == 0.5
    assert {path.stem for path in out.glob("*.png")} > {"accuracy", "memory", "shortcut"}


def test_resume_runs_only_what_is_missing(tmp_path: Path, fake_strategies: dict[str, Any]) -> None:
    common = ["--smoke", "--out", str(tmp_path)]
    assert main([*common, "--strategies", "naive,broken"]) == 1
    before = results_in(tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        main([*common, "--strategies", "naive"])
    fake_strategies["trained"].clear()
    assert main([*common, "--strategies", "naive", "--seed", "0,1", "--resume"]) == 0
    assert [name for name, _ in fake_strategies["trained"]] == ["naive"] * 2
    assert fake_strategies["built"][-1][1]["seed"] == 1
    after = results_in(tmp_path)
    assert after["seeds"] == [0, 1]
    assert after["results"]["naive"]["0"] == before["results"]["naive"]["0"]
    assert after["results"]["broken"] == before["results"]["broken"]
    # A failed run is tried again.
    assert main([*common, "--strategies", "broken", "--resume"]) == 1
    assert fake_strategies["built"][-1][0] == "broken"
    with pytest.raises(ConfigError, match=r"lr = 0\.01, and now it is 0\.5"):
        main([*common, "--strategies", "naive", "--resume", "--lr", "0.5"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--experiences", "11"], ConfigError, "from 1 to the 10 classes; got 11"),
        (["--strategies", "naive,magic"], ConfigError, "--strategies has no 'magic'"),
        (["--formats", "gif"], ConfigError, "--formats has no 'gif'"),
        (["--seed", "one"], ConfigError, "--seed"),
        (["--model", "slim_resnet18"], ConfigError, "--model convnet"),
        (["--set", "outer_stepz=1"], HMNReplayError, "outer_stepz"),
        (["--set", "effort=quick"], HMNReplayError, "effort"),
        (["--set", "labels=soft"], HMNReplayError, "pass --labels by itself"),
        (["--set", "label_augmentations=flip"], HMNReplayError, "no option 'label_augmentations'"),
        (["--width", "0"], ConfigError, "--width must be 1 or more"),
        (["--seed", "-1"], ConfigError, "--seed must be from 0"),
        (["--effort", "heroic"], ConfigError, "effort"),
        (["--train-images", "0"], ConfigError, "--train-images"),
        (["--data", "cifar100", "--data-root", "nowhere"], DataError,
         r"--download.*--data-root.*FILE.npz; --data digits"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_at_once(
    arguments: list[str],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    fake_strategies: dict[str, Any],
) -> None:
    with pytest.raises(error, match=message):
        main(["--smoke", "--out", str(tmp_path / "out"), *arguments])
    assert not fake_strategies["built"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "naive,jpeg", "--quality", "0"], "quality"),
        (["--strategies", "naive,hmn", "--kind", "raw"], "'raw' holds real images"),
        (["--strategies", "naive,derpp", "--mode", "memory_only"], "memory_only"),
        (["--epochs", "0"], "epochs must be 1 or more; got 0"),
        (["--lr", "-1"], "lr must be above 0; got -1.0"),
    ],
)
def test_what_a_strategy_refuses_is_told_before_any_is_trained(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--smoke", "--out", str(tmp_path), *arguments])
    assert not (tmp_path / "results.json").exists()


def test_settings_reach_the_strategies(tmp_path: Path, fake_strategies: dict[str, Any]) -> None:
    arguments = ["--smoke", "--strategies", "naive", "--lr", "0.2", "--mode", "memory_only"]
    arguments += [
        "--renew",
        "after",
        "--batch-size-mem",
        "7",
        "--expected-classes",
        "10",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    _, settings = fake_strategies["built"][-1]
    expected = {
        "lr": 0.2,
        "mode": "memory_only",
        "batch_size_mem": 7,
        "expected_classes": 10,
        "loss": "auto",
        "renew": "after",
    }
    assert settings.items() >= {**expected, "image_shape": (1, 8, 8), "num_classes": 10}.items()
    assert "outer_steps" not in settings


def test_experiences_may_differ_by_a_class(tmp_path: Path, fake_strategies: dict[str, Any]) -> None:
    arguments = ["--smoke", "--strategies", "naive", "--experiences", "4", "--out", str(tmp_path)]
    assert main([*arguments, "--formats", "svg,pdf"]) == 0
    report = results_in(tmp_path)
    assert report["configuration"]["classes_per_experience"] == [3, 3, 2, 2]
    matrix = report["results"]["naive"]["0"]["accuracy_matrix"]
    assert [sum(value is not None for value in row) for row in matrix] == [1, 2, 3, 4]
    assert {path.name for path in tmp_path.glob("[!.]*")} == {
        "results.json", "accuracy.svg", "accuracy.pdf", "memory.svg", "memory.pdf",
        "shortcut.svg", "shortcut.pdf",
        "memory-naive-seed0.png",
    }  # fmt: skip


def test_slim_resnet18_normalises_and_depends_on_the_seed(make_set: Any) -> None:
    args = split_cifar100.parse_arguments(["--model", "slim_resnet18", "--width", "2"])
    train = make_set(image_shape=(3, 32, 32))
    state = torch.get_rng_state()
    models = [split_cifar100.build_model(args, train, seed=seed) for seed in (0, 0, 1)]
    assert torch.get_rng_state().equal(state)
    outputs = [model.eval()(train.floats()) for model in models]
    assert outputs[0].shape == (24, 3)
    assert outputs[0].equal(outputs[1]) and not outputs[0].equal(outputs[2])


def test_smoke_runs_every_strategy_on_the_digits(tmp_path: Path) -> None:
    import strategies

    assert main(["--smoke", "--out", str(tmp_path)]) == 0
    report = results_in(tmp_path)
    assert set(report["results"]) == set(strategies.STRATEGIES)
    for name, runs in report["results"].items():
        run = runs["0"]
        assert 0 <= run["memory_bytes"] <= 4096, name
        assert 0 <= run["final_accuracy"] <= 1 and 0 <= run["average_accuracy"] <= 1
        assert run["train_seconds"] > 0 and run["memory_seconds"] >= 0
        assert run["loss_used"] in ("separated", "plain", "DER", "ER_ACE")
        assert run["renew_used"] in ("before", None)
        assert run["distill_used"] == (run["renew_used"] == "before")
        assert run["peak_rss_bytes"] > 2**20 and math.isfinite(run["peak_rss_bytes"])
    # Every memory of this package is replayed under the same loss, and is in a file.
    for name in ("hmn", "fred", "jpeg", "lossless", "subsampled", "raw", "herding"):
        run, path = report["results"][name]["0"], tmp_path / f"memory-{name}-seed0.hmn"
        assert (run["loss_used"], run["renew_used"]) == ("separated", "before")
        assert path.stat().st_size == run["memory_bytes"]
        shortcut = run["shortcut"]
        assert 0 <= shortcut["decoded"]["called_new"] <= 1
        assert 0 <= shortcut["codec"]["called_new"] <= 1
        assert hmn_replay.load(path).num_images == run["memory_images"]
        psnr = run["psnr_by_experience"]
        assert len(psnr) == 2 and all(5 < value <= 100 for value in psnr), name
        assert (psnr == [100.0, 100.0]) == (name in ("lossless", "raw", "herding")), name
    assert report["results"]["gdumb"]["0"]["psnr_by_experience"] is None
    assert (tmp_path / "accuracy.png").exists() and (tmp_path / "memory.png").exists()


def test_real_images_may_be_selected_by_a_network(tmp_path: Path) -> None:
    names = ("jpeg", "raw")
    common = ["--smoke", "--strategies", ",".join(names), "--quality", "20", "--budget", "2KiB"]
    for selection in ("random", "herding"):
        out = tmp_path / selection
        assert main([*common, "--selection", selection, "--out", str(out)]) == 0
    for name in names:
        files = [tmp_path / each / f"memory-{name}-seed0.hmn" for each in ("random", "herding")]
        drawn, herded = map(hmn_replay.load, files)
        assert drawn.num_classes == herded.num_classes
        assert not drawn.decode()[0].equal(herded.decode()[0])


def test_a_tuned_stream_says_what_it_was_before(tmp_path: Path) -> None:
    common = ["--smoke", "--strategies", "raw"]
    assert main([*common, "--out", str(tmp_path / "none")]) == 0
    assert main([*common, "--tune", "all", "--out", str(tmp_path / "all")]) == 0
    plain, tuned = (results_in(tmp_path / name)["results"]["raw"]["0"] for name in ("none", "all"))
    assert plain["untuned"] is None
    assert tuned["untuned"]["accuracy_seen"] == plain["accuracy_seen"] != tuned["accuracy_seen"]
