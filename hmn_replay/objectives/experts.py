"""Expert trajectories: networks trained on real images, kept on disk as they were at every epoch.

They are what :mod:`hmn_replay.objectives.trajectories` compares students with. A safetensors file holds one
expert, from its random values to its last epoch, and is read an epoch at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hmn_replay.data.lookup import Images
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import ExpertError
from hmn_replay.files import digest_tensors, write_atomically
from hmn_replay.runtime import derive_seed
from hmn_replay.training.networks import Network
from hmn_replay.training.train import TrainingConfig, make_network, train_network

__all__ = ["EXPERT_TRAINING", "Experts", "experts_beside", "record_experts"]

_KEY = "hmn_replay_expert"

EXPERT_TRAINING = TrainingConfig(
    batch_size=256,
    schedule="constant",
    momentum=0.0,
    weight_decay=0.0,
    cutmix_probability=0.0,
    augmentations=("color", "crop", "cutout", "flip", "scale", "rotate"),
)
"""How MTT's code trains experts (Cazenavette et al. 2022): plain SGD, which students can follow."""


def record_experts(
    folder: str | Path,
    images: Images,
    class_indices: Tensor,
    num_classes: int,
    *,
    num_experts: int = 100,
    num_epochs: int = 50,
    networks: Sequence[str] = ("convnet",),
    config: TrainingConfig = EXPERT_TRAINING,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Experts:
    """Train networks on real images, and keep their parameters at every epoch.

    An expert that is there already is not trained again. Each is written when it is done, all at
    once or not at all, so a recording that was stopped goes on with those that are missing. The
    defaults are those of MTT (Cazenavette et al. 2022, arXiv 2203.11932).

    Args:
        folder: Where the files are, ``expert-0000.safetensors`` and so on; made where it is absent.
            A file has ``num_epochs + 1`` times the bytes of the network's float32 parameters, and
            takes twice that of memory until it is written.
        images: float in [0, 1] or uint8, ``(N, C, H, W)``, on the CPU.
        class_indices: int64 ``(N,)`` in [0, num_classes), on the CPU.
        num_classes: Number of logits.
        num_experts: How many experts; a folder may have more.
        num_epochs: Epochs of each; those in a folder may have more.
        networks: Architectures, which the experts have in turn.
        config: Their training. ``network`` and ``num_passes`` are not read; with ``epoch_images``,
            an epoch shows so many images.
        seed: Expert k of a seed is the same, however many there are.
        device: Where to train. Default: the best device present.

    Returns:
        The experts, to read from.

    Raises:
        ExpertError: The folder has experts of other data or settings, or a damaged file.
        TrainingError: A training left the real numbers.
        OSError: The folder cannot be written to.
    """
    experts = Experts(
        folder,
        images,
        class_indices,
        num_classes,
        num_experts=num_experts,
        num_epochs=num_epochs,
        networks=networks,
        config=config,
        seed=seed,
    )
    for number in experts.missing():
        experts.record(number, device)
    return experts


def experts_beside(checkpoint: str | Path) -> Path:
    """Return the folder of the experts that belong to a checkpoint: ``NAME.experts`` beside it."""
    return Path(f"{checkpoint}.experts")


class Experts:
    """Expert trajectories in a folder; arguments and errors as for :func:`record_experts`.

    The files that are there are checked by what they say of themselves; no parameter is read.

    Attributes:
        num_experts: How many they are.
        num_epochs: How many epochs of each can be read, not counting its beginning.
        num_images: How many images each is shown in all.
    """

    def __init__(
        self,
        folder: str | Path,
        images: Images,
        class_indices: Tensor,
        num_classes: int,
        *,
        num_experts: int,
        num_epochs: int,
        networks: Sequence[str] = ("convnet",),
        config: TrainingConfig = EXPERT_TRAINING,
        seed: int = 0,
    ) -> None:
        self.folder, self.num_experts, self.num_epochs = Path(folder), num_experts, num_epochs
        self.num_images = num_epochs * min(config.epoch_images or len(images), len(images))
        self._data = (images, class_indices, num_classes)
        self._networks, self._seed = tuple(networks), seed
        self._config = dataclasses.replace(config, num_passes=self.num_images)
        self._digest = digest_tensors(str(num_classes), {"images": images, "of": class_indices})
        for number in range(num_experts):
            if self.path(number).exists():
                self._check(number)

    def path(self, number: int) -> Path:
        """Return the file of an expert."""
        return self.folder / f"expert-{number:04}.safetensors"

    def missing(self) -> list[int]:
        """Return the experts that have no file yet."""
        return [number for number in range(self.num_experts) if not self.path(number).exists()]

    def network(self, number: int) -> Network:
        """Return a network of an expert's architecture, with the values that it begins with."""
        images, _, num_classes = self._data
        seed = derive_seed(self._seed, "expert", number)
        return make_network(images, num_classes, self._training(number), seed)

    def record(
        self,
        number: int,
        device: str | torch.device = "auto",
        progress: Callable[[int, int], None] | None = None,
        team: Team = ALONE,
    ) -> None:
        """Train an expert, and write its file.

        Args:
            number: Which one.
            device: Where to train.
            progress: Called as by :func:`hmn_replay.training.train.train_network`.
            team: The processes that train it together; the first one writes.
        """
        tensors: dict[str, Tensor] = {}

        def keep(epoch: int, network: Network) -> None:
            for name, value in network.named_parameters():
                tensors[f"{epoch + 1}/{name}"] = value.detach().to("cpu", copy=True)

        images, class_indices, num_classes = self._data
        keep(-1, self.network(number))
        train_network(
            images,
            class_indices,
            num_classes,
            config=self._training(number),
            seed=derive_seed(self._seed, "expert", number),
            device=device,
            progress=progress or False,
            on_epoch=keep,
            team=team,
        )
        if not team.first:
            return
        told = {"num_epochs": self.num_epochs, "settings": self._settings(number)}
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {_KEY: json.dumps(told)}
        write_atomically(self.path(number), safetensors.torch.save(tensors, metadata))

    def read(self, number: int, *epochs: int) -> list[dict[str, Tensor]]:
        """Read the parameters of an expert at some epochs, and nothing else of it.

        Args:
            number: Which one.
            epochs: 0, before its first step, to ``num_epochs``.

        Returns:
            For each epoch, the parameters by name, on the CPU.

        Raises:
            ExpertError: The file is absent or damaged.
        """
        try:
            with safetensors.safe_open(self.path(number), framework="pt") as file:
                names = [key[2:] for key in file.keys() if key.startswith("0/")]  # noqa: SIM118
                return [
                    {name: file.get_tensor(f"{epoch}/{name}") for name in names} for epoch in epochs
                ]
        except (safetensors.SafetensorError, OSError) as error:
            raise ExpertError(self._cannot_read(number, error)) from error

    def _training(self, number: int) -> TrainingConfig:
        name = self._networks[number % len(self._networks)]
        return dataclasses.replace(self._config, network=name)

    def _settings(self, number: int) -> dict[str, Any]:
        settings = dataclasses.asdict(self._training(number))
        del settings["num_passes"]
        settings |= {"seed": self._seed, "number": number, "data": self._digest}
        as_read: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists
        return as_read

    def _check(self, number: int) -> None:
        """Raise an ExpertError for the file of another recording, or of fewer epochs."""
        try:
            with safetensors.safe_open(self.path(number), framework="pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
            settings, num_epochs = dict(told["settings"]), int(told["num_epochs"])
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise ExpertError(self._cannot_read(number, error)) from error
        wanted = self._settings(number)
        for name, value in wanted.items():
            if settings.get(name) != value:
                came, asked = f"{name} {settings.get(name)!r}", repr(value)
                if name == "data":
                    came, asked = "other images or labels", "these"
                raise self._refusal(number, f"was recorded with {came}, not {asked}")
        if num_epochs < self.num_epochs:
            raise self._refusal(number, f"has {num_epochs} epochs, not {self.num_epochs}")

    def _refusal(self, number: int, why: str) -> ExpertError:
        folder = str(self.folder)
        return ExpertError(
            f"{str(self.path(number))!r} {why}; delete {folder!r} to record its experts anew, or "
            "give another folder"
        )

    def _cannot_read(self, number: int, error: Exception) -> str:
        path = str(self.path(number))
        return f"cannot read the expert {path!r} ({error}); delete that file to record it again"
