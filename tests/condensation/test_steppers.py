"""The stepper of batches: when it draws another network, and what it goes on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hmn_replay.condensation import steps
from hmn_replay.condensation.checkpoint import Checkpoint, flatten_state
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.steppers import BatchStepper
from hmn_replay.data.images import LabelledImages
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout
from tests.support import TINY

MakeStepper = Callable[..., BatchStepper]

pytestmark = pytest.mark.usefixtures("untouched_random_state")


@pytest.fixture
def make_stepper(
    make_set: Callable[..., LabelledImages], make_layout: Callable[..., Layout]
) -> MakeStepper:
    def make(first_class: int = 0, **options: Any) -> BatchStepper:
        usual = {name: value for name, value in TINY.items() if name != "device"}
        config, data = make_config(**{**usual, **options}), make_set()
        memory = HierarchicalMemory(make_layout(), data.classes, [3, 5, 2], seed=1)
        return BatchStepper(memory, steps.RealImages.of(data), config, 7, first_class)

    return make


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect the seeds and numbers of the networks that are drawn."""
    drawn: list[tuple[int, int]] = []
    fresh_network = steps.fresh_network

    def watched(memory: Any, real: Any, config: Any, seed: int, number: int) -> Any:
        drawn.append((seed, number))
        return fresh_network(memory, real, config, seed, number)

    monkeypatch.setattr(steps, "fresh_network", watched)
    return drawn


def take(stepper: BatchStepper, numbers: range) -> list[int]:
    optimizer = steps.make_optimizer(stepper.memory, (0.5, 0.99))
    steps.set_rate(optimizer, 0.01)
    return [stepper.step(optimizer, number) for number in numbers]


@pytest.mark.parametrize(
    ("objective", "expected"), [("gradient", [0, 1, 2]), ("dm", [0, 1, 2, 3, 4, 5, 6])]
)
def test_a_network_is_drawn_as_often_as_it_learns_nothing_more(
    make_stepper: MakeStepper,
    networks: list[tuple[int, int]],
    objective: str,
    expected: list[int],
) -> None:
    take(make_stepper(objective=objective, inner_steps=3), range(7))
    assert [number for _, number in networks] == expected
    assert len({seed for seed, _ in networks}) == len(expected)


def test_the_network_learns_between_steps(
    make_stepper: MakeStepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("match_step", "train_step"):
        monkeypatch.setattr(steps, name, lambda *_, name=name: order.append(name))
    take(make_stepper(), range(2))
    assert order == ["match_step", "train_step"] * 2
    take(make_stepper(network_images=0), range(1))
    assert order == [*["match_step", "train_step"] * 2, "match_step"]


@pytest.mark.parametrize(
    ("first_class", "options", "expected"),
    [
        (0, {"decoded_batch": 3}, (9, 8)),
        (0, {"decoded_batch": 99}, (15, 10)),
        (1, {"decoded_batch": 3}, (6, 5)),
        (0, {"decoded_batch": 1, "classes_per_step": 2}, (2, 2)),
    ],
)
def test_images_of_a_step_are_told_beforehand_and_counted_afterwards(
    make_stepper: MakeStepper,
    first_class: int,
    options: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    stepper = make_stepper(first_class, **options)
    assert (stepper.images_per_step, *take(stepper, range(1))) == expected


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_it_goes_on_with_the_network_that_was_kept(
    make_stepper: MakeStepper, networks: list[tuple[int, int]], number: int
) -> None:
    stepper = make_stepper(inner_steps=3)
    take(stepper, range(number))
    tensors = {
        name: value.clone()
        for owner_name, owner in stepper.owners().items()
        for name, value in flatten_state(owner_name, owner).items()
    }
    kept = [tensor.clone() for tensor in stepper.memory.state_dict().values()]
    take(stepper, range(number, number + 1))
    expected = stepper.memory.state_dict()

    again = make_stepper(inner_steps=3)
    again.memory.load_state_dict(dict(zip(expected, kept, strict=True)))
    networks.clear()
    again.resume(Checkpoint({}, tensors), number)
    take(again, range(number, number + 1))
    assert [drawn for _, drawn in networks] == [number // 3]
    assert all(value.equal(expected[name]) for name, value in again.memory.state_dict().items())
    assert stepper.results() == {}
    assert all(
        one.equal(two)
        for one, two in zip(again.network.parameters(), stepper.network.parameters(), strict=True)
    )
