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
FUNCTION = re.compile(r"^(\w+)\(\) \{\n(.*?)\n\}$", re.M | re.S)


def commands_of(page: str) -> list[str]:
    """Return the lines of a page's blocks, each call of a function replaced by its body."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.S)).replace("\\\n", " ")
    bodies = dict(FUNCTION.findall(text))
    lines = []
    for line in FUNCTION.sub("", text).splitlines():
        name, _, arguments = line.strip().partition(" ")
        lines.append(bodies[name].replace('"$@"', arguments) if name in bodies else line)
    return lines


LINES = [line for page in PAGES for line in commands_of(page.read_text())]
COMMANDS = sorted({" ".join(line.split("#")[0].split()) for line in LINES})
OURS = [line for line in COMMANDS if re.search(r"experiments/|hmn.replay ", line)]


class Parsed(Exception):
    """Raised in the place of what a command does."""


def test_there_are_commands() -> None:
    assert len(OURS) > 15


def test_a_function_stands_for_its_body() -> None:
    page = '```sh\nf() {\n    run --a \\\n        "$@"\n}\n```\n```sh\nf --b 1 \\\n    --c\ng\n```'
    assert [" ".join(line.split()) for line in commands_of(page) if line] == [
        "run --a --b 1 --c",
        "g",
    ]


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
