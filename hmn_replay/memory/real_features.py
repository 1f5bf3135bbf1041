"""Real features as memories, which a memory of learned ones is compared with at equal bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmn_replay.budget import Budget, as_int
from hmn_replay.data.features import FeatureSource, as_labelled_features, check_feature_shape
from hmn_replay.errors import ConfigError, DataError, MemoryFileError
from hmn_replay.extras import import_extra
from hmn_replay.memory.base import register_memory
from hmn_replay.memory.file import as_bytes
from hmn_replay.memory.real import RealMemory, join_numbers, split_numbers

__all__ = ["PQMemory", "RawFeatureMemory"]

_MAX_BITS = 8
_SUBSPACES_AT_ONCE = 2**22


class _RealFeatures(RealMemory):
    """What both kinds have in common."""

    holds_features, has_codec = True, False
    sizes_differ = False

    @staticmethod
    def check_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return a shape that features can have, or raise :class:`ConfigError`."""
        return check_feature_shape(image_shape)

    @staticmethod
    def _check_range(features: Tensor) -> None:
        """Raise a DataError where float16 holds no value like the largest one."""
        limits = torch.finfo(torch.float16)
        largest = float(features.abs().max()) if features.numel() else 0.0
        if largest and not limits.tiny <= largest <= limits.max:
            raise DataError(
                f"features up to {largest:.3g} cannot be kept in float16: scale all of them by one "
                f"number, so that the largest is between {limits.tiny:.0e} and {limits.max:,.0f}"
            )

    def _rows(self, payloads: Sequence[bytes]) -> Tensor:
        """Return payloads as uint8 ``(N, payload_bytes)``."""
        return as_bytes(b"".join(payloads)).view(len(payloads), self.payload_bytes)


@register_memory("raw-features")
class RawFeatureMemory(_RealFeatures):
    """Real features as float16; arguments as for :class:`RealMemory`."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of the features of an image."""
        return 2 * math.prod(self.image_shape)

    def encode(self, images: Tensor) -> list[bytes]:
        """Return the values of each image's features, in float16."""
        self._check_range(images)
        return [own.numpy().tobytes() for own in images.half().contiguous()]

    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        features = self._rows(payloads).view(torch.float16).float()
        if not bool(features.isfinite().all()):
            raise DataError("the file's features are not finite: it is damaged")
        return features.view(-1, *self.image_shape)


@register_memory("pq")
class PQMemory(_RealFeatures):
    """Real features by product quantisation (Jegou et al. 2011), the codebook in the file.

    The channels of a vector are cut into parts, and each part is replaced by the nearest of a few
    centroids, whose number is stored; the vectors of all positions of a map have one codebook.
    faiss finds the centroids of :meth:`train`; to encode, to decode and to load needs no faiss.

    Args:
        image_shape: ``(C, H, W)`` of features.
        num_parts: How many parts; C is a multiple of it.
        bits: Of a centroid's number, 1 to 8: there are ``2**bits`` centroids for each part.
        codebook: Float ``(num_parts, 2**bits, C / num_parts)``, kept in float16. Default: zeros.
        budget: As in :class:`RealMemory`.

    Raises:
        ConfigError: A value outside these ranges.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        num_parts: int,
        bits: int = 8,
        codebook: Tensor | None = None,
        budget: Budget | int | str | None = None,
    ) -> None:
        super().__init__(image_shape, budget=budget)
        channels = self.image_shape[0]
        parts, own_bits = as_int(num_parts) or 0, as_int(bits) or 0
        if parts < 1 or channels % parts:
            raise ConfigError(
                f"num_parts cuts {channels} channels into parts of one size; got {num_parts!r}"
            )
        if not 1 <= own_bits <= _MAX_BITS:
            raise ConfigError(f"bits is 1 to {_MAX_BITS}; got {bits!r}")
        self.num_parts, self.code_bits = parts, own_bits
        shape = (parts, 2**own_bits, channels // parts)
        codebook = torch.zeros(shape, dtype=torch.float32) if codebook is None else codebook
        self.codebook = codebook.cpu().half().float()
        if self.codebook.shape != shape or not bool(self.codebook.isfinite().all()):
            raise ConfigError(
                f"a codebook is finite floats {shape}; got {tuple(self.codebook.shape)}, or values "
                "beyond float16"
            )

    @classmethod
    def train(
        cls,
        data: FeatureSource,
        *,
        num_parts: int,
        bits: int = 8,
        budget: Budget | int | str | None = None,
        seed: int = 0,
    ) -> PQMemory:
        """Return a memory without features, whose codebook is trained on some by faiss's k-means.

        Args:
            data: The features; 2**bits positions or more; see
                :func:`hmn_replay.as_labelled_features`.
            num_parts: As the class.
            bits: As the class.
            budget: As the class.
            seed: Of the first centroids.

        Raises:
            ConfigError: As the class, or fewer positions than centroids.
            DataError: Features or labels that cannot be used.
            MissingExtraError: faiss is not installed.
        """
        data = as_labelled_features(data)
        empty = cls(data.image_shape, num_parts=num_parts, bits=bits, budget=budget)
        faiss = import_extra("faiss", "pq")
        cls._check_range(data.images)
        rows = _positions(data.images).numpy()
        if len(rows) < 2**bits:
            raise ConfigError(
                f"{2**bits} centroids are trained on as many vectors or more; got {len(rows)}: "
                "take fewer bits"
            )
        quantiser = faiss.ProductQuantizer(data.image_shape[0], empty.num_parts, empty.code_bits)
        quantiser.cp.seed = seed
        quantiser.cp.min_points_per_centroid = 1
        quantiser.train(np.ascontiguousarray(rows))
        centroids = faiss.vector_to_array(quantiser.centroids).reshape(empty.codebook.shape)
        codebook = torch.from_numpy(centroids)
        return cls(
            data.image_shape, num_parts=num_parts, bits=bits, codebook=codebook, budget=budget
        )

    @property
    def payload_bytes(self) -> int:
        """Bytes of the numbers of an image's centroids."""
        _, height, width = self.image_shape
        return math.ceil(self.num_parts * self.code_bits * height * width / 8)

    def encode(self, images: Tensor) -> list[bytes]:
        """Return the numbers of the centroids that are nearest to each image's parts."""
        self._check_range(images)
        rows = _positions(images)
        codes = torch.empty((len(rows), self.num_parts), dtype=torch.uint8)
        at_once = max(1, _SUBSPACES_AT_ONCE // self.codebook[0].numel())
        for part, centroids in enumerate(self.codebook):
            own = rows.view(len(rows), self.num_parts, -1)[:, part]
            found = [torch.cdist(some, centroids).argmin(dim=1) for some in own.split(at_once)]
            codes[:, part] = torch.cat(found)
        bits = np.unpackbits(codes.view(len(images), -1, 1).numpy(), axis=2)[..., -self.code_bits :]
        packed = np.packbits(bits.reshape(len(images), -1), axis=1)
        return [own.tobytes() for own in packed]

    def _read(self, payloads: Sequence[bytes]) -> Tensor:
        channels, height, width = self.image_shape
        count = self.num_parts * height * width
        bits = np.unpackbits(self._rows(payloads).numpy(), axis=1, count=count * self.code_bits)
        bits = bits.reshape(len(payloads), count, self.code_bits)
        weights = 1 << np.arange(self.code_bits)[::-1]
        codes = torch.from_numpy(bits @ weights).view(-1, self.num_parts)
        parts = self.codebook[torch.arange(self.num_parts), codes]
        return parts.view(-1, height, width, channels).movedim(-1, 1).contiguous()

    def header(self) -> bytes:
        """Return the codebook, float16."""
        return self.codebook.half().numpy().tobytes()

    def words(self) -> tuple[str, ...]:
        """Return shape, number of parts and bits, for the file's metadata."""
        return join_numbers(self.image_shape), str(self.num_parts), str(self.code_bits)

    @classmethod
    def _from_words(cls, words: Sequence[str], tensors: Mapping[str, Tensor]) -> PQMemory:
        shape, num_parts, bits = words
        # The codebook is as large as the words say before there is room for it.
        channels, header = check_feature_shape(split_numbers(shape))[0], tensors["header"]
        wanted = 2 * channels * 2 ** min(max(int(bits), 0), _MAX_BITS)
        if header.dtype != torch.uint8 or tuple(header.shape) != (wanted,):
            raise MemoryFileError("its codebook has another size than its words say")
        memory = cls(split_numbers(shape), num_parts=int(num_parts), bits=int(bits))
        codebook = header.clone().view(torch.float16).float().view(memory.codebook.shape)
        if not bool(codebook.isfinite().all()):
            raise MemoryFileError("its codebook is not finite")
        memory.codebook = codebook
        return memory

    def summary(self) -> dict[str, Any]:
        """Return what the memory is, as JSON types; see :meth:`Memory.summary`."""
        return {**super().summary(), "num_parts": self.num_parts, "code_bits": self.code_bits}


def _positions(features: Tensor) -> Tensor:
    """Return the vectors of all positions, ``(N H W, C)``."""
    return features.movedim(1, -1).reshape(-1, features.shape[1]).contiguous()
