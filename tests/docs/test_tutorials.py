"""The tutorials run as they stand, and say what they are said to say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize(("name", "file"), [("condensation", "digits.hmn"), ("stream", "seen.hmn")])
def test_tutorial(
    name: str,
    file: str,
    quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(TUTORIALS / f"{name}.py"))
    assert 0 < Path(file).stat().st_size <= 2048
    printed, shown = capsys.readouterr().out, (TUTORIALS / f"{name}.txt").read_text()
    # Seconds and accuracies differ from machine to machine; the lines do not.
    assert _words(printed) == _words(shown)
    if name == "condensation":  # the number of images is the layout's
        counts = [int(re.findall(r"(\d+) images in", text)[0]) for text in (printed, shown)]
        assert abs(counts[0] - counts[1]) <= 5
    assert float(re.findall(r"HMN: .*?([\d.]+)%", printed)[0]) > 40


@pytest.mark.parametrize("name", ["condensation", "stream"])
def test_page_has_every_part_of_its_script(name: str) -> None:
    parts = re.findall(r"\[start:(\w+)\]", (TUTORIALS / f"{name}.py").read_text())
    page = (TUTORIALS / f"{name}.md").read_text()
    assert re.findall(r'^--8<-- "tutorials/\w+\.py:(\w+)"$', page, re.MULTILINE) == parts


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d]+", text)
