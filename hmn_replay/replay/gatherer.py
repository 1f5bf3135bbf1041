"""Gathering: of images that come in pieces, a random sample of each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hmn_replay.data.features import LabelledFeatures
from hmn_replay.data.images import LabelledImages, joined_names
from hmn_replay.data.lookup import first_in_turn
from hmn_replay.errors import CheckpointError, DataError
from hmn_replay.runtime import make_generator

__all__ = ["Gatherer"]


class Gatherer:
    """Gathers images that come in pieces: of every class, a random sample.

    Each image has a random priority, and the classes take turns in keeping their image of lowest
    priority. So a class with fewer images than its share keeps them all, and each image of another
    class has the same chance to be kept. Adding images costs time in proportion to how many are
    kept, and a sort of their priorities where the gatherer is full.

    Args:
        capacity: Images kept at most, 1 or more; but one of each class at least.
        seed: Seed of the priorities.

    Attributes:
        num_seen: For each label, how many of its images were added.
        class_names: Label to name, where the images came with names.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seed = capacity, seed
        self.clear()

    def __len__(self) -> int:
        return len(self._images)

    def clear(self) -> None:
        """Begin anew."""
        self.num_seen: Counter[int] = Counter()
        self.class_names: dict[int, str] = {}
        # One tensor an image: one is replaced without a copy of the others.
        self._images: list[Tensor] = []
        # One tensor a piece, joined where the gatherer is full or asked for what it has.
        self._labels = [torch.empty(0, dtype=torch.int64)]
        self._priorities = [torch.empty(0, dtype=torch.float32)]

    def add(self, data: LabelledImages) -> None:
        """Add images or features, and drop what is beyond the capacity.

        Raises:
            DataError: They are of another size than those before, or a label has another name; none
                is added.
        """
        if self._images and self._images[0].shape != data.images.shape[1:]:
            raise DataError(
                f"images of {tuple(self._images[0].shape)} were gathered before, and what comes is "
                f"of {data.image_shape}; all must have the same (C, H, W)"
            )
        names = joined_names(self.class_names, data.class_names)
        generator = make_generator(self.seed, "raw buffer", self.num_seen.total())
        drawn = torch.rand(len(data), dtype=torch.float32, generator=generator)
        if len(self) + len(data) <= self.capacity:
            self._images += [data.images[i].clone() for i in range(len(data))]
            self._labels.append(data.labels.clone())
            self._priorities.append(drawn)
        else:
            labels = torch.cat([*self._labels, data.labels])
            priorities = torch.cat([*self._priorities, drawn])
            count = max(self.capacity, len(labels.unique()))
            kept = first_in_turn(labels, priorities)[:count].sort().values
            num_old = len(self)
            self._images = [
                self._images[i] if i < num_old else data.images[i - num_old].clone()
                for i in kept.tolist()
            ]
            self._labels, self._priorities = [labels[kept]], [priorities[kept]]
        self.num_seen.update(data.labels.tolist())
        self.class_names = names

    def images(self) -> LabelledImages | None:
        """Return the images that are kept; None where there is none."""
        if not self._images:
            return None
        labels = torch.cat(self._labels)
        names = {label: name for label, name in self.class_names.items() if label in labels}
        return _labelled(torch.stack(self._images), labels, names)

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered, as tensors and names."""
        seen = torch.tensor(sorted(self.num_seen.items()), dtype=torch.int64).view(-1, 2)
        images = torch.stack(self._images) if self._images else torch.empty(0, dtype=torch.uint8)
        return {
            "images": images,
            "labels": torch.cat(self._labels),
            "priorities": torch.cat(self._priorities),
            "seen": seen,
            "class_names": dict(self.class_names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            CheckpointError: It is something else.
        """
        images, labels, priorities, seen = (
            state[name].cpu() for name in ("images", "labels", "priorities", "seen")
        )
        for name, tensor, dtype, shape in (
            ("labels", labels, torch.int64, (len(images),)),
            ("priorities", priorities, torch.float32, (len(images),)),
            ("seen", seen, torch.int64, (len(seen), 2)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise CheckpointError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}")
        names = state["class_names"]
        if not isinstance(names, dict) or not all(
            isinstance(label, int) and isinstance(name, str) for label, name in names.items()
        ):
            raise CheckpointError(f"class_names are {names!r:.60}")
        if len(images):
            _labelled(images, labels, {})  # which checks them
        if int((seen[:, 1] < 0).sum()):
            raise CheckpointError("less than no images were seen")
        self.num_seen = Counter({label: count for label, count in seen.tolist()})
        self.class_names = dict(names)
        self._images = [image.clone() for image in images]
        self._labels, self._priorities = [labels.clone()], [priorities.clone()]


def _labelled(images: Tensor, labels: Tensor, names: dict[int, str]) -> LabelledImages:
    kind = LabelledFeatures if images.is_floating_point() else LabelledImages
    return kind(images, labels, names)
