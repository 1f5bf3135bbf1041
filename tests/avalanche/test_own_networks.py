"""A stream's own network as what its memory is matched on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from torch import Tensor, nn
from torchvision.transforms import Normalize

from hmn_replay import build_network
from hmn_replay.avalanche.kinds import HMNReplay
from hmn_replay.condensation.config import EFFORTS, CondenseConfig
from hmn_replay.errors import CheckpointError, ConfigError
from tests.streams import (
    SHAPE,
    Images,
    in_pieces,
    make_model,
    make_strategy,
    streams,
    train,
    weights,
)
from tests.support import TINY

OWN: dict[str, Any] = {**TINY, "beta_grid": (), "batch_size_mem": 4, "matching_networks": "own"}
OWN |= {"trained_networks": 1, "trained_passes": 20}


def make_replay(**options: Any) -> HMNReplay:
    return HMNReplay(6000, **{**OWN, **options})


def convnet(num_classes: int = 4) -> nn.Module:
    return build_network("convnet", SHAPE, num_classes, width=3, seed=0)


def learn(replay: HMNReplay, stream: Any = None, **options: Any) -> Any:
    strategy = make_strategy([replay], model=convnet(), **options)
    train(strategy, streams().train_stream if stream is None else stream)
    return strategy


def trains_networks(replay: HMNReplay) -> list[bool]:
    """Return for each update whether networks were trained for it."""
    return ["experts" in entry["phases"] for entry in replay.report]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, False]),
        ({"objective": "gradient"}, [True, False]),
        ({"renew": "after"}, [False, False]),
        ({"matching_networks": "trained"}, [True, True]),
    ],
)
def test_it_serves_once_it_has_learned(options: dict[str, Any], expected: list[bool]) -> None:
    replay = make_replay(**options)
    learn(replay)
    assert trains_networks(replay) == expected
    assert replay.memory is not None and replay.memory.num_classes == 4


class Counting(nn.Module):
    """A network with state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images)
        return logits

    def features(self, images: Tensor) -> list[Tensor]:
        blocks: list[Tensor] = self.body.features(images)  # type: ignore[operator]
        return blocks

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"seen": 3}


def test_it_may_have_state_that_is_no_tensor() -> None:
    replay = make_replay()
    train(make_strategy([replay], model=Counting()), streams().train_stream)
    assert trains_networks(replay) == [True, False]


def test_another_network_has_first_weights_of_its_own() -> None:
    stream = streams(num_experiences=4).train_stream
    replay = make_replay()
    learn(replay, stream[:2])
    learn(replay, stream[2:])
    assert trains_networks(replay) == [True, False, True, False]


def test_features_are_matched_where_task_labels_tell_classes_apart() -> None:
    replay = make_replay(loss="plain")
    strategy = make_strategy([replay], model=convnet())
    train(strategy, streams("nc_tasks").train_stream)
    assert [entry["networks_given"] for entry in replay.report] == [2, 2]


class _OneBlock(nn.Module):
    """A network whose features are those of one layer, as torchvision's are."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "make", "expected"),
    [
        ({}, convnet, [0, 2]),
        ({"renew": "after"}, convnet, [2, 2]),
        ({"pruning": "order"}, convnet, [0, 2]),
        ({}, make_model, [0, 0]),
        ({}, _OneBlock, [0, 0]),
        ({"network_width": 4}, convnet, [0, 0]),
        ({"trained_passes": 30}, convnet, [0, 0]),
        ({"objective": "gradient"}, convnet, [0, 0]),
        ({"objective": "dm"}, convnet, [0, 0]),
        ({"trained_networks": 0}, convnet, [0, 0]),
        ({"matching_networks": "trained"}, convnet, [0, 0]),
    ],
)
def test_by_default_it_serves_where_it_can(
    options: dict[str, Any], make: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {k: v for k, v in OWN.items() if k in CondenseConfig.model_fields}
    monkeypatch.setitem(EFFORTS, "draft", settings)
    replay = HMNReplay(6000, batch_size_mem=4, device="cpu", **options)
    strategy = make_strategy([replay], model=make())
    train(strategy, streams().train_stream)
    assert [entry["networks_given"] for entry in replay.report] == expected
    assert ("first_weights" in replay.state_dict()) == any(expected)


def test_the_memory_depends_on_what_it_has_learned() -> None:
    files = []
    for rate in (0.05, 0.5):
        model = convnet()
        replay = make_replay()
        strategy = make_strategy(
            [replay], model=model, optimizer=torch.optim.SGD(model.parameters(), lr=rate)
        )
        for experience in streams().train_stream:
            strategy.train(experience)
            files.append(replay.memory.to_bytes())  # type: ignore[union-attr]
    assert files[0] == files[2], "before the first experience it has learned nothing"
    assert files[1] != files[3]


def test_a_network_of_normalised_images_sees_normalised_ones() -> None:
    """As much as one that normalises by itself."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    memories = []
    for outside in (False, True):
        torch.manual_seed(0)
        replay = make_replay(outer_steps=1, precision="float32")
        data = Images(transform=Normalize(mean, std) if outside else None)
        statistics: dict[str, Any] = {} if outside else {"mean": mean, "std": std}
        model = build_network("convnet", SHAPE, 4, width=3, seed=0, **statistics)
        strategy = make_strategy([replay], model=model)
        train(strategy, streams(data=data).train_stream)
        memories.append(replay.memory.decode()[0])  # type: ignore[union-attr]
    assert float((memories[0] - memories[1]).abs().max()) < 0.02


def test_online_pieces_are_matched_on_it_too() -> None:
    replay = make_replay()
    pieces = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    learn(replay, pieces)
    replay.finish()
    assert trains_networks(replay) == [False, False]


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    stream = streams(num_experiences=3, data=Images((0, 1, 2))).train_stream
    whole = make_replay()
    strategy = make_strategy([whole], model=convnet())
    for number in range(3):
        train(strategy, stream[number : number + 1], seed=number)
        if number == 1:
            save_checkpoint(strategy, tmp_path / "stream.pt")
            torch.save(whole.state_dict(), tmp_path / "state.pt")
            model = copy.deepcopy(strategy.model)
    resumed, _ = maybe_load_checkpoint(make_strategy(), tmp_path / "stream.pt")
    train(resumed, stream[2:], seed=2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    by_state = make_replay()
    by_state.load_state_dict(state)
    again = make_strategy([by_state], model=model)
    train(again, stream[2:], seed=2)
    assert weights(resumed).equal(weights(strategy))
    for plugin in (resumed.plugins[0], by_state):
        assert plugin.memory.to_bytes() == whole.memory.to_bytes()  # type: ignore[union-attr]
    state["first_weights"]["body.head.1.bias"][0] += 1
    for weights_of in (state["first_weights"], {"body.head.1.bias": "none"}, [1]):
        with pytest.raises(CheckpointError, match="network was altered"):
            make_replay().load_state_dict({**state, "first_weights": weights_of})


def test_a_network_that_cannot_serve_is_refused_before_training() -> None:
    for options, model, kind, message in (
        ({}, make_model(), "nc", r"Sequential has no features\(images\)"),
        ({"objective": "dm"}, convnet(), "nc", "dm does not"),
        (
            {"objective": "gradient", "loss": "plain"},
            convnet(),
            "nc_tasks",
            "one head, without task labels",
        ),
    ):
        strategy = make_strategy([make_replay(**options)], model=model)
        before = weights(strategy)
        with pytest.raises(ConfigError, match=message):
            train(strategy, streams(kind).train_stream)
        # Of a benchmark with task labels, the first experience has none above 0.
        assert kind == "nc_tasks" or weights(strategy).equal(before)
    with pytest.raises(ConfigError, match="matching_networks must be one of auto, trained, own"):
        make_replay(matching_networks="mine")
