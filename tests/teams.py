"""Several processes at one condensation, for ``test_distributed.py``: ``teams.py DIR OPTIONS MTT``.

Torch is imported once, and every process is forked from there: of each scene the processes write
what came of them to ``DIR/SCENE-RANK.pt``. OPTIONS are those of ``condense``, MTT those that make
trajectories match, as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it at its first step
import torch.distributed as dist
from torch import Tensor, nn

from hmn_replay.cli import main
from hmn_replay.condensation.condense import condense
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import load_dataset
from hmn_replay.distributed import ALONE, GradientPart, Team, join
from hmn_replay.errors import HMNReplayError
from hmn_replay.memory import MEMORIES, LearnedMemory, load
from hmn_replay.objectives import OBJECTIVES, gradient_matching
from hmn_replay.runtime import seeded
from hmn_replay.training.train import add_gradients

Work = Callable[[int], Any]

OPTIONS: dict[str, Any] = {}
# With these, how often gradients are summed in the warm start, and for the network after a match.
WARM_STEPS, TRAININGS = 4, 1
COMMAND = [
    *("condense", "--data", "digits", "--budget", "4KiB", "--quiet", "--json"),
    *("--set", "warm_start_steps=3", "--set", "outer_steps=1", "--set", "inner_steps=3"),
    *("--set", "real_batch=4", "--set", "decoded_batch=4", "--set", "network_width=4"),
    *("--set", "network_images=8", "--set", "pruning_passes=16", "--set", "pruning_width=4"),
    *("--set", "trained_networks=0"),
]


def some_data(*labels: int) -> LabelledImages:
    index = torch.arange(36) % len(labels)
    generator = torch.Generator().manual_seed(sum(labels))
    noise = torch.rand(36, 3, 8, 8, generator=generator)
    level = (index + 1) / (len(labels) + 1)
    images = (0.3 * noise + 0.7 * level.view(-1, 1, 1, 1)).mul(255).to(torch.uint8)
    return LabelledImages(images, torch.tensor(labels)[index])


def described(memory: LearnedMemory) -> dict[str, Any]:
    report: dict[str, Any] = memory.report
    return {
        "state": dict(memory.state_dict()),
        "images": memory.decode()[0],
        "psnr": report["warm_start_psnr"],
        "num_images": [phase["images"] for phase in report["phases"].values()],
    }


class Scenes:
    """Forks processes and keeps what came of them, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def play(self, name: str, size: int, work: Work, **environment: str) -> None:
        """Let processes call ``work`` with their rank; what it returns or raises is written."""
        children = []
        for rank in range(size):
            child = os.fork()
            if child:
                children.append(child)
                continue
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(self._act(name, rank, work))
        for child in children:
            os.waitpid(child, 0)

    def wait_for(self, name: str, rank: int) -> None:
        """Wait until a process has come to its end, a minute at most."""
        late = time.monotonic() + 60
        while not (self.folder / f"{name}-{rank}.pt").exists() and time.monotonic() < late:
            time.sleep(0.02)

    def _act(self, name: str, rank: int, work: Work) -> int:
        begun = time.monotonic()
        try:
            outcome = {"result": work(rank)}
        except (HMNReplayError, OSError, KeyboardInterrupt) as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        except BaseException:
            import traceback

            traceback.print_exc()
            return 1
        outcome["seconds"] = time.monotonic() - begun
        torch.save(outcome, self.folder / f"{name}-{rank}.pt")
        return 0

    def team(self, name: str, size: int, work: Work) -> None:
        """Let processes work inside an initialised process group."""

        def together(rank: int) -> Any:
            store = f"file://{self.folder}/{name}.store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            return work(rank)

        self.play(name, size, together)


def at_call(number: int, action: Callable[[], None], timeout_seconds: float = 60.0) -> Team:
    """Join the team, and do something before it sums gradients for the time of that number."""
    team = join(timeout_seconds)
    sum_gradients, calls = team.sum_gradients, [0]

    def watched(parts: Iterable[GradientPart]) -> None:
        calls[0] += 1
        if calls[0] == number:
            action()
        sum_gradients(parts)

    team.sum_gradients = watched  # type: ignore[method-assign]
    return team


def alike(work: Callable[..., Any], *args: Any, **options: Any) -> Work:
    """Let every process do the same."""
    return lambda _: work(*args, **options)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def planned(kind: str, number_format: str, num_classes: int, num_groups: int) -> dict[str, Any]:
    """Return a memory kind's layout, and a budget for so many groups of images."""
    memory_type = MEMORIES[kind]
    assert issubclass(memory_type, LearnedMemory)
    chosen = {"hmn": "4 KiB", "idc": "12 KiB", "haba": "150 KiB"}[kind]
    layout = memory_type.choose_layout(chosen, (3, 8, 8), 5, number_format)
    num_images = num_groups * layout.group_size
    budget = memory_type.file_bytes_of(layout, num_classes, num_images, 9999)
    return {"kind": kind, "layout": layout, "budget": budget}


def new(kind: str = "hmn", number_format: str = "float32", **options: Any) -> dict[str, Any]:
    # Room for five images a class, or for one group of them.
    room = planned(kind, number_format, 3, 15 if kind == "hmn" else 3)
    return described(condense(some_data(0, 1, 2), **{**room, **OPTIONS, **options}))


def grown(path: Path) -> dict[str, Any]:
    # Class 2 comes again, and 3 and 4 are new.
    memory = load(path)
    assert isinstance(memory, LearnedMemory)
    budget = planned("hmn", memory.layout.number_format, 5, 20)["budget"]
    return described(condense(some_data(2, 3, 4), budget, memory=memory, **OPTIONS))


def same_results(scenes: Scenes) -> None:
    folder = scenes.folder
    for number_format in ("float32", "int8", "entropy"):
        first = folder / f"first-{number_format}.hmn"
        room = planned("hmn", number_format, 3, 15)
        condense(some_data(0, 1, 2), **room, **OPTIONS).save(first)
        for size in (1, 2):
            scenes.team(f"new-{number_format}-{size}", size, alike(new, "hmn", number_format))
            if number_format != "float32":
                scenes.team(f"grown-{number_format}-{size}", size, alike(grown, first))
    for size in (1, 2):
        more = {"fidelity": 0.5, "selection": "herding", "trained_passes": 36}
        scenes.team(f"idc-{size}", size, alike(new, "idc", **more))
        scenes.team(f"mtt-{size}", size, alike(new, **json.loads(sys.argv[3])))


def interrupted(scenes: Scenes) -> None:
    path = scenes.folder / "interrupted.checkpoint"

    def ctrl_c(rank: int) -> Any:
        third_match = WARM_STEPS + 2 * (1 + TRAININGS) + 1
        team = at_call(third_match, lambda: send(signal.SIGINT)) if rank == 1 else None
        return new(checkpoint=path, team=team)

    scenes.team("interrupted", 2, ctrl_c)
    for size in (1, 3):
        again = path.with_name(f"resumed-{size}.checkpoint")
        again.write_bytes(path.read_bytes())
        scenes.team(f"resumed-{size}", size, alike(new, checkpoint=again))


def lost(scenes: Scenes) -> None:
    path = scenes.folder / "killed.checkpoint"

    def killed(rank: int) -> Any:
        fourth_match = WARM_STEPS + 3 * (1 + TRAININGS) + 1
        team = at_call(fourth_match, lambda: send(signal.SIGKILL)) if rank == 1 else None
        return new(checkpoint=path, team=team, checkpoint_seconds=0)

    def silent(rank: int) -> Any:
        wait = partial(scenes.wait_for, "silent", 0) if rank == 1 else lambda: None
        return new(team=at_call(2, wait, timeout_seconds=0.5))

    def failing(rank: int) -> Any:
        def full() -> None:
            raise OSError(28, "No space left on device")

        team = at_call(2, full) if rank == 0 else None
        try:
            return new(checkpoint=scenes.folder / "failed.checkpoint", team=team)
        finally:
            if rank == 0:
                scenes.wait_for("failing", 1)  # it has left the team, but lives on

    scenes.team("killed", 2, killed)
    scenes.team("after-killed", 1, alike(new, checkpoint=path))
    scenes.team("silent", 2, silent)
    scenes.team("failing", 2, failing)


def different(scenes: Scenes) -> None:
    scenes.team("different", 2, lambda rank: new(seed=rank))
    scenes.team("each-alone", 2, lambda rank: new(seed=rank, team=ALONE))


def clocks(scenes: Scenes) -> None:
    def by_seconds(rank: int) -> Any:
        ticks = [0.0]

        def monotonic() -> float:
            ticks[0] += 1.0 if rank == 0 else 0.1
            return ticks[0]

        time.monotonic = monotonic
        return new(max_seconds=20.0, outer_steps=9)

    scenes.team("by-seconds", 2, by_seconds)


def messages(scenes: Scenes) -> None:
    def tell(rank: int) -> dict[str, Any]:
        with join() as team:
            given, none, frozen = (nn.Parameter(torch.zeros(4, 2)) for _ in range(3))
            given.grad = torch.full((4, 2), 1.0 + rank)
            if rank == 0:
                none.grad = torch.arange(8.0).view(4, 2)
            team.sum_gradients([(given, torch.tensor([3, 1])), (none, ...)])
            team.sum_gradients([])
            assert given.grad is not None
            assert none.grad is not None
            values = torch.full((3,), float(rank))
            team.copy_first([values, frozen])
            return {
                "rank": (team.rank, team.size, team.first),
                "share": (team.share([5, 6, 7]), team.share(torch.arange(5))),
                "gradients": (given.grad, none.grad, frozen.grad),
                "sum": team.sum(rank, 10.0),
                "agree": team.agree(lambda: {"of": rank}),
                "copied": values,
            }

    scenes.team("messages", 2, tell)
    scenes.team("alone", 1, tell)

    def gradients(_: int) -> dict[str, list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(5, 3, 8, 8, generator=generator)
        labels = torch.tensor([0, 1, 2, 1, 0])
        found = {}
        with join() as team:
            for name, norm in (("group", nn.GroupNorm(4, 4)), ("batch", nn.BatchNorm2d(4))):
                with seeded(0):
                    layers = nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
                network = nn.Sequential(*layers)
                add_gradients(network, images, labels, labels.flip(0), 0.3, team=team)
                parameters = network.parameters()
                found[name] = [p.grad for p in parameters if p.grad is not None]
        return found

    for size in (1, 2):
        scenes.team(f"gradients-{size}", size, gradients)


def commands(scenes: Scenes) -> None:
    def command(out: Path, rank: int) -> tuple[int, str, str]:
        printed, complaints = io.StringIO(), io.StringIO()
        matched = [0]

        def fatal(*batches: Any) -> Tensor:
            matched[0] += 1
            if rank == 1 and matched[0] == 8:  # of 10 classes a step, half are this process's
                send(signal.SIGKILL)
            return gradient_matching(*batches)

        OBJECTIVES.add("fatal", fatal)
        objective = ["--set", "objective=fatal"] if "lost" in out.name else []
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
            code = main([*COMMAND, *objective, "--out", str(out), "--restart"])
        return code, printed.getvalue(), complaints.getvalue()

    load_dataset("digits", "train")  # scikit-learn is imported once, too
    for name in ("command", "lost-command"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        scenes.play(name, 2, partial(command, scenes.folder / f"{name}.hmn"), **meeting)


if __name__ == "__main__":
    torch.set_num_threads(1)
    OPTIONS.update(json.loads(sys.argv[2]))
    all_scenes = Scenes(Path(sys.argv[1]))
    for part in (same_results, interrupted, lost, different, clocks, messages, commands):
        start = time.monotonic()
        part(all_scenes)
        print(f"{part.__name__} {time.monotonic() - start:.1f} s", flush=True)
