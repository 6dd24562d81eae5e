"""The pages for users in `src`: their sections, and the code in these, run as a reader would.

Each block of Python is a program of its own, and blocks of a shell are run as they stand, with
`python` and `kvstore-inspect` those of this test run. What comments say, as in ``print(…)  # this``
or ``…  # prints: this``, is what the programs of a section print.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from .inspecting import inspector
from .processes import PATIENCE_SECONDS

SOURCES: Final = Path(__file__).resolve().parents[2] / "src"
PAGES: Final = tuple(
    SOURCES / f"{name}.md" for name in ("GUIDE", "RECIPES", "MOVING", "DEPLOYING", "REFERENCE")
)

_HEADING: Final = re.compile(r"^(#{1,4}) (.+)$")
_FENCE: Final = re.compile(r"^```(\w*)$")
_PRINTS: Final = re.compile(
    r"^\s*(?:print\(.*\)  # (?!prints: )|.*  # prints: )(.*)$", re.MULTILINE
)


class Block(NamedTuple):
    """A block of code: its language, its text, and the line of the page that it begins at."""

    language: str
    text: str
    line: int


class Section(NamedTuple):
    """What is between two headings of a page."""

    page: Path
    heading: str
    text: str
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.page.stem}, {self.heading}"

    def code(self, language: str) -> tuple[Block, ...]:
        """Return the blocks in a language."""
        return tuple(block for block in self.blocks if block.language == language)


def sections(page: Path) -> Iterator[Section]:
    """Yield the sections of a page, what comes before the first heading under its title."""
    lines: list[str] = []
    blocks: list[Block] = []
    heading, fence = "", None
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if fence is not None:
            if line == "```":
                language, begin = fence
                blocks.append(Block(language, "\n".join(lines[begin:]) + "\n", number - 1))
                fence = None
        elif opening := _FENCE.match(line):
            fence = opening[1], len(lines) + 1
        elif title := _HEADING.match(line):
            if heading:
                yield Section(page, heading, "\n".join(lines), tuple(blocks))
            heading, lines, blocks = title[2], [], []
            continue
        lines.append(line)
    assert fence is None, f"{page}: a block does not end"
    yield Section(page, heading, "\n".join(lines), tuple(blocks))


def section(page: str, heading: str) -> Section:
    """Return the section of this heading."""
    (found,) = (each for each in sections(SOURCES / f"{page}.md") if each.heading == heading)
    return found


def run_python(part: Section) -> tuple[dict[str, Any], str]:
    """Run a section's Python in the current folder; return its names and what it printed."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for block in part.code("python"):
            program: dict[str, Any] = {"__name__": "page"}
            first = block.line - block.text.count("\n")
            exec(compile("\n" * first + block.text, part.page, "exec"), program)
            names |= program
    return names, printed.getvalue()


def run_shell(part: Section, commands: Path, **clients: str) -> "subprocess.CompletedProcess[str]":
    """Run a section's lines of a shell in the current folder, up to the first that fails.

    In the folder `commands` is put what has the names that these use.
    """
    commands.mkdir(exist_ok=True)
    this = f'"{sys.executable}" -W error'
    own = {"python": this, "kvstore-inspect": f"{this} -m kvstore_inspect"}
    for name, command in {**own, **clients}.items():
        script = commands / name.replace("_", "-")
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o700)
    return subprocess.run(
        ["sh", "-e", "-c", "".join(block.text for block in part.code("sh"))],
        env=inspector(PATH=f"{commands}{os.pathsep}{os.environ['PATH']}"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def names_of(page: str, heading: str) -> Any:
    """Run a section's Python in the current folder; return its names as attributes."""
    return SimpleNamespace(**run_python(section(page, heading))[0])


def expected_output(part: Section) -> list[str]:
    """Return what the comments in a section's Python say that it prints, line by line."""
    return [line for block in part.code("python") for line in _PRINTS.findall(block.text)]
