"""The choice of real images, against slow and obvious references."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Subset

from hmn_replay.condensation import selection
from hmn_replay.condensation.pruning import margins
from hmn_replay.condensation.selection import (
    SELECTIONS,
    coverage_centric,
    herding,
    k_centre,
    round_robin,
    select_images,
)
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError
from hmn_replay.runtime import derive_seed, make_generator
from hmn_replay.training.networks import Network, build_network
from hmn_replay.training.train import TrainingConfig, train_network

TINY = TrainingConfig(width=4, num_passes=50, augmentations=())
kernels = pytest.mark.parametrize("kernel", [herding, k_centre])


def points(num_points: int, num_axes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_points, num_axes, generator=generator, dtype=torch.float64)


def some_scores(num_points: int, seed: int = 0) -> Tensor:
    """Most of them close together, as AUM is, and some alike."""
    generator = torch.Generator().manual_seed(seed)
    return (8 * torch.randn(num_points, generator=generator)).round() / 4


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def an_uneven_set(counts: tuple[int, ...] = (9, 2, 6), seed: int = 0) -> LabelledImages:
    """Noise, the labels -3, 7 and 1000 in a random order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([-3, 7, 1000]).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(256, (len(labels), 3, 8, 8), generator=generator)
    return LabelledImages(images.to(torch.uint8), labels)


@given(st.integers(1, 14), st.integers(1, 4), st.integers(0, 10**6))
def test_every_choice_of_herding_brings_the_mean_closest(
    num_points: int, num_axes: int, seed: int
) -> None:
    features = points(num_points, num_axes, seed)
    mean = features.mean(dim=0)
    chosen: list[int] = []
    for choice in herding(features, num_points).tolist():
        distances = {
            i: float((features[[*chosen, i]].mean(dim=0) - mean).norm())
            for i in range(num_points)
            if i not in chosen
        }
        # Of two points, either is as far from their mean: which one is up to rounding.
        assert distances[choice] <= min(distances.values()) + 1e-9
        chosen.append(choice)


def test_herding_in_single_precision_is_as_good() -> None:
    features = F.normalize(points(300, 20)).float()
    order = herding(features, 300)
    mean = features.double().mean(dim=0)
    for count in (1, 2, 10, 100):
        chosen = order[: count - 1].tolist()
        totals = features[chosen].double().sum(dim=0) + features.double()
        distances = (totals / count - mean).norm(dim=1)
        distances[chosen] = torch.inf
        assert float(distances[order[count - 1]]) <= float(distances.min()) + 1e-6


@given(st.integers(1, 14), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([None, 0]))
def test_every_choice_of_k_centre_is_the_farthest(
    num_points: int, num_axes: int, seed: int, first: int | None
) -> None:
    features = points(num_points, num_axes, seed)
    begin, *choices = k_centre(features, num_points, first=first).tolist()
    if first is None:
        from_mean = (features - features.mean(dim=0)).norm(dim=1)
        assert float(from_mean[begin]) <= float(from_mean.min()) + 1e-9
    else:
        assert begin == first
    chosen = [begin]
    for choice in choices:
        gaps = {
            i: min(float((features[i] - features[j]).norm()) for j in chosen)
            for i in range(num_points)
            if i not in chosen
        }
        assert gaps[choice] >= max(gaps.values()) - 1e-9
        chosen.append(choice)


@given(st.integers(3, 8), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=25)
def test_k_centre_is_within_twice_the_least_radius(num_points: int, count: int, seed: int) -> None:
    features = points(num_points, 2, seed)
    distances = torch.cdist(features, features)

    def radius(centres: list[int]) -> float:
        return float(distances[:, centres].min(dim=1).values.max())

    least = min(radius(list(centres)) for centres in combinations(range(num_points), count))
    assert radius(k_centre(features, count).tolist()) <= 2 * least + 1e-9


@kernels
def test_points_are_chosen_once_each_and_no_more_than_there_are(
    kernel: Callable[[Tensor, int], Tensor],
) -> None:
    for features in (torch.rand(4, 3), torch.zeros(4, 2), torch.full((4, 2), 0.1)):
        before = features.clone()
        order = kernel(features, 9)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        assert kernel(features, 2).tolist() == order[:2].tolist()
        assert kernel(features, 0).shape == kernel(features, -1).shape == (0,)
        assert features.equal(before)
    assert kernel(torch.ones(1, 3), 1).tolist() == [0]
    assert not kernel(torch.rand(4, 3, requires_grad=True), 4).requires_grad


@kernels
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), r"features are floats \(N, D\), N of 1 or more; got torch.float32 \(3,\)"),
        (torch.zeros(0, 3), r"features are floats .* \(0, 3\)"),
        (torch.zeros(3, 2, dtype=torch.int64), "features are floats .* torch.int64"),
        (torch.tensor([[1.0], [math.nan]]), "hold NaN or infinity"),
    ],
)
def test_features_that_are_none_are_refused(
    kernel: Callable[[Tensor, int], Tensor], features: Tensor, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kernel(features, 2)


@pytest.mark.parametrize("first", [-1, 3])
def test_k_centre_begins_with_a_point_that_there_is(first: int) -> None:
    with pytest.raises(ConfigError, match=rf"first is a position in \[0, 3\); got {first}"):
        k_centre(torch.zeros(3, 2), 2, first=first)


def strata_of(scores: Tensor, num_strata: int) -> list[int]:
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        return [0] * len(scores)
    shares = [(score - low) / (high - low) for score in scores.tolist()]
    return [min(int(share * num_strata), num_strata - 1) for share in shares]


def budgets_of(sizes: list[int], count: int) -> list[int]:
    """Algorithm 1 of CCS, as it is written."""
    budgets = [0] * len(sizes)
    left = list(range(len(sizes)))
    while left:
        smallest = min(left, key=lambda stratum: sizes[stratum])
        budgets[smallest] = min(sizes[smallest], count // len(left))
        count -= budgets[smallest]
        left.remove(smallest)
    return budgets


@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.9]),
    st.integers(0, 10**6),
)
def test_coverage_takes_of_every_stratum_what_the_paper_does(
    num_points: int, num_strata: int, hard_share: float, seed: int
) -> None:
    scores = some_scores(num_points, seed)
    num_hard = math.floor(round(hard_share * 100) * num_points / 100)
    by_score = sorted(range(num_points), key=lambda i: float(scores[i]))
    hard, rest = by_score[:num_hard], by_score[num_hard:]
    strata = dict(zip(rest, strata_of(scores[rest], num_strata), strict=True))
    sizes = [list(strata.values()).count(stratum) for stratum in range(num_strata)]
    for count in range(len(rest) + 1):
        order = coverage_centric(
            scores, count, hard_share=hard_share, num_strata=num_strata, generator=draw(seed)
        ).tolist()
        found = [strata[position] for position in order]
        assert [found.count(stratum) for stratum in range(num_strata)] == budgets_of(sizes, count)
        assert len(set(order)) == count
    whole = coverage_centric(
        scores, num_points, hard_share=hard_share, num_strata=num_strata, generator=draw(seed)
    ).tolist()
    assert whole[len(rest) :] == hard[::-1]
    assert whole[: len(rest)] == order


def test_coverage_is_an_order() -> None:
    scores = some_scores(40)
    whole = coverage_centric(scores, 99, hard_share=0.3, generator=draw())
    assert sorted(whole.tolist()) == list(range(40))
    for count in range(40):
        part = coverage_centric(scores, count, hard_share=0.3, generator=draw())
        assert part.equal(whole[:count])
    other = coverage_centric(scores, 99, hard_share=0.3, generator=draw(1))
    assert not other.equal(whole)


def test_coverage_draws_every_point_of_a_stratum_as_often() -> None:
    scores = torch.tensor([0.0] * 8 + [1.0] * 2)
    generator = draw()
    counts = torch.zeros(10)
    for _ in range(800):
        order = coverage_centric(scores, 4, hard_share=0.0, num_strata=3, generator=generator)
        counts[order] += 1
    assert counts.sum() == 3200
    assert counts[8:].tolist() == [800, 800]
    # Binomial, 200 on average with a deviation of 12.
    assert 140 < counts[:8].min() <= counts[:8].max() < 260


@pytest.mark.parametrize(
    ("scores", "hard_share", "num_strata", "message"),
    [
        (torch.zeros(3), 1.0, 50, r"hard_share is in \[0, 1\); got 1.0"),
        (torch.zeros(3), -0.1, 50, r"hard_share is in \[0, 1\); got -0.1"),
        (torch.zeros(3), math.nan, 50, r"hard_share is in \[0, 1\); got nan"),
        (torch.zeros(3), 0.1, 0, "num_strata is 1 or more; got 0"),
        (torch.zeros(0), 0.1, 50, r"scores are finite numbers \(N,\), one or more; got \(0,\)"),
        (torch.zeros(3, 1), 0.1, 50, r"scores are finite numbers .* got \(3, 1\)"),
        (torch.tensor([1.0, math.nan]), 0.1, 50, r"got \(2,\), 1 of them finite"),
        (torch.tensor([1.0, math.inf]), 0.1, 50, r"got \(2,\), 1 of them finite"),
    ],
)
def test_coverage_refuses_what_it_cannot_use(
    scores: Tensor, hard_share: float, num_strata: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        coverage_centric(scores, 1, hard_share=hard_share, num_strata=num_strata, generator=draw())


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_round_robin_deals_in_turn(lengths: list[int]) -> None:
    orders = [torch.arange(length) + 100 * i for i, length in enumerate(lengths)]
    expected = [
        int(order[turn]) for turn in range(max(lengths)) for order in orders if turn < len(order)
    ]
    assert round_robin(orders).tolist() == expected


counts_of_three_classes = st.tuples(*[st.integers(1, 12)] * 3)


@pytest.mark.parametrize("method", SELECTIONS)
@given(counts_of_three_classes, st.integers(0, 10**6), st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_every_selection_is_balanced_and_an_order(
    method: str, counts: tuple[int, int, int], seed: int, num_images: int
) -> None:
    data = an_uneven_set(counts, seed)
    choose = partial(select_images, data, method, config=TINY, seed=seed, device="cpu")
    if method != "ccs":
        choose = partial(choose, network=build_network("convnet", (3, 8, 8), 3, width=4))
    whole = choose()
    assert whole.dtype == torch.int64
    assert sorted(whole.tolist()) == list(range(len(data)))
    for count in range(1, len(whole) + 1):
        kept = [int((data.labels[whole[:count]] == label).sum()) for label in data.classes]
        unspent = [n for n, size in zip(kept, counts, strict=True) if n < size]
        assert unspent == sorted(unspent, reverse=True)
        assert not unspent or max(kept) <= min(unspent) + 1
    assert choose(num_images=num_images).equal(whole[:num_images])


def test_a_random_selection_is_one_draw_a_class() -> None:
    data = an_uneven_set()
    orders = [
        data.of_class(label)[torch.randperm(n, generator=make_generator(5, "real images", label))]
        for label, n in ((-3, 9), (7, 2), (1000, 6))
    ]
    expected = [orders[i][turn] for turn in range(9) for i in range(3) if turn < len(orders[i])]
    assert select_images(data, seed=5).tolist() == [int(position) for position in expected]


@pytest.mark.parametrize("name", ["convnet", "vgg16", "resnet18"])
def test_features_are_what_the_last_layer_takes_in(name: str) -> None:
    data = an_uneven_set((6, 6, 6))
    network = build_network(name, (3, 8, 8), 3, width=4)
    linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    taken: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        network.eval()(data.floats())
    handle.remove()
    network.train()
    network.get_submodule("body.stages.0").eval()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    for method, kernel, features in (
        ("herding", herding, F.normalize(taken[0])),
        ("k-centre", k_centre, taken[0]),
    ):
        orders = [data.of_class(label) for label in data.classes.tolist()]
        orders = [own[kernel(features[own], 4)] for own in orders]
        found = select_images(data, method, num_images=12, network=network)
        assert found.tolist() == torch.stack(orders, dim=1).flatten().tolist()
    assert [module.training for module in network.modules()] == modes
    assert all(value.equal(state[key]) for key, value in network.state_dict().items())


def test_ccs_scores_by_the_aum_of_a_training() -> None:
    data = an_uneven_set((12, 12, 12))
    recorded: list[Tensor] = []

    def record(_: int, network: Network) -> None:
        with torch.no_grad():
            recorded.append(margins(network.eval()(data.floats()), data.class_indices))

    config = TrainingConfig(width=4, num_passes=108)
    seed = derive_seed(3, "selection")
    arguments = (data.images, data.class_indices, 3)
    train_network(*arguments, config=config, seed=seed, device="cpu", on_epoch=record)
    assert len(recorded) == 3
    scores = sum(recorded, torch.zeros(36)) / 3
    orders = []
    for label in data.classes.tolist():
        own = data.of_class(label)
        generator = make_generator(3, "coverage-centric", label)
        orders.append(own[coverage_centric(scores[own], 5, hard_share=0.5, generator=generator)])
    found = select_images(
        data, "ccs", num_images=15, hard_share=0.5, config=config, seed=3, device="cpu"
    )
    assert found.tolist() == torch.stack(orders, dim=1).flatten().tolist()


@pytest.mark.usefixtures("untouched_random_state")
@pytest.mark.parametrize("method", SELECTIONS)
def test_the_seed_alone_decides(method: str) -> None:
    data = an_uneven_set((12, 12, 12))

    def choose(seed: int) -> list[int]:
        order: list[int] = select_images(
            data, method, config=TINY, seed=seed, device="cpu"
        ).tolist()
        return order

    assert choose(0) == choose(0)
    assert choose(0) != choose(1)


def test_images_run_through_the_network_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = an_uneven_set((9, 9, 9))
    network = build_network("convnet", (3, 8, 8), 3, width=4)
    sizes: list[int] = []
    network.get_submodule("body.stages.0").register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    whole = select_images(data, "k-centre", network=network)
    assert sizes == [2, 9, 9, 9]  # two show what its head is
    monkeypatch.setattr(selection, "images_at_once", lambda _: 4)
    assert select_images(data, "k-centre", network=network).equal(whole)
    assert sizes[4:] == [2, *[4, 4, 1] * 3]


@pytest.mark.parametrize("method", ["herding", "k-centre"])
def test_any_module_may_give_the_features(method: str) -> None:
    data = an_uneven_set((6, 6, 6))
    ours = build_network("convnet", (3, 8, 8), 3, width=4)
    plain = nn.Sequential(ours.body, nn.Identity())
    wanted = select_images(data, method, network=ours)
    assert select_images(data, method, network=plain).equal(wanted)
    without_parameters = nn.Sequential(nn.Flatten(), nn.ReLU())
    with pytest.raises(ConfigError, match="Sequential has no linear layer"):
        select_images(data, method, network=without_parameters)
    with pytest.raises(ConfigError, match=r"a trained nn\.Module, or None .* got 'convnet'"):
        select_images(data, method, network="convnet")  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [herding, k_centre])
def test_kernels_make_no_graph(kernel: Callable[[Tensor, int], Tensor]) -> None:
    def keep(_: Any) -> NoReturn:
        raise AssertionError("a graph is made")

    features = points(9, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        kernel(features, 4)


def test_the_head_is_found_where_the_first_images_are_alike() -> None:
    class Masked(nn.Module):
        """Has logits for classes that have not come yet, as an incremental classifier does."""

        def __init__(self) -> None:
            super().__init__()
            self.network = build_network("convnet", (3, 8, 8), 3, width=4)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images)
            return logits.masked_fill(torch.tensor([False, False, True]), -1000.0)

    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    images[3:] = torch.randint(256, (3, 3, 8, 8), generator=draw())
    data = LabelledImages(images, torch.arange(6) // 3)
    assert sorted(select_images(data, "herding", network=Masked()).tolist()) == list(range(6))


def test_wrong_options_are_refused() -> None:
    data = an_uneven_set()
    network = build_network("convnet", (3, 8, 8), 3, width=4)
    with pytest.raises(ConfigError, match="one of random, herding, k-centre, ccs; got 'best'"):
        select_images(data, "best")
    for num_images in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="num_images is None, or a whole number"):
            select_images(data, num_images=num_images)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass config=, and no network"):
        select_images(data, "ccs", network=network)
    with pytest.raises(ConfigError, match="hard_share"):
        select_images(data, "ccs", hard_share=2, config=TINY, device="cpu")
    with pytest.raises(ConfigError, match="there is one class alone"):
        select_images(data.take(data.of_class(7)), "ccs", config=TINY, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", SELECTIONS)
def test_selections_on_a_gpu(method: str) -> None:
    data = an_uneven_set()
    order = select_images(data, method, config=TINY, device="cuda")
    assert order.device.type == "cpu"
    assert sorted(order.tolist()) == list(range(len(data)))


@pytest.mark.parametrize("method", SELECTIONS)
def test_any_images_are_put_in_order(method: str) -> None:
    data = an_uneven_set()
    wanted = select_images(data, method, config=TINY, device="cpu")
    for source in ((data.images.numpy(), data.labels.numpy()), Subset(data, range(len(data)))):
        assert select_images(source, method, config=TINY, device="cpu").equal(wanted)
