"""Which image each rank sees where every few steps are about some of the classes only.

The stream of samples is cut into episodes of equal length (Vinyals et al., "Matching Networks for
One Shot Learning", NeurIPS 2016), each with classes of its own: sample g is of episode
``g // length``, whose classes and whose images' order follow from the seed and that number. As
with the order of epochs nothing here has state, and a step's images are the same on any number of
ranks.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipelines.images.order import Int64s, key_of, permutation

_CLASS_STREAM = 5
_EPISODE_STREAM = 6


@dataclass(frozen=True, eq=False)
class EpisodeOrder:
    """Which image each global sample number stands for, by episodes.

    Attributes:
        seed: the run's seed.
        labels: class of each image, shape (size,).
        number: how many classes there are.
        classes: how many of them an episode is about; all are equally likely.
        length: samples of an episode, a multiple of the global batch.
        repeats: see :class:`data_pipelines.images.order.SampleOrder`.
    """

    seed: int
    labels: Int64s
    number: int
    classes: int
    length: int
    repeats: int = 1

    def classes_of(self, episode: int) -> Int64s:
        """The classes of an episode, ascending, shape (classes,)."""
        drawn = permutation(key_of(self.seed, _CLASS_STREAM), episode, self.number)
        return np.sort(drawn[: self.classes])

    def images(self, samples: Int64s) -> Int64s:
        """The image that each sample number stands for; same shape as samples."""
        episodes, places = np.divmod(samples, self.length)
        images = np.empty_like(samples)
        for episode in np.unique(episodes):
            here = episodes == episode
            images[here] = self._images(int(episode), places[here] // self.repeats)
        return images

    def image_after(self, sample: int, count: int) -> int:
        """The image ``count`` images after that of ``sample``, of the same episode's classes."""
        episode, place = divmod(sample, self.length)
        return int(self._images(episode, np.array([place // self.repeats + count]))[0])

    def _images(self, episode: int, places: Int64s) -> Int64s:
        """The images at some places of an episode; one that is longer begins again, shuffled."""
        pool = _pool(self, episode)
        rounds, places = np.divmod(places, len(pool))
        images = np.empty_like(places)
        for number in np.unique(rounds):
            here = rounds == number
            key = key_of(self.seed, _EPISODE_STREAM, episode)
            images[here] = pool[permutation(key, int(number), len(pool))[places[here]]]
        return images


# Two episodes: what is made ahead may be of the next one.
@lru_cache(maxsize=2)
def _pool(order: EpisodeOrder, episode: int) -> Int64s:
    """The images of an episode's classes."""
    return np.flatnonzero(np.isin(order.labels, order.classes_of(episode)))
