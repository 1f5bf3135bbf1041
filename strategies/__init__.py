"""Ready-made Avalanche strategies: HMN replay, and its rivals under as many bytes.

>>> strategy = strategies.build("jpeg", model, 300 * 1024, num_classes=100)  # doctest: +SKIP
>>> for experience in benchmark.train_stream:  # doctest: +SKIP
...     strategy.train(experience)
>>> strategies.memory_use(strategy).num_bytes  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hmn_replay.avalanche.kinds import REPLAY_OPTIONS
from hmn_replay.budget import Budget
from hmn_replay.registry import Registry
from strategies import (
    avalanche_replay,
    derpp,
    er_ace,
    fred,
    gdumb,
    herding,
    hmn,
    joint,
    naive,
    real,
)
from strategies.measures import MemoryUse, memory_images, memory_use, protocol_used
from strategies.settings import Settings, Strategy

if TYPE_CHECKING:
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins.evaluation import EvaluationPlugin

__all__ = [
    "STRATEGIES",
    "MemoryUse",
    "Settings",
    "Strategy",
    "build",
    "memory_images",
    "memory_use",
    "protocol_used",
]

STRATEGIES: Registry[Callable[[Settings], Strategy]] = Registry("strategy")
"""What :func:`build` builds, by name; add a rival of your own as a function of the settings."""

for _name, _build in {
    "naive": naive.build,
    "joint": joint.build,
    "hmn": hmn.build,
    "fred": fred.build,
    "jpeg": real.build_jpeg,
    "lossless": real.build_lossless,
    "subsampled": real.build_subsampled,
    "raw": real.build_raw,
    "herding": herding.build,
    "gdumb": gdumb.build,
    "derpp": derpp.build,
    "er_ace": er_ace.build,
    "avalanche-replay": avalanche_replay.build,
}.items():
    STRATEGIES.add(_name, _build)


def build(
    name: str,
    model: nn.Module,
    budget: Budget | int | str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int = 64,
    batch_size_mem: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    mode: Literal["replay", "memory_only"] = "replay",
    effort: str = "draft",
    expected_classes: int | None = None,
    evaluator: EvaluationPlugin | None = None,
    plugins: Sequence[SupervisedPlugin[Any]] = (),
    progress: bool = True,
    **options: Any,
) -> Strategy:
    """Build an Avalanche strategy whose memory never takes more than a budget.

    All train by SGD and cross-entropy; *our memories*, those of hmn, fred, jpeg, lossless,
    subsampled, raw and herding, under the same replay loss. :func:`protocol_used` says of every
    strategy by which loss it was trained, when its memory was renewed, and how much the previous
    network counted. Experiences give float images in [0, 1] and labels, and task labels too where
    DER++ is to learn from them. Avalanche shuffles and draws from the global generators: seed
    these (``RNGManager.set_random_seeds``) for the same results again.

    Args:
        name: One of :data:`STRATEGIES`.
        model: From images to logits ``(N, num_classes)``. Read ``strategy.model`` afterwards: GDumb
            replaces it.
        budget: What the memory may take, as :class:`hmn_replay.Budget` reads it.
        num_classes: Number of logits.
        image_shape: ``(C, H, W)``.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        batch_size: New images in a step.
        batch_size_mem: Replayed images beside them, fewer where the memory has fewer. Default: as
            many as new ones.
        epochs: Times that the images of an experience are shown.
        seed: Seed of what our memories draw; the others draw from the global generators.
        device: Where to train; ``"auto"`` is CUDA where there is one, else the CPU.
        mode: ``"replay"``, or ``"memory_only"``: from the second experience on the memory is
            renewed before training, and trained on alone. DER++, ER-ACE and Avalanche's replay lack
            the latter; GDumb is always so; naive and joint training have no memory.
        effort: Effort of what hmn and fred condense: ``"draft"``, ``"quick"``, ``"standard"`` or
            ``"paper"``.
        expected_classes: How many classes will come in all, if that is known; for our memories.
        evaluator: Avalanche's metrics and loggers. Default: none.
        plugins: More plugins, called after the strategy's own.
        progress: Whether our memories print a line after each update.
        **options: The strategy's own, named in its module; and those of
            :class:`hmn_replay.MemoryReplay`, such as ``loss``, ``distill`` or ``labels``, which the
            other strategies do not use: GDumb trains on its memory alone, DER++ and ER-ACE have
            losses of their own, and Avalanche's replay has the plain one.

    Raises:
        BudgetError: The budget cannot be read, or does not hold one image. The memories of this
            package raise the latter when an experience begins whose classes it does not hold.
        ConfigError: An unknown name or option, or a value outside its range.
    """
    build_strategy = STRATEGIES[name]
    settings = Settings(
        model=model,
        budget_bytes=Budget.parse(budget).num_bytes,
        num_classes=num_classes,
        image_shape=image_shape,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        batch_size_mem=batch_size if batch_size_mem is None else batch_size_mem,
        epochs=epochs,
        seed=seed,
        device=device,
        mode=mode,
        replay={name: options.pop(name) for name in REPLAY_OPTIONS if name in options},
        effort=effort,
        expected_classes=expected_classes,
        evaluator=evaluator,
        plugins=plugins,
        progress=progress,
        options=options,
    )
    return build_strategy(settings)
