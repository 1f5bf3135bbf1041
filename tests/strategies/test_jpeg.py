"""JPEG replay: scans that stay as they are, a file that is full, a quality that is chosen."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from hmn_replay.baselines.jpeg import encode_jpeg_scans
from hmn_replay.baselines.real_images import RealImages
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.training.train import TrainingConfig
from strategies import jpeg
from strategies.jpeg import QUALITIES, JPEGReplay, choose_quality, extend_jpeg
from tests.strategies.support import BUDGET, build, easy_set, make_stream


def classes_of(*labels: int) -> LabelledImages:
    data = easy_set(60)
    return data.take(torch.isin(data.labels, torch.tensor(labels)))


def test_scans_of_old_classes_stay_byte_for_byte_and_the_file_stays_full() -> None:
    memory: RealImages | None = None
    for number, labels in enumerate([(0, 1), (4, 5), (2, 3)], 1):
        before = {} if memory is None else memory.scans
        memory = extend_jpeg(memory, classes_of(*labels), 2500, quality=30, seed=number)
        assert memory.file_bytes == len(memory.serialise()) <= 2500
        # One scan more would not fit, with its length in a byte and padding.
        assert memory.file_bytes > 2500 - max(memory.arrays["lengths"].tolist()) - 24
        assert max(memory.images_per_class) - min(memory.images_per_class) <= 1
        for label, scans in before.items():
            assert memory.scans[label] == scans[: len(memory.scans[label])]
    assert memory is not None
    assert memory.classes.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_dropped_is_drawn_by_the_seed() -> None:
    old = extend_jpeg(None, classes_of(0, 1), 2500, quality=30, seed=0)
    other = extend_jpeg(None, classes_of(0, 1), 2500, quality=30, seed=1)
    again = extend_jpeg(None, classes_of(0, 1), 2500, quality=30, seed=0)
    assert old.serialise() == again.serialise() != other.serialise()


def test_a_class_that_comes_again_is_drawn_anew() -> None:
    old = extend_jpeg(None, classes_of(0, 1), 1500, quality=30, seed=0)
    new = extend_jpeg(old, classes_of(1, 2), 1500, quality=30, seed=1)
    assert new.classes.tolist() == [0, 1, 2]
    assert new.scans[0] == old.scans[0][: len(new.scans[0])]
    assert not set(new.scans[1]) <= set(old.scans[1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32)])
def test_all_scans_stand_under_the_first_header(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, *shape), generator=generator, dtype=torch.uint8)
    first = LabelledImages(images[:6], torch.arange(6) % 2)
    memory = extend_jpeg(None, first, 20_000, quality=10)
    second = LabelledImages(images[6:], torch.arange(6) % 2 + 2)
    memory = extend_jpeg(memory, second, 20_000, quality=10)
    headers = [encode_jpeg_scans(images, 10, subsampling=name)[0] for name in ("4:2:0", "4:4:4")]
    assert memory.arrays["header"].tobytes() in headers
    assert memory.decode()[0].shape == (12, *shape)


def test_the_quality_is_chosen_at_the_share_that_the_classes_will_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    scores = iter([0.3, 0.5, 0.9, 0.9, 0.4, 0.2] * 3)

    def fake_evaluate(memory: RealImages, held_out: LabelledImages, **_: Any) -> tuple[Any, float]:
        sizes.append(memory.file_bytes)
        assert len(held_out) == 24
        return None, next(scores)

    monkeypatch.setattr(jpeg, "evaluate", fake_evaluate)
    for expected_classes, share in ((None, 1200), (4, 6000), (1, 12_000)):
        sizes.clear()
        quality, accuracies = choose_quality(
            classes_of(0, 1), 12_000, expected_classes=expected_classes
        )
        assert quality == 20
        assert list(accuracies) == [str(quality) for quality in QUALITIES]
        assert max(sizes) <= share
    assert len(sizes) == len(QUALITIES)


def test_the_quality_is_chosen_by_real_trainings() -> None:
    training = TrainingConfig(width=4, num_passes=40)
    options: dict[str, Any] = {"training": training, "device": "cpu"}
    quality, accuracies = choose_quality(classes_of(0, 1, 2), 4000, **options)
    assert quality in QUALITIES
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    assert choose_quality(classes_of(0, 1, 2), 4000, **options) == (quality, accuracies)


def test_where_there_is_nothing_to_choose_by_the_quality_is_20() -> None:
    assert choose_quality(classes_of(0), 4000) == (20, {})
    assert choose_quality(easy_set(1), 4000) == (20, {})
    assert choose_quality(classes_of(0, 1), 100) == (20, {})


def test_a_quality_may_be_given() -> None:
    strategy = build("jpeg", quality=35)
    for experience in make_stream(num_per_class=8, num_experiences=2):
        strategy.train(experience)
    replay = strategy.plugins[0]
    assert isinstance(replay, JPEGReplay)
    assert [entry["quality"] for entry in replay.report] == [35, 35]
    for wrong in (0, 101, 2.5):
        with pytest.raises(ConfigError, match="quality is None or a whole number from 1 to 100"):
            build("jpeg", quality=wrong)


def test_a_run_that_goes_on_from_its_state_ends_with_the_same_file() -> None:
    stream = make_stream(num_per_class=20)

    def run(restart: bool) -> bytes:
        torch.manual_seed(0)
        strategy = build("jpeg")
        for experience in stream:
            strategy.train(experience)
            if restart:
                file = io.BytesIO()
                torch.save(strategy.plugins[0].state_dict(), file)
                file.seek(0)
                strategy = build("jpeg")
                strategy.plugins[0].load_state_dict(torch.load(file, weights_only=True))
        replay = strategy.plugins[0]
        assert replay.memory.file_bytes <= BUDGET
        data: bytes = replay.memory.serialise()
        return data

    assert run(restart=False) == run(restart=True)


def test_a_budget_too_small_for_one_image_is_told() -> None:
    with pytest.raises(BudgetError, match="does not hold one image"):
        extend_jpeg(None, classes_of(0, 1), 300, quality=30)
