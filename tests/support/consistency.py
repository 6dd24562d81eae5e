"""Whether a closed file is whole, as the library's own checker sees it."""

from pathlib import Path

from kvstore.recovery.check import check_file


def assert_consistent(path: Path) -> None:
    """Assert that the checker finds nothing wrong with the closed file."""
    problems = [str(problem) for problem in check_file(path)]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:10])
