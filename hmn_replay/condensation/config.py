"""The settings of a condensation, and the three efforts that name a whole set of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hmn_replay.condensation.options import convert, convert_fields
from hmn_replay.data.augment import STRATEGIES
from hmn_replay.errors import ConfigError
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.objectives import OBJECTIVES
from hmn_replay.objectives.trajectories import EXPERT_TRAINING
from hmn_replay.runtime import PRECISIONS
from hmn_replay.training.networks import NETWORKS
from hmn_replay.training.train import TrainingConfig

__all__ = ["EFFORTS", "CondenseConfig", "make_config", "parse_option"]

_AT_LEAST_0 = (
    *("warm_start_steps", "outer_steps", "inner_steps", "network_images", "max_start_epoch"),
)
_AT_LEAST_1 = (
    *("warm_start_batch", "real_batch", "decoded_batch", "network_width", "network_batch"),
    *("num_experts", "expert_epochs", "student_steps", "student_batch"),
    *("pruning_passes", "pruning_width"),
)
_RATES = (
    *("warm_start_learning_rate", "memory_learning_rate", "network_learning_rate"),
    *("expert_learning_rate", "student_learning_rate"),
)


@dataclass(frozen=True)
class CondenseConfig:
    """How a memory is condensed; the defaults are those of ``effort="quick"``.

    A *step* draws some classes, matches a batch of each and moves the memory once. Of ``"mtt"``, it
    lets a student follow an expert, and moves the memory once.

    Attributes:
        number_format: How values are stored: ``"float32"``, ``"float16"``, ``"int8"`` or
            ``"entropy"``; see :mod:`hmn_replay.memory.formats`.
        objective: ``"gradient"`` (IDC's), ``"distribution"``, ``"dc"``, ``"dsa"``, ``"dm"`` or
            ``"mtt"``; see :data:`hmn_replay.objectives.OBJECTIVES`, which tells, too, whether both
            batches are augmented, and what the network learns from between steps.
        warm_start_steps: Steps of fitting the memory to real images before matching; 0 for none.
        warm_start_batch: Images a step of the warm start.
        warm_start_learning_rate: Of Adam, for extractors, decoder and dataset memory; class and
            instance memories take 10 times that, and 30 times where new classes come to a memory.
        warm_start_seconds: Seconds after which the warm start ends, as ``max_seconds`` ends
            matching. ``warm_start_steps`` still bounds it. Default: None, no bound.
        outer_steps: How many random networks are drawn one after another; 0 for no matching.
        inner_steps: Steps with each of them.
        classes_per_step: Classes drawn in a step; None for all.
        real_batch: Real images of each drawn class.
        decoded_batch: Decoded images of each drawn class, at most.
        memory_learning_rate: Of Adam, for extractors, decoder and dataset memory while matching;
            class and instance memories take 10 times that.
        augmentations: Drawn once a class and step, for real and decoded images alike; of experts
            and students, for every image.
        max_seconds: Seconds after which matching ends, those of the warm start counted; the
            learning rate has then come down to 0. ``outer_steps`` still bounds it. The result then
            depends on the machine's speed. Those of recording experts are counted too; experts
            that are there already cost none. Default: None, no bound.
        network: One of :data:`hmn_replay.training.networks.NETWORKS`, or several to be drawn in turn, one an
            outer step; pruning trains the first.
        network_width: Channels of ConvNet's blocks.
        network_images: Images that the network learns from after each step; 0 for none.
        network_batch: Batch size of that training.
        network_learning_rate: Of its SGD (momentum 0.9, weight decay 5e-4).
        network_cutmix_probability: That a batch of it is mixed by CutMix.
        experts: The folder of the expert trajectories that ``"mtt"`` is after; other objectives
            read neither it nor what has "expert" or "student" in its name below. Experts that are
            missing are recorded; those that are there serve every run with the same seed, settings
            of experts and real images, those not kept back. Default: None, ``NAME.experts`` beside
            the checkpoint; without one, a temporary folder.
        num_experts: How many networks are trained on real images; ``network`` in turn.
        expert_images: Real images that an expert sees in an epoch; None for all.
        expert_batch: Batch size of that training.
        expert_learning_rate: Of its SGD, which has neither momentum nor a schedule.
        expert_epochs: How many epochs after its start a student's goal is.
        max_start_epoch: The last epoch of an expert that a student starts at; one is drawn for
            every step. So many epochs are recorded, and ``expert_epochs`` more.
        student_steps: Steps of a student on decoded images, in one step of the memory.
        student_batch: Decoded images of each, at most, of all classes that are condensed.
        student_learning_rate: Of a student's SGD, at first; it is learned beside the memory.
        student_rate_learning_rate: Of the Adam that learns its logarithm; 0 to leave it.
        over_budget: Share of instance memories condensed beyond what fits, and pruned in the end.
        beta_grid: Shares of hard images among the pruned that are tried; one alone is just taken.
        holdout: Share of the real images kept back to choose beta by.
        pruning_passes: Images that each network of the pruning is shown in all.
        pruning_width: Channels of its ConvNet's blocks.
        pruning_augmentations: Of those networks' training, which mixes batches as often as
            ``network_cutmix_probability`` says.
        precision: ``"float32"``; ``"bfloat16"`` for autocast in the decoder and the networks, two
            to three times faster where the processor multiplies it natively; ``"auto"`` for
            bfloat16 just there.

    Raises:
        ConfigError: A value outside its range.
    """

    number_format: str | None = None
    objective: str = "gradient"
    warm_start_steps: int = 1500
    warm_start_batch: int = 256
    warm_start_learning_rate: float = 0.01
    warm_start_seconds: float | None = None
    outer_steps: int = 10
    inner_steps: int = 10
    classes_per_step: int | None = 10
    real_batch: int = 64
    decoded_batch: int = 96
    memory_learning_rate: float = 0.001
    augmentations: tuple[str, ...] = ("color", "crop", "cutout")
    max_seconds: float | None = None
    network: tuple[str, ...] = ("convnet",)
    network_width: int = 32
    network_images: int = 512
    network_batch: int = 64
    network_learning_rate: float = 0.01
    network_cutmix_probability: float = 0.5
    experts: str | None = None
    num_experts: int = 4
    expert_images: int | None = 4096
    expert_batch: int = 64
    expert_learning_rate: float = 0.01
    expert_epochs: int = 2
    max_start_epoch: int = 3
    student_steps: int = 10
    student_batch: int = 64
    student_learning_rate: float = 0.02
    student_rate_learning_rate: float = 0.05
    over_budget: float = 0.1
    beta_grid: tuple[float, ...] = (0.0, 0.5, 1.0)
    holdout: float = 0.1
    pruning_passes: int = 10_000
    pruning_width: int = 32
    pruning_augmentations: tuple[str, ...] = ("color", "crop", "flip", "scale", "rotate")
    precision: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.network, str):
            object.__setattr__(self, "network", (self.network,))
        convert_fields(self)
        requirements = {
            "number_format": (
                self.number_format in (None, *NUMBER_FORMATS),
                f"None or one of {list(NUMBER_FORMATS)}",
            ),
            "objective": (self.objective in OBJECTIVES, f"one of {tuple(OBJECTIVES)}"),
            "network": (
                len(self.network) > 0 and set(self.network) <= set(NETWORKS),
                f"one of {NETWORKS}, or several",
            ),
            "precision": (self.precision in PRECISIONS, f"one of {PRECISIONS}"),
            "over_budget": (0 <= self.over_budget <= 10, "in [0, 10]"),
            "holdout": (0 < self.holdout <= 0.5, "in (0, 0.5]"),
            "network_cutmix_probability": (0 <= self.network_cutmix_probability <= 1, "in [0, 1]"),
            "beta_grid": (
                len(self.beta_grid) > 0 and all(0 <= beta <= 1 for beta in self.beta_grid),
                "one number in [0, 1], or several",
            ),
            "expert_batch": (self.expert_batch >= 2, "2 or more"),
            "experts": (self.experts != "", "None, or the name of a folder"),
            "student_rate_learning_rate": (
                0 <= self.student_rate_learning_rate < math.inf,
                "0 or more and finite",
            ),
        }
        for name in ("classes_per_step", "expert_images"):
            count = getattr(self, name)
            requirements[name] = (count is None or count >= 1, "None, or 1 or more")
        for name in ("warm_start_seconds", "max_seconds"):
            seconds = getattr(self, name)
            requirements[name] = (
                seconds is None or 0 < seconds < math.inf,
                "None, or above 0 and finite",
            )
        for name in ("augmentations", "pruning_augmentations"):
            requirements[name] = (
                set(getattr(self, name)) <= set(STRATEGIES),
                f"among {STRATEGIES}",
            )
        for name in _AT_LEAST_0:
            requirements[name] = (getattr(self, name) >= 0, "0 or more")
        for name in _AT_LEAST_1:
            requirements[name] = (getattr(self, name) >= 1, "1 or more")
        for name in _RATES:
            requirements[name] = (0 < getattr(self, name) < math.inf, "above 0 and finite")
        for name, (met, wanted) in requirements.items():
            if not met:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def num_steps(self) -> int:
        """How many steps of matching there are."""
        return self.outer_steps * self.inner_steps

    @property
    def pruning_training(self) -> TrainingConfig:
        """The training that AUM and beta come from."""
        return TrainingConfig(
            network=self.network[0],
            width=self.pruning_width,
            num_passes=self.pruning_passes,
            augmentations=self.pruning_augmentations,
            cutmix_probability=self.network_cutmix_probability,
            precision=self.precision,
        )

    @property
    def expert_training(self) -> TrainingConfig:
        """The training of experts, but for their architectures and number of epochs."""
        return EXPERT_TRAINING.replace(
            width=self.network_width,
            epoch_images=self.expert_images,
            batch_size=self.expert_batch,
            learning_rate=self.expert_learning_rate,
            augmentations=self.augmentations,
            precision=self.precision,
        )


EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {},
    "standard": {
        "warm_start_steps": 3000,
        "outer_steps": 60,
        "inner_steps": 20,
        "beta_grid": (0.0, 0.25, 0.5, 0.75, 1.0),
        "pruning_passes": 20_000,
        "pruning_width": 64,
    },
    "paper": {
        "number_format": "float32",
        "outer_steps": 2000,
        "inner_steps": 100,
        "classes_per_step": None,
        "decoded_batch": 128,
        "network_width": 128,
        "network_images": 2000,
        # MTT's for CIFAR-10 at 10 images a class; it takes 5,000 steps in all: outer_steps=50.
        "num_experts": 100,
        "expert_images": None,
        "expert_batch": 256,
        "expert_epochs": 2,
        "max_start_epoch": 20,
        "student_steps": 30,
        "student_batch": 100,
        "student_learning_rate": 0.01,
        "beta_grid": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "pruning_passes": 100_000,
        "pruning_width": 128,
    },
}


def make_config(effort: str = "quick", **options: Any) -> CondenseConfig:
    """Return the settings of an effort, with some of them replaced.

    Args:
        effort: ``"quick"``, ``"standard"`` or ``"paper"``.
        **options: Fields of :class:`CondenseConfig` by name.

    Raises:
        ConfigError: No such effort or field, or a value outside its range.
    """
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise ConfigError(f"effort is one of {', '.join(EFFORTS)}; got {effort!r}")
    for name in options:
        _field_type(name)
    return CondenseConfig(**{**EFFORTS[effort], **options})


def parse_option(name: str, text: str) -> Any:
    """Read the value of a :class:`CondenseConfig` field as a person would type it.

    Args:
        name: A field's name.
        text: ``"3"``, ``"0.5"``, ``"none"``, a word, or a list apart by commas.

    Raises:
        ConfigError: No such field, or a text that is not a value of its type.
    """
    kind = _field_type(name)
    if text.lower() == "none":
        return convert(name, None, kind)
    if kind.startswith("tuple"):
        return convert(name, tuple(_literal(word) for word in text.split(",") if word), kind)
    return convert(name, text if kind.startswith("str") else _literal(text), kind)


def _literal(text: str) -> int | float | str:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text.strip()


def _field_type(name: str) -> str:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(CondenseConfig)}
    if name not in kinds:
        raise ConfigError(f"there is no option {name!r}; there are {', '.join(kinds)}")
    return kinds[name]
