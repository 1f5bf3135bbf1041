"""Experiences of Avalanche, as the labelled images in [0, 1] that a memory is made of.

Images are read through the experience's *eval* transforms: what a memory keeps is not augmented.
Those transforms may normalise; the normalisation is undone here, and applied again to what is
replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.models import IncrementalClassifier, MultiTaskModule
from avalanche.training.supervised import JointTraining
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from hmn_replay.data.images import LabelledImages, stack_images, to_image, to_label
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.training.networks import device_of

__all__ = [
    "NormalisingNetwork",
    "Normalization",
    "Strategy",
    "adapt_heads",
    "check_experiences",
    "check_is_normalised",
    "class_counts",
    "class_key",
    "experiences_of",
    "find_normalization",
    "first_images",
    "first_of_each_class",
    "heads_of_tasks",
    "images_of",
    "is_piece",
    "read_experiences",
    "split_class_keys",
    "with_their_streams",
]

Strategy: TypeAlias = Any
"""An Avalanche strategy; its types promise less than it has."""

# A class key holds the task's label in its upper half, the class's in its lower.
_LABEL_BITS = 32
_REMEDY = "give the benchmark's eval transforms a Resize and a CenterCrop of one size"
# So many images of an experience show whether it is normalised.
_NUM_LOOKED_AT = 8


@dataclass(frozen=True)
class Normalization:
    """What a benchmark's transforms do to images in [0, 1]: ``(images - mean) / std``.

    Args:
        mean: One number a channel, or one for all.
        std: The same, above 0.

    Raises:
        ConfigError: Another number of channels than 1 or 3, a number that is not finite, or a std
            of 0 or less.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        values = torch.tensor([*self.mean, *self.std], dtype=torch.float32)
        if not (len(self.mean) == len(self.std) in (1, 3) and values.isfinite().all()):
            raise ConfigError(
                "a normalisation is (mean, std) with 1 or 3 finite numbers each, one a channel; "
                f"got {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"the std of a normalisation is above 0; got {self.std}")

    @classmethod
    def of(cls, pair: tuple[Any, Any]) -> Normalization:
        """Read ``(mean, std)``, each a number, or a sequence or a tensor of them.

        Raises:
            ConfigError: As the class.
        """
        try:
            mean, std = (
                tuple(torch.as_tensor(part, dtype=torch.float64).flatten().tolist())
                for part in pair
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"a normalisation is (mean, std), numbers each; got {pair!r}"
            ) from error
        return cls(mean, std)

    def apply(self, images: Tensor) -> Tensor:
        """Normalise float images ``(..., C, H, W)`` in [0, 1], bit for bit as torchvision does."""
        mean, std = _constants(self, images.dtype, images.device)
        return images.sub(mean).div_(std)

    def undo(self, images: Tensor) -> Tensor:
        """Bring normalised images ``(..., C, H, W)`` back to [0, 1]."""
        mean, std = _constants(self, images.dtype, images.device)
        return images.mul(std).add_(mean)


class NormalisingNetwork(nn.Module):
    """A network of normalised images, for images in [0, 1].

    Attributes:
        network: The network itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        device = device_of(network)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(normalization, name), dtype=torch.float64, device=device)
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, *args: Any, **options: Any) -> Any:
        """Return the network's output for float images in [0, 1], and what else it takes."""
        return self.network(self._normalised(images), *args, **options)

    def features(self, images: Tensor) -> Any:
        """Return the features of float images in [0, 1]."""
        return self.network.features(self._normalised(images))  # type: ignore[operator]

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)


@functools.lru_cache
def _constants(
    normalization: Normalization, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and std, ``(C, 1, 1)`` each; kept, so that no step copies them to a device."""
    with torch.inference_mode(False):  # they serve training too
        mean, std = (
            torch.tensor(values, dtype=dtype).view(-1, 1, 1).to(device)
            for values in (normalization.mean, normalization.std)
        )
    return mean, std


def find_normalization(*datasets: Any) -> Normalization | None:
    """Find the ``Normalize`` of torchvision among the eval transforms of data sets.

    Both of torchvision's (``transforms`` and ``transforms.v2``) are found, inside any ``Compose``,
    in Avalanche's transform groups, and in the wrapped data set's own ``transform``.

    Args:
        *datasets: Each an ``AvalancheDataset``.

    Returns:
        The normalisation, or None where there is none.

    Raises:
        DataError: There are several, or the train transforms have another.
    """
    found = {
        group: {each for dataset in datasets for each in _normalizations(dataset, group)}
        for group in ("train", "eval")
    }
    if len(found["eval"]) > 1 or found["train"] != found["eval"]:
        raise DataError(
            "expected one normalisation, the same in the train and the eval transforms, found "
            f"{sorted(map(str, found['train']))} and {sorted(map(str, found['eval']))}: memories "
            "read images by the eval transforms, so give both the same; where both do the same "
            "in a way that is not found, pass normalization=(mean, std)"
        )
    return next(iter(found["eval"]), None)


def normalises(transform: object) -> bool:
    """Return whether a transform has a ``Normalize`` of torchvision in it."""
    return next(_walk(transform), None) is not None


def check_experiences(
    experiences: Sequence[Any], normalization: Normalization | None
) -> tuple[int, tuple[int, ...]]:
    """Read the first image, so that data that cannot be used is refused before training.

    Returns:
        How many parts an item has, 2, or 3 with a task label; and the shape ``(C, H, W)`` of its
        image. 0 and ``()`` where there is no item.

    Raises:
        DataError: As :func:`read_experiences`; or the third part of items is no task label.
    """
    dataset = _eval_data(experiences)
    if not len(dataset):
        return 0, ()
    image, _ = _fetch(dataset, 0, normalization)
    for experience in experiences:
        _check_task_labels(experience)
    shape = tuple(to_image(image, "image 0 of the experience").shape)
    return len(dataset[0]), shape


def _check_task_labels(experience: Any) -> None:
    """Refuse items whose third part is no task label, but the image's position, or the like."""
    data, known = _eval_data([experience]), getattr(experience.dataset, "targets_task_labels", None)
    items = [data[at] for at in (0, len(data) // 2, len(data) - 1)] if len(data) > 2 else []
    found = [to_label(each[2], "task label of an image") for each in items if len(each) == 3]
    are_tasks = len({*found}) < 3 if known is None else {*found} <= {*known}
    if found and not are_tasks:
        raise DataError(
            "items are (image, label) or (image, label, task label); got images with "
            f"{', '.join(map(str, found))} for a third part, which are no task labels of the data "
            "set: leave it out"
        )


def check_is_normalised(experiences: Sequence[Any], normalization: Normalization) -> None:
    """Refuse a normalisation that the eval transforms of some experiences do not apply.

    Raises:
        DataError: They have no ``Normalize``, and give images in [0, 1].
    """
    found = (_normalizations(each.dataset, "eval") for each in experiences)
    if any(next(each, None) is not None for each in found) or min(normalization.mean) <= 0:
        return
    images = first_images(experiences, _NUM_LOOKED_AT)
    is_plain = images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())
    if is_plain and images.numel():
        raise DataError(
            f"normalization= says that images are normalised with {normalization.mean} and "
            f"{normalization.std}, but the eval transforms give images in [0, 1]: give these the "
            "Normalize that training has, or leave normalization= out where nothing normalises"
        )


def images_of(
    experiences: Any, normalization: tuple[Sequence[float], Sequence[float]] | None = None
) -> LabelledImages:
    """Return the images of an experience of Avalanche, or of all of a stream, as a memory has them.

    They are read by their eval transforms, whose normalisation is undone.

    Args:
        experiences: An experience, a stream, or a list of experiences.
        normalization: Mean and deviation by channel that the transforms end in. Default: None,
            those of the ``Normalize`` of torchvision that is found in them; of none, no
            normalisation.

    Returns:
        The images, whose labels are class keys where there are task labels; see
        :func:`hmn_replay.split_class_keys`.

    Raises:
        DataError: Images or labels that cannot be used.
    """
    parts = [experiences] if hasattr(experiences, "dataset") else list(experiences)
    if normalization is None:
        return read_experiences(parts, find_normalization(*(each.dataset for each in parts)))
    return read_experiences(parts, Normalization.of(normalization))


def first_of_each_class(
    experiences: Sequence[Any], normalization: Normalization | None, *, known: Container[int] = ()
) -> LabelledImages | None:
    """Read one image of each class, the first that there is, as :func:`read_experiences` does.

    Args:
        experiences: As there.
        normalization: As there.
        known: Class keys that are left out.

    Returns:
        The images; None where there are none, or the data sets do not list their labels.
    """
    dataset, found = _eval_data(experiences), dict[tuple[int, int], int]()
    names = ("targets", "targets_task_labels")
    parts: list[list[Any]]
    parts = [[getattr(each, name, None) for name in names] for each in dataset.datasets]
    if any(labels is None for labels, _ in parts):
        return None
    labels = [int(label) for own, _ in parts for label in own]
    tasks = [int(task) for own, given in parts for task in (given or [0] * len(own))]
    for position, key in enumerate(zip(labels, tasks, strict=True)):
        found.setdefault(key, position)
    new = [(key[0], position) for key, position in found.items() if class_key(*key) not in known]
    if not new:
        return None
    return stack_images(
        lambda index: _fetch(dataset, new[index][1], normalization),
        len(new),
        describe=lambda index: f"the first image of class {new[index][0]}",
        remedy=_REMEDY,
    )


def read_experiences(
    experiences: Sequence[Any], normalization: Normalization | None
) -> LabelledImages:
    """Read experiences through their eval transforms.

    Args:
        experiences: One or more. Their items are ``(image, label)`` or ``(image,
            label, task label)``; nothing but their data sets is used.
        normalization: What their transforms end in, or None.

    Returns:
        The images of all, whose labels are class keys; see :func:`class_key`.

    Raises:
        DataError: Items of another form, images of other than 1 or 3 channels, values outside
            [0, 1] once the normalisation is undone, or labels that are not single integers.
    """
    dataset = _eval_data(experiences)
    return stack_images(
        lambda position: _fetch(dataset, position, normalization),
        len(dataset),
        describe="image {} of the experience".format,
        remedy=_REMEDY,
    )


def class_key(label: int, task: int = 0) -> int:
    """Return the integer that a memory knows a class by, of 64 bits.

    Args:
        label: Below 2**32; not negative where the task label is above 0.
        task: The task label, 0 to 2**31 - 1.

    Returns:
        The label where the task label is 0, else ``(task << 32) | label``.

    Raises:
        DataError: A number is outside its range.
    """
    least = 0 if task else -(2**63)
    if not (least <= label < 2**_LABEL_BITS and 0 <= task < 2**31):
        raise DataError(
            "expected labels below 2**32, not negative where the task label is above 0, and task "
            f"labels from 0 to 2**31 - 1; got label {label}, task label {task}"
        )
    return (task << _LABEL_BITS) | label if task else label


def split_class_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels and the task labels, int64 ``(N,)`` each, of :func:`class_key`."""
    tasks = (keys >> _LABEL_BITS).clamp(min=0)
    return torch.where(tasks == 0, keys, keys & (2**_LABEL_BITS - 1)), tasks


def class_counts(labels: Tensor, counts: Tensor, num_classes: int) -> Tensor:
    """Add up counts by label: float32 ``(K,)``; labels outside [0, K) are left out."""
    is_inside = (labels >= 0) & (labels < num_classes)
    totals = torch.zeros(num_classes + 1, dtype=torch.float32, device=labels.device)
    return totals.index_add(0, labels.where(is_inside, num_classes), counts)[:num_classes]


def first_images(experiences: Sequence[Any], count: int) -> Tensor:
    """Return the first and the last images of an experience, as its eval transforms give them.

    Args:
        experiences: Of Avalanche; the first one counts.
        count: How many at most; none of an empty data set, or one whose eval transforms give no
            tensors.
    """
    dataset = experiences[0].dataset.eval()
    positions = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    images = [dataset[i][0] for i in positions]
    if not images or not all(isinstance(image, Tensor) for image in images):
        return torch.empty(0)
    return torch.stack(images)


def is_piece(strategy: Strategy, experience: Any) -> bool:
    """Return whether an experience is a piece of one, of an online stream."""
    return isinstance(experience, OnlineCLExperience) and not isinstance(strategy, JointTraining)


def experiences_of(strategy: Strategy, experience: Any) -> Sequence[Any]:
    """Return all experiences whose data a training has: of joint training several."""
    return strategy._experiences if isinstance(strategy, JointTraining) else [experience]


def with_their_streams(experiences: Sequence[Any]) -> Iterator[Any]:
    """Yield experiences and all others of their streams, where these can be listed."""
    yield from experiences
    for each in experiences:
        whole = getattr(each, "origin_experience", each)  # of a piece
        stream = getattr(whole, "origin_stream", None)
        if isinstance(stream, Sequence):
            yield from stream


def heads_of_tasks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a network that have a part for each task."""
    return [module for module in model.modules() if isinstance(module, MultiTaskModule)]


def adapt_heads(model: nn.Module, labels: Collection[int]) -> None:
    """Let heads that grow with the stream, IncrementalClassifier, have a unit for each label.

    Avalanche gives them those of the current experience, and masks all that were none's: of a
    memory that comes from elsewhere, the classes would be learned by no unit.
    """
    for module in model.modules():
        if isinstance(module, IncrementalClassifier):
            was_training, module.training = module.training, True
            try:
                adapt: Any = module.adaptation
                adapt(SimpleNamespace(classes_in_this_experience=labels))
            finally:
                module.training = was_training


def _eval_data(experiences: Sequence[Any]) -> ConcatDataset[Any]:
    return ConcatDataset([experience.dataset.eval() for experience in experiences])


def _fetch(
    dataset: Any, position: int, normalization: Normalization | None
) -> tuple[object, object]:
    """Return an image as ``stack_images`` takes it, and its class key."""
    item = dataset[position]
    name = f"image {position} of the experience"
    if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
        count = f" of {len(item)}" if isinstance(item, (tuple, list, dict)) else ""
        raise DataError(
            f"{name}: expected (image, label) or (image, label, task label), got "
            f"{type(item).__name__}{count}"
        )
    image, label = item[0], to_label(item[1], name)
    task = to_label(item[2], f"{name}, task label") if len(item) == 3 else 0
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        image = torch.from_numpy(image.copy())
    if isinstance(image, Tensor) and image.is_floating_point():
        image = _to_unit_range(image, normalization, name)
    return image, class_key(label, task)


def _to_unit_range(image: Tensor, normalization: Normalization | None, name: str) -> Tensor:
    tolerance = 1e-5
    if normalization is not None:
        if image.ndim != 3 or len(normalization.mean) not in (1, len(image)):
            raise DataError(
                f"{name}: expected an image (C, H, W) with the {len(normalization.mean)} channels "
                f"of its normalisation, got {tuple(image.shape)}"
            )
        # What rounding may have moved out of the range goes back into it.
        image, tolerance = normalization.undo(image.float()), 1e-3
    low, high = (float(bound) for bound in image.aminmax()) if image.numel() else (0.0, 0.0)
    if low < -tolerance or high > 1 + tolerance:
        undone = (
            "no torchvision Normalize was found in the eval transforms"
            if normalization is None
            else f"once the normalisation with {normalization.mean} and {normalization.std} is "
            "undone"
        )
        raise DataError(
            f"{name}: expected floats in [0, 1], got [{low:.3g}, {high:.3g}]; {undone}; pass the "
            "one that the benchmark applies as normalization=(mean, std)"
        )
    return image.clamp(0, 1)


def _normalizations(dataset: Any, group: str) -> Iterator[Normalization]:
    """Walk a tree of data sets, and yield each normalisation that its transforms apply."""
    flat = getattr(dataset, "_flat_data", None)
    if flat is not None:
        yield from _normalizations(flat, group)
    for name in ("_frozen_transform_groups", "_transform_groups"):
        groups = getattr(dataset, name, None)
        if groups is not None:
            # A group may be made when it is asked for, and only then.
            with contextlib.suppress(KeyError):
                yield from _walk(groups[group])
    for child in getattr(dataset, "_datasets", ()):
        yield from _normalizations(child, group)
    if flat is None and not hasattr(dataset, "_datasets"):
        yield from _walk(getattr(dataset, "transform", None))
        wrapped = getattr(dataset, "dataset", None)
        if isinstance(wrapped, Dataset):
            yield from _normalizations(wrapped, group)


def _walk(transform: Any) -> Iterator[Normalization]:
    if isinstance(transform, (transforms.Normalize, v2.Normalize)):
        yield Normalization.of((transform.mean, transform.std))
    elif isinstance(transform, nn.Sequential):
        for child in transform:
            yield from _walk(child)
    elif type(transform).__name__ == "TupleTransform":
        # The others are for labels.
        yield from _walk(transform.transforms[0] if transform.transforms else None)
    elif isinstance(transform, (list, tuple)):
        for child in transform:
            yield from _walk(child)
    elif transform is not None:
        yield from _walk(list(getattr(transform, "transforms", ())))
        inner = getattr(transform, "transform", None)
        if inner is not transform:
            yield from _walk(inner)
