"""The checker: every structure of a file against every other, each breach in one plain line.

Reads the bytes of a file and trusts none of them, so it does not hang or die on a damaged one. Run
by the tests on every store as a test ends, and by ``kvstore-inspect verify``. It takes one bit of
memory for each 32 bytes of the file that it checks.
"""

import mmap
import os
from collections.abc import Callable, Iterator

from .check_extents import check_extents, check_superblock
from .check_slabs import check_slabs
from .check_table import check_table
from .checked_file import CheckedFile, Image
from .problems import Breach, Problem


def check_file(path: str | os.PathLike[str]) -> list[Problem]:
    """Check the closed file at `path`; an empty list says that it is whole.

    Takes no lock and changes nothing. What a file in use shows may be half of a change.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return [Problem(0, "file", "is empty", Breach.FILE_EMPTY)]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            return list(check_image(image))


def check_image(
    image: Image, progress: Callable[[int, int], object] = lambda _done, _whole: None
) -> Iterator[Problem]:
    """Yield every breach of the format in the bytes of a file; where it was cut off, read zeros.

    `progress` is called now and then with how much of the way is done, and the whole of it.
    """
    file = CheckedFile(image, progress)
    yield from check_superblock(file)
    if file.extent_count:
        yield from check_extents(file)
        yield from check_table(file)
        yield from check_slabs(file)
