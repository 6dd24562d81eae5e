"""Operations on one key from a shell: ``python -m kvstore create|put|read|touch|delete``.

JSON in, JSON out. Exit status 0: done; 1: refused, with a message on standard error; 2: wrong
usage; 3: another process has the file.
"""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, TextIO

from kvstore import __version__

from .errors import InvalidTTLError, KVStoreError, StoreLockedError
from .file.platform import system
from .format.codec import MAX_TTL_SECONDS, check_ttl, encode_key, encode_value
from .format.layout import MAX_FILE_SIZE
from .store import KVStore

DONE: Final = 0
REFUSED: Final = 1
LOCKED: Final = 3  # 2, wrong usage, is argparse's
INTERRUPTED: Final = 128 + 2  # as of a program that SIGINT ends


# The library's name of an option, in what it says of its number.
_LIMIT: Final = re.compile(r"\bmax_bytes(?= (?:is|than) -?\d)")


class _Failure(Exception):
    """A command that failed for a reason of the shell's; its message tells which."""


class _Existing(KVStore):
    """A store whose file must be there: a mistyped name makes none."""

    _creates = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _fill_standard_streams()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parse(arguments)
        if isinstance(options, int):
            return options
        _COMMANDS[options.command](options)
    except StoreLockedError as error:
        return _end(f"{error.args[0]}; --wait SECONDS waits for it", LOCKED)
    except FileNotFoundError as error:
        return _end(_missing(error), REFUSED)
    except OSError as error:
        told = error.strerror or error
        return _end(f"{error.filename}: {told}" if error.filename else told, REFUSED)
    # A warning: where Python was told to make errors of them.
    except (KVStoreError, ValueError, Warning, _Failure) as error:
        return _end(error, REFUSED)
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def _end(message: object, status: int) -> int:
    said = _LIMIT.sub("--max-bytes", str(message))
    _tell(f"kvstore: {said}\n")
    return status


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """Print a warning as a line: no line of this program's source says more."""
    _end(message, DONE)


def _missing(error: FileNotFoundError) -> str:
    name = str(error.filename)
    if os.path.isdir(os.path.dirname(name)):
        return f"{name}: the file does not exist; `create` or `put` makes it"
    return f"{name}: the folder of the file does not exist"


# --- the commands --------------------------------------------------------------------------------


def _create(options: argparse.Namespace) -> None:
    value = _checked_value(options)
    with _opened(KVStore, options) as store:
        store.create(options.key, value, ttl=options.ttl)


def _put(options: argparse.Namespace) -> None:
    value = _checked_value(options)
    with _opened(KVStore, options) as store:
        store.put(options.key, value, ttl=options.ttl)


def _checked_value(options: argparse.Namespace) -> Any:
    """Return the value, once all that is given is found valid: what is refused makes no file."""
    value = _value(options)
    encode_key(options.key)
    encode_value(options.key, value)
    _check_ttl(options, "without --ttl the record does not expire")
    return value


def _check_ttl(options: argparse.Namespace, otherwise: str) -> None:
    if options.ttl is None:
        return
    try:
        check_ttl(options.key, options.ttl)
    except InvalidTTLError as error:
        raise _Failure(
            f"key {options.key!r}: --ttl is {options.ttl}, allowed are 1 to "
            f"{MAX_TTL_SECONDS:,} seconds; {otherwise}"
        ) from error


def _read(options: argparse.Namespace) -> None:
    with _opened(_Existing, options) as store:
        value = store.read_bytes(options.key)
    # Whoever reads slowly does not keep others from the file.
    _write(value + b"\n", "the value ")


def _touch(options: argparse.Namespace) -> None:
    _check_ttl(options, "--forever lets the record never expire")
    with _opened(_Existing, options) as store:
        store.touch(options.key, options.ttl)  # None, where it is --forever


def _delete(options: argparse.Namespace) -> None:
    with _opened(_Existing, options) as store:
        store.delete(options.key)


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    "create": _create,
    "put": _put,
    "read": _read,
    "touch": _touch,
    "delete": _delete,
}


def _opened(kind: type[KVStore], options: argparse.Namespace) -> KVStore:
    return kind(options.file, max_bytes=options.max_bytes, timeout=options.wait)


def _value(options: argparse.Namespace) -> Any:
    text = _standard_input() if options.value == "-" else options.value
    # Not orjson, which would turn an integer out of range into a float.
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Failure(f"the value is not JSON: {error}") from error


# --- standard streams ----------------------------------------------------------------------------


def _fill_standard_streams() -> None:
    """Where one was closed, put something in its place, or the store's file would be that."""
    with suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    if sys.stderr is None:  # where print() would write on standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


def _standard_input() -> bytes:
    try:
        if sys.stdin is None:
            raise OSError("it is closed")
        return sys.stdin.buffer.read()
    except OSError as error:
        raise _Failure(
            f"cannot read the value from standard input: {error.strerror or error}"
        ) from error


def _write(text: bytes, what: str = "") -> None:
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        if system.has_no_reader(error):
            return  # it has enough
        raise _Failure(
            f"cannot write {what}to standard output: {error.strerror or error}"
        ) from error


def _tell(text: str) -> None:
    """Write on standard error. Where that takes nothing, the exit status still tells."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO | None) -> None:
    """Keep Python from trying once more at its end to write what cannot be written."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- options -------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace | int:
    """Return the options, or the exit status where the parser has said all there is to say."""
    try:
        return _parser().parse_args(arguments)
    except SystemExit as end:
        # What the parser has said may still be in a buffer.
        _tell("")
        _write(b"")
        return end.code if isinstance(end.code, int) else 2


def _parser() -> argparse.ArgumentParser:
    """Return the parser, which takes the options of all commands before and after their names."""
    parser = _Parser(
        prog="python -m kvstore",
        description="Create, replace, read and delete records of a kvstore file.",
        epilog="Exit status: 0 done, 1 refused, 2 wrong usage, 3 the file is in use.",
    )
    parser.add_argument("--version", action="version", version=f"kvstore {__version__}")
    _add_shared(parser, file=None, wait=0.0, max_bytes=MAX_FILE_SIZE)
    # Not set here, so that what was given before the command's name stands.
    absent = dict.fromkeys(("file", "wait", "max_bytes"), argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    create = commands.add_parser(
        "create",
        help="store a JSON object under a new key; makes the file where it is missing",
        epilog="""example: python -m kvstore create user:1 '{"name": "Ada"}' --ttl 3600""",
    )
    put = commands.add_parser(
        "put",
        help="store a JSON object under a key, in place of what is there; makes the file likewise",
        epilog="""example: python -m kvstore put user:1 '{"name": "Ada"}'""",
    )
    read = commands.add_parser("read", help="print the value of a key as JSON")
    touch = commands.add_parser(
        "touch",
        help="give a key another time to live",
        epilog="example: python -m kvstore touch user:1 --ttl 3600",
    )
    delete = commands.add_parser("delete", help="remove a key")
    for command in (create, put, read, touch, delete):
        _add_shared(command, **absent)
        command.add_argument("key", help="1 to 32 characters; after -- where it begins with a dash")
    for command in (create, put):
        command.add_argument(
            "value",
            nargs="?",
            default="-",
            help="a JSON object (default: read from standard input)",
        )
        _add_ttl(command)
    ends = touch.add_mutually_exclusive_group(required=True)
    _add_ttl(ends)
    ends.add_argument("--forever", action="store_true", help="never to expire")
    return parser


def _add_ttl(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--ttl", type=_whole_number, metavar="SECONDS", help="time to live")


def _add_shared(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    parser.add_argument(
        "--file",
        type=_path,
        default=defaults["file"],
        help="the store's file (default: the default file)",
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=defaults["wait"],
        metavar="SECONDS",
        help="how long to wait for another process to let go of the file (default: 0)",
    )
    parser.add_argument(
        "--max-bytes",
        type=_whole_number,
        default=defaults["max_bytes"],
        metavar="N",
        help=f"the file does not grow past this (default: {MAX_FILE_SIZE:,}); under a limit on "
        f"memory (ulimit -v), what fits into it",
    )


class _Parser(argparse.ArgumentParser):
    """One that tells wrong usage even where standard error takes nothing."""

    def error(self, message: str) -> NoReturn:
        with suppress(OSError):
            super().error(message)
        raise SystemExit(2)


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return seconds


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


if __name__ == "__main__":
    sys.exit(main())
