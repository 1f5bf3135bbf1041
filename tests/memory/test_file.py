"""The memory file: nothing is lost in it, and nothing in it is believed."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn_replay.errors import DataError, MemoryFileError
from hmn_replay.memory import (
    MEMORIES,
    HaBaLayout,
    HierarchicalMemory,
    HMNLayout,
    IDCLayout,
    LearnedMemory,
    LinBaLayout,
    Memory,
    PixelLayout,
    load,
    loads,
)
from hmn_replay.memory.file import FILE_VERSION, Record, TensorSpec, pack, packed_size, unpack
from tests.support import (
    LEARNED,
    LEARNED_FORMATS,
    REAL,
    frequency_layout,
    hmn_layout,
    learned_type,
    real,
    same_bits,
)

# The files that are damaged and forged: every kind, and HMN's in every format.
FILES = [
    *((kind, name) for kind, name in LEARNED_FORMATS if kind == "hmn" or name == "int8"),
    *((kind, "") for kind in REAL),
]
every_file = pytest.mark.parametrize(("kind", "number_format"), FILES)

SMALL: dict[str, Any] = {
    "image_shape": (1, 8, 8),
    "stride": 4,
    "dataset_channels": 1,
    "feature_channels": 1,
    "class_channels": 1,
    "instance_channels": 2,
    "decoder_channels": (2, 2),
}
SMALL_LAYOUTS: dict[str, Any] = {
    "hmn": functools.partial(hmn_layout, **SMALL),
    "fred": functools.partial(frequency_layout, (1, 8, 8)),
    "pixels": functools.partial(PixelLayout, (1, 8, 8)),
    "idc": functools.partial(IDCLayout, (1, 8, 8), pieces=2),
    "haba": functools.partial(HaBaLayout, (1, 8, 8), num_hallucinators=2),
    "linba": functools.partial(LinBaLayout, (1, 8, 8), num_bases=6),
}


@functools.lru_cache
def small_file(number_format: str = "int8", kind: str = "hmn") -> bytes:
    if kind in REAL:
        memory: Memory = real(kind, (1, 8, 8), (-3, 7, 10**12), (1, 2, 3))
    else:
        layout = SMALL_LAYOUTS[kind](number_format=number_format)
        counts = [layout.group_size * count for count in (2, 1, 3)]
        memory = learned_type(kind)(layout, [7, -3, 10**12], counts)
    memory.budget_bytes, memory.class_names = 9000, {7: "cat"}
    return memory.to_bytes()


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
    if found is None or len(found[1]) != 16:
        return prefix + header + body
    before, after = header[: found.start(1)], header[found.end(1) :]
    digest = blake2b(prefix + before + after + body, digest_size=8).hexdigest()
    return prefix + before + digest.encode() + after + body


def text_of(header: dict[str, Any]) -> str:
    text: str = header["__metadata__"]["hmn_replay"]
    return text


def with_text(header: dict[str, Any], text: Any) -> dict[str, Any]:
    return {**header, "__metadata__": {"hmn_replay": text}}


def reworded(data: bytes, old: str, new: str) -> bytes:
    """Return a file with other words in its metadata, sealed."""
    header, body = parts(data)
    text = text_of(header)
    assert text.count(old) == 1
    return sealed(with_text(header, text.replace(old, new)), body)


def rewritten(data: bytes, name: str, values: Any) -> bytes:
    """Write other values into a tensor."""
    header, body = parts(data)
    start, end = header[name]["data_offsets"]
    raw = np.asarray(values).tobytes()
    assert len(raw) == end - start
    return sealed(header, body[:start] + raw + body[end:])


def stored(data: bytes, name: str) -> Any:
    return unpack(data).tensors[name].numpy().copy()


def check(data: bytes) -> Memory | None:
    """Read bytes that may be anything: a memory that works, or a MemoryFileError; never else."""
    try:
        memory = loads(data)
    except MemoryFileError as error:
        assert str(error).startswith("cannot read the bytes of a memory: ")
        assert len(str(error)) > len("cannot read the bytes of a memory: ")
        return None
    try:
        images, labels = memory.decode()
    except DataError:  # of a codec that is not ours, whose images are read when they are asked for
        assert memory.kind in REAL
        return memory
    assert bool(((images >= 0) & (images <= 1)).all())
    assert len(images) == len(labels)
    again = memory.to_bytes()
    assert len(again) == memory.file_bytes
    # A forger's code, or class names, may be longer than need be.
    is_plain = not isinstance(memory, LearnedMemory) or not memory.layout.is_coded
    assert len(again) == len(data) or not is_plain or memory.names_bytes or b"names" in data
    return memory


def same_memory(one: Memory, two: Memory) -> bool:
    (images, labels), (other_images, other_labels) = one.decode(), two.decode()
    return (
        one.words() == two.words()
        and one.budget_bytes == two.budget_bytes
        and one.class_names == two.class_names
        and one.classes.equal(two.classes)
        and labels.equal(other_labels)
        and same_bits(images, other_images)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.hmn"


# What is packed.


DTYPES = [
    torch.int64,
    torch.float64,
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int8,
    torch.uint8,
]
SPECS = st.builds(
    TensorSpec, st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=4).map(tuple)
)
NAMES = st.text("abcxyz._019", min_size=1, max_size=12)
WORDS = st.lists(st.text("abc019,-", min_size=1, max_size=9), max_size=4).map(tuple)
RECORDS = st.builds(
    Record,
    st.sampled_from(sorted(MEMORIES)),
    st.integers(0, 10**7),
    st.none() | st.integers(1, 10**15),
    WORDS,
    st.dictionaries(NAMES, SPECS, min_size=1, max_size=8),
)


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_the_size_that_is_predicted_is_the_size_that_safetensors_writes(record: Any) -> None:
    specs = record.tensors
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    data = pack(Record(record.kind, record.num_images, record.budget_bytes, record.words, tensors))
    size = packed_size(record.kind, record.num_images, record.budget_bytes, record.words, specs)
    assert len(data) == size
    back = unpack(data)
    assert (back.kind, back.num_images) == (record.kind, record.num_images)
    assert (back.budget_bytes, back.words) == (record.budget_bytes, record.words)
    found = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in back.tensors.items()}
    assert found == specs
    assert len(safetensors.torch.load(data)) == len(specs)


@every_file
def test_the_file_is_safetensors_and_says_what_it_is(
    kind: str, number_format: str, path: Path
) -> None:
    path.write_bytes(small_file(number_format, kind))
    memory = load(path)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {"labels", "counts", "names", *memory.stored()}
        text = file.metadata()["hmn_replay"]
        assert text.startswith(f"{FILE_VERSION} ")
        assert text.split(" ")[2:] == [kind, str(len(memory)), "9000", *memory.words()]
        assert file.get_tensor("labels").tolist() == memory.classes.tolist()
        assert file.get_tensor("counts").tolist() == memory.images_per_class


def test_the_file_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = f"""
        from hmn_replay import HierarchicalMemory, HMNLayout
        layout = HMNLayout(number_format="int8", **{SMALL!r})
        memory = HierarchicalMemory(layout, [7, -3, 10**12], [2, 1, 3], budget=9000)
        memory.class_names = {{7: "cat"}}
        memory.save({str(tmp_path / "other.hmn")!r})
    """
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
    assert (tmp_path / "other.hmn").read_bytes() == small_file()


@every_file
def test_bytes_are_read_to_a_memory_of_the_same_bytes(kind: str, number_format: str) -> None:
    data = small_file(number_format, kind)
    memory = loads(data)
    assert memory.to_bytes() == data
    assert (memory.budget_bytes, memory.class_names) == (9000, {7: "cat"})


def test_loading_and_saving_leave_the_random_state(
    path: Path, untouched_random_state: None
) -> None:
    path.write_bytes(small_file())
    load(path).save(path)
    assert path.read_bytes() == small_file()


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
    with pytest.raises(MemoryFileError, match=r"memory\.hmn': not a regular file"):
        load(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
@pytest.mark.timeout(10)
def test_a_device_without_an_end_is_refused_at_once() -> None:
    with pytest.raises(MemoryFileError, match="not a regular file"):
        load("/dev/zero")


def test_a_name_with_a_null_character_is_refused() -> None:
    with pytest.raises(MemoryFileError, match="a file name holds no null character"):
        load("memory\0.hmn")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\0" * 7, b"\0" * 8, b"\0" * 4096, b"\xff" * 4096, b"hello\n", b"PK\3\4" * 99],
)
def test_any_other_file_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(MemoryFileError, match=r"cannot read '.*memory\.hmn': not a memory file"):
        load(path)


def test_another_safetensors_file_is_refused(path: Path) -> None:
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3)}, {"format": "pt"}))
    with pytest.raises(MemoryFileError, match="not a memory file: its header is not hmn_replay's"):
        load(path)


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("torch.load", refuse)
    for kind, number_format in FILES:
        assert loads(small_file(number_format, kind)).num_classes == 3


# Files that were damaged: the digest.


@every_file
def test_a_truncated_file_is_refused_wherever_it_ends(kind: str, number_format: str) -> None:
    data = small_file(number_format, kind)
    for length in range(len(data)):
        assert check(data[:length]) is None


@every_file
def test_no_flipped_byte_goes_unseen(kind: str, number_format: str) -> None:
    data = small_file(number_format, kind)
    for position in range(len(data)):
        for change in (1 << (position % 8), 255):
            changed = bytearray(data)
            changed[position] ^= change
            assert check(bytes(changed)) is None


def test_what_was_done_to_a_file_is_said() -> None:
    data = small_file()
    changed = bytearray(data)
    changed[-1] ^= 1
    altered = "its digest does not fit its content: the file was truncated, altered or damaged"
    for damaged, message in (
        (bytes(changed), altered),
        (data[:-1], altered),
        (data + b"\0", altered),
        (data[:100], "a truncated one: 100 bytes do not hold the header that they announce"),
    ):
        with pytest.raises(MemoryFileError, match=re.escape(message)):
            loads(damaged)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage a file in one of the ways that files are damaged."""
    at, length = rng.randrange(len(data) + 1), rng.randrange(1, 40)
    way = rng.randrange(6)
    if way == 0:  # overwritten
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if way == 1:  # inserted
        return data[:at] + rng.randbytes(length) + data[at:]
    if way == 2:  # cut out
        return data[:at] + data[at + length :]
    if way == 3:  # a piece of itself elsewhere
        source = rng.randrange(len(data))
        return data[:at] + data[source : source + length] + data[at + length :]
    if way == 4:  # doubled
        return data[:at] + data[max(0, at - length) :]
    changed = bytearray(data)  # bits
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@every_file
def test_no_damage_gets_through(kind: str, number_format: str) -> None:
    data, rng = small_file(number_format, kind), random.Random(0)
    started = time.monotonic()
    for _ in range(1000):
        changed = mutated(data, rng)
        memory = check(changed)
        assert memory is None or changed == data
    assert time.monotonic() - started < 30


# Files that were forged: the digest fits.


@every_file
def test_forged_bytes_are_refused_or_make_a_whole_memory(kind: str, number_format: str) -> None:
    data, rng = small_file(number_format, kind), random.Random(1)
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    assert sealed(header, body) == data
    num_whole = 0
    for number in range(400):
        if number % 2:
            forged = sealed(mutated(header, rng), body)
        else:
            forged = sealed(header, mutated(body, rng))
        num_whole += check(forged) is not None
    assert num_whole > 5  # the digest of the forger is the right one


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 6, 1000, 1001, 2**31, 2**63, 2**64, 10**400),
    *(0.0, 1.0, 1.5, 3.0, -1.0, 1e308, float("inf"), float("nan")),
    *("", "x", "I8", "F32", "F64", "BF16", "BOOL", "U8", "F8_E4M3", "\ud800", "9" * 50),
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
                node[rng.choice(["x", "labels", "dtype", "shape", "values"])] = node[key]
            elif action == 2 and isinstance(node[key], int):
                node[key] += rng.choice((-1, 1, 8, -8, 2**32))
            elif isinstance(node[key], str) and " " in node[key]:
                words = node[key].split(" ")
                place = rng.choice([0, *range(2, len(words))])
                numbers = ("0", "-1", "999999", "1,1", "4", "8,8", "int8")
                words[place] = rng.choice([*words, *numbers, *MEMORIES])
                node[key] = " ".join(words)
            else:
                node[key] = copy.deepcopy(rng.choice(JUNK))
            break
    return header


@every_file
def test_forged_headers_are_refused_or_make_a_whole_memory(kind: str, number_format: str) -> None:
    (header, body), rng = parts(small_file(number_format, kind)), random.Random(2)
    for _ in range(700):
        check(sealed(edited(header, rng), body))


def forgeries() -> dict[str, tuple[bytes, str]]:
    data, pieces = small_file(), small_file(kind="idc")
    header, body = parts(data)
    labels, counts = stored(data, "labels"), stored(data, "counts")
    scales, biases = stored(data, "scales"), stored(data, "biases")
    names = len(stored(data, "names"))
    nested = b'{"a":' * 5000 + b"1" + b"}" * 5000
    twice = json.dumps(header)[:-1] + ',"labels":{"dtype":"I64","shape":[9],"data_offsets":[0,24]}}'
    hmn = " ".join(text_of(header).split(" ")[5:])
    assert hmn == "int8 1,8,8 4 1 1 1 2 2,2 0"

    def scaled(value: float) -> bytes:
        return rewritten(
            data, "scales", np.where(np.arange(len(scales)) == 3, np.float32(value), scales)
        )

    def biased(value: float) -> bytes:
        return rewritten(
            data, "biases", np.where(np.arange(len(biases)) == 3, np.float16(value), biases)
        )

    def reshaped(name: str, shape: Any) -> bytes:
        return sealed({**header, name: {**header[name], "shape": shape}}, body)

    def renamed(text: bytes) -> bytes:
        return rewritten(data, "names", np.frombuffer(text.ljust(names, b"\0"), np.uint8))

    return {
        "nested": (sealed(nested, body), "its header is not hmn_replay's"),
        "nested in the metadata": (sealed(with_text(header, [[[]]]), body), "is not hmn_replay's"),
        "a list": (sealed(b"[1, 2, 3]", body), "its header is not hmn_replay's"),
        "not UTF-8": (sealed(b"\xff\xfe\xfa", body), "its header is not hmn_replay's"),
        "an oversized header": (sealed(b" " * 2**17, body), "a header of 131,072 bytes, over 65"),
        "a header of many exabytes": (b"\xff" * 7 + b"\x7f" + data[8:], "do not hold the header"),
        "version 3": (
            sealed(with_text(header, "3" + text_of(header)[1:]), body),
            "file version 3; this version of hmn_replay reads version 2: install the version",
        ),
        "version -1": (sealed(with_text(header, "-1 x y"), body), "file version -1"),
        "no version": (sealed(with_text(header, " x y"), body), "is not hmn_replay's"),
        "too few words": (sealed(with_text(header, "2 0123456789abcdef hmn"), body), "unpack"),
        "budget 0": (reworded(data, " 9000 ", " 0 "), "1 byte or more"),
        "a budget in another way": (reworded(data, " 9000 ", " +9000 "), "written in another way"),
        "a budget of a million digits": (reworded(data, "9000", "9" * 60_000), "metadata"),
        "fewer than no images": (reworded(data, "hmn 6 ", "hmn -6 "), "a negative number"),
        "another number of images": (reworded(data, "hmn 6 ", "hmn 7 "), "add up to its 7 images"),
        "a kind that nobody knows": (
            reworded(data, " hmn ", " hmm "),
            f"memory kind must be one of {', '.join(MEMORIES)}; got 'hmm'; did you mean 'hmn'",
        ),
        "a kind of real images": (
            reworded(data, " hmn ", " raw "),
            "too many values of ['image shape']",
        ),
        "another kind": (reworded(pieces, " idc 24 ", " pixels 24 "), "a layout of 2 words, got 3"),
        "too many fields": (reworded(data, " 2,2 0", " 2,2 0 0"), "a layout of 9 words, got 10"),
        "too few fields": (reworded(data, " 2,2 0", " 2,2"), "a layout of 9 words, got 8"),
        "another layout": (reworded(data, " 2 2,2 0", " 3 2,2 0"), "tensor 'values' is torch.int8"),
        "the largest layout": (
            reworded(data, "1,8,8 4 1 1 1 2 2,2", "3,224,224 2 512 512 512 512 512"),
            "tensor 'biases' is torch.float16",
        ),
        "another format": (reworded(data, " int8 ", " float32 "), "are not those of such a memory"),
        "an unknown format": (reworded(data, " int8 ", " int7 "), "number format must be one of"),
        "a tensor too many": (
            sealed(
                {**header, "x": {"dtype": "I8", "shape": [0], "data_offsets": [len(body)] * 2}},
                body,
            ),
            "its tensors are not those of such a memory: ['x']",
        ),
        "a tensor too few": (
            sealed({k: v for k, v in header.items() if k != "values"}, body),
            "its tensors cannot be read",
        ),
        "a shape of text": (reshaped("values", ["x"]), "its tensors cannot be read"),
        "a shape of nothing": (reshaped("values", []), "its tensors cannot be read"),
        "a null shape": (reshaped("values", None), "its tensors cannot be read"),
        "a fractional shape": (reshaped("values", [6.0]), "its tensors cannot be read"),
        "a shape below nothing": (reshaped("values", [-1]), "its tensors cannot be read"),
        "a shape beyond floats": (reshaped("values", [10**400]), "its tensors cannot be read"),
        "another shape": (reshaped("values", [1, header["values"]["shape"][0]]), "tensor 'values'"),
        "labels of another shape": (reshaped("labels", [3, 1]), "1 to 1000 classes; got 0"),
        "a name twice": (sealed(twice.encode(), body), ""),
        "offsets that overlap": (
            sealed({**header, "counts": {**header["counts"], "data_offsets": [0, 3]}}, body),
            "its tensors cannot be read",
        ),
        "offsets beyond the end": (
            sealed({**header, "counts": {**header["counts"], "data_offsets": [0, 2**62]}}, body),
            "its tensors cannot be read",
        ),
        "the same class twice": (
            rewritten(data, "labels", labels[[0, 1, 0]]),
            "each class may occur once",
        ),
        "labels that a byte holds": (
            rewritten(data, "labels", np.array([1, 2, 3])),
            "tensor 'labels' is torch.int64 (3,); expected torch.uint8 (3,)",
        ),
        "counts that do not add up": (
            rewritten(data, "counts", counts + np.array([1, 0, 0], np.uint8)),
            "images a class do not add up to its 6 images",
        ),
        "counts apart from groups": (
            rewritten(pieces, "counts", np.array([7, 5, 12], np.uint8)),
            "4 images share stored values",
        ),
        "a scale of NaN": (scaled(np.nan), "its scales are not finite, or far too large"),
        "an infinite scale": (scaled(np.inf), "its scales are not finite"),
        "a scale far too large": (scaled(1e30), "its scales are not finite"),
        "a scale too large for its integers": (scaled(9999), "has values that are far too large"),
        "a scale below zero": (scaled(-0.01), "a scale is not positive"),
        "a scale of zero": (scaled(0), "a scale is not positive"),
        "a denormal scale": (scaled(1e-40), "a scale is not positive"),
        "a bias of NaN": (biased(np.nan), "its biases are not finite, or far too large"),
        "an infinite bias": (biased(np.inf), "its biases are not finite"),
        "names of another type": (
            sealed({**header, "names": {**header["names"], "dtype": "I8"}}, body),
            "tensor 'names' is torch.int8",
        ),
        "a type of float8": (
            sealed({**header, "names": {**header["names"], "dtype": "F8_E4M3"}}, body),
            "tensor 'names' is torch.float8_e4m3fn, which no memory stores",
        ),
        "names that are no code": (renamed(b"abc"), "its class names cannot be read"),
        "names of another number": (renamed(zlib_of('["a"]')), "its class names are not 3 texts"),
        "names that are numbers": (renamed(zlib_of("[1,2,3]")), "its class names are not 3 texts"),
        "names that are a text": (renamed(zlib_of('"abc"')), "its class names"),
        "names that no text can have": (
            renamed(zlib_of('["\\ud800"]')),
            "its class names are not all of Unicode",
        ),
        "a digest that no text can have": (
            sealed(with_text(header, text_of(header)), body).replace(
                text_of(header).split(" ")[1].encode(), b"\\ud800" + b"0" * 10
            ),
            "not a memory file",
        ),
        "names that are no JSON": (renamed(zlib_of("[")), "its class names cannot be read"),
    }


def zlib_of(text: str) -> bytes:
    import zlib

    return zlib.compress(text.encode())


@pytest.mark.parametrize("name", forgeries())
def test_a_forged_file_is_refused_with_the_reason(name: str) -> None:
    data, message = forgeries()[name]
    with pytest.raises(MemoryFileError, match=re.escape(message) or None):
        loads(data)


def test_names_that_inflate_without_end_are_refused() -> None:
    memory = real("raw")
    record = unpack(memory.to_bytes())
    bomb = torch.from_numpy(np.frombuffer(zlib_of('["' + "a" * 2**23), np.uint8).copy())
    tensors = {**record.tensors, "names": bomb}
    data = pack(Record(record.kind, record.num_images, None, record.words, tensors))
    assert len(data) < 2**14
    with pytest.raises(MemoryFileError, match="its class names cannot be read"):
        loads(data)


@pytest.mark.parametrize("number_format", ["float32", "float16"])
@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4])
def test_values_that_are_no_numbers_are_refused(
    kind: str, number_format: str, value: float
) -> None:
    data = small_file(number_format, kind)
    for tensor in ("values", "biases"):
        if tensor in unpack(data).tensors:
            values = stored(data, tensor)
            values[len(values) // 2] = value
            with pytest.raises(MemoryFileError, match=f"its {tensor} are not finite"):
                loads(rewritten(data, tensor, values))


LARGE_LAYOUTS: dict[str, Any] = {
    **SMALL_LAYOUTS,
    "hmn": functools.partial(
        hmn_layout,
        **{**SMALL, "stride": 32, "decoder_channels": (64,) * 5, "instance_channels": 64},
    ),
    "haba": functools.partial(HaBaLayout, (3, 8, 8), num_hallucinators=64),
    "linba": functools.partial(LinBaLayout, (3, 8, 8), num_bases=1024),
}


@pytest.mark.parametrize(("kind", "number_format"), LEARNED_FORMATS)
def test_the_largest_values_that_are_accepted_still_decode_to_images(
    kind: str, number_format: str
) -> None:
    layout = LARGE_LAYOUTS[kind](number_format=number_format)
    data = learned_type(kind)(layout, [0, 1], layout.group_size).to_bytes()
    for name in ("values", "scales", "biases"):
        if name in unpack(data).tensors:
            old = stored(data, name)
            signs = np.where(np.arange(len(old)) % 3 == 0, -1, 1) if name != "scales" else 1
            largest = 127 if old.dtype == np.int8 else 1e4 / 127.1 if name == "scales" else 1e4
            new = np.full(len(old), largest) * signs
            data = rewritten(data, name, new.astype(old.dtype))
    assert check(data) is not None or kind == "hmn"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a Linux process")
def test_a_small_file_takes_little_memory_whatever_it_says(tmp_path: Path) -> None:
    """A hundred classes of the largest instance memories, of which the file has not one."""
    layout = HMNLayout((1, 224, 224), "int8", 2, 1, 1, 1, 512, (1,))
    memory = HierarchicalMemory(layout, range(100), 0)
    path = tmp_path / "claims.hmn"
    memory.save(path)
    # The same with more images than it has values for.
    record = unpack(path.read_bytes())
    counts = torch.full((100,), 100, dtype=torch.int16)
    tensors = {**record.tensors, "counts": counts}
    claims = tmp_path / "claims_more.hmn"
    claims.write_bytes(pack(Record(record.kind, 10_000, None, record.words, tensors)))
    script = f"""
        import resource
        from hmn_replay import MemoryFileError, load
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        assert load({str(path)!r}).num_images == 0
        try:
            load({str(claims)!r})
        except MemoryFileError:
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


def test_a_code_of_next_to_nothing_cannot_claim_any_number_of_images() -> None:
    layout = SMALL_LAYOUTS["hmn"](number_format="entropy")
    memory = HierarchicalMemory(layout, [0, 1], [40, 2])
    record = unpack(memory.to_bytes())
    for num_images, code in ((42, record.tensors["code"][:4]), (10**6, record.tensors["code"])):
        counts = torch.tensor([num_images - 2, 2])
        counts = counts.to(torch.uint8 if num_images < 256 else torch.int32)
        tensors = {**record.tensors, "counts": counts, "code": code}
        data = pack(Record(record.kind, num_images, None, record.words, tensors))
        with pytest.raises(MemoryFileError, match=r"is too short for|are too few for"):
            loads(data)
