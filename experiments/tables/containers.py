"""Every memory kind under one loss, rivals under losses of their own, and chosen real images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from experiments.arguments import parse_names
from experiments.results import percent
from experiments.tables import published
from experiments.tables.rows import (
    NOTHING,
    Row,
    accuracies,
    budgets,
    memories,
    number,
    sections,
)
from experiments.tables.settings import Settings
from experiments.tables.store import Store
from experiments.tables.study import (
    KINDS,
    Study,
    condense_once,
    load_study,
    select_once,
    train_once,
)


@dataclass(frozen=True)
class System:
    """A row: a memory kind and an objective, or a selection of real images.

    Attributes:
        label: Its name in the table.
        kind: As for :func:`hmn_replay.condense`; None where nothing is condensed, or where the
            objective is not among ours, and the paper's numbers alone are shown.
        objective: The rival's own; None for the one that all share.
        selection: As for :func:`hmn_replay.select_images`.
    """

    label: str
    kind: str | None = None
    objective: str | None = None
    selection: str | None = None


SYSTEMS = {
    "hmn": System("HMN", "hmn"),
    "linba": System("LinBa", "linba"),
    "haba": System("HaBa", "haba"),
    "idc": System("IDC", "idc"),
    "fred": System("FreD", "fred"),
    "pixels": System("learned pixels", "pixels"),
    "dc": System("DC", "pixels", "dc"),
    "dsa": System("DSA", "pixels", "dsa"),
    "dm": System("DM", "pixels", "dm"),
    "mtt": System("MTT", "pixels", "mtt"),
    "haba-mtt": System("HaBa + MTT", "haba", "mtt"),
    "linba-bptt": System("LinBa + BPTT", None, "bptt"),
    "random": System("real images, random", selection="random"),
    "herding": System("real images, herding", selection="herding"),
    "k-centre": System("real images, k-centre", selection="k-centre"),
    "ccs": System("real images, CCS", selection="ccs"),
}
for added in KINDS:
    SYSTEMS.setdefault(added, System(added, added))
ROWS = [name for name, system in SYSTEMS.items() if system.kind or system.selection]
DEFAULT_ROWS = "hmn,linba,haba,idc,fred,pixels,random,herding,k-centre,ccs"


def run(args: argparse.Namespace, settings: Settings, store: Store) -> None:
    """Make the memories of all rows, and learn from them."""
    names = parse_names("--rows", args.rows or DEFAULT_ROWS, ROWS)
    study = load_study(args, args.data, settings, store)
    for ipc in settings.ipc:
        for name in names:
            for seed in settings.seeds:
                measure(study, SYSTEMS[name], {"system": name, "ipc": ipc, "seed": seed})


def measure(study: Study, system: System, identity: dict[str, Any]) -> None:
    """Make one memory and learn from it, as far as that was not done."""
    if system.selection is not None:
        path = select_once(study, system.selection, identity)
        train_once(study, identity, path)
    elif system.kind is not None:
        options = {} if system.objective is None else {"objective": system.objective}
        path = condense_once(study, system.kind, identity, **options)
        train_once(study, identity, path)


def make_rows(args: argparse.Namespace, settings: Settings, store: Store) -> list[Row]:
    """Return a row for every IPC and system, run or not."""
    numbers = published.CONTAINERS if published.dataset_name(args.data) == "cifar10" else {}
    shared = settings.options.get("objective", "gradient")
    return [
        {
            "label": system.label,
            "loss": None if system.selection else system.objective or shared,
            "paper": numbers.get(name, {}).get(ipc),
            "accuracies": accuracies(store, system=name, ipc=ipc),
            **memories(store, system=name, ipc=ipc),
        }
        for ipc in budgets(settings, store)
        for name, system in SYSTEMS.items()
    ]


def markdown(rows: list[Row]) -> str:
    """Return a table for each IPC."""

    def line(row: Row) -> list[str]:
        return [
            row["label"],
            row["loss"] or NOTHING,
            number(row["paper"], ".1f"),
            percent(row["accuracies"]),
            *(number(row[name]) for name in ("images", "bytes", "values", "seconds")),
        ]

    head = ["memory", "loss", "paper %", "ours %", "images", "bytes", "values", "seconds"]
    return sections(rows, head, line)
