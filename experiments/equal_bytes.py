"""Which memory teaches a network most at equal bytes: HMN, raw images or JPEG?

    python experiments/equal_bytes.py --data cifar10 --data-root data --download
    python experiments/equal_bytes.py --data cifar10.npz --rows raw,jpeg,quick --seeds 0,1,2

Each row of the table is a memory of the same data under the same budget of bytes of a file, header
and all. A fresh network is trained on it and scored on the test set, for every seed (which also
draws the memory); the last epoch counts. JPEG is tried at several qualities and shown at the one
with the highest test accuracy, which favours it.

Rows are kept in OUT/results.json as they are finished, and a run that was stopped goes on from
there; memories lie beside it. The table is printed and written to OUT/results.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import hmn_replay
from experiments.arguments import add_data, make_parser, parse_numbers
from experiments.results import deviation, markdown_table, reset_peak_memory
from hmn_replay.baselines import jpeg_images, raw_images
from hmn_replay.budget import Budget
from hmn_replay.config import EFFORTS
from hmn_replay.data import LabelledImages
from hmn_replay.files import write_atomically
from hmn_replay.runtime import peak_memory_bytes
from hmn_replay.sources import load_dataset


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data(parser, "digits")
    parser.add_argument("--budget", default="122880", help="such as 122880 or '120 KiB'")
    parser.add_argument(
        "--rows", default="raw,jpeg,quick", help="raw, jpeg, and any of the efforts"
    )
    parser.add_argument("--qualities", default="5,10,20,30", help="of JPEG")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--network", default="convnet")
    parser.add_argument("--width", type=int, default=128, help="channels of ConvNet's blocks")
    parser.add_argument("--passes", type=int, default=40_000, help="images a network is shown")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("equal_bytes"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    source = {"data_root": args.data_root, "download": args.download, "size": args.size}
    train = load_dataset(args.data, "train", **source)
    test = load_dataset(args.data, "test", **source)
    budget = Budget.parse(args.budget)
    seeds = parse_numbers("--seeds", args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    results_path = args.out / "results.json"
    settings = {
        "data": args.data,
        "train_images": len(train),
        "test_images": len(test),
        "budget_bytes": budget.num_bytes,
        "network": args.network,
        "width": args.width,
        "passes": args.passes,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    results: dict[str, Any] = {"settings": settings, "rows": {}}
    if results_path.exists():
        results = json.loads(results_path.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{results_path} holds results of other settings; give another --out")

    rows: list[str] = []
    for row in args.rows.split(","):
        if row == "jpeg":
            rows.extend(f"jpeg q{quality}" for quality in args.qualities.split(","))
        elif row == "raw" or row in EFFORTS:
            rows.append(row)
        else:
            raise SystemExit(f"no row {row!r}: choose from raw, jpeg, {', '.join(EFFORTS)}")
    for row in rows:
        for seed in seeds:
            key = f"{row} seed {seed}"
            if key in results["rows"]:
                continue
            print(f"{key} ...", flush=True)
            results["rows"][key] = measure(row, seed, train, test, budget, args)
            write_atomically(results_path, json.dumps(results, indent=1).encode())
    table = make_table(results["rows"])
    write_atomically(args.out / "results.md", table.encode())
    print(table)


def measure(
    row: str,
    seed: int,
    train: LabelledImages,
    test: LabelledImages,
    budget: Budget,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Make one memory, train on it, and return what came out."""
    reset_peak_memory()
    started = time.monotonic()
    result: dict[str, Any] = {}
    if row == "raw":
        memory: Any = raw_images(train, budget, seed=seed)
    elif row.startswith("jpeg"):
        memory = jpeg_images(train, budget, quality=int(row.removeprefix("jpeg q")), seed=seed)
    else:
        path = args.out / f"{row}-{seed}.hmn"
        memory = hmn_replay.condense(
            train,
            budget,
            effort=row,
            seed=seed,
            device=args.device,
            checkpoint=path.with_suffix(".checkpoint"),
            progress=True,
        )
        memory.save(path)
        result |= {"num_floats": memory.num_floats, "report": memory.report}
    seconds = time.monotonic() - started
    _, accuracy = hmn_replay.evaluate(
        memory,
        test,
        network=args.network,
        width=args.width,
        num_passes=args.passes,
        seed=seed,
        device=args.device,
    )
    return result | {
        "accuracy": accuracy,
        "file_bytes": memory.file_bytes,
        "num_images": memory.num_images,
        "seconds": seconds,
        "peak_rss_bytes": peak_memory_bytes(torch.device("cpu")),
    }


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table, best first; of JPEG the best quality alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, result in results.items():
        groups.setdefault(key.rpartition(" seed ")[0], []).append(result)
    means = {name: statistics.mean(r["accuracy"] for r in group) for name, group in groups.items()}
    ranked = sorted(groups, key=means.__getitem__, reverse=True)
    rows = [["memory", "images", "bytes", "accuracy %", "seeds", "seconds to make"]]
    jpeg_shown = False
    for name in ranked:
        if name.startswith("jpeg"):
            if jpeg_shown:
                continue
            jpeg_shown = True
        group = groups[name]
        accuracies = [100 * result["accuracy"] for result in group]
        label = f"HMN {name}" if name in EFFORTS else name
        seconds = statistics.mean(result["seconds"] for result in group)
        rows.append(
            [
                label,
                str(group[0]["num_images"]),
                f"{group[0]['file_bytes']:,}",
                f"{statistics.mean(accuracies):.1f} ± {deviation(accuracies):.1f}",
                str(len(group)),
                f"{seconds:,.0f}",
            ]
        )
    return markdown_table(rows) + "\n"


if __name__ == "__main__":
    main()
