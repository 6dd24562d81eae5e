"""Builds the compiled twin of the hot path, as part of building the package.

Offsets and sizes come from `layout.py`: each of its whole numbers becomes a constant of C, in a
file that the twin's sources include. Where the twin cannot be built, the package goes without.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from Cython.Build import cythonize
from setuptools import Extension
from setuptools.command.build_ext import build_ext

SOURCES: Final = Path("src/kvstore")
CONSTANTS: Final = "layout_constants.pxi"


def constants_of(layout: Path) -> dict[str, int]:
    """Return the whole numbers, below 2**64, that a layout module declares."""
    return {
        name: value
        for name, value in runpy.run_path(str(layout)).items()
        if name.isupper() and type(value) is int and 0 <= value < 2**64
    }


def as_cython(constants: dict[str, int]) -> Iterator[str]:
    """Yield the lines of a file that declares these numbers as constants of C."""
    yield "cdef extern from *:"
    yield '    """'
    for name, value in constants.items():
        yield f"    #define KVSTORE_{name} UINT64_C({value})"
    yield '    """'
    for name in constants:
        yield f'    const uint64_t {name} "KVSTORE_{name}"'
    yield f"BUILT_WITH = {constants}"


class BuildHot(build_ext):
    """`build_ext` that makes C of Cython first."""

    def finalize_options(self) -> None:
        """Add what there is to build."""
        folder = Path("build/cython")
        folder.mkdir(parents=True, exist_ok=True)
        lines = as_cython(constants_of(SOURCES / "layout.py"))
        (folder / CONSTANTS).write_text("\n".join(lines) + "\n", "utf-8")
        self.distribution.ext_modules = cythonize(
            [
                Extension(f"kvstore.{source.stem}", [str(source)], optional=True)
                for source in sorted(SOURCES.glob("*.pyx"))
            ],
            build_dir=str(folder),
            include_path=[str(folder)],
            language_level=3,
        )
        super().finalize_options()
