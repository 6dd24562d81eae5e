"""What a thread may do with stores while it is inside an operation on one already.

A signal handler, a finalizer that the garbage collector runs, or a trace function may call a store
between any two instructions of an operation that this very thread is inside of. All of such a call
happens while the interrupted operation stands still. So it must never wait for a lock that its own
thread holds, nor for a thread that may be waiting for one of these.

1. A thread is *inside* from before it takes the first lock of an operation until it has let go of
   the last. That is known at every instruction: where it is not the locks themselves that tell,
   `thread.inside` is entered by the same kind of ``with`` as they are.
2. A call that is made inside is refused with `StoreBusyError` where this thread holds a lock that
   the call may need; before anything has changed.
3. Of all threads one at a time may go on with such calls; others are refused. The one that may
   waits only for threads that are in one store each, which take their locks in order and wait for
   nothing that it holds. Both locks of one store in two threads, each interrupted by a call of the
   other store, would otherwise be a circle. Who flushes while he holds the whole table would wait
   for a flush that such a thread is amid: see `StoreLocks.flush_alone`.
4. `close` is not refused. Where it would be, it is put off until the interrupted operation has
   ended: see `leave`.

`waiting` has an entry for each thread that called something while it was inside, until the
outermost operation of that thread has ended: the stores that it has to close then.
"""

import sys
import threading
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Final

from kvstore.compiled import Inside, Lock
from kvstore.errors import StoreBusyError

if TYPE_CHECKING:
    from typing import Protocol

    from kvstore.compiled.interface import OwnedLock

    class _Store(Protocol):
        def close(self) -> None: ...


class _OwnLock:
    """Makes a thread's lock as that is first asked for; then it is found before this is asked."""

    def __get__(self, local: "_Thread", _owner: type | None = None) -> "OwnedLock":
        # Of two that want the first one, the second amid the first, both get the same.
        return vars(local).setdefault("inside", Lock())  # type: ignore[no-any-return]


class _Thread(threading.local):
    """This thread's own lock, which it holds exactly while it is inside."""

    inside = _OwnLock()


class _ThreadOfC:
    """The same where locks of C count for themselves: one object does for all threads."""

    def __init__(self, inside: "OwnedLock") -> None:
        self.inside = inside


thread: Final = _Thread() if Inside is None else _ThreadOfC(Inside())


def is_inside() -> bool:
    """Return whether this thread is inside an operation on some store."""
    return thread.inside._is_owned()


# A dict, for each change of it is one step, and asking whether it is empty costs next to nothing.
waiting: "Final[dict[int, list[_Store]]]" = {}


def begin_inside(path: str) -> None:
    """Have this thread, which is inside, begin another operation; `path` is for the message.

    Raises:
        StoreBusyError: another thread does so already.
    """
    waiting.setdefault(get_ident(), [])
    if len(waiting) > 1:
        raise StoreBusyError(
            f"{path}: this thread is inside an operation on a store, and so is another one that "
            f"was interrupted as well; try again once the interrupted operation has ended"
        )


def close_at_end(store: "_Store") -> None:
    """Have `store` closed as soon as the operation that this thread is inside of has ended."""
    waiting.setdefault(get_ident(), []).append(store)


def leave() -> None:
    """Do what was put off until this thread is outside. Call it where an operation has ended."""
    if is_inside():
        return
    stores = waiting.get(get_ident(), [])
    while stores:
        # Taken off once that has ended: what interrupts it leaves it to the next call, and there is
        # one as a close ends, too.
        store = stores[-1]
        close_reporting(store)
        if store in stores:
            stores.remove(store)
    waiting.pop(get_ident(), None)


def close_reporting(store: "_Store") -> None:
    """Close a store; an error goes to `sys.excepthook`, for there is nobody to raise it to."""
    try:
        store.close()
    except Exception:
        with suppress(Exception):  # of the hook
            sys.excepthook(*sys.exc_info())


def forget_others() -> None:
    """In a forked child: the other threads are gone."""
    own = waiting.get(get_ident())
    waiting.clear()
    if own is not None:
        waiting[get_ident()] = own
