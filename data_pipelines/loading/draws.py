"""What each of a sample's random numbers decides, and how windows and boxes are drawn with them.

The numbers are the sample's own (:func:`data_pipelines.images.order.uniforms`).
"""

import math

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.order import Float64s

# A run that goes on with newer code must find its numbers where they were, so new ones are put at
# the end.
FLIP, TOP, LEFT = 0, 1, 2
AREAS = slice(3, 13)
RATIOS = slice(13, 23)
COLORS = slice(23, 27)
OPERATIONS = slice(27, 31)
SIGNS = slice(31, 35)
ERASED, ERASED_TOP, ERASED_LEFT = 35, 36, 37
ERASED_AREAS = slice(38, 48)
ERASED_RATIOS = slice(48, 58)
# TrivialAugment's; its operation and direction are RandAugment's first, since only one is there.
STRENGTH = 58
TURN = 59
UNIFORMS = 60


def first_fitting(
    limits: Float64s, areas: Float64s, ratios: Float64s, places: Float64s
) -> tuple[Float64s, Float64s, NDArray[np.bool_]]:
    """Of several tries at a window in each image, the first that fits, placed evenly.

    Args:
        limits: height and width of each image, shape (2, n).
        areas: of the tries as shares of the image's area, shape (n, tries).
        ratios: widths of the tries over their heights, shape (n, tries).
        places: where the window goes, vertically and across, in [0, 1), shape (2, n).

    Returns:
        height and width, then top and left, shape (2, n); and whether any try fitted, shape (n,).
    """
    height, width = limits[:, :, None]
    area = height * width * areas
    tries = np.stack([np.rint(np.sqrt(area / ratios)), np.rint(np.sqrt(area * ratios))])
    fits = np.logical_and.reduce((tries > 0) & (tries <= limits[:, :, None]), axis=0)
    window = tries[:, np.arange(len(fits)), fits.argmax(1)]
    return window, np.floor(places * (limits - window + 1)), fits.any(axis=1)


def between(low: float, high: float, uniforms: Float64s) -> Float64s:
    """Numbers spread evenly over [low, high), from those in [0, 1)."""
    return low + (high - low) * uniforms


def log_between(low: float, high: float, uniforms: Float64s) -> Float64s:
    """As :func:`between`, but that their logarithms are spread evenly."""
    return np.exp(between(math.log(low), math.log(high), uniforms))
