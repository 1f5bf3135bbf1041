"""How full a file is: further images for what is left, or a reason why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hmn_replay import condense, load_dataset
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError, HMNReplayWarning
from hmn_replay.memory import HierarchicalMemory, LearnedMemory
from tests.support import TINY, Observer, at_call, hmn_layout, made

DIGITS = load_dataset("digits", "train")


def digits(*labels: int, each: int = 150) -> LabelledImages:
    return DIGITS.take(torch.cat([DIGITS.of_class(label)[:each] for label in labels]))


def short(data: LabelledImages, budget: int, **options: Any) -> LearnedMemory:
    settings = {**TINY, "outer_steps": 1, "beta_grid": (), "over_budget": 0.1}
    return condense(data, budget, **{**settings, **options})


@pytest.mark.parametrize(
    ("labels", "budget", "options"),
    [
        ((0, 1), 2048, {}),
        ((0, 1, 2, 3, 4), 4096, {}),
        ((0, 1), 2048, {"warm_start_steps": 0}),
        ((0, 1), 2048, {"warm_start_steps": 60, "over_budget": 0.0}),
        ((0, 1, 2), 2500, {"outer_steps": 0}),
        (tuple(range(10)), 4096, {"beta_grid": (0.0, 1.0), "over_budget": 0.0}),
    ],
)
def test_a_short_training_fills_its_file(
    labels: tuple[int, ...], budget: int, options: dict[str, Any]
) -> None:
    data = digits(*labels)
    memory = short(data, budget, expected_classes=10, **options)
    report = memory.report
    assert 0.97 * budget <= memory.file_bytes <= budget
    assert report["fill"] == memory.file_bytes / budget and report["unused_reason"] is None
    counts = memory.images_per_class
    real = [len(data.of_class(label)) for label in memory.classes.tolist()]
    for count, most in zip(counts, real, strict=True):
        assert count <= most and (count == most or count >= max(counts) - 1)


def test_a_file_is_filled_alike_again() -> None:
    one, two = (short(digits(0, 1), 2048, expected_classes=10) for _ in range(2))
    assert one.to_bytes() == two.to_bytes()


def test_where_all_real_images_are_in_it_the_report_says_so() -> None:
    memory = short(digits(0, 1, each=20), 2048, expected_classes=10)
    assert memory.images_per_class == [20, 20]
    assert memory.report["fill"] < 0.97
    assert memory.report["unused_reason"] == (
        "the memory has an image for every real one of its new classes"
    )


def test_where_real_images_fill_little_of_it_that_is_said() -> None:
    with pytest.warns(HMNReplayWarning, match=r"every real one.*are enough.* warm start longer"):
        memory = short(digits(0, 1, each=20), 20_000)
    assert memory.report["fill"] < 0.1
    short(digits(0, 1, each=20), 20_000, expected_classes=10)  # others will fill it


def test_room_for_labels_that_are_made_later_is_no_room_left() -> None:
    options: dict[str, Any] = {"kind": "fred", "over_budget": 0.0, "expected_classes": 10}
    first = short(digits(0, 1), 2048, **options)
    first.set_soft_labels(torch.rand(len(first), 2, generator=torch.Generator()).softmax(dim=1))
    first.shrink()
    second = short(digits(2, 3), 2048, memory=first, **options)
    assert second.report["fill"] < 0.97 and second.report["unused_reason"] is None


def test_added_classes_fill_it_and_leave_old_images_alone() -> None:
    first = short(digits(0, 1, each=20), 2048, expected_classes=10)
    images = first.decode(dtype=torch.uint8)[0]
    second = short(digits(2, 3), 2048, memory=first)
    assert second.report["fill"] >= 0.97
    old = second.decode(torch.isin(second.labels, first.classes).nonzero().flatten())[0]
    old = old.mul(255).round().to(torch.uint8)
    assert all(any(image.equal(other) for other in images) for image in old)
    assert max(second.images_per_class) <= 150


SOFT: dict[str, Any] = {"labels": "soft", "teacher_passes": 400, "teacher_width": 8}


def test_images_that_are_added_have_soft_labels_like_the_others() -> None:
    memory = short(digits(0, 1), 2048, **{**SOFT, "teacher_passes": 6000})
    assert memory.report["fill"] >= 0.97 and memory.report["unused_reason"] is None
    assert memory.is_soft.all()
    # What the teacher says of them is of their own class, as of those that were matched.
    rows, index = memory.soft_labels(), memory.class_index
    own = rows[torch.arange(len(rows)), index]
    last = torch.cat([(index == k).nonzero().flatten()[-5:] for k in range(2)])
    assert own[last].mean() > 0.6


def test_a_run_that_goes_on_after_its_labels_fills_its_file_alike(tmp_path: Path) -> None:
    data, checkpoint, team = digits(0, 1), tmp_path / "run", Observer()
    expected = short(data, 2048, team=team, **SOFT)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # in the training of the pruning
        late = Observer(sum_gradients=at_call(team.calls["sum_gradients"], stop))
        short(data, 2048, checkpoint=checkpoint, team=late, **SOFT)
    again = Observer()
    memory = short(data, 2048, checkpoint=checkpoint, team=again, **SOFT)
    assert memory.to_bytes() == expected.to_bytes()
    assert again.calls["sum_gradients"] < team.calls["sum_gradients"]


@pytest.mark.parametrize("kind", ["hmn", "fred", "pixels", "idc", "haba", "linba"])
def test_images_are_added_behind_those_of_their_class(kind: str) -> None:
    memory = made(kind, "float32")
    size = memory.layout.group_size
    before, counts = memory.decode()[0], memory.images_per_class
    labels = memory.labels.tolist()
    added = memory.add_images([2 * size, size], seed=3)
    assert memory.images_per_class == [counts[0] + 2 * size, counts[1] + size]
    assert memory.labels.tolist() == [7] * (counts[0] + 2 * size) + [-3] * (counts[1] + size)
    assert added.tolist() == [
        *range(counts[0], counts[0] + 2 * size),
        *range(memory.num_images - size, memory.num_images),
    ]
    others = torch.ones(memory.num_images, dtype=torch.bool).index_fill(0, added, False)
    assert memory.decode(others.nonzero().flatten())[0].equal(before)
    assert memory.labels[others].tolist() == labels
    memory.keep(others.nonzero().flatten())
    assert memory.decode()[0].equal(before)


def test_images_that_are_added_have_hard_labels() -> None:
    memory = made("hmn", "entropy")
    memory.set_soft_labels(torch.tensor([[0.6, 0.4]]).expand(memory.num_images, 2))
    added = memory.add_images([1, 0])
    assert not memory.is_soft[added].any() and int(memory.is_soft.sum()) == memory.num_images - 1


def test_images_are_not_added_where_scales_are_shared() -> None:
    with pytest.raises(ConfigError, match="not where values are int8"):
        made("hmn", "int8").add_images([1, 1])


def test_an_encoded_image_is_nearer_than_a_random_one() -> None:
    data = digits(0, 1, 2)
    options = {"warm_start_steps": 80, "warm_start_batch": 64, "outer_steps": 0}
    memory = short(data, 2048, **options)
    before = memory.decode()[0]
    real = digits(0, 1, 2).floats(torch.arange(9) * 7)
    added = memory.add_images([3, 3, 3])
    others = torch.ones(memory.num_images, dtype=torch.bool).index_fill(0, added, False)
    wanted = torch.zeros(memory.num_images, 1, 8, 8).index_copy(0, added, real)

    def error() -> float:
        return float((memory.decode(added)[0] - real).square().mean())

    random = error()
    assert memory.set_images(added, lambda positions: wanted[positions])
    assert error() < 0.7 * random
    assert memory.decode(others.nonzero().flatten())[0].equal(before)


def test_a_kind_that_encodes_nothing_says_so() -> None:
    memory = made("haba", "float32")
    before = memory.to_bytes()
    assert not memory.set_images(torch.tensor([0]), lambda positions: torch.zeros(1, 3, 8, 8))
    lone = HierarchicalMemory(hmn_layout((3, 8, 8)), [0], 1)
    assert not lone.set_images(torch.tensor([0]), lambda positions: torch.zeros(1, 3, 8, 8))
    assert memory.to_bytes() == before


def test_room_is_left_for_labels_that_come_later() -> None:
    """Soft labels that are set afterwards push few images out."""
    first = short(digits(0, 1), 2048, expected_classes=10)
    first.set_soft_labels(torch.tensor([[0.6, 0.4]]).expand(first.num_images, 2))
    first.shrink()
    second = short(digits(2, 3), 2048, memory=first)
    assert second.file_bytes <= 2048 and second.report["fill"] >= 0.9
    bare = (~second.is_soft).nonzero().flatten()
    count = second.num_images
    rows = torch.tensor([0.3, 0.2, 0.3, 0.2]).expand(len(bare), 4)
    second.set_soft_labels(rows, bare)
    second.shrink()
    assert second.num_images >= 0.9 * count
