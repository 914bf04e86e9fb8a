"""Where training scripts keep a network's weights, among all that they save."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpp.checkpoints.stand_ins import Inert
from tpp.checkpoints.whole_networks import WholeNetwork
from tpp.common.errors import UserError
from tpp.common.reading import check_names
from tpp.models.fitting import few

# Where training scripts keep the weights, and how they call a moving average of them (timm,
# torchvision's references, and what people write).
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_AVERAGE = re.compile(r"(.*_)?(ema|swa)(_.*)?", re.IGNORECASE)
_DEEPEST = 3  # levels of dicts below which a network is looked for


@dataclass(frozen=True)
class Found:
    """What a training script saved.

    Attributes:
        tensors: the network's ``state_dict``.
        average: a moving average of it, if there is one.
        optimizer: an optimiser's ``state_dict``, if there is one.
        notes: what a user should know of how it was found.
    """

    tensors: dict[str, Tensor]
    average: dict[str, Tensor] | None = None
    optimizer: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def find_state_dict(data: Any, source: str) -> Found:
    """Find a network's weights, and what belongs to them, in what a file holds.

    The weights are a dict of tensors: the whole file, or under ``state_dict``,
    ``model_state_dict`` or ``model``, or under another key if it is the only one.

    Raises:
        UserError: there is no such dict, or there are several.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: holds {_kind(data)}, not a state_dict")
    tensors, notes = _only_state_dict(data, source)
    averages = [v for k, v in data.items() if _is_average(k) and isinstance(v, Mapping)]
    average = None
    if averages:
        check_names(averages[0], source)
        average = {n: t for n, t in averages[0].items() if isinstance(t, Tensor)}
    optimizers = [state for value in data.values() for state in _optimizers(value)]
    if len(optimizers) > 1:
        notes.append(f"left out: the states of {len(optimizers)} optimisers")
    return Found(tensors, average, optimizers[0] if len(optimizers) == 1 else None, notes)


def _is_average(key: Any) -> bool:
    return isinstance(key, str) and _AVERAGE.fullmatch(key) is not None


def _optimizers(value: Any) -> Iterator[Mapping[str, Any]]:
    """The states of optimisers in a value, which may be a list of them, as Lightning has it."""
    for state in value if isinstance(value, list) else [value]:
        if isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys():
            yield state


def _only_state_dict(data: Mapping[Any, Any], source: str) -> tuple[dict[str, Tensor], list[str]]:
    found = list(_state_dicts(data))
    if not found:
        raise UserError(f"{source}: no state_dict, alone or under a key: {_instead(data)}")
    if len(found) > 1:
        keys = few([key for key, _ in found], 5)
        raise UserError(
            f"{source}: holds several state_dicts, under {keys}; save the one that is meant: "
            "torch.save(model.state_dict(), PATH)"
        )
    key, state = found[0]
    check_names(state, source)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    notes = []
    if isinstance(state, WholeNetwork):
        notes.append(f"the tensors of a pickled {state.of} are taken; its class is not run")
    if key and key not in _STATE_KEYS:
        notes.append(f"the weights are those under {key!r}")
    others = [str(name) for name in state if name not in tensors]
    if others:
        notes.append(f"left out: {few(others)}, no tensor{'s' if len(others) > 1 else ''}")
    return tensors, notes


def _state_dicts(
    data: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict of tensors, with its keys; if there is one under a known key, that alone."""
    inside = {
        key: list(_state_dicts(value, (*path, key)))
        for key, value in data.items()
        if isinstance(key, str) and isinstance(value, Mapping) and len(path) < _DEEPEST
        if not _is_average(key) and not any(_optimizers(value))
    }
    for key in _STATE_KEYS:
        if inside.get(key):
            yield from inside[key]
            return
    if any(inside.values()):
        for found in inside.values():
            yield from found
        return
    # Below a key of its own a generator's state is a dict of tensors too, though of no matrices.
    least = 0 if not path or path[-1] in _STATE_KEYS else 2
    if any(isinstance(value, Tensor) and value.dim() >= least for value in data.values()):
        yield ".".join(path), data


def _instead(data: Mapping[Any, Any]) -> str:
    if not data:
        return "it is empty"
    arrays = [str(n) for n, value in data.items() if isinstance(value, Inert)]
    wrong = [str(name) for name, value in data.items() if not isinstance(value, Tensor)]
    if arrays:
        first = next(value for value in data.values() if isinstance(value, Inert))
        return f"{few(arrays)} {'are' if len(arrays) > 1 else 'is'} no tensor but {_kind(first)}"
    return f"{few(wrong)} {'are' if len(wrong) > 1 else 'is'} no tensor"


def _kind(value: Any) -> str:
    name = value.stands_for if isinstance(value, Inert) else type(value).__name__
    return f"a {name}"
