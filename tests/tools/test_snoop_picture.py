"""Pictures: a PNG with matplotlib, and one HTML file that needs nothing else."""

import builtins
import os
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cbit.hw.errors import CbitError
from cbit.hw.types import PAGE_SIZE
from cbit.tools.dram_file import Extent
from cbit.tools.snoop import SnoopReport, snoop
from cbit.tools.snoop_html import write_html
from cbit.tools.snoop_map import CELL_COLOURS
from cbit.tools.snoop_picture import write_png

SCRIPT = b"<script>alert('&amp;')</script>"


class Image:
    size = 64 << 30

    def extents(self) -> Iterable[Extent]:
        plain = np.zeros(40 * PAGE_SIZE, np.uint8)
        plain[::PAGE_SIZE] = 1
        plain[16 : 16 + len(SCRIPT)] = list(SCRIPT)
        rng = np.random.default_rng(1)
        yield 0, plain
        yield 1 << 30, rng.integers(0, 256, 200 * PAGE_SIZE, dtype=np.uint8)


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report() -> SnoopReport:
    return snoop(Image(), needles=(SCRIPT, b"absent", b"\xff<b>"))


def html(report: SnoopReport, tmp_path: Path, title: str = "t") -> str:
    write_html(tmp_path / "page.html", report, title)
    return (tmp_path / "page.html").read_text("utf-8")


def test_the_page_is_well_formed_and_fetches_nothing(
    report: SnoopReport, tmp_path: Path
) -> None:
    page = Page(html(report, tmp_path))
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "base"} & {t for t, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href", "onload", "onclick"} & names


def test_strings_titles_and_searches_are_escaped(
    report: SnoopReport, tmp_path: Path
) -> None:
    text = html(report, tmp_path, title="</title><b>x</b>")
    assert "<script" not in text
    assert "<b>" not in text
    page = Page(text)
    assert page.text.count(SCRIPT.decode()) == 2  # as a string, and as found
    assert "</title><b>x</b>" in page.text
    assert r"\xff<b>" in page.text


def test_the_map_of_the_page_has_every_class_in_its_colour(
    report: SnoopReport, tmp_path: Path
) -> None:
    page = Page(html(report, tmp_path))
    rectangles = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert {one["fill"] for one in rectangles} == set(CELL_COLOURS[:3])
    assert "0x0..0x28000 plain" in page.text
    assert "0x40000000..0x40080000 encrypted-looking" in page.text
    assert re.search(r"63\.0 GiB never written or zero", page.text)


def test_the_page_tells_totals_and_addresses(
    report: SnoopReport, tmp_path: Path
) -> None:
    page = Page(html(report, tmp_path))
    assert f"{(64 << 30) // PAGE_SIZE - 240} pages" in page.text
    assert "40 pages" in page.text
    assert "200 pages" in page.text
    assert "0x10" in page.text


def test_the_png_shows_the_classes_in_their_colours(
    report: SnoopReport, tmp_path: Path
) -> None:
    from matplotlib import image

    write_png(tmp_path / "map.png", report, "a $title_of$ {odd} \\ characters")
    pixels = image.imread(tmp_path / "map.png")[..., :3]
    seen = {
        "#" + "".join(f"{round(float(part) * 255):02x}" for part in colour)
        for colour in np.unique(pixels.reshape(-1, 3), axis=0)
    }
    assert set(CELL_COLOURS[:3]) <= seen
    height, width, _ = pixels.shape
    assert 300 < height < 2000
    assert 800 < width < 2000


def test_a_png_of_nothing_but_zeros_is_drawn(tmp_path: Path) -> None:

    class Empty:
        size = 1 << 30

        def extents(self) -> Iterable[Extent]:
            return ()

    write_png(tmp_path / "map.png", snoop(Empty()), "nothing")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(
    report: SnoopReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CbitError, match=r"pip install 'cbit\[plots\]'"):
        write_png(tmp_path / "map.png", report, "t")
    assert os.listdir(tmp_path) == []
