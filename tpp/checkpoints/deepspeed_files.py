"""DeepSpeed's checkpoint folders (ZeRO 0 to 3), read without DeepSpeed and without pickle.

``engine.save_checkpoint(dir)``, and Accelerate's ``save_state`` under DeepSpeed, write

    dir/latest                          the name of the newest step folder
    dir/global_step3/                   a step folder; other names are possible
        mp_rank_00_model_states.pt                       ZeRO 0 to 2: the network
        zero_pp_rank_K_mp_rank_00_model_states.pt        ZeRO 3: buffers, and names of parameters
        zero_pp_rank_K_mp_rank_00_optim_states.pt        ZeRO 1 to 3: rank K's part of the rest

(``bf16_zero_pp_rank_...`` in bf16 mode). A rank's part holds, for each group of parameters, one
flat float32 vector of weights, and one of every state of the optimiser that has an entry for each
weight:

- ZeRO 1 and 2 lay the parameters of a group end to end, pad the end, and cut the vector into as
  many equal parts as there are ranks.
- ZeRO 3 cuts every single parameter into as many equal parts as there are ranks, pads its last
  part, and lays a rank's parts of all parameters end to end.

The names and shapes of the parameters, in that order, are in the file with the network.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpp.checkpoints.torch_files import NeedsPickleError, load_torch
from tpp.common.errors import UserError, reason_of
from tpp.common.reading import check_names, read_text

PathLike = str | os.PathLike[str]

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM_FILE = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt"
)
_HALF = (torch.bfloat16, torch.float16)
_CONVERT = (
    "where it was made, save its weights alone (DeepSpeed's zero_to_fp32.py does so for ZeRO 1 "
    "to 3) and prune that file"
)
# What Python raises when data is laid out in another way than expected.
_LAYOUT_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# More candidates than this for who is who among parameters of equal shape: give up.
_MOST_CANDIDATES = 10_000
_LONGEST_TAG = 4096  # bytes of the file latest


@dataclass(frozen=True)
class DeepSpeedState:
    """A DeepSpeed checkpoint, put together from the files of all ranks.

    Every tensor is on the CPU, whole, and float32 where the file has a half-precision type.

    Attributes:
        tensors: the network's ``state_dict``. A parameter has the values of DeepSpeed's float32
            copy where there is one; tied parameters are one tensor under several names.
        optimizer: {state such as ``momentum_buffer`` or ``exp_avg``: {parameter: tensor of the
            parameter's shape}}.
        scalars: {state such as ``step``: {parameter: number}}, as far as the optimiser keeps such
            numbers with its states.
        step: optimiser steps done, None if the file does not say.
        source: the step folder that was read.
        not_read: what the files hold but no parameter could be given, and why; None if nothing.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    scalars: dict[str, dict[str, float]]
    step: int | None
    source: Path
    not_read: str | None = None


@dataclass(frozen=True)
class _File:
    """One loaded file: what it holds, and where it lies, for error messages."""

    path: Path
    data: Any

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value under ``key``, which has to be of this kind."""
        value = self.data.get(key)
        if not isinstance(value, kind):
            raise UserError(
                f"{self.path}: not as DeepSpeed 0.19 writes it: {key!r} is {_is(value)}"
            )
        return value


@dataclass(frozen=True)
class _Place:
    """Where the values of one parameter lie: (rank, start, length) for each piece, in order."""

    name: str
    shape: tuple[int, ...]
    pieces: list[tuple[int, int, int]]

    def take(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the parameter together from the flat vectors of all ranks; a copy."""
        pieces = [parts[rank][start : start + length] for rank, start, length in self.pieces]
        return _float32(torch.cat(pieces) if pieces else torch.empty(0)).reshape(self.shape)


@dataclass
class _Optimizer:
    """What is found of the optimiser's state, and the reason why something is not."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    not_read: str | None = None


def is_deepspeed_folder(path: PathLike) -> bool:
    """Whether :func:`read_deepspeed` is meant for ``path``; no file is opened."""
    folder = Path(path)
    return (folder / "latest").is_file() or _is_step_folder(folder)


def read_deepspeed(path: PathLike) -> DeepSpeedState:
    """Read a checkpoint that DeepSpeed wrote under ZeRO 0, 1, 2 or 3, on any number of ranks.

    Needs neither DeepSpeed nor a GPU nor ranks, and runs no code from the files. Where the weights
    lie is worked out as in DeepSpeed's own ``zero_to_fp32.py``. Under ZeRO 0 DeepSpeed numbers the
    states of the optimiser without saying whose they are. They are given to parameters if the
    shapes leave one way only, on condition that every parameter group lists its parameters in the
    order of the network; otherwise ``not_read`` says that they were not.

    Args:
        path: the folder that holds ``latest``, or a step folder.

    Raises:
        UserError: the folder is none of DeepSpeed's, a file is missing, damaged, or holds objects
            of a class that is not known here, the files do not fit each other, or the network
            was split in another way too (tensor, pipeline or expert parallel).
    """
    folder = _step_folder(Path(path))
    model_paths, optim_paths = _files_of(folder)
    first = _load(model_paths[0])
    _check_parallelism(first)
    try:
        if first.data.get("param_shapes") is None:
            tensors, optimizer = _read_whole(first, optim_paths)
        else:
            tensors, optimizer = _read_parts(first, model_paths, optim_paths)
    except _LAYOUT_ERRORS as error:
        raise UserError(
            f"{folder}: not as DeepSpeed 0.19 writes it ({type(error).__name__}: "
            f"{reason_of(error)})"
        ) from None
    step = first.data.get("global_steps")
    return DeepSpeedState(
        tensors=tensors,
        optimizer=optimizer.tensors,
        scalars=optimizer.scalars,
        step=step if isinstance(step, int) else None,
        source=folder,
        not_read=optimizer.not_read,
    )


def _is_step_folder(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*_model_states.pt"))


def _step_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if _is_step_folder(path):
        return path
    latest = path / "latest"
    if not latest.is_file():
        raise UserError(f"{path}: no DeepSpeed checkpoint: neither latest nor *_model_states.pt")
    try:
        # A name, not a path: what it leads to lies in this folder.
        tag = read_text(latest, "the name of the newest step", largest=_LONGEST_TAG).strip()
        found = tag == Path(tag).name != "" and tag != ".." and (path / tag).is_dir()
    except OSError:  # a name that is too long for a file
        found = False
    if not found:
        raise UserError(f"{latest}: names {tag!r}, and there is no such folder beside it")
    if not _is_step_folder(path / tag):
        raise UserError(f"{path / tag}: holds no *_model_states.pt")
    return path / tag


def _files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files with the network and with the optimiser's states, in the order of the ranks."""
    model, optim = (
        _by_rank(folder, sorted(folder.glob(f"*{suffix}")), pattern)
        for suffix, pattern in (("model_states.pt", _MODEL_FILE), ("optim_states.pt", _OPTIM_FILE))
    )
    if len(model) > 1 and not all(map(_is_stage_3, model)):
        raise UserError(
            f"{folder}: holds {model[0].name} and {model[1].name}, which are of different ZeRO "
            "stages; remove the files of the older run"
        )
    return model, optim


def _by_rank(folder: Path, files: list[Path], pattern: re.Pattern[str]) -> list[Path]:
    ranks: dict[int, Path] = {}
    for file in files:
        match = pattern.fullmatch(file.name)
        if match is None or int(match["mp"]) > 0:
            raise UserError(
                f"{file}: the network was split by tensor, pipeline or expert parallelism too, "
                f"which is not read here; {_CONVERT}"
            )
        # A file with the whole network has no rank in its name; it comes before all others.
        rank = -1 if match["rank"] is None else int(match["rank"])
        if rank in ranks:
            raise UserError(
                f"{folder}: holds both {ranks[rank].name} and {file.name}; "
                "remove that of the older run"
            )
        ranks[rank] = file
    ordered = [ranks[rank] for rank in sorted(ranks)]
    for expected, rank in enumerate(rank for rank in sorted(ranks) if rank >= 0):
        if rank != expected:
            missing = ranks[rank].name.replace(f"_rank_{rank}_", f"_rank_{expected}_", 1)
            raise UserError(f"{folder}: lacks {missing}; copy the files of all ranks")
    return ordered


def _is_stage_3(model_file: Path) -> bool:
    return not model_file.name.startswith("mp_rank")


def _load(path: Path) -> _File:
    try:
        data = load_torch(path)
    except NeedsPickleError as error:
        raise UserError(f"{error}; {_CONVERT}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not as DeepSpeed 0.19 writes it: it holds {_is(data)}")
    return _File(path, data)


def _check_parallelism(model: _File) -> None:
    degrees = model.data.get("checkpoint_parallel_dimensions")
    degrees = degrees.values() if isinstance(degrees, dict) else ()
    for degree in (model.data.get("mp_world_size", 1), *degrees):
        if degree not in (None, 1):
            raise UserError(
                f"{model.path}: the network was split by tensor or pipeline parallelism too, "
                f"which is not read here; {_CONVERT}"
            )


def _check_ranks(model: _File, files: Sequence[Path], what: str) -> None:
    ranks = model.data.get("dp_world_size")
    if len(files) != ranks:
        raise UserError(
            f"{model.path.parent}: {ranks} ranks wrote it, but there are {len(files)} files "
            f"*zero_pp_rank_*_{what}.pt; copy those of all ranks"
        )


def _read_whole(model: _File, optim_paths: list[Path]) -> tuple[dict[str, Tensor], _Optimizer]:
    """ZeRO 0: every rank has everything, and one file holds it."""
    if optim_paths:
        raise UserError(
            f"{optim_paths[0]}: is of ZeRO 1 to 3, but {model.path.name} is of ZeRO 0; "
            "remove the files of the older run"
        )
    module, ties = _module_of(model)
    owned = [name for name in module if name not in ties]
    tensors = {name: _float32(module[name], copy=True) for name in owned}
    buffers = set(model.get("buffer_names", list))
    parameters = {name: tuple(module[name].shape) for name in owned if name not in buffers}
    saved = model.data.get("optimizer")
    optimizer = _Optimizer()
    if saved:
        masters, optimizer = _name_states(saved, parameters)
        tensors |= masters
    return _in_order(module, tensors, ties), optimizer


def _module_of(model: _File) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The saved ``state_dict``, and which of its names are another's tensor: {alias: name}."""
    module = model.get("module", dict)
    wrong = [name for name, value in module.items() if not isinstance(value, Tensor)]
    if wrong or not module:
        found = f"{wrong[0]} is {_is(module[wrong[0]])}" if wrong else "it is empty"
        raise UserError(f"{model.path}: its 'module' is no state_dict: {found}")
    check_names(module, str(model.path))
    seen: dict[Any, str] = {}
    ties = {}
    for name, tensor in module.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        first = seen.setdefault(place, name)
        if first != name:
            ties[name] = first
    shared = model.data.get("shared_params")
    return module, ties | (shared if isinstance(shared, dict) else {})


def _name_states(
    saved: Mapping[str, Any], parameters: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], _Optimizer]:
    """ZeRO 0: whose are the optimiser's states, and float32 copies, if there are any?"""
    # In bf16 and fp16 mode DeepSpeed's own wrapper is around the optimiser.
    inner = saved.get("optimizer_state_dict", saved)
    if not isinstance(inner, dict) or not {"state", "param_groups"} <= inner.keys():
        return {}, _Optimizer(not_read="the optimizer's state: it is not laid out as torch's")
    groups, states = inner["param_groups"], inner["state"]
    masters = dict(enumerate(tensor for group in saved.get("fp32_groups", []) for tensor in group))
    shapes = {
        index: next((tuple(t.shape) for t in _tensors_of(states, masters, index)), None)
        for group in groups
        for index in group["params"]
    }
    names = _names_of(groups, shapes, parameters)
    if names is None:
        what = "the optimizer's state"
        if masters or "fp32_groups_flat" in saved:
            what += " and the float32 copies of the weights"
        return {}, _Optimizer(
            not_read=f"{what}: under ZeRO 0 DeepSpeed does not record whose they are, and the "
            f"shapes in its {len(groups)} parameter groups leave more than one way, or none"
        )
    optimizer = _Optimizer()
    for index, name in names.items():
        for key, value in states.get(index, {}).items():
            if isinstance(value, Tensor) and value.ndim > 0:
                optimizer.tensors.setdefault(key, {})[name] = _float32(value, copy=True)
            elif isinstance(value, Tensor | int | float):
                optimizer.scalars.setdefault(key, {})[name] = float(value)
    return {names[index]: tensor.clone() for index, tensor in masters.items()}, optimizer


def _tensors_of(states: Any, masters: dict[int, Tensor], index: int) -> Iterable[Tensor]:
    """What has the shape of the optimiser's parameter number ``index``."""
    if index in masters:
        yield masters[index]
    for value in states.get(index, {}).values():
        if isinstance(value, Tensor) and value.ndim > 0:
            yield value


def _names_of(
    groups: Sequence[dict[str, Any]],
    shapes: Mapping[int, tuple[int, ...] | None],
    parameters: Mapping[str, tuple[int, ...]],
) -> dict[int, str] | None:
    """The names of an optimiser's numbered parameters; None if they cannot be told.

    Args:
        groups: the optimiser's ``param_groups``.
        shapes: of every parameter of the optimiser, None if it has no state.
        parameters: {name: shape} in the order of the network.
    """
    if all("param_names" in group for group in groups):
        names = {
            index: name
            for group in groups
            for index, name in zip(group["params"], group["param_names"], strict=True)
        }
        return names if parameters.keys() >= set(names.values()) else None
    queues = [list(group["params"]) for group in groups]
    left_out = len(parameters) - len(shapes)
    # One way to hand out the parameters so far, for each (taken from group 0, 1, ...), and
    # whether there are others.
    ways: dict[tuple[int, ...], tuple[tuple[Any, ...] | None, bool]]
    ways = {(0,) * len(queues): ((), False)}
    for number, (name, shape) in enumerate(parameters.items()):
        after: dict[tuple[int, ...], tuple[tuple[Any, ...] | None, bool]] = {}
        for taken, (way, several) in ways.items():
            steps: list[tuple[tuple[int, ...], tuple[Any, ...] | None]] = []
            if number - sum(taken) < left_out:
                steps.append((taken, way))
            for g, queue in enumerate(queues):
                if taken[g] < len(queue) and shapes[queue[taken[g]]] in (None, shape):
                    step = (*taken[:g], taken[g] + 1, *taken[g + 1 :])
                    steps.append((step, (way, queue[taken[g]], name)))
            for step, longer in steps:
                after[step] = (longer, several or step in after)
        if len(after) > _MOST_CANDIDATES:
            return None
        ways = after
    way, several = ways.get(tuple(map(len, queues)), (None, True))
    if several:
        return None
    names = {}
    while way:
        way, index, name = way
        names[index] = name
    return names


def _read_parts(
    first: _File, model_paths: list[Path], optim_paths: list[Path]
) -> tuple[dict[str, Tensor], _Optimizer]:
    """ZeRO 1 to 3: put the parameters together from the parts of all ranks."""
    stage_3 = _is_stage_3(first.path)
    _check_ranks(first, optim_paths, "optim_states")
    if stage_3:
        _check_ranks(first, model_paths, "model_states")
    module, ties = _module_of(first)
    parts = [_load_part(path, len(optim_paths), stage_3) for path in optim_paths]
    vectors = _by_group(first, parts, stage_3)
    places = _places_of(first, parts[0], vectors, stage_3)
    tensors = {
        place.name: place.take(group_vectors)
        for group, group_vectors in zip(places, vectors, strict=True)
        for place in group
    }
    if stage_3:
        tensors |= _frozen([first, *map(_load, model_paths[1:])])
    for name, tensor in module.items():
        # Under ZeRO 3 an empty tensor holds the place of a parameter.
        if name not in tensors and name not in ties and not (stage_3 and tensor.numel() == 0):
            tensors[name] = _float32(tensor, copy=True)
    for name in module:
        if ties.get(name, name) not in tensors:
            raise UserError(f"{first.path}: names {name}, but no rank's file holds its values")
    return _in_order(module, tensors, ties), _states_of(parts, places, stage_3)


def _load_part(path: Path, ranks: int, stage_3: bool) -> _File:
    """One rank's part; it has to be of the same ZeRO stage and number of ranks as all others."""
    part = _File(path, _load(path).get("optimizer_state_dict", dict))
    # DeepSpeed's BF16_Optimizer, a ZeRO 1 of its own, does not write its stage.
    stage = part.data.get("zero_stage", 1)
    if stage not in (1, 2, 3) or (stage == 3) != stage_3:
        raise UserError(
            f"{path}: is of ZeRO {stage}, but the network's file is not; "
            "remove the files of the older run"
        )
    count = part.data.get("partition_count")
    if set(count if isinstance(count, list) else [count]) != {ranks}:
        raise UserError(
            f"{path}: its weights are split into {count} parts, but {ranks} ranks wrote the "
            f"folder (MiCS or expert parallelism), which is not read here; {_CONVERT}"
        )
    return part


def _by_group(model: _File, parts: Sequence[_File], stage_3: bool) -> list[list[Tensor]]:
    """The flat vectors of weights: for each group of parameters those of all ranks."""
    count = len(model.get("param_shapes", list))
    key = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    for part in parts:
        found = part.get(key, list)
        if len(found) != count or not all(isinstance(vector, Tensor) for vector in found):
            raise UserError(
                f"{part.path}: its {key!r} are not {count} tensors, one for each group of "
                f"parameters in {model.path.name}"
            )
    return [[part.data[key][number] for part in parts] for number in range(count)]


def _places_of(
    model: _File, part: _File, vectors: Sequence[Sequence[Tensor]], stage_3: bool
) -> list[list[_Place]]:
    """Where the parameters of each group lie in the ranks' vectors."""
    all_gaps = part.data.get("param_alignment_paddings")
    places = []
    for number, (group, flat) in enumerate(zip(model.data["param_shapes"], vectors, strict=True)):
        shapes = {name: tuple(map(int, shape)) for name, shape in group.items()}
        if stage_3:
            places.append(_places_cut_singly(shapes, flat, part.path))
        else:
            gaps = all_gaps[number] if all_gaps else [0] * len(shapes)
            places.append(_places_end_to_end(shapes, gaps, flat, part.path))
    return places


def _places_end_to_end(
    shapes: Mapping[str, tuple[int, ...]], gaps: list[int], flat: Sequence[Tensor], source: Path
) -> list[_Place]:
    """ZeRO 1 and 2: the vectors of the ranks follow each other; padding is at the very end.

    ``gaps`` is the padding that follows each parameter, 0 but for few optimisers. The padding at
    the end is cut off in the file, from the last parts, so their lengths say where each begins.
    """
    ends = [0]
    for part in flat:
        ends.append(ends[-1] + part.numel())
    places, offset = [], 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        stop = offset + math.prod(shape)
        pieces = [
            (rank, max(offset, ends[rank]) - ends[rank], min(stop, end) - max(offset, ends[rank]))
            for rank, end in enumerate(ends[1:])
            if max(offset, ends[rank]) < min(stop, end)
        ]
        places.append(_Place(name, shape, pieces))
        offset = stop + gap
    # As in zero_to_fp32.py: how much padding there is cannot be told exactly, only up to this.
    align = 2 * len(flat)
    if offset > ends[-1] or math.ceil(offset / align) != math.ceil(ends[-1] / align):
        raise _wrong_size(source, offset, ends[-1])
    return places


def _places_cut_singly(
    shapes: Mapping[str, tuple[int, ...]], flat: Sequence[Tensor], source: Path
) -> list[_Place]:
    """ZeRO 3: each parameter is cut into equal parts, the last padded, one for each rank."""
    places, offset = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        part = math.ceil(size / len(flat))
        pieces = [
            (rank, offset, min(part, size - rank * part))
            for rank in range(len(flat))
            if rank * part < size
        ]
        places.append(_Place(name, shape, pieces))
        offset += part
    for vector in flat:
        if vector.numel() != offset:
            raise _wrong_size(source, offset, vector.numel())
    return places


def _wrong_size(source: Path, wanted: int, found: int) -> UserError:
    return UserError(
        f"{source}: a group of parameters has {wanted} values, but the ranks' vectors "
        f"hold {found}; the files are not of one and the same run"
    )


def _frozen(models: Sequence[_File]) -> dict[str, Tensor]:
    """ZeRO 3: parameters that are not trained, cut like the others, but each on its own."""
    shapes = models[0].data.get("frozen_param_shapes") or {}
    frozen = {}
    for name, shape in shapes.items():
        fragments = [model.get("frozen_param_fragments", dict).get(name) for model in models]
        if not all(isinstance(fragment, Tensor) for fragment in fragments):
            raise UserError(f"{models[0].path.parent}: a rank's file lacks the frozen {name}")
        flat = torch.cat([fragment.reshape(-1) for fragment in fragments])
        if flat.numel() < math.prod(shape):
            raise _wrong_size(models[0].path, math.prod(shape), flat.numel())
        frozen[name] = _float32(flat[: math.prod(shape)]).reshape(tuple(shape)).clone()
    return frozen


def _in_order(
    names: Iterable[str], tensors: Mapping[str, Tensor], ties: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors as the network's ``state_dict`` orders them; ties are the same tensor."""
    ordered = {name: tensors[ties.get(name, name)] for name in names}
    return ordered | {name: tensor for name, tensor in tensors.items() if name not in ordered}


def _states_of(parts: list[_File], places: list[list[_Place]], stage_3: bool) -> _Optimizer:
    """The optimiser's state for each parameter, cut and padded as the weights are."""
    optimizer, unfit = _Optimizer(), set()
    for number, group in enumerate(places):
        states = [_group_state(part, number, stage_3) for part in parts]
        for key, value in states[0].items():
            values: list[Any] = [state.get(key) for state in states]
            if value is None:
                continue
            if _is_scalar(value):
                optimizer.scalars.setdefault(key, {}).update(
                    (place.name, float(value)) for place in group
                )
            elif _fits(values, group):
                optimizer.tensors.setdefault(key, {}).update(
                    (place.name, place.take(values)) for place in group
                )
            else:
                unfit.add(key)
    if unfit:
        names = ", ".join(sorted(unfit))
        optimizer.not_read = f"the optimizer's {names}: without an entry for each weight"
    return optimizer


def _group_state(part: _File, number: int, stage_3: bool) -> dict[str, Any]:
    """One rank's state of one flat vector; empty if the optimiser has made no step."""
    saved = part.data.get("optimizer_state_dict" if stage_3 else "base_optimizer_state")
    if isinstance(saved, list):  # DeepSpeed's "elastic" checkpoints
        return saved[number]
    return saved["state"].get(number, {})


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _fits(values: Sequence[Any], group: Sequence[_Place]) -> bool:
    """Whether these are flat vectors that hold a value for each weight."""
    if not all(isinstance(value, Tensor) and value.ndim == 1 for value in values):
        return False
    return all(
        start + length <= values[rank].numel()
        for place in group
        for rank, start, length in place.pieces
    )


def _float32(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """Half precision as float32, anything else as it is; ``copy`` lets go of the file."""
    dtype = torch.float32 if tensor.dtype in _HALF else tensor.dtype
    return tensor.detach().to(dtype, copy=copy)


def _is(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
