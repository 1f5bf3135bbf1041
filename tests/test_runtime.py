"""Seeds by name, generators of their own, and devices by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.errors import ConfigError
from hmn_replay.runtime import derive_seed, make_generator, resolve_device, seeded

Names = st.lists(st.integers() | st.text(max_size=8), max_size=4)


@given(st.integers(), Names)
def test_a_seed_is_a_63_bit_number_that_depends_on_seed_and_names_alone(
    seed: int, names: list[int | str]
) -> None:
    derived = derive_seed(seed, *names)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, *names)


def test_a_seed_stays_what_it_was_in_earlier_versions() -> None:
    assert derive_seed(0, "match", 7) == 4210022883515827518
    assert derive_seed(-1) == 7517584765477595306


def test_other_seeds_names_and_orders_give_other_seeds() -> None:
    draws: list[tuple[int, tuple[int | str, ...]]] = [
        (0, ()),
        (1, ()),
        (0, ("a",)),
        (0, ("a", "b")),
        (0, ("b", "a")),
        (0, ("ab",)),
        (0, ("a, b",)),
        (0, (1,)),
        (0, ("1",)),
        (0, (1, 1)),
        (0, (11,)),
    ]
    assert len({derive_seed(seed, *names) for seed, names in draws}) == len(draws)


def test_generators_of_one_name_draw_alike_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    one, two = make_generator(3, "x"), make_generator(3, "x")
    other = make_generator(3, "y")
    assert torch.rand(5, generator=one).equal(torch.rand(5, generator=two))
    assert not torch.rand(5, generator=make_generator(3, "x")).equal(torch.rand(5, generator=other))
    assert torch.get_rng_state().equal(before)


def test_seeded_draws_alike_and_restores_the_global_state() -> None:
    before = torch.get_rng_state()
    with seeded(3, "x"):
        first = torch.nn.Linear(3, 3).weight
    assert torch.get_rng_state().equal(before)
    with seeded(3, "x"):
        again = torch.nn.Linear(3, 3).weight
    with seeded(4, "x"):
        other = torch.nn.Linear(3, 3).weight
    assert first.equal(again)
    assert not first.equal(other)


def test_seeded_restores_the_global_state_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(0):
        torch.rand(3)
        raise KeyError
    assert torch.get_rng_state().equal(before)


def test_auto_is_a_device_that_works() -> None:
    device = resolve_device()
    assert torch.zeros(1, device=device).device.type == device.type
    if torch.cuda.is_available():
        assert device.type == "cuda"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_may_be_named_or_given(device: str | torch.device) -> None:
    assert resolve_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:999", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used .*pass 'auto', 'cpu'"):
        resolve_device(device)
