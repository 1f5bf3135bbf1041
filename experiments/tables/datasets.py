"""HMN against the best of the rivals' memory kinds, on several data sets."""

from __future__ import annotations

import argparse
import statistics

from experiments.arguments import parse_names
from experiments.results import markdown_table, percent
from experiments.tables import published
from experiments.tables.containers import SYSTEMS, measure
from experiments.tables.rows import NOTHING, Row, accuracies, budgets, memories, number
from experiments.tables.settings import Settings
from experiments.tables.store import Store
from experiments.tables.study import KINDS, load_study
from hmn_replay.errors import ConfigError

DEFAULT_ROWS = "hmn,linba,idc"


def run(args: argparse.Namespace, settings: Settings, store: Store) -> None:
    """Make the memories of every data set, and learn from them."""
    names = parse_names("--rows", args.rows or DEFAULT_ROWS, KINDS)
    asked = args.datasets.split(",")
    if len({published.dataset_name(data) for data in asked}) < len(asked):
        raise ConfigError(f"--datasets are of different names; got {args.datasets}")
    for data in asked:
        study = load_study(args, data, settings, store)
        for ipc in settings.ipc:
            for name in names:
                for seed in settings.seeds:
                    identity = {"data": study.name, "system": name, "ipc": ipc, "seed": seed}
                    measure(study, SYSTEMS[name], identity)


def make_rows(args: argparse.Namespace, settings: Settings, store: Store) -> list[Row]:
    """Return a row for every data set and IPC, run or not."""
    asked = [published.dataset_name(data) for data in args.datasets.split(",")]
    ran = [data for (data,) in store.seen("memory", "data")]
    rows = []
    for data in dict.fromkeys([*published.DATASETS, *asked, *ran]):
        for ipc in budgets(settings, store):
            numbers = published.DATASETS.get(data, {})
            row = {"data": data, "ipc": ipc}
            row["paper"] = {who: numbers.get(who, {}).get(ipc) for who in ("hmn", "rival")}
            row["systems"] = {
                name: {
                    "accuracies": accuracies(store, data=data, system=name, ipc=ipc),
                    **memories(store, data=data, system=name, ipc=ipc),
                }
                for name in KINDS
            }
            rows.append(row)
    return rows


def markdown(rows: list[Row]) -> str:
    """Return one table, and below it what went wrong."""
    head = ["data set", "IPC", "paper: HMN %", "paper: best rival %", "HMN %", "best rival %"]
    lines, notes = [[*head, "which", "of", "images", "bytes"]], []
    for row in rows:
        hmn = row["systems"]["hmn"]
        rivals = {n: s for n, s in row["systems"].items() if n != "hmn" and s["accuracies"]}
        best = max(
            rivals, key=lambda name: statistics.fmean(rivals[name]["accuracies"]), default=None
        )
        found = rivals[best] if best else {"accuracies": [], "images": None, "bytes": None}
        lines.append(
            [
                row["data"],
                str(row["ipc"]),
                *(number(row["paper"][who], ".1f") for who in ("hmn", "rival")),
                percent(hmn["accuracies"]),
                percent(found["accuracies"]),
                SYSTEMS[best].label if best else NOTHING,
                number(len(rivals) or None),
                *(f"{number(hmn[name])} / {number(found[name])}" for name in ("images", "bytes")),
            ]
        )
        notes += [
            f"- {row['data']}, {row['ipc']} IPC, {SYSTEMS[name].label}: {error}"
            for name, found in row["systems"].items()
            for error in found["errors"]
        ]
    return "\n\n".join([markdown_table(lines), *(["\n".join(notes)] if notes else [])])
