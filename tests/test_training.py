"""The evaluation protocol on toy sets, where the right answer is known."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hmn_replay import training
from hmn_replay.augment import draw_augmentation
from hmn_replay.data import LabelledImages
from hmn_replay.errors import ConfigError, DataError, TrainingError
from hmn_replay.layout import Layout
from hmn_replay.lookup import ImageLookup, join_images
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.networks import Network
from hmn_replay.runtime import PRECISIONS, make_generator
from hmn_replay.training import (
    SCHEDULES,
    TrainingConfig,
    cosine_rate,
    draw_batch,
    evaluate,
    make_network,
    score,
    train_network,
)

# Any: what this module says is replaced in a test.
container: Any = importlib.import_module("hmn_replay.container")

TINY = TrainingConfig(width=8, num_passes=1_600, batch_size=16)
PLAIN = TrainingConfig(
    width=8, num_passes=640, batch_size=16, cutmix_probability=0.0, augmentations=()
)


def stripes(num_images: int, labels: tuple[int, ...] = (-3, 7, 1000), seed: int = 0) -> Any:
    """Horizontal, vertical and checked stripes under noise, as a pair of tensors."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(num_images) % 3
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = torch.stack((rows // 2 % 2, columns // 2 % 2, (rows // 2 + columns // 2) % 2))
    noise = torch.rand((num_images, 3, 8, 8), generator=generator)
    images = 0.6 * patterns[kinds].unsqueeze(1) + 0.4 * noise
    return (images * 255).round().to(torch.uint8), torch.tensor(labels)[kinds]


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


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


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


def test_the_seed_alone_decides_and_the_global_state_is_untouched() -> None:
    images, labels = stripes(30)
    before = torch.random.get_rng_state()

    def trained(seed: int) -> Tensor:
        torch.rand(seed + 1)
        return weights(train_network(images, labels.clamp(0, 2), 3, config=TINY, seed=seed))

    first, again, other = trained(0), trained(0), trained(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.random.set_rng_state(before)
    train_network(images, labels.clamp(0, 2), 3, config=TINY)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_test_label_that_the_source_lacks_is_an_error() -> None:
    images, labels = stripes(60)
    test_images, test_labels = stripes(90, seed=1)
    _, complete = evaluate((images, labels), (test_images, test_labels), config=TINY, device="cpu")
    for stranger in (-100, 8, 5000):
        strange = torch.where(test_labels == 7, stranger, test_labels)
        _, accuracy = evaluate((images, labels), (test_images, strange), config=TINY, device="cpu")
        assert accuracy <= 2 / 3
        assert accuracy >= complete - 1 / 3 - 1e-9


def test_pixels_are_normalised_by_the_statistics_of_the_source() -> None:
    images, labels = stripes(30)
    network = train_network(images, labels.clamp(0, 2), 3, config=PLAIN, device="cpu")
    floats = images.float() / 255
    torch.testing.assert_close(network.mean.flatten(), floats.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(
        network.std.flatten(), floats.std(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4
    )


def test_images_may_be_looked_up() -> None:
    images, labels = stripes(20, labels=(0, 1, 2))
    lookup = join_images([images[:7], images[7:]])
    options: dict[str, Any] = {"config": PLAIN, "seed": 2, "device": "cpu"}
    network = train_network(images, labels, 3, **options)
    assert weights(train_network(lookup, labels, 3, **options)).equal(weights(network))
    assert score(network, lookup, labels) == score(network, images, labels)


def test_a_memory_is_decoded_batch_by_batch_where_all_its_images_take_too_much(
    make_layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = HierarchicalMemory(make_layout(), [4, 7, 9], 6, seed=1)
    trained = []
    for kept_bytes in (2**30, 0):
        monkeypatch.setattr(container, "_KEPT_BYTES", kept_bytes)
        assert isinstance(memory.decoded(), ImageLookup) == (not kept_bytes)
        for source, test_set in ((memory, stripes(9)), (stripes(9), memory)):
            network, accuracy = evaluate(source, test_set, config=PLAIN, device="cpu")
            trained.append((weights(network).tolist(), network.classes.tolist(), accuracy))
    assert trained[:2] == trained[2:]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plain_training_equals_sgd_written_out(schedule: str) -> None:
    images, labels = stripes(8)
    labels = labels.clamp(0, 2)
    config = TrainingConfig(
        width=4,
        num_passes=24,
        batch_size=8,
        schedule=schedule,
        cutmix_probability=0.0,
        augmentations=(),
    )
    trained = train_network(images, labels, 3, config=config, seed=3, device="cpu")

    network = make_network(images, 3, config, seed=3)
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for step in range(3):
        loss = nn.functional.cross_entropy(network(images / 255), labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rate = 0.01
        if schedule == "cosine":
            rate *= (1 + math.cos(math.pi * step / 3)) / 2
        with torch.no_grad():
            for parameter, gradient, v in zip(
                network.parameters(), gradients, velocity, strict=True
            ):
                v.mul_(0.9).add_(gradient + 5e-4 * parameter)
                parameter.sub_(rate * v)
    torch.testing.assert_close(weights(trained), weights(network), rtol=1e-4, atol=1e-5)


def test_cosine_schedule_falls_from_the_peak_to_almost_zero() -> None:
    rates = [cosine_rate(step, 1000, 0.01) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[500] == pytest.approx(0.005)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-7
    assert cosine_rate(1000, 1000, 0.01) == pytest.approx(0, abs=1e-18)


def test_a_batch_is_moved_in_one_way_and_mixed_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = stripes(6)
    images, labels = images / 255, labels.clamp(0, 2)
    before, drawn = images.clone(), list[list[str]]()
    original = draw_augmentation

    def watched(names: list[str], *args: Any, **options: Any) -> Any:
        drawn.append(names)
        assert options["batch"] == 6  # a draw for every image
        return original(names, *args, **options)

    monkeypatch.setattr("hmn_replay.training.draw_augmentation", watched)

    def draw(number: int, names: tuple[str, ...], probability: float) -> Any:
        generator = make_generator(number)
        return draw_batch(
            images,
            labels,
            torch.zeros(3),
            torch.ones(3),
            generator,
            augmentations=names,
            cutmix_probability=probability,
        )

    all_names = ("color", "crop", "cutout", "flip", "scale", "rotate")
    batches = [draw(number, all_names, 0.5) for number in range(40)]
    assert {name for names in drawn for name in names} == set(all_names)
    for names in drawn:
        assert len(names) == 4
        assert {"color", "cutout", "flip"} < set(names)
    assert 10 <= sum(lam < 1 for *_, lam in batches) <= 30
    assert images.equal(before)
    for one, two in zip(draw(7, all_names, 0.5), batches[7], strict=True):
        assert one == two if isinstance(one, float) else one.equal(two)
    untouched, labels_a, labels_b, lam = draw(0, (), 0.0)
    assert untouched.equal(images)
    assert labels_a.equal(labels)
    assert labels_b.equal(labels)
    assert lam == 1.0


def test_epochs_are_reported_with_the_network() -> None:
    images, labels = stripes(20)
    epochs: list[int] = []
    margins: list[Tensor] = []

    def record(epoch: int, network: Network) -> None:
        epochs.append(epoch)
        network.eval()
        with torch.no_grad():
            margins.append(network(images / 255))

    def train(on_epoch: Any) -> Network:
        return train_network(
            images, labels.clamp(0, 2), 3, config=PLAIN, device="cpu", on_epoch=on_epoch
        )

    network = train(record)
    assert epochs == list(range(640 // 20))
    assert torch.equal(margins[-1], network(images / 255))
    assert not torch.equal(margins[0], margins[-1])
    # What the callback does to the mode does not change the training.
    assert torch.equal(weights(network), weights(train(None)))


@pytest.mark.parametrize(
    ("num_images", "num_passes", "batch_size", "expected"),
    [
        (10, 20, 4, [4, 3, 3] * 2),
        (9, 9, 8, [5, 4]),
        (5, 1, 2, [3, 2]),
        (1, 2, 64, [2, 2]),
        (4, 7, 64, [4, 4]),
    ],
)
def test_batches_are_even_and_never_of_one_image(
    num_images: int, num_passes: int, batch_size: int, expected: list[int]
) -> None:
    images, labels = stripes(num_images)
    seen: list[tuple[int, int]] = []
    train_network(
        images,
        labels.clamp(0, 2),
        3,
        config=TrainingConfig(width=2, num_passes=num_passes, batch_size=batch_size),
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    done = [0, *(count for count, _ in seen)]
    assert [after - before for before, after in itertools.pairwise(done)] == expected
    assert {total for _, total in seen} == {sum(expected)}


@pytest.mark.parametrize(
    ("epoch_images", "expected", "num_epochs"), [(6, 6, 3), (1, 2, 6), (20, 9, 3), (None, 9, 3)]
)
def test_an_epoch_may_show_some_images_drawn_anew(
    epoch_images: int | None, expected: int, num_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = stripes(9)
    shown = list[Tensor]()

    def watched(batch: Tensor, *args: Any, **options: Any) -> Any:
        shown.append(batch)
        return draw_batch(batch, *args, **options)

    monkeypatch.setattr(training, "draw_batch", watched)
    config = dataclasses.replace(PLAIN, num_passes=3 * expected, epoch_images=epoch_images)
    epochs: list[set[bytes]] = []

    def count(*_: Any) -> None:
        epochs.append({image.numpy().tobytes() for batch in shown for image in batch})
        assert len(epochs[-1]) == sum(map(len, shown)) == expected  # none twice
        shown.clear()

    train_network(images, labels.clamp(0, 2), 3, config=config, device="cpu", on_epoch=count)
    assert len(epochs) == num_epochs
    assert len(set.union(*epochs)) > expected or expected == 9


def test_a_training_begins_with_the_network_that_can_be_made() -> None:
    images, labels = stripes(9)
    config = dataclasses.replace(PLAIN, learning_rate=1e-30, weight_decay=0.0, num_passes=9)
    trained = train_network(images, labels.clamp(0, 2), 3, config=config, seed=5, device="cpu")
    network = make_network(images, 3, config, seed=5)
    torch.testing.assert_close(weights(network), weights(trained), rtol=0, atol=1e-20)
    assert torch.equal(network.mean, trained.mean)
    assert torch.equal(network.std, trained.std)


def test_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(stripes(6), stripes(6), config=PLAIN, num_passes=6, progress=True, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train: 100%" in captured.err
    evaluate(stripes(6), stripes(6), config=PLAIN, num_passes=6, device="cpu")
    assert capsys.readouterr().err == ""


def test_trains_where_the_caller_has_switched_gradients_off() -> None:
    images, labels = stripes(12)
    expected = train_network(images, labels.clamp(0, 2), 3, config=PLAIN)
    with torch.no_grad():
        network = train_network(images, labels.clamp(0, 2), 3, config=PLAIN)
        assert not torch.is_grad_enabled()
    assert torch.equal(weights(network), weights(expected))


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


def test_refuses_labels_in_place_of_class_indices() -> None:
    images, labels = stripes(6)
    with pytest.raises(
        DataError, match=r"class indices in \[0, 3\), got -3 to 1000; give positions"
    ):
        train_network(images, labels, 3, config=PLAIN)


def test_refuses_a_test_set_of_another_shape() -> None:
    other = (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(DataError, match=r"images of \(3, 8, 8\) and the test set of \(3, 16, 16\)"):
        evaluate(stripes(6), other, config=PLAIN)


def test_a_training_that_leaves_the_real_numbers_says_so() -> None:
    images, labels = stripes(12)
    with pytest.raises(TrainingError, match="left the real numbers at learning rate 1e"):
        evaluate((images, labels), (images, labels), config=PLAIN, learning_rate=1e30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "lenet"}, "network must be one of .*'convnet'.*got 'lenet'"),
        ({"width": 0}, "width must be 1 or more, got 0"),
        ({"depth": 0}, "depth must be None, or 1 or more, got 0"),
        ({"num_passes": 0}, "num_passes must be 1 or more"),
        ({"batch_size": 1}, "batch_size must be 2 or more, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"schedule": "linear"}, "schedule must be one of .*'constant'.*got 'linear'"),
        ({"epoch_images": 0}, "epoch_images must be None, or 1 or more, got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"cutmix_probability": 1.5}, r"cutmix_probability must be in \[0, 1\], got 1.5"),
        ({"augmentations": ("blur",)}, r"augmentations must be among .*got \('blur',\)"),
        ({"precision": "float16"}, "precision must be one of .*'bfloat16', 'auto'.*got 'float16'"),
        ({"width": "64"}, "width must be int, got '64'"),
        ({"width": 8.5}, "width must be int, got 8.5"),
        ({"depth": 2.0}, r"depth must be int \| None, got 2.0"),
        ({"learning_rate": "a"}, "learning_rate must be float, got 'a'"),
        ({"augmentations": None}, "augmentations must be a list, got None"),
        ({"network": ["convnet"]}, "network must be str"),
    ],
)
def test_configuration_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'epochs'.*network, width, depth"):
        evaluate(stripes(6), stripes(6), epochs=3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_configuration_takes_every_precision(precision: str) -> None:
    assert TrainingConfig(precision=precision).precision == precision


def test_configuration_takes_a_list_and_hashes() -> None:
    config = TrainingConfig(augmentations=["flip"])  # type: ignore[arg-type]
    assert config == TrainingConfig(augmentations=("flip",))
    assert hash(config) == hash(TrainingConfig(augmentations=("flip",)))


def test_training_is_the_same_inside_other_modes() -> None:
    train, test = stripes(12), stripes(6, seed=1)
    options: dict[str, Any] = {"num_passes": 36, "width": 4, "device": "cpu"}
    network, accuracy = evaluate(train, test, **options)
    with torch.inference_mode():
        inside, same = evaluate(stripes(12), stripes(6, seed=1), **options)
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
