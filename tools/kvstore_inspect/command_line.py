"""The command line: the group of commands, and what each kind of trouble ends in.

Exit status 0: fine; 1: problems found; 2: wrong usage, or not a store; 3: another process has it.
"""

import importlib
import os
import sys
from difflib import get_close_matches
from typing import Any, Final

import click

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    KVStoreError,
    StoreLockedError,
    UnsupportedFormatError,
    __version__,
)

from .commands.common import LOCKED, PROBLEMS, WRONG_USAGE
from .terminal import OutputError, give_up, path_text, prepare_streams, say

_WHERE_LOCKED: Final = (
    "--wait SECONDS waits for it; a command that only reads looks at it all the same with "
    "--unlocked"
)

_COMMANDS: Final = (
    "info",
    "keys",
    "get",
    "dump",
    "load",
    "copy",
    "compact",
    "diff",
    "slots",
    "verify",
    "repair",
    "report",
    "completion",
)


class _Commands(click.Group):
    """Imports the module of a command only when it is run: some need large libraries."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"kvstore_inspect.commands.{name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take a file in the place of a command for `info` of it; say what may have been meant."""
        name = args[0]
        if name in _COMMANDS or name.startswith("-"):
            return super().resolve_command(context, args)
        if not os.path.isfile(name):
            context.fail(_no_command(name))
        if len(args) > 1 and args[1] in _COMMANDS:
            context.fail(f"The command comes before the file: {args[1]} {path_text(name)}")
        return super().resolve_command(context, ["info", *args])


def _no_command(name: str) -> str:
    similar = get_close_matches(name, _COMMANDS, 1)
    if similar:
        return f"No command and no file is called {path_text(name)!r}. Did you mean {similar[0]}?"
    return f"No command and no file is called {path_text(name)!r}."


@click.command(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 fine, 1 problems found, 2 wrong usage or not a store, 3 in use.",
)
@click.version_option(__version__, prog_name="kvstore-inspect")
@click.pass_context
def group(context: click.Context) -> int:
    """See into a kvstore file, check it, carry it elsewhere, mend it.

    Without a command: what to do first. With a FILE in its place: info of it.
    """
    if context.invoked_subcommand is None:
        from .start import show_start  # which no command needs

        show_start()
    return WRONG_USAGE


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    prepare_streams()
    output = sys.stdout
    try:
        result: Any = group.main(arguments, prog_name="kvstore-inspect", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        try:
            error.show()
        except OSError:
            give_up(sys.stderr)
        return error.exit_code
    except click.Abort:
        return 128 + 2
    except SystemExit:
        if sys.stdout is output:
            raise
        # click has put something else in place of a closed pipe, and makes it status 1.
        sys.stdout = output
        give_up(sys.stdout)
        return 0
    except BrokenPipeError:
        give_up(sys.stdout)  # whoever reads has enough
        return 0
    except OutputError as error:
        give_up(sys.stdout)
        say(f"kvstore-inspect: cannot write to standard output: {error.strerror}")
        return PROBLEMS
    except StoreLockedError as error:
        return _end(StoreLockedError(error.args[0], _WHERE_LOCKED), LOCKED)
    except (UnsupportedFormatError, InvalidKeyError, OSError) as error:
        return _end(error, WRONG_USAGE)
    except (CorruptStoreError, KVStoreError) as error:
        return _end(error, PROBLEMS)
    return result if isinstance(result, int) else 0


def _end(error: Exception, status: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    say(f"kvstore-inspect: {text}")
    return status
