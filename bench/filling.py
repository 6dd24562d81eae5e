"""Numbered records in a store: put there, as far as an allowance of time goes, and looked for.

Record number `index` has the key `key_of(index)` and one of a few values; so any process can tell
what a store should hold by its number of records alone.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from time import perf_counter
from typing import Any, Final

from engines import Engine
from workers import Say

from harness import key_of, make_values

DISTINCT_VALUES: Final = 100
CHUNK: Final = 1000  # records between two looks at the clock


class Records:
    """The records of an experiment, by their number.

    Args:
        size: of each value, in bytes of compact JSON.
    """

    def __init__(self, size: int) -> None:
        self._values = make_values(size, DISTINCT_VALUES)

    def value(self, index: int) -> dict[str, Any]:
        """Return the value of record `index`."""
        return self._values[index % DISTINCT_VALUES]

    def fill(
        self,
        store: Engine,
        indexes: Iterable[int],
        seconds: float,
        say: Say,
        note: Callable[[int], None] | None = None,
    ) -> int:
        """Create these records, but no more once so many seconds have passed.

        Args:
            store: none of them is there.
            indexes: their numbers.
            seconds: what is allowed.
            say: hears of the progress.
            note: gets the number of records created so far, after each `CHUNK` of them.

        Returns:
            How many were created.
        """
        rest = iter(indexes)
        create, value = store.create, self.value
        done = 0
        end = perf_counter() + seconds
        while perf_counter() < end and (chunk := list(islice(rest, CHUNK))):
            for index in chunk:
                create(key_of(index), value(index), None)
            done += len(chunk)
            say(f"{done:,} records")
            if note is not None:
                note(done)
        return done

    def look(self, store: Engine, records: int, say: Say) -> tuple[list[int], int]:
        """Read the records number 0 to `records - 1`.

        Returns:
            The numbers of those that are absent; how many have another value or cannot be read.
        """
        absent: list[int] = []
        wrong = 0
        for index in range(records):
            if index % CHUNK == 0:
                say(f"{index:,} of {records:,} records read")
            try:
                wrong += store.read(key_of(index)) != self.value(index)
            except KeyError:
                absent.append(index)
            except Exception:  # each engine has errors of its own
                wrong += 1
        return absent, wrong
