"""Every command that README and the pages show is one that can be given."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from hmn_replay import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({" ".join(line.split("#")[0].split()) for line in LINES})
OURS = [line for line in COMMANDS if re.search(r"experiments/|hmn.replay ", line)]


class Parsed(Exception):
    """Raised in the place of what a command does."""


def test_there_are_commands() -> None:
    assert len(OURS) > 15


@pytest.mark.parametrize("line", OURS)
def test_arguments_are_known(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args: Any, **kwargs: Any) -> argparse.Namespace:
        namespace: argparse.Namespace = parse(*args, **kwargs)
        if hasattr(namespace, "arguments"):  # those of a sub-command are parsed next
            return namespace
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    words = shlex.split(line)
    script = next((word for word in words if word.startswith("experiments/")), None)
    position = next(
        i for i, word in enumerate(words) if word in (script, "hmn-replay", "hmn_replay")
    )
    monkeypatch.setattr(sys, "argv", words[position:])
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # scripts put the checkout first
    with pytest.raises(Parsed):
        if script is None:
            cli.main()
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
