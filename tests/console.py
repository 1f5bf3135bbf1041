"""The command, run inside the process that tests it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hmn_replay.cli import main

TINY_CONDENSATION = [
    *("--set", "warm_start_steps=3", "--set", "warm_start_batch=16"),
    *("--set", "outer_steps=1", "--set", "inner_steps=1", "--set", "real_batch=4"),
    *("--set", "decoded_batch=4", "--set", "network_width=4", "--set", "network_images=8"),
    *("--set", "pruning_passes=16", "--set", "pruning_width=4", "--set", "beta_grid=0.5"),
    *("--set", "trained_networks=0"),
]
TINY_TRAINING = ["--width", "4", "--passes", "200", "--repeats", "2"]
BUDGET = "8KiB"


class Console:
    """Runs the command in this process, and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: object, code: int = 0) -> str:
        """Return the standard output; standard error is then in ``self.err``."""
        self.capsys.readouterr()
        try:
            found = main([str(word) for word in argv])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            found = stop.code
        out, self.err = self.capsys.readouterr()
        assert found == code, self.err
        assert "Traceback" not in self.err
        return out

    def json(self, *argv: object) -> dict[str, Any]:
        result = json.loads(self(*argv, "--json"))
        assert isinstance(result, dict)
        return result
