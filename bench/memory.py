"""`memory`: what importing an engine costs, and what its records take of the process's own memory.

Measured is **private anonymous memory**: the sum of the `Anonymous:` fields of /proc/self/smaps
(Linux only), over all mappings but those of the engine's files. That is what the process has
written for itself: heap, stacks, changed pages of libraries. Pages of mapped files belong to the
page cache and are left out; those that were copied are counted apart.

Import: in a new interpreter each time, that has imported orjson, which the same work takes with any
engine; and for kvstore also what it adds, with a new store open, to its own libraries. Heap: a
process creates 1,000 records, is measured, goes on to a million or as far as the time allows, and
is measured again. Keys are made one at a time, values come from a small pool.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from engines import ENGINES, Kind, OpenEngine
from engines.atomic import find_extension
from filling import Records
from workers import Plan, Say, Skipped, Worker, in_turns, noting_failure, show_spread, spread

from harness import markdown_table

VALUE_SIZE: Final = 100
FIRST_RECORDS: Final = 1000
RECORDS: Final = 1_000_000
QUICK_RECORDS: Final = 20_000
ALLOWANCE: Final = 35.0  # seconds to create them
QUICK_ALLOWANCE: Final = 0.5
ROUNDS: Final = 7  # of imports
PATIENCE: Final = 120.0
KVSTORE_LIBRARIES: Final = ("mmap", "orjson", "portalocker", "xxhash")

# Imports nothing that an engine would have to bring. The first look at the memory makes what
# looking takes. Arguments: libraries that are to be there, module, one more folder to find it in or
# nothing, file for a store or nothing.
_IMPORT_PROGRAM: Final = """
import sys
from time import perf_counter
def anonymous():
    total = 0
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            if line.startswith(b"Anonymous:"):
                total += int(line.split()[1]) * 1024
    return total
libraries, module, folder, path = sys.argv[1:]
for library in libraries.split():
    __import__(library)
if folder:
    sys.path.append(folder)
anonymous()
before, modules = anonymous(), len(sys.modules)
begin = perf_counter()
imported = __import__(module)
seconds = perf_counter() - begin
figures = [seconds, len(sys.modules) - modules, anonymous() - before]
if path:
    store = imported.KVStore(path)
    figures.append(anonymous() - before)
    store.close()
print(figures)
"""


def read_anonymous(directory: Path) -> tuple[int, int]:
    """Return the bytes of anonymous memory of this process: outside and inside of files there."""
    totals = {False: 0, True: 0}
    name = os.fsencode(directory.resolve()) + b"/"
    is_inside = False
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            field = line.split(None, 1)[0]
            if field == b"Anonymous:":
                totals[is_inside] += int(line.split()[1]) * 1024
            elif not field.endswith(b":"):  # the heading of the next mapping
                is_inside = name in line
    return totals[False], totals[True]


def hold(
    open_engine: OpenEngine, say: Say, directory: Path, records: int, seconds: float
) -> dict[str, int]:
    """Task: create records, as many as the time allows; return the memory early on and then."""
    directory.mkdir()
    store = open_engine(directory)
    known = Records(VALUE_SIZE)
    known.fill(store, range(FIRST_RECORDS), seconds, say)
    gc.collect()
    early, _ = read_anonymous(directory)
    created = known.fill(store, range(FIRST_RECORDS, records), seconds, say)
    gc.collect()
    late, of_files = read_anonymous(directory)
    store.close()
    return {
        "records": FIRST_RECORDS + created,
        "early_bytes": early,
        "late_bytes": late,
        "growth_bytes": late - early,
        "of_files_bytes": of_files,
    }


def measure(plan: Plan) -> dict[str, Any]:
    """Import in turns, then let each engine hold its records.

    Raises:
        Skipped: this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise Skipped("/proc/self/smaps is Linux's")
    records, seconds = (QUICK_RECORDS, QUICK_ALLOWANCE) if plan.quick else (RECORDS, ALLOWANCE)
    errors: dict[str, str] = {}
    imports, beyond = _measure_imports(plan)
    heap: dict[str, dict[str, int]] = {}
    for engine in plan.engines:
        with noting_failure(errors, engine), Worker(engine, plan.progress, PATIENCE) as worker:
            heap[engine] = worker.call(hold, plan.place / engine, records, seconds)
    return {
        "value_size": VALUE_SIZE,
        "first_records": FIRST_RECORDS,
        "records": records,
        "imports": imports,
        "beyond_libraries": beyond,
        "heap": heap,
        "errors": errors,
    }


def _measure_imports(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what importing each engine adds to nothing, and each kvstore to its libraries."""
    rounds = plan.rounds or (1 if plan.quick else ROUNDS)
    own = [engine for engine in plan.engines if ENGINES[engine].module == "kvstore"]
    alone: dict[str, list[list[float]]] = {engine: [] for engine in plan.engines}
    beyond: dict[str, list[list[float]]] = {engine: [] for engine in own}
    store = plan.place / "new"
    for number, engine in in_turns(plan.engines, rounds + 1):
        figures = [_import(plan, engine)]
        if engine in beyond:
            figures.append(_import(plan, engine, KVSTORE_LIBRARIES, store))
            store.unlink()
        if number:  # the first round compiles the modules, which takes memory
            alone[engine].append(figures[0])
            if engine in beyond:
                beyond[engine].append(figures[1])
    return (
        {engine: _spreads(figures) for engine, figures in alone.items()},
        {engine: _spreads(figures) for engine, figures in beyond.items()},
    )


def _spreads(figures: list[list[float]]) -> dict[str, dict[str, float]]:
    names = ("seconds", "modules", "bytes", "bytes_with_store_open")
    columns = zip(*figures, strict=True)
    return {name: spread(column) for name, column in zip(names, columns, strict=False)}


def _import(
    plan: Plan, engine: str, libraries: Sequence[str] = ("orjson",), store: Path | None = None
) -> list[float]:
    plan.progress.show(f"{engine}: importing")
    kind = ENGINES[engine]
    compiled = {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(plan.place / "compiled"),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-c", _IMPORT_PROGRAM),
            *(" ".join(libraries), kind.module, _folder_of(kind), str(store or "")),
        ],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, **compiled, **kind.environment},
    )
    figures: list[float] = json.loads(done.stdout)
    return figures


def _folder_of(kind: Kind) -> str:
    """Return the folder of a module that is not to be found by its name alone, else nothing."""
    spec = kind.find(kind.module) if kind.find is find_extension else None
    return str(Path(spec.origin).parent) if spec is not None and spec.origin else ""


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as tables: imports, what kvstore adds to its libraries, heap."""
    imports = markdown_table(
        ["import, beyond orjson", "ms", "modules", "MiB"],
        [
            [
                engine,
                show_spread({name: each * 1e3 for name, each in figures["seconds"].items()}),
                f"{figures['modules']['median']:.0f}",
                _mebibytes(figures["bytes"]["median"]),
            ]
            for engine, figures in result["imports"].items()
        ],
    )
    beyond = markdown_table(
        [f"beyond {', '.join(KVSTORE_LIBRARIES)}", "import, MiB", "with a new store open, MiB"],
        [
            [
                engine,
                _mebibytes(figures["bytes"]["median"]),
                _mebibytes(figures["bytes_with_store_open"]["median"]),
            ]
            for engine, figures in result["beyond_libraries"].items()
        ],
    )
    heap = markdown_table(
        [
            "private memory",
            f"with {result['first_records']:,} records, MiB",
            "records at the end",
            "with these, MiB",
            "growth, MiB",
        ],
        [
            [engine, "–", "–", "–", result["errors"][engine]]
            if engine in result["errors"]
            else [
                engine,
                _mebibytes(result["heap"][engine]["early_bytes"]),
                f"{result['heap'][engine]['records']:,}",
                _mebibytes(result["heap"][engine]["late_bytes"]),
                _mebibytes(result["heap"][engine]["growth_bytes"]),
            ]
            for engine in result["imports"]
        ],
    )
    return "\n\n".join([imports, beyond, heap] if result["beyond_libraries"] else [imports, heap])


def _mebibytes(size: float) -> str:
    return f"{size / (1 << 20):.2f}"
