"""The papers' numbers: what they are of, and how a data set is found among them."""

from __future__ import annotations

import itertools

import pytest

from experiments.tables import published
from experiments.tables.containers import SYSTEMS
from experiments.tables.published import dataset_name
from experiments.tables.study import KINDS
from hmn_replay.training.networks import NETWORKS


def test_numbers_are_percents_of_systems_that_the_tables_have() -> None:
    assert set(published.CONTAINERS) <= set(SYSTEMS)
    assert set(published.ARCHITECTURES) <= set(published.MEMORY) | set(KINDS)
    for numbers in published.ARCHITECTURES.values():
        assert set(numbers) <= set(NETWORKS)
    by_ipc = [
        *published.CONTAINERS.values(),
        *itertools.chain(*map(dict.values, published.ARCHITECTURES.values())),
        *itertools.chain(*map(dict.values, published.DATASETS.values())),
    ]
    for row in by_ipc:
        assert set(row) <= {1, 10, 50}
        # More images, more accuracy.
        assert 0 < row[1] == min(row.values()) <= max(row.values()) < 100


def test_hmn_is_above_every_rival_under_the_same_loss() -> None:
    hmn = published.CONTAINERS["hmn"]
    for name in set(KINDS) - {"hmn", "fred"}:  # the paper says nothing of FreD
        assert all(hmn[ipc] > accuracy for ipc, accuracy in published.CONTAINERS[name].items())


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("cifar10", "cifar10"),
        ("sets/CIFAR-100.npz", "cifar100"),
        ("sets/tiny-imagenet-200/", "tiny_imagenet"),
        ("SVHN", "svhn"),
        ("imagenet-10", "imagenet10"),
    ],
)
def test_a_data_set_is_known_by_the_letters_of_its_name(data: str, name: str) -> None:
    assert dataset_name(data) == name
