"""Memories condensed with one network, or several in turn, and learned from by others."""

from __future__ import annotations

import argparse

from experiments.arguments import parse_names
from experiments.results import percent
from experiments.tables import published
from experiments.tables.containers import SYSTEMS
from experiments.tables.rows import Row, accuracies, budgets, memories, number, sections
from experiments.tables.settings import Settings
from experiments.tables.store import Store
from experiments.tables.study import KINDS, condense_once, load_study, train_once
from hmn_replay.training.networks import NETWORKS

DEFAULT_ROWS = "hmn,idc"


def run(args: argparse.Namespace, settings: Settings, store: Store) -> None:
    """Condense into each memory kind with each pool of networks, and train each network on it."""
    evaluated = parse_names("--evaluate-on", args.evaluate_on, NETWORKS)
    pairs = asked(args)
    study = load_study(args, args.data, settings, store)
    for ipc in settings.ipc:
        for name, pool in pairs:
            for seed in settings.seeds:
                identity = {"system": name, "matched_on": pool, "ipc": ipc, "seed": seed}
                path = condense_once(study, name, identity, network=tuple(pool.split("+")))
                for network in evaluated:
                    train_once(study, identity, path, network=network)


def asked(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return every memory kind with every pool of networks, such as ``convnet+vgg16``."""
    names = parse_names("--rows", args.rows or DEFAULT_ROWS, KINDS)
    pools = args.networks.split(",")
    for pool in pools:
        parse_names("--networks", pool.replace("+", ","), NETWORKS)
    return [(name, pool) for name in names for pool in pools]


def make_rows(args: argparse.Namespace, settings: Settings, store: Store) -> list[Row]:
    """Return a row for every IPC, memory kind and pool of networks that a run asked for."""
    is_paper = published.dataset_name(args.data) == "cifar10"
    ran = store.seen("memory", "system", "matched_on")
    rows = []
    for ipc in budgets(settings, store):
        for name, pool in dict.fromkeys([*asked(args), *ran]):
            numbers = published.ARCHITECTURES.get(name, {}) if pool == "convnet" else {}
            row = memories(store, system=name, matched_on=pool, ipc=ipc)
            row["label"] = f"{SYSTEMS[name].label}, {pool}"
            row["networks"] = {
                network: {
                    "paper": numbers.get(network, {}).get(ipc) if is_paper else None,
                    "accuracies": accuracies(
                        store, system=name, matched_on=pool, ipc=ipc, network=network
                    ),
                }
                for network in NETWORKS
            }
            rows.append(row)
    return rows


def markdown(rows: list[Row]) -> str:
    """Return a table for each IPC."""

    def line(row: Row) -> list[str]:
        cells = [row["label"], number(row["images"]), number(row["bytes"]), number(row["seconds"])]
        for found in row["networks"].values():
            cells += [number(found["paper"], ".1f"), percent(found["accuracies"])]
        return cells

    head = ["memory, condensed with", "images", "bytes", "seconds"]
    for network in NETWORKS:
        head += [f"{network}, paper %", "ours %"]
    return sections(rows, head, line)
