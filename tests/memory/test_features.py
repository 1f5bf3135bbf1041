"""Memories of features: learned ones, and real ones in float16 or by product quantisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hmn_replay
from hmn_replay import (
    FeatureLayout,
    FeatureMemory,
    LabelledFeatures,
    Memory,
    PQMemory,
    RawFeatureMemory,
    condense,
    evaluate,
    load,
)
from hmn_replay.errors import (
    BudgetError,
    ConfigError,
    DataError,
    HMNReplayWarning,
    MemoryFileError,
    MissingExtraError,
)
from hmn_replay.memory import loads
from hmn_replay.memory.file import Record, pack, unpack

pytestmark = pytest.mark.usefixtures("untouched_random_state")

FORMATS = list(hmn_replay.NUMBER_FORMATS)
VECTORS, MAPS = (24, 1, 1), (6, 3, 2)
needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="needs the extra pq")


def features(
    shape: tuple[int, int, int] = VECTORS,
    each: int = 60,
    labels: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
    shift: float = 0.0,
) -> LabelledFeatures:
    """Return features behind a ReLU, whose classes differ in their means, of a few directions."""
    draws, fixed = (torch.Generator().manual_seed(s) for s in (seed, 99))
    count = math.prod(shape)
    directions = torch.randn(4, count, generator=fixed)
    means = 3 * torch.randn(10, count, generator=fixed)
    index = torch.tensor(labels).repeat_interleave(each)
    codes = torch.randn(len(index), 4, generator=draws)
    noise = 0.1 * torch.randn(len(index), count, generator=draws)
    values = (means[index] + codes @ directions + noise).clamp_min(0) + shift
    return LabelledFeatures(values.view(-1, *shape), index)


def quick(data: LabelledFeatures, budget: int | str = 3000, **options: Any) -> FeatureMemory:
    made = condense(data, budget, **{"device": "cpu", "warm_start_steps": 60, **options})
    assert isinstance(made, FeatureMemory)
    return made


def small(shape: tuple[int, int, int], number_format: str, seed: int = 0) -> FeatureMemory:
    """Return a memory that every parameter of has a value of its own."""
    layout = FeatureLayout(shape, number_format, 4, 3 if number_format == "entropy" else 0)
    memory = FeatureMemory(layout, [7, -3], [2, 3], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        memory.bound.fill_(-0.25)
    memory.update_scales()
    return memory


def relative_error(memory: Memory, data: LabelledFeatures) -> float:
    """Return the error to the nearest real features of the same class, in their variance."""
    decoded, labels = memory.decode()
    errors = []
    for label in data.classes.tolist():
        real = data.images[data.labels == label].flatten(1)
        own = decoded[labels == label].flatten(1)
        errors.append(torch.cdist(own, real).square().min(dim=1).values)
    spread = (data.images - data.images.mean(dim=0)).flatten(1).square().sum(dim=1).mean()
    return float(torch.cat(errors).mean() / spread)


# What is decoded.


@pytest.mark.parametrize("shape", [VECTORS, MAPS])
@pytest.mark.parametrize("number_format", FORMATS)
def test_features_are_decoded_by_the_equation(
    shape: tuple[int, int, int], number_format: str
) -> None:
    memory = small(shape, number_format)
    decoded, labels = memory.decode()
    assert decoded.shape == (5, *shape) and labels.tolist() == [7, 7, -3, -3, -3]

    def value(name: str, index: int | None = None) -> Tensor:
        indices = None if index is None else torch.tensor([index])
        found = memory.value(name, indices).detach().double()
        return found if index is None else found[0]

    for i in range(5):
        codes = value("dataset_memory") + value("class_memory", i) + value("instance_memory", i)
        x = torch.einsum("ck,khw->chw", value("decoder"), codes)
        x = x + (value("class_offset", i) + value("offset")).view(-1, 1, 1)
        x = x.clamp_min(float(value("bound"))) * math.exp(float(value("log_scale")))
        torch.testing.assert_close(decoded[i].double(), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory(torch.arange(5)).detach(), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number_format", FORMATS)
def test_bits_do_not_depend_on_the_others_and_a_file_gives_the_same(number_format: str) -> None:
    memory = small(MAPS, number_format)
    decoded, _ = memory.decode()
    for i in (4, 0, 2):
        assert memory.decode([i])[0].equal(decoded[i : i + 1])
    assert memory.decode([3, 3, 1])[0].equal(decoded[[3, 3, 1]])
    again = loads(memory.to_bytes())
    assert isinstance(again, FeatureMemory) and again.layout == memory.layout
    assert again.decode()[0].equal(decoded)
    assert again.to_bytes() == memory.to_bytes()
    assert len(memory.to_bytes()) == memory.file_bytes
    kept = copy.deepcopy(memory)
    kept.keep([0, 3])
    assert kept.decode()[0].equal(decoded[[0, 3]])
    kept.add_classes([5], 2)
    assert kept.decode([0, 1])[0].equal(decoded[[0, 3]])


def test_features_are_no_pixels() -> None:
    memory = small(VECTORS, "int8")
    assert memory.holds_features and memory.value_dtype == torch.float32
    with pytest.raises(ConfigError, match="holds features, which are no pixels"):
        memory.decode(dtype=torch.uint8)
    with pytest.raises(ConfigError, match="holds features"):
        hmn_replay.contact_sheet(memory, "none.png")
    with pytest.raises(ConfigError, match="holds features"):
        hmn_replay.Gallery().add(memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (24, 1)}, r"shape of features is \(C, H, W\)"),
        ({"image_shape": (24, 0, 1)}, r"shape of features is \(C, H, W\)"),
        ({"image_shape": (24, 225, 1)}, "H, W from 1 to 224"),
        ({"image_shape": (2**18 + 1, 1, 1)}, "no more than 262,144 values"),
        ({"code_channels": 25}, "code_channels is 1 to 24; got 25"),
        ({"code_channels": 0}, "code_channels is 1 to 24; got 0"),
        ({"image_bytes": 0}, "image_bytes is 1 or more where values are entropy-coded"),
        ({"number_format": "int8"}, "image_bytes is 1 or more where .* and 0 otherwise"),
    ],
)
def test_a_layout_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    usual = {
        "image_shape": VECTORS,
        "number_format": "entropy",
        "code_channels": 4,
        "image_bytes": 3,
    }
    with pytest.raises(ConfigError, match=message):
        FeatureLayout(**{**usual, **change})


# Condensing.


@pytest.mark.parametrize("shape", [VECTORS, MAPS])
def test_a_memory_of_features_fills_its_budget_and_comes_near_to_real_ones(
    shape: tuple[int, int, int],
) -> None:
    data = features(shape, each=200)
    memory = quick(data, 3000, seed=1)
    assert memory.kind == "features" and memory.image_shape == shape
    assert 2400 < memory.file_bytes == len(memory.to_bytes()) <= 3000
    assert relative_error(memory, data) < 0.2
    assert memory.report["warm_start_psnr"] > 8
    assert float(memory.decode()[0].min()) >= 0  # as behind a ReLU
    assert [*memory.report["phases"]] == ["warm_start", "matching", "pruning"]
    assert memory.report["phases"]["matching"]["images"] == 0


@pytest.mark.parametrize("number_format", FORMATS)
def test_every_number_format_is_fitted(number_format: str) -> None:
    data = features(each=300, shift=-5.0)
    memory = quick(data, 8000, number_format=number_format)
    assert memory.layout.number_format == number_format
    assert relative_error(memory, data) < 0.1
    assert float(memory.decode()[0].min()) < 0


def test_vectors_of_more_channels_than_there_are_of_them_are_fitted() -> None:
    data = features((500, 1, 1), each=8)
    memory = quick(data, 6000)
    assert memory.num_images == 24 and memory.layout.code_channels > 4
    assert relative_error(memory, data) < 0.05


def test_it_does_not_depend_on_the_scale_of_features() -> None:
    data = features()
    for factor in (1e-3, 1e3):
        scaled = LabelledFeatures(factor * data.images, data.labels)
        assert relative_error(quick(scaled), scaled) < 0.1


def test_a_head_learns_from_a_memory_what_it_learns_from_real_features() -> None:
    train, test = features(each=80), features(each=40, seed=1)
    memory = quick(train, "2 KB")
    options: dict[str, Any] = {"device": "cpu", "num_passes": 3000}
    network, accuracy = evaluate(memory, test, **options)
    _, upper = evaluate(train, test, **options)
    assert upper > 0.9 and accuracy > upper - 0.1
    logits = network(test.images)
    assert logits.shape == (len(test), 3) and not network.training
    assert memory.file_bytes < train.images.numel()


def test_no_head_learns_from_a_memory_without_features() -> None:
    data, real = features(), RawFeatureMemory(VECTORS)
    real.extend(data)
    for memory in (small(VECTORS, "entropy"), real):
        memory.keep([])
        with pytest.raises(DataError, match="expected a source of one image or more"):
            evaluate(memory, data, device="cpu")


def test_images_and_features_are_not_mixed_up(make_set: Callable[..., Any]) -> None:
    images, vectors = make_set(), features()
    with pytest.raises(DataError, match="expected images, got LabelledFeatures"):
        condense(vectors, 3000, kind="hmn")
    with pytest.raises(DataError, match=r"extract_features\(\) makes them of images"):
        condense(images, 3000, kind="features")
    with pytest.raises(DataError, match="expected features and labels"):
        condense((images.images, images.labels), 3000, kind="features")
    memory = condense((vectors.images, vectors.labels), 3000, kind="features", warm_start_steps=2)
    assert memory.kind == "features"
    with pytest.raises(ConfigError, match="networks match images; leave them out"):
        condense(vectors, 3000, networks=[hmn_replay.build_network("convnet", (3, 8, 8), 3)])
    for config in ({"outer_steps": 1}, {"labels": "soft"}):
        with pytest.raises(ConfigError, match="features are fitted by the warm start"):
            condense(vectors, 3000, **config)
    with pytest.raises(BudgetError, match="does not hold one image of each of 3 classes"):
        condense(vectors, 400)


def test_classes_are_added_and_old_features_stay_to_the_bit() -> None:
    first, second = features(labels=(0, 1)), features(labels=(2, 3), seed=1)
    old = quick(first, 2500, expected_classes=4)
    new = quick(second, 2500, memory=old)
    assert new.classes.tolist() == [0, 1, 2, 3]
    assert new.file_bytes <= 2500 and min(new.images_per_class) > 0
    before, labels_before = old.decode()
    after, labels = new.decode()
    for label in (0, 1):
        own = after[labels == label]
        # Those that stay are the first: classes are in the order of chance already.
        assert own.equal(before[labels_before == label][: len(own)])
    assert sum(new.images_per_class[:2]) < old.num_images
    everything = LabelledFeatures(
        torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels])
    )
    assert relative_error(new, everything) < 0.3
    renewed = quick(second, 2500, memory=new)
    assert sorted(renewed.classes.tolist()) == [0, 1, 2, 3] and renewed.file_bytes <= 2500


def test_bytes_that_are_left_are_filled_with_features_that_are_encoded() -> None:
    data = features(each=300)
    layout = FeatureLayout(VECTORS, "entropy", 8, 9)
    memory = quick(data, 3000, layout=layout, warm_start_steps=1)
    assert memory.report["fill"] > 0.97
    assert memory.num_images > FeatureMemory.max_images(layout, 3000, 3) + 20
    assert relative_error(memory, data) < 0.2


def test_encoded_features_come_near_and_the_others_stay() -> None:
    data, memory = features(each=40), quick(features(each=40), 2500)
    before = memory.decode()[0]
    chosen = torch.tensor([5, 17])
    wanted = torch.stack([data.images[data.labels == label][0] for label in memory.labels[chosen]])
    assert memory.set_images(chosen, lambda indices: wanted[torch.searchsorted(chosen, indices)])
    after = memory.decode()[0]
    others = torch.tensor([i for i in range(len(memory)) if i not in chosen.tolist()])
    assert after[others].equal(before[others])
    error = (after[chosen] - wanted).square().mean() / data.images.var()
    assert float(error) < 0.1


def test_a_run_that_goes_on_from_a_checkpoint_makes_the_same_memory(tmp_path: Path) -> None:
    data = features()
    path = tmp_path / "checkpoint"
    whole = quick(data, checkpoint=path, checkpoint_seconds=0)
    assert quick(data, checkpoint=path).to_bytes() == whole.to_bytes() == quick(data).to_bytes()


# Real features.


def test_raw_features_are_float16_and_as_many_as_fit() -> None:
    data = features()
    memory = RawFeatureMemory(VECTORS, budget=1000)
    memory.extend(data)
    decoded, labels = memory.decode()
    assert decoded.dtype == torch.float32 and memory.file_bytes <= 1000 < memory.file_bytes + 50
    for label in (0, 1, 2):
        own = data.images[data.labels == label]
        assert decoded[labels == label].equal(own[: memory.images_per_class[label]].half().float())
    again = loads(memory.to_bytes())
    assert isinstance(again, RawFeatureMemory) and again.decode()[0].equal(decoded)
    assert hmn_replay.raw_features(data, 1000, seed=3).num_images == memory.num_images
    damaged = {**unpack(memory.to_bytes()).tensors}
    damaged["images"] = torch.full_like(damaged["images"], 255)
    record = unpack(memory.to_bytes())
    broken = loads(pack(Record(record.kind, record.num_images, None, record.words, damaged)))
    with pytest.raises(DataError, match="features are not finite"):
        broken.decode()
    huge = LabelledFeatures(torch.full((1, 2, 1, 1), 1e6), torch.tensor([0]))
    with pytest.raises(DataError, match=r"features up to 1e\+06 cannot be kept in float16"):
        hmn_replay.raw_features(huge, 1000)


def test_real_memories_do_not_mix_images_and_features(make_set: Callable[..., Any]) -> None:
    images = make_set(image_shape=(3, 8, 8))
    same_shape = LabelledFeatures(images.floats(), images.labels)
    with pytest.raises(DataError, match="expected images, got LabelledFeatures"):
        hmn_replay.RawMemory((3, 8, 8)).extend(same_shape)
    with pytest.raises(DataError, match=r"extract_features\(\) makes them of images"):
        RawFeatureMemory((3, 8, 8)).extend(images)
    with pytest.raises(DataError, match=r"expected features of \(24, 1, 1\), as the memory has"):
        RawFeatureMemory(VECTORS).extend(same_shape)


def test_real_features_are_taken_as_arrays_too() -> None:
    data = features()
    arrays = data.images.flatten(1).numpy(), data.labels.numpy()
    wanted = hmn_replay.raw_features(data, 1000).to_bytes()
    assert hmn_replay.raw_features(arrays, 1000).to_bytes() == wanted


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("shape", [VECTORS, MAPS])
def test_product_quantisation_takes_the_nearest_centroid_of_each_part(
    shape: tuple[int, int, int], bits: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(2, 2**bits, shape[0] // 2, generator=generator).half().float()
    data = features(shape, each=7)
    memory = PQMemory(shape, num_parts=2, bits=bits, codebook=codebook)
    memory.extend(data)
    decoded, _ = memory.decode()
    rows, found = (
        own.movedim(1, -1).reshape(-1, 2, shape[0] // 2) for own in (data.images, decoded)
    )
    for row, own in zip(rows, found, strict=True):
        for part in range(2):
            distances = (codebook[part] - row[part]).square().sum(dim=1)
            assert own[part].equal(codebook[part][distances.argmin()])
    assert memory.payload_bytes == math.ceil(2 * bits * shape[1] * shape[2] / 8)
    assert loads(memory.to_bytes()).decode()[0].equal(decoded)
    assert memory.summary()["code_bits"] == bits


@needs_faiss
def test_faiss_trains_the_codebook() -> None:
    data = features()
    memory = hmn_replay.pq_features(data, 4000, num_parts=6, bits=4, seed=1)
    assert memory.file_bytes <= 4000 and memory.num_images > 100
    assert relative_error(memory, data) < 0.1
    again = hmn_replay.pq_features(data, 4000, num_parts=6, bits=4, seed=1)
    assert again.to_bytes() == memory.to_bytes()
    arrays = data.images.flatten(1).numpy(), data.labels.numpy()
    again = hmn_replay.pq_features(arrays, 4000, num_parts=6, bits=4, seed=1)
    assert again.to_bytes() == memory.to_bytes()
    with pytest.raises(ConfigError, match="256 centroids are trained on as many vectors"):
        hmn_replay.pq_features(data, 40_000, num_parts=6, bits=8)


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hmn-replay\[pq\]'"):
        hmn_replay.pq_features(features(), 4000, num_parts=6, bits=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 5}, "num_parts cuts 24 channels into parts of one size; got 5"),
        ({"num_parts": 0}, "num_parts cuts 24 channels"),
        ({"num_parts": 2, "bits": 9}, "bits is 1 to 8; got 9"),
        ({"num_parts": 2, "bits": 1, "codebook": torch.zeros(2, 3, 12)}, "a codebook is finite"),
        (
            {"num_parts": 2, "bits": 1, "codebook": torch.full((2, 2, 12), math.inf)},
            "a codebook is finite floats",
        ),
    ],
)
def test_a_quantiser_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PQMemory(VECTORS, **options)


def test_a_file_whose_words_claim_another_codebook_is_refused() -> None:
    memory = PQMemory(VECTORS, num_parts=2, bits=3)
    memory.extend(features())
    record = unpack(memory.to_bytes())
    for words in (("24,1,1", "2", "8"), ("262144,1,1", "2", "8"), ("24,1,1", "5", "3")):
        changed = Record(record.kind, record.num_images, None, words, record.tensors)
        with pytest.raises(MemoryFileError, match=r"another size|parts of one size"):
            loads(pack(changed))
    broken = {**record.tensors, "header": torch.full_like(record.tensors["header"], 255)}
    with pytest.raises(MemoryFileError, match="codebook is not finite"):
        loads(pack(Record(record.kind, record.num_images, None, record.words, broken)))


def test_herding_and_centres_are_of_the_features_themselves() -> None:
    data = features(each=20)
    order = hmn_replay.select_images(data, "herding", num_images=6)
    for label in (0, 1, 2):
        own = torch.nn.functional.normalize(data.images[data.labels == label].flatten(1))
        nearest = (own - own.mean(dim=0)).square().sum(dim=1).argmin()
        assert int(order[label]) == int(data.of_class(label)[nearest])
    assert len(hmn_replay.select_images(data, "k-centre").unique()) == 60
    with pytest.raises(ConfigError, match="ccs scores by trainings on images"):
        hmn_replay.select_images(data, "ccs")


def test_saved_features_are_loaded_and_inspected(tmp_path: Path, run: Any) -> None:
    memory = quick(features())
    path = tmp_path / "features.hmn"
    memory.save(path)
    assert load(path).decode()[0].equal(memory.decode()[0])
    failed = run("evaluate", path, "--data", "digits", code=1)
    assert "extract_features() makes features of images" in failed + run.err
    told = run.json("inspect", path)
    assert told["kind"] == "features" and told["image_shape"] == [24, 1, 1]
    assert "features" in run("inspect", path)
    assert told["layout"]["code_channels"] <= 24


@needs_faiss
def test_another_default_dtype_changes_nothing_of_a_codebook() -> None:
    data = features()
    torch.set_default_dtype(torch.float64)
    try:
        memory = hmn_replay.ReplayMemory(4000, "pq", num_parts=6, device="cpu")
        memory.check_room(data)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("mean", "deviation"), [(1, 0), (0, 0), (1e4, 1), (-3e4, 1), (0, 1e12), (0, 1e-12)]
)
@pytest.mark.parametrize("count", [1, 200])
def test_features_far_from_0_and_alike_are_kept(count: int, mean: float, deviation: float) -> None:
    draws = torch.randn(count, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    values = mean + deviation * draws
    labels = torch.arange(len(values)) % min(4, len(values))
    budget = 717 if count == 1 else 3000
    options: dict[str, Any] = {"kind": "features", "effort": "draft", "warm_start_steps": 20}
    memory = condense((values, labels), budget, device="cpu", **options)
    kept, _ = loads(memory.to_bytes()).decode()
    assert kept.isfinite().all()
    error = float((kept.mean() - values.mean()).abs())
    assert error <= 0.1 * deviation + 1e-5 * abs(mean) + 1e-12


def test_features_beyond_what_float32_can_square_are_refused() -> None:
    values = features(each=50).images * 1e20
    with pytest.raises(DataError, match=r"too large .*: scale them to 1e\+15 at most"):
        condense(LabelledFeatures(values, torch.arange(len(values)) % 4), 3000, effort="draft")


@pytest.mark.parametrize("number_format", ["entropy", "int8"])
def test_added_features_of_another_range_are_warned_of(number_format: str) -> None:
    options: dict[str, Any] = {"number_format": number_format, "expected_classes": 9}
    first = condense(features(), 6000, effort="draft", warm_start_steps=20, **options)
    alike = features(labels=(3, 4), seed=1)
    condense(alike, memory=first, effort="draft", warm_start_steps=20)  # of which nothing is said
    negative = LabelledFeatures(alike.images - 30, alike.labels)
    far = LabelledFeatures(alike.images + 300, alike.labels)
    # Steps of int8 are as wide as the largest value asks for.
    for strange in (negative,) if number_format == "int8" else (negative, far):
        with pytest.warns(HMNReplayWarning, match="have another range than the first ones"):
            condense(strange, memory=first, effort="draft", warm_start_steps=20)
