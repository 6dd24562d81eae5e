"""`kvstore-inspect report`: a page of its own, which shows what is in the file."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest
from support import MIB
from support.clock import FakeClock
from support.disks import fill, mounted

from kvstore import KVStore
from kvstore.format.layout import (
    IDENTITY,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    STATE,
    STATE_OFFSET,
    key_hash,
)
from kvstore.format.superblock import pack_state
from kvstore_inspect.command_line import main
from kvstore_inspect.file_view import open_view
from kvstore_inspect.survey import NO_TTL, extents, survey

PICTURES: Final = {
    "Map of the file",
    "Value sizes",
    "Space by size class",
    "Expiry over time",
    "Load of the segments",
    "Probe lengths",
}
_BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """What is in a page: its tags, the texts of its headings, and all that it refers to."""

    VOID: Final = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data + " "


@pytest.fixture
def path(path: Path) -> Path:
    """A closed store of 500 records, a hundred of them with a time-to-live."""
    with KVStore(path) as store:
        for number in range(500):
            store.create(
                f"key {number}", {"text": "x" * (number * 7)}, ttl=None if number % 5 else 3600
            )
    return path


def report(path: Path, *options: str) -> tuple[int, Page]:
    target = path.with_suffix(".html")
    status = main(["report", str(path), "-o", str(target), *options])
    return status, Page(target.read_text("utf-8"))


def test_page_has_all_its_pictures_and_says_that_nothing_is_unusual(path: Path) -> None:
    status, page = report(path)
    assert status == 0
    assert set(page.headings) == PICTURES
    assert page.tags.count("svg") == len(PICTURES)
    assert "Nothing unusual." in page.text
    assert re.search(r"records\s+500\b", page.text)


def test_page_refers_to_nothing_outside_of_itself(path: Path) -> None:
    _, page = report(path)
    assert "script" not in page.tags
    assert page.references
    for reference in page.references:
        assert reference.startswith("data:") or reference[1:] in page.ids, reference
    assert len(set(page.ids)) == len(page.ids), "a name that two things have"


def test_page_shows_keys_and_names_as_text_and_never_as_markup(tmp_path: Path) -> None:
    path = tmp_path / "<b>&\x1b.kvs"
    with KVStore(path) as store:
        store.create("<script>alert(1)</script>", {})
        offset = store._words[store._slots.find(*_found(store)) + 40 >> 3] & 0xFFFF_FFFF
    with path.open("r+b") as file:
        file.seek(offset + 24)
        file.write(b"damaged!")
    status, page = report(path)
    assert status == 1
    assert not {"script", "b"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert "<b>&\\x1b.kvs" in page.text


def _found(store: KVStore) -> tuple[int, bytes]:
    key = b"<script>alert(1)</script>"
    return key_hash(key, store._seed), key


def test_damage_is_listed_and_ends_in_exit_status_1(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    place = contents.index(b"key 7{")
    contents[place + 10] ^= 1
    path.write_bytes(contents)
    status, page = report(path)
    assert status == 1
    assert "Damage" in page.headings
    assert "key 7" in page.text
    assert "kvstore-inspect verify names all of it" in page.text


def test_file_that_was_not_closed_is_shown_without_its_index(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    _, count, durable, *_ = STATE.unpack_from(contents, STATE_OFFSET)
    seed = IDENTITY.unpack_from(contents)[4]
    state = pack_state(False, count, durable, 0, 0, seed)
    contents[STATE_OFFSET : STATE_OFFSET + STATE.size] = state
    path.write_bytes(contents)
    status, page = report(path)
    assert status == 0
    assert "was not closed in order" in page.text
    assert set(page.headings) == PICTURES - {"Load of the segments", "Probe lengths"}
    assert re.search(r"records\s+500\b", page.text)


def test_page_goes_to_standard_output_and_the_store_is_never_overwritten(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_bytes()
    assert main(["report", str(path), "-o", "-"]) == 0
    assert set(Page(capsys.readouterr().out).headings) == PICTURES
    assert main(["report", str(path), "-o", str(path)]) == 2
    assert path.read_bytes() == before


def test_a_page_that_cannot_be_written_is_told_of_by_name_and_not_left_in_part(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said "[Errno 28] No space left on device", ended with 2, and left an empty page."""
    full = Path("/dev/full")
    if full.exists():
        assert main(["report", str(path), "-o", str(full)]) == 1
        assert capsys.readouterr().err == (
            "kvstore-inspect: /dev/full: the page could not be written: No space left on device\n"
        )
        assert full.is_char_device()
    assert main(["report", str(path), "-o", str(tmp_path / "missing" / "page.html")]) == 2
    assert "missing/page.html: No such file" in capsys.readouterr().err
    with mounted("tmpfs", tmp_path) as disk:
        page = disk / "page.html"
        fill(disk)
        assert main(["report", str(path), "-o", str(page)]) == 1
        said = capsys.readouterr().err
        assert f"{page}: the page could not be written: No space left on device" in said
        assert not page.exists()


def test_report_tells_how_many_bytes_the_page_has(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = path.with_suffix(".html")
    report(path)
    assert f"{page}: {page.stat().st_size:,} bytes\n" in capsys.readouterr().err


def test_survey_counts_what_is_in_the_file(path: Path, clock: FakeClock) -> None:
    path.unlink()
    with KVStore(path) as store:
        for number in range(1_000):
            store.create(f"{number}", {"text": "x" * 50}, ttl=(None, 30, 7_200)[number % 3])
        stats = store.stats()
    with open_view(path) as view:
        moment = clock.now_ms + 60_000
        by_slots = survey(view, moment, lambda _done, _whole: None)
        found = survey(view, moment, lambda _done, _whole: None, every_record=True)
        kinds = Counter(extent.kind for extent in extents(view))
        assert (found.slabs, found.free_extents) == (kinds[KIND_SLAB], kinds[KIND_FREE])
    assert (found.records, found.expired) == (667, 333)
    assert found.lifetimes == {NO_TTL: 334, 0: 333, 86_400: 333}
    assert sum(found.probes.values()) == sum(found.value_sizes.values()) == 667
    assert found.segments == kinds[KIND_SEGMENT] == stats.segments
    assert found.free_size == stats.free_size
    assert found.live_size + found.expired_size == stats.live_size
    assert (found.classes, found.value_sizes) == (by_slots.classes, by_slots.value_sizes)


def test_numbers_on_the_page_are_all_of_what_can_be_read(path: Path, clock: FakeClock) -> None:
    """It said "records 35,637" beside "with a time-to-live 42,733", which had expired in part."""
    path.unlink()
    with KVStore(path) as store:
        for number in range(90):
            store.create(f"{number}", {"text": "x" * 50}, ttl=(None, 30, 72_000)[number % 3])
    clock.advance(7_200)
    _, page = report(path)
    shown = " ".join(page.text.split())
    assert "records 60 " in shown
    assert "of these with a time-to-live 30 " in shown
    assert "expired, not yet taken back 30 " in shown
    assert "held by what has expired 2.8 KiB (2,880 B)" in shown


def test_pictures_have_a_number_on_every_bar_and_name_one_unit(path: Path) -> None:
    """The label of the tallest bar was left out, and low bars could not be read."""
    _, page = report(path)
    shown = page.text.split()
    with KVStore(path) as store:
        sizes = Counter(max(4, (len(store.read_bytes(key)) - 1).bit_length()) for key in store)
    for power, count in sizes.items():
        assert f"≤{2**power:,}" in shown
        assert str(count) in shown
    assert {"MiB", "KiB"} & set(shown)
    assert not re.search(r"\b[kM]B\b", page.text)


def test_page_does_not_give_the_hash_seed_away(path: Path) -> None:
    seed = IDENTITY.unpack_from(path.read_bytes())[4]
    assert main(["report", str(path), "-o", str(path.with_suffix(".html"))]) == 0
    text = path.with_suffix(".html").read_text("utf-8").lower()
    assert f"{seed:x}" not in text
    assert str(seed) not in text


def test_page_of_an_empty_store_says_that_there_is_none(path: Path) -> None:
    path.unlink()
    KVStore(path).close()
    status, page = report(path)
    assert status == 0
    assert "Nothing unusual." in page.text
    assert page.text.split().count("none") == 4


def test_file_that_is_mostly_free_is_advised_to_be_copied(path: Path) -> None:
    with KVStore(path) as store:
        for number in range(2_000):
            store.create(f"{number}", {"text": "x" * 15_000})
        for number in range(2_000):
            store.delete(f"{number}")
        assert store.stats().file_size > 16 * MIB
    _, page = report(path)
    assert "kvstore-inspect copy makes a compact copy" in page.text


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    """The command of a headless browser that says what goes to its console."""
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return [
        found,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]


def test_browser_shows_every_picture_without_an_error(path: Path, browser: list[str]) -> None:
    report(path)
    shown = subprocess.run(
        [*browser, "--dump-dom", path.with_suffix(".html").as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert set(Page(shown.stdout).headings) == PICTURES
    assert "CONSOLE" not in shown.stderr
