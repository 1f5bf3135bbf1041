"""The replay memory: what a training loop of any kind keeps, draws from, and goes on with.

memory = ReplayMemory("300 KiB")
for images, labels in experiences:
    memory.update(images, labels)
    ...
    old_images, old_labels = memory.sample(64)
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hmn_replay.budget import Budget, as_int
from hmn_replay.condensation.labelling import LABEL_AUGMENTATIONS, label_images
from hmn_replay.data.features import read_data
from hmn_replay.data.images import ImageSource, LabelledImages, joined_names
from hmn_replay.data.lookup import first_in_turn
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    HMNReplayError,
    HMNReplayWarning,
)
from hmn_replay.files import tensor_bytes
from hmn_replay.memory import Memory, loads
from hmn_replay.memory.file import as_bytes
from hmn_replay.replay.gatherer import Gatherer
from hmn_replay.replay.keepers import (
    Keeper,
    check_own_settings,
    check_same_shape,
    make_keeper,
    named_arguments,
)
from hmn_replay.runtime import (
    check_seed,
    derive_seed,
    isolated,
    make_generator,
    resolve_device,
    without_autocast,
)
from hmn_replay.training.networks import Network, device_of, evaluating

__all__ = ["STATE_VERSION", "DecodedImages", "ReplayMemory", "digest_memory", "digest_state"]

STATE_VERSION = 4

Result = TypeVar("Result")


class ReplayMemory:
    """A memory that is renewed with what comes, and drawn from; it needs no framework.

    Torch's, numpy's and Python's global generators stay as they are: every draw has a generator of
    its own, which comes from ``seed`` and the number of the draw.

    Args:
        budget: Bytes that the memory's file may take at any time, such as ``"300 KiB"``; or a
            :class:`Keeper`, for a memory of your own.
        kind: A memory kind: ``"hmn"`` or another learned one, ``"jpeg"``, ``"raw"``,
            ``"subsampled"`` or ``"lossless"``; of features ``"features"``, ``"raw-features"`` or
            ``"pq"``. Not used with a keeper.
        max_raw_images: Bound on the images that :meth:`gather` holds, but for one of each class.
            They do not count towards the memory's bytes.
        seed: Seed of every draw.
        device: Where the memory is made and drawn: ``"auto"`` for CUDA where there is one, else the
            CPU, or anything that ``torch.device`` takes.
        progress: Whether to print a line on standard error after each update; in a terminal bars
            are shown too.
        **options: Those of the kind's keeper: ``expected_classes``, ``effort`` and any field of
            :class:`~hmn_replay.CondenseConfig` for learned kinds, see :class:`LearnedKeeper`;
            ``selection``, ``training``, ``expected_classes`` for real images, ``factor`` for
            subsampled ones, and ``quality`` for JPEG, see :class:`RealKeeper` and
            :class:`JPEGKeeper`; ``selection``, ``expected_classes``, ``num_parts`` and ``bits`` for
            features by product quantisation, see :class:`PQKeeper`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
        UnknownOptionError: An option that the kind does not have; also a TypeError.

    Attributes:
        keeper: What says how the memory is renewed.
        report: For each update a dict of JSON types: ``update`` (0, 1, ...), ``seconds``,
            ``num_images``, ``images_per_class``, ``file_bytes``, ``fill``, its share of the budget
            (None where the memory has none), and what the keeper adds.
        gatherer: What waits for :meth:`finish`.
        device: As resolved.
    """

    report: list[dict[str, Any]]

    def __init__(
        self,
        budget: Budget | int | str | Keeper,
        kind: str = "hmn",
        *,
        max_raw_images: int = 10_000,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(budget, Keeper):
            if options or kind != "hmn":
                raise ConfigError("a keeper has its own kind and options; give it alone")
            self.keeper = budget
        else:
            check_own_settings(kind, type(self), named_arguments(ReplayMemory))
            self.keeper = make_keeper(budget, kind, **options)
        if (as_int(max_raw_images) or 0) < 1:
            raise ConfigError(
                f"max_raw_images must be a whole number of 1 or more; got {max_raw_images!r}"
            )
        check_seed(seed)
        self.max_raw_images, self.seed, self.progress = max_raw_images, seed, progress
        self.device = resolve_device(device)
        self._memory: Memory | None = None
        self.report = []
        self.gatherer = Gatherer(max_raw_images, seed)
        self._num_updates = self._num_draws = 0
        self._decoded: DecodedImages | None = None

    def __len__(self) -> int:
        """Return how many images can be drawn."""
        return 0 if self.memory is None else self.memory.num_images

    def __repr__(self) -> str:
        budget = "" if self._budget_bytes is None else f"{self._budget_bytes:,} bytes, "
        return (
            f"{type(self).__name__}({type(self.keeper).__name__}, {budget}{self.num_updates} "
            f"updates, memory={self.memory!r})"
        )

    @property
    def memory(self) -> Memory | None:
        """What was last made, or None. It may be set to a memory that was loaded.

        Raises:
            ConfigError: On setting it: not a memory, or one of another kind than the keeper's.
            BudgetError: Its file is larger than the keeper's budget.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self._check_memory(memory)
        self._memory = memory

    def _check_memory(self, memory: Memory | None) -> None:
        """Refuse what the keeper could not go on from."""
        wanted = self.keeper.memory_type or Memory
        if memory is None:
            return
        if not isinstance(memory, wanted):
            what = f"{memory!r}" if isinstance(memory, Memory) else type(memory).__name__
            raise ConfigError(
                f"expected a {wanted.__name__} to go on from, got {what}: pass what "
                "hmn_replay.load(path) gives of such a memory's file, or choose its kind"
            )
        limit = self._budget_bytes
        if limit is not None and memory.file_bytes > limit:
            raise BudgetError(
                f"the memory takes {memory.file_bytes:,} bytes and the budget is {limit:,}: call "
                f"memory.shrink({limit}) first, or give more"
            )

    @property
    def _budget_bytes(self) -> int | None:
        """The keeper's budget; None where it has none."""
        budget = getattr(self.keeper, "budget", None)
        return budget.num_bytes if isinstance(budget, Budget) else None

    @property
    def memory_bytes(self) -> int:
        """The bytes of the memory's file; 0 without a memory."""
        return 0 if self.memory is None else self.memory.file_bytes

    @property
    def num_updates(self) -> int:
        """How many updates there were."""
        return self._num_updates

    @property
    def num_draws(self) -> int:
        """How often images were drawn."""
        return self._num_draws

    @property
    def num_read(self) -> tuple[int, int]:
        """How many updates there were, and how many images were gathered since."""
        return self._num_updates, self.gatherer.num_seen.total()

    def count_classes(self, images: LabelledImages) -> int:
        """Return how many classes there are in the memory, in what is gathered, and in images."""
        known = [] if self.memory is None else self.memory.classes.tolist()
        return len({*known, *self.gatherer.num_seen, *images.labels.tolist()})

    def check_room(self, images: ImageSource, labels: Any = None) -> None:
        """Refuse images after which the memory would not fit its budget; see :class:`Keeper`.

        Args:
            images: As in :meth:`update`; one of each class is enough.
            labels: As in :meth:`update`.

        Raises:
            BudgetError: The budget does not hold one image of each class that the memory has, of
                each of these, and of each that is expected, by hard labels; the message says what
                would do.
        """
        data = self._read(images, labels)
        num_classes = self.count_classes(data)
        self._making_room(
            lambda memory: self.keeper.check_room(data, memory=memory, num_classes=num_classes)
        )

    def _making_room(
        self, act: Callable[[Memory | None], Result]
    ) -> tuple[Result, BudgetError | None]:
        """Do something with the memory, or without its soft labels where they leave no room.

        Returns:
            What it gave, and the error where it was done without.
        """
        try:
            return act(self.memory), None
        except BudgetError as error:
            if self.memory is None or not self.memory.has_soft_labels:
                raise
            hard = copy.deepcopy(self.memory)
            hard.set_soft_labels(None)
            return act(hard), error

    def update(
        self,
        images: ImageSource,
        labels: Any = None,
        *,
        model: nn.Module | None = None,
        networks: Sequence[nn.Module] = (),
        note: Mapping[str, Any] | None = None,
    ) -> Memory:
        """Renew the memory with images.

        A class that the memory has already is renewed from its old and its new images: learned
        kinds are fitted to both, and of real images both take turns.

        Args:
            images: uint8, or floats in [0, 1], ``(N, C, H, W)`` or ``(N, H, W, C)``; or, without
                ``labels``, anything that :func:`hmn_replay.as_labelled_images` takes, such as a
                data set. For a memory of features these, as
                :func:`hmn_replay.as_labelled_features` takes them.
            labels: int64 ``(N,)``.
            model: The network that is being trained, for a selection by it; it is left as it is.
            networks: States of that network, the earliest first, for learned kinds to match on in
                place of networks that are trained for it; see :func:`hmn_replay.condense`.
            note: What to add to the entry of the report, of types that JSON has.

        Returns:
            The memory, which :attr:`memory` is from now on.

        Raises:
            DataError: Images or labels that cannot be used; a label that has another name in them
                than in the memory.
            BudgetError: The budget does not hold one image of each class, or of each that is
                expected, by hard labels; or a keeper made a memory above its budget. The memory
                stays as it was.
        """
        started, index = time.monotonic(), self._num_updates
        data = self._read(images, labels)
        first_of_each = first_in_turn(data.labels, torch.arange(len(data)))[: data.num_classes]

        def renew(memory: Memory | None) -> tuple[Memory, dict[str, Any]]:
            surroundings = without_autocast(self.device)
            if self.keeper.draws_globally:
                surroundings = isolated(self.device, self.seed, "update", index)
            with surroundings:
                first, num_classes = data.take(first_of_each), self.count_classes(data)
                self.keeper.check_room(first, memory=memory, num_classes=num_classes)
                return self.keeper.renew(
                    data,
                    memory=memory,
                    index=index,
                    seed=self.seed,
                    device=self.device,
                    model=model,
                    networks=networks,
                    progress=self.progress,
                )

        self._decoded = None  # room for what renews the memory; the old one can be decoded again
        renewed, reason = self._making_room(renew)
        if not isinstance(renewed, tuple) or len(renewed) != 2 or renewed[0] is None:
            raise ConfigError(
                "a keeper's renew returns a memory and a dict of what to report; got "
                f"{renewed!r:.80}"
            )
        memory, report = renewed
        self._check_memory(memory)
        if reason is not None:
            warnings.warn(
                f"images lost their soft labels, to make room: {reason}",
                HMNReplayWarning,
                stacklevel=2,
            )
        entry = {
            "update": index,
            **report,
            **(note or {}),
            "seconds": time.monotonic() - started,
            **_sizes(memory),
        }
        # Through JSON, so that what a checkpoint gives back has the same types.
        self.report.append(json.loads(json.dumps(entry, default=_plain)))
        self._memory, self._num_updates = memory, index + 1
        if self.progress:
            unused, share = entry.get("unused_reason"), entry["fill"]
            print(
                f"hmn_replay, update {index}: {memory.num_images:,} images of "
                f"{len(entry['images_per_class'])} classes in {entry['file_bytes']:,} bytes"
                + (f", {100 * share:.1f} % of the budget" if share else "")
                + f", {entry['seconds']:.0f} s"
                + (f" ({unused})" if unused else ""),
                file=sys.stderr,
                flush=True,
            )
        return memory

    def gather(self, images: ImageSource, labels: Any = None) -> None:
        """Take images that come in pieces, for :meth:`finish`.

        Beyond ``max_raw_images``, a random sample is kept, of every class alike, and one of each
        class at least.

        Args:
            images: As in :meth:`update`.
            labels: As in :meth:`update`.

        Raises:
            DataError: As :meth:`update`, and images of another size than those that were gathered
                or are in the memory; what was gathered stays as it was.
        """
        data = self._read(images, labels)
        if self.memory is not None:
            check_same_shape(self.memory, data)
            joined_names(self.memory.class_names, data.class_names)  # which checks them
        self.gatherer.add(data)

    def finish(
        self,
        *,
        model: nn.Module | None = None,
        networks: Sequence[nn.Module] = (),
        note: Mapping[str, Any] | None = None,
    ) -> bool:
        """Renew the memory with what was gathered; True where there was something.

        Args:
            model: As in :meth:`update`.
            networks: As in :meth:`update`.
            note: As in :meth:`update`.
        """
        images = self.gatherer.images()
        if images is not None:
            self.update(images, model=model, networks=networks, note=note)
            self.gatherer.clear()
        return images is not None

    def _read(self, images: ImageSource, labels: Any) -> LabelledImages:
        source = images if labels is None else (images, labels)
        # A data set may have transforms that draw.
        with isolated(self.device, self.seed, "read", *self.num_read):
            return read_data(source, holds_features=self.keeper.holds_features)

    def decoded(self, device: str | torch.device | None = None) -> DecodedImages | None:
        """Return all images, decoded once until the memory is another one; None without a memory.

        Args:
            device: Where they are kept. Default: :attr:`device`.
        """
        memory, decoded = self.memory, self._decoded
        if memory is None:
            return None
        # A device that has been looked at is not asked again: each time it would be waited for.
        target = self.device
        if device is not None:
            target = torch.device(device) if device != "auto" else resolve_device()
            if decoded is not None and target in (decoded.device, decoded.images.device):
                target = decoded.device  # which may be named without the number that it has
            elif target != self.device:
                target = resolve_device(target)
        if decoded is None or decoded.memory is not memory or decoded.device != target:
            self._decoded = decoded = DecodedImages.of(memory, target)
        return decoded

    def sample(
        self,
        count: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw images at random, none twice; the next call draws others.

        Args:
            count: How many, 1 or more; all, where there are fewer.
            dtype: A floating one for images in [0, 1], or ``torch.uint8``; features are floats.
            device: Where they are wanted. Default: :attr:`device`.

        Returns:
            Images ``(n, C, H, W)``, or features, and labels, int64 ``(n,)``.

        Raises:
            ConfigError: The memory is empty, or a value is outside its range.
        """
        images, labels, _ = self.sample_soft(count, dtype=dtype, device=device)
        return images, labels

    def sample_soft(
        self,
        count: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw images as :meth:`sample` does, with their soft labels.

        Args:
            count: As in :meth:`sample`.
            dtype: As in :meth:`sample`.
            device: As in :meth:`sample`.

        Returns:
            Images, labels, and what a network said of them: float32 ``(n, K)`` in the order of the
            memory's classes, as :meth:`hmn_replay.Memory.soft_labels` gives it; None where the
            memory has no soft labels.

        Raises:
            ConfigError: As :meth:`sample`.
        """
        decoded = self.decoded(device)
        if decoded is None or not len(decoded):
            raise ConfigError("there is nothing to draw: the memory is empty; call update() first")
        if (as_int(count) or 0) < 1:
            raise ConfigError(f"count must be a whole number of 1 or more; got {count!r}")
        # A generator a draw, so that a checkpoint needs the number of the draw alone.
        generator = make_generator(self.seed, "replay", self._num_draws)
        self._num_draws += 1
        return decoded.draw(count, dtype, generator)

    def label(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        classes: Sequence[int] | Tensor | None = None,
        views: int = 4,
        augmentations: Sequence[str] = LABEL_AUGMENTATIONS,
    ) -> int:
        """Give images that have hard labels soft ones, by what a network says of them.

        To be called when the network has learned what the memory was last renewed with. The file
        stays within the budget: images of the fullest classes make room.

        Args:
            network: From float images ``(B, C, H, W)`` in [0, 1] to logits ``(B, L)``; shown
                without gradients, and in evaluation mode if it is a module.
            classes: The L labels that the logits stand for, in any order. Default: None, those of
                the network's buffer ``classes`` for one of :func:`hmn_replay.build_network` or
                :func:`hmn_replay.evaluate`, and 0 to L - 1 for any other.
            views: How many augmentations a label is a mean over.
            augmentations: Their names; see :func:`hmn_replay.data.augment.draw_augmentation`.
                Without ``"flip"`` where a mirrored image is of no class, as digits are.

        Returns:
            How many images were labelled, those included that then made room; none, with a
            warning, where the budget does not hold one image of each class beside labels.

        Raises:
            ConfigError: There is no logit for a class of the memory, or it holds features.
        """
        if self.memory is None:
            return 0
        if self.memory.holds_features:
            raise ConfigError(
                "soft labels are what a network says of augmented images; features have none"
            )
        memory = copy.deepcopy(self.memory)
        chosen = (~memory.is_soft).nonzero().flatten()
        if not len(chosen):
            return 0
        wanted = memory.classes.tolist()
        if classes is None and isinstance(network, Network):
            classes = network.classes
        given = None if classes is None else [int(label) for label in classes]
        if given is not None and len(set(given)) < len(given):
            raise ConfigError("classes are the labels of the logits; some occur twice or more")

        def of_memory(images: Tensor) -> Tensor:
            logits = network(images)
            if logits.ndim != 2:
                raise ConfigError(f"expected logits (B, L); got shape {tuple(logits.shape)}")
            known = range(logits.shape[1]) if given is None else given
            position = {label: index for index, label in enumerate(known)}
            missing = sorted({*wanted} - {*position})
            if missing or len(known) != logits.shape[1]:
                raise ConfigError(
                    f"expected a logit for each class of the memory; of {logits.shape[1]} logits "
                    f"for {len(known)} labels there is none for {missing[:6]}: pass the labels "
                    "that the logits stand for as classes=, unless these are 0, 1, 2, ..."
                )
            return logits[:, [position[label] for label in wanted]]

        with evaluating(network), without_autocast(self.device):
            rows = label_images(
                of_memory,
                [memory.decode(chosen, dtype=torch.uint8)[0]],
                views=views,
                augmentations=augmentations,
                seed=derive_seed(self.seed, "labels", self._num_updates),
                device=device_of(network) if isinstance(network, nn.Module) else self.device,
            )
        memory.set_soft_labels(rows, chosen)
        try:
            memory.shrink(self._budget_bytes)
        except BudgetError as error:
            warnings.warn(f"images keep hard labels: {error}", HMNReplayWarning, stacklevel=2)
            return 0
        self._memory = memory
        if self.report:
            self.report[-1] |= _sizes(memory)
        return len(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, as tensors, numbers and texts, with a digest of all.

        It holds no settings: :meth:`load_state_dict` is for a memory made with the same ones.
        ``torch.load(..., weights_only=True)`` reads it from a file.
        """
        memory = b"" if self.memory is None else self.memory.to_bytes()
        state = {
            "version": STATE_VERSION,
            "memory": as_bytes(memory),
            "report": json.dumps(self.report),
            "num_updates": self._num_updates,
            "num_draws": self._num_draws,
            "pending": self.gatherer.state_dict(),
        }
        return {**state, "digest": digest_state(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; what follows is bit for bit what it would be.

        Raises:
            CheckpointError: The state is not one of this version, or is damaged; nothing changes.
        """
        gatherer = Gatherer(self.max_raw_images, self.seed)
        try:
            if "training_digest" in state:
                raise CheckpointError("it is that of a plugin, such as HMNReplay")
            version, digest = state["version"], state["digest"]
            if version != STATE_VERSION:
                raise CheckpointError(f"version {version!r}, expected {STATE_VERSION}")
            if digest != digest_state({key: state[key] for key in state if key != "digest"}):
                raise CheckpointError("its digest does not fit: it was altered")
            memory = state["memory"].cpu().numpy().tobytes()
            loaded = loads(memory, device=self.device) if memory else None
            self._check_memory(loaded)
            gatherer.load_state_dict(state["pending"])
            report = json.loads(state["report"])
            if not (isinstance(report, list) and all(isinstance(one, dict) for one in report)):
                raise CheckpointError("its report is no list of maps")
            updates, draws = as_int(state["num_updates"]), as_int(state["num_draws"])
            if updates is None or draws is None or min(updates, draws) < 0:
                raise CheckpointError("it counts updates and draws otherwise than from 0 on")
        except (
            HMNReplayError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
            RuntimeError,
        ) as error:
            raise CheckpointError(
                f"not a whole state of a replay memory: {error}; take an earlier one"
            ) from error
        self._memory, self.report, self.gatherer = loaded, report, gatherer
        self._num_updates, self._num_draws = updates, draws

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: no image that can be decoded again."""
        left_out = dict.fromkeys(("_memory", "report", "gatherer", "_decoded"))
        return {**self.__dict__, **left_out, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what :meth:`__getstate__` described; on the CPU where its device is not here."""
        learned = state.pop("state")
        self.__dict__.update(state)
        try:
            self.device = resolve_device(self.device)
        except ConfigError:  # of a machine with another device
            self.device = torch.device("cpu")
        self.load_state_dict(learned)


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """A memory's images, decoded once and kept on the device that trains.

    Attributes:
        memory: What they were decoded from.
        device: Where they are.
        images: uint8 ``(N, C, H, W)``: a quarter of the bytes that floats would take. Features are
            float32.
        labels: int64 ``(N,)``.
        soft: float32 ``(N, K)``, soft labels; None where the memory has none.
    """

    memory: Memory
    device: torch.device
    images: Tensor
    labels: Tensor
    soft: Tensor | None = None

    @classmethod
    def of(cls, memory: Memory, device: torch.device) -> DecodedImages:
        """Decode a memory where it is, and bring its images to a device."""
        with without_autocast(device):
            images, labels = memory.decode(dtype=memory.value_dtype)
        soft = memory.soft_labels().to(device) if memory.has_soft_labels else None
        return cls(memory, device, images.to(device), labels.to(device), soft)

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> DecodedImages:
        """Return the first images of every class, the classes taking turns, ``count`` at most."""
        if count >= len(self):
            return self
        turns = first_in_turn(self.labels, torch.arange(len(self), device=self.device))
        chosen = turns[:count].sort().values
        soft = None if self.soft is None else self.soft[chosen]
        parts = self.images[chosen], self.labels[chosen], soft
        return DecodedImages(self.memory, self.device, *parts)

    def draw(
        self, count: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw images at random, none twice.

        Args:
            count: How many; all, where there are fewer.
            dtype: Dtype of the images: a floating one for values in [0, 1], or uint8.
            generator: On the CPU.

        Returns:
            Images ``(n, C, H, W)``, labels, and soft labels or None.

        Raises:
            ConfigError: ``dtype`` is another.
        """
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype must be a torch.dtype, such as torch.float32; got {dtype!r}")
        is_fitting = dtype == torch.uint8 and not self.memory.holds_features
        if not (dtype.is_floating_point or is_fitting):
            raise ConfigError(
                f"dtype must be a floating one or torch.uint8; got {dtype}"
                + (" for features" if dtype == torch.uint8 else "")
            )
        indices = torch.randperm(len(self), generator=generator)[:count]
        indices = indices.to(self.device, non_blocking=True)
        images = self.images[indices]
        if dtype != torch.uint8:
            is_bytes = images.dtype == torch.uint8
            images = images.to(dtype).div_(255) if is_bytes else images.to(dtype)
        soft = None if self.soft is None else self.soft[indices]
        return images, self.labels[indices], soft


def _sizes(memory: Memory) -> dict[str, Any]:
    """Return what the report says of a memory."""
    file_bytes, budget_bytes = memory.file_bytes, memory.budget_bytes
    return {
        "num_images": memory.num_images,
        "images_per_class": list(memory.images_per_class),
        "file_bytes": file_bytes,
        "fill": None if budget_bytes is None else file_bytes / budget_bytes,
    }


def _plain(value: Any) -> Any:
    """Return a number, an array or anything else as JSON may have it."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def digest_memory(memory: Memory) -> bytes:
    """Return what tells a memory from others, in a checkpoint too."""
    return hashlib.blake2b(memory.to_bytes(), digest_size=16).digest()


def digest_state(state: dict[str, Any]) -> str:
    """Return 32 hexadecimal digits of nested numbers, texts and tensors, names among them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        if isinstance(value, dict):
            value = digest_state(value)
        if isinstance(value, Tensor):
            digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
            digest.update(tensor_bytes(value))
        else:
            digest.update(repr((name, value)).encode())
    return digest.hexdigest()
