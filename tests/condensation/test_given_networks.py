"""Matching on networks that were trained elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hmn_replay import build_network
from hmn_replay.condensation import steps
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.matchers import given_networks
from hmn_replay.condensation.steps import RealImages, StepContext, make_optimizer
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import CheckpointError, ConfigError, TrainingError
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.runtime import make_generator
from hmn_replay.training import train
from tests.support import TINY, same, tiny, values_of

MakeLayout = Callable[..., Any]
MakeSet = Callable[..., LabelledImages]

SHAPE = (3, 8, 8)


def network(seed: int = 0, num_classes: int = 3, **options: Any) -> nn.Module:
    return build_network("convnet", SHAPE, num_classes, width=3, seed=seed, **options)


def context(data: LabelledImages, layout: Any, **options: Any) -> StepContext:
    settings = {name: value for name, value in TINY.items() if name != "device"}
    memory = HierarchicalMemory(layout, data.classes, 3)
    optimizer = make_optimizer(memory, (0.5, 0.99))
    config = make_config(**{**settings, **options})
    return StepContext(memory, RealImages.of(data), config, optimizer)


def test_networks_are_points_between_two_states_in_a_row(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    states = [network(seed) for seed in range(3)]
    given = given_networks(context(make_set(), make_layout()), 0, states)
    ends = [torch.cat([p.detach().flatten() for p in each.parameters()]) for each in states]
    found: dict[int, list[float]] = {0: [], 1: []}
    for number in range(12):
        given.draw(number)
        values = torch.cat([p.detach().flatten() for p in given.network.parameters()])
        for first in range(2):
            along = ends[first + 1] - ends[first]
            share = float((values - ends[first]) @ along / (along @ along))
            if values.allclose(torch.lerp(ends[first], ends[first + 1], share), atol=1e-5):
                found[first].append(share)
    assert sum(map(len, found.values())) == 12 and min(map(len, found.values())) >= 2
    shares = [*found[0], *found[1]]
    assert min(shares) >= 0 and max(shares) <= 1 and max(shares) - min(shares) > 0.5
    given.draw(4)
    before = values_of(given.network)
    given.draw(5)
    given.draw(4)
    assert same(before, values_of(given.network))


@pytest.mark.parametrize("objective", ["distribution", "gradient"])
def test_they_are_matched_on_in_place_of_trained_ones_and_left_as_they_are(
    make_set: MakeSet, make_layout: MakeLayout, objective: str
) -> None:
    data, layout = make_set(labels=(0, 1, 2)), make_layout()
    states = [network(0).train(), network(1).train()]
    before = [values_of(each) for each in states]
    options: dict[str, Any] = {"objective": objective, "trained_networks": 2, "beta_grid": ()}
    options |= {"trained_passes": 48}
    own, again = (tiny(data, layout, networks=states, **options) for _ in range(2))
    assert "experts" not in own.report["phases"]
    assert own.to_bytes() == again.to_bytes()
    assert all(same(a, values_of(b)) for a, b in zip(before, states, strict=True))
    assert all(each.training for each in states)
    others = [tiny(data, layout, **options), tiny(data, layout, networks=states[:1], **options)]
    assert all(own.to_bytes() != other.to_bytes() for other in others)


def test_a_class_has_the_logit_of_its_label(make_set: MakeSet, make_layout: MakeLayout) -> None:
    """A step on a network with its logits in another order is the same step."""
    data, order = make_set(), [2, 0, 1]
    in_order = network().eval()
    shuffled = network().eval()
    head = [module for module in shuffled.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        # Class i has logit order[i].
        for values in (head.weight, head.bias):
            values[order] = values.clone()
    ends = []
    for each, logits in ((in_order, None), (shuffled, order), (shuffled, None)):
        own = context(data, make_layout(), objective="gradient", precision="float32")
        steps.set_lr(own.optimizer, 0.1)
        steps.match_step(own, each, make_generator(0), logits)
        ends.append(own.memory.decode()[0])
    assert ends[0].allclose(ends[1], atol=1e-5)
    assert not ends[0].allclose(ends[2], atol=1e-3)


def test_a_checkpoint_is_of_the_networks_it_was_begun_with(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout = make_set(labels=(0, 1, 2)), make_layout()
    path = str(tmp_path / "run.ckpt")
    tiny(data, layout, networks=[network(0)], checkpoint=path)
    with pytest.raises(CheckpointError, match="with other networks;"):
        tiny(data, layout, networks=[network(1)], checkpoint=path)


class Plain(nn.Sequential):
    """Has no features."""


@pytest.mark.parametrize(
    ("networks", "options", "message"),
    [
        ([Plain(nn.Flatten(), nn.Linear(192, 3))], {}, r"Plain has no features\(images\)"),
        ([network(0), network(0, num_classes=4)], {}, "states of one network"),
        (["convnet"], {}, "networks are modules; got 'convnet'"),
        ([network(0)], {"objective": "dm"}, "'?dm'? does not"),
        ([network(0)], {"objective": "mtt"}, "networks are for objectives that match"),
    ],
)
def test_networks_that_cannot_serve_are_refused(
    make_set: MakeSet, make_layout: MakeLayout, networks: Any, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(make_set(labels=(0, 1, 2)), make_layout(), networks=networks, **options)


def test_a_network_that_diverged_is_told_from_a_memory_that_did(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    diverged = network(0)
    with torch.no_grad():
        next(diverged.parameters())[0] = math.inf
    with pytest.raises(TrainingError, match=r"weights that are not finite.*its optimizer"):
        tiny(make_set(labels=(0, 1, 2)), make_layout(), networks=[network(0), diverged])


def one_logit(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return build_network("convnet", image_shape, 1, width=3)


def one_channel(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return build_network("convnet", (1, *image_shape[1:]), num_classes, width=3)


def flat(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Plain(nn.Flatten(), nn.Linear(192, num_classes))


def test_features_are_matched_without_a_logit_for_each_class(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    given = network(0, num_classes=2)
    for labels in ((0, 1, 2), (-5, 7, 1000)):
        memory = tiny(make_set(labels=labels), make_layout(), networks=iter([given]))
        assert memory.classes.tolist() == list(labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": (one_logit,)}, r"K of 3 or more here; .* \(2, 1\)"),
        ({"network": ("convnet", one_channel)}, r"does not take images \(2, 3, 8, 8\)"),
        ({"network": (one_logit,), "objective": "mtt"}, r"K of 3 or more here"),
        ({"network": (flat,), "objective": "distribution"}, r"no features"),
        (
            {"networks": [network(0, num_classes=2)], "objective": "gradient"},
            r"K of 3 or more here",
        ),
        ({"networks": network(0)}, r"give \[network\]"),
        ({"networks": None}, r"give \[network\], not None"),
        ({"networks": [network(0)], "objective": "gradient", "labels": (-1, 0, 1)}, "label -1 can"),
    ],
)
def test_what_cannot_be_matched_with_is_refused_before_the_warm_start(
    make_set: MakeSet, make_layout: MakeLayout, options: dict[str, Any], message: str
) -> None:
    data = make_set(labels=options.get("labels", (0, 1, 2)))
    options = {name: value for name, value in options.items() if name != "labels"}
    with pytest.raises(ConfigError, match=message):
        tiny(data, make_layout(), warm_start_steps=10**9, **options)


def test_networks_that_were_given_are_compiled_where_a_stream_gains_by_it(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten updates of one class each gain what one would not; so do ConvNets inside a module."""
    # One update: 10 steps of one class, 64 real and 64 decoded images, at width 6 and 64 pixels.
    one_update = 10 * 64 * 6 * 64
    monkeypatch.setattr(train, "_WORTH_COMPILING", 9 * one_update / torch.get_num_threads())
    monkeypatch.setattr(train, "can_compile", lambda _: True)
    ours, data, layout = network(), make_set(), make_layout()
    wide = build_network("convnet", SHAPE, 3, width=6)
    ours_inside = nn.ModuleDict({"network": wide})
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def is_compiled(given: nn.Module, compile: bool | str = "auto", **fields: Any) -> bool:
        fields = {"first_class": 2, "expected_classes": 10, "networks": [given], **fields}
        settings = {"objective": "distribution", "outer_steps": 1, "inner_steps": 10}
        batches = {"real_batch": 64, "decoded_batch": 64}
        made = context(data, layout, **settings, **batches, compile=compile)
        planned = steps.plan_compiling(made.memory, made.config, **fields)
        own = dataclasses.replace(made, compiling=planned)
        assert (own.objective.loss is made.objective.loss) == (not planned.matching)
        return planned.matching

    assert is_compiled(wide) and is_compiled(ours_inside) and not is_compiled(ours)
    assert not is_compiled(wide, expected_classes=8) and not is_compiled(wide, expected_classes=0)
    assert not is_compiled(wide, first_class=0)
    assert not is_compiled(wide, compile=False)
    assert not is_compiled(other) and is_compiled(other, compile=True)


class Remembering(nn.Module):
    """A network with state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(images)
        return logits

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"seen": 3}


def test_networks_may_have_state_that_is_no_tensor(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    networks = [Remembering(), Remembering()]
    memory = tiny(make_set(), make_layout(), networks=networks, objective="gradient", beta_grid=())
    assert memory.num_images
