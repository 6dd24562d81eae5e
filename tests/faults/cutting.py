"""The file cut off at every length that means something, and at some of its extents."""

import random
from pathlib import Path
from typing import Final

import pytest
from support.damage import State
from support.workload import make_value

from kvstore import CorruptStoreError, KVStore, UnsupportedFormatError
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_MAP_SIZE,
    EXTENT_SIZE,
    FIRST_FILE_SIZE,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    RECORD_MAGIC_BYTES,
    STATE,
    STATE_OFFSET,
)

from .laboratory import Experiment, stop_clock_between_calls

_EXTENTS: Final = 8  # of each file, a trial


def cut_everywhere(folder: Path, rng: random.Random) -> int:
    """Cut a closed file, and one that was not closed, at each such length; return how many."""
    stop_clock_between_calls()
    path = folder / "cut.kvs"
    live, closed, in_use = make_images(path, rng)
    tried = 0
    for contents in (closed, in_use):
        end_of = ends(contents, live)
        for size in lengths(contents, rng):
            path.write_bytes(contents[:size])
            try:
                left = {key: live[key] for key, end in end_of.items() if end <= size}
                open_cut(path, contents, size, left)
            except BaseException as error:
                error.add_note(f"cut off at {size:,} of {len(contents):,} bytes")
                raise
            tried += 1
    return tried


def make_images(path: Path, rng: random.Random) -> tuple[State, bytes, bytes]:
    """Return what a store holds, and its file: closed, and in use, grown since its last flush."""
    live: State = {}
    in_use = b""
    with KVStore(path) as store:
        for number in range(400):
            if number == 210:
                store.sync()
            value = make_value(str(number), number, rng.choice((20, 9_000, 16_000)))
            store.create(str(number), value)
            live[str(number)] = value
        in_use = path.read_bytes()
    _, extents, durable, *_ = STATE.unpack_from(in_use, STATE_OFFSET)
    assert FIRST_FILE_SIZE < durable * EXTENT_SIZE < extents * EXTENT_SIZE == len(in_use)
    return live, path.read_bytes(), in_use


def lengths(contents: bytes, rng: random.Random) -> list[int]:
    """Return the lengths at and around where structures, extents and records begin or end."""
    _, _, durable, *_ = STATE.unpack_from(contents, STATE_OFFSET)
    extents = rng.sample(range(0, len(contents), EXTENT_SIZE), _EXTENTS)
    edges = {0, 8, len(contents), FIRST_FILE_SIZE, durable * EXTENT_SIZE, *extents}
    for start, size in (
        *((offset, IDENTITY.size) for offset in IDENTITY_OFFSETS),
        (STATE_OFFSET, STATE.size),
        (HOLDER_OFFSET, HOLDER.size),
        (ALLOCATOR_OFFSET, ALLOCATOR_SIZE),
        (DIRECTORY_OFFSET, DIRECTORY_SIZE),
        (EXTENT_MAP_OFFSET, EXTENT_MAP_SIZE),
    ):
        edges |= {start, start + size}
    last = contents.rindex(RECORD_MAGIC_BYTES)
    around = {edge + step for edge in edges | {last} for step in (-1, 0, 1)}
    return sorted(size for size in around if 0 <= size <= len(contents))


def open_cut(path: Path, contents: bytes, size: int, left: State) -> None:
    """Open what is left of a file: refused and left alone, or all that was not cut off is there."""
    clean, extents, durable, *_ = STATE.unpack_from(contents, STATE_OFFSET)
    if 0 < size < (extents if clean else durable) * EXTENT_SIZE:
        with pytest.raises((CorruptStoreError, UnsupportedFormatError), match=path.name):
            KVStore(path)
        assert path.read_bytes() == contents[:size], "a file that was refused has changed"
        return
    with KVStore(path) as store:
        assert dict(store) == left, "records were lost, or made up"
        store.create("new", {})
    with KVStore(path) as store:
        assert len(store) == len(left) + 1


def ends(contents: bytes, live: State) -> dict[str, int]:
    """Return where each value ends that these bytes hold. It tells its key all through."""
    texts = {key: f'"text":"{value["text"]}"}}'.encode() for key, value in live.items()}
    starts = {key: contents.find(text) for key, text in texts.items()}
    return {key: start + len(texts[key]) for key, start in starts.items() if start >= 0}


EXPERIMENTS = (
    Experiment(
        "damage-cut-at-boundaries",
        "cut off at and around each structure, extent and record",
        "files",
        cut_everywhere,
    ),
)
