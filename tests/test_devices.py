"""The whole way on the device that there is: a GPU, where there is one, else the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training import Naive
from torch import nn

import hmn_replay
from hmn_replay.condensation.loop import Run
from tests.support import TINY, TINY_MTT, real_set

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {**TINY, "device": DEVICE, "beta_grid": (), "network_width": 4, "over_budget": 0.5}
LABELS = {"teacher_passes": 16, "teacher_width": 4, "labeller_width": 2, "pruning": "order"}

pytestmark = pytest.mark.gpu


def some_images(num_classes: int = 3) -> hmn_replay.LabelledImages:
    return real_set((3, 8, 8), tuple(range(num_classes)), (12,) * num_classes)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hmn", {"fidelity": 0.3, "trained_networks": 2, "trained_passes": 24}),
        ("hmn", {"objective": "gradient", "network_cutmix_probability": 1.0}),
        ("fred", {"objective": "dc", "fidelity": 0.3}),
        ("fred", {"objective": "dm", "pruning": "order"}),
        ("pixels", TINY_MTT),
        ("idc", {"network": "convnet"}),
        ("haba", {"precision": "bfloat16"}),
        ("linba", {}),
        ("hmn", {"labels": "soft", **LABELS}),
        ("fred", {"labels": "labeller", **LABELS}),
    ],
)
@pytest.mark.filterwarnings("ignore:the file fills", "ignore:.*real images for")
def test_condensed_saved_trained_on_and_added_to(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    data, more = some_images(), some_images(5).take(torch.arange(36, 60))
    budget = 200_000 if kind == "haba" else 12_000
    memory = hmn_replay.condense(data, budget, kind=kind, **{**OPTIONS, **options})
    assert memory.classes.device.type == DEVICE
    memory.save(tmp_path / "memory.hmn")
    loaded = hmn_replay.load(tmp_path / "memory.hmn", device=DEVICE)
    assert loaded.decode()[0].equal(memory.decode()[0])
    grown = hmn_replay.condense(more, memory=memory, **{**OPTIONS, **options})
    assert grown.num_classes == 5 and grown.file_bytes <= budget
    config = hmn_replay.TrainingConfig(width=4, num_passes=20)
    _, accuracy = hmn_replay.evaluate(grown, some_images(5), config=config, device=DEVICE)
    assert 0 <= accuracy <= 1


def test_a_run_that_was_interrupted_goes_on_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**OPTIONS, "checkpoint_seconds": 0, "trained_networks": 0}
    path, count = tmp_path / "run", Run._count
    memory = hmn_replay.condense(some_images(), 9000, **options)

    def interrupted(run: Run, num_images: int) -> tuple[bool, bool]:
        is_due, _ = count(run, num_images)
        return is_due, run.state["phase"] == "matching" and run.state["step"] == 3

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_count", interrupted)
        hmn_replay.condense(some_images(), 9000, checkpoint=path, **options)
    again = hmn_replay.condense(some_images(), 9000, checkpoint=path, **options)
    torch.testing.assert_close(again.decode()[0], memory.decode()[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["fred", "jpeg"])
def test_a_replay_memory_draws_there_and_its_state_may_come_from_there(
    kind: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quality": 30}
    if kind == "fred":
        options = {name: value for name, value in OPTIONS.items() if name != "device"}
    replay, again = (
        hmn_replay.ReplayMemory(6000, kind, device=DEVICE, progress=False, **options)
        for _ in range(2)
    )
    data = some_images(4)
    replay.update(data.take(data.labels < 2))
    replay.gather(data.take(data.labels == 2))
    images, labels = replay.sample(5)
    assert (images.device.type, labels.device.type) == (DEVICE, DEVICE)
    decoded = replay.decoded()
    assert replay.decoded(images.device) is decoded is replay.decoded(DEVICE)
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", map_location=DEVICE))
    again.gather(data.take(data.labels == 3))
    assert again.finish() and again.memory is not None and again.memory.num_classes == 4


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize("options", [{}, {"tune": "all", "tune_steps": 2, "labels": "soft"}])
def test_a_stream_is_learned_there(options: dict[str, Any], tmp_path: Path) -> None:
    data: Any = some_images(4)
    benchmark = nc_benchmark(data, data, n_experiences=2, task_labels=False, seed=0)
    model = hmn_replay.build_network("convnet", (3, 8, 8), 4, width=8)
    tiny = {name: value for name, value in OPTIONS.items() if name != "device"}
    replay = hmn_replay.HMNReplay(6000, kind="fred", recode_share=0.5, **options, **tiny)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        device=DEVICE,
        plugins=[replay],
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.eval(benchmark.test_stream)
    assert replay.memory is not None and replay.memory.num_classes == 4
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    replay.load_state_dict(torch.load(tmp_path / "state.pt", map_location=DEVICE))
    strategy.train(benchmark.train_stream[1])
