"""Scores of a memory beside real images, by count and by bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hmn_replay import (
    LabelledImages,
    RealMemory,
    ReplayMemory,
    baselines,
    evaluate,
    jpeg_images,
    raw_images,
    scores,
    select_images,
)
from hmn_replay.baselines.scores import ddranking_score
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.training.train import TrainingConfig
from tests.console import Console
from tests.stripes import stripes
from tests.support import real

CONFIG = TrainingConfig(width=4, num_passes=240, batch_size=16)
OPTIONS: dict[str, Any] = {"config": CONFIG, "device": "cpu"}
# Where no accuracy matters.
UNTRAINED: dict[str, Any] = {**OPTIONS, "config": TrainingConfig(width=4, num_passes=16)}


def data(num_images: int, seed: int = 0) -> LabelledImages:
    return LabelledImages(*stripes(num_images, labels=(0, 1, 2), seed=seed))


def test_they_are_differences_of_the_accuracies_that_they_name() -> None:
    train, test = data(90), data(30, seed=1)
    memory = raw_images(train, 4000, seed=7)
    lines: list[str] = []
    found = scores(memory, train, test, repeats=2, seed=3, progress=lines.append, **OPTIONS)
    accuracies = found["accuracies"]
    assert len(lines) == 2 * len(accuracies) == 14
    assert all(len(values) == 2 for values in accuracies.values())
    assert found["num_images"] == memory.num_images and found["file_bytes"] == memory.file_bytes

    def train_on(source: Any, seed: int, **options: Any) -> float:
        _, accuracy = evaluate(source, test, seed=seed, **OPTIONS, **options)
        return float(accuracy)

    bare = {"augmentations": (), "cutmix_probability": 0.0}
    for place, seed in enumerate((3, 4)):
        order = select_images(train, num_images=memory.num_images, seed=seed)
        expected = {
            "memory": train_on(memory, seed),
            "real": train_on(train, seed),
            "random_count": train_on(train.take(order), seed),
            "random_bytes_raw": train_on(raw_images(train, memory.file_bytes, seed=seed), seed),
            "memory_unaugmented": train_on(memory, seed, **bare),
            "random_count_unaugmented": train_on(train.take(order), seed, **bare),
        }
        assert {name: accuracies[name][place] for name in expected} == expected

    def mean(name: str) -> float:
        return float(sum(accuracies[name]) / 2)

    assert found["hard_label_recovery"]["mean"] == pytest.approx(mean("real") - mean("memory"))
    for name, told in found["improvement_over_random"].items():
        assert told["mean"] == pytest.approx(mean("memory") - mean(f"random_{name}"))
    lrs = [
        ddranking_score(memory - few, memory - real)
        for memory, few, real in zip(
            *(accuracies[name] for name in ("memory", "random_count", "real")), strict=True
        )
    ]
    assert found["label_robust_score"]["count"]["mean"] == pytest.approx(sum(lrs) / 2)
    least = [
        max(pair)
        for pair in zip(*(accuracies[f"random_bytes_{k}"] for k in ("raw", "jpeg")), strict=True)
    ]
    by_bytes = [
        ddranking_score(memory - few, memory - real)
        for memory, few, real in zip(accuracies["memory"], least, accuracies["real"], strict=True)
    ]
    assert found["label_robust_score"]["bytes"]["mean"] == pytest.approx(sum(by_bytes) / 2)
    assert set(found["augmentation_robust_score"]) == {"count"}
    assert json.loads(json.dumps(found)) == found


def test_the_score_is_that_of_the_paper() -> None:
    assert ddranking_score(1, 1) == pytest.approx(1) and ddranking_score(-1, -1) == 0
    alpha = 0.3 * 0.2 + 0.7 * -0.1
    expected = (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert ddranking_score(0.2, -0.1, 0.3) == pytest.approx(expected)


@pytest.fixture
def one_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take JPEG's quality as chosen: a choice trains for longer than these tests do."""
    monkeypatch.setattr(baselines.scores, "choose_quality", lambda *_, **__: (20, {}))


@pytest.mark.usefixtures("one_quality")
def test_what_does_not_fit_is_left_out() -> None:
    memory = real("jpeg", classes=(0, 1, 2), counts=(1, 1, 1))
    found = scores(memory, data(60), data(12, seed=1), repeats=1, **UNTRAINED)
    assert "bytes_raw" not in found["improvement_over_random"]
    assert found["hard_label_recovery"]["std"] == 0.0


@pytest.mark.usefixtures("one_quality")
@pytest.mark.filterwarnings("ignore:.* test images are of classes that the source has no image of")
def test_what_fits_for_some_seeds_alone_is_left_out() -> None:
    # Some images take many more bytes as JPEG than others.
    images = torch.full((21, 3, 32, 32), 90, dtype=torch.uint8)
    images[:10] = torch.randint(256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    train = LabelledImages(images, torch.tensor([*[0, 1] * 10, 2]))

    def filled(budget: int, seed: int) -> RealMemory:
        return jpeg_images(train, budget, quality=20, seed=seed)

    memory = filled(1000, 2)
    assert len({filled(memory.file_bytes, seed).num_classes for seed in (0, 1)}) > 1
    found = scores(memory, train, train, repeats=2, **UNTRAINED)
    assert "random_bytes_jpeg" not in found["accuracies"] and found["jpeg_quality"] is None
    assert all(len(values) == 2 for values in found["accuracies"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_set": stripes(9, labels=(5, 6, 7))}, "test_set has none of the memory's labels"),
        ({"train_set": (torch.zeros(2, 3, 9, 9), [0, 1])}, r"train_set has images of \(3, 9, 9\)"),
        ({"test_set": (torch.zeros(2, 3, 9, 9), [0, 1])}, r"test_set has images of \(3, 9, 9\)"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_any_training(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained")

    monkeypatch.setattr(baselines.scores, "evaluate", train)
    monkeypatch.setattr(baselines.scores, "choose_quality", train)
    memory = real("jpeg", classes=(0, 1, 2), counts=(1, 1, 1))
    sets = {"train_set": data(9), "test_set": data(9), **change}
    with pytest.raises(DataError, match=message):
        scores(memory, **sets, **OPTIONS)


def test_features_have_no_scores() -> None:
    memory = ReplayMemory("3 KiB", "raw-features")
    features = torch.arange(160.0).view(20, 8, 1, 1), torch.arange(20) % 2
    memory.update(features)
    assert memory.memory is not None
    with pytest.raises(ConfigError, match="a memory of features is scored by evaluate"):
        scores(memory.memory, data(9), data(9), **OPTIONS)


@pytest.mark.usefixtures("one_quality")
def test_progress_is_printed_or_given_to_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    memory, lines = real("jpeg", classes=(0, 1, 2), counts=(1, 1, 1)), list[str]()
    for progress in (True, lines.append):
        scores(memory, data(9), data(6), repeats=1, progress=progress, **UNTRAINED)
        printed = capsys.readouterr().err.splitlines()
        assert bool(printed) == (progress is True)
        assert not printed or "seed 0, random count unaugmented: " in printed[-1]
    assert len(lines) >= 5


@pytest.mark.parametrize(("option", "value"), [("repeats", 0), ("weight", 1.5)])
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    memory: Any = real("raw")
    with pytest.raises(ConfigError, match=option):
        scores(memory, data(60), data(12), **{option: value})


def test_the_command_prints_them(run: Console, tmp_path: Path) -> None:
    images = torch.randint(0, 255, (20, 1, 8, 8), dtype=torch.uint8)
    memory = raw_images(LabelledImages(images, torch.arange(20) % 10), 2000)
    memory.save(tmp_path / "raw.hmn")
    words = ("--scores", "--width", 4, "--passes", 100, "--repeats", 1, "--device", "cpu")
    found = json.loads(run("evaluate", tmp_path / "raw.hmn", *words, "--json"))
    assert found["passes"] == 100 and len(found["accuracies"]["real"]) == 1
    assert "seed 0, random count unaugmented: " in run.err
    text = run("evaluate", tmp_path / "raw.hmn", *words, "--quiet")
    for line in ("real less memory", "memory less random, count", "label robust score, count"):
        assert line in text
    assert "±" not in text, "one seed has no deviation"
