"""Each experiment of the fault laboratory, in its short form: nothing is ever lost."""

import json
from collections.abc import Iterator

import pytest
from support import SCALE, seeded_random
from support.platforms import needs_fork
from support.processes import Child

from faults.catalogue import EXPERIMENTS
from faults.laboratory import Experiment

pytestmark = needs_fork  # for each trial


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Child]:
    """A process of one thread, which forks for each trial."""
    with Child(
        "from faults.laboratory import run_short_forms; run_short_forms(say, hear)"
    ) as child:
        yield child


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_nothing_is_lost(experiment: Experiment, laboratory: Child) -> None:
    reason = experiment.unavailable()
    if reason is not None:
        pytest.skip(reason)
    seed = seeded_random().getrandbits(32)
    laboratory.say(json.dumps([experiment.name, seed, SCALE]))
    failures = json.loads(laboratory.hear())
    assert not failures, "\n\n".join(failures)
