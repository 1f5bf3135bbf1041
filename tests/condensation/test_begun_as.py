"""Which real images a memory begins as."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hmn_replay import build_network, condense, select_images
from hmn_replay.condensation import loop, steps
from hmn_replay.condensation.checkpoint import read_checkpoint, write_checkpoint
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.selection import embedding
from hmn_replay.data.features import LabelledFeatures
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import CheckpointError, ConfigError
from hmn_replay.memory import LearnedMemory
from hmn_replay.objectives.trajectories import experts_beside
from tests.support import LAYOUTS, Observer, at_call, room_for, tiny

MakeSet = Callable[..., LabelledImages]

SHAPE = (3, 8, 8)
# Pixels are what they begin as, but for their rounding.
PIXELS = LAYOUTS["pixels"](SHAPE, "int8")
UNMATCHED: dict[str, Any] = {"outer_steps": 0, "over_budget": 0.0, "beta_grid": ()}
BUDGET = room_for(PIXELS, 3, 15)


def network(seed: int = 0) -> nn.Module:
    return build_network("convnet", SHAPE, num_classes=3, width=4, seed=seed)


def begun_as(memory: LearnedMemory, data: LabelledImages) -> list[list[int]]:
    """Return, for each class of the data, the real images that the memory's are nearest to."""
    decoded, labels = memory.decode()
    nearest = []
    for label in data.classes.tolist():
        own = data.of_class(label)
        distances = torch.cdist(decoded[labels == label].flatten(1), data.floats(own).flatten(1))
        nearest.append(own[distances.argmin(dim=1)].tolist())
    return nearest


def chosen(data: LabelledImages, method: str, judge: nn.Module, count: int = 5) -> list[list[int]]:
    order = select_images(data, method, network=judge)
    return [order[data.labels[order] == label][:count].tolist() for label in data.classes.tolist()]


@pytest.mark.parametrize(
    ("options", "num_trained"),
    [
        ({"outer_steps": 0, "trained_networks": 2}, 1),
        ({"trained_networks": 2}, 2),
        ({"trained_networks": 0}, 1),
        ({"trained_networks": 2, "networks": [network(1), network(2)]}, 1),
        ({"objective": "mtt", "num_experts": 3, "max_start_epoch": 0, "expert_epochs": 1}, 3),
    ],
    ids=["unmatched", "trained", "random", "given", "mtt"],
)
@pytest.mark.parametrize("method", ["herding", "k-centre"])
def test_they_are_chosen_by_a_network_that_learned_from_the_real_images(
    make_set: MakeSet,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, Any],
    num_trained: int,
    method: str,
) -> None:
    """The first of those that are trained to match on, or one that is trained like them."""
    judges: list[nn.Module] = []

    def watch(images: Any, judge: nn.Module) -> Any:
        judges.append(copy.deepcopy(judge))
        return embedding(images, judge)

    monkeypatch.setattr(loop, "embedding", watch)
    data = make_set(60, labels=(0, 1, 2))
    options = {**UNMATCHED, "outer_steps": 1, "trained_passes": 60, **options}
    options |= {"memory_learning_rate": 1e-9, "experts": str(tmp_path)}
    memory = tiny(data, PIXELS, budget=BUDGET, selection=method, **options)
    phases = memory.report["phases"]
    assert list(phases) == ["experts", "selection", "warm_start", "matching", "pruning"]
    assert (phases["experts"]["images"], phases["selection"]["images"]) == (60 * num_trained, 60)
    assert len(judges) == 1  # for all classes
    assert begun_as(memory, data) == chosen(data, method, judges[0])
    recorded = load_file(tmp_path / "expert-0000.safetensors")
    weights = dict(judges[0].named_parameters())
    assert all(weights[name].equal(recorded[f"1/{name}"]) for name in weights)
    assert not all(weights[name].equal(recorded[f"0/{name}"]) for name in weights)
    assert len(list(tmp_path.iterdir())) == num_trained


def normalising(image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6 * 36, num_classes))


def test_batch_normalisation_has_the_statistics_of_the_real_images(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not in the files of what is trained before, and are no part of the training."""
    judges: list[Any] = []

    def watch(images: Any, judge: nn.Module) -> Any:
        judges.append(copy.deepcopy(judge))
        return embedding(images, judge)

    monkeypatch.setattr(loop, "embedding", watch)
    data = make_set(60, labels=(0, 1, 2))
    options = {"network": (normalising,), "selection": "herding", "trained_passes": 60}
    memory = tiny(data, PIXELS, budget=BUDGET, **{**UNMATCHED, **options})
    (judge,) = judges
    (norm,) = [module for module in judge.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: list[Any] = []
    norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    judge.eval()(data.floats(torch.arange(60)))
    torch.testing.assert_close(norm.running_mean, seen[0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen[0].var(dim=(0, 2, 3)))
    assert norm.momentum == 0.1
    assert begun_as(memory, data) == chosen(data, "herding", judge)


def test_those_that_fill_it_up_are_the_next_ones(make_set: MakeSet) -> None:
    data = make_set(90, labels=(0, 1, 2))
    real = steps.RealImages.of(data)
    (drawn, *_), judge = steps.drawn_orders(real, seed=3), network()
    (wanted, *_) = chosen(data, "herding", judge, 30)
    embed = embedding(data.images, judge)
    order = steps.with_chosen_first(drawn, data.images, 12, "herding", embed)
    assert order[:12].tolist() == wanted[:12]
    assert order[12:].tolist() == [each for each in drawn.tolist() if each not in wanted[:12]]
    assert steps.with_chosen_first(drawn, data.images, 99, "herding", embed).tolist() == wanted


def test_features_are_chosen_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 12, 1, 1, generator=generator)
    data = LabelledFeatures(features, torch.arange(60) % 3)
    options: dict[str, Any] = {"warm_start_steps": 500, "device": "cpu", "over_budget": 0.0}
    memory = condense(data, "1 KiB", selection="herding", **options)
    assert list(memory.report["phases"]) == ["selection", "warm_start", "matching", "pruning"]
    order = select_images(data, "herding").tolist()
    found = [begun for own in begun_as(memory, data) for begun in own]
    assert sorted(found) == sorted(order[: len(found)])


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 6, 9])
def test_interrupted_it_goes_on_in_the_same_order(
    make_set: MakeSet, tmp_path: Path, moment: int
) -> None:
    data, path = make_set(60, labels=(0, 1, 2)), tmp_path / "run.checkpoint"
    options = {"budget": BUDGET, "selection": "herding", "checkpoint_seconds": 0, **UNMATCHED}
    options |= {"trained_passes": 60, "network_batch": 20}
    expected = tiny(data, PIXELS, **options).to_bytes()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(data, PIXELS, checkpoint=path, team=Observer(sum=at_call(moment, stop)), **options)
    assert tiny(data, PIXELS, checkpoint=path, **options).to_bytes() == expected


def test_it_goes_on_where_the_folder_of_experts_is_lost(make_set: MakeSet, tmp_path: Path) -> None:
    data, path = make_set(60, labels=(0, 1, 2)), tmp_path / "run.checkpoint"
    options = {"budget": BUDGET, "selection": "herding", "checkpoint_seconds": 0, **UNMATCHED}
    options |= {"trained_passes": 60, "network_batch": 20}
    expected = tiny(data, PIXELS, **options).to_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "embedding", stop)
        tiny(data, PIXELS, checkpoint=path, **options)
    shutil.rmtree(experts_beside(path))
    assert tiny(data, PIXELS, checkpoint=path, **options).to_bytes() == expected


class Headless(nn.Module):
    """Its logits are no output of a linear layer."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(shape[0], num_classes, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.convolution(images).mean(dim=(2, 3))
        return logits


def test_what_cannot_be_chosen_by_is_refused_before_any_work(
    make_set: MakeSet, tmp_path: Path
) -> None:
    data, path = make_set(60, labels=(0, 1, 2)), tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"budget": BUDGET, "checkpoint": path, "network": (Headless,)}
    with pytest.raises(ConfigError, match=r"output of an nn\.Linear"):
        tiny(data, PIXELS, selection="herding", objective="gradient", **options)
    assert not path.exists()
    with pytest.raises(ConfigError, match="selection must be one of random, herding, k-centre"):
        make_config(selection="ccs")


def test_a_checkpoint_with_a_wrong_order_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    data, path = make_set(60, labels=(0, 1, 2)), tmp_path / "run.checkpoint"
    options = {"budget": BUDGET, "selection": "herding", "trained_passes": 60, **UNMATCHED}
    tiny(data, PIXELS, checkpoint=path, **options)
    with safe_open(path, framework="pt") as file:
        identity = json.loads(file.metadata()["hmn_replay_checkpoint"])["identity"]
    found = read_checkpoint(path, identity)
    assert found is not None
    order = found.tensors["order"].clone()
    order[0] = order[1]
    write_checkpoint(path, identity, found.state, {**found.tensors, "order": order})
    with pytest.raises(CheckpointError, match="not each of them once"):
        tiny(data, PIXELS, checkpoint=path, **options)
