"""Split CIFAR-100: which memory forgets least at equal bytes?

    python experiments/split_cifar100.py --download
    python experiments/split_cifar100.py --data cifar10 --experiences 5 --budget 48KiB --seed 0,1
    python experiments/split_cifar100.py --data digits --experiences 5 --budget 2KiB
    python experiments/split_cifar100.py --smoke

The classes of a data set come in experiences, a few new ones in each, and one network learns them
one experience after the other (class-incremental: one head, no task label at test time). Every
strategy gets the same network, epochs, augmentation, class order and budget of bytes for its
memory, and is scored after each experience on the test images of all classes seen so far. They take
as many steps over current images; beside these, memories of this package that are renewed before
training replay in the first experience, too, and a memory of fewer images than a batch replays
fewer. They are replayed under the same loss and renewed at the same time; results.json
names these, and the losses of the other strategies, as loss_used, renew_used and distill_used, the
weight of a distillation from the previous network. The older protocol is --renew after --loss
balanced.

After the last experience it is measured whether a network takes artefacts of the memory for age:
how many clean test images of old classes it calls one of the newest, and how many of them once they
have been through the memory's codec (hmn_replay.shortcut_report; shortcut in results.json).
psnr_by_experience is how near the memory's images of each experience's classes are then to real
ones, in dB (hmn_replay.psnr_by_class).

Written to OUT: results.json, after every finished run; accuracy.png, memory.png and shortcut.png
(or other --formats); and the memory file of each run that has one, memory-hmn-seed0.hmn. With
--resume, runs that OUT/results.json holds already are kept. The exit code is 1 if a strategy
failed; its error is in results.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    # Python looks beside the script; what is run is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hmn_replay
from experiments import arguments
from experiments.arguments import (
    add_data,
    is_digits,
    make_parser,
    parse_names,
    parse_numbers,
    parse_settings,
)
from experiments.results import hold, make_table, reset_peak_memory, resumed, summarise, versions
from hmn_replay.avalanche.losses import LOSSES, RENEWALS, TUNED
from hmn_replay.avalanche.plugin import replay_of
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import make_config
from hmn_replay.data.images import LabelledImages, channel_stats
from hmn_replay.data.sources import TORCHVISION, Split
from hmn_replay.errors import BudgetError, ConfigError, DataError, HMNReplayError
from hmn_replay.evaluation import score
from hmn_replay.files import write_atomically
from hmn_replay.runtime import (
    PRECISIONS,
    autocast,
    make_generator,
    peak_memory_bytes,
    resolve_device,
    seeded,
)

# Digits must not be mirrored, nor recoloured, neither by us nor while HMN condenses them.
DIGITS_AUGMENTATIONS = ("crop", "scale", "rotate")
DIGITS_OPTIONS = {"augmentations": DIGITS_AUGMENTATIONS, "network_cutmix_probability": 0.0}
DIGITS_OPTIONS["pruning_augmentations"] = DIGITS_AUGMENTATIONS

# What --smoke puts in the place of the defaults; options given on the command line still count.
SMOKE: dict[str, Any] = {
    "data": "digits",
    "experiences": 2,
    "budget": "4KiB",
    "width": 8,
    "train_images": 8,
    "test_images": 8,
    "batch_size": 16,
}
SMOKE_OPTIONS = {"warm_start_steps": 5, "outer_steps": 1, "inner_steps": 2, "network_images": 8}
SMOKE_OPTIONS |= dict.fromkeys(("real_batch", "decoded_batch", "network_width", "network_batch"), 4)
SMOKE_OPTIONS |= {"trained_networks": 1, "trained_passes": 16, "pruning_passes": 20}
SMOKE_OPTIONS["pruning_width"] = 4

# These say where and what to run, not how: they may differ when a run is resumed.
NOT_COMPARED = {"data_root", "download", "strategies", "seed", "smoke", "set", "resume", "out"}
NOT_COMPARED |= {"formats"}


def distillation_weight(text: str) -> float | str:
    return text if text == "adaptive" else float(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data(parser, default="cifar100")
    add("--train-images", type=int, help="use at most so many training images of each class")
    add("--test-images", type=int, help="use at most so many test images of each class")
    add(
        "--experiences",
        type=int,
        default=10,
        help="parts that the classes are split into, as evenly as can be",
    )
    add(
        "--budget",
        default="300KiB",
        help="bytes of every memory: 307200, 300KiB, ...",
    )
    add("--strategies", default="all", help="some of strategies.STRATEGIES, such as hmn,fred,jpeg")
    add("--model", choices=("slim_resnet18", "convnet", "resnet18"),
        help="network (default: slim_resnet18 for 3 x 32 x 32 images, else convnet)")  # fmt: skip
    add("--width", type=int,
        help="channels of convnet's blocks, slim_resnet18's first (default: 64, 20)")  # fmt: skip
    add("--epochs", type=int, default=1, help="of each experience")
    add("--batch-size", type=int, default=64, help="images of the experience in a step")
    add("--batch-size-mem", type=int, help="replayed images in a step (default: as --batch-size)")
    add("--lr", type=float, default=0.01, help="learning rate of SGD with momentum 0.9")
    add("--precision", choices=PRECISIONS, default="float32",
        help="of the network's training; auto is bfloat16 where the processor has it")  # fmt: skip
    add("--compile", action="store_true", help="compile the network by torch.compile")
    add("--mode", choices=("replay", "memory_only"), default="replay",
        help="memory_only: later experiences train on the memory alone")  # fmt: skip
    add(
        "--loss",
        choices=("auto", *LOSSES),
        default="auto",
        help="of our memories; auto is separated, or balanced with --renew after; asymmetric is "
        "ER-ACE's",
    )
    add("--renew", choices=RENEWALS, default="auto",
        help="when an experience is made into one of our memories: before or after it is trained "
        "on; auto is before, with the losses auto and separated")  # fmt: skip
    add("--distill", type=distillation_weight, metavar="WEIGHT",
        help="weight of our memories' distillation from the previous network, which is working "
        "memory and not counted in the budget: a number, or adaptive, which grows with the number "
        "of old classes (default: 1 with the losses separated and grouped)",
    )  # fmt: skip
    add("--labels", choices=("hard", "soft"), default="hard",
        help="whether our memories keep what the network says of their images, in the same bytes, "
        "and learn it again")  # fmt: skip
    add("--crop-fill", choices=("mean", "black"), default="mean",
        help="what crops are padded with: the training set's mean colour, or black")  # fmt: skip
    add("--tune", choices=TUNED, default="none",
        help="what is tuned on our memories, class-balanced, after an experience")  # fmt: skip
    add("--tune-steps", type=int, default=100, help="steps of that tuning")
    add("--tune-rate", type=float, default=0.01, help="learning rate of that tuning")
    add("--replay-weight", type=float,
        help="replayed images' share of our memories' loss (default: by their number)")  # fmt: skip
    add("--recode", type=float, default=0.0,
        help="share of current images that hmn, fred, jpeg and subsampled code")  # fmt: skip
    add("--quality", type=int, help="of jpeg, 1 to 100 (default: chosen on the first experience)")
    add("--selection", choices=hmn_replay.SELECTIONS, default="random",
        help="which images jpeg, lossless, subsampled and raw keep, and hmn and fred begin as: "
        "at random, or by a network that is trained on each experience before")  # fmt: skip
    add("--factor", type=int, default=2,
        help="pixels that one of subsampled's stands for, along each side")  # fmt: skip
    add("--seed", default="0", help="one or several, such as 0,1,2; also draws the class order")
    add("--expected-classes", type=int, help="tell our memories how many classes will come in all")
    add("--kind", default="hmn", help="memory kind of the strategy hmn: hmn, pixels, idc, ...")
    add(
        "--effort",
        default="draft",
        help="of what hmn and fred condense: draft, quick, standard, paper",
    )
    add("--matching-networks", choices=("auto", "trained", "own"), default="auto",
        help="of hmn and fred: own matches on the strategy's network once it has learned; its "
        "model must have features, as convnet has; auto is own where it can be")  # fmt: skip
    add("--set", action="append", default=[], metavar="FIELD=VALUE",
        help="any setting of hmn_replay.CondenseConfig, for hmn, fred; several times")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, ... (default: CUDA where present, else cpu)")
    add("--smoke", action="store_true", help="everything tiny, to see in seconds that it works")
    add("--resume", action="store_true", help="keep the runs that OUT/results.json holds")
    add("--formats", default="png", help="of the figures: some of png,pdf,svg")
    add("--out", type=Path, default=Path("split_cifar100"), help="folder to write to")
    if parser.parse_args(argv).smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)

    # ---------------------------------------------------------------- settings, checked at once
    args.budget = Budget.parse(args.budget).num_bytes
    args.device = str(resolve_device(args.device))
    seeds = parse_numbers("--seed", args.seed)
    if not 0 <= min(seeds) <= max(seeds) < 2**32:
        raise ConfigError(f"--seed must be from 0 to 2**32 - 1; got {args.seed}")
    if args.width is not None and args.width < 1:
        raise ConfigError(f"--width must be 1 or more; got {args.width}")
    formats = parse_names("--formats", args.formats, ("png", "pdf", "svg"))
    args.options = dict[str, Any](SMOKE_OPTIONS if args.smoke else {})
    if is_digits(args.data):
        args.options |= DIGITS_OPTIONS
    args.options |= parse_settings(args, unknown=hmn_replay.LabelConfig.model_fields)
    make_config(args.effort, **args.options)
    passes = 6000 if args.selection == "random" else 20_000
    training: dict[str, Any] = {"width": 32, "num_passes": passes}
    if args.smoke:
        training = {"width": 4, "num_passes": 100}
    if is_digits(args.data):
        training |= {"augmentations": DIGITS_AUGMENTATIONS, "cutmix_probability": 0.0}
    args.small_training = training

    # ---------------------------------------------------------------------------------- the data
    train, test = load(args, "train"), load(args, "test")
    num_classes = train.num_classes
    if not 1 <= args.experiences <= num_classes:
        raise ConfigError(
            f"--experiences must be from 1 to the {num_classes} classes; got {args.experiences}"
        )
    # As even as can be: the first experiences have a class more than the last.
    each, rest = divmod(num_classes, args.experiences)
    sizes = [each + (position < rest) for position in range(args.experiences)]
    # The network's outputs, and so the labels from here on, are positions in the sorted classes.
    if not test.classes.equal(train.classes):
        raise DataError("the test split must have the same classes as the training split")
    train = LabelledImages(train.images, train.class_indices, train.class_names)
    test = LabelledImages(test.images, test.class_indices, test.class_names)
    if args.model is None:
        args.model = "slim_resnet18" if train.image_shape == (3, 32, 32) else "convnet"

    # What Avalanche's own code warns of, no user of this script can mend.
    warnings.filterwarnings("ignore", module=r"avalanche|deprecated|qpsolvers")
    import strategies  # Avalanche takes seconds to import: only once the data are known to be well

    names = parse_names("--strategies", args.strategies, strategies.STRATEGIES)
    for name in names:  # what a model or an option is wrong for fails before the first hour
        with contextlib.suppress(BudgetError):
            make_strategy(name, seeds[0], train, args)

    # ------------------------------------------------------------------------------- the results
    configuration = {name: v for name, v in vars(args).items() if name not in NOT_COMPARED}
    configuration |= {
        "num_train": len(train),
        "num_test": len(test),
        "classes_per_experience": sizes,
    }
    report: dict[str, Any] = {
        "configuration": configuration,
        "versions": versions("torch", "torchvision", "avalanche-lib"),
    }
    report |= {"threads": torch.get_num_threads(), "seeds": [], "class_order": {}, "results": {}}
    report = json.loads(json.dumps(report))  # as it would come back from the file
    results_path = args.out / "results.json"
    with hold(args.out):
        if results_path.exists():
            report = resumed(report, results_path, resume=args.resume)
        results = report["results"]

        # ------------------------------------------------------- every strategy, once for a seed
        for seed in seeds:
            order = torch.randperm(num_classes, generator=make_generator(seed, "classes")).tolist()
            report["seeds"] = sorted({*report["seeds"], seed})
            report["class_order"][str(seed)] = [int(train.classes[index]) for index in order]
            for name in names:
                runs = results.setdefault(name, {})
                if "final_accuracy" in runs.get(str(seed), {}):
                    print(f"{name}, seed {seed}: kept", flush=True)
                    continue
                try:
                    runs[str(seed)] = run(name, seed, order, sizes, train, test, args)
                except Exception as error:  # the others' results are worth having
                    traceback.print_exc()
                    runs[str(seed)] = {"error": f"{type(error).__name__}: {error}"}
                write_atomically(results_path, json.dumps(report, indent=1).encode())

    # ------------------------------------------------------------------------ figures and a table
    from experiments.figures import draw_accuracy, draw_memories, draw_shortcut

    for suffix in formats:
        draw_accuracy(report, args.out / f"accuracy.{suffix}")
        draw_memories(report, args.out, args.out / f"memory.{suffix}")
        draw_shortcut(report, args.out / f"shortcut.{suffix}")
    print("\n" + make_table(results))
    print(f"\nIn {args.out}: " + ", ".join(sorted(path.name for path in args.out.glob("[!.]*"))))
    failed = [name for name in names for seed in seeds if "error" in results[name][str(seed)]]
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}; see {results_path}", file=sys.stderr)
    return 1 if failed else 0


def make_strategy(name: str, seed: int, train: LabelledImages, args: argparse.Namespace) -> Any:
    """Return a strategy and its network, of which nothing is trained yet."""
    import strategies

    model: nn.Module = build_model(args, train, seed=seed)
    if args.compile:
        model.compile(dynamic=True)
    if args.precision != "float32":
        model = MixedPrecision(model, args.precision, args.device)
    names = ("crop",) if is_digits(args.data) else ("crop", "flip")
    fill = channel_stats(train.images)[0] if args.crop_fill == "mean" else 0.0
    hmn_replay.augment_training(model, names, fill=fill, seed=seed)
    condensed = {
        "matching_networks": args.matching_networks,
        "recode_share": args.recode,
        "selection": args.selection,
        **args.options,
    }
    training = hmn_replay.TrainingConfig(**args.small_training)
    selected = {"selection": args.selection, "training": training}
    options: dict[str, dict[str, Any]] = {
        "hmn": {"kind": args.kind, **condensed},
        "fred": condensed,
        "raw": selected,
        "lossless": selected,
        "jpeg": {"quality": args.quality, "recode_share": args.recode, **selected},
        "subsampled": {"factor": args.factor, "recode_share": args.recode, **selected},
    }
    return strategies.build(
        name,
        model,
        args.budget,
        num_classes=train.num_classes,
        image_shape=train.image_shape,
        lr=args.lr,
        batch_size=args.batch_size,
        batch_size_mem=args.batch_size_mem,
        epochs=args.epochs,
        seed=seed,
        device=args.device,
        mode=args.mode,
        loss=args.loss,
        renew=args.renew,
        distill=args.distill,
        labels=args.labels,
        label_augmentations=names,
        tune=args.tune,
        tune_steps=args.tune_steps,
        tune_rate=args.tune_rate,
        replay_weight=args.replay_weight,
        effort=args.effort,
        expected_classes=args.expected_classes,
        progress=sys.stderr.isatty(),
        **options.get(name, {}),
    )


def run(
    name: str,
    seed: int,
    order: list[int],
    sizes: list[int],
    train: LabelledImages,
    test: LabelledImages,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train one strategy on the whole stream; return what results.json holds of it."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.determinism.rng_manager import RNGManager

    import strategies
    from experiments.figures import save_samples

    reset_peak_memory()
    RNGManager.set_random_seeds(seed)  # Avalanche draws the order of the images from torch's state
    sets: dict[str, Any] = {"train_dataset": train, "test_dataset": test}
    benchmark = nc_benchmark(
        **sets,
        n_experiences=len(sizes),
        per_exp_classes=dict(enumerate(sizes)),
        task_labels=False,
        fixed_class_order=order,
    )
    parts = [part.tolist() for part in torch.tensor(order).split(sizes)]
    tests = [test.take(torch.isin(test.labels, torch.tensor(part))) for part in parts]
    strategy = make_strategy(name, seed, train, args)

    # Joint training sees all experiences at once, and is measured once.
    stream = list(benchmark.train_stream)
    steps = [stream] if name == "joint" else [[experience] for experience in stream]
    matrix: list[list[float | None]] = [[None] * len(tests) for _ in tests]
    before: list[list[float | None]] = [[None] * len(tests) for _ in tests]
    replay = replay_of(strategy)
    tuned = None if replay is None or replay.tune == "none" else replay
    seconds = 0.0
    for step, experiences in enumerate(steps, 1 + len(stream) - len(steps)):
        started = time.perf_counter()
        strategy.train(experiences if name == "joint" else experiences[0])
        seconds += time.perf_counter() - started
        use = strategies.memory_use(strategy)
        if use.num_bytes > args.budget:
            raise BudgetError(f"{name} stores {use.num_bytes} bytes; the budget is {args.budget}")
        # Classes not seen yet have never been a target: nothing to learn from their score.
        matrix[step - 1][:step] = score_each(strategy.model, tests[:step])
        if tuned is not None:
            with tuned.untuned(strategy.model):
                before[step - 1][:step] = score_each(strategy.model, tests[:step])
        summary = summarise(matrix, [len(images) for images in tests])
        print(
            f"{name}, seed {seed}: experience {step}/{len(tests)}, accuracy "
            f"{100 * summary['accuracy_seen'][step - 1]:.1f} %, memory {use.num_images} images in "
            f"{use.num_bytes:,} bytes, {seconds:.0f} s",
            flush=True,
        )

    memory = None if replay is None else replay.memory
    shortcut = None
    if len(sizes) > 1:
        shortcut = hmn_replay.shortcut_report(
            strategy, memory, test, new_classes=order[-sizes[-1] :], real_set=train, seed=seed
        )
    psnr: list[float | None] | None = None
    if memory is not None:
        by_class = hmn_replay.psnr_by_class(memory, train)
        own = [[by_class[label] for label in part if label in by_class] for part in parts]
        psnr = [statistics.fmean(part) if part else None for part in own]
    images, labels = strategies.memory_images(strategy)
    if len(images):
        save_samples(images, labels, args.out / f"memory-{name}-seed{seed}.png")
    if memory is not None:
        memory.save(args.out / f"memory-{name}-seed{seed}.hmn")
    return {
        **strategies.protocol_used(strategy),
        "memory_bytes": use.num_bytes,
        "memory_images": use.num_images,
        "accuracy_matrix": matrix,
        **summary,
        "untuned": tuned and summarise(before, [len(images) for images in tests]),
        "shortcut": shortcut,
        "psnr_by_experience": psnr,
        "train_seconds": seconds - use.seconds,
        "memory_seconds": use.seconds,
        "peak_rss_bytes": peak_memory_bytes(torch.device("cpu")),
    }


def score_each(model: nn.Module, parts: Sequence[LabelledImages]) -> list[float]:
    return [score(model, part.images, part.labels) for part in parts]


def load(args: argparse.Namespace, split: Split) -> LabelledImages:
    """Load a split, of each class at most as many images as are wanted."""
    try:
        data = arguments.load(args, split)
    except DataError as error:
        if args.data not in TORCHVISION:
            raise
        raise DataError(
            f"{error}. Or give its images as --data FILE.npz; --data digits needs no file"
        ) from error
    limit = args.train_images if split == "train" else args.test_images
    if limit is None:
        return data
    if limit < 1:
        raise ConfigError(f"--{split}-images must be 1 or more, got {limit}")
    return data.take(torch.cat([data.of_class(c)[:limit] for c in data.classes.tolist()]))


def build_model(args: argparse.Namespace, train: LabelledImages, *, seed: int) -> nn.Module:
    """Build the network, which normalises its images in [0, 1] by the training set's statistics."""
    mean, std = channel_stats(train.images)
    if args.model != "slim_resnet18":
        if args.model == "resnet18" and args.width is not None:
            raise ConfigError("resnet18 has a width of its own; leave --width out")
        shape, width = train.image_shape, args.width or 64
        return hmn_replay.build_network(
            args.model, shape, train.num_classes, width=width, mean=mean, std=std, seed=seed
        )
    if train.image_shape != (3, 32, 32):
        raise ConfigError(
            f"slim_resnet18 takes images of 3 x 32 x 32, not {train.image_shape}; --model convnet"
        )
    from avalanche.models.slim_resnet18 import SlimResNet18
    from torchvision.transforms import Normalize

    with seeded(seed, "network", args.model):
        network = SlimResNet18(train.num_classes, nf=args.width or 20)
    return nn.Sequential(Normalize(mean.tolist(), std.tolist()), network)


class MixedPrecision(nn.Module):
    """A network in another precision than float32; its parameters and outputs are float32."""

    def __init__(self, network: nn.Module, precision: str, device: str) -> None:
        super().__init__()
        self.network, self.precision, self.device = network, precision, torch.device(device)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 ``(N, K)``."""
        with autocast(self.device, self.precision):
            logits: Tensor = self.network(images)
        return logits.float()

    def features(self, images: Tensor) -> Any:
        """Return the network's features, where it has any, in the caller's precision."""
        return self.network.features(images)  # type: ignore[operator]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (HMNReplayError, OSError) as error:
        sys.exit(f"split_cifar100.py: error: {error}")
