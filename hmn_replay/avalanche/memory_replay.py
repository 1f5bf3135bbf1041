"""A plugin for Avalanche that trains on a memory's images, whatever the memory is."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor

from hmn_replay.avalanche.gathering import Gatherer
from hmn_replay.avalanche.losses import (
    PARTED_LOSSES,
    DecodedImages,
    Loss,
    add_to_minibatch,
    check_loss,
    check_settings,
    finish_images,
    is_plain_cross_entropy,
    log_shares,
    part_loss,
)
from hmn_replay.avalanche.replay_state import ReplayState
from hmn_replay.avalanche.streams import (
    Normalization,
    as_experience_data,
    check_experience,
    find_normalization,
    isolated_random_state,
    read_experience,
)
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import CheckpointError, ConfigError, HMNReplayError
from hmn_replay.runtime import make_generator

__all__ = ["MemoryReplay", "Strategy"]

Strategy: TypeAlias = Any
"""An Avalanche strategy; its types promise less than it has."""


class MemoryReplay(SupervisedPlugin[Any], supports_distributed=False):
    """Trains on a memory's images beside the current experience's, and renews the memory after it.

    A subclass says what the memory is: :meth:`update` makes it from an experience's images. It
    needs ``decode(dtype=torch.uint8)``, ``num_images``, ``images_per_class`` and ``file_bytes``;
    its classes are numbered by :func:`hmn_replay.avalanche.streams.class_key` (the label, where the task
    label is 0).

    ``mode="replay"``: each training mini-batch gets decoded images at its end, drawn uniformly and
    none twice; :attr:`last_replay_size` and :attr:`replay_mask` tell them apart.
    ``mode="memory_only"``, the protocol of GDumb and IDC: the first experience trains on its
    raw images and is condensed after that; every later one is condensed *before* training, and then
    the memory alone is trained on.

    An online stream (``split_online_stream``) gives an experience in pieces. They are gathered, and
    made into the memory when the next experience begins (as ``access_task_boundaries`` shows, else
    where only new classes come: see :class:`hmn_replay.avalanche.gathering.Gatherer`); at the end of a
    ``strategy.train(...)`` call with several pieces; and when :meth:`finish` is called, which
    a loop over single pieces has to do in the end.

    Images are read through the eval transforms. torchvision's ``Normalize`` among them is undone
    for the memory, and applied again to what is replayed; of the train transforms nothing is, as
    they are mostly for PIL images: ``replay_transform`` takes their place.

    The caller's random state, module modes and gradients are left alone; as long as there is no
    memory, training is bit for bit what it is without the plugin. Where a strategy has a loss of
    its own, as DER and ER_ACE have, replayed images count as current ones.

    Args:
        batch_size_mem: Images replayed in a step; fewer where the memory has fewer. Default: the
            strategy's ``train_mb_size``. ``"memory_only"`` does not use it.
        mode: ``"replay"`` or ``"memory_only"``.
        replay_transform: Augments decoded images, float ``(N, C, H, W)`` in [0, 1], on the
            strategy's device, before normalisation; returns as many of the same shape. It
            should draw from a generator of its own.
        replay_weight: w in [0, 1]: the loss is ``(1 - w) * criterion(current) + w *
            criterion(replayed)``, whatever the batch sizes; what other plugins add to the loss
            stays as it is. Default: ``None``, the criterion of the whole mini-batch.
        loss: ``"plain"``, ``"balanced"``, ``"asymmetric"`` or ``"auto"``. The many images of a few
            new classes push old classes down, and the few images of each of these cannot make up
            for it. ``"balanced"``, the logit-adjusted loss of Menon et al. (2021): while
            training, the logarithm of each class's share of the loss is added to its logit. What
            the network learns is then free of how often a class is shown. ``"asymmetric"``, that of
            ER-ACE (Caccia et al. 2022): classes of the memory that the experience does not have are
            left out of the current images' softmax, so that these are told apart from each other
            alone; the replayed ones from all. With task labels above 0 both are ``"plain"``.
            ``"auto"``: ``"balanced"`` where the strategy's loss is a cross-entropy, else
            ``"plain"``.
        normalization: ``(mean, std)`` that the benchmark's transforms apply. Default: ``None``,
            that of torchvision's ``Normalize`` in the eval transforms, or none.
        max_raw_images: Bound on the raw images gathered of an online experience. They do not count
            towards the memory's bytes, as an experience's own data does not.
        seed: Of every draw.

    Raises:
        ConfigError: A value outside its range.

    Attributes:
        memory: What was last made, or None. It may be set to a memory that was loaded.
        report: For each update a dict of JSON types: ``update``, ``seconds``, ``num_images``,
            ``images_per_class``, ``file_bytes``, ``drift_psnr`` (dB of the old images that stayed;
            None where none changed, or where it is not known), and what :meth:`update` adds.
        last_replay_size: How many of the current mini-batch's images are replayed: its last ones.
    """

    memory: Any
    report: list[dict[str, Any]]
    last_replay_size: int

    def __init__(
        self,
        *,
        batch_size_mem: int | None = None,
        mode: Literal["replay", "memory_only"] = "replay",
        replay_transform: Callable[[Tensor], Tensor] | None = None,
        replay_weight: float | None = None,
        loss: Loss = "plain",
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        max_raw_images: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_settings(mode, batch_size_mem, max_raw_images, replay_weight, loss)
        self.batch_size_mem, self.mode = batch_size_mem, mode
        self.replay_transform = replay_transform
        self.replay_weight, self.loss = replay_weight, loss
        self.normalization = None if normalization is None else Normalization.of(normalization)
        self.max_raw_images, self.seed = max_raw_images, seed
        self.memory, self.report, self.last_replay_size = None, [], 0
        self._gatherer = Gatherer(self.max_raw_images, self.seed)
        self._num_updates = self._num_steps = self._num_pieces = 0
        self._batch_size = self._item_length = 0
        self._device = torch.device("cpu")
        self._found: Normalization | None = None
        self._is_renewed = False
        self._loss_now = "plain"
        self._current_counts: Tensor | None = None
        self._decoded: DecodedImages | None = None

    @abstractmethod
    def update(self, images: LabelledImages, *, index: int) -> tuple[Any, dict[str, Any]]:
        """Make the memory that follows :attr:`memory`, and leave that one as it is.

        Torch's, numpy's and Python's global generators are seeded meanwhile, and restored.

        Args:
            images: An experience's images; their labels are class keys.
            index: The number of the update: 0, 1, ...

        Returns:
            The new memory, and what to add to the report, of types that JSON has.
        """

    def memory_to_bytes(self, memory: Any) -> bytes:
        """Return a memory as the bytes of its file, for checkpoints: its ``serialise()``."""
        return bytes(memory.serialise())

    def memory_from_bytes(self, data: bytes) -> Any:
        """Return the memory that :meth:`memory_to_bytes` made the bytes of.

        Raises:
            HMNReplayError: They are damaged, or the subclass does not say how to read them.
        """
        raise ConfigError(f"{type(self).__name__} has no memory_from_bytes(), which loading needs")

    @property
    def memory_bytes(self) -> int:
        """The bytes of the memory's file; 0 without a memory."""
        return 0 if self.memory is None else int(self.memory.file_bytes)

    @property
    def num_pending(self) -> int:
        """How many raw images of an online stream wait to be condensed."""
        return len(self._gatherer)

    @property
    def replay_mask(self) -> Tensor:
        """Bool ``(N,)`` on the strategy's device: which of the current mini-batch are replayed."""
        mask = torch.zeros(self._batch_size, dtype=torch.bool, device=self._device)
        mask[self._batch_size - self.last_replay_size :] = True
        return mask

    def finish(self) -> bool:
        """Make what an online stream has left into the memory; True where there was something."""
        images = self._gatherer.images()
        if images is not None:
            self._renew(images)
            self._gatherer.clear()
        return images is not None

    def before_training(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Note the device, and check that the loss is one that can be weighted."""
        self._device = torch.device(strategy.device)
        self._num_pieces = 0
        if self.replay_weight is not None or self.loss in PARTED_LOSSES:
            check_loss(strategy, self.loss)

    def before_train_dataset_adaptation(
        self, strategy: Strategy, *args: Any, **kwargs: Any
    ) -> None:
        """Check the experience's data, and find its normalisation."""
        experience = strategy.experience
        self._is_renewed = False
        if self.mode == "memory_only" and isinstance(experience, OnlineCLExperience):
            raise ConfigError(
                'mode="memory_only" condenses an experience before training, but an online stream '
                'gives it in pieces: use mode="replay"'
            )
        self._found = self.normalization or find_normalization(experience.dataset)
        with isolated_random_state(self._device, self.seed, "check"):
            self._item_length = check_experience(experience, self._found)

    def after_train_dataset_adaptation(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """In ``"memory_only"``, condense the experience, and train from the memory."""
        if self.mode == "replay" or self.memory is None:
            return
        self._learn(strategy.experience)
        self._is_renewed = True
        strategy.adapted_dataset = as_experience_data(
            self.memory, self._found, with_tasks=self._item_length > 2
        )

    def before_training_exp(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Gather a piece of an online stream; decode the memory."""
        experience = strategy.experience
        has_tasks = any(getattr(experience, "task_labels", ()))
        self._loss_now = "plain" if has_tasks else self.loss
        if self._loss_now == "auto":
            self._loss_now = "balanced" if is_plain_cross_entropy(strategy) else "plain"
        self._current_counts = None
        if isinstance(experience, OnlineCLExperience):
            self._num_pieces += 1
            is_first = experience.is_first_subexp if experience.access_task_boundaries else None
            ended = self._gatherer.add(self._read(experience), is_first=is_first)
            if ended is not None:
                self._renew(ended)
        else:
            self.finish()
        self._decode()

    def before_training_iteration(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Add decoded images to the mini-batch, or augment those that it consists of."""
        mbatch = strategy.mbatch
        self._batch_size = len(mbatch[0])
        self.last_replay_size = 0
        if self._is_renewed:
            self.last_replay_size = self._batch_size
            if self.replay_transform is not None:
                images = mbatch[0] if self._found is None else self._found.undo(mbatch[0])
                mbatch[0] = finish_images(images.clamp(0, 1), self.replay_transform, self._found)
        if self.mode == "memory_only":
            return
        decoded = self._decode()
        if decoded is None or not len(decoded):
            return
        # A generator a step, so that a checkpoint needs the number of the step alone.
        generator = make_generator(self.seed, "replay", self._num_steps)
        self._num_steps += 1
        images, labels, tasks = decoded.draw(
            self.batch_size_mem or strategy.train_mb_size, mbatch[0].dtype, generator
        )
        images = finish_images(images, self.replay_transform, self._found)
        add_to_minibatch(mbatch, images, labels, tasks)
        self.last_replay_size = len(images)
        self._batch_size += len(images)

    def after_forward(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Count what others, such as DER, have put before the mini-batch since."""
        self._batch_size = len(strategy.mbatch[0])

    def before_backward(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Part the loss into that of the current images and that of the replayed."""
        decoded, num_replayed = self._decoded, self.last_replay_size
        if self.mode == "memory_only" or not (num_replayed and decoded):
            return
        if self.replay_weight is None and self._loss_now == "plain":
            return
        labels, weight = strategy.mb_y, self.replay_weight
        if weight is None:
            weight = num_replayed / len(labels)
        known = shift = None
        if self._loss_now == "asymmetric":
            known = decoded.known
        elif self._loss_now == "balanced":
            counts = self._count(labels[:-num_replayed], strategy.mb_output.shape[1])
            shift = log_shares(counts, decoded, weight)
        part_loss(strategy, num_replayed, weight, known=known, shift=shift)

    def after_training_exp(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Make the experience into the memory."""
        experience = strategy.experience
        if not isinstance(experience, OnlineCLExperience):
            if not self._is_renewed:
                self._learn(experience)
        elif experience.access_task_boundaries and experience.is_last_subexp:
            self.finish()

    def after_training(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Where several pieces were given at once, they have come to their end."""
        if self._num_pieces > 1:
            self.finish()
        self.last_replay_size = self._batch_size = 0
        self._current_counts = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the plugin has learned, as tensors, numbers and texts.

        It holds no settings: :meth:`load_state_dict` is for a plugin made with the same ones.
        ``torch.load(..., weights_only=True)`` reads it from a file.
        """
        return ReplayState(
            b"" if self.memory is None else self.memory_to_bytes(self.memory),
            self.report,
            self._num_updates,
            self._num_steps,
            self._gatherer.state_dict(),
        ).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; what follows is bit for bit what it would be.

        Raises:
            CheckpointError: The state is not one of this version, or is damaged; nothing changes.
        """
        gatherer = Gatherer(self.max_raw_images, self.seed)
        try:
            learned = ReplayState.from_dict(state)
            memory = self.memory_from_bytes(learned.memory) if learned.memory else None
            gatherer.load_state_dict(learned.pending)
        except HMNReplayError as error:
            raise CheckpointError(
                f"not a whole state of {type(self).__name__}: {error}; take an earlier one"
            ) from error
        self.memory, self.report, self._gatherer = memory, learned.report, gatherer
        self._num_updates, self._num_steps = learned.num_updates, learned.num_steps

    def __getstate__(self) -> dict[str, Any]:
        """Return what Avalanche's ``save_checkpoint`` keeps: no image that can be decoded again."""
        left_out = dict.fromkeys(("memory", "report", "_gatherer", "_decoded"))
        return {**self.__dict__, **left_out, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what :meth:`__getstate__` described."""
        learned = state.pop("state")
        self.__dict__.update(state)
        self.load_state_dict(learned)

    def _learn(self, experience: Any) -> None:
        if len(experience.dataset):
            self._renew(self._read(experience))

    def _read(self, experience: Any) -> LabelledImages:
        with isolated_random_state(self._device, self.seed, "read", self._num_updates):
            return read_experience(experience, self._found)

    def _renew(self, images: LabelledImages) -> None:
        index, started = self._num_updates, time.monotonic()
        with isolated_random_state(self._device, self.seed, "update", index):
            memory, report = self.update(images, index=index)
        entry = {
            "update": index,
            "drift_psnr": None,
            **report,
            "seconds": time.monotonic() - started,
            "num_images": memory.num_images,
            "images_per_class": list(memory.images_per_class),
            "file_bytes": memory.file_bytes,
        }
        # Through JSON, so that what a checkpoint gives back has the same types.
        self.report.append(json.loads(json.dumps(entry)))
        self.memory, self._num_updates = memory, index + 1

    def _count(self, labels: Tensor, num_classes: int) -> Tensor:
        """Count the labels of a mini-batch with those of its experience so far: ``(K,)``."""
        if self._current_counts is None:
            counts = torch.zeros(num_classes)
            for label, count in self._gatherer.num_seen.items():
                counts[label] = count
            self._current_counts = counts.to(labels.device)
        ones = torch.ones(len(labels), device=labels.device)
        return self._current_counts.index_add_(0, labels, ones)

    def _decode(self) -> DecodedImages | None:
        """Decode the memory, once until it is another one."""
        memory, decoded = self.memory, self._decoded
        if memory is None:
            return None
        if decoded is None or decoded.memory is not memory or decoded.device != self._device:
            self._decoded = decoded = DecodedImages.of(memory, self._device)
        return decoded
