"""HMN replay as a strategy, and fred's: their options reach the plugin."""

from __future__ import annotations

import pytest

from hmn_replay import HMNReplay, LearnedKeeper
from hmn_replay.condensation.config import make_config
from hmn_replay.errors import ConfigError
from tests.strategies.support import BUDGET, OPTIONS, build


def test_settings_reach_the_plugin() -> None:
    strategy = build(
        "hmn", batch_size_mem=5, seed=3, expected_classes=6, mode="memory_only", effort="standard"
    )
    replay = strategy.plugins[0]
    assert isinstance(replay, HMNReplay)
    keeper = replay.store.keeper
    assert isinstance(keeper, LearnedKeeper)
    assert keeper.budget.num_bytes == BUDGET
    assert (replay.batch_size_mem, replay.seed, replay.mode) == (5, 3, "memory_only")
    assert keeper.expected_classes == 6
    assert keeper.config == make_config("standard", fidelity=0.0, **OPTIONS["hmn"])
    assert replay.device is None and replay.loss == "auto"


def test_a_wrong_value_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="warm_start_steps"):
        build("hmn", warm_start_steps=-1)


def test_fred_is_hmn_replay_of_that_kind() -> None:
    replay = build("fred", effort="standard").plugins[0]
    assert isinstance(replay, HMNReplay)
    keeper = replay.store.keeper
    assert isinstance(keeper, LearnedKeeper)
    assert keeper.kind == "fred"
    assert keeper.config == make_config("standard", fidelity=0.3, **OPTIONS["fred"])
    with pytest.raises(ConfigError, match='pass kind to the strategy "hmn"'):
        build("fred", kind="pixels")
