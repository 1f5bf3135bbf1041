"""Write the golden files: a memory file of every kind and number format, and what it decodes to.

    python tests/data/golden/make_golden.py

A file that is there already is left as it is, for ever: files that users have written are like it,
and tests/memory/test_golden.py shows that they are still read to the same images. A new memory kind
or number format gets a file by this script, once. A new version of the file format gets files of
its own beside the old ones.

* ``KIND-FORMAT.hmn``, or ``KIND.hmn`` for real images: the file.
* ``KIND-soft.hmn`` and ``KIND-labeller.hmn``: a file with soft labels, or with a labeller.
* ``KIND-FORMAT.npz``: ``pixels``, uint8 ``(N, C, H, W)``, what it decodes to (of features,
  float32), and ``labels``; of files with soft labels, ``soft``, float32 ``(N, K)``, too; of those
  with a labeller, ``logits``, float32 ``(N, K)``, what it says of the images.
* ``golden.json``: the BLAKE2b of each file and, for learned kinds, of the values that it is loaded
  with: float32, in the order of the table, which no machine may round in another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hmn_replay
from hmn_replay import (
    MEMORIES,
    NUMBER_FORMATS,
    LabelledFeatures,
    LabelledImages,
    LearnedMemory,
    Memory,
)
from hmn_replay.memory import (
    FeatureLayout,
    FrequencyLayout,
    HaBaLayout,
    HMNLayout,
    IDCLayout,
    LinBaLayout,
    PixelLayout,
)
from hmn_replay.memory.labels import Labeller

FOLDER = Path(__file__).parent
SHAPE, FEATURE_SHAPE = (3, 9, 13), (6, 2, 3)
NAMES = {-3: "Straßenbahn", 7: "cat"}


def hmn_layout(number_format: str) -> HMNLayout:
    image_bytes = 5 if NUMBER_FORMATS[number_format].is_coded else 0
    return HMNLayout(SHAPE, number_format, 4, 3, 2, 2, 2, (5, 4), image_bytes)


def feature_layout(number_format: str) -> FeatureLayout:
    image_bytes = 5 if NUMBER_FORMATS[number_format].is_coded else 0
    return FeatureLayout(FEATURE_SHAPE, number_format, 3, image_bytes)


def frequency_layout(number_format: str) -> FrequencyLayout:
    image_bytes = 5 if NUMBER_FORMATS[number_format].is_coded else 0
    return FrequencyLayout(SHAPE, number_format, 40, image_bytes)


LAYOUTS: dict[str, Callable[[str], Any]] = {
    "hmn": hmn_layout,
    "fred": frequency_layout,
    "features": feature_layout,
    "pixels": lambda number_format: PixelLayout(SHAPE, number_format),
    "idc": lambda number_format: IDCLayout(SHAPE, number_format),
    "haba": lambda number_format: HaBaLayout(SHAPE, number_format, 2),
    "linba": lambda number_format: LinBaLayout(SHAPE, number_format, 5),
}
CODEBOOK = torch.linspace(-2, 2, 2 * 8 * 3).view(2, 8, 3)
CODECS: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 40},
    "subsampled": {"factor": 3},
    "pq": {"num_parts": 2, "bits": 3, "codebook": CODEBOOK},
}


def learned(kind: str, number_format: str) -> Memory:
    """Return a memory that has been pruned, with a class that has no image left."""
    memory_type: Any = MEMORIES[kind]
    layout = LAYOUTS[kind](number_format)
    size = layout.group_size
    memory = memory_type(layout, [7, -3, 2**40], [2 * size, 2 * size, size], budget=20_000)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in memory.parameters():
            noise = rng.normal(0, 0.3, parameter.shape).astype(np.float32)
            parameter.add_(torch.from_numpy(noise))
    memory.update_scales()
    memory.keep(range(size, 4 * size))
    memory.class_names = dict(NAMES)
    return memory  # type: ignore[no-any-return]


def real(kind: str) -> Memory:
    """Return a memory of real images, of which one has been dropped."""
    memory_type: Any = MEMORIES[kind]
    shape = FEATURE_SHAPE if memory_type.holds_features else SHAPE
    memory = memory_type(shape, budget=20_000, **CODECS.get(kind, {}))
    rng = np.random.default_rng(2)
    coarse = rng.integers(0, 230, (5, 3, 3, 5)).repeat(3, axis=2).repeat(3, axis=3)[..., :13]
    pixels = (coarse + rng.integers(0, 25, (5, *SHAPE))).astype(np.uint8)
    labels = torch.tensor([-3, 7, 7, 2**40, 2**40])
    data = LabelledImages(torch.from_numpy(pixels), labels)
    if memory.holds_features:
        values = rng.normal(0, 1, (5, *shape)).astype(np.float32)
        data = LabelledFeatures(torch.from_numpy(values), labels)
    memory.extend(data)
    memory.keep([0, 1, 2, 4])
    memory.class_names = dict(NAMES)
    return memory  # type: ignore[no-any-return]


def as_it_is(memory: Memory) -> Memory:
    return memory


def with_soft_labels(memory: Memory) -> Memory:
    """Return the memory with soft labels, and with a class that came after them."""
    rng = np.random.default_rng(3)
    rows = rng.dirichlet(np.full(memory.num_classes, 0.4), memory.num_images)
    memory.set_soft_labels(torch.from_numpy(rows))
    if isinstance(memory, LearnedMemory):
        memory.add_classes([11], 1)
    return memory


def with_labeller(memory: Memory) -> Memory:
    """Return the memory with a labeller of its classes."""
    width, depth = 5, 2
    labeller = Labeller(memory.image_shape, memory.num_classes, width, depth)
    rng = np.random.default_rng(4)
    for name, buffer in labeller.named_buffers():
        values = rng.normal(0, 6, buffer.shape) if "integers" in name else rng.random(buffer.shape)
        buffer.copy_(torch.from_numpy(np.round(values) if "integers" in name else values + 0.1))
    memory.set_labeller(labeller)
    return memory


LABELLED: dict[str, tuple[str, str, Callable[[Memory], Memory]]] = {
    "hmn-entropy-soft": ("hmn", "entropy", with_soft_labels),
    "raw-soft": ("raw", "", with_soft_labels),
    "jpeg-labeller": ("jpeg", "", with_labeller),
}


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def values(memory: LearnedMemory) -> bytes:
    """Return the values that a memory has, as bytes of float32 in the order of the table."""
    return b"".join(
        memory.get_parameter(name).detach().numpy().tobytes() for name in memory.tensors
    )


def golden_names() -> Iterator[tuple[str, str, str]]:
    """Yield the name of each golden file, the memory kind and the number format, if it has one."""
    for kind, memory_type in MEMORIES.items():
        if not issubclass(memory_type, LearnedMemory):
            yield kind, kind, ""
            continue
        for number_format, entry in NUMBER_FORMATS.items():
            if memory_type.codes_entropy or not entry.is_coded:
                yield f"{kind}-{number_format}", kind, number_format


def main() -> None:
    path = FOLDER / "golden.json"
    digests: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    plain = ((*names, as_it_is) for names in golden_names())
    both = [*plain, *((name, *made) for name, made in LABELLED.items())]
    for name, kind, number_format, add_labels in both:
        file = FOLDER / f"{name}.hmn"
        if file.exists():
            continue
        memory = add_labels(learned(kind, number_format) if number_format else real(kind))
        memory.save(file)
        pixels, labels = memory.decode(dtype=memory.value_dtype)
        arrays: dict[str, Any] = {"pixels": pixels.numpy(), "labels": labels.numpy()}
        if memory.has_soft_labels:
            arrays["soft"] = memory.soft_labels().numpy()
        if memory.labeller is not None:
            arrays["logits"] = memory.labeller(pixels.float() / 255).numpy()
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        digests[name] = {"file": digest(file.read_bytes())}
        loaded = hmn_replay.load(file)
        if isinstance(loaded, LearnedMemory):
            digests[name]["values"] = digest(values(loaded))
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    path.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
