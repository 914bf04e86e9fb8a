import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import order

GOLDEN_ORDER = [6, 3, 1, 5, 4, 0, 2, 7]
GOLDEN_UNIFORMS = [
    [0.425744602813912, 0.8925340492133313],
    [0.8171484402225163, 0.07620972916997704],
]
SIZES = st.integers(1, 60)
SEEDS = st.integers(-(2**63), 2**64 - 1)


def test_hash_is_splitmix64() -> None:
    # The first outputs of the reference implementation for seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert order._hash(1234567, np.arange(3, dtype=np.uint64)).tolist() == expected


def test_order_never_changes() -> None:
    # Written down once: a run that resumes after an upgrade must see the same order and crops.
    assert order.permutation(0, 0, 8).tolist() == GOLDEN_ORDER
    np.testing.assert_array_equal(order.uniforms(7, np.array([0, 10**12]), 2), GOLDEN_UNIFORMS)


@given(SEEDS, st.integers(0, 1000), SIZES)
def test_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    assert sorted(order.permutation(seed, epoch, size)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(order.permutation(seed, epoch, 50)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100


def test_each_image_is_equally_likely_at_each_place() -> None:
    size, epochs = 6, 6000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), order.permutation(3, epoch, size)] += 1
    expected = epochs / size
    # Six standard deviations of a binomial count.
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected * (1 - 1 / size))


def test_permutation_cannot_be_changed_by_its_users() -> None:
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(0, 0, 5)[0] = 1


@given(st.integers(0, 500), st.integers(1, 12), st.integers(1, 8))
def test_ranks_together_take_exactly_the_step(step: int, per_rank: int, world_size: int) -> None:
    batch = per_rank * world_size
    shares = [order.rank_samples(step, batch, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {per_rank}
    assert sorted(np.concatenate(shares)) == list(range(step * batch, (step + 1) * batch))


@given(SEEDS, SIZES, st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_every_image_once_per_epoch_over_all_ranks(
    seed: int, size: int, epochs: int, per_rank: int, world_size: int
) -> None:
    batch = per_rank * world_size
    seen: dict[int, int] = {}
    for step in range(-(-epochs * size // batch)):
        for rank in range(world_size):
            samples = order.rank_samples(step, batch, rank, world_size)
            images = order.sample_images(seed, samples, size)
            seen.update(zip(samples.tolist(), images.tolist(), strict=True))
    for epoch in range(epochs):
        whole = [seen[epoch * size + i] for i in range(size)]
        assert whole == order.permutation(seed, epoch, size).tolist()


@given(SEEDS, SIZES, st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_image_depends_on_the_sample_number_alone(seed: int, size: int, samples: list[int]) -> None:
    together = order.sample_images(seed, np.array(samples), size)
    alone = [order.sample_images(seed, np.array([sample]), size)[0] for sample in samples]
    assert together.tolist() == alone


@given(SEEDS, st.lists(st.integers(0, 2**62), min_size=1, max_size=30), st.integers(1, 30))
def test_uniforms_depend_on_the_sample_number_alone(
    seed: int, samples: list[int], count: int
) -> None:
    together = order.uniforms(seed, np.array(samples), count)
    assert together.shape == (len(samples), count)
    assert ((together >= 0) & (together < 1)).all()
    for row, sample in zip(together, samples, strict=True):
        longer = order.uniforms(seed, np.array([sample]), count + 3)[0]
        np.testing.assert_array_equal(row, longer[:count])


def test_uniforms_are_uniform_and_independent() -> None:
    numbers = order.uniforms(0, np.arange(20_000), 8)
    histogram = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in numbers.T])
    chi_square = ((histogram - 1000) ** 2 / 1000).sum(1)
    assert chi_square.max() < 60  # 19 degrees of freedom: one in a million
    correlation = np.corrcoef(np.concatenate([numbers[:-1], numbers[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(16)).max() < 0.04
