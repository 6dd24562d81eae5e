"""Times of single operations, counted in buckets that are as fine as the times are short.

As HdrHistogram does it: each power of two is cut into 128 buckets of one width, so that a bucket is
less than 1 % of what it holds, from nanoseconds to hours, and below 256 each number has its own.
"""

from collections import Counter
from collections.abc import Iterable
from math import ceil
from typing import Any, Final, Self

_BITS: Final = 7  # of a number below its highest one that are kept

SHARES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}


class Histogram:
    """Counts of whole numbers, by bucket. The largest is known exactly."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.largest = 0

    def add(self, numbers: Iterable[int]) -> None:
        """Count some numbers, none below 0."""
        seen = Counter(numbers)
        for number, count in seen.items():
            self._counts[_bucket(number)] += count
        self.largest = max(self.largest, max(seen, default=0))

    @property
    def total(self) -> int:
        """How many numbers were counted."""
        return self._counts.total()

    def percentile(self, share: float) -> int:
        """Return the end of the bucket of the number that `share` (0 to 1) of all do not exceed."""
        wanted = ceil(share * self.total)
        for bucket in sorted(self._counts):
            wanted -= self._counts[bucket]
            if wanted <= 0:
                return min(_last_of(bucket), self.largest)
        return self.largest

    def summary(self) -> dict[str, float]:
        """Return the percentiles of `SHARES`, and the largest; of nanoseconds, in microseconds."""
        numbers = {name: self.percentile(share) for name, share in SHARES.items()}
        return {name: number / 1000 for name, number in (numbers | {"max": self.largest}).items()}

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes: the largest number; of each bucket its end and count."""
        buckets = [[_last_of(bucket), count] for bucket, count in sorted(self._counts.items())]
        return {"largest": self.largest, "buckets": buckets}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Return the histogram that `to_json` was asked of."""
        histogram = cls()
        histogram.largest = stored["largest"]
        histogram._counts.update({_bucket(last): count for last, count in stored["buckets"]})
        return histogram


def _bucket(number: int) -> int:
    shift = max(number.bit_length() - _BITS - 1, 0)
    return (shift << _BITS) + (number >> shift)


def _last_of(bucket: int) -> int:
    """Return the largest number of a bucket."""
    shift = max((bucket >> _BITS) - 1, 0)
    return ((bucket - (shift << _BITS) + 1) << shift) - 1
