"""Training on toy sets, where the right answer is known."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.data.augment import draw_augmentation
from hmn_replay.data.lookup import join_images
from hmn_replay.errors import ConfigError, DataError, TrainingError
from hmn_replay.evaluation import score
from hmn_replay.runtime import PRECISIONS, make_generator, seeded
from hmn_replay.training.networks import Network
from hmn_replay.training.train import (
    SCHEDULES,
    TrainingConfig,
    add_gradients,
    cosine_lr,
    draw_batch,
    make_network,
    mixed_loss,
    train_network,
)
from tests.stripes import PLAIN, TINY, stripes, weights
from tests.support import Observer


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
    rates = [cosine_lr(step, 1000, 0.01) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[500] == pytest.approx(0.005)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-7
    assert cosine_lr(1000, 1000, 0.01) == pytest.approx(0, abs=1e-18)


def test_a_batch_is_moved_in_one_way_and_mixed_as_often_as_asked() -> None:
    images, labels = stripes(6)
    images, labels = images / 255, labels.clamp(0, 2)
    before = images.clone()
    moving, others = ["crop", "scale", "rotate"], ["color", "cutout", "flip"]

    def draw(number: int, names: Collection[str], probability: float) -> Any:
        return draw_batch(
            images,
            labels,
            torch.zeros(3),
            torch.ones(3),
            make_generator(number),
            augmentations=names,
            cutmix_probability=probability,
        )

    ways = set[int]()
    for number in range(12):
        generator = make_generator(number)
        way = int(torch.randint(3, (), generator=generator))
        names = [*others, moving[way]]
        fill = torch.zeros(3), torch.ones(3)
        augment = draw_augmentation(names, (8, 8), generator, batch=6, fill=fill[0], std=fill[1])
        assert draw(number, [*moving, *others], 0.0)[0].equal(augment(images))
        ways.add(way)
    assert ways == {0, 1, 2}
    batches = [draw(number, [*moving, *others], 0.5) for number in range(40)]
    assert 10 <= sum(lam < 1 for *_, lam in batches) <= 30
    assert images.equal(before)
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
    epoch_images: int | None, expected: int, num_epochs: int
) -> None:
    images, labels = stripes(9)
    shown = list[Tensor]()

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, 3)

        def forward(self, images: Tensor) -> Tensor:
            if self.training:  # the network is tried on two images first
                shown.append(images.detach())
            logits: Tensor = self.linear(images.flatten(1))
            return logits

    config = PLAIN.replace(
        network=lambda *_: Recorder(), num_passes=3 * expected, epoch_images=epoch_images
    )
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
    config = PLAIN.replace(learning_rate=1e-30, weight_decay=0.0, num_passes=9)
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


def test_a_training_that_diverges_says_so() -> None:
    images, labels = stripes(12, labels=(0, 1, 2))
    epochs: list[int] = []
    config = PLAIN.replace(learning_rate=1e30)
    with pytest.raises(TrainingError, match="diverged at learning rate 1e"):
        train_network(
            images, labels, 3, config=config, on_epoch=lambda epoch, _: epochs.append(epoch)
        )
    assert len(epochs) < 5  # of 53


@pytest.mark.parametrize("spoilt", [200, 299])
def test_the_loss_is_read_now_and_then_and_after_the_last_step(spoilt: int) -> None:
    """A memory of a few images has one batch an epoch: a GPU does not wait after each."""
    images, labels = stripes(12, labels=(0, 1, 2))
    config, team, epochs = PLAIN.replace(num_passes=300 * 12), Observer(), list[int]()

    def spoil(epoch: int, network: Network) -> None:
        epochs.append(epoch)
        if epoch == spoilt - 1:
            with torch.no_grad():
                next(network.parameters()).fill_(math.nan)

    with pytest.raises(
        TrainingError, match=r"NaN or infinite by step (\d+) of 300; lower"
    ) as error:
        train_network(images, labels, 3, config=config, on_epoch=spoil, team=team)
    noticed = int(re.findall(r"step (\d+)", str(error.value))[0])
    assert spoilt < noticed <= min(300, spoilt + 64)
    assert epochs == [*range(noticed - 1)]
    assert team.calls["sum"] <= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "lenet"}, "network must be one of convnet, .*; got 'lenet'"),
        ({"width": 0}, "width must be greater than or equal to 1; got 0"),
        ({"depth": 0}, "depth must be greater than or equal to 1; got 0"),
        ({"num_passes": 0}, "num_passes must be greater than or equal to 1; got 0"),
        ({"batch_size": 1}, "batch_size must be greater than or equal to 2; got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0; got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant; got 'linear'"),
        ({"epoch_images": 0}, "epoch_images must be greater than or equal to 1; got 0"),
        ({"momentum": 1.0}, "momentum must be less than 1; got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be greater than or equal to 0; got -1.0"),
        ({"cutmix_probability": 1.5}, "cutmix_probability must be less than or equal to 1"),
        ({"augmentations": ("blur",)}, "augmentation must be one of .*; got 'blur'"),
        ({"precision": "float16"}, "precision must be one of .*bfloat16, auto; got 'float16'"),
        ({"width": 8.5}, "width must be a valid integer.*; got 8.5"),
        ({"learning_rate": "a"}, "learning_rate must be a valid number.*; got 'a'"),
        ({"augmentations": None}, "augmentations must be a valid tuple; got None"),
        ({"network": 3}, "network must be"),
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


# The gradient of a batch.


def some_network(norm: nn.Module) -> nn.Module:
    with seeded(0):
        layers = nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = make_generator(1)
    images = torch.rand(7, 3, 8, 8, generator=generator)
    labels_a, labels_b = torch.randint(5, (2, 7), generator=generator)
    return images, labels_a, labels_b


@pytest.mark.parametrize("part_size", [1, 3, 7, None])
@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 4), nn.BatchNorm2d(4)], ids=["group", "batch"])
def test_it_is_that_of_the_mean_loss_of_the_whole_batch(
    norm: nn.Module, lam: float, part_size: int | None, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    network = some_network(copy.deepcopy(norm))
    images, labels_a, labels_b = batch
    log_probabilities = F.log_softmax(network(images), dim=1)
    expected_loss = -sum(
        lam * row[a] + (1 - lam) * row[b]
        for row, a, b in zip(log_probabilities, labels_a, labels_b, strict=True)
    ) / len(images)
    expected = torch.autograd.grad(expected_loss, list(network.parameters()))
    sizes: list[int] = []
    network.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    loss = add_gradients(network, images, labels_a, labels_b, lam, part_size=part_size)
    whole = isinstance(norm, nn.BatchNorm2d) or part_size in (7, None)
    assert sizes == ([7] if whole else [3, 3, 1] if part_size == 3 else [1] * 7)
    torch.testing.assert_close(loss, expected_loss.detach())
    assert not loss.requires_grad
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_until_they_are_cleared(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    once, twice = some_network(nn.GroupNorm(4, 4)), some_network(nn.GroupNorm(4, 4))
    for network, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            add_gradients(network, *batch, 0.5)
    for one, two in zip(once.parameters(), twice.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(two.grad, 2 * one.grad)


def test_bfloat16_is_for_the_network_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    network = some_network(nn.GroupNorm(4, 4))
    loss = add_gradients(network, *batch, 0.5, precision="bfloat16")
    assert loss.dtype == torch.float32
    exact = some_network(nn.GroupNorm(4, 4))
    assert not loss.equal(add_gradients(exact, *batch, 0.5))
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("lam", [1.0, 0.25, 0.0])
def test_the_loss_of_a_mixed_batch_is_that_of_soft_labels(lam: float) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels_a, labels_b = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 1, 1, 1])
    expected = -sum(
        lam * math.log(row[a]) + (1 - lam) * math.log(row[b])
        for row, a, b in zip(
            logits.softmax(dim=1).tolist(), labels_a.tolist(), labels_b.tolist(), strict=True
        )
    )
    loss = mixed_loss(logits, labels_a, labels_b, lam)
    assert float(loss) == pytest.approx(expected / 5, rel=1e-5)


def with_dropout(image_shape: Sequence[int], num_classes: int) -> nn.Module:
    convolution = nn.Conv2d(image_shape[0], 4, 3, padding=1)
    head = nn.Linear(4 * math.prod(image_shape[1:]), num_classes)
    return nn.Sequential(convolution, nn.Dropout(), nn.Flatten(), head)


def test_what_a_network_of_ones_own_draws_comes_from_the_seed(
    untouched_random_state: None,
) -> None:
    images, labels = stripes(30, labels=(0, 1, 2))
    config = TrainingConfig(network=with_dropout, num_passes=60, batch_size=10)
    found: list[nn.Module] = []
    drawn: list[float] = []
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(state)

            # What is drawn between epochs is the caller's own.
            def on_epoch(*_: Any, state: int = state) -> None:
                if state > 1:
                    drawn.append(float(torch.rand(())))

            network = train_network(
                images, labels, 3, config=config, seed=5, device="cpu", on_epoch=on_epoch
            )
            found.append(network)
    assert weights(found[0]).equal(weights(found[1]))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        assert drawn == [float(torch.rand(())) for _ in drawn]
