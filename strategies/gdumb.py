"""GDumb (Prabhu et al. 2020): a balanced memory, and a network trained afresh on it alone.

It is given about as many image passes as a replaying rival: see
:class:`strategies.settings.EqualPasses`.
"""

from __future__ import annotations

from avalanche.training.plugins.gdumb import GDumbPlugin
from avalanche.training.supervised import Naive

from strategies.buffers import BalancedBuffer
from strategies.settings import EqualPasses, Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it; the network of the moment is ``strategy.model``, no longer the caller's.

    Images are stored as uint8 pixels; labels are not counted, in its favour.

    Raises:
        BudgetError: The budget does not hold one image.
    """
    settings.choose()
    plugin = GDumbPlugin(mem_size=settings.num_images())
    plugin.storage_policy = BalancedBuffer(plugin.mem_size)
    return Naive(**settings.common(plugin, EqualPasses(settings)))
