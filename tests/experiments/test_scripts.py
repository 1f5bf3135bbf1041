"""Every script runs from a checkout that is not installed, or not in place."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import command

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path for path in sorted(ROOT.glob("experiments/*.py")) if "sys.exit(main" in path.read_text()
]


def test_scripts_find_their_own_checkout() -> None:
    # As where the package is installed elsewhere: nothing of this checkout is on the path.
    program = f"""
        import contextlib, io, runpy, sys

        elsewhere = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
        for script in sys.argv[1:]:
            for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
                del sys.modules[name]
            sys.path[:] = [script.rpartition("/")[0], *elsewhere]
            sys.argv = [script, "--help"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name="__main__")
            assert "experiments" in sys.modules, script
    """
    names = [path.stem for path in SCRIPTS]
    assert {"split_cifar100", "equal_bytes", "gpu_check", "benchmark"} <= set(names)
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, SCRIPTS)],
        cwd=ROOT.parent,
        check=True,
        timeout=120,
    )


def defaults_without_help(text: str, defaults: dict[str, Any]) -> list[str]:
    """Return the options that have a default, and whose entry in a help does not say it."""
    options = text.partition("options:")[2]
    entries = {words.split()[0]: words for words in re.split(r"^  (?=-)", options, flags=re.M)[1:]}
    return [
        name
        for name, value in defaults.items()
        if value not in (None, []) and not isinstance(value, bool)
        if "(default: " not in " ".join(entries["--" + name.replace("_", "-")].split())
    ]


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS if path.stem != "benchmark"])
def test_the_help_says_every_default(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse_arguments = importlib.import_module(f"experiments.{script}").parse_arguments
    required = {"paper_tables": ["--table", "memory"]}.get(script, [])
    defaults = vars(parse_arguments(required))
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    for word in required:
        defaults.pop(word.removeprefix("--"), None)
    assert defaults_without_help(capsys.readouterr().out, defaults) == []


@pytest.mark.parametrize("name", command.MODULES)
def test_the_help_of_a_benchmark_says_every_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"experiments.benchmarks.{command.MODULES[name]}")
    module.add_arguments(parser)
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    assert defaults_without_help(capsys.readouterr().out, vars(parser.parse_args([]))) == []
