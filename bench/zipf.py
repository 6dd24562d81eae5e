"""A choice of records as skewed as that of web requests: the Zipfian distribution of YCSB."""

import random
from itertools import accumulate
from typing import Final

EXPONENT: Final = 0.99  # YCSB's


class Zipf:
    """Chooses among `count` records, the one of rank r with a probability in proportion to 1 / r^s.

    Exactly so: from the sums of all the weights, by bisection. Ranks are scattered over the records
    at random, so that those often chosen are no neighbours in a store.

    Args:
        count: how many records there are.
        rng: where chance comes from.
        exponent: s; YCSB's constant if not told else.
    """

    def __init__(self, count: int, rng: random.Random, exponent: float = EXPONENT) -> None:
        self._rng = rng
        weights: list[float] = [rank**-exponent for rank in range(1, count + 1)]
        self._sums = list(accumulate(weights))
        self.by_rank = rng.sample(range(count), count)
        """The numbers of the records, that most often chosen first."""

    def probability(self, rank: int) -> float:
        """Return how likely the record of a rank is chosen; 0 is the rank of the likeliest."""
        below = self._sums[rank - 1] if rank else 0.0
        return (self._sums[rank] - below) / self._sums[-1]

    def choose(self, count: int) -> list[int]:
        """Return the numbers of `count` records, each chosen for itself."""
        return self._rng.choices(self.by_rank, cum_weights=self._sums, k=count)
