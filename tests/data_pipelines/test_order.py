import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.images import order
from data_pipelines.images.order import SampleOrder

GOLDEN_ORDER = [6, 3, 1, 5, 4, 0, 2, 7]
GOLDEN_UNIFORMS = [
    [0.425744602813912, 0.8925340492133313],
    [0.8171484402225163, 0.07620972916997704],
]
GOLDEN_WINDOWS = [7, 8, 10, 9, 6, 5, 1, 4, 3, 11, 2, 0]
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


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """Whole shuffles and windows over shards of any sizes, with and without repetitions."""
    size = draw(SIZES)
    seed, repeats = draw(SEEDS), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return SampleOrder(seed, size, repeats)
    shards = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    window = draw(st.integers(1, size + 3))
    return SampleOrder(seed, size, repeats, window, np.array(shards, dtype=np.int32))


@given(orders(), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_every_image_once_per_pass_over_all_ranks(
    order_: SampleOrder, passes: int, per_rank: int, world_size: int
) -> None:
    batch, length = per_rank * world_size, order_.size * order_.repeats
    seen: dict[int, int] = {}
    for step in range(-(-passes * length // batch)):
        for rank in range(world_size):
            samples = order.rank_samples(step, batch, rank, world_size)
            images = order_.images(samples)
            assert not seen.keys() & set(samples.tolist())
            seen.update(zip(samples.tolist(), images.tolist(), strict=True))
    for number in range(passes):
        whole = [seen[number * length + i] for i in range(length)]
        once = whole[:: order_.repeats]
        assert sorted(once) == list(range(order_.size))
        assert whole == np.repeat(once, order_.repeats).tolist()
        if order_.window is None:
            assert once == order.permutation(order_.seed, number, order_.size).tolist()


@given(
    orders(),
    st.integers(0, 40),
    st.integers(1, 4),
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
)
def test_the_stream_is_the_same_for_any_ranks_and_goes_on_anywhere(
    order_: SampleOrder, start: int, per_rank: int, world_sizes: list[int]
) -> None:
    batch = 12 * per_rank  # divisible by 1, 2, 3 and 4
    position = start * batch
    for step, world_size in enumerate(world_sizes, start):  # other ranks at every step
        shares = [
            order_.images(order.rank_samples(step, batch, rank, world_size))
            for rank in range(world_size)
        ]
        together = np.stack(shares, axis=1).ravel()
        alone = [int(order_.images(np.array([position + i]))[0]) for i in range(batch)]
        assert together.tolist() == alone
        position += batch


@given(orders(), st.integers(0, 10**6), st.integers(0, 100))
def test_the_image_after_is_the_next_place_of_the_stream(
    order_: SampleOrder, sample: int, count: int
) -> None:
    place = sample // order_.repeats + count
    everywhere = order_.images(
        np.array([place * order_.repeats + r for r in range(order_.repeats)])
    )
    assert set(everywhere.tolist()) == {order_.image_after(sample, count)}


@given(orders().filter(lambda order_: order_.window is not None), st.integers(0, 50))
def test_a_window_holds_what_follows_in_the_epochs_order_of_shards(
    order_: SampleOrder, epoch: int
) -> None:
    assert order_.window is not None and order_.shards is not None
    length = order_.size * order_.repeats
    images = order_.images(np.arange(epoch * length, (epoch + 1) * length, order_.repeats))
    # The shards in some order, one after the other; which order, the images themselves tell.
    windows = [images[i : i + order_.window] for i in range(0, order_.size, order_.window)]
    met: list[int] = []
    for window in windows:
        here = set(order_.shards[window].tolist())
        begun = [shard for shard in met if shard in here]
        assert begun in ([], met[-1:])  # at most the last one goes on
        # All shards but one end in the window in which they begin, unless they are longer.
        new = here - set(begun)
        rest = {
            shard: int((order_.shards == shard).sum() - (order_.shards[window] == shard).sum())
            for shard in new
        }
        unfinished = [shard for shard in new if rest[shard]]
        assert len(unfinished) <= 1
        met += sorted(new, key=lambda shard: (rest[shard] > 0, shard))


@given(SEEDS, SIZES, st.integers(0, 50))
def test_a_window_of_everything_is_a_whole_shuffle(seed: int, size: int, epoch: int) -> None:
    shards = np.arange(size, dtype=np.int32) // 5
    windowed = SampleOrder(seed, size, window=size, shards=shards)
    samples = np.arange(epoch * size, (epoch + 1) * size)
    assert windowed.images(samples).tolist() == order.permutation(seed, epoch, size).tolist()


def test_windows_and_shards_are_shuffled_anew_in_every_epoch() -> None:
    size, window = 60, 20
    order_ = SampleOrder(5, size, window=window, shards=np.arange(size, dtype=np.int32) // 10)
    first_shards, cuts, counts = set(), set(), np.zeros((10, window))
    for epoch in range(2000):
        images = order_.images(np.arange(epoch * size, epoch * size + window))
        pair = frozenset((images // 10).tolist())
        first_shards.add(pair)
        inside = images // 10 == min(pair)
        counts[images[inside] % 10, np.flatnonzero(inside)] += 1
    assert len(first_shards) == 15  # every two of six
    # Each image of a shard is equally likely at each place of its window: 2000 / 20 times.
    assert np.abs(counts - 100).max() < 6 * np.sqrt(100)
    wide = SampleOrder(5, size, window=15, shards=np.arange(size, dtype=np.int32) // 10)
    for epoch in range(200):
        images = wide.images(np.arange(epoch * size, epoch * size + 15))
        cuts.add(tuple(sorted(images.tolist())))
    assert len(cuts) > 150  # the shard that a window cuts is cut elsewhere every time


def test_order_of_windows_never_changes() -> None:
    windowed = SampleOrder(3, 12, window=5, shards=np.arange(12, dtype=np.int32) // 3)
    assert windowed.images(np.arange(12)).tolist() == GOLDEN_WINDOWS


def test_an_order_can_be_sent_to_a_worker_after_use() -> None:
    windowed = SampleOrder(3, 12, window=5, shards=np.arange(12, dtype=np.int32) // 3)
    before = windowed.images(np.arange(40)).tolist()
    assert pickle.loads(pickle.dumps(windowed)).images(np.arange(40)).tolist() == before


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
