"""The model of the protocol finds nothing wrong with it, and what is wrong without each rule."""

import pytest

from faults.superseding_model import RULES, find

ROUNDS = 3_000
# Most are missed within a tenth of these. What follows from a seed is the affair of Python.
MOST_ROUNDS = 10_000


def test_with_all_rules_nothing_is_lost() -> None:
    assert find(range(ROUNDS)) is None


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_missed_where_it_is_left_out(rule: str) -> None:
    assert find(range(MOST_ROUNDS), without=rule), RULES[rule].lost
