"""What every memory is: labelled images under a budget of bytes, decoded on demand.

The loop, the replay, the command and the evaluation know memories by :class:`Memory` alone.
Memories whose images are learned are in :mod:`hmn_replay.memory.learned`, real images in
:mod:`hmn_replay.memory.real`.
"""

from __future__ import annotations

import abc
import copy
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hmn_replay.budget import Budget, as_int, largest
from hmn_replay.data.lookup import ImageLookup, Images, are_probabilities, rank_in_class
from hmn_replay.errors import (
    BudgetError,
    ConfigError,
    DataError,
    HMNReplayError,
    HMNReplayWarning,
    MemoryFileError,
)
from hmn_replay.files import write_atomically
from hmn_replay.memory.checks import check_classes, check_counts, check_indices
from hmn_replay.memory.file import (
    Record,
    TensorSpec,
    check_claims,
    integer_dtype,
    pack,
    packed_size,
    read_file,
    specs_of,
    unpack,
)
from hmn_replay.memory.labels import Labeller, SoftLabels, check_takes_labels
from hmn_replay.memory.names import read_names, stored_names, stored_names_bytes
from hmn_replay.registry import Registry, name_of
from hmn_replay.runtime import resolve_device, without_autocast

__all__ = [
    "MEMORIES",
    "Codec",
    "DecodedDataset",
    "Memory",
    "load",
    "loads",
    "register_memory",
]

# Decoded once where all images take no more than this, such as 87,000 of 32 x 32.
_KEPT_BYTES = 2**30
_LABEL_NAMES = {"soft": "soft labels", "labeller": "labeller"}
_OPTIONAL = {"names", "label_code", "labeller_code", "labeller_values"}

AnyMemory = TypeVar("AnyMemory", bound="type[Memory]")

Codec: TypeAlias = Callable[[Tensor], Tensor]
"""What :meth:`Memory.codec` returns."""


class Memory(abc.ABC):
    """Labelled images under a budget of bytes, decoded on demand and kept in one file.

    Images stand class by class, in the order of :attr:`classes`.

    Attributes:
        kind: The memory kind's registered name, such as ``"hmn"`` or ``"jpeg"``.
        holds_features: Whether a network's features stand in the place of images: float32 values of
            any size, and no pixels. True of some kinds.
        classes: int64 ``(K,)``, the label of each class.
        class_index: int64 ``(N,)``, for each image the position of its class in ``classes``.
        class_names: Label to name, of the classes that have one. Kept in the file.
        budget_bytes: Bytes that the file may take, or None for no bound.
        report: How the memory was made; see :func:`hmn_replay.condense`. Not in the file.
    """

    kind: ClassVar[str]
    label_weight: ClassVar[float | None] = None
    """Weight of its soft labels in :func:`hmn_replay.evaluate`, where none is given. None for the
    usual one, see :class:`hmn_replay.TrainingConfig`."""

    has_codec: ClassVar[bool] = False
    """Whether :meth:`codec` gives a function for a memory with images."""
    holds_features: ClassVar[bool] = False
    classes: Tensor
    class_index: Tensor
    class_names: dict[int, str]
    budget_bytes: int | None
    report: dict[str, Any]
    # Beside class_index, so that nobody has to ask the device for them.
    _counts: list[int]
    _soft: SoftLabels | None = None
    _labeller: Labeller | None = None

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a decoded image."""

    @abc.abstractmethod
    def to(self, device: Any) -> Any:
        """Move the memory to a device, where its images are then decoded; return it."""

    @abc.abstractmethod
    def bits(self) -> dict[str, float]:
        """Return the bits that each stored tensor takes in the file, by name.

        Header, labels, counts and class names are not in it; :meth:`label_bits` are.
        """

    @abc.abstractmethod
    def _decode(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode images: of int64 ``(B,)`` on the CPU, float32 in [0, 1] or uint8.

        Features are float32 of any size, and ``dtype`` is float32.
        """

    @abc.abstractmethod
    def _keep(self, kept: Tensor) -> None:
        """Drop what only other images are decoded from: of ascending int64 ``(B,)`` on the CPU."""

    def _drop_classes(self, stays: Tensor) -> None:
        """Drop what only other classes have: of ascending positions, int64, on their device."""
        del stays

    @abc.abstractmethod
    def words(self) -> tuple[str, ...]:
        """Return what the file says of the memory beside its kind; without spaces."""

    @abc.abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Return what the file stores beside labels, counts and class names: name to tensor."""

    @classmethod
    @abc.abstractmethod
    def _restore(cls, record: Record, classes: list[int], counts: list[int]) -> Memory:
        """Return the memory of a file whose labels and counts have been read.

        Raises:
            HMNReplayError: Words or tensors are not what :meth:`words` and :meth:`stored` give.
            ValueError: As well.
        """

    @property
    def num_classes(self) -> int:
        """How many classes the memory has."""
        return len(self.classes)

    @property
    def num_images(self) -> int:
        """How many images the memory decodes to."""
        return len(self.class_index)

    def __len__(self) -> int:
        return self.num_images

    def __repr__(self) -> str:
        budget = "" if self.budget_bytes is None else f" of {self.budget_bytes:,}"
        return (
            f"{type(self).__name__}(kind={self.kind!r}, {self.num_images} images of "
            f"{self.num_classes} classes, image_shape={self.image_shape}, {self.file_bytes:,}"
            f"{budget} bytes)"
        )

    @property
    def labels(self) -> Tensor:
        """int64 ``(N,)``, the label of each image."""
        return self.classes[self.class_index]

    @property
    def value_dtype(self) -> torch.dtype:
        """What decoded images are kept in where it counts: uint8, and float32 for features."""
        return torch.float32 if self.holds_features else torch.uint8

    @property
    def images_per_class(self) -> list[int]:
        """How many images each class has, in the order of :attr:`classes`."""
        return list(self._counts)

    @property
    def file_bytes(self) -> int:
        """The exact size of the file that :meth:`save` writes."""
        specs = class_specs(self.classes.tolist(), self.num_images)
        specs |= specs_of({**self.stored(), **self._stored_names()})
        specs |= self.label_specs()
        return packed_size(self.kind, self.num_images, self.budget_bytes, self.words(), specs)

    def summary(self) -> dict[str, Any]:
        """Return what the memory is, as JSON types: what ``hmn-replay inspect`` prints."""
        bits = self.bits()
        return {
            "kind": self.kind,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "num_images": self.num_images,
            "classes": self.classes.tolist(),
            "class_names": [self.class_names.get(label) for label in self.classes.tolist()],
            "images_per_class": self.images_per_class,
            "budget_bytes": self.budget_bytes,
            "file_bytes": self.file_bytes,
            "labels": self.richest_labels,
            "label_bytes": sum(spec.num_bytes for spec in self.label_specs().values()),
            "bits": bits,
        }

    @torch.no_grad()
    def decode(
        self, indices: Tensor | Sequence[int] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Decode images.

        An image's bits do not depend on which others are decoded with it, nor on its place among
        them, nor on a surrounding ``torch.autocast``. On a CPU with another number of threads, the
        last bits of floats may differ; on a GPU, whose convolutions torch lets round to TF32, they
        may differ by a thousandth.

        Args:
            indices: Positions of the images wanted, ``(B,)``; repeats are allowed. Default: all.
            dtype: ``torch.float32``, or ``torch.uint8`` for images rounded to 0 to 255, which
                features cannot be.

        Returns:
            Images ``(B, C, H, W)``, float32 in [0, 1] or uint8, or features, float32; and their
            labels, int64 ``(B,)``; both on the memory's device.

        Raises:
            ConfigError: A position outside ``0 .. N - 1``, a mask, or another dtype.
        """
        if dtype not in (torch.float32, torch.uint8):
            raise ConfigError(f"dtype is torch.float32 or torch.uint8; got {dtype}")
        if self.holds_features and dtype == torch.uint8:
            raise ConfigError(
                f"memory kind {self.kind!r} holds features, which are no pixels to show, to export "
                "or to round to uint8; decode() gives them as float32"
            )
        if indices is None:
            indices = torch.arange(self.num_images)
        indices = check_indices(indices, self.num_images)
        labels = self.classes[self.class_index[indices.to(self.class_index.device)]]
        return self._decode(indices, dtype), labels

    def codec(self) -> Codec | None:
        """Return a function that shows any images as the memory would give them back.

        Until it has been used, the memory is to stay as it is.

        Returns:
            From uint8 images ``(N, C, H, W)`` on the CPU to as many of the same shape, encoded and
            decoded. It raises a :class:`~hmn_replay.errors.DataError` for what are none. None where
            the memory has no code for images that are not in it (:attr:`has_codec`), or no image.
        """
        recode = self._codec() if self.has_codec and self.num_images else None
        if recode is None:
            return None
        shape = self.image_shape

        def checked(images: Tensor) -> Tensor:
            is_uint8 = images.dtype == torch.uint8 and images.device.type == "cpu"
            if not is_uint8 or images.shape[1:] != shape:
                raise DataError(
                    f"the codec takes uint8 images of {shape} on the CPU; got {images.dtype} "
                    f"{tuple(images.shape)} on {images.device}"
                )
            return recode(images) if len(images) else images.clone()

        return checked

    def _codec(self) -> Codec | None:
        """Return the function of :meth:`codec`, which checks what this one is given."""
        return None

    def decoded(self, dtype: torch.dtype = torch.float32) -> Images:
        """Return all images: decoded now, or whenever they are asked for if that takes over 1 GiB.

        The bits are the same. Until they have been asked for, the memory is to stay as it is.

        Args:
            dtype: As in :meth:`decode`.
        """

        def fetch(positions: Tensor | None) -> Tensor:
            return self.decode(positions, dtype=dtype)[0]

        shape = (self.num_images, *self.image_shape)
        is_kept = math.prod(shape) * dtype.itemsize <= _KEPT_BYTES
        kept = fetch(None) if is_kept else None
        if kept is not None and not self.holds_features:
            return kept
        found = fetch if kept is None else kept.__getitem__
        return ImageLookup(found, shape, dtype, holds_features=self.holds_features)

    def as_dataset(
        self,
        transform: Callable[[Tensor], object] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        soft: bool = False,
    ) -> DecodedDataset:
        """Decode everything once, into a data set of ``(image, label)`` pairs.

        Args:
            transform: Applied to an image ``(C, H, W)`` each time that it is read, such as one of
                torchvision's that normalises and augments.
            dtype: As in :meth:`decode`.
            soft: Whether the second of a pair is the image's soft label, float32 ``(K,)``, as
                ``torch.nn.CrossEntropyLoss`` takes it, and not the class's label.
        """
        images, labels = self.decode(dtype=dtype)
        rows = self.soft_labels().cpu() if soft else None
        return DecodedDataset(images.cpu(), labels.cpu(), transform, rows)

    # Soft labels, and a labeller.

    @property
    def has_soft_labels(self) -> bool:
        """Whether any image has a soft label."""
        return self._soft is not None

    @property
    def is_soft(self) -> Tensor:
        """Bool ``(N,)`` on the CPU: which images have a soft label."""
        if self._soft is None:
            return torch.zeros(self.num_images, dtype=torch.bool)
        return self._soft.is_soft

    @property
    def richest_labels(self) -> str:
        """The most that a network can learn from: ``"labeller"``, ``"soft"`` or ``"hard"``."""
        if self._labeller is not None:
            return "labeller"
        return "soft" if self.has_soft_labels else "hard"

    def soft_labels(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return what a trained network said of images: the probabilities of the classes.

        An image without a soft label has the probability 1 for its own class. Classes that it
        hardly resembles, and those that came to the memory after it, have the probability 0.

        Args:
            indices: As in :meth:`decode`.

        Returns:
            float32 ``(B, K)`` on the memory's device, in the order of :attr:`classes`; rows sum to
            one.

        Raises:
            ConfigError: As :meth:`decode`.
        """
        positions = None if indices is None else check_indices(indices, self.num_images)
        soft = SoftLabels.hard(self._counts) if self._soft is None else self._soft
        return soft.probabilities(positions).to(self.classes.device)

    def set_soft_labels(
        self, probabilities: Tensor | None, indices: Tensor | Sequence[int] | None = None
    ) -> None:
        """Give images soft labels, rounded to what the file stores.

        The file may then be over the budget; :meth:`shrink` mends that.

        Args:
            probabilities: float ``(B, K)``, 0 or more, in the order of :attr:`classes`. None takes
                all soft labels away.
            indices: Positions of the images, each once. Default: all.

        Raises:
            ConfigError: Positions as in :meth:`decode`, or probabilities of another shape, below 0,
                not finite or all 0 for an image; or the memory holds features.
        """
        if probabilities is None:
            self._soft = None
            return
        check_takes_labels(holds_features=self.holds_features)
        probabilities = torch.as_tensor(probabilities)
        indices = torch.arange(self.num_images) if indices is None else indices
        positions = check_indices(indices, self.num_images, once=True)
        wanted = (len(positions), self.num_classes)
        if probabilities.shape != wanted:
            raise ConfigError(
                f"soft labels are probabilities {wanted}, one a class of each image; got "
                f"{tuple(probabilities.shape)}"
            )
        if not are_probabilities(probabilities):
            low, high = probabilities.float().aminmax()
            raise ConfigError(
                "soft labels are finite probabilities, of each image not all 0; got values from "
                f"{low:.3g} to {high:.3g}: logits are made such by softmax(dim=1)"
            )
        old = SoftLabels.hard(self._counts) if self._soft is None else self._soft
        self._soft = old.replaced(positions, probabilities)

    @property
    def labeller(self) -> Labeller | None:
        """The small network in the file that labels augmented images, or None.

        It maps float images ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``, in the order of
        :attr:`classes`. Where classes are added to the memory, it is dropped.
        """
        return None if self._labeller is None else self._labeller.to(self.classes.device)

    def set_labeller(self, labeller: Labeller | None) -> None:
        """Keep a labeller in the file, or none.

        Raises:
            ConfigError: It is for other classes or images than the memory's, or the memory holds
                features.
        """
        if labeller is not None:
            check_takes_labels(holds_features=self.holds_features)
            got = (labeller.num_classes, labeller.image_shape)
            if got != (self.num_classes, self.image_shape):
                raise ConfigError(
                    f"the labeller is for {got[0]} classes of images {got[1]}, the memory has "
                    f"{self.num_classes} of {self.image_shape}"
                )
        # Not by name: a learned memory is a module, which would take it for a part of its own.
        self.__dict__["_labeller"] = labeller

    def stored_labels(self) -> dict[str, Tensor]:
        """Return what the file stores of soft labels and of the labeller: name to tensor."""
        return {**_stored(self._soft), **_stored(self._labeller)}

    def restore_labels(self, tensors: Mapping[str, Tensor], num_bytes: int) -> None:
        """Take over soft labels and a labeller, or that there are none.

        Args:
            tensors: What :meth:`stored_labels` gave, maybe among others.
            num_bytes: Bytes of all tensors of the file, which bound what they may claim.

        Raises:
            MemoryFileError: They are not those of this memory's images and classes.
            ConfigError: As well.
        """
        if self.holds_features and tensors.keys() & (_OPTIONAL - {"names"}):
            raise MemoryFileError("a memory of features has labels of images")
        self._soft = SoftLabels.restored(tensors, self._counts, num_bytes)
        self.set_labeller(Labeller.restored(tensors, self.image_shape, self.num_classes, num_bytes))

    def label_specs(self, indices: Tensor | None = None) -> dict[str, TensorSpec]:
        """Return type and shape of what the file has of soft labels and of the labeller.

        Args:
            indices: int64 ``(B,)``, ascending: if only these images were kept. Default: all.
        """
        if indices is None:
            return specs_of(self.stored_labels())
        counts = self.class_index.cpu()[indices].bincount(minlength=self.num_classes)
        return self._label_specs_of(indices, range(self.num_classes), counts.tolist())

    def _label_specs_of(
        self, rows: Tensor, columns: Sequence[int], counts: Sequence[int]
    ) -> dict[str, TensorSpec]:
        """Return :meth:`label_specs` as they are after :meth:`_rearrange_labels`."""
        soft, labeller = self._rearranged_labels(rows, columns, counts)
        return specs_of({**_stored(soft), **_stored(labeller)})

    def label_bits(self) -> dict[str, float]:
        """Return the bits that soft labels and labeller take in the file, by name."""
        bits: dict[str, float] = {}
        for name, spec in self.label_specs().items():
            owner = "labeller" if name.startswith("labeller") else "soft_labels"
            bits[owner] = bits.get(owner, 0.0) + 8.0 * spec.num_bytes
        return bits

    def shrink(self, budget: Budget | int | str | None = None) -> None:
        """Drop images until the file is within a budget, as few as that takes.

        The first images of every class stay longest: the last ones of the fullest classes go.

        Args:
            budget: Bytes of the file. Default: the memory's own.

        Raises:
            BudgetError: A class would lose its last image, or no budget.
        """
        limit = self.budget_bytes if budget is None else Budget.parse(budget).num_bytes
        if limit is None or self.file_bytes <= limit:
            return
        size = self.images_kept_together
        order = (rank_in_class(self.class_index.cpu()) // size).argsort(stable=True)

        def first(num_groups: int) -> Tensor:
            return order[: num_groups * size].sort().values

        def fits(num_groups: int) -> bool:
            trial = copy.deepcopy(self)
            trial.keep(first(num_groups))
            return trial.file_bytes <= limit

        num_kept = largest(0, len(order) // size, fits)
        if num_kept < (num_held := sum(count > 0 for count in self._counts)) or not num_kept:
            raise BudgetError(
                f"a budget of {limit:,} bytes does not hold one image of each of {num_held} "
                "classes"
                + (
                    "; give a larger one"
                    if self.richest_labels == "hard"
                    else f" beside its {_LABEL_NAMES[self.richest_labels]}; give a larger one, or "
                    "go without"
                )
            )
        self.keep(first(num_kept))

    @property
    def images_kept_together(self) -> int:
        """How many images share stored values, and so are kept or dropped together."""
        return 1

    @torch.no_grad()
    def keep(self, indices: Tensor | Sequence[int]) -> None:
        """Drop every image but these; no image that stays changes by one bit.

        Args:
            indices: Positions of the images that stay, each once, in any order; they are kept in
                their present order. A class may lose all of its images; the class stays.

        Raises:
            ConfigError: A position outside ``0 .. N - 1``, one that occurs twice, a mask, or some
                of the images that share stored values without the others.
        """
        kept = check_indices(indices, self.num_images, once=True).sort().values
        self._keep(kept)
        self.class_index = self.class_index[kept.to(self.class_index.device)]
        self._counts = self.class_index.bincount(minlength=self.num_classes).tolist()
        self._rearrange_labels(kept, range(self.num_classes))

    @torch.no_grad()
    def remove(self, classes: Sequence[int] | Tensor) -> None:
        """Remove classes and all of their images; no image of another class changes by one bit.

        Args:
            classes: Labels that the memory has, each once. One class at least must stay.

        Raises:
            ConfigError: A label that the memory does not have or that occurs twice, or no class
                would stay.
        """
        labels = self.classes.tolist()
        gone = set(check_classes(classes))
        if unknown := sorted(gone.difference(labels)):
            raise ConfigError(f"classes {unknown} are not in the memory; it has {labels[:5]} ...")
        stays = [position for position, label in enumerate(labels) if label not in gone]
        if not stays:
            raise ConfigError("a memory has 1 class or more; remove all but one at most")
        index = self.class_index.cpu()
        self.keep(torch.isin(index, torch.tensor(stays)).nonzero().flatten())
        rows = torch.tensor(stays, device=self.classes.device)
        self.class_index = torch.searchsorted(rows, self.class_index)
        self._counts = [self._counts[position] for position in stays]
        self.classes = self.classes[rows]
        self.class_names = {k: name for k, name in self.class_names.items() if k not in gone}
        self._drop_classes(rows)
        self._rearrange_labels(torch.arange(self.num_images), stays)

    def _rearrange_labels(self, rows: Tensor, columns: Sequence[int]) -> None:
        """Let soft labels and labeller follow images and classes.

        Args:
            rows: int64 ``(N,)``, the position that each image had; -1 for a new one.
            columns: The position that each class had; -1 for a new one.
        """
        self._soft, labeller = self._rearranged_labels(rows, columns, self._counts)
        self.set_labeller(labeller)

    def _rearranged_labels(
        self, rows: Tensor, columns: Sequence[int], counts: Sequence[int]
    ) -> tuple[SoftLabels | None, Labeller | None]:
        """Return the soft labels and the labeller of other images and classes.

        Args:
            rows: As in :meth:`_rearrange_labels`.
            columns: As in :meth:`_rearrange_labels`.
            counts: How many images each class has.
        """
        soft, labeller = self._soft, self._labeller
        if soft is not None:
            soft = soft.rearranged(rows, columns, counts)
            soft = soft if bool(soft.is_soft.any()) else None
        if labeller is not None and list(columns) != [*range(labeller.num_classes)]:
            is_known = min(columns) >= 0
            labeller = labeller.of_classes(torch.tensor(columns)) if is_known else None
        return soft, labeller

    def to_bytes(self) -> bytes:
        """Return the bytes of the memory's file; :func:`hmn_replay.memory.loads` reads them.

        Raises:
            DataError: The memory has no class, as before :meth:`RealMemory.extend`.
            TrainingError: Learned values that are not finite, or far too large.
            ConfigError: Soft labels over more classes than a file of so few bytes may have.
        """
        if not self.num_classes:
            raise DataError(
                "there is nothing to save: the memory has no class; extend() it with images first"
            )
        labels, counts = class_specs(self.classes.tolist(), self.num_images).values()
        tensors = {
            "labels": self.classes.to(labels.dtype),
            "counts": torch.tensor(self._counts, dtype=counts.dtype),
            **self.stored(),
            **self._stored_names(),
            **self.stored_labels(),
        }
        if self._soft is not None:
            num_bytes = sum(spec.num_bytes for spec in specs_of(tensors).values())
            try:
                self._soft.check_claims(num_bytes)
            except MemoryFileError as error:
                raise ConfigError(
                    f"a file with these soft labels could not be read again: {error}; store labels "
                    "of fewer images, images of more bytes, or hard labels alone"
                ) from error
        return pack(Record(self.kind, self.num_images, self.budget_bytes, self.words(), tensors))

    def save(self, path: str | Path) -> None:
        """Write the memory to a file, all at once or not at all.

        Raises:
            BudgetError: The file would be over the budget; nothing is written.
            ConfigError: As :meth:`to_bytes`.
            DataError: As :meth:`to_bytes`.
            TrainingError: As :meth:`to_bytes`.
        """
        write_atomically(path, self.checked_bytes())

    def checked_bytes(self) -> bytes:
        """Return :meth:`to_bytes`, or raise a BudgetError where they are over the budget."""
        data = self.to_bytes()
        if self.budget_bytes is not None and len(data) > self.budget_bytes:
            raise BudgetError(
                f"the memory takes {len(data):,} bytes, over its budget of {self.budget_bytes:,}; "
                "call shrink() first, which drops images until it fits"
            )
        if not MEMORIES.is_built_in(self.kind):
            try:
                loads(data)
            except MemoryFileError as error:
                raise ConfigError(
                    f"a file of the kind {self.kind!r} could not be read again, and is not "
                    f"written: {error}"
                ) from error
        return data

    def push_to_hub(
        self,
        repo_id: str,
        *,
        source: str | None = None,
        accuracy: float | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put the memory on the Hugging Face Hub, with a card and a contact sheet, in one commit.

        It becomes a repository of data, which is made where it is absent. ``hmn_replay.load(
        "hf://OWNER/NAME")`` reads it. Needs ``pip install 'hmn-replay[hub]'``.

        Args:
            repo_id: ``OWNER/NAME``.
            source: For the card: what the images come from, such as ``"CIFAR-10"``.
            accuracy: For the card: test accuracy of a network that was trained on the memory, in
                [0, 1].
            license: For the card: an identifier that the Hub knows, such as ``"mit"``.
            tags: Tags beside those of the memory's kind.
            private: Whether the repository is private, where it is new. Default: the owner's own.
            revision: Branch to commit to. Default: the main one.
            token: Default: that of ``hf auth login``.

        Returns:
            The address of the commit.

        Raises:
            MissingExtraError: ``huggingface_hub`` is not installed.
            BudgetError: The file would be over the budget.
            DataError: The memory holds no image.
            OSError: The Hub refuses it, or does not answer.
        """
        from hmn_replay.memory.hub import push

        return push(
            self,
            repo_id,
            source=source,
            accuracy=accuracy,
            license=license,
            tags=tags,
            private=private,
            revision=revision,
            token=token,
        )

    def to_hf_dataset(self) -> Any:
        """Return the images as a data set of Hugging Face's ``datasets``.

        See :func:`hmn_replay.memory.export.to_hf_dataset`.
        """
        from hmn_replay.memory.export import to_hf_dataset

        return to_hf_dataset(self)

    @property
    def names_bytes(self) -> int:
        """Bytes that the class names take in the file; 0 without names."""
        return stored_names_bytes(self.class_names, self.classes.tolist())

    def _stored_names(self) -> dict[str, Tensor]:
        return stored_names(self.class_names, self.classes.tolist())


MEMORIES: Registry[type[Memory]] = Registry("memory kind")
"""The memory kinds by name."""


def register_memory(name: str) -> Callable[[AnyMemory], AnyMemory]:
    """Return a decorator that registers a memory kind, whose files :func:`load` then reads.

    Args:
        name: As for :meth:`hmn_replay.registry.Registry.add`.

    Raises:
        ConfigError: The name is taken, or has other characters; or what is decorated is no memory,
            or has a name already.
    """
    if not isinstance(name, str):
        raise ConfigError(f"register_memory takes a name; got {name!r:.60}")

    def decorate(memory_type: AnyMemory) -> AnyMemory:
        if not isinstance(memory_type, type) or not issubclass(memory_type, Memory):
            raise ConfigError(f"a memory kind is a subclass of Memory; got {memory_type!r:.60}")
        if memory_type in MEMORIES.values():
            raise ConfigError(
                f"{memory_type.__name__} is the memory kind {memory_type.kind!r}, which its files "
                "are called by: subclass it for another"
            )
        MEMORIES.add(name, memory_type)
        memory_type.kind = name
        return memory_type

    return decorate


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    max_images: int | None = None,
    token: str | None = None,
) -> Memory:
    """Read a memory file, of whatever kind.

    What the memory decodes to is bit for bit what it was when it was saved, on the same kind of
    device (a GPU with the same settings of TF32), and on a CPU with as many threads. Whatever the
    file claims, reading it takes memory and time in proportion to its bytes; decoding all of its
    images may take more.

    Args:
        path: A file that :meth:`Memory.save` wrote; or ``"hf://OWNER/NAME"`` for one that
            :meth:`Memory.push_to_hub` put on the Hugging Face Hub, with ``@REVISION`` or ``/FILE``
            at its end for another than the newest ``memory.hmn``.
        device: Where the tensors go; ``"auto"`` is CUDA where present, else the CPU.
        max_images: Refuse a file of more images. Default: None, as many as the format lets a file
            of its bytes have.
        token: A login to the Hub, for an address there. Default: that of ``hf auth login``.

    Raises:
        ConfigError: An address on the Hub of another form, or a token for a file on disk.
        MemoryFileError: The file is not a memory file, is truncated or altered, has a version that
            this package does not read, or more images than ``max_images``.
        OSError: The file is absent or cannot be read.
        MissingExtraError: An address on the Hub, without ``huggingface_hub``.
    """
    target = resolve_device(device)
    if os.fspath(path).startswith("hf:/"):
        from hmn_replay.memory.hub import download

        path = download(os.fspath(path), token=token)
    elif token is not None:
        raise ConfigError(
            f"token= is a login to the Hub, for hf://OWNER/NAME; got the file {os.fspath(path)!r}: "
            "leave it out"
        )
    try:
        memory = _from_record(read_file(path), max_images)
    except MemoryFileError as error:
        raise MemoryFileError(f"cannot read {os.fspath(path)!r}: {error}") from error
    return memory.to(target)  # type: ignore[no-any-return]


def loads(
    data: bytes, *, device: str | torch.device = "cpu", max_images: int | None = None
) -> Memory:
    """Read the bytes of a memory file: the inverse of :meth:`Memory.to_bytes`, with every check.

    Args:
        data: The bytes.
        device: As in :func:`load`.
        max_images: As in :func:`load`.

    Raises:
        MemoryFileError: As :func:`load`.
    """
    target = resolve_device(device)
    try:
        return _from_record(unpack(data), max_images).to(target)  # type: ignore[no-any-return]
    except MemoryFileError as error:
        raise MemoryFileError(f"cannot read the bytes of a memory: {error}") from error


class DecodedDataset(Dataset[tuple[object, Any]]):
    """Decoded images as a map-style data set.

    Args:
        images: ``(N, C, H, W)``.
        targets: int64 ``(N,)``.
        transform: Applied to an image ``(C, H, W)`` each time that it is read, or None.
        soft: float ``(N, K)``: items are ``(image, soft label)``. Default: None, the targets.

    Attributes:
        targets: list of int, the labels, as torchvision's data sets have them.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        transform: Callable[[Tensor], object] | None = None,
        soft: Tensor | None = None,
    ) -> None:
        self.images = images
        self.targets: list[int] = targets.tolist()
        self.transform, self.soft = transform, soft

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        labels = "" if self.soft is None else ", soft labels"
        transformed = "" if self.transform is None else f", transform={name_of(self.transform)}"
        return (
            f"{type(self).__name__}({len(self)} images of {len(set(self.targets))} classes, "
            f"image_shape={tuple(self.images.shape[1:])}{labels}{transformed})"
        )

    def __getitem__(self, index: int) -> tuple[object, Any]:
        image = self.images[index].clone()  # which a transform may change in place
        target = self.targets[index] if self.soft is None else self.soft[index]
        return image if self.transform is None else self.transform(image), target


def _stored(part: SoftLabels | Labeller | None) -> dict[str, Tensor]:
    return {} if part is None else part.stored()


def warn_of_lost_labeller(before: Labeller | None, after: Labeller | None) -> None:
    """Warn where a memory has lost its labeller, which does not know classes that were added."""
    if before is not None and after is None:
        warnings.warn(
            "the memory's labeller does not know the classes that were added, and is no longer in "
            "the memory: make another by labels='labeller', or set_labeller()",
            HMNReplayWarning,
            stacklevel=4,
        )


def class_specs(classes: Sequence[int], num_images: int) -> dict[str, TensorSpec]:
    """Return the tensors that every file begins with: labels and counts, in their order."""
    low, high = (min(classes), max(classes)) if classes else (0, 0)
    return {
        "labels": TensorSpec(integer_dtype(low, high), (len(classes),)),
        "counts": TensorSpec(integer_dtype(0, num_images), (len(classes),)),
    }


def with_unknown(labels: Iterable[int], num_classes: int) -> list[int]:
    """Return labels and further ones, up to a number of classes: the smallest that there are."""
    known = {*labels}
    further = itertools.filterfalse(known.__contains__, itertools.count())
    return sorted(known.union(itertools.islice(further, max(0, num_classes - len(known)))))


def _from_record(record: Record, max_images: int | None = None) -> Memory:
    if max_images is not None and as_int(max_images) is None:
        raise ConfigError(f"max_images is a whole number, or None; got {max_images!r}")
    if max_images is not None and record.num_images > max_images:
        raise MemoryFileError(f"it has {record.num_images:,} images, over max_images={max_images}")
    check_claims(record.num_bytes, record.num_images)
    with without_autocast(torch.device("cpu")):
        return _restored(record)


def _restored(record: Record) -> Memory:
    try:
        memory_type = MEMORIES[record.kind]
        labels, counts = (record.tensors[name] for name in ("labels", "counts"))
        classes = check_classes(labels.tolist() if labels.ndim == 1 else [])
        specs = class_specs(classes, record.num_images)
        check_tensors({"labels": labels, "counts": counts}, specs)
        images_per_class = check_counts(counts.tolist(), len(classes))
        if sum(images_per_class) != record.num_images:
            raise MemoryFileError(
                f"its images a class do not add up to its {record.num_images} images"
            )
        memory = memory_type._restore(record, classes, images_per_class)
        memory.budget_bytes = record.budget_bytes
        if "names" in record.tensors:
            names = read_names(record.tensors["names"], len(classes))
            memory.class_names = {k: name for k, name in zip(classes, names, strict=True) if name}
        memory.restore_labels(record.tensors, record.num_bytes)
    except MemoryFileError:
        raise
    except (HMNReplayError, KeyError, ValueError, TypeError) as error:
        raise MemoryFileError(f"its content is not that of a memory ({error})") from error
    return memory


def check_tensors(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Raise a :class:`MemoryFileError` unless a file has just these tensors.

    Those of names and of soft labels and a labeller, which any file may have, are left aside.
    """
    if difference := sorted((set(tensors) - _OPTIONAL) ^ set(specs)):
        raise MemoryFileError(f"its tensors are not those of such a memory: {difference[:5]}")
    for name, spec in specs.items():
        if tensors[name].dtype != spec.dtype or tuple(tensors[name].shape) != spec.shape:
            raise MemoryFileError(
                f"tensor {name!r} is {tensors[name].dtype} {tuple(tensors[name].shape)}; expected "
                f"{spec.dtype} {spec.shape}"
            )
