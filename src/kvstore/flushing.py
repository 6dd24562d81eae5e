"""Shared flushes: threads that wait for stable storage at the same time share one flush.

A flush covers what was written before it *started*. So a thread that arrives while one runs waits
for the next; the first to find none running leads it, and all who wait by then follow (the group
commit of databases).

Invariant: after a flush has failed, no later one is trusted. The kernel may have dropped the pages
that it could not write and would call the next flush a success.
"""

import threading
from collections.abc import Callable


class SharedFlush:
    """One at a time, calls `flush`, which raises OSError where the disk did not take everything."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        # Taken as it is: a condition's own `with` is two functions in Python, and an exception at
        # the start of one of them, as a signal may raise it, would leave the lock held for good.
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._started = 0  # number of the newest flush
        self._succeeded = 0  # number of the newest one that succeeded
        self._running = False
        self._error: OSError | None = None
        self._ended = False

    def __call__(self) -> None:
        """Return when a flush that started after this call did has succeeded.

        After `end` it returns at once: the last flush covered everything.

        Raises:
            OSError: that flush, or any before it, failed.
        """
        number = 0  # of the flush that this call leads
        try:
            with self._lock:
                # A running flush may have started before our writes: only the one after it will do.
                wanted = self._started + 1
                while self._running and self._succeeded < wanted and not self._ended:
                    self._turn.wait()
                self._raise_failure()
                if self._ended or self._succeeded >= wanted:
                    return
                number = self._started + 1
                self._started = number
                self._running = True
            self._flush()
            self._succeeded = number
        except OSError as failure:
            self._error = self._error or failure
            raise
        finally:
            # An interrupted flush did not succeed, and did not fail: its followers start the next.
            if number:
                # Before the lock is taken, which may fail for want of memory.
                self._running = False
                with self._lock:
                    self._turn.notify_all()

    def end(self) -> None:
        """Wait for the running flush, if any; from now on calls return at once."""
        with self._lock:
            while self._running:
                self._turn.wait()
            self._ended = True
            self._turn.notify_all()

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise OSError(
                self._error.errno,
                "an earlier flush failed; no later one is trusted until the store is opened anew",
            ) from self._error
