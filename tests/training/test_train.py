"""Training on toy sets, where the right answer is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hmn_replay.data.augment import draw_augmentation
from hmn_replay.data.lookup import join_images
from hmn_replay.errors import ConfigError, DataError, TrainingError
from hmn_replay.evaluation import evaluate, score
from hmn_replay.runtime import PRECISIONS, make_generator
from hmn_replay.training import train as training
from hmn_replay.training.networks import Network
from hmn_replay.training.train import (
    SCHEDULES,
    TrainingConfig,
    cosine_rate,
    draw_batch,
    make_network,
    train_network,
)
from tests.stripes import PLAIN, TINY, stripes, weights


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

    monkeypatch.setattr("hmn_replay.training.train.draw_augmentation", watched)

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


def test_trains_where_the_caller_has_switched_gradients_off() -> None:
    images, labels = stripes(12)
    expected = train_network(images, labels.clamp(0, 2), 3, config=PLAIN)
    with torch.no_grad():
        network = train_network(images, labels.clamp(0, 2), 3, config=PLAIN)
        assert not torch.is_grad_enabled()
    assert torch.equal(weights(network), weights(expected))


def test_refuses_labels_in_place_of_class_indices() -> None:
    images, labels = stripes(6)
    with pytest.raises(
        DataError, match=r"class indices in \[0, 3\), got -3 to 1000; give positions"
    ):
        train_network(images, labels, 3, config=PLAIN)


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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_configuration_takes_every_precision(precision: str) -> None:
    assert TrainingConfig(precision=precision).precision == precision


def test_configuration_takes_a_list_and_hashes() -> None:
    config = TrainingConfig(augmentations=["flip"])  # type: ignore[arg-type]
    assert config == TrainingConfig(augmentations=("flip",))
    assert hash(config) == hash(TrainingConfig(augmentations=("flip",)))
