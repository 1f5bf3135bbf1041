"""Decoded images in a mini-batch."""

from __future__ import annotations

import pytest
import torch

from hmn_replay.avalanche.losses import DecodedImages, add_to_minibatch, finish_images, log_shares
from hmn_replay.avalanche.streams import Normalization
from hmn_replay.errors import DataError
from tests.streams import Memory

PIXELS = torch.arange(7 * 12, dtype=torch.uint8).view(7, 3, 2, 2)
KEYS = torch.tensor([0, 0, 1, 1, (4 << 32) | 2, -3, 5])


@pytest.fixture
def decoded() -> DecodedImages:
    return DecodedImages.of(Memory(PIXELS, KEYS), torch.device("cpu"))


def test_keys_become_labels_and_task_labels(decoded: DecodedImages) -> None:
    assert decoded.images.dtype == torch.uint8 and len(decoded) == 7
    assert decoded.labels.tolist() == [0, 0, 1, 1, 2, -3, 5]
    assert decoded.tasks.tolist() == [0, 0, 0, 0, 4, 0, 0]


def test_images_are_drawn_uniformly_and_none_twice(
    decoded: DecodedImages, untouched_random_state: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(7)
    for _ in range(700):
        images, labels, tasks = decoded.draw(3, torch.float32, generator)
        indices = images[:, 0, 0, 0].mul(255).round().long() // 12
        assert len(set(indices.tolist())) == 3
        assert torch.equal(labels, decoded.labels[indices])
        assert torch.equal(tasks, decoded.tasks[indices])
        assert torch.equal(images, PIXELS[indices].float() / 255)
        drawn[indices] += 1
    assert float((drawn - 300).abs().max()) < 60
    assert len(decoded.draw(50, torch.float16, generator)[0]) == 7


def test_integers_are_refused(decoded: DecodedImages) -> None:
    with pytest.raises(DataError, match=r"a mini-batch of floats, came torch\.uint8"):
        decoded.draw(1, torch.uint8, torch.Generator())


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # Two of three replayed images are of class 0, the third is of 2; class 3 is in neither.
        (0.5, [1 / 3, 3 / 8, 1 / 6 + 1 / 8, 1 / 6 + 1 / 8]),
        (0.0, [1 / 4, 3 / 4, 1 / 4, 1 / 4]),
        (1.0, [2 / 3, 1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_a_class_that_is_nowhere_has_the_lowest_share(weight: float, expected: list[float]) -> None:
    decoded = DecodedImages.of(Memory(PIXELS[:3], torch.tensor([0, 2, 0])), torch.device("cpu"))
    shares = log_shares(torch.tensor([0.0, 6.0, 2.0, 0.0]), decoded, weight)
    assert torch.allclose(shares.exp(), torch.tensor(expected))


def test_images_are_augmented_and_then_normalised() -> None:
    images = torch.rand(2, 3, 4, 4)
    normalization = Normalization((0.5,), (0.5,))
    assert finish_images(images, None, None) is images
    found = finish_images(images, lambda x: x.flip(3), normalization)
    assert torch.equal(found, (images.flip(3) - 0.5) / 0.5)


def test_a_minibatch_without_task_labels_gets_none() -> None:
    mbatch = [torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)]
    images, labels, tasks = torch.ones(1, 3, 4, 4), torch.ones(1).long(), torch.ones(1).long()
    add_to_minibatch(mbatch, images, labels, tasks)
    assert [len(part) for part in mbatch] == [3, 3]
    mbatch.append(torch.zeros(3, dtype=torch.int64))
    add_to_minibatch(mbatch, images, labels, tasks)
    assert [len(part) for part in mbatch] == [4, 4, 4] and mbatch[2].tolist() == [0, 0, 0, 1]
    mbatch.append(torch.zeros(4))
    with pytest.raises(DataError, match="task labels or none"):
        add_to_minibatch(mbatch, images, labels, tasks)
