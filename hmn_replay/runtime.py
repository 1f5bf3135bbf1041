"""Devices and random numbers: every draw comes from a seed and a name, none from global state."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from hmn_replay.errors import ConfigError

__all__ = ["derive_seed", "has_native_bfloat16", "make_generator", "resolve_device", "seeded"]


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"`` into the best device present, and check any other name.

    Args:
        device: ``"auto"`` (CUDA, then MPS, then CPU), or anything :class:`torch.device` takes.

    Raises:
        ConfigError: The name is unknown, or the device is not present.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"device {str(device)!r} cannot be used ({reason}); pass 'auto', 'cpu' or 'cuda'"
        ) from error
    return resolved


def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware, rather than by way of float32.

    On a CPU whose torch does not tell (before torch 2.9), the answer is no.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def derive_seed(seed: int, *names: int | str) -> int:
    """Return the 63-bit seed of one named draw.

    A draw that depends only on the run's seed and on its own name (say ``"match", step``) needs no
    generator state in a checkpoint, and does not move when another draw is added beside it.
    """
    digest = hashlib.blake2b(repr((int(seed), *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(seed: int, *names: int | str) -> torch.Generator:
    """Return a CPU generator for one named draw; see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextlib.contextmanager
def seeded(seed: int, *names: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block, and restore it afterwards.

    For code that draws from the global generator only, such as module initialisation on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *names))
        yield
