"""What the scales stand for."""

from __future__ import annotations

import dataclasses

import pytest

from experiments.tables.settings import SCALES
from hmn_replay.condensation.config import make_config
from hmn_replay.memory.registry import CONTAINERS


@pytest.mark.parametrize("scale", ["quick", "standard"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_has_the_same_seconds(scale: str, container: str) -> None:
    settings = SCALES[scale]
    assert settings.seconds is not None
    config = make_config(**settings.condensation(container))
    assert (config.max_seconds, config.over_budget) == (settings.seconds, 0.0)
    assert config.warm_start_seconds == settings.seconds / 2
    assert settings.condensation(container) == settings.condensation("hmn")


def test_paper_is_the_published_protocol() -> None:
    settings = SCALES["paper"]
    hmn, idc = (make_config(**settings.condensation(name)) for name in ("hmn", "idc"))
    assert (hmn.outer_steps, hmn.inner_steps, hmn.network_width) == (2000, 100, 128)
    assert (hmn.max_seconds, hmn.warm_start_seconds) == (None, None)
    assert (hmn.over_budget, idc.over_budget) == (0.1, 0.0)
    assert dataclasses.replace(hmn, over_budget=0.0) == idc
    assert (len(settings.seeds), settings.trainings, settings.width) == (3, 10, 128)


def test_options_of_the_command_line_go_first() -> None:
    options = {"over_budget": 0.3, "warm_start_seconds": 5.0}
    settings = dataclasses.replace(SCALES["paper"], options=options)
    for container in ("hmn", "raw"):
        config = make_config(**settings.condensation(container))
        assert (config.over_budget, config.warm_start_seconds) == (0.3, 5.0)
