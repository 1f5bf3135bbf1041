"""Bits in the loss: their gradient, what the controller does, and the budget in the end."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.condensation.rate import RateControl, fit_code, most_that_fit
from hmn_replay.errors import BudgetError
from hmn_replay.memory import HierarchicalMemory, loads
from tests.support import hmn_layout, trained


def coded_memory(seed: int = 0, std: float = 1.0, counts: Any = (4, 3)) -> HierarchicalMemory:
    labels = list(range(len(counts)))
    return trained(
        HierarchicalMemory(hmn_layout(number_format="entropy"), labels, counts), seed, std
    )


@torch.no_grad()
def rate_of(memory: HierarchicalMemory, *indices: int) -> tuple[float, float]:
    """Return the rate of some images, or of all."""
    image_bits, shared_bits = memory.rate(torch.tensor(indices or range(memory.num_images)))
    return float(image_bits), float(shared_bits)


def two_sided_geometric_bits(integers: Tensor) -> float:
    """Return the least bits of integers under one model, by trying very many."""
    mean = float(integers.detach().abs().double().mean())
    best = math.inf
    for level in range(56):
        of_level = 2 ** (level / 4 - 6)
        ratio = of_level / (1 + math.sqrt(1 + of_level**2))
        bits = math.log2((1 + ratio) / (1 - ratio)) - mean * math.log2(ratio)
        best = min(best, integers.numel() * bits)
    return best


def test_the_rate_is_that_of_the_best_models_by_hand() -> None:
    memory = coded_memory()
    image_bits, shared_bits = rate_of(memory)
    integers = (memory.instance_memory / 0.25).round().clamp(-127, 127)
    by_position = integers.flatten(1).unbind(1)
    expected = sum(map(two_sided_geometric_bits, by_position)) / memory.num_images
    assert image_bits == pytest.approx(expected, rel=1e-3)
    shared: list[Tensor] = [
        (memory.dataset_memory / 0.0625).round(),
        (memory.extractor_weight / 0.0625).round(),
    ]
    shared += [(memory.class_memory[:, c] / 0.0625).round() for c in range(2)]
    weights = [memory.get_parameter(f"decoder_weight_{i}") for i in range(3)]
    shared += [
        (weight / (0.35 * math.sqrt(2 / (9 * weight.shape[1])))).round() for weight in weights
    ]
    expected = sum(two_sided_geometric_bits(part.clamp(-127, 127)) for part in shared)
    assert shared_bits == pytest.approx(expected, rel=1e-3)


def test_the_rate_is_what_the_code_takes() -> None:
    memory = coded_memory(std=2.0, counts=(300, 200))
    image_bits, shared_bits = rate_of(memory)
    total = 500 * image_bits + shared_bits
    assert memory.code_bytes is not None
    assert total / 8 - 1 <= memory.code_bytes <= total / 8 * 1.002 + 8
    num_biases = 2 * 2 + 5 + 4 + 12
    assert sum(memory.bits().values()) == pytest.approx(total + 16 * num_biases, rel=1e-6)


def test_a_part_of_the_images_has_the_mean_of_its_own_bits() -> None:
    memory = coded_memory()
    parts = [rate_of(memory, index)[0] for index in range(7)]
    assert rate_of(memory)[0] == pytest.approx(sum(parts) / 7, rel=1e-5)


def test_bits_fall_along_their_gradient() -> None:
    memory = coded_memory()
    control = RateControl(memory, code_bytes=20, kept_images=7)
    control.add_gradients(torch.arange(7), torch.tensor(1.0))
    before = rate_of(memory)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            assert (parameter.grad is None) == ("bias" in name)
            if parameter.grad is not None:
                parameter.sub_(0.3 * parameter.grad.sign())
    after = rate_of(memory)
    assert after[0] < before[0]
    assert after[1] < before[1]


def test_the_weight_grows_while_bits_are_over_the_target_and_shrinks_while_under() -> None:
    memory = coded_memory(counts=(300, 200))
    image_bits, shared_bits = rate_of(memory)
    sizes = []
    for share in (0.5, 2.0):
        code_bytes = int((shared_bits + 500 * share * image_bits) / 8)
        control = RateControl(memory, code_bytes, kept_images=500)
        weights = []
        for _ in range(5):
            memory.zero_grad()
            control.add_gradients(torch.arange(7), torch.tensor(1.0))
            assert memory.instance_memory.grad is not None
            weights.append(float(memory.instance_memory.grad.abs().sum()))
        assert weights == sorted(weights, reverse=share > 1)
        assert weights[0] != weights[-1]
        sizes.append(weights[-1])
    assert sizes[0] > sizes[1]


def test_an_image_takes_no_more_than_it_may() -> None:
    memory = coded_memory()
    image_bits, shared_bits = rate_of(memory)
    weights = []
    for most in (image_bits / 16, 2 * image_bits / 8, math.inf):
        # The code may take twice what it takes: all that holds it back is what an image may.
        code_bytes = int((shared_bits + 7 * 2 * image_bits) / 8)
        control = RateControl(memory, code_bytes, kept_images=7, most_image_bytes=most)
        for _ in range(5):
            memory.zero_grad()
            control.add_gradients(torch.arange(7), torch.tensor(1.0))
        assert memory.instance_memory.grad is not None
        weights.append(float(memory.instance_memory.grad.abs().sum()))
    assert weights[0] > 2 * weights[1] >= 2 * weights[2]


def test_the_weight_is_in_the_distances_own_unit() -> None:
    gradients = []
    for distance in (1.0, 1000.0):
        memory = coded_memory()
        control = RateControl(memory, code_bytes=40, kept_images=7)
        control.add_gradients(torch.arange(7), torch.tensor(distance))
        assert memory.instance_memory.grad is not None
        gradients.append(memory.instance_memory.grad)
    torch.testing.assert_close(1000 * gradients[0], gradients[1])


def test_old_images_take_their_bits_from_the_target() -> None:
    memory = coded_memory()
    old_bits, _ = rate_of(memory, 0, 1, 2, 3)
    control = RateControl(memory, code_bytes=1000, kept_images=6, num_old=4, kept_old=3)
    whole = RateControl(memory, code_bytes=1000, kept_images=3)
    assert control.kept_new == 3
    assert float(control.state[3]) == pytest.approx(float(whole.state[3]) - 3 * old_bits)


def test_the_state_is_all_that_a_checkpoint_needs() -> None:
    memory = coded_memory()
    arguments = {"code_bytes": 1000, "kept_images": 6, "num_old": 4, "kept_old": 3}
    one = RateControl(memory, **arguments)
    for _ in range(3):
        one.add_gradients(torch.arange(4, 7), torch.tensor(1.0))
    with torch.no_grad():
        # The old images' bits are counted by a model of all images, which the new ones move.
        memory.instance_memory[4:] *= 3
    two = RateControl(memory, **arguments)
    two.state = one.state.clone()
    gradients = []
    for control in (one, two):
        memory.zero_grad()
        control.add_gradients(torch.tensor([5, 6]), torch.tensor(0.3))
        assert memory.instance_memory.grad is not None
        gradients.append(memory.instance_memory.grad.clone())
    assert gradients[0].equal(gradients[1])
    assert one.state.equal(two.state)


def test_the_integral_is_bounded_however_long_the_bits_are_off_the_target() -> None:
    memory = coded_memory()
    image_bits, shared_bits = rate_of(memory)
    for share, bound in ((0.01, 10.0), (100.0, -10.0)):
        code_bytes = int((shared_bits + 7 * share * image_bits) / 8) + 1
        control = RateControl(memory, code_bytes, kept_images=7)
        control.state[0] = 0.95 * bound
        integrals = []
        for _ in range(30):
            control.add_gradients(torch.arange(7), torch.tensor(1.0))
            integrals.append(float(control.state[0]))
        steps = [abs(after - before) for before, after in pairwise(integrals)]
        assert max(steps) < 0.03
        assert integrals[-1] == bound
        # What has been stored up is worked off as fast as it was: by half of it in half the steps.
        control.state[3] = 8e6 if bound > 0 else shared_bits
        for _ in range(210):
            control.add_gradients(torch.arange(7), torch.tensor(1.0))
        assert abs(float(control.state[0])) < 6
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in memory.parameters())


def test_a_step_without_any_image_has_the_gradient_of_what_is_shared() -> None:
    memory = coded_memory()
    control = RateControl(memory, code_bytes=40, kept_images=7)
    control.add_gradients(torch.arange(0), torch.tensor(1.0))
    assert memory.instance_memory.grad is None or not memory.instance_memory.grad.any()
    assert memory.dataset_memory.grad is not None
    assert bool(memory.dataset_memory.grad.any())
    assert bool(control.state.isfinite().all())


def test_shared_bytes_over_the_budget_are_refused() -> None:
    memory = coded_memory()
    _, shared_bits = rate_of(memory, 0, 1, 2, 3)
    arguments = {"kept_images": 6, "num_old": 4, "kept_old": 3}
    assert RateControl(memory, int(shared_bits / 8 + 2), **arguments).kept_new == 3
    with pytest.raises(BudgetError, match="what all images share takes"):
        RateControl(memory, int(shared_bits / 8 - 2), **arguments)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), std=st.floats(0.3, 5.0), share=st.floats(0.3, 1.1))
def test_a_fitted_code_is_within_its_budget(seed: int, std: float, share: float) -> None:
    memory = coded_memory(seed, std, (40, 30))
    budget = int(share * memory.file_bytes)
    before = memory.instance_memory.detach().clone()
    alike = copy.deepcopy(memory)
    with torch.no_grad():
        alike.instance_memory.zero_()
    # With all integers 0 an instance memory takes the fewest bits that there are.
    smallest = alike.file_bytes_with(70, alike.code_bytes, budget)
    if smallest > budget:
        message = rf"takes {smallest:,} bytes even with all .*, over its budget of {budget:,}"
        with pytest.raises(BudgetError, match=message):
            fit_code(memory, budget)
        return
    fit_code(memory, budget)
    memory.budget_bytes = budget
    assert len(memory.to_bytes()) == memory.file_bytes <= budget
    assert loads(memory.to_bytes()).decode()[0].equal(memory.decode()[0])
    steps = memory.instance_memory.detach() / 0.25
    assert steps.equal(steps.round())
    # Towards zero, and by about as much everywhere.
    change = (before.abs() - memory.instance_memory.detach().abs()) / 0.25
    assert float(change.min()) >= -0.501
    moved = change[steps != 0]
    assert not len(moved) or float(moved.max() - moved.min()) < 1.001
    if share >= 1.05:
        assert steps.equal((before / 0.25).clamp(-1e9, 1e9).round())


def test_fitting_wastes_little_and_leaves_the_first_images() -> None:
    memory = coded_memory(std=3.0, counts=(100, 100))
    old = memory.decode(range(100))[0]
    memory.budget_bytes = int(0.97 * memory.file_bytes)
    fit_code(memory, memory.budget_bytes, first_image=100)
    assert 0.97 * memory.budget_bytes < memory.file_bytes <= memory.budget_bytes
    assert memory.decode(range(100))[0].equal(old)


def test_a_budget_that_no_rounding_meets_is_refused() -> None:
    memory = coded_memory(std=20.0)
    rounded = memory.decode()[0]
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes even with all its images alike"):
        fit_code(memory, 300)
    assert memory.decode()[0].equal(rounded)


def test_as_many_images_stay_as_bytes_hold() -> None:
    memory = coded_memory(counts=(30, 30))
    with torch.no_grad():
        memory.instance_memory[10:30] *= 5
    full = memory.file_bytes

    def choose(num_images: int) -> Tensor:
        return torch.arange(num_images)

    def bytes_of(num_images: int) -> int:
        own = coded_memory(counts=(30, 30))
        own.load_state_dict(memory.state_dict())
        own.keep(choose(num_images))
        return own.file_bytes_with(num_images, own.code_bytes, full)

    for budget in (full - 1, full - 20, bytes_of(45), bytes_of(25) + 3):
        kept = len(most_that_fit(memory, budget, choose, 20, 60))
        # What is counted is the length of a perfect code.
        assert bytes_of(kept) <= budget + 12
        assert bytes_of(min(60, kept + 1)) > budget - 12
    assert len(most_that_fit(memory, bytes_of(25), choose, 40, 60)) == 40
    assert len(most_that_fit(memory, 2 * full, choose, 20, 50)) == 50
