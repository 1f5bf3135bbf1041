"""Current images shown as a memory would give them back (CIM-CIL, Wang et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmn_replay.avalanche.streams import Normalization
from hmn_replay.errors import ConfigError
from hmn_replay.memory import Memory
from hmn_replay.memory.base import Codec

__all__ = ["Recoder", "no_codec"]


class Recoder:
    """Encodes and decodes some images of a mini-batch, by the codec of a memory.

    The codec of the memory that it was last given is kept, and made anew for another.
    """

    def __init__(self) -> None:
        self._last: tuple[Memory, Codec] | None = None

    def __call__(
        self,
        images: Tensor,
        share: float,
        memory: Memory,
        normalization: Normalization | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return a mini-batch, some of its images as the memory would give them back.

        Args:
            images: float ``(N, C, H, W)``, normalised.
            share: Probability in [0, 1] of each image to be one of these.
            memory: The memory.
            normalization: How the images are normalised; None for images in [0, 1].
            generator: Generator of the draws, on the CPU.

        Raises:
            ConfigError: The memory has no codec.
        """
        draws = torch.rand(len(images), generator=generator, dtype=torch.float32)
        chosen = (draws < share).nonzero().flatten().to(images.device)
        codec = self._codec_of(memory)
        if not len(chosen):
            return images
        shown = images[chosen]
        pixels = (shown if normalization is None else normalization.undo(shown)).clamp(0, 1)
        coded = codec(pixels.float().mul(255).round().to(torch.uint8).cpu())
        coded = coded.to(images.device).to(images.dtype) / 255
        coded = coded if normalization is None else normalization.apply(coded)
        return images.index_copy(0, chosen, coded)

    def _codec_of(self, memory: Memory) -> Codec:
        if self._last is None or self._last[0] is not memory:
            codec = memory.codec()
            if codec is None:
                raise no_codec(memory)
            self._last = (memory, codec)
        return self._last[1]

    def __getstate__(self) -> dict[str, Any]:
        """Return what is kept with a plugin: nothing, a codec is made in no time."""
        return {"_last": None}


def no_codec(owner: object) -> ConfigError:
    """Return the error for a memory, or a keeper of memories, without a codec."""
    kind = getattr(owner, "kind", type(owner).__name__)
    return ConfigError(
        f"recode_share is for memories with a codec, such as hmn and jpeg; {kind!r} has none: "
        "leave it out"
    )
