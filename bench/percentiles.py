"""Percentiles of single operations' times, by HdrHistogram; made once all times were taken."""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Final

with warnings.catch_warnings():
    # Its structures do not say what Python 3.14 wants to know of their layout.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hdrh.histogram import HdrHistogram

SHARES: Final = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9, "p99.99": 99.99}
NAMES: Final = (*SHARES, "max")

_LONGEST: Final = 3600 * 10**9  # nanoseconds
_DIGITS: Final = 3  # that are kept of each time


def percentiles(nanoseconds: Iterable[Iterable[int]]) -> dict[str, float]:
    """Return the microseconds that each share of all did not exceed; the longest time is exact.

    A percentile that fewer than one time in it would exceed is left out.
    """
    histogram = HdrHistogram(1, _LONGEST, _DIGITS)
    for each in nanoseconds:
        for time, count in Counter(each).items():  # most times come often
            histogram.record_value(max(time, 1), count)
    total = histogram.get_total_count()
    found = {
        name: histogram.get_value_at_percentile(share) / 1000
        for name, share in SHARES.items()
        if total * (100 - share) >= 100
    }
    return {**found, "max": histogram.max_value / 1000} if total else {}
