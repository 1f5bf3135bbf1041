"""A tiny stream that is easy to learn, and what builds any strategy for it."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from torch import nn

import strategies
from hmn_replay import LabelledImages, build_network
from hmn_replay.evaluation import score
from hmn_replay.training.train import TrainingConfig

IMAGE_BYTES = 3 * 8 * 8
BUDGET = 24 * IMAGE_BYTES
# What makes a condensation small enough for a test.
OPTIONS: dict[str, dict[str, Any]] = {
    "hmn": {
        "warm_start_steps": 60,
        "outer_steps": 1,
        "inner_steps": 2,
        "real_batch": 4,
        "decoded_batch": 4,
        "network_width": 4,
        "trained_networks": 0,
        "network_images": 8,
        "network_batch": 4,
        "pruning_passes": 20,
        "pruning_width": 4,
        "beta_grid": (0.5,),
    },
    "jpeg": {"training": TrainingConfig(width=4, num_passes=40)},
}
OPTIONS["fred"] = OPTIONS["hmn"]


def easy_set(num_per_class: int = 40, num_classes: int = 6, seed: int = 0) -> LabelledImages:
    """Classes that differ in their colours, under a little noise."""
    colours = torch.rand(num_classes, 3, 2, 2, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(num_classes).repeat(num_per_class)
    images = colours.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)[labels]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return LabelledImages((0.85 * images + 0.15 * noise).mul(255).to(torch.uint8), labels)


def make_stream(num_per_class: int = 40, num_experiences: int = 3) -> list[Any]:
    """Experiences of two classes each, in samples ``(image, label, task label)``."""
    data: Any = easy_set(num_per_class, 2 * num_experiences)
    benchmark = nc_benchmark(
        data,
        data,
        n_experiences=num_experiences,
        task_labels=False,
        shuffle=False,
        fixed_class_order=list(range(2 * num_experiences)),
    )
    return list(benchmark.train_stream)


def make_stream_without_tasks(num_per_class: int = 8) -> list[Any]:
    """Experiences of three classes each, in samples ``(image, label)``."""
    easy: Any = easy_set(num_per_class)
    data: Any = as_classification_dataset(easy)
    benchmark: Any = class_incremental_benchmark(
        {"train": data, "test": data}, num_experiences=2, class_order=list(range(6))
    )
    return list(benchmark.train_stream)


def make_model() -> nn.Module:
    return build_network("convnet", (3, 8, 8), 6, width=8, mean=(0.5,) * 3, std=(0.25,) * 3)


def build(name: str, budget: int | str = BUDGET, **settings: Any) -> Any:
    usual: dict[str, Any] = {
        "num_classes": 6,
        "image_shape": (3, 8, 8),
        "lr": 0.1,
        "batch_size": 8,
        "device": "cpu",
        **OPTIONS.get(name, {}),
    }
    return strategies.build(name, make_model(), budget, **{**usual, **settings})


def accuracy(strategy: Any) -> float:
    test_set = easy_set(20, seed=1)
    return score(strategy.model, test_set.images, test_set.labels)
