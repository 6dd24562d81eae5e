"""The pages for users: their code runs and prints what it says, and what they list is all there."""

import builtins
import inspect
import re
import runpy
from pathlib import Path
from typing import Final

import pytest
from support.pages import PAGES, SOURCES, Section, expected_output, run_python, section, sections

import kvstore

SECTIONS: Final = [part for page in PAGES if page.stem != "REFERENCE" for part in sections(page)]
# Those that need what is made first, with the test that makes it and runs them.
RUN_ELSEWHERE: Final = {
    "A dict in a JSON file": "test_moving.py",
    "shelve": "test_moving.py",
    "diskcache": "test_moving.py",
    "SQLite": "test_moving.py",
    "Redis": "test_moving.py",
}
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_NOT_IN_ANCHORS: Final = re.compile(r"[^\w\- ]")


@pytest.mark.parametrize(
    "part",
    [part for part in SECTIONS if part.code("python") and part.heading not in RUN_ELSEWHERE],
    ids=str,
)
def test_the_python_of_a_section_runs_as_it_stands_and_prints_what_it_says(
    part: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, printed = run_python(part)
    assert printed.splitlines() == expected_output(part)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    return {
        _NOT_IN_ANCHORS.sub("", part.heading.lower()).replace(" ", "-") for part in sections(page)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text("utf-8"))
    for link in links:
        place, _, anchor = link.partition("#")
        if not place.startswith("https://"):
            target = (page.parent / place) if place else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_the_guide_leads_to_every_other_page() -> None:
    linked = set(_LINK.findall((SOURCES / "GUIDE.md").read_text("utf-8")))
    assert {page.name for page in PAGES if page.stem != "GUIDE"} <= linked


def test_the_reference_is_what_is_made_of_the_docstrings() -> None:
    """`python tools/build_reference.py` writes it anew."""
    pytest.importorskip("griffe2md")
    script = SOURCES.parent / "tools" / "build_reference.py"
    assert runpy.run_path(str(script))["reference"]() == (SOURCES / "REFERENCE.md").read_text(
        "utf-8"
    )


def test_every_error_stands_in_the_guide_with_what_to_do() -> None:
    table = section("GUIDE", "Every error, and what to do").text
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    listed = [row[0].strip().strip("`") for row in rows]
    errors = {
        name
        for name in kvstore.__all__
        if inspect.isclass(getattr(kvstore, name))
        and issubclass(getattr(kvstore, name), kvstore.KVStoreError)
    }
    assert sorted(set(listed) & errors) == sorted(errors)
    assert [name for name in listed if name.endswith("Error") and not _is_class(name)] == []
    assert all(cell.strip() for row in rows for cell in row)


def _is_class(name: str) -> bool:
    return hasattr(kvstore, name) or hasattr(builtins, name)


def test_every_number_that_stats_tells_is_explained() -> None:
    text = section("DEPLOYING", "What to watch").text
    assert [name for name in kvstore.StoreStats._fields if f"`{name}`" not in text] == []
