"""Metrics of a memory, for Avalanche's evaluation and its loggers.

evaluator = EvaluationPlugin(
    accuracy_metrics(stream=True), memory_metrics(), loggers=[TensorboardLogger("logs")]
)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from torch import Tensor

from hmn_replay.avalanche.plugin import MemoryReplay, replay_of
from hmn_replay.avalanche.streams import experiences_of, is_piece, split_class_keys
from hmn_replay.registry import check_name

__all__ = ["METRICS", "CalledNew", "MemoryMetric", "memory_metrics"]

Measure = Callable[[MemoryReplay], float | None]


def _fill(replay: MemoryReplay) -> float | None:
    budget = None if replay.memory is None else replay.memory.budget_bytes
    return None if budget is None else replay.memory_bytes / budget


def _images(replay: MemoryReplay) -> float:
    return float(len(replay.store))


def _images_per_class(replay: MemoryReplay) -> float | None:
    counts = [] if replay.memory is None else replay.memory.images_per_class
    return sum(counts) / len(counts) if counts else None


def _psnr(replay: MemoryReplay) -> float | None:
    return replay.report[-1].get("warm_start_psnr") if replay.report else None


def _seconds(replay: MemoryReplay) -> float:
    return float(sum(entry["seconds"] for entry in replay.report))


METRICS: dict[str, Measure] = {
    "bytes": lambda replay: float(replay.memory_bytes),
    "fill": _fill,
    "images": _images,
    "images_per_class": _images_per_class,
    "psnr": _psnr,
    "seconds": _seconds,
}
"""What is measured after each experience, by name: the bytes of the memory's file; the share of its
budget that these are; its images; its images per class, on average; the fidelity of a learned
memory's images to their real sources after the last warm start, in dB; and the seconds spent on the
memory so far. A measure may be None, and is then not logged."""


class MemoryMetric(PluginMetric[float | None]):
    """A number that is read off a memory after each experience.

    Args:
        name: What it is called: ``Memory_NAME`` in the logs.
        measure: From the plugin to the number, or None where there is none.
    """

    def __init__(self, name: str, measure: Measure) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.measure = name, measure
        self._value: float | None = None

    def result(self) -> float | None:
        """Return the last number; None where there was none."""
        return self._value

    def reset(self) -> None:
        """Forget the last number."""
        self._value = None

    def after_training_exp(self, strategy: Any) -> Any:
        """Measure the memory as the experience leaves it."""
        replay = replay_of(strategy)
        self._value = None if replay is None else self.measure(replay)
        return _logged(self, strategy, self._value)

    def __str__(self) -> str:
        return f"Memory_{self.name}"


class CalledNew(PluginMetric[float | None]):
    """The share of an evaluation's images of old classes that are called one of the newest ones.

    The newest classes are those of the experience that was trained on last. A network that tells
    old from new by a memory's artefacts calls many clean images of old classes new; see
    :func:`hmn_replay.shortcut_report`, which says more and takes more time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._new = self._old = torch.empty(0, dtype=torch.int64)
        self._seen: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Begin another evaluation."""
        self._num_old = self._num_called_new = torch.zeros((), dtype=torch.int64)

    def result(self) -> float | None:
        """Return the share, in [0, 1]; None where no image was of an old class."""
        num_old, num_called_new = int(self._num_old), int(self._num_called_new)
        return num_called_new / num_old if num_old else None

    def before_training_exp(self, strategy: Any) -> None:
        """Note which classes are new, those of the experience, of all its pieces so far; and old.

        The old ones are those of earlier experiences, or that the memory has, and are not new.
        """
        experience = strategy.experience
        labels = {
            int(label)
            for each in experiences_of(strategy, experience)
            for label in getattr(each.dataset, "targets", ())
        }
        shows_where = is_piece(strategy, experience) and experience.access_task_boundaries
        if shows_where and not experience.is_first_subexp:
            labels.update(self._new.tolist())
        self._seen.update(self._new.tolist())
        replay = replay_of(strategy)
        if replay is not None and replay.memory is not None:
            self._seen.update(split_class_keys(replay.memory.classes)[0].tolist())
        self._new = torch.tensor(sorted(labels), dtype=torch.int64)
        self._old = torch.tensor(sorted(self._seen - labels), dtype=torch.int64)

    def before_eval(self, strategy: Any) -> None:
        """Begin."""
        self.reset()

    def after_eval_iteration(self, strategy: Any) -> None:
        """Count."""
        super().after_eval_iteration(strategy)
        self.count(strategy.mb_output, strategy.mb_y)

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Count a mini-batch: logits ``(N, K)`` and labels ``(N,)``."""
        # Moved once, and summed where they are: a GPU is not waited for.
        if self._new.device != labels.device:
            self._new, self._old = self._new.to(labels.device), self._old.to(labels.device)
        is_old = _is_among(labels, self._old)
        called_new = _is_among(logits.argmax(1), self._new) & is_old
        self._num_old = self._num_old.to(labels.device) + is_old.sum()
        self._num_called_new = self._num_called_new.to(labels.device) + called_new.sum()

    def after_eval(self, strategy: Any) -> Any:
        """Log the share."""
        return _logged(self, strategy, self.result())

    def __str__(self) -> str:
        return "Memory_called_new"


def memory_metrics(*names: str) -> list[PluginMetric[float | None]]:
    """Return metrics of a memory, for Avalanche's ``EvaluationPlugin``.

    The memory is that of the first plugin of this package among the strategy's, or of the first
    :class:`~hmn_replay.MemoryBuffer`.

    Args:
        *names: Names in :data:`METRICS`, or ``"called_new"``, see :class:`CalledNew`. Default: all.

    Raises:
        UnknownNameError: A name that is not one of these.
    """
    known = [*METRICS, "called_new"]
    for name in names:
        check_name("metric", name, known)
    return [
        CalledNew() if name == "called_new" else MemoryMetric(name, METRICS[name])
        for name in names or known
    ]


def _logged(metric: Any, strategy: Any, value: float | None) -> Any:
    if value is None:
        return None
    name = get_metric_name(metric, strategy, add_task=False)
    return [MetricValue(metric, name, value, strategy.clock.train_iterations)]


def _is_among(labels: Tensor, classes: Tensor) -> Tensor:
    """Return which labels are among some classes, as ``torch.isin``, which waits for a GPU."""
    return (labels[:, None] == classes).any(dim=1)
