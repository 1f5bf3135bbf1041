"""Real images at equal bytes: what is drawn, and how full the file is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Subset

from hmn_replay.baselines import fill
from hmn_replay.baselines.fill import (
    choose_quality,
    jpeg_images,
    lossless_images,
    raw_images,
    real_images,
    subsampled_images,
)
from hmn_replay.condensation.selection import SELECTIONS, select_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError, DataError, UnknownOptionError
from hmn_replay.evaluation import evaluate
from hmn_replay.memory import (
    HierarchicalMemory,
    JPEGMemory,
    LosslessMemory,
    PQMemory,
    RawMemory,
    RealMemory,
)
from hmn_replay.memory.jpeg import decode_jpeg_scans, encode_jpeg_scans
from hmn_replay.training.train import TrainingConfig
from tests.support import real_set

LABELS = (-3, 7, 1000)
FILL: dict[str, Callable[..., RealMemory]] = {
    "raw": raw_images,
    "jpeg": partial(jpeg_images, quality=20),
    "lossless": lossless_images,
    "subsampled": subsampled_images,
}
every_kind = pytest.mark.parametrize("kind", FILL)
every_selection = pytest.mark.parametrize("selection", SELECTIONS)

# One pass over the images, for a choice that is some choice.
quick_choice = partial(
    select_images,
    config=TrainingConfig(width=4, num_passes=1, augmentations=()),
    device="cpu",
)


@pytest.fixture(scope="module", autouse=True)
def encoded_once() -> Iterator[None]:
    """Encode no image twice as lossless WebP, which takes milliseconds: its bytes are its own."""
    encode = LosslessMemory.encode

    @cache
    def payload(shape: torch.Size, pixels: bytes) -> bytes:
        image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, *shape)
        return encode(LosslessMemory(shape), image)[0]

    def encode_once(_: LosslessMemory, images: Tensor) -> list[bytes]:
        return [payload(image.shape, image.numpy().tobytes()) for image in images]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LosslessMemory, "encode", encode_once)
        yield


def some_data(
    num_images: int = 90, image_shape: tuple[int, ...] = (3, 16, 16), seed: int = 0
) -> LabelledImages:
    """Images that differ from each other, of three classes in turn."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num_images, image_shape[0], 2, 2))
    sides = [-(-side // 2) for side in image_shape[1:]]
    images = coarse.repeat(sides[0], axis=2).repeat(sides[1], axis=3)
    images = images[:, :, : image_shape[1], : image_shape[2]].astype(np.uint8)
    labels = torch.tensor(LABELS)[torch.arange(num_images) % len(LABELS)]
    return LabelledImages(torch.from_numpy(images), labels)


@every_kind
@pytest.mark.parametrize("budget", [1500, 3000, 4096])
def test_the_file_fills_its_budget_and_never_exceeds_it(kind: str, budget: int) -> None:
    data = some_data(300 if kind == "jpeg" else 150)
    memory = FILL[kind](data, budget)
    largest = max(map(len, FILL[kind](data, 10**6).payloads))
    assert len(memory) < len(data)
    # Beside the image that did not fit: its length and padding of the header.
    assert budget - largest - 24 < len(memory.to_bytes()) == memory.file_bytes <= budget


@every_kind
def test_classes_differ_by_one_image_at_most_and_the_first_have_more(kind: str) -> None:
    data = some_data(120)
    for budget in range(2000, 4000, 700):
        counts = FILL[kind](data, budget).images_per_class
        assert counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1


@every_kind
def test_a_class_with_fewer_images_gives_what_it_has(kind: str) -> None:
    data = some_data(90)
    few = torch.cat([data.of_class(-3), data.of_class(7)[:2], data.of_class(1000)])
    assert FILL[kind](data.take(few), 10**6).images_per_class == [30, 2, 30]


@pytest.mark.parametrize("kind", ["raw", "lossless"])
def test_images_are_those_of_the_data_each_once(kind: str) -> None:
    data = some_data(90)
    pixels, labels = FILL[kind](data, 20_000).decode(dtype=torch.uint8)
    known = {(x.numpy().tobytes(), int(y)) for x, y in zip(data.images, data.labels, strict=True)}
    found = [(x.numpy().tobytes(), int(y)) for x, y in zip(pixels, labels, strict=True)]
    assert len(set(found)) == len(found) > 20
    assert set(found) <= known
    assert labels.tolist() == sorted(labels.tolist())


def test_jpeg_images_are_those_of_the_raw_draw_through_jpeg() -> None:
    data = some_data(60)
    raw, raw_labels = raw_images(data, 10**6).decode(dtype=torch.uint8)
    memory = jpeg_images(data, 10**6, quality=20)
    images, labels = memory.decode(dtype=torch.uint8)
    scans = encode_jpeg_scans(raw, 20, subsampling=memory.subsampling)
    assert images.equal(decode_jpeg_scans(*scans))
    assert labels.equal(raw_labels)


def test_jpeg_images_of_a_given_subsampling_share_its_header() -> None:
    data = some_data(30)
    for subsampling in ("4:2:0", "4:4:4"):
        memory = jpeg_images(data, 10**6, quality=20, subsampling=subsampling)
        header, _ = encode_jpeg_scans(data.images[:1], 20, subsampling=subsampling)
        assert memory.header() == header


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (3, 50, 40)])
def test_jpeg_takes_the_chroma_with_which_more_images_fit(image_shape: tuple[int, ...]) -> None:
    data = some_data(90, image_shape)
    counts = [
        len(jpeg_images(data, 4000, quality=30, subsampling=subsampling))
        for subsampling in ("4:2:0", "4:4:4")
    ]
    assert len(jpeg_images(data, 4000, quality=30)) == max(counts)


@every_kind
def test_a_larger_budget_adds_images_to_those_of_a_smaller_one(kind: str) -> None:
    data = some_data(90)
    few, many = (set(FILL[kind](data, budget).payloads) for budget in (1500, 2500))
    assert few < many


@every_kind
@every_selection
def test_no_selection_exceeds_its_budget_or_favours_a_class(kind: str, selection: str) -> None:
    data = some_data(60)
    order = quick_choice(data, selection)
    payloads = FILL[kind](data, 10**6, selection=torch.arange(60)).payloads
    # Images of class k are 0, 3, 6, ... of those with label k.
    own = {int(i): payloads[20 * (int(i) % 3) + int(i) // 3] for i in order}

    @given(st.integers(1500, 40_000), st.integers(0, 20_000))
    @settings(max_examples=5, deadline=None)
    def check(budget: int, more: int) -> None:
        small, large = (
            FILL[kind](data, limit, selection=order) for limit in (budget, budget + more)
        )
        assert len(small.to_bytes()) <= budget
        counts = small.images_per_class
        assert counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1
        assert small.num_images <= large.num_images
        assert sorted(small.payloads) == sorted(own[int(i)] for i in order[: len(small)])

    check()


@every_selection
def test_a_larger_budget_adds_to_what_was_selected(selection: str) -> None:
    data = some_data(90)
    order = quick_choice(data, selection)
    budgets = range(2000, 80_000, 9000)
    kept = [set(raw_images(data, budget, selection=order).payloads) for budget in budgets]
    assert all(few < many for few, many in pairwise(kept[:-1]))
    assert len(kept[-1]) == 90


@every_kind
def test_a_selection_by_name_is_that_of_select_images(kind: str) -> None:
    """By a name that needs no training: the others are tested where they are made."""
    data = some_data(90)
    order = select_images(data, "random", seed=4)
    by_name = FILL[kind](data, 5000, selection="random", seed=4)
    assert by_name.to_bytes() == FILL[kind](data, 5000, selection=order).to_bytes()
    assert by_name.to_bytes() == FILL[kind](data, 5000, seed=4).to_bytes()
    assert by_name.to_bytes() != FILL[kind](data, 5000).to_bytes()


@every_kind
def test_a_selection_by_name_is_made_on_the_device(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"device.*'nowhere'"):
        FILL[kind](some_data(), 8000, selection="herding", device="nowhere")


def test_settings_of_a_kind_are_checked_by_name() -> None:
    with pytest.raises(UnknownOptionError, match=r"JPEGMemory has no option 'qualty'.*'quality'"):
        real_images(JPEGMemory, some_data(), 8000, qualty=3)
    with pytest.raises(ConfigError, match="JPEGMemory needs quality="):
        real_images(JPEGMemory, some_data(), 8000)


def test_images_of_a_class_are_taken_in_the_order_given() -> None:
    data = some_data(30)
    order = torch.tensor([20, 3, 9, 21, 0, 1, 2])
    memory = raw_images(data, 4000, selection=order)
    assert len(memory) == 4
    assert memory.decode(dtype=torch.uint8)[0].equal(data.images[[3, 9, 1, 20]])
    few = raw_images(data, 10**6, selection=torch.tensor([5, 4]))
    assert few.decode(dtype=torch.uint8)[0].equal(data.images[[4, 5]])


@every_kind
@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("best", "random, herding, k-centre, ccs; got 'best'"),
        (torch.tensor([0.0, 1.0]), r"int64 positions \(n,\) in \[0, 9\), one or more; got"),
        (torch.tensor([[0, 1]]), "int64 positions"),
        (torch.tensor([], dtype=torch.int64), "int64 positions"),
        (torch.tensor([0, 9]), "int64 positions"),
        (torch.tensor([-1, 0]), "int64 positions"),
        (torch.tensor([3, 0, 3]), "each position once at most; this one has some twice"),
    ],
)
def test_a_selection_that_is_none_is_refused(kind: str, selection: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FILL[kind](some_data(9), 5000, selection=selection)


@every_kind
def test_a_budget_too_small_names_the_smallest_that_does(kind: str) -> None:
    data = some_data(9)
    with pytest.raises(BudgetError, match="does not hold one image") as caught:
        FILL[kind](data, 100)
    smallest = int(str(caught.value).rpartition("is ")[2].removesuffix(" bytes").replace(",", ""))
    assert FILL[kind](data, smallest).num_images == 1
    with pytest.raises(BudgetError):
        FILL[kind](data, smallest - 1)


def test_fewer_images_than_classes_are_drawn_from_the_first_classes() -> None:
    memory = raw_images(some_data(9), 2000)
    assert memory.num_images == 2
    assert memory.classes.tolist() == [-3, 7]


@every_kind
def test_any_images_are_taken(kind: str) -> None:
    data = some_data(30)
    wanted = FILL[kind](data, 3000).to_bytes()
    arrays = data.images.movedim(1, -1).numpy(), data.labels.numpy()
    for source in ((data.images, data.labels), arrays, Subset(data, range(30))):
        assert FILL[kind](source, 3000).to_bytes() == wanted
    memory = RawMemory(data.image_shape, budget=3000)
    memory.extend(arrays)
    assert memory.to_bytes() == raw_images(data, 3000, selection=torch.arange(30)).to_bytes()
    with pytest.raises(DataError, match="pass that of a data set to load_dataset"):
        FILL[kind]("cifar10", 3000)


def test_without_a_quality_jpegs_is_chosen_for_the_classes_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    briefly = partial(choose_quality, training=TrainingConfig(width=4, num_passes=200))
    monkeypatch.setattr(fill, "choose_quality", briefly)
    data = some_data(24, (1, 8, 8))
    chosen, accuracies = briefly(data, 1000, expected_classes=data.num_classes)
    assert len(accuracies) > 1
    memory = jpeg_images(data, 1000)
    assert memory.quality == chosen
    assert memory.to_bytes() == jpeg_images(data, 1000, quality=chosen).to_bytes()


@pytest.mark.parametrize("order", [[4, 2, 7], np.array([4, 2, 7])])
def test_an_order_may_be_a_list_or_an_array(order: Any) -> None:
    data = some_data(9)
    wanted = raw_images(data, 10**5, selection=torch.tensor([4, 2, 7]))
    assert raw_images(data, 10**5, selection=order).to_bytes() == wanted.to_bytes()


def test_wrong_options_are_refused() -> None:
    data = some_data(9)
    with pytest.raises(ConfigError, match="quality is a whole number"):
        jpeg_images(data, 5000, quality=0)
    with pytest.raises(BudgetError, match="cannot read 'a lot'"):
        raw_images(data, "a lot")


@every_kind
def test_a_network_learns_from_them(kind: str) -> None:
    data = some_data(30)
    patterns = data.images[:3][data.class_indices]
    data = LabelledImages(data.images // 5 + patterns // 5 * 4, data.labels)
    options: dict[str, Any] = {"width": 8, "num_passes": 150, "batch_size": 4, "augmentations": ()}
    network, accuracy = evaluate(FILL[kind](data, 8000), data, device="cpu", **options)
    assert accuracy > 0.5
    assert network.classes.tolist() == list(LABELS)


@pytest.mark.parametrize("memory_type", [PQMemory, HierarchicalMemory])
def test_a_kind_that_is_not_just_filled_is_refused(memory_type: Any) -> None:
    with pytest.raises(ConfigError, match="needs no training, got"):
        real_images(memory_type, real_set(), 6000)
