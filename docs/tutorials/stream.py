"""Learn digits two classes at a time, with 2 KiB of memory: python docs/tutorials/stream.py."""

# --8<-- [start:benchmark]
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin

import hmn_replay

train_set = hmn_replay.load_dataset("digits", "train")
test_set = hmn_replay.load_dataset("digits", "test")
benchmark = nc_benchmark(train_set, test_set, n_experiences=5, task_labels=False, seed=0)
# --8<-- [end:benchmark]


# --8<-- [start:learn]
def learn_stream(*plugins):
    """Train one network on all experiences in turn; return its accuracy on all classes."""
    torch.manual_seed(0)
    model = hmn_replay.build_network("convnet", (1, 8, 8), num_classes=10, width=32)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=64,
        train_epochs=10,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True)),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    (accuracy,) = strategy.eval(benchmark.test_stream).values()
    return accuracy


# --8<-- [end:learn]

# --8<-- [start:memories]
hmn = hmn_replay.HMNReplay(
    budget="2 KiB",
    expected_classes=10,
    augmentations=("crop", "scale", "rotate"),
    warm_start_steps=200,
    outer_steps=2,
    seed=0,
)
jpeg = hmn_replay.JPEGReplay(budget="2 KiB", quality=20, seed=0)
raw = hmn_replay.RawReplay(budget="2 KiB", seed=0)
# --8<-- [end:memories]

# --8<-- [start:compare]
print(f"no memory: {learn_stream():.1%}")
for name, replay in {"HMN": hmn, "JPEG": jpeg, "raw": raw}.items():
    accuracy = learn_stream(replay)
    print(f"{name}: {accuracy:.1%}, {replay.memory.num_images} images, {replay.memory_bytes} bytes")
# --8<-- [end:compare]

# --8<-- [start:report]
for update in hmn.report:
    print(update["images_per_class"], f"{update['seconds']:.1f} s", f"{update['file_bytes']} bytes")
hmn.memory.save("seen.hmn")
# --8<-- [end:report]
