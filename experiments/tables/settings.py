"""What ``--scale`` stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Where seconds bound a phase, steps do not.
UNBOUNDED = 10**6


@dataclass(frozen=True)
class Settings:
    """How every memory of a table is made and scored.

    Attributes:
        effort: Of :func:`hmn_replay.condense`.
        seconds: Of condensing one memory, at most half of them for its warm start; None for the
            effort's numbers of steps.
        over_budget: Share of HMN's images condensed beyond the budget, and pruned in the end.
        width: Channels of ConvNet's blocks in evaluation.
        passes: Images that an evaluated network is shown; None for as many as in IDC's evaluation.
        most_passes: Of those of IDC's evaluation, the most; None for all of them.
        selection_epochs: On all real images, of the networks that some are chosen by.
        ipc: Budgets, in images a class of float32.
        seeds: One condensation each.
        trainings: Evaluated networks for each condensation.
        number_format: How learned values are stored.
        options: Other options of :func:`hmn_replay.condense`, for every memory kind.
        device: Where everything is computed.
    """

    effort: str
    seconds: float | None
    over_budget: float
    width: int
    passes: int | None
    selection_epochs: int
    ipc: tuple[int, ...]
    seeds: tuple[int, ...]
    trainings: int
    most_passes: int | None = None
    number_format: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"

    def condensation(self, kind: str) -> dict[str, Any]:
        """Return the options of :func:`hmn_replay.condense` for a memory kind."""
        options: dict[str, Any] = {"effort": self.effort, "over_budget": 0.0}
        options["objective"] = "gradient"  # the paper's, for every memory kind
        if kind == "hmn":
            options["over_budget"] = self.over_budget
        if self.seconds is not None:
            options |= {"max_seconds": self.seconds, "warm_start_seconds": self.seconds / 2}
            options |= dict.fromkeys(("outer_steps", "warm_start_steps"), UNBOUNDED)
        return options | self.options


SCALES = {
    "quick": Settings(
        effort="quick",
        seconds=60,
        over_budget=0.0,
        width=32,
        passes=20_000,
        selection_epochs=2,
        ipc=(1, 10),
        seeds=(0,),
        trainings=2,
    ),
    "standard": Settings(
        effort="standard",
        seconds=600,
        over_budget=0.0,
        width=64,
        passes=None,
        most_passes=120_000,
        selection_epochs=10,
        ipc=(1, 10),
        seeds=(0,),
        trainings=3,
    ),
    "paper": Settings(
        effort="paper",
        seconds=None,
        over_budget=0.1,
        width=128,
        passes=None,
        selection_epochs=200,
        ipc=(1, 10, 50),
        seeds=(0, 1, 2),
        trainings=10,
    ),
}
