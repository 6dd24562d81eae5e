"""Copies that `cp` or a backup run made of the file of an open store: right, or said to be torn.

Such a program reads one page after the other, while the store writes to them. The fault laboratory
(`faults.torn`) tears copies anywhere; here is what has happened, and each thing that tells of it.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import pytest
from support import seeded_random
from support.clock import FakeClock
from support.components import open_components
from support.disks import quick_folder
from support.files import open_contents
from support.images import write_image
from support.torn import backwards, forwards, shuffled, use

from kvstore import CorruptStoreError, KVStore
from kvstore.format.layout import (
    BUCKET_COUNT,
    BUCKET_SIZE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    SEGMENT_SLOTS,
    SHAPE_OFFSET,
    SLOT_COUNT,
    SPLIT_AT,
    STATE_OFFSET,
    STRIPE_SHIFT,
    U64,
    key_hash,
)

HEAD = FIXED_EXTENTS * EXTENT_SIZE // BUCKET_SIZE


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def names_in_one_segment(store: KVStore, homes: int = BUCKET_COUNT) -> Iterator[str]:
    """Yield names that lead to the same segment of depth 4, and to its first so many buckets."""
    seed = store._file.hash_seed
    for number in count():
        hash_of_name = key_hash(b"%d" % number, seed)
        if hash_of_name >> STRIPE_SHIFT == 7 and hash_of_name % BUCKET_COUNT < homes:
            yield f"{number}"


def outcomes(copy: Path, keys: list[str]) -> list[str]:
    """Return for each key whether it is there, and "torn" where its lookup says so."""
    found = []
    with KVStore(copy) as store:
        for key in keys:
            try:
                found.append("there" if key in store else "not there")
            except CorruptStoreError as error:
                told = ("torn while it was made", f"kvstore-inspect repair {copy}")
                found.append("torn" if all(text in str(error) for text in told) else str(error))
    return found


def test_copy_begun_before_the_first_change_and_ended_after_it(path: Path) -> None:
    """The head says that the file was closed, and its checksum is right; the table is a later one.

    Of 20,000 keys that nobody had touched 6,910 were "not there", and could be created once more.
    """
    still = {f"stay {number}": {"n": number} for number in range(5_000)}
    with KVStore(path) as store:
        for key, value in still.items():
            store.create(key, value)
    with KVStore(path) as store:
        store.read("stay 1")
        before = open_contents(store)
        for number in range(20_000):
            store.create(f"new {number}", {})
        after = open_contents(store)
    assert before[STATE_OFFSET]
    # It is longer by then, and what has come is records: opening itself can tell.
    copy = write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))
    with pytest.raises(CorruptStoreError, match="longer than its contents"):
        KVStore(copy)
    assert copy.read_bytes()[:STATE_OFFSET] == before[:STATE_OFFSET]
    # Copied no further than it was at first, it opens, and every lookup can tell.
    cut = forwards([before, after], [HEAD])[: len(before)]
    found = outcomes(write_image(copy, cut), list(still))
    assert set(found) == {"there", "torn"}
    assert not use(copy, cut, still, seeded_random())


def test_segment_that_was_split_while_it_was_copied(path: Path) -> None:
    """The directory of before leads all its keys to what is by now the lower half."""
    with KVStore(path) as store:
        names = names_in_one_segment(store)
        still = {name: {"name": name} for name in islice(names, SPLIT_AT)}
        for name, value in still.items():
            store.create(name, value)
    with KVStore(path) as store:
        before = open_contents(store)
        store.create(next(names), {})
        after = open_contents(store)
        assert store.stats().segments == 17
    for copy in (forwards([before, after], [HEAD]), backwards([before, after], [HEAD])):
        found = outcomes(write_image(path.with_suffix(".copy"), copy), list(still))
        assert "not there" not in found
        # Backwards the head is of after: not closed, so it is rebuilt, and right.
        assert ("torn" in found) == bool(copy[STATE_OFFSET])
    rng = seeded_random()
    for _ in range(5):
        use(path.with_suffix(".copy"), shuffled([before, after], rng), still, rng)


def test_segment_that_was_rewritten_in_place_while_it_was_copied(path: Path) -> None:
    """Depth and prefix are as before: that keys went back to their home pages, rewrites tell."""
    with KVStore(path) as store:
        names = names_in_one_segment(store, homes=2)
        going = list(islice(names, 120))
        for name in going:
            store.create(name, {})
        still = {name: {"name": name} for name in islice(names, 120)}
        for name, value in still.items():  # their home pages are full, or will be
            store.create(name, value)
    with KVStore(path) as store:
        before = open_contents(store)
        for name in going:
            store.delete(name)
        hash_of_one = key_hash(next(iter(still)).encode(), store._file.hash_seed)
        segment = store._file.directory[hash_of_one >> 49] << EXTENT_SHIFT
        assert store._parts.segments.split_or_compact(hash_of_one, 0)
        after = open_contents(store)
    pages = [segment // BUCKET_SIZE + number for number in range(BUCKET_COUNT + 1)]
    torn = 0
    for page in pages[:-1]:
        # The home page of before leads on to that of after, from which the key has gone home.
        copy = bytearray(before)
        copy[page * BUCKET_SIZE : pages[-1] * BUCKET_SIZE] = after[
            page * BUCKET_SIZE : pages[-1] * BUCKET_SIZE
        ]
        image = bytes(copy[: len(before)])
        found = outcomes(write_image(path.with_suffix(".copy"), image), list(still))
        assert "not there" not in found
        torn += "torn" in found
    assert torn


def merged_while_copied(path: Path) -> tuple[dict[str, dict[str, str]], list[bytes]]:
    """Return what nobody touched, and a file before, amid and after a merge, then filled again."""
    with KVStore(path) as store:
        names = names_in_one_segment(store)
        still = {name: {"name": name} for name in islice(names, 300)}
        for name, value in still.items():
            store.create(name, value)
        going = list(islice(names, 2 * SPLIT_AT))
        for name in going:
            store.create(name, {})
        for name in going:
            store.delete(name)
        assert store.stats().segments >= 18
    with KVStore(path) as store:
        images = [open_contents(store)]
        write = store._file.write

        def watch(offset: int, data: bytes) -> None:
            if len(data) >= BUCKET_SIZE:
                images.append(open_contents(store))
            write(offset, data)

        store._file.write = watch
        assert store._all_keys.merge_segments()
        store._file.write = write
        images.append(open_contents(store))
        for number in range(8):  # in the extents that the table gave back
            store.create(f"large {number}", {"text": "x" * 16_000})
        images.append(open_contents(store))
    images.append(path.read_bytes())
    return still, images


def test_segments_that_merged_while_they_were_copied(path: Path) -> None:
    """The directory of before leads half of the keys to what is zeros by now, or records."""
    still, images = merged_while_copied(path)
    copy = path.with_suffix(".copy")
    for later in (images[-3], images[-2]):
        found = outcomes(write_image(copy, forwards([images[0], later], [HEAD])), list(still))
        assert set(found) == {"there", "torn"}
        # Backwards the head is of after: not closed, so it is rebuilt, and right.
        found = outcomes(write_image(copy, backwards([images[0], later], [HEAD])), list(still))
        assert set(found) == {"there"}


def test_segments_that_merged_and_were_closed_while_they_were_copied(path: Path) -> None:
    """The directory of after leads all keys to what were two halves before."""
    still, images = merged_while_copied(path)
    copy = path.with_suffix(".copy")
    found = outcomes(write_image(copy, backwards([images[0], images[-1]], [HEAD])), list(still))
    assert set(found) == {"there", "torn"}


def test_pages_of_any_moment_of_a_merge_hide_no_key(path: Path) -> None:
    still, images = merged_while_copied(path)
    rng = seeded_random()
    for head in (images[0], images[-1]):
        for _ in range(6):
            image = shuffled(images, rng)
            start = HEAD * BUCKET_SIZE
            use(path.with_suffix(".copy"), head[:start] + image[start:], still, rng)


def shapes(image: bytes, extent: int) -> list[int]:
    """Return the shape of each bucket of a segment."""
    first = (extent << EXTENT_SHIFT) + SHAPE_OFFSET
    return [
        U64.unpack_from(image, first + number * BUCKET_SIZE)[0] for number in range(BUCKET_COUNT)
    ]


def segment_of(store: KVStore, name: str) -> int:
    return store._file.directory[key_hash(name.encode(), store._file.hash_seed) >> 49]


def test_each_rewrite_split_merge_and_rebuild_gives_all_pages_a_shape_that_none_had(
    path: Path,
) -> None:
    seen: list[int] = []

    def note(extent: int) -> None:
        found = shapes(path.read_bytes(), extent)
        assert len(set(found)) == 1, "pages of one segment differ"
        assert found[0] not in seen, "as at another moment"
        seen.append(found[0])

    with KVStore(path) as store:
        seed = store._file.hash_seed
        names = names_in_one_segment(store, homes=4)
        first, *others = islice(names, 400)
        for name in (first, *others):
            store.create(name, {})
        extent = segment_of(store, first)
        note(extent)
        for name in others:
            store.delete(name)
        assert store._parts.segments.split_or_compact(
            key_hash(first.encode(), store._file.hash_seed), 0
        )
        note(extent)
        for name in islice(names, SPLIT_AT):
            store.create(name, {})
        note(extent)
        upper = next(e for e in set(store._file.directory) if e not in seen and e > extent + 10)
        note(upper)
        for name in set(store) - {first}:
            store.delete(name)
        assert store._all_keys.merge_segments()
        note(extent)
        for name in islice(names, SPLIT_AT):
            store.create(name, {})
        note(extent)
        note(segment_of(store, max(store, key=lambda name: key_hash(name.encode(), seed))))
        crashed = open_contents(store)
    for _ in range(3):
        path.write_bytes(crashed)
        with KVStore(path) as store:
            crashed = open_contents(store)
            note(segment_of(store, first))


def test_rewrite_that_was_undone_is_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages may be in a copy, and the next rewrite places the keys otherwise."""
    with open_components(path) as parts:
        names = (b"%d" % number for number in count())
        own = (name for name in names if parts.hash(name) >> STRIPE_SHIFT == 7)
        keys = list(islice(own, SEGMENT_SLOTS // 2 + 1))
        for key in keys:
            parts.store(key, b"{}")
        extent = parts.file.directory[parts.hash(keys[0]) >> 49]
        before = shapes(parts.file.map[: parts.file.size], extent)[0]
        seen: list[int] = []
        write = parts.file.write

        def fail(offset: int, data: bytes) -> None:
            write(offset, data)
            if len(data) == EXTENT_SIZE:
                seen.append(U64.unpack_from(data, SHAPE_OFFSET)[0])
                if len(seen) == 2:
                    raise KeyboardInterrupt

        monkeypatch.setattr(parts.file, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            parts.segments.split_or_compact(parts.hash(keys[0]), 0)
        monkeypatch.setattr(parts.file, "write", write)
        assert shapes(parts.file.map[: parts.file.size], extent)[0] == before
        assert parts.segments.split_or_compact(parts.hash(keys[0]), 0)
        assert shapes(parts.file.map[: parts.file.size], extent)[0] not in {before, *seen}
        parts.file.require_rebuild()


@pytest.mark.parametrize(
    "count_keys",
    [len, lambda store: len(set(store)), lambda store: len(dict(store))],
    ids=["len", "iteration", "items"],
)
def test_what_goes_through_all_says_so_of_a_page_of_another_moment(
    path: Path, count_keys: Callable[[KVStore], int]
) -> None:
    with KVStore(path) as store:
        for name in islice(names_in_one_segment(store), 300):
            store.create(name, {}, ttl=1)
        extent = segment_of(store, name)
    contents = bytearray(path.read_bytes())
    contents[(extent << EXTENT_SHIFT) + 3 * BUCKET_SIZE + SHAPE_OFFSET + 6] += 1
    path.write_bytes(contents)
    clock = FakeClock()
    with KVStore(path) as store, pytest.MonkeyPatch.context() as patch:
        clock.set(2**47 / 1_000)
        patch.setattr("kvstore.clock.time_ns", clock)
        for act in (count_keys, KVStore.purge_expired):
            with pytest.raises(CorruptStoreError, match="torn while it was made"):
                act(store)


def test_count_that_pages_of_another_moment_would_make_wrong_is_refused(
    path: Path, clock: FakeClock
) -> None:
    """What has expired was created after the head was copied, and is not in its count."""
    with KVStore(path) as store:
        names = names_in_one_segment(store)
        store.create("first", {}, ttl=5)
        for name in islice(names, 10):
            store.create(name, {})
        going = next(names)
        store.create(going, {}, ttl=5)
    with KVStore(path) as store:
        before = open_contents(store)
        for name in islice(names, 5):
            store.create(name, {}, ttl=5)
        after = open_contents(store)
    clock.advance(10)
    copy = write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))
    with KVStore(copy) as store, pytest.raises(CorruptStoreError, match="live slots, but it has"):
        len(store)


def test_page_of_an_index_before_it_was_rebuilt_is_not_taken_for_one_of_today(path: Path) -> None:
    """It was left in an extent that is a segment's once more: its depth and prefix fit."""
    with KVStore(path) as store:
        store.create("key", {})
        extent = segment_of(store, "key")
    contents = bytearray(path.read_bytes())
    for number in range(BUCKET_COUNT):
        page = (extent << EXTENT_SHIFT) + number * BUCKET_SIZE
        contents[page + SHAPE_OFFSET + 4] += 1
        contents[page + 32 : page + 112] = bytes(80)
    path.write_bytes(contents)
    with KVStore(path) as store:
        for use_key in (store.read, store.get, store.ttl, store.delete, store.__contains__):
            with pytest.raises(CorruptStoreError, match="rebuilds"):
                use_key("key")
        with pytest.raises(CorruptStoreError, match="rebuilds"):
            store.create("key", {})


def test_deleting_what_was_added_later_does_not_give_up_what_was_there(path: Path) -> None:
    """The extent map of before knows of one record in the extent: it seemed to be the last."""
    with KVStore(path) as store:
        for number in range(20):
            store.create(f"{number}", {"text": "x" * 300})
        for number in range(1, 20):
            store.delete(f"{number}")
    with KVStore(path) as store:
        before = open_contents(store)
        for number in range(1, 20):
            store.create(f"{number}", {"text": "x" * 300})
        after = open_contents(store)
    copy = write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))
    with KVStore(copy) as store:
        assert store.read("0") == {"text": "x" * 300}
        for number in range(1, 20):
            with pytest.raises(CorruptStoreError, match="but it has 19 others"):
                store.delete(f"{number}")
        for number in range(100):
            store.create(f"larger {number}", {"text": "x" * 500})
        assert store.read("0") == {"text": "x" * 300}
    with KVStore(copy) as store:
        assert store.read("0") == {"text": "x" * 300}


def torn_before_its_first_change(path: Path, old: int, later: int, text: str) -> Path:
    """Return a copy whose head is of a closed store, and whose records are of a later moment."""
    with KVStore(path) as store:
        for number in range(old):
            store.create(f"old {number}", {"n": number})
    with KVStore(path) as store:
        before = open_contents(store)
        for number in range(later):
            store.create(f"later {number}", {"text": text})
        after = open_contents(store)
    return write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))


def created_until_told(copy: Path, sizes: Iterable[int]) -> tuple[dict[str, dict[str, str]], int]:
    """Create records of these sizes in a copy; return those that it took, and how many it did not.

    The process is killed then, as far as the file can tell: it is left as it was when it was open.
    """
    taken: dict[str, dict[str, str]] = {}
    said: list[str] = []
    with KVStore(copy) as store:
        for number, size in enumerate(sizes):
            try:
                store.create(f"new {number}", {"text": "y" * size})
            except CorruptStoreError as error:
                said.append(str(error))
            else:
                taken[f"new {number}"] = {"text": "y" * size}
        killed = copy.read_bytes()
    copy.write_bytes(killed)
    assert all("does not know" in each for each in said)
    assert all(f"kvstore-inspect repair {copy}" in each for each in said)
    return taken, len(said)


def test_nothing_is_created_beside_records_of_a_later_moment(path: Path) -> None:
    """In what the map of before calls free there are whole records, of another class.

    Twenty new ones went beside them. The next rebuild gave the extent to the class with more bytes:
    "old 100 new 0".
    """
    copy = torn_before_its_first_change(path, 100, 60, "x" * 4_000)
    taken, refused = created_until_told(copy, [200] * 20)
    assert not taken
    assert refused == 20
    with KVStore(copy) as store:  # it was told of damage, and so it is rebuilt
        assert all(store.read(f"old {number}") == {"n": number} for number in range(100))
        store.create("now it can", {})


def test_nothing_is_created_in_an_extent_that_was_of_another_class_later(path: Path) -> None:
    """Its entry says that it has room for one class, its records are of another by then."""
    with KVStore(path) as store:
        for number in range(3):
            store.create(f"going {number}", {"text": "x" * 1_000})
        store.create("stays", {})
    with KVStore(path) as store:
        before = open_contents(store)
        for number in range(3):
            store.delete(f"going {number}")
        for number in range(40):
            store.create(f"later {number}", {"text": "x" * 3_000})
        after = open_contents(store)
    copy = write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))
    taken, refused = created_until_told(copy, [1_000] * 20)
    assert refused
    with KVStore(copy) as store:
        assert store.read("stays") == {}
        assert all(store.read(key) == value for key, value in taken.items())


def test_deleting_a_record_past_what_was_ever_taken_is_refused(path: Path) -> None:
    """Its slot is newer than its extent's entry. On the free list it had the map contradict itself.

    The copy was closed without an error then, and refused to open from then on.
    """
    copy = torn_before_its_first_change(path, 100, 60, "")
    told = 0
    with KVStore(copy) as store:
        for number in range(60):
            if f"later {number}" in store:
                with pytest.raises(CorruptStoreError, match="were ever taken"):
                    store.delete(f"later {number}")
                assert f"later {number}" in store
                told += 1
    assert told
    with KVStore(copy) as store:
        assert all(store.read(f"old {number}") == {"n": number} for number in range(100))
        store.delete("later 0")
    with KVStore(copy) as store:
        assert "later 0" not in store


def test_what_expired_past_what_was_ever_taken_is_not_purged(path: Path, clock: FakeClock) -> None:
    with KVStore(path) as store:
        for number in range(100):
            store.create(f"old {number}", {"n": number}, ttl=5)
    with KVStore(path) as store:
        before = open_contents(store)
        for number in range(60):
            store.create(f"later {number}", {"n": number}, ttl=5)
        after = open_contents(store)
    copy = write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))
    clock.advance(10)
    with KVStore(copy) as store, pytest.raises(CorruptStoreError, match="were ever taken"):
        store.purge_expired()
    with KVStore(copy) as store:
        assert len(store) == 0
        store.create("later 0", {})
    with KVStore(copy) as store:
        assert list(store) == ["later 0"]


def test_former_pages_of_the_table_are_not_taken_for_records_of_a_later_moment(path: Path) -> None:
    """Rebuilt, split, emptied and filled again: whatever an extent was, it can be of any class."""
    rng = seeded_random()
    sizes = (10, 100, 400, 2_000, 16_000)
    with KVStore(path, max_bytes=8 * 1024 * 1024) as store:
        for number in range(5_000):
            store.create(f"{number}", {}, ttl=10_000)
    for round_ in range(4):
        path.write_bytes(_left_open(path, rng, sizes))
        with KVStore(path, max_bytes=8 * 1024 * 1024) as store:
            for key in rng.sample(sorted(store), len(store) * 9 // 10):
                store.delete(key)
            for size in sizes:
                for number in range(40):
                    store.create(f"{round_} {size} {number}", {"text": "z" * size})


def _left_open(path: Path, rng: random.Random, sizes: tuple[int, ...]) -> bytes:
    """Return the file as it was in the middle of an opening: the next one rebuilds the index."""
    with KVStore(path, max_bytes=8 * 1024 * 1024) as store:
        for number in range(200):
            store.create(f"r {number}", {"text": "z" * rng.choice(sizes)})
        for number in range(200):
            store.delete(f"r {number}")
        return path.read_bytes()


def test_counts_that_creating_made_impossible_are_not_vouched_for(path: Path) -> None:
    """A segment's entry is older than its pages, and knows of no tombstones for new keys to take.

    So it came to have more live slots than used ones, under a clean flag, and the closed file
    refused to open.
    """
    with KVStore(path) as store:
        names = names_in_one_segment(store, homes=1)
        first = list(islice(names, SLOT_COUNT))
        for name in first:
            store.create(name, {})
    with KVStore(path) as store:
        before = open_contents(store)
        for name in first[1:]:
            store.delete(name)
        after = open_contents(store)
    copy = write_image(path.with_suffix(".copy"), forwards([before, after], [HEAD]))
    created: list[str] = []
    with KVStore(copy) as store:
        for name in islice(names, 20):
            store.create(name, {})
            created.append(name)
    with KVStore(copy) as store:
        assert {first[0], *created} <= set(store)
