"""Both twins of the hot path, each in a process of its own, told the same and compared."""

import base64
import pickle
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from .processes import Child
from .twin import FOREIGN, Outcome, Step

KINDS: Final = ("plain", "compiled")
_SCRIPT: Final = "from support.twin import serve; serve()"


class Twins:
    """The plain twin and the compiled one; both are started anew after one of them has died.

    Use as a context manager: at its end the two are ended.

    Args:
        folder: where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children:
            child.__exit__(None, None, None)
        self._children = []

    def _start(self) -> None:
        self._started += 1
        for kind, pure in zip(KINDS, ("1", ""), strict=True):
            folder = self._folder / f"{kind} {self._started}"
            self._children.append(Child(_SCRIPT, folder, kind, KVSTORE_PURE=pure))

    def _tell(self, *step: Any) -> list[Any]:
        """Have both do a step, at the same time; return what came of it in each."""
        if not self._children:
            self._start()
        line = base64.b64encode(pickle.dumps(step)).decode()
        try:
            for child in self._children:
                child.say(line)
            return [pickle.loads(base64.b64decode(child.hear())) for child in self._children]
        except BaseException:
            self.__exit__()
            raise

    def do(self, *steps: Step) -> list[Outcome]:
        """Have both do these steps; return what came of each, which is the same in both."""
        plain, compiled = self._tell("all", *steps)
        for number, (step, one, other) in enumerate(zip(steps, plain, compiled, strict=True)):
            if one != other:
                self._fail(f"step {number} of {len(steps)}, {str(step)[:1000]}", one, other)
        outcomes: list[Outcome] = plain
        return outcomes

    def try_out(self, *experiment: Any) -> None:
        """Have both do one of the experiments of `Twin`, with the same results.

        None of these is an error but those that the store raises for what is wrong.
        """
        plain, compiled = self._tell(*experiment)
        assert plain == compiled, _first_difference(plain, compiled)
        own = [part for part in plain if FOREIGN in str(part)]
        assert not own, str(own[0])[:3_000]

    def _fail(self, step: str, plain: Outcome, compiled: Outcome) -> NoReturn:
        told = "\n".join(
            f"{kind}: {str(outcome)[:2000]}"
            for kind, outcome in zip(KINDS, (plain, compiled), strict=True)
        )
        raise AssertionError(f"the twins differ\n{step}\n{told}\n{self._difference()}")

    def _difference(self) -> str:
        """Say where the two files, as they are by now, differ."""
        one, other = self._tell("image")
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
