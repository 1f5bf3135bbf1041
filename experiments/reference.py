"""Gradient matching as IDC published it, in the plainest way: what our speed is compared with.

After the loop of IDC's code (Kim et al. 2022, arXiv 2205.14959) for CIFAR-10 and ConvNet-3. Nothing
here is tuned, and nothing of `hmn_replay` does its work but what reads, augments and mixes batches
of images, by which both sides learn from the same data.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hmn_replay.data.augment import draw_augmentation
from hmn_replay.data.images import LabelledImages, channel_stats
from hmn_replay.errors import BudgetError
from hmn_replay.runtime import make_generator, seeded
from hmn_replay.training.train import draw_batch, mixed_loss

# IDC cuts a stored image into FACTOR x FACTOR pieces.
FACTOR = 2


def make_convnet(
    image_shape: tuple[int, int, int], num_classes: int, width: int = 128, depth: int = 3
) -> nn.Sequential:
    """Return IDC's ConvNet with random weights: its instance norm is ``GroupNorm(C, C)`` too."""
    channels, height, wide = image_shape
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
        channels = width
    pixels = (height >> depth) * (wide >> depth)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * pixels, num_classes))


def matching_loss(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> Tensor:
    """Return the squared distance of the convolution weights' gradients, with its graph.

    Every parameter's gradient is taken, and those of biases, norms and the head are passed over.
    """
    parameters = list(network.parameters())
    real_loss = F.cross_entropy(network(real_images), real_labels)
    real_gradients = torch.autograd.grad(real_loss, parameters)
    decoded_loss = F.cross_entropy(network(decoded_images), decoded_labels)
    decoded_gradients = torch.autograd.grad(decoded_loss, parameters, create_graph=True)
    loss = decoded_loss.new_zeros(())
    for parameter, real, decoded in zip(parameters, real_gradients, decoded_gradients, strict=True):
        if parameter.ndim == 4:
            loss = loss + (decoded - real.detach()).pow(2).sum()
    return loss


def matching_step(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient to the decoded images: what `gradient_matching` returns."""
    images = decoded_images.detach().requires_grad_()
    loss = matching_loss(network, real_images, real_labels, images, decoded_labels)
    network.zero_grad()
    torch.autograd.backward(loss)
    assert images.grad is not None
    return loss.detach(), images.grad


def decode_pieces(stored: Tensor) -> Tensor:
    """Decode IDC's container: cut images into four pieces, each upsampled to a whole one.

    Args:
        stored: float ``(N, C, H, W)``, H and W even.

    Returns:
        float ``(4 N, C, H, W)``: the upper left piece of every image, then the upper right, ...
    """
    pieces = rearrange(stored, "n c (i h) (j w) -> (i j n) c h w", i=FACTOR, j=FACTOR)
    return F.interpolate(pieces, scale_factor=FACTOR, mode="bilinear", align_corners=False)


class ReferenceLoop:
    """IDC's condensation, with its settings for CIFAR-10; goes on for as long as it is let.

    As many float32 images a class as the budget holds; no byte of a header is counted. They begin
    as pieces of four real images each. In every step, each class draws 64 real images and moves its
    own by SGD; then the network learns from 2000 real images. After 100 steps it is drawn anew.

    Args:
        data: The real images; their sides are even, and 8 or more.
        budget_bytes: Bytes of the pixels.
        width: Channels of ConvNet's blocks.
        inner_steps: Steps with each network.
        real_batch: Real images of a class in a step.
        decoded_batch: Decoded images of a class in a step, at most.
        network_images: Images that the network learns from after each step.
        seed: Of every draw.
        device: Where to compute.

    Attributes:
        seconds: How long the initialisation and all steps took, and nothing else.
        step: How many steps were taken.

    Raises:
        BudgetError: The budget does not hold one image a class.
    """

    def __init__(
        self,
        data: LabelledImages,
        budget_bytes: int,
        *,
        width: int = 128,
        inner_steps: int = 100,
        real_batch: int = 64,
        decoded_batch: int = 128,
        network_images: int = 2000,
        seed: int = 0,
        device: torch.device,
    ) -> None:
        started = time.perf_counter()
        self.data, self.seed, self.device = data, seed, device
        self.width, self.inner_steps, self.network_images = width, inner_steps, network_images
        self.real_batch, self.decoded_batch = real_batch, decoded_batch
        image_bytes = 4 * data.images[0].numel()
        self.per_class = budget_bytes // (image_bytes * data.num_classes)
        if not self.per_class:
            raise BudgetError(
                f"{budget_bytes:,} bytes do not hold a float32 image of {image_bytes:,} bytes for "
                f"each of {data.num_classes} classes"
            )
        self.members = [data.of_class(label) for label in data.classes.tolist()]
        self.mean, self.std = channel_stats(data.images)
        self.pixels = self._initial_pixels().to(device).requires_grad_()
        # IDC: 0.005 at ten stored images a class, and in proportion to their number.
        rate = 5e-3 * self.per_class / 10
        self.optimizer = torch.optim.SGD([self.pixels], lr=rate, momentum=0.5)
        self.step = 0
        self._renew_network()
        self.seconds = time.perf_counter() - started

    def run(self, seconds: float) -> None:
        """Take steps until all of them have taken so many seconds, or a little more."""
        while self.seconds < seconds:
            started = time.perf_counter()
            self.take_step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - started

    def take_step(self) -> None:
        """Match every class once, then let the network learn."""
        if self.step and self.step % self.inner_steps == 0:
            self._renew_network()
        generator = make_generator(self.seed, "step", self.step)
        for label in range(len(self.members)):
            self._match_class(label, generator)
        self._train_network(generator)
        self.step += 1

    def decode(self) -> tuple[Tensor, Tensor]:
        """Return the images so far, float ``(N, C, H, W)`` in [0, 1], and their labels."""
        with torch.no_grad():
            images = [decode_pieces(stored) for stored in self.pixels.split(self.per_class)]
        labels = self.data.classes.repeat_interleave(FACTOR**2 * self.per_class)
        return torch.cat(images).clamp(0, 1), labels

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to go on."""
        return {
            "pixels": self.pixels.detach(),
            "optimizer": self.optimizer.state_dict(),
            "network": self.network.state_dict(),
            "learner": self.learner.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back, or on, to where another loop of the same arguments was."""
        with torch.no_grad():
            self.pixels.copy_(state["pixels"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.network.load_state_dict(state["network"])
        self.learner.load_state_dict(state["learner"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _initial_pixels(self) -> Tensor:
        """Tile real images, four to a stored one, each reduced to its piece."""
        generator = make_generator(self.seed, "initial pixels")
        stored = []
        for members in self.members:
            order = torch.randperm(len(members), generator=generator)
            drawn = order[torch.arange(FACTOR**2 * self.per_class) % len(order)]
            real = self.data.floats(members[drawn])
            pieces = F.interpolate(real, scale_factor=1 / FACTOR, mode="nearest")
            stored.append(rearrange(pieces, "(i j n) c h w -> n c (i h) (j w)", i=FACTOR, j=FACTOR))
        return torch.cat(stored)

    def _renew_network(self) -> None:
        with seeded(self.seed, "network", self.step):
            network = make_convnet(self.data.image_shape, len(self.members), self.width)
        self.network = network.to(self.device)
        self.learner = torch.optim.SGD(
            self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
        )
        with torch.no_grad():
            self.pixels.clamp_(0, 1)

    def _match_class(self, label: int, generator: torch.Generator) -> None:
        members = self.members[label]
        chosen = members[torch.randperm(len(members), generator=generator)[: self.real_batch]]
        real = self.data.floats(chosen).to(self.device)
        decoded = decode_pieces(self.pixels[label * self.per_class : (label + 1) * self.per_class])
        if len(decoded) > self.decoded_batch:
            order = torch.randperm(len(decoded), generator=generator)[: self.decoded_batch]
            decoded = decoded[order.to(self.device)]
        augment = draw_augmentation(
            ("color", "crop", "cutout"),
            self.data.image_shape[1:],
            generator,
            fill=self.mean,
            std=self.std,
        )
        real, decoded = (self._normalise(augment(images)) for images in (real, decoded))
        loss = matching_loss(
            self.network,
            real,
            torch.full((len(real),), label, device=self.device),
            decoded,
            torch.full((len(decoded),), label, device=self.device),
        )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def _train_network(self, generator: torch.Generator) -> None:
        order = torch.randperm(len(self.data), generator=generator)[: self.network_images]
        for indices in order.split(64):
            images, labels, other_labels, share = draw_batch(
                self.data.floats(indices).to(self.device),
                self.data.class_indices[indices].to(self.device),
                self.mean,
                self.std,
                generator,
                augmentations=("color", "crop"),
                cutmix_probability=0.5,
            )
            logits = self.network(self._normalise(images))
            loss = mixed_loss(logits, labels, other_labels, share)
            self.learner.zero_grad()
            torch.autograd.backward(loss)
            self.learner.step()

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (value.view(1, -1, 1, 1).to(images.device) for value in (self.mean, self.std))
        return (images - mean) / std
