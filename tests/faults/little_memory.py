"""A store of many times the memory that its process may use, in a memory cgroup of 64 MiB."""

import functools
import itertools
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from support import MIB
from support.workload import make_value

from kvstore import KVStore

from .laboratory import Experiment

LIMIT: Final = 64 * MIB
# What the interpreter grows by, of its own memory, whatever the size of the store.
MOST_PRIVATE: Final = 24 * MIB
VALUE_SIZE: Final = 15_900

_CGROUPS: Final = Path("/sys/fs/cgroup")
_numbers = itertools.count()


class MemoryGroup:
    """A control group that limits memory, of version 1 or 2, below one of this process's own.

    Raises:
        OSError: there are none here, or they cannot be made.
    """

    def __init__(self, limit: int) -> None:
        parent, self._version = _parent()
        self._folder = parent / f"kvstore-test-{os.getpid()}-{next(_numbers)}"
        self._folder.mkdir()
        try:
            if self._version == 2:
                self._write("memory.max", limit)
                with suppress(OSError):  # a kernel without swap does not have it
                    self._write("memory.swap.max", 0)
            else:
                self._write("memory.limit_in_bytes", limit)
                with suppress(OSError):
                    self._write("memory.swappiness", 0)
                with suppress(OSError):
                    self._write("memory.memsw.limit_in_bytes", limit)
        except BaseException:
            self._folder.rmdir()
            raise

    def enter(self) -> None:
        """Put this process into the group."""
        self._write("cgroup.procs", os.getpid())

    def killed(self) -> int:
        """Return how many processes the kernel ended for want of memory."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        fields = dict(line.split() for line in (self._folder / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0))

    def most_used(self) -> int:
        """Return the most bytes that were in use, page cache included; 0 if it does not tell."""
        name = "memory.peak" if self._version == 2 else "memory.max_usage_in_bytes"
        with suppress(OSError):
            return int((self._folder / name).read_text())
        return 0

    def remove(self) -> None:
        """Remove the group, whose processes have ended."""
        self._folder.rmdir()

    def _write(self, name: str, value: int) -> None:
        (self._folder / name).write_text(f"{value}\n")


def _parent() -> tuple[Path, int]:
    """Return the folder to make groups in, and the version."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        # 4:memory:/some/group in version 1, 0::/some/group in version 2
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _CGROUPS / "memory" / group.lstrip("/"), 1
    # Version 2 gives controllers only to groups that their parent has them given to, and that
    # parent has no processes of its own: the nearest such group above this process.
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        own = _CGROUPS / group.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(_CGROUPS):
                break
            control = folder / "cgroup.subtree_control"
            if control.exists() and "memory" in control.read_text().split():
                return folder, 2
    raise FileNotFoundError("no memory controller")


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    group = MemoryGroup(limit)
    try:
        yield group
    finally:
        group.remove()


@functools.cache
def reason_for_no_group() -> str | None:
    """Return why memory cannot be limited here; None where it can."""
    if sys.platform != "linux":
        return "control groups are Linux's"
    from kvstore.file.platform.linux import file_system

    try:
        with memory_group(LIMIT):
            pass
    except OSError as error:
        return f"no memory cgroup can be made: {error}"
    with tempfile.TemporaryFile() as file:
        kind = file_system(file.fileno())
    return f"temporary files are in memory ({kind})" if kind in ("tmpfs", "ramfs", "") else None


def reason_for_no_large_store() -> str | None:
    """As `reason_for_no_group`; and the test suite has no minutes for it."""
    if "PYTEST_CURRENT_TEST" in os.environ:
        return "takes minutes: in the long form only"
    return reason_for_no_group()


def fill_and_read(size: int, _folder: Path, rng: random.Random) -> int:
    """Fill a store of so many bytes and read it at random, in a process with little memory.

    Returns:
        The size in MB.
    """
    # Not in the trial's folder: what is in memory counts as memory of the group.
    with tempfile.TemporaryDirectory() as folder, memory_group(LIMIT) as group:
        told, tell = os.pipe()
        seed = rng.getrandbits(32)
        child = os.fork()
        if child == 0:
            os.close(told)
            try:
                group.enter()
                result = work(Path(folder) / "data.kvs", size, random.Random(seed))
                os.write(tell, json.dumps(result).encode())
            except BaseException as error:
                traceback.print_exc()
                os.write(tell, json.dumps({"error": repr(error)}).encode())
            finally:
                os._exit(0)
        os.close(tell)
        heard = b""
        while block := os.read(told, 65_536):
            heard += block
        os.close(told)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert group.killed() == 0, "ended by the kernel, for want of memory"
        assert code == 0, f"ended with {code}"
        result = json.loads(heard)
        assert "error" not in result, result["error"]
        assert result["file_size"] >= size
        assert result["private"] <= MOST_PRIVATE, f"{result['private']:,} bytes of private memory"
        assert group.most_used() <= LIMIT
        with KVStore(Path(folder) / "data.kvs") as store:
            assert len(store) == result["records"]
    return size // 10**6


def work(path: Path, size: int, rng: random.Random) -> dict[str, Any]:
    """Fill a store, read, delete and create at random, close it, and read again."""
    before = _private_bytes()
    count = size // (VALUE_SIZE + 700)  # with what a block of its class has more
    with KVStore(path) as store:
        for number in range(count):
            store.create(f"{number}", make_value(f"{number}", number, VALUE_SIZE))
        for _ in range(count // 16):
            number = rng.randrange(count)
            assert store.read(f"{number}") == make_value(f"{number}", number, VALUE_SIZE), number
        for number in rng.sample(range(count), count // 50):
            store.delete(f"{number}")
            store.create(f"{number}", make_value(f"{number}", number, VALUE_SIZE))
        private = _private_bytes() - before
        file_size = store.stats().file_size
    with KVStore(path) as store:
        for _ in range(count // 16):
            number = rng.randrange(count)
            assert store.read(f"{number}") == make_value(f"{number}", number, VALUE_SIZE), number
        assert sum(1 for _ in store) == count
        private = max(private, _private_bytes() - before)
    return {"file_size": file_size, "private": private, "records": count}


def _private_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


EXPERIMENTS = (
    Experiment(
        "little-memory",
        "a store of half as much again as the memory that its process may use",
        "MB",
        partial(fill_and_read, 100 * 10**6),
        unavailable=reason_for_no_group,
    ),
    Experiment(
        "little-memory-500-mb",
        "a store of eight times the memory that its process may use",
        "MB",
        partial(fill_and_read, 500 * 10**6),
        unavailable=reason_for_no_large_store,
    ),
)
