"""Episodes: which classes and which images each step is about."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.demo import generate_demo
from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.episodes import EpisodeOrder
from data_pipelines.images.image_index import open_images
from data_pipelines.images.order import Steps
from data_pipelines.loaders import train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.settings import DemoData, EpisodesSection

CLASSES = [[2, 3], [3, 4], [0, 1], [1, 3]]
IMAGES = [9, 11, 8, 15, 14, 10, 12, 13, 18, 14, 16, 19, 17, 15, 12, 13]


@st.composite
def orders(draw: st.DrawFn) -> tuple[EpisodeOrder, int]:
    """An order, and its global batch."""
    number, batch = draw(st.integers(2, 7)), draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 9), min_size=number, max_size=number))
    labels = np.repeat(np.arange(number), sizes)
    order = EpisodeOrder(
        draw(st.integers(0, 2**63)),
        labels,
        number,
        draw(st.integers(2, number)),
        batch * draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
    )
    return order, batch


@given(orders(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_an_episode_goes_through_the_images_of_its_classes(given_, episode):
    order, _ = given_
    classes = order.classes_of(episode)
    assert len({*classes.tolist()}) == order.classes and (np.diff(classes) > 0).all()
    start = episode * order.length
    images = order.images(np.arange(start, start + order.length))
    assert np.isin(order.labels[images], classes).all()
    pool = np.flatnonzero(np.isin(order.labels, classes))
    once = images[:: order.repeats]
    assert np.array_equal(images, np.repeat(once, order.repeats)[: len(images)])
    for begin in range(0, len(once), len(pool)):
        part = once[begin : begin + len(pool)]
        assert len({*part.tolist()}) == len(part), "none comes twice before all have come"
    # A bad image is replaced by one of the same classes.
    assert order.labels[order.image_after(start, 3)] in classes


@given(orders(), st.integers(0, 1000), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=40, deadline=None)
def test_a_sample_is_the_same_image_wherever_it_is_asked_for(given_, step, ranks):
    order, batch = given_
    samples = np.arange(step * batch, (step + 1) * batch)
    whole = order.images(samples)
    for rank in range(ranks):
        assert np.array_equal(order.images(samples[rank::ranks]), whole[rank::ranks])
    alone = [int(order.images(np.array([sample]))[0]) for sample in samples]
    assert alone == whole.tolist() == pickle.loads(pickle.dumps(order)).images(samples).tolist()
    # All of a step is of one episode.
    assert len({*(samples // order.length).tolist()}) == 1


def test_written_down():
    """A run of an earlier version goes on with the same episodes."""
    order = EpisodeOrder(3, np.repeat(np.arange(5), 4), 5, 2, 8)
    assert [order.classes_of(e).tolist() for e in range(4)] == CLASSES
    assert order.images(np.arange(16)).tolist() == IMAGES


def test_classes_are_drawn_evenly():
    order = EpisodeOrder(0, np.arange(8), 8, 3, 4)
    drawn = np.concatenate([order.classes_of(e) for e in range(800)])
    assert (abs(np.bincount(drawn) - 300) < 60).all()
    other = EpisodeOrder(1, np.arange(8), 8, 3, 4)
    assert any((order.classes_of(e) != other.classes_of(e)).any() for e in range(5))


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_both_loaders_on_any_number_of_ranks(tmp_path, loader):
    generate_demo(tmp_path, DemoData(classes=4, train_per_class=6, val_per_class=1))
    index = open_images(tmp_path / "train")
    episodes = EpisodesSection(classes=2, steps=2)
    order = training_order(index, 5, episodes=episodes, batch=8)
    transform = ImageTransform(16, 16, "none", (0.5,) * 3, (0.25,) * 3)

    def labels(rank, ranks, accumulation, start=0):
        settings = LoaderSettings(loader, 0 if loader == "torchvision" else 1, torch.device("cpu"),
                                  rank, ranks)  # fmt: skip
        steps = Steps(8, accumulation, start, 4 - start)
        found = [b for _, b in train_batches(index, transform, order, steps, settings)]
        return torch.cat(found).view(4 - start, -1)

    whole = labels(0, 1, 1)
    assert torch.equal(
        whole, torch.from_numpy(index.labels[order.images(np.arange(32))]).view(4, 8)
    )
    for step, row in enumerate(whole):
        assert {*row.tolist()} == {*order.classes_of(step // 2).tolist()}
    for rank in range(2):
        assert torch.equal(labels(rank, 2, 2), whole[:, rank::2])
    assert torch.equal(labels(0, 1, 1, start=3), whole[3:])
