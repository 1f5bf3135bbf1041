"""The bounded sample of raw images, and where an experience that comes in pieces ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hmn_replay.avalanche.gathering import Gatherer, RawBuffer
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import DataError

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def piece(labels: Sequence[int], first: int = 0) -> LabelledImages:
    """Make images whose pixels tell their number."""
    numbers = torch.arange(first, first + len(labels))
    images = numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)
    return LabelledImages(images.contiguous(), torch.tensor(labels))


def counts(data: LabelledImages) -> dict[int, int]:
    values, number = data.labels.unique(return_counts=True)
    return dict(zip(values.tolist(), number.tolist(), strict=True))


def test_a_buffer_keeps_all_that_fits() -> None:
    buffer = RawBuffer(6, seed=0)
    buffer.add(piece([1, 2, 1]))
    buffer.add(piece([5, 5, 5], first=3))
    data = buffer.images()
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert data.labels.tolist() == [1, 2, 1, 5, 5, 5]


def test_a_full_buffer_is_class_balanced() -> None:
    buffer = RawBuffer(9, seed=0)
    for start in range(0, 200, 10):
        buffer.add(piece([0] * 7 + [1] * 3, first=start))
        assert len(buffer) <= 9
    assert sorted(counts(buffer.images()).values()) == [4, 5]
    buffer.add(piece([2, 2]))
    found = counts(buffer.images())
    assert found[2] == 2 and sum(found.values()) == 9 and {found[0], found[1]} == {3, 4}
    assert buffer.num_seen == {0: 140, 1: 60, 2: 2}


def test_each_image_is_as_likely_to_be_kept_wherever_it_came() -> None:
    kept = torch.zeros(40)
    for seed in range(150):
        buffer = RawBuffer(8, seed=seed)
        for start in range(0, 40, 5):
            buffer.add(piece([0] * 5, first=start))
        kept[buffer.images().images[:, 0, 0, 0].long()] += 1
    # 150 draws of 1 in 5: a mean of 30, and a deviation of 5.
    assert float(kept.mean()) == 30
    assert abs(float(kept[:20].mean()) - 30) < 4 and float(kept.min()) > 10


def test_what_a_buffer_keeps_holds_no_piece_alive() -> None:
    data = piece([0, 0, 0])
    buffer = RawBuffer(2, seed=0)
    buffer.add(data)
    data.images.fill_(9)
    assert 9 not in buffer.images().images


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_an_experience_ends_where_only_new_classes_come(size: int, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(size)
    order = [
        torch.randint(num_classes, (200,), generator=generator) + 10 * number for number in range(4)
    ]
    gatherer = Gatherer(1000, seed=0)
    ended = []
    for labels in order:
        for part in labels.split(size):
            before = gatherer.add(piece(part.tolist()))
            if before is not None:
                ended.append(before)
    last = gatherer.images()
    assert last is not None
    ended.append(last)
    assert [len(data) for data in ended] == [200] * 4
    for data, labels in zip(ended, order, strict=True):
        assert sorted(data.labels.tolist()) == sorted(labels.tolist())


def test_single_images_are_not_taken_for_experiences() -> None:
    gatherer = Gatherer(100, seed=0)
    for label in range(20):
        assert gatherer.add(piece([label])) is None
    assert len(gatherer) == 20


def test_a_class_that_comes_late_is_no_new_experience() -> None:
    gatherer = Gatherer(100, seed=0)
    gatherer.add(piece([0, 1] * 10))
    assert gatherer.add(piece([2])) is None
    assert gatherer.add(piece([0])) is None
    assert gatherer.add(piece([2, 1])) is None
    data = gatherer.images()
    assert data is not None and counts(data) == {0: 11, 1: 11, 2: 2} == gatherer.num_seen


def test_a_told_boundary_is_believed() -> None:
    gatherer = Gatherer(100, seed=0)
    assert gatherer.add(piece([0, 1]), is_first=True) is None
    assert gatherer.add(piece([2, 3] * 20), is_first=False) is None
    ended = gatherer.add(piece([0, 1]), is_first=True)
    assert ended is not None and counts(ended) == {0: 1, 1: 1, 2: 20, 3: 20}
    assert len(gatherer) == 2
    gatherer.clear()
    assert gatherer.images() is None


def test_a_state_gives_the_same_gatherer() -> None:
    first, second = Gatherer(8, seed=0), Gatherer(8, seed=0)
    for gatherer in (first, second):
        gatherer.add(piece([0, 1] * 10))
        gatherer.add(piece([2], first=50))
    restored = Gatherer(8, seed=0)
    restored.load_state_dict(first.state_dict())
    assert len(restored) == len(first) == 9
    for gatherer in (second, restored):
        gatherer.add(piece([1, 2] * 5, first=100))
    a, b = second.images(), restored.images()
    assert a is not None and b is not None
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_an_empty_state_gives_an_empty_gatherer() -> None:
    gatherer = Gatherer(8, seed=0)
    gatherer.load_state_dict(Gatherer(8, seed=0).state_dict())
    assert gatherer.images() is None


@pytest.mark.parametrize("name", ["gathered.images", "waiting.labels", "gathered.seen"])
def test_a_damaged_state_is_refused(name: str) -> None:
    gatherer = Gatherer(8, seed=0)
    gatherer.add(piece([0, 1]))
    state = gatherer.state_dict()
    for broken in (
        {k: v for k, v in state.items() if k != name},
        {**state, name: torch.zeros(3)},
        {**state, "gathered.labels": torch.zeros(20)},
    ):
        with pytest.raises(DataError, match="not the gathered images"):
            Gatherer(8, seed=0).load_state_dict(broken)
