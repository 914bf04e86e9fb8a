"""Which image each rank sees at each step, as a pure function of (seed, position).

Training is one endless stream of samples numbered 0, 1, 2, ... across all ranks. Sample g is
image ``permutation(seed, epoch, size)[i]`` with ``epoch, i = divmod(g, size)``, and step s with
global batch B covers samples s*B to (s+1)*B - 1. Batches are always full and may cross the end
of an epoch, so every image is seen exactly once per epoch. (With repeated augmentation, samples
r*k to r*k + r-1 are the image at place k of this stream: each is seen r times in r epochs.)

Images in shards can be shuffled within a window instead, see :class:`SampleOrder`: what is read
at any time then lies in few shards. Still a pure function; all of the above holds.

The random numbers of a sample's augmentation come from the same kind of hash. Nothing here has
state: a run resumes at any step, with any number of ranks, and every sample is the same again.
NumPy's generators are not used, since their streams may change between versions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpp.common.errors import UserError

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
_UInt64s = NDArray[np.uint64]

# SplitMix64: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_ORDER_STREAM = 1
_AUGMENT_STREAM = 2
_SHARD_STREAM = 3
_MIX_STREAM = 4


def permutation(seed: int, epoch: int, size: int) -> Int64s:
    """The order of an epoch: a permutation of 0..size-1, shape (size,), read-only."""
    return _permutation(seed, epoch, size)


# Two epochs: a batch may lie across the end of one. The wrapper above keeps its signature, which
# the cache's own wrapper would hide from type checkers.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Int64s:
    keys = _hash(key_of(seed, _ORDER_STREAM, epoch), np.arange(size, dtype=np.uint64))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def uniforms(seed: int, samples: Int64s, count: int) -> Float64s:
    """Random numbers of samples in [0, 1): shape (len(samples), count).

    Args:
        seed: the run's seed.
        samples: global sample numbers, shape (n,).
        count: numbers wanted per sample; the first k are the same for any count >= k.
    """
    return _uniforms(key_of(seed, _AUGMENT_STREAM), samples, count)


def _uniforms(key: int, samples: Int64s, count: int) -> Float64s:
    sample_keys = _hash(key, samples.astype(np.uint64))
    bits = _hash(sample_keys[:, None], np.arange(count, dtype=np.uint64)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixing_uniforms(seed: int, sample: int, count: int) -> Float64s:
    """Random numbers in [0, 1) of the batch that begins with a sample: shape (count,)."""
    return _uniforms(key_of(seed, _MIX_STREAM), np.array([sample]), count)[0]


def rank_samples(step: int, global_batch: int, rank: int, world_size: int) -> Int64s:
    """Global numbers of the samples that ``rank`` of ``world_size`` takes at ``step``, ascending.

    The rank takes every world_size-th sample, so the ranks together hold the step's
    ``global_batch`` samples whatever their number.
    """
    return step * global_batch + np.arange(rank, global_batch, world_size, dtype=np.int64)


class Order(Protocol):
    """What the loaders ask of an order; it can be pickled."""

    @property
    def seed(self) -> int:
        """The run's."""

    def images(self, samples: Int64s) -> Int64s:
        """The image (0..size-1) that each sample number stands for; same shape as samples."""

    def image_after(self, sample: int, count: int) -> int:
        """The image ``count`` images after that of ``sample``, to take in its place."""


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """Which image each global sample number stands for.

    Attributes:
        seed: the run's seed.
        size: number of images.
        repeats: consecutive samples that are the same image, augmented differently (repeated
            augmentation: Hoffer et al., "Augment your batch", CVPR 2020). Ranks take turns in the
            stream, so the repetitions go to different ranks.
        window: None to shuffle over the whole epoch. Else the shards are shuffled and read one
            after the other, and within every ``window`` consecutive images of this sequence the
            order is random: a window's images come from shards that follow each other in the
            epoch's order of shards. A window of at least ``size`` images is a whole shuffle.
        shards: the shard of each image, shape (size,); only with a window.
    """

    seed: int
    size: int
    repeats: int = 1
    window: int | None = None
    shards: NDArray[np.int32] | None = None
    _windowed: dict[int, Int64s] = field(default_factory=dict, init=False, repr=False)

    def images(self, samples: Int64s) -> Int64s:
        """The image (0..size-1) that each sample number stands for; same shape as samples."""
        epochs, places = np.divmod(samples // self.repeats, self.size)
        images = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            images[here] = self._epoch(int(epoch))[places[here]]
        return images

    def image_after(self, sample: int, count: int) -> int:
        """The image that comes ``count`` images after that of ``sample`` in the stream."""
        return int(self.images(np.array([sample + count * self.repeats]))[0])

    def _epoch(self, epoch: int) -> Int64s:
        if self.window is None or self.shards is None:
            return permutation(self.seed, epoch, self.size)
        if epoch not in self._windowed:
            # Two epochs: a batch may lie across the end of one.
            for old in sorted(self._windowed)[:-1]:
                self._windowed.pop(old, None)
            self._windowed[epoch] = self._windowed_order(epoch)
        return self._windowed[epoch]

    def _windowed_order(self, epoch: int) -> Int64s:
        assert self.window is not None and self.shards is not None
        shards = permutation(key_of(self.seed, _SHARD_STREAM), epoch, int(self.shards.max()) + 1)
        turn = np.argsort(shards)[self.shards]  # of the image's shard
        shuffled = np.empty(self.size, dtype=np.int64)
        shuffled[permutation(self.seed, epoch, self.size)] = np.arange(self.size)
        # At random within a shard, as the epoch's whole shuffle has it, so that the cut between
        # two windows falls on other images of a shard in every epoch.
        sequence = np.lexsort((shuffled, turn))
        windows = np.arange(self.size) // self.window
        return sequence[np.lexsort((shuffled[sequence], windows))]


@dataclass(frozen=True)
class Steps:
    """Some steps of training, and how the samples of each are dealt out in batches.

    Attributes:
        global_batch: images per step over all ranks.
        accumulation: batches that one step is made of on each rank.
        start: the first step, from 0; any step can be the first.
        count: number of steps.
    """

    global_batch: int
    accumulation: int
    start: int
    count: int

    def local_batch(self, world_size: int) -> int:
        """Images in each batch of a rank.

        Raises:
            UserError: the global batch does not divide evenly.
        """
        batches = world_size * self.accumulation
        if self.global_batch < 1 or self.global_batch % batches:
            raise UserError(
                f"a global batch of {self.global_batch} images cannot be shared evenly by "
                f"{world_size} ranks x {self.accumulation} accumulation steps"
            )
        return self.global_batch // batches

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, Int64s]]:
        """Step and sample numbers of each of a rank's batches."""
        for step in range(self.start, self.start + self.count):
            samples = rank_samples(step, self.global_batch, rank, world_size)
            for part in np.split(samples, self.accumulation):
                yield step, part


def key_of(*parts: int) -> int:
    """Fold integers of any sign and size up to 64 bits into one well-mixed 64-bit key."""
    key = 0
    for part in parts:
        mixed = _mix(np.array([key ^ (part & _MASK)], dtype=np.uint64) + np.uint64(_GOLDEN))
        key = int(mixed[0])
    return key


def _hash(key: int | _UInt64s, counters: _UInt64s) -> _UInt64s:
    """Element k of the SplitMix64 stream that starts at ``key``, for every k in ``counters``."""
    start = np.uint64(key) if isinstance(key, int) else key
    return _mix(start + (counters + np.uint64(1)) * np.uint64(_GOLDEN))


def _mix(z: NDArray[Any]) -> _UInt64s:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
