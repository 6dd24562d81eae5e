"""All experiments, in the order of the closing table."""

from typing import Final

from . import (
    backups,
    clocks,
    cutting,
    damage,
    flooding,
    forgery,
    full_disks,
    histories,
    hostile,
    hot_keys,
    inspector,
    interrupts,
    kills,
    little_memory,
    power,
    processes,
    reentry,
    refusals,
    superseding_model,
    torn,
    writes,
)
from .laboratory import Experiment

EXPERIMENTS: Final[tuple[Experiment, ...]] = (
    *power.EXPERIMENTS,
    *kills.EXPERIMENTS,
    *writes.EXPERIMENTS,
    *interrupts.EXPERIMENTS,
    *reentry.EXPERIMENTS,
    *damage.EXPERIMENTS,
    *cutting.EXPERIMENTS,
    *forgery.EXPERIMENTS,
    *torn.EXPERIMENTS,
    *full_disks.EXPERIMENTS,
    *refusals.EXPERIMENTS,
    *little_memory.EXPERIMENTS,
    *histories.EXPERIMENTS,
    *processes.EXPERIMENTS,
    *clocks.EXPERIMENTS,
    *flooding.EXPERIMENTS,
    *hostile.EXPERIMENTS,
    *hot_keys.EXPERIMENTS,
    *inspector.EXPERIMENTS,
    *backups.EXPERIMENTS,
    *superseding_model.EXPERIMENTS,
)


def named(name: str) -> Experiment:
    """Return the experiment of that name."""
    return next(experiment for experiment in EXPERIMENTS if experiment.name == name)
