"""Both loaders on real images, against each other and against torchvision's own transforms."""

import multiprocessing
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data_pipelines.images.batch import Batch, LoaderSettings
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.images.order import (
    SampleOrder,
    Steps,
    mixing_uniforms,
    permutation,
    uniforms,
)
from data_pipelines.loaders import eval_batches, resolve_loader, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform, erasing_boxes
from data_pipelines.loading.draws import UNIFORMS
from data_pipelines.loading.mixing import MIXING_UNIFORMS, mix
from data_pipelines.loading.recipes import flips, random_resized_windows
from data_pipelines.settings import (
    AugmentSection,
    ColorJitter,
    ProgressiveResizing,
    RandAugment,
)
from tpp.common.errors import UserError

# The torchvision loader's workers.
pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
LOADERS = ["dali", "torchvision"]
PHOTOS = 40
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def photos(unpack_photos: Callable[[int], ImageIndex]) -> ImageIndex:
    """Full-size ImageNet photos, grey ones among them."""
    return unpack_photos(PHOTOS)


@pytest.fixture(scope="module")
def cifar(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> ImageIndex:
    """The first 60 CIFAR-10 photos of the archive and 60 of another class."""
    root = tmp_path_factory.mktemp("cifar")
    counts: dict[str, int] = {}
    with tarfile.open(shared_data("cifar10-jpeg.tar.gz")) as archive:
        for member in archive:
            folder = str(Path(member.name).parent)
            counts[folder] = counts.get(folder, 0) + 1
            if counts[folder] <= 60:
                archive.extract(member, root, filter="data")
            if len(counts) == 2 and counts[folder] == 60:
                break
    return scan_class_folders(root / "cifar10" / "train")


def _transform(
    augmentation: str = "imagenet", size: int = 224, resize: int | None = 256, channels: int = 3
) -> ImageTransform:
    return ImageTransform(size, resize, augmentation, MEAN[:channels], STD[:channels], channels)


def _train(
    index: ImageIndex,
    transform: ImageTransform,
    *,
    order: SampleOrder | None = None,
    global_batch: int = 8,
    accumulation: int = 1,
    start: int = 0,
    steps: int = 5,
    **settings: Any,
) -> list[Batch]:
    covered = Steps(global_batch, accumulation, start, steps)
    order = order or training_order(index, 3)
    return list(train_batches(index, transform, order, covered, _settings(**settings)))


def _evaluate(
    index: ImageIndex, transform: ImageTransform, *, batch_size: int = 16, **settings: Any
) -> list[Batch]:
    return list(eval_batches(index, transform, batch_size, _settings(**settings)))


def _settings(loader: str = "dali", threads: int = 2, **more: Any) -> LoaderSettings:
    return LoaderSettings(loader, threads, CPU, **more)


def _levels(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: values in 0..255."""
    channels = images.shape[1]
    mean, std = torch.tensor([MEAN[:channels], STD[:channels]])[:, None, :, None, None]
    return (images * std + mean) * 255


def _join(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, *, mean: float) -> None:
    """Bounds measured on the photos, with Pillow 13: 99.8% of the values are the same.

    Each image's mean difference is below 0.05 of 255; a few in a million differ by two levels.
    """
    assert ours.shape == theirs.shape
    difference = (_levels(ours) - _levels(theirs)).abs()
    assert difference.mean((1, 2, 3)).max() < mean
    assert difference.max() < 2.01
    assert (difference > 1.01).float().mean() < 1e-5


def test_train_images_of_both_loaders_are_the_same(photos: ImageIndex) -> None:
    ours, our_labels = _join(_train(photos, _transform()))
    theirs, their_labels = _join(_train(photos, _transform(), loader="torchvision"))
    assert ours.dtype == theirs.dtype == torch.float32
    assert our_labels.dtype == their_labels.dtype == torch.int64
    assert torch.equal(our_labels, their_labels)
    assert sorted(our_labels.tolist()) == list(range(PHOTOS))
    _assert_close(ours, theirs, mean=0.06)


@pytest.mark.parametrize("loader", LOADERS)
def test_train_images_are_torchvision_s_for_the_same_window(
    photos: ImageIndex, loader: str
) -> None:
    images, labels = _join(_train(photos, _transform(), loader=loader))
    draws = uniforms(3, np.arange(PHOTOS), UNIFORMS)
    order = permutation(3, 0, PHOTOS)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    expected = []
    for image, draw in zip(order, draws, strict=True):
        photo = Image.open(photos.root / photos.files[image]).convert("RGB")
        size = np.array([(photo.height, photo.width)])
        ((top, left, height, width),) = random_resized_windows(size, draw[None]).tolist()
        cut = v2.functional.resized_crop(photo, top, left, height, width, [224, 224])
        crop = v2.functional.pil_to_tensor(cut)
        expected.append(normalise(crop.flip(-1) if flips(draw[None])[0] else crop))
    assert labels.tolist() == photos.labels[order].tolist()
    _assert_close(images, torch.stack(expected), mean=0.06)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("resize", [256, None])
def test_eval_images_are_torchvision_s(photos: ImageIndex, loader: str, resize: int | None) -> None:
    steps = [v2.Resize(resize)] if resize else []
    reference = v2.Compose(
        [
            *steps,
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    folder = ImageFolder(str(photos.root), reference)
    expected, labels = zip(*folder, strict=True)
    batches = _evaluate(photos, _transform(resize=resize), loader=loader)
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    images, our_labels = _join(batches)
    assert our_labels.tolist() == list(labels)
    # Without scaling the decoders agree bit by bit; what is left is float rounding.
    _assert_close(images, torch.stack(expected), mean=0.06 if resize else 1e-3)


def test_cifar_images_of_both_loaders_are_the_same(cifar: ImageIndex) -> None:
    transform = _transform("cifar", 32, None)
    settings: dict[str, Any] = {"global_batch": 40, "steps": 6}
    ours, our_labels = _join(_train(cifar, transform, **settings))
    theirs, their_labels = _join(_train(cifar, transform, loader="torchvision", **settings))
    assert torch.equal(our_labels, their_labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loader", LOADERS)
def test_cifar_images_are_padded_black_cut_and_mirrored(cifar: ImageIndex, loader: str) -> None:
    images, _ = _join(
        _train(cifar, _transform("cifar", 32, None), loader=loader, global_batch=60, steps=2)
    )
    draws = uniforms(3, np.arange(120), UNIFORMS)
    for image, sample, draw in zip(images, permutation(3, 0, 120), draws, strict=True):
        pixels = np.asarray(Image.open(cifar.root / cifar.files[sample]).convert("RGB"))
        padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
        top, left = int(draw[1] * 9), int(draw[2] * 9)
        cut = padded[top : top + 32, left : left + 32]
        if draw[0] < 0.5:
            cut = cut[:, ::-1]
        np.testing.assert_allclose(_levels(image[None])[0].permute(1, 2, 0).numpy(), cut, atol=1e-3)


@pytest.mark.parametrize("loader", LOADERS)
def test_any_start_any_ranks_any_accumulation_give_the_same_samples(
    cifar: ImageIndex, loader: str
) -> None:
    transform = _transform("cifar", 32, None)
    settings: dict[str, Any] = {"loader": loader, "global_batch": 48, "threads": 1}
    # Six steps of 48 over 120 images: an epoch ends in the middle of step 2.
    whole = _train(cifar, transform, steps=6, **settings)
    resumed = _train(cifar, transform, start=2, steps=4, **settings)
    for (images, labels), (again, labels_again) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)
    ranks = [
        _train(
            cifar,
            transform,
            steps=2,
            start=2,
            accumulation=2,
            rank=r,
            world_size=3,
            **settings,
        )
        for r in range(3)
    ]
    for step in range(2):
        images, labels = whole[2 + step]
        for rank, batches in enumerate(ranks):
            mine, my_labels = _join(batches[2 * step : 2 * step + 2])
            assert torch.equal(mine, images[rank::3])
            assert torch.equal(my_labels, labels[rank::3])


@pytest.mark.parametrize("loader", LOADERS)
def test_threads_change_nothing(photos: ImageIndex, loader: str) -> None:
    fewer = 0 if loader == "torchvision" else 1
    one = _train(photos, _transform(size=64), loader=loader, threads=fewer)
    more = _train(photos, _transform(size=64), loader=loader, threads=2)
    for (images, labels), (again, labels_again) in zip(one, more, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)


@pytest.mark.parametrize("loader", LOADERS)
def test_eval_ranks_share_the_images(cifar: ImageIndex, loader: str) -> None:
    few = cifar.subset(np.arange(0, len(cifar), 24))
    transform = _transform("cifar", 32, None)
    (whole, labels), *_ = _evaluate(few, transform, loader=loader)
    assert len(few) == 5
    for world_size in (2, 3):
        for rank in range(world_size):
            batches = _evaluate(
                few, transform, loader=loader, batch_size=2, rank=rank, world_size=world_size
            )
            mine, my_labels = _join(batches)
            assert torch.equal(mine, whole[rank::world_size])
            assert torch.equal(my_labels, labels[rank::world_size])
    assert _evaluate(few, transform, loader=loader, rank=5, world_size=6) == []


@pytest.fixture(scope="module")
def oddities(photos: ImageIndex, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """One photo in every guise that turns up in class folders."""
    folder = tmp_path_factory.mktemp("oddities") / "class"
    folder.mkdir()
    photo = Image.open(photos.root / photos.files[3]).convert("RGB")
    rotated = Image.Exif()
    rotated[274] = 6
    grey = np.asarray(photo.convert("L"))
    photo.save(folder / "exif.jpg", exif=rotated)
    photo.save(folder / "png.JPEG", format="PNG")
    photo.save(folder / "progressive.jpg", progressive=True)
    photo.resize((3, 2)).save(folder / "tiny.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("L").save(folder / "grey.jpg")
    photo.convert("LA").save(folder / "grey-alpha.png")
    photo.convert("1").save(folder / "bilevel.png")
    photo.convert("P").save(folder / "palette.png", transparency=3)
    photo.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.png")
    return scan_class_folders(folder.parent)


@pytest.mark.parametrize("channels", [3, 1])
def test_odd_files_become_the_same_images(oddities: ImageIndex, channels: int) -> None:
    ours, _ = _join(_evaluate(oddities, _transform(channels=channels)))
    theirs, _ = _join(_evaluate(oddities, _transform(channels=channels), loader="torchvision"))
    assert ours.shape == (11, channels, 224, 224)
    difference = (_levels(ours) - _levels(theirs)).abs()
    for file, image in zip(oddities.files, difference, strict=True):
        assert image.mean() < 0.25, file
        assert image.max() < 1.01, file


def test_the_odd_files_all_show_the_photo(oddities: ImageIndex) -> None:
    images, _ = _join(_evaluate(oddities, _transform(channels=1)))
    names = [Path(file).stem for file in oddities.files]
    alike = [n for n in range(len(names)) if names[n] not in ("tiny", "bilevel")]
    reference = images[names.index("grey")].flatten()
    for n in alike:
        assert np.corrcoef(images[n].flatten(), reference)[0, 1] > 0.98, names[n]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", ["junk", "empty", "truncated", "missing"])
def test_an_unreadable_file_is_named(
    cifar: ImageIndex, tmp_path: Path, loader: str, damage: str
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    good = (cifar.root / cifar.files[0]).read_bytes()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(good)
    index = scan_class_folders(tmp_path)
    bad = folder / "3.jpg"
    contents = {"junk": b"not an image", "empty": b"", "truncated": good[: len(good) // 2]}
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(contents[damage])
    transform = _transform("none", 32, None)
    with pytest.raises(UserError) as caught:
        _evaluate(index, transform, loader=loader, batch_size=2)
    assert str(caught.value).startswith(f"{bad}: cannot read this image (")
    assert "\n" not in str(caught.value)


def _endless(index: ImageIndex, loader: str) -> Iterator[Batch]:
    return train_batches(
        index,
        _transform("cifar", 32, None),
        training_order(index, 0),
        Steps(global_batch=8, accumulation=1, start=0, count=10**9),
        _settings(loader),
    )


def _dali_threads() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread of somebody else that ends meanwhile
            names.append((task / "comm").read_text())
    return sum(name.startswith("[DALI]") for name in names)


@pytest.mark.parametrize("consumed", [1, 2, 3])
def test_dali_is_freed_when_dropped(cifar: ImageIndex, consumed: int) -> None:
    batches = _endless(cifar, "dali")
    kept = [next(batches)[0] for _ in range(consumed)]
    copies = [images.clone() for images in kept]
    assert _dali_threads() > 0
    del batches
    assert _dali_threads() == 0
    # A batch outlives the pipeline that made it.
    for images, copy in zip(kept, copies, strict=True):
        assert torch.equal(images, copy)


def test_dali_is_freed_when_done_or_failed(cifar: ImageIndex) -> None:
    transform = _transform("cifar", 32, None)
    _train(cifar, transform)
    assert _dali_threads() == 0
    gone = ImageIndex.of(cifar.root, ["absent.jpg"], [0], cifar.classes[:1])
    with pytest.raises(UserError) as caught:
        _evaluate(gone, transform)
    # Also while the error, whose traceback holds the loader's frames, is still being looked at.
    assert caught.tb is not None
    assert _dali_threads() == 0


def test_torchvision_ends_its_workers_when_dropped(cifar: ImageIndex) -> None:
    batches = _endless(cifar, "torchvision")
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert multiprocessing.active_children() == []


def test_batches_are_kept_apart(cifar: ImageIndex) -> None:
    # DALI's buffers become tensors without a copy: a later batch must not write over an earlier.
    batches: Iterator[Batch] = iter(_train(cifar, _transform("cifar", 32, None), steps=15))
    fresh = _train(cifar, _transform("cifar", 32, None), steps=15, loader="torchvision")
    for (images, _), (expected, _) in zip(batches, fresh, strict=True):
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_uneven_batches_are_a_mistake(cifar: ImageIndex) -> None:
    with pytest.raises(UserError, match="8 images cannot be shared evenly by 3 ranks x 1"):
        _train(cifar, _transform("cifar", 32, None), world_size=3)


def test_loader_names() -> None:
    assert resolve_loader("auto") == resolve_loader("dali") == "dali"
    assert resolve_loader("torchvision") == "torchvision"
    with pytest.raises(UserError, match=r"data\.loader must be one of .*, not 'pillow'"):
        resolve_loader("pillow")


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_in_the_place_of_an_image_is_named(tmp_path: Path, loader: str) -> None:
    (tmp_path / "class" / "image.jpg").mkdir(parents=True)
    index = ImageIndex.of(tmp_path, ["class/image.jpg"], [0], ["class"])
    with pytest.raises(UserError, match=r"image\.jpg: cannot read this image \(Is a directory"):
        _evaluate(index, _transform("none", 32, None), loader=loader)


JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
RAND = RandAugment(operations=2, magnitude=9)
AUGMENTED = {
    "color_jitter": AugmentSection(color_jitter=JITTER),
    "rand_augment": AugmentSection(rand_augment=RAND),
    "trivial_augment": AugmentSection(trivial_augment=True),
    "random_erasing": AugmentSection(random_erasing=0.7),
    "all": AugmentSection(color_jitter=JITTER, rand_augment=RAND, random_erasing=0.7),
}


@pytest.mark.parametrize("augmented", AUGMENTED)
def test_augmented_images_of_both_loaders_are_the_same(photos: ImageIndex, augmented: str) -> None:
    transform = replace(_transform(size=96), augment=AUGMENTED[augmented])
    ours, _ = _join(_train(photos, transform))
    theirs, _ = _join(_train(photos, transform, loader="torchvision"))
    plain, _ = _join(_train(photos, _transform(size=96)))
    difference = (_levels(ours) - _levels(theirs)).abs().mean((1, 2, 3))
    # Without them the two differ by 0.3 at most. Operations enlarge that: equalize by much, where
    # a level more or less goes to another bin.
    assert difference.median() < 0.6
    assert difference.max() < (1.5 if augmented in ("color_jitter", "random_erasing") else 8)
    changed = (_levels(ours) - _levels(plain)).abs().mean((1, 2, 3)) > 1
    assert changed.float().mean() > (0.5 if augmented != "rand_augment" else 0.3)


@pytest.mark.parametrize("loader", LOADERS)
def test_erased_boxes_hold_the_mean(photos: ImageIndex, loader: str) -> None:
    erasing = replace(_transform(size=96), augment=AugmentSection(random_erasing=1.0))
    erased, _ = _join(_train(photos, erasing, loader=loader))
    plain, _ = _join(_train(photos, _transform(size=96), loader=loader))
    draws = uniforms(3, np.arange(PHOTOS), UNIFORMS)
    boxes = erasing_boxes(draws, 96, 1.0).tolist()
    for image, before, (top, left, height, width) in zip(erased, plain, boxes, strict=True):
        before[:, top : top + height, left : left + width] = 0
        assert torch.equal(image, before)
    assert sum(height * width > 0 for _, _, height, width in boxes) > 0.9 * PHOTOS


@pytest.mark.parametrize("loader", LOADERS)
def test_any_start_restores_every_augmentation_bit_by_bit(photos: ImageIndex, loader: str) -> None:
    # An epoch is 3 1/3 steps: at step 4 the images have grown.
    growing = ProgressiveResizing(start_size=32, start_epoch=1, end_epoch=1.1)
    more = {"mixup": 0.2, "cutmix": 1.0, "progressive": growing}
    augment = AUGMENTED["all"].model_copy(update=more)
    transform = replace(_transform(size=64), augment=augment)
    settings: dict[str, Any] = {
        "loader": loader,
        "global_batch": 12,
        "accumulation": 2,
        "order": training_order(photos, 3, repeats=2),
    }
    whole = _train(photos, transform, steps=8, **settings)  # 96 samples: past the end of an epoch
    assert [images.shape[2] for images, _ in whole] == [32] * 8 + [64] * 8
    for start in (1, 3, 5):
        resumed = _train(photos, transform, start=start, steps=8 - start, **settings)
        for (images, shares), (again, shares_again) in zip(
            whole[2 * start :], resumed, strict=True
        ):
            assert torch.equal(images, again) and torch.equal(shares, shares_again)


@pytest.mark.parametrize("loader", LOADERS)
def test_mixed_batches_are_the_batches_mixed(photos: ImageIndex, loader: str) -> None:
    settings: dict[str, Any] = {"loader": loader, "global_batch": 8, "steps": 6}
    mixing = AugmentSection(mixup=0.4, cutmix=1.0)
    plain = _train(photos, _transform(size=32), **settings)
    mixed = _train(photos, replace(_transform(size=32), augment=mixing), **settings)
    for step, ((images, labels), (made, shares)) in enumerate(zip(plain, mixed, strict=True)):
        draws = mixing_uniforms(3, 8 * step, MIXING_UNIFORMS)
        expected, targets = mix(images, labels, PHOTOS, mixing, draws)
        assert torch.equal(made, expected) and torch.equal(shares, targets)
    assert len({float(shares.max()) for _, shares in mixed}) == 6  # drawn anew for every batch


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("augmentation", ["imagenet", "cifar"])
def test_half_precision_and_channels_last_are_the_same_numbers(
    photos: ImageIndex, loader: str, augmentation: str
) -> None:
    erasing = AugmentSection(random_erasing=0.5)
    transform = replace(_transform(augmentation, 64, 72), augment=erasing)
    plain, _ = _join(_train(photos, transform, loader=loader))
    (images, _), *_ = _train(
        photos, transform, loader=loader, dtype=torch.float16, channels_last=True, global_batch=20
    )
    assert images.dtype == torch.float16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.contiguous(), plain[:20].half())


@pytest.mark.parametrize("loader", LOADERS)
def test_repetitions_are_the_same_image_augmented_anew(photos: ImageIndex, loader: str) -> None:
    order = training_order(photos, 3, repeats=4)
    images, labels = _join(
        _train(photos, _transform(size=32), loader=loader, order=order, global_batch=40, steps=1)
    )
    by_image = labels.view(10, 4)
    assert (by_image == by_image[:, :1]).all()
    assert by_image[:, 0].tolist() == photos.labels[permutation(3, 0, PHOTOS)[:10]].tolist()
    for copies in images.view(10, 4, -1):
        assert len(torch.unique(copies, dim=0)) == 4


def test_a_window_needs_shards(photos: ImageIndex) -> None:
    with pytest.raises(UserError, match=r"data\.shuffle_window: .* are files of their own"):
        training_order(photos, 0, window=10)


def test_the_threads_that_read_end_with_the_loader(cifar: ImageIndex) -> None:
    def readers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("read")]

    batches = _endless(cifar, "dali")
    next(batches)
    assert len(readers()) > 1
    batches.close()
    assert readers() == []
