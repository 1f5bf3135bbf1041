"""Every script runs from a checkout that is not installed, or not in place."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

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
