"""LabelledImages, what becomes one, and the statistics of its channels."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
)

from hmn_replay.data.images import (
    LabelledImages,
    as_labelled_images,
    channel_stats,
    stack_images,
    to_image,
    to_label,
)
from hmn_replay.errors import ConfigError, DataError


def some_images(labels: list[int], channels: int = 3, side: int = 4) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    shape = (len(labels), channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.tensor(labels))


class Pairs:
    """A map-style data set of the items given, in torchvision's way."""

    def __init__(self, *items: Any, **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


# --- LabelledImages


def test_it_is_a_data_set_of_floats_and_integers() -> None:
    data = some_images([7, -3, 1000, 7])
    image, label = data[-2]
    assert (image.dtype, image.shape, label) == (torch.float32, (3, 4, 4), 1000)
    assert image.equal(data.images[2] / 255)
    assert len(data) == 4
    assert data.targets is data.labels
    assert data.image_shape == (3, 4, 4)
    assert repr(data) == "LabelledImages(4 images of 3x4x4, 3 classes)"
    with pytest.raises(IndexError):
        data[4]


def test_a_loader_batches_it() -> None:
    images, labels = next(iter(DataLoader(some_images([7, -3, 1000, 7]), batch_size=4)))
    assert images.shape == (4, 3, 4, 4)
    assert labels.tolist() == [7, -3, 1000, 7]


def test_classes_are_sorted_and_indexed() -> None:
    data = some_images([7, -3, 1000, 7])
    assert data.classes.tolist() == [-3, 7, 1000]
    assert data.num_classes == 3
    assert data.class_indices.tolist() == [1, 0, 2, 1]
    assert data.of_class(7).tolist() == [0, 3]
    assert data.of_class(8).tolist() == []


def test_it_cannot_be_changed_but_can_be_copied() -> None:
    data = some_images([0, 1])
    assert data.num_classes == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.labels = data.labels + 1  # type: ignore[misc]
    assert copy.deepcopy(data).labels.equal(data.labels)


@pytest.mark.parametrize(
    "indices", [[2, 0, 2], torch.tensor([2, 0, -2]), np.array([2, 0, 2])], ids=str
)
def test_take_keeps_order_and_names(indices: Any) -> None:
    data = dataclasses.replace(some_images([5, 6, 7, 6]), class_names={5: "five"})
    taken = data.take(indices)
    assert taken.labels.tolist() == [7, 5, 7]
    assert taken.images.equal(data.images[[2, 0, 2]])
    assert taken.class_names == {5: "five"}


def test_take_reads_masks_and_refuses_nothing() -> None:
    data = some_images([5, 6, 7])
    assert data.take([True, False, True]).labels.tolist() == [5, 7]
    with pytest.raises(DataError, match="at least 1 image"):
        data.take([])
    with pytest.raises(IndexError):
        data.take([3])


def test_floats_are_in_the_unit_range() -> None:
    data = some_images([0, 1, 2])
    assert data.floats().equal(data.images.float() / 255)
    assert data.floats(torch.tensor([2])).equal(data.images[2:].float() / 255)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_a_split_is_a_partition_of_every_class(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    data = LabelledImages(
        torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1), torch.tensor(labels)
    )
    if max(counts) == 1:
        with pytest.raises(DataError, match="no class has 2 images"):
            data.split(fraction, seed)
        return
    first, second = data.split(fraction, seed)
    kept, held_out = first.images.flatten().tolist(), second.images.flatten().tolist()
    assert kept == sorted(kept)
    assert held_out == sorted(held_out)
    assert sorted(kept + held_out) == list(range(len(labels)))
    for label, count in enumerate(counts):
        num_second = int((second.labels == label).sum())
        if count == 1:
            assert num_second == 0
        else:
            assert 1 <= num_second <= count - 1
            assert abs(num_second - fraction * count) <= 1


def test_a_split_hangs_on_the_seed_and_on_the_class_alone() -> None:
    state = torch.random.get_rng_state()
    data = some_images([0] * 20 + [1] * 20)
    once, again = data.split(0.5, seed=1)[1], data.split(0.5, seed=1)[1]
    other, alone = data.split(0.5, seed=2)[1], data.take(data.of_class(1)).split(0.5, seed=1)[1]
    assert once.images.equal(again.images)
    assert not once.images.equal(other.images)
    assert once.take(once.of_class(1)).images.equal(alone.images)
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_split_of_nothing_or_everything_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"in \(0, 1\), got"):
        some_images([0, 0]).split(fraction)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "a tensor of uint8 .* got float32"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"\(N, C, H, W\).* \(2, 4, 4\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), torch.zeros(2).long(), "got ndarray; as_labelled"),
        (
            torch.zeros(2, 3, 4, 4).byte(),
            torch.zeros(2).int(),
            "labels .* of int64 .* int32",
        ),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 1).long(), r"\(N\).* \(2, 1\)"),
        (torch.zeros(2, 3, 4, 4).byte(), [0, 1], "got list"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "got 2 images and 3 labels"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), "at least 1 image"),
        (torch.zeros(2, 2, 4, 4).byte(), torch.zeros(2).long(), "1 or 3 channels"),
        (torch.zeros(2, 3, 0, 4).byte(), torch.zeros(2).long(), "at least 1 pixel"),
        (torch.zeros(2, 3, 4, 4).byte().to("meta"), torch.zeros(2).long(), "on meta"),
    ],
)
def test_other_tensors_are_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelledImages(images, labels)


# --- as_labelled_images


def test_labelled_images_come_back_as_they_are() -> None:
    data = some_images([0, 1])
    assert as_labelled_images(data) is data
    assert as_labelled_images(data, size=4) is data
    assert as_labelled_images(data, size=2).image_shape == (3, 2, 2)


def test_a_pair_of_arrays_is_read() -> None:
    data = some_images([7, -3])
    for pair in [
        (data.images, data.labels),
        [data.floats(), [7, -3]],
        (data.images.permute(0, 2, 3, 1).numpy(), np.array([[7], [-3]], np.int16)),
    ]:
        read = as_labelled_images(pair)
        assert read.images.equal(data.images)
        assert read.labels.equal(data.labels)
    assert as_labelled_images((data.images, data.labels), size=2).image_shape == (3, 2, 2)


@pytest.mark.parametrize("labels", [[7], [7, -3], [7, -3, 1000]])
def test_a_list_of_images_and_their_labels_are_read(labels: list[int]) -> None:
    data = some_images(labels)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
    lists: list[list[Any]] = [pictures, list(map(np.asarray, pictures)), list(data.floats())]
    for images in lists:
        for pair in ((images, labels), [tuple(images), data.labels], (images, np.array(labels))):
            read = as_labelled_images(pair)
            assert read.images.equal(data.images)
            assert read.labels.equal(data.labels)
    assert as_labelled_images((pictures, labels), size=2).image_shape == (3, 2, 2)


def test_two_items_are_a_data_set_whatever_their_labels_are() -> None:
    data = some_images([7, -3])
    for shape in ((), (1,), (1, 1)):
        items = [
            (image, label.view(shape))
            for image, label in zip(data.images, data.labels, strict=True)
        ]
        for source in (items, tuple(items)):
            read = as_labelled_images(source)
            assert read.images.equal(data.images)
            assert read.labels.tolist() == [7, -3]


def test_pictures_tensors_and_arrays_of_a_data_set_are_read() -> None:
    data = some_images([7, -3, 1000])
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
    arrays = [np.asarray(picture) for picture in pictures]
    kinds: list[list[Any]] = [pictures, arrays, list(data.images), list(data.floats())]
    for images in kinds:
        for extra in [(), (0,)]:
            items = [
                (image, label, *extra)
                for image, label in zip(images, data.labels.tolist(), strict=True)
            ]
            sources: list[Any] = [items, Pairs(*items)]
            for source in sources:
                read = as_labelled_images(source)
                assert read.images.equal(data.images)
                assert read.labels.equal(data.labels)


def test_torch_data_sets_are_read() -> None:
    data = some_images([7, -3, 1000])
    read = as_labelled_images(TensorDataset(data.floats(), data.labels))
    assert read.images.equal(data.images)
    assert as_labelled_images(Subset(data, [2, 0])).labels.tolist() == [1000, 7]


def test_grey_among_colour_is_repeated() -> None:
    grey, colour = Image.new("L", (2, 2), 9), Image.new("RGB", (2, 2), (1, 2, 3))
    for items in itertools.permutations([(grey, 0), (grey, 0), (colour, 1)]):
        read = as_labelled_images(list(items))
        assert read.image_shape == (3, 2, 2)
        assert read.images[read.labels == 0].unique().tolist() == [9]
        assert read.images[read.labels == 1].flatten().tolist() == [1] * 4 + [2] * 4 + [3] * 4


def test_images_of_many_sizes_need_a_size() -> None:
    items = [(Image.new("L", (4, 4)), 0), (Image.new("L", (5, 4)), 1)]
    with pytest.raises(
        DataError, match=r"item 1 is 4 x 5 .* first image is 4 x 4: .*; as_labelled_images\(data"
    ):
        as_labelled_images(items)
    assert as_labelled_images(items, size=3).image_shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], r"maps labels to names.* got \['cat', 'dog'\]: dict\(enumerate"),
        ({"0": "cat"}, "labels, which are integers.* got '0': 'cat'"),
        ({0: 7}, "got 0: 7"),
    ],
)
def test_class_names_that_are_none_are_refused(names: Any, message: str) -> None:
    data = some_images([0, 1])
    with pytest.raises(DataError, match=message):
        LabelledImages(data.images, data.labels, names)
    named = LabelledImages(data.images, data.labels, {np.int64(0): "cat"})  # type: ignore[dict-item]
    assert named.class_names[0] == "cat"


def test_class_names_are_those_of_the_data_set() -> None:
    image = torch.zeros(1, 2, 2)
    named = Pairs((image, 0), (image, 1), classes=["cat", "dog"])
    assert as_labelled_images(named).class_names == {0: "cat", 1: "dog"}
    subset: Any = Subset(named, [1])  # type: ignore[arg-type]
    assert as_labelled_images(subset).class_names == {0: "cat", 1: "dog"}
    parts: list[Any] = [subset, named]
    assert as_labelled_images(ConcatDataset(parts)).class_names == {0: "cat", 1: "dog"}
    parts = [named, Pairs((image, 0), classes=["dog"])]
    assert as_labelled_images(ConcatDataset(parts)).class_names == {}
    numbered = Pairs((image, 4), classes=["x"], class_to_idx={"cat": 4})
    assert as_labelled_images(numbered).class_names == {4: "cat"}
    remapped = Pairs((image, 4), classes=["x"], target_transform=abs)
    assert as_labelled_images(remapped).class_names == {}
    assert as_labelled_images(Pairs((image, 4), classes=[3])).class_names == {}


def test_of_a_loader_its_data_set_is_asked_for() -> None:
    data: Any = Pairs((IMAGE, 0))
    loader: Any = DataLoader(data)
    with pytest.raises(DataError, match=r"got a DataLoader: pass its data set, loader\.dataset"):
        as_labelled_images(loader)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """A data set with no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield IMAGE, 0


IMAGE = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "at least 1 image, got an empty data set"),
        ((torch.zeros(0, 3, 4, 4), torch.zeros(0).long()), "empty data set"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3).long()), "2 images and 3 labels"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)), "multi-label"),
        ((torch.full((2, 3, 4, 4), -1.5), torch.zeros(2).long()), "undo your normalisation"),
        (([IMAGE, IMAGE], [0, 1, 2]), "a label for every image, got 2 images and 3 labels"),
        (
            ([IMAGE, torch.zeros(1, 3, 2)], [0, 1]),
            r"image 1 is 3 x 2 .*; as_labelled_images\(data, size=64\)",
        ),
        (([IMAGE, IMAGE - 1], [0, 1]), "image 1: .* undo your normalisation"),
        (([IMAGE, IMAGE], [0.5, 1.5]), "labels: expected integers as labels, got float64"),
        ((torch.zeros(2, 3, 4, 4), []), "2 images and 0 labels"),
        (([], []), "at least 1 image, got an empty data set"),
        ("cifar10", "got the name 'cifar10': pass that of a data set to load_dataset, or"),
        (torch.zeros(2, 3, 4, 4), "got Tensor"),
        ({"train": [(IMAGE, 0)]}, "got dict"),
        (Stream(), "with a length, got Stream"),
        (None, "got NoneType"),
        ([IMAGE], r"item 0: expected \(image, label\), got Tensor"),
        ([(IMAGE, 0), (IMAGE,)], r"item 1: expected \(image, label\), got tuple"),
        ([(IMAGE, 0), ("a.png", 0)], "item 1: expected an image .* got str"),
        ([(IMAGE, 0), (IMAGE, torch.ones(3))], "item 1: .* multi-label"),
        ([(IMAGE, 0), (IMAGE, 0.5)], "item 1: expected integers as labels, got float64"),
        ([(IMAGE, 0), (IMAGE - 1, 0)], "item 1: .* undo your normalisation"),
        ([(IMAGE, 0), (IMAGE * torch.nan, 0)], "item 1: .* NaN"),
    ],
)
def test_other_sources_are_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_labelled_images(source)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 8192; got 0"):
        as_labelled_images(some_images([0]), size=0)


def test_images_are_fetched_once_and_in_order() -> None:
    fetched: Counter[int] = Counter()

    def fetch(position: int) -> tuple[object, object]:
        fetched[position] += 1
        return IMAGE, position

    assert stack_images(fetch, 5).labels.tolist() == list(fetched) == [0, 1, 2, 3, 4]
    assert set(fetched.values()) == {1}


# --- pixels and labels of every kind


def some_pixels(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def pixels_of(images: Any, size: int | None = None) -> Tensor:
    return as_labelled_images((images, torch.zeros(len(images)).long()), size=size).images


def labels_of(labels: Any) -> Tensor:
    count = len(labels) if getattr(labels, "ndim", 1) else 1
    return as_labelled_images((torch.zeros(count, 1, 1, 1), labels)).labels


@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_layout_gives_channels_first(make: Any, channels: int) -> None:
    pixels = some_pixels(4, channels, 8, 6)
    want = torch.from_numpy(pixels)
    assert pixels_of(make(pixels)).equal(want)
    last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    assert pixels_of(make(last)).equal(want)
    assert pixels_of(make(last)).is_contiguous()


def test_grey_images_may_leave_out_the_channel() -> None:
    pixels = some_pixels(4, 8, 6)
    assert pixels_of(pixels).equal(torch.from_numpy(pixels)[:, None])


def test_where_both_layouts_fit_a_tensor_is_channels_first_and_an_array_channels_last() -> None:
    pixels = some_pixels(2, 3, 8, 3)
    assert pixels_of(torch.from_numpy(pixels)).shape == (2, 3, 8, 3)
    assert pixels_of(pixels).shape == (2, 3, 3, 8)


def test_bytes_share_memory() -> None:
    images = torch.from_numpy(some_pixels(2, 3, 4, 4))
    assert pixels_of(images).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_rounded_to_bytes(dtype: Any) -> None:
    pixels = some_pixels(300, 1, 4, 4)
    assert pixels_of((pixels / 255).astype(dtype)).equal(torch.from_numpy(pixels))


def test_bfloat16_with_gradient_is_read() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).bfloat16().reshape(3, 1, 1, 1).requires_grad_()
    assert pixels_of(images).flatten().tolist() == [0, 128, 255]


def test_read_only_and_reversed_arrays_are_read() -> None:
    pixels = some_pixels(3, 4, 4)
    pixels.flags.writeable = False
    assert pixels_of(pixels).equal(torch.from_numpy(pixels.copy())[:, None])
    assert pixels_of(pixels[::-1]).equal(torch.from_numpy(pixels[::-1].copy())[:, None])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 3, 8, 8), np.uint8), "at least 1 image, got an empty data set"),
        (np.zeros((5, 784), np.uint8), r"expected each image of shape .*, got \(784,\)"),
        (np.zeros((5, 8, 8, 4), np.uint8), r"1 or 3 channels, got \(8, 8, 4\)"),
        (np.zeros((5, 1, 3, 8, 8), np.uint8), r"got \(1, 3, 8, 8\)"),
        (np.zeros((5, 3, 0, 8), np.uint8), r"got \(3, 0, 8\)"),
        (np.zeros((5, 8, 8), np.int64), "uint8, or as floats .* got int64; convert integers"),
        (torch.zeros(5, 8, 8, dtype=torch.bool), "got bool"),
        (np.full((5, 8, 8), np.nan), "finite floats in .* got NaN or infinity"),
        (np.full((5, 8, 8), -np.inf), "got NaN or infinity"),
        (np.linspace(-2.1, 2.6, 64).reshape(1, 8, 8), "undo your normalisation"),
        (np.linspace(0, 255, 64).reshape(1, 8, 8), r"got \[0, 255\]; divide by 255"),
        (np.full((5, 8, 8), None), "expected numbers, got an array of object"),
        (np.full((5, 8, 8), "cat"), "got an array of <U3"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pixels_of(images)


def test_nan_is_found_in_the_last_chunk() -> None:
    images = torch.zeros(1000, 1, 2, 2)
    images[-1, 0, 1, 1] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        pixels_of(images)


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), channels=st.sampled_from([1, 3]),
    size=st.integers(1, 16),
)  # fmt: skip
def test_resizing_gives_squares_for_any_shape(
    height: int, width: int, channels: int, size: int
) -> None:
    batch = torch.from_numpy(some_pixels(2, channels, height, width))
    resized = pixels_of(batch, size)
    assert resized.shape == (2, channels, size, size)
    constant = pixels_of(torch.full_like(batch, 77), size)
    assert constant.unique().tolist() == [77]


def test_resizing_keeps_the_centre_and_matches_the_picture() -> None:
    pixels = some_pixels(6, 10, 3)
    cropped = pixels_of(pixels[None], 6)[0]
    assert cropped.equal(torch.from_numpy(pixels[:, 2:8].transpose(2, 0, 1).copy()))
    halved = to_image(Image.fromarray(pixels), "item 0", 3)
    np.testing.assert_array_equal(pixels_of(pixels[None], 3)[0], halved)


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3), ("YCbCr", 3)],
)
def test_pictures_of_8_bits_become_grey_or_colour(mode: str, channels: int) -> None:
    picture = Image.fromarray(some_pixels(5, 7, 3)).convert(mode)
    assert to_image(picture, "item 0").shape == (channels, 5, 7)


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "LAB"])
def test_pictures_of_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match=f"item 7: .* 8 bits per channel, got .*{mode}"):
        to_image(Image.new(mode, (4, 4)), "item 7")


def test_an_image_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match=r"item 7: .* got dict; give the data set a transform"):
        to_image({"pixels": 1}, "item 7")
    with pytest.raises(DataError, match=r"item 7: expected each image .* got \(2, 4, 4\)"):
        to_image(torch.zeros(2, 4, 4), "item 7")


@pytest.mark.parametrize(
    "labels",
    [
        [-3, 7, 1000],
        (np.int8(-3), 7, np.uint16(1000)),
        np.array([[-3], [7], [1000]], np.int16),
        np.array([-3, 7, 1000], ">i4"),
        torch.tensor([-3, 7, 1000], dtype=torch.int32),
    ],
)
def test_integers_of_any_kind_are_labels(labels: Any) -> None:
    converted = labels_of(labels)
    assert converted.dtype == torch.int64
    assert converted.tolist() == [-3, 7, 1000]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(4), r"got shape \(4, 4\); multi-label .* labels.argmax\(1\)"),
        ([[0, 1], [1, 0]], "multi-label"),
        ([[0], [1, 2]], "rows of different lengths; multi-label"),
        (np.array(3), r"got shape \(\)"),
        ([0.5, 1.0], "expected integers as labels, got float64"),
        (torch.zeros(3), "expected integers as labels, got float32"),
        (np.array([1j]), "expected integers as labels, got complex128"),
        (["cat", "dog"], "expected numbers, got an array of <U3"),
        ([None, 3], "got an array of object"),
        (np.array([2**63], np.uint64), r"below 2\*\*63"),
    ],
)
def test_what_is_not_one_integer_an_image_is_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(labels)


@pytest.mark.parametrize(
    "label", [5, np.int64(5), np.array(5), np.array([5]), torch.tensor(5), torch.tensor([[5]])]
)
def test_one_integer_of_any_kind_is_a_label(label: Any) -> None:
    assert to_label(label, "item 0") == 5
    assert type(to_label(label, "item 0")) is int


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor([0, 1, 1]), r"item 2: expected one integer .* got shape \(1, 3\)"),
        ([0, 1], "multi-label targets are not supported"),
        (np.array([]), r"got shape \(1, 0\)"),
        (2.0, "item 2: expected integers as labels, got float64"),
        (torch.tensor(0.5), "got float32"),
        ("cat", "item 2: expected an integer as its label, got 'cat'; number the classes"),
        (None, "its label, got None"),
        ({"boxes": []}, "its label, got {'boxes'"),
        (2**63, "item 2: .* uint64"),
    ],
)
def test_what_is_not_one_integer_is_refused(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_label(label, "item 2")


# --- channel_stats


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_stats_are_those_of_numpy(channels: int) -> None:
    data = some_images([0] * 300, channels, side=5)
    values = data.images.numpy().astype(np.float64) / 255
    for images in [data.images, data.floats(), data.floats().double().requires_grad_()]:
        mean, std = channel_stats(images)
        assert mean.dtype == std.dtype == torch.float32
        np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-6)


def test_a_constant_channel_can_be_divided_by() -> None:
    mean, std = channel_stats(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8))
    assert mean.item() == pytest.approx(0.2)
    assert std.item() == pytest.approx(1e-3)


def test_channel_stats_leave_the_images_alone() -> None:
    for dtype in (torch.float64, torch.uint8):
        images = torch.ones(2, 1, 2, 2).to(dtype)
        channel_stats(images)
        assert images.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"\(N, C, H, W\).* got float32 \(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), "not empty"),
        (torch.zeros(2, 3, 4, 4).int(), "got int32"),
        (torch.full((2, 3, 4, 4), 1.5), "undo your normalisation"),
        (torch.full((2, 3, 4, 4), torch.nan), "NaN"),
    ],
)
def test_channel_stats_refuse_other_tensors(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        channel_stats(images)


class Items:
    """A data set that says that it has so many items, and has three."""

    def __init__(self, says: Any) -> None:
        self.says = says

    def __len__(self) -> int:
        length: int = self.says
        return length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= 3:
            raise IndexError(index)
        return torch.zeros(1, 8, 8), index


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (5, "item 3: there is none, though the data set says that it has 5"),
        (-1, "the length of the data set is no number of items"),
        (2**70, "the length of the data set is no number of items"),
        ("x", "the length of the data set is no number of items"),
        (10**12, r"1,000,000,000,000 images of \(1, 8, 8\) do not fit in memory: they take 64,000"),
    ],
)
def test_a_data_set_whose_length_lies_is_refused(says: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_labelled_images(Items(says))
    assert len(as_labelled_images(Items(3))) == 3


@pytest.mark.filterwarnings("ignore")  # prototypes of torch's warn
@pytest.mark.parametrize(
    ("made_from", "message"),
    [
        (Tensor.to_sparse, "got a sparse, nested or quantized tensor"),
        (
            lambda floats: torch.nested.nested_tensor(list(floats)),
            "got a sparse, nested or quantized tensor",
        ),
        (
            lambda floats: floats.to("meta"),
            "expected a plain tensor with values, got a meta tensor",
        ),
        (
            lambda floats: floats.to(torch.float8_e4m3fn),
            "expected floats of 16, 32 or 64 bits, got float8_e4m3fn",
        ),
    ],
    ids=["sparse", "nested", "meta", "float8"],
)
def test_a_tensor_without_plain_numbers_is_refused(
    made_from: Callable[[Tensor], Tensor], message: str
) -> None:
    floats = torch.zeros(4, 3, 8, 8)
    with pytest.raises(DataError, match=message):
        as_labelled_images((made_from(floats), torch.arange(4)))
    with pytest.raises(DataError, match="expected a plain tensor with values"):
        as_labelled_images((floats, torch.arange(4).to_sparse()))
