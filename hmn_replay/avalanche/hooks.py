"""Forward hooks on the network that is trained: what its predecessor and its head say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hmn_replay.errors import ConfigError

__all__ = ["Head", "Teacher", "check_has_head"]


def check_has_head(model: nn.Module) -> None:
    """Raise a ConfigError for a network without a linear layer, which could be its head."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} has no nn.Linear, which would be its head")


class _Watcher:
    """A forward pre-hook that a copy of the module does not take along."""

    hook: RemovableHandle

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _watch_nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _nothing, ()  # what a module is saved with


def _watch_nothing(*call: Any) -> None:
    """In a copy of a module, stand for what watches the module itself."""


def _nothing() -> Callable[..., None]:
    return _watch_nothing


class Teacher(_Watcher):
    """A network as it was, shown what the network is shown now.

    Attributes:
        network: A copy, in evaluation mode, compiled where the network is; it shares what does not
            learn, such as a frozen backbone.
        classes: int64 ``(M,)``, those whose logits are compared.
        hook: Notes what the network is shown; to be removed in the end.
    """

    def __init__(self, model: nn.Module, classes: Tensor) -> None:
        frozen: dict[int, Any] = {
            id(each): each for each in model.parameters() if not each.requires_grad
        }
        self.network, self.classes = copy.deepcopy(model, dict(frozen)).eval(), classes
        self._shared = [
            (module, name, each)
            for module in self.network.modules()
            for name, each in module.named_parameters(recurse=False)
            if id(each) in frozen
        ]
        # A copy of what Module.compile() has compiled is not compiled.
        for module, copied in zip(model.modules(), self.network.modules(), strict=True):
            if module._compiled_call_impl is not None:
                copied.compile(dynamic=True)
        self._shown: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._marked = self._shown
        # After the hooks that are there, which may augment: both see the same images.
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note what the network is shown."""
        self._shown = inputs, options

    def mark(self) -> None:
        """Take what the network was last shown for what is compared."""
        self._marked = self._shown

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return its logits for what was marked."""
        for module, name, shared in self._shared:
            if shared.requires_grad:  # it will learn from the step that follows on
                setattr(module, name, nn.Parameter(shared.detach().clone(), requires_grad=False))
        self._shared = [part for part in self._shared if not part[2].requires_grad]
        inputs, options = self._marked
        logits: Tensor = self.network(*inputs, **options)
        return logits


class Head(_Watcher):
    """A network's head, and the features that it was last given in training."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self._features: Tensor | None = None
        self.hook = head.register_forward_pre_hook(self)

    def __call__(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note the features of a training step."""
        if head.training:
            self._features = inputs[0].detach()

    def logits(self, like: Tensor) -> Tensor:
        """Return the head's logits, without a graph to the features, of the shape of others."""
        features = self._features
        if features is not None:
            logits = self.head.forward(features.to(self.head.weight.dtype))
            if logits.shape == like.shape:
                return logits
        if features is None:
            raise ConfigError(
                'loss="grouped" lets the head alone learn, and the head was not seen at work: code '
                "that torch.compile made before the training does not show it; call "
                'torch.compiler.reset() before, or take loss="separated"'
            )
        raise ConfigError(
            'loss="grouped" lets the head alone learn, and its logits are of another shape than '
            f'{tuple(like.shape)}, that of the strategy\'s; take loss="separated"'
        )
