"""The augmentations as parts of a DALI graph; torch_augment has the same for torch.

All are called while a pipeline is defined, on images in the CPU's or the GPU's memory. What is
random about them comes in from outside as numbers of each sample, on the CPU.
"""

from nvidia.dali import fn
from nvidia.dali.auto_aug.augmentations import sharpness_kernel
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.data_node import DataNode

from data_pipelines.loading.augment import RAND_AUGMENT_OPERATIONS
from data_pipelines.settings import RandAugment

# What shows where an operation moves an image's edge into view: DALI's own choice.
_FILL = 128


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
    parts = [suite[name] for name in RAND_AUGMENT_OPERATIONS]
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
