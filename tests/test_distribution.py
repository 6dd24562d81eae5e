"""What is published: under which name and version, and that nobody is told to install another's."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from zipfile import ZipFile

import pytest

import kvstore

ROOT: Final = Path(__file__).resolve().parent.parent
# What a reader or a program may take an installing command from.
_SUFFIXES: Final = frozenset({".md", ".py", ".toml", ".pyx", ".pxi", ".j2"})
_PLACES: Final = ("src", "tools", "tests", "bench")
# `kvstore` as what is to be installed, with or without an extra, a version or an address.
_BY_NAME: Final = re.compile(
    r"""\b(?:pip|uv|pipx|poetry|conda)\b[^\n&;|]*?\b(?:install|add|run)\b[^\n&;|]*?"""
    r"""[\s'"`]kvstore(?:-mmap)?(?:\[|==|~=|>=|\s*@|['"`\s]|$)""",
    re.MULTILINE,
)
_WITH_EXTRA: Final = re.compile(r"(?<![\w/.])kvstore\[[a-z]+\]")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def test_distribution_has_a_name_of_its_own_and_the_version_that_the_package_names(
    project: dict[str, Any],
) -> None:
    """`kvstore` on PyPI is a client of Consul, whose module would be in this one's place."""
    assert project["name"] == "kvstore-mmap"
    assert project["version"] == kvstore.__version__
    assert list(project["scripts"]) == ["kvstore-inspect"]


def test_extras_ask_for_this_distribution_and_no_other(project: dict[str, Any]) -> None:
    wanted = [each for extra in project["optional-dependencies"].values() for each in extra]
    own = [each for each in wanted if each.startswith("kvstore")]
    assert own
    assert all(each.startswith("kvstore-mmap[") for each in own), own


def test_nothing_says_to_install_it_by_name() -> None:
    """It is not published yet: what a reader finds installs from a clone."""
    files = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    files += [file for place in _PLACES for file in sorted((ROOT / place).rglob("*"))]
    found = []
    for file in files:
        if file == Path(__file__) or not (file.suffix in _SUFFIXES or file.name == "run"):
            continue
        text = file.read_text("utf-8")
        found += [(file.name, each[0]) for each in _BY_NAME.finditer(text)]
        found += [(file.name, each[0]) for each in _WITH_EXTRA.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "pip install kvstore",
        "pip install 'kvstore[inspect]'",
        'python -m pip install -q "kvstore-mmap==1"',
        "uv add kvstore\n",
    ],
)
def test_what_would_install_it_by_name_is_known_when_it_is_seen(line: str) -> None:
    assert _BY_NAME.search(line)
    assert not _BY_NAME.search("pip install -q . && .venv/bin/python -m kvstore read k")


# --- what is uploaded ----------------------------------------------------------------------------


def _run(*command: str, **changes: str) -> None:
    done = subprocess.run(
        (sys.executable, "-P", "-m", *command),  # a build leaves a folder "build" in the project's
        env={**os.environ, "KVSTORE_REQUIRE_COMPILED": "0", "NO_COLOR": "1", **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout


def _files(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in {".pyc", ".so", ".pyd", ".kvs"}
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made of a copy: a build leaves files behind."""
    for needed in ("build", "setuptools", "twine"):
        found = find_spec(needed)
        if found is None or found.origin is None:  # a folder of that name
            pytest.skip(f"{needed} is not installed")
    folder = tmp_path_factory.mktemp("source")
    left = (".git", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*left, ".venv", "venv"))
    _run("build", "--sdist", "--no-isolation", "--outdir", str(folder), str(folder / "copy"))
    (made,) = folder.glob("*.tar.gz")
    return made


def test_the_source_distribution_has_all_that_builds_tests_and_checks_it(
    source: Path, tmp_path: Path
) -> None:
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert unpacked.name == f"kvstore_mmap-{kvstore.__version__}"
    folders = (".ci", ".github", "bench", "src", "tests", "tools")
    wanted = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", ".ci/run"}
    wanted |= {
        each
        for each in _files(source.parent / "copy")
        if each.startswith(tuple(f"{folder}/" for folder in folders))
    }
    assert wanted - _files(unpacked) == set()


def test_what_is_uploaded_passes_the_index_s_checks_and_a_wheel_has_the_package_only(
    source: Path,
) -> None:
    """Of a wheel without the compiled code, which takes a compiler; that would add to it only."""
    if find_spec("Cython") is None:
        pytest.skip("Cython is not installed")
    with tarfile.open(source) as archive:
        archive.extractall(source.parent, filter="data")
    unpacked = source.parent / f"kvstore_mmap-{kvstore.__version__}"
    _run(
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source.parent),
        str(unpacked),
        CC="false",
    )
    (wheel,) = source.parent.glob("*.whl")
    _run("twine", "check", "--strict", str(source), str(wheel))
    names = ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"kvstore", "kvstore_inspect", f"kvstore_mmap-{kvstore.__version__}.dist-info"}
    assert {"kvstore/py.typed", "kvstore_inspect/py.typed", "kvstore/store.py"} <= set(names)
    assert {Path(name).suffix for name in names if ".dist-info/" not in name} <= {
        *(".py", ".typed", ".html", ".j2", ".css", ".js"),
    }
