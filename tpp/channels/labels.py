"""Classes of entries that can only go together."""

from dataclasses import dataclass

import numpy as np

from tpp.channels.planes import Labels


@dataclass(frozen=True)
class Axis:
    """One labelled dimension of a parameter or buffer.

    Attributes:
        tensor: its name in the ``state_dict``.
        dim: the dimension.
        labels: one for each position.
        groups: 1, or the number of groups of the convolution whose input channels these are: the
            labels are then those of all its input channels, though the dimension has but one
            group's.
    """

    tensor: str
    dim: int
    labels: Labels
    groups: int = 1


@dataclass(frozen=True)
class Partition:
    """Channels of a convolution in groups: each group must keep as many.

    Attributes:
        labels: of all channels, group by group.
        groups: number of groups.
        module: the convolution's name.
    """

    labels: Labels
    groups: int
    module: str


class EntryClasses:
    """A union-find over labels, with what is known about each class."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.notes: dict[int, str] = {}

    def find(self, label: int) -> int:
        """The label that stands for the class of ``label``."""
        parent = self.parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def union(self, a: int, b: int) -> None:
        """Make one class of two; of their notes the first one's stays."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a
            if b in self.notes:
                self.notes.setdefault(a, self.notes.pop(b))

    def note(self, label: int, text: str) -> None:
        """Say something of a label's class; what was said first stays."""
        self.notes.setdefault(self.find(label), text)

    def roots(self, labels: Labels) -> Labels:
        """What stands for the class of each label."""
        return np.fromiter(map(self.find, labels.tolist()), np.int64, len(labels))
