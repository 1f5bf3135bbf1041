"""A step of gradient matching, `hmn_replay.gradient_matching`, against the published one.

Both get the same ConvNet-3 with GroupNorm(C, C), the same real and decoded images of one class, and
give the gradient to the decoded images of the squared distance between the gradients of the
convolution weights. The reference, experiments/reference.py, is written in the plainest way after
IDC's loop: it takes every parameter's gradient. Ours is compiled, as in condensations that are long
enough, and timed in float32 and under autocast to bfloat16; the reference in float32 alone, as it
is. All take turns, and medians are compared. --no-compile takes ours as it is, too.

Share of the peak. A convolution's forward pass, its gradient to the weight and its gradient to the
input are as much work each. Of the first layer the step needs 7 such passes over one batch: on real
images 2, forward and to the weight; on decoded ones 5, these two, and for the second derivative one
forward and two to the input. Of every other layer it needs 10: on real images also the one to the
input, on decoded ones that too, and one more forward. The yardstick is a forward pass of the
network's convolutions, and of nothing else, over one batch, in the memory format that is faster.
peak_fraction is the FLOP/s of the step's necessary work over those of the yardstick. Work is that
of direct convolution, of the derivative along the distance's gradient, which double backward
exceeds.

Peak memory is that of a fresh process which takes one step, without compiling, and of which
"before" is what it took before the step: torch, this package, network and images. On a GPU, that of
tensors alone.

Relative errors are |ours - reference| / |reference|, norms over all images' gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hmn_replay
from experiments.benchmarks.common import in_fresh_process, interleave, positive, readable
from experiments.reference import make_convnet, matching_step
from hmn_replay.errors import ConfigError
from hmn_replay.objectives import get_objective
from hmn_replay.runtime import autocast, make_generator, peak_memory_bytes, resolve_device, seeded

SMOKE = {"width": 4, "batch": 2, "side": 8, "rounds": 1, "warm_up": 1, "compile": False}

# Passes over one batch: on the real images, then on the decoded ones.
FIRST_LAYER_PASSES = 2 + 5
OTHER_LAYER_PASSES = 3 + 7

CHANNELS, NUM_CLASSES, DEPTH = 3, 10, 3
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive, default=128, help="channels of ConvNet's blocks")
    parser.add_argument("--batch", type=positive, default=64, help="real images, and decoded ones")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument("--rounds", type=positive, default=15, help="how often each step is timed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="whether our step is compiled")  # fmt: skip
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.side < 2**DEPTH:
        raise ConfigError(f"--side must be {2**DEPTH} or more, got {args.side}")
    device = resolve_device(args.device)
    shape = (args.width, args.batch, args.side)
    steps = make_steps(*shape, device, compile=args.compile)
    yardsticks = {
        f"{precision}, {layout}": make_yardstick(*shape, device, dtype, memory_format)
        for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for layout, memory_format in MEMORY_FORMATS.items()
    }
    seconds = interleave({**steps, **yardsticks}, args.rounds, device, warm_up=args.warm_up)
    work = convolution_work(*shape)

    def fraction(step: str, precision: str) -> float:
        forward = min(seconds[f"{precision}, {layout}"] for layout in MEMORY_FORMATS)
        share: float = (work["step_flops"] / seconds[step]) / (work["forward_flops"] / forward)
        return share

    peaks = {
        name: in_fresh_process(peak_memory, name, *shape, str(device), torch.get_num_threads())
        for name in steps
    }
    results = {
        "ours_seconds": seconds["ours"],
        "ours_bfloat16_seconds": seconds["ours_bfloat16"],
        "reference_seconds": seconds["reference"],
        "ratio": seconds["reference"] / seconds["ours"],
        "ratio_bfloat16": seconds["reference"] / seconds["ours_bfloat16"],
        "peak_fraction": fraction("ours", "float32"),
        "peak_fraction_bfloat16": fraction("ours_bfloat16", "bfloat16"),
        "peak_fraction_reference": fraction("reference", "float32"),
        **relative_errors(*shape, device, compile=args.compile),
        "peak_memory_bytes": {name: peak for name, (peak, _) in peaks.items()},
        "peak_memory_before_bytes": {name: before for name, (_, before) in peaks.items()},
        "convolution_forward_seconds": {name: seconds[name] for name in yardsticks},
        "work": work,
    }
    report(results, args)
    return results


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"ConvNet-{DEPTH} of width {args.width}, {args.batch} real and {args.batch} decoded images "
        f"of {CHANNELS} x {args.side} x {args.side}; medians of {args.rounds}"
    )
    titles = ("ms a step", "times", "of peak", "peak memory", "before")
    print(" " * 20 + "{:>12s}{:>8s}{:>9s}{:>14s}{:>14s}".format(*titles))
    rows = {"reference": "", "ours": "", "ours_bfloat16": "_bfloat16"}
    for name, suffix in rows.items():
        is_reference = name == "reference"
        ratio = 1.0 if is_reference else results[f"ratio{suffix}"]
        share = results["peak_fraction" + ("_reference" if is_reference else suffix)]
        print(
            f"{name.replace('_', ', '):20s}{1000 * results[f'{name}_seconds']:12.2f}{ratio:8.2f}"
            f"{100 * share:7.1f} %{readable(results['peak_memory_bytes'][name]):>14s}"
            f"{readable(results['peak_memory_before_bytes'][name]):>14s}"
        )
    work = results["work"]
    print(
        f"necessary work: {work['step_flops'] / 1e9:.3g} GFLOP a step, a forward pass of the "
        f"convolutions {work['forward_flops'] / 1e9:.3g}"
    )
    print(
        f"relative error: float64 {results['relative_error_float64']:.1e}, float32 "
        f"{results['relative_error']:.1e} (the reference's own rounding "
        f"{results['reference_rounding']:.1e}), bfloat16 {results['relative_error_bfloat16']:.1e}"
    )


def make_inputs(
    width: int, batch: int, side: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return our network, the reference's with the same weights, and the arguments of a step."""
    shape = (CHANNELS, side, side)
    network = hmn_replay.build_network("convnet", shape, NUM_CLASSES, width=width, depth=DEPTH)
    with seeded(0, "reference"):
        plain = make_convnet(shape, NUM_CLASSES, width, DEPTH)
    with torch.no_grad():
        for theirs, ours in zip(plain.parameters(), network.parameters(), strict=True):
            theirs.copy_(ours)
    generator = make_generator(0, "images")
    real, decoded = torch.rand(2, batch, *shape, generator=generator).to(device, dtype)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    arguments = (real, labels, decoded, labels)
    return network.to(device, dtype), plain.to(device, dtype), arguments


def make_steps(
    width: int,
    batch: int,
    side: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compile: bool = False,
) -> dict[str, Callable[[], Tensor]]:
    """Return the steps by name, each a function that returns the gradient to the images."""
    network, plain, arguments = make_inputs(width, batch, side, device, dtype)
    decoded = arguments[2].requires_grad_()
    objective = get_objective("gradient")
    matching = objective if objective.compiled is None or not compile else objective.compiled()

    def ours(precision: str = "float32") -> Tensor:
        with autocast(device, precision):
            return torch.autograd.grad(matching(network, *arguments), decoded)[0]

    return {
        "reference": lambda: matching_step(plain, *arguments)[1],
        "ours": ours,
        "ours_bfloat16": lambda: ours("bfloat16"),
    }


def convolution_sizes(width: int, side: int) -> list[tuple[int, int, int]]:
    """Return input channels, output channels and side of each of the network's convolutions."""
    channels = [CHANNELS, *[width] * DEPTH]
    return [(channels[n], channels[n + 1], side >> n) for n in range(DEPTH)]


def convolution_work(width: int, batch: int, side: int) -> dict[str, Any]:
    """Count the FLOPs of a forward pass of the convolutions, and of what a step needs of them."""
    first, *others = (
        2 * 9 * inputs * outputs * size**2 * batch
        for inputs, outputs, size in convolution_sizes(width, side)
    )
    return {
        "forward_flops": first + sum(others),
        "step_flops": FIRST_LAYER_PASSES * first + OTHER_LAYER_PASSES * sum(others),
        "first_layer_passes": FIRST_LAYER_PASSES,
        "other_layer_passes": OTHER_LAYER_PASSES,
    }


def make_yardstick(
    width: int,
    batch: int,
    side: int,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Callable[[], None]:
    """Return a forward pass of the network's convolutions, each on an input of its own."""
    generator = make_generator(0, "yardstick")

    def tensor(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=memory_format)

    layers = [
        (tensor(batch, inputs, size, size), tensor(outputs, inputs, 3, 3))
        for inputs, outputs, size in convolution_sizes(width, side)
    ]

    @torch.no_grad()
    def forward() -> None:
        for images, weight in layers:
            torch.nn.functional.conv2d(images, weight, padding=1)

    return forward


def peak_memory(
    name: str, width: int, batch: int, side: int, device_name: str, threads: int
) -> tuple[int, int]:
    """Return the most memory that this process used with one step, and before it."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    step = make_steps(width, batch, side, device)[name]
    before = peak_memory_bytes(device)
    step()
    return peak_memory_bytes(device), before


def relative_errors(
    width: int, batch: int, side: int, device: torch.device, *, compile: bool
) -> dict[str, float]:
    """Compare our gradients with the reference's, and that with itself in float64."""
    single = make_steps(width, batch, side, device, compile=compile)
    double = make_steps(width, batch, side, device, torch.float64)
    rounded, exact = single["reference"](), double["reference"]()

    def relative(gradient: Tensor, wanted: Tensor) -> float:
        gradient, wanted = gradient.cpu().double(), wanted.cpu().double()
        return float((gradient - wanted).norm() / wanted.norm())

    return {
        "relative_error": relative(single["ours"](), rounded),
        "relative_error_bfloat16": relative(single["ours_bfloat16"](), rounded),
        "relative_error_float64": relative(double["ours"](), exact),
        "reference_rounding": relative(rounded, exact),
    }
