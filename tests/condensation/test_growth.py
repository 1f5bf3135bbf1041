"""Room for new classes: who gets how many images, and what a memory that is added to keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.condensation import steps
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.growth import Growth, make_room, share_groups
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory import (
    NUMBER_FORMATS,
    HierarchicalMemory,
    HMNLayout,
    LearnedMemory,
    MemoryLayout,
    load,
)
from hmn_replay.objectives import gradient_matching
from tests.support import LAYOUTS, LEARNED, TINY, made, room_for, tiny, trained, type_of

MakeLayout = Callable[..., HMNLayout]
MakeSet = Callable[..., LabelledImages]

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def room(
    data: LabelledImages,
    num_bytes: int,
    layout: MemoryLayout,
    old: LearnedMemory | None = None,
    over_budget: float = 0.3,
) -> Growth:
    return make_room(
        data,
        Budget(num_bytes),
        over_budget,
        memory_type=type_of(layout),
        layout=layout,
        old=old,
        seed=1,
        device=torch.device("cpu"),
    )


def images_of(memory: LearnedMemory, labels: set[int]) -> list[bytes]:
    images, owners = memory.decode()
    chosen = [i for i, label in enumerate(owners.tolist()) if label in labels]
    return [images[i].numpy().tobytes() for i in chosen]


def test_a_new_memory_gets_its_share_and_a_little_more(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    budget = room_for(layout, 3, 20)
    data = make_set(30)
    growth = room(data, budget, layout)
    assert HierarchicalMemory.max_images(layout, budget, 3) == 20
    # 20 images for 3 classes are 7, 7 and 6; 0.3 of 20 / 3 is 2, and those 2 go again.
    assert growth.memory.images_per_class == [9, 9, 8]
    assert growth.drops() == [2, 2, 2]
    assert (growth.num_planned, growth.drops(20)) == (20, [2, 2, 2])
    assert [growth.drops(count) for count in (22, 25, 26)] == [[1, 2, 1], [0, 1, 0], [0, 0, 0]]
    assert growth.num_most == 26
    assert (growth.first_class, growth.num_old, len(growth.old_labels)) == (0, 0, 0)
    assert growth.pool(data).images[:].equal(data.images)


def test_old_classes_make_room_for_new_ones(make_set: MakeSet, make_layout: MakeLayout) -> None:
    layout = make_layout()
    budget = room_for(layout, 5, 15)
    old = HierarchicalMemory(layout, [7, -1], [9, 6])
    data = make_set(labels=(3, 4, 5))
    growth = room(data, budget, layout, old)
    assert growth.memory.classes.tolist() == [7, -1, 3, 4, 5]
    assert growth.memory.images_per_class == [9, 6, 4, 4, 4]
    assert growth.drops() == [6, 3, 1, 1, 1]
    assert (growth.first_class, growth.num_old) == (2, 15)
    assert images_of(growth.memory, {7, -1}) == images_of(old, {7, -1})
    assert growth.old_images[:].equal(old.decode(dtype=torch.uint8)[0])
    positions = torch.tensor([5, 2])
    for own, chosen in ((None, slice(None)), (positions, positions)):
        pool = growth.pool(data, own)
        assert pool.images[:].equal(torch.cat([data.images[chosen], growth.old_images[:]]))
        assert pool.labels.tolist() == [*data.labels[chosen].tolist(), *[7] * 9, *[-1] * 6]


def test_a_class_without_images_has_none_to_give_up(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, [7, 8], [5, 0])
    growth = room(make_set(labels=(3, 4)), room_for(layout, 4, 8), layout, old)
    # Three classes share 8 images: 3, 3 and 2; 0.3 of 8 / 4 is 1, and that one goes again.
    assert growth.memory.images_per_class == [5, 0, 4, 3]
    assert growth.drops() == [2, 1, 1]


def test_a_class_that_comes_again_is_new_and_brings_its_old_images(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, [7, 3], [4, 5])
    data = make_set(num_images=30, labels=(3, 4))  # 15 of each
    growth = room(data, room_for(layout, 3, 12), layout, old)
    assert growth.memory.classes.tolist() == [7, 3, 4]
    assert (growth.first_class, growth.num_old) == (1, 4)
    assert images_of(growth.memory, {7}) == images_of(old, {7})
    # Its 5 old images stand three times beside its 15 new ones.
    assert growth.old_labels.tolist() == [7] * 4 + [3] * 5
    pool = growth.pool(data)
    assert pool.labels.tolist() == [*data.labels.tolist(), *[7] * 4, *[3] * 15]
    assert pool.images[-15:].equal(growth.old_images[-5:].repeat_interleave(3, dim=0))


@pytest.mark.parametrize("over_budget", [0.0, 0.3])
def test_the_rest_of_a_division_is_left_to_old_classes(
    make_set: MakeSet, make_layout: MakeLayout, over_budget: float
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, [7, 8], [6, 6])
    growth = room(make_set(labels=(3, 4)), room_for(layout, 4, 14), layout, old, over_budget)
    held = growth.memory.images_per_class
    left = [count - drop for count, drop in zip(held, growth.drops(), strict=True)]
    assert left == [4, 4, 3, 3]


def test_a_class_that_comes_again_begins_as_each_of_its_images_once(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, [7, 3], [4, 5])
    data = make_set(num_images=30, labels=(3, 4))
    growth = room(data, room_for(layout, 3, 12), layout, old)
    real = steps.RealImages.of(growth.pool(data), growth.memory.classes)
    num_old = []
    for seed in range(40):
        first, second = steps.drawn_orders(real, seed, growth.first_class)
        for order, count in ((first, 20), (second, 15)):
            images = real.data.images[order].flatten(1)
            assert len(images.unique(dim=0)) == len(order) == count
        num_old.append(int((first[:8] >= 30).sum()))
    # 5 old images, drawn three times as often as 15 new ones, are 3.4 of the first 8 on average;
    # drawn as often as these they would be 2.
    assert 2.8 < sum(num_old) / 40 < 4


def test_where_every_class_comes_again_the_memory_is_new(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    data = make_set()
    old = HierarchicalMemory(layout, data.classes.flip(0), 4, seed=9)
    growth = room(data, room_for(layout, 3, 12), layout, old)
    assert growth.first_class == growth.num_old == 0
    assert all(p.requires_grad for p in growth.memory.parameters())
    fresh = growth.memory.get_parameter("dataset_memory")
    assert not fresh.equal(old.dataset_memory)


def test_a_budget_too_small_for_all_classes_is_refused(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, range(10, 20), 1)
    with pytest.raises(BudgetError, match="one image of each of 13 classes"):
        room(make_set(), room_for(layout, 13, 13) - 1, layout, old)


@pytest.mark.parametrize(
    ("kind", "number_format", "objective"),
    [
        *(("hmn", number_format, "gradient") for number_format in NUMBER_FORMATS),
        ("hmn", "entropy", "distribution"),
        *((kind, "int8", "gradient") for kind in LEARNED if kind != "hmn"),
    ],
)
def test_added_classes_leave_old_images_as_they_are_to_the_bit(
    make_set: MakeSet, kind: str, number_format: str, objective: str
) -> None:
    layout = LAYOUTS[kind]((3, 8, 8), number_format)
    size = layout.group_size
    budget = room_for(layout, 6, 24 * size)
    memory: LearnedMemory | None = None
    for step, labels in enumerate([(0, 1), (2, 3), (4, 5)]):
        data = make_set(100 * size, labels=labels, seed=step)
        before = None if memory is None else memory.to_bytes()
        grown = tiny(data, layout, budget=budget, memory=memory, objective=objective, seed=step)
        if memory is not None:
            assert memory.to_bytes() == before
            old = set(memory.classes.tolist())
            stayed = images_of(grown, old)
            assert 0 < len(stayed) < memory.num_images
            assert set(stayed) <= set(images_of(memory, old))
        assert len(grown.to_bytes()) == grown.file_bytes <= budget
        planned = type_of(layout).max_images(layout, budget, 2 * step + 2)
        if layout.is_coded:  # classes share bytes alike, whatever an image takes
            assert grown.num_images >= planned
            assert grown.file_bytes > 0.95 * budget
        else:
            assert grown.num_images == planned
            assert max(grown.images_per_class) - min(grown.images_per_class) <= size
        assert all(p.requires_grad for p in grown.parameters())
        memory = grown
    assert memory is not None
    assert memory.classes.tolist() == [0, 1, 2, 3, 4, 5]
    assert memory.report["images_per_class"] == memory.images_per_class
    assert layout.is_coded or memory.images_per_class == [4 * size] * 6
    assert memory.report["file_bytes"] == memory.file_bytes


@pytest.mark.parametrize("number_format", ["int8", "entropy"])
def test_by_order_the_first_images_of_a_class_stay(
    make_set: MakeSet, make_layout: MakeLayout, number_format: str
) -> None:
    layout = make_layout(number_format)
    options: dict[str, Any] = {"budget": room_for(layout, 6, 24), "beta_grid": ()}
    options["pruning"] = "order"
    memory = tiny(make_set(100, labels=(0, 1)), layout, **options)
    assert memory.report["pruning"] == "order" and memory.report["beta"] is None
    assert memory.report["phases"]["pruning"]["images"] == 0
    grown = tiny(make_set(100, labels=(2, 3, 4), seed=1), layout, memory=memory, **options)
    for label in (0, 1):
        stayed, before = images_of(grown, {label}), images_of(memory, {label})
        assert 0 < len(stayed) < len(before)
        assert stayed == before[: len(stayed)]


def test_by_order_as_many_are_matched_as_will_stay(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout("int8")
    seen: list[int | None] = []
    usual = steps.match_step

    def noted(context: steps.StepContext, *args: Any) -> int:
        seen.append(context.least_images)
        return usual(context, *args)

    monkeypatch.setattr(steps, "match_step", noted)
    options: dict[str, Any] = {"budget": room_for(layout, 10, 40), "beta_grid": ()}
    data = make_set(100, labels=(0, 1))
    memory = tiny(data, layout, pruning="order", expected_classes=10, **options)
    tiny(make_set(100, labels=(2,)), layout, pruning="order", memory=memory, **options)
    tiny(data, layout, pruning="order", expected_classes=10**3, **options)
    tiny(data, layout, **options)
    per_class = HierarchicalMemory.max_images(layout, options["budget"], 3) // 3
    # A run has six steps. A budget that cannot hold all that is expected holds an image of each.
    assert seen == [4] * 6 + [per_class] * 6 + [1] * 6 + [None] * 6


def test_what_is_pruned_by_order_is_not_pruned_by_aum(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="leave beta_grid out"):
        condense(make_set(), "9 KiB", pruning="order", beta_grid=(0.0, 1.0))
    with pytest.raises(ConfigError, match="pruning must be one of"):
        condense(make_set(), "9 KiB", pruning="size")


def test_new_classes_are_fitted_through_the_old_decoder(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout("float32")
    first = make_set(labels=(0, 1, 2))
    options: dict[str, Any] = {"warm_start_steps": 150, "outer_steps": 0}
    options["budget"] = room_for(layout, 5, 20)
    memory = tiny(first, layout, **options)
    second = make_set(labels=(5, 6), seed=1)
    grown = tiny(second, layout, memory=memory, **options)
    assert float(str(grown.report["warm_start_psnr"])) > 15
    images, labels = grown.decode()
    for label in (5, 6):
        own = second.floats(second.of_class(label)).mean()
        assert float(images[labels == label].mean()) == pytest.approx(float(own), abs=0.1)


def test_a_memory_from_a_file_grows_to_the_same_bits(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Any
) -> None:
    layout = make_layout("int8")
    memory = tiny(make_set(labels=(0, 1)), layout, budget=1632)
    memory.save(tmp_path / "first.hmn")
    second = make_set(labels=(2, 3), seed=1)
    from_file = load(tmp_path / "first.hmn")
    expected = tiny(second, layout, budget=1632, memory=memory).to_bytes()
    assert tiny(second, layout, budget=1632, memory=from_file).to_bytes() == expected


@pytest.mark.parametrize("number_format", ["int8", "entropy"])
def test_growing_goes_on_from_a_checkpoint(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Any,
    number_format: str,
    register_objective: Callable[[Any], str],
) -> None:
    steps: list[int] = []

    def interrupted(*batches: Any) -> torch.Tensor:
        steps.append(len(steps))
        if len(steps) in stop_at:
            raise KeyboardInterrupt
        return gradient_matching(*batches)

    stop_at: list[int] = []
    path = tmp_path / "run.checkpoint"
    layout, second = make_layout(number_format), make_set(labels=(2, 3), seed=1)
    memory = tiny(make_set(labels=(0, 1)), layout, budget=1632)
    options: dict[str, Any] = {"budget": 1632, "memory": memory}
    options["objective"] = register_objective(interrupted)
    expected = tiny(second, layout, **options).to_bytes()
    num_steps = len(steps)
    stop_at.append(num_steps + 3)
    with pytest.raises(KeyboardInterrupt):
        tiny(second, layout, checkpoint=path, **options)
    assert tiny(second, layout, checkpoint=path, **options).to_bytes() == expected
    assert len(steps) < 3 * num_steps


def test_a_renewed_class_looks_like_its_old_and_its_new_images(make_layout: MakeLayout) -> None:
    layout = make_layout("float32")

    def grey(level: int) -> LabelledImages:
        """Twenty images of label 0, all alike, and of label 9 one of every brightness."""
        levels = torch.cat([torch.full((20,), level), torch.linspace(0, 255, 20)])
        images = levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8)
        return LabelledImages(images.contiguous(), torch.tensor([0] * 20 + [9] * 20))

    options: dict[str, Any] = {"warm_start_steps": 150, "outer_steps": 0, "over_budget": 0}
    options["budget"] = room_for(layout, 2, 20)
    memory = tiny(grey(20), layout, **options)
    grown = tiny(grey(235).take(range(20)), layout, memory=memory, **options)
    images, labels = grown.decode()
    means = images[labels == 0].mean(dim=(1, 2, 3))
    assert float((means < 0.3).float().mean()) > 0.2
    assert float((means > 0.7).float().mean()) > 0.2
    assert sorted(grown.classes.tolist()) == [0, 9]


@pytest.mark.filterwarnings("ignore:the budget of .* is planned for")
def test_expected_classes_choose_the_layout(make_set: MakeSet) -> None:
    data = make_set(image_shape=(3, 32, 32))
    options = {**TINY, "warm_start_steps": 1, "outer_steps": 0}
    memory = condense(data, "24 KiB", expected_classes=100, **options)

    def choose(num_classes: int) -> HMNLayout:
        num_real = len(data) // data.num_classes
        layout: HMNLayout = HierarchicalMemory.choose_layout(
            "24 KiB", (3, 32, 32), num_classes, "entropy", num_real
        )
        return layout

    assert memory.layout == choose(100)
    assert memory.layout != choose(3)
    for wrong in (0, 1001, 2.5, "many"):
        with pytest.raises(ConfigError, match="expected_classes is 1 to 1000"):
            condense(data, "24 KiB", expected_classes=wrong, **options)  # type: ignore[arg-type]


def test_a_memory_keeps_its_layout(make_set: MakeSet, make_layout: MakeLayout) -> None:
    memory = tiny(make_set(), make_layout())
    more = make_set(labels=(7, 8))
    with pytest.raises(ConfigError, match="leave layout= out"):
        tiny(more, make_layout(class_channels=1), memory=memory)
    with pytest.raises(ConfigError, match="float32"):
        tiny(more, make_layout(), memory=memory, number_format="float32")
    with pytest.raises(ConfigError, match="options ask for"):
        tiny(make_set(image_shape=(3, 9, 9), labels=(7,)), memory.layout, memory=memory)


def test_a_frozen_memory_can_grow(make_layout: MakeLayout, make_set: MakeSet) -> None:
    old = HierarchicalMemory(make_layout(), [7, 8], 3, seed=1).requires_grad_(False)
    growth = room(make_set(), 10**4, old.layout, old)
    assert growth.memory.get_parameter("class_memory").requires_grad
    assert not old.class_memory.requires_grad


def large_images(num_images: int, scale: float) -> HierarchicalMemory:
    """Return an entropy-coded memory whose images take more bytes than planned."""
    layout = LAYOUTS["hmn"]((3, 8, 8), "entropy")
    assert isinstance(layout, HMNLayout)
    memory = HierarchicalMemory(layout, [7, 8], num_images, seed=3)
    with torch.no_grad():
        memory.get_parameter("instance_memory").mul_(scale)
    return memory


def test_old_images_that_are_large_stay_while_there_is_room(make_set: MakeSet) -> None:
    old = large_images(6, scale=100)
    data = make_set(num_images=12, labels=(3, 4))
    growth = room(data, room_for(old.layout, 4, 200), old.layout, old)
    assert min(growth.costs[:2]) > 1.2
    assert growth.memory.images_per_class == [6, 6, 6, 6] and growth.drops() == [0, 0, 0, 0]
    # Where there is less room, a class keeps as many of the new images as of the old ones.
    growth = room(data, room_for(old.layout, 4, 14), old.layout, old, over_budget=0)
    kept = [n - d for n, d in zip(growth.memory.images_per_class, growth.drops(), strict=True)]
    assert max(kept) - min(kept) <= 1 and max(kept) < 6


def test_no_class_loses_all_images_however_large_they_are(make_set: MakeSet) -> None:
    old = large_images(6, scale=3000)
    growth = room(
        make_set(num_images=12, labels=(3, 4)), room_for(old.layout, 4, 8), old.layout, old
    )
    assert min(growth.costs[:2]) > 1.5
    kept = [n - d for n, d in zip(growth.memory.images_per_class, growth.drops(), strict=True)]
    assert min(kept) >= 1


@pytest.mark.filterwarnings("ignore:the budget of .* is planned for", "ignore:the file fills")
def test_a_stream_of_few_images_has_room_for_the_classes_that_are_expected() -> None:
    generator = torch.Generator().manual_seed(0)

    def smooth(count: int, side: int) -> Tensor:
        grid = torch.rand(count, 3, side, side, generator=generator)
        return F.interpolate(grid, size=(16, 16), mode="bicubic").clamp(0, 1)

    memory, limit = None, 1800
    for first in range(0, 24, 6):
        labels = torch.arange(first, first + 6).repeat_interleave(5)
        images = (0.6 * smooth(30, 4) + 0.4 * smooth(30, 8)).mul(255).to(torch.uint8)
        memory = condense(
            (images, labels),
            limit,
            memory=memory,
            expected_classes=24,
            effort="draft",
            warm_start_steps=100,
            outer_steps=0,
            device="cpu",
        )
        assert min(memory.images_per_class) >= 1 and memory.file_bytes <= limit
    assert memory is not None and memory.num_classes == 24


# Who gets how many.


def shared_by_hand(num_groups: int, most: list[int], costs: list[float]) -> list[int]:
    """Give a group to whoever has taken the least and can take one more, while there is room."""
    counts = [min(1, n) for n in most]
    left = num_groups - sum(n * cost for n, cost in zip(counts, costs, strict=True))
    while True:
        able = [k for k, n in enumerate(counts) if n < most[k] and costs[k] <= left + 1e-9]
        if not able:
            return counts
        chosen = min(able, key=lambda k: (counts[k] * costs[k], k))
        counts[chosen] += 1
        left -= costs[chosen]


@settings(max_examples=60, deadline=None)
@given(
    num_groups=st.integers(0, 60),
    most=st.lists(st.integers(0, 20), min_size=1, max_size=6),
)
def test_all_classes_share_alike(num_groups: int, most: list[int]) -> None:
    costs = [1.0] * len(most)
    assert share_groups(num_groups, most, costs) == shared_by_hand(num_groups, most, costs)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_groups=st.integers(1, 200))
def test_all_classes_share_alike_in_bytes(data: st.DataObject, num_groups: int) -> None:
    most = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    costs = [data.draw(st.floats(0.25, 3)) for _ in most]
    counts = share_groups(num_groups, most, costs)
    taken = [n * cost for n, cost in zip(counts, costs, strict=True)]
    assert all(0 <= n <= own for n, own in zip(counts, most, strict=True))
    assert min(counts) >= 1
    assert sum(taken) <= max(num_groups, sum(costs)) + 1e-6
    # Whoever could keep more has about as much as whoever has the most.
    for own, n, cost, most_own in zip(taken, counts, costs, most, strict=True):
        assert n == most_own or own > max(taken) - 1 - cost - max(costs)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("with_old", [False, True])
def test_no_class_gets_more_images_than_there_are_real_ones(
    kind: str, with_old: bool, make_set: MakeSet
) -> None:
    layout = LAYOUTS[kind]((3, 8, 8), "int8")
    size = layout.group_size
    data = make_set(num_images=15)  # 5 of each of 3 classes
    old = made(kind, classes=(8, 9), groups=(1, 1)) if with_old else None
    growth = room(data, 10**6, layout, old, over_budget=1.0)
    counts = growth.memory.images_per_class[growth.first_class :]
    assert counts == [max(size, 5 // size * size)] * 3
    assert growth.memory.images_per_class[: growth.first_class] == ([size] * 2 if with_old else [])
    assert sum(growth.drops()) == 0


def test_old_images_of_fewer_bytes_count_for_less(make_layout: MakeLayout) -> None:
    """Of an entropy-coded memory: classes share bytes, not images."""
    memory = trained(
        HierarchicalMemory(make_layout("entropy", image_bytes=8), [0, 1], [30, 30]), std=1.0
    )
    with torch.no_grad():
        memory.instance_memory[:30] = 0.0  # next to no bits
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=generator).to(torch.uint8)
    data = LabelledImages(pixels, torch.tensor([2, 3]).repeat_interleave(20))
    growth = room(data, room_for(memory.layout, 4, 40), memory.layout, memory)
    small, large = growth.costs[:2]
    assert small == 0.25
    assert large > small
    kept = [
        n - drop for n, drop in zip(growth.memory.images_per_class, growth.drops(), strict=True)
    ]
    assert kept[0] > kept[1]
    assert max(kept[2:]) - min(kept[2:]) <= 1


def test_what_is_shared_and_takes_too_much_is_reported_before_the_first_step(
    make_layout: MakeLayout,
    make_set: MakeSet,
    register_objective: Callable[[Any], str],
) -> None:
    """What all images share is several times as large as was planned."""
    memory = HierarchicalMemory(make_layout("entropy", decoder_channels=(48, 48)), [0, 1], 2)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(60)
    data = make_set(labels=(5, 6))
    budget = room_for(memory.layout, 4, 8)
    assert memory.file_bytes > budget
    calls: list[int] = []

    def counted(*batches: Any) -> torch.Tensor:
        calls.append(1)
        return gradient_matching(*batches)

    with pytest.raises(BudgetError, match="what all images share takes"):
        tiny(
            data,
            memory.layout,
            memory=memory,
            budget=budget,
            objective=register_objective(counted),
            warm_start_steps=10**9,
        )
    assert not calls
