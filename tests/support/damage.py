"""Damage done to the bytes of a file at random, and files to do it to."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvstore import (
    KVStore,
)
from kvstore.format.layout import (
    BUCKET_MARKER,
    BUCKET_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    U64,
)

from .workload import Value, make_value

State = dict[str, Value]

PAGE = 4096
_EXTENT_MAP = EXTENT_MAP_OFFSET // EXTENT_SIZE
SIZES = (0, 50, 50, 200, 200, 700, 3_000, 15_000)
LINE = 64  # damage is aimed at such pieces of the file that hold something


def build(path: Path, rng: random.Random, keys: int = 400) -> State:
    """Make a closed store at `path`, with gaps and long keys, and return what it holds."""
    live: State = {}
    with KVStore(path) as store:
        for number in range(keys):
            key = f"{'é' * 16 if number % 5 == 0 else ''}{number}"
            size = rng.choice(SIZES)
            value = make_value(key, number, size)
            store.create(key, value, ttl=10**9 if number % 3 == 0 else None)
            live[key] = value
        for key in rng.sample(sorted(live), keys // 4):
            store.delete(key)
            del live[key]
    return live


@dataclass
class Damage:
    """What was done to a file: `hits` are ranges of bytes, `said` is for messages."""

    said: list[str] = field(default_factory=list)
    hits: list[range] = field(default_factory=list)

    def add(self, what: str, start: int, stop: int) -> None:
        self.said.append(f"{what} {start:,}..{stop:,}")
        self.hits.append(range(start, stop))


class Original:
    """A store file before any damage."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        self.lines = [
            offset
            for offset in range(0, len(contents), LINE)
            if any(contents[offset : offset + LINE])
        ]
        self.pages = sorted({offset // PAGE * PAGE for offset in self.lines})
        self.buckets = [page for page in self.pages if is_bucket(contents, page)]
        self._segments = {page // EXTENT_SIZE for page in self.buckets}

    def may_hide_keys(self, damage: Damage) -> bool:
        """Return whether keys may be absent, without an error, after this damage.

        A page of the table that was replaced as a whole is found by its marker or its shape. If it
        was one of the fixed extents, the index is built anew only where all records are there, and
        that cannot be told only where both state and extent map are damaged.
        """
        extents = {
            extent
            for hit in damage.hits
            for extent in range(hit.start // EXTENT_SIZE, (hit.stop - 1) // EXTENT_SIZE + 1)
        }
        in_first_page = any(hit.start < PAGE for hit in damage.hits)
        if in_first_page and extents & set(range(_EXTENT_MAP, FIXED_EXTENTS)):
            return True
        return bool(extents & self._segments) and any(len(hit) != PAGE for hit in damage.hits)


def is_bucket(contents: bytes | bytearray, page: int) -> bool:
    """Tell a page of the table by its marker."""
    return bool(
        U64.unpack_from(contents, page)[0] == BUCKET_MARKER | page // BUCKET_SIZE
        and page >= FIXED_EXTENTS * EXTENT_SIZE
    )


# --- kinds of damage ---------------------------------------------------------------------------


def flip_bits(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Flip one bit, or a few, where something is."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 1, 3, 20))):
        offset = rng.choice(original.lines) + rng.randrange(LINE)
        damaged[offset] ^= 1 << rng.randrange(8)
        damage.add("bit at", offset, offset + 1)
    return bytes(damaged), damage


def garble_bytes(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Write a few random bytes, zeros or ones over what is there."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 1, 3))):
        size = rng.choice((1, 2, 4, 8, 48, 512))
        offset = rng.choice(original.lines) // size * size
        damaged[offset : offset + size] = rng.choice(
            (bytes(size), b"\xff" * size, rng.randbytes(size))
        )
        damage.add("bytes", offset, offset + size)
    return bytes(damaged), damage


def zero_pages(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Make pages zeros, as a disk that lost them gives them."""
    damaged, damage = bytearray(original.contents), Damage()
    for _ in range(rng.choice((1, 1, 4))):
        page = rng.choice(original.pages)
        damaged[page : page + PAGE] = bytes(PAGE)
        damage.add("zeros in", page, page + PAGE)
    return bytes(damaged), damage


def swap_pages(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Exchange two pages, or write one over the other, as a disk that mixed up addresses."""
    damaged, damage = bytearray(original.contents), Damage()
    one, other = rng.choice(original.pages), rng.choice(original.pages)
    if one != other:
        damaged[one : one + PAGE] = original.contents[other : other + PAGE]
        damage.add(f"page {other:,} in", one, one + PAGE)
        if rng.random() < 0.5:
            damaged[other : other + PAGE] = original.contents[one : one + PAGE]
            damage.add(f"page {one:,} in", other, other + PAGE)
    return bytes(damaged), damage


def truncate(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Cut the file off anywhere, or at a page or an extent."""
    size = rng.randrange(1, len(original.contents))
    unit = rng.choice((1, PAGE, EXTENT_SIZE))
    size = max(1, size // unit * unit)
    damage = Damage()
    damage.add("cut off", size, len(original.contents))
    return original.contents[:size], damage


def append_garbage(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Add bytes at the end: random ones, or a piece of the file itself."""
    size = rng.choice((1, 100, PAGE, EXTENT_SIZE, 300_000))
    start = rng.choice(original.pages)
    garbage = rng.choice((rng.randbytes(size), original.contents[start : start + size]))
    damage = Damage()
    damage.said.append(f"{len(garbage):,} bytes more at the end")
    return original.contents + garbage, damage


def swap_sectors_of_the_index(original: Original, rng: random.Random) -> tuple[bytes, Damage]:
    """Exchange two slots or two sectors within the table: each is well-formed, in a wrong place."""
    damaged, damage = bytearray(original.contents), Damage()
    size = rng.choice((48, 512))
    one, other = (
        rng.choice(original.buckets) + 256 + size * rng.randrange((PAGE - 256) // size)
        for _ in range(2)
    )
    damaged[one : one + size], damaged[other : other + size] = (
        original.contents[other : other + size],
        original.contents[one : one + size],
    )
    damage.add("exchanged", one, one + size)
    damage.add("exchanged", other, other + size)
    return bytes(damaged), damage


KINDS: dict[str, Callable[[Original, random.Random], tuple[bytes, Damage]]] = {
    "flip_bits": flip_bits,
    "garble_bytes": garble_bytes,
    "zero_pages": zero_pages,
    "swap_pages": swap_pages,
    "truncate": truncate,
    "append_garbage": append_garbage,
    "swap_sectors_of_the_index": swap_sectors_of_the_index,
}
