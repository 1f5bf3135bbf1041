"""The networks that condense and evaluate: ConvNet, three of torchvision's, and users' own."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.registry import Registry, check_takes, name_of
from hmn_replay.runtime import (
    default_float32,
    drawing_from,
    make_generator,
    resolve_device,
    seeded,
)
from hmn_replay.training._timm import find_timm

__all__ = [
    "NETWORKS",
    "ConvBlock",
    "Network",
    "NetworkFactory",
    "StagedNetwork",
    "build_network",
    "default_depth",
    "find_head",
    "is_built_in",
    "linear_head",
    "logits_and_features",
]

NetworkFactory: TypeAlias = Callable[..., nn.Module]

NETWORKS: Registry[NetworkFactory] = Registry("network")
"""The networks by name. An entry is a function ``(image_shape, num_classes) -> nn.Module``.

The module maps normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``. Where the
function has a parameter ``width`` or ``depth``, it gets the one of the settings, whatever its own
default; a ``partial`` keeps what it has bound. To add a network, register its function, or pass it
in place of a name:

    @hmn_replay.NETWORKS.register("linear")
    def linear(image_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), num_classes))

``"timm:NAME"`` is a network of timm's, with random weights, and ``"timm-pretrained:NAME"`` one with
the weights that timm loads for it; both need ``pip install 'hmn-replay[timm]'``.

Objectives that match features need a module with a method ``features(images)`` that returns the
outputs of its blocks, tensors ``(N, ...)``, as a list, or the only one.

A function that is not this package's may draw weights from torch's global generator: it is seeded
while the function is called and restored afterwards, one call at a time; another thread that draws
from it meanwhile draws other numbers. So it is while such networks are trained or matched on, whose
layers may draw from it, such as dropout.
"""

NETWORKS.add_family("timm", find_timm)
NETWORKS.add_family("timm-pretrained", partial(find_timm, pretrained=True))

# From this side on, ResNet and DenseNet keep the stem that torchvision gives them for ImageNet.
_IMAGENET_SIDE = 128


class Network(nn.Module):
    """A classifier of images in [0, 1]: normalisation by channel, then any module.

    Args:
        body: Maps normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``.
        num_classes: Number of logits.
        mean: ``(C,)``, subtracted from the images.
        std: ``(C,)``, which they are divided by.

    Attributes:
        classes: int64 ``(num_classes,)``, the label that each logit stands for: 0, 1, ... until
            :func:`hmn_replay.evaluate` writes a dataset's own labels there.
    """

    mean: Tensor
    std: Tensor
    classes: Tensor

    def __init__(self, body: nn.Module, num_classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        self.register_buffer("classes", torch.arange(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of float images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.body((images - self.mean) / self.std)
        return logits

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the body's blocks, ``(N, ...)`` each, first block first.

        They are those of ConvNet's blocks; of VGG's layers up to each pooling; of the stem and the
        four groups of ResNet and DenseNet; and what another body's ``features(images)`` returns.

        Raises:
            ConfigError: The body has no ``features``.
        """
        features = getattr(self.body, "features", None)
        if not callable(features):
            raise ConfigError(
                f"{type(self.body).__name__} has no features(images), which distribution matching "
                "compares; add that method, or choose another objective or network"
            )
        outputs = features((images - self.mean) / self.std)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


class StagedNetwork(nn.Module):
    """A network as stages in a row and a head.

    Args:
        stages: Modules from images, then from each other's output, ``(N, C', H', W')``.
        head: From the last stage's output to logits ``(N, K)``.
    """

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of normalised images ``(N, C, H, W)``."""
        for stage in self.stages:
            images = stage(images)
        logits: Tensor = self.head(images)
        return logits

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the output of every stage, ``(N, C', H', W')``, first stage first."""
        outputs = [images]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]


class ConvBlock(nn.Sequential):
    """A block of ConvNet: 3 x 3 convolution, instance normalisation, ReLU, average pooling by 2.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1),
            # The function of InstanceNorm2d, but with a fast second derivative on a CPU.
            nn.GroupNorm(width, width),
            nn.ReLU(),
            _AveragePool(),
        )

    @property
    def convolution(self) -> nn.Conv2d:
        """The first layer."""
        return cast(nn.Conv2d, self[0])


def build_network(
    network: str | NetworkFactory,
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
    2; one linear layer.

    The others are torchvision's, with batch normalisation (VGG-16 too: torchvision's `vgg16_bn`),
    adapted to small images as the field does: ResNet-18 and DenseNet-121 begin with a 3 x 3
    convolution of stride 1 and no pooling, unless the smaller side is 128 or more; VGG-16 leaves
    out a pooling that would leave less than one pixel, and ends in one linear layer.

    Args:
        network: A name in :data:`NETWORKS`, or a function like its entries.
        image_shape: ``(C, H, W)``: any number of channels; for the built-in networks, sides of 2 or
            more, of DenseNet 8 or more.
        num_classes: Number of logits, 1 or more.
        width: Channels of every block of ConvNet, 1 or more. Default: 128.
        depth: Number of blocks of ConvNet. Default: :func:`default_depth`.
        mean: ``(C,)`` subtracted from images in [0, 1]. Default: 0.
        std: ``(C,)`` that they are divided by, above 0. Default: 1.
        seed: The same seed gives the same weights. Built-in networks draw them from a generator of
            their own, others as :data:`NETWORKS` says.

    Returns:
        The network, in training mode.

    Raises:
        ConfigError: Unknown name, a value outside its range, or a function that returns no module.
    """
    if isinstance(network, nn.Module):
        raise ConfigError(
            "a network is a name, or a function from image shape and number of classes to a "
            "module, so that each run has weights of its own; got a module, "
            f"{type(network).__name__}: give a function that makes it"
        )
    factory = NETWORKS[network] if isinstance(network, str) else network
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ConfigError(f"image_shape must be (C, H, W), got {tuple(image_shape)}")
    if num_classes < 1 or width < 1:
        raise ConfigError(f"num_classes and width must be 1 or more, got {num_classes} and {width}")
    mean = _statistic("mean", mean, image_shape[0], 0.0)
    std = _statistic("std", std, image_shape[0], 1.0)
    if not bool((std > 0).all()):
        raise ConfigError(f"std must be above 0, got {std.tolist()}")
    parameters = inspect.signature(factory).parameters
    bound = factory.keywords if isinstance(factory, partial) else {}
    sizes = {"width": width} | ({} if depth is None else {"depth": depth})
    sizes = {n: size for n, size in sizes.items() if n in parameters and n not in bound}
    check_takes("network", partial(factory, **sizes), ["image_shape", "num_classes"])
    build = partial(factory, (image_shape[0], *image_shape[1:]), num_classes, **sizes)
    if is_built_in(factory):
        with drawing_from(make_generator(seed, "network", name_of(network))):
            body = build()
    else:
        with seeded(seed, "network", name_of(network)), default_float32():
            body = build()
    if not isinstance(body, nn.Module):
        raise ConfigError(f"{name_of(network)} must return an nn.Module; got {type(body).__name__}")
    return Network(body.train(), num_classes, mean, std)


def is_built_in(network: str | NetworkFactory) -> bool:
    """Return whether a network is this package's, and so draws from no global generator."""
    return NETWORKS.is_built_in(network)


def default_depth(height: int, width: int) -> int:
    """Return the number of ConvNet's blocks that the field uses for images of a size.

    By the smaller side: 3 up to 48 pixels (CIFAR), 4 up to 96 (Tiny-ImageNet), 5 up to 160, 6 above
    (ImageNet at 224). Below 16 pixels, for which there is no convention, 2 or fewer: a third block
    would normalise maps of 2 x 2 pixels.
    """
    side = min(height, width)
    usual = 2 if side < 16 else 3 if side <= 48 else 4 if side <= 96 else 5 if side <= 160 else 6
    return max(1, min(usual, _max_depth(side)))


@contextlib.contextmanager
def evaluating(network: object) -> Iterator[None]:
    """Let a network be in evaluation mode inside the block, every module as it was afterwards.

    Args:
        network: Nothing happens unless it is a module.
    """
    if not isinstance(network, nn.Module):
        yield
        return
    with keeping_modes(network):
        for module in network.modules():
            module.training = False
        yield


@contextlib.contextmanager
def keeping_modes(network: nn.Module) -> Iterator[None]:
    """Let every module of a network be in the mode afterwards that it is in now."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def requires_grad(parameters: Sequence[Tensor], flag: bool) -> Iterator[None]:
    """Set ``requires_grad`` of parameters inside the block, and restore it afterwards."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(flag)
        yield
    finally:
        for parameter, before in zip(parameters, flags, strict=True):
            parameter.requires_grad_(before)


def device_of(network: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return where a network is; one without a parameter and a buffer is on the CPU by default."""
    values = itertools.chain(network.parameters(), network.buffers())
    return next((value.device for value in values), default or torch.device("cpu"))


@contextlib.contextmanager
def lent_to(network: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """Let a network be on a device and in evaluation mode inside the block, as it was afterwards.

    Args:
        network: Any module.
        device: None for where it is.

    Yields:
        The device.
    """
    home = device_of(network)
    target = home if device is None else resolve_device(device)
    try:
        network.to(target)
        with evaluating(network):
            yield target
    finally:
        network.to(home)


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and persistent buffers by name; no extra state of its own."""
    state = network.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def find_head(network: nn.Module, *inputs: Tensor) -> nn.Linear:
    """Return the linear layer whose output is what a network returns: its logits.

    Some of these may be masked, as Avalanche's ``IncrementalClassifier`` does. The layer is found
    by a forward pass, in evaluation mode and without gradients; the mode of every module is as it
    was afterwards.

    Args:
        network: Maps images to logits.
        *inputs: What it is called with: a few images that differ, float ``(N, C, H, W)``, and what
            else it takes, such as task labels.

    Raises:
        ConfigError: No linear layer makes the logits.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), evaluating(network):
        logits, calls = _watch(network, layers, *inputs)
    making = _making(logits, calls)
    if making:
        return making[-1].layer
    name = type(network).__name__
    if not layers:
        problem = f"{name} has no linear layer"
    elif isinstance(logits, Tensor):
        problem = (
            f"none of the {len(layers)} linear layers of {name} makes its logits "
            f"{tuple(logits.shape)}"
        )
    else:
        problem = f"{name} returns {type(logits).__name__}"
    raise ConfigError(
        f"{problem}, and a network is needed whose logits (N, K) are the output of an nn.Linear: "
        "return that output as it is, without a mask behind it (IncrementalClassifier: "
        "masking=False)"
    )


def logits_and_features(
    network: nn.Module, head: nn.Linear, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a network's logits ``(N, K)``, and what its head makes them from, ``(N, D)``.

    Args:
        network: Maps images to logits, in the mode that it is in.
        head: What :func:`find_head` returns.
        images: float ``(N, C, H, W)``.
    """
    logits, calls = _watch(network, [head], images)
    return logits, (_making(logits, calls) or calls)[-1].given.flatten(1)


class _Call(NamedTuple):
    """A call of a linear layer."""

    layer: nn.Linear
    given: Tensor
    output: Tensor


def _watch(
    network: nn.Module, layers: Sequence[nn.Linear], *inputs: Tensor
) -> tuple[Any, list[_Call]]:
    """Return what a network returns, and the calls of some of its layers, in their order."""
    calls: list[_Call] = []

    def note(
        layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        calls.append(
            _Call(cast(nn.Linear, layer), given[0] if given else named["input"], output.clone())
        )

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        # What torch.compile has made before would not call the hooks.
        plain = cast(nn.Module, getattr(network, "_orig_mod", network))
        return plain._call_impl(*inputs), calls


def _making(logits: Any, calls: Sequence[_Call]) -> list[_Call]:
    """Return the calls whose output equals the logits; or does so but where these are masked.

    Logits are masked that have one value for all of two images or more, as those of classes that
    are still to come.
    """
    if not isinstance(logits, Tensor):
        return []
    own = [call for call in calls if call.output.shape == logits.shape]
    if not own:
        return []
    same = [
        torch.isclose(call.output.to(logits.dtype), logits, 0, 0, equal_nan=True) for call in own
    ]
    if found := [call for call, is_same in zip(own, same, strict=True) if is_same.all()]:
        return found
    masked = (logits == logits[:1]).all(dim=0)
    if masked.all():  # of one image alone, or of equal ones, nothing can be told
        return []
    return [call for call, is_same in zip(own, same, strict=True) if (masked | is_same).all()]


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


def _check_side(name: str, image_shape: Sequence[int], least: int) -> None:
    _, height, width = image_shape
    if min(height, width) < least:
        raise ConfigError(
            f"{name} needs images with sides of {least} or more, got {height} x {width}"
        )


@NETWORKS.register("convnet")
def _convnet(
    image_shape: Sequence[int], num_classes: int, *, width: int = 128, depth: int | None = None
) -> nn.Module:
    _check_side("convnet", image_shape, 2)
    channels, height, wide = image_shape
    depth = default_depth(height, wide) if depth is None else depth
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
    head = nn.Sequential(nn.Flatten(), nn.Linear(width * pixels, num_classes))
    return StagedNetwork(stages, head)


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


@NETWORKS.register("vgg16")
def _vgg16(image_shape: Sequence[int], num_classes: int) -> nn.Module:
    _check_side("vgg16", image_shape, 2)
    channels, side = image_shape[0], min(image_shape[1:])
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
    return StagedNetwork(stages, _pooled_linear(channels, num_classes))


@NETWORKS.register("resnet18")
def _resnet18(image_shape: Sequence[int], num_classes: int) -> nn.Module:
    from torchvision.models import resnet18

    _check_side("resnet18", image_shape, 2)
    channels, side = image_shape[0], min(image_shape[1:])

    model = resnet18(weights=None, num_classes=num_classes)
    stem = [
        _stem(channels, side, mode="fan_out"),
        model.bn1,
        model.relu,
        *([model.maxpool] if side >= _IMAGENET_SIDE else []),
    ]
    groups = [model.layer1, model.layer2, model.layer3, model.layer4]
    return StagedNetwork([nn.Sequential(*stem), *groups], _pooled_linear(512, num_classes))


@NETWORKS.register("densenet121")
def _densenet121(image_shape: Sequence[int], num_classes: int) -> nn.Module:
    from torchvision.models import densenet121

    _check_side("densenet121", image_shape, 8)  # it halves the side three times
    channels, side = image_shape[0], min(image_shape[1:])

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
    return StagedNetwork([nn.Sequential(*stem), *groups], _pooled_linear(1024, num_classes))


def _stem(channels: int, side: int, *, mode: Literal["fan_in", "fan_out"]) -> nn.Conv2d:
    kernel, stride = (7, 2) if side >= _IMAGENET_SIDE else (3, 1)
    stem = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode=mode, nonlinearity="relu")
    return stem


def linear_head(feature_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return a linear layer on features ``(N, C, H, W)``: as for :data:`hmn_replay.NETWORKS`.

    Args:
        feature_shape: ``(C, H, W)``.
        num_classes: Number of logits.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(feature_shape), num_classes))


# Reports name it so, and a seed's weights are drawn by that name.
linear_head.__module__ = "hmn_replay.training.backbones"

NETWORKS.mark_built_in(linear_head)
