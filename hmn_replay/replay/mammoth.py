"""The replay memory as a buffer of Mammoth's rehearsal methods, by the interface that these call.

Nothing of Mammoth is imported: its models know their buffer by ``add_data``, ``get_data``,
``get_all_data`` and a few attributes (``utils/buffer.py`` of aimagelab/mammoth).
"""

from __future__ import annotations

import copy
import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hmn_replay.budget import as_int
from hmn_replay.data.images import as_labelled_images
from hmn_replay.data.lookup import images_at_once
from hmn_replay.errors import CheckpointError, ConfigError, HMNReplayError
from hmn_replay.memory import Memory, loads
from hmn_replay.replay.store import DecodedImages, ReplayMemory, digest_memory
from hmn_replay.runtime import make_generator
from hmn_replay.training.networks import device_of, evaluating

__all__ = ["MammothBuffer"]

_NAMES = ("examples", "labels", "logits", "task_labels")


class MammothBuffer:
    """A :class:`~hmn_replay.ReplayMemory` behind the interface of Mammoth's ``Buffer``.

    A method gives its buffer each mini-batch, epoch after epoch. Here, they are gathered, every
    image once with its label, and taken into the memory when :meth:`end_task` is called, which a
    model does in its own ``end_task``. So what is replayed is decoded images of earlier tasks.
    Their number is the memory's; ``buffer_size`` bounds nothing.

    Kept are images and labels. Task labels are those that the classes came with, so a class
    belongs to one task. Logits are the network's own for the decoded images, where :meth:`end_task`
    is given the network; like the decoded images they are in working memory, and no part of the
    memory's file or budget. Once the memory is another, as after ``memory.update()``, a draw is
    refused until :meth:`end_task` has made them anew. ``true_labels`` and
    ``sample_selection_scores`` are not used.

    Args:
        memory: What keeps the images. Its ``max_raw_images`` bounds those gathered of a task, which
            do not count towards its budget.
        device: Where ``get_data`` and the others return tensors, unless they are told another.

    Attributes:
        memory: As given.
        num_seen_examples: How many images there are to replay: 0 before the first task's end.
        attributes: The names of what Mammoth's buffers may hold, in the order of ``get_data``.
    """

    def __init__(self, memory: ReplayMemory, device: str | torch.device = "cpu") -> None:
        if memory.keeper.holds_features:
            raise ConfigError(
                "a buffer of Mammoth's holds images, which a memory of features cannot: use a "
                "memory of images"
            )
        self.memory, self.device = memory, device
        self.attributes = list(_NAMES)
        self._tasks: dict[int, int] = {}
        self._seen: set[bytes] = set()
        self._logits: Tensor | None = None
        # What they are of: as it is, and what tells it from others once it was loaded anew.
        self._logits_of: Memory | None = None
        self._digest = b""
        self._num_draws = 0

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def num_seen_examples(self) -> int:
        """How many images there are to replay."""
        return len(self)

    @property
    def buffer_size(self) -> int:
        """How many images there are to replay."""
        return len(self)

    @buffer_size.setter
    def buffer_size(self, value: int) -> None:
        """Leave the number to the memory, whose bound is in bytes."""

    @property
    def examples(self) -> Tensor:
        """float32 ``(N, C, H, W)`` in [0, 1]: all decoded images."""
        return self._images(torch.arange(len(self))).to(self.device)

    @property
    def labels(self) -> Tensor:
        """int64 ``(N,)``."""
        return self._attribute("labels").to(self.device)

    @property
    def used_attributes(self) -> list[str]:
        """The names of what ``get_data`` returns, in its order; none while there is nothing.

        Raises:
            ConfigError: The logits are of another memory than the buffer's.
        """
        if self.is_empty():
            return []
        if self._logits is not None and not self._logits_fit():
            raise ConfigError(
                "the logits are of another memory than the buffer has now, as after "
                "memory.update(): call end_task(network), which makes them anew, or end_task(), "
                "which leaves them out"
            )
        absent = {
            *(["logits"] if self._logits is None else []),
            *([] if self._tasks else ["task_labels"]),
        }
        return [name for name in self.attributes if name not in absent]

    def is_empty(self) -> bool:
        """Return whether there is nothing to replay, as before the end of the first task."""
        return not len(self)

    def is_full(self) -> bool:
        """Return whether there is something to replay: the memory fills its budget at once."""
        return not self.is_empty()

    def to(self, device: str | torch.device) -> MammothBuffer:
        """Return tensors on a device from now on."""
        self.device = device
        return self

    def empty(self) -> None:
        """Begin anew, with nothing to replay and nothing gathered."""
        self.memory.memory = None
        self._set_logits(None)
        self._begin_task()
        self._tasks.clear()

    def add_data(
        self,
        examples: Tensor,
        labels: Tensor | None = None,
        logits: Tensor | None = None,
        task_labels: Tensor | None = None,
        attention_maps: Sequence[Tensor] | None = None,
        true_labels: Tensor | None = None,
        sample_selection_scores: Tensor | None = None,
    ) -> None:
        """Gather a mini-batch of the current task, less what came before with the same label.

        Args:
            examples: float ``(n, C, H, W)`` in [0, 1], neither augmented nor normalised: Mammoth's
                ``not_aug_inputs``.
            labels: int64 ``(n,)``.
            logits: Not kept: see the class.
            task_labels: ``(n,)``, or None.
            attention_maps: Not for this buffer.
            true_labels: Not used.
            sample_selection_scores: Not used.

        Raises:
            ConfigError: No labels, or attention maps.
            DataError: Images or labels that cannot be used.
        """
        if labels is None or attention_maps is not None:
            raise ConfigError(
                "a memory keeps labelled images: expected labels and no attention maps; use a "
                "method that gives its buffer labels, such as ER, ER-ACE or DER++"
            )
        data = as_labelled_images((examples, labels))
        new: dict[bytes, int] = {}
        for position, (image, label) in enumerate(
            zip(data.images, data.labels.tolist(), strict=True)
        ):
            key = image.numpy().tobytes() + label.to_bytes(8, "little", signed=True)
            digest = hashlib.blake2b(key, digest_size=8).digest()
            if digest not in self._seen:
                new.setdefault(digest, position)
        if new:
            self.memory.gather(data.take(torch.tensor(list(new.values()))))
            self._seen.update(new)
        if task_labels is not None:
            tasks = task_labels.long().tolist()
            self._tasks.update(zip(data.labels.tolist(), tasks, strict=True))

    def end_task(self, network: Callable[[Tensor], Tensor] | None = None) -> None:
        """Make what was gathered into the memory; a model's ``end_task`` calls it.

        Args:
            network: From float images ``(n, C, H, W)`` in [0, 1] to logits, for methods that replay
                these (DER++). A module is given them where it is, in evaluation mode; a function on
                the buffer's device, and what it calls is to be brought to that mode by the caller.
                Default: None, no logits.
        """
        self.memory.finish(model=network if isinstance(network, nn.Module) else None)
        self._begin_task()
        self._set_logits(None)
        kept = self.memory.memory
        if network is not None and kept is not None and not self.is_empty():
            parts = torch.arange(len(self)).split(images_at_once(kept.image_shape))
            target = device_of(network) if isinstance(network, nn.Module) else self.device
            with torch.no_grad(), evaluating(network):
                found = [network(self._images(part).to(target)).cpu() for part in parts]
            self._set_logits(torch.cat(found))

    def get_data(
        self,
        size: int,
        transform: Callable[[Tensor], Tensor] | None = None,
        return_index: bool = False,
        device: str | torch.device | None = None,
        mask_task_out: int | None = None,
        cpt: int | None = None,
        return_not_aug: bool = False,
        not_aug_transform: Callable[[Tensor], Tensor] | None = None,
        force_indexes: Any = None,
    ) -> tuple[Tensor, ...]:
        """Draw images at random, none twice, and what is known of them.

        Args:
            size: How many; fewer where there are fewer.
            transform: Applied to each image ``(C, H, W)``, or to all at once where it is a module
                of Mammoth's that takes batches (``KorniaAugNoGrad``).
            return_index: Whether the positions come first.
            device: Where the tensors go. Default: the buffer's.
            mask_task_out: A task whose images are left out.
            cpt: Classes per task, where the buffer has no task labels.
            return_not_aug: Whether the images come untransformed, too, before the transformed ones.
            not_aug_transform: Applied to these.
            force_indexes: Positions, in place of a draw.

        Returns:
            Images, labels, logits and task labels, those of :attr:`used_attributes`.

        Raises:
            ConfigError: There is nothing to draw, ``mask_task_out`` needs task labels or ``cpt``,
                or the logits are of another memory.
        """
        available = torch.arange(len(self))
        if mask_task_out is not None:
            available = available[self._task_of(cpt) != mask_task_out]
            if not len(available):
                raise ConfigError(f"there is nothing to draw but images of task {mask_task_out}")
        if force_indexes is not None:
            chosen = available[torch.as_tensor(force_indexes, dtype=torch.int64, device="cpu")]
        else:
            chosen = available[self._draw(len(available))[:size]]
        return self._collect(
            chosen, transform, device, return_index, return_not_aug, not_aug_transform
        )

    def get_balanced_data(
        self, size: int, transform: Callable[[Tensor], Tensor] | None = None, n_classes: int = -1
    ) -> tuple[Tensor, ...]:
        """Draw as many images of every class as of the others, but for one.

        Args:
            size: How many in all; fewer where a class has fewer than its share.
            transform: As in :meth:`get_data`.
            n_classes: How many classes, drawn at random; -1 for all.
        """
        order = self._draw(len(self))
        labels = self._attribute("labels")[order]
        classes = labels.unique()
        if 0 < n_classes < len(classes):
            classes = classes[self._draw(len(classes))[:n_classes]]
        shares = [size // len(classes) + (i < size % len(classes)) for i in range(len(classes))]
        chosen = [
            order[labels == label][:share]
            for label, share in zip(classes.tolist(), shares, strict=True)
        ]
        return self._collect(torch.cat(chosen), transform)

    def get_data_by_index(
        self,
        indexes: Any,
        transform: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, ...]:
        """Return what is at some positions; arguments as in :meth:`get_data`."""
        return self.get_data(len(indexes), transform, device=device, force_indexes=indexes)

    def get_all_data(
        self,
        transform: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, ...]:
        """Return everything; arguments as in :meth:`get_data`."""
        return self._collect(torch.arange(len(self)), transform, device)

    def get_dataloader(
        self,
        args: Namespace,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: Callable[[Tensor], Tensor] | None = None,
        sampler: Any = None,
    ) -> DataLoader[Any]:
        """Return a loader of what :meth:`get_all_data` returns, its images transformed anew."""
        del args
        items = copy.copy(self)
        items._transform = transform  # type: ignore[attr-defined]
        generator = make_generator(self.memory.seed, "mammoth loader", self._num_draws)
        self._num_draws += 1
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            sampler=sampler,
            generator=generator,
        )

    def __getitem__(
        self, index: int, transform: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        transform = transform or getattr(self, "_transform", None)
        return [part[0] for part in self.get_data(1, transform, force_indexes=[index])]

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (self[index] for index in range(len(self)))

    def serialize(self, out_device: str | torch.device = "cpu") -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes, for Mammoth's checkpoints."""
        del out_device
        tasks = torch.tensor(sorted(self._tasks.items()), dtype=torch.int64).view(-1, 2)
        state: dict[str, Any] = {
            "memory": self.memory.state_dict(),
            "tasks": tasks,
            "num_draws": self._num_draws,
            "seen": torch.tensor(list(map(list, sorted(self._seen))), dtype=torch.uint8),
        }
        if self._logits is not None and self._logits_fit():
            state["logits"] = self._logits
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the memory once."""
        return {**self.__dict__, "_logits_of": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`serialize` gave; a model's ``load_buffer`` calls it.

        Raises:
            CheckpointError: It is something else; nothing changes.
        """
        try:
            tasks, seen, logits = state["tasks"], state["seen"], state.get("logits")
            draws, memory = as_int(state["num_draws"]), state["memory"]
            if tasks.dtype != torch.int64 or tasks.ndim != 2 or tasks.shape[1] != 2:
                raise CheckpointError(f"its tasks are {tasks.dtype} {tuple(tasks.shape)}")
            if seen.dtype != torch.uint8 or (seen.numel() and seen.ndim != 2):
                raise CheckpointError(f"its seen images are {seen.dtype} {tuple(seen.shape)}")
            if draws is None or draws < 0:
                raise CheckpointError(f"it counts {state['num_draws']!r} draws")
            if logits is not None:
                data = memory["memory"].cpu().numpy().tobytes()
                num_images = len(loads(data)) if data else 0
                if len(logits) != num_images:
                    raise CheckpointError(f"it has {len(logits)} logits of {num_images} images")
            self.memory.load_state_dict(memory)
        except (HMNReplayError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"not a state of a MammothBuffer: {error}") from error
        self._tasks, self._seen = dict(tasks.tolist()), set(map(bytes, seen.tolist()))
        self._num_draws = draws
        self._set_logits(logits)

    def _set_logits(self, logits: Tensor | None) -> None:
        """Take over logits of the memory that there is now, or none."""
        memory = self.memory.memory if logits is not None else None
        self._logits, self._logits_of = logits, memory
        self._digest = b"" if memory is None else digest_memory(memory)

    def _logits_fit(self) -> bool:
        """Return whether the logits are of the memory that there is now."""
        memory = self.memory.memory
        if (
            memory is not self._logits_of
            and memory is not None
            and digest_memory(memory) == self._digest
        ):
            self._logits_of = memory
        return memory is self._logits_of

    def _begin_task(self) -> None:
        self.memory.gatherer.clear()
        self._seen.clear()

    def _draw(self, count: int) -> Tensor:
        generator = make_generator(self.memory.seed, "mammoth", self._num_draws)
        self._num_draws += 1
        return torch.randperm(count, generator=generator)

    def _images(self, positions: Tensor) -> Tensor:
        return self._decoded().images[positions].float().div_(255)

    def _decoded(self) -> DecodedImages:
        decoded = self.memory.decoded("cpu")
        if decoded is None:
            raise ConfigError("the buffer is empty: nothing was learned before; ask is_empty()")
        return decoded

    def _attribute(self, name: str) -> Tensor:
        labels = self._decoded().labels
        if name == "logits":
            assert self._logits is not None
            return self._logits
        if name == "labels":
            return labels
        known, inverse = labels.unique(return_inverse=True)
        return torch.tensor([self._tasks.get(label, 0) for label in known.tolist()])[inverse]

    def _task_of(self, cpt: int | None) -> Tensor:
        if self._tasks:
            return self._attribute("task_labels")
        if cpt is None:
            raise ConfigError("mask_task_out needs task labels, or cpt, the classes per task")
        return self._attribute("labels") // cpt

    def _collect(
        self,
        chosen: Tensor,
        transform: Callable[[Tensor], Tensor] | None,
        device: str | torch.device | None = None,
        return_index: bool = False,
        return_not_aug: bool = False,
        not_aug_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        images = self._images(chosen)
        parts = [chosen] if return_index else []
        if return_not_aug:
            parts.append(_transformed(images, not_aug_transform))
        parts.append(_transformed(images, transform))
        parts += [self._attribute(name)[chosen] for name in self.used_attributes[1:]]
        target = self.device if device is None else device
        return tuple(part.to(target) for part in parts)


def _transformed(images: Tensor, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    if transform is None or not len(images):
        return images
    if any(kind.__name__ == "KorniaAugNoGrad" for kind in type(transform).__mro__):
        return transform(images)
    return torch.stack([transform(image) for image in images])
