"""Equal-bytes baselines: real images, drawn at random or chosen, in as many bytes as a memory.

What is compared is a real file, its header and labels counted, filled with as many images as fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.condensation.labelling import (
    LabelConfig,
    add_labels,
    as_label_config,
    check_teacher,
    train_teacher,
)
from hmn_replay.condensation.selection import select_images
from hmn_replay.data.features import FeatureSource, as_labelled_features, read_data
from hmn_replay.data.images import ImageSource, LabelledImages, as_labelled_images
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.evaluation import evaluate
from hmn_replay.memory.jpeg import SUBSAMPLINGS
from hmn_replay.memory.labels import check_takes_labels
from hmn_replay.memory.real import (
    AnyReal,
    JPEGMemory,
    LosslessMemory,
    RawMemory,
    RealMemory,
    SubsampledMemory,
    check_order,
)
from hmn_replay.memory.real_features import PQMemory, RawFeatureMemory
from hmn_replay.settings import check_options
from hmn_replay.training.networks import Network
from hmn_replay.training.train import TrainingConfig

__all__ = [
    "QUALITIES",
    "add_real_labels",
    "choose_quality",
    "jpeg_images",
    "lossless_images",
    "next_quality",
    "pq_features",
    "raw_features",
    "raw_images",
    "real_images",
    "search_qualities",
    "subsampled_images",
]

QUALITIES = (5, 10, 20, 35, 50, 75, 95)
"""The JPEG qualities that are tried at first; see :func:`next_quality`."""

_USUAL_QUALITY = 20
_USUAL_EXPERIENCES = 10
_HELD_OUT = 0.2


def raw_images(
    data: ImageSource,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    labels: LabelConfig | str = "hard",
    teacher: Network | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> RawMemory:
    """Take real images, as many as fit a budget as uint8 pixels.

    Args:
        data: Where to take them from, each once; see :func:`hmn_replay.as_labelled_images`. With a
            selection by name, the numbers of images of two classes differ by one at most, the first
            classes having more, but for a class that has no more to give.
        budget: Bytes of the file, header and labels counted.
        selection: One of :data:`hmn_replay.SELECTIONS`; or the order in which the images of a class
            are taken, int64 positions in ``data``, such as those that
            :func:`hmn_replay.select_images` gives with options of your own: the first image of
            every class, then the second, while they fit.
        labels: What is kept of images beside their classes, in the same bytes: ``"hard"`` for
            nothing, ``"soft"`` or ``"labeller"``; or settings of these.
        teacher: The network that labels are made from, such as :func:`train_teacher` returns for
            the same labels. Default: one that is trained here on all images.
        seed: Of a selection by name, and of a teacher. A larger budget adds images to those of a
            smaller one.
        device: Where the networks are trained that a selection by name and labels need. Default:
            CUDA where present, else the CPU.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: The selection or the labels are not as said above, or the teacher has other
            classes, or is for other images.
        DataError: Images or labels that cannot be used.
    """
    return _fill(RawMemory, {}, data, budget, selection, labels, teacher, seed, device)


def jpeg_images(
    data: ImageSource,
    budget: Budget | int | str,
    *,
    quality: int | None = None,
    subsampling: str | None = None,
    selection: str | Tensor = "random",
    labels: LabelConfig | str = "hard",
    teacher: Network | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> JPEGMemory:
    """Take real images, as many as fit a budget as JPEG under one header.

    Args:
        data: As in :func:`raw_images`, which takes the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        quality: libjpeg's, 1 to 100. Default: None, the one that :func:`choose_quality` finds for
            these classes, by a training each.
        subsampling: One of :data:`hmn_replay.memory.jpeg.SUBSAMPLINGS`; not used for grey images.
            Default: the one with which more images fit.
        selection: As in :func:`raw_images`; one by name puts all images of ``data`` in order.
        labels: As in :func:`raw_images`.
        teacher: As in :func:`raw_images`.
        seed: As in :func:`raw_images`.
        device: As in :func:`raw_images`.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``quality``, ``subsampling``, ``selection`` or ``labels`` is not as said above,
            or the teacher is not, as in :func:`raw_images`.
        DataError: As :func:`raw_images`.
    """
    data = as_labelled_images(data)
    config = _label_config(JPEGMemory, data, labels, teacher)
    order = _order(data, selection, None, seed, device)
    if quality is None:
        quality, _ = choose_quality(
            data, budget, expected_classes=data.num_classes, seed=seed, device=device
        )
    subsamplings = SUBSAMPLINGS if data.image_shape[0] == 3 else SUBSAMPLINGS[:1]
    if subsampling is not None:
        subsamplings = (subsampling,)
    candidates = [
        real_images(JPEGMemory, data, budget, selection=order, quality=quality, subsampling=name)
        for name in subsamplings
    ]
    make = _teacher_for(data, config, teacher, seed, device)
    return add_real_labels(max(candidates, key=len), data, order, config, make, seed)


def lossless_images(
    data: ImageSource,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    labels: LabelConfig | str = "hard",
    teacher: Network | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> LosslessMemory:
    """Take real images, as many as fit a budget as lossless WebP.

    Args:
        data: As in :func:`raw_images`, which takes the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        selection: As in :func:`raw_images`; one by name puts all images of ``data`` in order.
        labels: As in :func:`raw_images`.
        teacher: As in :func:`raw_images`.
        seed: As in :func:`raw_images`.
        device: As in :func:`raw_images`.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``selection`` is not as said above.
        DataError: As :func:`raw_images`.
    """
    return _fill(LosslessMemory, {}, data, budget, selection, labels, teacher, seed, device)


def subsampled_images(
    data: ImageSource,
    budget: Budget | int | str,
    *,
    factor: int = 2,
    selection: str | Tensor = "random",
    labels: LabelConfig | str = "hard",
    teacher: Network | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> SubsampledMemory:
    """Take real images, as many as fit a budget as pixels of a coarser grid.

    Args:
        data: As in :func:`raw_images`, which takes the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        factor: Pixels of an image for one of the grid, along each side: 2 to 8.
        selection: As in :func:`raw_images`.
        labels: As in :func:`raw_images`.
        teacher: As in :func:`raw_images`.
        seed: As in :func:`raw_images`.
        device: As in :func:`raw_images`.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``factor`` or ``selection`` is not as said above.
        DataError: As :func:`raw_images`.
    """
    own = {"factor": factor}
    return _fill(SubsampledMemory, own, data, budget, selection, labels, teacher, seed, device)


def real_images(
    memory_type: type[AnyReal],
    data: ImageSource | FeatureSource,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    labels: LabelConfig | str = "hard",
    teacher: Network | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    **settings: Any,
) -> AnyReal:
    """Take real images, as many as fit a budget, into a memory of any kind; features likewise.

    Args:
        memory_type: The class of the kind, such as one that was registered.
        data: As in :func:`raw_images`; for a kind of features as in :func:`raw_features`.
        budget: Bytes of the file, header and labels counted.
        selection: As in :func:`raw_images`. Where images differ in their bytes, one by name puts
            all of ``data`` in order.
        labels: As in :func:`raw_images`.
        teacher: As in :func:`raw_images`.
        seed: As in :func:`raw_images`.
        device: As in :func:`raw_images`.
        **settings: What the class takes beside the image shape and ``budget``.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: A kind that is learned, or needs training (``pq``, see :func:`pq_features`);
            ``selection`` is not as said above, or a setting is out of its range.
        DataError: As :func:`raw_images`.
    """
    if not issubclass(memory_type, RealMemory) or issubclass(memory_type, PQMemory):
        raise ConfigError(
            f"expected a kind that holds real images and needs no training, got "
            f"{memory_type.__name__}: use condense() for a learned kind, and pq_features() for pq"
        )
    check_options(memory_type.__name__, settings, list(memory_type.setting_types))
    for name in memory_type.required_settings():
        if name not in settings:
            raise ConfigError(f"{memory_type.__name__} needs {name}=")
    return _fill(memory_type, settings, data, budget, selection, labels, teacher, seed, device)


def _fill(
    memory_type: type[AnyReal],
    settings: Mapping[str, Any],
    source: ImageSource | FeatureSource,
    budget: Budget | int | str,
    selection: str | Tensor,
    labels: LabelConfig | str,
    teacher: Network | None,
    seed: int,
    device: str | torch.device,
) -> AnyReal:
    """Fill a memory of any kind; arguments as for :func:`real_images`."""
    data = read_data(source, holds_features=memory_type.holds_features)
    config = _label_config(memory_type, data, labels, teacher)
    memory = memory_type(data.image_shape, budget=budget, **settings)
    most = None
    if not memory.sizes_differ:
        most = max(1, Budget.parse(budget).num_bytes // memory.payload_bytes)
    order = _order(data, selection, most, seed, device)
    memory.extend(data, order=order)
    make = _teacher_for(data, config, teacher, seed, device)
    return add_real_labels(memory, data, order, config, make, seed)


def choose_quality(
    data: ImageSource,
    budget: Budget | int | str,
    *,
    expected_classes: int | None = None,
    qualities: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    training: TrainingConfig | None = None,
) -> tuple[int, dict[str, float]]:
    """Choose the JPEG quality that a small network learns best from, on held-out real images.

    Each quality is given the bytes that these classes will have in the end. A network is trained on
    the images that fit, and scored on a fifth of the data, which is kept back.

    Args:
        data: Images of the first classes; see :func:`hmn_replay.as_labelled_images`.
        budget: Bytes of the whole memory.
        expected_classes: How many classes will come in all. Default: 10 times those of ``data``.
        qualities: What to choose from, ascending. Default: ``QUALITIES``, and on past their edge,
            as :func:`next_quality` says, while the best is there.
        seed: Seed of the split, the draw and the training.
        device: Where to train.
        training: How each network is trained. Default: a ConvNet of width 32, 6,000 image passes.

    Returns:
        The quality, the lower one of two as good, and the accuracy of each that was tried, in [0,
        1]. Of qualities at which all images fit, the highest alone is tried: there fewer bytes
        would buy nothing.
        Where there is nothing to choose by (one class alone, no image to hold out, no room), 20 and
        no accuracy.

    Raises:
        DataError: Images or labels that cannot be used.
    """
    data = as_labelled_images(data)
    counts = torch.bincount(data.class_indices)
    if data.num_classes < 2 or int(counts.max()) < 2:
        return _USUAL_QUALITY, {}
    train, held_out = data.split(_HELD_OUT, seed)
    num_classes = expected_classes or _USUAL_EXPERIENCES * data.num_classes
    num_bytes = Budget.parse(budget).num_bytes
    share = num_bytes * data.num_classes // max(num_classes, data.num_classes)
    training = training or TrainingConfig(width=32, num_passes=6000)

    def fill(quality: int) -> RealMemory:
        return jpeg_images(train, max(share, 1), quality=quality, seed=seed)

    def score(quality: int, memory: RealMemory) -> float:
        del quality
        return evaluate(memory, held_out, seed=seed, device=device, config=training)[1]

    best, found = search_qualities(fill, score, num_images=len(train), qualities=qualities)
    found = dict(sorted(found.items()))
    return best or _USUAL_QUALITY, {str(quality): accuracy for quality, accuracy in found.items()}


def search_qualities(
    fill: Callable[[int], RealMemory],
    score: Callable[[int, RealMemory], float],
    *,
    num_images: int | None = None,
    qualities: Sequence[int] | None = None,
) -> tuple[int | None, dict[int, float]]:
    """Score JPEG qualities, each of which fills a budget.

    Args:
        fill: From a quality to its memory. Where it raises a BudgetError, so would higher ones.
        score: From a quality and its memory to how good it is: the higher, the better.
        num_images: How many images there are: of qualities at which all fit, the highest alone is
            scored. Default: None, all are.
        qualities: What to choose from, ascending. Default: ``QUALITIES``, and on past their edge,
            as :func:`next_quality` says, while the best is there.

    Returns:
        The best quality, the lower one of two as good, or None where none fits; and the score of
        each that was scored.
    """
    filled: dict[int, RealMemory] = {}
    scores: dict[int, float] = {}

    def fits(quality: int) -> bool:
        with contextlib.suppress(BudgetError):
            filled[quality] = fill(quality)
        return quality in filled

    def of_use() -> list[int]:
        lowest = max((q for q, memory in filled.items() if len(memory) == num_images), default=0)
        return [quality for quality in sorted(filled) if quality >= lowest]

    for quality in QUALITIES if qualities is None else qualities:
        if not fits(quality):
            break
    while waiting := [quality for quality in of_use() if quality not in scores]:
        for quality in waiting:
            scores[quality] = score(quality, filled[quality])
        further = next_quality({quality: scores[quality] for quality in of_use()})
        if qualities is None and further is not None:
            fits(further)
    return max(of_use(), key=lambda quality: scores[quality], default=None), scores


def next_quality(accuracies: Mapping[int, float]) -> int | None:
    """Return the JPEG quality to try next, past the edge where the best so far is.

    That is half the lowest quality, down to 1, or half of what lies between the highest and 100.

    Args:
        accuracies: Of each quality tried. The lower one of two as good is the better one.

    Returns:
        A quality that was not tried, or None where the best lies between others, or at 1 or 100.
    """
    best = max(sorted(accuracies), key=lambda quality: accuracies[quality], default=None)
    if best is not None and best == min(accuracies) > 1:
        return best // 2
    if best is not None and best == max(accuracies) < 100:
        return (best + 101) // 2
    return None


def raw_features(
    data: FeatureSource,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    seed: int = 0,
) -> RawFeatureMemory:
    """Take real features, as many as fit a budget in float16.

    Args:
        data: Where to take them from, each once; see :func:`hmn_replay.as_labelled_features`.
        budget: Bytes of the file, header and labels counted.
        selection: As in :func:`raw_images`; herding and k-centre are by the features themselves.
        seed: Of a selection by name.

    Raises:
        BudgetError: Not those of one image fit; the message gives the smallest budget that does.
        ConfigError: The selection is not as said above.
        DataError: Features or labels that cannot be used.
    """
    return real_images(RawFeatureMemory, data, budget, selection=selection, seed=seed)


def pq_features(
    data: FeatureSource,
    budget: Budget | int | str,
    *,
    num_parts: int,
    bits: int = 8,
    selection: str | Tensor = "random",
    seed: int = 0,
) -> PQMemory:
    """Take real features, as many as fit a budget by product quantisation.

    The codebook is trained on all of them, and counts as all else does: ``2**bits`` times the
    channels, in float16. Needs ``pip install 'hmn-replay[pq]'``.

    Args:
        data: Where to take them from, each once; see :func:`hmn_replay.as_labelled_features`.
        budget: Bytes of the file, header, labels and codebook counted.
        num_parts: Parts that channels are cut into; C is a multiple of it.
        bits: Of the number of a part's centroid, 1 to 8.
        selection: As in :func:`raw_features`; one by name puts all of ``data`` in order.
        seed: Of the codebook, and of a selection by name.

    Raises:
        BudgetError: Not those of one image fit; the message gives the smallest budget that does.
        ConfigError: ``num_parts``, ``bits`` or ``selection`` is not as said above.
        DataError: Features or labels that cannot be used.
        MissingExtraError: faiss is not installed.
    """
    data = as_labelled_features(data)
    memory = PQMemory.train(data, num_parts=num_parts, bits=bits, budget=budget, seed=seed)
    memory.extend(data, order=_order(data, selection, None, seed, "cpu"))
    return memory


def add_real_labels(
    memory: AnyReal,
    data: LabelledImages,
    order: Tensor,
    config: LabelConfig,
    teacher: Callable[[], Network],
    seed: int = 0,
) -> AnyReal:
    """Give a memory labels, and drop the images that these leave no room for.

    Args:
        memory: Filled from the data, without labels; returned.
        data: What it was filled from.
        order: int64, the order in which it took the images.
        config: Which labels; with hard ones nothing is done.
        teacher: Gives the teacher; called once it is known that labels have room.
        seed: Seed of augmentations.

    Raises:
        BudgetError: One image of each class does not fit beside labels.
    """
    if config.labels == "hard":
        return memory
    _check_label_room(memory, data, config)
    own = data.labels[order]
    sources = [
        order[own == label][:count]
        for label, count in zip(memory.classes.tolist(), memory.images_per_class, strict=True)
    ]
    add_labels(memory, teacher(), config, sources=data.images[torch.cat(sources)], seed=seed)
    memory.shrink()
    return memory


def _label_config(
    memory_type: type[RealMemory],
    data: LabelledImages,
    labels: LabelConfig | str,
    teacher: Network | None,
) -> LabelConfig:
    """Return the settings of labels, if a memory of the data may have these, by that teacher."""
    config = as_label_config(labels)
    if config.labels != "hard":
        check_takes_labels(holds_features=memory_type.holds_features)
    if teacher is not None:
        check_teacher(teacher, config, data.classes, data.image_shape)
    return config


def _teacher_for(
    data: LabelledImages,
    config: LabelConfig,
    teacher: Network | None,
    seed: int,
    device: str | torch.device,
) -> Callable[[], Network]:
    """Return what gives the teacher: that of the caller, or one that is trained when called."""
    if teacher is not None:
        return lambda: teacher
    return partial(train_teacher, data, config, seed=seed, device=device)


def _check_label_room(memory: RealMemory, data: LabelledImages, config: LabelConfig) -> None:
    """Raise a BudgetError where one image of each class does not fit beside labels."""
    needed = memory.bytes_of_one_each(data.num_classes, memory.budget_bytes)
    needed += config.planned_bytes(memory.image_shape, data.num_classes).of(data.num_classes)
    is_short = memory.num_classes < data.num_classes
    if memory.budget_bytes is not None and (is_short or needed > memory.budget_bytes):
        raise BudgetError(
            f"a budget of {memory.budget_bytes:,} bytes does not hold one image of each of "
            f"{data.num_classes} classes beside labels={config.labels!r}; about "
            f"{needed:,} bytes would"
        )


def _order(
    data: LabelledImages,
    selection: str | Tensor,
    num_images: int | None,
    seed: int,
    device: str | torch.device,
) -> Tensor:
    if not isinstance(selection, str):
        return check_order(selection, len(data))
    return select_images(data, selection, num_images=num_images, seed=seed, device=device)
