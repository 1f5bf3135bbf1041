"""Room for new classes in a memory whose budget stays: which class keeps how many images.

All classes share the budget alike. New classes begin with more images than that, as the paper
condenses more than fit; in the end every class drops what is over its share, so that old classes
make room by the same double-ended pruning that new ones go through.

What all images are decoded with, the dataset memory and the decoder, is fitted to the classes of
the first call and then stays as it is. So old images keep every bit, however many classes are
added, and the work for new classes does not grow with the old ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hmn_replay.budget import Budget, largest
from hmn_replay.condensation.labelling import LabelConfig
from hmn_replay.data.images import LabelledImages, joined_names
from hmn_replay.data.lookup import Images, LabelledView, join_images, rank_in_class
from hmn_replay.memory.file import TensorSpec
from hmn_replay.memory.labels import NO_LABELS, LabelBytes
from hmn_replay.memory.layout import MemoryLayout
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.memory.names import affordable_names, stored_names_bytes

__all__ = ["Growth", "fill", "make_room"]

# However small the images of an entropy-coded memory are: more of them would be of little use.
_LEAST_COST = 0.25
# Of a budget: less than that is not filled up.
_LEAST_LEFT = 0.01


@dataclass(frozen=True, eq=False)
class Growth:
    """A memory with room for new classes, and what it takes to fill and to prune it.

    Attributes:
        memory: Old classes, then those of the data; more images than the budget holds.
        first_class: Position of the first class of the data; 0 where the memory is new.
        num_old: How many images the old classes have; they stand first.
        num_planned: How many images of planned size the budget holds, of all classes together.
        costs: For each class, how many images of planned size one of its images counts as.
        most: For each class, how many images it keeps at most.
        old_images: uint8 ``(M, C, H, W)``, what the old memory decodes to, on the CPU; features are
            float32.
        old_labels: int64 ``(M,)``, their labels.
        old_repeats: int64 ``(M,)``, how often each stands beside the new ones: images of a class
            that is renewed, until they are about as many as its new ones.
        label_bytes: About how many bytes soft labels or a labeller take.
    """

    memory: LearnedMemory
    first_class: int
    num_old: int
    num_planned: int
    costs: tuple[float, ...]
    most: tuple[int, ...]
    old_images: Images
    old_labels: Tensor
    old_repeats: Tensor
    label_bytes: LabelBytes = NO_LABELS

    def planned_labels(self, num_images: int) -> dict[str, TensorSpec]:
        """Return about what the file will have of the labels of so many images."""
        count = self.label_bytes.of(num_images)
        return {"label_code": TensorSpec(torch.uint8, (count,))} if count else {}

    def drops(self, num_images: int | None = None) -> list[int]:
        """Return how many images each class that has any drops, in the memory's order.

        Args:
            num_images: How many of planned size would fit. Default: :attr:`num_planned`.
        """
        held, size = self.memory.images_per_class, self.memory.layout.group_size
        num_groups = (self.num_planned if num_images is None else num_images) // size
        kept = share_groups(num_groups, [count // size for count in self.most], self.costs)
        return [count - size * own for count, own in zip(held, kept, strict=True) if count]

    @property
    def num_most(self) -> int:
        """The number of images, as :meth:`drops` takes it, from which on no more are kept."""
        return math.ceil(sum(n * c for n, c in zip(self.most, self.costs, strict=True)))

    @property
    def old_drops(self) -> int:
        """How many images the old classes drop in all, as planned."""
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
    memory_type: type[LearnedMemory],
    layout: MemoryLayout,
    old: LearnedMemory | None = None,
    labels: LabelConfig | None = None,
    seed: int = 0,
    device: torch.device,
) -> Growth:
    """Return a memory with images for the classes of ``data``, not fitted to them yet.

    No class gets more images than there are real ones of it, or one group of images that share
    stored values.

    Args:
        data: Images of the new classes. A class that the old memory has is renewed: it is added as
            a new one, with its old images beside the real ones to be fitted to.
        budget: Of the memory in the end.
        over_budget: Share of images beyond what fits.
        memory_type: The memory kind; that of ``old``, where there is one.
        layout: Of the memory; that of ``old``, where there is one.
        old: The memory to add to; it is left as it is.
        labels: What labels the memory will have. Default: hard ones, and those of old images.
        seed: Of initial values.
        device: Where the memory goes.

    Raises:
        BudgetError: The budget does not hold one image of each class, old and new.
        ConfigError: More classes than a memory may have.
        DataError: A label that has another name in ``data`` than in the old memory.
    """
    old_labels = [] if old is None else old.classes.tolist()
    new_labels = data.classes.tolist()
    again = sorted(set(new_labels).intersection(old_labels))
    stay = [label for label in old_labels if label not in again]
    first_class, classes = len(stay), [*stay, *new_labels]
    size, limit = layout.group_size, budget.num_bytes
    names = joined_names({} if old is None else old.class_names, data.class_names)
    names = affordable_names(names, classes, limit)
    names_bytes = stored_names_bytes(names, classes)
    labels = labels or LabelConfig()
    if old is not None and old.has_soft_labels and labels.labels == "hard":
        labels = LabelConfig(labels="soft")
    label_bytes = labels.planned_bytes(layout.image_shape, len(classes))
    num_planned = memory_type.max_images(layout, limit, classes, names_bytes, label_bytes)
    held = {} if old is None else dict(zip(old_labels, old.images_per_class, strict=True))
    # A class that is renewed is fitted to its old images too.
    real = {label: len(data.of_class(label)) + held.get(label, 0) for label in new_labels}
    most = [held[label] // size for label in stay]
    most += [max(1, real[label] // size) for label in new_labels]
    costs = [1.0] * len(classes)
    if old is not None and first_class and layout.is_coded:
        costs[:first_class] = _costs(old, stay)
        # New images are taken to be as large as the old ones, so that a class has as many of both.
        costs[first_class:] = [sum(costs[:first_class]) / first_class] * len(new_labels)
    shares = share_groups(num_planned // size, most, costs)
    # Without another class there is no margin to prune by.
    over = over_budget * sum(shares) / len(classes) if len(classes) > 1 else 0
    counts = [
        size * min(share + math.ceil(over), own)
        for share, own in zip(shares[first_class:], most[first_class:], strict=True)
    ]
    # No old class keeps more than a new one of which there are more real images than that, but for
    # the one group more that it has where the number cannot be divided.
    bounded = [
        count * cost
        for count, cost, own in zip(counts, costs[first_class:], most[first_class:], strict=True)
        if count < size * own
    ]
    kept_at_most = [
        size * min(own, max(share, math.ceil(max(bounded) / cost / size)) if bounded else own)
        for share, own, cost in zip(
            shares[:first_class], most[:first_class], costs[:first_class], strict=True
        )
    ]
    if old is None or not first_class:
        memory = memory_type(layout, new_labels, counts, seed=seed).to(device)
    else:
        memory = copy.deepcopy(old).to(device).requires_grad_(True)
        memory.budget_bytes, memory.report = None, {}
        if again:
            memory.remove(again)
        memory.add_classes(new_labels, counts, seed=seed)
        memory.freeze_shared()
    memory.class_names = names
    old_images: Images = data.images[:0]
    old_labels_of = data.labels[:0]
    if old is not None:
        old_images = old.decoded(old.value_dtype).to(torch.device("cpu"))
        old_labels_of = old.labels.cpu()
    repeats = torch.ones_like(old_labels_of)
    for label in again:
        ours = old_labels_of == label
        repeats[ours] = max(1, len(data.of_class(label)) // max(1, int(ours.sum())))
    return Growth(
        memory,
        first_class,
        sum(memory.images_per_class[:first_class]),
        num_planned,
        tuple(costs),
        (*kept_at_most, *counts),
        old_images,
        old_labels_of,
        repeats,
        label_bytes,
    )


def share_groups(num_groups: int, most: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Return how many groups of images each class keeps where all share a number alike.

    Classes that have fewer than their share leave the rest to the others. Of two classes that share
    alike, the first keeps one more where the number cannot be divided. A class that has any keeps
    one at least, though there be no room for it.

    Args:
        num_groups: How many groups of planned size there is room for, in all.
        most: For each class, how many groups it can keep.
        costs: For each class, how many groups of planned size one of its groups counts as.
    """

    def kept(level: int) -> list[int]:
        shares = (max(1, math.floor(level / cost)) for cost in costs)
        return [min(own, share) for own, share in zip(most, shares, strict=True)]

    def takes(counts: Sequence[int]) -> float:
        return sum(count * cost for count, cost in zip(counts, costs, strict=True))

    highest = max(most, default=0) * math.ceil(max(costs, default=1.0))
    level = largest(0, highest, lambda tried: takes(kept(tried)) <= num_groups)
    counts = kept(level)
    left = num_groups - takes(counts)
    for position, (own, cost) in enumerate(zip(most, costs, strict=True)):
        # A little is added for sums of quotients that fall short of whole numbers.
        if counts[position] < own and counts[position] * cost <= level and cost <= left + 1e-9:
            counts[position] += 1
            left -= cost
    return counts


@torch.no_grad()
def fill(
    memory: LearnedMemory,
    budget_bytes: int,
    first_class: int,
    more: Sequence[Tensor],
    real_images: Callable[[Tensor], Tensor],
    *,
    planned_labels: Callable[[int], dict[str, TensorSpec]] | None = None,
    label: Callable[[LearnedMemory, Tensor, Tensor], None] | None = None,
) -> LearnedMemory:
    """Return a memory with further images for the bytes that a budget has left.

    Images of an entropy-coded memory may have come to take fewer bytes than was planned for them.
    Those that are added are encoded for the decoder as it is, and not matched.

    Args:
        memory: An entropy-coded memory within its budget; it is left as it is.
        budget_bytes: Of the file.
        first_class: The classes before it get no more images.
        more: For each class from there on, which real images it may get, in their order: int64,
            what ``real_images`` takes.
        real_images: From these to the images, float32 ``(B, C, H, W)`` in [0, 1], on the CPU.
        planned_labels: From a number of images to what the file will have of their labels; see
            :meth:`Growth.planned_labels`. Default: None, what it has of them.
        label: Gives images of a memory soft labels, in place: from the memory, their positions and
            the real images that they come from. Default: None, added images have hard labels.

    Returns:
        The given memory where it is full, where there are no more real images, or where its kind
        encodes none; see :meth:`hmn_replay.LearnedMemory.set_images`.
    """

    def takes(tried: LearnedMemory) -> int:
        labels = None if planned_labels is None else planned_labels(tried.num_images)
        return tried.file_bytes_with(tried.num_images, tried.code_bytes, budget_bytes, labels)

    left = budget_bytes - takes(memory)
    new = (memory.class_index >= first_class).nonzero().flatten()
    size = memory.layout.group_size
    if left <= _LEAST_LEFT * budget_bytes or not len(new):
        return memory
    image_bytes = max(1 / 64, float(memory.rate(new)[0]) / 8)
    # Twice as many as would take what is left, where images are as large as they were.
    num_groups = math.ceil(2 * left / (image_bytes * size))
    most = [len(own) // size for own in more]
    # And one each, for those classes that have one less.
    shares = share_groups(num_groups + len(most), most, [1.0] * len(most))
    wanted = [0] * first_class + [size * share for share in shares]
    tried = copy.deepcopy(memory)
    added = tried.add_images(wanted)
    sources = torch.full((tried.num_images,), -1)
    parts = [own[:count] for own, count in zip(more, wanted[first_class:], strict=True)]
    sources[added] = torch.cat(parts)
    if not len(added) or not tried.set_images(added, lambda chosen: real_images(sources[chosen])):
        return memory
    if label is not None:
        label(tried, added, sources[added])
    is_added = torch.zeros(tried.num_images, dtype=torch.bool).index_fill(0, added, True)
    places = rank_in_class(tried.class_index.cpu())[added]
    turns = added[(places // size).argsort(stable=True)]

    def with_added(num_images: int) -> LearnedMemory:
        kept = torch.cat([(~is_added).nonzero().flatten(), turns[:num_images]])
        filled = copy.deepcopy(tried)
        filled.keep(kept)
        return filled

    num_added = largest(
        0, len(added) // size, lambda groups: takes(with_added(size * groups)) <= budget_bytes
    )
    return with_added(size * num_added) if num_added else memory


@torch.no_grad()
def _costs(old: LearnedMemory, classes: Sequence[int]) -> list[float]:
    """Return how many images of planned size an image of each class counts as.

    Entropy-coded images may take more or less than was planned; every class has its share of the
    bytes.
    """
    planned_bits = 8 * old.planned_image_bytes(old.layout)
    costs = []
    for label in classes:
        own = (old.labels == label).nonzero().flatten()
        image_bits = float(old.rate(own)[0]) if len(own) else planned_bits
        costs.append(max(_LEAST_COST, image_bits / planned_bits))
    return costs
