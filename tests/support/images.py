"""What is left of a file after power loss, and what of its contents may be lost with it.

Between two flushes the disk may write any part of what changed, in any order, one 512-byte sector
whole or not at all. So an image takes each sector, independently, from one of the states that the
file went through since the last flush.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from .workload import Value

SECTOR: Final = 512
PAGE: Final = 4096


class PowerLoss:
    """Images of a crash, from `states` of the file: the first is as of the last flush.

    `unit` is the number of bytes that reach the disk together: `SECTOR` or `PAGE`.
    """

    def __init__(self, states: Sequence[bytes], unit: int) -> None:
        self._states = states
        self._unit = unit
        self._longest = max(map(len, states))
        padded = [state.ljust(self._longest, b"\0") for state in states]
        self._base = padded[0]
        # For each unit that changed at all, what it was in each of the states.
        self.changed = [
            (offset, versions)
            for offset in range(0, self._longest, unit)
            if len(set(versions := [state[offset : offset + unit] for state in padded])) > 1
        ]

    def image(self, rng: random.Random) -> bytes:
        """Return what the disk may hold after the crash."""
        image = bytearray(self._base)
        count = len(self._states)
        style = rng.choice(("even", "mostly old", "mostly new", "runs"))
        for index, (offset, versions) in enumerate(self.changed):
            if style == "even":
                state = rng.randrange(count)
            elif style == "mostly old":
                state = rng.randrange(count) if rng.random() < 0.1 else 0
            elif style == "mostly new":
                state = rng.randrange(count) if rng.random() < 0.1 else -1
            elif index == 0 or rng.random() < 0.1:
                state = rng.randrange(count)
            image[offset : offset + self._unit] = versions[state]
        return bytes(image[: len(rng.choice(self._states))])


class History:
    """What was acknowledged, and so what each key may be after power loss.

    A key that nobody touched since the last sync is as it was then. Each later operation stands or
    is gone, or for a delete is undone: the key may be in any state it was in since.
    """

    def __init__(self) -> None:
        self.live: dict[str, Value] = {}
        self._since_sync: dict[str, list[Value | None]] = {}

    def apply(self, store: Any, key: str, value: Value | None) -> None:
        """Create the key, or delete it where there is no value, and take note before and after."""
        self.intend(key, value)
        if value is None:
            store.delete(key)
            del self.live[key]
        else:
            store.create(key, value)
            self.live[key] = value

    def intend(self, key: str, value: Value | None) -> None:
        """Take note that an operation begins, whose outcome may reach the disk from now on."""
        self._since_sync.setdefault(key, [self.live.get(key)]).append(value)

    def synced(self) -> None:
        """Take note that all that was acknowledged is on stable storage."""
        self._since_sync.clear()

    def copy(self) -> "History":
        copy = History()
        copy.live = dict(self.live)
        copy._since_sync = {key: list(states) for key, states in self._since_sync.items()}
        return copy

    def assert_allows(self, contents: Mapping[str, Value]) -> None:
        """Assert that a file with these contents keeps every promise."""
        for key in contents.keys() | self.live.keys() | self._since_sync.keys():
            found = contents.get(key)
            allowed = self._since_sync.get(key) or [self.live.get(key)]
            assert found in allowed, (
                f"key {key!r} is {_shown(found)} after the crash, "
                f"allowed: {', '.join(map(_shown, allowed))}"
            )


@contextmanager
def before_each_flush(action: Callable[[], object]) -> Iterator[None]:
    """Do `action` at the start of every flush: what the file holds then is what gets flushed."""
    real = os.fdatasync

    def flush(fd: int) -> None:
        action()
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", flush)
        yield


def write_image(path: Path, image: bytes) -> Path:
    """Make `image` the contents of a file of its own at `path`."""
    path.unlink(missing_ok=True)
    path.write_bytes(image)
    return path


def _shown(value: Value | None) -> str:
    return "absent" if value is None else f"mark {value.get('mark')}"
