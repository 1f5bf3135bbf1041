"""Room for new classes: who gets how many images, and what a memory that is added to keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hmn_replay.budget import Budget
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.growth import Growth, make_room
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.base import Container
from hmn_replay.memory.file import load, serialise
from hmn_replay.memory.formats import NUMBER_FORMATS, NumberFormat
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout
from tests.support import LAYOUTS, TINY, tiny

MakeLayout = Callable[..., Layout]
MakeSet = Callable[..., LabelledImages]

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def room(
    data: LabelledImages, num_bytes: int, layout: Layout, old: HierarchicalMemory | None = None
) -> Growth:
    device = torch.device("cpu")
    return make_room(data, Budget(num_bytes), 0.3, layout=layout, old=old, seed=1, device=device)


def images_of(memory: Container, labels: set[int]) -> list[bytes]:
    images, owners = memory.decode()
    chosen = [i for i, label in enumerate(owners.tolist()) if label in labels]
    return [images[i].numpy().tobytes() for i in chosen]


def test_a_new_memory_gets_its_share_and_a_little_more(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    budget = layout.file_bytes(3, 20, 9999)
    growth = room(make_set(), budget, layout)
    assert layout.max_images(budget, 3) == 20
    # 20 images for 3 classes are 7, 7 and 6; 0.3 of 20 / 3 is 2, and those 2 go again.
    assert growth.memory.images_per_class == [9, 9, 8]
    assert growth.drops() == [2, 2, 2]
    assert (growth.num_planned, growth.drops(20)) == (20, [2, 2, 2])
    assert [growth.drops(count) for count in (22, 25, 26)] == [[1, 2, 1], [0, 1, 0], [0, 0, 0]]
    assert growth.num_most == 24
    assert (growth.first_class, growth.num_old, len(growth.old_labels)) == (0, 0, 0)
    data = make_set()
    assert growth.pool(data).images[:].equal(data.images)


def test_old_classes_make_room_for_new_ones(make_set: MakeSet, make_layout: MakeLayout) -> None:
    layout = make_layout()
    budget = layout.file_bytes(5, 15, 9999)
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
    for given, chosen in ((None, slice(None)), (positions, positions)):
        pool = growth.pool(data, given)
        assert pool.images[:].equal(torch.cat([data.images[chosen], growth.old_images[:]]))
        assert pool.labels.tolist() == [*data.labels[chosen].tolist(), *[7] * 9, *[-1] * 6]


def test_a_class_without_images_has_none_to_give_up(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, [7, 8], [5, 0])
    growth = room(make_set(labels=(3, 4)), layout.file_bytes(4, 8, 9999), layout, old)
    assert growth.memory.images_per_class == [5, 0, 3, 3]
    assert growth.drops() == [3, 1, 1]


def test_a_class_that_comes_again_is_new_and_brings_its_old_images(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    old = HierarchicalMemory(layout, [7, 3], [4, 5])
    data = make_set(num_images=30, labels=(3, 4))  # 15 of each
    growth = room(data, layout.file_bytes(3, 12, 9999), layout, old)
    assert growth.memory.classes.tolist() == [7, 3, 4]
    assert (growth.first_class, growth.num_old) == (1, 4)
    assert images_of(growth.memory, {7}) == images_of(old, {7})
    # Its 5 old images stand three times beside its 15 new ones.
    assert growth.old_labels.tolist() == [7] * 4 + [3] * 5
    pool = growth.pool(data)
    assert pool.labels.tolist() == [*data.labels.tolist(), *[7] * 4, *[3] * 15]
    assert pool.images[-15:].equal(growth.old_images[-5:].repeat_interleave(3, dim=0))


def test_where_every_class_comes_again_the_memory_is_new(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    data = make_set()
    old = HierarchicalMemory(layout, data.classes.flip(0), 4, seed=9)
    growth = room(data, layout.file_bytes(3, 12, 9999), layout, old)
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
        room(make_set(), layout.file_bytes(13, 13, 9999) - 1, layout, old)


@pytest.mark.parametrize(
    ("container", "number_format", "objective"),
    [
        *(("hmn", number_format, "gradient") for number_format in NUMBER_FORMATS),
        *(("hmn", number_format, "distribution") for number_format in NUMBER_FORMATS),
        *((container, "int8", "gradient") for container in ("raw", "idc", "haba", "linba")),
    ],
)
def test_added_classes_leave_old_images_as_they_are_to_the_bit(
    make_set: MakeSet, container: str, number_format: NumberFormat, objective: str
) -> None:
    layout = LAYOUTS[container]((3, 8, 8), number_format)
    size = layout.group_size
    budget = layout.file_bytes(6, 24 * size, 9999)
    memory: Container | None = None
    for step, labels in enumerate([(0, 1), (2, 3), (4, 5)]):
        data = make_set(labels=labels, seed=step)
        before = None if memory is None else serialise(memory)
        grown = tiny(data, layout, budget=budget, memory=memory, objective=objective, seed=step)
        if memory is not None:
            assert serialise(memory) == before
            old = set(memory.classes.tolist())
            stayed = images_of(grown, old)
            assert 0 < len(stayed) < memory.num_images
            assert set(stayed) <= set(images_of(memory, old))
            assert grown.report["drift_psnr"] is None
        assert len(serialise(grown)) == grown.file_bytes <= budget
        planned = layout.max_images(budget, 2 * step + 2)
        assert grown.num_images >= planned if layout.is_coded else grown.num_images == planned
        assert max(grown.images_per_class) - min(grown.images_per_class) <= size
        assert all(p.requires_grad for p in grown.parameters())
        memory = grown
    assert memory is not None
    assert memory.classes.tolist() == [0, 1, 2, 3, 4, 5]
    assert memory.report["images_per_class"] == memory.images_per_class
    assert layout.is_coded or memory.images_per_class == [4 * size] * 6
    assert memory.report["file_bytes"] == memory.file_bytes


def test_new_classes_are_fitted_through_the_old_decoder(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout("float32")
    first = make_set(labels=(0, 1, 2))
    options: dict[str, Any] = {"warm_start_steps": 400, "outer_steps": 0}
    options["budget"] = layout.file_bytes(5, 20, 9999)
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
    memory = tiny(make_set(labels=(0, 1)), layout, budget=3000)
    memory.save(tmp_path / "first.hmn")
    second = make_set(labels=(2, 3), seed=1)
    from_file = load(tmp_path / "first.hmn")
    expected = serialise(tiny(second, layout, budget=3000, memory=memory))
    assert serialise(tiny(second, layout, budget=3000, memory=from_file)) == expected


def test_growing_goes_on_from_a_checkpoint(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, second = make_layout(), make_set(labels=(2, 3), seed=1)
    memory = tiny(make_set(labels=(0, 1)), layout, budget=3000)
    options: dict[str, Any] = {"budget": 3000, "memory": memory}
    expected = serialise(tiny(second, layout, **options))
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(
            "hmn_replay.condensation.steps.train_step", None
        )  # the first matching step fails
        with pytest.raises(TypeError):
            tiny(second, layout, checkpoint=path, **options)
    assert serialise(tiny(second, layout, checkpoint=path, **options)) == expected


def test_a_renewed_class_looks_like_its_old_and_its_new_images(make_layout: MakeLayout) -> None:
    layout = make_layout("float32")

    def grey(level: int) -> LabelledImages:
        """Twenty images of label 0, all alike, and of label 9 one of every brightness."""
        levels = torch.cat([torch.full((20,), level), torch.linspace(0, 255, 20)])
        images = levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8)
        return LabelledImages(images.contiguous(), torch.tensor([0] * 20 + [9] * 20))

    options: dict[str, Any] = {"warm_start_steps": 400, "outer_steps": 0, "over_budget": 0}
    options["budget"] = layout.file_bytes(2, 20, 9999)
    memory = tiny(grey(20), layout, **options)
    grown = tiny(grey(235).take(range(20)), layout, memory=memory, **options)
    images, labels = grown.decode()
    means = images[labels == 0].mean(dim=(1, 2, 3))
    assert float((means < 0.3).float().mean()) > 0.2
    assert float((means > 0.7).float().mean()) > 0.2
    assert sorted(grown.classes.tolist()) == [0, 9]


def test_expected_classes_choose_the_layout(make_set: MakeSet) -> None:
    data = make_set(image_shape=(3, 32, 32))
    options = {**TINY, "warm_start_steps": 1, "outer_steps": 0}
    memory = condense(data, "24 KiB", expected_classes=100, **options)
    num_real = len(data) // data.num_classes
    assert memory.layout == Layout.choose("24 KiB", (3, 32, 32), 100, "int8", num_real)
    assert memory.layout != Layout.choose("24 KiB", (3, 32, 32), 3, "int8", num_real)
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


def test_a_frozen_memory_can_grow(
    make_layout: Callable[..., Layout], make_set: Callable[..., LabelledImages]
) -> None:
    old = HierarchicalMemory(make_layout(), [7, 8], 3, seed=1).requires_grad_(False)
    growth = make_room(
        make_set(), Budget(10**4), 0.1, layout=old.layout, old=old, device=torch.device("cpu")
    )
    assert growth.memory.class_memory.requires_grad
    assert not old.class_memory.requires_grad
