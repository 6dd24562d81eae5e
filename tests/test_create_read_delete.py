"""The three operations, opening and closing, and what stands after each."""

import os
from pathlib import Path
from typing import Any

import pytest
from support import processes, scaled, seeded_random
from support.files import digest, open_size, size
from support.platforms import needs_symbolic_links
from support.stores import OpenStore
from support.values import sized_value

import kvstore
from kvstore import (
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    StoreClosedError,
    StoreLockedError,
    UnsupportedFormatError,
)


def test_the_example_of_the_readme_works(tmp_path: Path) -> None:
    with KVStore(tmp_path / "data.kvs") as store:
        store.create("user:1", {"name": "Ada"}, ttl=3600)
        assert store.read("user:1") == {"name": "Ada"}
        store.delete("user:1")
        assert len(store) == 0


def test_a_new_store_is_empty(store: KVStore) -> None:
    assert len(store) == 0
    assert list(store) == []
    assert dict(store) == {}
    with pytest.raises(KeyNotFoundError):
        store.read("k")


def test_what_was_created_is_read_until_it_is_deleted(store: KVStore) -> None:
    assert store.create("k", {"n": 1}) is None  # type: ignore[func-returns-value]
    assert store.read("k") == {"n": 1}
    assert store["k"] == {"n": 1}
    assert store.read_bytes("k") == b'{"n":1}'
    assert store.delete("k") is None  # type: ignore[func-returns-value]
    for call in (store.read, store.read_bytes, store.__getitem__, store.delete, store.ttl):
        with pytest.raises(KeyNotFoundError):
            call("k")


def test_create_never_replaces(store: KVStore) -> None:
    store.create("k", {"n": 1}, ttl=100)
    for value in ({"n": 1}, {"n": 2}, {}):
        with pytest.raises(KeyExistsError):
            store.create("k", value)
    assert store.read("k") == {"n": 1}
    assert store.ttl("k") is not None
    assert len(store) == 1


def test_create_after_delete_starts_anew(store: KVStore) -> None:
    for number in range(100):
        store.create("k", {"n": number, "p": "x" * number * 50})
        assert store.read("k")["n"] == number
        del store["k"]
        assert "k" not in store
    assert len(store) == 0


def test_arguments_may_be_named(store: KVStore) -> None:
    store.create(key="k", value={"n": 1}, ttl=60)
    assert store.read(key="k") == {"n": 1}
    assert store.read_bytes(key="k") == b'{"n":1}'
    assert store.get(key="k", default=None) == {"n": 1}
    assert store.ttl(key="k") == 60
    store.delete(key="k")
    assert store.get(key="k") is None


def test_thousands_of_keys_come_and_go(store: KVStore, open_store: OpenStore) -> None:
    """Through many growth steps of table and file: all there, then half, then all again."""
    count = 25_000
    for number in range(count):
        store.create(f"key:{number}", {"n": number})
    assert len(store) == count
    for number in range(0, count, 2):
        store.delete(f"key:{number}")
    assert len(store) == count // 2
    store.close()
    again = open_store()
    assert len(again) == count // 2
    for number in range(0, count, 2):
        again.create(f"key:{number}", {"again": number})
    for number in range(count):
        assert again.read(f"key:{number}") == {"n" if number % 2 else "again": number}


def test_a_long_random_walk_agrees_with_a_dict(open_store: OpenStore) -> None:
    """Values of all sizes, keys that come back, a reopening now and then."""
    random = seeded_random()
    store, model = open_store(), dict[str, Any]()
    for step in range(scaled(30_000)):
        key = f"{random.choice('ab')}{random.randrange(3000)}"
        chance = random.random()
        if chance < 0.5:
            value = sized_value(int(2 ** random.uniform(3.6, 14)), step)
            if key in model:
                with pytest.raises(KeyExistsError):
                    store.create(key, value)
            else:
                store.create(key, value)
                model[key] = value
        elif chance < 0.8:
            if key in model:
                store.delete(key)
                del model[key]
            else:
                with pytest.raises(KeyNotFoundError):
                    store.delete(key)
        else:
            assert store.get(key) == model.get(key)
        if random.random() < 3 / 10_000:
            store.close()
            store = open_store()
            assert len(store) == len(model)
    assert dict(store) == model


def test_deleting_and_creating_for_long_does_not_make_the_file_grow(store: KVStore) -> None:
    random = seeded_random()
    for number in range(500):
        store.create(f"k{number}", sized_value(1000, number))
    first_size = open_size(store)
    keys = list(store)
    for number in range(scaled(20_000)):
        place = random.randrange(len(keys))
        store.delete(keys[place])
        keys[place] = f"new{number}"
        store.create(keys[place], sized_value(1000, number))
    assert open_size(store) == first_size
    assert set(store) == set(keys)


def test_keys_come_and_go_for_long_in_a_table_that_is_nearly_full(
    store: KVStore, open_store: OpenStore
) -> None:
    """Where buckets overflow into the next ones, and deleted slots must not end a search."""
    random = seeded_random()
    keys = [f"k{number}" for number in range(17_000)]
    for key in keys:
        store.create(key, {})
    for number in range(scaled(20_000)):
        place = random.randrange(len(keys))
        store.delete(keys[place])
        keys[place] = f"new{number}"
        store.create(keys[place], {})
    assert sum(store.read(key) == {} for key in keys) == len(keys)
    assert set(store) == set(keys)
    store.close()
    again = open_store()
    for place in random.sample(range(len(keys)), len(keys) // 2):
        again.delete(keys[place])
        keys[place] = ""
    assert set(again) == set(keys) - {""}
    assert all(key in again for key in keys if key)


# --- opening --------------------------------------------------------------------------------------


def test_a_store_keeps_everything_over_many_openings(open_store: OpenStore) -> None:
    for number in range(20):
        with open_store() as store:
            assert len(store) == number
            assert all(store[f"k{before}"] == {"n": before} for before in range(number))
            store.create(f"k{number}", {"n": number})
        assert store.closed


def test_opening_without_change_keeps_the_contents(store: KVStore, open_store: OpenStore) -> None:
    store.create("k", {"n": 1})
    store.close()
    for _ in range(3):
        with open_store() as again:
            assert again.read("k") == {"n": 1}


def test_the_path_may_be_a_string_or_any_path_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path / "like.kvs")

    monkeypatch.chdir(tmp_path)
    for place in (str(tmp_path / "str.kvs"), tmp_path / "path.kvs", Place(), "relative.kvs"):
        with KVStore(place) as store:
            assert isinstance(store.path, Path)
            assert store.path.samefile(place)
            store.create("k", {})
    assert sorted(os.listdir(tmp_path)) == ["like.kvs", "path.kvs", "relative.kvs", "str.kvs"]


def test_a_store_opened_by_a_relative_path_outlives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = KVStore("relative.kvs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.create("k", {"n": 1})
    store.sync()
    store.close()
    assert os.listdir(tmp_path / "elsewhere") == []
    with KVStore(tmp_path / "relative.kvs") as again:
        assert again.read("k") == {"n": 1}


def test_the_file_is_the_only_one_the_store_makes(tmp_path: Path, open_store: OpenStore) -> None:
    for _ in range(2):
        store = open_store()
        for number in range(3000):
            store.create(f"{number}:{len(store)}", {"n": number})
            if number % 1000 == 0:
                store.sync()
        assert os.listdir(tmp_path) == ["test.kvs"]
        store.close()
        assert os.listdir(tmp_path) == ["test.kvs"]


@pytest.mark.parametrize(
    "length", [0, 1, 511, 512, 4096, 65_535, 65_536, 2 * 1024 * 1024, 5 * 2**20]
)
def test_a_file_of_nothing_but_zeros_becomes_a_new_store(
    path: Path, open_store: OpenStore, length: int
) -> None:
    path.write_bytes(bytes(length))
    store = open_store()
    assert len(store) == 0
    store.create("k", {"n": 1})
    store.close()
    assert open_store().read("k") == {"n": 1}


FOREIGN = {
    "one byte": b"x",
    "text": b"precious notes\n" * 100,
    "SQLite": b"SQLite format 3\0" + bytes(8176),
    "zeros, then a byte": bytes(2 * 1024 * 1024 - 1) + b"x",
    "a byte at the start of zeros": b"x" + bytes(2 * 1024 * 1024),
    "a byte within zeros": bytes(700_000) + b"x" + bytes(700_000),
    "a byte past the largest store": None,
}


@pytest.mark.parametrize("contents", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(
    path: Path, contents: bytes | None
) -> None:
    if contents is None:
        with path.open("wb") as file:
            file.seek(1_000_000_000)
            file.write(b"x")
        before = size(path)
        with pytest.raises(UnsupportedFormatError):
            KVStore(path)
        assert size(path) == before
        return
    path.write_bytes(contents)
    with pytest.raises(UnsupportedFormatError):
        KVStore(path)
    assert path.read_bytes() == contents


@needs_symbolic_links
def test_a_second_opener_in_this_process_is_refused_and_disturbs_nobody(
    store: KVStore, open_store: OpenStore, tmp_path: Path
) -> None:
    store.create("k", {"n": 1})
    (tmp_path / "link.kvs").symlink_to(store.path)
    os.link(store.path, tmp_path / "hard link.kvs")
    before = digest(store.path)
    for place in (store.path, tmp_path / "link.kvs", tmp_path / "hard link.kvs"):
        with pytest.raises(StoreLockedError):
            KVStore(place)
    assert digest(store.path) == before
    store.create("l", {"n": 2})
    store.close()
    assert dict(open_store()) == {"k": {"n": 1}, "l": {"n": 2}}


def test_two_stores_in_one_process_do_not_mix(tmp_path: Path, open_store: OpenStore) -> None:
    one, two = open_store(tmp_path / "one.kvs"), open_store(tmp_path / "two.kvs")
    for number in range(1000):
        one.create(f"k{number}", {"one": number})
        two.create(f"k{number}", {"two": number})
    one.close()
    assert all(two[f"k{number}"] == {"two": number} for number in range(1000))


# --- closing --------------------------------------------------------------------------------------


def test_close_is_idempotent(store: KVStore) -> None:
    assert store.closed is False
    for _ in range(3):
        store.close()
        assert store.closed is True


def test_the_with_statement_closes_also_on_an_error(open_store: OpenStore) -> None:
    with pytest.raises(ZeroDivisionError), open_store() as store:
        store.create("k", {"n": 1})
        raise ZeroDivisionError
    assert store.closed
    assert open_store().read("k") == {"n": 1}


def test_with_gives_the_store_itself(store: KVStore) -> None:
    with store as inside:
        assert inside is store
        assert not store.closed
    assert store.closed


def test_every_member_of_a_closed_store_says_that_it_is_closed(store: KVStore) -> None:
    store.create("k", {"n": 1})
    started = iter(store)
    store.close()
    for call in (
        lambda: store.create("new", {}),
        lambda: store.read("k"),
        lambda: store["k"],
        lambda: store.read_bytes("k"),
        lambda: store.get("k"),
        lambda: store.delete("k"),
        lambda: store.__delitem__("k"),
        lambda: store.put("k", {}),
        lambda: store.__setitem__("k", {}),
        lambda: store.touch("k", 10),
        lambda: store.pop("k"),
        lambda: store.pop("k", None),
        lambda: store.setdefault("k", {}),
        lambda: store.update(k={}),
        lambda: store.get_many(["k"]),
        lambda: store.put_many({"k": {}}),
        lambda: store.delete_many(["k"]),
        store.popitem,
        store.clear,
        lambda: bool(store),
        lambda: store.ttl("k"),
        lambda: "k" in store,
        lambda: len(store),
        lambda: list(store),
        lambda: list(store.keys()),
        lambda: list(store.values()),
        lambda: list(store.items()),
        lambda: dict(store),
        store.purge_expired,
        store.sync,
        store.stats,
        lambda: next(started),
    ):
        with pytest.raises(StoreClosedError):
            call()
    assert store.closed
    assert store.path.name == "test.kvs"


def test_a_store_left_open_is_closed_as_the_interpreter_exits(
    path: Path, open_store: OpenStore
) -> None:
    """Nothing is printed either: no warning, no traceback."""
    code = "import sys, kvstore; s = kvstore.KVStore(sys.argv[1]); s.create('k', {'n': 1})"
    assert processes.run_python(code, path) == ""
    assert open_store().read("k") == {"n": 1}


def test_a_store_that_was_forgotten_can_be_opened_again(path: Path, open_store: OpenStore) -> None:
    """An opening that failed, or a store never closed in a process that ended, blocks nobody."""
    code = (
        "import os, sys, kvstore; s = kvstore.KVStore(sys.argv[1]);"
        "s.create('k', {'n': 1}); sys.stdout.flush(); os._exit(0)"
    )
    processes.run_python(code, path)
    with pytest.raises(ValueError, match="max_bytes"):
        KVStore(path, max_bytes=1)
    assert open_store().read("k") == {"n": 1}


# --- the rest -------------------------------------------------------------------------------------


def test_sync_may_be_called_at_any_time(store: KVStore) -> None:
    assert store.sync() is None
    store.create("k", {"n": 1})
    store.sync()
    store.sync()
    assert store.read("k") == {"n": 1}


def test_a_durable_store_works_like_any_other(open_store: OpenStore) -> None:
    store = open_store(durable=True)
    for number in range(20):
        store.create(f"k{number}", {"n": number})
    for number in range(10):
        store.delete(f"k{number}")
    store.close()
    assert dict(open_store()) == {f"k{number}": {"n": number} for number in range(10, 20)}


def test_options_are_for_one_opening_and_not_kept_in_the_file(
    store: KVStore, open_store: OpenStore
) -> None:
    store.create("k", {"n": 1})
    store.close()
    for options in ({"max_bytes": 8 * 2**20}, {"durable": True}, {"timeout": 1.5}, {}):
        with open_store(**options) as again:
            assert again.read("k") == {"n": 1}


def test_stats_counts_the_records_and_the_bytes_of_the_file(store: KVStore) -> None:
    assert isinstance(store.stats(), kvstore.StoreStats)
    for number in range(100):
        store.create(f"k{number}", {"n": number})
    stats = store.stats()
    assert stats.records == 100
    assert stats.file_size == open_size(store)
