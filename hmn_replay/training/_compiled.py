"""Functions of a network and a batch that torch.compile makes, and when to use them."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from hmn_replay.errors import HMNReplayWarning
from hmn_replay.runtime import seeded

__all__ = [
    "Compile",
    "CompiledFunction",
    "can_compile",
    "mixes_images",
    "resolve_compile",
]

Compile: TypeAlias = Literal["auto"] | bool

# Backends that could not compile, each with the type of device that it was to compile for, or with
# what it could not compile, or with the bits of vectors whose code was wrong: in this process they
# are not tried again.
_BROKEN: set[tuple[object, object]] = set()
_NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing")
# Compiled functions of so many architectures, batch shapes and precisions are kept.
_NUM_KEPT = 64
# What is compiled may differ from what is not by this share of it: rounding of bfloat16 is a fifth
# of that, and a faulty compiler is far above.
_MOST_DIFFERENCE = 0.5
# Bits of the vectors that are compiled for on a CPU, one after the other where code computes
# something else; None for the processor's. GCC 12 is at fault with 512 on some processors.
_VECTOR_BITS = (None, 256)


def can_compile(device: torch.device) -> bool:
    """Return whether what torch.compile needs is installed: on a CPU, a C++ compiler for Python."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(os.environ.get("CXX", usual)) is not None and header.exists()


def resolve_compile(compile: Compile, device: torch.device) -> Compile:
    """Return False for ``"auto"`` where nothing can be compiled, else the argument."""
    return False if compile == "auto" and not can_compile(device) else compile


def mixes_images(network: nn.Module) -> bool:
    """Return whether a network's output for an image depends on the batch's others."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


class CompiledFunction:
    """A function of a network, a batch of images and more, compiled at the first batch.

    Networks of one architecture share a compiled function, in this process and, by torch's cache on
    disk, in later ones; it takes any number of images, or one alone. Where compiling fails, a
    warning is given, once in a process for the compiler or for that network, and the function is
    called as it is.

    Args:
        function: Takes a network, images ``(N, C, H, W)``, tensors that belong to them, and
            anything else that can be hashed, and calls torch alone.
        image_dims: For each tensor after the images, which of its dimensions has the N; None to
            compile anew for each N, where torch has no derivative for all of them.
        backend: What torch.compile compiles with.

    Attributes:
        has_failed: Whether compiling has failed; it is not tried again.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        image_dims: Sequence[int] | None = (0,),
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self.function, self.image_dims, self.backend = function, image_dims, backend
        self.has_failed = False

    def __call__(self, network: nn.Module, images: Tensor, *others: Any) -> Any:
        """Return what the function returns, but for rounding."""
        found = self.attempt(network, images, *others)
        return self.function(network, images, *others) if found is None else found

    def attempt(self, network: nn.Module, images: Tensor, *others: Any) -> Any | None:
        """Return what the compiled function does, or None where compiling fails."""
        if self.has_failed:
            return None
        device = images.device.type
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        fixed = tuple(other for other in others if not isinstance(other, Tensor))
        num_rows = len(images) if self.image_dims is None else None
        key = self.function, *_key(network, images), cast, torch.is_grad_enabled(), fixed, num_rows
        self.has_failed = _is_broken(self.backend, images, key)
        if self.has_failed:
            return None
        try:
            if self.image_dims is not None:
                own = (other for other in others if isinstance(other, Tensor))
                for values, dim in ((images, 0), *zip(own, self.image_dims, strict=False)):
                    torch._dynamo.maybe_mark_dynamic(values, dim)
            return _compiled(self.function, self.backend, key)(network, images, *others)
        except Exception as error:
            # Whatever it was, the same is computed without compiling, and raises if it must.
            self.has_failed = True
            _note_failure(error, self.backend, images, key)
            return None


def _key(network: nn.Module, images: Tensor) -> tuple[object, ...]:
    """Return what code is compiled for, but for the precision."""
    names = tuple((name, tuple(p.shape), p.dtype) for name, p in network.named_parameters())
    # The code is made for a number of threads.
    return (type(network), names, images.device, *images.shape[1:], torch.get_num_threads())


def _is_broken(backend: object, images: Tensor, key: object) -> bool:
    """Return whether a backend could compile nothing for these images' device, or not this."""
    return (backend, images.device.type) in _BROKEN or (backend, key) in _BROKEN


def _note_failure(error: Exception, backend: object, images: Tensor, key: object) -> None:
    """Warn that compiling failed, and remember it: of what it was, or of the whole compiler."""
    cause = getattr(error, "inner_exception", error)
    if type(cause).__name__ in _NO_COMPILER:
        _BROKEN.add((backend, images.device.type))
    elif not isinstance(cause, MemoryError | torch.OutOfMemoryError):
        _BROKEN.add((backend, key))
    reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
    warnings.warn(
        f"torch.compile failed ({reason}); going on without, which is slower: install a recent "
        "C++ compiler, or pass compile=False",
        HMNReplayWarning,
        stacklevel=6,
    )


class _WrongCodeError(Exception):
    """What was compiled computes something else than what it was compiled from."""


class _Checked:
    """A compiled copy of a function of a network, images and more, checked at its first call.

    On a CPU, a fault of the C++ compiler would spoil a whole training: outputs and gradients are
    compared with those of the function itself, once.

    Torch keeps what it compiled, a limited number of versions, with a function's code: copies of
    the code leave each all of them, and none to the caller's functions.
    """

    def __init__(self, function: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        self.function, self.backend = function, backend
        self._untried: list[int | None] = [None]
        if backend == "inductor":
            self._untried = [bits for bits in _VECTOR_BITS if (backend, bits) not in _BROKEN]
        self._agreed: Callable[..., Any] | None = None

    def __call__(self, network: nn.Module, images: Tensor, *others: Any) -> Any:
        """Return what the function does; raise a _WrongCodeError where no code computes it."""
        while self._agreed is None:
            if not self._untried:
                raise _WrongCodeError("its code computes something else")
            bits = self._untried.pop(0)
            compiled = self._compile(bits)
            if images.device.type != "cpu" or self._agrees(compiled, network, images, *others):
                self._agreed = compiled
            elif self._untried:  # the last one may do for another function
                _BROKEN.add((self.backend, bits))
        return self._agreed(network, images, *others)

    def _compile(self, bits: int | None) -> Callable[..., Any]:
        options: dict[str, Any] | None = None if bits is None else {"cpp.simdlen": bits}
        name = f"compiled{self.function.__name__}"
        code = self.function.__code__.replace(co_name=name)
        copy = FunctionType(code, self.function.__globals__)
        compiled: Callable[..., Any] = torch.compile(
            copy, backend=self.backend, dynamic=False, options=options
        )
        return compiled

    def _agrees(self, compiled: Callable[..., Any], network: nn.Module, *others: Any) -> bool:
        """Return whether both compute the same, but for rounding and what a network draws."""
        found, expected = (
            _outputs_and_gradients(function, 0, network, *others)
            for function in (compiled, self.function)
        )
        if all(map(_is_near, found, expected)):
            return True
        if _are_finite(expected) and not _are_finite(found):
            return False
        redrawn = _outputs_and_gradients(self.function, 1, network, *others)
        return not all(map(_is_near, redrawn, expected))


def _outputs_and_gradients(
    function: Callable[..., Any], seed: int, network: nn.Module, images: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Return all that a function of a network returns, and the gradients of its square, each flat.

    What the network draws, it draws with the seed. Generators and the network's buffers, such as
    batch normalisation's, are left as they are.
    """
    inputs = [x for x in (images, *network.parameters()) if x.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with seeded(seed, "check"):
        tree = function(network, images, *others)
    outputs = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
    learned = [x for x in outputs if x.requires_grad]
    gradients: Sequence[Tensor] = []
    if learned and inputs:
        total = torch.stack([x.float().square().sum() for x in learned]).sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return _flat(outputs), _flat(gradients)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    parts = [x.detach().float().flatten() for x in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor is another one but for rounding, as a whole. NaN is not."""
    difference = float(torch.linalg.vector_norm(found - expected))
    return difference <= _MOST_DIFFERENCE * float(torch.linalg.vector_norm(expected))


@lru_cache(_NUM_KEPT)
def _compiled(
    function: Callable[..., Any], backend: str | Callable[..., Any], key: object
) -> _Checked:
    """Return a compiled function of its own for each key."""
    return _Checked(function, backend)
