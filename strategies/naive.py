"""Naive fine-tuning: nothing is kept, and old classes are forgotten. The lower bound."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it; it stores nothing, whatever the budget."""
    settings.choose()
    return Naive(**settings.common())
