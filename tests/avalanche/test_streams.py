"""An experience's data as labelled images: normalisation, forms of items, class keys."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.transforms import v2

from hmn_replay.avalanche.streams import (
    Normalization,
    check_experiences,
    check_is_normalised,
    class_key,
    find_normalization,
    read_experiences,
    split_class_keys,
)
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.runtime import isolated
from tests.streams import Images, streams

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
EXPECTED = Normalization(MEAN, STD)


class Experience:
    def __init__(self, *items: Any) -> None:
        self.dataset = AvalancheDataset([_Items(items)])


class _Items(Dataset[Any]):
    def __init__(self, items: tuple[Any, ...]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Pictures(Images):
    """The same images, as pictures."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        picture = Image.fromarray(self.pixels[index].movedim(0, -1).numpy())
        return (picture if self.transform is None else self.transform(picture)), self.targets[index]


def benchmark_with(train: Any, evaluation: Any, data: Images | None = None) -> Any:
    data = data or Pictures()
    return nc_benchmark(
        data,
        data,
        n_experiences=2,
        task_labels=False,
        shuffle=False,
        train_transform=train,
        eval_transform=evaluation,
    )


def augmented(normalise: Any) -> Any:
    return transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])


def evaluated(normalise: Any) -> Any:
    return transforms.Compose([transforms.Compose([transforms.ToTensor()]), normalise])


@pytest.mark.parametrize(
    "normalise",
    [transforms.Normalize(MEAN, STD), v2.Normalize(list(MEAN), list(STD))],
    ids=["v1", "v2"],
)
def test_images_are_read_through_eval_transforms_and_not_normalised(normalise: Any) -> None:
    benchmark = benchmark_with(augmented(normalise), evaluated(normalise))
    experience = benchmark.train_stream[1]
    found = find_normalization(experience.dataset)
    assert found == EXPECTED
    images = read_experiences([experience], found)
    data = Pictures()
    labels = torch.tensor(data.targets)
    assert images.labels.unique().tolist() == [2, 3] and len(images) == 20
    for label in (2, 3):
        assert torch.equal(images.images[images.labels == label], data.pixels[labels == label])


def test_normalisation_is_found_in_a_wrapped_data_sets_own_transform() -> None:
    inner = Images(transform=torch.nn.Sequential(v2.Normalize(list(MEAN), list(STD))))
    subset = Subset(inner, [0, 1, 2])
    subset.targets = inner.targets[:3]  # type: ignore[attr-defined]
    for data in (inner, subset):
        assert find_normalization(as_classification_dataset(data)) == EXPECTED  # type: ignore[arg-type]


def test_an_experience_without_images_contradicts_no_normalisation() -> None:
    check_is_normalised([Experience()], EXPECTED)
    with pytest.raises(DataError, match=r"the eval transforms give images in \[0, 1\]"):
        check_is_normalised([Experience((torch.rand(3, 8, 8), 0))], EXPECTED)


def test_no_normalisation_is_found_where_there_is_none() -> None:
    assert find_normalization(streams().train_stream[0].dataset) is None
    target = (None, transforms.Normalize(MEAN, STD))
    dataset = AvalancheDataset([Images()], transform_groups={"train": target, "eval": target})  # type: ignore[arg-type]
    assert find_normalization(dataset) is None


def test_different_normalisations_are_refused() -> None:
    other = transforms.Normalize((0.5,), (0.5,))
    mine = transforms.Normalize(MEAN, STD)
    for train, evaluation in ((augmented(other), evaluated(mine)), (None, evaluated(mine))):
        dataset = benchmark_with(train, evaluation).train_stream[0].dataset
        with pytest.raises(DataError, match=r"the same in the train and the eval transforms"):
            find_normalization(dataset)


def test_normalising_is_torchvisions_to_the_bit() -> None:
    images = torch.rand(5, 3, 4, 4)
    expected = transforms.Normalize(MEAN, STD)(images)
    assert torch.equal(EXPECTED.apply(images), expected)
    assert torch.allclose(EXPECTED.undo(expected), images, atol=1e-6)


@pytest.mark.parametrize(
    "pair",
    [((0.5,), (0.0,)), ((0.5, 0.5), (1.0, 1.0)), ((0.5,), (1.0,) * 3), (("a",), (1.0,)), (0.5,)],
)
def test_a_normalisation_that_is_none_is_refused(pair: Any) -> None:
    with pytest.raises(ConfigError, match="normalisation"):
        Normalization.of(pair)


def test_a_normalisation_may_be_numbers_or_tensors() -> None:
    assert Normalization.of((0.5, 0.25)) == Normalization((0.5,), (0.25,))
    assert Normalization.of((torch.tensor([0.5]), np.array([0.25]))) == Normalization(
        (0.5,), (0.25,)
    )


IMAGE = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"x": IMAGE, "y": 1}, "got dict of 2"),
        ((IMAGE, 1, 0, 5), "got tuple of 4"),
        ((IMAGE,), "got tuple of 1"),
        ((IMAGE, torch.tensor([0, 1, 1])), "multi-label"),
        ((torch.zeros(7), 1), r"\(C, H, W\)"),
        ((IMAGE, 1, -1), "task label -1"),
        ((IMAGE, 1.5), "integers as labels"),
        ((IMAGE - 1, 1), r"got \[-1, -1\]; no torchvision Normalize"),
        ((IMAGE * torch.nan, 1), "NaN"),
    ],
)
def test_items_that_cannot_be_used_are_refused(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_experiences([Experience(item)], None)
    with pytest.raises(DataError, match=message):
        read_experiences([Experience(item)], None)


def test_a_wrong_normalisation_is_refused() -> None:
    with pytest.raises(DataError, match="once the normalisation with"):
        check_experiences([Experience((IMAGE + 5, 1))], EXPECTED)
    with pytest.raises(DataError, match="3 channels of its normalisation"):
        check_experiences([Experience((torch.zeros(1, 4, 4), 1))], EXPECTED)


def test_checking_returns_how_many_parts_an_item_has() -> None:
    assert check_experiences([Experience((IMAGE, 1))], None) == (2, tuple(IMAGE.shape))
    assert check_experiences([Experience((IMAGE, 1, 0))], None) == (3, tuple(IMAGE.shape))
    assert check_experiences([Experience()], None) == (0, ())


def test_arrays_and_pictures_are_read() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    items = [(pixels, 1), (Image.fromarray(pixels), 1), (pixels / np.float32(255), 1)]
    images = read_experiences([Experience(*items)], None).images
    expected = torch.from_numpy(pixels).movedim(-1, 0)
    for image in images:
        assert torch.equal(image, expected)


def test_class_keys_and_back() -> None:
    pairs = [(0, 0), (-7, 0), (2**32 - 1, 0), (0, 1), (9, 2), (2**32 - 1, 2**31 - 1)]
    keys = torch.tensor([class_key(label, task) for label, task in pairs])
    assert keys[:3].tolist() == [0, -7, 2**32 - 1] and int(keys[4]) == (2 << 32) | 9
    labels, tasks = split_class_keys(keys)
    assert list(zip(labels.tolist(), tasks.tolist(), strict=True)) == pairs
    for label, task in ((2**32, 0), (-1, 1), (0, 2**31), (0, -1)):
        with pytest.raises(DataError, match="labels below"):
            class_key(label, task)


def test_random_states_are_seeded_inside_and_kept_outside() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def draw_inside(name: str) -> tuple[float, float, float]:
        with isolated(torch.device("cpu"), 3, name):
            return draw()

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = [draw(), draw()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    found = [draw()]
    inside = draw_inside("a")
    with pytest.raises(RuntimeError), isolated(torch.device("cpu"), 3, "a"):
        raise RuntimeError
    found.append(draw())
    assert found == expected
    assert inside == draw_inside("a") != draw_inside("b")
    with torch.autocast("cpu", torch.bfloat16), isolated(torch.device("cpu"), 0, "a"):
        assert not torch.is_autocast_enabled("cpu")


def test_several_experiences_are_read_as_one() -> None:
    experiences = streams().train_stream
    data = Images()
    images = read_experiences(experiences, None)
    assert images.labels.bincount().tolist() == [10] * 4
    assert sorted(map(bytes, images.images.flatten(1).numpy())) == sorted(
        map(bytes, data.pixels.flatten(1).numpy())
    )
