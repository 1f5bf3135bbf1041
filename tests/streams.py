"""Small benchmarks of Avalanche, a strategy, and a plugin whose memory is made in no time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
    split_online_stream,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.logging import BaseLogger
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import Dataset

from hmn_replay.avalanche.plugin import MemoryReplay
from hmn_replay.data.images import LabelledImages
from hmn_replay.memory import Memory, RawMemory
from hmn_replay.replay import Keeper

SHAPE = (3, 8, 8)


class Images(Dataset[tuple[object, int]]):
    """Images of noise, brighter from class to class; float tensors in [0, 1]."""

    def __init__(
        self, labels: Sequence[int] = (0, 1, 2, 3), each: int = 10, transform: Any = None
    ) -> None:
        generator = torch.Generator().manual_seed(len(labels))
        self.targets = [label for _ in range(each) for label in labels]
        rank = torch.tensor([list(labels).index(label) for label in self.targets])
        noise = torch.rand(len(rank), *SHAPE, generator=generator)
        level = (rank + 1) / (len(labels) + 1)
        self.pixels = (0.3 * noise + 0.7 * level.view(-1, 1, 1, 1)).mul(255).to(torch.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = self.pixels[index].float().div(255)
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def raw_memory(images: Tensor, labels: Tensor) -> RawMemory:
    """Return real images as a memory, without a budget."""
    memory = RawMemory(images.shape[1:])
    memory.extend(LabelledImages(images, labels))
    return memory


class FirstKeeper(Keeper):
    """Keeps the first images of each class; a class that comes again is replaced."""

    def __init__(self, per_class: int = 3) -> None:
        self.per_class = per_class
        self.given: list[LabelledImages] = []

    def renew(
        self, images: LabelledImages, *, memory: Memory | None, index: int, **_: Any
    ) -> tuple[Memory, dict[str, Any]]:
        self.given.append(images)
        renewed = RawMemory(images.image_shape)
        if memory is not None:
            old = LabelledImages(*memory.decode(dtype=torch.uint8))
            stays = ~torch.isin(old.labels, images.classes)
            if stays.any():
                renewed.extend(old.take(stays))
        kept = [images.of_class(label)[: self.per_class] for label in images.classes.tolist()]
        renewed.extend(images, order=torch.cat(kept))
        return renewed, {"index": index, "draw": float(torch.rand(()))}


class KeepFirst(MemoryReplay):
    """Keeps the first images of each class."""

    memory: Any

    def __init__(self, per_class: int = 3, **options: Any) -> None:
        self.keeper = FirstKeeper(per_class)
        super().__init__(self.keeper, **options)

    @property
    def given(self) -> list[LabelledImages]:
        """What was given to be kept."""
        return self.keeper.given


def streams(kind: str = "nc", data: Images | None = None, num_experiences: int = 2) -> Any:
    """Make a benchmark: ``nc``, ``nc_tasks``, ``ci`` (no task labels) or ``datasets``."""
    data = data or Images()
    if kind.startswith("nc"):
        return nc_benchmark(
            data,
            data,
            n_experiences=num_experiences,
            task_labels=kind == "nc_tasks",
            shuffle=False,
            class_ids_from_zero_in_each_exp=kind == "nc_tasks",
        )
    avalanche_data: Any = as_classification_dataset(data)
    if kind == "ci":
        return class_incremental_benchmark(
            {"train": avalanche_data, "test": avalanche_data},
            num_experiences=num_experiences,
            class_order=sorted(set(data.targets)),
        )
    return benchmark_from_datasets(train=[avalanche_data], test=[avalanche_data])


def labelled_streams(*labels: Sequence[int]) -> Any:
    """Make a benchmark without task labels, with the given labels in each experience."""
    data: list[Any] = [as_classification_dataset(Images(each)) for each in labels]
    return benchmark_from_datasets(train=data)


def make_model(num_classes: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, num_classes)
        )


class Quiet(BaseLogger):
    """Logs nothing; without a logger Avalanche warns."""


def _quiet() -> EvaluationPlugin:
    return EvaluationPlugin(loggers=[Quiet()])  # type: ignore[no-untyped-call]


def make_strategy(plugins: Sequence[Any] = (), kind: type[Any] = Naive, **options: Any) -> Any:
    """Make a strategy with a small model, SGD with momentum and no output."""
    model = options.pop("model", None) or make_model()
    usual: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 8,
        "eval_mb_size": 64,
        "evaluator": _quiet(),
        "plugins": list(plugins),
    }
    return kind(model=model, **{**usual, **options})


def in_pieces(stream: Any, size: int, **options: Any) -> Any:
    """Split a stream's experiences into pieces."""
    return split_online_stream(stream, size, seed=0, **options)


def train(strategy: Any, stream: Any, seed: int = 0, **options: Any) -> None:
    """Train on every experience of a stream, from a given random state."""
    torch.manual_seed(seed)
    for experience in stream:
        strategy.train(experience, **options)


def weights(strategy: Any) -> Tensor:
    """Return all values of a strategy's model in a row."""
    return torch.cat([value.flatten().double() for value in strategy.model.state_dict().values()])
