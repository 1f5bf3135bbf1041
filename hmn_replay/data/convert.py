"""Arrays, tensors and pictures to uint8 pixels, and labels to int64, refusing what is neither."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hmn_replay.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CHANNELS",
    "CHUNK",
    "Array",
    "check_size",
    "check_tensor",
    "check_unit_range",
    "dtype_name",
    "is_array",
    "to_image",
    "to_label",
    "to_labels",
    "to_pixels",
]

Array: TypeAlias = "Tensor | npt.NDArray[Any]"

CHANNELS = (1, 3)
"""How many channels an image may have: grey, or red, green and blue."""

CHUNK = 128
"""Images converted at a time, so that no float copy of a whole data set is made."""


def to_pixels(images: Array, name: str, size: int | None = None) -> Tensor:
    """Bring a batch of images to uint8 ``(N, C, H, W)`` on the CPU.

    Args:
        images: uint8, or floats in [0, 1] (rounded), of shape ``(N, C, H, W)``, ``(N, H, W, C)``
            or ``(N, H, W)``, with 1 or 3 channels. Where both orders fit, a tensor is read
            channels first and an array channels last.
        name: What they are called in an error message.
        size: Side in pixels to resize the shorter side and crop the centre to. Default: ``None``,
            as they are.

    Returns:
        The pixels, which share memory with ``images`` where nothing had to be converted.

    Raises:
        DataError: The images are not as said above, or there are none.
    """
    batch = _to_tensor(images, name)
    if batch.ndim and len(batch) == 0:
        raise DataError(f"{name}: expected at least 1 image, came an empty data set")
    shape = tuple(batch.shape[1:])
    first, last = (len(shape) == 3 and shape[axis] in CHANNELS for axis in (0, -1))
    if not (len(shape) == 2 or first or last) or 0 in shape:
        raise DataError(
            f"{name}: expected each image of shape (C, H, W), (H, W, C) or (H, W), with 1 or 3 "
            f"channels, came {shape}"
        )
    pixels = batch if batch.dtype == torch.uint8 else _floats_to_bytes(batch, name)
    if len(shape) == 2:
        pixels = pixels.unsqueeze(1)
    elif not first or (last and not isinstance(images, Tensor)):
        pixels = pixels.movedim(-1, 1)
    return pixels.contiguous() if size is None else _resize(pixels, size)


def to_image(image: object, name: str, size: int | None = None) -> npt.NDArray[np.uint8]:
    """Bring one image to uint8 ``(C, H, W)``.

    Args:
        image: A PIL image of 8 bits a channel (grey modes give 1 channel, all others 3, without
            transparency), or a tensor or an array as in :func:`to_pixels`, without ``N``.
        name: What it is called in an error message.
        size: As in :func:`to_pixels`.

    Raises:
        DataError: It is something else.
    """
    from PIL.Image import Image

    if is_array(image):
        return np.asarray(to_pixels(image[None], name, size)[0])
    if not isinstance(image, Image):
        raise DataError(
            f"{name}: expected an image as a PIL image, a tensor or an array, came "
            f"{type(image).__name__}; give the data set a transform that makes one"
        )
    if image.mode.startswith(("I", "F", "LAB")):
        raise DataError(
            f"{name}: expected a grey or RGB picture of 8 bits a channel, came one of PIL's mode "
            f"{image.mode!r}; convert it first"
        )
    image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    pixels = np.asarray(image if size is None else _fit(image, size), np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def to_labels(labels: object) -> Tensor:
    """Bring labels to int64 ``(N,)`` on the CPU.

    Args:
        labels: Integers of any dtype, ``(N,)`` or ``(N, 1)``: a tensor, an array or a sequence.

    Raises:
        DataError: There is not one integer an image (multi-label or one-hot targets, floats,
            texts), or int64 does not hold it.
    """
    try:
        array = labels if is_array(labels) else np.asarray(labels)
    except ValueError as error:
        raise DataError(
            "labels: expected one integer an image, came rows of different lengths; multi-label "
            "targets are not supported"
        ) from error
    targets = _to_tensor(array, "labels")
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise DataError(
            f"labels: expected one integer an image, shape (N,), came {tuple(targets.shape)}; "
            "multi-label targets are not supported; for one-hot ones pass labels.argmax(1)"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise DataError(
            f"labels: expected integers, came {dtype_name(targets)}; convert them to int64"
        )
    integers = targets.to(torch.int64)
    if targets.dtype == torch.uint64 and bool((integers < 0).any()):
        raise DataError("labels: expected integers below 2**63, came larger ones")
    return integers.contiguous()


def to_label(label: object, name: str) -> int:
    """Bring one label, an integer of any type, to an int.

    Args:
        label: A Python or numpy integer, or a tensor or array that holds one.
        name: What its item is called in an error message.

    Raises:
        DataError: As for :func:`to_labels`.
    """
    if is_array(label) and math.prod(label.shape) == 1:
        label = label.item()
    try:
        integer = operator.index(label)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        if is_array(label) or isinstance(label, (list, tuple)):
            raise DataError(
                f"{name}: expected one integer as label, came {len(label)} values; multi-label "
                "targets are not supported; for one-hot ones pass their argmax"
            ) from error
        raise DataError(
            f"{name}: expected an integer as label, came {type(label).__name__} {label!r:.40}"
        ) from error
    if not -(2**63) <= integer < 2**63:
        raise DataError(f"{name}: expected a label that int64 holds, came {integer}")
    return integer


def check_unit_range(values: Tensor, name: str) -> None:
    """Raise a DataError for NaN, infinity, and floats outside [0, 1] by more than rounding."""
    low, high = (float(bound) for bound in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"{name}: expected finite floats in [0, 1], came NaN or infinity")
    if low < -1e-5 or high > 1 + 1e-5:
        in_bytes = low >= 0 and 2 < high <= 255
        raise DataError(
            f"{name}: expected floats in [0, 1], came [{low:.3g}, {high:.3g}]; "
            + ("divide by 255" if in_bytes else "undo your normalisation (values * std + mean)")
        )


def check_size(size: int | None) -> None:
    """Raise a ConfigError unless ``size`` is None or the side of an image: 1 or more pixels."""
    if size is not None and size < 1:
        raise ConfigError(f"size is the side of an image in pixels, 1 or more; came {size}")


def check_tensor(value: object, name: str, dtype: torch.dtype, axes: tuple[str, ...]) -> None:
    """Raise a DataError unless ``value`` is a tensor of these axes and dtype, on the CPU."""
    came = type(value).__name__
    if isinstance(value, Tensor):
        if value.dtype == dtype and value.ndim == len(axes) and value.device.type == "cpu":
            return
        came = f"{dtype_name(value)} {tuple(value.shape)} on {value.device}"
    raise DataError(
        f"expected {name} as a {dtype_name(dtype)} tensor ({', '.join(axes)}) on the CPU, came "
        f"{came}; as_labelled_images converts"
    )


def is_array(value: object) -> TypeGuard[Array]:
    """Tell whether a value is a tensor or a numpy array."""
    return isinstance(value, (Tensor, np.ndarray))


def dtype_name(typed: Tensor | torch.dtype) -> str:
    """Return a dtype, or that of a tensor, as ``"float32"``, without the name of the library."""
    dtype = typed if isinstance(typed, torch.dtype) else typed.dtype
    return str(dtype).removeprefix("torch.")


def _to_tensor(values: Array, name: str) -> Tensor:
    """Bring numbers to a tensor on the CPU that shares their memory where it can."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    # Torch reads neither foreign byte orders nor negative strides, and warns of read-only memory.
    native = values.dtype.newbyteorder("=")
    values = values.astype(native, order="C", copy=not values.flags.writeable)
    try:
        return torch.from_numpy(values)
    except TypeError as error:
        raise DataError(
            f"{name}: expected an array of numbers, came one of {values.dtype}; convert it first"
        ) from error


def _floats_to_bytes(batch: Tensor, name: str) -> Tensor:
    if not batch.is_floating_point():
        raise DataError(
            f"{name}: expected pixels as uint8, or as floats in [0, 1], came {dtype_name(batch)}; "
            "convert integers in 0..255 to uint8"
        )
    pixels = torch.empty(batch.shape, dtype=torch.uint8)
    for start in range(0, len(batch), CHUNK):
        values = batch[start : start + CHUNK]
        check_unit_range(values, name)
        pixels[start : start + CHUNK] = values.float().mul(255).round_().clamp_(0, 255)
    return pixels


def _resize(pixels: Tensor, size: int) -> Tensor:
    from PIL.Image import fromarray

    if tuple(pixels.shape[2:]) == (size, size):
        return pixels.contiguous()
    resized = np.empty((*pixels.shape[:2], size, size), np.uint8)
    for position, image in enumerate(pixels):
        for channel, plane in enumerate(image.contiguous().numpy()):
            resized[position, channel] = _fit(fromarray(plane), size)
    return torch.from_numpy(resized)


def _fit(image: Image, size: int) -> Image:
    """Resize the shorter side to ``size`` (bilinear, antialiased), then crop the centre."""
    from PIL.Image import Resampling

    shorter = min(image.size)
    if shorter != size:
        width, height = (max(size, round(side * size / shorter)) for side in image.size)
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
