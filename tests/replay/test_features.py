"""Replay memories of features: in a loop of one's own, and going on from a state."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from hmn_replay import LabelledFeatures, PQKeeper, ReplayMemory
from hmn_replay.errors import ConfigError, DataError, UnknownOptionError
from hmn_replay.memory import MEMORIES
from hmn_replay.replay import make_keeper

OPTIONS: dict[str, dict[str, Any]] = {
    "features": {"warm_start_steps": 20, "expected_classes": 4},
    "raw-features": {},
    "pq": {"num_parts": 3, "bits": 2},
}
BUDGETS = {"features": 1500, "raw-features": 1000, "pq": 600}
KINDS = [
    pytest.param(
        kind, marks=[pytest.mark.skipif(find_spec("faiss") is None, reason="needs the extra pq")]
    )
    if kind == "pq"
    else kind
    for kind in OPTIONS
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(labels: tuple[int, ...], each: int = 40, seed: int = 0) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(6, 12, generator=torch.Generator().manual_seed(9))
    index = torch.tensor(labels).repeat_interleave(each)
    noise = torch.randn(len(index), 12, generator=generator)
    return LabelledFeatures((means[index] + 0.3 * noise).view(-1, 12, 1, 1), index)


def make(kind: str) -> ReplayMemory:
    return ReplayMemory(BUDGETS[kind], kind, device="cpu", seed=3, **OPTIONS[kind])


@every_kind
def test_classes_share_the_budget_as_they_come(kind: str, untouched_random_state: None) -> None:
    memory, means = make(kind), batch((0, 1, 2, 3), each=1).images
    for labels in ((0, 1), (2, 3)):
        memory.check_room(batch(labels, each=1))
        made = memory.update(batch(labels))
        assert type(made) is MEMORIES[kind] and made.file_bytes <= BUDGETS[kind]
    assert made.classes.tolist() == [0, 1, 2, 3] and min(made.images_per_class) > 0
    features, drawn = memory.sample(20)
    assert features.dtype == torch.float32 and features.shape[1:] == (12, 1, 1)
    nearest = torch.cdist(features.flatten(1), means.flatten(1)).argmin(dim=1)
    # A codebook has the centroids of the classes that came first, and of these alone.
    first = drawn < (2 if kind == "pq" else 4)
    assert first.any() and nearest[first].equal(drawn[first])
    assert memory.sample(5, dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(ConfigError, match=r"got torch.uint8 for features"):
        memory.sample(5, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="soft labels are what a network says of augmented"):
        memory.label(lambda images: images.flatten(1))


@every_kind
def test_pieces_are_gathered_and_a_state_goes_on_to_the_bit(kind: str) -> None:
    data = batch((0, 1))
    one = make(kind)
    for part in torch.arange(len(data)).split(30):
        one.gather(data.images[part].flatten(1), data.labels[part])
    state = one.state_dict()
    assert one.finish()
    other = make(kind)
    other.load_state_dict(state)
    assert other.finish() and other.memory_bytes == one.memory_bytes
    assert other.sample(9)[0].equal(one.sample(9)[0])
    third = make(kind)
    third.load_state_dict(one.state_dict())
    assert third.sample(9)[0].equal(other.sample(9)[0])
    for memory in (one, third):
        memory.update(batch((2,)))
    assert one.memory is not None and third.memory is not None
    assert one.memory.to_bytes() == third.memory.to_bytes()


def test_images_are_refused_where_features_are_kept() -> None:
    with pytest.raises(DataError, match="expected features and labels"):
        make("raw-features").update(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(DataError, match="kind='features' is for these"):
        ReplayMemory(5000, "raw").update(batch((0,)))


def test_keepers_know_what_they_hold() -> None:
    assert make_keeper(1000, "features").holds_features
    assert isinstance(make_keeper(1000, "pq"), PQKeeper)
    assert not make_keeper(1000).holds_features and not make_keeper(1000, "jpeg").holds_features
    with pytest.raises(ConfigError, match="features are fitted by the warm start"):
        make_keeper(1000, "features", outer_steps=3)
    with pytest.raises(
        UnknownOptionError, match="the memory kind 'raw-features' has no option 'quality'"
    ):
        make_keeper(1000, "raw-features", quality=3)


@pytest.mark.parametrize("options", [{"bits": 99}, {"num_parts": 0}, {"bits": 0}])
def test_settings_of_quantisation_are_checked_when_given(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ReplayMemory("4 KiB", "pq", device="cpu", **options)


@every_kind
@pytest.mark.parametrize("columns", [slice(None, None, 2), slice(0, 3)])
def test_features_may_be_columns_of_a_table(kind: str, columns: slice) -> None:
    data = batch((0, 1))
    table = data.images.flatten(1)[:, columns]
    options = {**OPTIONS[kind], **({"num_parts": 3} if kind == "pq" else {})}
    memories = []
    for features in (table, table.contiguous()):
        memory = ReplayMemory(BUDGETS[kind], kind, device="cpu", **options)
        memories.append(memory.update((features, data.labels)).to_bytes())
    assert memories[0] == memories[1]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("scale", [1e5, 1e20, 1e-9])
def test_features_that_float16_cannot_hold_are_refused(kind: str, scale: float) -> None:
    memory, data = make(kind), batch((0, 1))
    with pytest.raises(DataError, match=r"features up to .* cannot be kept in float16: scale"):
        memory.update(LabelledFeatures(scale * data.images, data.labels))
    assert memory.memory is None
    memory.update(LabelledFeatures(0 * data.images, data.labels))
