"""Margins, AUM and double-ended pruning, against cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.condensation.pruning import (
    MarginRecorder,
    aum,
    double_ended_prune,
    margins,
)
from hmn_replay.errors import ConfigError
from hmn_replay.training.train import TrainingConfig, train_network
from tests.stripes import stripes

LOGITS = torch.tensor([[2.0, 5.0, 1.0], [2.0, 5.0, 1.0], [2.0, 5.0, 1.0], [7.0, 7.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 0])


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_a_margin_is_the_own_logit_less_the_best_other() -> None:
    assert margins(LOGITS, LABELS).tolist() == [-3.0, 3.0, -4.0, 0.0]


def test_margins_of_two_classes_are_the_difference() -> None:
    logits = torch.tensor([[0.25, 1.5], [-2.0, -math.inf]])
    assert margins(logits, torch.tensor([0, 0])).tolist() == [-1.25, math.inf]


def test_margins_take_leading_axes() -> None:
    stacked = torch.stack([LOGITS, 2 * LOGITS, LOGITS + 100])
    result = margins(stacked, LABELS)
    assert result.shape == (3, 4)
    assert result[0].equal(margins(LOGITS, LABELS))
    assert result[1].equal(2 * result[0])
    assert result[2].equal(result[0])


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 10**6))
def test_margins_equal_a_loop(num_images: int, num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    expected = [
        row[label] - max(value for j, value in enumerate(row) if j != label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    before = logits.clone()
    assert margins(logits, labels).tolist() == expected
    assert logits.equal(before)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3, 1), zeros(3)),
        (torch.zeros(3), zeros(3)),
        (torch.zeros(3, 2), zeros(4)),
        (torch.zeros(4, 3, 2), zeros(4)),
    ],
    ids=["one class", "no classes", "too many labels", "epochs are not images"],
)
def test_margins_refuse_shapes_that_do_not_fit(logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"logits are \(\.\.\., N, K\) with K of 2 or more"):
        margins(logits, labels)


@pytest.mark.parametrize("labels", [[0, 1, 3, 0], [0, -1, 2, 0], [1000, 5, -3, 0]])
def test_margins_refuse_labels_that_are_no_class_indices(labels: list[int]) -> None:
    told = f"labels are in 0 .. 2, .*; got {min(labels)} to {max(labels)}"
    with pytest.raises(ConfigError, match=told):
        margins(LOGITS, torch.tensor(labels))


def test_margins_of_no_image_are_none() -> None:
    assert margins(torch.zeros(5, 0, 3), zeros(0)).shape == (5, 0)


def test_aum_is_the_mean_over_epochs() -> None:
    epochs = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, 0.0]])
    assert aum(epochs).tolist() == [3.0, -2.0]
    assert aum(list(epochs)).tolist() == [3.0, -2.0]
    assert aum(tuple(epochs[:1])).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("nothing", [[], (), torch.empty(0, 5)])
def test_aum_of_no_epoch_is_refused(nothing: Any) -> None:
    with pytest.raises(ConfigError, match="got the margins of none"):
        aum(nothing)


@pytest.mark.parametrize(
    ("num_drop", "beta", "stays"),
    [
        (0, 0.5, [0, 1, 2, 3, 4, 5]),
        (2, 0.0, [0, 2, 4, 5]),  # the two easiest go: 1 (0.9) and 3 (0.8)
        (2, 1.0, [1, 2, 3, 5]),  # the two hardest go: 4 (-0.5) and 0 (0.1)
        (2, 0.5, [0, 2, 3, 5]),  # one of each
        (3, 0.5, [0, 2, 5]),  # floor(1.5): 1 hard one and 2 easy ones
        (3, 0.34, [0, 2, 5]),  # floor(1.02) is 1
        (3, 0.33, [0, 4, 5]),  # floor(0.99) is 0
        (6, 0.5, []),
    ],
)
def test_the_hardest_and_the_easiest_go(num_drop: int, beta: float, stays: list[int]) -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.8, -0.5, 0.4])
    kept = double_ended_prune(scores, zeros(6), num_drop, beta)
    assert kept.dtype == torch.int64
    assert kept.tolist() == stays


def test_every_class_is_pruned_by_itself() -> None:
    # Class 7 is all harder than class -3, and still loses no more.
    scores = torch.tensor([10.0, -1.0, 20.0, -2.0, 30.0, -3.0])
    labels = torch.tensor([-3, 7, -3, 7, -3, 7])
    assert double_ended_prune(scores, labels, 1, beta=1.0).tolist() == [1, 2, 3, 4]
    assert double_ended_prune(scores, labels, 1, beta=0.0).tolist() == [0, 2, 3, 5]
    # One number a class goes by the order of the sorted labels.
    assert double_ended_prune(scores, labels, [2, 0], beta=1.0).tolist() == [1, 3, 4, 5]
    assert double_ended_prune(scores, labels, [0, 2], beta=1.0).tolist() == [0, 1, 2, 4]


def test_among_equal_scores_the_first_counts_as_the_hardest() -> None:
    scores = torch.zeros(300)
    assert double_ended_prune(scores, zeros(300), 2, beta=1.0).tolist() == list(range(2, 300))
    assert double_ended_prune(scores, zeros(300), 2, beta=0.0).tolist() == list(range(298))


@pytest.mark.parametrize(("beta", "num_drop"), [(0.29, 100), (0.57, 100), (0.1, 10), (0.7, 10)])
def test_floor_is_taken_of_the_decimal_number(beta: float, num_drop: int) -> None:
    num_hardest = round(beta * num_drop)
    kept = double_ended_prune(torch.arange(200.0), zeros(200), num_drop, beta)
    assert kept.tolist() == list(range(num_hardest, 200 - (num_drop - num_hardest)))


def test_scores_beyond_all_bounds_are_in_order_too() -> None:
    scores = torch.tensor([math.inf, -math.inf, 0.0])
    assert double_ended_prune(scores, zeros(3), 1, beta=1.0).tolist() == [0, 2]
    assert double_ended_prune(scores, zeros(3), 1, beta=0.0).tolist() == [1, 2]


def test_of_nothing_nothing_stays() -> None:
    kept = double_ended_prune(torch.empty(0), zeros(0), 0, beta=0.5)
    assert kept.dtype == torch.int64
    assert kept.tolist() == []


@st.composite
def pruning_cases(draw: st.DrawFn) -> tuple[list[float], list[int], list[int], float]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    labels = draw(st.permutations([3 * c - 4 for c, size in enumerate(sizes) for _ in range(size)]))
    scores = draw(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=sum(sizes), max_size=sum(sizes))
    )
    drops = [draw(st.integers(0, size)) for size in sizes]
    return scores, list(labels), drops, draw(st.floats(0, 1))


@given(pruning_cases())
def test_each_class_loses_its_share_at_both_ends(
    case: tuple[list[float], list[int], list[int], float],
) -> None:
    scores, labels, drops, beta = case
    kept = double_ended_prune(torch.tensor(scores), torch.tensor(labels), drops, beta).tolist()
    assert kept == sorted(set(kept))
    for label, drop in zip(sorted(set(labels)), drops, strict=True):
        members = [i for i, own in enumerate(labels) if own == label]
        staying = [i for i in kept if labels[i] == label]
        gone = [i for i in members if i not in staying]
        assert len(gone) == drop
        ranking = sorted(members, key=lambda i: (scores[i], i))
        places = sorted(map(ranking.index, staying))
        if places:
            num_hardest = places[0]
            assert places == list(range(num_hardest, num_hardest + len(places)))
            assert num_hardest <= beta * drop + 1e-6 < num_hardest + 1 + 1e-5


@pytest.mark.parametrize("beta", [-0.01, 1.01, math.nan])
def test_beta_is_a_share(beta: float) -> None:
    with pytest.raises(ConfigError, match=r"beta is in \[0, 1\]; got"):
        double_ended_prune(torch.zeros(3), zeros(3), 1, beta)


@pytest.mark.parametrize("num_drop", [4, -1])
def test_a_class_cannot_drop_more_than_it_has(num_drop: int) -> None:
    with pytest.raises(ConfigError, match=f"class 5 has 3 images; it cannot drop {num_drop} of"):
        double_ended_prune(torch.zeros(3), zeros(3) + 5, num_drop, 0.5)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="NaN"):
        double_ended_prune(torch.tensor([1.0, math.nan]), zeros(2), 1, 0.5)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(N,\) both; got \(3,\) and \(2,\)"):
        double_ended_prune(torch.zeros(3), zeros(2), 1, 0.5)
    with pytest.raises(ConfigError, match=r"\(N,\) both; got \(3, 1\) and \(3, 1\)"):
        double_ended_prune(torch.zeros(3, 1), zeros(3)[:, None], 1, 0.5)
    with pytest.raises(ConfigError, match=r"or 2 of them, one a class; got \[1, 1, 1\]"):
        double_ended_prune(torch.zeros(3), torch.tensor([0, 1, 1]), [1, 1, 1], 0.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type_will_do(dtype: torch.dtype) -> None:
    assert margins(LOGITS, LABELS.to(dtype)).equal(margins(LOGITS, LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="labels are integers; got"):
        margins(LOGITS, LABELS.clamp(max=1).to(dtype))


def test_epochs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="a margin for each image"):
        aum([torch.zeros(3), torch.zeros(2)])


def test_the_number_to_drop_may_be_numpys() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.4])
    num_drops: list[Any] = [np.int64(2), np.array([2])]
    for num_drop in num_drops:
        assert double_ended_prune(scores, zeros(4), num_drop, beta=0.5).tolist() == [2, 3]
    for wrong in (None, 1.0, [1.0]):
        with pytest.raises(ConfigError, match="num_drop is an integer"):
            double_ended_prune(scores, zeros(4), wrong, beta=0.5)  # type: ignore[arg-type]


def test_recorded_margins_are_those_of_every_image_after_every_epoch() -> None:
    images, labels = stripes(24, labels=(0, 1, 2))
    recorder, expected = MarginRecorder(images, labels), list[Tensor]()

    def record(epoch: int, network: Any) -> None:
        recorder(epoch, network)
        assert network.training
        with torch.no_grad():
            expected.append(margins(network.eval()(images / 255), labels))

    config = TrainingConfig(width=4, num_passes=96, batch_size=8)
    train_network(images, labels, 3, config=config, device="cpu", on_epoch=record)
    assert len(recorder.recorded) == len(expected) == 4
    torch.testing.assert_close(torch.stack(recorder.recorded), torch.stack(expected))
    torch.testing.assert_close(recorder.aum(), torch.stack(expected).mean(0))
