"""The replay plugins of each kind of memory: learned ones, and real images in as many bytes.

replay = HMNReplay("300 KiB")
strategy = Naive(model=model, optimizer=optimizer, criterion=criterion, plugins=[replay])
for experience in benchmark.train_stream:
    strategy.train(experience)
replay.memory.save("seen.hmn")
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from hmn_replay.avalanche.losses import Loss, Renewal
from hmn_replay.avalanche.plugin import MemoryReplay
from hmn_replay.avalanche.streams import Strategy, experiences_of
from hmn_replay.avalanche.weights import on_cpu
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import EFFORTS, CondenseConfig, make_config
from hmn_replay.condensation.matchers import check_given_networks
from hmn_replay.errors import ConfigError
from hmn_replay.objectives import get_objective
from hmn_replay.registry import check_name
from hmn_replay.replay import LearnedKeeper, Selection, make_keeper
from hmn_replay.replay.keepers import (
    check_learned_options,
    check_own_settings,
    hints_for,
    named_arguments,
    options_of,
)
from hmn_replay.runtime import isolated
from hmn_replay.settings import check_options
from hmn_replay.training.networks import device_of, evaluating, tensors_of
from hmn_replay.training.train import TrainingConfig

__all__ = ["HMNReplay", "JPEGReplay", "LosslessReplay", "RawReplay", "SubsampledReplay"]


class ReplayOptions(TypedDict, total=False):
    """The options of :class:`MemoryReplay`, which its subclasses take too."""

    batch_size_mem: int | None
    mode: Literal["replay", "memory_only"]
    replay_transform: Callable[[Tensor], Tensor] | None
    replay_weight: float | None
    loss: Loss
    renew: Renewal
    distill: float | Literal["adaptive"] | None
    recode_share: float
    labels: Literal["hard", "soft"]
    label_weight: float
    label_augmentations: str | Collection[str]
    tune: Literal["none", "head", "all"]
    tune_steps: int
    tune_rate: float
    normalization: tuple[Sequence[float], Sequence[float]] | None
    max_raw_images: int
    seed: int
    device: str | torch.device | None
    progress: bool


REPLAY_OPTIONS = tuple(ReplayOptions.__annotations__)
"""The names of these options."""


class HMNReplay(MemoryReplay):
    """Replays a learned memory, condensed by matching, under a budget of bytes.

    With each experience its classes are added to the memory by :func:`hmn_replay.condense` with
    ``memory=``: new classes get memories of their own, old ones give up instance memories, classes
    that come back are renewed, and the saved file stays within the budget.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        kind: A learned memory kind: ``"hmn"``; ``"fred"``, the better one of both in streams so far
            (see the results in the documentation); ``"pixels"``, ``"idc"``, ``"haba"`` or
            ``"linba"``; or ``"features"`` for a model with a frozen backbone.
        expected_classes: How many classes the stream will have in all, if that is known: the
            memory's tensors are shaped for so many. Default: None, ten times those of the
            experience that comes, or as many of them as the budget can be shaped for.
        config: Settings of the condensation, in place of ``effort`` and ``options``. Default: None,
            those of ``effort``.
        effort: ``"draft"``, ``"quick"``, ``"standard"`` or ``"paper"``. The default is made for
            streams, where training waits for every update.
        matching_networks: ``"trained"``: what matching needs is trained from scratch on the
            experience, as ``trained_networks`` says. ``"own"``: once the strategy's network has
            learned anything, points between its first weights and those it has take their place,
            which costs no training. With ``renew="before"`` these know the old classes and not yet
            the new ones, and the first experience has none. The first weights are a copy in working
            memory, no part of the memory's file or budget. For networks with ``features(images)``,
            such as those of :func:`hmn_replay.build_network`, where the objective matches features;
            unless it does, not for task labels above 0. Default: ``"auto"``, the strategy's own
            where its ``features`` are a list, of each of its blocks, and else networks would be
            trained for an objective that matches features, with the settings that an effort has for
            them; otherwise ``"trained"``. The report says how many states of its own were used, as
            ``networks_given``.
        **options: Those of :class:`MemoryReplay`; and fields of
            :class:`~hmn_replay.CondenseConfig`, but those of :class:`~hmn_replay.LabelConfig`.
            Default of ``fidelity``: 0.3 where the memory is replayed beside real images, 0 with
            ``mode="memory_only"``.

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
        matching_networks: Literal["auto", "trained", "own"] = "auto",
        **options: Any,
    ) -> None:
        check_name("matching_networks", matching_networks, ("auto", "trained", "own"))
        replay: Any = {name: options.pop(name) for name in REPLAY_OPTIONS if name in options}
        others = [*named_arguments(type(self)), *REPLAY_OPTIONS]
        check_learned_options(type(self).__name__, others, options)
        if replay.get("mode") == "memory_only":  # no real images beside it
            if config is None:
                options = {"fidelity": 0.0, **options}
            elif config.fidelity is None:
                config = config.replace(fidelity=0.0)
        keeper = LearnedKeeper(
            budget,
            kind=kind,
            expected_classes=expected_classes,
            config=config,
            effort=effort,
            **options,
        )
        super().__init__(keeper, **replay)
        if matching_networks == "own" and keeper.holds_features:
            raise ConfigError("features are not matched: leave matching_networks out")
        self.matching_networks = matching_networks
        self._config = keeper.config
        objective = get_objective(keeper.config.objective)
        self._may_match_own = matching_networks == "own" or (
            matching_networks == "auto"
            and not keeper.holds_features
            and objective.matches_features
            and objective.matches_trained
            and _trains_usual_networks(keeper.config)
        )

    def before_training(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Bring the memory to where it is condensed; check the network that it is matched on."""
        super().before_training(strategy, *args, **kwargs)
        if self.memory is not None:
            self.memory.to(self.compute_device)
        if self.matching_networks == "own":
            check_given_networks(self._config.objective, [strategy.model])

    def before_train_dataset_adaptation(
        self, strategy: Strategy, *args: Any, **kwargs: Any
    ) -> None:
        """Check the experience's data; note the network's first weights."""
        super().before_train_dataset_adaptation(strategy, *args, **kwargs)
        if self._may_match_own and self._first_weights is None:
            model, is_asked = strategy.model, self.matching_networks == "own"
            if is_asked or _gives_blocks(model, self._image_shape):
                self._first_weights = on_cpu(tensors_of(model))
        needs_labels = not get_objective(self._config.objective).matches_features
        experiences = experiences_of(strategy, strategy.experience)
        if self.matching_networks == "own" and needs_labels and self._has_tasks(experiences):
            raise ConfigError(
                'matching_networks="own" is for one head, without task labels above 0, unless the '
                "objective matches features"
            )

    def _networks(self) -> Sequence[nn.Module]:
        """Return the network as it was at first and as it is, once it has learned anything."""
        model, first = self._model, self._first_weights
        if not self._may_match_own or model is None or first is None:
            return ()
        now, start = copy.deepcopy(model), copy.deepcopy(model)
        changed = False
        for name, value in tensors_of(start).items():
            # A head that has grown since has nothing to begin from.
            if name in first and first[name].shape == value.shape:
                changed = changed or not first[name].equal(value.cpu())
                value.copy_(first[name])
        if not changed:
            return ()
        return [self._taking_images(start), self._taking_images(now)]


class _RealReplay(MemoryReplay):
    """Replays real images of a kind, whose settings a subclass names as arguments of its own."""

    kind: ClassVar[str]

    def __init__(self, budget: Budget | int | str, **options: Any) -> None:
        owner = type(self)
        check_own_settings(self.kind, owner, REPLAY_OPTIONS)
        known = dict.fromkeys([*named_arguments(owner), *options_of(self.kind), *REPLAY_OPTIONS])
        check_options(owner.__name__, options, known, hints_for(options))
        replay: Any = {name: options.pop(name) for name in REPLAY_OPTIONS if name in options}
        super().__init__(make_keeper(budget, self.kind, **options), **replay)


class RawReplay(_RealReplay):
    """Replays real images that are stored as uint8 pixels.

    A subclass whose ``kind`` is another that was registered takes the settings of that kind, too.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        selection: Which images of a class stay longest; see :class:`~hmn_replay.RealKeeper`. With
            ``renew="before"`` the network has not been trained on the experience yet.
        training: Training of the network that a selection by name needs at every experience.
            Default: None, a ConvNet of width 32 that is shown 20,000 images.
        expected_classes: How many classes the stream will have in all, if that is known: a budget
            that does not hold one image of each is refused. Default: None, those that are there.
        **options: Those of :class:`MemoryReplay`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
        UnknownOptionError: An option that there is not; also a TypeError.
    """

    kind = "raw"

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        selection: Selection = "random",
        training: TrainingConfig | None = None,
        expected_classes: int | None = None,
        **options: Unpack[ReplayOptions],
    ) -> None:
        super().__init__(
            budget,
            selection=selection,
            training=training,
            expected_classes=expected_classes,
            **options,
        )


class LosslessReplay(RawReplay):
    """Replays real images that are stored as lossless WebP; arguments as for :class:`RawReplay`.

    More of them fit than of pixels, and what is replayed has no artefacts.
    """

    kind = "lossless"


class SubsampledReplay(_RealReplay):
    """Replays real images that are stored as pixels of a coarser grid.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        factor: Pixels of an image for one of the grid, along each side: 2 to 8.
        selection: Which images of a class stay longest; see :class:`~hmn_replay.RealKeeper`.
        training: Training of the network that a selection by name needs at every experience.
            Default: None, a ConvNet of width 32 that is shown 20,000 images.
        expected_classes: How many classes the stream will have in all, if that is known: a budget
            that does not hold one image of each is refused. Default: None, those that are there.
        **options: Those of :class:`MemoryReplay`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
        UnknownOptionError: An option that there is not; also a TypeError.
    """

    kind = "subsampled"

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        factor: int = 2,
        selection: Selection = "random",
        training: TrainingConfig | None = None,
        expected_classes: int | None = None,
        **options: Unpack[ReplayOptions],
    ) -> None:
        super().__init__(
            budget,
            factor=factor,
            selection=selection,
            training=training,
            expected_classes=expected_classes,
            **options,
        )


class JPEGReplay(_RealReplay):
    """Replays real images that are stored as JPEG scans under one header.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        quality: libjpeg's, 1 (smallest) to 100 (best). Default: None, the one that a
            small network learns best from, by a training each on the first experience; see
            :func:`hmn_replay.baselines.fill.choose_quality`.
        expected_classes: How many classes the stream will have in all, if that is known, for that
            choice. Default: None, ten times those of the first experience.
        training: Training of that network, and of a selection's. Default: None, that of
            ``choose_quality``, and for a selection that of :class:`RawReplay`.
        selection: Which images of a class stay longest; see :class:`~hmn_replay.RealKeeper`.
        **options: Those of :class:`MemoryReplay`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: A value outside its range.
        UnknownOptionError: An option that there is not; also a TypeError.
    """

    kind = "jpeg"

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        quality: int | None = None,
        expected_classes: int | None = None,
        training: TrainingConfig | None = None,
        selection: Selection = "random",
        **options: Unpack[ReplayOptions],
    ) -> None:
        super().__init__(
            budget,
            quality=quality,
            expected_classes=expected_classes,
            training=training,
            selection=selection,
            **options,
        )


def _trains_usual_networks(config: CondenseConfig) -> bool:
    """Return whether networks are trained to match on, and nothing was chosen about them."""

    def chosen(each: CondenseConfig) -> list[Any]:
        names = [n for n in type(each).model_fields if n.startswith(("network", "trained_"))]
        return [getattr(each, name) for name in names]

    usual = [chosen(make_config(effort)) for effort in EFFORTS]
    return config.trained_networks > 0 and chosen(config) in usual


@torch.no_grad()
def _gives_blocks(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Return whether a network gives logits of images alone, and the features of several blocks."""
    if not callable(getattr(model, "features", None)):
        return False
    device = device_of(model)
    images = torch.full((2, *image_shape), 0.5, device=device)
    try:
        with isolated(device, 0, "features"), evaluating(model):
            logits, blocks = model(images), model.features(images)  # type: ignore[operator]
    except Exception:  # whatever a network's own code may raise
        return False
    are_blocks = isinstance(blocks, list | tuple) and all(
        isinstance(each, Tensor) and len(each) == len(images) for each in blocks
    )
    return are_blocks and len(blocks) > 1 and getattr(logits, "ndim", 0) == 2
