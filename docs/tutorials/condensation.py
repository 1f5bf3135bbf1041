"""Condense scikit-learn's digits into 2 KiB: python docs/tutorials/condensation.py."""

# --8<-- [start:data]
import hmn_replay

train_set = hmn_replay.load_dataset("digits", "train")
test_set = hmn_replay.load_dataset("digits", "test")
print(f"{len(train_set)} images of {train_set.image_shape}, {train_set.num_classes} classes")
# --8<-- [end:data]

# --8<-- [start:condense]
moves = ("crop", "scale", "rotate")  # digits are not to be mirrored, nor recoloured
memory = hmn_replay.condense(
    train_set,
    budget="2 KiB",
    augmentations=moves,
    pruning_augmentations=moves,
    warm_start_steps=300,
    outer_steps=3,
    pruning_passes=2000,
    trained_passes=1000,
    seed=0,
)
print(f"{len(memory)} images in {memory.file_bytes:,} of {memory.budget_bytes:,} bytes")
# --8<-- [end:condense]

# --8<-- [start:report]
for name, phase in memory.report["phases"].items():
    print(f"{name}: {phase['seconds']:.1f} s, {phase['images_per_second']:.0f} images/s")
# --8<-- [end:report]

# --8<-- [start:file]
memory.save("digits.hmn")
loaded = hmn_replay.load("digits.hmn")
images, labels = memory.decode()
assert images.equal(loaded.decode()[0])  # bit for bit
# --8<-- [end:file]

# --8<-- [start:compare]
rivals = {
    "HMN": memory,
    "JPEG": hmn_replay.jpeg_images(train_set, "2 KiB", quality=20, seed=0),
    "raw": hmn_replay.raw_images(train_set, "2 KiB", seed=0),
}
for name, rival in rivals.items():
    _, accuracy = hmn_replay.evaluate(
        rival, test_set, seed=0, width=32, num_passes=10_000, augmentations=moves
    )
    print(f"{name}: {rival.num_images} images, {accuracy:.1%}")
# --8<-- [end:compare]
