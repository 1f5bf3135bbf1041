"""The reference's step against ours and against finite differences; its container; its loop."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hmn_replay
from experiments.reference import (
    ReferenceLoop,
    decode_pieces,
    make_convnet,
    matching_loss,
    matching_step,
)
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"width": 3, "real_batch": 3, "network_images": 6, "device": CPU}


def make_batches(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, decoded = torch.rand(2, 3, 3, 8, 8, generator=generator, dtype=dtype)
    return real, torch.tensor([1, 1, 1]), decoded, torch.tensor([1, 1, 1])


def make_networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    ours = hmn_replay.build_network("convnet", (3, 8, 8), 4, width=5, depth=3).double()
    plain = make_convnet((3, 8, 8), 4, width=5).double()
    with torch.no_grad():
        for theirs, own in zip(plain.parameters(), ours.parameters(), strict=True):
            # Away from what all norms begin with.
            own.add_(0.1 * torch.rand(own.shape, generator=torch.Generator().manual_seed(1)))
            theirs.copy_(own)
    return ours, plain


def test_step_is_gradient_matching_in_float64() -> None:
    ours, plain = make_networks()
    batches = make_batches()
    loss, gradient = matching_step(plain, *batches)
    real_images, real_labels, decoded, decoded_labels = batches
    decoded = decoded.detach().requires_grad_()
    expected_loss = hmn_replay.gradient_matching(
        ours, real_images, real_labels, decoded, decoded_labels
    )
    (expected,) = torch.autograd.grad(expected_loss, decoded)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-9)
    assert (gradient - expected).norm() <= 1e-9 * expected.norm()
    assert not batches[2].requires_grad


def test_step_is_the_slope_of_the_loss() -> None:
    _, plain = make_networks()
    real, real_labels, decoded, labels = make_batches()
    _, gradient = matching_step(plain, real, real_labels, decoded, labels)
    for position in ((0, 0, 0, 0), (1, 2, 3, 4), (2, 1, 7, 7)):
        losses = []
        for change in (1e-5, -1e-5):
            moved = decoded.clone()
            moved[position] += change
            losses.append(matching_loss(plain, real, real_labels, moved, labels).item())
        slope = (losses[0] - losses[1]) / 2e-5
        assert gradient[position].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_pieces_are_decoded_one_by_one_as_by_hand() -> None:
    stored = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    decoded = decode_pieces(stored)
    assert decoded.shape == (12, 3, 8, 6)
    for number, (top, left) in enumerate([(0, 0), (0, 3), (4, 0), (4, 3)]):
        for image in range(3):
            piece = stored[image : image + 1, :, top : top + 4, left : left + 3]
            wanted = F.interpolate(piece, (8, 6), mode="bilinear", align_corners=False)
            assert decoded[3 * number + image].equal(wanted[0])


def test_loop_begins_with_four_real_images_in_each_stored_one() -> None:
    # Every image has one colour of its own, so a piece tells which image it is of.
    labels = torch.tensor([7, 3]).repeat(8)
    colours = torch.arange(16, dtype=torch.uint8) * 15
    images = colours.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    loop = ReferenceLoop(LabelledImages(images, labels), 4 * 3 * 64 * 2 * 2 + 5, **TINY)
    assert loop.pixels.shape == (4, 3, 8, 8) and loop.step == 0
    decoded, decoded_labels = loop.decode()
    assert decoded_labels.tolist() == [3] * 8 + [7] * 8
    assert (decoded.amax(dim=(1, 2, 3)) - decoded.amin(dim=(1, 2, 3))).max() < 1e-6
    shown = (decoded[:, 0, 0, 0] * 255).round().to(torch.uint8)
    assert len(shown.unique()) == 16
    for label in (3, 7):
        assert set(shown[decoded_labels == label].tolist()) == set(
            colours[labels == label].tolist()
        )


def test_loop_follows_the_gradient_class_by_class(make_set: Any) -> None:
    data = make_set(labels=(0, 1))
    loop = ReferenceLoop(data, 4 * 192 * 2, **TINY)
    before = loop.pixels.detach().clone()
    weights = [parameter.detach().clone() for parameter in loop.network.parameters()]
    loop.take_step()
    assert loop.step == 1
    moved = (loop.pixels - before).flatten(1).abs().sum(dim=1)
    assert (moved > 0).all()
    assert any(not w.equal(p) for w, p in zip(weights, loop.network.parameters(), strict=True))
    # SGD moves an image by its rate times its gradient, and by half of its last move again.
    rate = loop.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(5e-4)
    velocity = loop.optimizer.state[loop.pixels]["momentum_buffer"]
    assert torch.allclose(loop.pixels[1], before[1] - rate * velocity[1], atol=1e-7)


@pytest.mark.usefixtures("untouched_random_state")
def test_loop_goes_on_from_its_state_to_the_same_bits(make_set: Any) -> None:
    data, options = make_set(), {**TINY, "inner_steps": 2}
    whole = ReferenceLoop(data, 4 * 192 * 3, **options)
    for _ in range(3):
        whole.take_step()
    first = ReferenceLoop(data, 4 * 192 * 3, **options)
    first.take_step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ReferenceLoop(data, 4 * 192 * 3, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.seconds == first.seconds
    for _ in range(2):
        second.take_step()
    assert second.step == 3
    assert second.pixels.equal(whole.pixels)
    for ours, theirs in zip(second.network.parameters(), whole.network.parameters(), strict=True):
        assert ours.equal(theirs)


def test_loop_stops_when_its_seconds_are_over(make_set: Any) -> None:
    loop = ReferenceLoop(make_set(), 4 * 192 * 3, **TINY)
    assert loop.seconds > 0
    loop.run(loop.seconds)
    assert loop.step == 0
    target = loop.seconds + 1e-4
    loop.run(target)
    assert loop.step >= 1 and loop.seconds >= target


def test_loop_takes_no_more_decoded_images_than_wanted(
    make_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def matching_loss(
        network: Any, real: Tensor, _: Tensor, decoded: Tensor, labels: Tensor
    ) -> Any:
        seen.append((len(real), len(decoded), labels.tolist()))
        return decoded.square().sum()

    monkeypatch.setattr("experiments.reference.matching_loss", matching_loss)
    data = make_set(labels=(0, 1))
    ReferenceLoop(data, 4 * 192 * 2 * 2, decoded_batch=5, **TINY).take_step()
    assert seen == [(3, 5, [0] * 5), (3, 5, [1] * 5)]


def test_loop_needs_an_image_a_class(make_set: Any) -> None:
    with pytest.raises(BudgetError, match=r"768 bytes for each of 3 classes"):
        ReferenceLoop(make_set(), 4 * 192 * 3 - 1, **TINY)
