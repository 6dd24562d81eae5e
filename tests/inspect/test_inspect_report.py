"""`kvstore-inspect report`: a page of its own, which shows what is in the file."""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
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
from kvstore_inspect.terminal import escaped

PICTURES: Final = {
    "Map of the file",
    "Value sizes",
    "Space by size class",
    "Expiry over time",
    "Load of the segments",
    "Probe lengths",
}
# Markup, text from right to left, what a terminal obeys, wide and stacked characters.
HOSTILE: Final = (
    "<script>alert(1)</script>",
    "</bdi></table><h1>&amp;&#60;",
    "\"quoted'{{ 7 * 7 }}",
    "W" * 32,
    "W" * 15 + ":" + "W" * 16,
    "漢" * 32,
    "\U0001f680" * 32,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufdfd" * 32,
    "a" + "\u0301" * 31,
    "\u0645\u0631\u062d\u0628\u0627:1",
    "\u202egnp.exe",
    "\n\t\x1b[31m",
    "   ",
)
LISTED: Final = 10  # keys in each list of a page
PHONE: Final = 360
WIDTHS: Final = (PHONE, 1_280)
SMALLEST_LETTERS: Final = 11  # pixels
LEAST_CONTRAST: Final = 4.5  # of letters, as WCAG 2 has it at level AA
# Says of each width how wide the page is then, and what of it sticks out, is cut off, or is small.
_MEASURE: Final = """<!doctype html><meta charset="utf-8"><pre></pre><script>
const html = HTML, found = {};
function measure(frame, width) {
  const page = frame.contentDocument;
  const here = {width: page.documentElement.scrollWidth, outside: [], cut: [], letters: []};
  for (const each of page.body.querySelectorAll("*")) {
    const box = each.getBoundingClientRect(), what = each.outerHTML.slice(0, 90);
    const around = each.tagName == "text" && each.ownerSVGElement.getBoundingClientRect();
    if (box.left < 0 || box.right > width + 0.5) here.outside.push(what);
    if (around ? box.left < around.left - 0.5 || box.right > around.right + 0.5
               : each.clientWidth && each.scrollWidth > each.clientWidth + 1) here.cut.push(what);
    if ([...each.childNodes].some(node => node.nodeType == 3 && node.data.trim())) {
      const drawn = each.getScreenCTM && each.getScreenCTM();
      const scale = drawn ? Math.hypot(drawn.a, drawn.b) : 1;
      const size = parseFloat(frame.contentWindow.getComputedStyle(each).fontSize);
      here.letters.push(scale * size);
    }
  }
  here.letters = Math.min(...here.letters);
  found[width] = here;
  document.querySelector("pre").textContent = JSON.stringify(found);
}
for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 30000px; border: 0`;  // without a scroll bar
  frame.onload = () => measure(frame, width);
  frame.srcdoc = html;
  document.body.append(frame);
}
</script>"""
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


def shown(browser: list[str], page: Path) -> str:
    """Return what a browser makes of a page; there is nothing that it complains about."""
    done = subprocess.run(
        [*browser, "--dump-dom", page.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    return done.stdout


def test_browser_shows_every_picture_without_an_error(whole: Path, browser: list[str]) -> None:
    page = Page(shown(browser, whole.with_suffix(".html")))
    assert set(page.headings) == PICTURES | LISTS


# --- what is in the store ------------------------------------------------------------------------


@pytest.fixture(params=[HOSTILE[:LISTED], HOSTILE[-LISTED:]], ids=["first", "last"])
def hostile(request: pytest.FixtureRequest, path: Path) -> Path:
    """A page whose lists are of hostile keys, in a file with a hostile name."""
    path = path.with_name("W" * 60 + "<i>\u0301.kvs")
    with KVStore(path) as store:
        for number, key in enumerate(request.param):
            store.put(key, {"text": "x" * number}, ttl=1000 + number)
    page = path.with_name("hostile.html")
    assert inspect("report", path, "-o", page).status == DONE
    return page


def test_hostile_keys_are_shown_as_text_that_says_what_they_are(hostile: Path) -> None:
    text = hostile.read_text("utf-8")
    page = Page(text)
    assert not {"script", "h3", "i"} & set(page.tags)
    assert page.tags.count("h1") == 1
    with KVStore(next(hostile.parent.glob("*W<i>*.kvs"))) as store:
        for key in store:
            assert escaped(key) in page.text
    assert not any(character in text for character in "\x1b\t\u202e\u200d")


def test_no_key_breaks_the_page_on_a_phone_or_a_wide_screen(
    hostile: Path, browser: list[str], tmp_path: Path
) -> None:
    html = json.dumps(hostile.read_text("utf-8")).replace("</", "<\\/")
    measure = tmp_path / "measure.html"
    measure.write_text(
        _MEASURE.replace("HTML", html, 1).replace("WIDTHS", json.dumps(WIDTHS)), "utf-8"
    )
    found = json.loads(unescape(re.findall("<pre>(.*?)</pre>", shown(browser, measure))[0]))
    for width in WIDTHS:
        here = found[str(width)]
        assert here["width"] == width
        assert here["outside"] == []
        assert here["cut"] == []
        assert here["letters"] >= SMALLEST_LETTERS


def _colours(style: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style))


def _light(colour: str) -> float:
    """Return the relative luminance of a colour."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_what_is_behind_them(whole: Path, scheme: str) -> None:
    style = whole.with_suffix(".html").read_text("utf-8").partition("</style>")[0]
    light, _, dark = style.partition("prefers-color-scheme: dark")
    colours = _colours(light) | (_colours(dark) if scheme == "dark" else {})
    pairs = [("faint", "page"), ("faint", "card")]
    pairs += [("text", behind) for behind in ("page", "card", "note", "fine", "key")]
    for letters, behind in pairs:
        darker, lighter = sorted((_light(colours[letters]), _light(colours[behind])))
        assert (lighter + 0.05) / (darker + 0.05) >= LEAST_CONTRAST, (letters, behind)


def test_page_says_what_the_store_holds_by_prefix(path: Path, clock: FakeClock) -> None:
    path.unlink()
    with KVStore(path) as store:
        store.put_many((f"user:{number}", {"text": "x" * 20}) for number in range(75))
        store.put_many((f"job:{number}", {"text": "x" * 20}) for number in range(25))
        store.put("expired:1", {"text": "x" * 20}, ttl=1)
    clock.advance(2)
    _, page = report(path)
    shown = " ".join(page.text.split())
    assert "expired:" not in shown
    assert re.search(r"user: 75 \S+ KiB 75%", shown)
    assert re.search(r"job: 25 \S+ KiB 25%", shown)


def test_page_names_the_largest_values_and_the_keys_that_expire_next(page: Page) -> None:
    """Of 500 values, each is larger than the one before it, and every fifth expires in an hour."""
    shown = " ".join(page.text.split())
    largest = shown.partition("Largest values")[2].partition("What expires next")[0]
    assert re.findall(r"key (\d+) [\d,]+ ", largest) == [str(499 - place) for place in range(10)]
    expiring = shown.partition("What expires next")[2].partition("Map of the file")[0]
    assert "an hour 100 " in expiring
    assert "a week 100 " in expiring
    named = re.findall(r"key (\d+) ", expiring)
    assert len(named) == 10
    assert all(int(number) % 5 == 0 for number in named)


def test_page_of_keys_that_never_expire_says_so(path: Path) -> None:
    path.unlink()
    with KVStore(path) as store:
        store.put("user:1", {"name": "Ada"})
    _, page = report(path)
    assert "No key has a time-to-live." in page.text
