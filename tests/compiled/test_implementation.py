"""Which implementation runs, and what is no reason to fall back to the plain one."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
from support import processes
from support.inspecting import run_inspector

import kvstore
from kvstore import KVStore

IS_BUILT: Final = find_spec("kvstore.compiled._fast_path") is not None
SHOW: Final = "import kvstore; print(kvstore.IMPLEMENTATION)"
FITS: Final = "def built_with(): return {'BUCKET_SIZE': 4096}\n"


def show(**changes: str) -> "subprocess.CompletedProcess[str]":
    """Import kvstore in a child, and print which implementation runs there."""
    environment = processes.environment(**{"KVSTORE_PURE": "0", **changes})
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SHOW],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=processes.PATIENCE_SECONDS,
        check=False,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to put things in and take things out."""
    copied = tmp_path / "copied" / "kvstore"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyx")
    shutil.copytree(Path(kvstore.__file__).parent, copied, ignore=ignored)
    return copied


@pytest.fixture
def plain_package(package: Path) -> Path:
    """A copy of the package without anything compiled."""
    for name in ("_fast_path", "_bytes"):
        for file in (package / "compiled").glob(f"{name}.*"):
            file.unlink()
    return package


def show_of(package: Path, **changes: str) -> "subprocess.CompletedProcess[str]":
    """Do as `show`, of this copy of the package."""
    return show(PYTHONPATH=str(package.parent), **changes)


# --- the choice ----------------------------------------------------------------------------------


def test_the_compiled_implementation_runs_where_it_was_built() -> None:
    assert show().stdout.strip() == ("compiled" if IS_BUILT else "plain")
    assert show(KVSTORE_PURE="").stdout.strip() == ("compiled" if IS_BUILT else "plain")


def test_the_environment_chooses_the_plain_implementation() -> None:
    assert show(KVSTORE_PURE="1").stdout.strip() == "plain"


def test_the_plain_implementation_runs_where_nothing_was_built(plain_package: Path) -> None:
    result = show_of(plain_package)
    assert (result.stdout.strip(), result.stderr) == ("plain", "")


def test_this_process_runs_what_its_environment_asks_for() -> None:
    pure = os.environ.get("KVSTORE_PURE", "0") not in ("", "0")
    assert ("compiled" if IS_BUILT and not pure else "plain") == kvstore.IMPLEMENTATION


def test_the_inspector_says_which_implementation_it_runs(path: Path) -> None:
    KVStore(path).close()
    for pure in ("0", "1"):
        expected = "compiled" if IS_BUILT and pure == "0" else "plain"
        shown = json.loads(run_inspector("info", path, "--json", KVSTORE_PURE=pure).out)
        assert shown["implementation"] == expected
        lines = run_inspector("info", path, KVSTORE_PURE=pure).out.splitlines()
        assert f"hot path {expected}" in {" ".join(line.split()) for line in lines}


# --- what is an error ----------------------------------------------------------------------------


def assert_refused(package: Path, *named: str) -> None:
    """Check that this copy does not import, says why, and that the plain one still runs."""
    result = show_of(package)
    assert result.returncode == 1
    assert "ImportError" in result.stderr or "ModuleNotFoundError" in result.stderr
    for each in (*named, "KVSTORE_PURE=1"):
        assert each in result.stderr
    assert show_of(package, KVSTORE_PURE="1").stdout.strip() == "plain"


@pytest.mark.skipif(not IS_BUILT, reason="the compiled code was not built")
@pytest.mark.parametrize(
    ("changed", "was", "now"),
    [
        ("FIRST_FILE_SIZE = 3 * 1024 * 1024", "FIRST_FILE_SIZE = 2,097,152", "3145728"),
        ("BLOCK_SIZES = 64, 80", "BLOCK_SIZES = (64, 96, 128", "(64, 80)"),
        ("FINGERPRINT_CODES = bytes(256)", "FINGERPRINT_CODES = b'", r"b'\x00\x00"),
    ],
)
def test_an_implementation_built_for_another_layout_is_refused(
    package: Path, changed: str, was: str, now: str
) -> None:
    """As a layout does that was edited in an editable install, which builds nothing anew."""
    assert show_of(package).stdout.strip() == "compiled"
    layout = package / "format" / "layout.py"
    layout.write_text(f"{layout.read_text('utf-8')}\n{changed}\n", "utf-8")
    assert_refused(package, was, now)


@pytest.mark.skipif(not IS_BUILT, reason="the compiled code was not built")
@pytest.mark.parametrize("name", ["_fast_path", "_bytes"])
def test_half_of_an_implementation_is_refused(package: Path, name: str) -> None:
    for file in (package / "compiled").glob(f"{name}.*"):
        file.unlink()
    assert_refused(package, f"kvstore.compiled.{name} is missing")


@pytest.mark.skipif(not IS_BUILT, reason="the compiled code was not built")
def test_an_implementation_that_does_not_load_is_refused(package: Path) -> None:
    for file in (package / "compiled").glob("_fast_path.*"):
        file.write_bytes(b"for another kind of machine")
    assert_refused(package, "_fast_path")


def test_an_implementation_that_lacks_a_module_is_refused(plain_package: Path) -> None:
    (plain_package / "compiled" / "_fast_path.py").write_text(
        "import nothing_of_this_name\n", "utf-8"
    )
    (plain_package / "compiled" / "_bytes.py").write_text(FITS, "utf-8")
    assert_refused(plain_package, "nothing_of_this_name")


@pytest.mark.skipif(not IS_BUILT, reason="the compiled implementation was not built")
def test_the_fast_path_is_left_out_where_threads_run_at_once(package: Path) -> None:
    """In a free-threaded Python: it relies on their taking turns. The rest is used as it is."""
    start = package / "__init__.py"
    text = start.read_text("utf-8")
    switch = "import sys\nsys._is_gil_enabled = lambda: False\n"
    start.write_text(f"{switch}{text}", "utf-8")
    (package / "compiled" / "_fast_path.py").write_text("raise ImportError('loaded')\n", "utf-8")
    result = show_of(package)
    assert (result.stdout.strip(), result.stderr) == ("free-threaded", "")


@pytest.mark.skipif(not IS_BUILT, reason="the compiled implementation was not built")
def test_the_fast_path_refuses_to_be_loaded_where_threads_run_at_once() -> None:
    code = (
        "import sys\n"
        "sys._is_gil_enabled = lambda: False\n"
        "try:\n"
        "    import kvstore.compiled._fast_path\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "(GIL), which is switched off" in processes.run_python(code)


@pytest.mark.parametrize("name", ["_fast_path", "_bytes"])
def test_a_constant_that_the_layout_lost_is_named(plain_package: Path, name: str) -> None:
    for each in ("_fast_path", "_bytes"):
        (plain_package / "compiled" / f"{each}.py").write_text(FITS, "utf-8")
    (plain_package / "compiled" / f"{name}.py").write_text(
        "def built_with(): return {'BUCKET_HEIGHT': 12}\n", "utf-8"
    )
    assert_refused(plain_package, f"{name}.py", "BUCKET_HEIGHT = 12", "None")
