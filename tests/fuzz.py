"""Read mutated memory files for as long as asked: each is loaded or refused, within bounds.

    python tests/fuzz.py --seconds 600

The golden files are cut, spliced and edited; half of the results get the digest that fits them.
Whatever they say, loading them ends in a memory or in a ``MemoryFileError``, within the memory that
``SECURITY.md`` promises and a bound on the time. The first file for which it does not is written to
``fuzz-NUMBER.hmn``, and the exit code is 1. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import torch

from hmn_replay.errors import DataError, MemoryFileError
from hmn_replay.memory import loads
from hmn_replay.runtime import peak_memory_bytes

GOLDEN = Path(__file__).parent / "data" / "golden"
FREE_BYTES, BYTES_PER_BYTE = 2**24, 768
# For one file on a busy machine; those that are read take milliseconds.
FREE_SECONDS, SECONDS_PER_BYTE = 5.0, 1e-5
WORDS = [b"0", b"1", b"-1", b"7", b"64", b"999999999", b"1,1", b"3,224,224", b"1,8,8", b"32"]
WORDS += [b"entropy", b"int8", b"float16", b"hmn", b"raw", b"jpeg", b"lossless"]
WORDS += [b"idc", b"linba", b"fred"]


def sealed(data: bytes) -> bytes:
    """Return a file with the digest and the length of the header that fit its content."""
    length = int.from_bytes(data[:8], "little")
    found = re.search(rb'"hmn_replay":"\S* ([0-9a-f]{16}) ', data[8 : 8 + length])
    if found is None:
        return data
    before, after = data[: 8 + found.start(1)], data[8 + found.end(1) :]
    return before + blake2b(before + after, digest_size=8).hexdigest().encode() + after


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a file after one to four edits of its bytes, header or words."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        length = int.from_bytes(data[:8], "little")
        header, body = data[8 : 8 + length], data[8 + length :]
        edit = rng.choice((flipped, flipped, cut, spliced, repeated, reworded, recounted, junked))
        if edit is cut or (edit not in (reworded, recounted) and rng.random() < 0.7):
            body = edit(body, others, rng)
        else:
            header = edit(header, others, rng)
        # Mostly with the length that fits; the digest is for the caller to fit.
        length = len(header) if rng.random() < 0.95 else length
        data = length.to_bytes(8, "little") + header + body
    return data


def flipped(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Flip bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Cut off the end, or a part."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 4, 64, len(data))) :]


def spliced(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Put a part of another file in."""
    other = rng.choice(others)
    start, at = rng.randrange(len(other)), rng.randrange(len(data) + 1)
    part = other[start : start + rng.choice((1, 8, 100))]
    return data[:at] + part + data[at + rng.choice((0, len(part))) :]


def repeated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Repeat a part, up to ten thousand times."""
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.choice((1, 8, 64))]
    return data[:start] + part * rng.choice((2, 100, 10_000)) + data[start:]


def reworded(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Replace a word of the metadata."""
    found = re.search(rb'"hmn_replay":"([^"]*)"', data)
    if found is None:
        return flipped(data, others, rng)
    words = found[1].split(b" ")
    words[rng.randrange(len(words))] = rng.choice(WORDS)
    return data[: found.start(1)] + b" ".join(words) + data[found.end(1) :]


def recounted(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Replace a number."""
    numbers = list(re.finditer(rb"[0-9]+", data))
    if not numbers:
        return flipped(data, others, rng)
    found = rng.choice(numbers)
    value = int(found[0][:18])
    new = rng.choice((0, 1, value + 1, value - 1, 2 * value, 10**6, 2**31, 2**62))
    return data[: found.start()] + str(new).encode() + data[found.end() :]


def junked(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Overwrite a part by one value, or by noise."""
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 64, 4096))
    size = min(size, len(data) - start)
    junk = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b"[" * size))
    return data[:start] + junk + data[start + size :]


def check(data: bytes) -> str:
    """Read a file; return how that ended. Anything but a memory or a refusal is raised."""
    try:
        memory = loads(data)
    except MemoryFileError:
        return "refused"
    json.dumps(memory.summary())
    try:
        images, _ = memory.decode(range(min(2, memory.num_images)))
    except DataError:  # of a codec that is not ours, whose images are read when they are asked for
        return "read, but not decoded"
    assert bool(images.isfinite().all()), "values that are not finite"
    if not memory.holds_features:
        assert bool(((images >= 0) & (images <= 1)).all()), "pixels outside [0, 1]"
    return "read"


def reset_peak_memory() -> int:
    """Let the peak of the process's memory be what it is now, where the system can; return it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(torch.device("cpu"))


def main() -> int:
    """Fuzz, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [path.read_bytes() for path in sorted(GOLDEN.glob("*.hmn"))]
    for data in seeds:
        assert sealed(data) == data
        assert check(data) == "read"
    ends, number, started = Counter[str](), 0, time.monotonic()
    slowest = largest = 0.0
    while time.monotonic() - started < args.seconds:
        rng = random.Random(f"{args.seed} {number}")
        data = mutated(rng.choice(seeds), seeds, rng)
        data = sealed(data) if rng.random() < 0.5 else data
        before, begun = reset_peak_memory(), time.monotonic()
        try:
            ends[check(data)] += 1
            seconds = time.monotonic() - begun
            used = peak_memory_bytes(torch.device("cpu")) - before
            assert used < FREE_BYTES + BYTES_PER_BYTE * len(data), f"{used:,} bytes of memory"
            assert seconds < FREE_SECONDS + SECONDS_PER_BYTE * len(data), f"{seconds:.1f} s"
            slowest, largest = max(slowest, seconds), max(largest, used)
        except Exception:
            path = Path(f"fuzz-{number}.hmn")
            path.write_bytes(data)
            print(f"file {number} of seed {args.seed}, {len(data):,} bytes: see {path}", flush=True)
            raise
        number += 1
    told = ", ".join(f"{count:,} {end}" for end, count in sorted(ends.items()))
    print(
        f"{number:,} files: {told}; at most {largest / 2**20:.1f} MiB and {slowest:.2f} s for one"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
