"""The compiled twin where it is not like Python by itself: locks, signals, forks, bare offsets."""

import os
import signal
import threading
from pathlib import Path

import pytest
from support.parts import Parts, open_parts
from support.processes import run_script

from kvstore import KVStore
from kvstore.implementation import IMPLEMENTATION

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
        for lock in locks:
            lock.acquire()
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
        for lock in locks:
            lock.release()
        assert not any(lock.locked() for lock in (*store._stripes, store._space))
        say(dict(store))
        store.close()
        """,
        path,
        lock,
    )
    assert said == "{'key': {}}\n"
    with KVStore(path) as store:
        assert dict(store) == {"key": {}}
