"""The evaluation protocol: train a fresh network on decoded images, and score it on real ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.budget import as_int
from hmn_replay.data.features import LabelledFeatures
from hmn_replay.data.images import (
    ImageSource,
    as_labelled_images,
    check_same_keys,
    check_same_names,
    show_label,
)
from hmn_replay.data.lookup import Images, as_floats, check_labelled, images_at_once, join_images
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning
from hmn_replay.memory.base import Memory
from hmn_replay.memory.labels import LABELS, Labeller
from hmn_replay.registry import check_name
from hmn_replay.runtime import resolve_device, without_autocast
from hmn_replay.training.networks import Network, NetworkFactory, lent_to, linear_head
from hmn_replay.training.train import Targets, TrainingConfig, train_network

__all__ = ["Decodable", "evaluate", "labeller_accuracy", "score"]

_FEATURE_TRAINING = TrainingConfig(network=linear_head, augmentations=(), cutmix_probability=0.0)


@runtime_checkable
class Decodable(Protocol):
    """Anything that gives labelled images back, such as a memory."""

    def decode(self) -> tuple[Tensor, Tensor]:
        """Return float images ``(N, C, H, W)`` in [0, 1] and int64 labels ``(N,)``."""
        ...


def evaluate(
    source: Decodable | ImageSource,
    test_set: Decodable | ImageSource,
    *,
    network: str | NetworkFactory | None = None,
    labels: str | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    config: TrainingConfig | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[Network, float]:
    """Train a fresh network on a memory or a set of images, and score it on a test set.

    The accuracy is that of the last epoch: no choice is made by the test set. Pixels are normalised
    by the mean and deviation of the source's own images. On features, the network is a linear layer
    by default, and nothing is augmented or mixed. A surrounding ``torch.autocast`` changes
    nothing; ``precision`` says how the network computes.

    Args:
        source: What to learn from: a memory (anything with ``decode()``), or anything that
            :func:`hmn_replay.data.images.as_labelled_images` takes.
        test_set: The same. An image whose label the source does not have counts as misclassified,
            with a HMNReplayWarning.
        network: Architecture: a name in :data:`hmn_replay.NETWORKS`, or a function from image shape
            and number of classes to a module. Default: that of ``config``, else ConvNet.
        labels: What of a memory to learn from: ``"hard"``, its classes; ``"soft"``, the soft labels
            in its file too; ``"labeller"``, the classes and what the labeller in its file says of
            each augmented image. Default: the last of these that it has.
        seed: The same seed gives the same accuracy, on the same machine's CPU and number of
            threads.
        device: Where to train. Default: CUDA where present, else the CPU.
        config: The training. Default: ``TrainingConfig()``; for features, with
            ``network=linear_head``, ``augmentations=()`` and ``cutmix_probability=0``.
        progress: Whether to show a bar on standard error.
        **options: Fields of :class:`TrainingConfig` that replace those of ``config``.

    Returns:
        The network, in evaluation mode on ``device``, whose buffer ``classes`` holds the label of
        each logit; and its accuracy in [0, 1].

    Raises:
        UnknownOptionError: An option that :class:`TrainingConfig` does not have.
        ConfigError: An option out of range, or labels that the source does not have.
        DataError: Images or labels that cannot be used, of different shapes, or none; a test set
            of other labels than the source throughout; or a class name that stands for another
            label in the test set than in the source.
        TrainingError: The training diverged.
    """
    if network is not None:
        options["network"] = network
    images, own_labels, own_names = _images_and_labels(source)
    holds_features = not isinstance(images, Tensor) and images.holds_features
    usual = _FEATURE_TRAINING if holds_features else TrainingConfig()
    config = (config or usual).replace(**options)
    if config.label_weight is None and isinstance(source, Memory):
        config = config.replace(label_weight=source.label_weight)
    test_images, test_labels, test_names = _images_and_labels(test_set)
    _check_shapes(images.shape[1:], test_images.shape[1:], "the source", holds_features)
    for name, given in {"source": own_labels, "test set": test_labels}.items():
        if not len(given):
            raise DataError(f"expected a {name} of one image or more; it has none")
    check_same_names(own_names, test_names, "the source", "the test set")
    classes, class_indices = torch.unique(own_labels, return_inverse=True)
    targets = _targets(source, labels, classes)
    test_indices = _positions(test_labels, classes, "the source")
    _warn_of_unknown(test_indices, "the source has no image of")
    target = resolve_device(device)
    with without_autocast(target):
        trained = train_network(
            images,
            class_indices,
            len(classes),
            targets=targets,
            config=config,
            seed=seed,
            device=target,
            progress=progress,
        )
        accuracy = score(trained, test_images, test_indices)
    trained.classes.copy_(classes)
    return trained, accuracy


def score(
    network: nn.Module,
    images: Images,
    class_indices: Tensor,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> float:
    """Return the share of images whose largest logit is that of their class.

    Args:
        network: From float images in [0, 1] to logits ``(N, K)``; every module's mode, and the
            device, are as they were afterwards.
        images: float in [0, 1] or uint8, ``(N, C, H, W)``, N 1 or more, on any device.
        class_indices: int64 ``(N,)``; a value outside [0, K), such as -1, is never right.
        batch_size: Images at a time. Default: :func:`hmn_replay.data.lookup.images_at_once`.
        device: Where to run. Default: where the network is.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        DataError: No image, or tensors of other shapes or dtypes.
        ConfigError: ``batch_size`` is below 1.
    """
    check_labelled(images, class_indices)
    if batch_size is not None and (as_int(batch_size) or 0) < 1:
        raise ConfigError(f"batch_size must be a whole number of 1 or more; got {batch_size!r}")
    batch_size = images_at_once(images.shape[1:]) if batch_size is None else batch_size
    with lent_to(network, device) as target, torch.no_grad():
        num_right = torch.zeros((), dtype=torch.int64, device=target)
        for start in range(0, len(images), batch_size):
            chunk = slice(start, start + batch_size)
            predicted = network(as_floats(images[chunk].to(target))).argmax(dim=1)
            num_right += (predicted == class_indices[chunk].to(target)).sum()
    return float(num_right) / len(images)


def labeller_accuracy(memory: Memory, test_set: Decodable | ImageSource) -> float:
    """Return the accuracy of a memory's labeller on real images, in [0, 1].

    Images of classes that the memory does not have count as misclassified, with a warning.

    Args:
        memory: A memory with a labeller in its file.
        test_set: As in :func:`evaluate`.

    Raises:
        ConfigError: The memory has no labeller.
        DataError: As in :func:`evaluate`.
    """
    labeller = memory.labeller
    if labeller is None:
        raise ConfigError("the memory has no labeller; make it with labels='labeller'")
    images, labels, names = _images_and_labels(test_set)
    check_same_names(memory.class_names, names, "the memory", "the test set")
    _check_shapes(memory.image_shape, images.shape[1:], "the memory")
    indices = _positions(labels, memory.classes.cpu(), "the memory")
    _warn_of_unknown(indices, "the memory does not have")
    device = memory.classes.device
    with without_autocast(device):
        return score(labeller, images, indices, device=device)


def _check_shapes(
    own: Sequence[int], tested: Sequence[int], owner: str, holds_features: bool = False
) -> None:
    """Refuse a test set of images of another shape ``(C, H, W)``."""
    if tuple(own) != tuple(tested):
        raise DataError(
            f"{owner} has images of {tuple(own)} and the test set of {tuple(tested)}; both must "
            "have the same (C, H, W)"
            + ("; extract_features() makes features of images" if holds_features else "")
        )


def _warn_of_unknown(test_indices: Tensor, whose: str) -> None:
    """Warn of test images whose class is not there, for a caller's caller."""
    if num_unknown := int((test_indices < 0).sum()):
        warnings.warn(
            f"{num_unknown:,} of {len(test_indices):,} test images are of classes that {whose}, "
            "and count as misclassified",
            HMNReplayWarning,
            stacklevel=3,
        )


def _positions(labels: Tensor, classes: Tensor, owner: str) -> Tensor:
    """Return the positions of a test set's labels among classes; -1 for those not there."""
    check_same_keys(labels, classes, "the test set")
    ascending, order = classes.sort()
    found = torch.searchsorted(ascending, labels).clamp(max=len(classes) - 1)
    known = ascending[found] == labels
    if len(labels) and not known.any():
        raise DataError(
            f"expected a test set with labels of {owner}, {_shown(ascending)}; got "
            f"{_shown(labels.unique())}: number the classes of both alike"
        )
    return torch.where(known, order[found], -1)


def _shown(classes: Tensor) -> str:
    """Return ascending labels as a message shows them, a few of many."""
    shown = [show_label(label) for label in classes.tolist()]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:4], "...", shown[-1]])


def _targets(
    source: Decodable | ImageSource, labels: str | None, classes: Tensor
) -> Targets | None:
    """Return the soft targets of a source over some of its classes, or None for hard labels."""
    if labels is not None:
        check_name("labels", labels, LABELS)
    if not isinstance(source, Memory):
        if labels not in (None, "hard"):
            raise ConfigError(f"labels={labels!r} is for a memory; got a {type(source).__name__}")
        return None
    wanted = source.richest_labels if labels is None else labels
    columns = _positions(classes, source.classes.cpu(), "the memory")
    if wanted == "soft":
        if not source.has_soft_labels:
            raise ConfigError("the memory has no soft labels; make it with labels='soft'")
        # A class without images may have a part of the others' labels, or all of one.
        rows = source.soft_labels()[:, columns.to(source.classes.device)]
        total = rows.sum(dim=1, keepdim=True)
        own = torch.searchsorted(classes, source.labels.cpu()).to(rows.device)
        return torch.where(total > 0, rows / total, F.one_hot(own, len(classes)))
    if wanted == "labeller":
        labeller = source.labeller
        if labeller is None:
            raise ConfigError("the memory has no labeller; make it with labels='labeller'")

        @cache  # once for each device, which would else be waited for in each step
        def on(device: torch.device) -> tuple[Labeller, Tensor]:
            return labeller.to(device), columns.to(device)

        def label(images: Tensor) -> Tensor:
            network, own = on(images.device)
            logits: Tensor = network(images)
            return logits[:, own]

        return label
    return None


def _images_and_labels(
    source: Decodable | ImageSource,
) -> tuple[Images, Tensor, Mapping[int, str]]:
    """Return images, their labels, and the names of labels that have one."""
    if isinstance(source, Memory):
        return source.decoded(), source.labels.cpu(), source.class_names
    if isinstance(source, Decodable):
        with torch.no_grad():
            images, labels = source.decode()
        return images.detach().cpu(), labels.cpu(), getattr(source, "class_names", None) or {}
    labelled = as_labelled_images(source)
    names = labelled.class_names
    if isinstance(labelled, LabelledFeatures):
        return join_images([labelled.images]), labelled.labels, names
    return labelled.images, labelled.labels, names
