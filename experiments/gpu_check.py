"""Is the package right and fast on this GPU? One command of ten minutes, and a table of its answer.

    python experiments/gpu_check.py --data cifar10.npz
    python experiments/gpu_check.py --data cifar10 --minutes 5 --out gpu.json
    python experiments/gpu_check.py --device cpu --smoke

Five parts, each after the other, and none of which stops the next by failing:

tests      the tests that need a CUDA device: pytest -m gpu
quick      condense(effort="quick"): seconds, peak memory, and the accuracy of a network of width
           128 that is trained on the memory alone
timed      the same for a condensation that may take what is left of the time, up to 8 minutes, when
           3.5 minutes have been kept for the parts below
matching   a step of gradient matching against the published one, at width 32 and 128, and the share
           of the card's measured peak that it reaches: benchmark.py matching
training   a training step of width 64, compiled, against the plain one: benchmark.py training

It needs pip install -e ".[dev]", and no network beyond the data, which is CIFAR-10 as --data names
it; images that are there already, such as an .npz file, are best. Printed as a table, and written
to --out as JSON, after each part. The exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    # Python looks beside the script; what is checked is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hmn_replay
from experiments.arguments import add_data, load, make_parser
from experiments.benchmarks import matching, training
from experiments.benchmarks.common import add_common_arguments, readable
from experiments.results import reset_peak_memory
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError, HMNReplayError, HMNReplayWarning
from hmn_replay.files import check_target, write_atomically
from hmn_replay.runtime import peak_memory_bytes, resolve_device

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "quick", "timed", "matching", "training")

# Of a timed condensation, which leaves time for its evaluation, and for parts that come after it.
MOST_SECONDS = 480.0
EVALUATION_SECONDS = 60.0
LEFT_SECONDS = {"matching": 150.0, "training": 60.0}
TESTS_SECONDS = 240.0

SMOKE: dict[str, Any] = {"data": "digits", "budget": "4KiB", "minutes": 0.2}
SMOKE_OPTIONS: dict[str, Any] = {
    "warm_start_steps": 2,
    "trained_networks": 1,
    "trained_passes": 16,
    "outer_steps": 1,
    "inner_steps": 1,
    "network_width": 4,
    "pruning_passes": 20,
    "pruning_width": 4,
    "compile": False,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data(parser, default="cifar10")
    add = parser.add_argument
    add("--budget", default="120KiB", help="bytes of the memories")
    add("--minutes", type=float, default=9.5, help="what all parts may take, about")
    add("--parts", default=",".join(PARTS), help="which parts, comma-separated (default: all)")
    add("--passes", type=int, default=500_000,
        help="images that the evaluation's network is shown")  # fmt: skip
    add("--device", default="cuda", help="cuda, cuda:1, ...; cpu to rehearse")
    add("--smoke", action="store_true", help="everything tiny, to see in seconds that it works")
    add("--out", type=Path, default=Path("gpu_check.json"), help="file to write to")
    if parser.parse_args(argv).smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    args.parts = tuple(args.parts.split(","))
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ConfigError(f"--parts has no {unknown[0]!r}; choose from {', '.join(PARTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    args = parse_arguments(argv)
    device = resolve_device(args.device)
    check_target(args.out)
    wants_data = {"quick", "timed"} & set(args.parts)
    train, test = (load(args, split) if wants_data else None for split in ("train", "test"))
    report: dict[str, Any] = {"machine": describe(device), "parts": {}}
    print(json.dumps(report["machine"], indent=1), flush=True)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": run_tests,
        "matching": lambda: measure_matching(args, device),
        "training": lambda: measure_training(args, device),
        "quick": lambda: condense(train, test, args, device),
        "timed": lambda: condense(train, test, args, device, left_seconds()),
    }
    later = args.parts[args.parts.index("timed") + 1 :] if "timed" in args.parts else ()

    def left_seconds() -> float:
        kept: float = sum(LEFT_SECONDS.get(name, 0.0) for name in later)
        return float(60 * args.minutes - elapsed() - kept)

    def elapsed() -> float:
        return time.perf_counter() - started

    for name in args.parts:
        before = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", HMNReplayWarning)
                entry = parts[name]()
            if told := [str(each.message) for each in caught]:  # that compiling failed, say
                entry["warnings"] = told
        except Exception as error:  # what fails is an answer too, and the others are still wanted
            traceback.print_exc()
            entry = {"error": f"{type(error).__name__}: {error}"}
        report["parts"][name] = {**entry, "part_seconds": time.perf_counter() - before}
        write_atomically(args.out, (json.dumps(report, indent=1) + "\n").encode())
        print("\n".join(rows(name, report["parts"][name])), flush=True)
    print(f"{elapsed():.0f} s in all; in {args.out}")
    return 1 if any("error" in entry for entry in report["parts"].values()) else 0


def describe(device: torch.device) -> dict[str, Any]:
    """Return what figures must not be given without: the card and the software."""
    machine: dict[str, Any] = {"device": device.type, "processor": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return {**machine, **versions, "hmn_replay": hmn_replay.__version__}


def run_tests() -> dict[str, Any]:
    """Run the tests marked gpu in a process of their own."""
    files = [str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TESTS_SECONDS
    )
    lines = done.stdout.strip().splitlines()
    entry: dict[str, Any] = {"exit_code": done.returncode, "summary": lines[-1] if lines else ""}
    if done.returncode:
        entry["error"] = f"pytest ended with exit code {done.returncode}"
        entry["output"] = (done.stdout + done.stderr)[-4000:]
    return entry


def benchmark(module: Any, device: torch.device, *, smoke: bool, **settings: Any) -> dict[str, Any]:
    """Run a module of experiments/benchmarks with its defaults, but for some settings."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    add_common_arguments(parser)
    parser.set_defaults(device=str(device), **(module.SMOKE if smoke else settings))
    results: dict[str, Any] = module.measure(parser.parse_args([]))
    return results


def measure_matching(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps of matching at the paper's width and at ours."""
    wanted = ["ours_seconds", "ours_bfloat16_seconds", "reference_seconds", "ratio"]
    wanted += ["ratio_bfloat16", "peak_fraction", "peak_fraction_bfloat16", "peak_memory_bytes"]
    wanted += ["relative_error", "relative_error_bfloat16"]
    found = {}
    for width in (32, 128):
        # As condense() does by default on a GPU, where nothing is compiled.
        results = benchmark(matching, device, smoke=args.smoke, width=width, compile=False)
        found[str(width)] = {name: results[name] for name in wanted}
    return {"widths": found}


def measure_training(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time training steps of width 64."""
    return benchmark(training, device, smoke=args.smoke)


def condense(
    train: LabelledImages | None,
    test: LabelledImages | None,
    args: argparse.Namespace,
    device: torch.device,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Condense, quickly or for as long as there is, and train a network on the memory alone."""
    assert train is not None and test is not None
    options: dict[str, Any] = dict(SMOKE_OPTIONS) if args.smoke else {}
    if seconds is not None:
        left = 0.01 if args.smoke else seconds - EVALUATION_SECONDS
        if left <= 0:
            raise ConfigError(f"nothing is left of --minutes {args.minutes:g}; give it more")
        options |= {"max_seconds": min(MOST_SECONDS, left), "outer_steps": 100_000}
    reset_peak_memory(device)
    started = time.perf_counter()
    memory = hmn_replay.condense(train, args.budget, device=device, seed=0, **options)
    condensed, peak_bytes = time.perf_counter(), peak_memory_bytes(device)
    config = hmn_replay.TrainingConfig(
        width=4 if args.smoke else 128,
        num_passes=100 if args.smoke else args.passes,
        precision="auto",
    )
    accuracy = hmn_replay.evaluate(memory, test, seed=0, device=device, config=config)[1]
    return {
        "seconds": condensed - started,
        "phases": {name: phase["seconds"] for name, phase in memory.report["phases"].items()},
        "images": memory.num_images,
        "file_bytes": memory.file_bytes,
        "budget_bytes": memory.budget_bytes,
        "peak_memory_bytes": peak_bytes,
        "accuracy": accuracy,
        "evaluation_seconds": time.perf_counter() - condensed,
    }


def rows(name: str, entry: dict[str, Any]) -> list[str]:
    """Return what the table says of a part."""
    return [
        *answer(name, entry),
        *(f"{'':10s}warned: {each}" for each in entry.get("warnings", ())),
    ]


def answer(name: str, entry: dict[str, Any]) -> list[str]:
    if "error" in entry:
        return [f"{name:10s}failed: {entry['error']}"]
    if name == "tests":
        return [f"{name:10s}{entry['summary']}"]
    if name == "matching":
        return [
            f"{name:10s}width {width}: {results['ratio']:.2f} times the reference in float32 "
            f"({100 * results['peak_fraction']:.0f} % of peak), {results['ratio_bfloat16']:.2f} in "
            f"bfloat16 ({100 * results['peak_fraction_bfloat16']:.0f} %)"
            for width, results in entry["widths"].items()
        ]
    if name == "training":
        rate = entry["compiled_images_per_second"]
        return [
            f"{name:10s}{entry['ratio']:.2f} times the eager step in {entry['precision']}, "
            f"{rate:,.0f} images/s; {entry['first_compile_seconds']:.0f} s to compile"
        ]
    return [
        f"{name:10s}{100 * entry['accuracy']:.1f} % from {entry['images']:,} images in "
        f"{entry['file_bytes']:,} bytes, condensed in {entry['seconds']:.0f} s, peak memory "
        f"{readable(entry['peak_memory_bytes'])}"
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (HMNReplayError, OSError) as error:
        sys.exit(f"gpu_check.py: error: {error}")
