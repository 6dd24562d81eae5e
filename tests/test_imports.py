"""Modules import only from those below them, and nothing that is rarely used."""

import ast
import sys
from pathlib import Path
from typing import Final

import pytest
from support import children

import kvstore

# Low to high, as in the design.
ORDER: Final = (
    "errors",
    "layout",
    "codec",
    "clock",
    "undo",
    "headers",
    "_hot",
    "implementation",
    "reentry",
    "filelock",
    "flushing",
    "disk",
    "scan",
    "notes",
    "soundness",
    "evidence",
    "datafile",
    "extents",
    "slab",
    "segment",
    "slots",
    "table",
    "recovery",
    "problem",
    "check",
    "location",
    "stats",
    "views",
    "operations",
    "store",
    "__main__",
)
PACKAGE: Final = Path(kvstore.__file__).parent
SOURCES: Final = sorted(PACKAGE.glob("*.py"))


def _imported(source: Path) -> set[str]:
    """Return the full names of the modules that this module of kvstore imports, wherever in it.

    Those that it only names types of are left out: they are imported by type checkers alone.
    """
    names = set()
    tree = ast.parse(source.read_text("utf-8"))
    for_types = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ("kvstore" if node.level else "", node.module)))
            names |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place_in_the_order() -> None:
    assert {source.stem for source in SOURCES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_module_imports_only_from_those_below_it(source: Path) -> None:
    below = ORDER if source.stem == "__init__" else ORDER[: ORDER.index(source.stem)]
    own = {name for name in _imported(source) if name.split(".")[0] == "kvstore"}
    allowed = {f"kvstore.{name}" for name in below}
    if source.stem == "__main__":
        allowed.add("kvstore")
    assert own <= allowed


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
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
    loaded = set(children.run_python(USE, path).split())
    rare = {
        "argparse",
        "ctypes",
        "kvstore.__main__",
        "kvstore.check",
        "kvstore.location",
        "kvstore_inspect",
        "platformdirs",
    }
    assert loaded & rare == set()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not used at all")
def test_ctypes_is_loaded_as_a_durable_store_is_opened_and_for_no_other(path: Path) -> None:
    """At the first flush it would be too late: what it takes to load a module may be gone then."""
    use = """
import sys
import kvstore.datafile
from kvstore import KVStore
kvstore.datafile.overwrites_in_place = lambda _: True
for durable in (False, True):
    with KVStore(sys.argv[1], durable=durable) as store:
        print("ctypes" in sys.modules)
        loaded = set(sys.modules)
        store.create("key", {})
        store.delete("key")
    assert set(sys.modules) == loaded
"""
    assert children.run_python(use, path).split() == ["False", "True"]


def test_importing_the_package_opens_no_store_and_loads_no_rare_module() -> None:
    loaded = set(children.run_python("import kvstore, sys; print(*sys.modules)").split())
    assert loaded & {"argparse", "kvstore.check", "kvstore.location", "platformdirs"} == set()
