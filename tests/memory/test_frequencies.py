"""The memory of frequencies, against sums of cosines written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.condensation.condense import condense
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory import FrequencyLayout, FrequencyMemory
from tests.support import PLAIN_FORMATS, trained

Doubles = npt.NDArray[np.float64]
pytestmark = pytest.mark.usefixtures("untouched_random_state")

CIFAR = (3, 32, 32)
shapes = pytest.mark.parametrize(
    "shape", [(3, 8, 8), (1, 9, 14), (3, 12, 40), (1, 70, 33)], ids=str
)


def smooth_images(
    count: int, shape: tuple[int, int, int], seed: int = 0, noise: float = 0.02
) -> Tensor:
    """Return images of low frequencies and a little noise, float32 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], 3, 3, generator=generator)
    images = torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear")
    return (images + noise * torch.randn(count, *shape, generator=generator)).clamp(0, 1)


def cosine(frequency: int, pixel: int, size: int) -> float:
    scale = math.sqrt((1 if frequency == 0 else 2) / size)
    return scale * math.cos(math.pi * frequency * (2 * pixel + 1) / (2 * size))


def wave(colour: int, u: int, v: int, shape: tuple[int, int, int]) -> Doubles:
    """Return what a coefficient of 1 stands for in a block: float64 ``(C, h, w)``."""
    channels, height, width = shape
    colours = [[1.0]] if channels == 1 else [[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]]
    own = np.array(colours[colour], np.float64)
    rows = np.array([cosine(u, i, height) for i in range(height)])
    columns = np.array([cosine(v, j, width) for j in range(width)])
    found: Doubles = np.einsum("c,i,j->cij", own / np.linalg.norm(own), rows, columns)
    return found


def waves(shape: tuple[int, int, int], block: tuple[int, int], count: int) -> Doubles:
    """Return what each stored coefficient of a block stands for, the lowest first."""
    whole = (shape[0], *block)

    def distance(which: tuple[int, int, int]) -> float:
        colour, u, v = which
        return (1.0, 2.6, 4.0)[colour] * (
            0.5 + 32 * math.sqrt((u / block[0]) ** 2 + (v / block[1]) ** 2)
        )

    every = [(c, u, v) for c in range(shape[0]) for u in range(block[0]) for v in range(block[1])]
    return np.stack([wave(*which, whole) for which in sorted(every, key=distance)[:count]])


def bytes_of(memory: FrequencyMemory, indices: Tensor) -> float:
    """Return the bytes that an image's code takes, on average."""
    with torch.no_grad():
        return float(memory.rate(indices)[0]) / 8


# Decoding.


@shapes
def test_an_image_is_a_sum_of_cosines(shape: tuple[int, int, int]) -> None:
    layout = FrequencyLayout(shape, "float32", 40)
    memory = trained(FrequencyMemory(layout, [0], 2))
    (height, width), (down, across) = layout.block, layout.blocks
    assert max(layout.block) <= 32 and height * down >= shape[1] and width * across >= shape[2]
    own = waves(shape, layout.block, 40)
    coefficients = memory.coefficients.detach().double().flatten(2).numpy()
    step = math.exp(memory.log_step.item())
    for image, wanted in zip(memory.decode()[0].numpy(), coefficients, strict=True):
        blocks = np.einsum("bf,fcij->bcij", wanted * step, own) + 0.5
        for block, (row, column) in zip(blocks, np.ndindex(down, across), strict=True):
            shown = image[:, row * height :, column * width :][:, :height, :width]
            cut = block[:, : shown.shape[1], : shown.shape[2]].clip(0, 1)
            np.testing.assert_allclose(shown, cut, atol=2e-6)


@pytest.mark.parametrize(
    ("image_bytes", "units"), [(96, 1), (130, 1), (140, 2), (280, 4), (999, 4)]
)
def test_the_lowest_frequencies_have_coarser_units_in_larger_images(
    image_bytes: int, units: int
) -> None:
    layout = FrequencyLayout(CIFAR, "entropy", 64, image_bytes)
    assert layout.lowest_units == units
    memory = FrequencyMemory(layout, [0], 1)
    values = torch.randint(-3, 4, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        memory.coefficients.copy_(values)
        memory.log_step.fill_(-1.5)
    coefficients = values.double().numpy() * math.exp(-1.5)
    coefficients[:, :, 0] *= units
    shown = np.einsum("f,fcij->cij", coefficients.ravel(), waves(CIFAR, (32, 32), 64)) + 0.5
    np.testing.assert_allclose(memory.decode()[0][0], shown.clip(0, 1), atol=1e-5)


def test_bytes_are_spent_on_low_frequencies_and_on_brightness() -> None:
    layout = FrequencyLayout((3, 32, 32), "float32", 64)
    memory = FrequencyMemory(layout, [0], 64)
    with torch.no_grad():
        memory.coefficients.copy_(torch.eye(64).view(64, 1, 8, 8))
    shown = memory.decode()[0] - 0.5
    assert shown[0].std() < 1e-6 and shown[0].mean() > 0
    grey = (shown - shown.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert 40 < int(grey.sum()) < 64
    # A whole image of one colour is among the first, the finest waves are not.
    assert not grey[:5].all()
    spectrum = torch.fft.rfft2(shown).abs().square()
    assert float(spectrum[:, :, 8:24, 8:].sum() / spectrum.sum()) < 0.01


def test_images_may_be_looked_at_first_and_learned_afterwards() -> None:
    # Of a shape that no other test has, for which nothing has been kept.
    memory = FrequencyMemory(FrequencyLayout((1, 11, 13), "float32", 40), [0], 2)
    with torch.inference_mode():
        memory.decode()
    memory(torch.arange(2)).sum().backward()
    assert memory.coefficients.grad is not None and bool(memory.coefficients.grad.any())


# Fitting to real images.


@shapes
def test_with_all_frequencies_images_come_back(shape: tuple[int, int, int]) -> None:
    least = FrequencyLayout(shape, "float32", 8)
    every = shape[0] * math.prod(least.block) // 8 * 8
    memory = FrequencyMemory(FrequencyLayout(shape, "float32", every), [3], 5)
    images = smooth_images(5, shape)
    assert memory.fit(0, lambda positions: images[positions])
    # Of an odd number of frequencies the last few are left out.
    tolerance = 1e-5 if every == shape[0] * math.prod(least.block) else 0.02
    torch.testing.assert_close(memory.decode()[0], images, rtol=0, atol=tolerance)


@pytest.mark.parametrize("number_format", PLAIN_FORMATS)
def test_few_frequencies_show_what_is_coarse(number_format: str) -> None:
    images = smooth_images(6, CIFAR)
    memory = FrequencyMemory(FrequencyLayout(CIFAR, number_format, 192), [3], 6)
    memory.fit(0, lambda positions: images[positions])
    memory.update_scales()
    assert float((memory.decode()[0] - images).square().mean()) < 1e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(12, 400), st.integers(0, 99))
def test_coded_images_take_what_is_planned(image_bytes: int, seed: int) -> None:
    layout = FrequencyLayout.of_images(CIFAR, "entropy", image_bytes)
    memory = FrequencyMemory(layout, [0, 1], [20, 0])
    images = smooth_images(20, CIFAR, seed, noise=0.15)
    memory.fit(0, lambda positions: images[positions])
    taken = bytes_of(memory, torch.arange(20))
    assert 0.9 * image_bytes < taken <= image_bytes


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 32), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("edge", [False, True])
def test_flat_images_and_plain_patterns_are_encoded(
    shape: tuple[int, int, int], edge: bool
) -> None:
    images = torch.zeros(8, *shape)
    images[2:4] = 1.0
    images[4:6, :, :, : shape[2] // (2 if edge else 1)] = 1.0
    images[6:] = 0.3
    data = LabelledImages(images.mul(255).round().to(torch.uint8), torch.arange(8) % 2)
    memory = condense(
        data, 4096, kind="fred", warm_start_steps=5, outer_steps=0, device="cpu", over_budget=0
    )
    decoded, labels = memory.decode()
    for own, label in zip(decoded, labels, strict=True):
        others = data.floats(data.of_class(int(label)))
        nearest = float((others - own).square().flatten(1).mean(1).min())
        assert nearest < (0.04 if edge else 1e-4)


@pytest.mark.parametrize("image_bytes", [96, 160, 400, 800])
def test_no_image_is_too_bright_for_its_bytes(image_bytes: int) -> None:
    images = smooth_images(40, CIFAR, noise=0.1)
    images[::4], images[1::4] = 0.1 * images[::4], 1 - 0.1 * images[1::4]
    memory = FrequencyMemory(FrequencyLayout.of_images(CIFAR, "entropy", image_bytes), [0], 40)
    memory.fit(0, lambda positions: images[positions])
    assert float(memory.coefficients.detach().round().abs().max()) <= 127
    psnr = -10 * (memory.decode()[0] - images).square().mean(dim=(1, 2, 3)).log10()
    assert float(torch.cat([psnr[::4], psnr[1::4]]).min()) > 32


def test_more_bytes_show_more() -> None:
    images, errors = smooth_images(20, CIFAR), []
    for image_bytes in (8, 20, 50):
        memory = FrequencyMemory(FrequencyLayout.of_images(CIFAR, "entropy", image_bytes), [0], 20)
        memory.fit(0, lambda positions: images[positions])
        errors.append(float((memory.decode()[0] - images).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_images_of_later_classes_have_the_step_of_the_first_ones_and_take_as_much() -> None:
    images = smooth_images(20, CIFAR)
    memory = FrequencyMemory(FrequencyLayout.of_images(CIFAR, "entropy", 60), [0], 20)
    memory.fit(0, lambda positions: images[positions])
    before, step = memory.decode()[0], memory.log_step.clone()
    memory.add_classes([1], [20])
    # Rougher ones, which at that step would take more.
    rough = smooth_images(20, CIFAR, seed=1, noise=0.06)
    memory.fit(20, lambda positions: rough[positions - 20])
    assert memory.log_step.equal(step)
    assert memory.decode(range(20))[0].equal(before)
    new = torch.arange(20, 40)
    assert 54 < bytes_of(memory, new) <= 60
    assert float((memory.decode(new)[0] - rough).square().mean()) < 0.02


def test_a_codec_shows_images_as_the_memory_would() -> None:
    images = smooth_images(30, CIFAR).mul(255).round().to(torch.uint8)
    memory = FrequencyMemory(FrequencyLayout.of_images(CIFAR, "entropy", 60), [0], 30)
    memory.fit(0, lambda positions: images[positions].float() / 255)
    codec = memory.codec()
    assert codec is not None
    shown, kept = codec(images), memory.decode(dtype=torch.uint8)[0]
    assert shown.shape == images.shape and shown.dtype == torch.uint8
    assert float((shown.int() - kept.int()).abs().float().mean()) < 0.5
    assert codec(images[:0]).shape == (0, *CIFAR)


def test_condensing_fits_fills_and_matches() -> None:
    images = smooth_images(80, (3, 16, 16)).mul(255).to(torch.uint8)
    data = LabelledImages(images, torch.arange(80) % 2)
    options: dict[str, Any] = {"kind": "fred", "effort": "draft", "device": "cpu", "over_budget": 0}
    fitted = condense(data, "1200", outer_steps=0, **options)
    assert fitted.report["warm_start_psnr"] > 25 and fitted.report["fill"] > 0.97
    options |= {"network_width": 4, "trained_passes": 100, "decoded_batch": 8, "real_batch": 8}
    matched = condense(data, "1200", outer_steps=2, **options)
    assert matched.file_bytes <= 1200
    count = min(fitted.num_images, matched.num_images)
    moved = matched.decode(range(count))[0] - fitted.decode(range(count))[0]
    assert 0 < float(moved.abs().mean()) < 0.1


# Layouts.


def test_a_budget_is_filled_with_images_of_planned_size() -> None:
    layout = FrequencyMemory.choose_layout("120KiB", CIFAR, 10)
    assert (layout.image_bytes, layout.number_format) == (96, "entropy")
    assert layout.num_frequencies == 1056
    assert 1200 < FrequencyMemory.max_images(layout, "120KiB", 10) < 1280
    asked = FrequencyMemory.choose_layout("120KiB", CIFAR, 10, image_bytes=60)
    assert asked.image_bytes == 60 and asked.num_frequencies < 1056
    plain = FrequencyMemory.choose_layout("120KiB", CIFAR, 10, "float32")
    assert (plain.image_bytes, plain.num_frequencies) == (0, 192)


def test_images_are_smaller_where_budgets_are_and_larger_where_real_ones_are_few() -> None:
    small = FrequencyMemory.choose_layout("3KiB", CIFAR, 10)
    assert small.image_bytes < 60
    assert FrequencyMemory.max_images(small, "3KiB", 10) >= 50
    few = FrequencyMemory.choose_layout("120KiB", CIFAR, 10, real_images_per_class=60)
    assert FrequencyMemory.max_images(few, "120KiB", 10) <= 600
    larger = FrequencyMemory.max_images(
        FrequencyLayout.of_images(CIFAR, "entropy", few.image_bytes - 1), "120KiB", 10
    )
    assert larger > 600
    most = FrequencyMemory.choose_layout("120KiB", CIFAR, 10, real_images_per_class=1)
    assert most.image_bytes == 4 * 96


def test_a_budget_that_holds_no_image_of_each_class_is_refused() -> None:
    with pytest.raises(BudgetError, match="does not hold one image of each of 1000 classes"):
        FrequencyMemory.choose_layout(1500, CIFAR, 1000)


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((3, 8, 8), 12, "multiple of 8, up to 192"),
        ((3, 8, 8), 200, "multiple of 8, up to 192"),
        ((1, 9, 9), 88, "multiple of 8, up to 81"),
        ((1, 9, 9), 0, "multiple of 8"),
    ],
)
def test_a_number_of_frequencies_out_of_range_is_refused(
    shape: tuple[int, int, int], count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FrequencyLayout(shape, "float32", count)
