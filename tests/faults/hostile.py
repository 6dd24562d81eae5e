"""Content that looks like the file's own structures, and what old records leave behind.

FF and FE are in no UTF-8, so what a user stores can only come near a record: all of its bytes but
these, at any place. What the store itself wrote can be a whole one: an old record, of which nothing
but its magic is overwritten, may end up in the middle of a larger block. Neither may be taken for a
record when the index is rebuilt.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support import MIB
from support.components import replace_writes
from support.workload import difference, make_value

import kvstore.file.platform
from kvstore import InvalidKeyError, InvalidValueError, KVStore
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY_OFFSETS,
    MAX_KEY_CHARACTERS,
    RECORD_MAGIC_BYTES,
    STATE_OFFSET,
)
from kvstore.recovery.check import check_file, check_image

from .laboratory import Experiment, stop_clock_between_calls

State = dict[str, dict[str, Any]]

MAX_BYTES: Final = 16 * MIB
ROUNDS: Final = 4  # a trial: each fills a store further, then looks at what a crash would leave
IMAGES: Final = 15  # a trial, of stale records
# What the magics of records, free blocks, buckets and the file are, and look like in text.
SIGNS: Final = (
    "KR", "KF", "0VBK", "KBV0", "\x89KVS\r\n\x1a\n", "\x89KVS", "ÿþKR", "ÿþKF",
    "\ufffe\ufeff", "\ufeffKR", "\ufffeKR", "\ufffe\ufeffKF", "\uffffKR", "\ufefe\uffff",
)  # fmt: skip
# Each byte above 127 without its uppermost bit.
_NEAREST: Final = bytes(byte & 0x7F for byte in range(256))
# Ways to make text of bytes that are none. The first cannot be stored, and must be refused.
READINGS: Final[tuple[Callable[[bytes], str], ...]] = (
    lambda data: data.decode("utf-8", "surrogateescape"),
    lambda data: data.decode("utf-8", "ignore"),
    lambda data: data.decode("utf-8", "replace"),
    lambda data: data.decode("latin-1"),
    lambda data: data.translate(_NEAREST).decode("ascii"),
    lambda data: data.replace(b"\xff\xfe", "\ufffe".encode()).decode("utf-8", "ignore"),
)


# --- content made of the file's own bytes ------------------------------------------------------


def store_lookalikes(folder: Path, rng: random.Random) -> int:
    """Store keys and values made of structures of the same file; return how many."""
    stop_clock_between_calls()
    live: State = {}
    stored = 0
    with KVStore(folder / "hostile.kvs") as store:
        for number in range(60):
            live[f"{number}"] = make_value(f"{number}", number, rng.choice((10, 300, 3_000)))
            store.create(f"{number}", live[f"{number}"], ttl=rng.choice((None, 10**9)))
        for _ in range(ROUNDS):
            for _ in range(60):
                stored += create_lookalike(store, live, rng)
            for key in rng.sample(sorted(live), 30):
                store.delete(key)
                del live[key]
            contents = bytes(store._file.map[: store._file.size])
            problems = [each for each in check_image(contents) if each.structure != "state"]
            assert not problems, f"in the file in use: {problems[:5]}"
            assert_recovers(folder / "crashed.kvs", contents, [live])
    return stored


def create_lookalike(store: KVStore, live: State, rng: random.Random) -> int:
    """Create a key with a value, one of them or both made of pieces of the file itself."""
    read = rng.choice(READINGS)
    key = read(piece(store, rng))[:MAX_KEY_CHARACTERS] if rng.random() < 0.5 else ""
    if not key or key in live:
        key = f"key {rng.getrandbits(40)}"
    text = " " * rng.randrange(64) + rng.choice(SIGNS) * rng.randrange(3)
    for _ in range(rng.choice((1, 1, 4, 20))):
        text += read(piece(store, rng)) + rng.choice(SIGNS)
    value: dict[str, Any] = {rng.choice(("", "v", "KR" * 20)): text}
    if rng.random() < 0.3:
        value = {text[:20]: [text[:500], {text[-40:]: list(text[:30].encode("utf-8", "ignore"))}]}
    while True:
        try:
            store.create(key, value)
        except (InvalidKeyError, InvalidValueError) as error:
            if "limit" not in str(error):
                assert_refused_rightly(key, value, error)
                return 0
            text = text[: len(text) // 2]
            value = {"v": text}
        else:
            live[key] = value
            return 1


def assert_refused_rightly(key: str, value: dict[str, Any], error: Exception) -> None:
    """Assert that text was refused because it is none: it holds surrogates."""
    surrogates = any("\ud800" <= character <= "\udfff" for character in key + repr_of(value))
    assert surrogates, f"{key!r} was refused: {error}"


def repr_of(value: object) -> str:
    """Return all the text in a value."""
    if isinstance(value, dict):
        return "".join(map(repr_of, (*value, *value.values())))
    return "".join(map(repr_of, value)) if isinstance(value, list) else str(value)


def piece(store: KVStore, rng: random.Random) -> bytes:
    """Return some bytes of the file from where a structure begins, or shortly before."""
    file = store._file
    start = rng.choice(
        (
            *IDENTITY_OFFSETS,
            STATE_OFFSET,
            ALLOCATOR_OFFSET,
            file.directory[rng.randrange(len(file.directory))] * EXTENT_SIZE,
            *[an_aligned_magic(store, rng)] * 5,
        )
    )
    start = max(0, start - rng.choice((0, 0, 0, 4, 32)))
    return file.map[start : start + rng.choice((8, 32, 64, 64, 300, 4_000))]


def an_aligned_magic(store: KVStore, rng: random.Random) -> int:
    """Return the offset of a magic of a record or a free block, after a place chosen by chance."""
    file = store._file
    start = rng.randrange(FIXED_EXTENTS * EXTENT_SIZE, file.size)
    found = file.map[start : file.size].find(RECORD_MAGIC_BYTES[:2])
    return start + found if found >= 0 else STATE_OFFSET


# --- what old records leave behind -------------------------------------------------------------


def leave_stale_records(folder: Path, rng: random.Random) -> int:
    """Have extents change their size class over whole old records, and crash; return how often."""
    stop_clock_between_calls()
    with pytest.MonkeyPatch.context() as patch:
        in_place = rng.random() < 0.5
        patch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: in_place)
        with KVStore(folder / "stale.kvs", max_bytes=MAX_BYTES) as store:
            crashes = Crashes(store, folder / "crashed.kvs", rng)
            while crashes.tried < IMAGES:
                small, large = rng.choice((50, 80, 200, 700)), rng.choice((600, 3_000, 15_000))
                crashes.fill(small, 2 * EXTENT_SIZE)
                crashes.remove(rng.choice((1.0, 1.0, 0.9)))
                crashes.fill(large, 2 * EXTENT_SIZE)
                assert crashes.stale, "no whole old record is left but for its magic"
                crashes.remove(rng.choice((1.0, 0.9, 0.5)))
        return crashes.tried


class Crashes:
    """A store in use, whose file is copied now and then just before one of its writes, and opened.

    Attributes:
        live: what the store holds.
        tried: how many copies were opened.
        stale: whether a key and value of a deleted record were seen whole, outside of any record.
    """

    def __init__(self, store: KVStore, path: Path, rng: random.Random) -> None:
        self._store = store
        self._path = path
        self._rng = rng
        self._write = store._file.write
        self._next: State = {}
        self._until = 0
        self._mark = 0
        self._dead: list[bytes] = []
        self.live: State = {}
        self.tried = 0
        self.stale = False
        replace_writes(store._file, self._write_or_crash)

    def _write_or_crash(self, offset: int, data: bytes) -> None:
        self._until -= 1
        if self._until < 0:
            self._until = self._rng.randrange(1_500)
            file = self._store._file
            # What is under way happened or did not; all else is as it was acknowledged.
            assert_recovers(self._path, file.map[: file.size], [self.live, self._next])
            self.tried += 1
        self._write(offset, data)

    def _do(self, key: str, value: dict[str, Any] | None) -> None:
        self._next = dict(self.live)
        if value is None:
            del self._next[key]
            self._store.delete(key)
        else:
            self._next[key] = value
            self._store.create(key, value)
        self.live = self._next

    def fill(self, size: int, total: int) -> None:
        """Create records of about so many bytes, that take so many together."""
        for _ in range(total // size):
            self._mark += 1
            text = make_value("", self._mark, self._rng.randrange(size))["text"]
            self._do(f"{self._mark:032}", {"mark": self._mark, "text": text})
        contents = self._store._file.map[: self._store._file.size]
        self.stale = self.stale or any(dead in contents for dead in self._dead)

    def remove(self, share: float) -> None:
        """Delete that share of all records, in some order."""
        keys = self._rng.sample(sorted(self.live), round(share * len(self.live)))
        self._dead = [f'{key}{{"mark":{self.live[key]["mark"]},'.encode() for key in keys[:20]]
        for key in keys:
            self._do(key, None)


# --- both --------------------------------------------------------------------------------------


def assert_recovers(path: Path, contents: bytes, allowed: list[State]) -> None:
    """Assert that the file, as a killed process leaves it, is recovered to one of these states."""
    path.write_bytes(contents)
    with KVStore(path, max_bytes=MAX_BYTES) as store:
        found = dict(store)
        assert any(found == state for state in allowed), difference(found, allowed[-1])
        assert len(store) == len(found)
    # Not a magic that no slot leads to, nor a block that is neither live nor free.
    problems = check_file(path)
    assert not problems, f"after recovery: {problems[:5]}"


EXPERIMENTS = (
    Experiment(
        "hostile-content", "keys and values made of the file's own bytes", "pairs", store_lookalikes
    ),
    Experiment(
        "hostile-leftovers",
        "whole old records in new blocks, then a crash at a write",
        "crashes",
        leave_stale_records,
    ),
)
