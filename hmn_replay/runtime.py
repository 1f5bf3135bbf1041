"""Devices and random numbers: every draw comes from a seed and a name, none from global state."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hmn_replay.budget import as_int
from hmn_replay.errors import ConfigError

__all__ = [
    "PRECISIONS",
    "autocast",
    "default_float32",
    "derive_seed",
    "deterministic_cudnn",
    "drawing_from",
    "isolated",
    "isolated_if",
    "make_generator",
    "peak_memory_bytes",
    "resolve_device",
    "resolve_precision",
    "rewinder",
    "seeded",
    "without_autocast",
]

PRECISIONS = ("float32", "bfloat16", "auto")

# What torch keeps for the whole process is changed by one thread at a time.
_LOCK = threading.RLock()
# Of the global generators, for as long as code that is not ours runs; taken before the other.
_RANDOM_LOCK = threading.RLock()
_flags_before: list[tuple[bool, bool]] = []


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"`` into a device, and check any other name.

    Args:
        device: ``"auto"`` (CUDA where present, else the CPU), or anything :class:`torch.device`
            takes. Of several GPUs, ``"auto"`` takes the one whose number is the process's on its
            machine, which torchrun gives as ``LOCAL_RANK``. Apple's GPU (``"mps"``) has no float64,
            which this package needs: it is never chosen, and refused.

    Raises:
        ConfigError: The name is unknown, or the device is not present or has no float64; or torch's
            own default device is another than the CPU, where generators and real images are.
    """
    if (default := torch.get_default_device()).type != "cpu":
        raise ConfigError(
            f"torch's default device is {str(default)!r}, and what names no device is expected on "
            'the CPU: call torch.set_default_device("cpu"), and give device= instead'
        )
    if device == "auto":
        if torch.cuda.is_available():
            local_rank = os.environ.get("LOCAL_RANK")
            if local_rank is None:
                return torch.device("cuda")
            # Some launchers show each process its own GPU alone.
            return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
        # The meta device has tensors without values, and Apple's GPU no float64.
        torch.zeros((), dtype=torch.float64, device=resolved).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"device {str(device)!r} cannot be used ({reason}); pass 'auto', 'cpu' or 'cuda'"
        ) from error
    return resolved


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return ``"float32"`` or ``"bfloat16"``: what a precision means on a device.

    Args:
        precision: ``"float32"``; ``"bfloat16"``; or ``"auto"``, bfloat16 where the processor
            multiplies it natively (on a CPU, as torch 2.9 or newer reports).
        device: Where networks and decoders compute.
    """
    if precision == "auto":
        return "bfloat16" if _has_native_bfloat16(device) else "float32"
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks and decoders compute.

    Args:
        device: The device of the tensors.
        precision: A precision; see :func:`resolve_precision`.
    """
    enabled = resolve_precision(precision, device) == "bfloat16"
    # Inside another autocast, torch would keep the weights that it cast while they are trained on.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Let no ``torch.autocast`` of the caller apply inside the block, on a device or the CPU."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", device.type):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def deterministic_cudnn(device: torch.device) -> Iterator[None]:
    """Make cuDNN use the same algorithm every time inside the block, for work on a CUDA device.

    The flags are the process's: they are set while any thread is inside such a block, and restored
    when the last one leaves. For another device nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with _LOCK:
        current = cudnn.deterministic, cudnn.benchmark
        _flags_before.append(_flags_before[0] if _flags_before else current)
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        with _LOCK:
            before = _flags_before.pop()
            if not _flags_before:
                cudnn.deterministic, cudnn.benchmark = before


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: CUDA's own count, or the process's resident set.

    So far is since the process began, or since the count was reset (on Linux, by writing 5 to
    ``/proc/self/clear_refs``). 0 where the platform has no such count.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@functools.lru_cache
def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def check_seed(seed: int) -> int:
    """Return a seed as Python's integer, or raise a ConfigError for what is none."""
    number = as_int(seed)
    if number is None:
        raise ConfigError(f"seed must be an integer, got {seed!r}")
    return number


def derive_seed(seed: int, *names: int | str) -> int:
    """Return the 63-bit seed of one named draw.

    A draw that depends only on the run's seed and on its own name (say ``"match", step``) needs no
    generator state in a checkpoint, and does not move when another draw is added beside it.

    Raises:
        ConfigError: The seed is not an integer.
    """
    digest = hashlib.blake2b(repr((check_seed(seed), *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(seed: int, *names: int | str) -> torch.Generator:
    """Return a CPU generator for one named draw; see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


class drawing_from(TorchFunctionMode):  # used like a function, as torch's own are
    """Let torch.nn's modules that are made inside the block draw their weights from a generator.

    They would draw from torch's global one, which other threads draw from too. Inside the block,
    in this thread alone, tensors of no given dtype are float32, and those of no given device are on
    the CPU, whatever the defaults. Dropout is not reached: no weights are drawn by it.

    Args:
        generator: On the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with what it was not given."""
        given = dict(kwargs or {})
        if func in _DRAWING and given.get("generator") is None:
            given["generator"] = self.generator
        if func in _MAKING:
            given["dtype"] = given.get("dtype") or torch.float32
            given["device"] = given.get("device") or "cpu"
        return func(*args, **given)


_DRAWING = frozenset(
    {
        nn.init.kaiming_uniform_,
        nn.init.normal_,
        nn.init.uniform_,
        Tensor.bernoulli_,
        Tensor.normal_,
        Tensor.uniform_,
        torch.normal,
        torch.rand,
        torch.randn,
    }
)
_MAKING = frozenset({torch.empty, torch.ones, torch.rand, torch.randn, torch.zeros})


@contextlib.contextmanager
def default_float32() -> Iterator[None]:
    """Make float32 torch's default inside the block, for code that names no dtype.

    The default is the process's: one thread at a time is inside such a block.
    """
    with _LOCK:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(seed: int, *names: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block, and restore it afterwards.

    For code that draws from the global generator only, such as a user's modules. One thread at a
    time is inside such a block; one that draws from it meanwhile draws other numbers.
    """
    with _RANDOM_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *names))
        yield


def rewinder(device: torch.device) -> Callable[[], None]:
    """Return a function that sets torch's global generators back to where they are now.

    It lets code that draws from them draw the same numbers again: on the CPU, and on a device.
    """
    state = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(state)
        if own is not None:
            torch.cuda.set_rng_state(own, device)

    return rewind


@contextlib.contextmanager
def isolated(device: torch.device, seed: int, *names: int | str) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block; restore them after.

    For code that is not ours: a benchmark's transforms, and a user's way to make a memory. Inside
    the block no autocast is on, in which a caller's training loop may be. One thread at a time is
    inside such a block; one that draws from a global generator meanwhile draws other numbers.
    """
    value = derive_seed(seed, *names)
    devices = [device] if device.type == "cuda" else []
    with _RANDOM_LOCK, torch.random.fork_rng(devices=devices), without_autocast(device):
        state, numpy_state = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(value)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def isolated_if(
    draws_globally: bool, device: torch.device, seed: int, *names: int | str
) -> contextlib.AbstractContextManager[None]:
    """Return :func:`isolated` for code that may draw from a global generator, else nothing."""
    return isolated(device, seed, *names) if draws_globally else contextlib.nullcontext()
