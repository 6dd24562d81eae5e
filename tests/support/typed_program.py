"""A user's program that calls all of the store: what type checkers are shown, and what is run.

It is in the words of a user: only public names, and no `Any` of its own. What a checker has to
refuse is marked as ignored; under `mypy --strict` a mark that nothing needs is an error as well.
"""

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypedDict, assert_type, cast

import kvstore
from kvstore import (
    IMPLEMENTATION,
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    KVStoreError,
    StoreBusyError,
    StoreClosedError,
    StoreFullError,
    StoreLockedError,
    StoreStats,
    UnsupportedFormatError,
    ValueTooLargeError,
)


class Settings(TypedDict):
    theme: str
    size: int


class Session(TypedDict):
    user: str


def one_key(store: KVStore) -> None:
    """Without an annotation of its own, the values of a store are dicts of anything."""
    store.create("user:1", {"name": "Ada", "langs": ["en", "fr"], "born": None}, ttl=3600)
    assert_type(store.read("user:1"), dict[str, Any])
    assert_type(store["user:1"], dict[str, Any])
    assert_type(store.read_bytes("user:1"), bytes)
    assert_type(store.get("user:1"), dict[str, Any] | None)
    assert_type(store.get("user:2", None), dict[str, Any] | None)
    assert_type(store.get("user:2", 0), dict[str, Any] | int)
    assert_type(store.ttl("user:1"), int | None)
    assert_type("user:1" in store, bool)
    store.put("user:1", {"name": "Ada"}, 60)
    store["user:2"] = {"visits": 1}
    counts: dict[str, int] = {"visits": 2}
    store.put("user:2", counts)
    store.touch("user:2", 60)
    store.touch("user:2", None)
    assert_type(store.setdefault("user:3", {"visits": 0}, ttl=60), dict[str, Any])
    store.delete("user:1")
    del store["user:2"]
    assert_type(store.pop("user:3"), dict[str, Any])
    assert_type(store.pop("user:3", None), dict[str, Any] | None)
    assert_type(store.pop("user:3", "none"), dict[str, Any] | str)


def many_keys(store: KVStore) -> None:
    """Batches take mappings and iterables of pairs, lists and generators of keys."""
    store.put_many({"a": {"n": 1}, "b": {"n": 2}}, ttl=60)
    store.put_many((f"item:{number}", {"n": number}) for number in range(10))
    store.put_many(store)
    store.update({"c": {"n": 3}})
    store.update([("d", {"n": 4})], e={"n": 5})
    assert_type(store.get_many(["a", "b"]), dict[str, dict[str, Any]])
    assert_type(store.delete_many(key for key in ("a", "z")), int)
    assert_type(store.popitem(), tuple[str, dict[str, Any]])


def all_keys(store: KVStore) -> None:
    """A store is a mapping for whoever takes one."""
    assert_type(len(store), int)
    assert_type(bool(store), bool)
    assert_type(iter(store), Iterator[str])
    assert_type(sorted(store.keys()), list[str])
    for key, value in store.items():
        assert_type(key, str)
        assert_type(value, dict[str, Any])
    for value in store.values():
        assert_type(value, dict[str, Any])
    assert_type(dict(store), dict[str, dict[str, Any]])
    assert_type(names(store), list[str])
    add(store)


def names(mapping: Mapping[str, Mapping[str, object]]) -> list[str]:
    return sorted(mapping)


def add(mapping: MutableMapping[str, dict[str, Any]]) -> None:
    mapping["added"] = {"n": 1}


def whole_store(store: KVStore, folder: Path) -> None:
    stats = store.stats()
    assert_type(stats, StoreStats)
    assert_type(stats.records + stats.file_size + stats.live_size + stats.free_size, int)
    assert_type(stats.load, float)
    assert_type(store.backup(folder / "backup.kvs", overwrite=True), int)
    assert_type(store.compact(), int)
    assert_type(store.purge_expired(), int)
    assert_type(store.path, Path)
    assert_type(store.closed, bool)
    store.sync()
    store.clear()


def typed_values(path: Path) -> None:
    """A store of one kind of value: what goes in and what comes out is a `TypedDict`."""
    with KVStore[Settings](path) as store:
        store.create("ada", {"theme": "dark", "size": 12})
        store["alan"] = Settings(theme="light", size=14)
        store.put_many({"grace": {"theme": "dark", "size": 10}})
        settings: Settings = store.read("ada")
        assert_type(settings["size"], int)
        assert_type(store.get("ada"), Settings | None)
        assert_type(store.setdefault("ada", settings), Settings)
        assert_type(store.get_many(["ada"]), dict[str, Settings])
        assert_type(store.pop("ada", None), Settings | None)
        for value in store.values():
            assert_type(value["theme"], str)

        store.put("ada", {"theme": "dark"})  # type: ignore[typeddict-item]
        store["ada"] = {"theme": "dark", "size": "12"}  # type: ignore[typeddict-item]
        settings["them"] = "dark"  # type: ignore[typeddict-unknown-key]

    annotated: KVStore[Settings] = KVStore(path, durable=True)
    assert_type(annotated["alan"]["theme"], str)
    annotated.close()


def values_of_several_kinds(path: str) -> None:
    """Views of one store for what is under other keys: the same object, to a checker another.

    Or `KVStore[Any]`, whose values are whatever an annotation says.
    """
    with KVStore(path, max_bytes=4 * 2**20, durable=False, timeout=0.5) as store:
        settings = cast("KVStore[Settings]", store)
        sessions = cast("KVStore[Session]", store)
        settings.put("settings", {"theme": "dark", "size": 12})
        sessions.put("session:1", {"user": "ada"}, ttl=3600)
        assert_type(settings.read("settings"), Settings)
        assert_type(sessions.read("session:1")["user"], str)
        one = cast("Settings", store.read("settings"))
        assert_type(one["size"], int)
    with KVStore[Any](path) as unchecked:
        unchecked.put("session:2", Session(user="alan"))
        again: Settings = unchecked.read("settings")
        assert_type(again["theme"], str)


class Cache(KVStore[Session]):
    """A store of a user's own."""

    def put(self, key: str, value: Session, ttl: int | None = 60) -> None:
        super().put(key, value, ttl)


def errors(store: KVStore) -> str:
    """Each error can be told from the others, and all from those of other libraries."""
    try:
        store.create("", {})
    except KeyExistsError:
        return "there"
    except (InvalidValueError, ValueTooLargeError, InvalidTTLError) as error:
        return str(error)
    except InvalidKeyError as error:
        refused: ValueError = error
        assert_type(refused.args, tuple[Any, ...])
    except (StoreFullError, StoreLockedError, StoreBusyError, StoreClosedError):
        return "later"
    except (CorruptStoreError, UnsupportedFormatError):
        return "repair"
    try:
        store.read("absent")
    except KeyNotFoundError as error:
        absent: KeyError = error
        failed: KVStoreError = error
        assert_type((absent.args, failed.args), tuple[tuple[Any, ...], tuple[Any, ...]])
    return f"{IMPLEMENTATION} {kvstore.__version__}"


def mistakes(store: KVStore) -> None:
    """What a checker finds before the program runs; never called."""
    store.put(1, {})  # type: ignore[arg-type]
    store.put("key", 1)  # type: ignore[arg-type]
    store.put("key", [1, 2])  # type: ignore[arg-type]
    store.put("key", {1: 2})  # type: ignore[dict-item]
    store.put("key", Session(user="ada"))  # type: ignore[arg-type]
    store.put("key", {}, ttl="60")  # type: ignore[arg-type]
    store.put("key", {}, lifetime=60)  # type: ignore[call-arg]
    _ = store.read("key").theme  # type: ignore[attr-defined]
    _ = store.get("key")["theme"]  # type: ignore[index]
    _ = store.read_bytes("key") + ""  # type: ignore[operator]
    store.put_many(["key"])  # type: ignore[list-item]
    KVStore("path", 4 * 2**20)  # type: ignore[call-arg]
    KVStore(path=1)  # type: ignore[arg-type]


def main(folder: Path) -> None:
    with KVStore(folder / "data.kvs") as store:
        one_key(store)
        many_keys(store)
        all_keys(store)
        errors(store)
        whole_store(store, folder)
    typed_values(folder / "typed.kvs")
    values_of_several_kinds(str(folder / "several.kvs"))
    with Cache(folder / "cache.kvs") as cache:
        cache.put("session:1", {"user": "ada"})
        assert cache.ttl("session:1") == 60


if __name__ == "__main__":
    main(Path(sys.argv[1]))
