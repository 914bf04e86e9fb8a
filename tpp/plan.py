"""The pruning plan: which filters of which layers go."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.common.reading import read_json

FORMAT = "tpp-pruning-plan"
VERSION = 1
# Of one layer: more than any has, and few enough to be counted out.
_MOST_FILTERS = 2**20


@dataclass(frozen=True)
class PruningPlan:
    """Filters to remove, per layer.

    Attributes:
        filters: number of filters (output channels or neurons) of each layer before pruning.
        pruned: sorted indices of the filters to remove, for exactly the layers in ``filters``.
            Layers are in network order. A layer may have an empty list; at least one filter
            of every layer is kept.

    Raises:
        UserError: an index is repeated, unsorted or out of range, no filter would be kept, or a
            layer's name or number of filters is one that no layer has.
    """

    filters: dict[str, int]
    pruned: dict[str, list[int]]

    def __post_init__(self) -> None:
        if list(self.filters) != list(self.pruned):
            raise UserError("pruning plan: 'filters' and 'pruned' must name the same layers")
        for layer, indices in self.pruned.items():
            count = self.filters[layer]
            _check_layer(layer, count)
            if any(not isinstance(i, int) or isinstance(i, bool) for i in indices):
                raise UserError(f"pruning plan: {layer}: indices must be whole numbers")
            if list(indices) != sorted(set(indices)):
                raise UserError(f"pruning plan: {layer}: indices must be sorted, without repeats")
            if indices and (indices[0] < 0 or indices[-1] >= count):
                raise UserError(
                    f"pruning plan: {layer}: indices must be in 0..{count - 1}, "
                    f"not {indices[0] if indices[0] < 0 else indices[-1]}"
                )
            if len(indices) >= count:
                raise UserError(f"pruning plan: {layer}: at least one of {count} filters must stay")

    @classmethod
    def from_indices(
        cls, filters: Mapping[str, int], pruned: Mapping[str, Iterable[int]]
    ) -> "PruningPlan":
        """Make a plan from indices in any order; layers of ``filters`` not named lose nothing."""
        unknown = [name for name in pruned if name not in filters]
        if unknown:
            raise UserError(f"pruning plan: no layer is called {unknown[0]!r}")
        return cls(dict(filters), {name: sorted(pruned.get(name, ())) for name in filters})

    def kept(self, layer: str) -> list[int]:
        """Sorted indices of the filters of ``layer`` that stay."""
        gone = set(self.pruned[layer])
        return [i for i in range(self.filters[layer]) if i not in gone]

    @property
    def active_layers(self) -> list[str]:
        """Layers that lose at least one filter, in network order."""
        return [layer for layer, indices in self.pruned.items() if indices]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON."""
        layers = {
            layer: {"filters": self.filters[layer], "pruned": list(indices)}
            for layer, indices in self.pruned.items()
        }
        return {"format": FORMAT, "version": VERSION, "layers": layers}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "pruning plan") -> "PruningPlan":
        """Read what :meth:`to_dict` wrote; ``source`` names the origin in error messages."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f'{source}: not a pruning plan (expected "format": "{FORMAT}")')
        if data.get("version") != VERSION:
            raise UserError(f"{source}: plan version {data.get('version')!r}, expected {VERSION}")
        layers = data.get("layers")
        if not isinstance(layers, dict):
            raise UserError(f'{source}: "layers" must map layer names to filters and pruned')
        for name, entry in layers.items():
            if (
                not isinstance(entry, dict)
                or set(entry) != {"filters", "pruned"}
                or not isinstance(entry["filters"], int)
                or isinstance(entry["filters"], bool)
                or not isinstance(entry["pruned"], list)
            ):
                raise UserError(f'{source}: {name}: expected {{"filters": N, "pruned": [...]}}')
        try:
            return cls(
                {name: entry["filters"] for name, entry in layers.items()},
                {name: entry["pruned"] for name, entry in layers.items()},
            )
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot write the plan: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Read a plan written by :meth:`save`.

        Raises:
            UserError: the file is missing, is not JSON, or does not hold a valid plan.
        """
        return cls.from_dict(read_json(path, "the pruning plan"), source=str(path))


def _check_layer(name: str, count: int) -> None:
    # Names stand in tables, logs and TensorBoard's tags. None becomes a path; should one ever
    # do, it cannot leave its folder.
    if not name.isprintable() or "/" in name or "\\" in name:
        raise UserError(f"pruning plan: {name!r}: no layer's name has such characters")
    if not 1 <= count <= _MOST_FILTERS:
        raise UserError(f"pruning plan: {name}: expected 1 to {_MOST_FILTERS:,} filters")
