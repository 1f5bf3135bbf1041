"""Images that are looked up are those that a tensor of them all would give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.data.lookup import (
    ImageLookup,
    LabelledView,
    first_in_turn,
    held_on,
    images_at_once,
    join_images,
    rank_in_class,
    take_images,
    without_repeats,
)

SHAPE = (2, 3, 4)


def some_images(count: int, first: int = 0) -> Tensor:
    """Images of one value each: their number."""
    return (first + torch.arange(count, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, *SHAPE)


def numbers(images: Tensor) -> list[int]:
    assert images.shape[1:] == SHAPE
    return images[:, 0, 0, 0].tolist()


def test_it_stands_for_a_tensor() -> None:
    images, asked = some_images(7).contiguous(), list[Tensor]()

    def fetch(positions: Tensor) -> Tensor:
        asked.append(positions)
        return images[positions]

    lookup = ImageLookup(fetch, images.shape, images.dtype)
    assert lookup.shape == images.shape
    assert lookup.dtype == torch.uint8
    assert len(lookup) == 7
    assert asked == []
    indices: list[Tensor | slice] = [
        torch.tensor([6, 0, 0]),
        torch.tensor([], dtype=torch.int64),
        images[:, 0, 0, 0] > 3,
        slice(2, 5),
        slice(-2, None),
    ]
    for index in indices:
        assert lookup[index].equal(images[index])
    assert [len(positions) for positions in asked] == [3, 0, 3, 3, 2]
    assert lookup.to(torch.device("cpu"))[:].equal(images)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.data(),
)
def test_sets_stand_one_after_another(counts: list[int], data: st.DataObject) -> None:
    starts = [sum(counts[:place]) for place in range(len(counts))]
    parts = [some_images(count, start) for count, start in zip(counts, starts, strict=True)]
    joined = join_images(parts)
    assert numbers(joined[:]) == list(range(sum(counts)))
    positions = data.draw(st.lists(st.integers(0, sum(counts) - 1), max_size=6))
    assert numbers(joined[torch.tensor(positions, dtype=torch.int64)]) == positions
    again = join_images([joined, joined.take(torch.tensor([0]))])
    assert numbers(again[:]) == [*range(sum(counts)), 0]


def test_some_are_taken_of_a_tensor_and_of_a_lookup() -> None:
    images = some_images(6)
    for source in (images, join_images([images])):
        taken = take_images(source, torch.tensor([5, 1, 1, 3]))
        assert taken.shape == (4, *SHAPE)
        assert numbers(taken[:]) == [5, 1, 1, 3]
        assert numbers(take_images(taken, torch.tensor([3, 0]))[:]) == [3, 5]


def test_an_image_that_is_repeated_stands_where_it_stood_first() -> None:
    images = join_images([torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2)])
    repeated = images.take(torch.tensor([2, 0, 2, 1, 0]))
    assert without_repeats(repeated, torch.tensor([4, 2, 1, 0, 3])).tolist() == [4, 2, 3]
    assert without_repeats(repeated, torch.empty(0, dtype=torch.int64)).tolist() == []
    assert without_repeats(images[:], torch.tensor([1, 0, 2])).tolist() == [1, 0, 2]


@pytest.mark.parametrize("is_lookup", [False, True])
def test_a_gpu_holds_no_images_that_are_too_many(
    is_lookup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held is a copy, which needs a GPU; what is not is fetched when it is looked at."""
    tensor = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    images = join_images([tensor]) if is_lookup else tensor
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (39, 100))
    held = held_on(images, torch.device("cuda"))
    assert isinstance(held, ImageLookup) and held.shape == tensor.shape
    assert held_on(images, torch.device("cpu"))[:].equal(tensor)


def test_a_view_gives_floats() -> None:
    view = LabelledView(join_images([some_images(3, 100)]), torch.tensor([4, 4, 5]))
    assert len(view) == 3
    floats = view.floats(torch.tensor([2, 0]))
    assert floats.dtype == torch.float32
    assert floats[:, 0, 0, 0].tolist() == pytest.approx([102 / 255, 100 / 255])


def test_fewer_large_images_go_at_once_and_one_always() -> None:
    shapes = [(3, 8, 8), (1, 32, 32), (3, 64, 64), (3, 224, 224), (3, 5000, 5000)]
    assert [images_at_once(shape) for shape in shapes] == [512, 512, 128, 10, 1]


labelled = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), max_size=30)


@given(images=labelled)
def test_the_rank_of_an_image_is_how_many_of_its_class_stand_before_it(
    images: list[tuple[int, int]],
) -> None:
    labels = [label for label, _ in images]
    wanted = [labels[:i].count(label) for i, label in enumerate(labels)]
    assert rank_in_class(torch.tensor(labels, dtype=torch.int64)).tolist() == wanted


@given(images=labelled)
def test_classes_take_turns_by_priority(images: list[tuple[int, int]]) -> None:
    left = sorted((priority, label, i) for i, (label, priority) in enumerate(images))
    wanted = []
    while left:
        turn = [next(each for each in left if each[1] == k) for k in {each[1] for each in left}]
        wanted += [i for _, _, i in sorted(turn)]
        left = [each for each in left if each not in turn]
    labels, priorities = torch.tensor(images, dtype=torch.int64).view(-1, 2).T
    assert first_in_turn(labels, priorities).tolist() == wanted
