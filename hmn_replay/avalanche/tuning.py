"""Tuning of a network on class-balanced mini-batches (as in EEIL, Castro et al. 2018)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hmn_replay.avalanche.weights import digests_like, on_cpu, take_weights
from hmn_replay.training.networks import keeping_modes
from hmn_replay.training.train import cosine_lr

__all__ = ["Tuner", "by_class", "draw_balanced"]


class Tuner:
    """Tunes a network when an experience has been trained on, and undoes that for the next.

    Attributes:
        untuned: Weights by name, on the CPU, from before the last tuning, which is not undone yet;
            else None.
        digests: Of the same weights after it, by name.
    """

    def __init__(
        self, untuned: dict[str, Tensor] | None = None, digests: dict[str, str] | None = None
    ) -> None:
        self.untuned, self.digests = untuned, digests or {}

    def tune(
        self,
        model: nn.Module,
        tuned: nn.Module,
        loss: Callable[[int], Tensor],
        *,
        steps: int,
        rate: float,
    ) -> None:
        """Take steps of SGD with momentum 0.9; gradients and modes are as before in the end.

        The network is in training mode meanwhile, but for batch normalisation, whose running
        statistics stay as they are.

        Args:
            model: The network.
            tuned: It, or the module of it that learns.
            loss: The loss of a step, by the step's number.
            steps: How many steps.
            rate: Learning rate at first; it falls to 0 along half a cosine.
        """
        parameters = [each for each in tuned.parameters() if each.requires_grad]
        ids = set(map(id, parameters))
        self.untuned = on_cpu(
            {name: each for name, each in model.named_parameters() if id(each) in ids}
        )
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
        kept = [each.grad for each in parameters]
        try:
            with keeping_modes(model), torch.enable_grad():
                model.train()
                for module in model.modules():
                    module.training = module.training and not isinstance(module, _BatchNorm)
                for step in range(steps):
                    gradients = torch.autograd.grad(loss(step), parameters, allow_unused=True)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, rate)
                    optimizer.step()
        finally:
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.grad = before
            self.digests = digests_like(self.untuned, model)

    @contextlib.contextmanager
    def undone(self, model: nn.Module) -> Iterator[bool]:
        """Give a network its weights from before the tuning, unless it was changed since.

        Where the block raises, it has the tuned ones again, and they can be undone once more.

        Yields:
            False where it was changed, and so goes on as it is.
        """
        untuned, self.untuned = self.untuned, None
        # A head that has grown since is as it was tuned; it has no weights from before.
        now = digests_like(untuned or {}, model)
        is_same = all(self.digests.get(name) == digest for name, digest in now.items())
        tuned = on_cpu({name: each for name, each in model.named_parameters() if name in now})
        if is_same:
            take_weights(model, untuned or {})
        try:
            yield is_same
        except BaseException:
            take_weights(model, tuned)
            self.untuned = untuned
            raise


def by_class(labels: Tensor) -> list[Tensor]:
    """Return the positions of each class's images, int64 ``(n,)`` on the CPU."""
    labels = labels.cpu()
    return [(labels == label).nonzero().flatten() for label in labels.unique().tolist()]


def draw_balanced(by_class: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Draw positions of images, of each class as many or one more, in random order: ``(n,)``."""
    order = torch.randperm(len(by_class), generator=generator).repeat(count // len(by_class) + 1)
    drawn = torch.rand(count, generator=generator, dtype=torch.float32)
    chosen = [
        by_class[index][int(share * len(by_class[index]))]
        for index, share in zip(order[:count].tolist(), drawn.tolist(), strict=True)
    ]
    return torch.stack(chosen)
