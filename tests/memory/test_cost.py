"""What a file costs whoever reads it: memory and time in proportion to its bytes, no more."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hmn_replay.errors import MemoryFileError, TrainingError
from hmn_replay.memory import HierarchicalMemory, HMNLayout, SubsampledMemory, load, loads
from hmn_replay.memory.entropy import encode
from hmn_replay.memory.file import Record, check_claims, integer_dtype, pack, unpack
from tests.support import real

# The memory that docs/file-format.md and SECURITY.md promise at most.
FREE_BYTES, BYTES_PER_BYTE = 2**24, 768


def layout_of(instance_channels: int, widths: tuple[int, ...] = (1,) * 5) -> HMNLayout:
    """Return a layout with so many integers an image, on a grid of one cell."""
    return HMNLayout((1, 8, 8), "entropy", 32, 1, 1, 1, instance_channels, widths, 1)


def zeros(layout: HMNLayout, num_images: int) -> HierarchicalMemory:
    memory = HierarchicalMemory(layout, [0], num_images)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.zero_()
    return memory


def sparse(layout: HMNLayout, num_images: int) -> bytes:
    """Return a well-formed file of zeros, each of which takes the fewest bits there are."""
    memory = HierarchicalMemory(layout, [0], 0)
    rows = [tensor for tensor in memory.tensors.values() if not tensor.is_bias]
    coded = [
        (
            torch.zeros(tensor.full_shape(1, num_images), dtype=torch.int8),
            torch.zeros(tensor.model_shape, dtype=torch.uint8),
        )
        for tensor in rows
    ]
    record = unpack(memory.to_bytes())
    tensors = {
        **record.tensors,
        "counts": torch.tensor([num_images], dtype=integer_dtype(0, num_images)),
        "levels": torch.cat([levels.flatten() for _, levels in coded]),
        "code": torch.frombuffer(bytearray(encode(coded)), dtype=torch.uint8),
    }
    return pack(Record(record.kind, num_images, None, record.words, tensors))


def run_alone(script: str) -> str:
    """Run a script in a process of its own; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a Linux process")
def test_what_a_file_costs_is_in_proportion_to_its_bytes(tmp_path: Path) -> None:
    """Files that claim as much as they may are read, and those that claim more are refused."""
    most, more = tmp_path / "most.hmn", tmp_path / "more.hmn"
    most.write_bytes(zeros(layout_of(8), 400_000).to_bytes())
    more.write_bytes(sparse(layout_of(2), 2_000_000))
    script = f"""
        from hmn_replay import MemoryFileError, load
        from hmn_replay.runtime import peak_memory_bytes
        import torch, pathlib
        def cost(path):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = peak_memory_bytes(torch.device("cpu"))
            try:
                found = load(path).num_images
            except MemoryFileError:
                found = 0
            print(found, peak_memory_bytes(torch.device("cpu")) - before)
        load({str(most)!r})
        cost({str(most)!r})
        cost({str(more)!r})
    """
    num_images, read, none, refused = map(int, run_alone(script).split())
    assert (num_images, none) == (400_000, 0)
    assert most.stat().st_size < 60_000
    assert more.stat().st_size < 30_000
    assert read < FREE_BYTES + BYTES_PER_BYTE * most.stat().st_size
    assert refused < FREE_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a Linux process")
def test_labels_of_many_classes_cost_in_proportion_too(tmp_path: Path) -> None:
    path, tiny = tmp_path / "many.hmn", tmp_path / "tiny.hmn"
    for num_classes, file in ((1000, path), (3, tiny)):
        memory = SubsampledMemory((1, 8, 8), factor=8)
        labels = torch.cat([torch.arange(num_classes), torch.zeros(250, dtype=torch.int64)])
        images = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        memory.extend((images, labels))
        memory.set_soft_labels(torch.eye(num_classes)[:1], [0])
        memory.save(file)
    script = f"""
        from hmn_replay import load
        from hmn_replay.runtime import peak_memory_bytes
        import torch, pathlib
        load({str(tiny)!r})
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory_bytes(torch.device("cpu"))
        assert load({str(path)!r}).has_soft_labels
        print(peak_memory_bytes(torch.device("cpu")) - before)
    """
    assert int(run_alone(script)) < FREE_BYTES + BYTES_PER_BYTE * path.stat().st_size


@pytest.mark.parametrize("num_images", [10**6, 10**9, 10**18])
def test_more_images_than_the_format_lets_a_file_have_are_refused(num_images: int) -> None:
    record = unpack(zeros(layout_of(1), 5).to_bytes())
    counts = torch.tensor([num_images], dtype=integer_dtype(0, num_images))
    tensors = {**record.tensors, "counts": counts}
    data = pack(Record(record.kind, num_images, None, record.words, tensors))
    with pytest.raises(MemoryFileError, match=f"bytes are too few for {num_images:,} images: a"):
        loads(data)


def test_more_values_than_the_format_lets_a_file_have_are_refused() -> None:
    data = sparse(layout_of(512), 12_000)
    with pytest.raises(MemoryFileError, match=r"bytes are too few for 6,1\d\d,\d+ values"):
        loads(data)


def test_a_decoder_of_next_to_no_bytes_is_refused() -> None:
    """More than a thousand million multiplications an image, in a file of ten kilobytes."""
    layout = HMNLayout((3, 224, 224), "entropy", 32, 1, 1, 1, 1, (128,) * 5, 1)
    assert HierarchicalMemory.image_work(layout) > 2**30
    with pytest.raises(MemoryFileError, match=r"too few for .* multiplications for an image"):
        loads(sparse(layout, 2))
    with pytest.raises(TrainingError, match=r"could not be read again: .* multiplications"):
        zeros(layout, 2).to_bytes()
    # The same decoder with weights that are worth their bytes.
    memory = HierarchicalMemory(layout, [0], 1)
    assert loads(memory.to_bytes()).decode()[0].isfinite().all()


def test_work_is_counted_as_the_decoder_multiplies() -> None:
    layout = HMNLayout((3, 20, 36), "int8", 4, 2, 1, 2, 3, (5, 7))
    flops = FlopCounterMode(display=False)
    memory = HierarchicalMemory(layout, [0], 1)
    with flops, torch.no_grad():
        memory(torch.tensor([0]))
    convolutions = flops.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert HierarchicalMemory.image_work(layout) == convolutions // 2


def test_many_values_that_are_all_but_zeros_are_saved_so_that_they_are_loaded() -> None:
    memory = zeros(layout_of(16), 100_000)
    with torch.no_grad():
        memory.instance_memory[::1000] = 0.5
    data = memory.to_bytes()
    assert len(data) == memory.file_bytes
    assert 16 * 100_000 / 64 < len(data) < 1.2 * 16 * 100_000 / 64
    again = loads(data)
    assert isinstance(again, HierarchicalMemory)
    assert again.instance_memory.equal(memory.instance_memory)
    assert again.to_bytes() == data


def test_who_wants_few_images_says_so(tmp_path: Path) -> None:
    memory, path = real("raw", (1, 8, 8)), tmp_path / "six.hmn"
    memory.save(path)
    assert load(path, max_images=memory.num_images).num_images == memory.num_images
    message = rf"it has {memory.num_images} images, over max_images={memory.num_images - 1}"
    with pytest.raises(MemoryFileError, match=message):
        load(path, max_images=memory.num_images - 1)
    with pytest.raises(MemoryFileError, match="over max_images=0"):
        loads(path.read_bytes(), max_images=0)


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
@pytest.mark.parametrize("side", [8, 32, 64, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_memory_that_is_planned_comes_near_the_bounds(
    channels: int, side: int, num_classes: int
) -> None:
    plan = functools.partial(
        HierarchicalMemory.choose_layout,
        image_shape=(channels, side, side),
        num_classes=num_classes,
    )
    for exponent in range(18, 31, 2):
        budget = 2**exponent
        layout = plan(budget)
        num_images = HierarchicalMemory.max_images(layout, budget, num_classes)
        values = HierarchicalMemory.num_floats_of(layout, num_classes, num_images)
        work = HierarchicalMemory.image_work(layout)
        check_claims(budget, 2 * num_images, math.ceil(1.3 * values), 8 * work)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a Linux process")
@pytest.mark.parametrize("name", ["hmn-entropy", "hmn-int8", "jpeg", "lossless"])
def test_reading_and_decoding_again_and_again_keeps_no_memory(name: str) -> None:
    data = (Path(__file__).parents[1] / "data" / "golden" / f"{name}.hmn").read_bytes()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for number in range(150):
        if number == 50:
            before = resident()
        memory = loads(data)
        memory.decode()
        memory.to_bytes()
    assert resident() - before < 2**21


def test_the_fuzzer_finds_nothing_in_a_second() -> None:
    """`make fuzz` does so for longer."""
    script = Path(__file__).parents[1] / "fuzz.py"
    result = subprocess.run(
        [sys.executable, str(script), "--seconds", "1", "--seed", "7"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert " files: " in result.stdout
