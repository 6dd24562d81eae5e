"""Each experiment of the fault laboratory, in its short form: nothing is ever lost."""

import os

import pytest
from support import SCALE, seeded_random
from support.processes import call_in_child

from faults.catalogue import EXPERIMENTS
from faults.laboratory import Experiment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each trial is a forked process")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_nothing_is_lost(experiment: Experiment) -> None:
    reason = experiment.unavailable()
    if reason is not None:
        pytest.skip(reason)
    seed = seeded_random().getrandbits(32)
    failures = call_in_child(
        "faults.laboratory.run_short_form", name=experiment.name, seed=seed, scale=SCALE
    )
    assert not failures, "\n\n".join(failures)
