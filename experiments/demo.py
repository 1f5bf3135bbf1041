"""Condense scikit-learn's digits into a few kilobytes; compare with raw images of as many bytes.

    python experiments/demo.py --out demo

Needs no data. Writes digits.hmn, contact_sheet.png and results.json to OUT, and prints the accuracy
of a network trained on the memory beside that of one trained on real images, raw and as JPEG.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import hmn_replay
from hmn_replay.baselines import jpeg_images, raw_images
from hmn_replay.export import contact_sheet
from hmn_replay.storage import write_atomically

# Digits must not be mirrored, nor recoloured; small images need little network.
EVALUATION = hmn_replay.TrainingConfig(
    width=64, num_passes=40_000, augmentations=("crop", "scale", "rotate"), cutmix_probability=0.0
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--budget", default="8 KiB", help="bytes that each memory may take")
    parser.add_argument("--seeds", type=int, default=3, help="networks trained on each memory")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train = hmn_replay.load_dataset("digits", "train")
    test = hmn_replay.load_dataset("digits", "test")
    print(f"{len(train)} images to learn from, {len(train.images.flatten()):,} bytes of pixels")

    memory = hmn_replay.condense(
        train,
        args.budget,
        seed=0,
        device=args.device,
        progress=True,
        augmentations=("crop", "scale", "rotate"),
        network_cutmix_probability=0.0,
    )
    memory.save(args.out / "digits.hmn")
    contact_sheet(memory, args.out / "contact_sheet.png")

    memories: dict[str, Any] = {
        "HMN": memory,
        "raw images": raw_images(train, args.budget),
        "JPEG, quality 50": jpeg_images(train, args.budget, quality=50),
    }
    results = {}
    print(f"\n{'memory':<18}{'images':>8}{'bytes':>8}   accuracy %")
    for name, rival in memories.items():
        accuracies = [
            100
            * hmn_replay.evaluate(rival, test, config=EVALUATION, seed=seed, device=args.device)[1]
            for seed in range(args.seeds)
        ]
        mean = statistics.mean(accuracies)
        deviation = statistics.stdev(accuracies) if args.seeds > 1 else 0.0
        results[name] = {
            "num_images": rival.num_images,
            "file_bytes": rival.file_bytes,
            "accuracies": accuracies,
        }
        print(
            f"{name:<18}{rival.num_images:>8}{rival.file_bytes:>8}   {mean:.1f} ± {deviation:.1f}",
            flush=True,
        )
    write_atomically(args.out / "results.json", json.dumps(results, indent=1).encode())
    print(f"\nIn {args.out}: digits.hmn, contact_sheet.png, results.json")


if __name__ == "__main__":
    main()
