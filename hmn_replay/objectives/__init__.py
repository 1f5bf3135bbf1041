"""What is matched: losses between a batch of real and a batch of decoded images on a network.

An objective is a function ``(network, real_images, real_labels, decoded_images, decoded_labels)``
that returns a scalar loss with a graph to ``decoded_images``. It knows nothing of what decoded
them. To add one, register it, or pass it as ``condense(objective=...)``:

    @hmn_replay.OBJECTIVES.register("mean")
    def match_means(network, real_images, real_labels, decoded_images, decoded_labels):
        return (decoded_images.mean(dim=0) - real_images.mean(dim=0)).square().sum()

What else differs from one published loop to the next, :class:`Objective` says of each: a plain
function is an ``Objective`` with its defaults. Trajectory matching (``"mtt"``) is the exception: it
compares whole trainings in place of two batches; see :func:`trajectory_matching`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.objectives.features import block_means, distribution_matching, last_block_matching
from hmn_replay.objectives.gradients import CompiledMatch, cosine_matching, gradient_matching
from hmn_replay.objectives.trajectories import trajectory_matching
from hmn_replay.registry import Registry, check_name, check_takes, name_of
from hmn_replay.training.train import CompiledFunction, checked_loss

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveFunction",
    "cosine_matching",
    "distribution_matching",
    "get_objective",
    "gradient_matching",
    "last_block_matching",
    "trajectory_matching",
]

_ARGUMENTS = ("network", "real_images", "real_labels", "decoded_images", "decoded_labels")

ObjectiveFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss, and what the condensation loop does around it.

    The defaults are those of IDC (Kim et al. 2022), and of a plain function.

    Attributes:
        loss: The objective as a function of network, real images, real labels, decoded images and
            decoded labels, which returns a scalar, 0 or more. None for an objective that compares
            whole trainings, as :func:`trajectory_matching` does.
        augments: Whether real and decoded batches are augmented, both by the same draw.
        learns_from: What the network is trained on after each step: ``"real"`` images,
            ``"decoded"`` images, or ``"nothing"``.
        network_augments: Whether that training augments its images.
        network_cutmix: Whether that training mixes images by CutMix.
        several_classes: Whether a batch may be of several classes, whose losses the function sums
            over; it is then given labels on the CPU. Default: each class has a batch of its own, as
            it has wherever the network normalises by the batch.
        matches_features: Whether the network needs ``features(images)``.
        compiled: Returns the loss with its passes through the network compiled, for one run that is
            long enough to gain by it. Default: None, there is no such thing.
    """

    loss: ObjectiveFunction | None
    augments: bool = True
    learns_from: Literal["real", "decoded", "nothing"] = "real"
    network_augments: bool = True
    network_cutmix: bool = True
    several_classes: bool = False
    matches_features: bool = False
    compiled: Callable[[], ObjectiveFunction] | None = None

    def __post_init__(self) -> None:
        check_name("learns_from", self.learns_from, ("real", "decoded", "nothing"))
        if self.loss is not None:
            check_takes("objective", self.loss, _ARGUMENTS)
        # Messages call it by its function; see name_of.
        object.__setattr__(self, "__wrapped__", self.loss)

    @property
    def name(self) -> str:
        """What reports and checkpoints call it: its function, and what is set beside that."""
        defaults = {each.name: each.default for each in fields(self)}
        own = {name: getattr(self, name) for name in defaults if name not in ("loss", "compiled")}
        given = [f"{name}={value!r}" for name, value in own.items() if value != defaults[name]]
        return name_of(self.loss) + (f"({', '.join(given)})" if given else "")

    @property
    def fresh_network(self) -> bool:
        """Whether every step draws a new network: one that learns nothing serves once."""
        return self.learns_from == "nothing"

    @property
    def compares_trainings(self) -> bool:
        """Whether whole trainings are compared in place of two batches."""
        return self.loss is None

    @property
    def matches_trained(self) -> bool:
        """Whether batches are matched on networks that real images have trained."""
        return self.learns_from == "real" and not self.compares_trainings

    def __call__(
        self,
        network: nn.Module,
        real_images: Tensor,
        real_labels: Tensor,
        decoded_images: Tensor,
        decoded_labels: Tensor,
    ) -> Tensor:
        """Return the loss, and check that it is one.

        Raises:
            ConfigError: The objective compares trainings, or its function returned anything but a
                scalar with a graph to ``decoded_images``.
        """
        if self.loss is None:
            raise ConfigError("this objective compares whole trainings, not batches")
        loss = self.loss(network, real_images, real_labels, decoded_images, decoded_labels)
        name, wanted = name_of(self.loss), "an objective must return a scalar tensor"
        return checked_loss(loss, name, wanted, decoded_images, "decoded_images")


OBJECTIVES: Registry[ObjectiveFunction] = Registry("objective")
"""The objectives by name: of IDC (`gradient`), DC, DSA, DM over all blocks, DM itself, and MTT.

An entry is a function, or an :class:`Objective` that says what the loop does around it.
"""


def _with_compiled_match(loss: Callable[..., Tensor]) -> Callable[[], ObjectiveFunction]:
    return lambda: partial(loss, match=CompiledMatch())


def _with_compiled_means(loss: Callable[..., Tensor]) -> Callable[[], ObjectiveFunction]:
    return lambda: partial(loss, means=CompiledFunction(block_means, image_dims=(1,)))


OBJECTIVES.add(
    "gradient", Objective(gradient_matching, compiled=_with_compiled_match(gradient_matching))
)
OBJECTIVES.add(
    "dc",
    Objective(
        cosine_matching,
        augments=False,
        learns_from="decoded",
        network_augments=False,
        network_cutmix=False,
        compiled=_with_compiled_match(cosine_matching),
    ),
)
OBJECTIVES.add(
    "dsa",
    Objective(
        cosine_matching,
        learns_from="decoded",
        network_cutmix=False,
        compiled=_with_compiled_match(cosine_matching),
    ),
)
OBJECTIVES.add(
    "distribution",
    Objective(
        distribution_matching,
        several_classes=True,
        matches_features=True,
        compiled=_with_compiled_means(distribution_matching),
    ),
)
OBJECTIVES.add(
    "dm",
    Objective(
        last_block_matching,
        learns_from="nothing",
        several_classes=True,
        matches_features=True,
        compiled=_with_compiled_means(last_block_matching),
    ),
)
# Compares a student's training with an expert's: by trajectory_matching, in a step of its own.
OBJECTIVES.add("mtt", Objective(None, learns_from="nothing"))

OBJECTIVES.mark_built_in()


def get_objective(objective: str | ObjectiveFunction) -> Objective:
    """Return the objective of a registered name, or of a function.

    Args:
        objective: A name in :data:`OBJECTIVES`, a function with an objective's arguments, or an
            :class:`Objective`.

    Raises:
        ConfigError: There is none of that name, or it is not callable.
    """
    entry = OBJECTIVES[objective] if isinstance(objective, str) else objective
    if isinstance(entry, Objective):
        return entry
    if not callable(entry):
        raise ConfigError(
            f"objective must be one of {', '.join(OBJECTIVES)}, or a function; got {entry!r}"
        )
    return Objective(entry)
