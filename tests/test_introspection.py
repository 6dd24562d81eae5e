"""What a program sees of the store's classes and functions, whichever implementation runs."""

import inspect
import json
import subprocess
import sys
from typing import Any, Final
from unittest import mock

import pytest
from support import processes

import kvstore
from kvstore import KeyNotFoundError, KVStore

MEMBERS: Final = sorted(name for name in dir(KVStore) if not name.startswith("_"))
DESCRIBE: Final = """
import inspect, json, pydoc, kvstore
def described(each):
    told = {"type": type(each).__name__, "doc": inspect.getdoc(each)}
    if callable(each) and not (isinstance(each, type) and issubclass(each, Exception)):
        told["signature"] = str(inspect.signature(each))
    return told | {"annotations": str(getattr(each, "__annotations__", None))}
seen = {"help": pydoc.render_doc(kvstore.KVStore, renderer=pydoc.plaintext)}
for name in kvstore.__all__:
    if name != "IMPLEMENTATION":
        seen[name] = described(getattr(kvstore, name))
for name in dir(kvstore.KVStore):
    if not name.startswith("_") or name in ("__init__", "__getitem__", "__contains__", "__iter__"):
        seen[f"KVStore.{name}"] = described(inspect.getattr_static(kvstore.KVStore, name))
print(json.dumps(seen))
"""


def describe(pure: str) -> dict[str, dict[str, str]]:
    """Return what a child sees of all public names, with KVSTORE_PURE set so."""
    told = subprocess.run(
        [sys.executable, "-c", DESCRIBE],
        env=processes.environment(KVSTORE_PURE=pure),
        capture_output=True,
        encoding="utf-8",
        timeout=processes.PATIENCE_SECONDS,
        check=True,
    )
    seen: dict[str, dict[str, str]] = json.loads(told.stdout)
    return seen


def test_signatures_annotations_and_help_are_those_of_both() -> None:
    assert describe("0") == describe("1")


@pytest.mark.parametrize("name", MEMBERS)
def test_every_public_member_says_what_it_takes_and_is(name: str) -> None:
    member = inspect.getattr_static(KVStore, name)
    function: Any = member.fget if isinstance(member, property) else member
    assert inspect.getdoc(function)
    if function.__module__.startswith("kvstore"):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in list(signature.parameters.values())[1:]:
            assert parameter.annotation is not inspect.Parameter.empty


def test_a_mock_of_a_store_takes_what_a_store_takes() -> None:
    store = mock.create_autospec(KVStore, instance=True)
    store.create("key", {"n": 1}, ttl=60)
    store.read.side_effect = KeyNotFoundError("key")
    with pytest.raises(KeyNotFoundError):
        store.read("key")
    for wrong in (
        lambda: store.create("key"),
        lambda: store.create("key", {}, lifetime=1),
        lambda: store.read("key", None),
        store.delete,
        lambda: store.put("key"),
        lambda: store.put("key", {}, lifetime=1),
        lambda: store.touch("key"),
        lambda: store.pop("key", None, None),
        lambda: store.popitem("key"),
        lambda: store.clear("key"),
        store.get_many,
        lambda: store.put_many({}, lifetime=1),
        lambda: store.delete_many("key", "other"),
    ):
        with pytest.raises(TypeError):
            wrong()
    assert set(MEMBERS) <= set(dir(store))
    assert set(dir(mock.create_autospec(kvstore))) >= set(kvstore.__all__)
