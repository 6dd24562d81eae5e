"""`kvstore-inspect report`: a page of its own, which shows what is in the file."""

import os
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
from support.inspecting import DONE, PROBLEMS, WRONG_USAGE, inspect

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
from kvstore_inspect.commands import report as report_command
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
LISTS: Final = {"Key prefixes", "Largest values", "What expires next"}
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store of 500 records, a hundred of them with a time-to-live, and its page."""
    path = tmp_path_factory.mktemp("whole") / "whole.kvs"
    with KVStore(path) as store:
        for number in range(500):
            store.create(
                f"key {number}", {"text": "x" * (number * 7)}, ttl=None if number % 5 else 3600
            )
    page = path.with_suffix(".html")
    result = inspect("report", path, "-o", page)
    assert result == (DONE, "", f"{page}: {page.stat().st_size:,} bytes\n")
    return path


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page(whole.with_suffix(".html").read_text("utf-8"))


@pytest.fixture
def path(path: Path, whole: Path) -> Path:
    """A copy of the store."""
    shutil.copy(whole, path)
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> str:
    """A page that takes no time to draw, for tests of where it goes."""
    monkeypatch.setattr(report_command, "render", lambda *_: "a page")
    return "a page"


def report(path: Path) -> tuple[int, Page]:
    result = inspect("report", path, "-o", "-")
    return result.status, Page(result.out)


def test_page_has_all_its_pictures_and_says_that_nothing_is_unusual(page: Page) -> None:
    assert set(page.headings) == PICTURES | LISTS
    assert page.tags.count("svg") == len(PICTURES)
    assert "Nothing unusual." in page.text
    assert re.search(r"records\s+500\b", page.text)


def test_page_refers_to_nothing_outside_of_itself(page: Page) -> None:
    assert "script" not in page.tags
    assert page.references
    for reference in page.references:
        assert reference.startswith("data:") or reference[1:] in page.ids, reference
    assert len(set(page.ids)) == len(page.ids), "a name that two things have"


def test_page_shows_keys_and_names_as_text_and_never_as_markup(tmp_path: Path) -> None:
    path = tmp_path / ("<b>&\x1b.kvs" if os.name == "posix" else "&b;.kvs")
    with KVStore(path) as store:
        store.create("<script>alert(1)</script>", {})
        offset = store._file.words[store._parts.slots.find(*_found(store)) + 40 >> 3] & 0xFFFF_FFFF
    with path.open("r+b") as file:
        file.seek(offset + 24)
        file.write(b"damaged!")
    status, page = report(path)
    assert status == 1
    assert not {"script", "b"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert path.name.replace("\x1b", "\\x1b") in page.text


def _found(store: KVStore) -> tuple[int, bytes]:
    key = b"<script>alert(1)</script>"
    return key_hash(key, store._file.hash_seed), key


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
    assert set(page.headings) - LISTS == PICTURES - {"Load of the segments", "Probe lengths"}
    assert re.search(r"records\s+500\b", page.text)


def test_page_goes_to_standard_output_and_the_store_is_never_overwritten(
    path: Path, drawn: str
) -> None:
    before = path.read_bytes()
    assert inspect("report", path, "-o", "-") == (DONE, drawn, "")
    assert inspect("report", path, "-o", path).status == WRONG_USAGE
    assert path.read_bytes() == before


def test_a_page_that_cannot_be_written_is_told_of_by_name_and_not_left_in_part(
    path: Path, tmp_path: Path, drawn: str
) -> None:
    """It said "[Errno 28] No space left on device", ended with 2, and left an empty page."""
    full = Path("/dev/full")
    if os.name == "posix" and full.exists():
        assert inspect("report", path, "-o", full) == (
            PROBLEMS,
            "",
            "kvstore-inspect: /dev/full: the page could not be written: No space left on device\n",
        )
        assert full.is_char_device()
    missing = inspect("report", path, "-o", tmp_path / "missing" / "page.html")
    assert missing.status == WRONG_USAGE
    assert f"{Path('missing', 'page.html')}: No such file" in missing.err
    with mounted("tmpfs", tmp_path) as disk:
        page = disk / "page.html"
        fill(disk)
        result = inspect("report", path, "-o", page)
        assert result.status == PROBLEMS
        assert f"{page}: the page could not be written: No space left on device" in result.err
        assert not page.exists()


def test_page_says_what_info_says(path: Path) -> None:
    """Of a store that does not open it said that the next opening would rebuild the index."""
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"key 7{") + 10] ^= 1
    contents[STATE_OFFSET + 8] ^= 1
    path.write_bytes(contents)
    _, page = report(path)
    advice = inspect("info", path, "--json").json()["advice"]
    assert any("The store does not open as it is" in sentence for sentence in advice)
    for sentence in advice:
        assert sentence.replace("`", "") in page.text


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
    assert "held by what has expired 2.8 KiB 2,880 B " in shown


def test_pictures_have_a_number_on_every_bar_and_name_one_unit(path: Path, page: Page) -> None:
    """The label of the tallest bar was left out, and low bars could not be read."""
    shown = page.text.split()
    with KVStore(path) as store:
        sizes = Counter(max(4, (len(store.read_bytes(key)) - 1).bit_length()) for key in store)
    for power, count in sizes.items():
        assert f"≤{2**power:,}" in shown
        assert str(count) in shown
    assert {"MiB", "KiB"} & set(shown)
    assert not re.search(r"\b[kM]B\b", page.text)


def test_page_does_not_give_the_hash_seed_away(whole: Path) -> None:
    seed = IDENTITY.unpack_from(whole.read_bytes())[4]
    text = whole.with_suffix(".html").read_text("utf-8").lower()
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


def test_browser_shows_every_picture_without_an_error(whole: Path, browser: list[str]) -> None:
    shown = subprocess.run(
        [*browser, "--dump-dom", whole.with_suffix(".html").as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert set(Page(shown.stdout).headings) == PICTURES | LISTS
    assert "CONSOLE" not in shown.stderr
