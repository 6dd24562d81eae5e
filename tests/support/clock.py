"""A clock that stands still until a test moves it."""

from typing import Final

START_SECONDS: Final = 1_700_000_000


class FakeClock:
    """Stands in for `time.time_ns`: called, it returns nanoseconds since 1970 UTC."""

    def __init__(self) -> None:
        self._now_ns = START_SECONDS * 10**9

    def __call__(self) -> int:
        return self._now_ns

    @property
    def now_ms(self) -> int:
        """Whole milliseconds since 1970 UTC, the unit of the file's times."""
        return self._now_ns // 10**6

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`; back, where that is negative."""
        self._now_ns += round(seconds * 10**9)

    def set(self, seconds: float) -> None:
        """Show `seconds` since 1970 UTC."""
        self._now_ns = round(seconds * 10**9)
