"""Files with damage in them, and what a store may say of one."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from support.damage import KINDS, SIZES, Original, State, build
from support.workload import Value, make_value

from kvstore import (
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    KVStoreError,
)
from kvstore.format.layout import (
    MAX_FILE_SIZE,
    SLOT_RECORD_OFFSET,
    key_hash,
)

from .laboratory import Experiment, stop_clock_between_calls

FILES = 20  # a trial, all of one original


def use_damaged_files(kind: str, folder: Path, rng: random.Random) -> int:
    """Damage a store in that way, some times, and use each; return how many."""
    stop_clock_between_calls()
    path = folder / "damaged.kvs"
    live = build(path, rng)
    original = Original(path.read_bytes())
    for number in range(FILES):
        contents, damage = KINDS[kind](original, rng)
        path.write_bytes(contents)
        try:
            use(path, contents, live, original.may_hide_keys(damage), rng)
        except BaseException as error:
            error.add_note(f"file {number}, damage: {'; '.join(damage.said)}")
            raise
    return FILES


def use(
    path: Path,
    contents: bytes,
    live: State,
    may_hide_keys: bool,
    rng: random.Random,
    *,
    spares_others: bool = True,
    max_bytes: int = MAX_FILE_SIZE,
) -> None:
    """Open a damaged file and do everything with it: right values or errors, and none else.

    Args:
        path: the file.
        contents: what is in it.
        live: what it held before the damage.
        may_hide_keys: whether keys may be absent without an error.
        rng: what decides.
        spares_others: what could be read is there after changes, too. Not where the index was
            forged: one that denies a record, with right checksums, has it overwritten, and the
            damage that this makes is found.
        max_bytes: as of `KVStore`.
    """
    try:
        store = KVStore(path, max_bytes=max_bytes)
    except KVStoreError:
        assert path.read_bytes() == contents, "a file that was refused has changed"
        return
    with store:
        before = {key: look_at(store, key, live[key]) for key in live}
        absent = [key for key, outcome in before.items() if outcome == "absent"]
        assert may_hide_keys or not absent, f"absent without damage to the index: {absent[:5]}"
        iterate(store, live, before)
        if rng.random() < 0.3:
            back_up(store, live, before, max_bytes)
        read_together(store, live, before)
        change(store, live, before, rng)
        if rng.random() < 0.5:
            _or_error(store.compact)  # what is damaged stays in its place, all else moves
        # Damage stays with whom it hit: what could be read can be read, whatever was written.
        right = {key: value for key, value in live.items() if before[key] == "right"}
        for key, value in right.items():
            outcome = look_at(store, key, value)
            assert outcome == "right" or not spares_others, f"{key!r} was right before the changes"
        for act in (store.sync, store.stats, store.purge_expired, store.__len__):
            _or_error(act)
        right = {key: value for key, value in right.items() if outlives_the_index(store, key)}
    with KVStore(path, max_bytes=max_bytes) as store:
        for key, value in right.items():
            outcome = look_at(store, key, value)
            assert outcome == "right" or not spares_others, f"{key!r} was right before the closing"


def outlives_the_index(store: KVStore, key: str) -> bool:
    """Return whether a key that can be read has its name in its record, not in its slot alone.

    A read needs the one, and rebuilding the index the other.
    """
    encoded = key.encode()
    slot = store._parts.slots.find(key_hash(encoded, store._file.hash_seed), encoded)
    return store._parts.records.contains_record_of(
        store._file.words[slot + SLOT_RECORD_OFFSET >> 3], encoded
    )


def look_at(store: KVStore, key: str, value: Value) -> str:
    """Return "right", "error" or "absent"; anything else fails."""
    try:
        found = store.read(key)
    except KeyNotFoundError:
        return "absent"
    except KVStoreError:
        _or_error(lambda: store.read_bytes(key))
        _or_error(lambda: key in store)
        _or_error(lambda: store.ttl(key))
        return "error"
    assert found == value, f"{key!r} reads as {str(found)[:80]}, a wrong value"
    assert store.get(key) == value
    assert key in store
    return "right"


def read_together(store: KVStore, live: State, before: dict[str, str]) -> None:
    """Read all at once: what can be read is, beside what is absent; damage is told of."""
    readable = [key for key, outcome in before.items() if outcome != "error"]
    right = {key: live[key] for key in readable if before[key] == "right"}
    assert store.get_many(readable) == right
    for key in list(before.keys() - set(readable))[:40]:
        assert isinstance(_or_error(lambda: store.get_many([*right, key])), KVStoreError)  # noqa: B023


def iterate(store: KVStore, live: State, before: dict[str, str]) -> None:
    """Walk over all: it ends, and gives right pairs, each once, all of them unless it raises."""
    seen = []
    try:
        for key, value in store.items():
            assert live.get(key) == value, f"items gave {key!r}: {str(value)[:80]}"
            seen.append(key)
    except KVStoreError:
        pass
    else:
        assert {key for key, outcome in before.items() if outcome == "right"} <= set(seen)
    assert len(seen) == len(set(seen)), "a key came twice"
    names = []
    try:
        for key in store:
            names.append(key)
            assert len(names) < 100_000, "no end of keys"
    except KVStoreError:
        pass
    else:
        assert {key for key, outcome in before.items() if outcome == "right"} <= set(names)


def back_up(store: KVStore, live: State, before: dict[str, str], max_bytes: int) -> None:
    """Make a backup: it holds every key that can be told of, or there is none."""
    out = store.path.with_suffix(".backup")
    if isinstance(_or_error(lambda: store.backup(out)), KVStoreError):
        assert not out.exists(), "the backup failed, and is there"
        return
    assert "error" not in before.values(), "a damaged key was left out"
    with KVStore(out, max_bytes=max_bytes) as copy:
        found = dict(copy.items())
    out.unlink()
    assert found == {key: live[key] for key, outcome in before.items() if outcome == "right"}


def change(store: KVStore, live: State, before: dict[str, str], rng: random.Random) -> None:
    """Delete, put and create: it works, or raises a `KVStoreError`; what worked can be seen."""
    harmed = [key for key in sorted(live) if before[key] == "error"]
    for key in harmed[:40] + rng.sample(sorted(live), 40):
        if before[key] in ("right", "error") and rng.random() < 0.4:
            before[key] = _put(store, key, rng) or before[key]
        elif before[key] == "right":
            if _or_error(lambda: store.delete(key)) is None and key not in store:  # noqa: B023
                before[key] = "deleted"
        elif before[key] == "error":
            before[key] = _create_over(store, key, live[key]) or "error"
    # Of the sizes that `build` deleted some of: these take their blocks.
    for number in range(500, 580):
        key = str(number)
        value = make_value(key, number, rng.choice(SIZES))
        if _or_error(lambda: store.create(key, value)) is None:  # noqa: B023
            assert look_at(store, key, value) == "right", f"{key!r} was created just now"


def _put(store: KVStore, key: str, rng: random.Random) -> str | None:
    """Put a key, and now and then delete it; return "put", or None where that raised an error."""
    value = {"put": "over it", "x": "x" * rng.choice(SIZES)}
    put = rng.choice((lambda: store.put(key, value), lambda: store.put_many({key: value})))
    if isinstance(_or_error(put), KVStoreError):
        return None
    assert look_at(store, key, value) == "right", f"{key!r} was put just now"
    if rng.random() < 0.3:
        _or_error(lambda: store.delete(key))
    elif rng.random() < 0.1:
        _or_error(lambda: store.delete_many([key]))
    return "put"


def _create_over(store: KVStore, key: str, value: Value) -> str | None:
    """Create a damaged key: as a rule it has to be deleted first."""
    try:
        store.create(key, {"over": "damage"})
    except KeyExistsError:
        if _or_error(lambda: store.delete(key)) is None:
            _or_error(lambda: store.create(key, value))
    except KVStoreError:
        pass
    else:
        return "created"
    return None


def _or_error(act: Callable[[], Any]) -> Any:
    """Return what it returns, or the `KVStoreError` that it raises."""
    try:
        return act()
    except KVStoreError as error:
        return error


EXPERIMENTS = tuple(
    Experiment(f"damage-{name}", fault, "files", partial(use_damaged_files, kind))
    for name, kind, fault in (
        ("bits", "flip_bits", "one bit to twenty flipped"),
        ("bytes", "garble_bytes", "1 to 512 bytes overwritten"),
        ("zeroed-pages", "zero_pages", "pages of zeros"),
        ("swapped-pages", "swap_pages", "pages exchanged, or one over the other"),
        ("truncation", "truncate", "the file cut off anywhere"),
        ("garbage-at-the-end", "append_garbage", "bytes added at the end"),
        ("swapped-slots", "swap_sectors_of_the_index", "slots or sectors of the table exchanged"),
    )
)
