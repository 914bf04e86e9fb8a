"""Checkpoints that describe themselves: weights and their network in one file without pickle.

A checkpoint is a safetensors file. Its metadata holds one JSON document: the architecture, the
width of every Conv2d and Linear layer, a hash of every tensor, the preprocessing of the images,
and whatever else the writer adds. That is enough to rebuild a pruned network from the file alone.
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpp.errors import UserError
from tpp.files import aside_of, sync
from tpp.models import (
    Architecture,
    architecture_of,
    build_model,
    build_on_meta,
)

FORMAT = "tpp-checkpoint"
VERSION = 1
_FIELDS = {"version", "architecture", "widths", "ties", "sha256", "preprocessing", "extra"}
# Where training scripts keep the weights, and what wrappers put before every name.
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        architecture: the network before pruning.
        preprocessing: how images are prepared (image_size, resize, mean, std, channels), or None.
        extra: whatever the writer added, such as class names, stage or metrics.
        shapes: shape of every tensor of the network's ``state_dict``.
        widths: [inputs, outputs] of every Conv2d and Linear layer.
        ties: names of tensors that are the same as another: {alias: name}.
        sha256: hash of the bytes of every stored tensor.
    """

    architecture: Architecture
    preprocessing: dict[str, Any] | None
    extra: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    widths: dict[str, list[int]]
    ties: dict[str, str]
    sha256: dict[str, str]


def save_model(
    path: PathLike,
    model_or_tensors: nn.Module | Mapping[str, Tensor],
    *,
    architecture: Architecture | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint; the file appears whole and verified, or not at all.

    The same network and arguments give the same bytes.

    Args:
        path: where to; missing folders are made.
        model_or_tensors: a network, pruned or not, or its ``state_dict``; any device and dtype.
        architecture: the dense network; by default what the model carries.
        preprocessing: how images are prepared; by default what the model carries. Plain data.
        extra: anything else worth keeping. Plain data.

    Raises:
        UserError: the architecture is not known, the tensors do not fit it, or the file cannot
            be written or does not read back as what was meant.
    """
    tensors: Mapping[str, Tensor]
    if isinstance(model_or_tensors, nn.Module):
        architecture = architecture or architecture_of(model_or_tensors)
        preprocessing = preprocessing or getattr(model_or_tensors, "preprocessing", None)
        tensors = model_or_tensors.state_dict()
    else:
        tensors = model_or_tensors
    path = Path(path)
    if architecture is None:
        raise UserError(f"{path}: cannot save a model whose architecture is not known; name it")
    network = build_on_meta(architecture)
    try:
        fit_to_shapes(network, {name: tuple(t.shape) for name, t in tensors.items()})
    except UserError as error:
        raise UserError(f"{path}: cannot save as {architecture.name}: {error}") from None
    ties = _find_ties(tensors)
    stored = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if name not in ties
    }
    metadata = {
        "version": VERSION,
        "architecture": architecture.to_dict(),
        "widths": layer_widths(network),
        "ties": ties,
        "sha256": {name: _sha256(tensor) for name, tensor in stored.items()},
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "extra": dict(extra or {}),
    }
    _write(path, stored, metadata)


def load_model(path: PathLike) -> nn.Module:
    """Rebuild the network of a checkpoint, pruned or not, from the file alone.

    Returns:
        The network on the CPU in evaluation mode, with attributes ``architecture`` and
        ``preprocessing``.

    Raises:
        UserError: the file is missing, truncated, damaged, of another format or version, or
            its tensors contradict what it says about itself.
    """
    tensors, info = _read(Path(path))
    model = network_of(info, source=str(path))
    assign_tensors(model, tensors)
    if any(buffer.is_meta for buffer in model.buffers()):
        arch = info.architecture
        with torch.random.fork_rng(devices=[]):
            fill_buffers(model, build_model(arch.name, arch.num_classes, **arch.args))
    model.__dict__["preprocessing"] = info.preprocessing
    return model.eval()


def read_metadata(path: PathLike) -> CheckpointInfo:
    """Read what a checkpoint says about itself, without reading its tensors.

    Raises:
        UserError: the file is missing, truncated, or of another format or version.
    """
    path = Path(path)
    with _open(path) as file:
        return _parse(path, file)


def find_metadata(path: PathLike) -> CheckpointInfo | None:
    """What a file says about itself, None if it is not one of ours; its tensors are not read.

    Raises:
        UserError: the file is missing, or one of ours that is damaged or of another version.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return None
    with _open(path) as file:
        return _parse(path, file) if FORMAT in (file.metadata() or {}) else None


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], CheckpointInfo | None]:
    """Read the tensors of one of our checkpoints, any safetensors file, or a ``.pth`` file.

    A ``.pth`` (``.pt``, ``.th``, ...) file holds a ``state_dict``, alone or under the key
    ``state_dict``, ``model_state_dict`` or ``model``. Prefixes that wrappers put before every
    name (``module.``, ``_orig_mod.``, ``model.``) are taken off. BatchNorm's
    ``num_batches_tracked``, which weights from before PyTorch 0.4.1 lack, is filled in as 0.

    Returns:
        The tensors on the CPU by name, and the checkpoint's description if it is one of ours.

    Raises:
        UserError: the file is missing, damaged, holds no ``state_dict``, or needs pickle.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return _tidy(_state_dict(path, _torch_load(path))), None
    with _open(path) as file:
        if FORMAT not in (file.metadata() or {}):
            return _tidy({name: file.get_tensor(name) for name in file.keys()}), None  # noqa: SIM118
    return _read(path)


def load_weights(model: nn.Module, path: PathLike) -> None:
    """Load the tensors of a file into ``model``, dense or pruned, in place.

    Any file that :func:`load_tensors` reads will do. Values are converted to the model's dtype
    and device.

    Raises:
        UserError: names or shapes of the tensors are not those of the model.
    """
    tensors, info = load_tensors(path)
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    unexpected = [name for name in tensors if name not in state]
    for problem, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise UserError(f"{path}: does not fit {type(model).__name__}: {problem} {_few(names)}")
    wrong = [name for name, tensor in state.items() if tensor.shape != tensors[name].shape]
    if wrong:
        name = wrong[0]
        hint = "; a pruned checkpoint is loaded with load_model" if info else ""
        raise UserError(
            f"{path}: does not fit {type(model).__name__}: {name} is {_x(tensors[name].shape)}, "
            f"the model's is {_x(state[name].shape)} ({len(wrong)} such tensors){hint}"
        )
    model.load_state_dict(tensors)


def network_of(info: CheckpointInfo, *, source: str) -> nn.Module:
    """The network that a checkpoint describes, on the meta device; ``source`` is for errors."""
    try:
        model = build_on_meta(info.architecture)
        fit_to_shapes(model, info.shapes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for layer, width in layer_widths(model).items():
        if info.widths.get(layer) != width:
            raise UserError(
                f"{source}: {layer}.weight has [inputs, outputs] {width}, "
                f"but the file says {info.widths.get(layer)}"
            )
    return model


def fit_to_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Resize the Conv2d, Linear and BatchNorm modules of ``model`` in place.

    Tensors that change shape lose their values, so this is meant for a model on the meta device,
    whose tensors are assigned afterwards.

    Args:
        model: a dense network, see :func:`tpp.models.build_on_meta`.
        shapes: the wanted shape of every tensor in the model's ``state_dict``.

    Raises:
        UserError: a tensor is missing or not known, or no widths of the layers give its shape.
    """
    names = list(model.state_dict())
    missing = [name for name in names if name not in shapes]
    known = set(names)
    unknown = [name for name in shapes if name not in known]
    if missing or unknown:
        problem = f"lacks {_few(missing)}" if missing else f"has unknown {_few(unknown)}"
        raise UserError(f"does not fit {type(model).__name__}: {problem}")
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        _fit_module(module, {k: shapes.get(f"{prefix}{k}") for k in ("weight", "running_mean")})
    for name, tensor in model.state_dict().items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(
                f"{name}: shape {_x(shapes[name])} does not fit {type(model).__name__}, "
                f"which wants {_x(tensor.shape)}"
            )


def assign_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors`` the parameters and buffers of ``model``, without a copy, ties kept."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    model.load_state_dict(dict(tensors), assign=True)
    for first, *others in names.values():
        for other in others:
            module, _, key = other.rpartition(".")
            setattr(model.get_submodule(module), key, model.get_parameter(first))


def fill_buffers(model: nn.Module, source: nn.Module) -> None:
    """Copy the buffers that are in no ``state_dict``, and so in no file, from another network."""
    stored = model.state_dict()
    for name, _ in list(model.named_buffers()):
        if name not in stored:
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, source.get_buffer(name).clone())


def layer_widths(model: nn.Module) -> dict[str, list[int]]:
    """[inputs, outputs] of every Conv2d and Linear layer, in network order."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            widths[name] = [module.in_channels, module.out_channels]
        elif isinstance(module, nn.Linear):
            widths[name] = [module.in_features, module.out_features]
    return widths


def _fit_module(module: nn.Module, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Resize one module as its wanted weight asks for; leave it where that makes no sense."""
    shape = shapes["weight"]
    if shape is not None and 0 in shape:
        return
    if isinstance(module, nn.Conv2d) and shape is not None and len(shape) == 4:
        if module.groups == module.in_channels == module.out_channels and shape[1] == 1:
            module.groups = module.in_channels = module.out_channels = shape[0]
        elif shape[0] % module.groups == 0:
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
        inputs = module.in_channels // module.groups
        _resize(module, "weight", (module.out_channels, inputs, *module.kernel_size))
        _resize(module, "bias", (module.out_channels,))
    elif isinstance(module, nn.Linear) and shape is not None and len(shape) == 2:
        module.out_features, module.in_features = shape
        _resize(module, "weight", shape)
        _resize(module, "bias", shape[:1])
    elif isinstance(module, _BatchNorm):
        shape = shape or shapes["running_mean"]
        if shape is not None and len(shape) == 1:
            module.num_features = shape[0]
            for key in ("weight", "bias", "running_mean", "running_var"):
                _resize(module, key, shape)


def _resize(module: nn.Module, key: str, shape: tuple[int, ...]) -> None:
    old = getattr(module, key)
    if old is None or tuple(old.shape) == tuple(shape):
        return
    new = old.new_empty(shape)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, key, new)


def _find_ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one: {alias: name}."""
    seen: dict[Any, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = seen.setdefault(place, name)
        if first != name:
            ties[name] = first
    return ties


def _sha256(tensor: Tensor) -> str:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry only: safetensors writes several in random order, and the same checkpoint
        # should be the same bytes.
        save_file(tensors, aside, metadata={FORMAT: json.dumps(metadata)})
        sync(aside)
        _verify(aside, metadata)
        aside.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the checkpoint: {error}") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def _verify(path: Path, metadata: dict[str, Any]) -> None:
    """Read a file back, tensor by tensor, and compare it with what was meant."""
    with safe_open(path, "pt") as file:
        if json.loads(file.metadata()[FORMAT]) != json.loads(json.dumps(metadata)):
            raise OSError("the header reads back differently")
        _verify_tensors({name: file.get_tensor(name) for name in file.keys()}, metadata["sha256"])  # noqa: SIM118


def _verify_tensors(tensors: Mapping[str, Tensor], sha256: Mapping[str, str]) -> None:
    for name in tensors.keys() ^ sha256.keys():
        raise OSError(f"{name} is {'missing' if name in sha256 else 'unexpected'}")
    for name, tensor in tensors.items():
        if _sha256(tensor) != sha256[name]:
            raise OSError(f"the bytes of {name} are not those that were meant")


def _read(path: Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Read and verify one of our checkpoints."""
    with _open(path) as file:
        info = _parse(path, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        _verify_tensors(tensors, info.sha256)
    except OSError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    tensors |= {alias: tensors[name] for alias, name in info.ties.items()}
    return tensors, info


def _open(path: Path) -> Any:
    _check_file(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")


def _parse(path: Path, file: Any) -> CheckpointInfo:
    text = (file.metadata() or {}).get(FORMAT)
    if text is None:
        raise UserError(
            f"{path}: not a {FORMAT} (a plain safetensors file does not say which network it is)"
        )
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: the metadata is not JSON ({error})") from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: {FORMAT} version {version!r}, expected {VERSION}")
    if set(data) != _FIELDS:
        raise UserError(f"{path}: the metadata must hold {', '.join(sorted(_FIELDS))}")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for alias, name in data["ties"].items():
        if name not in shapes:
            raise UserError(f"{path}: {alias} is said to be {name}, which is missing")
        shapes[alias] = shapes[name]
    architecture = Architecture.from_dict(data["architecture"], source=str(path))
    rest = {key: data[key] for key in ("preprocessing", "extra", "widths", "ties", "sha256")}
    return CheckpointInfo(architecture=architecture, shapes=shapes, **rest)


def _is_safetensors(path: Path) -> bool:
    _check_file(path)
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _torch_load(path: Path) -> Any:
    try:
        # Only the zip format of torch >= 1.6 can be mapped instead of read.
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: needs pickle, which can run any code, or is not a weights file; where it "
            "was made, save its tensors alone: torch.save(model.state_dict(), PATH)"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a whole PyTorch file ({error})") from None


def _state_dict(path: Path, data: Any) -> dict[str, Tensor]:
    for key in _STATE_KEYS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a state_dict")
    wrong = [str(name) for name, value in data.items() if not isinstance(value, Tensor)]
    if wrong or not data:
        found = f"{_few(wrong)} {'are' if len(wrong) > 1 else 'is'} no tensor" if wrong else "empty"
        raise UserError(f"{path}: no state_dict, alone or under {', '.join(_STATE_KEYS)}: {found}")
    return dict(data)


def _tidy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a foreign file the names that the bare network has today."""
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    norms = [name for name in tensors if name.endswith("running_mean")]
    counters = [name.replace("running_mean", "num_batches_tracked") for name in norms]
    return {name: torch.tensor(0) for name in counters} | tensors


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _few(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
