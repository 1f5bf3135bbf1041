"""Trajectory matching (MTT): a student's training on decoded images, compared with an expert's.

:func:`trajectory_matching` compares them; :class:`Experts` trains networks on real images and keeps
their parameters at every epoch in a folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hmn_replay.data.images import channel_stats
from hmn_replay.data.lookup import Images
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import ConfigError, ExpertError
from hmn_replay.files import clear_stale, digest_tensors, write_atomically
from hmn_replay.objectives._network import uncached_autocast, with_gradients
from hmn_replay.runtime import check_seed, derive_seed, rewinder
from hmn_replay.training.networks import NETWORKS, Network, NetworkFactory, is_built_in
from hmn_replay.training.train import TrainingConfig, make_network, train_network

__all__ = [
    "EXPERT_TRAINING",
    "Experts",
    "delete_checkpoint",
    "delete_experts",
    "experts_beside",
    "record_experts",
    "trajectory_matching",
]

_KEY = "hmn_replay_expert"
_FILE_NAME = re.compile(r"expert-[0-9]{4,}\.safetensors")
# What reading a description raises that nobody has written so.
_NOT_AS_WRITTEN = (ValueError, TypeError, LookupError, OverflowError, RecursionError)

EXPERT_TRAINING = TrainingConfig(
    batch_size=256,
    schedule="constant",
    momentum=0.0,
    weight_decay=0.0,
    cutmix_probability=0.0,
    augmentations=("color", "crop", "cutout", "flip", "scale", "rotate"),
)
"""Experts of plain SGD, which students can follow, as in MTT (Cazenavette et al. 2022)."""


def trajectory_matching(
    network: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    decoded_images: Tensor,
    decoded_labels: Tensor,
    batches: Sequence[Tensor],
    learning_rate: Tensor | float,
    augmentations: Sequence[Callable[[Tensor], Tensor]] | None = None,
    *,
    draws_globally: bool = True,
) -> Tensor:
    """Match where a student gets to with where an expert got to (MTT; Cazenavette et al. 2022).

    From an expert's parameters theta, a student takes N steps of plain SGD on decoded images,

        theta_(t+1) = theta_t - rate * grad L(theta_t, batch t),    theta_0 = theta,

    L the mean cross-entropy. The loss is its squared distance to the expert's parameters some
    epochs later, theta*, divided by how far the expert itself has moved (arXiv 2203.11932,
    equation 2):

        || theta_N - theta* ||^2 / || theta - theta* ||^2.

    The gradients are exact, through all steps, and are computed with the loss; ``backward()`` hands
    them over. Only one step's graph is kept at a time: on the way back, each step is taken again
    from the parameters that it began with, and turns d loss / d theta_(t+1) into d loss / d theta_t
    by a product with its Hessian. A network that draws, such as one with dropout, draws the same
    numbers again.

    Costs about 12 convolution passes over each batch, 3 forward in time and 9 back, where 9 would
    do with all graphs kept. Peak memory is N + 1 copies of the parameters, and the second-order
    graph of one batch, which is twice the graph of a training step; it does not grow with the
    number of decoded images.

    Args:
        network: Maps images to logits ``(N, K)``. Its architecture and mode count, its values do
            not. It is left as it is, and so are batch normalisation's statistics.
        start: The expert's parameters that the student begins with, by the names and on the device
            of the network's.
        target: The expert's parameters later, by the same names.
        decoded_images: float ``(B, C, H, W)``.
        decoded_labels: int64 ``(B,)``, class indices.
        batches: For each step of the student, the positions of its images, int64.
        learning_rate: The student's learning rate: a number, or a scalar on the network's device.
        augmentations: For each step, a differentiable function of its batch, which gives the same
            result whenever it is called. Default: none.
        draws_globally: Whether the network may draw from torch's global generators, which are then
            set back for each step that is taken again, and end where N steps leave them; another
            thread that draws from them meanwhile draws other numbers. Default: True. False, for one
            that draws nothing, leaves them alone.

    Returns:
        The loss, a scalar with a graph to ``decoded_images`` and, where it is a tensor,
        ``learning_rate``. Where the expert has not moved, it is 0 for a student that has not moved
        either.

    Raises:
        ConfigError: Parameters have other names or shapes than the network's, or the numbers of
            batches and of augmentations differ.
    """
    names = list(dict(network.named_parameters()))
    path = [_values(network, start, "start")]
    wanted = _values(network, target, "target")
    augments = [_unchanged] * len(batches) if augmentations is None else list(augmentations)
    if len(augments) != len(batches):
        raise ConfigError(
            f"expected one augmentation a batch, or none; got {len(augments)} for {len(batches)} "
            "batches"
        )
    images = decoded_images.detach()
    rate = learning_rate.detach() if isinstance(learning_rate, Tensor) else learning_rate
    # Batch normalisation updates these statistics, which nothing reads.
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def gradients_at(
        step: int, parameters: Sequence[Tensor], batch: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, ...]:
        values = {**buffers, **dict(zip(names, parameters, strict=True))}
        with uncached_autocast(batch.device.type):
            logits = functional_call(network, values, (augments[step](batch),))
            loss = F.cross_entropy(logits, decoded_labels[batches[step]])
        return torch.autograd.grad(
            loss, parameters, create_graph=create_graph, materialize_grads=True
        )

    def step_back(step: int, values: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return <gradients, vector>, and its derivatives by the batch and the parameters."""
        parameters, batch = _leaves(values), images[batches[step]].requires_grad_()
        gradients = gradients_at(step, parameters, batch, create_graph=True)
        along = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
        changes = torch.autograd.grad(along, [batch, *parameters], materialize_grads=True)
        return [along.detach(), *changes]

    inputs = [x for x in (decoded_images, learning_rate) if isinstance(x, Tensor)]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    device = images.device
    rewinds: list[Callable[[], None]] = []
    with torch.enable_grad():
        for step, indices in enumerate(batches):
            if draws_globally and wants_gradient:
                rewinds.append(rewinder(device))
            found = gradients_at(step, _leaves(path[-1]), images[indices], create_graph=False)
            path.append([p - rate * g for p, g in zip(path[-1], found, strict=True)])

        # An expert that has not moved would divide by zero.
        moved = _squared_distance(path[0], wanted).clamp_min(torch.finfo(wanted[0].dtype).tiny)
        loss = _squared_distance(path[-1], wanted) / moved
        if not wants_gradient:
            return loss
        backward = [2 * (p - w) / moved for p, w in zip(path.pop(), wanted, strict=True)]
        image_gradient, rate_gradient = torch.zeros_like(images), torch.zeros_like(loss)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=draws_globally):
            for step, indices in reversed(list(enumerate(batches))):
                if draws_globally:
                    rewinds[step]()
                along, of_batch, *of_parameters = step_back(step, path.pop(), backward)
                backward = [b - rate * c for b, c in zip(backward, of_parameters, strict=True)]
                image_gradient.index_add_(0, indices, -rate * of_batch)
                rate_gradient -= along
    return with_gradients(loss, inputs, [image_gradient, rate_gradient][: len(inputs)])


def record_experts(
    folder: str | Path,
    images: Images,
    class_indices: Tensor,
    num_classes: int,
    *,
    num_experts: int = 100,
    num_epochs: int = 50,
    networks: Sequence[str | NetworkFactory] = ("convnet",),
    config: TrainingConfig = EXPERT_TRAINING,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Experts:
    """Train networks on real images, and keep their parameters at every epoch.

    Experts that the folder has already are not trained again. Each file is written whole when its
    training is done, so that a recording that was stopped continues with the missing ones. The
    defaults are those of MTT (Cazenavette et al. 2022, arXiv 2203.11932).

    Args:
        folder: Folder of the files, ``expert-0000.safetensors`` and so on; made where it is absent.
            A file has ``num_epochs + 1`` times the bytes of the network's float32 parameters, and
            takes twice that of memory until it is written.
        images: float in [0, 1] or uint8, ``(N, C, H, W)``, on the CPU.
        class_indices: int64 ``(N,)`` in [0, num_classes), on the CPU.
        num_classes: Number of logits.
        num_experts: Number of experts; the folder may have more.
        num_epochs: Epochs of each expert; those in the folder may have more.
        networks: Architectures, names or functions as in :data:`hmn_replay.NETWORKS`, which the
            experts have in turn.
        config: How the experts are trained; ``network`` and ``num_passes`` are not read.
        seed: Seed of all experts; expert k of a seed is the same, however many there are.
        device: Where to train. Default: CUDA where present, else the CPU.

    Returns:
        The experts, whose parameters can be read.

    Raises:
        ExpertError: The folder has experts of other data or settings, or a damaged file.
        TrainingError: A training diverged.
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
    experts.make_folder()
    for number in experts.missing():
        experts.record(number, device)
    return experts


def experts_beside(checkpoint: str | Path) -> Path:
    """Return the folder of the experts that belong to a checkpoint: ``NAME.experts`` beside it."""
    return Path(f"{checkpoint}.experts")


def delete_checkpoint(checkpoint: str | Path) -> None:
    """Delete a checkpoint, and the experts that lie beside it; both may be absent.

    Raises:
        OSError: A file cannot be deleted.
    """
    Path(checkpoint).unlink(missing_ok=True)
    delete_experts(experts_beside(checkpoint))


def delete_experts(folder: str | Path) -> None:
    """Delete the experts in a folder, and the folder where nothing else is in it.

    Args:
        folder: Folder of the files; it may be absent.

    Raises:
        OSError: A file cannot be deleted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _FILE_NAME.fullmatch(path.name):
            path.unlink()
            clear_stale(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


class Experts:
    """Expert trajectories in a folder; arguments and errors as for :func:`record_experts`.

    The settings in the files that are there are checked; no parameter is read. Of a ``team``, the
    first process alone does so, and all make their experts alike. Without ``every_epoch``, only
    the initial and the last parameters of each are kept.

    Attributes:
        folder: Folder of the files.
        num_experts: Number of experts.
        num_epochs: Number of epochs of each that can be read, besides its initial weights.
        num_images: Number of images that each is shown in all, repeats counted.
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
        networks: Sequence[str | NetworkFactory] = ("convnet",),
        config: TrainingConfig = EXPERT_TRAINING,
        seed: int = 0,
        team: Team = ALONE,
        every_epoch: bool = True,
    ) -> None:
        self.folder, self.num_experts, self.num_epochs = Path(folder), num_experts, num_epochs
        self.num_images = num_epochs * min(config.epoch_images or len(images), len(images))
        self._kept = range(0, num_epochs + 1, 1 if every_epoch else num_epochs)
        self._data = (images, class_indices, num_classes)
        self._networks, self._seed = tuple(networks), check_seed(seed)
        self._lent: dict[int, Network] = {}
        self._known_shapes: dict[int, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        self._config = config.replace(num_passes=self.num_images)
        self._digest = digest_tensors(str(num_classes), {"images": images, "of": class_indices})
        team.agree(self._check_folder)

    def path(self, number: int) -> Path:
        """Return the file of an expert."""
        return self.folder / f"expert-{number:04}.safetensors"

    def draw(self, number: int, generator: torch.Generator) -> int:
        """Draw an expert of the architecture whose turn it is; number counts the draws."""
        num_architectures = len(self._networks)
        own = range(number % num_architectures, self.num_experts, num_architectures)
        return own[int(torch.randint(len(own), (), generator=generator))]

    def make_folder(self) -> None:
        """Make the folder where experts are missing, and try to write to it, before any work.

        Raises:
            OSError: The folder cannot be made, or nothing can be written to it.
        """
        if self.missing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass

    def missing(self) -> list[int]:
        """Return the experts that have no file yet."""
        return [number for number in range(self.num_experts) if not self.path(number).exists()]

    def network(self, number: int) -> Network:
        """Return a network of an expert's architecture with its initial weights, on the CPU."""
        images, _, num_classes = self._data
        seed = derive_seed(self._seed, "expert", number)
        return make_network(images, num_classes, self._training(number), seed, self._stats)

    def lent_network(self, number: int, device: torch.device) -> Network:
        """Return a network with an expert's buffers, whose weights the caller sets.

        One serves all experts of an architecture of this package's, in which no buffer depends on
        the seed; of another, each call makes one.
        """
        which = number % len(self._networks)
        if not is_built_in(self._networks[which]):
            return self.network(number).to(device)
        if which not in self._lent:
            self._lent[which] = self.network(number).to(device)
        return self._lent[which]

    def record(
        self,
        number: int,
        device: str | torch.device = "auto",
        progress: Callable[[int, int], None] | None = None,
        team: Team = ALONE,
    ) -> None:
        """Train an expert, and write its file.

        Args:
            number: Number of the expert, from 0.
            device: Where to train. Default: CUDA where present, else the CPU.
            progress: Function that is called after every step with the number of images seen so far
                and that of all to be seen.
            team: The processes that train it together; the first one writes the file.
        """
        tensors: dict[str, Tensor] = {}

        def keep(epoch: int, network: Network) -> None:
            if epoch + 1 not in self._kept:
                return
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
            stats=self._stats,
        )
        if not team.first:
            return
        digests: list[str | None] = [None] * (self.num_epochs + 1)
        for epoch in self._kept:
            digests[epoch] = digest_tensors("", self._parameters(tensors, epoch))
        description = {
            "num_epochs": self.num_epochs,
            "settings": self._settings(number),
            "digests": digests,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_stale(self.path(number))
        metadata = {_KEY: json.dumps(description)}
        write_atomically(self.path(number), safetensors.torch.save(tensors, metadata))

    def read(self, number: int, *epochs: int) -> list[dict[str, Tensor]]:
        """Read the parameters of an expert at some epochs, and nothing else of its file.

        Args:
            number: Number of the expert, from 0.
            *epochs: Numbers of completed epochs, from 0 for the initial weights to ``num_epochs``;
                without ``every_epoch``, these two alone.

        Returns:
            For each epoch, the parameters by name, on the CPU.

        Raises:
            ExpertError: The file is absent or damaged.
        """
        shapes = self._shapes(number)
        found = []
        try:
            with safetensors.safe_open(self.path(number), framework="pt") as file:
                digests = _description(file)["digests"]
                for epoch in epochs:
                    tensors = {name: file.get_tensor(f"{epoch}/{name}") for name in shapes}
                    if digest_tensors("", tensors) != digests[epoch]:
                        raise ValueError(f"epoch {epoch} was altered or damaged")
                    found.append(tensors)
        except (safetensors.SafetensorError, OSError, *_NOT_AS_WRITTEN) as error:
            raise ExpertError(self._cannot_read(number, error)) from error
        for tensors in found:
            got = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
            if got != shapes:
                wrong = next(name for name in shapes if got[name] != shapes[name])
                raise ExpertError(
                    self._cannot_read(number, f"{wrong} is not a parameter of its network")
                )
        return found

    @cached_property
    def _stats(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the images, which all experts are normalised by."""
        return channel_stats(self._data[0])

    @staticmethod
    def _parameters(tensors: Mapping[str, Tensor], epoch: int) -> dict[str, Tensor]:
        start = f"{epoch}/"
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    def _shapes(self, number: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the type and the shape of each parameter of an expert's network."""
        which = number % len(self._networks)
        if which not in self._known_shapes:
            parameters = self.network(number).named_parameters()
            self._known_shapes[which] = {
                name: (value.dtype, tuple(value.shape)) for name, value in parameters
            }
        return self._known_shapes[which]

    def _training(self, number: int) -> TrainingConfig:
        network = self._networks[number % len(self._networks)]
        return self._config.replace(network=network)

    def _settings(self, number: int) -> dict[str, Any]:
        settings = self._training(number).model_dump(mode="json", exclude={"num_passes"})
        found = {**settings, "seed": self._seed, "number": number, "data": self._digest}
        code = NETWORKS.fingerprint(self._networks[number % len(self._networks)])
        return {**found, "network's code": code} if code else found

    def _check_folder(self) -> None:
        """Raise an error for what is no folder, or has experts of another recording."""
        if self.folder.exists() and not self.folder.is_dir():
            message = "A file stands where the folder of the experts is to be"
            raise NotADirectoryError(errno.ENOTDIR, message, str(self.folder))
        for number in range(self.num_experts):
            if self.path(number).exists():
                self._check(number)

    def _check(self, number: int) -> None:
        """Raise an ExpertError for the file of another recording, or of fewer epochs."""
        try:
            with safetensors.safe_open(self.path(number), framework="pt") as file:
                description = _description(file)
            settings, num_epochs = dict(description["settings"]), int(description["num_epochs"])
            if len(description["digests"]) != num_epochs + 1:
                raise ValueError("it has not a digest for each epoch")
            enough = num_epochs >= self.num_epochs
            absent = [k for k in self._kept if enough and description["digests"][k] is None]
        except (safetensors.SafetensorError, OSError, *_NOT_AS_WRITTEN) as error:
            raise ExpertError(self._cannot_read(number, error)) from error
        for name, expected in self._settings(number).items():
            if settings.get(name) != expected:
                got, wanted = f"{name} {settings.get(name)!r}", repr(expected)
                if name == "data":
                    got, wanted = "other images or labels", "these"
                mismatch = f"was recorded with {got}, not {wanted}"
                break
        else:
            if enough and not absent:
                return
            mismatch = f"has {num_epochs} epochs, not {self.num_epochs}"
            if absent:
                mismatch = f"has not the parameters of epoch {absent[0]}"
        raise ExpertError(
            f"{str(self.path(number))!r} {mismatch}; delete {str(self.folder)!r} to record its "
            "experts anew, or give another folder"
        )

    def _cannot_read(self, number: int, error: Exception | str) -> str:
        path = str(self.path(number))
        return f"cannot read the expert {path!r} ({error}); delete that file to record it again"


def _description(file: Any) -> dict[str, Any]:
    """Return what an open file says of itself."""
    description = json.loads((file.metadata() or {})[_KEY])
    if not isinstance(description, dict):
        raise ValueError("its description is no map")
    return description


def _values(network: nn.Module, given: Mapping[str, Tensor], which: str) -> list[Tensor]:
    """Return parameters in the network's order, or raise :class:`ConfigError`."""
    expected = {name: tuple(value.shape) for name, value in network.named_parameters()}
    got = {name: tuple(value.shape) for name, value in given.items()}
    if got != expected:
        name = sorted({*got.items()} ^ {*expected.items()})[0][0]
        raise ConfigError(
            f"{which} must hold the parameters of {type(network).__name__} by name; expected "
            f"{name!r} of shape {expected.get(name)}, got {got.get(name)}"
        )
    return [given[name].detach() for name in expected]


def _squared_distance(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a - b).square().sum() for a, b in zip(one, two, strict=True)]).sum()


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in values]


def _unchanged(images: Tensor) -> Tensor:
    return images
