"""The labels of a network's parameters: which positions of which tensors can only go together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tpp.channels.planes import FIXED, Flow, Labels, along, compact_labels, plane_of, values_of
from tpp.models.fitting import place_of


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


GroupKind = Literal["grouped", "depthwise", "multiplied"]


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

    def roots(self) -> Labels:
        """What stands for the class of each label there is."""
        found = np.array(self.parent, np.int64)
        while not np.array_equal(above := found[found], found):
            found = above
        return found


class LabelStore:
    """All labels of one network: those of its tensors, which are merged, and which are frozen.

    Attributes:
        partitions: the constraints that convolutions in groups make.
        norm_inputs: per BatchNorm (and the like) the labels of what it normalises.
        group_kinds: per weight of a convolution in groups what a group is, see
            :meth:`group_kind`.
        followers: of the labels that are added to each other the first, where these are of filters
            that only gate or filter others one by one, and go along with them: those of a
            squeeze-and-excitation, of a depthwise convolution.

    Args:
        network: the network that is run, whose tensors get the labels.
        running: names of its modules that are running, innermost last, see
            :func:`tpp.models.fitting.running_modules`.
        group_kinds: of the network as it was before it was pruned, if it was.
    """

    def __init__(
        self, network: nn.Module, running: Sequence[str], group_kinds: Mapping[str, GroupKind]
    ) -> None:
        self.group_kinds = dict(group_kinds)
        self.partitions: list[Partition] = []
        self.norm_inputs: dict[str, Labels] = {}
        self.followers: set[int] = set()
        self._running = running
        self._frozen = EntryClasses()  # all that has to go at once; notes say why it cannot
        self._added = EntryClasses()  # the same without what follows; notes are not used
        self._inexact: dict[int, str] = {}
        self._fresh(1)  # FIXED
        self._flows: Any = WeakIdKeyDictionary()
        self._names: Any = WeakIdKeyDictionary()
        for name, tensor in (
            *network.named_parameters(remove_duplicate=False),
            *network.named_buffers(remove_duplicate=False),
        ):
            self._names.setdefault(tensor, []).append(name)
        self._first_name = {name: names[0] for names in self._names.values() for name in names}
        self._bound: dict[str, list[Labels | None]] = {}
        self._grouped: dict[str, tuple[Labels, int]] = {}

    # ---- what was found ----------------------------------------------------------------------

    @property
    def axes(self) -> list[Axis]:
        """The labelled dimensions, one entry for each of the tensor's names."""
        found = []
        for name, key in self._first_name.items():
            for dim, labels in enumerate(self._bound.get(key, ())):
                if labels is not None:
                    found.append(Axis(name, dim, labels))
            if key in self._grouped:
                labels, groups = self._grouped[key]
                found.append(Axis(name, 1, labels, groups))
        return found

    def rows(self, weight: str) -> Labels | None:
        """Labels of the filters of a weight; None if the network does not use it."""
        bound = self._bound.get(self._first_name.get(weight, ""))
        return None if bound is None else bound[0]

    def classes(self, labels: Labels) -> Labels:
        """For every label the class of all labels that have to go at once."""
        return self._class_of[labels]

    def sources(self, labels: Labels) -> Labels:
        """The same without what goes along: labels that are added to each other."""
        return self._source_of[labels]

    def why_frozen(self, label: int) -> str | None:
        """Why a label's class cannot go, None if it can."""
        return self._frozen.notes.get(int(self._class_of[label]))

    def why_inexact(self, classes: Iterable[int]) -> str | None:
        """Why removing some classes is not the same as zeroing them, None if it is."""
        return next((self._inexact[c] for c in classes if c in self._inexact), None)

    def close(self) -> None:
        """End of the run: let go of the activations; from now on only what was found is asked."""
        del self._flows
        self._class_of, self._source_of = self._frozen.roots(), self._added.roots()
        reasons = reversed(self._inexact.items())  # of several, the first on the way counts
        self._inexact = {int(self._class_of[label]): reason for label, reason in reasons}

    # ---- labels ------------------------------------------------------------------------------

    def _fresh(self, count: int) -> Labels:
        start = len(self._frozen.parent)
        new = range(start, start + count)
        self._frozen.parent.extend(new)
        self._added.parent.extend(new)
        return np.arange(start, start + count)

    def tie(self, first: Labels, second: Labels, *, follow: bool = False) -> None:
        """Merge labels pairwise; with ``follow`` the second's filters go along with the first's."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            if a == b:
                continue
            if FIXED in (a, b):
                fixed = "are added to a padding of the channels or another fixed value"
                self.freeze_labels(np.array([max(a, b)]), fixed)
                continue
            self._frozen.union(a, b)
            a, b = self._added.find(a), self._added.find(b)
            if follow:
                self.followers.add(b)
            elif a != b:
                # Added to others, what went along with them has a say of its own.
                lasting = {a, b} <= self.followers
                self.followers -= {a, b}
                self._added.union(a, b)
                if lasting:
                    self.followers.add(self._added.find(a))

    def freeze_labels(self, labels: Labels, reason: str) -> None:
        """Note that these channels cannot go."""
        text = f"{reason} ({place_of(self._running)})"
        for label in labels.tolist():
            if label != FIXED:
                self._frozen.note(label, text)

    def freeze(self, flow: Flow, reason: str) -> None:
        """Note that no channel of an activation can go."""
        for plane in flow.planes:
            self.freeze_labels(np.unique(values_of(plane)), reason)

    def warn(self, labels: Labels, reason: str) -> None:
        """Note that removing these channels is not the same as zeroing them."""
        for label in labels.tolist():
            if label != FIXED:
                self._inexact.setdefault(label, f"{reason} ({place_of(self._running)})")

    def add_partition(self, labels: Labels, groups: int) -> None:
        """Note that the running convolution has these channels in groups."""
        self.partitions.append(Partition(labels, groups, self._running[-1]))

    def add_norm(self, tensors: Sequence[Tensor | None], labels: Labels) -> None:
        """Note what the norm normalises that these are the parameters and buffers of."""
        stored = next((name for t in tensors if t is not None and (name := self.name_of(t))), None)
        if stored is not None:
            self.norm_inputs.setdefault(stored.rpartition(".")[0], labels)

    def group_kind(self, weight: Tensor, groups: int) -> GroupKind:
        """What a group of a convolution is: whether it reads several channels (``grouped``), one
        and makes one (``depthwise``), or one and makes several (``multiplied``).

        Filters that go may leave one of each: the convolution is then still what it was.
        """
        name = self.name_of(weight)
        assert name is not None
        rows, columns = weight.shape[:2]
        kind: GroupKind = (
            "grouped" if columns > 1 else "depthwise" if rows == groups else "multiplied"
        )
        return self.group_kinds.setdefault(name, kind)

    # ---- tensors -----------------------------------------------------------------------------

    def name_of(self, tensor: Tensor) -> str | None:
        """A parameter's or buffer's first name; None of what the network computes."""
        names = self._names.get(tensor)
        return names[0] if names else None

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has labels, or is one that gets them when it is first used."""
        return tensor in self._flows or self.name_of(tensor) is not None

    def flow(self, tensor: Any) -> Flow:
        """The labels of a tensor; those of a parameter are made when it is first used."""
        if not isinstance(tensor, Tensor):
            return Flow()
        if tensor in self._flows:
            return self._flows[tensor]
        key = self.name_of(tensor)
        if key is None:
            return Flow()
        bound = self._bound.setdefault(key, [None] * tensor.dim())
        planes = []
        for dim, size in enumerate(tensor.shape):
            if size > 1 and bound[dim] is None:
                bound[dim] = self._fresh(size)
            if size > 1:
                planes.append(plane_of(bound[dim], dim, tensor.shape))
        return Flow(tuple(planes), zero=False, weight=True)

    def set_flow(self, tensor: Tensor, flow: Flow) -> None:
        """Say what the labels of a computed tensor are."""
        if flow.planes and self.name_of(tensor) is None:
            compact = replace(flow, planes=tuple(map(compact_labels, flow.planes)))
            self._flows[tensor] = compact

    def bind(self, tensor: Tensor | None, dim: int, labels: Labels) -> None:
        """Let a dimension of a parameter go with ``labels``."""
        if tensor is None or tensor.shape[dim] == 1:
            return
        key = self.name_of(tensor)
        if key is None or tensor in self._flows:  # computed, not stored
            own = along(self.flow(tensor), dim)
            if own is not None:
                self.tie(labels, own)
            else:
                self.freeze_labels(labels, "meet values that the network computes")
            return
        bound = self._bound.setdefault(key, [None] * tensor.dim())
        old = bound[dim]
        if old is None:
            bound[dim] = labels
        else:
            self.tie(old, labels)

    def bind_grouped(self, weight: Tensor, columns: Labels, groups: int) -> None:
        """Let the columns of a weight in groups go with the channels that they read."""
        key = self.name_of(weight)
        assert key is not None
        if key in self._grouped:
            self.tie(self._grouped[key][0], columns)
        else:
            self._grouped[key] = (columns, groups)
        self.add_partition(columns, groups)

    def filters_of(self, weight: Tensor, dim: int) -> Labels | None:
        """Labels of a weight's filters, made if need be; None of a weight with one filter."""
        key = self.name_of(weight)
        if key is None:
            return along(self.flow(weight), dim)
        if weight.shape[dim] == 1:
            return None
        bound = self._bound.setdefault(key, [None] * weight.dim())
        labels = bound[dim]
        if labels is None:
            labels = bound[dim] = self._fresh(weight.shape[dim])
        return labels
