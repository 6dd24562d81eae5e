"""The pages for users: their code runs and prints what it says, and what they list is all there."""

import builtins
import inspect
import re
import runpy
from pathlib import Path
from typing import Final

import pytest
from support.clock import FakeClock
from support.pages import (
    PAGES,
    SOURCES,
    expected_output,
    run_python,
    run_shell,
    section,
    sections,
)

import kvstore

_CODE: Final = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_NOT_IN_ANCHORS: Final = re.compile(r"[^\w\- ]")


@pytest.mark.parametrize("page", ["GUIDE", "RECIPES", "DEPLOYING"])
def test_who_follows_a_page_from_top_to_bottom_sees_what_it_says(
    page: str, tmp_path: Path, clock: FakeClock
) -> None:
    for part in sections(SOURCES / f"{page}.md"):
        _, printed = run_python(part)
        assert (str(part), printed.splitlines()) == (str(part), expected_output(part))
        if part.code("sh"):
            result = run_shell(part, tmp_path / "bin")
            assert result.returncode == 0, (str(part), result.stdout, result.stderr)


def test_the_programs_of_the_guide_can_be_run_again(
    clock: FakeClock,
) -> None:
    for part in sections(SOURCES / "GUIDE.md"):
        for _ in range(2):
            assert run_python(part)[1].splitlines() == expected_output(part)


def test_no_section_has_code_that_nothing_runs() -> None:
    """Blocks of `console` need what a test has not: a network, a server, a new environment."""
    for page in PAGES:
        languages = {block.language for part in sections(page) for block in part.blocks}
        assert languages <= {"python", "sh", "console", "text", "pycon"}
    tested = Path(__file__).with_name("test_moving.py").read_text("utf-8")
    for part in sections(SOURCES / "MOVING.md"):
        assert not part.blocks or f'"{part.heading}"' in tested


def _links(page: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", page.read_text("utf-8")))


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    return {
        _NOT_IN_ANCHORS.sub("", part.heading.lower()).replace(" ", "-") for part in sections(page)
    }


@pytest.mark.parametrize("page", [*PAGES, SOURCES.parent / "README.md"], ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in _links(page):
        place, _, anchor = link.partition("#")
        if not place.startswith("https://"):
            target = (page.parent / place) if place else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_the_guide_leads_to_every_other_page() -> None:
    assert {page.name for page in PAGES if page.stem != "GUIDE"} <= {*_links(SOURCES / "GUIDE.md")}


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
