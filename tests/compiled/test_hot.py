"""The compiled twin where it is not like Python by itself: locks, signals, forks, bare offsets."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from support.parts import Parts, open_parts
from support.processes import run_script

from kvstore import CorruptStoreError, KVStore
from kvstore.compiled import IMPLEMENTATION

compiled_only = pytest.mark.skipif(
    IMPLEMENTATION != "compiled", reason="the compiled twin is not built, or not in use"
)


# --- locks -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
@pytest.mark.parametrize("lock", ["stripe", "space"])
def test_who_waits_for_a_lock_can_be_interrupted(path: Path, lock: str) -> None:
    """And then holds none, and nothing has changed. The main thread waited deaf to Ctrl-C."""
    said = run_script(
        """
        import threading, time
        store = KVStore(sys.argv[1])
        store.create("key", {})
        locks = store._stripes if sys.argv[2] == "stripe" else (store._space,)
        held, enough = threading.Event(), threading.Event()
        def hold():
            for lock in locks:
                lock.acquire()
            held.set()
            enough.wait()
            for lock in locks:
                lock.release()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        def interrupted(*_):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        def interrupt():
            while not done:  # one that comes before the wait begins does not end it
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGINT)
        for act in (
            lambda: store.create("other", {}),
            lambda: store.delete("key"),
            lambda: store.read("key") if locks is store._stripes else store.stats(),
        ):
            done = []
            signal.signal(signal.SIGINT, interrupted)
            thread = threading.Thread(target=interrupt)
            try:
                thread.start()
                act()
            except KeyboardInterrupt:
                done.append(1)
            thread.join()
        enough.set()
        holder.join()
        assert not any(lock._is_owned() for lock in (*store._stripes, store._space))
        assert len(store) == 1 and store.stats().records == 1
        say(dict(store))
        store.close()
        """,
        path,
        lock,
    )
    assert said == "{'key': {}}\n"
    with KVStore(path) as store:
        assert dict(store) == {"key": {}}


# --- offsets and bytes that make no sense ------------------------------------------------------


OFFSETS = (0, 40, 255, 2**21 - 47, 2**21, 2**26, 2**32, 2**63, 2**64 - 48, 2**64 - 1, 2**64, -1)


@compiled_only
@pytest.mark.parametrize("closed", [False, True])
def test_no_offset_leads_out_of_the_map(path: Path, closed: bool) -> None:
    """From code in Python, that is: those read from the file have tests of their own."""
    with open_parts(path) as parts:
        before = parts.file.map[: parts.file.size]
        if not closed:
            _call_all(parts)
            assert parts.file.map[: parts.file.size] == before
    if closed:
        _call_all(parts)


def _call_all(parts: Parts) -> None:
    slab, slots = parts.slab, parts.slots
    for place in OFFSETS:
        refused: list[tuple[Callable[..., object], *tuple[Any, ...]]] = [
            (slots.insert, place, 1, b"k", 2**20, 2, 0),
            (slots.delete, place, b"k"),
            (slots.remove, place),
            (slab.free, place if place > 2**20 else 2**64),
            (slab.allocate, place + 2**15),
        ]
        for call, *arguments in refused:
            with pytest.raises((IndexError, OverflowError, ValueError, CorruptStoreError)):
                call(*arguments)
        allowed: list[tuple[Callable[..., object], *tuple[Any, ...]]] = [
            (slots.is_live, place),
            (slots.is_expired, place, 0),
            (slots.used_slot_count, place),
        ]
        for call, *arguments in allowed:
            with suppress(IndexError, OverflowError, CorruptStoreError):
                call(*arguments)


@compiled_only
def test_nothing_is_taken_for_bytes_that_is_none(path: Path, store: KVStore) -> None:
    """The compiled twin looked into what it took for `bytes`, and was killed."""
    slots, nothing = store._slots, cast(Any, None)
    for call in (
        lambda: slots.find(1, nothing),
        lambda: slots.insert(2**20 + 256, 1, nothing, 2**20, 2, 0),
        lambda: slots.delete(2**20 + 256, nothing),
        lambda: store._restore("k", nothing, 0, 0),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert "k" not in store


# --- forks -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("amid", ["_open_extent", "split_or_compact"])
def test_child_forked_amid_an_operation_leaves_the_file_alone(path: Path, amid: str) -> None:
    """By a signal handler, which runs where the operation runs Python, and returns in the child.

    The compiled twin went on there: it had seen before that it may store through the map.
    """
    said = run_script(
        """
        from faults.cases import CASES
        os.urandom = bytes
        case = next(case for case in CASES if case.name == "create and split")
        store = KVStore(sys.argv[1])
        if sys.argv[2] == "split_or_compact":
            case.prepare(store)
        parts = store._slab if sys.argv[2] == "_open_extent" else store._segments
        real = getattr(parts, sys.argv[2])
        children = []
        def and_fork(*arguments):
            result = real(*arguments)
            children.append(os.fork())
            if children[-1]:
                before = bytes(store._file.map[:store._file.size])
                _, status = os.waitpid(children[-1], 0)
                assert bytes(store._file.map[:store._file.size]) == before
                say("child ended with", os.waitstatus_to_exitcode(status))
            return result
        setattr(parts, sys.argv[2], and_fork)
        try:
            case.act(store)
        except StoreClosedError:
            if children != [0]:
                raise
        os._exit(5) if children == [0] else say(len(children), case.key in store)
        """,
        path,
        amid,
    )
    assert said == "child ended with 5\n1 True\n"
