"""Reading weights from whatever kind of checkpoint they come in, without running any of it.

A source is one of our checkpoints, a folder that one of our training stages resumes from, any
safetensors file, a ``.pth`` file, a folder of DeepSpeed, Accelerate or Hugging Face, or a
repository on the Hub (``hf-hub:OWNER/NAME@REVISION``).
``docs/checkpoints.md`` has a row for each.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.checkpoints.file_kinds import is_safetensors
from tpp.checkpoints.folders import read_weights_folder
from tpp.checkpoints.model_file import EMA, OPTIMIZER, CheckpointInfo, is_ours, read_checkpoint
from tpp.checkpoints.names import OF_WINDOWS, match_names, rename_part
from tpp.checkpoints.safetensors_files import PathLike, open_safetensors
from tpp.checkpoints.state_dicts import find_state_dict
from tpp.checkpoints.torch_files import NeedsPickleError, load_torch
from tpp.common.errors import UserError
from tpp.common.hub import local
from tpp.common.own_code import is_own
from tpp.models.architecture import (
    Architecture,
    architecture_of,
    as_published,
    build_on_meta,
    set_architecture,
)
from tpp.models.fitting import by, few
from tpp.models.own import is_known, stand_in

_TRAINING_STATE = ("manifest.json", "state.json", "optimizer.safetensors")
_BUFFERS = (
    *("running_mean", "running_var", "num_batches_tracked", "total_ops", "total_params"),
    *OF_WINDOWS,
)


@dataclass(frozen=True)
class Source:
    """What was found in a checkpoint.

    Attributes:
        path: where it was found.
        tensors: the network's ``state_dict``, on the CPU; of a foreign file all that is there, by
            its names there, see :func:`fit_names`.
        info: the checkpoint's description, if it is one of ours.
        architecture: the network, if the checkpoint says it.
        companions: sets of tensors that belong to the network's, see
            :mod:`tpp.checkpoints.model_file`.
        optimizer: a PyTorch optimiser's ``state_dict`` whose states still go by number, if there
            is one; :func:`name_optimizer_state` gives them names.
        others: parameters of the file that are no part of the network, in the file's order, with
            the network's own between them: {name: dimensions}; empty if there are none.
        notes: what a user should know: what was left out, what could not be read, and why.
    """

    path: Path
    tensors: dict[str, Tensor]
    info: CheckpointInfo | None = None
    architecture: Architecture | None = None
    companions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    others: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def foreign(self) -> bool:
        """Whether it is from somebody else, and its names and settings may be too."""
        return self.info is None and self.architecture is None


def read_source(path: PathLike) -> Source:
    """Read a checkpoint of any kind that is known.

    A ``.pth`` (``.pt``, ``.th``, ...) file holds a ``state_dict``, alone or under a key; a moving
    average and an optimiser's state beside it are read too. Files are mapped, not read, where
    their format allows it.

    Raises:
        UserError: the file is missing, damaged, of another kind, holds no ``state_dict``, or an
            object of a class that is not known to be harmless.
    """
    path = local(path)
    if path.is_dir():
        return _read_folder(path)
    if not is_safetensors(path):
        return _read_torch(path)
    with open_safetensors(path) as file:
        if not is_ours(file):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Source(path, tensors)
    ours, companions, info = read_checkpoint(path)
    return Source(path, ours, info, info.architecture, companions)


def agreed(
    path: PathLike, said: Architecture | None, named: Architecture | None
) -> Architecture | None:
    """The network that a checkpoint and the user name, if either does.

    Args:
        path: the checkpoint.
        said: what it says. A class of somebody's own may by now be in a file of another name.
        named: what the user says.

    Raises:
        UserError: they are not the same.
    """
    if named is None or said is None:
        return named or said
    if is_own(said.name) and is_known(named.name):
        stand_in(said.name, named.name)
    elif named.name != said.name:
        raise UserError(
            f"{path}: holds a {said.name}, and is said to be a {named.name}; leave --model out"
        )
    for key, value in named.args.items():
        if said.args.get(key) != value:
            has = f"{key}={said.args[key]}" if key in said.args else f"no {key}"
            raise UserError(
                f"{path}: says what its network is called with, {has}, and not {key}={value}; "
                "leave --model-arg out"
            )
    return said


def fit_names(
    source: Source, architecture: Architecture, network: nn.Module | None = None
) -> Source:
    """A source whose tensors, and what goes with them, have the names of a network's.

    Prefixes and words of wrappers are taken off, what is no part of the network is left out, and
    BatchNorm's ``num_batches_tracked``, which weights from before PyTorch 0.4.1 lack, is filled in
    as 0. The notes say so. A source that says itself which network it holds is returned as it is.

    Args:
        source: what :func:`read_source` found.
        architecture: the network.
        network: the dense one, where it need not be built.

    Raises:
        UserError: the network is not all there, or other layers are there too.
    """
    if not source.foreign:
        return source
    model = network or build_on_meta(architecture)
    return _fit_names(source, model, model.state_dict())


def _fit_names(source: Source, model: nn.Module, wanted: Mapping[str, Tensor]) -> Source:
    network = type(model).__name__
    match = match_names(source.tensors, list(wanted), network)
    tensors = {
        name: source.tensors[match.names[name]] if name in match.names else torch.tensor(0)
        for name in wanted
        if name in match.names or name.endswith("num_batches_tracked")
    }
    companions = {
        companion: rename_part(members, match, wanted, network)
        for companion, members in source.companions.items()
    }
    others: dict[str, int] = {}
    if any(not name.endswith(_BUFFERS) for name in match.left_out):
        own = {name: mine for mine, name in match.names.items()}
        parameters = {name for name, _ in model.named_parameters()}
        others = {
            own.get(name, name): tensor.dim()
            for name, tensor in source.tensors.items()
            if (own[name] in parameters if name in own else not name.endswith(_BUFFERS))
        }
    return replace(
        source,
        tensors=tensors,
        companions=companions,
        others=others,
        notes=(*source.notes, *match.notes),
    )


def load_weights(model: nn.Module, path: PathLike) -> tuple[str, ...]:
    """Load the tensors of a checkpoint into ``model``, dense or pruned, in place.

    Anything that :func:`read_source` reads will do. Values are converted to the model's dtype
    and device. Settings that go with torchvision's published weights (``transform_input``) are
    set in the model and its architecture, unless the architecture's arguments say otherwise.

    Returns:
        What a user should know: what was left out, and what is assumed.

    Raises:
        UserError: names or shapes of the tensors are not those of the model.
    """
    source, state = read_source(path), model.state_dict()
    if source.foreign:
        try:
            source = _fit_names(source, model, state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    tensors = source.tensors
    missing = [name for name in state if name not in tensors]
    unexpected = [name for name in tensors if name not in state]
    for problem, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise UserError(f"{path}: does not fit {type(model).__name__}: {problem} {few(names)}")
    wrong = [name for name, tensor in state.items() if tensor.shape != tensors[name].shape]
    if wrong:
        name = wrong[0]
        hint = "; a pruned checkpoint is loaded with load_model" if source.info else ""
        raise UserError(
            f"{path}: does not fit {type(model).__name__}: {name} is {by(tensors[name].shape)}, "
            f"the model's is {by(state[name].shape)} ({len(wrong)} such tensors){hint}"
        )
    model.load_state_dict(tensors)
    architecture = architecture_of(model)
    if not source.foreign or architecture is None:
        return source.notes
    published, notes = as_published(architecture)  # attributes, which forward() looks at
    for name in published.args.keys() - architecture.args.keys():
        setattr(model, name, published.args[name])
    set_architecture(model, published)
    return (*source.notes, *notes)


def name_optimizer_state(
    state: Mapping[str, Any], model: nn.Module, others: Mapping[str, int] | None = None
) -> dict[str, dict[str, Tensor]] | None:
    """Give the states of a PyTorch optimiser, which go by number, their parameters' names.

    Numbers are those of the parameters in the order in which they were handed to the optimiser:
    by name where the state says so, else all in the network's order, or first those without
    weight decay (biases and norms) and then the others, or the reverse, as training scripts have
    it. An order counts if every state has its parameter's shape.

    Args:
        state: the optimiser's ``state_dict``.
        model: the network, on any device.
        others: see :class:`Source`: parameters that the optimiser had beside the network's, whose
            states are left out.

    Returns:
        {``optimizer.KEY``: {parameter: tensor}}, or None if no order fits.
    """
    try:
        groups, entries = state["param_groups"], state["state"]
        numbers = [number for group in groups for number in group["params"]]
        stated = [name for group in groups for name in group.get("param_names", ())]
        own = {name: p.dim() for name, p in model.named_parameters()}
        orders = [*_orders(own), *(_orders(others) if others else ())]
        for names in (stated, *orders):
            if len(names) != len(numbers):
                continue
            named = dict(zip(numbers, names, strict=True))
            foreign = others.keys() - own.keys() if others else ()
            found = _by_name(entries, named, dict(model.named_parameters()), foreign)
            if found is not None:
                return found
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        return None  # no optimiser's state_dict at all
    return None


def _orders(dimensions: Mapping[str, int]) -> Iterator[list[str]]:
    names = list(dimensions)
    yield names
    plain = {name for name, dim in dimensions.items() if dim <= 1 or name.endswith("bias")}
    decayed = [name for name in names if name not in plain]
    undecayed = [name for name in names if name in plain]
    yield undecayed + decayed
    yield decayed + undecayed


def _by_name(
    entries: Mapping[Any, Mapping[str, Any]],
    named: Mapping[Any, str],
    parameters: Mapping[str, Tensor],
    foreign: Collection[str],
) -> dict[str, dict[str, Tensor]] | None:
    result: dict[str, dict[str, Tensor]] = {}
    for number, values in entries.items():
        name = named.get(number)
        if name in foreign:
            continue
        if name is None or name not in parameters:
            return None
        for key, value in values.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value) if isinstance(value, int | float) else None
            if value is None:
                continue
            if value.dim() and value.shape != parameters[name].shape:
                return None
            result.setdefault(f"{OPTIMIZER}{key}", {})[name] = value
    return result


def _read_folder(path: Path) -> Source:
    from tpp.checkpoints.deepspeed_files import is_deepspeed_folder, read_deepspeed

    if is_deepspeed_folder(path):
        found = read_deepspeed(path)
        states: dict[str, dict[str, Tensor]] = dict(found.optimizer)
        for key, numbers in found.scalars.items():
            states[key] = {name: torch.tensor(number) for name, number in numbers.items()}
        companions = {f"{OPTIMIZER}{key}": named for key, named in states.items()}
        notes = () if found.not_read is None else (f"not read from {path}: {found.not_read}",)
        return Source(path, dict(found.tensors), companions=companions, notes=notes)
    if any((path / name).is_file() for name in _TRAINING_STATE):
        return _read_training_state(path)
    folder = read_weights_folder(path)
    return Source(
        path,
        folder.tensors,
        architecture=folder.architecture,
        optimizer=folder.optimizer,
    )


def _read_training_state(path: Path) -> Source:
    """A folder that a training stage resumes from."""
    from tpp.checkpoints.training_state import DamagedState, read_state

    try:
        state = read_state(path)
    except DamagedState as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    architecture = Architecture.from_dict(state.architecture, source=str(path))
    companions = {EMA: state.average} if state.average else {}
    return Source(path, state.model, None, architecture, companions, optimizer=state.optimizer)


def _read_torch(path: Path) -> Source:
    try:
        found = find_state_dict(load_torch(path), str(path))
    except NeedsPickleError as error:
        raise UserError(
            f"{error}; where it was made, save its tensors alone: "
            "torch.save(model.state_dict(), PATH)"
        ) from None
    companions = {} if found.average is None else {EMA: found.average}
    return Source(
        path,
        found.tensors,
        companions=companions,
        optimizer=found.optimizer,
        notes=tuple(found.notes),
    )
