"""The results of a table: everything that takes long is a cell, computed once and kept."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.results import hold, resumed, versions
from hmn_replay.errors import BudgetError, ConfigError, HMNReplayError
from hmn_replay.files import write_atomically

# What a system cannot do is a finding of the table, and no failure of the run.
FINDINGS = (BudgetError, torch.cuda.OutOfMemoryError)


class Store:
    """Cells in ``FOLDER/results.json``, which is written anew after each of them.

    A cell is a flat dict: what it is of (such as system, IPC and seed), and what was found, or
    ``error``, which is tried again by the next run.

    Args:
        folder: Made where it is absent. What cells keep beside their numbers goes there too.
        configuration: JSON values that all cells depend on.

    Attributes:
        release: Lets another run have the folder; called when the store is no longer used.

    Raises:
        ConfigError: The folder holds cells of another configuration, or of other versions; or
            another run writes to it.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / "results.json"
        holding = contextlib.ExitStack()
        holding.enter_context(hold(folder))
        self.release = weakref.finalize(self, holding.close)
        report = {"configuration": configuration, "versions": versions("torch", "torchvision")}
        # As it would come back from the file.
        self.report: dict[str, Any] = json.loads(json.dumps({**report, "cells": [], "rows": []}))
        try:
            if self.path.exists():
                self.report = resumed(self.report, self.path, resume=True)
        except ConfigError:
            self.release()
            raise
        self.failed: list[str] = []

    def agree(self, name: str, value: Any) -> None:
        """Remember what cells depend on that is known later, or refuse another value of it.

        Written at once: what a script keeps beside its cells, such as a network, is of it, too.
        """
        known = self.report["configuration"].setdefault(name, value)
        if known != value:
            raise ConfigError(
                f"{self.path} is of {name} = {known!r}, and now it is {value!r}; give another --out"
            )
        self.write()

    def find(self, what: str, **identity: Any) -> list[dict[str, Any]]:
        """Return the cells of that kind and identity, or part of one, that are no errors."""
        return [cell for cell in self._matching(what, identity) if "error" not in cell]

    def seen(self, what: str, *names: str) -> list[tuple[Any, ...]]:
        """Return what cells of that kind are of, errors too: the values of names, each once."""
        cells = self._matching(what, {})
        return list(dict.fromkeys(tuple(cell[name] for name in names) for cell in cells))

    def errors(self, **identity: Any) -> list[str]:
        """Return the errors among the cells of that identity, or part of one, each once."""
        matching = self._matching(None, identity)
        return list(dict.fromkeys(cell["error"] for cell in matching if "error" in cell))

    def notes(self, *names: str) -> list[str]:
        """Return a line for each error, behind the values of names that its cell is of."""
        failed = [cell for cell in self._matching(None, {}) if "error" in cell]
        lines = [
            f"- {', '.join(f'{name} {cell[name]}' for name in names if name in cell)}: "
            f"{cell['error']}"
            for cell in failed
        ]
        return list(dict.fromkeys(lines))

    def once(
        self, what: str, identity: dict[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the cell of that kind and identity, computed if it is not there yet.

        An exception becomes the cell's ``error``: one system's must not cost the others' results.
        """
        if found := self.find(what, **identity):
            return found[0]
        label = ", ".join([what, *(f"{name} {value}" for name, value in identity.items())])
        print(f"{label} ...", flush=True)
        try:
            result = compute()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            if not isinstance(error, FINDINGS):
                self.failed.append(label)
            if not isinstance(error, HMNReplayError):
                traceback.print_exc()
        shown = {
            name: value for name, value in result.items() if isinstance(value, float | int | str)
        }
        print("  " + ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        earlier = self._matching(what, identity)
        cells = [cell for cell in self.report["cells"] if cell not in earlier]
        cell: dict[str, Any] = json.loads(json.dumps({"what": what, **identity, **result}))
        self.report["cells"] = [*cells, cell]
        self.write()
        return cell

    def exit_code(self, *, stopped: bool) -> int:
        """Return that of a run, and say on standard error why it is not 0."""
        if stopped:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
        if self.failed:
            print(f"failed: {'; '.join(self.failed)}; see {self.path}", file=sys.stderr)
        return 1 if self.failed else 0

    def write(self) -> None:
        """Write ``results.json``."""
        write_atomically(self.path, json.dumps(self.report, indent=1).encode())

    def _matching(self, what: str | None, identity: dict[str, Any]) -> list[dict[str, Any]]:
        wanted = identity if what is None else {"what": what, **identity}
        return [
            cell
            for cell in self.report["cells"]
            if all(cell.get(name) == value for name, value in wanted.items())
        ]
