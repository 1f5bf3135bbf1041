"""Seeds by name, generators of their own, devices by name, and what they are set to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay import runtime
from hmn_replay.errors import ConfigError
from hmn_replay.runtime import (
    PRECISIONS,
    autocast,
    derive_seed,
    deterministic_cudnn,
    make_generator,
    peak_memory_bytes,
    resolve_device,
    seeded,
)
from hmn_replay.training.networks import build_network

CPU = torch.device("cpu")

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


def test_auto_is_never_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == torch.device("cpu")


def test_another_default_device_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="default device is 'meta'"):
        resolve_device()
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros

    def single(*args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*args, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", single)
    with pytest.raises(ConfigError, match=r"device 'cpu' cannot be used .*float64"):
        resolve_device("cpu")


@pytest.mark.parametrize(
    ("local_rank", "device"), [(None, "cuda"), ("0", "cuda:0"), ("2", "cuda:2"), ("5", "cuda:1")]
)
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(
    local_rank: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device() == torch.device(device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_may_be_named_or_given(device: str | torch.device) -> None:
    assert resolve_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:999", "cpu:x", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used .*pass 'auto', 'cpu'"):
        resolve_device(device)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let the processor be asked anew in a test and after it."""
    runtime._has_native_bfloat16.cache_clear()
    yield
    runtime._has_native_bfloat16.cache_clear()


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    matrix = torch.ones(2, 2, device=device)
    with autocast(device, precision):
        return (matrix @ matrix).dtype


def test_autocast_computes_in_the_precision_asked_for() -> None:
    assert product_dtype(CPU, "float32") == torch.float32
    assert product_dtype(CPU, "bfloat16") == torch.bfloat16
    assert product_dtype(CPU, "auto") in (torch.float32, torch.bfloat16)
    assert set(PRECISIONS) == {"float32", "bfloat16", "auto"}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
        (None, torch.float32),
    ],
    ids=["avx512", "amx", "neither", "not x86", "torch before 2.9"],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    capabilities: dict[str, Any] | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    forgetful: None,
) -> None:
    if capabilities is None:
        monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    else:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert product_dtype(CPU, "auto") == dtype
    assert product_dtype(CPU, "float32") == torch.float32
    assert product_dtype(CPU, "bfloat16") == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it() -> None:
    native = torch.cuda.get_device_capability() >= (8, 0)
    expected = torch.bfloat16 if native else torch.float32
    assert product_dtype(torch.device("cuda"), "auto") == expected


@pytest.mark.parametrize("flags", [(False, True), (True, False), (False, False)])
def test_cudnn_is_deterministic_inside_and_as_it_was_afterwards(
    flags: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", flags[0])
    monkeypatch.setattr(cudnn, "benchmark", flags[1])
    cuda = torch.device("cuda")
    with deterministic_cudnn(torch.device("cpu")):
        assert (cudnn.deterministic, cudnn.benchmark) == flags
    with deterministic_cudnn(cuda):
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == flags
    with pytest.raises(KeyError), deterministic_cudnn(cuda):
        raise KeyError
    assert (cudnn.deterministic, cudnn.benchmark) == flags


def test_cudnn_is_restored_when_the_last_of_several_threads_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    one, two = (deterministic_cudnn(torch.device("cuda")) for _ in range(2))
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert cudnn.deterministic
    two.__exit__(None, None, None)
    assert not cudnn.deterministic


def test_networks_made_in_threads_have_the_weights_of_their_seeds() -> None:
    def weights(seed: int) -> torch.Tensor:
        return build_network("convnet", (3, 8, 8), 2, width=8, seed=seed).body.get_parameter(
            "stages.1.0.weight"
        )

    before, seeds = torch.get_rng_state(), [0, 1, 2, 3] * 4
    expected = {seed: weights(seed) for seed in set(seeds)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(weights, seeds))
    assert all(value.equal(expected[seed]) for seed, value in zip(seeds, found, strict=True))
    assert torch.get_rng_state().equal(before)


def test_peak_memory_counts_bytes_and_never_falls() -> None:
    pytest.importorskip("resource")
    before = peak_memory_bytes(CPU)
    assert 2**20 < before < 2**40  # a process with torch in it, and not counted in KiB
    grown = torch.ones(before + 2**24, dtype=torch.uint8)
    after = peak_memory_bytes(CPU)
    assert after >= grown.nbytes
    del grown
    assert peak_memory_bytes(CPU) > after - 2**22  # the kernel's count is not exact to the page


def no_file(_: object) -> str:
    raise FileNotFoundError


def test_peak_memory_is_in_the_systems_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")

    def usage(who: int) -> Any:
        assert who == resource.RUSAGE_SELF
        return type("Usage", (), {"ru_maxrss": 7000})

    monkeypatch.setattr(resource, "getrusage", usage)
    monkeypatch.setattr("pathlib.Path.read_text", no_file)
    for platform, expected in (("linux", 7000 * 1024), ("darwin", 7000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory_bytes(CPU) == expected


def test_peak_memory_is_0_where_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("pathlib.Path.read_text", no_file)
    assert peak_memory_bytes(CPU) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    device = torch.device("cuda")
    tensor = torch.ones(2**24, device=device)
    assert tensor.nbytes <= peak_memory_bytes(device) < 2**40


@pytest.mark.parametrize("seed", [None, "a", 0.7, True])
def test_a_seed_that_is_no_integer_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer, got"):
        derive_seed(seed)


def test_a_seed_may_be_numpys() -> None:
    seed: Any = np.int64(3)
    assert derive_seed(seed, "x") == derive_seed(3, "x")
