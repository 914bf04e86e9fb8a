"""Reading weights from whatever kind of checkpoint they come in, without running any of it.

A source is one of our checkpoints, a folder that one of our training stages resumes from, any
safetensors file, a ``.pth`` file, or a DeepSpeed folder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.checkpoints.model_file import EMA, OPTIMIZER, CheckpointInfo, is_ours, read_checkpoint
from tpp.checkpoints.safetensors_files import PathLike, is_safetensors, open_safetensors
from tpp.checkpoints.torch_files import NeedsPickleError, load_torch
from tpp.checkpoints.training_state import DamagedState, read_state
from tpp.common.errors import UserError
from tpp.common.reading import check_names
from tpp.models.architecture import Architecture
from tpp.models.fitting import by, few

# Where training scripts keep the weights, a moving average of them, and the optimiser's state
# (timm, torchvision's references, and what people write), and what wrappers put before names.
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Source:
    """What was found in a checkpoint.

    Attributes:
        path: where it was found.
        tensors: the network's ``state_dict``, on the CPU.
        info: the checkpoint's description, if it is one of ours.
        architecture: the network, if the checkpoint says it.
        companions: sets of tensors that belong to the network's, see
            :mod:`tpp.checkpoints.model_file`.
        optimizer: a PyTorch optimiser's ``state_dict`` whose states still go by number, if there
            is one; :func:`name_optimizer_state` gives them names.
        not_read: what the checkpoint holds that could not be read, and why; None if nothing.
    """

    path: Path
    tensors: dict[str, Tensor]
    info: CheckpointInfo | None = None
    architecture: Architecture | None = None
    companions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    not_read: str | None = None


def read_source(path: PathLike) -> Source:
    """Read a checkpoint of any kind that is known.

    A ``.pth`` (``.pt``, ``.th``, ...) file holds a ``state_dict``, alone or under the key
    ``state_dict``, ``model_state_dict`` or ``model``; a moving average and an optimiser's state
    beside it are read too. Prefixes that wrappers put before every name (``module.``,
    ``_orig_mod.``, ``model.``) are taken off. BatchNorm's ``num_batches_tracked``, which weights
    from before PyTorch 0.4.1 lack, is filled in as 0. Files are mapped, not read, where their
    format allows it.

    Raises:
        UserError: the file is missing, damaged, holds no ``state_dict``, or needs pickle.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not is_safetensors(path):
        return _read_torch(path)
    with open_safetensors(path) as file:
        if not is_ours(file):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Source(path, _tidy(tensors))
    ours, companions, info = read_checkpoint(path)
    return Source(path, ours, info, info.architecture, companions)


def load_weights(model: nn.Module, path: PathLike) -> None:
    """Load the tensors of a checkpoint into ``model``, dense or pruned, in place.

    Anything that :func:`read_source` reads will do. Values are converted to the model's dtype
    and device.

    Raises:
        UserError: names or shapes of the tensors are not those of the model.
    """
    source = read_source(path)
    tensors, state = source.tensors, model.state_dict()
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


def name_optimizer_state(
    state: Mapping[str, Any], model: nn.Module
) -> dict[str, dict[str, Tensor]] | None:
    """Give the states of a PyTorch optimiser, which go by number, their parameters' names.

    Numbers are those of the parameters in the order in which they were handed to the optimiser:
    by name where the state says so, else all in the network's order, or first those without
    weight decay (biases and norms) and then the others, or the reverse, as training scripts have
    it. An order counts if every state has its parameter's shape.

    Args:
        state: the optimiser's ``state_dict``.
        model: the network, on any device.

    Returns:
        {``optimizer.KEY``: {parameter: tensor}}, or None if no order fits.
    """
    try:
        groups, entries = state["param_groups"], state["state"]
        numbers = [number for group in groups for number in group["params"]]
        stated = [name for group in groups for name in group.get("param_names", ())]
        for names in (stated, *_orders(model)):
            if len(names) != len(numbers):
                continue
            named = dict(zip(numbers, names, strict=True))
            found = _by_name(entries, named, dict(model.named_parameters()))
            if found is not None:
                return found
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        return None  # no optimiser's state_dict at all
    return None


def _orders(model: nn.Module) -> Iterator[list[str]]:
    names = [name for name, _ in model.named_parameters()]
    yield names
    plain = {name for name, p in model.named_parameters() if p.dim() <= 1 or name.endswith("bias")}
    decayed = [name for name in names if name not in plain]
    undecayed = [name for name in names if name in plain]
    yield undecayed + decayed
    yield decayed + undecayed


def _by_name(
    entries: Mapping[Any, Mapping[str, Any]],
    named: Mapping[Any, str],
    parameters: Mapping[str, Tensor],
) -> dict[str, dict[str, Tensor]] | None:
    result: dict[str, dict[str, Tensor]] = {}
    for number, values in entries.items():
        name = named.get(number)
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
        companions = {f"{OPTIMIZER}{key}": _strip(named) for key, named in states.items()}
        return Source(path, _tidy(found.tensors), companions=companions, not_read=found.not_read)
    if any((path / name).is_file() for name in ("manifest.json", "state.json")):
        return _read_training_state(path)
    raise UserError(
        f"{path}: a folder that holds neither a DeepSpeed checkpoint nor one that a training "
        "stage resumes from (checkpoints/step-...)"
    )


def _read_training_state(path: Path) -> Source:
    """A folder that a training stage resumes from."""
    try:
        state = read_state(path)
    except DamagedState as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    architecture = Architecture.from_dict(state.architecture, source=str(path))
    return Source(path, state.model, None, architecture, optimizer=state.optimizer)


def _read_torch(path: Path) -> Source:
    try:
        data = load_torch(path)
    except NeedsPickleError:
        raise UserError(
            f"{path}: needs pickle, which can run any code, or is not a weights file; where it "
            "was made, save its tensors alone: torch.save(model.state_dict(), PATH)"
        ) from None
    companions: dict[str, dict[str, Tensor]] = {}
    optimizer = None
    if isinstance(data, Mapping):
        average = next((data[k] for k in _EMA_KEYS if isinstance(data.get(k), Mapping)), None)
        if average is not None:
            check_names(average, str(path))
            # AveragedModel and the like keep a counter beside the weights.
            kept = {n: t for n, t in average.items() if isinstance(t, Tensor) and t.dim()}
            companions[EMA] = _tidy(kept)
        optimizer = next(
            (data[k] for k in _OPTIMIZER_KEYS if isinstance(data.get(k), Mapping)), None
        )
    return Source(path, _tidy(_state_dict(path, data)), companions=companions, optimizer=optimizer)


def _state_dict(path: Path, data: Any) -> dict[str, Tensor]:
    for key in _STATE_KEYS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a state_dict")
    wrong = [str(name) for name, value in data.items() if not isinstance(value, Tensor)]
    if wrong or not data:
        found = f"{few(wrong)} {'are' if len(wrong) > 1 else 'is'} no tensor" if wrong else "empty"
        raise UserError(f"{path}: no state_dict, alone or under {', '.join(_STATE_KEYS)}: {found}")
    check_names(data, str(path))
    return dict(data)


def _tidy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a foreign file the names that the bare network has today."""
    tensors = _strip(tensors)
    norms = [name for name in tensors if name.endswith("running_mean")]
    counters = [name.replace("running_mean", "num_batches_tracked") for name in norms]
    return {name: torch.tensor(0) for name in counters} | tensors


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that wrappers put before every name."""
    tensors = dict(tensors)
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
