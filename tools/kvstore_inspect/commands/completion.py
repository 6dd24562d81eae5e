"""`completion`: what makes a shell complete the commands and options of this tool."""

import sys
from typing import Final

import click
from click.shell_completion import get_completion_class

from .common import DONE

_PROGRAM: Final = "kvstore-inspect"
_PLACES: Final = {
    "bash": "~/.local/share/bash-completion/completions/kvstore-inspect",
    "zsh": "a folder of $fpath, as _kvstore-inspect",
    "fish": "~/.config/fish/completions/kvstore-inspect.fish",
}


@click.command(
    "completion",
    help="Print the script that makes SHELL complete the commands, options and files of this tool.",
    epilog="Example: kvstore-inspect completion bash > "
    "~/.local/share/bash-completion/completions/kvstore-inspect; for zsh, _kvstore-inspect in a "
    "folder of $fpath; for fish, ~/.config/fish/completions/kvstore-inspect.fish",
)
@click.argument("shell", type=click.Choice(list(_PLACES)))
@click.pass_context
def command(context: click.Context, shell: str) -> int:
    """Print click's script for the shell, its place as a comment behind it."""
    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click has all three
        raise click.UsageError(f"click completes nothing in {shell}")
    variable = f"_{_PROGRAM}_COMPLETE".replace("-", "_").upper()
    script = kind(context.find_root().command, {}, _PROGRAM, variable)
    text = script.source_template % script.source_vars()
    # zsh looks for `#compdef` in the first line, so the comment is the last one.
    sys.stdout.write(f"{text.strip()}\n\n# Put this into {_PLACES[shell]}\n")
    return DONE
