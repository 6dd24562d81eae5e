"""Builds the compiled code, as part of building the package, and its source distribution.

Every `.pyx` in `src/kvstore/compiled` becomes an extension. Offsets and sizes come from the layout:
each of its whole numbers becomes a constant of C, in a file that these sources include. Where one
of them cannot be built, for want of a C compiler or for any other reason, the package goes without
all of them: a line of the build's output says so, and plain Python does the work. With
``KVSTORE_REQUIRE_COMPILED=1`` in the environment that is an error instead.
"""

import logging
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Final

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

SOURCES: Final = Path("src/kvstore/compiled")
LAYOUT: Final = Path("src/kvstore/format/layout.py")
TRANSLATED: Final = Path("build/cython")  # the C that Cython makes of the sources
CONSTANTS: Final = "layout_constants.pxi"


Constant = int | tuple[int, ...] | bytes


def constants_of(layout: Path) -> dict[str, Constant]:
    """Return the whole numbers, below 2**64, that a layout module declares, and tables of them."""
    return {
        name: value
        for name, value in runpy.run_path(str(layout)).items()
        if name.isupper() and _is_constant(value)
    }


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(type(each) is int and _is_constant(each) for each in value)
    return type(value) is bytes or (type(value) is int and 0 <= value < 2**64)


def as_cython(constants: dict[str, Constant]) -> Iterator[str]:
    """Yield the lines of a file that declares these numbers and tables as constants of C.

    ``built_with`` returns them, for `kvstore.compiled` to compare with the layout that it finds.
    """
    yield "from libc.stdint cimport uint8_t, uint64_t"
    yield "cdef extern from *:"
    yield '    """'
    for name, value in constants.items():
        if isinstance(value, int):
            yield f"    #define KVSTORE_{name} UINT64_C({value})"
        else:
            yield f"    static const {_item_type(value)} KVSTORE_{name}[] = {{"
            yield f"        {', '.join(map(str, value))}"
            yield "    };"
    yield '    """'
    for name, value in constants.items():
        if isinstance(value, int):
            yield f'    const uint64_t {name} "KVSTORE_{name}"'
        else:
            yield f'    const {_item_type(value)} {name} "KVSTORE_{name}"[{len(value)}]'
    yield "def built_with():"
    yield "    return {"
    for name, value in constants.items():
        yield f'        "{name}": {_as_object(name, value)},'
    yield "    }"


def _as_object(name: str, value: Constant) -> str:
    """Return what makes an object of a constant of C: kept as objects they would take memory."""
    if isinstance(value, int):
        return name
    kind = "bytes" if isinstance(value, bytes) else "tuple"
    return f"{kind}([each for each in {name}[:{len(value)}]])"


def _item_type(table: tuple[int, ...] | bytes) -> str:
    return "uint8_t" if isinstance(table, bytes) else "uint64_t"


def write_constants() -> None:
    """Write them, unless they are there already: a newer file is a reason to build anew."""
    text = "\n".join(as_cython(constants_of(LAYOUT))) + "\n"
    TRANSLATED.mkdir(parents=True, exist_ok=True)
    file = TRANSLATED / CONSTANTS
    if not file.exists() or file.read_text("utf-8") != text:
        file.write_text(text, "utf-8")


def _reason(error: BaseException) -> str:
    """Return in a few words why a build failed; what a compiler has to say, it has printed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CalledProcessError):
            return f"{cause.cmd[0]} ended with exit status {cause.returncode}"
        if isinstance(cause, OSError):
            return f"{cause.filename}: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class BuildHot(build_ext):
    """`build_ext` of all that is to be compiled, or of nothing."""

    extensions: list[Extension]
    inplace: bool

    def finalize_options(self) -> None:
        """Look for what there is to build."""
        self.distribution.ext_modules = [
            Extension(f"kvstore.compiled.{source.stem}", [source.as_posix()])
            for source in sorted(SOURCES.glob("*.pyx"))
        ]
        super().finalize_options()

    def get_source_files(self) -> list[str]:
        """Return what a source distribution needs to build them too."""
        parts = map(Path.as_posix, SOURCES.glob("*.pxi"))
        return [*map(str, super().get_source_files()), *parts, "tools/build_hot.py"]

    def run(self) -> None:
        """Build them, or leave them all out and say why."""
        wanted_in_place = self.inplace
        try:
            self._translate()
            super().run()
        except Exception as error:  # whatever it is: the package works without them
            if os.environ.get("KVSTORE_REQUIRE_COMPILED", "0") not in ("", "0"):
                raise
            self.inplace = wanted_in_place
            self._leave_out()
            self.announce(
                f"kvstore: the compiled hot path was not built ({_reason(error)}); the plain one "
                f"in Python will be used",
                logging.WARNING,
            )

    def _translate(self) -> None:
        """Make C of Cython."""
        from Cython.Build import cythonize  # not needed to make a source distribution

        write_constants()
        translated = cythonize(
            self.extensions,
            build_dir=str(TRANSLATED),
            include_path=[str(TRANSLATED)],
            language_level=3,
        )
        by_name = {extension.name: extension for extension in translated}
        for extension in self.extensions:
            extension.sources = by_name[extension.name].sources
            extension.depends = by_name[extension.name].depends

    def _leave_out(self) -> None:
        """Remove those that were built, now or by an earlier build: half of them is none."""
        build_py = self.get_finalized_command("build_py")
        for extension in self.extensions:
            file = Path(self.get_ext_filename(extension.name))
            Path(self.build_lib, file).unlink(missing_ok=True)
            if self.inplace:
                package = extension.name.rpartition(".")[0]
                Path(build_py.get_package_dir(package), file.name).unlink(missing_ok=True)
        self.extensions = []  # and `ext_modules` stays: the wheel is laid out for a platform


class WholeSource(sdist):
    """`sdist` with all that is kept under version control, so that the tests run from it."""

    def make_distribution(self) -> None:
        """Add whole folders, but for what Python and its tools leave in them."""
        for file in ("CHANGELOG.md", ".gitignore"):
            self.filelist.append(file)
        for folder in (".ci", ".github", "bench", "src", "tests", "tools"):
            self.filelist.recursive_include(folder, "*")
        for left in ("*.py[cod]", "*.so"):
            self.filelist.global_exclude(left)
        super().make_distribution()
