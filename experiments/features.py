"""What teaches a head on a frozen backbone most at equal bytes: features or images?

    python experiments/features.py --data cifar10.npz --budgets 10KB,30KB,100KB --seeds 0,1,2

A small network is trained on one half of the classes, and frozen. Then memories are made of the
training images of all classes, and a linear head is trained on each and scored on the test set:

features           what hmn_replay.condense makes of features
raw-features       real features in float16
pq-MxB             real features by product quantisation into M parts of B bits each (needs faiss)
jpeg-Q             real images as JPEG of quality Q, which go through the backbone again

--mode once makes a memory of all classes at once. --mode stream begins with the classes that the
backbone knows, and adds the others one at a time, by hmn_replay.ReplayMemory; the head is trained
on the memory after the last. The decoder of features and the codebook of pq are then fitted to the
first classes alone. A seed draws the order of classes, the memory and the head.

Two rows have no budget: a head on all real features; and linear discriminant analysis, class means
and one covariance of all real features, which takes no replay at all (its bytes are in float16).

Written to OUT: backbone.pt, results.json, after every cell, and table.md. Stop it at any time: the
same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    # Python looks beside the script; what is run is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hmn_replay
from experiments.arguments import add_data, load, make_parser, parse_names, parse_numbers
from experiments.results import markdown_table, percent
from experiments.tables.rows import accuracies
from experiments.tables.store import Store
from hmn_replay.budget import Budget
from hmn_replay.data.features import LabelledFeatures
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError, HMNReplayError
from hmn_replay.files import write_atomically
from hmn_replay.memory.base import Memory
from hmn_replay.runtime import derive_seed, make_generator, resolve_device
from hmn_replay.training.networks import StagedNetwork
from hmn_replay.training.train import TrainingConfig, make_network, train_network

MODES = ("once", "stream")
WIDTHS = (24, 48, 96, 96, 192)
STRIDES = (1, 2, 2, 1, 2)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data(parser, "digits")
    add("--budgets", default="10KB,30KB", help="of a file, as 10KB,30KB,100KB")
    add(
        "--rows",
        default="features,raw-features,pq-16x4,pq-32x4,pq-16x6,jpeg-10,jpeg-20",
        help="memories that are compared, as explained below",
    )
    add("--mode", default="once,stream", help="once, stream or both")
    add("--seeds", default="0", help="an order of classes, a memory and a head each")
    add("--backbone-passes", type=int, default=200_000, help="images that the backbone is shown")
    add("--head-passes", type=int, default=100_000, help="features that a head is shown")
    add("--device", default="auto", help="cpu, cuda, ...; auto is CUDA where present")
    add("--out", type=Path, default=Path("features"), help="folder to write to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.device = str(resolve_device(args.device))
    budgets = [Budget.parse(text).num_bytes for text in args.budgets.split(",")]
    modes, seeds = parse_names("--mode", args.mode, MODES), parse_numbers("--seeds", args.seeds)
    rows = {row: parse_row(row) for row in args.rows.split(",")}
    for passes in (args.backbone_passes, args.head_passes):
        TrainingConfig(num_passes=passes)  # a wrong number is told before the backbone is trained
    train, test = load(args, "train"), load(args, "test")
    names = ("data", "size", "backbone_passes", "head_passes", "device")
    store = Store(args.out, {name: getattr(args, name) for name in names})
    store.agree("images", [len(train), len(test)])
    stopped = False
    try:
        backbone = get_backbone(train, args)
        extract = partial(hmn_replay.extract_features, backbone)
        data = extract(train), extract(test)
        reference(data, seeds, args, store)
        for budget in budgets:
            for row, (kind, options) in rows.items():
                for mode in modes:
                    for seed in seeds:
                        given = train if kind == "jpeg" else data[0]
                        identity = {"row": row, "budget": budget, "mode": mode, "seed": seed}
                        compute = partial(
                            measure, given, data[1], backbone, kind, options, identity, args
                        )
                        store.once("training", identity, compute)
    except KeyboardInterrupt:
        stopped = True
    store.write()
    text = "\n".join([markdown(store), *store.notes("row", "budget")])
    write_atomically(args.out / "table.md", text.encode())
    print(f"\n{text}\nWritten to {args.out}")
    return store.exit_code(stopped=stopped)


def parse_row(row: str) -> tuple[str, dict[str, Any]]:
    """Return the memory kind of a row, and the options of its keeper."""
    name, _, setting = row.rpartition("-")
    try:
        if name == "jpeg":
            return "jpeg", {"quality": int(setting)}
        if name == "pq":
            parts, bits = map(int, setting.split("x"))
            return "pq", {"num_parts": parts, "bits": bits}
    except ValueError:
        pass
    if row in ("features", "raw-features"):
        return row, {}
    raise ConfigError(f"--rows has features, raw-features, pq-MxB and jpeg-Q; got {row!r}")


def small_network(image_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return five convolutions with batch normalisation, and a linear layer on their means."""
    channels, stages = image_shape[0], []
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return StagedNetwork(stages, head)


def get_backbone(train: LabelledImages, args: argparse.Namespace) -> hmn_replay.FrozenBackbone:
    """Return the network that knows one half of the classes, trained now or by an earlier run."""
    known = train.classes[: max(1, train.num_classes // 2)]
    data = train.take(torch.isin(train.labels, known))
    config = TrainingConfig(
        network=small_network,
        num_passes=args.backbone_passes,
        batch_size=128,
        learning_rate=0.1,
        augmentations=("crop", "flip"),
        cutmix_probability=0.0,
        precision="auto",
    )
    path = args.out / "backbone.pt"
    if path.exists():
        network = make_network(data.images, data.num_classes, config).to(args.device)
        network.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))
    else:
        network = train_network(
            data.images,
            data.class_indices,
            data.num_classes,
            config=config,
            device=args.device,
            progress=sys.stderr.isatty(),
        )
        write_atomically(path, partial(torch.save, network.state_dict()))
    return hmn_replay.FrozenBackbone(network, train.image_shape)


def measure(
    train: LabelledImages,
    test: LabelledFeatures,
    backbone: hmn_replay.FrozenBackbone,
    kind: str,
    options: dict[str, Any],
    identity: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Make a memory and train a head on it."""
    seed, started = identity["seed"], time.monotonic()
    parts = [train]
    if identity["mode"] == "stream":
        num_known = max(1, train.num_classes // 2)
        drawn = torch.randperm(
            train.num_classes - num_known, generator=make_generator(seed, "order")
        )
        groups = [train.classes[:num_known], *train.classes[num_known:][drawn].split(1)]
        parts = [train.take(torch.isin(train.labels, group)) for group in groups]
    replay = hmn_replay.ReplayMemory(
        identity["budget"],
        kind,
        seed=seed,
        device=args.device,
        expected_classes=train.num_classes,
        **options,
    )
    for part in parts:
        replay.update(part)
    seconds, memory = time.monotonic() - started, replay.memory
    assert memory is not None, "an update makes one"
    return {
        "accuracy": score(features_of(memory, backbone), test, seed, args),
        "images": memory.num_images,
        "bytes": memory.file_bytes,
        "seconds": seconds,
    }


def features_of(memory: Memory, backbone: hmn_replay.FrozenBackbone) -> LabelledFeatures:
    """Return what a memory gives a head to learn from."""
    values, labels = memory.decode(dtype=memory.value_dtype)
    if memory.holds_features:
        return LabelledFeatures(values.cpu(), labels.cpu())
    return hmn_replay.extract_features(backbone, LabelledImages(values.cpu(), labels.cpu()))


def score(
    data: LabelledFeatures, test: LabelledFeatures, seed: int, args: argparse.Namespace
) -> float:
    """Return the accuracy of a head."""
    _, accuracy = hmn_replay.evaluate(
        data, test, seed=seed, device=args.device, num_passes=args.head_passes
    )
    return accuracy


def reference(
    data: tuple[LabelledFeatures, LabelledFeatures],
    seeds: Sequence[int],
    args: argparse.Namespace,
    store: Store,
) -> None:
    """Measure what needs no budget."""
    train, test = data
    for seed in seeds:
        store.once(
            "all",
            {"seed": seed},
            lambda seed=seed: {"accuracy": score(train, test, derive_seed(seed, "all"), args)},  # type: ignore[misc]
        )
    store.once("lda", {}, lambda: discriminant(train, test))


def discriminant(train: LabelledFeatures, test: LabelledFeatures) -> dict[str, Any]:
    """Score linear discriminant analysis; its covariance is shrunk a little."""
    rows, index = train.images.flatten(1).double(), train.class_indices
    one_hot = torch.eye(train.num_classes, dtype=torch.float64)[index]
    means = (one_hot.T @ rows) / one_hot.sum(dim=0).unsqueeze(1)
    rest = rows - means[index]
    covariance = rest.T @ rest / len(rows)
    covariance.diagonal().add_(1e-3 * float(covariance.diagonal().mean()) + 1e-12)
    weights: Tensor = torch.linalg.solve(covariance, means.T)
    logits = test.images.flatten(1).double() @ weights - (means.T * weights).sum(dim=0) / 2
    right = train.classes[logits.argmax(dim=1)] == test.labels
    size = rows.shape[1]
    num_values = train.num_classes * size + size * (size + 1) // 2
    return {"accuracy": float(right.float().mean()), "bytes": 2 * num_values}


def markdown(store: Store) -> str:
    """Return a table of accuracies, a row for each budget and kind."""
    modes = [mode for mode in MODES if store.find("training", mode=mode)]
    head = ["budget", "memory", "images", *(f"{mode} %" for mode in modes), "seconds"]
    lines = []
    for row, budget in sorted(store.seen("training", "row", "budget"), key=lambda own: own[1]):
        cells = store.find("training", row=row, budget=budget)
        found = [percent(accuracies(store, row=row, budget=budget, mode=mode)) for mode in modes]
        images = f"{max(cell['images'] for cell in cells):,}" if cells else "-"
        seconds = statistics.fmean(cell["seconds"] for cell in cells) if cells else 0.0
        lines.append([f"{budget:,}", row, images, *found, f"{seconds:.1f}"])
    table = markdown_table([head, *lines])
    everything = percent([cell["accuracy"] for cell in store.find("all")])
    notes = [f"A head on all real features: {everything} %."]
    for cell in store.find("lda"):
        accuracy = percent([cell["accuracy"]])
        notes.append(f"Linear discriminant analysis: {accuracy} %, {cell['bytes']:,} bytes.")
    return f"{table}\n\n" + " ".join(notes) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (HMNReplayError, OSError) as error:
        sys.exit(f"features.py: error: {error}")
