"""Files forged with right checksums: the right value or an error, never a crash or a hang."""

import random
from functools import partial
from pathlib import Path
from typing import Final

from support import MIB
from support.damage import State
from support.forgery import KINDS, MAX_BYTES, Forge, build_deep

from kvstore.recovery.check import check_file

from .damage import use
from .laboratory import Experiment, stop_clock_between_calls

FILES: Final = 10  # a trial, all of one original
# More than the trial has as it begins and the map takes: see `limit_memory`.
MEMORY: Final = 64 * MIB


def use_forged_files(kind: str, folder: Path, rng: random.Random) -> int:
    """Forge a store in that way, some times, and use each; return how many."""
    stop_clock_between_calls()
    path = folder / "forged.kvs"
    live = build_deep(path, rng)
    forge = Forge(path.read_bytes())
    use_all_of(path, live, rng)
    limit_memory()
    for number in range(FILES):
        contents, said = KINDS[kind](forge, rng)
        path.write_bytes(contents)
        try:
            check_file(path)
            # The records that a forged index denies may be overwritten: see `spares_others`.
            use(
                path,
                contents,
                live,
                "one copy" not in said[0],
                rng,
                spares_others=kind in {"table", "blocks"},
                max_bytes=MAX_BYTES,
            )
            check_file(path)
            assert path.stat().st_size <= len(contents) + 4 * MIB, "the file grew for nothing"
        except BaseException as error:
            error.add_note(f"file {number}, forged: {'; '.join(said)}")
            raise
    return FILES


def use_all_of(path: Path, live: State, rng: random.Random) -> None:
    """Use the file while it is whole, so that all that takes memory has been imported."""
    contents = path.read_bytes()
    use(path, contents, live, False, rng, max_bytes=MAX_BYTES)
    path.write_bytes(contents)


def limit_memory() -> None:
    """Have this process get no more than a little memory from now on, but for the map."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _why_not() -> str | None:
    return None if Path("/proc/self/statm").exists() else "limits memory as Linux counts it"


EXPERIMENTS = tuple(
    Experiment(
        f"forged-{kind}", fault, "files", partial(use_forged_files, kind), unavailable=_why_not
    )
    for kind, fault in (
        ("superblock", "identity and state forged, checksums right"),
        ("index", "directory, extent map and allocator forged, checksums right"),
        ("table", "bucket headers, control bytes and slots forged"),
        ("blocks", "links of free blocks and records' headers forged"),
    )
)
