"""What a network learns from every kind of source, and how it is scored, on toy sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hmn_replay.baselines.scores import scores
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.lookup import ImageLookup, Images
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning
from hmn_replay.evaluation import evaluate, score
from hmn_replay.memory import HierarchicalMemory, HMNLayout, RawMemory
from hmn_replay.memory.gallery import psnr_by_class
from tests.stripes import PLAIN, TINY, stripes, weights
from tests.support import KINDS, any_memory, real_set


class Memory:
    """Decodes to what it was given."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def decode(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels


class Constant(nn.Module):
    """Always answers with the same class."""

    def __init__(self, answer: int, num_classes: int = 3) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.logits = nn.Parameter(torch.eye(num_classes)[answer])

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.logits.expand(len(images), -1)


def test_learns_a_separable_set() -> None:
    network, accuracy = evaluate(
        stripes(60), stripes(90, seed=1), config=TINY, num_passes=6_400, device="cpu"
    )
    assert accuracy > 0.9
    assert network.classes.tolist() == [-3, 7, 1000]
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "densenet121"])
def test_every_network_trains(name: str) -> None:
    images, labels = stripes(6)
    network, accuracy = evaluate(
        (images, labels), (images, labels), network=name, config=TINY, num_passes=12, device="cpu"
    )
    assert 0 <= accuracy <= 1
    assert weights(network).isfinite().all()


def test_every_kind_of_source_gives_the_same_accuracy() -> None:
    images, labels = stripes(30)
    test = stripes(60, seed=1)
    sources: list[Any] = [
        (images, labels),
        (images.numpy(), labels.numpy()),
        LabelledImages(images, labels, {}),
        [(image, int(label)) for image, label in zip(images, labels, strict=True)],
        Memory(images / 255, labels),
    ]
    accuracies = {evaluate(source, test, config=PLAIN, device="cpu")[1] for source in sources}
    assert len(accuracies) == 1
    assert evaluate(sources[0], Memory(*test), config=PLAIN, device="cpu")[1] in accuracies


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_without_images_is_refused(kind: str) -> None:
    memory = any_memory(kind)
    memory.keep([])
    with pytest.raises(DataError, match="expected a source of one image or more; it has none"):
        evaluate(memory, real_set(), config=PLAIN, device="cpu")
    with pytest.raises(DataError, match="expected a test set of one image or more; it has none"):
        evaluate(real_set(), memory, config=PLAIN, device="cpu")
    with pytest.raises(DataError, match="expected a memory of one image or more; it has none"):
        scores(memory, real_set(), real_set(), config=PLAIN, device="cpu")


def test_a_test_label_that_the_source_lacks_is_misclassified() -> None:
    images, labels = stripes(60)
    test_images, test_labels = stripes(90, seed=1)
    _, complete = evaluate((images, labels), (test_images, test_labels), config=TINY, device="cpu")
    for stranger in (-100, 8, 5000):
        strange = torch.where(test_labels == 7, stranger, test_labels)
        with pytest.warns(HMNReplayWarning, match="30 of 90 test images are of classes that the"):
            _, accuracy = evaluate(
                (images, labels), (test_images, strange), config=TINY, device="cpu"
            )
        assert accuracy <= 2 / 3
        assert accuracy >= complete - 1 / 3 - 1e-9


def test_a_test_set_of_other_labels_throughout_is_refused() -> None:
    images, labels = stripes(6)
    for stranger in (labels + 2**32, labels - 5000):
        with pytest.raises(DataError, match="with labels of the source, -3, 7, 1000; got "):
            evaluate((images, labels), (images, stranger), config=TINY, device="cpu")
    tasks = labels.clamp(0, 1) + (torch.arange(6) % 4 + 1) * 2**32
    with pytest.raises(DataError, match=r"source, task 1: .*; got -3, 7, 1000: number the classes"):
        evaluate((images, tasks), (images, labels), config=TINY, device="cpu")
    with pytest.raises(DataError, match=r"got 0, 1, 2, 3, \.\.\., 9: number"):
        evaluate((images, labels + 5000), (images[:1].expand(10, -1, -1, -1), torch.arange(10)))


class Lazy(HierarchicalMemory):
    """Decodes whenever images are asked for, as where all of them take too much memory."""

    def decoded(self, dtype: torch.dtype = torch.float32) -> Images:
        def fetch(positions: Tensor | None) -> Tensor:
            return self.decode(positions, dtype=dtype)[0]

        return ImageLookup(fetch, (self.num_images, *self.image_shape), dtype)


@pytest.mark.filterwarnings("ignore:.* test images are of classes")
def test_a_memory_may_be_decoded_batch_by_batch(make_layout: Callable[..., HMNLayout]) -> None:
    trained = []
    for memory_type in (HierarchicalMemory, Lazy):
        memory = memory_type(make_layout(), [4, 7, 9], 6, seed=1)
        assert isinstance(memory.decoded(), ImageLookup) == (memory_type is Lazy)
        for source, test_set in ((memory, stripes(9)), (stripes(9), memory)):
            network, accuracy = evaluate(source, test_set, config=PLAIN, device="cpu")
            trained.append((weights(network).tolist(), network.classes.tolist(), accuracy))
    assert trained[:2] == trained[2:]


def test_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(stripes(6), stripes(6), config=PLAIN, num_passes=6, progress=True, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train: 100%" in captured.err
    evaluate(stripes(6), stripes(6), config=PLAIN, num_passes=6, device="cpu")
    assert capsys.readouterr().err == ""


def test_bfloat16_learns_too() -> None:
    _, accuracy = evaluate(
        stripes(60),
        stripes(90, seed=1),
        config=TINY,
        num_passes=6_400,
        precision="bfloat16",
        device="cpu",
    )
    assert accuracy > 0.9


def test_score_counts_right_answers() -> None:
    images = torch.zeros(7, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 2, -1, 1, 99])
    network = Constant(answer=1)
    network.dropout.eval()
    for batch_size in (1, 3, 512):
        assert score(network, images, labels, batch_size=batch_size) == 3 / 7
        assert score(network, images.double(), labels, batch_size=batch_size) == 3 / 7
    for wrong in (0, -4):
        with pytest.raises(ConfigError, match="batch_size must be a whole number of 1 or more"):
            score(network, images, labels, batch_size=wrong)
    assert network.training
    assert not network.dropout.training


def test_score_restores_the_modes_after_an_error() -> None:
    one = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    network = Constant(answer=1)
    with pytest.raises(RuntimeError):
        score(nn.Sequential(network, nn.Unflatten(1, (2, 2))), *one)
    assert network.training


def test_score_refuses_what_it_cannot_count() -> None:
    images, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="one image or more, got none"):
        score(Constant(0), images[:0], labels[:0])
    with pytest.raises(
        DataError, match=r"int64 class indices of shape \(2,\), got torch.int64 \(1"
    ):
        score(Constant(0), images, labels[:1])
    with pytest.raises(DataError, match=r"images \(N, C, H, W\), got torch.float32 \(3, 8, 8\)"):
        score(Constant(0), images[0], labels)


def test_refuses_a_test_set_of_another_shape() -> None:
    other = (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(DataError, match=r"images of \(3, 8, 8\) and the test set of \(3, 16, 16\)"):
        evaluate(stripes(6), other, config=PLAIN)


def test_a_name_that_stands_for_another_label_is_refused() -> None:
    def named(seed: int, names: dict[int, str]) -> LabelledImages:
        images, labels = stripes(12, seed=seed)
        return LabelledImages(images, labels, names)

    source = named(0, {-3: "one", 7: "two", 1000: "zero"})
    moved = named(1, {-3: "five", 7: "one", 1000: "two"})
    with pytest.raises(DataError, match="'one' is label -3 in the source and 7 in the test"):
        evaluate(source, moved, config=TINY, device="cpu")
    evaluate(source, named(1, {-3: "ONE", 7: "two"}), config=TINY, device="cpu")
    one_alike = named(1, {-3: "five", 7: "six", 1000: "zero"})
    evaluate(source, one_alike, config=TINY, device="cpu")
    unlike = named(1, {-3: "five", 7: "six", 1000: "seven"})
    with pytest.raises(DataError, match=r"label -3 is 'one' in the source .* are other classes"):
        evaluate(source, unlike, config=TINY, device="cpu")
    # As in ImageNet, whose cranes are a bird and a machine.
    cranes = {-3: "crane", 7: "crane"}
    for others in (cranes, {}, {7: "crane"}):
        evaluate(named(0, cranes), named(1, others), config=TINY, device="cpu")


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match="no option 'epochs'; num_passes counts images: epochs"):
        evaluate(stripes(6), stripes(6), epochs=3)


def test_training_is_the_same_inside_other_modes() -> None:
    train, test = stripes(12), stripes(6, seed=1)
    options: dict[str, Any] = {"num_passes": 36, "width": 4, "device": "cpu"}
    network, accuracy = evaluate(train, test, **options)
    with torch.inference_mode():
        inside, same = evaluate(stripes(12), stripes(6, seed=1), **options)
    assert same == accuracy
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cast, same = evaluate(train, test, **options)
    assert same == accuracy
    torch.set_default_dtype(torch.float64)
    try:
        other, same = evaluate(train, test, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same == accuracy
    for name, value in network.state_dict().items():
        assert inside.state_dict()[name].equal(value)
        assert other.state_dict()[name].equal(value)
        assert cast.state_dict()[name].equal(value)


def test_class_keys_of_tasks_are_not_compared_with_plain_labels() -> None:
    images, labels = stripes(12, labels=(0, 1, 2, 3))[:2]
    keys = labels + (labels >= 2).long() * 2**32
    memory = RawMemory(images.shape[1:])
    memory.extend(LabelledImages(images, keys))
    for compare in (partial(evaluate, config=TINY), psnr_by_class):
        with pytest.raises(DataError, match=r"class keys of tasks, .*split_class_keys"):
            compare(memory, (images, labels))
    # Those of the first task alone are the same.
    assert len(psnr_by_class(memory, (images[labels < 2], labels[labels < 2]))) == 2


def test_a_label_of_classes_without_images_counts_as_the_hard_one() -> None:
    images = torch.randint(256, (15, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    memory = RawMemory((3, 8, 8))
    memory.extend((images.to(torch.uint8), torch.arange(15) % 3))
    memory.set_soft_labels(torch.eye(3)[torch.zeros(15, dtype=torch.int64)])
    memory.keep(torch.arange(5, 15))
    assert memory.images_per_class == [0, 5, 5]
    for labels in ("hard", "soft"):
        network, _ = evaluate(memory, memory, labels=labels, config=TINY, device="cpu")
        assert network.classes.tolist() == [1, 2]
