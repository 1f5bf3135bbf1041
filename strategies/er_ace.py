"""ER-ACE (Caccia et al. 2022): the softmax of new images leaves old classes out.

Avalanche's ``ER_ACE`` over a class-balanced buffer of uint8 pixels, whose labels are not counted,
in its favour. The buffer takes in the images of an experience before they are learnt. Replayed
images go through the model on their own, unseen by plugins: augment in the model, as a forward
pre-hook.
"""

from __future__ import annotations

from avalanche.training.supervised.er_ace import ER_ACE

from strategies.buffers import BalancedBuffer
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Raises:
        ConfigError: ``mode`` is ``"memory_only"``, which it does not have.
        BudgetError: The budget does not hold one image.
    """
    settings.choose()
    settings.refuse_memory_only()
    num_images = settings.num_images()
    strategy = ER_ACE(
        mem_size=num_images, batch_size_mem=settings.batch_size_mem, **settings.common()
    )
    strategy.storage_policy = BalancedBuffer(num_images)
    strategy.storage_policy.batch_size_mem = settings.batch_size_mem
    return strategy
