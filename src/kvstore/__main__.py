"""The three operations from a shell: ``python -m kvstore create|read|delete``.

JSON in, JSON out. Exit status 0: done; 1: refused, with a message on standard error; 2: wrong
usage; 3: another process has the file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from kvstore import __version__

from .errors import KVStoreError, StoreLockedError
from .store import KVStore

DONE: Final = 0
REFUSED: Final = 1
LOCKED: Final = 3  # 2, wrong usage, is argparse's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except StoreLockedError as error:
        print(f"kvstore: {error.args[0]}; --wait SECONDS waits for it", file=sys.stderr)
        return LOCKED
    except (KVStoreError, OSError, ValueError) as error:
        print(f"kvstore: {error}", file=sys.stderr)
        return REFUSED
    return DONE


def _run(options: argparse.Namespace) -> None:
    value: dict[str, Any] = {}
    if options.command == "create":
        text = sys.stdin.buffer.read() if options.value == "-" else options.value
        # Not orjson, which would turn an integer out of range into a float.
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the value is not JSON: {error}") from error
    with KVStore(options.file, timeout=options.wait) as store:
        if options.command == "create":
            store.create(options.key, value, ttl=options.ttl)
        elif options.command == "delete":
            store.delete(options.key)
        else:
            sys.stdout.buffer.write(store.read_bytes(options.key) + b"\n")
            sys.stdout.buffer.flush()


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--file", help="the store's file (default: the default file)")
    shared.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait for another process to let go of the file (default: 0)",
    )
    shared.add_argument("key", help="1 to 32 characters")
    parser = argparse.ArgumentParser(
        prog="python -m kvstore",
        description="Create, read and delete records of a kvstore file.",
        epilog="Exit status: 0 done, 1 refused, 2 wrong usage, 3 the file is in use.",
    )
    parser.add_argument("--version", action="version", version=f"kvstore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="create|read|delete")
    create = commands.add_parser(
        "create",
        parents=[shared],
        help="store a JSON object under a new key",
        epilog="""example: python -m kvstore create user:1 '{"name": "Ada"}' --ttl 3600""",
    )
    create.add_argument(
        "value", nargs="?", default="-", help="a JSON object (default: read from standard input)"
    )
    create.add_argument("--ttl", type=int, metavar="SECONDS", help="time to live")
    commands.add_parser("read", parents=[shared], help="print the value of a key as JSON")
    commands.add_parser("delete", parents=[shared], help="remove a key")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
