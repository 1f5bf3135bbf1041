"""A gallery: one HTML file that shows what memories hold, class by class.

The file stands alone: pictures are inside it, there is no script, and nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmn_replay.data.images import (
    ImageSource,
    LabelledImages,
    as_labelled_images,
    check_same_keys,
    check_same_names,
    mean_psnr,
)
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.files import write_atomically
from hmn_replay.memory.base import Memory

__all__ = ["Gallery", "psnr_by_class"]

_SIDE = 48  # smaller images are enlarged to it, by a whole factor
_WIDTH = 1150  # of a line of images
_GREY = 128  # between images
_AT_ONCE = 16  # images whose nearest sources are sought at once
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --back: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
h2 small, .note { font-weight: normal; opacity: .7; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .25rem .8rem;
border-bottom: 1px solid var(--line); vertical-align: middle; } td.number { text-align: right;
font-variant-numeric: tabular-nums; white-space: nowrap; } td.wide { width: 45%; }
.bar { display: flex; height: .9rem; background: var(--back); border-radius: 3px;
overflow: hidden; }
.bar i { display: block; height: 100%; } .key span { margin-right: 1.2rem; white-space: nowrap; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
margin-right: .4rem; vertical-align: -1px; } figure { margin: .3rem 0 .8rem; }
figure, .scroll { overflow-x: auto; }
figcaption { font-size: .85rem; opacity: .7; } img { image-rendering: pixelated; display: block; }
"""


def psnr_by_class(memory: Memory, sources: ImageSource) -> dict[int, float]:
    """Return how near each class's images are to real ones.

    Args:
        memory: Of any kind.
        sources: Real images, such as those that the memory was made from; see
            :func:`hmn_replay.as_labelled_images`.

    Returns:
        For the label of each class that has images in both, the mean over the memory's images of
        the PSNR in dB to the real image of the class that is nearest in pixels; 100 at most, of an
        image that is the real one.

    Raises:
        DataError: Images of another shape, of classes that are named or numbered otherwise, or that
            cannot be used.
    """
    sources = as_labelled_images(sources)
    _check_sources(sources, memory)
    known, found = set(sources.classes.tolist()), {}
    labels = memory.labels.cpu()
    for label in memory.classes.tolist():
        positions = (labels == label).nonzero().flatten()
        if label not in known or not len(positions):
            continue
        images = memory.decode(positions, dtype=torch.uint8)[0].cpu()
        nearest = _nearest(images, sources.images[sources.of_class(label)])
        found[label] = _psnr(images, nearest)
    return found


def _psnr(images: Tensor, others: Tensor) -> float:
    """Return the mean PSNR in dB of uint8 images to others."""
    return mean_psnr((images.float() - others.float()).div(255).square().mean(dim=(1, 2, 3)))


def _check_sources(sources: LabelledImages, memory: Memory) -> None:
    """Raise a DataError unless real images are of a memory's shape, and of its classes."""
    if sources.image_shape != memory.image_shape:
        raise DataError(
            f"expected real images of {memory.image_shape}, as the memory has; got "
            f"{sources.image_shape}"
        )
    check_same_keys(sources.classes, memory.classes.cpu(), "the real images")
    check_same_names(memory.class_names, sources.class_names, "the memory", "the real images")


@dataclass(frozen=True)
class _Strip:
    """The images of a class at a stage."""

    png: bytes
    size: tuple[int, int]
    num_images: int
    num_shown: int
    psnr: float | None


@dataclass(frozen=True)
class _Stage:
    """A memory, as far as the gallery shows it."""

    title: str
    kind: str
    num_images: int
    file_bytes: int
    budget_bytes: int | None
    bits: dict[str, float]
    strips: dict[int, _Strip]


class Gallery:
    """A page of one memory, or of the stages that a memory goes through in a stream.

    Each class shows its first images, beside their real sources where these are given: of every
    image, the real one of its class that is nearest in pixels. Above stands what each tensor of the
    file takes in bytes.

    Args:
        title: Heading of the page.
        sources: Real images; see :func:`hmn_replay.as_labelled_images`. Default: None, none are
            shown.
        images_per_class: Images shown of each class and stage, 1 or more.

    Raises:
        ConfigError: ``images_per_class`` is below 1.
        DataError: Sources that cannot be used.

    Example:
        >>> gallery = Gallery()  # doctest: +SKIP
        >>> for experience in benchmark.train_stream:  # doctest: +SKIP
        ...     strategy.train(experience)
        ...     gallery.add(replay.memory, f"experience {experience.current_experience}")
        ...     gallery.save("memory.html")
    """

    def __init__(
        self,
        title: str = "What the memory holds",
        *,
        sources: ImageSource | None = None,
        images_per_class: int = 24,
    ) -> None:
        if images_per_class < 1:
            raise ConfigError(f"images_per_class must be 1 or more; got {images_per_class}")
        self.title, self.images_per_class = title, images_per_class
        self.sources = None if sources is None else as_labelled_images(sources)
        self._stages: list[_Stage] = []
        self._names: dict[int, str] = {}

    def add(self, memory: Memory, title: str = "") -> None:
        """Add a memory as it is now; later changes of it do not show.

        Args:
            memory: A memory of any kind.
            title: Its name on the page. Default: none, or its number where there are several.

        Raises:
            DataError: The memory holds no image, or images of another shape than the sources, or
                classes that these name or number otherwise.
        """
        images, labels = (part.cpu() for part in memory.decode(dtype=torch.uint8))
        if not len(images):
            raise DataError("there is nothing to show: the memory holds no image")
        if self.sources is not None:
            _check_sources(self.sources, memory)
        own = (self.sources.class_names if self.sources else None) or {}
        self._names.update({**own, **memory.class_names})
        strips = {
            label: self._strip(label, images[labels == label]) for label in memory.classes.tolist()
        }
        self._stages.append(
            _Stage(
                title,
                memory.kind,
                memory.num_images,
                memory.file_bytes,
                memory.budget_bytes,
                memory.bits(),
                strips,
            )
        )

    def html(self) -> str:
        """Return the page.

        Raises:
            ConfigError: Nothing was added.
        """
        if not self._stages:
            raise ConfigError("there is nothing to show: add a memory first")
        labels = sorted({label for stage in self._stages for label in stage.strips})
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # The page says of itself that it runs nothing and fetches nothing.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(self.title)}</h1>",
            self._overview(),
        ]
        if self.sources is not None:
            parts.append(
                '<p class="note">Below each row of the memory, the real image of the same class '
                "that is nearest in pixels.</p>"
            )
        parts += [self._section(label) for label in labels]
        return "\n".join([*parts, "</body></html>", ""])

    def save(self, path: str | Path) -> None:
        """Write the page, all at once or not at all.

        Raises:
            ConfigError: Nothing was added.
            OSError: The file cannot be written.
        """
        write_atomically(path, self.html().encode())

    def _title(self, number: int) -> str:
        stage = self._stages[number]
        return stage.title or (f"stage {number + 1}" if len(self._stages) > 1 else stage.kind)

    def _overview(self) -> str:
        """Return a table of the stages, each with a bar of the file's bytes by tensor."""
        names = list(dict.fromkeys(name for stage in self._stages for name in stage.bits))
        colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        most = max(max(stage.file_bytes, stage.budget_bytes or 0) for stage in self._stages)
        rows = []
        for number, stage in enumerate(self._stages):
            shares = [
                (colours[name], bits / 8 / most, f"{name}: {bits / 8:,.0f} bytes")
                for name, bits in stage.bits.items()
            ]
            rest = stage.file_bytes - sum(stage.bits.values()) / 8
            shares.append(
                ("#666", max(0.0, rest) / most, f"file header and labels: {rest:,.0f} bytes")
            )
            bar = "".join(
                f'<i style="width:{share:.3%};background:{colour}" title="{escape(text)}"></i>'
                for colour, share, text in shares
            )
            budget = f" of {stage.budget_bytes:,}" if stage.budget_bytes else ""
            cells = [
                f"<td>{escape(self._title(number))}</td>",
                f'<td class="number">{stage.num_images:,} images</td>',
                f'<td class="number">{len(stage.strips):,} classes</td>',
                f'<td class="number">{stage.file_bytes:,}{budget} bytes</td>',
                f'<td class="wide"><div class="bar">{bar}</div></td>',
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        keys = {**colours, "file header and labels": "#666"}
        if len(self._stages) == 1:
            stage = self._stages[0]
            sizes = {name: bits / 8 for name, bits in stage.bits.items()}
            sizes["file header and labels"] = stage.file_bytes - sum(sizes.values())
            captions = {name: f"{name}, {sizes[name]:,.0f} bytes" for name in keys}
        else:
            captions = {name: name for name in keys}
        key = "".join(
            f'<span><i style="background:{colour}"></i>{escape(captions[name])}</span>'
            for name, colour in keys.items()
        )
        return f'<div class="scroll"><table>{"".join(rows)}</table></div><p class="key">{key}</p>'

    def _section(self, label: int) -> str:
        """Return what a class holds, stage after stage."""
        named = self._names.get(label)
        heading = escape(named or f"class {label}") + (
            f" <small>label {label}</small>" if named else ""
        )
        parts = [f"<section><h2>{heading}</h2>"]
        for number, stage in enumerate(self._stages):
            if label not in stage.strips:
                continue
            strip = stage.strips[label]
            words = [self._title(number)] if len(self._stages) > 1 else []
            shown = "" if strip.num_shown == strip.num_images else f", {strip.num_shown} shown"
            words.append(f"{strip.num_images:,} images{shown}")
            if strip.psnr is not None:
                words.append(f"{strip.psnr:.1f} dB from the real ones")
            caption = escape(" · ".join(words))
            picture = ""
            if strip.num_shown:
                data = base64.b64encode(strip.png).decode()
                width, height = strip.size
                picture = (
                    f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
                    f'alt="Images of {escape(named or str(label))}: {caption}">'
                )
            parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
        return "".join(parts) + "</section>"

    def _strip(self, label: int, images: Tensor) -> _Strip:
        shown, psnr = images[: self.images_per_class], None
        rows: Sequence[Tensor] = [shown]
        if self.sources is not None and len(shown):
            own = self.sources.of_class(label) if label in self.sources.classes.tolist() else None
            if own is not None:
                nearest = _nearest(shown, self.sources.images[own])
                psnr = _psnr(shown, nearest)
                rows = [shown, nearest]
        if not len(shown):
            return _Strip(b"", (0, 0), 0, 0, None)
        factor = max(1, math.ceil(_SIDE / min(shown.shape[2:])))
        png, size = _draw(rows, max(1, _WIDTH // (factor * (shown.shape[3] + 1))))
        return _Strip(png, (factor * size[0], factor * size[1]), len(images), len(shown), psnr)


def _nearest(images: Tensor, real: Tensor) -> Tensor:
    """Return for each image the nearest real one: uint8 ``(N, C, H, W)``."""
    values = real.flatten(1).float()
    found = [
        torch.cdist(part.flatten(1).float(), values).argmin(1) for part in images.split(_AT_ONCE)
    ]
    return real[torch.cat(found)]


def _draw(rows: Sequence[Tensor], columns: int) -> tuple[bytes, tuple[int, int]]:
    """Return a PNG of rows of images, in lines of so many, and its width and height."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    columns = min(columns, len(rows[0]))
    lines = []
    for parts in zip(*(row.split(columns) for row in rows), strict=True):
        for part in parts:
            blank = part.new_full((columns - len(part), *part.shape[1:]), _GREY)
            lines.append(torch.cat([part, blank]))
    grid: Any = make_grid([*torch.cat(lines)], nrow=columns, padding=1, pad_value=_GREY)
    image, file = to_pil_image(grid), io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue(), image.size
