"""Memory: the heap does not grow with the records, and importing costs little."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from support import MIB, scaled
from support.disks import quick_folder
from support.files import size
from support.platforms import needs_linux
from support.processes import run_script

from kvstore import IMPLEMENTATION, KVStore

pytestmark = needs_linux  # reads /proc

# Memory of the process's own: what it maps of files is the system's to keep or to drop.
ANONYMOUS = """
def anonymous_bytes():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def test_heap_does_not_grow_with_the_number_of_records(path: Path) -> None:
    said = run_script(
        ANONYMOUS
        + """
with KVStore(sys.argv[1]) as store:
    text = "x" * 80
    for number in range(1_000):
        store.create(f"key:{number}", {"n": number, "text": text})
    few = anonymous_bytes()
    for number in range(1_000, 200_000):
        store.create(f"key:{number}", {"n": number, "text": text}, ttl=1_000_000)
    say(anonymous_bytes() - few)
    for number in range(0, 200_000, 1_000):
        assert store.read(f"key:{number}")["n"] == number
    assert len(store) == 200_000
    assert sum(1 for _ in store) == 200_000
    store.purge_expired()
    store.stats()
    say(anonymous_bytes() - few)
""",
        path,
    )
    for grown in said.split():
        assert int(grown) <= 2 * MIB


# Each makes `step(number)`, which is done for long; none needs more memory than its beginning.
HABITS = {
    "one hot key": """
def step(number):
    store.put("hot", {"n": number, "text": text[: number % 500]})
""",
    "rewriting": """
def step(number):
    store.put(f"key:{number % 5_000}", {"n": number, "text": text[: number % 500]}, ttl=1_000_000)
    if number % 20_000 == 0:
        store.sync()
""",
    "touching": """
def step(number):
    store.touch(f"key:{number % 5_000}", 1_000_000 + number)
""",
    "deleting and putting": """
def step(number):
    store.delete(f"key:{number % 5_000}")
    store.put(f"key:{number % 5_000}", {"n": number, "text": text})
    store.put(f"key:{number % 5_000}", {"n": -number})
    if number % 20_000 == 0:
        store.sync()
""",
    "popping and setting defaults": """
def step(number):
    store.pop(f"key:{number % 5_000}", None)
    store.setdefault(f"key:{number % 5_000}", {"n": number})
""",
    "batches": """
def step(number):
    store.put_many([(f"key:{number % 5_000}", {"n": number, "text": text})] * 3)
    store.get_many([f"key:{number % 5_000}"])
    store.delete_many([f"key:{number % 5_000}"])
    store.put_many({f"key:{number % 5_000}": {"n": number}})
""",
    "clearing": """
def step(number):
    store.put(f"key:{number % 5_000}", {"n": number, "text": text})
    if number % 10_000 == 0:
        store.clear()
""",
}


@pytest.mark.parametrize("habit", HABITS)
def test_heap_does_not_grow_however_often_keys_are_replaced(path: Path, habit: str) -> None:
    """What is superseded, retired or marked is so in the file, and in no table in memory."""
    said = run_script(
        ANONYMOUS
        + HABITS[habit]
        + """
text = "x" * 500
with KVStore(sys.argv[1]) as store:
    for number in range(5_000):
        store.create(f"key:{number}", {"n": number, "text": text})
    store.sync()
    for number in range(1_000):
        step(number)
    few = anonymous_bytes()
    for number in range(1_000, int(sys.argv[2])):
        step(number)
    say(anonymous_bytes() - few)
    assert len(store) <= 5_001
""",
        path,
        scaled(40_000 if IMPLEMENTATION == "plain" else 200_000),
    )
    assert int(said) <= 2 * MIB
    assert size(path) <= 64 * MIB


# What the test compares with: the third-party modules alone.
WITHOUT = """
import faulthandler, gc, os, signal, sys
import mmap, orjson, portalocker, xxhash
"""

WITH = """
import kvstore
store = kvstore.KVStore(sys.argv[1])
"""

REPORT = f"""
{ANONYMOUS}
modules = sorted(sys.modules)
print(anonymous_bytes(), *modules)
"""


def measure(script: str, path: Path) -> tuple[float, set[str]]:
    """Return the median of private memory at the end of the script, and what it has imported."""
    # Compiling takes memory, so only the first run may: here, whatever the environment says.
    compiled = {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(path.parent / "compiled"),
    }
    runs = [run_script(script, path, prelude="", **compiled) for _ in range(6)][1:]
    return median(int(said.split()[0]) for said in runs), set(runs[0].split()[1:])


def test_importing_and_opening_takes_little_memory_and_imports_nothing_rare(path: Path) -> None:
    with KVStore(path) as store:
        for number in range(100):
            store.create(f"{number}", {"n": number})
    without, modules_without = measure(WITHOUT + REPORT, path)
    with_kvstore, modules_with = measure(WITHOUT + WITH + REPORT, path)
    # Reached are 1.25 by Python 3.11, 1.35 in plain Python, 1.7 by 3.14. What the allocators keep
    # of what loading takes for a moment differs by 0.3 between environments of the same modules.
    assert with_kvstore - without <= 2.0 * MIB
    imported = modules_with - modules_without
    assert "kvstore.store" in imported
    rare = {
        "platformdirs",
        "argparse",
        "resource",
        "kvstore.recovery.check",
        "kvstore.backup",
        "kvstore.compacting",
        "kvstore.compiled.interface",
        "kvstore.location",
        "kvstore.moving",
        "kvstore.recovery.found_records",
        "kvstore.recovery.rebuild",
        "kvstore.__main__",
    }
    if IMPLEMENTATION == "compiled":
        rare |= {"kvstore.format.extent_records", "kvstore.format.segment"}
    assert not imported & rare
