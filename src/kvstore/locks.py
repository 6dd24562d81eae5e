"""The locks of one store, whether it is closed, and which calls may take them.

Locks, always in this order: `closing`, stripe, the space lock of `extents`, then what `datafile`
has for itself. Two stripes are held at once only where all of them are, taken in the order of their
numbers by `with_all_stripes`. No lock is held while a value is encoded, verified or parsed; while
the disk flushes, none but `closing`, and in `flush_alone` all stripes.

What a thread may take that is inside an operation already: see `reentry`.
"""

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from .compiled import Lock
from .errors import StoreBusyError, StoreClosedError
from .file.datafile import DataFile
from .file.reentry import begin_inside, is_inside, leave, thread, waiting
from .format.layout import STRIPE_COUNT

Result = TypeVar("Result")

if TYPE_CHECKING:
    from typing import Concatenate, ParamSpec, Protocol

    from .compiled.interface import OwnedLock

    class _HasLocks(Protocol):
        @property
        def _locks(self) -> "StoreLocks": ...

    Parameters = ParamSpec("Parameters")
    Self = TypeVar("Self", bound=_HasLocks)
    Method = Callable[Concatenate[Self, Parameters], Result]

_TURN_SECONDS: Final = 0.002


class StoreLocks:
    """The locks of the store in `file`, of which `space` is that of its extents.

    Attributes:
        closing: held while the store is closed, and while the file is marked dirty.
        stripes: one for each part of the table.
        inside: threads whose operation, on this store, may be between two locks.
        closed: no operation may begin. Changed with all stripes held, but for opening and forks; so
            an operation asks under its stripe.
        was_open: it is closed, and had been open.
    """

    def __init__(self, file: DataFile, space: "OwnedLock") -> None:
        self._file = file
        self.space = space
        self.inside: set[int] = set()
        self.closed = True
        self.was_open = False
        # The threads in `flush_alone`. A list, for each change of it is one step.
        self._alone: list[int] = []
        self._make_locks()

    def _make_locks(self) -> None:
        self.stripes: tuple[OwnedLock, ...] = tuple(Lock() for _ in range(STRIPE_COUNT))
        self.closing = Lock()

    def with_all_stripes(self, act: Callable[[], Result], first: int = 0) -> Result:
        """Return what `act` does while no other thread is in the table.

        Recursive, for a `with` statement lets go of its lock whatever interrupts it.
        """
        if first == STRIPE_COUNT:
            return act()
        with self.stripes[first]:
            return self.with_all_stripes(act, first + 1)

    def flush_alone(self, act: Callable[[], object]) -> None:
        """As `with_all_stripes`, for an `act` that flushes.

        That waits for the flush of another thread, which, interrupted amid that, may be waiting for
        a stripe: so such a thread goes on first, and who is interrupted from now on is refused.
        """
        ident = get_ident()
        is_done = False

        def act_unless_waited_for() -> None:
            nonlocal is_done
            if not (self._file.flushing_threads() & set(waiting)) - {ident}:
                act()
                is_done = True

        self._alone.append(ident)
        try:
            while not is_done:
                self.with_all_stripes(act_unless_waited_for)
                if not is_done:
                    sleep(_TURN_SECONDS)
        finally:
            self._alone.remove(ident)

    def while_open(self, act: Callable[[], Result]) -> Result:
        """Return what `act` does while the store stays open. The caller holds no lock."""
        with self.stripes[0]:  # any of them keeps it from being closed
            if self.closed:
                self.raise_closed()
            return act()

    def mark_dirty(self) -> None:
        """Mark the file dirty on disk, unless it is closed. The caller holds no lock."""
        with self.closing:
            if self.closed:
                self.raise_closed()
            self._file.mark_dirty()

    # --- calls from within ---------------------------------------------------------------------

    def is_held_here(self, flushes: bool) -> bool:
        """Return whether this very thread holds a lock that an operation may need."""
        locks = (self.closing, *self.stripes, self.space)
        return any(lock._is_owned() for lock in locks) or self._file.is_held_here(flushes)

    def check_reentry(self, flushes: bool) -> None:
        """Raise StoreBusyError unless an operation may begin amid the one of this very thread."""
        if self.closed:
            self.raise_closed()
        if self.is_held_here(flushes):
            self._raise_busy()
        begin_inside(self._file.path)
        # After that: of this thread and one that begins `flush_alone`, one sees the other.
        if self._alone and self.is_held_here(True):
            self._raise_busy()

    def _raise_busy(self) -> NoReturn:
        raise StoreBusyError(
            f"{self._file.path}: this thread is inside an operation on the store already, which a "
            f"signal handler, a finalizer or a trace function has interrupted; try again once that "
            f"operation has ended"
        )

    def is_busy_here(self) -> bool:
        """Return whether this thread, which is inside, must not wait until it can close the store.

        It is inside an operation on it; or whoever closes it already, be it another thread, may be
        waiting for what this one holds.
        """
        if self.closed or get_ident() in self.inside or self.is_held_here(True):
            return True
        try:
            begin_inside(self._file.path)
        except StoreBusyError:
            return True
        return False

    # --- open, or not --------------------------------------------------------------------------

    @property
    def never_opened(self) -> bool:
        """Whether the store's opening was not begun, has not ended or has failed."""
        return self.closed and not self.was_open

    def set_closed(self) -> None:
        """Let no operation begin any more."""
        self.was_open = True
        self.closed = True

    def raise_closed(self) -> NoReturn:
        """Say why the store takes no calls."""
        if self.never_opened:
            NOT_OPENED.raise_closed()
        raise StoreClosedError(
            f"{self._file.path}: the store is closed"
            if self._file.closed
            else f"{self._file.path}: the store belongs to the parent of this forked process"
        )

    def reset_after_fork(self) -> None:
        """In a forked child: other threads of the parent may have held these, and let go there."""
        self._make_locks()


class Turns:
    """Lets other threads have their turn now and then while one works for long.

    Not more often: where others compute, it takes 5 ms until this one has its next turn.
    """

    def __init__(self) -> None:
        self._due = 0.0

    def give(self) -> None:
        """Let others go on, if it is time. The caller holds no lock."""
        if monotonic() >= self._due:
            sleep(0)
            self._due = monotonic() + _TURN_SECONDS


class _NotOpened:
    """In place of all parts of a store that was not opened: whatever they are to do, it says so."""

    closed = never_opened = True
    wants_reclaiming = False
    inside: Final[set[int]] = set()

    def raise_closed(self, *_: object, **__: object) -> NoReturn:
        raise StoreClosedError(
            "the store was not opened: KVStore.__init__ was not called, has not ended or has failed"
        )

    check_reentry = with_all_stripes = raise_closed
    store = read = read_bytes = read_record = touch = expiry = delete = raise_closed
    count = any_key = clear = iterate = purge_expired = stats = raise_closed
    is_full = make = compact = merge_segments = raise_closed


NOT_OPENED: Final[Any] = _NotOpened()


def operation(
    *, flushes: bool
) -> "Callable[[Method[Self, Parameters, Result]], Method[Self, Parameters, Result]]":
    """Make an operation of a method that takes locks: its thread is inside while it runs."""

    def decorate(
        method: "Method[Self, Parameters, Result]",
    ) -> "Method[Self, Parameters, Result]":
        @wraps(method)
        def run(self: "Self", /, *args: "Parameters.args", **kwargs: "Parameters.kwargs") -> Result:
            locks = self._locks
            if is_inside():
                locks.check_reentry(flushes)
            ident = get_ident()
            is_outermost = ident not in locks.inside
            try:
                with thread.inside:
                    locks.inside.add(ident)
                    return method(self, *args, **kwargs)
            finally:
                if is_outermost:
                    locks.inside.discard(ident)
                if waiting:
                    leave()

        return run

    return decorate
