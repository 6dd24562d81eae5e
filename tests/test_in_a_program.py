"""What the pages say of the program around a store: each is by design, and is what happens."""

import hashlib
import uuid
from pathlib import Path

import pytest
from support import processes
from support.clock import FakeClock

from kvstore import InvalidKeyError, KVStore, StoreLockedError


def test_what_was_registered_at_exit_before_the_import_finds_the_store_closed(path: Path) -> None:
    """Functions run in the reverse order, and the import registers what closes open stores."""
    code = (
        "import atexit, sys\n"
        "def look(when):\n"
        "    try:\n"
        "        print(when, store['k'])\n"
        "    except Exception as error:\n"
        "        print(when, type(error).__name__)\n"
        "atexit.register(look, 'before the import')\n"
        "from kvstore import KVStore\n"
        "atexit.register(look, 'after it')\n"
        "store = KVStore(sys.argv[1])\n"
        "store.create('k', {})\n"
    )
    printed = processes.run_python(code, path).splitlines()
    assert printed == ["after it {}", "before the import StoreClosedError"]


@pytest.mark.parametrize("first", ["", "from kvstore import KVStore"])
def test_a_sub_interpreter_gets_one_clear_import_error_and_the_store_goes_on(
    path: Path, first: str
) -> None:
    """Whether or not the main one has imported it before, and whichever implementation runs."""
    code = (
        "import sys\n"
        "try:\n"
        "    import _interpreters as interpreters\n"
        "except ImportError:\n"
        "    import _xxsubinterpreters as interpreters\n"
        f"{first}\n"
        "script = f'''import sys\n"
        "sys.path[:] = {sys.path!r}\n"
        "try:\n"
        "    import kvstore\n"
        "except ImportError as error:\n"
        "    print(error, flush=True)\n"
        "'''\n"
        "other = interpreters.create()\n"
        "interpreters.run_string(other, script)\n"
        "interpreters.destroy(other)\n"
        "from kvstore import KVStore\n"
        "with KVStore(sys.argv[1]) as store:\n"
        "    store.create('k', {})\n"
        "    print(store.read('k'))\n"
    )
    told, read = processes.run_python(code, path).splitlines()
    assert "this is a sub-interpreter: import it in the main one" in told
    assert read == "{}"


def test_a_cell_run_twice_is_told_that_its_own_process_has_the_file(path: Path) -> None:
    cell = "store = KVStore(path)"
    notebook = {"KVStore": KVStore, "path": path}
    exec(cell, notebook)
    with pytest.raises(StoreLockedError, match="this very process"):
        exec(cell, notebook)
    exec(f"store.close()\n{cell}\nstore.close()", notebook)


def test_long_names_have_keys_by_a_digest_and_uuids_by_their_hex(store: KVStore) -> None:
    name = "https://example.org/" + "a" * 200
    for key in (hashlib.blake2b(name.encode(), digest_size=16).hexdigest(), uuid.uuid4().hex):
        store.create(key, {"name": name})
        assert store.read(key) == {"name": name}
    with pytest.raises(InvalidKeyError, match="36 characters"):
        store.create(str(uuid.uuid4()), {})


def test_a_clock_set_ahead_and_back_takes_what_was_used_and_lengthens_what_is_new(
    store: KVStore, clock: FakeClock
) -> None:
    day = 86_400
    for key in ("left alone", "used anew"):
        store.create(key, {}, ttl=60)
    clock.advance(day)
    assert "left alone" not in store
    store.create("used anew", {"n": 2})
    store.create("new", {}, ttl=60)
    clock.advance(-day)
    assert store.read("left alone") == {}
    assert store.read("used anew") == {"n": 2}
    assert store.ttl("new") == day + 60
    clock.advance(day)
    assert store.purge_expired() == 1
    clock.advance(-day)
    assert "left alone" not in store
