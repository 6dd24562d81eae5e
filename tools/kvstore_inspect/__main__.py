"""The console script, which says in one line what is missing where its extra was not installed."""

import sys


def main() -> int:
    """Run `kvstore-inspect` and return its exit status."""
    try:
        from .command_line import main as run

        return run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "jinja2", "matplotlib", "rich"):
            raise
        print(
            f"kvstore-inspect: {missing} is missing; in a clone of kvstore, "
            f"pip install '.[inspect]' brings it",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
