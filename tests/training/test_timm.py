"""timm's networks, by name, for evaluation and for matching."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import hmn_replay
from hmn_replay import LabelledImages, build_network, condense, evaluate
from hmn_replay.errors import ConfigError, MissingExtraError
from hmn_replay.training.networks import NETWORKS
from hmn_replay.training.train import TrainingConfig
from tests.console import Console
from tests.support import TINY, real

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra timm")


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_has_the_shapes_that_are_asked_for(
    name: str, untouched_random_state: None
) -> None:
    networks = [build_network(f"timm:{name}", (1, 32, 32), 5, seed=seed) for seed in (0, 0, 1)]
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = [network.eval()(images) for network in networks]
    assert logits[0].shape == (3, 5)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    features = networks[0].features(images)
    assert len(features) > 1 and all(len(own) == 3 for own in features)


@needs_timm
@pytest.mark.parametrize("objective", ["gradient", "dm"])
def test_a_memory_is_matched_and_scored_by_it(
    objective: str, make_set: Callable[..., LabelledImages]
) -> None:
    data = make_set(image_shape=(3, 32, 32))
    memory = condense(
        data, 20_000, kind="pixels", objective=objective, network="timm:test_resnet", **TINY
    )
    assert memory.report["network"] == ("timm:test_resnet",)
    config = TrainingConfig(network="timm:test_resnet", num_passes=48, batch_size=8)
    network, accuracy = evaluate(memory, data, config=config, device="cpu")
    assert 0 <= accuracy <= 1 and type(network.body).__name__ == "_Timm"


@needs_timm
def test_what_timm_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"timm model must be one of .*; did you mean 'test_vit"):
        build_network("timm:test_vitt", (3, 32, 32), 2)
    with pytest.raises(ConfigError, match=r"pretrained timm model must be one of"):
        build_network("timm-pretrained:test_vitt", (3, 32, 32), 2)
    with pytest.raises(ConfigError, match="network must be one of convnet"):
        TrainingConfig(network="tim:resnet18")
    assert "timm:test_vit" in NETWORKS and "timm:none" not in NETWORKS
    assert not [name for name in NETWORKS if "timm" in name]


@needs_timm
def test_pretrained_weights_are_those_that_timm_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timm: Any = pytest.importorskip("timm")
    saved = timm.create_model("test_resnet")
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    create = timm.create_model

    def create_from_file(name: str, **options: Any) -> Any:
        assert options["pretrained"]
        overlay = {"file": str(tmp_path / "weights.pth")}
        return create(name, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", create_from_file)
    network = build_network("timm-pretrained:test_resnet", (3, 32, 32), 7)
    body: Any = network.body
    found = body.model.state_dict()
    assert torch.equal(found["conv1.0.weight"], saved.state_dict()["conv1.0.weight"])
    assert found["fc.weight"].shape[0] == 7


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for use in (
        lambda: build_network("timm:resnet18", (3, 32, 32), 2),
        lambda: TrainingConfig(network="timm:resnet18"),
        lambda: hmn_replay.CondenseConfig(network=("timm:resnet18",)),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'hmn-replay\[timm\]'"):
            use()


@needs_timm
def test_the_command_takes_it(run: Console, tmp_path: Path) -> None:
    real("raw", image_shape=(1, 32, 32), classes=(0, 1)).save(tmp_path / "raw.hmn")
    words = ("--network", "timm:test_resnet", "--passes", 20, "--repeats", 1, "--device", "cpu")
    found = json.loads(run("evaluate", tmp_path / "raw.hmn", *words, "--size", 32, "--json"))
    assert found["network"] == "timm:test_resnet" and 0 <= found["accuracy_mean"] <= 1
    run("evaluate", tmp_path / "raw.hmn", "--network", "timm:nothing", code=2)
    assert "timm model must be one of" in run.err
