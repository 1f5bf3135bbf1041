"""The networks that condense and evaluate: ConvNet, and three of torchvision's for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.runtime import default_float32, seeded

__all__ = ["NETWORKS", "ConvBlock", "Network", "build_network", "default_depth"]

NETWORKS = ("convnet", "vgg16", "resnet18", "densenet121")

# From this side on, ResNet and DenseNet keep the stem that torchvision gives them for ImageNet.
_IMAGENET_SIDE = 128
# DenseNet-121 halves the side three times.
_MIN_SIDE = {"convnet": 2, "vgg16": 2, "resnet18": 2, "densenet121": 8}


class Network(nn.Module):
    """A classifier of images in [0, 1], as stages in a row and a head.

    Args:
        stages: Modules from images, then from each other's output, ``(N, C', H', W')``.
        head: From the last stage's output to logits ``(N, num_classes)``.
        num_classes: Number of logits.
        mean: ``(C,)``, subtracted from the images.
        std: ``(C,)``, which they are divided by.

    Attributes:
        classes: int64 ``(num_classes,)``, the label that each logit stands for: 0, 1, ... until
            :func:`hmn_replay.training.train.evaluate` writes a data set's own labels there.
    """

    mean: Tensor
    std: Tensor
    classes: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        head: nn.Module,
        num_classes: int,
        mean: Tensor,
        std: Tensor,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        self.register_buffer("classes", torch.arange(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of float images ``(N, C, H, W)`` in [0, 1]."""
        x = (images - self.mean) / self.std
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x)
        return logits

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what every stage gives, ``(N, C', H', W')`` each, first stage first.

        The stages are ConvNet's blocks; what VGG has up to each pooling; the stem and the four
        groups of ResNet and DenseNet.
        """
        x = (images - self.mean) / self.std
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class ConvBlock(nn.Sequential):
    """A block of ConvNet: 3 x 3 convolution, instance normalisation, ReLU, average pooling by 2.

    Args:
        in_channels: Channels of its input.
        width: Channels of its output.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            _AveragePool(),
        )

    @property
    def convolution(self) -> nn.Conv2d:
        """The first layer."""
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> nn.GroupNorm:
        """The second layer: one channel a group."""
        return cast(nn.GroupNorm, self[1])


def build_network(
    name: str,
    image_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 128,
    depth: int | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    seed: int = 0,
) -> Network:
    """Build a network with random float32 weights on the CPU.

    `convnet` is the ConvNet-3 of dataset condensation (Gidaris and Komodakis 2018): blocks of
    3 x 3 convolution, instance normalisation with learned scale and shift, ReLU, average pooling by
    2; one linear layer. The normalisation is written ``GroupNorm(width, width)``, the same function
    as ``InstanceNorm2d`` with a second derivative about 7 times faster on a CPU.

    The others are torchvision's, with batch normalisation (VGG-16 too: torchvision's `vgg16_bn`),
    fitted to small images as the field does: ResNet-18 and DenseNet-121 begin with a 3 x 3
    convolution of stride 1 and no pooling, unless the smaller side is 128 or more; VGG-16 leaves
    out a pooling that would leave less than one pixel, and ends in one linear layer.

    Args:
        name: One of :data:`NETWORKS`.
        image_shape: ``(C, H, W)``: any number of channels; sides of 2 or more, DenseNet 8 or more.
        num_classes: Number of logits.
        width: Channels of every block; ConvNet only. Default: 128.
        depth: Number of blocks; ConvNet only. Default: :func:`default_depth`.
        mean: ``(C,)`` subtracted from images in [0, 1]. Default: 0.
        std: ``(C,)`` that they are divided by, above 0. Default: 1.
        seed: The same seed gives the same weights; the global random state is left as it was.

    Returns:
        The network, in training mode.

    Raises:
        ConfigError: Unknown name, or a value outside what is said above.
    """
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ConfigError(f"image_shape must be (C, H, W), got {tuple(image_shape)}")
    channels, height, wide = image_shape
    side = min(height, wide)
    if side < _MIN_SIDE[name]:
        raise ConfigError(
            f"{name} takes images with sides of {_MIN_SIDE[name]} or more, got {height} x {wide}"
        )
    if num_classes < 1 or width < 1:
        raise ConfigError(f"num_classes and width must be 1 or more, got {num_classes} and {width}")
    mean = _statistic("mean", mean, channels, 0.0)
    std = _statistic("std", std, channels, 1.0)
    if not bool((std > 0).all()):
        raise ConfigError(f"std must be above 0, got {std.tolist()}")
    with default_float32(), seeded(seed, "network", name):
        if name == "convnet":
            blocks = default_depth(height, wide) if depth is None else depth
            stages, head = _convnet(channels, height, wide, num_classes, width, blocks)
        else:
            stages, head = _TORCHVISION[name](channels, side, num_classes)
    return Network(stages, head, num_classes, mean, std)


def default_depth(height: int, width: int) -> int:
    """Return the number of ConvNet's blocks that the field uses for images of a size.

    By the smaller side: 3 up to 48 pixels (CIFAR), 4 up to 96 (Tiny-ImageNet), 5 up to 160, 6 above
    (ImageNet at 224). Below 16 pixels 2 or fewer, which the field has no custom for: a third block
    would normalise maps of 2 x 2 pixels.
    """
    side = min(height, width)
    usual = 2 if side < 16 else 3 if side <= 48 else 4 if side <= 96 else 5 if side <= 160 else 6
    return max(1, min(usual, _max_depth(side)))


def _max_depth(side: int) -> int:
    return side.bit_length() - 1


def _statistic(
    name: str, value: Tensor | Sequence[float] | None, channels: int, default: float
) -> Tensor:
    if value is None:
        return torch.full((channels,), default, dtype=torch.float32)
    tensor = torch.as_tensor(value).detach().to("cpu", torch.float32).clone().reshape(-1)
    if len(tensor) != channels or not bool(tensor.isfinite().all()):
        raise ConfigError(
            f"{name} must be {channels} finite numbers, one a channel, got {tensor.tolist()}"
        )
    return tensor


_Parts = tuple[list[nn.Module], nn.Module]


def _convnet(
    channels: int, height: int, wide: int, num_classes: int, width: int, depth: int
) -> _Parts:
    deepest = _max_depth(min(height, wide))
    # Deeper, a block would normalise maps of one pixel: to zero, whatever the image.
    if not 1 <= depth <= deepest:
        raise ConfigError(
            f"depth must be in [1, {deepest}] for images of {height} x {wide}, got {depth}"
        )
    stages: list[nn.Module] = []
    for _ in range(depth):
        stages.append(ConvBlock(channels, width))
        channels = width
    pixels = (height >> depth) * (wide >> depth)
    return stages, nn.Sequential(nn.Flatten(), nn.Linear(width * pixels, num_classes))


class _AveragePool(nn.Module):
    """Average pooling by 2, over whole cells."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.avg_pool2d(x, 2)
        # Forward and backward, torch's own pooling of such maps takes twice the time on a CPU.
        height, width = (side // 2 * 2 for side in x.shape[2:])
        x = x[..., 0:height:2, :] + x[..., 1:height:2, :]
        return (x[..., 0:width:2] + x[..., 1:width:2]) / 4


def _pooled_linear(num_features: int, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_features, num_classes)
    )


def _vgg16(channels: int, side: int, num_classes: int) -> _Parts:
    stages: list[nn.Module] = []
    for widths in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        layers: list[nn.Module] = []
        for width in widths:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        stages.append(nn.Sequential(*layers))
    return stages, _pooled_linear(channels, num_classes)


def _resnet18(channels: int, side: int, num_classes: int) -> _Parts:
    from torchvision.models import resnet18

    model = resnet18(weights=None, num_classes=num_classes)
    stem = [
        _stem(channels, side, mode="fan_out"),
        model.bn1,
        model.relu,
        *([model.maxpool] if side >= _IMAGENET_SIDE else []),
    ]
    groups = [model.layer1, model.layer2, model.layer3, model.layer4]
    return [nn.Sequential(*stem), *groups], _pooled_linear(512, num_classes)


def _densenet121(channels: int, side: int, num_classes: int) -> _Parts:
    from torchvision.models import densenet121

    model = densenet121(weights=None, num_classes=num_classes)
    parts = model.features
    stem = [
        _stem(channels, side, mode="fan_in"),
        parts.norm0,
        parts.relu0,
        *([parts.pool0] if side >= _IMAGENET_SIDE else []),
    ]
    groups = [
        nn.Sequential(parts.denseblock1, parts.transition1),
        nn.Sequential(parts.denseblock2, parts.transition2),
        nn.Sequential(parts.denseblock3, parts.transition3),
        nn.Sequential(parts.denseblock4, parts.norm5, nn.ReLU(inplace=True)),
    ]
    return [nn.Sequential(*stem), *groups], _pooled_linear(1024, num_classes)


def _stem(channels: int, side: int, *, mode: Literal["fan_in", "fan_out"]) -> nn.Conv2d:
    kernel, stride = (7, 2) if side >= _IMAGENET_SIDE else (3, 1)
    stem = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode=mode, nonlinearity="relu")
    return stem


_TORCHVISION: dict[str, Callable[[int, int, int], _Parts]] = {
    "vgg16": _vgg16,
    "resnet18": _resnet18,
    "densenet121": _densenet121,
}
