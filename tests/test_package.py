"""What ``import hmn_replay`` gives, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import hmn_replay

HEAVY = ("avalanche", "matplotlib", "PIL", "pandas", "scipy", "sklearn", "torchvision")


def test_every_public_name_is_there_and_told_of() -> None:
    for name in hmn_replay.__all__:
        thing = getattr(hmn_replay, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name


def test_importing_costs_torch_and_little_more() -> None:
    script = f"""
import sys, torch
before = set(sys.modules)
import hmn_replay
heavy = {HEAVY!r}
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set(heavy)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"
