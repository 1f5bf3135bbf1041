"""Differentiable augmentation, drawn once and applied to as many batches as need the same draw."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.runtime import make_generator

__all__ = [
    "STRATEGIES",
    "Augmentation",
    "RandomAugmentation",
    "augment_training",
    "cutmix",
    "draw_augmentation",
]

STRATEGIES = ("color", "crop", "cutout", "flip", "scale", "rotate")

_BRIGHTNESS, _SATURATION, _CONTRAST = 1.0, 2.0, 0.5
_CROP, _CUTOUT, _SCALE, _DEGREES = 0.125, 0.5, 1.2, 15.0
_MAX_SEED = 2**62

# Uniform numbers behind one draw, always all of them: naming one more strategy moves no other.
_NUM_UNIFORM = 11


def draw_augmentation(
    names: Collection[str],
    image_size: tuple[int, int],
    generator: torch.Generator | None,
    *,
    batch: int | None = None,
    fill: float | Sequence[float] | Tensor = 0.5,
    std: float | Sequence[float] | Tensor = 0.25,
) -> Augmentation:
    """Draw one augmentation: of DSA (Zhao and Bilen 2021) as IDC's code (Kim et al. 2022) has it.

    IDC augments normalised images, and its zero is their mean. Images here are in [0, 1], so the
    mean that padding and cutout leave behind is ``fill``, and the unit of brightness is ``std``:
    give a data set's own statistics where they are known.

    With u uniform in [0, 1), drawn anew at every mention:

    * ``color`` adds ``(u - 0.5) * std``; multiplies by 2u what a pixel's channels differ from
      their mean; multiplies by u + 0.5 what an image's values differ from theirs. Not clamped.
    * ``crop`` moves by up to 12.5 % of a side each way, in whole pixels.
    * ``cutout`` fills a square of half the side, cut off where it crosses the border.
    * ``flip`` mirrors left and right, with probability 0.5.
    * ``scale`` shrinks or enlarges by a factor in [1/1.2, 1.2], height and width apart.
    * ``rotate`` turns by up to 15 degrees.

    They are applied in the order colour, flip, crop, scale, rotate, cutout. With ``scale`` or
    ``rotate``, one bilinear resampling does all that moves pixels; without, pixels move unaltered.

    Args:
        names: Some of :data:`STRATEGIES`, in any order; none of them gives the identity.
        image_size: Height and width in pixels.
        generator: A CPU generator; it gives the same draws whatever the device of the images. None
            for torch's global one.
        batch: None for one draw that all images share, or the number of images for a draw each.
        fill: Value of pixels that come from outside the image, and of the cutout square: one, or
            one a channel.
        std: Standard deviation of the pixels, the unit of brightness: one, or one a channel.

    Returns:
        The augmentation, to be called on batches of ``image_size``.

    Raises:
        ConfigError: An unknown name, or a size or batch below 1.
    """
    chosen = frozenset([names] if isinstance(names, str) else names)
    if unknown := sorted(chosen.difference(STRATEGIES)):
        raise ConfigError(f"unknown augmentation {unknown[0]!r}; choose from {STRATEGIES}")
    height, width = image_size
    if min(height, width) < 1:
        raise ConfigError(f"image_size must be two numbers of 1 or more, got {image_size}")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch must be None or 1 or more, got {batch}")
    uniform = torch.rand(batch or 1, _NUM_UNIFORM, generator=generator, dtype=torch.float64)
    flip, brightness, saturation, contrast, *geometry = uniform.unbind(1)
    shift_y, shift_x, cut_y, cut_x, scale_y, scale_x, angle = geometry

    one, zero = torch.ones_like(flip), torch.zeros_like(flip)
    mirror = torch.where(flip < 0.5, -one, one) if "flip" in chosen else one
    down = _draw_shift(shift_y, height) if "crop" in chosen else zero
    right = _draw_shift(shift_x, width) if "crop" in chosen else zero
    zoom_y = _draw_zoom(scale_y) if "scale" in chosen else one
    zoom_x = _draw_zoom(scale_x) if "scale" in chosen else one
    limit = math.radians(_DEGREES) if "rotate" in chosen else 0.0
    cos, sin = torch.cos((2 * angle - 1) * limit), torch.sin((2 * angle - 1) * limit)
    brightness, saturation = (brightness - 0.5) * _BRIGHTNESS, saturation * _SATURATION
    top, left = _draw_corner(cut_y, height), _draw_corner(cut_x, width)
    # An output pixel at p, counted from the centre, shows the input at mirror(zoom R p + shift);
    # grid_sample counts in half sides, hence the ratios.
    ratio = height / width
    row_x = (zoom_x * cos, -zoom_x * sin * ratio, right * 2 / width)
    row_y = (zoom_y * sin / ratio, zoom_y * cos, down * 2 / height)
    return Augmentation(
        names=chosen,
        image_size=(height, width),
        batch=batch,
        fill=_per_channel(fill),
        std=_per_channel(std),
        color=torch.stack((brightness, saturation, contrast + _CONTRAST)),
        pixels=torch.stack((mirror, down, right, top, left)).long(),
        affine=torch.stack((*(mirror * value for value in row_x), *row_y)),
    )


class RandomAugmentation:
    """Augments every image by a draw of its own, from torch's global generator.

    For ``replay_transform=`` of a replay plugin, which seeds that generator for each mini-batch and
    restores it. torchvision's transforms, given a batch, make one draw for all of it.

    Args:
        names: Some of :data:`STRATEGIES`, as :func:`draw_augmentation` describes them; or one text
            of them with commas between.
        fill: As in :func:`draw_augmentation`: what pads a crop, best the data's mean colour.
        std: As in :func:`draw_augmentation`.

    Raises:
        ConfigError: An unknown name.
    """

    def __init__(
        self,
        names: str | Collection[str] = ("crop", "flip"),
        *,
        fill: float | Sequence[float] | Tensor = 0.5,
        std: float | Sequence[float] | Tensor = 0.25,
    ) -> None:
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",") if name.strip()]
        self.names = tuple(names)
        self.fill, self.std = fill, std
        draw_augmentation(self.names, (1, 1), torch.Generator())  # which checks the names

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images ``(N, C, H, W)``, each augmented by itself.

        Args:
            images: Floats in [0, 1], or such as were normalised, in which case ``fill`` and ``std``
                are, too.
            generator: A CPU generator. Default: torch's global one.
        """
        if not len(images):
            return images
        height, width = images.shape[2:]
        draw = draw_augmentation(
            self.names,
            (height, width),
            generator,
            batch=len(images),
            fill=self.fill,
            std=self.std,
        )
        return draw(images)


def augment_training(
    model: nn.Module,
    names: str | Collection[str] = ("crop", "flip"),
    *,
    fill: float | Sequence[float] | Tensor = 0.5,
    std: float | Sequence[float] | Tensor = 0.25,
    seed: int = 0,
) -> RemovableHandle:
    """Augment every image that a network is trained on, current and replayed ones alike.

    By a hook before its forward pass, in training mode alone, so that it does not matter where a
    method adds its replayed images to the batch. Give the benchmark no augmentation then. A
    previous network that is distilled sees the same augmented images. A second call for the same
    network takes the place of the first. Draws go on where the network is saved whole, and begin
    anew where its ``state_dict()`` is loaded into another.

    Args:
        model: The network; its first input is images, float ``(N, C, H, W)``.
        names: As in :class:`RandomAugmentation`.
        fill: As in :class:`RandomAugmentation`: the data's mean colour is best; of normalised
            images it is 0.
        std: As in :class:`RandomAugmentation`; of normalised images it is 1.
        seed: Seed of the draws, which leave torch's global generator alone.

    Returns:
        What removes the hook, by its ``remove()``.

    Raises:
        ConfigError: An unknown name; or, while training, images that are not the first argument
            without a name, or features in their place.
    """
    augmentation = RandomAugmentation(names, fill=fill, std=std)
    generator = make_generator(seed, "augment")
    for number, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _AugmentTraining):
            del model._forward_pre_hooks[number]
    return model.register_forward_pre_hook(_AugmentTraining(augmentation, generator))


class _AugmentTraining:
    """The hook of :func:`augment_training`; a network is saved and copied with it."""

    def __init__(self, augmentation: RandomAugmentation, generator: torch.Generator) -> None:
        self.augmentation, self.generator = augmentation, generator

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training:
            return None
        if not inputs:
            raise ConfigError(
                "augment_training augments the first argument of a network, which was called with "
                "names alone: call it as network(images, ...)"
            )
        images, *others = inputs
        backbone = getattr(module, "backbone", None)
        if backbone is not None and images.shape[1:] == getattr(backbone, "feature_shape", None):
            raise ConfigError(
                f"augment_training is for images, and a memory of features gives the network "
                f"features {tuple(images.shape[1:])}: augment by the benchmark's transforms"
            )
        return self.augmentation(images, self.generator), *others

    def __getstate__(self) -> dict[str, Any]:
        return {"augmentation": self.augmentation, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.augmentation, self.generator = state["augmentation"], torch.Generator()
        self.generator.set_state(state["generator"])


@dataclass(frozen=True, eq=False)
class Augmentation:
    """A drawn augmentation, differentiable in the images; made by :func:`draw_augmentation`.

    Attributes:
        names: The strategies that are applied.
        image_size: Height and width of the images that it takes.
        batch: None if all images share the draw, else the number of images that it takes.
        fill: ``(1, C or 1, 1, 1)``, the value behind the image.
        std: ``(1, C or 1, 1, 1)``, the unit of brightness.
        color: float64 ``(3, batch or 1)``: brightness in units of ``std``, saturation, contrast.
        pixels: int64 ``(5, batch or 1)``: mirror (-1 or 1), offset down and right, upper left
            corner of the cutout square.
        affine: float64 ``(6, batch or 1)``: the rows of grid_sample's 2 x 3 matrix.
    """

    names: frozenset[str]
    image_size: tuple[int, int]
    batch: int | None
    fill: Tensor
    std: Tensor
    color: Tensor
    pixels: Tensor
    affine: Tensor

    @classmethod
    def join(cls, parts: Sequence[Augmentation], sizes: Sequence[int]) -> Augmentation:
        """Return an augmentation of several batches put together, of a draw for each image.

        Args:
            parts: For each batch, what its images share; all of the same names, image size, fill
                and std. A single one comes back itself.
            sizes: For each batch, the number of its images.
        """
        if len(parts) == 1:
            return parts[0]
        counts = torch.tensor(sizes)
        color, pixels, affine = (
            torch.cat([getattr(part, name) for part in parts], dim=1).repeat_interleave(counts, 1)
            for name in ("color", "pixels", "affine")
        )
        return replace(parts[0], batch=sum(sizes), color=color, pixels=pixels, affine=affine)

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: float ``(N, C, H, W)``, usually in [0, 1], on any device.

        Returns:
            A tensor like ``images``, not clamped; ``images`` themselves where nothing is to do.

        Raises:
            DataError: The images are not float, or not of the shape that was drawn for.
        """
        self._check(images)
        fill = self.fill.to(images.dtype).to(images.device, non_blocking=True)
        if "color" in self.names:
            images = self._change_color(images)
        if not self.names.isdisjoint(("scale", "rotate")):
            images = self._resample(images, fill)
        elif not self.names.isdisjoint(("flip", "crop")):
            move = self._move_shared if self.batch is None else self._move_each
            images = move(images, fill)
        if "cutout" in self.names:
            images = self._cut_out(images, fill)
        return images

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise DataError(
                f"expected float images (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if tuple(images.shape[2:]) != self.image_size:
            raise DataError(
                f"the augmentation was drawn for images of {self.image_size}, got "
                f"{tuple(images.shape[2:])}; draw another"
            )
        if self.batch is not None and len(images) != self.batch:
            raise DataError(
                f"the augmentation holds a draw for each of {self.batch} images, got "
                f"{len(images)}; draw with batch=None to share one draw"
            )
        for name, value in (("fill", self.fill), ("std", self.std)):
            if value.shape[1] not in (1, images.shape[1]):
                raise DataError(
                    f"{name} has {value.shape[1]} channels and the images have {images.shape[1]}"
                )

    def _change_color(self, images: Tensor) -> Tensor:
        std = self.std.to(images.dtype).to(images.device, non_blocking=True)
        values = self.color.to(images.dtype).to(images.device, non_blocking=True)
        brightness, saturation, contrast = values.view(3, -1, 1, 1, 1).unbind()
        images = images + brightness * std
        mean = images.mean(dim=1, keepdim=True)
        images = torch.lerp(mean, images, saturation)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return torch.lerp(mean, images, contrast)

    def _move_shared(self, images: Tensor, fill: Tensor) -> Tensor:
        mirror, down, right, _, _ = self.pixels[:, 0].tolist()
        if mirror < 0:
            images = images.flip(-1)
        if not (down or right):
            return images
        height, width = self.image_size
        top, bottom = max(0, -down), min(height, height - down)
        left, stop = max(0, -right), min(width, width - right)
        moved = fill.expand_as(images).clone()
        moved[:, :, top:bottom, left:stop] = images[
            :, :, top + down : bottom + down, left + right : stop + right
        ]
        return moved

    def _move_each(self, images: Tensor, fill: Tensor) -> Tensor:
        height, width = self.image_size
        pixels = self.pixels.to(images.device, non_blocking=True)
        mirror, down, right = pixels[:3, :, None].unbind()
        rows = torch.arange(height, device=images.device) + down
        columns = torch.arange(width, device=images.device) + right
        inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
        columns = torch.where(mirror < 0, width - 1 - columns, columns)
        flat = (
            rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        )
        index = flat.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        moved = images.flatten(2).gather(2, index).view_as(images)
        return torch.where(inside[:, None], moved, fill)

    def _resample(self, images: Tensor, fill: Tensor) -> Tensor:
        height, width = self.image_size
        grid_shape = (self.affine.shape[1], height, width)
        affine = self.affine.to(images.dtype).to(images.device, non_blocking=True)
        xx, xy, x0, yx, yy, y0 = affine[:, :, None, None].unbind()
        x = _centres(width, images)
        y = _centres(height, images)[:, None]
        # Not F.affine_grid: its matrix product may run in TF32 on CUDA.
        grid = torch.stack(
            ((xx * x + xy * y + x0).expand(grid_shape), (yx * x + yy * y + y0).expand(grid_shape)),
            dim=-1,
        )
        grid = grid.expand(len(images), -1, -1, -1)
        return F.grid_sample(images - fill, grid, align_corners=False) + fill

    def _cut_out(self, images: Tensor, fill: Tensor) -> Tensor:
        height, width = self.image_size
        corners = self.pixels[3:].to(images.device, non_blocking=True)[:, :, None]
        rows = _within(torch.arange(height, device=images.device) - corners[0], _cut_side(height))
        columns = _within(torch.arange(width, device=images.device) - corners[1], _cut_side(width))
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(inside, fill, images)


def cutmix(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    probability: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Paste into every image the same rectangle of another one (CutMix, Yun et al. 2019).

    The share of an image that is kept is drawn from Beta(1, 1), before the rectangle is cut off at
    the border. The loss of the result is ``lam * loss(labels_a) + (1 - lam) * loss(labels_b)``.

    Args:
        images: ``(N, C, H, W)``, left as they are.
        labels: ``(N,)``, any integers.
        generator: A CPU generator.
        probability: That the batch is mixed at all, in [0, 1].

    Returns:
        The mixed images; ``labels``; the labels of the images pasted; and ``lam``, the share of
        pixels not pasted over. A batch that is not mixed comes back itself, with ``lam`` 1.

    Raises:
        ConfigError: ``probability`` is out of range.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"probability must be in [0, 1], got {probability}")
    # torch draws no Beta from a generator; the standard library does, from a seed of ours.
    rng = random.Random(int(torch.randint(_MAX_SEED, (), generator=generator)))
    order = torch.randperm(len(images), generator=generator)
    if rng.random() >= probability:
        return images, labels, labels, 1.0
    height, width = images.shape[2:]
    side = math.sqrt(1.0 - rng.betavariate(1.0, 1.0))
    top, bottom = _draw_span(rng, height, side)
    left, right = _draw_span(rng, width, side)
    order = order.to(images.device, non_blocking=True)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    lam = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, labels, labels[order.to(labels.device, non_blocking=True)], lam


def _draw_span(rng: random.Random, size: int, share: float) -> tuple[int, int]:
    half = int(size * share) // 2
    centre = rng.randrange(size)
    return max(0, centre - half), min(size, centre + half)


def _draw_integer(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).floor().clamp(max=count - 1)


def _draw_shift(uniform: Tensor, size: int) -> Tensor:
    reach = int(size * _CROP + 0.5)
    return _draw_integer(uniform, 2 * reach + 1) - reach


def _draw_zoom(uniform: Tensor) -> Tensor:
    return uniform * (_SCALE - 1 / _SCALE) + 1 / _SCALE


def _cut_side(size: int) -> int:
    return int(size * _CUTOUT + 0.5)


def _draw_corner(uniform: Tensor, size: int) -> Tensor:
    side = _cut_side(size)
    return _draw_integer(uniform, size + 1 - side % 2) - side // 2


def _per_channel(value: float | Sequence[float] | Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return tensor.detach().reshape(1, -1, 1, 1)


def _within(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _centres(size: int, like: Tensor) -> Tensor:
    steps = torch.arange(size, dtype=like.dtype, device=like.device)
    return (2 * steps + 1) / size - 1
