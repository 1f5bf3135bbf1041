"""The tutorials run as they stand, and print what they are said to print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, blocks, run_blocks


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize(("name", "file"), [("condensation", "digits.hmn"), ("stream", "seen.hmn")])
def test_tutorial(
    name: str,
    file: str,
    quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = DOCS / "tutorials" / f"{name}.md"
    run_blocks(blocks(page))
    assert 0 < Path(file).stat().st_size <= 2048
    printed, shown = capsys.readouterr().out, "".join(blocks(page, "text"))
    # Seconds and accuracies differ from machine to machine; the lines do not.
    assert _words(printed) == _words(shown)
    if name == "condensation":  # the number of images is the layout's
        counts = [int(re.findall(r"(\d+) images in", text)[0]) for text in (printed, shown)]
        assert abs(counts[0] - counts[1]) <= 5
    assert float(re.findall(r"HMN: .*?([\d.]+)%", printed)[0]) > 40


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d]+", text)
