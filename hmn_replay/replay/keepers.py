"""What a memory keeps of the images that come: one keeper for learned kinds, one for real images.

A keeper makes the memory that follows another. It has settings and no state: what it makes depends
on its arguments alone.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hmn_replay.baselines.fill import QUALITIES, choose_quality, jpeg_images
from hmn_replay.budget import Budget, as_int
from hmn_replay.condensation.condense import check_config, condense
from hmn_replay.condensation.config import CondenseConfig, make_config
from hmn_replay.condensation.labelling import LabelConfig
from hmn_replay.condensation.selection import (
    SELECTIONS,
    check_method_of_features,
    select_images,
)
from hmn_replay.data.features import as_labelled_features
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.lookup import first_in_turn
from hmn_replay.errors import BudgetError, ConfigError, DataError
from hmn_replay.memory import (
    MEMORIES,
    JPEGMemory,
    LearnedMemory,
    Memory,
    PQMemory,
    RealMemory,
    loads,
)
from hmn_replay.memory.base import with_unknown
from hmn_replay.memory.checks import MAX_CLASSES, check_num_classes
from hmn_replay.memory.real import check_order
from hmn_replay.registry import check_name
from hmn_replay.runtime import derive_seed
from hmn_replay.settings import check_options
from hmn_replay.training.networks import is_built_in
from hmn_replay.training.train import TrainingConfig

__all__ = [
    "JPEGKeeper",
    "Keeper",
    "LearnedKeeper",
    "PQKeeper",
    "RealKeeper",
    "Selection",
    "check_learned_options",
    "check_same_shape",
    "hints_for",
    "make_keeper",
    "named_arguments",
    "options_of",
]

Selection: TypeAlias = "str | Callable[[LabelledImages, nn.Module], Tensor]"

AnyMemory = TypeVar("AnyMemory", bound=Memory)

# Images that are replayed beside real ones stay like these.
_FIDELITY = 0.3
# Of the network that real images are selected by at every update.
_SELECTION_TRAINING = TrainingConfig(width=32, num_passes=20_000)


class Keeper(ABC):
    """Says how a memory is renewed with images that come. Subclass it for a memory of your own."""

    @property
    def draws_globally(self) -> bool:
        """Whether :meth:`renew` may draw from the global generators of torch, numpy or Python.

        They are then seeded for it and restored afterwards, and one such call waits for another in
        a second thread. By default it may.
        """
        return True

    @property
    def memory_type(self) -> type[Memory] | None:
        """The class of the memories that it makes. None where that is not known: images, then."""
        return None

    @property
    def has_codec(self) -> bool:
        """Whether the memories that it makes have a codec; by default they may.

        See :meth:`hmn_replay.Memory.codec`. Where they have none, what needs one is refused before
        training.
        """
        return self.memory_type is None or self.memory_type.has_codec

    @property
    def needs_model(self) -> bool:
        """Whether :meth:`renew` cannot do without the network that is trained; by default it can.

        What an online stream has left is then made into the memory only where it is known.
        """
        return False

    @property
    def holds_features(self) -> bool:
        """Whether the memory is one of features, which then come in the place of images."""
        return self.memory_type is not None and self.memory_type.holds_features

    @abstractmethod
    def renew(
        self,
        images: LabelledImages,
        *,
        memory: Memory | None,
        index: int,
        seed: int,
        device: torch.device,
        model: nn.Module | None,
        networks: Sequence[nn.Module],
        progress: bool,
    ) -> tuple[Memory, dict[str, Any]]:
        """Make the memory that follows ``memory``, and leave that one as it is.

        Args:
            images: What came, such as the images of an experience.
            memory: What was kept so far; None at first.
            index: The number of the update: 0, 1, ...
            seed: Seed of the whole run; draws should differ from one ``index`` to the next.
            device: Where to compute.
            model: A network that is being trained, to be left as it is; None where there is none.
            networks: States of one that was trained, to match on, to be left as they are; see
                :func:`hmn_replay.condense`. Empty where there are none.
            progress: Whether to show progress on standard error.

        Returns:
            The new memory, and what to add to the report, of types that JSON has.
        """

    def check_room(  # noqa: B027  # nothing to refuse is a default
        self, images: LabelledImages, *, memory: Memory | None, num_classes: int
    ) -> None:
        """Refuse images after which the memory would not fit its budget. By default none are.

        Args:
            images: One image or more of each class that comes.
            memory: What was kept so far; None at first.
            num_classes: How many classes there are in ``memory``, in ``images`` and in what waits
                to be kept, together.

        Raises:
            BudgetError: The budget does not hold one image of each of these classes, and of each
                that is expected; the message says what would do.
        """


class LearnedKeeper(Keeper):
    """Condenses what comes into a learned memory, by :func:`hmn_replay.condense` with ``memory=``.

    New classes get memories of their own, old ones give up instance memories, classes that come
    back are renewed, and the saved file stays within the budget.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        kind: A learned memory kind: ``"hmn"``, or ``"fred"``, ``"pixels"``, ``"idc"``, ``"haba"``,
            ``"linba"``; ``"features"`` for a frozen network's features.
        expected_classes: How many classes there will be in all, if that is known: the memory's
            tensors are shaped for so many. Default: None, ten times those that come in an update,
            or as many of them as the budget can be shaped for.
        config: Settings of the condensation, in place of ``effort`` and ``options``. Default: None,
            those of ``effort``.
        effort: ``"draft"``, ``"quick"``, ``"standard"`` or ``"paper"``. The default is made for
            streams, where training waits for every update.
        **options: Fields of :class:`~hmn_replay.CondenseConfig`, but those of
            :class:`~hmn_replay.LabelConfig`: labels are made by the network that learns, see
            :meth:`hmn_replay.ReplayMemory.label`. Default of ``fidelity``: 0.3, for a network that
            learns from real images too; 0 is better for one that learns from the memory alone.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
        UnknownOptionError: An option that there is not; also a TypeError.
    """

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        kind: str = "hmn",
        expected_classes: int | None = None,
        config: CondenseConfig | None = None,
        effort: str = "draft",
        **options: Any,
    ) -> None:
        if config is not None and (options or effort != "draft"):
            given = sorted(options) or ["effort"]
            raise ConfigError(f"config= has all settings; give it alone, without {given[0]}=")
        if config is not None and not isinstance(config, CondenseConfig):
            raise ConfigError(
                f"config= is a hmn_replay.CondenseConfig; got {config!r:.80}: pass single settings "
                "as options"
            )
        memory_type = MEMORIES[kind]
        if not issubclass(memory_type, LearnedMemory):
            held, plugins = "images", "RawReplay, JPEGReplay or LosslessReplay"
            if memory_type.holds_features:
                held, plugins = "features", "MemoryReplay with a RealKeeper or a PQKeeper"
            raise ConfigError(
                f"what is learned is condensed, and {kind!r} holds real {held}: use {plugins}, or "
                "without Avalanche ReplayMemory"
            )
        own = [name for name in LabelConfig.model_fields if name in options]
        check_learned_options(f"the memory kind {kind!r}", named_arguments(LearnedKeeper), options)
        if own or (config is not None and config.labels != "hard"):
            raise ConfigError(
                f"{own[0] if own else 'labels'}: in a stream the network that learns makes the "
                'labels, by HMNReplay(labels="soft") or ReplayMemory.label(network); leave it out'
            )
        self.budget, self.kind = Budget.parse(budget), kind
        self.effort = effort if config is None else None
        config = config or make_config(effort, **{**memory_type.settings, **options})
        self.config = config if config.fidelity is not None else config.replace(fidelity=_FIDELITY)
        check_config(self.config, memory_type)
        self.expected_classes = _number_of_classes(expected_classes)

    @property
    def draws_globally(self) -> bool:
        """Whether a network or an objective is a user's own; see :class:`Keeper`."""
        return self.config.draws_globally

    @property
    def memory_type(self) -> type[LearnedMemory]:
        """The class of the memory kind."""
        found = MEMORIES[self.kind]
        assert issubclass(found, LearnedMemory)
        return found

    def check_room(
        self, images: LabelledImages, *, memory: Memory | None, num_classes: int
    ) -> None:
        """Refuse what the budget cannot hold; see :meth:`Keeper.check_room`."""
        count, known = max(num_classes, self.expected_classes or 0), {*images.classes.tolist()}
        if memory is None:
            layout = self._choose_layout(images, count)
        else:
            layout = _of_type(memory, self.memory_type).layout
            check_same_shape(memory, images)
            known.update(memory.classes.tolist())
        self.memory_type.max_images(layout, self.budget, with_unknown(known, count))

    def renew(
        self,
        images: LabelledImages,
        *,
        memory: Memory | None,
        index: int,
        seed: int,
        device: torch.device,
        model: nn.Module | None = None,
        networks: Sequence[nn.Module] = (),
        progress: bool = False,
    ) -> tuple[LearnedMemory, dict[str, Any]]:
        """Condense images into the memory; see :meth:`Keeper.renew`."""
        condensed = condense(
            images,
            self.budget,
            kind=self.kind,
            memory=_copied(memory, self.memory_type, device),
            expected_classes=self._expected(images),
            config=self.config,
            seed=derive_seed(seed, "update", index),
            device=device,
            progress=progress and sys.stderr.isatty(),
            networks=networks,
        )
        note = {"effort": self.effort, "networks_given": len(networks)}
        return condensed, {**condensed.report, **note}

    def _expected(self, images: LabelledImages) -> int | None:
        if self.expected_classes is not None:
            return self.expected_classes
        for factor in (10, 5, 2):
            expected = min(factor * images.num_classes, MAX_CLASSES)
            with contextlib.suppress(BudgetError):
                self._choose_layout(images, expected)
                return expected
        return None

    def _choose_layout(self, images: LabelledImages, num_classes: int) -> Any:
        """Return the layout for so many classes, or raise a BudgetError where none fits."""
        return self.memory_type.choose_layout(
            self.budget,
            images.image_shape,
            num_classes,
            self.config.number_format,
            image_bytes=self.config.image_bytes,
        )


class RealKeeper(Keeper):
    """Keeps real images, as many of every class as fit a budget of bytes.

    When classes come, the others make room by dropping their last images. An image once encoded
    stays as it is, byte for byte. Of a class that comes again new and old images take turns, as
    many of both.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        kind: A kind of real images: ``"raw"``, ``"lossless"``, ``"subsampled"``, ``"raw-features"``
            for features, or one that was registered. For ``"jpeg"`` :class:`JPEGKeeper` chooses a
            quality; ``"pq"`` has :class:`PQKeeper`, which trains its codebook.
        selection: Which images of a class stay longest: one of :data:`hmn_replay.SELECTIONS`, or a
            callable that takes the images that come and the network that is being trained, and
            returns their order, int64 ``(n,)``. Where a benchmark normalises images, a plugin wraps
            the network in a module that does, whose ``network`` it is.
        training: Training of the network that a selection by name needs, other than ``"random"``.
            Default: None, a ConvNet of width 32 that is shown 20,000 images.
        expected_classes: How many classes there will be in all, if that is known: a budget that
            does not hold one image of each is refused. Default: None, those that are there.
        **settings: Those of the kind, see :class:`RealMemory`, such as ``factor`` of
            ``"subsampled"``.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range, or a setting that is missing.
        UnknownOptionError: A setting that the kind does not have; also a TypeError.
    """

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        kind: str = "raw",
        selection: Selection = "random",
        training: TrainingConfig | None = None,
        expected_classes: int | None = None,
        **settings: Any,
    ) -> None:
        check_own_settings(kind, RealKeeper, named_arguments(RealKeeper))
        check_name("selection", selection, SELECTIONS, or_callable=True)
        memory_type = MEMORIES[kind]
        if not issubclass(memory_type, RealMemory):
            raise ConfigError(f"{kind!r} is learned, and has a LearnedKeeper")
        if memory_type.holds_features and not callable(selection):
            check_method_of_features(selection)
        known = [*named_arguments(RealKeeper), *memory_type.setting_types]
        check_options(f"the memory kind {kind!r}", settings, known, hints_for(settings))
        missing = [name for name in memory_type.required_settings() if name not in settings]
        if missing and type(self).empty is RealKeeper.empty:
            given = "give it, or " if missing[0] in memory_type.setting_types else ""
            keeper = _KEEPERS[kind].__name__ if kind in _KEEPERS else "Keeper of your own"
            raise ConfigError(
                f"the memory kind {kind!r} needs {missing[0]}=; {given}use a {keeper}"
            )
        if memory_type.setting_types and not missing:
            memory_type.check_settings(**settings)
        self.budget, self.kind, self.settings = Budget.parse(budget), kind, settings
        self.selection, self.training = selection, training
        self.expected_classes = _number_of_classes(expected_classes)

    @property
    def draws_globally(self) -> bool:
        """Whether the selection or its network is a user's own; see :class:`Keeper`."""
        is_ours = self.training is None or is_built_in(self.training.network)
        return callable(self.selection) or not is_ours

    @property
    def needs_model(self) -> bool:
        """Whether the selection is a function of the network; see :class:`Keeper`."""
        return callable(self.selection)

    @property
    def memory_type(self) -> type[RealMemory]:
        """The class of the memory kind."""
        found = MEMORIES[self.kind]
        assert issubclass(found, RealMemory)
        return found

    def empty(self, image_shape: tuple[int, int, int]) -> RealMemory:
        """Return a memory without images, for their size; of codecs the setting of fewest bytes."""
        return self.memory_type(image_shape, **self.settings)

    def begin(
        self, images: LabelledImages, order: Tensor, *, seed: int, device: torch.device
    ) -> tuple[RealMemory, dict[str, Any]]:
        """Return the first memory, filled, and what to add to its report."""
        memory = self.empty(images.image_shape)
        memory.budget_bytes = self.budget.num_bytes
        memory.extend(images, order=order)
        return memory, {}

    def check_room(
        self, images: LabelledImages, *, memory: Memory | None, num_classes: int
    ) -> None:
        """Refuse what the budget cannot hold; see :meth:`Keeper.check_room`."""
        if memory is None:
            memory = self.empty(images.image_shape)
        classes, limit = max(num_classes, self.expected_classes or 0), self.budget.num_bytes
        held = _of_type(memory, self.memory_type)
        needed = held.bytes_of_one_each(classes, limit, images)
        if needed > limit:
            raise BudgetError(
                f"a budget of {limit:,} bytes does not hold one image of each of "
                f"{classes} classes; about {needed:,} bytes would"
            )

    def renew(
        self,
        images: LabelledImages,
        *,
        memory: Memory | None,
        index: int,
        seed: int,
        device: torch.device,
        model: nn.Module | None = None,
        networks: Sequence[nn.Module] = (),
        progress: bool = False,
    ) -> tuple[RealMemory, dict[str, Any]]:
        """Add images to the memory; see :meth:`Keeper.renew`."""
        if not callable(self.selection):
            order = select_images(
                images,
                self.selection,
                config=self.training or _SELECTION_TRAINING,
                seed=derive_seed(seed, "selection", index),
                device=device,
            )
        elif model is None:
            raise ConfigError(
                "a selection by the network needs one: pass model=, or train the strategy first"
            )
        else:
            order = check_order(self.selection(images, model), len(images))
        extended = _copied(memory, self.memory_type, torch.device("cpu"))
        note: dict[str, Any] = {}
        known = {*images.labels[order].tolist()}
        if extended is None:
            extended, note = self.begin(images, order, seed=seed, device=device)
        else:
            counts = zip(extended.classes.tolist(), extended.images_per_class, strict=True)
            known.update(label for label, count in counts if count)
            extended.budget_bytes = self.budget.num_bytes
            extended.extend(images, order=order)
        if missing := sorted(known - {*extended.classes.tolist()}):
            raise BudgetError(
                f"a budget of {self.budget.num_bytes:,} bytes does not hold one image of each of "
                f"{len(known)} classes: there is none left of {missing[0]}; give more"
            )
        return extended, note


class JPEGKeeper(RealKeeper):
    """Keeps real images as JPEG scans under one header.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        quality: libjpeg's, 1 (smallest) to 100 (best). Default: None, the one that a small network
            learns best from, by a training each on the images that come first; see
            :func:`hmn_replay.baselines.fill.choose_quality`. Or a lower one, where the budget would
            not hold one image of each class that is expected.
        expected_classes: How many classes there will be in all, if that is known, for that choice.
            Default: None, ten times those that come first.
        training: Training of that network, and of a selection's. Default: None, that of
            ``choose_quality``, and for a selection that of :class:`RealKeeper`.
        selection: Which images of a class stay longest; see :class:`RealKeeper`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
    """

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        quality: int | None = None,
        expected_classes: int | None = None,
        training: TrainingConfig | None = None,
        selection: Selection = "random",
    ) -> None:
        super().__init__(
            budget,
            kind=JPEGMemory.kind,
            selection=selection,
            training=training,
            expected_classes=expected_classes,
        )
        if quality is not None and not 1 <= (as_int(quality) or 0) <= 100:
            raise ConfigError(
                f"quality must be None or a whole number from 1 to 100; got {quality!r}"
            )
        self.quality = quality

    def empty(self, image_shape: tuple[int, int, int]) -> RealMemory:
        """Return a memory without images, at the quality given, or at the lowest."""
        return JPEGMemory(image_shape, quality=self.quality or 1)

    def begin(
        self, images: LabelledImages, order: Tensor, *, seed: int, device: torch.device
    ) -> tuple[RealMemory, dict[str, Any]]:
        """Return the first memory, filled, after the choice of its quality."""
        report: dict[str, Any] = {}
        quality = self.quality
        if quality is None:
            quality, report["accuracies"] = choose_quality(
                images,
                self.budget,
                expected_classes=self.expected_classes,
                seed=seed,
                device=device,
                training=self.training,
            )
            quality = self._affordable(images, order, quality)
        return jpeg_images(images, self.budget, quality=quality, selection=order), report

    def _affordable(self, images: LabelledImages, order: Tensor, quality: int) -> int:
        """Return a quality, or a lower one where the budget would not hold one of each class."""
        positions = first_in_turn(images.labels[order], torch.arange(len(order)))
        first_of_each = images.take(order[positions[: images.num_classes]])
        for lower in (quality, *sorted(q for q in (1, 2, *QUALITIES) if q < quality)[::-1]):
            keeper = JPEGKeeper(self.budget, quality=lower, expected_classes=self.expected_classes)
            with contextlib.suppress(BudgetError):
                keeper.check_room(first_of_each, memory=None, num_classes=images.num_classes)
                return lower
        return 1

    def renew(self, images: LabelledImages, **context: Any) -> tuple[RealMemory, dict[str, Any]]:
        """Add images to the memory, at the quality of those that are there."""
        memory, report = super().renew(images, **context)
        return memory, {"quality": memory.summary()["quality"], **report}


class PQKeeper(RealKeeper):
    """Keeps features by product quantisation, with a codebook of those that come first.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        num_parts: As in :class:`PQMemory`.
        bits: As in :class:`PQMemory`.
        selection: Which images of a class stay longest; see :class:`RealKeeper`.
        expected_classes: As in :class:`RealKeeper`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
        MissingExtraError: With the first features, where faiss is not installed.
    """

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        num_parts: int = 16,
        bits: int = 4,
        selection: Selection = "random",
        expected_classes: int | None = None,
    ) -> None:
        super().__init__(
            budget, kind=PQMemory.kind, selection=selection, expected_classes=expected_classes
        )
        # Its settings are checked by making one, of as many channels as parts.
        PQMemory((max(1, as_int(num_parts) or 0), 1, 1), num_parts=num_parts, bits=bits)
        self.num_parts, self.bits = num_parts, bits

    def empty(self, image_shape: tuple[int, int, int]) -> RealMemory:
        """Return a memory without features."""
        return PQMemory(image_shape, num_parts=self.num_parts, bits=self.bits)

    def begin(
        self, images: LabelledImages, order: Tensor, *, seed: int, device: torch.device
    ) -> tuple[RealMemory, dict[str, Any]]:
        """Return the first memory, filled, after the training of its codebook."""
        memory = PQMemory.train(
            as_labelled_features(images),
            num_parts=self.num_parts,
            bits=self.bits,
            budget=self.budget,
            seed=derive_seed(seed, "codebook") % 2**31,
        )
        memory.extend(images, order=order)
        return memory, {"num_parts": self.num_parts, "code_bits": self.bits}


_KEEPERS: dict[str, type[RealKeeper]] = {"jpeg": JPEGKeeper, "pq": PQKeeper}
"""The keepers of those kinds of real images that have another than :class:`RealKeeper`."""


_OTHER_NAMES = {
    "mem_size": "a memory is bounded by its budget in bytes, such as Budget.raw_images(2000, "
    "(3, 32, 32)) for those of 2000 images",
    "num_classes": "classes that are to come are expected_classes=",
    "ipc": "a budget in images per class is Budget.ipc(images, (3, 32, 32), classes)",
}
"""Options that others have, and what there is in their place."""


def check_same_shape(memory: Memory, images: LabelledImages) -> None:
    """Raise a DataError for images of another size than a memory's."""
    if memory.image_shape != images.image_shape:
        raise DataError(
            f"the memory has images of {memory.image_shape}, and what comes is of "
            f"{images.image_shape}; both must have the same (C, H, W)"
        )


def check_learned_options(owner: str, others: Iterable[str], options: Iterable[str]) -> None:
    """Raise an UnknownOptionError for an option that is no setting of a condensation.

    Args:
        owner: What takes the options, for the message.
        others: Names of its other options, which are suggested as well.
        options: The names of the options.
    """
    unknown = [name for name in options if name not in CondenseConfig.model_fields]
    known = [*others, *_settings()]
    check_options(owner, unknown, known, hints_for(unknown), CondenseConfig.catalogue)


def _settings() -> list[str]:
    """Return the settings of a condensation in a stream."""
    return [name for name in CondenseConfig.model_fields if name not in LabelConfig.model_fields]


def options_of(kind: str) -> list[str]:
    """Return the options that the keeper of a memory kind takes beside budget and kind."""
    memory_type = MEMORIES[kind]
    if issubclass(memory_type, LearnedMemory):
        options = {*named_arguments(LearnedKeeper), *_settings()}
    else:
        own = () if kind in _KEEPERS else getattr(memory_type, "setting_types", ())
        options = {*named_arguments(_KEEPERS.get(kind, RealKeeper)), *own}
    return sorted(options - {"budget", "kind"})


def hints_for(options: Iterable[str]) -> dict[str, str]:
    """Return what to say of options: which kinds have one, and what is in the place of others'."""
    all_options = {repr(kind): options_of(kind) for kind in MEMORIES}
    found = dict(_OTHER_NAMES)
    for option in options:
        kinds = [kind for kind, its_options in all_options.items() if option in its_options]
        if kinds:
            of = "kinds" if len(kinds) > 1 else "kind"
            found[option] = f"it is an option of the memory {of} {', '.join(kinds)}"
    return found


def check_own_settings(kind: str, owner: Callable[..., Any], taken: Iterable[str]) -> None:
    """Refuse a kind with a setting of the name of an argument, which would take what is given.

    Args:
        kind: The memory kind.
        owner: What has the arguments, and passes settings on.
        taken: Their names.

    Raises:
        ConfigError: There is such a setting.
    """
    own = getattr(MEMORIES[kind], "setting_types", {})
    if both := sorted(own.keys() & set(taken)):
        raise ConfigError(
            f"{both[0]!r} is an argument of {owner.__name__}, and a setting of the memory kind "
            f"{kind!r}, which would not be given it: rename the setting"
        )


def named_arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's arguments, without ``**options``."""
    arguments = inspect.signature(function).parameters.values()
    return [each.name for each in arguments if each.kind is not each.VAR_KEYWORD]


def make_keeper(budget: Budget | int | str, kind: str = "hmn", **options: Any) -> Keeper:
    """Return the keeper of a memory kind.

    Args:
        budget: Bytes that the memory's file may take at any time.
        kind: A memory kind: learned or of real images.
        **options: Those of :class:`LearnedKeeper`, :class:`JPEGKeeper`, :class:`PQKeeper` or
            :class:`RealKeeper`, the settings of a kind that was registered among them.

    Raises:
        UnknownOptionError: An option that the kind does not have; also a TypeError.
        ConfigError: An unknown kind, or a value outside its range.
        BudgetError: The budget cannot be read.
    """
    memory_type = MEMORIES[kind]
    if issubclass(memory_type, LearnedMemory):
        return LearnedKeeper(budget, kind=kind, **options)
    check_options(f"the memory kind {kind!r}", options, options_of(kind), hints_for(options))
    if kind in _KEEPERS:
        return _KEEPERS[kind](budget, **options)
    return RealKeeper(budget, kind=kind, **options)


def _copied(
    memory: Memory | None, memory_type: type[AnyMemory], device: torch.device
) -> AnyMemory | None:
    """Return a memory as its file has it, so that a run that goes on from a file does the same."""
    if memory is None:
        return None
    return _of_type(loads(memory.to_bytes(), device=device), memory_type)


def _of_type(memory: Memory, memory_type: type[AnyMemory]) -> AnyMemory:
    """Return a memory that is of a class, or raise a ConfigError."""
    if not isinstance(memory, memory_type):
        raise ConfigError(
            f"what is extended must be a {memory_type.__name__}; the memory is {memory!r}: give "
            "one of the same kind"
        )
    return memory


def _number_of_classes(num_classes: int | None) -> int | None:
    """Return a number of classes that a memory can have, or None where it is not known."""
    return None if num_classes is None else check_num_classes(num_classes, "expected_classes")
