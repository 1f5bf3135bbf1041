"""Condensation: from labelled images to a memory under a budget of bytes.

Three phases follow each other. The *warm start* fits the memory to real images, *matching* makes
networks learn from its images what they learn from real ones, and *pruning* brings it back from
the over-budget to the budget.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hmn_replay.budget import Budget
from hmn_replay.condensation.config import CondenseConfig, make_config
from hmn_replay.condensation.loop import Condensation
from hmn_replay.condensation.matchers import check_given_networks
from hmn_replay.data.features import LabelledFeatures, read_data
from hmn_replay.data.images import ImageSource
from hmn_replay.distributed import Team, join
from hmn_replay.errors import BudgetError, ConfigError, HMNReplayWarning
from hmn_replay.files import check_target
from hmn_replay.memory.base import MEMORIES, Memory, warn_of_lost_labeller
from hmn_replay.memory.checks import check_num_classes
from hmn_replay.memory.layout import MemoryLayout
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.runtime import (
    check_seed,
    deterministic_cudnn,
    resolve_device,
    resolve_precision,
    without_autocast,
)
from hmn_replay.training.networks import Network
from hmn_replay.training.train import resolve_compile

__all__ = ["check_config", "condense"]

# Of a budget: a file of less is said to be not full, and why.
_FULL_SHARE = 0.97
# Of the images that a budget is planned for, the share that makes no warning.
_USED_SHARE, _USED_SHARE_CODED = 0.9, 1 / 16
# A file that is filled less, since the real images are few, makes one.
_LEAST_SHARE = 0.1


@torch.inference_mode(False)
def condense(
    source: ImageSource,
    budget: Budget | int | str | None = None,
    *,
    config: CondenseConfig | None = None,
    effort: str = "quick",
    seed: int = 0,
    device: str | torch.device = "auto",
    kind: str | None = None,
    layout: MemoryLayout | None = None,
    memory: LearnedMemory | None = None,
    expected_classes: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    team: Team | None = None,
    networks: Iterable[nn.Module] = (),
    teacher: Network | None = None,
    **options: Any,
) -> LearnedMemory:
    """Condense a labelled image set into a memory (Zheng et al. 2024, Algorithm 1).

    What is made depends on the arguments alone: not on the caller's ``torch.autocast``, default
    dtype, grad mode or cuDNN's choice of algorithms, and not on torch's random state. Whether a GPU
    multiplies float32 in TF32 is left as torch is set.

    Args:
        source: A map-style data set of ``(image, label)``, a pair of arrays or tensors, or
            :class:`LabelledImages`; see :func:`hmn_replay.as_labelled_images`. For a memory of
            features :class:`LabelledFeatures`; see :func:`hmn_replay.extract_features`.
        budget: Bytes that the saved file may take, header and all: a number, a text such as
            ``"120 KiB"``, or a :class:`Budget`. A memory has no more images of a class than there
            are real ones: where the budget is for many more, a :class:`HMNReplayWarning` says
            so, and ``memory.report["unused_reason"]`` says why a file is not full.
            Default: that of ``memory``, where one is given that has a budget.
        config: The settings, in place of ``effort`` and ``options``. Default: those of ``effort``.
        effort: ``"draft"``, ``"quick"``, ``"standard"`` or ``"paper"``: a set of
            :class:`~hmn_replay.CondenseConfig` fields.
        seed: The same seed gives the same memory, bit for bit, on the same machine's CPU with the
            same number of threads. Some derivatives of torch (those of resampling) are not the same
            twice on CUDA.
        device: Where to compute; ``"auto"`` is CUDA where it is present, else the CPU.
        kind: The memory kind: ``"hmn"``, or one that it is compared with: ``"fred"``,
            ``"pixels"``, ``"idc"``, ``"haba"`` or ``"linba"``; or ``"features"``, which is fitted
            by the warm start and not matched. Default: that of ``memory``; without one
            ``"features"`` for features, else ``"hmn"``.
        layout: The shapes of the memory's tensors, and the number format. Default: what the kind
            chooses for the budget, by ``choose_layout``.
        memory: A memory to add to. Its classes stay and make room: each gives up images by
            double-ended pruning until all classes, old and new, share the budget alike; no image
            that stays changes by one bit. What all images are decoded with stays too, and only the
            classes of ``source`` are condensed, against the old ones. A class that the memory has
            already is renewed: condensed again, from its new images and its old ones. The given
            memory is not changed. Default: None, a new memory.
        expected_classes: How many classes are to come in all, where more are to be added later: the
            layout is chosen for so many, where neither ``memory`` nor ``layout`` gives one,
            ``pruning="order"`` prepares for them, and entropy-coded images leave room for one of
            each. Default: those of ``source``.
        checkpoint: A file to go on from where it exists, and that is written every minute; None
            for none. It stays there in the end, and so does ``NAME.experts`` beside it, the folder
            of the networks that are trained before, where the settings name no other. That of
            another run is refused; functions of your own are known by their code and what they
            close over.
        progress: Whether to show bars on standard error.
        team: The processes that share the work, from :func:`hmn_replay.distributed.join`, which
            says how long to wait for one; all call this alike, with the same arguments, and leave
            the team when it ends. Process 0 alone reads and writes the checkpoint. Default: all
            that ``torch.distributed`` was initialised for, or a single process;
            :data:`hmn_replay.distributed.ALONE` makes each process condense by itself.
        networks: States that one network had while it was trained elsewhere, the earliest first, to
            match on in place of ``trained_networks``: every ``inner_steps`` steps a point is drawn
            between two of them that follow each other. Modules of one architecture, from float
            images ``(N, C, H, W)`` in [0, 1] to logits whose positions are the labels, with
            ``features(images)`` where the objective matches features. They are copied, and run in
            evaluation mode. Default: none.
        teacher: The network that labels are made from, such as :func:`hmn_replay.train_teacher`
            returns, whose buffer ``classes`` has all classes that the memory will have. For
            ``labels="labeller"`` a ConvNet of ``labeller_width``. It is copied, and run in
            evaluation mode; ``teacher_width`` and ``teacher_passes`` are not read. Default: one is
            trained on the images that the memory is made of.
        **options: Fields of :class:`~hmn_replay.CondenseConfig`, to replace the effort's.

    Returns:
        The memory, on ``device``. ``memory.report`` is a dict of JSON values: the settings (the
        precision as it was resolved, ``compile`` False in place of "auto" where nothing can be
        compiled, and ``image_bytes`` as planned); ``teacher_given``, whether a teacher was;
        ``seconds``, and for each phase that there is (``experts``, ``selection``, ``warm_start``,
        ``matching``, ``labels`` and ``pruning``) ``seconds``, ``images``, ``images_per_second`` and
        ``peak_memory_bytes`` (so far);
        ``warm_start_psnr`` in dB (None without a warm start); ``beta`` (None where nothing was
        pruned by AUM or a function) and ``beta_accuracies``, in [0, 1] on held-out real images
        (empty without a search);
        ``student_rate``, the learning rate that ``"mtt"`` ended with (None for other objectives);
        ``images_per_class``, ``file_bytes``, ``unused_bytes`` of the budget and ``fill``, the share
        that is used, with ``unused_reason``, why that is below 0.97, else None.

    Raises:
        BudgetError: The budget does not hold one image a class; the message says what would. Or
            there is none.
        ConfigError: A value outside its range, or arguments that exclude each other.
        UnknownOptionError: An option that is no field; also a TypeError.
        DataError: Images or labels that cannot be used.
        CheckpointError: The checkpoint belongs to another run, or cannot be read.
        OSError: Nothing can be written where the checkpoint is to be.
        DistributedError: A process of the team was lost, or was given something else; the message
            names the checkpoint, from which any number of processes may go on.
        ExpertError: The folder ``experts`` has those of other images or settings, or a damaged one.
        TrainingError: The optimisation diverged.
    """
    if memory is not None and not isinstance(memory, Memory):
        raise ConfigError(
            f"memory is one to add to, such as condense() or load() returns; got {memory!r:.60}"
        )
    if not isinstance(config, CondenseConfig | None):
        raise ConfigError(f"config is a CondenseConfig; got {config!r:.60}")
    if not isinstance(team, Team | None):
        raise ConfigError(f"team is what hmn_replay.distributed.join() returns; got {team!r:.60}")
    if checkpoint is not None:
        is_path = isinstance(checkpoint, str | os.PathLike)
        if not is_path or "\0" in os.fspath(checkpoint):
            raise ConfigError(f"checkpoint is the path of a file; got {checkpoint!r:.60}")
        check_target(checkpoint)
    if memory is None:
        default = "features" if isinstance(source, LabelledFeatures) else "hmn"
        memory_type = MEMORIES[default if kind is None else kind]
    elif kind in (None, memory.kind):
        memory_type = type(memory)
    else:
        raise ConfigError(
            f"a memory that is added to keeps its kind, {memory.kind!r}; got kind={kind!r}: leave "
            "it out"
        )
    if not issubclass(memory_type, LearnedMemory):
        raise ConfigError(
            f"memory kind {memory_type.kind!r} holds real images or features, and nothing is "
            "condensed in it: fill one by jpeg_images(data, budget), raw_images(data, budget) or "
            "ReplayMemory(budget, kind).update(data), or name a learned kind, such as hmn"
        )
    if memory is not None:
        if layout not in (None, memory.layout):
            raise ConfigError("a memory that is added to keeps its layout; leave layout= out")
        layout = memory.layout
    if layout is not None:
        memory_type.check_layout(layout)
    named_effort = effort if config is None else None
    if config is None:
        layouts_own = {} if layout is None else {"number_format": layout.number_format}
        config = make_config(effort, **{**memory_type.settings, **layouts_own, **options})
    elif options or effort != "quick":
        given = sorted(options) or ["effort"]
        raise ConfigError(f"config= has all settings; give it alone, without {given[0]}=")
    check_config(config, memory_type)
    if budget is None and memory is not None:
        budget = memory.budget_bytes
    if budget is None:
        raise BudgetError(
            "expected a budget, or a memory to add to that has one, and got neither; pass the "
            'bytes of the file, such as "120 KiB"'
        )
    limit, target, seed = Budget.parse(budget), resolve_device(device), check_seed(seed)
    networks = check_given_networks(config.objective, networks)
    if networks and memory_type.holds_features:
        raise ConfigError("networks match images; leave them out for features, which are fitted")
    if expected_classes is not None:
        expected_classes = check_num_classes(expected_classes, "expected_classes")
    data = read_data(source, holds_features=memory_type.holds_features)
    if layout is None:
        num_classes = max(data.num_classes, expected_classes or 0)
        num_real = len(data) // data.num_classes
        label_bytes = config.planned_bytes(data.image_shape, num_classes)
        layout = memory_type.choose_layout(
            limit,
            data.image_shape,
            num_classes,
            config.number_format,
            num_real,
            config.image_bytes,
            label_bytes,
        )
    elif memory is None and config.image_bytes not in (None, _planned_bytes(layout)):
        raise ConfigError(
            f"image_bytes asks for {config.image_bytes} bytes for an image, and the layout plans "
            f"{_planned_bytes(layout)}; leave one of them out"
        )
    number_format = config.number_format or layout.number_format
    if (layout.image_shape, layout.number_format) != (data.image_shape, number_format):
        raise ConfigError(
            f"the layout is for {layout.number_format} images of {layout.image_shape}; the data "
            f"and options ask for {number_format} and {data.image_shape}"
        )
    config = config.replace(
        number_format=number_format,
        precision=resolve_precision(config.precision, target),
        compile=resolve_compile(config.compile, target),
    )
    with (
        torch.enable_grad(),
        without_autocast(target),
        deterministic_cudnn(target),
        join() if team is None else team as team,
    ):
        run = Condensation(
            data,
            limit,
            layout,
            config,
            memory_type=memory_type,
            old=memory,
            seed=seed,
            device=target,
            progress=progress,
            team=team,
            expected_classes=expected_classes,
            networks=networks,
            teacher=teacher,
        )
        has_warned = _warn_of_unused_bytes(run, limit)
        if checkpoint is not None:
            run.resume(Path(checkpoint))
        condensed = run.finish()
        if memory is not None and config.labels != "labeller":
            warn_of_lost_labeller(memory.labeller, condensed.labeller)
    measured = run.report()
    file_bytes: int = measured["file_bytes"]
    settings = {"kind": memory_type.kind, "effort": named_effort, "seed": seed}
    condensed.report = {
        **settings,
        **config.model_dump(),
        "teacher_given": teacher is not None,
        "image_bytes": _planned_bytes(layout),
        "labels": "hard" if condensed.richest_labels == "hard" else config.labels,
        **measured,
        "unused_bytes": limit.num_bytes - file_bytes,
        "fill": file_bytes / limit.num_bytes,
        "unused_reason": _why_unused(run, limit, file_bytes, has_warned),
    }
    return condensed


def _planned_bytes(layout: MemoryLayout) -> int | None:
    """Return the bytes that a layout plans for an image's code; None where there is no code."""
    return getattr(layout, "image_bytes", 0) or None


def _why_unused(run: Condensation, budget: Budget, file_bytes: int, has_warned: bool) -> str | None:
    """Return why a file is less full than it should be, or None.

    Warn where more could be had, and where it is nearly empty for want of real images, unless that
    was warned of before.
    """
    memory, size = run.memory, run.memory.layout.group_size
    labels = run.growth.planned_labels(memory.num_images)
    if labels and run.config.labels == "hard":  # they are made later, and have their room
        sizes = memory.num_images, memory.code_bytes
        file_bytes = max(file_bytes, memory.file_bytes_with(*sizes, budget.num_bytes, labels))
    share = file_bytes / budget.num_bytes
    if share >= _FULL_SHARE:
        return None
    counts = memory.images_per_class[run.first_class :]
    if all(count + size > len(own) for count, own in zip(counts, run.orders, strict=True)):
        reason = "the memory has an image for every real one of its new classes"
        may_warn = not (has_warned or run.first_class or run.expects_more)
        if memory.layout.is_coded and may_warn and share < _LEAST_SHARE:
            _warn_of_fill(
                share,
                budget,
                f"{reason}, for which {file_bytes:,} bytes are enough; where these should be "
                "better, make the warm start longer (warm_start_steps)",
            )
        return reason
    image_bytes = memory.group_bytes(memory.layout)
    if not memory.layout.is_coded and budget.num_bytes - file_bytes <= 2 * image_bytes:
        return "a further image does not fit"
    if run.first_class and not memory.layout.is_coded:
        return "old classes have no more images to share the budget with"
    reason = (
        "the images take fewer bytes than were planned for them; a longer warm start "
        "(warm_start_steps), more images (over_budget) or a smaller budget would fill it"
    )
    _warn_of_fill(share, budget, reason)
    return reason


def _warn_of_fill(share: float, budget: Budget, reason: str) -> None:
    warnings.warn(
        f"the file fills {100 * share:.0f} % of the budget of {budget}: {reason}",
        HMNReplayWarning,
        stacklevel=5,
    )


def check_config(config: CondenseConfig, memory_type: type[Memory]) -> None:
    """Raise a :class:`ConfigError` for settings that a memory kind cannot be condensed with."""
    for name in ("beta_grid", "beta"):
        default, value = CondenseConfig.model_fields[name].default, getattr(config, name)
        if config.pruning == "order" and value != default:
            raise ConfigError(
                "beta and beta_grid choose which images are pruned by AUM, and pruning='order' "
                f"drops the last: leave {name} out; got {value}"
            )
    if not config.warm_start_steps and not config.num_steps:
        raise ConfigError(
            "without a warm start and without matching nothing is learned: set warm_start_steps, "
            "or outer_steps and inner_steps, to 1 or more; got "
            f"{config.warm_start_steps}, {config.outer_steps} and {config.inner_steps}"
        )
    by_networks = config.num_steps or config.labels != "hard" or config.pruning != "order"
    if memory_type.holds_features and by_networks:
        raise ConfigError(
            "features are fitted by the warm start, and neither matched, labelled nor pruned by "
            "networks for images: outer_steps=0, labels='hard' and pruning='order' are expected; "
            f"got {config.outer_steps}, {config.labels!r} and {config.pruning!r}"
        )


def _warn_of_unused_bytes(run: Condensation, budget: Budget) -> bool:
    """Warn where a tenth of the planned images or more cannot be, for want of real ones."""
    memory, planned = run.memory, run.growth.num_planned
    if run.expects_more:
        return False  # they get what is left
    usable = memory.num_images - sum(run.growth.drops())
    # Where images are entropy-coded, fewer of them take more bytes each, to a degree.
    share = _USED_SHARE_CODED if memory.layout.is_coded else _USED_SHARE
    if usable > share * planned:
        return False
    size, labels = memory.layout.group_size, run.growth.planned_labels(usable) or None
    enough = memory.file_bytes_with(usable, None, budget.num_bytes, labels)
    or_one_group = f", or the {size} that share stored values" if size > 1 else ""
    warnings.warn(
        f"the budget of {budget} is planned for {planned:,} images, but the data has real images "
        f"for {usable:,} of them only, and a memory has no more images of a class than there are "
        f"real ones{or_one_group}; {enough:,} bytes are enough",
        HMNReplayWarning,
        stacklevel=4,
    )
    return True
