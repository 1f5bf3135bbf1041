"""The settings of a condensation, and the efforts that name a whole set of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_serializer

from hmn_replay.condensation.labelling import LabelConfig
from hmn_replay.condensation.pruning import PruningFunction
from hmn_replay.condensation.selection import BY_FEATURES
from hmn_replay.data.augment import STRATEGIES
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.objectives import OBJECTIVES, ObjectiveFunction, get_objective
from hmn_replay.objectives.trajectories import EXPERT_TRAINING
from hmn_replay.registry import check_name, name_of
from hmn_replay.runtime import PRECISIONS
from hmn_replay.settings import check_options, one_of
from hmn_replay.training.networks import NETWORKS, NetworkFactory, is_built_in
from hmn_replay.training.train import MAX_LEARNING_RATE, Compile, TrainingConfig

__all__ = ["EFFORTS", "PRUNINGS", "CondenseConfig", "make_config"]

PRUNINGS = ("aum", "order")
"""Which images are dropped: what ``pruning`` of a :class:`CondenseConfig` takes."""

_AtLeast0 = Annotated[int, Field(ge=0)]
_AtLeast1 = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Seconds = Annotated[float, Field(gt=0)]
# Far beyond what converges, and within what float32 holds.
_LearningRate = Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)]
_Number = Annotated[int, Field(ge=0, le=10_000)]
# In so many seconds of matching, networks train long enough to gain the seconds of compiling.
_WORTH_COMPILING_SECONDS = 300.0
_Augmentation = Annotated[str, one_of("augmentation", STRATEGIES)]


class CondenseConfig(LabelConfig):
    """How a memory is condensed; the defaults are those of ``effort="quick"``.

    A *step* draws some classes, matches a batch of each, and updates the memory once. With
    ``"mtt"``, it lets a student follow an expert, and updates the memory once. Learning rates are
    those of what all images share (in the hierarchical memory: dataset memory, extractors and
    decoder); each memory kind says by which factor its other tensors learn faster, see
    :meth:`hmn_replay.LearnedMemory.parameter_groups`.

    Raises:
        UnknownOptionError: A keyword that is no field.
        ConfigError: A value of another type, or outside its range.
    """

    catalogue = "the command 'hmn-replay options' lists the settings"

    number_format: Annotated[str, one_of("number format", NUMBER_FORMATS)] | None = None
    """How values are stored, by name. Default: the memory kind's own, entropy-coded for hmn and
    fred."""

    image_bytes: Annotated[int, Field(ge=1)] | None = None
    """Bytes planned for an image's own values, where these are entropy-coded: more bytes for fewer
    and better images. Less is taken where five images of a class would not fit, more where there
    are fewer real images than would. A memory that is added to keeps its own. None for the memory
    kind's choice: of hmn and fred, 1.73 times the root of an image's number of values."""

    objective: Annotated[str | ObjectiveFunction, one_of("objective", OBJECTIVES)] = "distribution"
    """What is matched: a registered name, or a function like those of `hmn_replay.objectives`; see
    hmn_replay.objectives.Objective for what it decides beside."""

    selection: Annotated[str, one_of("selection", ("random", *BY_FEATURES))] = "random"
    """Which real images the memory begins as and is filled up with: random; or herding or
    k-centre, by the features of a network that learned from them: the first of trained_networks or
    of the experts, or where others are matched on, or none, one that is trained alike."""

    warm_start_steps: _AtLeast0 = 1000
    """Steps of fitting the memory to real images before matching; 0 for none."""

    warm_start_batch: _AtLeast1 = 256
    """Images in a step of the warm start."""

    warm_start_learning_rate: _LearningRate = 0.01
    """Learning rate of the warm start's Adam, at first; it falls to 0 along half a cosine."""

    warm_start_seconds: _Seconds | None = None
    """Seconds after which the warm start ends, its learning rate brought down to 0;
    warm_start_steps still bounds it. None for no bound."""

    outer_steps: _AtLeast0 = 40
    """How many networks are drawn one after another to match with; 0 for no matching."""

    inner_steps: _AtLeast0 = 10
    """Steps of matching with each network."""

    classes_per_step: _AtLeast1 | None = 10
    """Classes drawn in a step; None for all."""

    real_batch: _AtLeast1 = 64
    """Real images of each drawn class."""

    decoded_batch: _AtLeast1 = 64
    """Decoded images of each drawn class, at most."""

    memory_learning_rate: _LearningRate = 0.003
    """Learning rate of matching's Adam, at first; it falls to 0 along half a cosine."""

    fidelity: Annotated[float, Field(ge=0, le=1000)] | None = None
    """How much decoded images stay, while they are matched, like the real ones that the warm start
    fitted them to: the weight w of log d + w log e, for the objective's distance d and the mean
    squared error e to these. A network that learns from the memory alone learns most with 0; one
    that learns from real images beside it, as in a stream, gains by more. Default: 0, in a stream
    0.3."""

    augmentations: tuple[_Augmentation, ...] = ("color", "crop", "cutout")
    """Augmentations, drawn once for each class and step, for real and decoded images alike; of
    experts and students, for every image."""

    max_seconds: _Seconds | None = None
    """Seconds after which matching ends, those of all that comes before it counted, its learning
    rate brought down to 0; outer_steps still bounds it. The result then depends on the machine's
    speed. None for no bound."""

    network: Annotated[
        tuple[Annotated[str | NetworkFactory, one_of("network", NETWORKS)], ...],
        Field(min_length=1),
    ] = ("convnet",)
    """Architecture to match with: a registered name, or a function from image shape and number of
    classes to a module; several take turns, one for each outer step, and pruning trains the
    first."""

    network_width: _AtLeast1 = 32
    """Channels of a matched ConvNet's blocks."""

    trained_networks: _Number = 3
    """How many networks are trained on real images before matching, where the objective's networks
    learn from these, as those of "gradient" and "distribution" do. Every inner_steps steps, one of
    them is drawn, and a point between its initial and its trained weights. 0 for random networks
    that learn network_images images after each step, as in IDC."""

    trained_passes: _AtLeast1 = 200_000
    """Images that each of trained_networks is shown in all, rounded to whole epochs, 10 at most."""

    network_images: _AtLeast0 = 512
    """Images that a random network learns from after each step; 0 for none."""

    network_batch: Annotated[int, Field(ge=2)] = 64
    """Batch size of the matched networks' training."""

    network_learning_rate: _LearningRate = 0.01
    """Learning rate of the matched networks' SGD (momentum 0.9, weight decay 5e-4), at first where
    they are trained before matching: it then falls to 0 along half a cosine."""

    network_cutmix_probability: _Share = 0.5
    """Probability that a training batch of the matched networks is mixed by CutMix."""

    experts: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")] | None = None
    """Folder of the networks that are trained on real images before matching: trained_networks, or
    the expert trajectories that "mtt" follows. Missing ones are trained; those that are there serve
    every run with the same seed, settings of their training and real images. None for NAME.experts
    beside the checkpoint, or without one, for a temporary folder."""

    num_experts: Annotated[int, Field(ge=1, le=10_000)] = 4
    """How many experts "mtt" follows; those of network take turns. Other objectives read no setting
    with "expert" or "student" in its name from here on."""

    expert_images: _AtLeast1 | None = 4096
    """Real images that an expert sees in an epoch; None for all."""

    expert_batch: Annotated[int, Field(ge=2)] = 64
    """Batch size of an expert's training."""

    expert_learning_rate: _LearningRate = 0.01
    """Learning rate of an expert's SGD, which has neither momentum nor a schedule."""

    expert_epochs: _AtLeast1 = 2
    """How many epochs after its start an expert's parameters are the student's target."""

    max_start_epoch: _AtLeast0 = 3
    """The last epoch of an expert that a student starts at; one is drawn for every step."""

    student_steps: _AtLeast1 = 10
    """Steps of a student on decoded images, in one step of the memory."""

    student_batch: _AtLeast1 = 64
    """Decoded images in a step of a student, at most, of all classes that are condensed."""

    student_learning_rate: _LearningRate = 0.02
    """Learning rate of a student's SGD, at first; it is learned beside the memory."""

    student_rate_learning_rate: Annotated[float, Field(ge=0, le=MAX_LEARNING_RATE)] = 0.05
    """Learning rate of the Adam that learns the logarithm of the student's; 0 to leave it."""

    over_budget: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Share of images condensed beyond what fits, and pruned in the end."""

    pruning: Annotated[str | PruningFunction, one_of("pruning", PRUNINGS)] = "aum"
    """Which images of a class are dropped, of those beyond what fits or when classes are added:
    aum, those of highest and lowest area under the margin (Zheng et al. 2024); order, the last; or
    those of highest and lowest score by a function, see
    hmn_replay.condensation.pruning.PruningFunction. With order, batches are matched of the first
    images of a class alone, of a number drawn for each batch, from as many as the class will have
    with all expected classes to all it has: however many stay in the end have then been matched
    together."""

    beta: _Share = 0.5
    """Share of hard images among those that are pruned; the others are easy ones."""

    beta_grid: tuple[_Share, ...] = ()
    """Values of beta to try instead: of each, a network is trained on the images that would stay,
    and the best one on held-out real images is taken. A choice costs a training for each; their
    accuracies often differ by less than those of two seeds. Empty for no search."""

    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the real images kept back to choose beta by; none are without beta_grid."""

    pruning_passes: _AtLeast1 = 10_000
    """Images that each network of the pruning is shown in all."""

    pruning_width: _AtLeast1 = 32
    """Channels of a pruning ConvNet's blocks."""

    pruning_augmentations: tuple[_Augmentation, ...] = ("color", "crop", "flip", "scale", "rotate")
    """Augmentations of the pruning networks' training, which mixes batches as often as
    network_cutmix_probability says."""

    precision: Annotated[str, one_of("precision", PRECISIONS)] = "auto"
    """Precision of decoder and networks: float32, bfloat16 (autocast), or auto for bfloat16 just
    where the processor multiplies it natively."""

    compile: Compile = "auto"
    """Whether training steps of matched networks, experts and pruning networks are compiled by
    torch.compile: True, False, or auto; see TrainingConfig. With auto, those of matched networks
    are not where the networks differ in architecture or max_seconds is below 300; of networks that
    were given, ConvNets are. Where classes are added, those that are expected count as well."""

    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints; 0 for one after every step. It does not change the result."""

    @field_serializer("objective")
    def _named_objective(self, objective: Any) -> str:
        """Return a function by its name, so that reports have JSON's types."""
        return objective if isinstance(objective, str) else get_objective(objective).name

    @field_serializer("pruning")
    def _named_pruning(self, pruning: Any) -> str:
        return name_of(pruning)

    @field_serializer("network")
    def _named_networks(self, networks: Any) -> tuple[str, ...]:
        return tuple(map(name_of, networks))

    @property
    def draws_globally(self) -> bool:
        """Whether anything that is run is a user's own, which may draw as it likes."""
        is_ours = all(map(is_built_in, self.network)) and not callable(self.pruning)
        return not (is_ours and OBJECTIVES.is_built_in(self.objective))

    @property
    def num_steps(self) -> int:
        """How many steps of matching there are."""
        return self.outer_steps * self.inner_steps

    @property
    def network_training(self) -> TrainingConfig:
        """What the matched networks' training has in common with others."""
        is_short = self.max_seconds is not None and self.max_seconds < _WORTH_COMPILING_SECONDS
        is_eager = is_short or any(each != self.network[0] for each in self.network)
        return TrainingConfig(
            network=self.network[0],
            width=self.network_width,
            precision=self.precision,
            compile=False if self.compile == "auto" and is_eager else self.compile,
        )

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
            compile=self.compile,
        )

    @property
    def pool_training(self) -> TrainingConfig:
        """The training of trained_networks, but for their architectures and number of epochs."""
        return TrainingConfig(
            width=self.network_width,
            epoch_images=self.trained_passes,
            batch_size=self.network_batch,
            learning_rate=self.network_learning_rate,
            cutmix_probability=self.network_cutmix_probability,
            augmentations=self.augmentations,
            precision=self.precision,
            compile=self.compile,
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
            compile=self.compile,
        )


EFFORTS: dict[str, dict[str, Any]] = {
    "draft": {
        "warm_start_steps": 400,
        "outer_steps": 5,
        "trained_networks": 2,
        "trained_passes": 10_000,
        "pruning": "order",
        "pruning_passes": 5000,
    },
    "quick": {},
    "standard": {
        "warm_start_steps": 3000,
        "outer_steps": 300,
        "pruning_passes": 20_000,
        "pruning_width": 64,
    },
    "paper": {
        "number_format": "float32",
        "objective": "gradient",
        "warm_start_steps": 1500,
        "outer_steps": 2000,
        "inner_steps": 100,
        "classes_per_step": None,
        "decoded_batch": 128,
        "memory_learning_rate": 0.001,
        "network_width": 128,
        "trained_networks": 0,
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
        "pruning_passes": 100_000,
        "pruning_width": 128,
    },
}
"""For each effort, the fields of :class:`CondenseConfig` that differ from their defaults."""


def make_config(effort: str = "quick", **options: Any) -> CondenseConfig:
    """Return the settings of an effort, with some of them replaced.

    Args:
        effort: ``"draft"``, ``"quick"``, ``"standard"`` or ``"paper"``.
        **options: Fields of :class:`CondenseConfig` by name. ``beta`` and ``beta_grid`` are for
            pruning by AUM, and ask for it.

    Raises:
        ConfigError: No such effort, or a value outside its range.
        UnknownOptionError: No such field; also a TypeError.
    """
    check_name("effort", effort, EFFORTS)
    check_options(
        "condense", options, CondenseConfig.model_fields, catalogue=CondenseConfig.catalogue
    )
    settings = {**EFFORTS[effort], **options}
    if {"beta", "beta_grid"} & options.keys() and "pruning" not in options:
        settings["pruning"] = "aum"
    return CondenseConfig(**settings)
