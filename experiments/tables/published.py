"""The numbers of the papers: test accuracies in percent of ConvNet-3 where no network is named.

All are as Zheng et al. 2024 (arXiv 2310.07506) report them. By images per class (IPC).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

ByIPC: TypeAlias = dict[int, float]

# CIFAR-10. The first five have one loss, IDC's; the others each their own.
CONTAINERS: dict[str, ByIPC] = {
    "hmn": {1: 65.7, 10: 73.7, 50: 76.9},
    "linba": {1: 62.0, 10: 67.8, 50: 70.7},
    "haba": {1: 48.5, 10: 61.8, 50: 72.4},
    "idc": {1: 50.0, 10: 67.5, 50: 74.5},
    "pixels": {1: 36.7, 10: 58.3, 50: 69.5},
    "dc": {1: 28.3, 10: 44.9, 50: 53.9},
    "dsa": {1: 28.8, 10: 52.1, 50: 60.6},
    "dm": {1: 26.0, 10: 48.9, 50: 63.0},
    "mtt": {1: 46.3, 10: 65.3, 50: 71.6},
    "haba-mtt": {1: 48.3, 10: 69.9, 50: 74.0},
    "linba-bptt": {1: 66.4, 10: 71.2, 50: 73.6},
}

# CIFAR-10, condensed with ConvNet-3: memory kind, then the network that is evaluated.
ARCHITECTURES: dict[str, dict[str, ByIPC]] = {
    "hmn": {
        "convnet": CONTAINERS["hmn"],
        "vgg16": {1: 58.5, 10: 64.3, 50: 70.2},
        "resnet18": {1: 56.8, 10: 62.9, 50: 69.1},
        "densenet121": {1: 50.7, 10: 56.9, 50: 65.1},
    },
    "idc": {
        "convnet": CONTAINERS["idc"],
        "vgg16": {1: 28.7, 10: 43.1, 50: 57.9},
    },
}

# Data set, then HMN and the best of all rivals, whatever their loss.
DATASETS: dict[str, dict[str, ByIPC]] = {
    "cifar10": {
        "hmn": CONTAINERS["hmn"],
        "rival": {
            ipc: max(numbers[ipc] for name, numbers in CONTAINERS.items() if name != "hmn")
            for ipc in (1, 10, 50)
        },
    },
    "cifar100": {"hmn": {1: 36.3, 10: 45.4}, "rival": {1: 34.0, 10: 42.9}},
    "svhn": {"hmn": {1: 87.4, 10: 90.0}, "rival": {1: 87.3, 10: 89.1}},
    "tiny_imagenet": {"hmn": {1: 19.4, 10: 24.4}, "rival": {1: 16.0, 10: 23.2}},
    "imagenet10": {"hmn": {1: 64.6}, "rival": {1: 60.4}},
}

# Megabytes of a GPU while condensing CIFAR-10.
MEMORY: dict[str, dict[int, float | str]] = {
    "hmn": {1: 2680, 10: 4540, 50: 10426},
    "haba": {1: 3368, 10: 11148, 50: 48276},
    "linba": dict.fromkeys((1, 10, 50), "out of memory"),
}


def dataset_name(data: str) -> str:
    """Return the name under which a data set is published, from its name, file or folder.

    Example:
        >>> dataset_name("sets/Tiny-ImageNet-200"), dataset_name("cifar-10.npz")
        ('tiny_imagenet', 'cifar10')
    """
    letters = re.sub("[^a-z0-9]", "", Path(data).name.lower().removesuffix(".npz"))
    return "tiny_imagenet" if letters.startswith("tinyimagenet") else letters
