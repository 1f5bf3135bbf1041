"""What a gatherer keeps of images that come in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hmn_replay.data.images import LabelledImages
from hmn_replay.replay.gatherer import Gatherer


def piece(labels: Sequence[int], first: int = 0) -> LabelledImages:
    """Make images whose pixels tell their number."""
    numbers = torch.arange(first, first + len(labels))
    images = numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)
    return LabelledImages(images.contiguous(), torch.tensor(labels))


def counts(gatherer: Gatherer) -> dict[int, int]:
    data = gatherer.images()
    assert data is not None
    values, number = data.labels.unique(return_counts=True)
    return dict(zip(values.tolist(), number.tolist(), strict=True))


def test_a_gatherer_keeps_all_that_fits() -> None:
    gatherer = Gatherer(6, seed=0)
    gatherer.add(piece([1, 2, 1]))
    gatherer.add(piece([5, 5, 5], first=3))
    data = gatherer.images()
    assert data is not None
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert data.labels.tolist() == [1, 2, 1, 5, 5, 5]


def test_what_fits_costs_the_same_however_much_is_there() -> None:
    class Counted(TorchDispatchMode):
        """Counts the values that torch computes."""

        num_values = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            self.num_values += result.numel() if isinstance(result, Tensor) else 0
            return result

    def cost(gatherer: Gatherer) -> int:
        counted: Counted = Counted()  # type: ignore[no-untyped-call]
        with counted:
            gatherer.add(piece([3, 4]))
        return counted.num_values

    little, much = Gatherer(1000, seed=0), Gatherer(1000, seed=0)
    much.add(piece([0, 1] * 100))
    assert cost(little) == cost(much)


def test_a_full_gatherer_is_class_balanced() -> None:
    gatherer = Gatherer(9, seed=0)
    for start in range(0, 200, 10):
        gatherer.add(piece([0] * 7 + [1] * 3, first=start))
        assert len(gatherer) <= 9
    assert sorted(counts(gatherer).values()) == [4, 5]
    gatherer.add(piece([2, 2]))
    found = counts(gatherer)
    assert found[2] == 2 and sum(found.values()) == 9 and {found[0], found[1]} == {3, 4}
    assert gatherer.num_seen == {0: 140, 1: 60, 2: 2}


def test_one_image_of_each_class_stays_however_many_there_are() -> None:
    gatherer = Gatherer(3, seed=0)
    for label in range(7):
        gatherer.add(piece([label] * 4, first=4 * label))
    assert counts(gatherer) == dict.fromkeys(range(7), 1)


def test_each_image_is_as_likely_to_be_kept_wherever_it_came() -> None:
    kept = torch.zeros(40)
    for seed in range(150):
        gatherer = Gatherer(8, seed=seed)
        for start in range(0, 40, 5):
            gatherer.add(piece([0] * 5, first=start))
        data = gatherer.images()
        assert data is not None
        kept[data.images[:, 0, 0, 0].long()] += 1
    # 150 draws of 1 in 5: a mean of 30, and a deviation of 5.
    assert float(kept.mean()) == 30
    assert abs(float(kept[:20].mean()) - 30) < 4 and float(kept.min()) > 10


def test_what_a_gatherer_keeps_holds_no_piece_alive() -> None:
    data = piece([0, 0, 0])
    gatherer = Gatherer(2, seed=0)
    gatherer.add(data)
    data.images.fill_(9)
    kept = gatherer.images()
    assert kept is not None and 9 not in kept.images


def test_a_state_gives_the_same_gatherer() -> None:
    first, second, restored = (Gatherer(8, seed=0) for _ in range(3))
    restored.load_state_dict(first.state_dict())
    assert restored.images() is None
    for gatherer in (first, second):
        gatherer.add(piece([0, 1] * 10))
        gatherer.add(piece([2], first=50))
    restored.load_state_dict(first.state_dict())
    assert len(restored) == len(first) == 8
    for gatherer in (second, restored):
        gatherer.add(piece([1, 2] * 5, first=100))
    a, b = second.images(), restored.images()
    assert a is not None and b is not None
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    restored.clear()
    assert restored.images() is None and not restored.num_seen
