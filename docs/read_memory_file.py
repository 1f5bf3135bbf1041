"""Read a memory file of kind hmn with numpy and constriction alone."""

import hashlib
import itertools
import json
import math
import struct
import sys

import numpy as np
from constriction import stream

DTYPES = dict(I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1", F32="<f4", F16="<f2")


def read(data: bytes) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the words of the metadata, and the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    words = header.pop("__metadata__")["hmn_replay"].split(" ")
    before, after = data.split(words[1].encode(), 1)
    assert hashlib.blake2b(before + after, digest_size=8).hexdigest() == words[1]
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[start:end], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return words, tensors


def table(words: list[str], num_classes: int) -> list[tuple]:
    """Return the name, shape, step and shape of the models of every coded row of hmn."""
    num_images = int(words[3])
    (channels, height, width), stride = map(int, words[6].split(",")), int(words[7])
    dataset, feature, own_class, instance = map(int, words[8:12])
    decoder = list(map(int, words[12].split(",")))
    grid = math.ceil(height / stride), math.ceil(width / stride)
    widths = [feature + own_class + instance, *decoder, 4 * channels]
    rows = [
        ("dataset_memory", (dataset, *grid), 1 / 16, (1, 1, 1)),
        ("class_memory", (num_classes, own_class, *grid), 1 / 16, (1, own_class, 1, 1)),
        ("instance_memory", (num_images, instance, *grid), 1 / 4, (1, instance, *grid)),
        ("extractor_weight", (num_classes, feature, dataset), 1 / 16, (1, 1, 1)),
    ]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        step = 0.35 * math.sqrt(2 / (9 * inputs))
        rows.append((f"decoder_weight_{i}", (outputs, inputs, 3, 3), step, (1, 1, 1, 1)))
    return rows


def model(level: int):
    """Return the probabilities of -127 to 127 at a level."""
    octaves, quarters = divmod(level, 4)
    mean = math.ldexp(math.sqrt(math.sqrt(2.0**quarters)), octaves - 6)
    ratio = round(mean / (1 + math.sqrt(1 + mean * mean)) * 2**16)
    weights = [ratio ** abs(k) * 2 ** (16 * (127 - abs(k))) for k in range(-127, 128)]
    total = sum(weights)
    counts = [1 + weight * (2**24 - 255) // total for weight in weights]
    counts[127] += 2**24 - sum(counts)
    return stream.model.Categorical(np.array(counts) / 2**24, perfect=False)


def decode(words: list[str], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the float32 values of every coded row."""
    rows = table(words, len(tensors["labels"]))
    sizes = [math.prod(models) for _, _, _, models in rows]
    own = np.split(tensors["levels"], np.cumsum(sizes)[:-1])
    levels = np.concatenate(
        [
            np.broadcast_to(level.reshape(models), shape).ravel()
            for level, (_, shape, _, models) in zip(own, rows, strict=True)
        ]
    )
    integers = np.empty(len(levels), np.float32)
    decoder = stream.queue.RangeDecoder(tensors["code"].view("<u4").astype(np.uint32))
    for level in np.unique(levels):
        mine = levels == level
        integers[mine] = decoder.decode(model(int(level)), int(mine.sum())) - 127
    values, start = {}, 0
    for name, shape, step, _ in rows:
        end = start + math.prod(shape)
        values[name] = integers[start:end].reshape(shape) * np.float32(step)
        start = end
    return values


def images(words: list[str], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the images, float (N, C, H, W) in [0, 1], exact to rounding."""
    values, biases = decode(words, tensors), tensors["biases"].astype(np.float32)
    channels, height, width = map(int, words[6].split(","))
    num_classes, features = values["extractor_weight"].shape[:2]
    owner = np.repeat(np.arange(num_classes), tensors["counts"])
    own_biases, biases = np.split(biases, [num_classes * features])
    x = np.einsum("kfd,dhw->kfhw", values["extractor_weight"], values["dataset_memory"])
    x = silu(x + own_biases.reshape(num_classes, features, 1, 1))[owner]
    x = np.concatenate([x, values["class_memory"][owner], values["instance_memory"]], axis=1)
    weights = [value for name, value in values.items() if name.startswith("decoder_weight")]
    for i, weight in enumerate(weights):
        bias, biases = np.split(biases, [len(weight)])
        h, w = x.shape[2:]
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        x = bias.reshape(-1, 1, 1) + sum(
            np.einsum("nihw,oi->nohw", padded[:, :, r : r + h, c : c + w], weight[:, :, r, c])
            for r in range(3)
            for c in range(3)
        )
        if i < len(weights) - 1:
            x = silu(x)
        if i < len(weights) - 2:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
    n, _, h, w = x.shape
    x = x.reshape(n, channels, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)
    x = x.reshape(n, channels, 2 * h, 2 * w)[..., :height, :width]
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    """Return x times its logistic function."""
    return x / (1 + np.exp(-x))


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        words, tensors = read(file.read())
    print(*words)
    np.savez("images.npz", images=images(words, tensors))
