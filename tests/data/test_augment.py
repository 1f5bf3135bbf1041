"""Augmentation against a pixel-by-pixel reference."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import hmn_replay
from hmn_replay.data.augment import (
    STRATEGIES,
    Augmentation,
    RandomAugmentation,
    augment_training,
    cutmix,
    draw_augmentation,
)
from hmn_replay.errors import ConfigError, DataError

FILL = (0.2, 0.5, 0.7)
STD = (0.1, 0.2, 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def draw(
    names: tuple[str, ...], size: tuple[int, int], seed: int = 0, batch: int | None = None
) -> Augmentation:
    return draw_augmentation(names, size, generator(seed), batch=batch, fill=FILL, std=STD)


def reference(augmentation: Augmentation, images: Tensor) -> Tensor:
    """The same, one pixel at a time, from the published formulas."""
    out = torch.empty_like(images)
    _, channels, height, width = images.shape
    names = augmentation.names
    fill = torch.tensor(FILL, dtype=images.dtype)
    for n, original in enumerate(images):
        row = n if augmentation.batch is not None else 0
        image = original.clone()
        if "color" in names:
            brightness, saturation, contrast = augmentation.color[:, row].tolist()
            for c in range(channels):
                image[c] += brightness * STD[c]
            for y in range(height):
                for x in range(width):
                    pixel = image[:, y, x]
                    mean = sum(pixel.tolist()) / channels
                    image[:, y, x] = (pixel - mean) * saturation + mean
            mean = sum(image.flatten().tolist()) / image.numel()
            image = (image - mean) * contrast + mean
        mirror, down, right, top, left = augmentation.pixels[:, row].tolist()
        xx, xy, x0, yx, yy, y0 = augmentation.affine[:, row].tolist()

        def value(y: int, x: int, image: Tensor = image) -> Tensor:
            return image[:, y, x] if 0 <= y < height and 0 <= x < width else fill

        for y in range(height):
            for x in range(width):
                if names & {"scale", "rotate"}:
                    unit_x, unit_y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
                    from_x = ((xx * unit_x + xy * unit_y + x0 + 1) * width - 1) / 2
                    from_y = ((yx * unit_x + yy * unit_y + y0 + 1) * height - 1) / 2
                    i, j = math.floor(from_y), math.floor(from_x)
                    b, a = from_y - i, from_x - j
                    upper = (1 - a) * value(i, j) + a * value(i, j + 1)
                    lower = (1 - a) * value(i + 1, j) + a * value(i + 1, j + 1)
                    out[n, :, y, x] = (1 - b) * upper + b * lower
                else:
                    from_y, source_x = y + down, x + right
                    if 0 <= from_y < height and 0 <= source_x < width:
                        source_x = width - 1 - source_x if mirror < 0 else source_x
                        out[n, :, y, x] = image[:, from_y, source_x]
                    else:
                        out[n, :, y, x] = fill
                inside_y = top <= y < top + int(height * 0.5 + 0.5)
                if "cutout" in names and inside_y and left <= x < left + int(width * 0.5 + 0.5):
                    out[n, :, y, x] = fill
    return out


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(
    "names",
    [
        *((name,) for name in STRATEGIES),
        ("crop", "flip"),
        ("color", "crop", "cutout"),
        ("scale", "rotate"),
        STRATEGIES,
    ],
)
def test_equals_the_reference_pixel_by_pixel(names: tuple[str, ...], batch: int | None) -> None:
    for seed in range(3):
        images = noise(3, 3, 9, 14)
        augmentation = draw(names, (9, 14), seed, batch)
        torch.testing.assert_close(
            augmentation(images), reference(augmentation, images), rtol=1e-12, atol=1e-12
        )


def test_drawn_values_cover_the_published_ranges() -> None:
    augmentation = draw(STRATEGIES, (32, 24), batch=20_000)
    brightness, saturation, contrast = augmentation.color
    for drawn, low, high in (
        (brightness, -0.5, 0.5),
        (saturation, 0.0, 2.0),
        (contrast, 0.5, 1.5),
    ):
        assert low <= drawn.min() < low + 0.01
        assert high - 0.01 < drawn.max() <= high
    mirror, down, right, top, left = augmentation.pixels
    assert abs(float((mirror < 0).double().mean()) - 0.5) < 0.02
    assert down.unique().tolist() == list(range(-4, 5))
    assert right.unique().tolist() == list(range(-3, 4))
    # A square of 16 x 12 whose centre is anywhere in the image, or on its far border.
    assert top.unique().tolist() == list(range(-8, 25))
    assert left.unique().tolist() == list(range(-6, 19))


def test_scale_and_rotation_are_of_the_published_size() -> None:
    zoom_x, xy, _, yx, zoom_y, _ = draw(("scale",), (32, 24), batch=20_000).affine
    for zoom in (zoom_x, zoom_y):
        assert 1 / 1.2 <= zoom.min() < 0.84
        assert 1.19 < zoom.max() <= 1.2
    assert abs(float(torch.corrcoef(torch.stack((zoom_x, zoom_y)))[0, 1])) < 0.05
    assert not xy.any()
    assert not yx.any()
    # In pixels a rotation is orthogonal, whatever the ratio of the sides.
    xx, xy, _, yx, yy, _ = draw(("rotate",), (32, 24), batch=20_000).affine
    torch.testing.assert_close(xx**2 + (yx * 32 / 24) ** 2, torch.ones_like(xx))
    torch.testing.assert_close(xx, yy)
    torch.testing.assert_close(xy * 24 / 32, -yx * 32 / 24)
    angle = torch.rad2deg(torch.atan2(yx * 32 / 24, xx))
    assert -15 <= angle.min() < -14.9
    assert 14.9 < angle.max() <= 15


def test_flip_and_crop_move_pixels_exactly() -> None:
    images = noise(8, 3, 16, 16).float()
    for batch in (None, 8):
        moved = draw_augmentation(("crop", "flip"), (16, 16), generator(), batch=batch)(images)
        values = torch.cat((images.flatten(), torch.tensor([0.5])))
        assert torch.isin(moved, values).all()
        assert not torch.equal(moved, images)


@pytest.mark.parametrize("names", [("color", "crop", "cutout"), ("flip", "crop"), STRATEGIES])
def test_one_draw_is_shared_by_every_image_of_every_batch(names: tuple[str, ...]) -> None:
    augmentation = draw(names, (8, 8), seed=3)
    image = noise(1, 3, 8, 8)
    several = augmentation(image.expand(5, -1, -1, -1))
    alone = augmentation(image)
    torch.testing.assert_close(several, alone.expand_as(several), rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [("color", "crop", "cutout"), ("flip", "crop"), STRATEGIES])
def test_a_draw_each_differs_between_images(names: tuple[str, ...]) -> None:
    images = noise(1, 3, 16, 16).expand(40, -1, -1, -1)
    out = draw(names, (16, 16), batch=40)(images)
    # Flips and crops of 16 pixels have 2 x 5 x 5 outcomes, of which 40 draws meet 28 on average.
    assert len({tuple(image.flatten().tolist()) for image in out}) > 18


@pytest.mark.parametrize("names", [STRATEGIES, ("color", "crop", "cutout", "flip"), ()])
def test_joined_draws_augment_batches_put_together(names: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    draws = [draw_augmentation(names, (9, 12), generator, fill=0.3) for _ in range(3)]
    batches = torch.rand(6, 3, 9, 12, generator=generator, dtype=torch.double).split([3, 1, 2])
    joined = Augmentation.join(draws, [3, 1, 2])(torch.cat(batches))
    apart = [draw(batch) for draw, batch in zip(draws, batches, strict=True)]
    torch.testing.assert_close(joined, torch.cat(apart))
    assert Augmentation.join(draws[:1], [3]) is draws[0]


def test_the_seed_alone_decides_and_the_global_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    images, labels = noise(4, 3, 8, 8), torch.arange(4)
    first = draw(STRATEGIES, (8, 8), seed=5, batch=4)(images)
    again = draw(STRATEGIES, (8, 8), seed=5, batch=4)(images)
    other = draw(STRATEGIES, (8, 8), seed=6, batch=4)(images)
    cutmix(images, labels, generator())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_naming_one_more_strategy_moves_no_other_draw() -> None:
    few, many = draw(("color", "crop"), (8, 8), 7), draw(("color", "crop", "rotate"), (8, 8), 7)
    assert torch.equal(few.color, many.color)
    assert torch.equal(few.pixels[1:], many.pixels[1:])


@pytest.mark.parametrize("batch", [None, 2])
def test_gradient_in_float64(batch: int | None) -> None:
    for names in (("color",), ("crop", "flip", "cutout"), STRATEGIES):
        augmentation = draw(names, (6, 7), seed=11, batch=batch)
        images = noise(2, 3, 6, 7).requires_grad_()
        assert torch.autograd.gradcheck(augmentation, (images,))


def test_no_strategy_is_the_identity() -> None:
    images = noise(2, 3, 8, 8)
    assert torch.equal(draw((), (8, 8))(images), images)


def test_keeps_shape_dtype_and_its_input() -> None:
    for channels, dtype in ((1, torch.float32), (3, torch.float64)):
        images = noise(2, channels, 12, 8).to(dtype)
        copy = images.clone()
        for batch in (None, 2):
            out = draw_augmentation(STRATEGIES, (12, 8), generator(), batch=batch)(images)
            assert out.shape == images.shape
            assert out.dtype == dtype
            assert torch.equal(images, copy)


def test_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ConfigError, match=r"unknown augmentation 'blur'.*rotate"):
        draw_augmentation(("color", "blur"), (8, 8), generator())
    with pytest.raises(ConfigError, match="image_size"):
        draw_augmentation((), (0, 8), generator())
    with pytest.raises(ConfigError, match="batch must be None or 1 or more, got 0"):
        draw_augmentation((), (8, 8), generator(), batch=0)


def test_refuses_images_that_it_was_not_drawn_for() -> None:
    augmentation = draw(("color",), (8, 8), batch=2)
    with pytest.raises(DataError, match="each of 2 images, got 3"):
        augmentation(noise(3, 3, 8, 8))
    with pytest.raises(DataError, match=r"images of \(8, 8\), got \(8, 9\)"):
        augmentation(noise(2, 3, 8, 9))
    with pytest.raises(DataError, match="fill has 3 channels and the images have 1"):
        augmentation(noise(2, 1, 8, 8))
    with pytest.raises(DataError, match=r"float images \(N, C, H, W\), got torch.uint8"):
        augmentation(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_cutmix_lambda_is_the_area_not_pasted() -> None:
    # Image n holds the value n everywhere, so each pixel tells where it came from.
    images = torch.arange(6.0)[:, None, None, None].expand(6, 2, 12, 10).contiguous()
    labels = torch.arange(6) * 10
    for seed in range(50):
        mixed, labels_a, labels_b, lam = cutmix(images, labels, generator(seed), probability=1.0)
        assert torch.equal(labels_a, labels)
        for image, own, pasted in zip(mixed, labels_a, labels_b, strict=True):
            if own != pasted:
                kept = float((image == own / 10).double().mean())
                assert kept == pytest.approx(lam)
                assert float((image == pasted / 10).double().mean()) == pytest.approx(1 - lam)
    assert torch.equal(images[3], torch.full((2, 12, 10), 3.0))


def test_cutmix_pastes_one_rectangle() -> None:
    images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 16, 16).contiguous()
    for seed in range(30):
        mixed, _, labels_b, lam = cutmix(images, torch.arange(2), generator(seed), 1.0)
        if labels_b[0] == 1:
            rows, columns = (mixed[0, 0].any(dim=axis).sum() for axis in (1, 0))
            assert float(rows * columns) / 256 == pytest.approx(1 - lam)


def test_cutmix_keeps_the_share_that_the_published_draw_keeps() -> None:
    # A side sqrt(v), v uniform, around a uniform centre shows sqrt(v) - v / 4 of itself on average;
    # the mean over v of that squared is 1/2 - 1/5 + 1/48.
    images, labels, stream = torch.zeros(2, 1, 256, 256).bool(), torch.arange(2), generator()
    shares = [cutmix(images, labels, stream, probability=1.0)[3] for _ in range(2000)]
    assert sum(shares) / 2000 == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.02)
    assert min(shares) < 0.2
    assert max(shares) > 0.99


def test_cutmix_happens_as_often_as_asked() -> None:
    images, labels = noise(4, 1, 8, 8), torch.arange(4)
    stream = generator()
    untouched = sum(cutmix(images, labels, stream, 0.25)[0] is images for _ in range(1000))
    assert 700 < untouched < 800
    same, labels_a, labels_b, lam = cutmix(images, labels, stream, probability=0.0)
    assert same is images
    assert labels_a is labels_b
    assert lam == 1.0


def test_cutmix_refuses_an_impossible_probability() -> None:
    images, labels = noise(2, 1, 8, 8), torch.arange(2)
    with pytest.raises(ConfigError, match=r"probability must be in \[0, 1\], got 1.5"):
        cutmix(images, labels, generator(), 1.5)


def test_training_is_augmented_and_nothing_else(untouched_random_state: None) -> None:
    model = nn.Flatten()
    handle = augment_training(model, "crop,flip", seed=0)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model.eval()
    assert model(images).equal(images.flatten(1))
    model.train()
    first, second = model(images), model(images)
    assert not first.equal(images.flatten(1)) and not first.equal(second)
    augment_training(again := nn.Flatten(), ("crop", "flip"), seed=0)
    assert again(images).equal(first)
    augment_training(again, ("crop", "flip"), seed=0)
    assert again(images).equal(first), "the second takes the place of the first"
    handle.remove()
    assert model(images).equal(images.flatten(1))


def test_crops_are_padded_with_what_is_asked() -> None:
    fill = torch.tensor([0.25, 0.5, 0.75])
    augment_training(model := nn.Identity(), ("crop",), fill=fill)
    found = model.train()(fill.view(3, 1, 1).expand(20, 3, 8, 8))
    assert found.equal(fill.view(3, 1, 1).expand_as(found))
    augment_training(black := nn.Identity(), ("crop",), fill=0.0)
    assert black.train()(torch.ones(20, 3, 8, 8)).min() == 0


def test_other_inputs_of_a_network_are_passed_on() -> None:
    class Multi(nn.Module):
        def forward(self, images: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
            return images, tasks

    augment_training(model := Multi(), "flip")
    images, tasks = model(torch.rand(4, 1, 8, 8), torch.arange(4))
    assert images.shape == (4, 1, 8, 8) and tasks.tolist() == [0, 1, 2, 3]


def test_each_image_is_augmented_by_draws_of_the_global_generator() -> None:
    augment = RandomAugmentation("crop,flip", fill=0.0)
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(16, 3, 8, 8)
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    torch.manual_seed(3)
    assert augment(images).equal(first) and not first.equal(second)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 4
    assert augment(images[:0]).shape == (0, 3, 8, 8)
    with pytest.raises(ConfigError, match="unknown augmentation 'blur'"):
        RandomAugmentation("crop,blur")


def test_a_network_is_saved_with_its_augmentation() -> None:
    augment_training(model := nn.Flatten(), "crop, flip", seed=5)
    images = noise(6, 3, 8, 8)
    model(images)
    again = pickle.loads(pickle.dumps(model))
    assert model(images).equal(again(images))
    with pytest.raises(ConfigError, match=r"call it as network\(images, \.\.\.\)"):
        model(input=images)


def test_features_are_not_augmented() -> None:
    backbone = hmn_replay.FrozenBackbone(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (3, 8, 8))
    model = hmn_replay.FeatureClassifier(backbone, nn.Flatten()).train()
    hmn_replay.augment_training(model, "cutout", fill=0.0)
    model(torch.rand(4, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"features \(5, 1, 1\): augment by the benchmark"):
        model(torch.rand(4, 5, 1, 1))
