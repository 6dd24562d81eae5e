"""How much private memory the store takes: for each record, and for importing and opening it.

Measured is **private anonymous memory**: the sum of the `Anonymous:` fields of /proc/self/smaps
(Linux only), over all mappings but those of the data file. That is what the process has written for
itself: heap, stacks, changed pages of libraries. Pages of the data file belong to the page cache
and are left out; those that were copied, which there should be none of, are counted apart.

Growth: a child creates 1,000 records, is measured, goes on to a million, is measured again.
Keys are made one at a time, values come from a small pool. Import: in a child that has imported
nothing but orjson, portalocker, xxhash and mmap, the difference that `import kvstore` and opening a
new store make; the median of several such children.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, Final

from harness import (
    Progress,
    describe_machine,
    key_of,
    machine_line,
    make_parser,
    make_values,
    markdown_table,
    save,
    scratch_directory,
)

VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 100
FIRST_RECORDS: Final = 1000

# What the import child runs. It imports nothing else, so that nothing is there already that kvstore
# would have to bring.
_IMPORT_PROGRAM: Final = """
import sys
def anonymous():
    total = 0
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            if line.startswith(b"Anonymous:"):
                total += int(line.split()[1]) * 1024
    return total
import mmap, orjson, portalocker, xxhash
anonymous()
before, modules = anonymous(), set(sys.modules)
from kvstore import KVStore
imported = anonymous()
store = KVStore(sys.argv[1])
opened = anonymous()
added = sorted(set(sys.modules) - modules)
store.close()
print(orjson.dumps([before, imported - before, opened - before, added]).decode())
"""


def read_anonymous(data_file: Path) -> tuple[int, int]:
    """Return the bytes of anonymous memory of this process: outside and inside the data file."""
    outside = inside = 0
    name = str(data_file).encode()
    is_inside = False
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            field = line.split(None, 1)[0]
            if field == b"Anonymous:":
                size = int(line.split()[1]) * 1024
                if is_inside:
                    inside += size
                else:
                    outside += size
            elif not field.endswith(b":"):  # the heading of the next mapping
                is_inside = line.rstrip().endswith(name)
    return outside, inside


def load(path: Path, records: int) -> None:
    """In a child: create `records` records; print the memory early on and at the end."""
    from kvstore import KVStore

    values = cycle(make_values(VALUE_SIZE, DISTINCT_VALUES))
    store = KVStore(path)
    measured = []
    for first, end in ((0, FIRST_RECORDS), (FIRST_RECORDS, records)):
        for index in range(first, end):
            store.create(key_of(index), next(values))
        gc.collect()
        measured.append(read_anonymous(path))
    (early, _), (late, inside) = measured
    store.close()
    print(json.dumps({"early_bytes": early, "late_bytes": late, "data_file_bytes": inside}))


def _run(place: Path, *command: str) -> Any:
    # As installed: compiled beforehand, here by the first child. Compiling takes memory.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(place / "compiled")}
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, **compiled},
    )
    return json.loads(done.stdout)


def measure_growth(place: Path, records: int) -> dict[str, Any]:
    """Return the memory after the first thousand records, after all, and the difference."""
    result: dict[str, Any] = _run(
        place, __file__, "--child", str(place / "growth.kvs"), str(records)
    )
    result["records"] = records
    result["growth_bytes"] = result["late_bytes"] - result["early_bytes"]
    return result


def measure_import(place: Path, rounds: int, progress: Progress) -> dict[str, Any]:
    """Return what importing kvstore and opening a new store adds."""
    measured = []
    for number in range(-1, rounds):  # the first one only compiles the modules
        progress.show(f"importing and opening: {number + 1} of {rounds}")
        measured.append(_run(place, "-c", _IMPORT_PROGRAM, str(place / f"import{number}.kvs")))
    before, imported, opened, added = zip(*measured[1:], strict=True)
    return {
        "rounds": rounds,
        "libraries_bytes": median(before),
        "imported_bytes": median(imported),
        "opened_bytes": median(opened),
        "opened_range_bytes": [min(opened), max(opened)],
        "modules_added": added[0],
    }


def format_results(growth: dict[str, Any], added: dict[str, Any]) -> str:
    """Return the figures as a table."""

    def mebibytes(size: float) -> str:
        return f"{size / (1 << 20):.2f}"

    rows = {
        "orjson, portalocker, xxhash and mmap imported": added["libraries_bytes"],
        "… more with kvstore imported": added["imported_bytes"],
        "… more with a new store open": added["opened_bytes"],
        f"a store with {FIRST_RECORDS:,} records": growth["early_bytes"],
        f"the same with {growth['records']:,} records": growth["late_bytes"],
        "… growth": growth["growth_bytes"],
        "anonymous pages of the data file": growth["data_file_bytes"],
    }
    return markdown_table(
        ["private anonymous memory", "MiB"],
        [[name, mebibytes(size)] for name, size in rows.items()],
    )


def main() -> None:
    """Measure, print and save."""
    parser = make_parser("memory", __doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, help="(default: 1,000,000)")
    parser.add_argument("--rounds", type=int, help="children that import (default: 11)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        path, records = arguments.child
        load(Path(path), int(records))
        return
    records = arguments.records or (50_000 if arguments.quick else 1_000_000)
    rounds = arguments.rounds or (3 if arguments.quick else 11)
    progress = Progress()
    with scratch_directory(arguments.dir) as place:
        machine = describe_machine(place, ["kvstore", "orjson", "xxhash", "portalocker"])
        added = measure_import(place, rounds, progress)
        progress.show(f"creating {records:,} records")
        growth = measure_growth(place, records)
    progress.clear()
    print(machine_line(machine))
    print()
    print(format_results(growth, added))
    print(f"\nmodules added: {', '.join(added['modules_added'])}")
    save("memory", arguments, {"machine": machine, "growth": growth, "import": added})


if __name__ == "__main__":
    main()
