"""What the scales stand for."""

from __future__ import annotations

import dataclasses

import pytest

from experiments.tables.settings import SCALES
from experiments.tables.study import KINDS
from hmn_replay.condensation.config import make_config


@pytest.mark.parametrize("scale", ["quick", "standard"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_seconds(scale: str, kind: str) -> None:
    settings = SCALES[scale]
    assert settings.seconds is not None
    config = make_config(**settings.condensation(kind))
    assert (config.max_seconds, config.over_budget) == (settings.seconds, 0.0)
    assert config.warm_start_seconds == settings.seconds / 2
    assert settings.condensation(kind) == settings.condensation("hmn")


def test_paper_is_the_published_protocol() -> None:
    settings = SCALES["paper"]
    hmn, idc = (make_config(**settings.condensation(name)) for name in ("hmn", "idc"))
    assert (hmn.outer_steps, hmn.inner_steps, hmn.network_width) == (2000, 100, 128)
    assert (hmn.max_seconds, hmn.warm_start_seconds) == (None, None)
    assert (hmn.over_budget, idc.over_budget) == (0.1, 0.0)
    assert hmn.replace(over_budget=0.0) == idc
    assert (len(settings.seeds), settings.trainings, settings.width) == (3, 10, 128)


def test_options_of_the_command_line_go_first() -> None:
    options = {"over_budget": 0.3, "warm_start_seconds": 5.0}
    settings = dataclasses.replace(SCALES["paper"], options=options)
    for kind in ("hmn", "pixels"):
        config = make_config(**settings.condensation(kind))
        assert (config.over_budget, config.warm_start_seconds) == (0.3, 5.0)
