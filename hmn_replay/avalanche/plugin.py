"""The replay plugin: trains on images of a memory beside the current ones, and renews it."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins.from_scratch_training import FromScratchTrainingPlugin
from avalanche.training.plugins.lwf import LwFPlugin
from torch import Tensor, nn

from hmn_replay.avalanche.buffer import (
    MemoryBuffer,
    add_to_minibatch,
    as_avalanche_dataset,
    count_labels,
    finish_images,
)
from hmn_replay.avalanche.hooks import Head, Teacher, check_has_head
from hmn_replay.avalanche.losses import (
    Loss,
    Renewal,
    ReplayLoss,
    ReplayStep,
    distillation,
    find_loss,
    label_distillation,
    plain,
)
from hmn_replay.avalanche.protocol import (
    ReplayProtocol,
    check_asked,
    check_labels,
    check_tuning,
    has_plain_criterion,
    needs_all_classes,
    owner_of_loss,
)
from hmn_replay.avalanche.recoding import Recoder, no_codec
from hmn_replay.avalanche.streams import (
    NormalisingNetwork,
    Normalization,
    Strategy,
    adapt_heads,
    check_experiences,
    check_is_normalised,
    class_counts,
    experiences_of,
    find_normalization,
    first_images,
    first_of_each_class,
    heads_of_tasks,
    is_piece,
    read_experiences,
    split_class_keys,
    with_their_streams,
)
from hmn_replay.avalanche.tuning import Tuner, by_class, draw_balanced
from hmn_replay.avalanche.weights import (
    digest_of,
    is_same_network,
    on_cpu,
    weight_digests,
    weights_of,
)
from hmn_replay.budget import as_int
from hmn_replay.condensation.labelling import LABEL_AUGMENTATIONS
from hmn_replay.data.augment import RandomAugmentation
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.lookup import as_floats
from hmn_replay.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HMNReplayError,
    HMNReplayWarning,
)
from hmn_replay.files import digest_tensors
from hmn_replay.memory import Memory
from hmn_replay.replay import (
    DecodedImages,
    Keeper,
    ReplayMemory,
)
from hmn_replay.replay.store import STATE_VERSION, digest_state
from hmn_replay.runtime import isolated, make_generator, resolve_device
from hmn_replay.training.backbones import FrozenBackbone, extract_features
from hmn_replay.training.networks import evaluating, find_head
from hmn_replay.training.train import checked_loss

__all__ = ["MemoryReplay", "replay_of"]

# A loss that is a smaller share of the criterion than that was scaled; autocast rounds it by less.
_LEAST_SHARE = 0.9
_FIRST_WEIGHTS, _UNTUNED_WEIGHTS = "first_weights", "untuned_weights"


class MemoryReplay(SupervisedPlugin[Any], supports_distributed=False):
    """Trains on a memory's images beside the current experience's, and renews the memory with it.

    The memory is a :class:`~hmn_replay.ReplayMemory`; ``keeper`` says how it is renewed. Its
    classes are numbered by :func:`hmn_replay.avalanche.streams.class_key` (the label, where the
    task label is 0).

    ``mode="replay"``: each training mini-batch gets decoded images at its end, drawn uniformly and
    none twice; :attr:`last_replay_size` and :attr:`replay_mask` tell them apart. By default the
    experience is taken into the memory *before* it is trained on (``renew="before"``), so that
    decoded images of its own classes are among them. Where new classes came as clean images alone
    and old ones as decoded images alone, the network would learn to tell new from old by that.
    ``mode="memory_only"``, the protocol of GDumb and IDC: the first experience trains on its
    raw images and is condensed after that; every later one is condensed *before* training, and then
    the memory alone is trained on, under the strategy's own loss.

    An online stream (``split_online_stream``) gives an experience in pieces, which can only be made
    into the memory after they have been trained on. They are gathered, and made into it when the
    next experience begins, where the stream shows that (``access_task_boundaries=True``); at the
    end of a ``strategy.train(...)`` call with several pieces; when :meth:`finish` is called, which
    a loop over single pieces has to do in the end; and where a stream hides its borders, also each
    time that ``max_raw_images`` have come.

    ``JointTraining``, which is given all experiences at once, makes all of them into one memory,
    after training unless ``renew="before"`` is given: nothing in it is old.

    Images are read through the eval transforms. torchvision's ``Normalize`` among them is undone
    for the memory, and applied again to what is replayed; of the train transforms nothing is, as
    they are mostly for PIL images: ``replay_transform`` takes their place.

    The caller's random state, module modes and gradients are left alone; as long as there is no
    memory, training is bit for bit what it is without the plugin. Avalanche's ``save_checkpoint``
    works with the plugin; ``maybe_load_checkpoint`` makes a new one: read it from
    ``strategy.plugins`` after it.

    A memory of features (kinds ``"features"``, ``"raw-features"`` and ``"pq"``) is for a strategy
    whose model is a :class:`~hmn_replay.FeatureClassifier`: its frozen backbone makes features of
    an experience for the memory and of each mini-batch, and replayed features stand beside these.
    ``replay_transform`` is then given features.

    Args:
        keeper: What says how the memory is renewed: a :class:`~hmn_replay.LearnedKeeper`, a
            :class:`~hmn_replay.RealKeeper`, or one of your own.
        batch_size_mem: Images replayed in a step; fewer where the memory has fewer. Default: the
            strategy's ``train_mb_size``. ``"memory_only"`` does not use it.
        mode: ``"replay"`` or ``"memory_only"``.
        replay_transform: Augments decoded images, float ``(N, C, H, W)`` in [0, 1], on the
            strategy's device, before normalisation; returns as many of the same shape. It may draw
            from the global generators of torch, numpy and Python, which are seeded for each
            mini-batch and restored afterwards.
        replay_weight: Share w in [0, 1] of the replayed images in the loss: ``(1 - w) *
            criterion(current) + w * criterion(replayed)``, whatever the batch sizes. Default:
            ``None``, the criterion of the whole mini-batch.
        loss: What the criterion's part of the loss becomes in steps that replay: a name in
            :data:`~hmn_replay.avalanche.losses.LOSSES` (``"plain"``, ``"balanced"``,
            ``"separated"``, ``"grouped"``, ``"asymmetric"``), or a callable that takes a
            :class:`~hmn_replay.avalanche.losses.ReplayStep`. The default, ``"auto"``, is
            ``"separated"`` where the memory is renewed before training, else ``"balanced"``. Where
            neither can be it is ``"plain"``, with one warning: a criterion other than
            ``CrossEntropyLoss`` without label smoothing, task labels above 0, or a strategy with a
            loss of its own, such as DER, for which replayed images count as current ones.
        renew: When an experience is taken into the memory: ``"before"`` or ``"after"`` it is
            trained on. The default, ``"auto"``, is ``"before"`` where the loss is ``"separated"``
            or ``"grouped"``, which need it, or ``"auto"`` and can be the first; else ``"after"``.
            Pieces of an online stream are always ``"after"``, with a warning where ``"before"`` was
            asked for. ``"memory_only"`` does not use it.
        distill: Weight, 0 or more, of a term that keeps the network near to the previous one, as it
            was when the experience began, on all images of the mini-batch and over the classes of
            the memory by then; see :func:`hmn_replay.avalanche.losses.distillation`.
            ``"adaptive"`` is the root of the number of these classes over that of the experience's,
            as LUCIR's code has it (Hou et al. 2019). The previous network sees the very images that
            the network sees, in evaluation mode. It is a copy in working memory while an experience
            is trained on, and no part of the memory's file or budget; classes that the experience
            brings again are left out. Default: ``None``, 1 where the loss is one that learns the
            current classes from decoded images too, such as ``"separated"`` and ``"grouped"``, and
            0 elsewhere and until the plugin has made an experience into the memory: of a memory
            that was loaded it is not known whether the network has learned it. Not for online
            streams, task labels above 0 or ``"memory_only"``.
        recode_share: Probability in [0, 1] with which an image of the experience is shown as the
            memory would give it back, encoded and decoded, so that a network cannot tell age by
            what a codec does to images (Wang et al. 2023, CIM-CIL). Default: 0, none. For kinds of
            memory with a codec (:attr:`hmn_replay.Memory.has_codec`), which are hmn, fred and all
            real images; not for ``"memory_only"``.
        labels: ``"hard"``, or ``"soft"``: when an experience has been trained on, the network says
            of the memory's images of its classes what else they resemble, which is kept in the file
            and counts towards its bytes. From the next experience on it is learned beside the
            classes wherever these images are replayed, over the classes that were known then. Not
            for task labels above 0 or ``"memory_only"``.
        label_weight: Weight, 0 or more, of that term, which is a mean over the mini-batch; see
            :func:`hmn_replay.avalanche.losses.label_distillation`. Default: 1.
        label_augmentations: Augmentations of the images that the network labels, whose answers are
            averaged: names, or one text of them, as ``"crop,flip"``; without ``"flip"`` where a
            mirrored image is of no class, as digits are.
        tune: ``"head"``, the ``nn.Linear`` that makes the logits, or ``"all"``: what is tuned after
            each experience but the first, on mini-batches of the memory's images alone that have as
            many of every class (as in EEIL, Castro et al. 2018). By SGD of its own, under the
            strategy's criterion; running statistics of batch normalisation stay as they are. The
            next experience goes on from the weights before the tuning, of which a copy is kept in
            working memory, unless the network was changed since. Default: ``"none"``. Not for
            online streams, task labels above 0 or ``"memory_only"``.
        tune_steps: Steps of the tuning, 1 or more, each over as many images as a training step.
        tune_rate: Learning rate of the tuning, above 0, at first; it falls to 0 along half a
            cosine.
        normalization: ``(mean, std)`` that the benchmark's transforms apply. Default: ``None``,
            that of torchvision's ``Normalize`` in the eval transforms, or none.
        max_raw_images: Bound on the raw images gathered of an online experience, but for one of
            each class. They do not count towards the memory's bytes, as an experience's own data
            does not.
        seed: Seed of every draw.
        device: Where the memory is made: None for the strategy's device, ``"auto"`` for CUDA where
            there is one, else the CPU, or anything that ``torch.device`` takes.
        progress: Whether to print a line on standard error after each update, which says its
            images, bytes and seconds.

    Raises:
        ConfigError: A value outside its range.
        BudgetError: While training, before the first step of an experience: the memory's budget
            does not hold one image of each class.

    Attributes:
        store: The replay memory, which works without Avalanche.
        loss_used: Name of the loss that the current or last experience was trained with: one of
            ``LOSSES``, a callable's name, or the name of a strategy with a loss of its own. None
            before the first.
        renew_used: ``"before"`` or ``"after"``: when the current or last experience was made into
            the memory. None before the first.
        distill_used: Weight of the distillation while the current or last experience is trained on:
            0 where there is none, as in the first one.
        last_replay_size: How many of the current mini-batch's images are replayed.
    """

    loss_used: str | None
    renew_used: str | None
    distill_used: float
    last_replay_size: int

    def __init__(
        self,
        keeper: Keeper,
        *,
        batch_size_mem: int | None = None,
        mode: Literal["replay", "memory_only"] = "replay",
        replay_transform: Callable[[Tensor], Tensor] | None = None,
        replay_weight: float | None = None,
        loss: Loss = "auto",
        renew: Renewal = "auto",
        distill: float | Literal["adaptive"] | None = None,
        recode_share: float = 0.0,
        labels: Literal["hard", "soft"] = "hard",
        label_weight: float = 1.0,
        label_augmentations: str | Collection[str] = LABEL_AUGMENTATIONS,
        tune: Literal["none", "head", "all"] = "none",
        tune_steps: int = 100,
        tune_rate: float = 0.01,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        max_raw_images: int = 10_000,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not isinstance(keeper, Keeper):
            raise ConfigError(
                "keeper says how the memory is renewed, as LearnedKeeper(budget) does; got "
                f"{keeper!r:.60}: for a budget alone take HMNReplay(budget)"
            )
        check_asked(
            mode,
            batch_size_mem,
            replay_transform,
            replay_weight,
            loss,
            renew,
            distill,
            recode_share,
        )
        if recode_share and not keeper.has_codec:
            raise no_codec(keeper)
        check_labels(mode, labels, label_weight, holds_features=keeper.holds_features)
        check_tuning(mode, tune, tune_steps, tune_rate)
        self.distill, self.recode_share = distill, recode_share
        self.tune, self.tune_steps, self.tune_rate = tune, tune_steps, tune_rate
        self.labels, self.label_weight = labels, label_weight
        self.label_augmentations = RandomAugmentation(label_augmentations).names
        self._soft: Tensor | None = None
        self._replayed_labels = torch.empty(0, dtype=torch.int64)
        # The highest label of the memory; -1 where the network's output need be no logits.
        self._most_label = -1
        self.batch_size_mem, self.mode = batch_size_mem, mode
        self.replay_transform = replay_transform
        self.replay_weight, self.loss, self.renew = replay_weight, loss, renew
        self.normalization = None if normalization is None else Normalization.of(normalization)
        self.device = device
        self.store = ReplayMemory(
            keeper,
            max_raw_images=max_raw_images,
            seed=seed,
            device="cpu" if device is None else device,
            progress=progress,
        )
        self.loss_used = self.renew_used = None
        self.distill_used = 0.0
        self.last_replay_size = 0
        self._num_pieces = 0
        self._num_replayed = self._num_before = self._num_views = 0
        self._device = torch.device("cpu")
        self._model: nn.Module | None = None
        # A digest of the network that was trained before the plugin was loaded.
        self._network_before: str | None = None
        self._is_other = False  # than the one that was trained before
        self._found = self.normalization
        self._item_length = 0
        self._image_shape: tuple[int, ...] = ()
        self._is_renewed = False
        self._warned: set[str] = set()
        self._loss_now: ReplayLoss = plain
        self._current_counts: Tensor | None = None
        self._own_counts = Counter[int]()
        # The classes of the current experience whose room was checked.
        self._checked: set[int] = set()
        self._old_classes = torch.empty(0, dtype=torch.int64)
        self._has_learned = False
        # Of the network's weights as the experience began, by name and shape.
        self._digests: dict[Any, str] = {}
        # How many updates there were before those of the network that is trained.
        self._num_updates_before = 0
        # Of the network, by name, on the CPU; where subclasses match on points from there on.
        self._first_weights: dict[str, Tensor] | None = None
        self._tuner = Tuner()
        self._gathered: Any = None  # the last piece of an online stream that was
        # A digest of the images that were made into the memory, and are being trained on.
        self._begun = ""
        # Since the experience, or the piece of one, began.
        self._num_augmented = 0
        self._is_loss_checked = False
        self._teacher: Teacher | None = None
        self._head: Head | None = None
        self._recoder = Recoder()
        _reattach_optim_modules()

    @property
    def memory(self) -> Memory | None:
        """What was last made, or None. It may be set to a memory that was loaded."""
        return self.store.memory

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self.store.memory = memory
        self._begun = ""

    @property
    def report(self) -> list[dict[str, Any]]:
        """For each update a dict of JSON types: that of :class:`~hmn_replay.ReplayMemory`.

        ``loss_used`` and ``renew_used`` are added to each.
        """
        return self.store.report

    @property
    def seed(self) -> int:
        """Seed of every draw."""
        return self.store.seed

    @property
    def max_raw_images(self) -> int:
        """Bound on the raw images gathered of an online experience."""
        return self.store.max_raw_images

    @property
    def memory_bytes(self) -> int:
        """The bytes of the memory's file; 0 without a memory."""
        return self.store.memory_bytes

    @property
    def num_pending(self) -> int:
        """How many raw images of an online stream wait to be condensed."""
        return len(self.store.gatherer)

    @property
    def replay_mask(self) -> Tensor:
        """Bool ``(N,)`` on the strategy's device: which of the current mini-batch are replayed.

        Where a strategy shows several views of the mini-batch one after the other, as SCR does, it
        marks the replayed images of every view.
        """
        mask = torch.zeros(self._num_before + self._num_replayed, dtype=torch.bool)
        mask[self._num_before :] = True
        return mask.repeat(self._num_views).to(self._device)

    @property
    def compute_device(self) -> torch.device:
        """Where the memory is made: the given device, or the strategy's."""
        return self._device if self.device is None else resolve_device(self.device)

    @property
    def found_normalization(self) -> Normalization | None:
        """The normalisation of what is replayed: the given one, or the current experience's.

        None for features, which enter behind what is normalised.
        """
        return None if self.holds_features else self._found

    @property
    def holds_features(self) -> bool:
        """Whether the memory is one of features."""
        return self.store.keeper.holds_features

    @property
    def has_task_labels(self) -> bool:
        """Whether the current experience's items are ``(image, label, task label)``."""
        return self._item_length > 2

    def finish(self, strategy: Strategy | None = None) -> bool:
        """Make what an online stream has left into the memory; True where there was something.

        Args:
            strategy: Its ``model`` is what a selection sees, labels are made by and is matched on.
                Default: None, the one that was trained last, which a plugin that was loaded does
                not know.

        Raises:
            ConfigError: The network is needed, and not known.
        """
        if strategy is not None:
            self._attend(strategy.device, strategy.model)
        if not self.num_pending:
            return False
        needs_model = (
            self.labels == "soft"
            or self._first_weights is not None
            or self.store.keeper.needs_model
        )
        if self._model is None and needs_model:
            raise ConfigError(
                "what is left is made into the memory by the strategy's network, which a plugin "
                "that was loaded does not know: call finish(strategy)"
            )
        is_new = self.store.finish(
            model=self._model_of_images(), networks=self._networks(), note=self._note()
        )
        if is_new:
            self._label()
        return is_new

    def learn(self, strategy: Strategy, experience: Any) -> None:
        """Make an experience into the memory, outside of a training.

        A piece of an online stream is gathered, as the class says. For those that use the plugin
        as what makes a memory, such as :class:`~hmn_replay.MemoryBuffer`.

        Args:
            strategy: Its ``device`` and its ``model`` are used, where it has them.
            experience: An experience of Avalanche, or a piece of one.
        """
        self._attend(getattr(strategy, "device", "cpu"), getattr(strategy, "model", None))
        self._check_data(experiences_of(strategy, experience))
        if is_piece(strategy, experience):
            self._gather(experience)
            self._end_piece(experience)
        else:
            self._learn(experiences_of(strategy, experience))
            self._begun = ""

    def before_training(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Note the device, and check that the loss can be had."""
        self._drop_hooks()  # of a training that did not come to its end
        if sum(isinstance(plugin, MemoryReplay) for plugin in strategy.plugins) > 1:
            raise ConfigError(
                "a strategy has two plugins that replay from a memory, each of which takes the "
                "images at the end of a mini-batch, and the loss, for its own: give it one"
            )
        multi = heads_of_tasks(strategy.model)
        asked = [name for name in self._for_one_head() if name != "distill"]
        if multi and asked:
            raise ConfigError(
                f"{asked[0]} is for one head, and {type(multi[0]).__name__} has one for each task; "
                "leave it out"
            )
        if self.tune == "head" or getattr(find_loss(self.loss)[1], "needs_head", False):
            check_has_head(strategy.model)
        self._attend(strategy.device, strategy.model)
        self._num_pieces = 0
        self._settle(strategy, ())

    def before_train_dataset_adaptation(
        self, strategy: Strategy, *args: Any, **kwargs: Any
    ) -> None:
        """Check the experience's data, find its normalisation, and settle how to train on it."""
        self._is_renewed, self._own_counts = False, Counter()
        if self.mode == "memory_only" and is_piece(strategy, strategy.experience):
            raise ConfigError(
                'mode="memory_only" condenses an experience before training, but an online stream '
                'gives it in pieces: use mode="replay"'
            )
        for name, is_wanted in (("distill", self.distill), ("tune", self.tune != "none")):
            if is_wanted and is_piece(strategy, strategy.experience):
                raise ConfigError(
                    f"{name} needs to know where an experience begins and ends, but an online "
                    f"stream gives experiences in pieces: leave {name} out"
                )
        if not is_piece(strategy, strategy.experience):
            self.finish()  # what an online stream before it has left is older than its images
            self._checked.clear()
        experiences = experiences_of(strategy, strategy.experience)
        self._check_data(experiences)
        with isolated(self._device, self.seed, "room"):
            images = first_of_each_class(experiences, self._found, known=self._checked)
            if images is not None:
                self.store.check_room(self._embedded(images))
                self._checked.update(images.labels.tolist())
        self._settle(strategy, experiences)
        if self._has_tasks(experiences):
            self._refuse_tasks()
        if not has_plain_criterion(strategy) and (wanted := self._for_one_head()):
            raise ConfigError(
                f"{wanted[0]} is not for {owner_of_loss(strategy)}, which has a loss of its own"
            )
        old = torch.empty(0).long() if self.memory is None else self.memory.classes
        self._old_classes = old.cpu().clone()
        if self._is_other and self._checked.intersection(old.tolist()):
            self._warn(
                "another network is trained on classes that the memory has from before: a new run "
                "takes a new plugin, or begins with plugin.memory = None"
            )
        self._has_learned = self.store.num_updates > self._num_updates_before

    def after_train_dataset_adaptation(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Renew the memory, if it is before training; in ``"memory_only"``, train from it alone."""
        labels, tasks = split_class_keys(self._old_classes)
        if len(labels) and not tasks.any():
            adapt_heads(strategy.model, labels.tolist())
        with self._tuner.undone(strategy.model) as is_undone:
            if not is_undone:
                self._warn(
                    "the network was changed after it was tuned, and goes on as it is; otherwise "
                    "it would go on from its weights before the tuning"
                )
            self._digests = weight_digests(strategy.model) if self._may_distill() else {}
            if self.renew_used != "before":
                return
            images = self._learn(experiences_of(strategy, strategy.experience))
        self._is_renewed = True
        if self.mode == "replay":
            self._own_counts.update([] if images is None else images.labels.tolist())
            return
        decoded = self._decode()
        assert decoded is not None
        strategy.adapted_dataset = as_avalanche_dataset(
            decoded, self.found_normalization, with_tasks=self.has_task_labels
        )

    def before_training_exp(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Gather a piece of an online stream; decode the memory."""
        experience = strategy.experience
        self._current_counts, self._num_augmented = None, 0
        self._is_loss_checked = False
        if is_piece(strategy, experience):
            self._num_pieces += 1
            self._gather(experience)
        self._decode()
        experiences = experiences_of(strategy, experience)
        self._settle(strategy, experiences)
        self._drop_hooks()
        self._most_label = -1
        if self.memory is not None and has_plain_criterion(strategy):
            labels, _ = split_class_keys(self.memory.classes.cpu())
            self._most_label = max(labels.tolist(), default=-1)
        # Data sets that do not list their labels are not checked, and may have been counted.
        own = self._checked | set(self._own_counts)
        distilled = [c for c in self._old_classes.tolist() if c not in own]
        self.distill_used = 0.0
        if distilled:
            numbers = len(distilled), max(1, len(own))
            self.distill_used = self._weigh_distillation(strategy, experiences, *numbers)
        now = weight_digests(strategy.model) if self.distill_used else {}
        if any(now.get(name, digest) != digest for name, digest in self._digests.items()):
            self._warn(
                "the network that is distilled is not the one that the experience began with: a "
                f"plugin before {type(self).__name__} has changed it; name "
                f"{type(self).__name__} first among the plugins, or pass distill=0"
            )
        self._teacher = self._make_teacher(strategy.model, torch.tensor(distilled))
        needs_head = getattr(self._loss_now, "needs_head", False)
        if self.tune == "head" or needs_head:
            with isolated(self._device, self.seed, "first images"):
                images = first_images(experiences, 2)
            if len(images) > 1:  # a mistake is told before the first step
                head = self._find_head(strategy.model, images.to(self._device))
                self._head = Head(head) if needs_head else None

    def before_training_iteration(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Add decoded images to the mini-batch, or augment those that it consists of."""
        mbatch = strategy.mbatch
        self._note_replayed(len(mbatch[0]), 0)
        if self.mode == "memory_only":
            if self._is_renewed:
                self._note_replayed(0, len(mbatch[0]))
                if self.replay_transform is not None:
                    found = self.found_normalization
                    images = mbatch[0] if found is None else found.undo(mbatch[0])
                    images = images if self.holds_features else images.clamp(0, 1)
                    mbatch[0] = self._finished(images)
            return
        decoded = self._decode()
        if decoded is None or not len(decoded):
            return
        if not mbatch[0].dtype.is_floating_point:
            raise DataError(
                f"expected a mini-batch of floats, got {mbatch[0].dtype}; give the benchmark "
                "transforms that end in floats"
            )
        if self.recode_share:
            generator = make_generator(self.seed, "recode", self.store.num_draws)
            mbatch[0] = self._recoder(
                mbatch[0], self.recode_share, decoded.memory, self._found, generator
            )
        if decoded.memory.holds_features:
            mbatch[0] = self._backbone()(mbatch[0])
        count = self.batch_size_mem or strategy.train_mb_size
        images, keys, self._soft = self.store.sample_soft(
            count, dtype=mbatch[0].dtype, device=self._device
        )
        self._note_replayed(len(mbatch[0]), len(images))
        images = self._finished(images)
        labels, tasks = split_class_keys(keys)
        add_to_minibatch(mbatch, images, labels, tasks)
        self._replayed_labels = labels
        if self._head is None and getattr(self._loss_now, "needs_head", False):
            self._head = Head(self._find_head(strategy.model, mbatch[0]))

    def after_forward(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Count what others have put before the mini-batch since, and how often it is shown."""
        num_labels, num_replayed = len(strategy.mb_y), self._num_replayed
        num_others = num_labels - num_replayed
        is_replay = self.mode == "replay" and num_replayed > 0
        if is_replay and num_others != self._num_before:
            last = strategy.mb_y[num_others:]
            if num_others < 0 or not last.equal(self._replayed_labels.to(last)):
                raise ConfigError(
                    "another plugin has added images behind the replayed ones, which are expected "
                    f"at the end of a mini-batch: name {type(self).__name__} last among the plugins"
                )
        if is_replay and self._most_label >= 0:
            shape = tuple(getattr(strategy.mb_output, "shape", ()))
            if len(shape) == 2 and shape[1] <= self._most_label:
                raise ConfigError(
                    f"the memory has a class of label {self._most_label}, and the network "
                    f"{shape[1]} logits: give it one for each label from 0 on"
                )
        self._note_replayed(num_others, num_replayed, len(strategy.mbatch[0]) // max(1, num_labels))
        if self._teacher is not None:
            self._teacher.mark()

    def before_backward(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Put the replay loss in the place of the criterion, and add the distillation's."""
        given = strategy.loss.detach()
        if self._teacher is not None:
            term = distillation(strategy.mb_output, self._teacher.logits(), self._teacher.classes)
            strategy.loss = strategy.loss + self.distill_used * term
        num_replayed = self._num_replayed
        if self.mode == "memory_only" or not num_replayed:
            return
        if self._soft is not None and self.label_weight and self.labels == "soft":
            assert self.memory is not None
            term = label_distillation(
                strategy.mb_output[-num_replayed:],
                self._soft,
                self.memory.classes.to(self._device, non_blocking=True),
            )
            strategy.loss = strategy.loss + self.label_weight / len(strategy.mb_y) * term
        if self._loss_now is plain and self.replay_weight is None:
            return
        decoded = self._decode()
        assert decoded is not None
        logits, labels = strategy.mb_output, strategy.mb_y
        criterion = strategy.criterion()
        if not self._is_loss_checked:
            self._is_loss_checked = True
            if bool(given < _LEAST_SHARE * criterion.detach()):
                self._warn(
                    "the strategy's loss is less than its criterion: where another plugin scales "
                    "it, as to accumulate gradients, the replay loss cannot take the criterion's "
                    f"place; name {type(self).__name__} before that plugin"
                )
        step = ReplayStep(
            logits=logits,
            labels=labels,
            num_replayed=num_replayed,
            criterion=strategy._criterion,
            replay_weight=self.replay_weight,
            current_counts=self._count(labels[:-num_replayed], logits.shape[1]),
            memory_counts=count_labels(decoded, logits.shape[1]),
            strategy=strategy,
            head_logits=None if self._head is None else self._head.logits(logits),
        )
        # Another plugin may have added a term of its own before: only the criterion's is replaced.
        name, wanted = self.loss_used or "loss", "loss returns a scalar tensor"
        loss = checked_loss(self._loss_now(step), name, wanted, logits, "the logits")
        strategy.loss = strategy.loss - criterion + loss

    def after_training_exp(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Make the experience into the memory, if that was not done before."""
        self._drop_hooks()
        experience = strategy.experience
        if is_piece(strategy, experience):
            self._end_piece(experience)
        else:
            if not self._is_renewed:
                self._learn(experiences_of(strategy, experience))
            self._begun = ""
            self._tune(strategy)
            self._label()

    def after_training(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Where several pieces were given at once, they have come to their end."""
        if self._num_pieces > 1:
            self.finish()
        elif self._num_pieces and not strategy.experience.access_task_boundaries:
            self._warn(
                "the online stream hides where an experience ends: its images are made into the "
                f"memory each time that max_raw_images={self.max_raw_images} of them have come, "
                "and when finish() is called; access_task_boundaries=True of split_online_stream "
                "shows it"
            )
        self._note_replayed(0, 0)
        self._current_counts = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the plugin has learned; see :meth:`hmn_replay.ReplayMemory.state_dict`.

        With ``tune``, and where the network itself is matched on (``matching_networks``), weights
        of it are in it, too.
        """
        found = self._found
        settled = {
            "normalization": None if found is None else [*map(list, (found.mean, found.std))],
            "loss_used": self.loss_used,
            "renew_used": self.renew_used,
            "num_updates_before": self._num_updates_before,
            "tuned_digests": self._tuner.digests,
            "network": self._network_digest(),
        }
        kept = {_FIRST_WEIGHTS: self._first_weights, _UNTUNED_WEIGHTS: self._tuner.untuned}
        learned = {"training": settled, **{k: v for k, v in kept.items() if v is not None}}
        return {**self.store.state_dict(), **learned, "training_digest": digest_state(learned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; what follows is bit for bit what it would be.

        Raises:
            CheckpointError: The state is not one of this version, or is damaged; nothing changes.
        """
        learned = ("training", _FIRST_WEIGHTS, _UNTUNED_WEIGHTS)
        try:
            own = dict(state)
            kept = {name: own.pop(name) for name in learned if name in own}
            if "digest" in own and "training_digest" not in own:
                raise CheckpointError("it is that of a ReplayMemory, which knows of no training")
            # That a state is of another version, the store says.
            if own.pop("training_digest") != digest_state(kept) and own["version"] == STATE_VERSION:
                raise CheckpointError("it or its network was altered")
            settled = kept.pop("training")
            if not all(isinstance(x, Tensor) for each in kept.values() for x in each.values()):
                raise CheckpointError("its network has weights that are no tensors")
            found, names = settled["normalization"], (settled["loss_used"], settled["renew_used"])
            found = None if found is None else Normalization.of(found)
            if not all(name is None or isinstance(name, str) for name in names):
                raise CheckpointError(f"{names} are no names")
            num_before, tuned = as_int(settled["num_updates_before"]), settled["tuned_digests"]
            network = settled.get("network")
            if not isinstance(network, str | None):
                raise CheckpointError(f"{network!r:.60} is no digest of a network")
            if num_before is None or num_before < 0 or not isinstance(tuned, dict):
                raise CheckpointError("it counts updates otherwise than from 0 on")
        except (HMNReplayError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                "not a whole state of a replay memory: what it says of the training cannot be "
                f"read ({error}); take an earlier one"
            ) from error
        self.store.load_state_dict(own)
        self._begun = ""
        self._found = self.normalization or found
        self.loss_used, self.renew_used = names
        self._num_updates_before = num_before
        self._first_weights, untuned = (
            on_cpu(kept[name]) if name in kept else None
            for name in (_FIRST_WEIGHTS, _UNTUNED_WEIGHTS)
        )
        self._tuner = Tuner(untuned, dict(tuned))
        # What is trained next need not be the network of before.
        self._model, self._soft, self._network_before = None, None, network

    def __getstate__(self) -> dict[str, Any]:
        """Return what Avalanche's ``save_checkpoint`` keeps: no network, and no decoded image."""
        absent = dict.fromkeys(("_model", "_teacher", "_head", "_gathered"))
        return {**self.__dict__, **absent, "_network_before": self._network_digest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what :meth:`__getstate__` described."""
        self.__dict__.update(state)
        _reattach_optim_modules()

    def _attend(self, device: str | torch.device, model: nn.Module | None) -> None:
        """Note what is trained, and where."""
        known, before = self._model, self._network_before
        if model is not None:
            if known is not None:
                self._is_other = not is_same_network(known, model)
            else:
                self._is_other = before is not None and digest_of(model) != before
            self._network_before = None
            if self._is_other:
                # What is known of one network does not hold for another.
                self._first_weights, self._tuner = None, Tuner()
                self._num_updates_before = self.store.num_updates
        self._device, self._model = torch.device(device), known if model is None else model
        self.store.device = self.compute_device

    def _network_digest(self) -> str | None:
        """Return a digest of the network that was trained last, where it is known."""
        return self._network_before if self._model is None else digest_of(self._model)

    def _note(self) -> dict[str, Any]:
        """Return what the report says of the training, beside what it says of the memory."""
        return {"loss_used": self.loss_used, "renew_used": self.renew_used}

    def _for_one_head(self) -> list[str]:
        """Return the options that were asked for and need one head and a loss that can be had."""
        asked = {
            "distill": bool(self.distill),
            "tune": self.tune != "none",
            'labels="soft"': self.labels == "soft",
        }
        return [name for name, is_asked in asked.items() if is_asked]

    def _refuse_tasks(self) -> None:
        """Raise a ConfigError for an option that was asked for and that task labels rule out."""
        for name in self._for_one_head():
            raise ConfigError(
                f"{name} is for one head, without task labels above 0; leave it out where a stream "
                "has a head for each task"
            )

    def _weigh_distillation(
        self, strategy: Strategy, experiences: Sequence[Any], num_old: int, num_new: int
    ) -> float:
        """Return the weight of the distillation in an experience; by default where it can be."""
        if self.distill == "adaptive":
            return math.sqrt(num_old / num_new) if self._has_learned else 0.0
        if self.distill is not None:
            return self.distill
        can_be = has_plain_criterion(strategy) and not self._has_tasks(experiences)
        if not (can_be and self._has_learned and needs_all_classes(self._loss_now)):
            return 0.0
        if any(isinstance(plugin, LwFPlugin) for plugin in strategy.plugins):
            self._warn("LwFPlugin distils the previous network: going on as with distill=0")
            return 0.0
        if any(isinstance(plugin, FromScratchTrainingPlugin) for plugin in strategy.plugins):
            return 0.0  # each experience begins with a network that has learned nothing
        return 1.0

    def _may_distill(self) -> bool:
        return self._has_learned and self.distill != 0 and len(self._old_classes) > 0

    def _make_teacher(self, model: nn.Module, classes: Tensor) -> Teacher | None:
        """Return a copy of the network to distil, or None where none is wanted."""
        if not self.distill_used:
            return None
        try:
            return Teacher(model, classes.to(self._device))
        except Exception as error:  # what a network's own copying may raise
            reason = f"{type(model).__name__} cannot be copied, to be distilled later ({error})"
            if self.distill is not None:
                raise ConfigError(f"{reason}: pass distill=0") from error
            self._warn(f"{reason}; going on without, as with distill=0")
            self.distill_used = 0.0
            return None

    def _check_data(self, experiences: Sequence[Any]) -> None:
        self._found = self.normalization or find_normalization(*(e.dataset for e in experiences))
        with isolated(self._device, self.seed, "check"):
            if self.normalization is not None:
                check_is_normalised(experiences, self.normalization)
            self._item_length, self._image_shape = check_experiences(experiences, self._found)

    def _learn(self, experiences: Sequence[Any]) -> LabelledImages | None:
        """Make experiences into the memory; return their images.

        Where a training was interrupted, and is begun again, the memory has them.
        """
        if not any(len(each.dataset) for each in experiences):
            return None
        images = self._read(experiences)
        digest = digest_tensors("", {"images": images.images, "labels": images.labels})
        if digest != self._begun:
            self.store.update(
                images, model=self._model_of_images(), networks=self._networks(), note=self._note()
            )
        self._begun = digest
        return images

    def _taking_images(self, network: nn.Module) -> nn.Module:
        """Return a network for images in [0, 1], which the benchmark would normalise for it."""
        found = self.found_normalization
        return network if found is None else NormalisingNetwork(network, found)

    def _model_of_images(self) -> nn.Module | None:
        return None if self._model is None else self._taking_images(self._model)

    def _networks(self) -> Sequence[nn.Module]:
        """Return states of the strategy's network to match on; none by default."""
        return ()

    @torch.no_grad()
    def _label(self) -> None:
        """Let the network say what else the images resemble that have no soft label yet."""
        memory, model, found = self.memory, self._model, self._found
        if self.labels != "soft" or memory is None or model is None:
            return

        def network(images: Tensor) -> Tensor:
            images = images.to(self._device)  # the memory may be on another
            logits: Tensor = model(images if found is None else found.apply(images))
            return logits

        with evaluating(model):
            self.store.label(network, augmentations=self.label_augmentations)

    def _find_head(self, model: nn.Module, images: Tensor) -> nn.Linear:
        """Return the layer that makes the logits, found by two images as the network takes them."""
        with isolated(self._device, self.seed, "head"):
            return find_head(model, images[[0, -1]])

    def _tune(self, strategy: Strategy) -> None:
        """Tune the network, or its head, on class-balanced mini-batches of the memory's images."""
        decoded = self._decode()
        if self.tune == "none" or decoded is None or not len(self._old_classes):
            return
        model, number = strategy.model, self.store.num_updates
        tuned = model
        if self.tune == "head":
            images = as_floats(decoded.images[[0, -1]])
            images = finish_images(images, None, self.found_normalization)
            tuned = self._find_head(model, images)
        num_images = strategy.train_mb_size + (self.batch_size_mem or strategy.train_mb_size)
        teacher = self._make_teacher(model, decoded.memory.classes)
        positions = by_class(decoded.labels)

        def loss(step: int) -> Tensor:
            generator = make_generator(self.seed, "tune", number, step)
            chosen = draw_balanced(positions, num_images, generator)
            chosen = chosen.to(self._device, non_blocking=True)
            images = as_floats(decoded.images[chosen])
            images = finish_images(images, self.replay_transform, self.found_normalization)
            labels, _ = split_class_keys(decoded.labels[chosen])
            logits = model(images)
            term: Tensor = strategy._criterion(logits, labels)
            if teacher is None:
                return term
            teacher.mark()
            kept = distillation(logits, teacher.logits(), teacher.classes)
            return term + self.distill_used * kept

        try:
            with isolated(self._device, self.seed, "tune", number):
                self._tuner.tune(model, tuned, loss, steps=self.tune_steps, rate=self.tune_rate)
        finally:
            if teacher is not None:
                teacher.hook.remove()

    def untuned(self, model: nn.Module) -> AbstractContextManager[None]:
        """Give the network its weights from before the last tuning, inside a ``with`` block.

        Args:
            model: The network; without a tuning it stays as it is.
        """
        return weights_of(model, self._tuner.untuned or {})

    def _read(self, experiences: Sequence[Any]) -> LabelledImages:
        with isolated(self._device, self.seed, "read", *self.store.num_read):
            return self._embedded(read_experiences(experiences, self._found))

    def _embedded(self, images: LabelledImages) -> LabelledImages:
        """Return what the memory holds of images: these, or their features."""
        if not self.holds_features:
            return images
        transform = None if self._found is None else self._found.apply
        return extract_features(self._backbone(), images, transform=transform)

    def _backbone(self) -> FrozenBackbone:
        backbone = getattr(self._model, "backbone", None)
        if not isinstance(backbone, FrozenBackbone):
            raise ConfigError(
                "a memory of features is for a FeatureClassifier, whose frozen backbone makes "
                f"them; the model is a {type(self._model).__name__}"
            )
        return backbone

    def _gather(self, piece: Any) -> None:
        """Take the first piece of an experience for the end of the one before it, and add it."""
        if piece is self._gathered:  # it is trained on again, as after an interruption
            return
        if piece.access_task_boundaries and piece.is_first_subexp:
            self.finish()
        self.store.gather(self._read([piece]))
        self._gathered = piece

    def _end_piece(self, piece: Any) -> None:
        """Make what was gathered into the memory, if its end is known, or enough has come."""
        if piece.access_task_boundaries:
            # Avalanche calls no piece the last where all are of one size.
            num_all = len(piece.origin_experience.dataset)
            is_end = piece.is_last_subexp or self.store.gatherer.num_seen.total() >= num_all
        else:
            is_end = self.store.gatherer.num_seen.total() >= self.max_raw_images
        if is_end:
            self.finish()

    def _settle(self, strategy: Strategy, experiences: Sequence[Any]) -> None:
        asked = ReplayProtocol(self.mode, self.loss, self.renew, self.replay_weight)
        settled = asked.settle(
            strategy,
            experiences,
            has_memory=self.memory is not None,
            has_tasks=self._has_tasks(experiences),
            warn=self._warn,
        )
        self._loss_now, self.loss_used, self.renew_used = settled

    def _has_tasks(self, experiences: Sequence[Any]) -> bool:
        """Return whether experiences or the memory have task labels above 0.

        Of a network with a head for each task, those of the experiences to come count, too: the
        first task is trained on as the others are.
        """
        has_heads = self._model is not None and heads_of_tasks(self._model)
        known = with_their_streams(experiences) if has_heads else experiences
        keys = torch.empty(0) if self.memory is None else self.memory.classes
        has_tasks = any(any(getattr(each, "task_labels", ())) for each in known)
        return has_tasks or bool(split_class_keys(keys.long())[1].any())

    def _finished(self, images: Tensor) -> Tensor:
        """Return a mini-batch of replayed images, augmented and normalised."""
        found, transform = self.found_normalization, self.replay_transform
        if transform is None:
            return finish_images(images, None, found)
        self._num_augmented += 1
        number = self.store.num_updates, self.store.num_draws, self._num_augmented
        with isolated(self._device, self.seed, "augment", *number):
            return finish_images(images, transform, found)

    def _drop_hooks(self) -> None:
        for owner in (self._teacher, self._head):
            if owner is not None:
                owner.hook.remove()
        self._teacher = self._head = None

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{type(self).__name__}: {message}", HMNReplayWarning, stacklevel=2)

    def _note_replayed(self, num_before: int, num_replayed: int, num_views: int = 1) -> None:
        self._num_before, self._num_replayed = num_before, num_replayed
        self._num_views = num_views
        self.last_replay_size = num_views * num_replayed

    def _count(self, labels: Tensor, num_classes: int) -> Tensor:
        """Count the labels of a mini-batch with those of its experience so far: ``(K,)``."""
        if self._current_counts is None:
            seen = self.store.gatherer.num_seen + self._own_counts
            keys, counts = torch.tensor(list(seen)), torch.tensor(list(seen.values()))
            counted = class_counts(keys.long(), counts.float(), num_classes)
            self._current_counts = counted.to(labels.device)
        self._current_counts += class_counts(labels, torch.ones_like(labels).float(), num_classes)
        return self._current_counts

    def _decode(self) -> DecodedImages | None:
        return self.store.decoded(self._device)


def _reattach_optim_modules() -> None:
    """Let Avalanche's ``save_checkpoint`` pickle optimizers.

    Torch deletes the names of its modules such as ``torch.optim.sgd``, where dill, which Avalanche
    saves with, looks for a class; it then fails with a PicklingError, with or without a plugin.
    This puts the names back.
    """
    for name, module in list(sys.modules.items()):
        parent, _, child = name.rpartition(".")
        if parent == "torch.optim":
            setattr(torch.optim, child, module)


def replay_of(strategy: Any) -> MemoryReplay | None:
    """Return the plugin by which a strategy replays from a memory of this package.

    It is among the strategy's plugins, or that of a ``MemoryBuffer`` which the strategy (ER-ACE) or
    one of its plugins (Avalanche's ``ReplayPlugin``) keeps; None where there is none.
    """
    for owner in (strategy, *strategy.plugins):
        buffer = getattr(owner, "storage_policy", None)
        if isinstance(owner, MemoryReplay):
            return owner
        if isinstance(buffer, MemoryBuffer):
            return buffer.replay
    return None
