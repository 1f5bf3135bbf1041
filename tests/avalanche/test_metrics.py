"""Metrics of a memory reach Avalanche's evaluation and its loggers."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger, TextLogger
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.supervised.er_ace import ER_ACE

from hmn_replay import HMNReplay, MemoryBuffer, RawReplay, memory_metrics
from hmn_replay.avalanche.metrics import METRICS, CalledNew
from hmn_replay.errors import ConfigError
from tests.streams import KeepFirst, in_pieces, labelled_streams, make_strategy, streams
from tests.support import TINY


def train(plugin: Any, loggers: Any, *metrics: Any) -> dict[str, Any]:
    """Train on two experiences, evaluate, and return the last metrics."""
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), *metrics, loggers=loggers)
    strategy = make_strategy([plugin], evaluator=evaluator)
    benchmark = streams()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.eval(benchmark.test_stream)
    found: dict[str, Any] = strategy.evaluator.get_last_metrics()
    return found


@pytest.mark.parametrize("renew", ["before", "after"])
def test_they_are_what_the_memory_is_after_each_experience(renew: Any) -> None:
    text = io.StringIO()
    replay = RawReplay(1500, renew=renew)
    found = train(replay, [TextLogger(text)], memory_metrics())
    memory = replay.memory
    assert memory is not None
    expected = {
        "bytes": memory.file_bytes,
        "fill": memory.file_bytes / 1500,
        "images": memory.num_images,
        "images_per_class": memory.num_images / 4,
        "seconds": sum(entry["seconds"] for entry in replay.report),
    }
    for name, value in expected.items():
        assert found[f"Memory_{name}/train_phase/train_stream"] == pytest.approx(value)
        assert f"Memory_{name}/train_phase/train_stream" in text.getvalue()
    assert not any("psnr" in name for name in found)
    assert 0 <= found["Memory_called_new/eval_phase/test_stream"] <= 1


def test_learned_memories_have_a_fidelity() -> None:
    replay = HMNReplay(6000, **{**TINY, "beta_grid": (0.5,)})
    found = train(replay, [TextLogger(io.StringIO())], memory_metrics("psnr"))
    psnr = found["Memory_psnr/train_phase/train_stream"]
    assert psnr == replay.report[-1]["warm_start_psnr"] and psnr > 0
    assert not any("bytes" in name for name in found)


def test_a_buffers_memory_is_measured_too() -> None:
    buffer = MemoryBuffer(KeepFirst())
    plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    found = train(plugin, [TextLogger(io.StringIO())], memory_metrics("images", "fill"))
    assert found["Memory_images/train_phase/train_stream"] == 12
    assert "Memory_fill/train_phase/train_stream" not in found  # it has no budget
    assert train(ReplayPlugin(mem_size=9), [TextLogger(io.StringIO())], memory_metrics())


def test_tensorboard_shows_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        logger = TensorboardLogger(tmp_path)
        train(KeepFirst(), [logger], memory_metrics("bytes"))
        logger.writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    values = [event.value for event in events.Scalars("Memory_bytes/train_phase/train_stream")]
    assert len(values) == 2 and 0 < values[0] < values[1]


def test_old_images_that_are_called_new_are_counted() -> None:
    metric = CalledNew()
    stream = labelled_streams((0, 1), (2, 3)).train_stream
    for experience in stream:
        metric.before_training_exp(SimpleNamespace(experience=experience, plugins=[]))
    assert metric.result() is None
    predicted = torch.tensor([0, 2, 3, 1, 2, 0])
    logits = torch.nn.functional.one_hot(predicted, 4).float()
    metric.count(logits, torch.tensor([0, 0, 1, 1, 2, 3]))
    assert metric.result() == 0.5
    metric.count(logits[:1], torch.tensor([1]))
    assert metric.result() == pytest.approx(0.4)
    metric.reset()
    assert metric.result() is None


def test_classes_to_come_are_not_old() -> None:
    evaluator = EvaluationPlugin(memory_metrics("called_new"), loggers=[TextLogger(io.StringIO())])
    strategy = make_strategy([RawReplay(1500)], evaluator=evaluator)
    name, found = "Memory_called_new/eval_phase/test_stream", []
    for experience in streams().train_stream:
        strategy.train(experience)
        found.append(strategy.eval(streams().test_stream).get(name))
    assert found[0] is None and found[1] is not None
    # A memory that was loaded has old classes, too.
    metric, replay = CalledNew(), RawReplay(1500)
    replay.memory = strategy.plugins[0].memory
    first = streams().train_stream[0]
    metric.before_training_exp(SimpleNamespace(experience=first, plugins=[replay]))
    metric.count(torch.eye(4)[[0, 0]], torch.tensor([2, 0]))
    assert metric.result() == 1


def test_the_pieces_of_an_online_experience_are_new_together() -> None:
    metric = CalledNew()
    stream = labelled_streams((0, 1), (2, 3)).train_stream
    new = []
    for piece in in_pieces(stream, 5, access_task_boundaries=True):
        metric.before_training_exp(SimpleNamespace(experience=piece, plugins=[]))
        predicted = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3]), 5).float()
        metric.reset()
        metric.count(predicted, torch.ones(4, dtype=torch.int64))
        new.append(metric.result())
    assert new == [None] * 4 + [new[4], 0.5, 0.5, 0.5], "two of four classes"
    evaluator = EvaluationPlugin(memory_metrics(), loggers=[TextLogger(io.StringIO())])
    strategy = make_strategy([RawReplay(1500)], evaluator=evaluator)
    for piece in in_pieces(streams().train_stream, 5, access_task_boundaries=True):
        strategy.train(piece)
    found = strategy.eval(streams().test_stream)
    assert "Memory_called_new/eval_phase/test_stream" in found


def test_the_memory_of_a_strategys_own_buffer_is_measured() -> None:
    evaluator = EvaluationPlugin(memory_metrics("images"), loggers=[TextLogger(io.StringIO())])
    strategy = make_strategy([], ER_ACE, batch_size_mem=6, evaluator=evaluator)
    strategy.storage_policy = MemoryBuffer(KeepFirst())
    for experience in streams().train_stream:
        strategy.train(experience)
    assert strategy.evaluator.get_last_metrics()["Memory_images/train_phase/train_stream"] == 12


def test_names_are_checked() -> None:
    assert len(memory_metrics()) == len(METRICS) + 1
    with pytest.raises(ConfigError, match=r"metric .*did you mean 'bytes'"):
        memory_metrics("byte")
