"""The plugin with a memory of features: a frozen backbone, and a head that learns a stream."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms

from hmn_replay import FeatureClassifier, FrozenBackbone, HMNReplay, MemoryBuffer, extract_features
from hmn_replay.avalanche.plugin import MemoryReplay
from hmn_replay.errors import ConfigError
from hmn_replay.memory import FeatureMemory, RawFeatureMemory
from hmn_replay.replay import RealKeeper
from tests.streams import SHAPE, Images, in_pieces, make_strategy, streams, train

pytestmark = pytest.mark.filterwarnings("ignore:added features have another range")

STEPS = {"warm_start_steps": 15, "batch_size_mem": 6}


def make_model(num_classes: int = 4) -> FeatureClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.ReLU())
        backbone = FrozenBackbone(network, SHAPE)
        head = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
        return FeatureClassifier(backbone, head)


class Watch(nn.Module):
    """Notes what the head is shown."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.shown = head, list[Tensor]()

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.shown.append(features.detach().clone())
        logits: Tensor = self.head(features)
        return logits


@pytest.mark.parametrize("options", [{}, {"distill": 1.0}, {"tune": "head"}, {"loss": "grouped"}])
def test_replayed_features_stand_beside_those_of_the_mini_batch(options: dict[str, Any]) -> None:
    model = make_model()
    model.head = watch = Watch(model.head)
    replay = HMNReplay(2500, kind="features", **{**STEPS, **options})
    strategy = make_strategy([replay], model=model)
    before = [value.clone() for value in model.backbone.state_dict().values()]
    train(strategy, streams().train_stream, 0)
    memory = replay.memory
    assert isinstance(memory, FeatureMemory) and memory.classes.tolist() == [0, 1, 2, 3]
    assert replay.memory_bytes <= 2500
    assert {tuple(shown.shape[1:]) for shown in watch.shown} == {(12, 1, 1)}
    assert max(map(len, watch.shown)) == 8 + 6  # the mini-batch, and what is replayed
    assert all(float(shown.min()) >= 0 for shown in watch.shown)
    after = model.backbone.state_dict().values()
    assert all(one.equal(two) for one, two in zip(before, after, strict=True))
    strategy.eval(streams().test_stream)  # of images alone


def test_features_are_those_of_normalised_images() -> None:
    normalize = transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    model, data = make_model(), Images(transform=normalize)
    replay = MemoryReplay(RealKeeper(100_000, kind="raw-features"))
    train(make_strategy([replay], model=model), streams("nc", data).train_stream, 0)
    assert isinstance(replay.memory, RawFeatureMemory) and replay.found_normalization is None
    decoded, labels = replay.memory.decode()
    shown = torch.stack([data[i][0] for i in range(len(data))])  # type: ignore[misc]
    wanted = model.backbone(shown).half().float()
    for label in range(4):
        own = wanted[torch.tensor(data.targets) == label]
        distances = torch.cdist(decoded[labels == label].flatten(1), own.flatten(1))
        assert float(distances.min(dim=1).values.max()) < 1e-3


def test_a_memory_alone_is_trained_on() -> None:
    model = make_model()
    model.head = watch = Watch(model.head)
    drawn: list[Tensor] = []

    def noise(features: Tensor) -> Tensor:
        drawn.append(features)
        return features + 100

    replay = HMNReplay(
        2500, kind="features", mode="memory_only", replay_transform=noise, warm_start_steps=5
    )
    train(make_strategy([replay], model=model), streams().train_stream, 0)
    assert drawn and float(drawn[-1].abs().max()) < 50
    assert float(watch.shown[-1].min()) > 50 and float(watch.shown[0].max()) < 50


def test_an_online_stream_is_gathered_as_features() -> None:
    replay = HMNReplay(2500, kind="features", **STEPS)  # type: ignore[arg-type]
    strategy = make_strategy([replay], model=make_model())
    pieces = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    train(strategy, pieces, 0)
    replay.finish()
    assert replay.memory is not None and replay.memory.classes.tolist() == [0, 1, 2, 3]


def test_a_model_without_a_frozen_backbone_is_refused() -> None:
    replay = HMNReplay(2500, kind="features")
    with pytest.raises(ConfigError, match="a memory of features is for a FeatureClassifier"):
        train(make_strategy([replay]), streams().train_stream, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "soft"}, "leave them out for features"),
        ({"outer_steps": 2}, "features are fitted by the warm start"),
        ({"matching_networks": "own"}, "features are not matched"),
        ({"recode_share": 0.5}, "'features' has none: leave it out"),
    ],
)
def test_what_features_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        HMNReplay(2500, kind="features", **options)


def test_features_are_neither_recoded_nor_in_a_buffer() -> None:
    keeper = RealKeeper(2500, kind="raw-features")
    with pytest.raises(ConfigError, match="'raw-features' has none: leave it out"):
        MemoryReplay(keeper, recode_share=0.5)
    with pytest.raises(ConfigError, match="which a memory of features cannot"):
        MemoryBuffer(MemoryReplay(keeper))


def test_a_memory_of_features_outlives_its_strategy() -> None:
    """What is in the file is all that the next training needs beside the backbone."""
    replay = HMNReplay(2500, kind="features", **STEPS)  # type: ignore[arg-type]
    model = make_model()
    strategy = make_strategy([replay], model=model)
    stream = streams().train_stream
    train(strategy, stream[:1], 0)
    again = HMNReplay(2500, kind="features", **STEPS)  # type: ignore[arg-type]
    again.load_state_dict(replay.state_dict())
    for plugin in (replay, again):
        train(make_strategy([plugin], model=make_model()), stream[1:], 1)
    assert replay.memory is not None and again.memory is not None
    assert replay.memory.to_bytes() == again.memory.to_bytes()
    real = extract_features(model.backbone, (Images().pixels, torch.tensor(Images().targets)))
    assert replay.memory.image_shape == real.image_shape
