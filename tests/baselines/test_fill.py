"""Real images at equal bytes: what is drawn, and how full the file is."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn_replay.baselines import fill as baselines
from hmn_replay.baselines.fill import jpeg_images, pack_jpeg_images, raw_images
from hmn_replay.baselines.jpeg import decode_jpeg_scans, encode_jpeg_scans
from hmn_replay.baselines.real_images import RealImages
from hmn_replay.baselines.selection import SELECTIONS, select_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError, DataError
from hmn_replay.evaluation import evaluate
from hmn_replay.training.train import TrainingConfig

LABELS = (-3, 7, 1000)


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


def make(kind: str, data: LabelledImages, budget: int | str, **options: Any) -> RealImages:
    if kind == "raw":
        return raw_images(data, budget, **options)
    return jpeg_images(data, budget, quality=20, **options)


both = pytest.mark.parametrize("kind", ["raw", "jpeg"])
every_selection = pytest.mark.parametrize("selection", SELECTIONS)


# One pass over the images, for a choice that is some choice.
quick_choice = partial(
    select_images,
    config=TrainingConfig(width=4, num_passes=1, augmentations=()),
    device="cpu",
)


@pytest.fixture
def quick_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selections by name train a small network for one pass over the images."""
    monkeypatch.setattr(baselines, "select_images", quick_choice)


@both
@pytest.mark.parametrize("budget", [1500, 3000, 4096, 7777, 20_000])
def test_the_file_fills_its_budget_and_never_exceeds_it(kind: str, budget: int) -> None:
    data = some_data(1500)
    images = make(kind, data, budget)
    most = 768 if kind == "raw" else max(map(len, encode_jpeg_scans(data.images, 20)[1])) + 1
    # Beside the image that did not fit: padding of the header, and a digit more of each size.
    assert budget - most - 24 < images.file_bytes <= budget
    assert images.file_bytes == len(images.serialise())


@both
def test_classes_differ_by_one_image_at_most_and_the_first_have_more(kind: str) -> None:
    data = some_data(300)
    for budget in range(2000, 6000, 700):
        counts = make(kind, data, budget).images_per_class
        assert counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1


@both
def test_a_class_with_fewer_images_gives_what_it_has(kind: str) -> None:
    data = some_data(90)
    few = torch.cat([data.of_class(-3), data.of_class(7)[:2], data.of_class(1000)])
    assert make(kind, data.take(few), 10**6).images_per_class == [30, 2, 30]


def test_raw_images_are_images_of_the_data_each_once() -> None:
    data = some_data(90)
    images, labels = raw_images(data, 20_000).decode()
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    known = {(x.numpy().tobytes(), int(y)) for x, y in zip(data.images, data.labels, strict=True)}
    pixels = (images * 255).round().to(torch.uint8)
    found = [(x.numpy().tobytes(), int(y)) for x, y in zip(pixels, labels, strict=True)]
    assert len(set(found)) == len(found)
    assert set(found) <= known
    assert labels.tolist() == sorted(labels.tolist())


def test_scans_are_packed_again_as_they_are_one_of_every_class_in_turn() -> None:
    data = some_data(300)
    images = jpeg_images(data, 6000, quality=30)
    header = images.arrays["header"].tobytes()
    assert pack_jpeg_images(header, images.scans, 6000).serialise() == images.serialise()
    fewer = pack_jpeg_images(header, images.scans, 4000)
    assert 3900 < fewer.file_bytes <= 4000
    assert max(fewer.images_per_class) - min(fewer.images_per_class) <= 1
    for label, scans in fewer.scans.items():
        assert scans == images.scans[label][: len(scans)]
    with pytest.raises(BudgetError, match="does not hold one image"):
        pack_jpeg_images(header, images.scans, 100)
    with pytest.raises(DataError, match="at least one JPEG scan"):
        pack_jpeg_images(header, {}, 4000)


def test_jpeg_images_of_a_given_subsampling_share_its_header() -> None:
    data = some_data(30)
    for subsampling in ("4:2:0", "4:4:4"):
        images = jpeg_images(data, 10**6, quality=20, subsampling=subsampling)
        header, _ = encode_jpeg_scans(data.images[:1], 20, subsampling=subsampling)
        assert images.arrays["header"].tobytes() == header


def test_jpeg_images_are_those_of_the_raw_draw_through_jpeg() -> None:
    data = some_data(60)
    raw, raw_labels = raw_images(data, 10**6).decode(dtype=torch.uint8)
    images, labels = jpeg_images(data, 10**6, quality=20).decode(dtype=torch.uint8)
    candidates = [
        decode_jpeg_scans(*encode_jpeg_scans(raw, 20, subsampling=subsampling))
        for subsampling in ("4:2:0", "4:4:4")
    ]
    assert any(images.equal(candidate) for candidate in candidates)
    assert labels.equal(raw_labels)
    floats, _ = jpeg_images(data, 10**6, quality=20).decode()
    assert floats.equal(images.float() / 255)


@both
def test_a_larger_budget_adds_images_to_those_of_a_smaller_one(kind: str) -> None:
    data = some_data(90)
    small, large = (make(kind, data, budget).decode()[0] for budget in (1500, 2500))
    few, many = ({image.numpy().tobytes() for image in images} for images in (small, large))
    assert few < many


@both
@every_selection
def test_no_selection_exceeds_its_budget_or_favours_a_class(kind: str, selection: str) -> None:
    data = some_data(90)
    order = quick_choice(data, selection)

    @given(st.integers(1500, 80_000), st.integers(0, 20_000))
    @settings(max_examples=10, deadline=None)
    def check(budget: int, more: int) -> None:
        small, large = (
            make(kind, data, limit, selection=order) for limit in (budget, budget + more)
        )
        assert len(small.serialise()) <= budget
        counts = small.images_per_class
        assert counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1
        assert small.num_images <= large.num_images
        labels = data.labels[order[: small.num_images]]
        assert counts == [int((labels == label).sum()) for label in small.classes]

    check()


@pytest.mark.usefixtures("quick_names")
@every_selection
def test_a_larger_budget_adds_to_what_was_selected(selection: str) -> None:
    data = some_data(90)
    files = [raw_images(data, budget, selection=selection) for budget in range(2000, 80_000, 9000)]
    kept = [{image.tobytes() for image in file.arrays["images"]} for file in files]
    assert all(few < many for few, many in pairwise(kept[:-1]))
    assert len(kept[-1]) == 90


@pytest.mark.usefixtures("quick_names")
@both
@every_selection
def test_a_selection_by_name_is_that_of_select_images(kind: str, selection: str) -> None:
    data = some_data(90)
    order = quick_choice(data, selection, seed=4)
    by_name = make(kind, data, 5000, selection=selection, seed=4)
    assert by_name.serialise() == make(kind, data, 5000, selection=order).serialise()
    assert (by_name.serialise() == make(kind, data, 5000, seed=4).serialise()) == (
        selection == "random"
    )


def test_images_are_taken_in_the_order_given() -> None:
    data = some_data(30)
    images = raw_images(data, 4000, selection=torch.tensor([20, 3, 9, 21, 0, 1, 2]))
    assert images.num_images == 4
    assert torch.from_numpy(images.arrays["images"]).equal(data.images[[3, 9, 21, 20]])
    few = raw_images(data, 10**6, selection=torch.tensor([5, 4]))
    assert few.decode(dtype=torch.uint8)[0].equal(data.images[[4, 5]])


@both
@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("best", "a selection is one of random, herding, k-centre, ccs; got 'best'"),
        (torch.tensor([0.0, 1.0]), r"int64 positions \(n,\) in \[0, 9\), one or more; got"),
        (torch.tensor([[0, 1]]), r"got torch.int64 \(1, 2\)"),
        (torch.tensor([], dtype=torch.int64), r"got torch.int64 \(0,\)"),
        (torch.tensor([0, 9]), "int64 positions"),
        (torch.tensor([-1, 0]), "int64 positions"),
        (torch.tensor([3, 0, 3]), "each position once; this one has some twice"),
    ],
)
def test_a_selection_that_is_none_is_refused(kind: str, selection: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(kind, some_data(9), 5000, selection=selection)


@both
def test_the_seed_decides_the_draw(kind: str) -> None:
    data = some_data(90)
    assert make(kind, data, 4000).serialise() == make(kind, data, 4000).serialise()
    assert make(kind, data, 4000).serialise() != make(kind, data, 4000, seed=1).serialise()


@both
def test_a_budget_too_small_names_the_smallest_that_does(kind: str) -> None:
    data = some_data(9)
    with pytest.raises(BudgetError, match="does not hold one image") as caught:
        make(kind, data, 100)
    smallest = int(str(caught.value).rpartition("is ")[2].removesuffix(" bytes").replace(",", ""))
    assert make(kind, data, smallest).num_images == 1
    with pytest.raises(BudgetError):
        make(kind, data, smallest - 1)


def test_fewer_images_than_classes_are_drawn_from_the_first_classes() -> None:
    images = raw_images(some_data(9), 2000)
    assert images.num_images == 2
    assert images.classes.tolist() == [-3, 7]


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (3, 50, 40)])
def test_jpeg_takes_the_chroma_that_lets_more_images_fit(image_shape: tuple[int, ...]) -> None:
    data = some_data(90, image_shape)
    images = jpeg_images(data, 4000, quality=30)
    for subsampling in ("4:2:0", "4:4:4"):
        header, scans = encode_jpeg_scans(data.images, 30, subsampling=subsampling)
        mean = len(b"".join(scans)) / len(scans) + 1
        expected = min(90.0, (4000 - len(header) - 400) / mean)
        assert images.num_images > 0.9 * expected - 2


def test_long_scans_have_their_lengths_in_two_bytes() -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 256, (6, 3, 32, 32), np.uint8))
    data = LabelledImages(noise, torch.arange(6))
    images = jpeg_images(data, 10**6, quality=90)
    assert images.arrays["lengths"].dtype == np.uint16
    assert images.decode()[0].shape == (6, 3, 32, 32)
    assert jpeg_images(data, 10**6, quality=1).arrays["lengths"].dtype == np.uint8


def test_wrong_options_are_refused() -> None:
    data = some_data(9)
    with pytest.raises(ConfigError, match="quality is a whole number"):
        jpeg_images(data, 5000, quality=0)
    with pytest.raises(BudgetError, match="cannot read 'a lot'"):
        raw_images(data, "a lot")


@both
def test_a_network_learns_from_them(kind: str) -> None:
    data = some_data(30)
    network, accuracy = evaluate(
        make(kind, data, 5000), data, width=8, num_passes=60, batch_size=16, device="cpu"
    )
    assert 0 <= accuracy <= 1
    assert network.classes.tolist() == list(LABELS)
