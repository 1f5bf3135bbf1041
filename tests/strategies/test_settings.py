"""The settings that strategies are built from."""

from __future__ import annotations

import pytest

from hmn_replay.errors import ConfigError
from tests.strategies.support import build


def test_the_options_there_are_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown option 'gamma'; this strategy's own are: alpha"):
        build("derpp", gamma=1)
    with pytest.raises(ConfigError, match="this strategy's own are: none"):
        build("naive", gamma=1)


def test_without_an_evaluator_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = build("naive")
    assert not strategy.evaluator.metrics
    assert capsys.readouterr().out == ""
