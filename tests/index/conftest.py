"""Fixtures of the tests of the index."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB
from support.components import Components, open_components


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power loss, and waiting for the disk is most of an opening's time."""
    for name in ("fdatasync", "fsync"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, lambda _fd: None)


@pytest.fixture
def parts(path: Path) -> Iterator[Components]:
    """An open file that is not checked: its blocks belong to no slot."""
    with open_components(path, 8 * MIB) as parts:
        yield parts
        parts.file.require_rebuild()
