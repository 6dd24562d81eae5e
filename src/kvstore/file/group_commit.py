"""Group commit: threads that wait for stable storage at the same time share one flush.

A flush covers what was written before it *started*. So a thread that arrives while one runs waits
for the next: the first to arrive leads that one, and all who arrive until it starts follow.

Who leads and has no follower may flush the bytes alone that its operation is about, which takes the
disk less. That suffices only where nothing else has to be on the disk before: see `require_full`
and `record_cleared`. Where several wait, one flush of everything serves them all. So does the one
after it, which as a rule is led by one alone, while the others make their next changes and then
queue: what it writes of these, the flush that they wait for need not.

The followers of a flush pass its gate one by one, each letting in the next. Woken all at once, as
by a condition, they would mostly queue for the interpreter's lock, and for the condition's own:
with eight threads and a fast disk that cost more than the flushes did (`bench/durable.py`).

Invariants:
1. After a flush has failed, no later one is trusted. The kernel may have dropped the pages that it
   could not write and would call the next flush a success. Only one flush runs at a time: the
   kernel tells of a failure once, so of two at once the wrong one might hear of it.
2. When a flush of one range has succeeded, nothing that was owed before the call is still missing
   on the disk: whatever was owed or noted as cleared makes the flush one of everything.
"""

from collections.abc import Callable
from typing import Final

from kvstore.compiled import Lock

_NEXT: Final = "next"


class _Flush:
    """A flush that may be joined, or runs, or has ended: then its gate is open."""

    __slots__ = ("gate", "is_followed", "is_full", "succeeded")

    def __init__(self) -> None:
        self.gate = Lock()
        self.is_followed = False
        self.is_full = True
        self.succeeded = False


class GroupCommit:
    """One at a time, calls `flush`, which raises OSError where the disk did not take everything.

    Or `flush_range`, with the start and the end of the bytes in question; None where there is none.
    """

    def __init__(
        self, flush: Callable[[], None], flush_range: Callable[[int, int], None] | None = None
    ) -> None:
        self._flush = flush
        self._flush_range = flush_range
        # Locks are taken as they are, by `with`: what wraps one in functions of Python may be
        # interrupted by a signal between them, and leave it held forever.
        self._disk = Lock()  # held by the leader that flushes
        # Under `_NEXT` the flush that may be joined, if any. A dict, for its `setdefault` is one
        # step: of those who find none, one leads.
        self._joinable: dict[str, _Flush] = {}
        self._error: OSError | None = None
        self._ended = False
        # What is owed is written down without a lock, so each time in one step, and taken off by
        # the leader before it flushes: then what comes too late for it stays for the next.
        self._owes_everything = False
        self._cleared: list[int] = []
        self._was_followed = False
        # How often `require_full_flush_for_reuse` was called, by now and before the last flush of
        # everything.
        self._reuses = 0
        self._reuses_flushed = 0

    def require_full(self) -> None:
        """Have the next flush be one of everything, whoever asks for it.

        Call it after the change that it is about, and before letting go of the lock that keeps
        others from building on this change.
        """
        self._owes_everything = True

    def require_full_flush_for_reuse(self) -> None:
        """As `require_full`; until that flush has succeeded, `reuse_waits` is true.

        The caller holds a lock that all callers hold.
        """
        self._owes_everything = True
        self._reuses += 1

    @property
    def reuse_waits(self) -> bool:
        """Whether no flush of everything has succeeded that began after the last such call."""
        return self._reuses != self._reuses_flushed

    def record_cleared(self, offset: int) -> None:
        """As `require_full`, but a flush of a range that starts at `offset` will do as well."""
        self._cleared.append(offset)

    def __call__(self, byte_range: tuple[int, int] | None = None) -> bool:
        """Return when a flush that started after this call did has succeeded.

        It is one of everything; or of the bytes from the start to the end of `byte_range`, if one
        is given and nothing else is owed. After `end` it returns at once: the last flush covered
        everything.

        Returns:
            Whether everything that was written before the call is on stable storage.

        Raises:
            OSError: that flush, or any before it, failed.
        """
        while (flush := self._lead_or_follow(byte_range)) is None:
            pass
        return flush.is_full

    def _lead_or_follow(self, byte_range: tuple[int, int] | None) -> _Flush | None:
        """Lead the next flush, or follow it; return it, or None where it did not cover this call.

        That is where its leader was interrupted, or did not see that it was followed.
        """
        own = _Flush()
        with own.gate:
            flush = self._joinable.setdefault(_NEXT, own)
            if flush is own:
                with self._disk:
                    # What is written from here on, this flush may not cover.
                    self._joinable.pop(_NEXT, None)
                    self._lead(own, byte_range)
                    own.succeeded = True
            else:
                flush.is_followed = True
        if flush is own:
            return own
        with flush.gate:
            pass
        if flush.succeeded:
            return flush if flush.is_full else None
        self._raise_failure()
        # Interrupted, its leader may have left it there. Should this take away another one, that
        # one is joined by nobody else, and no harm is done.
        self._joinable.pop(_NEXT, None)
        return None

    def _lead(self, own: _Flush, byte_range: tuple[int, int] | None) -> None:
        self._raise_failure()
        if self._ended:
            return
        cleared = self._cleared[:]
        is_shared = own.is_followed or self._was_followed
        self._was_followed = own.is_followed
        try:
            if (
                byte_range is None
                or self._flush_range is None
                or is_shared
                or self._owes_everything
                or any(offset != byte_range[0] for offset in cleared)
            ):
                self._owes_everything = False
                self._cleared.clear()
                reuses = self._reuses
                self._flush()
                self._reuses_flushed = reuses
            else:
                own.is_full = False
                del self._cleared[: len(cleared)]
                self._flush_range(*byte_range)
        except BaseException as failure:
            self._owes_everything = True
            # One without a number is no word of the system's: a signal handler raised it, as a
            # TimeoutError of its own, and the disk may have done its part or not.
            if isinstance(failure, OSError) and failure.errno is not None:
                self._error = failure
            raise

    def end(self) -> None:
        """Wait for the running flush, if any; from now on calls return at once."""
        self._ended = True
        with self._disk:
            pass

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise OSError(
                self._error.errno,
                "an earlier flush failed; no later one is trusted until the store is opened anew",
            ) from self._error
