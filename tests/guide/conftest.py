"""Where the programs of the pages run."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which a test's programs make their files."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
