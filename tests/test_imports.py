"""Rooms import only from those below them, and nothing that is rarely used."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import pytest
from support import processes
from support.platforms import PLATFORM, needs_linux

import kvstore

# The rooms, low to high. `store` stands for the API: all modules that are in no room, but `errors`.
ROOMS: Final = ("errors", "format", "compiled", "file", "index", "recovery", "store", "adapters")
FOLDERS: Final = [room for room in ROOMS if room not in ("errors", "store")]
PACKAGE: Final = Path(kvstore.__file__).parent
SOURCES: Final = sorted(PACKAGE.rglob("*.py"))


def _name(source: Path) -> str:
    """Return the name of a module below `kvstore`; that of a room for its `__init__`."""
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _room(name: str) -> str:
    room = name.partition(".")[0]
    return room if room in ROOMS else "store"


def _imported(source: Path) -> Iterator[str]:
    """Yield the full names of the modules that this module of kvstore imports, wherever in it.

    Those that it only names types of are left out: they are imported by type checkers alone.
    """
    tree = ast.parse(source.read_text("utf-8"))
    for_types = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
    }
    package = ".".join(("kvstore", *source.relative_to(PACKAGE).parts[:-1]))
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, "another room is imported by its full name"
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            modules = [f"{base}.{alias.name}" for alias in node.names]
            yield from (each if _source(each) else base for each in modules)


def _source(module: str) -> Path | None:
    """Return the file of a module of this package; None where there is none of this name."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    sources = (place.with_suffix(".py"), place / "__init__.py")
    return next((source for source in sources if source.exists()), None)


def _own_imports(source: Path) -> set[str]:
    """Return the names below `kvstore` of what a module imports of this package."""
    return {
        name.removeprefix("kvstore").removeprefix(".") or "__init__"
        for name in _imported(source)
        if name.partition(".")[0] == "kvstore"
    }


def test_what_differs_by_operating_system_is_behind_one_seam() -> None:
    asks = re.compile(
        r"sys\.platform|os\.name|hasattr\((?:os|mmap|signal)\b|import (?:fcntl|resource)"
    )
    sources = [each for each in SOURCES if each.parent != PACKAGE / "file" / "platform"]
    assert len(sources) > 50
    assert [each for each in sources if asks.search(each.read_text("utf-8"))] == []


def test_every_room_is_known_and_stands_in_the_page_on_the_inside() -> None:
    assert {place.parent.name for place in PACKAGE.glob("*/__init__.py")} == set(FOLDERS)
    sources = Path(__file__).resolve().parents[1] / "src"
    page = (sources / "README.md").read_text("utf-8")
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| [`")]
    assert [room.split("`")[1].rstrip("/") for _, room, *_ in lines] == FOLDERS
    for _, room, _, modules, _ in lines:
        place = sources / "kvstore" / room.split("`")[1]
        names = modules.split("`")[1::2]
        assert names
        for name in names:
            assert any((place / f"{name}{ending}").exists() for ending in ("", ".py")), name


@pytest.mark.parametrize("source", SOURCES, ids=_name)
def test_a_room_imports_only_from_those_below_it(source: Path) -> None:
    name = _name(source)
    upward = {
        other
        for other in _own_imports(source)
        if ROOMS.index(_room(other)) > ROOMS.index(_room(name))
    }
    assert upward == set()


def test_modules_import_each_other_in_no_circle() -> None:
    imports = {_name(source): _own_imports(source) - {"__init__"} for source in SOURCES}
    tuple(TopologicalSorter(imports).static_order())  # raises CycleError


@pytest.mark.parametrize("source", SOURCES, ids=_name)
def test_the_core_never_imports_the_inspection_tool(source: Path) -> None:
    assert not {name for name in _imported(source) if name.startswith("kvstore_inspect")}
    assert "kvstore_inspect" not in source.read_text("utf-8")


USE: Final = """
import sys
from kvstore import KVStore
with KVStore(sys.argv[1]) as store:
    store.create("k", {"n": 1}, ttl=60)
    assert store.read("k") == {"n": 1}
    assert list(store) == ["k"]
    store.delete("k")
print(*sorted(sys.modules))
"""


def test_ordinary_use_imports_nothing_that_is_rarely_needed(path: Path) -> None:
    loaded = set(processes.run_python(USE, path).split())
    rare = {
        "argparse",
        "kvstore.__main__",
        "kvstore.adapters",
        "kvstore.recovery.check",
        "kvstore.location",
        "kvstore_inspect",
        "platformdirs",
    }
    if PLATFORM != "win32":  # each lock is asked for by it
        rare.add("ctypes")
    assert loaded & rare == set()


@needs_linux
def test_ctypes_is_loaded_as_a_durable_store_is_opened_and_for_no_other(path: Path) -> None:
    """At the first flush it would be too late: what it takes to load a module may be gone then."""
    use = """
import sys
import kvstore.file.platform
from kvstore import KVStore
kvstore.file.platform.system.overwrites_in_place = lambda _: True
for durable in (False, True):
    with KVStore(sys.argv[1], durable=durable) as store:
        print("ctypes" in sys.modules)
        loaded = set(sys.modules)
        store.create("key", {})
        store.delete("key")
    assert set(sys.modules) == loaded
"""
    assert processes.run_python(use, path).split() == ["False", "True"]


def test_importing_the_package_opens_no_store_and_loads_no_rare_module() -> None:
    loaded = set(processes.run_python("import kvstore, sys; print(*sys.modules)").split())
    assert (
        loaded & {"argparse", "kvstore.recovery.check", "kvstore.location", "platformdirs"} == set()
    )
