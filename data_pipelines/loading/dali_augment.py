"""The augmentations as parts of a DALI graph; torch_augment has the same for torch.

All are called while a pipeline is defined, on images in the CPU's or the GPU's memory. What is
random about them comes in from outside as numbers of each sample, on the CPU.
"""

from nvidia.dali import fn
from nvidia.dali.auto_aug.augmentations import sharpness_kernel
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from nvidia.dali.data_node import DataNode

from data_pipelines.loading.augment import (
    AUGMENT_OPERATIONS,
    TRIVIAL_BINS,
    TRIVIAL_STRENGTHS,
)
from data_pipelines.settings import RandAugment

# What shows where an operation moves an image's edge into view: DALI's own choice for RandAugment,
# black for TrivialAugment as in its paper and torchvision.
_FILL, _TRIVIAL_FILL = 128, 0


def color_jitter(images: DataNode, factors: DataNode) -> DataNode:
    """Change brightness, contrast, saturation and hue, all in one pass.

    Args:
        images: uint8, HWC, RGB.
        factors: a row of :func:`data_pipelines.loading.augment.color_jitter_factors`, float32,
            shape (4,).

    Returns:
        uint8 images of the same size.
    """
    return fn.color_twist(
        images,
        brightness=factors[0],
        contrast=factors[1],
        saturation=factors[2],
        hue=factors[3] * 360,  # degrees
    )


def rand_augment(
    images: DataNode, operations: DataNode, turned: DataNode, rand: RandAugment
) -> DataNode:
    """Put each image through its operations, one after the other.

    The pipeline must be one of ``pipeline_def(enable_conditionals=True)``: DALI then gives each
    operation just those images of the batch that go through it.

    Args:
        images: uint8, HWC, RGB.
        operations, turned: rows of
            :func:`data_pipelines.loading.augment.rand_augment_choices`, int32, shape
            (rand.operations,).
        rand: how many operations, and how strong.

    Returns:
        uint8 images of the same size.
    """
    suite = {part.name: part for part in get_rand_augment_suite(use_shape=True)}
    suite |= {"sharpness": _sharpness, "equalize": _equalize}
    parts = [suite[name] for name in AUGMENT_OPERATIONS]
    bins = signed_bin(rand.magnitude, turned)
    for place in range(rand.operations):
        images = select(
            parts,
            operations[place],
            data=images,
            magnitude_bin=bins[place],
            num_magnitude_bins=rand.bins,
            shape=images.shape(),
            fill_value=_FILL,
        )
    return images


def trivial_augment(images: DataNode, choice: DataNode) -> DataNode:
    """Put each image through one operation; in a pipeline as :func:`rand_augment` needs it.

    DALI's own suite of that name has other strengths: an enhancement of 0.01 at least, moves by
    fractions of a pixel, and levels from 256 down, of which the first inverts nothing.

    Args:
        images: uint8, HWC, RGB.
        choice: a row of :func:`data_pipelines.loading.augment.trivial_augment_choices`, int32,
            shape (3,).

    Returns:
        uint8 images of the same size.
    """
    suite = {part.name: part for part in get_trivial_augment_wide_suite()}
    suite |= {"sharpness": _sharpness, "equalize": _equalize}
    suite |= {
        name: suite[name].augmentation(mag_range=strengths)
        for name, strengths in TRIVIAL_STRENGTHS.items()
    }
    return select(
        [suite[name] for name in AUGMENT_OPERATIONS],
        choice[0],
        data=images,
        magnitude_bin=signed_bin(choice[2], choice[1]),
        num_magnitude_bins=TRIVIAL_BINS,
        fill_value=_TRIVIAL_FILL,
    )


def erase(images: DataNode, boxes: DataNode) -> DataNode:
    """Fill a box of each image with zeros.

    Args:
        images: normalised, float32 or float16, CHW or HWC.
        boxes: a row of :func:`data_pipelines.loading.augment.erasing_boxes`, float32, shape (4,);
            nothing is erased where its height and width are 0.

    Returns:
        images of the same type, size and layout.
    """
    return fn.erase(images, anchor=boxes[0:2], shape=boxes[2:4], axis_names="HW", fill_value=0)


# The suite's own two call operators by names that are on their way out, and DALI prints a warning
# for each.
@augmentation(
    mag_range=(0, 0.9), randomly_negate=True, mag_to_param=sharpness_kernel, param_device="auto"
)
def _sharpness(images: DataNode, kernel: DataNode) -> DataNode:
    return fn.filter(images, kernel)


@augmentation
def _equalize(images: DataNode, _: None) -> DataNode:
    return fn.equalize(images)
