"""Two stores, one with the compiled code and one without, told the same and compared."""

import logging
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from .scripted_store import FOREIGN, Outcome, ScriptedStore, Step

KINDS: Final = ("plain", "compiled")


class StorePair:
    """A store without the compiled code and one with it, side by side.

    Use as a context manager: at its end both are closed.

    Args:
        folder: where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self._stores = [ScriptedStore(folder / kind, plain=kind == "plain") for kind in KINDS]

    def __enter__(self) -> Self:
        logging.disable()
        return self

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
        for store in self._stores:
            store.end()

    def do(self, *steps: Step) -> list[Outcome]:
        """Have both do these steps; return what came of each, which is the same in both."""
        plain, compiled = self._stores
        outcomes = []
        for number, step in enumerate(steps):
            one, other = plain.do(step), compiled.do(step)
            if one != other:
                self._fail(f"step {number} of {len(steps)}, {str(step)[:1000]}", one, other)
            outcomes.append(one)
        return outcomes

    def try_out(self, experiment: str, *arguments: Any) -> None:
        """Have both do one of the experiments of `ScriptedStore`, with the same results.

        None of these is an error but those that the store raises for what is wrong.
        """
        plain, compiled = (store.try_out(experiment, *arguments) for store in self._stores)
        assert plain == compiled, _first_difference(plain, compiled)
        own = [part for part in plain if FOREIGN in str(part)]
        assert not own, str(own[0])[:3_000]

    def _fail(self, step: str, plain: Outcome, compiled: Outcome) -> NoReturn:
        told = "\n".join(
            f"{kind}: {str(outcome)[:2000]}"
            for kind, outcome in zip(KINDS, (plain, compiled), strict=True)
        )
        raise AssertionError(f"the two differ\n{step}\n{told}\n{self._difference()}")

    def _difference(self) -> str:
        """Say where the two files, as they are by now, differ."""
        one, other = (store.image() for store in self._stores)
        if len(one) != len(other):
            return f"files of {len(one):,} and {len(other):,} bytes"
        words = (
            (place, one[place : place + 8], other[place : place + 8])
            for place in range(0, len(one), 8)
        )
        return "\n".join(
            f"byte {place:,}: {of_one.hex(' ')} / {of_other.hex(' ')}"
            for place, of_one, of_other in words
            if of_one != of_other
        )[:2_000]


def _first_difference(one: Any, other: Any) -> str:
    """Say where two results of many parts begin to differ."""
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for number, parts in enumerate(zip(one, other, strict=True)):
            if parts[0] != parts[1]:
                before = f"after {str(one[number - 1])[:500]}\n" if number else ""
                return f"{before}part {number}: {_first_difference(*parts)}"
    return f"\nplain:    {str(one)[:1500]}\ncompiled: {str(other)[:1500]}"
