import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpp.common.errors import UserError
from tpp.regularization.schedule import GrowthSchedule


def test_published_lengths():
    cifar = GrowthSchedule(1e-4, 1.0, update_interval=10, stabilize_steps=10_000)
    imagenet = GrowthSchedule(1e-4, 1.0, update_interval=5, stabilize_steps=40_000)
    assert (cifar.growth_steps, cifar.total_steps) == (100_000, 110_001)
    assert (imagenet.growth_steps, imagenet.total_steps) == (50_000, 90_001)


@given(
    st.floats(1e-4, 2.0), st.floats(0.01, 2.0), st.integers(1, 20), st.integers(1, 50), st.data()
)
def test_lambda_follows_the_iterative_rule(delta, tau, interval, stabilize, data):
    """The rule as a program with state: add delta every interval until tau is reached."""
    schedule = GrowthSchedule(delta, tau, interval, stabilize)
    end = min(schedule.total_steps, 2000)
    strength, reached = 0.0, None
    for step in range(end):
        if step % interval == 0 and reached is None:
            strength = delta * (step / interval)
            if strength >= tau * (1 - 1e-9):
                strength, reached = tau, step
        assert schedule.strength(step) == pytest.approx(strength, rel=1e-9)
        assert schedule.phase(step) == ("grow" if reached is None else "stabilize")
    if reached is not None:
        assert schedule.growth_steps == reached


def test_layers_are_zeroed_one_after_the_other():
    schedule = GrowthSchedule(0.5, 1.0, 1, stabilize_steps=31, zero_out_interval=10)
    begin = schedule.growth_steps
    assert [layer for layer in range(5) if schedule.zeroed(layer, begin + 9)] == []
    assert [layer for layer in range(5) if schedule.zeroed(layer, begin + 10)] == [0]
    assert [layer for layer in range(5) if schedule.zeroed(layer, begin + 29)] == [0, 1]
    assert [layer for layer in range(5) if schedule.zeroed(layer, begin + 30)] == [0, 1, 2]
    schedule.check_zero_out(2)
    assert schedule.zeroed(2, schedule.total_steps - 1)
    with pytest.raises(UserError, match=r"stabilize_steps \(K_s\) is 31.*at least 41"):
        schedule.check_zero_out(3)
