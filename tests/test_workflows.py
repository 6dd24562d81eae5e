"""What runs where the project is published: with the least rights, and pinned by hash."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
_USES: Final = re.compile(r"^\s*(?:- )?uses: *(.+)$", re.MULTILINE)
_PINNED: Final = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def texts() -> dict[str, str]:
    """Each workflow's text, by its name."""
    found = {file.stem: file.read_text("utf-8") for file in WORKFLOWS}
    assert set(found) == {"tests", "release"}
    return found


def test_each_action_is_pinned_by_its_hash_and_says_which_version_that_is() -> None:
    used = [each for text in texts().values() for each in _USES.findall(text)]
    assert len(used) > 5
    assert [each for each in used if not _PINNED.fullmatch(each)] == []


def test_one_action_has_one_hash_everywhere() -> None:
    used = {each for text in texts().values() for each in _USES.findall(text)}
    names = [each.partition("@")[0] for each in used]
    assert len(names) == len(set(names))


def test_only_what_publishes_may_do_more_than_read() -> None:
    for text in texts().values():
        assert "\npermissions: {}\n" in text
    granted = re.findall(r"^ +([\w-]+): (write)\b", "".join(texts().values()), re.MULTILINE)
    assert granted == [("id-token", "write")]
    assert "secrets." not in "".join(texts().values())


def test_every_python_that_the_package_names_is_tested_and_has_wheels() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    named = re.findall(r"Python :: (3\.\d+)'", str(settings["project"]["classifiers"]))
    assert named
    assert f"python: {named}".replace("'", '"') in texts()["tests"]
    built = settings["tool"]["cibuildwheel"]["build"]
    assert built == [f"cp{version.replace('.', '')}-*" for version in named]


def test_tests_and_wheels_are_made_on_the_same_systems() -> None:
    systems = [re.findall(r"^ {10}- ([\w.-]+)$", text, re.MULTILINE) for text in texts().values()]
    assert systems[0] == systems[1]
    assert len(systems[0]) == 6


@pytest.mark.parametrize(
    "command",
    [
        ("actionlint", *map(str, WORKFLOWS)),
        ("zizmor", "--offline", "--no-progress", "--persona=pedantic", str(ROOT / ".github")),
    ],
    ids=lambda command: command[0],
)
def test_a_tool_that_knows_workflows_finds_nothing(command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
