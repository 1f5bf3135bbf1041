"""The gallery: one page, which stands alone, of what memories hold."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from hmn_replay import Gallery, LabelledImages, jpeg_images, psnr_by_class, raw_images
from hmn_replay.errors import ConfigError, DataError
from tests.console import Console
from tests.support import KINDS, any_memory, real, real_set


class Page(HTMLParser):
    """Tags, texts and pictures of a page; every tag that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @property
    def pictures(self) -> list[np.ndarray[Any, Any]]:
        sources = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        datas = [base64.b64decode(str(source).split("base64,")[1]) for source in sources]
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in datas]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shown(kind: str) -> None:
    memory = any_memory(kind)
    gallery = Gallery()
    gallery.add(memory)
    text = gallery.html()
    page = Page(text)
    assert len(page.pictures) == 2 and f"{memory.num_images:,} images" in text
    assert f"{memory.file_bytes:,} bytes" in text
    for name in memory.bits():
        assert name in text


def test_images_stand_in_lines_beside_the_nearest_real_ones() -> None:
    memory = real("raw", classes=(3,), counts=(30,), image_shape=(3, 8, 8))
    images, _ = memory.decode(dtype=torch.uint8)
    others = real_set(classes=(4,), counts=(5,)).images
    labels = torch.tensor([4] * 5 + [3] * 30)
    sources = LabelledImages(torch.cat([others, images.flip(0)]), labels)
    gallery = Gallery(sources=sources, images_per_class=25)
    gallery.add(memory)
    text = gallery.html()
    (picture,) = Page(text).pictures
    # Lines of 21 images of 9 pixels, each with its sources below; here these are the images.
    assert picture.shape == (4 * 9 + 1, 21 * 9 + 1, 3)
    cells = picture[1:, 1:].reshape(4, 9, 21, 9, 3)[:, :8, :, :8].transpose(0, 2, 4, 1, 3)
    assert np.array_equal(cells[0], images[:21].numpy())
    assert np.array_equal(cells[1], cells[0]) and np.array_equal(cells[3], cells[2])
    assert np.array_equal(cells[2, :4], images[21:25].numpy()) and (cells[2, 4:] == 128).all()
    assert "30 images, 25 shown" in text and "100.0 dB" in text


def test_the_page_runs_nothing_and_fetches_nothing() -> None:
    memory = real("jpeg")
    memory.class_names = {-3: "<script>alert(1)</script>", 7: 'a"b'}
    gallery = Gallery("<b>title</b>")
    gallery.add(memory, "<i>stage</i>")
    text = gallery.html()
    tags = {tag for tag, _ in Page(text).tags}
    assert not tags & {"script", "link", "iframe", "b"}
    assert "default-src 'none'" in text and not re.search(r"https?://|url\(|\son\w+=", text)
    assert "&lt;script&gt;" in text and "&lt;i&gt;stage" in text


def test_stages_show_how_classes_make_room(tmp_path: Path) -> None:
    memory, gallery = real("raw", counts=(4, 4)), Gallery()
    gallery.add(memory, "first")
    memory.keep([0, 1, 4])
    gallery.add(memory, "second")
    gallery.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.findall(r"<figcaption>(\w+) · (\d) images", text)
    assert found == [("first", "4"), ("second", "2"), ("first", "4"), ("second", "1")]


def test_a_class_without_images_has_no_picture() -> None:
    memory, gallery = real("raw"), Gallery()
    memory.keep([0])
    gallery.add(memory)
    text = gallery.html()
    assert len(Page(text).pictures) == 1 and "0 images" in text


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ConfigError, match="add a memory first"):
        Gallery().html()
    with pytest.raises(ConfigError, match="images_per_class"):
        Gallery(images_per_class=0)
    with pytest.raises(DataError, match="holds no image"):
        empty = real("raw")
        empty.keep([])
        Gallery().add(empty)
    with pytest.raises(DataError, match=r"expected real images of \(3, 8, 8\)"):
        Gallery(sources=real_set((1, 8, 8))).add(real("raw"))


def test_sources_are_any_images() -> None:
    memory, data = real("jpeg"), real_set()
    pages = []
    for sources in (
        data,
        (data.images.numpy(), data.labels.numpy()),
        Subset(data, range(len(data))),
    ):
        gallery = Gallery(sources=sources)
        gallery.add(memory)
        pages.append(gallery.html())
        assert psnr_by_class(memory, sources) == psnr_by_class(memory, data)
    assert pages[0] == pages[1] == pages[2] and "dB from the real ones" in pages[0]
    with pytest.raises(DataError, match="pass that of a data set to load_dataset"):
        Gallery(sources="cifar10")


def test_the_command_writes_the_page(run: Console, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        real("jpeg", image_shape=(1, 8, 8), classes=(0, 1), seed=seed).save(
            tmp_path / f"{name}.hmn"
        )
    files, out = [str(tmp_path / f"{name}.hmn") for name in ("one", "two")], tmp_path / "out.html"
    assert '"out"' in run("gallery", *files, out, "--data", "digits", "--json")
    page = out.read_text(encoding="utf-8")
    assert "one · 2 images" in page and "two · 3 images" in page and "dB from the real" in page
    run("gallery", *files, code=2)
    assert "must be an .html file" in run.err


def test_the_psnr_of_a_class_is_that_to_its_nearest_real_images(make_set: Any) -> None:
    data = make_set(image_shape=(3, 16, 16))
    memory = jpeg_images(data, "100 KiB", quality=20)
    found = psnr_by_class(memory, data)
    assert list(found) == memory.classes.tolist()
    for label, value in found.items():
        positions = (memory.labels == label).nonzero().flatten()
        own = memory.decode(positions)[0]
        real = data.floats(data.of_class(label))
        errors = [min(float((image - one).square().mean()) for one in real) for image in own]
        wanted = sum(-10 * math.log10(error) for error in errors) / len(errors)
        assert value == pytest.approx(wanted, abs=1e-3)
    assert set(psnr_by_class(raw_images(data, "100 KiB"), data).values()) == {100.0}
    one = data.take(data.of_class(int(data.classes[0])))
    assert list(psnr_by_class(memory, one)) == one.classes.tolist()
    with pytest.raises(DataError, match="expected real images of"):
        psnr_by_class(memory, make_set(image_shape=(3, 8, 8)))
    named = dict.fromkeys(data.classes.tolist(), "")
    named = {label: f"class {label}" for label in named}
    others = dict(zip(named, reversed(list(named.values())), strict=True))
    memory.class_names = named
    numbered = LabelledImages(data.images, data.labels, others)
    for compare in (psnr_by_class, lambda own, real: Gallery(sources=real).add(own)):
        with pytest.raises(DataError, match="number the classes of both alike"):
            compare(memory, numbered)
