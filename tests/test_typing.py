"""What a user's type checker says of a program that calls all of the store."""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
from support import typed_program
from support.processes import PATIENCE_SECONDS

import kvstore

PROGRAM: Final = Path(typed_program.__file__)
_PACKAGES: Final = Path(kvstore.__file__).resolve().parents[1]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The program in a folder of its own, so that no setting of this project counts."""
    return Path(shutil.copy(PROGRAM, tmp_path / "program.py"))


def check(command: list[object], folder: Path) -> str:
    """Return what a type checker says that ends with 0."""
    search = {} if _PACKAGES.name == "site-packages" else {"MYPYPATH": str(_PACKAGES)}
    done = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env={**os.environ, **search},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mypy_passes_it_with_all_checks_on(program: Path) -> None:
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    said = check([sys.executable, "-m", "mypy", "--strict", program], program.parent)
    assert "no issues found in 1 source file" in said


def test_pyright_passes_it_with_all_checks_on(program: Path) -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    settings = {
        "include": [program.name],
        "extraPaths": [str(_PACKAGES)],
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (program.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    said = check([pyright, "--pythonpath", sys.executable], program.parent)
    assert "0 errors, 0 warnings" in said


def test_it_runs(tmp_path: Path) -> None:
    typed_program.main(tmp_path)
    with kvstore.KVStore(tmp_path / "typed.kvs") as store:
        assert set(store) == {"ada", "alan", "grace"}


def test_it_calls_every_public_member_and_names_every_error() -> None:
    tree = ast.parse(PROGRAM.read_text("utf-8"))
    called = {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    named = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    members = {name for name in dir(kvstore.KVStore) if not name.startswith("_")}
    assert members <= called
    assert set(kvstore.__all__) <= named
