"""Raw images of an experience that comes in pieces: a bounded sample, and where it ends.

An online stream gives a few images at a time, and need not say where an experience begins. Its
images are gathered here until the next experience is seen to have begun.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import DataError
from hmn_replay.runtime import make_generator

__all__ = ["Gatherer", "RawBuffer"]

# How improbable it must be that an experience goes on, for it to be taken as ended.
_DOUBT = 0.001


class RawBuffer:
    """Keeps up to ``capacity`` of the images it was given: a random sample of every class.

    Each image has a random priority, and the classes take turns in keeping their image of lowest
    priority. So a class with fewer images than its share keeps them all, and each image of another
    class has the same chance to be kept. Adding images costs time in proportion to their number,
    and a sort of the priorities where the buffer is full.

    Args:
        capacity: Images kept at most, 1 or more.
        seed: Of the priorities.

    Attributes:
        num_seen: For each label, how many of its images were added.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seed = capacity, seed
        self.num_seen: Counter[int] = Counter()
        # One tensor an image: one is replaced without a copy of the others.
        self._images: list[Tensor] = []
        self._labels = torch.empty(0, dtype=torch.int64)
        self._priorities = torch.empty(0)

    def __len__(self) -> int:
        return len(self._images)

    def add(self, data: LabelledImages) -> None:
        """Add images, uint8 ``(N, C, H, W)``, and drop what is beyond the capacity."""
        generator = make_generator(self.seed, "raw buffer", self.num_seen.total())
        priorities = torch.cat([self._priorities, torch.rand(len(data), generator=generator)])
        labels = torch.cat([self._labels, data.labels])
        kept = torch.arange(len(labels))
        if len(labels) > self.capacity:
            kept = _first_in_turn(labels, priorities)[: self.capacity].sort().values
        num_old = len(self)
        self._images = [
            self._images[i] if i < num_old else data.images[i - num_old].clone()
            for i in kept.tolist()
        ]
        self._labels, self._priorities = labels[kept], priorities[kept]
        self.num_seen.update(data.labels.tolist())

    def images(self) -> LabelledImages:
        """Return the images that are kept; there must be one."""
        return LabelledImages(torch.stack(self._images), self._labels)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the buffer holds, as tensors."""
        seen = torch.tensor(sorted(self.num_seen.items()), dtype=torch.int64).view(-1, 2)
        images = torch.stack(self._images) if self._images else torch.empty(0, dtype=torch.uint8)
        return {
            "images": images,
            "labels": self._labels,
            "priorities": self._priorities,
            "seen": seen,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            DataError: The tensors are not those of a buffer.
        """
        try:
            images, labels, priorities, seen = (
                state[name] for name in ("images", "labels", "priorities", "seen")
            )
            if not len(images) == len(labels) == len(priorities) <= self.capacity:
                raise DataError("they differ in number, or are more than the capacity")
            if len(images):
                LabelledImages(images, labels)
            self.num_seen = Counter({label: count for label, count in seen.tolist()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not the gathered images of an experience: {error}") from error
        self._images = [image.clone() for image in images]
        self._labels, self._priorities = labels, priorities


class Gatherer:
    """Gathers the pieces of one experience after another.

    Where a piece does not say whether it is an experience's first, its classes tell: an experience
    has ended when images come whose classes are all new to it, and too many of them for that to be
    chance. With K classes seen among n images, (K + 1) / (n + 1) is taken for the chance that the
    next image of the same experience is of a class not yet seen: more than the estimate of Good
    (1953), who has in K's place the number of classes seen exactly once. When this, to the power of
    the number of images that came of new classes alone, is below 0.001, the experience has ended.
    Until then these images wait. So an experience that brings classes of the one before it is taken
    as its continuation, and has to be told.

    Args:
        capacity: Images kept at most of an experience.
        seed: Of the choice of images.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seed = capacity, seed
        self._gathered, self._waiting = self._empty(), self._empty()

    def __len__(self) -> int:
        return len(self._gathered) + len(self._waiting)

    def add(self, piece: LabelledImages, *, is_first: bool | None = None) -> LabelledImages | None:
        """Take a piece.

        Args:
            piece: Its images.
            is_first: Whether it is the first of its experience; None where that is not known.

        Returns:
            The images of the experience before it, where that has ended; else None.
        """
        if is_first is not None:
            ended = self.images() if is_first else None
            if is_first:
                self.clear()
            self._gathered.add(piece)
            return ended
        seen = self._gathered.num_seen
        chance = (len(seen) + 1) / (seen.total() + 1)
        if chance > 0.5 or seen.keys() & set(piece.labels.tolist()):
            if len(self._waiting):
                self._gathered.add(self._waiting.images())
                self._waiting = self._empty()
            self._gathered.add(piece)
            return None
        self._waiting.add(piece)
        if chance ** self._waiting.num_seen.total() >= _DOUBT:
            return None
        ended = self._gathered.images()
        self._gathered, self._waiting = self._waiting, self._empty()
        return ended

    @property
    def num_seen(self) -> Counter[int]:
        """For each label, how many of its images were added since an experience last ended."""
        return self._gathered.num_seen + self._waiting.num_seen

    def images(self) -> LabelledImages | None:
        """Return all that was gathered since an experience last ended; None where nothing was."""
        if len(self._waiting):
            self._gathered.add(self._waiting.images())
            self._waiting = self._empty()
        return self._gathered.images() if len(self._gathered) else None

    def clear(self) -> None:
        """Begin anew."""
        self._gathered, self._waiting = self._empty(), self._empty()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was gathered, as tensors."""
        return {
            f"{name}.{key}": value
            for name, buffer in self._buffers().items()
            for key, value in buffer.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            DataError: The tensors are not those of a gatherer.
        """
        for name, buffer in self._buffers().items():
            prefix = f"{name}."
            buffer.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )

    def _buffers(self) -> dict[str, RawBuffer]:
        return {"gathered": self._gathered, "waiting": self._waiting}

    def _empty(self) -> RawBuffer:
        return RawBuffer(self.capacity, self.seed)


def _first_in_turn(labels: Tensor, priorities: Tensor) -> Tensor:
    """Order images so that the classes take turns, each with its lowest priority first."""
    order = priorities.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    _, counts = labels[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    turns = torch.arange(len(labels)) - starts
    # The last sort is stable, and would favour the lowest labels in the last turn.
    shuffled = priorities[order].argsort(stable=True)
    return order[shuffled][turns[shuffled].argsort(stable=True)]
