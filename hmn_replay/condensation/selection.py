"""Which real images to keep: at random, by herding, by k-centre greedy, or by coverage (CCS).

The kernels are pure functions over features or scores, and none makes an N x N matrix. Each gives
an order, the first to be kept first: what is chosen for a small budget is kept in a larger one.
:func:`select_images` is the one door to them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.budget import as_int
from hmn_replay.condensation.pruning import MarginRecorder
from hmn_replay.data.features import LabelledFeatures
from hmn_replay.data.images import ImageSource, as_labelled_images
from hmn_replay.data.lookup import Images, as_floats, images_at_once
from hmn_replay.errors import ConfigError
from hmn_replay.registry import check_name
from hmn_replay.runtime import derive_seed, make_generator
from hmn_replay.training.networks import device_of, evaluating, find_head, logits_and_features
from hmn_replay.training.train import TrainingConfig, train_network

__all__ = [
    "BY_FEATURES",
    "SELECTIONS",
    "check_method_of_features",
    "choose_by_features",
    "coverage_centric",
    "embedding",
    "herding",
    "k_centre",
    "round_robin",
    "select_images",
]

SELECTIONS = ("random", "herding", "k-centre", "ccs")
"""What :func:`select_images` takes as a method."""

BY_FEATURES = ("herding", "k-centre")
"""The methods that compare a network's features: what :func:`choose_by_features` takes."""


def select_images(
    data: ImageSource,
    method: str = "random",
    *,
    num_images: int | None = None,
    network: nn.Module | None = None,
    hard_share: float = 0.3,
    config: TrainingConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Tensor:
    """Put the images of a data set in the order in which they are to be kept.

    Every class is put in order by itself; then one image of every class is taken, then another, and
    on. Herding is by the inputs of the network's last layer at unit length, as in iCaRL (Rebuffi et
    al. 2017); k-centre by the same inputs as they are (Sener and Savarese 2018); CCS by the AUM of
    one training on all images, whose margins are taken in evaluation mode after every epoch.

    Args:
        data: Where to choose from; see :func:`hmn_replay.as_labelled_images`.
        method: One of :data:`SELECTIONS`.
        num_images: How many to choose, 1 or more: the first ones of the order. Default: all.
        network: A trained network, for herding and k-centre: any module from float images
            ``(N, C, H, W)`` in [0, 1] to logits that are the output of an ``nn.Linear``. It is used
            where it is, and the mode of every module is as it was afterwards. Default: one that is
            trained here on all images; for features none, as they are compared themselves.
        hard_share: For :func:`coverage_centric`, in [0, 1). Default: 0.3, with which its authors
            keep a tenth of CIFAR-10.
        config: The training here, where the method needs one. An AUM has as many margins as that
            has epochs. Default: ``TrainingConfig()``.
        seed: Of the draw, and of the training here.
        device: Where to train. Default: CUDA where present, else the CPU.
        progress: Whether to show a bar of the training on standard error.

    Returns:
        Positions in ``data``, int64 on the CPU, each once. Among the first n of them, for any n,
        the numbers of images of two classes differ by one at most, the first classes having more,
        but for a class that has no more to give.

    Raises:
        ConfigError: An argument is not as said above; a network for CCS, which scores by the epochs
            of a training; or CCS of one class alone, which has no margins.
        DataError: Images or labels that cannot be used.
        TrainingError: The training here diverged.
    """
    check_name("selection", method, SELECTIONS)
    if num_images is not None and (as_int(num_images) is None or num_images < 1):
        raise ConfigError(f"num_images is None, or a whole number of 1 or more; got {num_images!r}")
    if not 0 <= hard_share < 1:
        raise ConfigError(f"hard_share is in [0, 1); got {hard_share}")
    data = as_labelled_images(data)
    if isinstance(data, LabelledFeatures):
        check_method_of_features(method)
    if network is not None and not isinstance(network, nn.Module):
        raise ConfigError(
            f"network is a trained nn.Module, or None to train one; got {network!r}: the network "
            "to train is named in config=TrainingConfig(network=...)"
        )
    if method == "ccs" and network is not None:
        raise ConfigError("ccs scores by the epochs of a training: pass config=, and no network")

    train = partial(
        train_network,
        data.images,
        data.class_indices,
        data.num_classes,
        config=config,
        seed=derive_seed(seed, "selection"),
        device=device,
        progress=progress,
    )
    if method == "ccs" and data.num_classes < 2:
        raise ConfigError(
            "ccs scores images by how a network tells their class from others, and there is one "
            "class alone: take another selection, such as random or herding"
        )
    members = {label: data.of_class(label) for label in data.classes.tolist()}
    count = _largest_share(list(map(len, members.values())), num_images)
    if method == "random":
        orders = [
            torch.randperm(len(own), generator=make_generator(seed, "real images", label))
            for label, own in members.items()
        ]
    elif method == "ccs":
        recorder = MarginRecorder(data.images, data.class_indices)
        train(on_epoch=recorder)
        scores = recorder.aum()
        orders = [
            coverage_centric(
                scores[own],
                count,
                hard_share=hard_share,
                generator=make_generator(seed, "coverage-centric", label),
            )
            for label, own in members.items()
        ]
    else:
        holds_features = isinstance(data, LabelledFeatures)
        trained = train() if network is None and not holds_features else network
        embed = embedding(data.images, trained)
        choose = partial(choose_by_features, count=count, method=method, embed=embed)
        return round_robin([choose(data.images, own) for own in members.values()])[:num_images]
    ordered = [own[order] for own, order in zip(members.values(), orders, strict=True)]
    return round_robin(ordered)[:num_images]


def check_method_of_features(method: str) -> None:
    """Raise a ConfigError for a selection that features cannot be chosen by."""
    if method == "ccs":
        raise ConfigError("ccs scores by trainings on images; features take random or herding")


def embedding(images: Images, network: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """Return what makes features ``(B, D)``, float, of some images.

    Args:
        images: All of them: uint8 ``(N, C, H, W)``; without a network features, float.
        network: The features are the inputs of its last layer, in evaluation mode, where it is.
            None for the images themselves.

    Raises:
        ConfigError: The network's logits are not the output of an ``nn.Linear``.
    """
    if network is None:
        return partial(torch.flatten, start_dim=1)

    def shown(some: Tensor) -> Tensor:
        return as_floats(some.to(device_of(network, some.device)))

    def embed(some: Tensor) -> Tensor:
        with evaluating(network):
            return logits_and_features(network, head, shown(some))[1]

    ends = torch.tensor([0, len(images) - 1])  # images that differ, mostly
    head = find_head(network, shown(images[ends]))
    return embed


@torch.no_grad()
def choose_by_features(
    images: Images, members: Tensor, count: int, method: str, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Choose images of a class by herding, of features at unit length, or by k-centre greedy.

    Args:
        images: ``(N, C, H, W)``, fetched in parts.
        members: int64 ``(M,)`` on the CPU, the positions of the class's images, M of 1 or more.
        count: How many to choose; no more than M are.
        method: One of :data:`BY_FEATURES`.
        embed: From some images to their features; see :func:`embedding`.

    Returns:
        Their positions in the order chosen, int64 ``(min(count, M),)`` on the CPU.
    """
    parts = members.split(images_at_once(images.shape[1:]))
    features = torch.cat([embed(images[part]) for part in parts])
    if method == "herding":
        order = herding(F.normalize(features), count)
    else:
        order = k_centre(features, count)
    return members[order.cpu()]


@torch.no_grad()
def herding(features: Tensor, count: int) -> Tensor:
    """Choose points one by one, each bringing the mean of all chosen closest to the mean of all.

        p_t = argmin_x || mu - (x + p_1 + ... + p_{t-1}) / t ||

    Welling 2009, as in iCaRL's Algorithm 4 (Rebuffi et al. 2017), each point at most once.

    Args:
        features: float ``(N, D)``, finite, N of 1 or more, on any device.
        count: How many to choose; no more than N are.

    Returns:
        Their positions in the order chosen, int64 ``(min(count, N),)``, on the same device.

    Raises:
        ConfigError: ``features`` are not as said above.

    Example:
        >>> herding(torch.tensor([[0.0], [4.0], [5.0], [9.0]]), 3)
        tensor([1, 2, 0])
    """
    # About the mean, the norm to make small is that of x + p_1 + ..., whatever t.
    centred, squares = _centre(features)
    order = _empty_order(features, count)
    total = torch.zeros_like(centred[0])
    for position in range(len(order)):
        # Positions of one entry: a device is not asked for their values.
        best = (squares + 2 * (centred @ total)).argmin().view(1)
        order[position : position + 1] = best
        total = total + centred.index_select(0, best).view(-1)
        squares.index_fill_(0, best, torch.inf)
    return order


@torch.no_grad()
def k_centre(features: Tensor, count: int, *, first: int | None = None) -> Tensor:
    """Choose points one by one, each the farthest from the nearest of those chosen.

        p_t = argmax_x min_{s < t} || x - p_s ||

    K-centre greedy (Sener and Savarese 2018, Algorithm 1), within twice the least radius.

    Args:
        features: float ``(N, D)``, finite, N of 1 or more, on any device.
        count: How many to choose; no more than N are.
        first: The position to begin with. Default: that of the point closest to the mean.

    Returns:
        Their positions in the order chosen, int64 ``(min(count, N),)``, on the same device.

    Raises:
        ConfigError: ``features`` are not as said above, or ``first`` is not in [0, N).

    Example:
        >>> k_centre(torch.tensor([[0.0], [4.0], [5.0], [9.0]]), 3, first=0)
        tensor([0, 3, 1])
    """
    centred, squares = _centre(features)
    if first is not None and not 0 <= first < len(features):
        raise ConfigError(f"first is a position in [0, {len(features)}); got {first}")
    order = _empty_order(features, count)
    nearest = torch.full_like(squares, torch.inf)
    best = squares.argmin().view(1)
    if first is not None:
        best = torch.tensor([first], device=features.device)
    for position in range(len(order)):
        order[position : position + 1] = best
        own = centred.index_select(0, best).view(-1)
        distances = squares + squares.index_select(0, best) - 2 * (centred @ own)
        nearest = torch.minimum(nearest, distances).index_fill_(0, best, -torch.inf)
        best = nearest.argmax().view(1)
    return order


def coverage_centric(
    scores: Tensor,
    count: int,
    *,
    hard_share: float,
    num_strata: int = 50,
    generator: torch.Generator,
) -> Tensor:
    """Choose points at random, as many of every stratum of the scores as it has.

    CCS (Zheng et al. 2023, arXiv 2210.15809, Algorithm 1): drop the hardest, split the range of the
    other scores into strata of equal width, and spread the count evenly over the strata, the
    smallest first; what one cannot use goes to those after it. The same numbers come of taking one
    point of every stratum in turn, the largest stratum first, so with one ``hard_share`` this is an
    order too; the paper, though, has another share for every count.

    Args:
        scores: float ``(N,)``, finite, N of 1 or more, on the CPU; low is hard, as of AUM.
        count: How many to choose; no more than N are.
        hard_share: Of the points, floor(share N) of lowest score are dropped, in [0, 1): chosen
            when no other is left, the easiest of them first.
        num_strata: 1 or more. Default: 50, the paper's.
        generator: Of the draw within the strata.

    Returns:
        Their positions in the order chosen, int64 ``(min(count, N),)``.

    Raises:
        ConfigError: An argument is not as said above.
    """
    if not 0 <= hard_share < 1:
        raise ConfigError(f"hard_share is in [0, 1); got {hard_share}")
    if num_strata < 1:
        raise ConfigError(f"num_strata is 1 or more; got {num_strata}")
    if scores.ndim != 1 or not len(scores) or not bool(scores.isfinite().all()):
        raise ConfigError(
            f"scores are finite numbers (N,), one or more; got {tuple(scores.shape)}, "
            f"{int(scores.isfinite().sum())} of them finite"
        )
    # 0.29 * 100 is 28.999... in floating point; the little that is added mends that.
    num_hard = min(math.floor(hard_share * len(scores) + 1e-9), len(scores) - 1)
    by_score = scores.argsort(stable=True)
    rest = by_score[num_hard:]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    values = scores[rest].double()
    low, high = values.min(), values.max()
    shares = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    strata = (shares * num_strata).long().clamp(max=num_strata - 1)
    groups = sorted((rest[strata == stratum] for stratum in range(num_strata)), key=len)
    return torch.cat([round_robin(groups[::-1]), by_score[:num_hard].flip(0)])[: max(0, count)]


def round_robin(orders: Sequence[Tensor]) -> Tensor:
    """Take the first of every order, then the second of every one that has one, and on.

    Args:
        orders: One tensor or more, ``(N_i,)`` each.

    Returns:
        ``(sum of N_i,)``.

    Example:
        >>> round_robin([torch.tensor([1, 2, 3]), torch.tensor([7])])
        tensor([1, 7, 2, 3])
    """
    rounds = torch.cat([torch.arange(len(order)) for order in orders])
    return torch.cat(list(orders))[rounds.argsort(stable=True)]


def _largest_share(counts: Sequence[int], num_images: int | None) -> int:
    """Return the most images that any class gives, when ``num_images`` are taken in turn."""
    wanted = sum(counts) if num_images is None else min(num_images, sum(counts))
    shares = range(max(counts) + 1)
    return next(share for share in shares if sum(min(n, share) for n in counts) >= wanted)


def _centre(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return features less their mean, and their squared norms: distances then round least."""
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ConfigError(
            f"features are floats (N, D), N of 1 or more; got {features.dtype} "
            f"{tuple(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ConfigError("features hold NaN or infinity: the network that they come from diverged")
    centred = features - features.mean(dim=0)
    return centred, centred.square().sum(dim=1)


def _empty_order(features: Tensor, count: int) -> Tensor:
    num_chosen = max(0, min(count, len(features)))
    return torch.empty(num_chosen, dtype=torch.int64, device=features.device)
