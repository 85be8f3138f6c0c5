"""Calls that take turns: their order and number, and ratios round by round. No seconds are tested."""

from functools import partial

import pytest

from course_utils.evaluation.turns import in_turns, times_as_fast


def test_ways_take_turns_in_blocks_and_each_call_takes_the_next_item():
    seen = []
    ways = {
        "a": [partial(seen.append, i) for i in ("a0", "a1", "a2")],
        "b": [lambda: seen.append("b")],
    }
    taken = in_turns(ways, rounds=2, calls=2)
    assert seen == ["a0", "a1", "b", "b", "a2", "a0", "b", "b", "a1", "a2", "b", "b"]
    assert {name: len(of_way) for name, of_way in taken.items()} == {"a": 2, "b": 2}
    assert all(ms > 0 for of_way in taken.values() for ms in of_way)


@pytest.mark.parametrize(
    ("ways", "rounds", "calls", "message"),
    [
        ({}, 2, 1, "nothing to call: give some items"),
        ({"a": [print], "b": []}, 2, 1, "nothing to call for 'b'"),
        ({"a": [print]}, 1, 1, "1 rounds of 1 calls: take 2 rounds"),
        ({"a": [print]}, 2, 0, "2 rounds of 0 calls"),
    ],
)
def test_nothing_to_time_is_refused(ways, rounds, calls, message):
    with pytest.raises(ValueError, match=message):
        in_turns(ways, rounds=rounds, calls=calls)


def test_ratios_are_taken_round_by_round():
    """A machine that gets slower by the round slows both ways down, and the ratio stays."""
    ratio, low, high = times_as_fast([2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0])
    assert ratio == low == high == 2.0


def test_ratios_of_other_rounds_are_refused():
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        times_as_fast([1.0, 2.0, 3.0], [1.0, 2.0])
