"""Room for new classes in a memory whose budget stays: who gets how many images.

All classes share the budget alike. New classes are added with more images than that, as the paper
condenses more than fit; in the end every class gives up what is over its share, so that old classes
make room by the same double-ended pruning that new ones go through.

What all images are decoded with, the dataset memory and the decoder, is fitted to the classes of
the first call and then stays as it is. Old images so keep every bit, however many classes come, and
the work for new classes does not grow with the old ones. The other way, to let it learn on with
half of each batch from the old decoded images, gave no better images, and old ones drifted. Warm
start of 1,480 images of ten classes of CIFAR-100 after ten others (300 KiB, int8):

==================  =====  ============  =============
shared tensors      steps  new images    old images to
                           to real ones  what they were
==================  =====  ============  =============
stay as they are      300  22.2 dB       the same bits
stay as they are    1,500  23.2 dB       the same bits
learn on              300  21.8 dB       34.5 dB
learn on            1,500  23.1 dB       36.7 dB
==================  =====  ============  =============

The first ten classes came to 23.9 dB in 1,500 steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.lookup import Images, LabelledView, join_images
from hmn_replay.memory.base import Container
from hmn_replay.memory.container_layout import ContainerLayout
from hmn_replay.memory.registry import make_container

__all__ = ["Growth", "make_room"]


@dataclass(frozen=True, eq=False)
class Growth:
    """A memory with room for new classes, and what it takes to fill and to prune it.

    Attributes:
        memory: Old classes, then those of the data; more images than the budget holds.
        first_class: Position of the first class of the data; 0 where the memory is new.
        num_old: How many images the old classes have; they come first.
        num_planned: How many images the budget is planned for, of all classes.
        old_images: uint8 ``(M, C, H, W)``, what the old memory decodes to, on the CPU.
        old_labels: int64 ``(M,)``, their labels.
        old_repeats: int64 ``(M,)``, how often each stands beside the new ones: images of a class
            that comes again until they are about as many as its new ones.
    """

    memory: Container
    first_class: int
    num_old: int
    num_planned: int
    old_images: Images
    old_labels: Tensor
    old_repeats: Tensor

    def drops(self, num_images: int | None = None) -> list[int]:
        """Return how many images each class that has any gives up, in the memory's order.

        Args:
            num_images: How many would stay if every class had its share. Default: as planned.
        """
        held, size = self.memory.images_per_class, self.memory.layout.group_size
        num_groups = (self.num_planned if num_images is None else num_images) // size
        shares = _shares(num_groups, len(held), size)
        return [max(0, count - share) for count, share in zip(held, shares, strict=True) if count]

    @property
    def num_most(self) -> int:
        """How many images may stay while classes that have any share alike."""
        held = [count for count in self.memory.images_per_class if count]
        return max(self.num_planned, min(held) * self.memory.num_classes)

    @property
    def old_drops(self) -> int:
        """How many images the old classes are to give up in all, as planned."""
        old = self.memory.images_per_class[: self.first_class]
        return sum(self.drops()[: sum(count > 0 for count in old)])

    def pool(self, data: LabelledImages, positions: Tensor | None = None) -> LabelledView:
        """Return images of ``data`` and the old ones, to learn from together; nothing is copied.

        Args:
            data: The images that the memory was made for.
            positions: Those of them to learn from; all where None.
        """
        new = torch.arange(len(data)) if positions is None else positions
        old = torch.arange(len(self.old_labels)).repeat_interleave(self.old_repeats)
        images = join_images([data.images, self.old_images])
        labels = torch.cat([data.labels[new], self.old_labels[old]])
        return LabelledView(images.take(torch.cat([new, len(data) + old])), labels)


def make_room(
    data: LabelledImages,
    budget: Budget,
    over_budget: float,
    *,
    layout: ContainerLayout,
    old: Container | None = None,
    seed: int = 0,
    device: torch.device,
) -> Growth:
    """Return a memory with images for the classes of ``data``, not fitted to them yet.

    Args:
        data: Images of the new classes. A class that the old memory has comes as a new one, with
            its old images beside the real ones to be fitted to.
        budget: Of the memory in the end.
        over_budget: Share of images beyond what fits.
        layout: Of the memory; that of ``old``, where there is one.
        old: The memory to add to; it is left as it is.
        seed: Of initial values.
        device: Where the memory goes.

    Raises:
        BudgetError: The budget does not hold one image of each class, old and new.
        ConfigError: More classes than a memory may have.
    """
    old_labels = [] if old is None else old.classes.tolist()
    again = sorted(set(data.classes.tolist()).intersection(old_labels))
    first_class = len(old_labels) - len(again)
    num_classes = first_class + data.num_classes
    size = layout.group_size
    num_groups = layout.max_images(budget, num_classes) // size
    shares = _shares(num_groups, num_classes, size)
    # Without another class there is no margin to prune by.
    num_over = size * math.ceil(over_budget * num_groups / num_classes) if num_classes > 1 else 0
    counts = [share + num_over for share in shares[first_class:]]
    if old is None or not first_class:
        memory = make_container(layout, data.classes, counts, seed=seed).to(device)
    else:
        memory = copy.deepcopy(old).to(device).requires_grad_(True)
        memory.budget_bytes, memory.report = None, {}
        if again:
            memory.remove(again)
        memory.extend(data.classes, counts, seed=seed)
        memory.freeze_shared()
    held = memory.images_per_class
    old_images: Images = data.images[:0]
    labels = data.labels[:0]
    if old is not None:
        old_images = old.decoded(torch.uint8).to(torch.device("cpu"))
        labels = old.labels.cpu()
    repeats = torch.ones_like(labels)
    for label in again:
        ours = labels == label
        repeats[ours] = max(1, len(data.of_class(label)) // max(1, int(ours.sum())))
    num_old = sum(held[:first_class])
    planned = size * num_groups
    return Growth(memory, first_class, num_old, planned, old_images, labels, repeats)


def _shares(num_groups: int, num_classes: int, size: int) -> list[int]:
    """Return the images of each class where all share alike, the first having more."""
    fair, extra = divmod(num_groups, num_classes)
    return [size * (fair + (position < extra)) for position in range(num_classes)]
