"""Whether a network tells old classes from new ones by the artefacts of a memory.

A network that has seen clean images of new classes beside decoded images of old ones may learn
that clean means new. It then calls clean images of old classes new, and right ones are recovered by
putting them through the memory's codec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmn_replay.data.images import ImageSource, LabelledImages, as_labelled_images
from hmn_replay.data.lookup import as_floats, images_at_once
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.memory.base import Memory
from hmn_replay.runtime import make_generator, without_autocast
from hmn_replay.training.networks import device_of, evaluating, find_head, logits_and_features

__all__ = ["shortcut_report"]

_PROBED = 2000
_LEAST_PROBED = 4


def shortcut_report(
    model: Any,
    memory: Memory | None,
    test_set: ImageSource,
    *,
    new_classes: Sequence[int],
    real_set: ImageSource | None = None,
    codec: Callable[[Tensor], Tensor] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how far a network calls old classes new because their images are clean.

    Images of old classes are shown to it as they are, through the memory's codec (encoded and
    decoded by :meth:`hmn_replay.Memory.codec`, where the memory's kind has one), and as the
    memory's own decoded images. Then a logistic regression on the
    network's features is asked which images are decoded and which are clean: one half of both is
    learned from, the other is scored, and 0.5 is as good as guessing.

    It takes some forward passes. The caller's random state, and the network's modes, are left
    alone.

    Args:
        model: From float images ``(N, C, H, W)`` to logits ``(N, K)`` whose positions are the
            labels; or an Avalanche strategy, whose ``model`` is taken. Features are the inputs of
            the ``nn.Linear`` whose output the logits are; the logits, where there is none.
        memory: What was replayed, of any kind; None for none, and then only images as they are.
        test_set: Real images with labels, such as a test split. The old classes are those of the
            memory, or of the test set where there is no memory, but for the new ones; images of
            others are left out.
        new_classes: Labels of the newest experience.
        real_set: Clean images that the probe tells from the memory's. Default: ``test_set``. Images
            that were trained on may be told from others by that alone, so take the training images
            where the memory's were trained on, too.
        codec: Function from uint8 images ``(N, C, H, W)`` on the CPU to as many of the same shape,
            in place of the memory's own codec.
        transform: Applied to float images ``(N, C, H, W)`` in [0, 1] before the network, such as
            the normalisation of a benchmark. Default: None, that which a replay plugin of the
            strategy has found in its benchmark; none for a network.
        seed: Seed of the probe's draws.

    Returns:
        A dict of JSON types. Shares and accuracies are in [0, 1]; what cannot be had is None:

        * ``num_old_classes``, ``num_new_classes`` and ``balanced_share``, the new classes' share of
          all of these;
        * ``clean``, ``codec`` and ``decoded``: for the old classes' images as they are, through the
          codec, and out of the memory, ``{"accuracy": ..., "called_new": ...}``, the second the
          share that is predicted as one of the new classes;
        * ``probe``: ``{"decoded": ..., "codec": ...}``, the probe's accuracy in telling the
          memory's images, and test images through the codec, from clean images of the same classes.

    Raises:
        ConfigError: ``new_classes`` is empty or has a label that is neither in the memory nor in
            the test set, or the codec returns something else.
        DataError: No image of an old class.
    """
    network = model if isinstance(model, nn.Module) else model.model
    if transform is None:
        transform = _normalization_of(model)
    if multi := [m for m in network.modules() if hasattr(m, "forward_single_task")]:
        raise ConfigError(
            f"the report is of networks with one head; {type(multi[0]).__name__} has one for each "
            "task"
        )
    if not isinstance(new_classes, Iterable):
        raise ConfigError(f"new_classes is a list of labels; got {new_classes!r}")
    new = torch.as_tensor(list(new_classes), dtype=torch.int64)
    if not len(new):
        raise ConfigError("new_classes must have one label or more; got none")
    tested = as_labelled_images(test_set)
    known = (tested.classes if memory is None else memory.classes).cpu()
    for label in new[~torch.isin(new, torch.cat([known, tested.classes]))].tolist():
        raise ConfigError(
            f"new_classes are labels that the memory or the test set has; {label} is none: they "
            f"have {sorted({*known.tolist(), *tested.classes.tolist()})!r:.80}"
        )
    old = known[~torch.isin(known, new)]
    test = _of_classes(tested, old)
    if test is None:
        raise DataError(
            "the test set has no image of an old class: of one that is in the memory and not among "
            "new_classes"
        )
    real = test if real_set is None else _of_classes(as_labelled_images(real_set), old)
    decoded = None
    if memory is not None and memory.num_images:
        images, labels = memory.decode(dtype=torch.uint8)
        decoded = _of_classes(LabelledImages(images.cpu(), labels.cpu()), old)
    if codec is None and memory is not None:
        codec = memory.codec()
    coded = None if codec is None else LabelledImages(_coded(codec, test.images), test.labels)

    generator = make_generator(seed, "shortcut")
    with _features_of(network, test.images[:2], transform) as features:

        def run(data: LabelledImages | None) -> tuple[dict[str, float] | None, Tensor]:
            """Return what becomes of some images, and their features."""
            if data is None:
                return None, torch.empty(0)
            predicted, rows = features(data.images)
            called_new = torch.isin(predicted, new).float().mean()
            accuracy = (predicted == data.labels).float().mean()
            return {"accuracy": float(accuracy), "called_new": float(called_new)}, rows

        of_test, test_rows = run(test)
        of_coded, coded_rows = run(coded)
        of_decoded, decoded_rows = run(decoded)
        real_rows = test_rows if real is test else run(real)[1]
    probe: dict[str, float | None] = {"decoded": None, "codec": None}
    if decoded is not None and real is not None:
        pairs = _pairs(decoded.labels, real.labels, generator)
        probe["decoded"] = _probe(decoded_rows[pairs[0]], real_rows[pairs[1]])
    if coded is not None:
        # Two halves: no image is on both sides.
        order = torch.randperm(len(test), generator=generator)[: 2 * _PROBED]
        half = len(order) // 2
        sides = coded_rows[order[:half]], test_rows[order[half : 2 * half]]
        probe["codec"] = _probe(*sides)
    num_old, num_new = test.num_classes, len(new.unique())
    return {
        "num_old_classes": num_old,
        "num_new_classes": num_new,
        "balanced_share": num_new / (num_old + num_new),
        "clean": of_test,
        "codec": of_coded,
        "decoded": of_decoded,
        "probe": probe,
    }


def _normalization_of(strategy: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what a strategy's replay plugin found that its benchmark does to images in [0, 1]."""
    for owner in (strategy, *getattr(strategy, "plugins", ())):
        # A MemoryBuffer, which methods such as ER-ACE and ReplayPlugin replay from, holds a plugin.
        buffered = getattr(getattr(owner, "storage_policy", None), "replay", None)
        for replay in (owner, buffered):
            found = getattr(replay, "found_normalization", None)
            if found is not None:
                apply: Callable[[Tensor], Tensor] = found.apply
                return apply
    return None


def _of_classes(data: LabelledImages, classes: Tensor) -> LabelledImages | None:
    is_one = torch.isin(data.labels, classes)
    return data.take(is_one.nonzero()[:, 0]) if bool(is_one.any()) else None


def _coded(codec: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    coded = codec(images.cpu())
    if coded.shape != images.shape or coded.dtype != torch.uint8:
        raise ConfigError(
            f"the codec returned {coded.dtype} {tuple(coded.shape)} for uint8 "
            f"{tuple(images.shape)}; expected as many uint8 images of the same shape"
        )
    return coded


@contextlib.contextmanager
def _features_of(
    network: nn.Module, some_images: Tensor, transform: Callable[[Tensor], Tensor] | None
) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Give a function from images to predicted labels ``(N,)`` and features ``(N, D)``."""
    device = device_of(network)

    def shown(images: Tensor) -> Tensor:
        floats = as_floats(images.to(device))
        return floats if transform is None else transform(floats)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        predicted, rows = [], []
        for chunk in images.split(images_at_once(images.shape[1:])):
            if head is None:
                logits = features = network(shown(chunk))
            else:
                logits, features = logits_and_features(network, head, shown(chunk))
            predicted.append(logits.argmax(dim=1).cpu())
            rows.append(features.flatten(1).float().cpu())
        return torch.cat(predicted), torch.cat(rows)

    with evaluating(network), torch.no_grad(), without_autocast(device):
        head = None
        with contextlib.suppress(ConfigError):
            head = find_head(network, shown(some_images))
        yield run


def _pairs(ours: Tensor, theirs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions on two sides, as many of every class on both, in random order."""
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in ours.unique().tolist():
        sides = [(side == label).nonzero()[:, 0] for side in (ours, theirs)]
        least = min(map(len, sides))
        for own, side in zip(chosen, sides, strict=True):
            own.append(side[torch.randperm(len(side), generator=generator)[:least]])
    first, second = (torch.cat(own) for own in chosen)
    order = torch.randperm(len(first), generator=generator)[:_PROBED]
    return first[order], second[order]


def _probe(ours: Tensor, theirs: Tensor) -> float | None:
    """Return the held-out accuracy of a logistic regression, or None for too few images."""
    if len(ours) < _LEAST_PROBED:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = len(ours) // 2
    parts = [torch.cat([side[:half] for side in (ours, theirs)]).numpy()]
    parts.append(torch.cat([side[half : 2 * half] for side in (ours, theirs)]).numpy())
    labels = torch.arange(2).repeat_interleave(half).numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    probe.fit(parts[0], labels)
    return float(probe.score(parts[1], labels))
