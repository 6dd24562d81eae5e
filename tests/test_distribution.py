"""What is published: under which name and version, and that nobody is told to install another's."""

import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

import kvstore

ROOT: Final = Path(__file__).resolve().parent.parent
# What a reader or a program may take an installing command from.
_SUFFIXES: Final = frozenset({".md", ".py", ".toml", ".pyx", ".pxi", ".j2"})
_PLACES: Final = ("src", "tools", "tests", "bench")
# `kvstore` as what is to be installed, with or without an extra, a version or an address.
_BY_NAME: Final = re.compile(
    r"""\b(?:pip|uv|pipx|poetry|conda)\b[^\n&;|]*?\b(?:install|add|run)\b[^\n&;|]*?"""
    r"""[\s'"`]kvstore(?:-mmap)?(?:\[|==|~=|>=|\s*@|['"`\s]|$)""",
    re.MULTILINE,
)
_WITH_EXTRA: Final = re.compile(r"(?<![\w/.])kvstore\[[a-z]+\]")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def test_distribution_has_a_name_of_its_own_and_the_version_that_the_package_names(
    project: dict[str, Any],
) -> None:
    """`kvstore` on PyPI is a client of Consul, whose module would be in this one's place."""
    assert project["name"] == "kvstore-mmap"
    assert project["version"] == kvstore.__version__
    assert list(project["scripts"]) == ["kvstore-inspect"]


def test_extras_ask_for_this_distribution_and_no_other(project: dict[str, Any]) -> None:
    wanted = [each for extra in project["optional-dependencies"].values() for each in extra]
    own = [each for each in wanted if each.startswith("kvstore")]
    assert own
    assert all(each.startswith("kvstore-mmap[") for each in own), own


def test_nothing_says_to_install_it_by_name() -> None:
    """It is not published yet: what a reader finds installs from a clone."""
    files = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    files += [file for place in _PLACES for file in sorted((ROOT / place).rglob("*"))]
    found = []
    for file in files:
        if file == Path(__file__) or not (file.suffix in _SUFFIXES or file.name == "run"):
            continue
        text = file.read_text("utf-8")
        found += [(file.name, each[0]) for each in _BY_NAME.finditer(text)]
        found += [(file.name, each[0]) for each in _WITH_EXTRA.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "pip install kvstore",
        "pip install 'kvstore[inspect]'",
        'python -m pip install -q "kvstore-mmap==1"',
        "uv add kvstore\n",
    ],
)
def test_what_would_install_it_by_name_is_known_when_it_is_seen(line: str) -> None:
    assert _BY_NAME.search(line)
    assert not _BY_NAME.search("pip install -q . && .venv/bin/python -m kvstore read k")
