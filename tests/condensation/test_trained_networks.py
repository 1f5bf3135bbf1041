"""Matching on networks between the initial and the trained weights of a few."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn_replay.condensation.config import CondenseConfig, make_config
from hmn_replay.condensation.matchers import BatchMatcher, trained_networks
from hmn_replay.condensation.steps import RealImages, StepContext, make_optimizer
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ExpertError
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.objectives.trajectories import Experts
from tests.support import TINY, room_for, same, tiny, values_of

MakeLayout = Callable[..., Any]
MakeSet = Callable[..., LabelledImages]

TRAINED: dict[str, Any] = {"trained_networks": 2, "trained_passes": 48, "beta_grid": ()}


@pytest.fixture
def config() -> CondenseConfig:
    options = {name: value for name, value in TINY.items() if name != "device"}
    return make_config(**{**options, **TRAINED, "inner_steps": 2})


@pytest.fixture
def experts(make_set: MakeSet, config: CondenseConfig, tmp_path: Path) -> Experts:
    data = make_set()
    return Experts(
        tmp_path,
        data.images,
        data.class_indices,
        3,
        num_experts=2,
        num_epochs=2,
        config=config.pool_training,
    )


@pytest.fixture
def matcher(
    make_set: MakeSet, make_layout: MakeLayout, config: CondenseConfig, experts: Experts
) -> BatchMatcher:
    data = make_set()
    memory = HierarchicalMemory(make_layout(), data.classes, 3)
    optimizer = make_optimizer(memory, (0.5, 0.99))
    context = StepContext(memory, RealImages.of(data), config, optimizer)
    return BatchMatcher(context, trained_networks(context, 7, experts), 7)


def test_a_folder_that_cannot_be_written_to_is_told_before_any_work(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    folders = [tmp_path / "file" / "experts"]
    folders += [path for path in [Path("/proc")] if path.is_dir()]  # nobody can write there
    for folder in folders:
        with pytest.raises(OSError, match=str(folder)):
            tiny(
                make_set(),
                make_layout(),
                **TRAINED,
                experts=str(folder),
                warm_start_steps=10**6,
            )


@given(num_experts=st.integers(1, 12), num_architectures=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_architectures_take_turns(num_experts: int, num_architectures: int) -> None:
    num_experts = max(num_experts, num_architectures)
    images, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2)
    experts = Experts(
        "nowhere",
        images,
        labels,
        2,
        num_experts=num_experts,
        num_epochs=1,
        networks=("convnet",) * num_architectures,
    )
    generator = torch.Generator().manual_seed(0)
    drawn = [experts.draw(number, generator) for number in range(300 * num_architectures)]
    assert [k % num_architectures for k in drawn] == [*range(num_architectures)] * 300
    assert set(drawn) == set(range(num_experts))


def position(values: list[Tensor], initial: list[Tensor], trained: list[Tensor]) -> float | None:
    """Return where values are between two ends, 0 to 1; None where they are elsewhere."""
    value, start, end = (
        torch.cat([v.flatten() for v in own]) for own in (values, initial, trained)
    )
    along = end - start
    share = float((value - start) @ along / (along @ along))
    near = torch.allclose(value, torch.lerp(start, end, share), atol=1e-5)
    return share if near else None


def test_networks_are_points_between_two_ends(matcher: BatchMatcher, experts: Experts) -> None:
    networks = matcher.networks
    names = [name for name, _ in experts.network(0).named_parameters()]
    ends = [
        [[values[name] for name in names] for values in experts.read(number, 0, 2)]
        for number in range(2)
    ]
    assert not ends[0][0][0].equal(ends[0][1][0]), "a training changes weights"
    found: dict[int, list[float]] = {0: [], 1: []}
    for number in range(12):
        networks.draw(number)
        values = [parameter.detach() for parameter in networks.network.parameters()]
        shares = [position(values, *pair) for pair in ends]
        (own,) = [number for number, share in enumerate(shares) if share is not None]
        share = shares[own]
        assert share is not None and -1e-3 <= share <= 1 + 1e-3
        found[own].append(share)
    assert min(map(len, found.values())) >= 2, "both are drawn"
    assert max(map(max, found.values())) - min(map(min, found.values())) > 0.5


def test_files_are_read_once(matcher: BatchMatcher, experts: Experts) -> None:
    for number in range(12):
        matcher.networks.draw(number)
    for number in range(2):
        experts.path(number).unlink()
    drawn = values_of(matcher.networks.network)
    matcher.networks.draw(12)
    assert not same(drawn, values_of(matcher.networks.network))


def test_a_network_stays_as_it_is_for_its_steps(matcher: BatchMatcher) -> None:
    matcher.step(0)
    before = values_of(matcher.networks.network)
    matcher.step(1)
    assert same(before, values_of(matcher.networks.network))
    matcher.step(2)
    assert not same(before, values_of(matcher.networks.network))
    assert matcher.kept() == {}


def test_it_goes_on_with_the_network_of_its_number(matcher: BatchMatcher) -> None:
    matcher.step(0)
    expected = values_of(matcher.networks.network)
    matcher.networks.draw(5)
    matcher.resume(None, 1)  # type: ignore[arg-type]
    assert all(
        a.equal(b) for a, b in zip(expected, values_of(matcher.networks.network), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"objective": "distribution"}, True),
        (
            {"objective": lambda _, real, __, decoded, ___: (decoded.mean() - real.mean()) ** 2},
            True,
        ),
        ({"objective": "dc"}, False),
        ({"objective": "dm"}, False),
        ({"trained_networks": 0}, False),
        ({"outer_steps": 0}, False),
    ],
)
def test_they_take_the_place_of_networks_that_learn_from_real_images(
    make_set: MakeSet, make_layout: MakeLayout, options: dict[str, Any], expected: bool
) -> None:
    memory = tiny(make_set(), make_layout(), **{**TRAINED, **options})
    assert ("experts" in memory.report["phases"]) == expected
    if expected:
        assert memory.report["phases"]["experts"]["images"] == 2 * 48


def test_a_folder_serves_runs_of_other_settings_on_the_same_images(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout = make_set(), make_layout()
    options = {**TRAINED, "experts": str(tmp_path / "networks")}
    first = tiny(data, layout, **options)
    assert len(os.listdir(tmp_path / "networks")) == 2
    again = tiny(data, layout, **options)
    assert again.to_bytes() == first.to_bytes()
    assert again.report["phases"]["experts"]["images"] == 0
    other = tiny(data, layout, objective="distribution", memory_learning_rate=0.1, **options)
    assert other.report["phases"]["experts"]["images"] == 0
    with pytest.raises(ExpertError, match="other images or labels"):
        tiny(make_set(seed=1), layout, **options)


def test_networks_for_added_classes_know_these_alone(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    options = {**TRAINED, "budget": room_for(layout, 6, 24)}
    first = tiny(make_set(60), layout, **options)
    both = tiny(make_set(30, labels=(7, 8, 9)), layout, memory=first, **options)
    assert both.num_classes == 6
    old = torch.isin(both.labels, first.classes)
    # Two epochs of 30 images each, without the old ones.
    assert both.report["phases"]["experts"]["images"] == 2 * 2 * 30
    images = first.decode()[0]
    for image in both.decode(old.nonzero().flatten())[0]:
        assert any(image.equal(other) for other in images)


def with_dropout(image_shape: Sequence[int], num_classes: int) -> nn.Module:
    convolution = nn.Conv2d(image_shape[0], 4, 3, padding=1)
    head = nn.Linear(4 * math.prod(image_shape[1:]), num_classes)
    return nn.Sequential(convolution, nn.Dropout(), nn.Flatten(), head)


@pytest.mark.parametrize("trained_networks", [0, 2])
def test_a_network_with_dropout_is_matched_on_alike_whatever_was_drawn_before(
    make_set: MakeSet, make_layout: MakeLayout, trained_networks: int
) -> None:
    files = set()
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(state)
            options = {"network": with_dropout, "trained_networks": trained_networks}
            memory = tiny(make_set(), make_layout(), objective="gradient", **options)
            files.add(memory.to_bytes())
    assert len(files) == 1


class Projected(nn.Module):
    """A network with a buffer of random values, which its weights learn to go with."""

    def __init__(self, image_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(math.prod(image_shape), 5))
        self.head = nn.Linear(5, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1) @ self.get_buffer("projection"))
        return logits


def test_an_expert_s_weights_are_matched_with_its_own_buffers(
    matcher: BatchMatcher, make_set: MakeSet, tmp_path: Path
) -> None:
    data, context = make_set(), matcher.context
    experts = Experts(
        tmp_path / "projected",
        data.images,
        data.class_indices,
        3,
        num_experts=2,
        num_epochs=1,
        networks=(Projected,),
    )
    networks, seen = trained_networks(context, 7, experts), set()
    for number in range(6):
        networks.draw(number)
        found = networks.network.get_buffer("body.projection")
        own = [experts.network(k).get_buffer("body.projection") for k in range(2)]
        (expert,) = (k for k in range(2) if found.equal(own[k]))
        initial, trained = experts.read(expert, 0, 1)
        weight = networks.network.get_parameter("body.head.weight")
        ends = initial["body.head.weight"], trained["body.head.weight"]
        between = torch.minimum(*ends) - 1e-6 <= weight, weight <= torch.maximum(*ends) + 1e-6
        assert all(bool(each.all()) for each in between)
        seen.add(expert)
    assert seen == {0, 1}
