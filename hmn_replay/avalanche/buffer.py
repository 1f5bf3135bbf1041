"""A memory's images as Avalanche takes them: in mini-batches, and as a buffer of exemplars.

:class:`MemoryBuffer` is a storage policy for methods that replay from a buffer of their own:

    buffer = MemoryBuffer(HMNReplay("300 KiB"))
    plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from avalanche.benchmarks.utils import (
    AvalancheDataset,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.models.utils import avalanche_forward
from avalanche.training.storage_policy import ExemplarsBuffer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hmn_replay.avalanche.streams import Normalization, class_counts, split_class_keys
from hmn_replay.budget import as_int
from hmn_replay.data.lookup import as_floats, images_at_once
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.memory import Memory
from hmn_replay.replay import DecodedImages
from hmn_replay.replay.store import digest_memory
from hmn_replay.runtime import without_autocast
from hmn_replay.training.networks import evaluating

if TYPE_CHECKING:
    from hmn_replay.avalanche.plugin import MemoryReplay

__all__ = [
    "MemoryBuffer",
    "add_to_minibatch",
    "as_avalanche_dataset",
    "count_labels",
    "finish_images",
]


class MemoryBuffer(ExemplarsBuffer):
    """A memory as a storage policy of Avalanche: for ReplayPlugin, GDumb, ER-ACE, DER and others.

    :attr:`buffer` is the memory's decoded images, normalised as the benchmark normalises them,
    without its train transforms; ``replay_transform`` of the plugin augments them, and has to draw
    from the global generators where a loader's workers read them: each worker has a copy of a
    generator of its own, all at the same place. Items are ``(image, label)``, or ``(image, label,
    task label)`` where the benchmark's are.

    ``ReplayPlugin`` takes it as ``storage_policy``; to methods that make a buffer of their own it
    is given afterwards: ``plugin.storage_policy = MemoryBuffer(...)``. What Avalanche's code
    allows:

    * ReplayPlugin, GDumb and RAR work on every benchmark, ``task_balanced_dataloader=True`` on
      those with task labels.
    * ER-ACE and MIR read a task label from every item of the buffer: pass ``task_labels=True``
      where the benchmark has none. (MIR fails with ``eval_every`` above 0, whatever its buffer.)
    * DER, with ``logits=True``, ER-AML, MER (``strategy.buffer.storage_policy``) and SCR
      (``strategy.replay_plugin.storage_policy``) work on benchmarks with task labels alone.
    * ER-ACE, DER and MIR replay nothing while the buffer is smaller than their ``batch_size_mem``.
    * BiC does not run with the versions of torch that this package needs; methods that store
      features or gradients in place of images have no use for it.

    Args:
        replay: What makes the memory: a replay plugin such as ``HMNReplay("300 KiB")``, which is
            not to be among the strategy's plugins too. Its options that concern training are not
            used (``loss``, ``batch_size_mem``, ``mode``) or refused (``distill``, ``tune``,
            ``recode_share``, ``labels``); its ``memory``, ``report``, ``finish()`` and
            ``state_dict()`` are what they always are.
        max_size: Images in the buffer at most; more of the memory's are left out, of every class
            alike. Default: None, no bound but the memory's own in bytes.
        task_labels: Whether items have a task label (0, where the stream has none). Default: None,
            where the stream's items have one.
        logits: Whether items end in the logits that the strategy's network gave when the memory
            was made, which DER replays. They are computed from the decoded images, kept in working
            memory, and not part of the memory's file or budget.

    Attributes:
        replay: As given.
        max_size: As given, ``sys.maxsize`` for no bound.
    """

    def __init__(
        self,
        replay: MemoryReplay,
        *,
        max_size: int | None = None,
        task_labels: bool | None = None,
        logits: bool = False,
    ) -> None:
        limit = sys.maxsize if max_size is None else as_int(max_size) or 0
        super().__init__(limit)
        if limit < 1:
            raise ConfigError(
                f"max_size must be a whole number of 1 or more, or None; got {max_size!r}"
            )
        if not hasattr(replay, "store"):
            raise ConfigError(
                f"a MemoryBuffer is of a plugin, such as HMNReplay('300 KiB'); got {replay!r:.80}"
            )
        if replay.labels != "hard":
            raise ConfigError(
                "a method that replays from a buffer learns classes alone: leave labels out"
            )
        if replay.holds_features:
            raise ConfigError(
                "a buffer stands beside images in a method's mini-batches, which a memory of "
                "features cannot: use the plugin itself"
            )
        self.replay, self.task_labels, self.needs_logits = replay, task_labels, logits
        unused = {
            "distill": bool(replay.distill),
            "recode_share": bool(replay.recode_share),
            "tune": replay.tune != "none",
        }
        for name, is_given in unused.items():
            if is_given:
                raise ConfigError(
                    f"{name} is for a plugin, which sees the training; a method that replays from "
                    "a buffer has its own: leave it out"
                )
        if getattr(replay, "matching_networks", None) == "own":
            raise ConfigError(
                'matching_networks="own" is for a plugin, which sees the network from the '
                "first; a buffer does not: leave it out"
            )
        self._logits: Tensor | None = None
        self._logits_of = b""
        self._made_for: tuple[Any, ...] = ()

    @property  # type: ignore[misc]
    def buffer(self) -> AvalancheDataset[Any]:
        """The memory's images; none before the first experience."""
        memory = self.replay.memory
        if memory is None:
            return AvalancheDataset([])
        now = (memory, self.max_size, self.replay.found_normalization, self._logits)
        # Compared by identity: a memory has no equality.
        if len(self._made_for) != len(now) or any(
            a is not b for a, b in zip(self._made_for, now, strict=True)
        ):
            if self.needs_logits and len(memory) and self._logits_of != digest_memory(memory):
                raise ConfigError(
                    "the logits are of another memory than the plugin has now, as after finish() "
                    "or load_state_dict(): call resize(strategy, max_size), which makes them anew"
                )
            self._buffer = self._dataset(memory, self.replay.replay_transform, self._logits)
            self._made_for = now
        return self._buffer

    def _dataset(
        self,
        memory: Memory,
        transform: Callable[[Tensor], Tensor] | None = None,
        logits: Tensor | None = None,
    ) -> Any:
        return as_avalanche_dataset(
            DecodedImages.of(memory, torch.device("cpu")).first(self.max_size),
            self.replay.found_normalization,
            transform,
            with_tasks=self._with_tasks,
            logits=logits,
        )

    @property
    def buffer_groups(self) -> dict[int, SimpleNamespace]:
        """The part of the buffer with each label, as ``.buffer``; MIR and ER-AML read it."""
        buffer: Any = self.buffer
        labels = torch.tensor([int(label) for label in buffer.targets])
        return {
            label: SimpleNamespace(buffer=buffer.subset((labels == label).nonzero()[:, 0].tolist()))
            for label in labels.unique().tolist()
        }

    @property
    def buffer_datasets(self) -> list[AvalancheDataset[Any]]:
        """The buffer in parts, one a label, as SCR reads it."""
        return [group.buffer for group in self.buffer_groups.values()]

    @property
    def _with_tasks(self) -> bool:
        if self.task_labels is None:
            return self.replay.has_task_labels
        return self.task_labels

    def update(self, strategy: Any, **kwargs: Any) -> None:
        """Make the strategy's current experience into the memory."""
        self.post_adapt(strategy, strategy.experience)

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Make an experience into the memory.

        A piece of an online stream is gathered, as :class:`~hmn_replay.MemoryReplay` says.

        Raises:
            BudgetError: The budget does not hold one image of each class; a buffer first learns of
                an experience once it has been trained on.
            ConfigError: The plugin is among the strategy's own, too.
        """
        if any(plugin is self.replay for plugin in getattr(agent, "plugins", ())):
            raise ConfigError(
                f"the {type(self.replay).__name__} of a MemoryBuffer is among the strategy's "
                "plugins, and would make each experience into the memory twice: take it out"
            )
        self.replay.learn(agent, exp)
        self._compute_logits(agent)

    def resize(self, strategy: Any, new_size: int) -> None:
        """Show at most so many images, and compute logits anew; the memory keeps its images."""
        self.max_size = new_size
        self._compute_logits(strategy)

    def __getstate__(self) -> dict[str, Any]:
        """Return what Avalanche's ``save_checkpoint`` keeps: no image that can be decoded again."""
        return {**self.__dict__, "_buffer": None, "_made_for": ()}

    @torch.no_grad()
    def _compute_logits(self, agent: Any) -> None:
        memory = self.replay.memory
        if not self.needs_logits or memory is None or not len(memory):
            self._logits, self._logits_of = None, b""
            return
        # Of images that are not augmented, by a loader with a generator of its own: it would draw
        # from torch's global one.
        batch_size = images_at_once(memory.image_shape)
        loader = DataLoader(
            self._dataset(memory), batch_size=batch_size, generator=torch.Generator()
        )
        with evaluating(agent.model), without_autocast(torch.device(agent.device)):
            parts = []
            for images, _, *rest in loader:
                tasks = rest[0].to(agent.device) if self._with_tasks else None
                parts.append(avalanche_forward(agent.model, images.to(agent.device), tasks))
        self._logits, self._logits_of = torch.cat(parts).cpu(), digest_memory(memory)


def count_labels(decoded: DecodedImages, num_classes: int) -> Tensor:
    """Return how many images of each class below K there are, of task 0: float32 ``(K,)``."""
    labels, tasks = split_class_keys(decoded.labels)
    return class_counts(labels, (tasks == 0).float(), num_classes)


def as_avalanche_dataset(
    decoded: DecodedImages,
    normalization: Normalization | None,
    transform: Callable[[Tensor], Tensor] | None = None,
    *,
    with_tasks: bool,
    logits: Tensor | None = None,
) -> AvalancheDataset[Any]:
    """Return images as a data set of Avalanche, in the space that training sees.

    Args:
        decoded: The images; their labels are class keys.
        normalization: Applied to each image as it is read, or None.
        transform: Applied before, to a batch of one image, or None.
        with_tasks: Whether items are ``(image, label, task label)`` or ``(image, label)``.
        logits: ``(N, K)``, a last part of the items; None for none.
    """
    labels, tasks = (part.tolist() for part in split_class_keys(decoded.labels))
    attributes = [DataAttribute(labels, "targets")]
    if with_tasks:
        attributes.append(DataAttribute(tasks, "targets_task_labels", use_in_getitem=True))
    if logits is not None:
        rows: Any = list(logits)
        attributes.append(DataAttribute(rows, "logits", use_in_getitem=True))
    items = _Items(decoded.images.cpu(), labels, normalization, transform)
    kind = TaskAwareSupervisedClassificationDataset if with_tasks else AvalancheDataset
    return kind([items], data_attributes=attributes)


@dataclass(frozen=True, eq=False)
class _Items(Dataset[tuple[Tensor, int]]):
    images: Tensor
    targets: list[int]
    normalization: Normalization | None
    transform: Callable[[Tensor], Tensor] | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = as_floats(self.images[index : index + 1])
        return finish_images(image, self.transform, self.normalization)[0], self.targets[index]


def finish_images(
    images: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    normalization: Normalization | None,
) -> Tensor:
    """Augment and normalise images ``(N, C, H, W)`` in [0, 1].

    Raises:
        DataError: ``transform`` changed their shape or their type.
    """
    if transform is not None:
        shape, dtype = images.shape, images.dtype
        images = transform(images)
        if images.shape != shape or images.dtype != dtype:
            raise DataError(
                f"replay_transform returned {images.dtype} {tuple(images.shape)} for {dtype} "
                f"{tuple(shape)}; expected as many images of the same shape and type, in [0, 1]"
            )
    return images if normalization is None else normalization.apply(images)


def add_to_minibatch(mbatch: list[Tensor], images: Tensor, labels: Tensor, tasks: Tensor) -> None:
    """Append images to a mini-batch of images, labels, and task labels or none, in place.

    Raises:
        DataError: The mini-batch has other parts, or images of another size.
    """
    if len(mbatch) > 3 or mbatch[0].shape[1:] != images.shape[1:]:
        raise DataError(
            f"the memory's images are {tuple(images.shape[1:])}; expected a mini-batch of images "
            "as large, labels, and task labels or none, got shapes "
            f"{[tuple(part.shape) for part in mbatch]}; the train transforms must give the size "
            "that the eval transforms give"
        )
    # A plain zip: without task labels, the third part is left out.
    for position, (part, replayed) in enumerate(zip(mbatch, (images, labels, tasks), strict=False)):
        mbatch[position] = torch.cat([part, replayed])
