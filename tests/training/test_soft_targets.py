"""Learning from soft targets: against slow references, mixed as the images are, compiled or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.evaluation import evaluate
from hmn_replay.training.networks import Network, build_network
from hmn_replay.training.train import (
    CompiledLoss,
    SoftTargets,
    TrainingConfig,
    add_gradients,
    mixed_loss,
    resolve_compile,
    train_network,
)
from tests.stripes import PLAIN, TINY, stripes, weights
from tests.support import any_memory

CPU = torch.device("cpu")
can_compile = resolve_compile("auto", CPU) == "auto"


def draw(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_a, labels_b = torch.randint(3, (2, count), generator=generator)
    targets = (2 * torch.randn(count, 3, generator=generator)).softmax(dim=1)
    return torch.rand(count, 3, 8, 8, generator=generator), labels_a, labels_b, targets


def convnet() -> Network:
    return build_network("convnet", (3, 8, 8), 3, width=4)


def by_hand(
    logits: Tensor, a: Tensor, b: Tensor, lam: float, targets: Tensor, w: float, t: float
) -> float:
    """Return the loss in Python's floats, image by image."""
    total = 0.0
    for row, one, two, target in zip(logits.double(), a, b, targets.double(), strict=True):
        hard = -(lam * row.log_softmax(0)[one] + (1 - lam) * row.log_softmax(0)[two])
        soft = -(target * (row / t).log_softmax(0)).sum()
        total += float((1 - w) * hard + w * t**2 * soft)
    return total / len(logits)


@pytest.mark.parametrize(("weight", "temperature"), [(0.9, 2.0), (0.5, 1.0), (1.0, 4.0)])
def test_the_loss_is_that_of_hinton(weight: float, temperature: float) -> None:
    _, a, b, targets = draw(7)
    logits = torch.randn(7, 3, generator=torch.manual_seed(1))
    soft = SoftTargets(targets, weight, temperature)
    for lam in (1.0, 0.3):
        wanted = by_hand(logits, a, b, lam, targets, weight, temperature)
        assert float(mixed_loss(logits, a, b, lam, soft)) == pytest.approx(wanted, rel=1e-5)
    nothing = SoftTargets(targets, 0.0, temperature)
    assert mixed_loss(logits, a, b, 0.3, nothing).allclose(mixed_loss(logits, a, b, 0.3))


@pytest.mark.parametrize("part_size", [None, 4])
def test_parts_of_a_batch_add_up(part_size: int | None) -> None:
    images, a, b, targets = draw(11)
    soft, network, whole = SoftTargets(targets, 0.7, 2.0), convnet(), convnet()
    loss = add_gradients(network, images, a, b, 0.4, soft=soft, part_size=part_size)
    wanted = mixed_loss(whole(images), a, b, 0.4, soft)
    torch.autograd.backward(wanted)
    assert loss.allclose(wanted)
    for one, two in zip(network.parameters(), whole.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("backend", ["eager", *(["inductor"] if can_compile else [])])
@pytest.mark.parametrize("count", [12, 9])
def test_a_compiled_step_is_the_same(backend: str, count: int) -> None:
    """With 12 images, then with a smaller batch, which is filled up with images of weight 0."""
    compiled = CompiledLoss("float32", backend)
    for size in dict.fromkeys((12, count)):
        images, a, b, targets = draw(size)
        soft, network, whole = SoftTargets(targets, 0.7, 2.0), convnet(), convnet()
        loss = add_gradients(network, images, a, b, 0.4, soft=soft, compiled=compiled)
        wanted = add_gradients(whole, images, a, b, 0.4, soft=soft)
        torch.testing.assert_close(loss, wanted)
        for one, two in zip(network.parameters(), whole.parameters(), strict=True):
            assert one.grad is not None
            assert two.grad is not None
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_hard_targets_change_nothing_but_the_temperature() -> None:
    images, labels = stripes(20)
    _, index = labels.unique(return_inverse=True)
    config = PLAIN.replace(temperature=1.0)
    plain = train_network(images, index, 3, config=config, device="cpu")
    one_hot = F.one_hot(index).float()
    soft = train_network(images, index, 3, targets=one_hot, config=config, device="cpu")
    torch.testing.assert_close(weights(soft), weights(plain), rtol=1e-3, atol=1e-4)


def test_a_network_learns_what_soft_labels_say_against_the_classes() -> None:
    images, labels = stripes(60)
    _, index = labels.unique(return_inverse=True)
    said = F.one_hot((index + 1) % 3).float() * 0.9 + 0.1 / 3
    config = TINY.replace(num_passes=6_400, cutmix_probability=0.5)
    network = train_network(images, index, 3, targets=said, config=config, device="cpu")
    test, _ = stripes(30, seed=1)
    answers = network(test.float() / 255).argmax(dim=1)
    assert float((answers == (torch.arange(30) + 1) % 3).float().mean()) > 0.9


def test_soft_labels_are_mixed_as_the_images_are() -> None:
    """Of a batch that CutMix mixes, the targets are those of both images, by their shares."""
    images, labels = stripes(16)
    _, index = labels.unique(return_inverse=True)
    rows = torch.eye(16)[:, :3].clone()
    rows[3:] = 1 / 3
    seen: list[tuple[float, Tensor]] = []

    usual = SoftTargets.scaled

    def scaled(self: SoftTargets, scale: float) -> Tensor:
        seen.append((scale, self.targets))
        return usual(self, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftTargets, "scaled", scaled)
        config = PLAIN.replace(cutmix_probability=1.0, num_passes=64, temperature=1.0)
        train_network(images, index, 3, targets=rows, config=config, device="cpu")
    assert len(seen) == 4
    for _, targets in seen:
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))
    # Somewhere an image whose label is one class got a part of one of another label.
    assert any(bool(((t > 0.34) & (t < 0.999)).any()) for _, t in seen)


def test_a_labeller_is_shown_the_augmented_images() -> None:
    images, labels = stripes(12)
    _, index = labels.unique(return_inverse=True)
    shown: list[Tensor] = []

    def labeller(batch: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        shown.append(batch)
        return batch.mean(dim=(2, 3))

    config = TINY.replace(num_passes=24, batch_size=12)
    train_network(images, index, 3, targets=labeller, config=config, device="cpu")
    assert [len(batch) for batch in shown] == [12, 12]
    plain = images.float() / 255
    assert not any((batch[i] == plain).flatten(1).all(1).any() for batch in shown for i in range(4))


@pytest.mark.parametrize("num_logits", [1, 2])
def test_a_labeller_of_other_classes_is_refused(num_logits: int) -> None:
    images, labels = stripes(12)
    _, index = labels.unique(return_inverse=True)

    def labeller(batch: Tensor) -> Tensor:
        return batch.mean(dim=(2, 3))[:, :num_logits]

    with pytest.raises(ConfigError, match=rf"targets is a network .* gives \(\d+, {num_logits}\)"):
        train_network(images, index, 3, targets=labeller, config=TINY, device="cpu")


def test_what_are_no_targets_is_refused() -> None:
    images, labels = stripes(6)
    _, index = labels.unique(return_inverse=True)
    wrong = [torch.ones(6, 2), *(torch.ones(6, 3) for _ in range(3))]
    for targets, value in zip(wrong[1:], (-1.0, 0.0, float("nan")), strict=True):
        targets[5] = value
    for targets in wrong:
        with pytest.raises(DataError, match=r"soft labels \(6, 3\), rows of finite probabilities"):
            train_network(images, index, 3, targets=targets, device="cpu")
    with pytest.raises(ConfigError, match="label_weight must be less than or equal to 1"):
        TrainingConfig(label_weight=1.5)
    with pytest.raises(ConfigError, match="temperature must be greater than 0"):
        TrainingConfig(temperature=0)


@pytest.mark.parametrize(("kind", "weight"), [("hmn", 0.5), ("idc", 0.5), ("raw", 0.9)])
def test_learned_images_have_labels_of_less_weight(kind: str, weight: float) -> None:
    memory = any_memory(kind)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(memory.num_images, memory.num_classes, generator=generator)
    memory.set_soft_labels(rows / rows.sum(1, keepdim=True))

    def learned(**options: Any) -> Tensor:
        network, _ = evaluate(
            memory, memory, width=2, num_passes=40, seed=0, device="cpu", **options
        )
        return weights(network)

    assert torch.equal(learned(), learned(label_weight=weight))
    assert not torch.equal(learned(), learned(label_weight=0.7))
    assert torch.equal(learned(labels="hard"), learned(label_weight=0.0))
