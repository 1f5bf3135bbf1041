"""Condense a labelled image set into a memory file of a few kilobytes, and train from it.

>>> memory = hmn_replay.condense(train_set, budget="120 KiB", seed=0)  # doctest: +SKIP
>>> memory.save("cifar10.hmn")  # doctest: +SKIP
>>> network, accuracy = hmn_replay.evaluate(memory, test_set, seed=0)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hmn_replay.baselines.fill import (
    jpeg_images,
    lossless_images,
    pq_features,
    raw_features,
    raw_images,
    subsampled_images,
)
from hmn_replay.baselines.scores import scores
from hmn_replay.budget import Budget
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.config import EFFORTS, CondenseConfig
from hmn_replay.condensation.labelling import LabelConfig, label_images, train_teacher
from hmn_replay.condensation.pruning import MarginRecorder, aum, double_ended_prune, margins
from hmn_replay.condensation.selection import SELECTIONS, select_images
from hmn_replay.data.augment import RandomAugmentation, augment_training
from hmn_replay.data.features import LabelledFeatures, as_labelled_features
from hmn_replay.data.images import LabelledImages, as_labelled_images
from hmn_replay.data.sources import DATASETS, load_dataset
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    ExpertError,
    HMNReplayError,
    HMNReplayWarning,
    MemoryFileError,
    MissingExtraError,
    TrainingError,
    UnknownOptionError,
)
from hmn_replay.evaluation import evaluate, labeller_accuracy
from hmn_replay.memory import (
    MEMORIES,
    NUMBER_FORMATS,
    FeatureLayout,
    FeatureMemory,
    HierarchicalMemory,
    HMNLayout,
    JPEGMemory,
    LearnedMemory,
    LosslessMemory,
    Memory,
    MemoryLayout,
    NumberFormat,
    PQMemory,
    RawFeatureMemory,
    RawMemory,
    RealMemory,
    StoredTensor,
    SubsampledMemory,
    load,
    register_memory,
)
from hmn_replay.memory.export import (
    contact_sheet,
    export_dd_ranking,
    export_images,
    export_npz,
)
from hmn_replay.memory.gallery import Gallery, psnr_by_class
from hmn_replay.memory.labels import LABELS
from hmn_replay.objectives import (
    OBJECTIVES,
    Objective,
    cosine_matching,
    distribution_matching,
    gradient_matching,
    last_block_matching,
    trajectory_matching,
)
from hmn_replay.objectives.trajectories import record_experts
from hmn_replay.replay import (
    JPEGKeeper,
    Keeper,
    LearnedKeeper,
    MammothBuffer,
    PQKeeper,
    RealKeeper,
    ReplayMemory,
)
from hmn_replay.shortcut import shortcut_report
from hmn_replay.training.backbones import (
    FeatureClassifier,
    FrozenBackbone,
    extract_features,
    load_backbone,
)
from hmn_replay.training.networks import NETWORKS, build_network, linear_head
from hmn_replay.training.train import TrainingConfig, train_network

if TYPE_CHECKING:
    from hmn_replay.avalanche.buffer import MemoryBuffer
    from hmn_replay.avalanche.kinds import (
        HMNReplay,
        JPEGReplay,
        LosslessReplay,
        RawReplay,
        SubsampledReplay,
    )
    from hmn_replay.avalanche.losses import LOSSES, ReplayStep, label_distillation
    from hmn_replay.avalanche.metrics import memory_metrics
    from hmn_replay.avalanche.plugin import MemoryReplay
    from hmn_replay.avalanche.streams import images_of, split_class_keys

__version__ = "0.1.0"

__all__ = [
    "DATASETS",
    "EFFORTS",
    "LABELS",
    "LOSSES",
    "MEMORIES",
    "NETWORKS",
    "NUMBER_FORMATS",
    "OBJECTIVES",
    "SELECTIONS",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "CondenseConfig",
    "ConfigError",
    "DataError",
    "DistributedError",
    "ExpertError",
    "FeatureClassifier",
    "FeatureLayout",
    "FeatureMemory",
    "FrozenBackbone",
    "Gallery",
    "HMNLayout",
    "HMNReplay",
    "HMNReplayError",
    "HMNReplayWarning",
    "HierarchicalMemory",
    "JPEGKeeper",
    "JPEGMemory",
    "JPEGReplay",
    "Keeper",
    "LabelConfig",
    "LabelledFeatures",
    "LabelledImages",
    "LearnedKeeper",
    "LearnedMemory",
    "LosslessMemory",
    "LosslessReplay",
    "MammothBuffer",
    "MarginRecorder",
    "Memory",
    "MemoryBuffer",
    "MemoryFileError",
    "MemoryLayout",
    "MemoryReplay",
    "MissingExtraError",
    "NumberFormat",
    "Objective",
    "PQKeeper",
    "PQMemory",
    "RandomAugmentation",
    "RawFeatureMemory",
    "RawMemory",
    "RawReplay",
    "RealKeeper",
    "RealMemory",
    "ReplayMemory",
    "ReplayStep",
    "StoredTensor",
    "SubsampledMemory",
    "SubsampledReplay",
    "TrainingConfig",
    "TrainingError",
    "UnknownOptionError",
    "as_labelled_features",
    "as_labelled_images",
    "augment_training",
    "aum",
    "build_network",
    "condense",
    "contact_sheet",
    "cosine_matching",
    "distribution_matching",
    "double_ended_prune",
    "evaluate",
    "export_dd_ranking",
    "export_images",
    "export_npz",
    "extract_features",
    "gradient_matching",
    "images_of",
    "jpeg_images",
    "label_distillation",
    "label_images",
    "labeller_accuracy",
    "last_block_matching",
    "linear_head",
    "load",
    "load_backbone",
    "load_dataset",
    "lossless_images",
    "margins",
    "memory_metrics",
    "pq_features",
    "psnr_by_class",
    "raw_features",
    "raw_images",
    "record_experts",
    "register_memory",
    "scores",
    "select_images",
    "shortcut_report",
    "split_class_keys",
    "subsampled_images",
    "train_network",
    "train_teacher",
    "trajectory_matching",
]

# Importing Avalanche takes seconds, and a gigabyte.
_LAZY = {
    "HMNReplay": "kinds",
    "JPEGReplay": "kinds",
    "LOSSES": "losses",
    "LosslessReplay": "kinds",
    "MemoryBuffer": "buffer",
    "MemoryReplay": "plugin",
    "RawReplay": "kinds",
    "ReplayStep": "losses",
    "SubsampledReplay": "kinds",
    "images_of": "streams",
    "label_distillation": "losses",
    "memory_metrics": "metrics",
    "split_class_keys": "streams",
}


def __getattr__(name: str) -> object:
    """Import what needs Avalanche when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hmn_replay.avalanche.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    """List the names that are imported when they are asked for, too."""
    return sorted({*globals(), *_LAZY})
