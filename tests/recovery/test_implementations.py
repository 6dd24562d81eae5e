"""Both implementations recover the same file in the same way, write by write."""

import random
from copy import copy
from pathlib import Path

import pytest
from support import MIB, scaled, seeded_random
from support.clock import FakeClock
from support.components import NOW_MS, replace_writes
from support.consistency import assert_consistent
from support.files import open_contents
from support.images import write_image
from support.record_images import STAMP, Image
from xxhash import xxh3_64_intdigest

from kvstore import KVStore, compiled
from kvstore.compiled import COMPILED, PLAIN, Implementation
from kvstore.format.layout import (
    BLOCK_SIZES,
    DIRECTORY_SHIFT,
    EXTENT_SIZE,
    IDENTITY,
    KIND_SLAB,
    MARKED_MAGIC,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SIZE_CLASSES,
    STAMP_LIMIT,
    STATE,
    STATE_OFFSET,
    TIME_LIMIT,
)
from kvstore.index.extents import Extents
from kvstore.recovery.opening import open_file
from kvstore.recovery.rebuild import rebuild

if COMPILED is None:
    pytest.skip("the compiled implementation is not built or not wanted", allow_module_level=True)

BOTH = (PLAIN, COMPILED)
VOID = STAMP - 1


# --- files -------------------------------------------------------------------------------------


def some_key(rng: random.Random) -> str:
    """Return a key of 1 to 32 characters, up to 128 bytes of them."""
    return "".join(rng.choices("aé漢🔑", k=rng.choice((1, 4, 8, 16, 32))))


def crashed(path: Path, rng: random.Random, clock: FakeClock, count: int) -> Image:
    """Return a file of records of many sizes, some deleted, some past their expiry."""
    sizes = rng.choice(((10,), (100,), (10, 200), (10, 100, 1_000, 5_000, 16_000)))
    with KVStore(path) as store:
        for number in range(count):
            key = f"{number}{some_key(rng)}"[:32]
            ttl = rng.choice((None, None, 5, 1_000))
            store.create(key, {"v": "x" * rng.choice(sizes)}, ttl)
            if rng.random() < 0.2:
                store.delete(key)
        contents = open_contents(store)
    path.unlink()
    clock.advance(rng.choice((0, 5)))
    return Image(contents)


def forge_some(image: Image, rng: random.Random) -> None:
    """Put whole records, damaged ones and garbage wherever blocks can begin, mostly in slabs."""
    keys = [some_key(rng).encode() for _ in range(5)]
    places = image.extents(KIND_SLAB) or image.extents()
    for _ in range(rng.randrange(60)):
        extent = rng.choice(places if rng.random() < 0.8 else image.extents())
        key, value = rng.choice(keys), b'"' + b"v" * rng.choice((0, 20, 100, 3_000)) + b'"'
        size = BLOCK_SIZES[SIZE_CLASSES[(RECORD_HEADER_SIZE + len(key) + len(value) + 31) // 32]]
        position = rng.randrange(EXTENT_SIZE // size) * size
        if rng.random() < 0.1:
            position = rng.randrange(EXTENT_SIZE)
        image.forge(
            extent + position,
            rng.choice((key, key, key, key, b"", key + b"k" * 129)[: rng.choice((4, 6))])[:255],
            value if rng.random() < 0.95 else b"1",
            rng.choice((STAMP, STAMP + 1, VOID, STAMP_LIMIT, STAMP_LIMIT - 1)),
            rng.choice((0, 0, NOW_MS - 1, NOW_MS + 10**6, TIME_LIMIT - 1, TIME_LIMIT, 2**64 - 1)),
            0 if rng.random() < 0.7 else rng.randrange(256),
            RECORD_MAGIC if rng.random() < 0.8 else MARKED_MAGIC,
        )
    for _ in range(rng.randrange(20)):
        extent = rng.choice(places)
        position = rng.randrange(0, EXTENT_SIZE, rng.choice((1, 32, 64, 160)))
        image.put(
            extent + position,
            rng.choice((RECORD_MAGIC_BYTES, b"", b"\0")) + rng.randbytes(rng.randrange(64)),
        )


# --- both recoveries ---------------------------------------------------------------------------


def recover(path: Path, contents: bytes, now_ms: int) -> tuple[list[tuple[int, bytes]], bytes]:
    """Recover a file of these contents; return every write, and what the file then is."""
    write_image(path, contents)
    file = open_file(str(path), 64 * MIB, 0.0, now_ms, mending=True)
    try:
        writes: list[tuple[int, bytes]] = []
        real = file.write

        def write(offset: int, data: bytes) -> None:
            writes.append((offset, data))
            real(offset, data)

        replace_writes(file, write)
        extents = Extents(file)
        rebuild(file, extents, now_ms)
        return writes, bytes(file.map[: file.size])
    finally:
        file.close()


def assert_same(
    path: Path,
    image: Image,
    now_ms: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    both: tuple[Implementation, ...] = BOTH,
) -> None:
    """Recover with both; compare each write, the files, and what was said."""
    monkeypatch.setattr("kvstore.recovery.report.monotonic", lambda: 0.0)
    results = []
    for implementation in both:
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "selected", implementation)
            writes, contents = recover(path, bytes(image.contents), now_ms)
        assert_consistent(path) if "no slot" not in caplog.text else None
        results.append((writes, contents, [record.getMessage() for record in caplog.records]))
    (plain_writes, plain, plain_said), (writes, contents, said) = results
    assert said == plain_said
    for ours, theirs in zip(writes, plain_writes, strict=True):
        assert ours == theirs
    assert contents == plain


@pytest.mark.parametrize("number", range(scaled(40)))
def test_file_with_forged_and_damaged_records_is_recovered_the_same(
    path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    rng = random.Random(f"{seeded_random().random()} {number}")
    image = crashed(path, rng, clock, rng.choice((0, 1, 30, 300, 1_500)))
    image.set_void_stamp(rng.choice((0, 0, VOID)))
    forge_some(image, rng)
    assert_same(path, image, clock.now_ms, monkeypatch, caplog)


@pytest.mark.parametrize(
    ("key_size", "value_size", "stamp"),
    [(0, 60, 1), (129, 60, 1), (60, 1, 1), (60, 0, 1), (4, 60, STAMP_LIMIT)],
)
def test_record_that_nobody_can_have_written_is_dropped_though_its_checksum_is_right(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key_size: int,
    value_size: int,
    stamp: int,
) -> None:
    """It is in a block of its class, after others that are sound."""
    steps = (RECORD_HEADER_SIZE + key_size + value_size + 31) // 32
    size = BLOCK_SIZES[SIZE_CLASSES[steps]]
    with KVStore(path) as store:
        image = Image(open_contents(store))
    image.contents[STATE_OFFSET : STATE_OFFSET + STATE.size] = bytes(STATE.size)
    extent = image.extents()[-1]
    for block in range(3):
        image.forge(extent + block * size, b"key %d" % block, b"v" * (size - 40))
    image.forge(extent + 3 * size, b"k" * key_size, b"v" * value_size, stamp)
    assert_same(path, image, NOW_MS, monkeypatch, caplog)
    assert "of 3 records" in caplog.text
    assert "1 damaged" in caplog.text


@pytest.mark.parametrize(
    ("bits", "count"),
    [
        (15, 1_000),
        (15, 1_419),  # 1,280 keys: as many as a segment has slots
        (15, 1_600),  # more
        (33, 1_200),  # those of one key are not next to each other
        (64, 40),
        (0, 3_000),  # the home bucket is the same
    ],
)
def test_records_whose_hashes_collide_are_given_the_same_slots(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bits: int,
    count: int,
) -> None:
    """With the uppermost `bits` of all hashes the same, and now and then the home bucket."""
    rng = seeded_random()
    same = rng.getrandbits(64)
    with KVStore(path) as store:
        empty = open_contents(store)
    (seed,) = {IDENTITY.unpack_from(empty)[4]}

    def digest(data: bytes, with_seed: int = 0) -> int:
        hashed = xxh3_64_intdigest(data, with_seed)
        if with_seed != seed:
            return hashed
        rest = (1 << 64 - bits) - 1
        home = 15 if bits == 0 or hashed >> 40 & 3 == 0 else 0
        return (same & ~rest | hashed & rest | home) & 2**64 - 1

    for module in ("extent_records", "layout"):
        monkeypatch.setattr(f"kvstore.format.{module}.xxh3_64_intdigest", digest)
    image = Image(empty + bytes(8 * EXTENT_SIZE), digest)
    # Without a state, the file is as long as it is.
    image.contents[STATE_OFFSET : STATE_OFFSET + STATE.size] = bytes(STATE.size)
    blocks = [
        extent + position
        for extent in image.extents()[-8:]
        for position in range(0, EXTENT_SIZE - 127, 128)
    ]
    for number, offset in enumerate(rng.sample(blocks, count)):
        # Every tenth is of one of three keys.
        key = b"k" * 20 + b"%d" % (number if number % 10 else number % 30)
        image.forge(
            offset,
            key,
            b'"' + b"v" * 50 + b'"',
            STAMP + number % 7,
            rng.choice((0, 2**45)),
            magic=MARKED_MAGIC if number % 19 == 0 else RECORD_MAGIC,
        )
    assert image.digest(b"k", seed) >> DIRECTORY_SHIFT == same >> DIRECTORY_SHIFT or bits < 15
    # What hashes by itself is the plain one in both: the compiled one has hashes of its own.
    altered = copy(BOTH[1])
    altered.scan_blocks = PLAIN.scan_blocks
    assert_same(path, image, NOW_MS, monkeypatch, caplog, (PLAIN, altered))
