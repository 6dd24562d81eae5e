"""The time as the file has it."""

import time
from typing import Final

from .format.codec import MAX_TTL_SECONDS
from .format.layout import TIME_LIMIT

# All who need the time look here, so that it can be another one.
time_ns = time.time_ns

# The last moment from which the longest time-to-live ends before `TIME_LIMIT`.
LAST_MS: Final = TIME_LIMIT - 1 - MAX_TTL_SECONDS * 1000


def now_ms() -> int:
    """Return whole milliseconds since 1970 UTC.

    A clock set to before 1970 stands still there; one so far ahead that not every expiry could be
    stored, in the year 10,572, likewise.
    """
    now = time_ns() // 1_000_000
    if 0 <= now <= LAST_MS:
        return now
    return 0 if now < 0 else LAST_MS
