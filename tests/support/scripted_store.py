"""A store that does what it is told, step by step, and tells what comes of each as text.

Two of them, one with a fast path and one without, tell the same where they do the same: outcomes in
words, the writes through the write path, and a digest of the file after each step. Masked is what
differs by nature: the process id in the file, and the folder.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

from xxhash import xxh3_64, xxh3_64_intdigest

import kvstore.clock
from kvstore import KVStore, KVStoreError, compiled
from kvstore.format.layout import HOLDER, HOLDER_OFFSET

from . import MIB, MIN_MAX_BYTES
from .cases import CASES, Prepared, write_path
from .clock import START_SECONDS, FakeClock
from .components import FaultyWrites, replace_writes
from .platforms import USUAL_MAX_BYTES
from .values import nested

NO_DIGEST: Final = -1
MOST_TEXT: Final = 1_000


class Outcome(NamedTuple):
    """What a step returned or raised, as text, and often a digest of the file after it."""

    text: str
    digest: int


# What the text of an error begins with that is neither of the store's own nor of the system's.
FOREIGN: Final = "raises, of its own making, "
Step = tuple[Any, ...]  # the name of a method of `ScriptedStore`, and arguments
ERRORS: Final[dict[str, Callable[[], BaseException]]] = {
    "OSError": lambda: OSError(errno.EIO, "refused"),
    "KeyboardInterrupt": KeyboardInterrupt,
    "MemoryError": MemoryError,
}


class ScriptedStore:
    """A store and the clock that it goes by.

    Args:
        folder: where its files are.
        plain: do without the compiled code.
    """

    def __init__(self, folder: Path, *, plain: bool) -> None:
        folder.mkdir()
        self._folder = folder
        self._plain = plain
        self._store: KVStore | None = None
        self._path = folder / "none"
        self._number = self._steps = 0
        self._every = 1
        self._options: dict[str, Any] = {}
        self._in_place = True
        self._trace: list[tuple[int, bytes]] | None = None
        self.clock = FakeClock()

    def do(self, step: Step) -> Outcome:
        """Do a step and return what came of it."""
        with mock.patch.object(kvstore.clock, "time_ns", self.clock):
            return Outcome(self.tell(step), self._digest())

    def try_out(self, experiment: str, *arguments: Any) -> list[Any]:
        """Do one of the experiments below; return all that came of it."""
        with (
            mock.patch.object(kvstore.clock, "time_ns", self.clock),
            mock.patch("os.urandom", random.Random(1).randbytes),
        ):
            told: list[Any] = getattr(self, experiment)(*arguments)
        return told

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        """Have what is opened be of the implementation that is wanted."""
        chosen = compiled.PLAIN if self._plain else compiled.selected
        with mock.patch.object(compiled, "selected", chosen):
            yield

    def tell(self, step: Step) -> str:
        """Do a step and return, as text, what it returned or raised."""
        name, *arguments = step
        try:
            text = f"gives {getattr(self, name)(*arguments)!r}"
        except BaseException as error:
            text = _described(error)
        # Where folders are parted by backslashes, `repr` doubles them.
        for folder in (repr(str(self._folder))[1:-1], str(self._folder)):
            text = text.replace(folder, "")
        text = text.replace(f"pid {os.getpid()}", "pid")
        if len(text) > MOST_TEXT:
            digest = xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
            text = f"{text[:MOST_TEXT]}… and so on: {digest}"
        return text

    def image(self) -> bytes:
        """Return what is in the file, without its holder."""
        contents = bytearray(self._contents())
        if len(contents) > HOLDER_OFFSET:
            contents[HOLDER_OFFSET : HOLDER_OFFSET + HOLDER.size] = bytes(HOLDER.size)
        return bytes(contents)

    def _contents(self) -> bytes:
        """Return what of the file is in use: on Windows it is longer while it is open."""
        store = self._store
        with self._path.open("rb") as file:
            return file.read(-1 if store is None or store.closed else store._file.size)

    def _digest(self) -> int:
        """Return a digest of `image()`, in every so many steps; else a number that says no more."""
        self._steps += 1
        if self._steps % self._every or not self._path.exists():
            return NO_DIGEST
        contents = memoryview(self._contents())
        digest = xxh3_64(contents[:HOLDER_OFFSET])
        digest.update(contents[HOLDER_OFFSET + HOLDER.size :])
        return digest.intdigest()

    def digest_every(self, steps: int) -> None:
        """Look at the file after every so many steps only, from now on."""
        self._steps, self._every = 0, steps

    # --- the store as a whole

    def new(
        self, seed: int, in_place: bool, max_bytes: int = USUAL_MAX_BYTES, durable: bool = False
    ) -> None:
        """Give up the store for a new one, with identities that `seed` makes."""
        self.end()
        self.digest_every(1)
        self.clock.set(START_SECONDS)
        self._number += 1
        self._path = self._folder / f"{self._number}.kvs"
        self._in_place = in_place
        self._options = {"max_bytes": max_bytes, "durable": durable}
        with mock.patch("os.urandom", random.Random(seed).randbytes):
            self.open()

    def end(self) -> None:
        """Close the store and forget its file."""
        if self._store is not None:
            self._store.close()
        self._store = None
        self._path.unlink(missing_ok=True)

    def open(self) -> None:
        """Open the file."""
        with write_path(self._in_place), self._chosen():
            self._store = KVStore(self._path, **self._options)
        if self._trace is not None:
            self.record()

    def close(self) -> None:
        """Close the store."""
        assert self._store is not None
        self._store.close()

    def reopen(self) -> None:
        """Close the store and open its file again."""
        self.close()
        self.open()

    def crash(self) -> None:
        """Go on with a copy of the file of the open store."""
        assert self._store is not None
        copy = self._path.with_suffix(".copy")
        shutil.copyfile(self._path, copy)
        self._store.close()
        copy.replace(self._path)
        self.open()

    def set_clock(self, seconds: float) -> None:
        """Have the clock show that time."""
        self.clock.set(seconds)

    def advance_clock(self, seconds: float) -> None:
        """Have the clock move on, or back."""
        self.clock.advance(seconds)

    def reclaim(self) -> None:
        """Reclaim all that is retired."""
        assert self._store is not None
        self._store._parts.reclaimer.reclaim()

    def merge(self) -> int:
        """Merge segments of the table."""
        assert self._store is not None
        return self._store._all_keys.merge_segments()

    # --- what is written

    def record(self) -> None:
        """Keep all writes from now on."""
        assert self._store is not None
        self._trace = trace = []
        write = self._store._file.write

        def note(offset: int, data: bytes) -> None:
            trace.append((offset, bytes(data)))
            write(offset, data)

        replace_writes(self._store._file, note)

    def writes(self) -> list[tuple[int, bytes | tuple[int, int]]]:
        """Return the writes since this was last asked, long ones as their length and a digest."""
        assert self._trace is not None
        kept = [
            (offset, data if len(data) <= 64 else (len(data), xxh3_64_intdigest(data)))
            for offset, data in self._trace
            if offset != HOLDER_OFFSET
        ]
        del self._trace[:]
        return kept

    # --- the members of the store

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the store."""
        return getattr(self._store, name)(*arguments, **named)

    def create_deep(self, key: str, depth: int, kind: type) -> None:
        """Create a key with a value that is nested too deep to be told of."""
        assert self._store is not None
        self._store.create(key, nested(depth, kind))

    def restore(self, key: str, encoded: bytes, times: tuple[int, int], replace: bool) -> None:
        """Carry a record over, with the times that it had elsewhere."""
        assert self._store is not None
        self._store._restore(key, encoded, *times, replace=replace)

    def keys(self) -> list[str]:
        """Iterate the keys."""
        assert self._store is not None
        return list(self._store)

    def items(self) -> list[tuple[str, Any]]:
        """Iterate the pairs."""
        assert self._store is not None
        return list(self._store.items())

    def look(self, key: str) -> list[str]:
        """Do all on a key that changes nothing."""
        return [
            self.tell(("call", name, key))
            for name in ("read", "__getitem__", "read_bytes", "get", "ttl", "__contains__")
        ]

    def stats(self) -> str:
        """Return what the store counts."""
        assert self._store is not None
        return repr(self._store.stats())

    # --- operations cut short

    def cut_short(self, case: str, in_place: bool, error: str, lasting: bool) -> list[Any]:
        """Have a case's call fail at each of its writes in turn; return all that came of it."""
        told: list[Any] = []
        self.end()
        self.digest_every(1)
        self.clock.set(START_SECONDS)
        (wanted,) = (each for each in CASES if each.name == case)
        with write_path(in_place), self._chosen():
            prepared = Prepared(wanted, self._folder, self.clock)
            self._path = self._folder / "cut.kvs"
            for fail_at in count(1):
                self._store = prepared.open(self._path)
                self.record()
                fault = FaultyWrites(self._store._file, fail_at, ERRORS[error](), lasting=lasting)
                told.append((fail_at, self.do(("act", wanted)), fault.calls, self.writes()))
                if wanted.key is not None:
                    told.append(self.look(wanted.key))
                told += [self.tell(("items",)), self.tell(("call", "__len__"))]
                told += [self.do(("close",)), self.writes()]
                self._store.close()
                self._trace = None
                self._in_place, self._options = in_place, {"max_bytes": MIN_MAX_BYTES}
                told += [self.do(("open",)), self.tell(("items",)), self.do(("close",))]
                if fail_at > fault.calls:
                    return told
        raise AssertionError

    def act(self, case: Any) -> None:
        """Do the call of a case."""
        case.act(self._store)

    # --- files of others

    def use(self, image: Path, in_place: bool, keys: list[str], seed: int) -> list[Any]:
        """Open a copy of a file that may be damaged, and do everything with it."""
        self.end()
        self.digest_every(8)
        self.clock.set(START_SECONDS)
        self._number += 1
        self._path = self._folder / f"{self._number}.kvs"
        shutil.copyfile(image, self._path)
        self._in_place, self._options = in_place, {"max_bytes": 8 * MIB}
        told: list[Any] = [self.do(("open",))]
        if self._store is not None:
            rng = random.Random(seed)
            told += (
                (step, self.tell(step) if step[0] == "look" else self.do(step))
                for step in steps_on(keys, rng)
            )
            told += [self.do(("close",)), self.do(("open",))]
            if not told[-1].text.startswith("raises"):
                told += [(key, self.look(key)) for key in keys]
                told += [self.do(("items",)), self.do(("call", "__len__")), self.do(("close",))]
        return told


def _described(error: BaseException) -> str:
    kind = "raises " if isinstance(error, KVStoreError | OSError | KeyboardInterrupt) else FOREIGN
    cause = error.__cause__ and _described(error.__cause__)
    return f"{kind}{type(error).__name__}: {error!s} {error.args!r} [{cause}]"


def steps_on(keys: list[str], rng: random.Random) -> list[Step]:
    """Return steps that look at all of some keys, and change some."""
    some = rng.sample(keys, min(40, len(keys)))
    steps: list[Step] = [("look", key) for key in keys]
    steps += [("keys",), ("items",), ("call", "__len__"), ("stats",)]
    for key in some:
        kind = rng.randrange(5)
        if kind < 3:
            size = rng.choice((0, 40, 200, 700, 3_000, 15_000))
            name = rng.choice(("create", "put", "put"))
            steps.append(("call", name, key, {"over": "x" * size}, rng.choice((None, 50))))
        if rng.random() < 0.3:
            steps.append(rng.choice((("call", "touch", key, 50), ("call", "sync"), ("reclaim",))))
        if kind > 1:
            steps.append(("call", rng.choice(("delete", "delete", "pop")), key))
        if kind == 2:
            steps.append(("call", "create", key, {"again": "y" * rng.randrange(3_000)}))
        steps.append(("look", key))
    for _ in range(4):
        batch = rng.sample(keys, min(50, len(keys)))
        value = {"many": "x" * rng.choice((0, 40, 700))}
        steps += [("call", "get_many", batch), ("call", "get_many", batch[:5])]
        steps += [("call", "put_many", [(key, value) for key in batch[:20]], 10**6)]
        steps += [("call", "delete_many", batch[10:30]), ("call", "get_many", batch)]
    for number in range(30):
        value = {"new": "z" * rng.choice((0, 40, 200, 700, 3_000, 15_000))}
        steps.append(("call", "create", f"{number} new", value, rng.choice((None, 10**6))))
    steps += [("look", key) for key in keys]
    steps += [("call", "purge_expired"), ("call", "__len__"), ("keys",), ("items",)]
    steps += [("call", "sync"), ("stats",)]
    return steps
