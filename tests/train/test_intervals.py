"""Intervals as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpp.common.errors import UserError
from train.config.intervals import Interval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000 steps", Interval(1000, "steps")),
        ("1 step", Interval(1, "steps")),
        ("0.5 epochs", Interval(0.5, "epochs")),
        (".25 epoch", Interval(0.25, "epochs")),
        ("  30minutes ", Interval(30, "minutes")),
    ],
)
def test_what_people_write(text, expected):
    assert Interval.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "1000", "steps", "0 steps", "-1 steps", "1.5 steps", "1e3 steps", "2 hours", "nan"]
)
def test_what_makes_no_sense(text):
    with pytest.raises(UserError, match="steps"):
        Interval.parse(text)


@given(every=st.integers(1, 50), last=st.integers(1, 400))
def test_steps_are_multiples(every, last):
    interval = Interval(every, "steps")
    due = [s for s in range(1, last + 1) if interval.due(s, steps_per_epoch=7, seconds_since=1e9)]
    assert due == [s for s in range(1, last + 1) if s % every == 0]


@given(images=st.integers(1, 500), batch=st.integers(1, 64), tenths=st.integers(1, 30))
def test_epochs_are_the_first_step_at_or_after_each_multiple(images, batch, tenths):
    """By whole numbers: after step s, 10*s*batch tenths of images are seen."""
    interval = Interval(tenths / 10, "epochs")
    due = [
        s for s in range(1, 200) if interval.due(s, steps_per_epoch=images / batch, seconds_since=0)
    ]
    passed = [10 * s * batch // (tenths * images) for s in range(200)]
    assert due == [s for s in range(1, 200) if passed[s] > passed[s - 1]]


def test_minutes_are_since_the_last_one():
    interval = Interval.parse("2 minutes")
    assert not interval.due(10**6, steps_per_epoch=1, seconds_since=119)
    assert interval.due(1, steps_per_epoch=10**6, seconds_since=120)
