"""What the experiments compute of their runs, keep of earlier ones, and print."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hmn_replay
from hmn_replay.errors import ConfigError
from hmn_replay.files import try_lock


def summarise(matrix: list[list[float | None]], num_test: list[int]) -> dict[str, Any]:
    """Compute what is reported of an accuracy matrix.

    Args:
        matrix: Accuracy in [0, 1] after experience i (row) on the test images of experience j
            (column): measured for j <= i, or None; in rows not measured (yet) None throughout.
        num_test: Test images of each experience.

    Returns:
        `accuracy_seen`, for each row the share of right answers over the classes seen so far, or
        None; `final_accuracy`, its last entry; `average_accuracy`, the mean of those measured;
        `forgetting`, the mean over all experiences but the last of their best accuracy before the
        end minus that in the end, None where there is nothing to compare.
    """
    seen: list[float | None] = []
    for i, row in enumerate(matrix):
        known = [accuracy for accuracy in row[: i + 1] if accuracy is not None]
        right = sum(a * n for a, n in zip(known, num_test, strict=False))
        seen.append(right / sum(num_test[: i + 1]) if len(known) == i + 1 else None)
    measured = [accuracy for accuracy in seen if accuracy is not None]
    drops = []
    for j, last in enumerate(matrix[-1][:-1]):
        before = [row[j] for row in matrix[:-1] if row[j] is not None]
        if before and last is not None:
            drops.append(max(a for a in before if a is not None) - last)
    return {
        "accuracy_seen": seen,
        "final_accuracy": seen[-1],
        "average_accuracy": statistics.fmean(measured) if measured else None,
        "forgetting": statistics.fmean(drops) if drops else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Return what results are compared by: versions of packages, of Python and of our own."""
    found = {name: version(name) for name in packages}
    return found | {"python": platform.python_version(), "hmn_replay": hmn_replay.__version__}


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a folder of results, and keep it to this run inside the block.

    Each run writes ``results.json`` whole: of two at a time, one would lose the other's cells.

    Raises:
        ConfigError: Another run has the folder.
        OSError: It cannot be made, or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if try_lock(file.fileno()) is False:
            raise ConfigError(
                f"another run writes to {folder}: wait for its end, or give another --out"
            )
        yield


def resumed(
    report: dict[str, Any],
    path: Path,
    *,
    resume: bool,
    parts: Sequence[str] = ("configuration", "versions"),
) -> dict[str, Any]:
    """Return an earlier report in the place of a new one, if it is of the same settings.

    Args:
        report: The new one; what its parts name has to be the same in the earlier one.
        path: Where that is.
        resume: Whether to go on from it at all.
        parts: Names of the dicts with the settings.

    Raises:
        ConfigError: It is of other settings, or not to be gone on from.
    """
    if not resume:
        raise ConfigError(f"{path} exists; pass --resume to keep its runs, or give another --out")
    try:
        earlier: dict[str, Any] = json.loads(path.read_text())
        settings = [
            (name, earlier[part].get(name), now)
            for part in parts
            for name, now in report[part].items()
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no file of results ({error!r}); move it away, or give another --out"
        ) from error
    for name, then, now in settings:
        if then != now:
            raise ConfigError(
                f"{path} is of {name} = {then!r}, and now it is {now!r}; give another --out"
            )
    return earlier


def finished(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs of each strategy that has any, the best strategy first."""
    runs = {
        name: [run for run in by_seed.values() if "error" not in run]
        for name, by_seed in results.items()
    }
    runs = {name: group for name, group in runs.items() if group}
    return dict(sorted(runs.items(), key=lambda item: -mean_of(item[1], "final_accuracy")))


def mean_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(shares: Sequence[float]) -> str:
    """Return the mean in percent, and the deviation where there are several; a dash for none."""
    if not shares:
        return "-"
    values = [100 * share for share in shares]
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {deviation(values):.1f}" if len(values) > 1 else mean


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the strategies, best first; accuracies in percent."""
    title = (
        "strategy, loss, renewed, memory bytes, images, final accuracy %, average accuracy %, "
        "forgetting %, old called new % (through the codec)"
    )
    rows = [f"{title}, seeds, training s, memory s".split(", ")]
    for name, runs in finished(results).items():
        final = percent([run["final_accuracy"] for run in runs])
        if all(run.get("untuned") for run in runs):
            untuned = percent([run["untuned"]["final_accuracy"] for run in runs])
            final += f" (untuned {untuned})"
        # Joint training is measured once: the mean over all experiences is not known.
        is_whole = all(None not in run["accuracy_seen"] for run in runs)
        has_forgetting = all(run["forgetting"] is not None for run in runs)
        rows.append(
            [
                name,
                runs[0]["loss_used"] + (", distilled" if runs[0].get("distill_used") else ""),
                runs[0]["renew_used"] or "-",
                f"{mean_of(runs, 'memory_bytes'):,.0f}",
                f"{mean_of(runs, 'memory_images'):,.0f}",
                final,
                f"{100 * mean_of(runs, 'average_accuracy'):.1f}" if is_whole else "-",
                f"{100 * mean_of(runs, 'forgetting'):.1f}" if has_forgetting else "-",
                _shortcut_cell([run["shortcut"] for run in runs]),
                str(len(runs)),
                f"{mean_of(runs, 'train_seconds'):,.0f}",
                f"{mean_of(runs, 'memory_seconds'):,.0f}",
            ]
        )
    return markdown_table(rows)


def called_new(reports: Sequence[dict[str, Any] | None], images: str) -> float | None:
    """Return the mean share of old classes' images that are called new; None where not measured.

    Args:
        reports: What `hmn_replay.shortcut_report` returned, one a run.
        images: `clean`, `codec` or `decoded`.
    """
    found = [report[images]["called_new"] for report in reports if report and report[images]]
    return statistics.fmean(found) if found else None


def _shortcut_cell(reports: Sequence[dict[str, Any] | None]) -> str:
    clean, codec = called_new(reports, "clean"), called_new(reports, "codec")
    cell = "-" if clean is None else f"{100 * clean:.1f}"
    return cell if codec is None else f"{cell} ({100 * codec:.1f})"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells, the first row its head, in columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Let the process's peak begin anew, where Linux allows it, and that of a device's tensors."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
