"""Both loaders on mutated images, in a process of their own: python -m tests.fuzz.loaders.

DALI, libjpeg and libpng are C code: an input that ends the process is a finding like any other.
"""

import argparse
import tempfile
import time
from pathlib import Path
from random import Random

import torch

from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.images.order import Steps
from data_pipelines.images.source import BadImages
from data_pipelines.loaders import LOADERS, eval_batches, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from tests.fuzz.harness import fresh, mutate
from tests.fuzz.targets_data import TARGETS, image

_IMAGES = 24
_MEAN, _STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
TRANSFORMS = (
    ImageTransform(16, None, "none", _MEAN, _STD),
    ImageTransform(16, 20, "none", _MEAN, _STD),
    ImageTransform(16, None, "none", (0.0,), (1.0,), channels=1),
    ImageTransform(16, None, "imagenet", _MEAN, _STD),
)


def check_loaders(folder: Path, number: int) -> int:
    """Feed both loaders some mutated images; how many of them one or the other skipped.

    Every image is delivered or told to be bad in evaluation, and every sample delivered in
    training; whatever else happens ends the process.
    """
    target = next(target for target in TARGETS if target.name == "image")
    seeds, random, skipped = target.seeds(folder), Random(number), 0
    transform = TRANSFORMS[number % len(TRANSFORMS)]
    with fresh(folder / "images") as root:
        (root / "a").mkdir()
        for place in range(_IMAGES):
            (root / "a" / f"{place}.jpg").write_bytes(mutate(random, seeds, target))
        # So that there always is one to take the place of others.
        (root / "a" / "whole.png").write_bytes(image())
        index = scan_class_folders(root)
        for loader in LOADERS[1:]:
            bad = BadImages(index, on_error="skip", limit=1.0)
            settings = LoaderSettings(loader, int(loader == "dali"), torch.device("cpu"))
            if transform.augmentation == "none":
                batches = eval_batches(index, transform, 8, settings, bad=bad)
                expected = len(index)
            else:
                order = training_order(index, number)
                steps = Steps(global_batch=25, accumulation=1, start=0, count=2)
                batches = train_batches(index, transform, order, steps, settings, bad=bad)
                expected = 50
            delivered = sum(len(images) for images, _ in batches)
            told = len(bad.take_new())
            skipped += told
            if transform.augmentation == "none":
                delivered += told
            assert delivered == expected, f"{loader}: {delivered} images instead of {expected}"
    return skipped


def main() -> None:
    """Check the loaders with numbers from --first on, until the time is up or the count is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.loaders", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="of the numbers (default 0)")
    parser.add_argument("--count", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    options = parser.parse_args()
    end, number, skipped = time.monotonic() + options.seconds, options.first, 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        while number < options.first + options.count and time.monotonic() < end:
            # Written beforehand: it names what ended the process.
            print("number", number, flush=True)
            skipped += check_loaders(Path(folder), number)
            number += 1
    print(f"{_IMAGES * (number - options.first)} images, {skipped} times one was skipped")


if __name__ == "__main__":
    main()
