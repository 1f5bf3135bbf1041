"""The gradient of a batch is the same in parts."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.runtime import make_generator, seeded
from hmn_replay.training.gradients import add_gradients, mixed_loss

# Any: what this module imports is replaced in tests.
gradients: Any = importlib.import_module("hmn_replay.training.gradients")

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def make_network(norm: nn.Module) -> nn.Module:
    with seeded(0):
        layers = nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = make_generator(1)
    images = torch.rand(7, 3, 8, 8, generator=generator)
    labels_a, labels_b = torch.randint(5, (2, 7), generator=generator)
    return images, labels_a, labels_b


@pytest.fixture(params=[1, 3, 7, 512])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(gradients, "images_at_once", lambda _: request.param)
    yield request.param


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 4), nn.BatchNorm2d(4)], ids=["group", "batch"])
def test_it_is_that_of_the_mean_loss_of_the_whole_batch(
    norm: nn.Module, lam: float, at_once: int, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    network = make_network(copy.deepcopy(norm))
    images, labels_a, labels_b = batch
    log_probabilities = F.log_softmax(network(images), dim=1)
    expected_loss = -sum(
        lam * row[a] + (1 - lam) * row[b]
        for row, a, b in zip(log_probabilities, labels_a, labels_b, strict=True)
    ) / len(images)
    expected = torch.autograd.grad(expected_loss, list(network.parameters()))
    sizes: list[int] = []
    network.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    loss = add_gradients(network, images, labels_a, labels_b, lam)
    whole = isinstance(norm, nn.BatchNorm2d) or at_once >= 7
    assert sizes == ([7] if whole else [3, 3, 1] if at_once == 3 else [1] * 7)
    torch.testing.assert_close(loss, expected_loss.detach())
    assert not loss.requires_grad
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_until_they_are_cleared(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    once, twice = make_network(nn.GroupNorm(4, 4)), make_network(nn.GroupNorm(4, 4))
    for network, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            add_gradients(network, *batch, 0.5)
    for one, two in zip(once.parameters(), twice.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(two.grad, 2 * one.grad)


def test_bfloat16_is_for_the_network_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    network = make_network(nn.GroupNorm(4, 4))
    loss = add_gradients(network, *batch, 0.5, precision="bfloat16")
    assert loss.dtype == torch.float32
    exact = make_network(nn.GroupNorm(4, 4))
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
