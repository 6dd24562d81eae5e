"""The examples in the docstrings of all that is public: each has one, and it does what it says.

Each runs in an empty folder, with all of kvstore's names and `store`, a new store in it.
"""

import doctest
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support.stores import OpenStore

import kvstore

_OPERATORS: Final = frozenset({"__contains__", "__len__", "__bool__", "__iter__", "__getitem__"})


def _public() -> Iterator[tuple[str, object]]:
    """Yield what a user may call, with its name, but what only inherits its docstring."""
    yield "kvstore", kvstore
    for name in kvstore.__all__:
        each = getattr(kvstore, name)
        if isinstance(each, type):
            yield name, each
    for owner in (kvstore.KVStore, kvstore.StoreStats):
        for name, member in vars(owner).items():
            if name in _OPERATORS or (not name.startswith("_") and _has_docstring(owner, member)):
                yield f"{owner.__name__}.{name}", member


def _has_docstring(owner: type, member: object) -> bool:
    """Return whether it has one of its own: a field of a named tuple has none."""
    return owner is kvstore.KVStore or inspect.isroutine(member)


PUBLIC: Final = dict(_public())


def _examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "", name)


def test_what_is_looked_at_is_all_that_a_user_may_call() -> None:
    members = {name.removeprefix("KVStore.") for name in PUBLIC if name.startswith("KVStore.")}
    of_the_store = {name for name in dir(kvstore.KVStore) if not name.startswith("_")}
    assert of_the_store - members == {"keys"}, "what the language's own docstring describes"
    assert {"KVStoreError", "KeyNotFoundError", "StoreStats", "KVStore"} < set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_docstring_has_an_example_that_does_what_it_says(
    name: str,
    open_store: OpenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = _examples(name)
    assert examples, f"{name} has no example"
    names: dict[str, object] = {each: getattr(kvstore, each) for each in kvstore.__all__}
    names["store"] = open_store("store.kvs")
    test = doctest.DocTest(examples, names, name, None, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = io.StringIO()
    runner.run(test, out=said.write)
    assert not runner.failures, said.getvalue()
