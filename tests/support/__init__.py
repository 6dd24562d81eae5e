"""Helpers of the tests: one module each for clock, files, keys, values, threads, processes, ….

Settings, all environment variables:

KVSTORE_TEST_SCALE     how long the random tests are, as a factor; 1 takes seconds
KVSTORE_TEST_SEED      a seed for the random tests, or "random" for another one each time; each
                       prints its own. By default they do the same every time, so that a commit
                       passes or not: it is the fault laboratory (`tests.faults`) that looks for the
                       unexpected.
KVSTORE_TEST_MEMORY    how much memory forged files may cost, as a factor; more than 1 for
                       extensions that take more, as those with sanitizers do
KVSTORE_TEST_PLATFORM  an operating system to imitate, "windows" or "macos": see `fakes`
"""

import os
import random
from typing import Final

from . import fakes

fakes.install()

SCALE: Final = float(os.environ.get("KVSTORE_TEST_SCALE", "1"))
SEED: Final = os.environ.get("KVSTORE_TEST_SEED", "1")
MEMORY_FACTOR: Final = float(os.environ.get("KVSTORE_TEST_MEMORY", "1"))

MIB: Final = 1024 * 1024
MIN_MAX_BYTES: Final = 4 * MIB
MAX_MAX_BYTES: Final = 1_000_000_000


def scaled(count: int) -> int:
    """Return how many rounds a random test that takes `count` by default should make."""
    return max(1, round(count * SCALE))


def seeded_random() -> random.Random:
    """Return a random generator and print its seed, which pytest shows when the test fails."""
    seed = random.SystemRandom().getrandbits(32) if SEED == "random" else int(SEED)
    print(f"KVSTORE_TEST_SEED={seed}")  # noqa: T201
    return random.Random(seed)
