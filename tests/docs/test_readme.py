"""README: its code runs, its links lead somewhere, and it stays one that can be read at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hmn_replay
from tests.docs.pages import DOCS, ROOT, blocks, run_blocks

README = (ROOT / "README.md").read_text()
SCRIPTS = blocks(ROOT / "README.md")


def test_code_for_a_data_set(quick: None) -> None:
    names = run_blocks(SCRIPTS[:1])
    assert Path("digits.hmn").stat().st_size <= 4096
    assert names["images"].shape == (names["memory"].num_images, 1, 8, 8)
    assert names["accuracy"] > 0.3


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_code_for_a_stream(quick: None) -> None:
    names = run_blocks(SCRIPTS[1:])
    assert Path("seen.hmn").stat().st_size <= 2048
    assert names["replay"].memory.num_classes == 10
    assert names["results"]["Top1_Acc_Stream/eval_phase/test_stream/Task000"] > 0.2


def test_pages_repeat_it_to_the_letter() -> None:
    assert set(SCRIPTS) <= set(blocks(DOCS / "quickstart.md"))
    limits = README[README.index("## When not to use it") : README.index("## More")]
    assert (DOCS / "index.md").read_text().endswith(limits.rstrip() + "\n")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    files = [link for link in links if not link.startswith("https://")]
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_readme_is_short_and_names_the_commands() -> None:
    assert len(README.splitlines()) <= 155
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"make ([a-z]+)", README))
    assert "test" in named
    assert named <= set(targets)


def test_citation_names_this_version() -> None:
    assert f"version: {hmn_replay.__version__}\n" in (ROOT / "CITATION.cff").read_text()
