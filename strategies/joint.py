"""Joint training on the whole stream at once: the upper bound, with no memory and no budget."""

from __future__ import annotations

from avalanche.training.supervised import JointTraining

from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it; call its ``train`` once, with the list of all experiences."""
    settings.choose()
    return JointTraining(**settings.common())
