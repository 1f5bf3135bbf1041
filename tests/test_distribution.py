"""What is built and released: the wheel's content, the extras, the workflow."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hmn_replay

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    for name in ("build", "hatchling"):
        pytest.importorskip(name, reason="needs the extra dev")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"hmn_replay-{hmn_replay.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"hmn_replay", f"hmn_replay-{hmn_replay.__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hmn_replay").rglob("*.py")}
    assert modules <= names and "hmn_replay/py.typed" in names
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE))
    assert {"hub", "timm", "plots", "docs", "dev"} <= extras
    named = set()
    for path in (ROOT / "hmn_replay").rglob("*.py"):
        named |= set(re.findall(r'import_extra\("[\w.]+", "(\w+)"\)', path.read_text()))
    assert named and named <= extras


def test_a_release_is_a_tag_of_the_version_with_an_entry_in_the_changelog() -> None:
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert 'tags: ["v*"]' in workflow and "id-token: write" in workflow
    # What the workflow looks for, in the package's own form.
    source = (ROOT / "hmn_replay" / "__init__.py").read_text()
    assert f'\n__version__ = "{hmn_replay.__version__}"\n' in source
    assert re.search(
        r"^## \[(Unreleased|\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_container_is_small_to_read() -> None:
    assert len((ROOT / "Dockerfile").read_text().splitlines()) < 20
