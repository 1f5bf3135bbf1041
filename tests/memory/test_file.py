"""The memory file: nothing is lost in it, and nothing in it is believed."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hmn_replay.memory.file
from hmn_replay.errors import BudgetError, ConfigError, MemoryFileError, TrainingError
from hmn_replay.memory.base import Container
from hmn_replay.memory.container_layout import DIGEST_LENGTH, METADATA_KEY, ContainerLayout
from hmn_replay.memory.file import deserialise, load, save_memory, serialise
from hmn_replay.memory.formats import NUMBER_FORMATS, NumberFormat
from hmn_replay.memory.haba import HaBaLayout
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout
from hmn_replay.memory.linba import LinBaLayout
from hmn_replay.memory.pixels import IDCLayout, RawLayout
from hmn_replay.memory.registry import CONTAINERS, make_container
from tests.support import LAYOUTS, hmn_layout, made

MakeLayout = Callable[..., Layout]

every_container = pytest.mark.parametrize("container", CONTAINERS)
every_kind = pytest.mark.parametrize(
    ("container", "number_format"),
    [(name, own) for name, layout in CONTAINERS.items() for own in layout.number_formats],
)
# The files that are damaged and forged: one of each container, and HMN's in every format.
every_file = pytest.mark.parametrize(
    ("container", "number_format"),
    [
        *(("hmn", number_format) for number_format in NUMBER_FORMATS),
        *(("raw", "float16"), ("idc", "int8"), ("haba", "int8"), ("linba", "int8")),
    ],
)

SMALL: dict[str, Any] = {
    "image_shape": (1, 8, 8),
    "stride": 4,
    "dataset_channels": 1,
    "feature_channels": 1,
    "class_channels": 1,
    "instance_channels": 2,
    "decoder_channels": (2, 2),
}


SMALL_LAYOUTS: dict[str, Callable[[NumberFormat], ContainerLayout]] = {
    "hmn": lambda number_format: hmn_layout(number_format=number_format, **SMALL),
    "raw": functools.partial(RawLayout, (1, 8, 8)),
    "idc": functools.partial(IDCLayout, (1, 8, 8), factor=2),
    "haba": functools.partial(HaBaLayout, (1, 8, 8), num_hallucinators=2),
    "linba": functools.partial(LinBaLayout, (1, 8, 8), num_bases=6),
}


@functools.lru_cache
def small_file(number_format: NumberFormat = "int8", container: str = "hmn") -> bytes:
    layout = SMALL_LAYOUTS[container](number_format)
    counts = [layout.group_size * count for count in (2, 1, 3)]
    memory = make_container(layout, [7, -3, 10**12], counts)
    memory.budget_bytes = 9000
    return serialise(memory)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a file's header, read, and its body."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def sealed(header: bytes | dict[str, Any], body: bytes) -> bytes:
    """Put a file together with the digest that fits it, as someone with bad intent would."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
    prefix = len(header).to_bytes(8, "little")
    found = re.search(rb'"hmn_replay":"\S* ([^ "]*) ', header)
    if found is None:
        return prefix + header + body
    before, after = header[: found.start(1)], header[found.end(1) :]
    digest = blake2b(prefix + before + after + body, digest_size=DIGEST_LENGTH // 2).hexdigest()
    if len(found[1]) != DIGEST_LENGTH:
        return prefix + header + body
    return prefix + before + digest.encode() + after + body


def with_words(header: dict[str, Any], **words: str) -> dict[str, Any]:
    """Replace words of the metadata by their names."""
    names = ("version", "digest", "budget", "format", "shape", "stride", "channels", "decoder")
    old = dict(zip(names, header["__metadata__"][METADATA_KEY].split(" "), strict=True))
    text = " ".join({**old, **words}.values())
    return {**header, "__metadata__": {METADATA_KEY: text}}


def edited_words(data: bytes, old: str, new: str) -> dict[str, Any]:
    """Return a file's header with other words in its metadata."""
    header, _ = parts(data)
    text = header["__metadata__"][METADATA_KEY]
    assert old in text
    return {**header, "__metadata__": {METADATA_KEY: text.replace(old, new)}}


def reshaped(header: dict[str, Any], **shapes: Any) -> dict[str, Any]:
    return {
        name: {**entry, "shape": shapes[name]} if name in shapes else entry
        for name, entry in header.items()
    }


def rewritten(data: bytes, name: str, values: Any) -> bytes:
    """Write other values into a tensor."""
    header, body = parts(data)
    start, end = header[name]["data_offsets"]
    raw = np.asarray(values).tobytes()
    assert len(raw) == end - start
    return sealed(header, body[:start] + raw + body[end:])


def stored(data: bytes, name: str) -> Any:
    header, body = parts(data)
    start, end = header[name]["data_offsets"]
    dtypes = {"I64": "<i8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "I8": "<i1", "U8": "<u1"}
    return np.frombuffer(body[start:end], dtypes[header[name]["dtype"]]).copy()


def overwrite(path: Path, data: bytes) -> None:
    """Write a file's bytes where it stands: a thousand times as fast as to make it anew."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
    try:
        os.ftruncate(handle, len(data))
        os.write(handle, data)
    finally:
        os.close(handle)


def times(container: str, count: int) -> int:
    """Return how often to damage a file: the rivals' together as often as HMN's in one format."""
    return count if container == "hmn" else count // 4


def check(path: Path, data: bytes) -> Container | None:
    """Load a file that may be anything: a memory that works, or a MemoryFileError; never else."""
    overwrite(path, data)
    try:
        memory = load(path)
    except MemoryFileError as error:
        assert str(error).startswith(f"cannot read '{path}': ")
        assert len(str(error)) > len(f"cannot read '{path}': ")
        return None
    images, labels = memory.decode()
    assert bool(((images >= 0) & (images <= 1)).all())
    assert len(images) == len(labels)
    again = serialise(memory)
    assert len(again) == memory.file_bytes
    # A forger's code may be longer than need be.
    assert len(again) == len(data) or memory.layout.is_coded
    return memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.hmn"


def same_memory(one: Container, two: Container) -> bool:
    (images, labels), (other_images, other_labels) = one.decode(), two.decode()
    return (
        one.layout == two.layout
        and one.budget_bytes == two.budget_bytes
        and one.classes.equal(two.classes)
        and labels.equal(other_labels)
        and images.numpy().tobytes() == other_images.numpy().tobytes()
    )


# What is saved comes back.


@every_kind
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_is_decoded_after_load_is_what_was_decoded_before_save(
    container: str,
    number_format: NumberFormat,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    layout = LAYOUTS[container](data.draw(st.sampled_from([(1, 8, 8), (3, 9, 13)])), number_format)
    size = layout.group_size
    labels = data.draw(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
    counts = [size * data.draw(st.integers(1, 4)) for _ in labels]
    memory = make_container(layout, sorted(labels), counts, seed=data.draw(st.integers(0, 99)))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(data.draw(st.sampled_from([0.0, 1e-6, 1.0, 3.0, 80.0])))
    memory.update_scales()
    if data.draw(st.booleans()):
        memory.keep([i for i in range(memory.num_images) if i // size % 2 == 0])
    if data.draw(st.booleans()):
        new = data.draw(st.integers().filter(lambda v: v not in labels and abs(v) < 9**18))
        memory.extend([new], 2 * size)
    path = tmp_path_factory.getbasetemp() / "round_trip.hmn"

    memory.save(path)
    loaded = load(path)

    assert path.stat().st_size == memory.file_bytes == loaded.file_bytes
    assert same_memory(memory, loaded)
    assert loaded.images_per_class == memory.images_per_class
    assert serialise(loaded) == path.read_bytes() == serialise(memory)


@every_kind
def test_a_loaded_memory_goes_on_like_the_one_saved(
    container: str, number_format: NumberFormat, path: Path
) -> None:
    memory = made(container, number_format, classes=(3, 1), groups=(4, 2))
    memory.budget_bytes = 20 * 1024
    memory.save(path)
    loaded = load(path)
    size = memory.layout.group_size
    for one in (memory, loaded):
        one.keep([*range(2 * size), *range(5 * size, 6 * size)])
        one.extend([9], 3 * size, seed=1)
    assert same_memory(memory, loaded)
    assert serialise(memory) == serialise(loaded)


@every_container
def test_a_memory_without_any_image_comes_back(container: str, path: Path) -> None:
    memory = made(container)
    memory.keep([])
    memory.save(path)
    loaded = load(path)
    assert loaded.num_images == 0
    assert loaded.images_per_class == [0, 0]
    assert loaded.decode()[0].shape == (0, 3, 8, 8)


TENSORS = {
    "hmn": ["dataset", "classes", "instances", "extractors", "decoder", "biases", "scales"],
    "raw": ["images"],
    "idc": ["images"],
    "haba": ["bases", "hallucinators", "biases", "scales"],
    "linba": ["coefficients", "basis", "scales"],
}


# Parameters that are brought back to the range of pixels after every step.
PIXELS = ("images", "bases")


@every_container
def test_the_file_is_safetensors_and_says_what_it_is(container: str, path: Path) -> None:
    memory = made(container, classes=(3, 1))
    memory.budget_bytes = 10_000
    memory.save(path)
    layout = memory.layout
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {"labels", "counts", *TENSORS[container]}
        assert file.metadata()[METADATA_KEY].startswith("1 ")
        assert file.get_tensor("labels").tolist() == [3, 1]
        assert file.get_tensor("counts").tolist() == memory.images_per_class
        assert file.get_tensor(layout.per_image).dtype == torch.int8
        assert len(file.get_tensor(layout.per_image)) == memory.num_images / layout.group_size
        num_values = sum(file.get_tensor(name).numel() for name in layout.learned)
        assert num_values == memory.num_floats


def test_the_file_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = f"""
        import sys
        from hmn_replay.memory.layout import Layout
        from hmn_replay.memory.hierarchical import HierarchicalMemory
        layout = Layout(number_format="int8", **{SMALL!r})
        memory = HierarchicalMemory(layout, [7, -3, 10**12], [2, 1, 3], budget=9000)
        memory.save({str(tmp_path / "other.hmn")!r})
    """
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
    assert (tmp_path / "other.hmn").read_bytes() == small_file()


def test_loading_takes_a_path_as_text_too_and_a_device(path: Path) -> None:
    path.write_bytes(small_file())
    assert load(str(path), device="cpu").num_images == 6
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        load(path, device="nowhere")


def test_loading_and_saving_leave_the_random_state(
    path: Path, untouched_random_state: None
) -> None:
    path.write_bytes(small_file())
    load(path).save(path)


# Saving.


def test_a_memory_over_its_budget_is_not_saved(make_layout: MakeLayout, path: Path) -> None:
    memory = HierarchicalMemory(make_layout(), [3, 1], 2)
    memory.budget_bytes = 1500
    path.write_bytes(b"old")
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes, over its budget of 1,500; drop"):
        memory.save(path)
    assert path.read_bytes() == b"old"
    memory.budget_bytes = memory.file_bytes
    save_memory(memory, path)
    assert path.stat().st_size == memory.budget_bytes


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_memory_that_diverged_is_not_saved(
    container: str, number_format: NumberFormat, value: float, path: Path
) -> None:
    names = [name for name, _ in made(container).named_parameters()]
    if not math.isnan(value):
        names = [name for name in names if name not in PIXELS]
    for name in names:
        memory = made(container, number_format)
        with torch.no_grad():
            memory.get_parameter(name).view(-1)[0] = value
        memory.update_scales()
        with pytest.raises(TrainingError, match=r"values .* not finite.*: its training diverged"):
            memory.save(path)
        assert not path.exists()


# Files that are no files.


def test_an_absent_file_is_the_systems_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(path)


def test_a_folder_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"directory|denied"):
        load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(10)
def test_a_pipe_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(MemoryFileError, match="not a regular file"):
        load(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
@pytest.mark.timeout(10)
def test_a_device_without_an_end_is_refused_at_once() -> None:
    with pytest.raises(MemoryFileError, match="not a regular file"):
        load("/dev/zero")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\0" * 7, b"\0" * 8, b"\0" * 4096, b"\xff" * 4096, b"hello\n", b"PK\3\4" * 99],
)
def test_any_other_file_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(MemoryFileError, match=r"cannot read .*: not a memory file"):
        load(path)


def test_another_safetensors_file_is_refused(path: Path) -> None:
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3)}, {"format": "pt"}))
    with pytest.raises(MemoryFileError, match="not a memory file: its header is not hmn_replay's"):
        load(path)


# Files that were damaged: the digest.


@every_file
def test_a_truncated_file_is_refused_wherever_it_ends(
    container: str, number_format: NumberFormat, path: Path
) -> None:
    data = small_file(number_format, container)
    for length in range(len(data)):
        assert check(path, data[:length]) is None


@every_file
def test_no_flipped_bit_goes_unseen(
    container: str, number_format: NumberFormat, path: Path
) -> None:
    data = small_file(number_format, container)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        assert check(path, bytes(changed)) is None


def test_what_was_done_to_a_file_is_said(path: Path) -> None:
    data = small_file()
    changed = bytearray(data)
    changed[-1] ^= 1
    for damaged, message in (
        (bytes(changed), "digest does not fit its content: the file was altered or damaged"),
        (data[:-1], f"it is truncated: {len(data) - 1:,} bytes instead of {len(data):,}"),
        (data + b"\0", f"followed by bytes that are not its own: {len(data) + 1:,} bytes"),
        (data[:100], "a truncated one: 100 bytes do not hold the header that they announce"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(MemoryFileError, match=re.escape(message) or None):
            load(path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage a file in one of the ways that files are damaged."""
    at, length = rng.randrange(len(data) + 1), rng.randrange(1, 40)
    kind = rng.randrange(6)
    if kind == 0:  # overwritten
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 1:  # inserted
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 2:  # cut out
        return data[:at] + data[at + length :]
    if kind == 3:  # a piece of itself elsewhere
        source = rng.randrange(len(data))
        return data[:at] + data[source : source + length] + data[at + length :]
    if kind == 4:  # doubled
        return data[:at] + data[max(0, at - length) :]
    changed = bytearray(data)  # bits
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@every_file
def test_no_damage_gets_through(container: str, number_format: NumberFormat, path: Path) -> None:
    data, rng = small_file(number_format, container), random.Random(0)
    path.write_bytes(data)
    whole = load(path)
    started = time.monotonic()
    for _ in range(times(container, 2500)):
        changed = mutated(data, rng)
        memory = check(path, changed)
        assert memory is None or (changed == data and same_memory(memory, whole))
    assert time.monotonic() - started < 15


# Files that were forged: the digest fits.


@every_file
def test_forged_bytes_are_refused_or_make_a_whole_memory(
    container: str, number_format: NumberFormat, path: Path
) -> None:
    data, rng = small_file(number_format, container), random.Random(1)
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    assert sealed(header, body) == data
    num_whole = 0
    for number in range(times(container, 1200)):
        if number % 2:
            forged = sealed(mutated(header, rng), body)
        else:
            forged = sealed(header, mutated(body, rng))
        num_whole += check(path, forged) is not None
    assert num_whole > 20  # the digest of the forger is the right one


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 6, 1000, 1001, 2**31, 2**63, 2**64, 10**400),
    *(0.0, 1.0, 1.5, 3.0, -1.0, 1e308, float("inf"), float("nan")),
    *("", "x", "I8", "F32", "F64", "BF16", "BOOL", "U8", "\ud800", "9" * 50),
    *([], [[]], [0], [1], [3], [6], [-1], [3, 1], [None], ["x"], [1.5], [10**400], {}, {"a": 1}),
]


def edited(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Edit a header's JSON somewhere, as deep as it goes."""
    header = json.loads(json.dumps(header))
    for _ in range(rng.choice((1, 1, 2, 3))):
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and rng.random() < 0.9:
                node = node[key]
                continue
            action = rng.randrange(4)
            if action == 0:
                del node[key]
            elif action == 1 and isinstance(node, dict):
                node[rng.choice(["x", "labels", "dtype", "shape", "instances"])] = node[key]
            elif action == 2 and isinstance(node[key], int):
                node[key] += rng.choice((-1, 1, 8, -8, 2**32))
            elif isinstance(node[key], str) and " " in node[key]:
                words = node[key].split(" ")
                place = rng.choice([0, *range(2, len(words))])
                numbers = ("0", "-1", "999999", "1,1", "4", "8,8", "int8")
                words[place] = rng.choice([*words, *numbers, *CONTAINERS])
                node[key] = " ".join(words)
            else:
                node[key] = copy.deepcopy(rng.choice(JUNK))
            break
    return header


@every_file
def test_forged_headers_are_refused_or_make_a_whole_memory(
    container: str, number_format: NumberFormat, path: Path
) -> None:
    (header, body), rng = parts(small_file(number_format, container)), random.Random(2)
    for _ in range(times(container, 2500)):
        check(path, sealed(edited(header, rng), body))


def forgeries() -> dict[str, tuple[bytes, str]]:
    data, pieces = small_file(), small_file(container="idc")
    hallucinated = small_file(container="haba")
    header, body = parts(data)
    labels, scales = stored(data, "labels"), stored(data, "scales")
    biases, counts = stored(data, "biases"), stored(data, "counts")
    nested = b'{"a":' * 5000 + b"1" + b"}" * 5000
    huge = 10**400
    twice = json.dumps(header)[:-1] + ',"labels":{"dtype":"I64","shape":[9],"data_offsets":[0,24]}}'
    infinity, nan = np.float32(np.inf), np.float32(np.nan)

    def scaled(value: Any) -> bytes:
        return rewritten(data, "scales", np.where(np.arange(len(scales)) == 3, value, scales))

    def biased(value: Any) -> bytes:
        changed = np.where(np.arange(len(biases)) == 3, np.float16(value), biases)
        return rewritten(data, "biases", changed)

    def without_classes() -> bytes:
        emptied = reshaped(header, labels=[0], counts=[0], extractors=[0, 1, 1], scales=[4])
        emptied["classes"] = {**header["classes"], "shape": [0, 1, 2, 2]}
        emptied["biases"] = {**header["biases"], "shape": [8]}
        sizes = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "I8": 1}
        pieces, offset = [], 0
        for name, entry in emptied.items():
            if name == "__metadata__":
                continue
            size = int(np.prod(entry["shape"])) * sizes[entry["dtype"]]
            start = header[name]["data_offsets"][0]
            pieces.append(body[start : start + size])
            emptied[name] = {**entry, "data_offsets": [offset, offset + size]}
            offset += size
        return sealed(emptied, b"".join(pieces))

    return {
        "nested": (sealed(nested, body), "its header is not hmn_replay's"),
        "nested in the metadata": (
            sealed({**header, "__metadata__": {METADATA_KEY: [[[]]]}}, body),
            "its header is not hmn_replay's",
        ),
        "a list": (sealed(b"[1, 2, 3]", body), "its header is not hmn_replay's"),
        "not UTF-8": (sealed(b"\xff\xfe\xfa", body), "its header is not hmn_replay's"),
        "an oversized header": (sealed(b" " * 2**17, body), "a header of 131,072 bytes, over 65"),
        "a header of many exabytes": (b"\xff" * 7 + b"\x7f" + data[8:], "do not hold the header"),
        "version 2": (
            sealed(with_words(header, version="2"), body),
            "file version 2; this version of hmn_replay reads version 1: install the version",
        ),
        "version -1": (sealed(with_words(header, version="-1"), body), "file version -1"),
        "no version": (sealed(with_words(header, version=""), body), "is not hmn_replay's"),
        "budget 0": (sealed(with_words(header, budget="0"), body), "1 byte or more"),
        "a budget of a million digits": (sealed(with_words(header, budget="9" * 60_000), body), ""),
        "three channels": (sealed(with_words(header, channels="1,1,1"), body), "not enough values"),
        "five channels": (
            sealed(with_words(header, channels="1,1,1,2,2"), body),
            "too many values",
        ),
        "another layout": (sealed(with_words(header, channels="1,1,1,3"), body), "the layout has"),
        "the largest layout": (
            sealed(with_words(header, shape="3,224,224", channels="512,512,512,512"), body),
            "the layout has",
        ),
        "another format": (sealed(with_words(header, format="float32"), body), "the layout has"),
        "a tensor too many": (
            sealed({**header, "x": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}, body),
            "tensors that no memory has: ['x']",
        ),
        "a tensor too few": (
            sealed({k: v for k, v in header.items() if k != "decoder"}, body),
            "its tensors are not those of a memory (KeyError('decoder'))",
        ),
        "a shape of text": (
            sealed(reshaped(header, instances=["x", 2, 2, 2]), body),
            "it has 'x' instances",
        ),
        "a shape of nothing": (sealed(reshaped(header, instances=[]), body), "IndexError"),
        "a null shape": (sealed(reshaped(header, instances=None), body), "TypeError"),
        "a shape of null": (sealed(reshaped(header, instances=[None, 2, 2, 2]), body), "None inst"),
        "a fractional shape": (
            sealed(reshaped(header, instances=[6.0, 2, 2, 2]), body),
            "it has 6.0 instances",
        ),
        "shapes beyond floats": (
            sealed(
                reshaped(
                    header,
                    **{name: [huge] for name in ("labels", "counts")},
                    classes=[huge, 1, 2, 2],
                    extractors=[huge, 1, 1],
                    biases=[huge + 8],
                    scales=[1 + 4 * huge + 3],
                    instances=[1.5, 2, 2, 2],
                ),
                body,
            ),
            "it has 1.5 instances",
        ),
        "fewer than no images": (
            sealed(reshaped(header, instances=[-1, 2, 2, 2]), body),
            "it has -1 instances",
        ),
        "more images than bytes": (
            sealed(reshaped(header, instances=[2**40, 2, 2, 2]), body),
            "it is truncated",
        ),
        "no classes": (without_classes(), "it has 0 labels"),
        "a name twice": (sealed(twice.encode(), body), ""),
        "offsets that overlap": (
            sealed({**header, "counts": {**header["counts"], "data_offsets": [0, 12]}}, body),
            "",
        ),
        "offsets beyond the end": (
            sealed({**header, "counts": {**header["counts"], "data_offsets": [0, 2**62]}}, body),
            "",
        ),
        "the same class twice": (
            rewritten(data, "labels", labels[[0, 1, 0]]),
            "classes come once each",
        ),
        "counts that do not add up": (
            rewritten(data, "counts", counts + np.array([1, 0, 0], np.int32)),
            "images a class do not add up to its",
        ),
        "a count below none": (
            rewritten(data, "counts", np.array([-1, 3, 4], np.int32)),
            "do not add up",
        ),
        "counts beyond bounds": (
            rewritten(data, "counts", np.array([2**31 - 1, 2**31 - 1, 8], np.int32)),
            "do not add up",
        ),
        "a scale of NaN": (scaled(nan), "its scales hold values that are not finite or far too"),
        "an infinite scale": (scaled(infinity), "its scales hold values"),
        "a scale far too large": (scaled(np.float32(1e30)), "its scales hold values"),
        "a scale below zero": (scaled(np.float32(-0.01)), "a scale is not positive"),
        "a scale of zero": (scaled(np.float32(0)), "a scale is not positive"),
        "a denormal scale": (scaled(np.float32(1e-40)), "a scale is not positive"),
        "counts apart from groups": (
            rewritten(pieces, "counts", np.array([7, 5, 12], np.int32)),
            "images come in groups of 4 that share stored values",
        ),
        "pieces as raw images": (
            sealed(edited_words(pieces, " idc 2", " raw"), parts(pieces)[1]),
            "images a class do not add up to its 6 images",
        ),
        "fewer hallucinators": (
            sealed(edited_words(hallucinated, "haba 2", "haba 1"), parts(hallucinated)[1]),
            "tensor 'hallucinators' is I8",
        ),
        "a container that nobody knows": (
            sealed(edited_words(pieces, " idc 2", " hmm 2"), parts(pieces)[1]),
            "not enough values to unpack",
        ),
        "a bias of NaN": (biased(np.nan), "its biases hold values that are not finite"),
        "an infinite bias": (biased(np.inf), "its biases hold values that are not finite"),
    }


@pytest.mark.parametrize("name", forgeries())
def test_a_forged_file_is_refused_with_the_reason(name: str, path: Path) -> None:
    data, message = forgeries()[name]
    path.write_bytes(data)
    with pytest.raises(MemoryFileError, match=re.escape(message) or None):
        load(path)


@pytest.mark.parametrize("number_format", ["float32", "float16"])
@every_container
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4])
def test_values_that_are_no_numbers_are_refused(
    container: str, number_format: NumberFormat, value: float, path: Path
) -> None:
    data = small_file(number_format, container)
    for tensor in TENSORS[container]:
        if tensor == "scales":
            continue
        values = stored(data, tensor)
        values[len(values) // 2] = value
        path.write_bytes(rewritten(data, tensor, values))
        with pytest.raises(MemoryFileError, match=f"its {tensor} hold values that are not finite"):
            load(path)


LARGE_LAYOUTS: dict[str, Callable[[NumberFormat], ContainerLayout]] = {
    **SMALL_LAYOUTS,
    "hmn": lambda number_format: hmn_layout(
        number_format=number_format,
        **{**SMALL, "stride": 32, "decoder_channels": (64,) * 5, "instance_channels": 64},
    ),
    "haba": functools.partial(HaBaLayout, (3, 8, 8), num_hallucinators=64),
    "linba": functools.partial(LinBaLayout, (3, 8, 8), num_bases=1024),
}


@every_kind
def test_the_largest_values_that_are_accepted_still_decode_to_images(
    container: str, number_format: NumberFormat, path: Path
) -> None:
    layout = LARGE_LAYOUTS[container](number_format)
    data = serialise(make_container(layout, [0, 1], layout.group_size))
    names = TENSORS[container] if number_format == "int8" else layout.learned
    for name in ["biases"] if layout.is_coded else names:
        old = stored(data, name)
        signs = np.where(np.arange(len(old)) % 3 == 0, -1, 1) if old.dtype != np.float32 else 1
        new = np.full(len(old), 127 if old.dtype == np.int8 else 1e4) * signs
        data = rewritten(data, name, new.astype(old.dtype))
    assert check(path, data) is not None or container == "hmn"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a Linux process")
def test_a_small_file_takes_little_memory_whatever_it_says(tmp_path: Path) -> None:
    """A thousand classes of the largest instance memories, of which the file has not one."""
    num_classes = 100
    layout = Layout((1, 224, 224), "int8", 2, 1, 1, 1, 512, (1,))
    memory = HierarchicalMemory(layout, [0], 1)
    memory.keep([])
    header, body = parts(serialise(memory))
    shapes = {
        name: list(spec.shape) for name, spec in layout.tensors(num_classes, num_images=0).items()
    }
    pieces, offset = [], 0
    forged = {"__metadata__": header["__metadata__"]}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        item = (end - start) // max(1, int(np.prod(entry["shape"])))
        size = int(np.prod(shapes[name])) * (item or 1)
        if name == "labels":
            piece = np.arange(num_classes, dtype=np.int64).tobytes()
        elif name == "counts":
            piece = bytes(size)
        elif name == "scales":
            piece = np.full(size // 4, 0.01, np.float32).tobytes()
        else:
            piece = (body[start:end] * num_classes)[:size].ljust(size, b"\0")
        pieces.append(piece)
        forged[name] = {**entry, "shape": shapes[name], "data_offsets": [offset, offset + size]}
        offset += size
    path = tmp_path / "forged.hmn"
    path.write_bytes(sealed(forged, b"".join(pieces)))
    script = f"""
        import resource, sys
        from hmn_replay.memory.file import load
        from hmn_replay.errors import MemoryFileError
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        assert load({str(path)!r}).num_images == 0
        print(peak() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(result.stdout) < 16 * path.stat().st_size + 2**25


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("torch.load", refuse)
    path.write_bytes(small_file())
    assert hmn_replay.memory.file.load(path).num_images == 6


@every_file
def test_bytes_come_back_as_a_memory_with_the_same_bytes(
    container: str, number_format: NumberFormat
) -> None:
    data = small_file(number_format, container)
    memory = deserialise(data)
    assert serialise(memory) == data
    for damaged in (b"", data[:-1], data + b"0", data[:-1] + bytes([data[-1] ^ 7])):
        with pytest.raises(MemoryFileError, match="cannot read the bytes of a memory"):
            deserialise(damaged)
