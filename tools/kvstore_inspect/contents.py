"""What a store holds, by the names of its keys: counted as its records go by, in bounded memory.

Keys are grouped by their prefix, which ends with their first `:`, `/` or `.`, or else with their
first `_` or `-`; and once more by what ends with the second `:`, `/` or `.`.
"""

import heapq
import re
from itertools import starmap
from typing import Final, NamedTuple

from kvstore.format.layout import NEVER

from .records import Record

HOUR: Final = 3_600
SOON: Final = (HOUR, 24 * HOUR, 7 * 24 * HOUR)
_SEPARATOR: Final = re.compile("[:/.]")
_OTHER_SEPARATOR: Final = re.compile("[_-]")
_MOST_PREFIXES: Final = 10_000
_LISTED: Final = 10
_MOST_SHOWN: Final = 12
_LEAST_SHARE: Final = 0.01
_LEAST_SHARE_OF_GROUP: Final = 0.05


class Total(NamedTuple):
    """How many keys, and how many bytes of the file their records take, padding included."""

    keys: int = 0
    size: int = 0


class Group(NamedTuple):
    """The keys that begin with `prefix`; None: those that have no separator."""

    prefix: str | None
    total: Total
    parts: "tuple[Group, ...]" = ()
    """Those of longer prefixes that are much of it."""


class Listed(NamedTuple):
    """A key of a list. Its value has that many bytes of JSON; `expires_at` as in the file."""

    key: str
    value_size: int
    expires_at: int


class _Sum:
    """A `Total` that is being counted."""

    __slots__ = ("keys", "size")

    def __init__(self) -> None:
        self.keys = self.size = 0

    def add(self, size: int) -> None:
        self.keys += 1
        self.size += size

    def total(self) -> Total:
        return Total(self.keys, self.size)


class Prefixes:
    """Keys and bytes for each prefix, as long as there are not too many of them.

    Then those with the fewest keys are forgotten, so that no more than `most` are held. One that is
    met again after that begins anew: `exact` is false, and counts may be low.
    """

    def __init__(self, most: int = _MOST_PREFIXES) -> None:
        self._most = most
        self._sums: dict[str, _Sum] = {}
        self.exact = True

    def add(self, prefix: str, size: int) -> None:
        """Count a key whose record takes that many bytes."""
        found = self._sums.get(prefix)
        if found is None:
            found = self._sums[prefix] = _Sum()
            if len(self._sums) > self._most:
                self._forget()
        found.add(size)

    def _forget(self) -> None:
        self.exact = False
        kept = sorted(self._sums.items(), key=lambda item: item[1].keys, reverse=True)
        self._sums = dict(kept[: self._most // 2])

    def totals(self) -> list[tuple[str, Total]]:
        """Return the prefixes that are held, with what was counted for each."""
        return [(prefix, found.total()) for prefix, found in self._sums.items()]


class Contents:
    """What a store holds at `now_ms`, of records that have not expired.

    Attributes:
        prefixes: shorter ones, up to the first separator.
    """

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms
        self._whole, self._without = _Sum(), _Sum()
        self.prefixes, self._longer = Prefixes(), Prefixes()
        self._soon = [_Sum() for _ in SOON]
        # Heaps, the entry that is to give way first.
        self._largest: list[_Entry] = []
        self._next: list[_Entry] = []

    def add(self, record: Record, size: int) -> None:
        """Count a record that takes that many bytes of the file."""
        self._whole.add(size)
        self._add_prefixes(record.key, size)
        _keep(self._largest, len(record.value), record)
        if record.expires_at != NEVER:
            _keep(self._next, -record.expires_at, record)
            left_ms = record.expires_at - self._now_ms
            for found, seconds in zip(self._soon, SOON, strict=True):
                if left_ms <= seconds * 1000:
                    found.add(size)

    def _add_prefixes(self, key: str, size: int) -> None:
        # A separator at the start is no end of a name.
        found = _SEPARATOR.search(key, 1)
        if found is not None:
            longer = _SEPARATOR.search(key, found.end() + 1)
            if longer is not None:
                self._longer.add(key[: longer.end()], size)
        else:
            found = _OTHER_SEPARATOR.search(key, 1)
        if found is None:
            self._without.add(size)
        else:
            self.prefixes.add(key[: found.end()], size)

    # --- what there is to show -----------------------------------------------------------------

    @property
    def whole(self) -> Total:
        """All of it."""
        return self._whole.total()

    def largest(self) -> list[Listed]:
        """Return the keys with the largest values, these first."""
        return _listed(self._largest)

    def next_to_expire(self) -> list[Listed]:
        """Return the keys that expire next, in that order."""
        return _listed(self._next)

    def soon(self) -> list[tuple[int, Total]]:
        """Return seconds, and what expires within them."""
        return [(seconds, found.total()) for seconds, found in zip(SOON, self._soon, strict=True)]

    def groups(self) -> list[Group]:
        """Return the groups that are a hundredth of all or more, the largest first."""
        found = (Group(None, self._without.total()), *starmap(Group, self.prefixes.totals()))
        shown = [group for group in found if _is_share(group.total, self.whole, _LEAST_SHARE)]
        return [self._parted(group) for group in heapq.nlargest(_MOST_SHOWN, shown, _size_of)]

    def others(self, groups: list[Group]) -> Total:
        """Return what is in none of these groups."""
        keys = sum(group.total.keys for group in groups)
        return Total(self.whole.keys - keys, self.whole.size - sum(map(_size_of, groups)))

    def _parted(self, group: Group) -> Group:
        """Return a group with its parts; or one with a longer prefix, if all keys have that."""
        if group.prefix is None:
            return group
        parts = [
            Group(prefix, total)
            for prefix, total in self._longer.totals()
            if prefix.startswith(group.prefix)
            and _is_share(total, group.total, _LEAST_SHARE_OF_GROUP)
        ]
        if len(parts) == 1 and parts[0].total == group.total:
            return parts[0]
        return group._replace(parts=tuple(sorted(parts, key=_size_of, reverse=True)))


_Entry = tuple[int, int, Listed]


def _keep(heap: list[_Entry], rank: int, record: Record) -> None:
    """Keep the records of the highest ranks; of one rank, those that come first in the file."""
    if len(heap) == _LISTED and rank < heap[0][0]:
        return
    listed = Listed(record.key, len(record.value), record.expires_at)
    entry = (rank, -record.offset, listed)
    if len(heap) < _LISTED:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _listed(heap: list[_Entry]) -> list[Listed]:
    return [listed for *_, listed in sorted(heap, reverse=True)]


def _size_of(group: Group) -> int:
    return group.total.size


def _is_share(part: Total, whole: Total, least: float) -> bool:
    """Return whether the keys are that share of others, or their records are."""
    many = part.keys >= least * whole.keys or part.size >= least * whole.size
    return part.keys > 0 and many
