"""What a network costs over the sides of its images, and what lies between those measured."""

from collections.abc import Sequence
from itertools import pairwise


def place_of_cost(curve: Sequence[tuple[int, float]], cost: float) -> tuple[int, int, float] | None:
    """The two neighbouring sides between which a network has a cost; None beyond those measured.

    Where costs are not in the order of the sides, the two largest that the cost lies between count.

    Args:
        curve: sides in pixels, and what each costs; in any order.
        cost: in the curve's unit.

    Returns:
        the smaller and the larger side, and the share of the way from the one to the other.
    """
    for (larger, most), (smaller, least) in pairwise(sorted(curve, reverse=True)):
        if min(most, least) <= cost <= max(most, least):
            share = (cost - least) / (most - least) if most != least else 1.0
            return smaller, larger, share
    return None
