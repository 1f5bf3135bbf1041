"""What a user adds from outside the package: a tier, a number format, a memory kind."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hmn_replay
from hmn_replay import (
    MEMORIES,
    NUMBER_FORMATS,
    HierarchicalMemory,
    HMNLayout,
    LabelledImages,
    LearnedMemory,
    NumberFormat,
    StoredTensor,
    register_memory,
)
from hmn_replay.baselines.fill import real_images
from hmn_replay.errors import ConfigError
from hmn_replay.memory import MemoryLayout, RawMemory
from hmn_replay.memory.file import pack, unpack
from tests.support import (
    LAYOUTS,
    LEARNED,
    TINY,
    PosterMemory,
    hmn_layout,
    learned_type,
    real_set,
    registered,
    same_bits,
    trained,
)

MakeSet = Callable[..., LabelledImages]


# A tier of 8 extra values an image: one more row of the table, and what reads it.


class ShadedMemory(HierarchicalMemory):
    """A hierarchical memory whose images are shaded, in eight bands, by values of their own."""

    @classmethod
    def table(cls, layout: HMNLayout) -> tuple[StoredTensor, ...]:
        extra = StoredTensor(
            "extra", "image", (8,), init=0.5, step=0.25, model_axes=(0,), rate=10.0
        )
        return (*super().table(layout), extra)

    def _images(self, indices: Tensor, *activations: Any) -> Tensor:
        images = super()._images(indices, *activations)
        bands = torch.arange(images.shape[3], device=images.device) * 8 // images.shape[3]
        shades = self.value("extra", indices)[:, bands]
        return images * (1 - 0.5 * torch.sigmoid(shades)[:, None, None])


@pytest.fixture
def shaded() -> Iterator[type[ShadedMemory]]:
    yield register_memory("shaded")(ShadedMemory)
    MEMORIES.remove("shaded")


def shaded_memory(number_format: str, counts: Any = (4, 3), **options: Any) -> ShadedMemory:
    layout = hmn_layout(number_format=number_format)
    return trained(ShadedMemory(layout, range(len(counts)), counts, **options))


every_format = pytest.mark.parametrize("number_format", NUMBER_FORMATS)


@every_format
def test_a_tier_is_counted(shaded: type[ShadedMemory], number_format: str) -> None:
    layout = hmn_layout(number_format=number_format)
    assert shaded.num_floats_of(layout, 2, 7) == HierarchicalMemory.num_floats_of(layout, 2, 7) + 56
    memory = shaded_memory(number_format)
    assert len(memory.to_bytes()) == memory.file_bytes
    budget = 20_000
    assert shaded.file_bytes_of(layout, 2, shaded.max_images(layout, budget, 2), budget) <= budget
    if not layout.is_coded:
        each = layout.format.dtype.itemsize
        plain = HierarchicalMemory.group_bytes(layout)
        assert shaded.group_bytes(layout) == plain + 8 * each
        assert memory.bits()["extra"] == 8 * 7 * 8 * each
        assert shaded.max_images(layout, budget, 2) < HierarchicalMemory.max_images(
            layout, budget, 2
        )


@every_format
def test_a_tier_is_read_and_learned(shaded: type[ShadedMemory], number_format: str) -> None:
    memory = shaded_memory(number_format)
    torch.autograd.backward(memory(torch.tensor([1])).sum())
    gradient = memory.get_parameter("extra").grad
    assert gradient is not None
    assert bool((gradient[1] != 0).all())
    assert not gradient[[0, 2, 3, 4, 5, 6]].any()
    groups = {id(p): g["factor"] for g in memory.parameter_groups() for p in g["params"]}
    assert groups[id(memory.get_parameter("extra"))] == 10.0
    before, _ = memory.decode()
    with torch.no_grad():
        memory.get_parameter("extra")[1] -= 2
    after, _ = memory.decode()
    assert (after != before).flatten(1).any(dim=1).tolist() == [False, True, *[False] * 5]


@every_format
def test_a_tier_is_saved_and_loaded(
    shaded: type[ShadedMemory], number_format: str, tmp_path: Path
) -> None:
    memory = shaded_memory(number_format)
    memory.save(tmp_path / "memory.hmn")
    loaded = hmn_replay.load(tmp_path / "memory.hmn")
    assert type(loaded) is shaded
    assert same_bits(loaded.decode()[0], memory.decode()[0])
    assert loaded.to_bytes() == memory.to_bytes()
    assert "extra" in loaded.bits()


def test_a_tier_is_entropy_coded(shaded: type[ShadedMemory]) -> None:
    memory = shaded_memory("entropy", (60, 40))
    values = (memory.get_parameter("extra").detach() / 0.25).round()
    assert 2 < float(values.abs().max()) < 40
    # A model for each of the eight values, and no more bits than a model can have.
    found = memory.bits()["extra"]
    by_entropy = 0.0
    for column in values.T:
        _, counts = column.unique(return_counts=True)
        shares = counts / counts.sum()
        by_entropy -= float((shares * shares.log2()).sum()) * len(column)
    assert by_entropy < found < 1.3 * by_entropy
    levels = memory.stored()["levels"]
    plain = HierarchicalMemory(memory.layout, [0, 1], [60, 40])
    assert len(levels) == len(plain.stored()["levels"]) + 8
    # The rate, by which training meets the budget, has gradients to the tier.
    image_bits, _ = memory.rate(torch.arange(100))
    torch.autograd.backward(image_bits)
    gradient = memory.get_parameter("extra").grad
    assert gradient is not None
    assert float((gradient != 0).float().mean()) > 0.5


@every_format
def test_a_tier_grows_and_shrinks_with_the_images(
    shaded: type[ShadedMemory], number_format: str
) -> None:
    memory = shaded_memory(number_format)
    images, _ = memory.decode()
    memory.add_classes([9], 2, seed=3)
    assert memory.get_parameter("extra").shape == (9, 8)
    assert same_bits(memory.decode()[0][:7], images)
    memory.keep([0, 3, 5, 8])
    assert memory.get_parameter("extra").shape == (4, 8)
    assert same_bits(memory.decode()[0][:3], images[[0, 3, 5]])
    memory.remove([0])
    assert memory.get_parameter("extra").shape == (2, 8)
    assert same_bits(memory.decode()[0][:1], images[[5]])
    assert len(memory.to_bytes()) == memory.file_bytes


@every_format
@pytest.mark.parametrize("objective", ["gradient", "distribution"])
def test_a_tier_is_condensed_grown_and_pruned(
    shaded: type[ShadedMemory],
    make_set: MakeSet,
    number_format: str,
    objective: str,
) -> None:
    layout = hmn_layout(number_format=number_format)
    budget = shaded.file_bytes_of(layout, 4, 20, 9999)
    options: dict[str, Any] = {**TINY, "kind": "shaded", "objective": objective}
    memory = hmn_replay.condense(make_set(80, labels=(0, 1)), budget, layout=layout, **options)
    assert type(memory) is shaded
    assert memory.report["kind"] == "shaded"
    before = copy.deepcopy(memory)
    extra = memory.get_parameter("extra").detach()
    assert extra.shape == (len(memory), 8)
    assert not bool((extra == extra.round()).all())
    grown = hmn_replay.condense(
        make_set(80, labels=(2, 3), seed=1), budget, memory=memory, **options
    )
    assert memory.to_bytes() == before.to_bytes()
    assert len(grown.to_bytes()) == grown.file_bytes <= budget
    assert grown.classes.tolist() == [0, 1, 2, 3]
    old, (images, labels) = {x.numpy().tobytes() for x in memory.decode()[0]}, grown.decode()
    stayed = [x.numpy().tobytes() for x in images[labels < 2]]
    assert 0 < len(stayed) < len(memory)
    assert set(stayed) <= old


def test_a_tier_has_a_layout_chosen_for_it(shaded: type[ShadedMemory], make_set: MakeSet) -> None:
    options = {**TINY, "outer_steps": 0, "warm_start_steps": 1, "over_budget": 0}
    data = make_set(300, image_shape=(3, 32, 32))
    memory = hmn_replay.condense(data, "24 KiB", kind="shaded", number_format="int8", **options)
    assert type(memory) is shaded
    assert memory.layout == shaded.choose_layout("24 KiB", (3, 32, 32), 3, "int8", 100)
    assert memory.file_bytes <= 24 * 1024


# A number format.


@pytest.fixture
def bfloat16() -> Iterator[str]:
    NUMBER_FORMATS.add("bfloat16", NumberFormat(torch.bfloat16))
    yield "bfloat16"
    NUMBER_FORMATS.remove("bfloat16")


@pytest.mark.parametrize("kind", LEARNED)
def test_every_kind_has_a_number_format_that_was_added(kind: str, bfloat16: str) -> None:
    layout = LAYOUTS[kind]((3, 8, 8), bfloat16)
    size = layout.group_size
    memory = trained(learned_type(kind)(layout, [7, -3], [2 * size, size]))
    assert {t.dtype for n, t in memory.stored().items() if n != "scales"} == {torch.bfloat16}
    data = memory.to_bytes()
    assert len(data) == memory.file_bytes
    loaded = hmn_replay.memory.loads(data)
    assert same_bits(loaded.decode()[0], memory.decode()[0])
    assert loaded.to_bytes() == data
    for name in memory.tensors:
        parameter = loaded.state_dict()[name]  # type: ignore[attr-defined]
        latent = memory.get_parameter(name).detach()
        assert parameter.equal(latent.to(torch.bfloat16).float()), name
    memory.add_classes([5], size)
    memory.keep(range(size, 4 * size))
    assert len(memory.to_bytes()) == memory.file_bytes


def test_a_number_format_that_was_added_is_condensed_in(bfloat16: str, make_set: MakeSet) -> None:
    layout = hmn_layout(number_format=bfloat16)
    budget = HierarchicalMemory.file_bytes_of(layout, 3, 10, 9999)
    memory = hmn_replay.condense(make_set(), budget, number_format=bfloat16, layout=layout, **TINY)
    assert memory.summary()["number_format"] == "bfloat16"
    assert (len(memory), len(memory.to_bytes())) == (10, memory.file_bytes)


def test_a_coded_number_format_may_be_added_too() -> None:
    NUMBER_FORMATS.add("coded", NumberFormat(torch.int8, is_coded=True))
    try:
        memory = trained(HierarchicalMemory(hmn_layout(number_format="coded"), [0, 1], 5))
        loaded = hmn_replay.memory.loads(memory.to_bytes())
        assert same_bits(loaded.decode()[0], memory.decode()[0])
        assert "code" in loaded.stored()
    finally:
        NUMBER_FORMATS.remove("coded")


# A memory kind.


class ShadeMemory(LearnedMemory):
    """Images of one brightness each, under a gradient that all share."""

    Layout = MemoryLayout

    @classmethod
    def table(cls, layout: MemoryLayout) -> tuple[StoredTensor, ...]:
        return (
            StoredTensor("shades", "image", (1,), init=0.5, rate=10.0),
            StoredTensor("tints", "class", (layout.image_shape[0],), init=0.5),
            StoredTensor("slope", "shared", layout.image_shape, init=0.1),
        )

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> list[MemoryLayout]:
        return [MemoryLayout(image_shape, number_format)]

    def forward(self, indices: Tensor) -> Tensor:
        shades = self.value("shades", indices)[:, :, None, None]
        tints = self.value("tints", indices)[:, :, None, None]
        return torch.sigmoid(shades + tints + self.value("slope"))


@pytest.fixture
def shade() -> Iterator[type[ShadeMemory]]:
    yield register_memory("shade")(ShadeMemory)
    MEMORIES.remove("shade")


@pytest.mark.parametrize("number_format", ["float32", "int8"])
def test_a_memory_kind_of_a_user_is_condensed_saved_and_read(
    shade: type[ShadeMemory], make_set: MakeSet, number_format: str, tmp_path: Path
) -> None:
    data = make_set()
    options = {**TINY, "warm_start_steps": 60, "number_format": number_format}
    budget = shade.file_bytes_of(MemoryLayout((3, 8, 8), number_format), 3, 20, 9999)
    memory = hmn_replay.condense(data, budget, kind="shade", **options)
    assert type(memory) is shade
    assert memory.images_per_class == [7, 7, 6]
    images, labels = memory.decode()
    for label in range(3):
        wanted = float(data.floats(data.of_class(label)).mean())
        assert float(images[labels == label].mean()) == pytest.approx(wanted, abs=0.15)
    memory.save(tmp_path / "memory.hmn")
    assert math.isclose((tmp_path / "memory.hmn").stat().st_size, budget, abs_tol=16)
    loaded = hmn_replay.load(tmp_path / "memory.hmn")
    assert same_bits(loaded.decode()[0], images)
    budget = shade.file_bytes_of(memory.layout, 5, 15, 9999)
    grown = hmn_replay.condense(make_set(labels=(5, 6)), budget, memory=memory, **options)
    assert grown.classes.tolist() == [0, 1, 2, 5, 6]


def test_images_of_a_kind_of_a_user_stay_in_their_range(shade: type[ShadeMemory]) -> None:
    class Glaring(ShadeMemory):
        def forward(self, indices: Tensor) -> Tensor:
            return 3 * super().forward(indices) - 1

    memory = Glaring(MemoryLayout((1, 8, 8), "float32"), [0], 3)
    with torch.no_grad():
        memory.get_parameter("shades").copy_(torch.tensor([[-9.0], [0.0], [9.0]]))
    images = memory.decode()[0]
    assert (float(images.min()), float(images.max())) == (0, 1)
    pixels = memory.decode(dtype=torch.uint8)[0]
    assert pixels.equal(images.mul(255).round().to(torch.uint8))
    assert bool((pixels[0] < 10).all()) and bool((pixels[2] == 255).all())


def test_a_file_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    class Bright(RawMemory):
        def __init__(self, image_shape: Any, *, more: int, budget: Any = None) -> None:
            super().__init__(image_shape, budget=budget)

    with registered(Bright):
        memory = Bright((3, 8, 8), more=2)
        memory.extend(real_set())
        with pytest.raises(ConfigError, match=r"could not be read again.*'more'"):
            memory.save(tmp_path / "memory.hmn")
    assert not list(tmp_path.iterdir())


def test_real_images_are_read_as_bytes() -> None:
    class Floating(RawMemory):
        def _read(self, payloads: Sequence[bytes]) -> Tensor:
            return super()._read(payloads).float() / 255

    memory = Floating((3, 8, 8))
    memory.extend(real_set())
    with pytest.raises(ConfigError, match=r"Floating\._read returns uint8 images"):
        memory.decode()


def test_a_kind_has_one_name_and_is_a_memory(shade: type[ShadeMemory]) -> None:
    with pytest.raises(ConfigError, match="ShadeMemory is the memory kind 'shade'"):
        register_memory("other")(ShadeMemory)
    with pytest.raises(ConfigError, match="a memory kind is a subclass of Memory; got <class 'int"):
        register_memory("number")(int)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="register_memory takes a name"):
        register_memory(ShadeMemory)  # type: ignore[arg-type]
    assert shade.kind == "shade" and "other" not in MEMORIES


def test_a_file_of_a_kind_that_is_not_registered_here_is_refused_by_name() -> None:
    register_memory("shade")(ShadeMemory)
    try:
        data = ShadeMemory(MemoryLayout((3, 8, 8), "int8"), [0], 2).to_bytes()
    finally:
        MEMORIES.remove("shade")
    with pytest.raises(hmn_replay.MemoryFileError, match=r"memory kind must .*; got 'sha"):
        hmn_replay.memory.loads(data)


# A kind of real images with a setting.


def test_a_setting_of_real_images_is_in_the_file_and_in_the_summary() -> None:
    with registered(PosterMemory):
        memory = PosterMemory((3, 8, 8), levels=8, budget=9000)
        memory.extend(real_set())
        loaded = hmn_replay.memory.loads(memory.to_bytes())
        assert isinstance(loaded, PosterMemory) and loaded.levels == 8
        assert memory.words() == ("3,8,8", "8") and loaded.summary()["levels"] == 8
        assert int((loaded.decode(dtype=torch.uint8)[0] % 32).sum()) == 0
        data = memory.to_bytes()
        for levels in ("08", "1", "x"):
            altered = dataclasses.replace(unpack(data), words=("3,8,8", levels))
            with pytest.raises(hmn_replay.MemoryFileError, match=r"another way|2 to 256|literal"):
                hmn_replay.memory.loads(pack(altered))
        assert loaded.to_bytes() == data


def test_real_images_with_a_setting_fill_a_budget() -> None:
    with registered(PosterMemory):
        memory = real_images(PosterMemory, real_set(), 600, levels=2)
        assert memory.levels == 2 and len(memory) == 1
