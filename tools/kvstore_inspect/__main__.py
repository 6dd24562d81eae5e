"""The console script, which says in one line what is missing where its extra was not installed."""

import sys


def main() -> int:
    """Run `kvstore-inspect` and return its exit status."""
    try:
        from .command_line import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        print(
            f"kvstore-inspect: {missing} is missing; pip install 'kvstore[inspect]' brings it",
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
