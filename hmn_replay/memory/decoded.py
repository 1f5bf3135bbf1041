"""Decoded images as a map-style data set."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["DecodedDataset"]


class DecodedDataset(Dataset[tuple[object, int]]):
    """Decoded images as a map-style data set.

    Args:
        images: ``(N, C, H, W)``.
        targets: int64 ``(N,)``.
        transform: Applied to an image ``(C, H, W)`` each time that it is read, or None.

    Attributes:
        targets: list of int, the labels, as torchvision's data sets have them.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, transform: Callable[[Tensor], object] | None = None
    ) -> None:
        self.images = images
        self.targets: list[int] = targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.targets[index]
