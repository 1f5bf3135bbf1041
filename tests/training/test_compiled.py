"""Compiled training steps: as eager ones but for rounding, shared, and left out where they fail."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_compiler
from torch._functorch.compilers import nop
from torch._inductor.exc import InvalidCxxCompiler

from hmn_replay.errors import ConfigError, HMNReplayWarning
from hmn_replay.runtime import make_generator, seeded
from hmn_replay.training.networks import Network, build_network
from hmn_replay.training.train import (
    CompiledFunction,
    CompiledLoss,
    TrainingConfig,
    add_gradients,
    resolve_compile,
    train_network,
    wants_compiling,
)
from tests.stripes import PLAIN, stripes, weights
from tests.support import CountingBackend

CPU = torch.device("cpu")
can_compile = resolve_compile("auto", CPU) == "auto"
Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


def draw(count: int, side: int = 8) -> Batch:
    generator = make_generator(1)
    labels_a, labels_b = torch.randint(3, (2, count), generator=generator)
    return torch.rand(count, 3, side, side, generator=generator), labels_a, labels_b


def convnet(seed: int = 0, width: int = 4) -> Network:
    return build_network("convnet", (3, 8, 8), 3, width=width, seed=seed)


def with_batch_norm() -> nn.Module:
    with seeded(0):
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers)


def assert_same_step(
    network: nn.Module, batch: Batch, lam: float, compiled: CompiledLoss, **options: Any
) -> None:
    """Compare loss and gradients of a batch, compiled and not."""
    eager = copy.deepcopy(network)
    for one, two in zip(eager.parameters(), network.parameters(), strict=True):
        one.grad = None if two.grad is None else two.grad.clone()
    expected = add_gradients(eager, *batch, lam, **options)
    loss = add_gradients(network, *batch, lam, compiled=compiled, **options)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad
    for one, two in zip(network.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    for name, value in eager.named_buffers():
        torch.testing.assert_close(network.get_buffer(name), value)


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("make", [convnet, with_batch_norm])
def test_one_function_serves_batches_of_every_size(
    make: Callable[[], nn.Module], lam: float, backend: CountingBackend
) -> None:
    compiled = CompiledLoss("float32", backend)
    for count in (8, 7, 8, 5):
        assert_same_step(make(), draw(count), lam, compiled)
    assert backend.count == 1


def test_networks_of_one_architecture_share_a_function(backend: CountingBackend) -> None:
    for seed in range(5):
        assert_same_step(convnet(seed), draw(6), 0.5, CompiledLoss("float32", backend))
    assert backend.count == 1
    for width in range(5, 15):  # more than torch compiles of one function before it gives up
        assert_same_step(convnet(width=width), draw(6), 0.5, CompiledLoss("float32", backend))
    assert backend.count == 11


def test_parts_of_a_large_batch_are_compiled_but_for_a_small_rest(backend: CountingBackend) -> None:
    compiled = CompiledLoss("float32", backend)
    network = convnet()
    assert_same_step(network, draw(10), 0.5, compiled, part_size=4)
    assert_same_step(network, draw(11), 0.5, compiled, part_size=4)  # adds to the gradients
    assert backend.count == 1


def test_trainings_of_any_batch_size_share_a_few_functions(backend: CountingBackend) -> None:
    for count in (33, 34, 40, 47, 48, 49, 56, 63, 64):
        assert_same_step(convnet(), draw(count), 0.5, CompiledLoss("float32", backend))
    assert backend.count == 4


def test_another_number_of_threads_gets_a_function_of_its_own(backend: CountingBackend) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert_same_step(convnet(), draw(6), 0.5, CompiledLoss("float32", backend))
    finally:
        torch.set_num_threads(before)
    assert backend.count == 2


def test_a_network_may_keep_parameters_out_of_the_loss(backend: CountingBackend) -> None:
    network = convnet()
    network.register_parameter("unused", nn.Parameter(torch.ones(2)))
    frozen = network.get_parameter("body.stages.0.0.weight").requires_grad_(False)
    add_gradients(network, *draw(4), 0.5, compiled=CompiledLoss("float32", backend))
    without = [p for p in network.parameters() if p.grad is None]
    assert len(without) == 2 and without[0] is network.unused and without[1] is frozen
    assert backend.count == 1


def test_a_compiler_that_fails_is_tried_once_in_a_process_with_one_warning() -> None:
    tried = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise InvalidCxxCompiler

    with pytest.warns(HMNReplayWarning, match=r"torch.compile failed .*; going on without"):
        assert_same_step(convnet(), draw(6), 0.5, CompiledLoss("float32", fail))
    arguments = convnet(width=5), draw(6)[0], torch.rand(2, 6), 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width in (4, 5):  # two trainings more, of which one has another network
            assert_same_step(convnet(width=width), draw(6), 0.5, CompiledLoss("float32", fail))
        assert CompiledFunction(sums, image_dims=(1,), backend=fail)(*arguments).equal(
            sums(*arguments)
        )
    assert len(tried) == 1


def test_a_network_that_cannot_be_compiled_keeps_no_other_from_it() -> None:
    tried = []

    def refuse_the_first(module: Any, _: Any) -> Any:
        tried.append(1)
        if len(tried) == 1:
            raise RuntimeError("no such operation")
        return module.forward

    with pytest.warns(HMNReplayWarning, match="no such operation"):
        assert_same_step(convnet(), draw(6), 0.5, CompiledLoss("float32", refuse_the_first))
    # In another training it is not tried again, nor warned of.
    assert_same_step(convnet(1), draw(6), 0.5, CompiledLoss("float32", refuse_the_first))
    assert len(tried) == 1
    assert_same_step(convnet(width=5), draw(6), 0.5, CompiledLoss("float32", refuse_the_first))
    assert len(tried) == 2
    # Another function of the same network is.
    arguments = convnet(), draw(6)[0], torch.rand(2, 6), 2
    other = CompiledFunction(sums, image_dims=(1,), backend=refuse_the_first)
    torch.testing.assert_close(other(*arguments), sums(*arguments))
    assert len(tried) == 3


def test_the_networks_own_error_is_raised_as_it_is(backend: CountingBackend) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
    with (
        pytest.warns(HMNReplayWarning, match="torch.compile failed"),
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
    ):
        add_gradients(network, *draw(4), 0.5, compiled=CompiledLoss("float32", backend))
    assert_same_step(convnet(), draw(4), 0.5, CompiledLoss("float32", backend))
    assert backend.count == 1, "that another network fails is no reason not to compile"


@pytest.mark.skipif(not can_compile, reason="needs a C++ compiler and Python's headers")
def test_a_compiled_training_is_the_plain_one_but_for_rounding() -> None:
    images, labels = stripes(30)
    labels = labels.clamp(0, 2)
    state = torch.get_rng_state()
    settings = torch._dynamo.config.get_config_copy()

    def trained(**options: Any) -> Network:
        config = PLAIN.replace(width=2, depth=1, batch_size=16, num_passes=90, **options)
        evaluate = lambda _, network: network.eval()  # noqa: E731
        return train_network(images, labels, 3, config=config, device="cpu", on_epoch=evaluate)

    eager, compiled = trained(compile=False), trained(compile=True)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-3, atol=1e-4)
    assert not weights(compiled).equal(weights(eager))
    assert weights(trained(compile=True)).equal(weights(compiled))
    assert torch.get_rng_state().equal(state)
    assert torch._dynamo.config.get_config_copy() == settings


def is_compiled(num_images: int, device: torch.device = CPU, **options: Any) -> bool:
    config = TrainingConfig(**options)
    return wants_compiling(config, (3, 32, 32), num_images, device)


@pytest.mark.skipif(not can_compile, reason="needs a C++ compiler and Python's headers")
def test_long_trainings_of_convnets_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = 40_000 * torch.get_num_threads()
    assert is_compiled(enough, width=64) and not is_compiled(enough // 2, width=64)
    assert is_compiled(enough // 2, width=128) and not is_compiled(enough, width=32)
    assert not is_compiled(enough, width=64, network="vgg16")
    assert not is_compiled(enough, torch.device("cuda"), width=64)
    assert not is_compiled(enough, width=64, compile=False)
    assert is_compiled(1, network="vgg16", compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not is_compiled(enough, width=64)
    assert is_compiled(1, compile=True)  # which says itself that it fails


def test_without_a_compiler_auto_means_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert resolve_compile("auto", CPU) is False
    assert resolve_compile(True, CPU) is True and resolve_compile(False, CPU) is False


@pytest.mark.parametrize(
    ("given", "read"), [("auto", "auto"), (True, True), ("false", False), ("True", True)]
)
def test_the_setting_is_read_as_typed(given: Any, read: object) -> None:
    assert TrainingConfig(compile=given).compile == read


def test_another_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile"):
        TrainingConfig(compile="sometimes")  # type: ignore[arg-type]


def sums(network: nn.Module, images: Tensor, weights: Tensor, power: int) -> Tensor:
    blocks = network.features(images)  # type: ignore[operator]
    return torch.stack([(weights @ block.flatten(1) ** power).sum() for block in blocks])


def test_a_compiled_function_serves_all_batches_and_networks_of_an_architecture(
    backend: CountingBackend,
) -> None:
    compiled = CompiledFunction(sums, image_dims=(1,), backend=backend)
    for seed, count in enumerate((6, 6, 4, 9, 5, 12, 7)):
        network, (images, *_) = convnet(seed), draw(count)
        arguments = network, images, torch.rand(2, count), 2
        torch.testing.assert_close(compiled(*arguments), sums(*arguments))
    assert backend.count == 1
    compiled(convnet(width=8), *draw(6)[:1], torch.rand(2, 6), 2)
    assert backend.count == 2


def test_a_function_can_be_compiled_for_each_number_of_images(backend: CountingBackend) -> None:
    compiled = CompiledFunction(sums, image_dims=None, backend=backend)
    counts = range(2, 14)  # more than torch compiles of one function before it gives up
    for seed, count in enumerate((*counts, *counts)):
        network, (images, *_) = convnet(seed), draw(count)
        arguments = network, images, torch.rand(2, count), 2
        torch.testing.assert_close(compiled(*arguments), sums(*arguments))
    assert backend.count == len(counts)


def test_a_function_that_cannot_be_compiled_is_called_as_it_is_with_one_warning() -> None:
    def fail(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no compiler")

    compiled = CompiledFunction(sums, image_dims=(1,), backend=fail)
    arguments = convnet(), draw(6)[0], torch.rand(2, 6), 2
    with pytest.warns(HMNReplayWarning, match="torch.compile failed"):
        assert compiled(*arguments).equal(sums(*arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(*arguments).equal(sums(*arguments))


def wrong(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
    """Compile code that computes NaN, as a faulty C++ compiler was seen to."""

    def call(*inputs: Any) -> Any:
        return [x * math.nan if isinstance(x, Tensor) else x for x in module(*inputs)]

    return call


@pytest.mark.parametrize("make", [convnet, with_batch_norm])
def test_code_that_computes_something_else_is_not_used(make: Callable[[], nn.Module]) -> None:
    with pytest.warns(HMNReplayWarning, match="its code computes something else.*going on without"):
        assert_same_step(make(), draw(6), 0.5, CompiledLoss("float32", wrong))


def test_a_compiled_function_that_computes_something_else_is_not_used() -> None:
    arguments = convnet(), draw(6)[0], torch.rand(2, 6), 2
    with pytest.warns(HMNReplayWarning, match="its code computes something else"):
        found = CompiledFunction(sums, image_dims=(1,), backend=wrong)(*arguments)
    assert found.equal(sums(*arguments))


def test_code_whose_gradients_alone_are_wrong_is_not_used() -> None:
    backend = aot_autograd(fw_compiler=nop, bw_compiler=make_boxed_compiler(wrong))
    with pytest.warns(HMNReplayWarning, match="its code computes something else"):
        assert_same_step(convnet(), draw(6), 0.5, CompiledLoss("float32", backend))


# A compiler whose code for the processor's own vectors is wrong; prints what it was asked for.
FAULTY_COMPILER = """
import copy, torch
from hmn_replay.training.networks import build_network
from hmn_replay.training.train import CompiledLoss, add_gradients

def compile(function, backend, dynamic, options):
    print(options)
    return function if options else lambda *inputs: function(*inputs) * float("nan")

torch.compile = compile
batch = torch.rand(6, 3, 8, 8), torch.arange(6) % 3, torch.arange(6) % 2
for width in (3, 3, 2):  # the wide ones are tried once in a process
    network = build_network("convnet", (3, 8, 8), 3, width=width)
    plain = copy.deepcopy(network)
    loss = add_gradients(network, *batch, 0.5, compiled=CompiledLoss("float32"))
    torch.testing.assert_close(loss, add_gradients(plain, *batch, 0.5))
    for one, two in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
"""


def test_where_code_for_wide_vectors_is_wrong_that_for_narrow_ones_is_used() -> None:
    """In a process of its own: what is at fault is remembered for the rest of a process."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", FAULTY_COMPILER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    narrow = str({"cpp.simdlen": 256})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(None), narrow, narrow]


def test_a_network_that_draws_is_compiled_though_its_code_draws_other_numbers() -> None:
    tried = []

    def compile(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        tried.append(1)

        def call(*inputs: Any) -> Any:
            torch.rand(100)
            return module(*inputs)

        return call

    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(192, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            add_gradients(network, *draw(6), 0.5, compiled=CompiledLoss("float32", compile))
    assert len(tried) == 1
