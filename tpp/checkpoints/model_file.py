"""Checkpoints that describe themselves: weights and their network in one file without pickle.

A checkpoint is a safetensors file. Its metadata holds one JSON document: the architecture, the
width of every Conv2d and Linear layer, a hash of every tensor, the preprocessing of the images,
and whatever else the writer adds. That is enough to rebuild a pruned network from the file alone.

Beside the network's own tensors a file may hold *companions*: sets of tensors that belong to the
parameters one by one, such as an optimiser's momentum, a moving average of the weights, or a mask
of those that are kept. They are called ``companion:tensor``.
"""

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tpp.checkpoints.file_kinds import begins_as_torch, is_safetensors
from tpp.checkpoints.safetensors_files import (
    PathLike,
    find_ties,
    open_safetensors,
    sha256_of_all,
    storable,
)
from tpp.common.errors import UserError
from tpp.common.files import aside_of, new_file, sync
from tpp.common.hub import local
from tpp.common.own_code import is_own
from tpp.common.reading import parse_json
from tpp.models.architecture import (
    Architecture,
    architecture_of,
    build_model,
    build_on_meta,
    set_preprocessing,
)
from tpp.models.fitting import assign_tensors, fill_buffers, fitted
from tpp.models.layers import layer_widths
from tpp.models.own import is_known, own_name

FORMAT = "tpp-checkpoint"
VERSION = 2
_UNSAID = "it does not say which network it holds"
EMA = "ema"
OPTIMIZER = "optimizer."
# A dense network is this many times as large as the file of what is left of it, and so many
# bytes, at most. It is built only where it computes what no file holds: masks and positions.
_MOST_TIMES_LARGER = 1000
_SMALL = 2**28
_FIELDS = {
    "version",
    "architecture",
    "widths",
    "ties",
    "sha256",
    "companions",
    "preprocessing",
    "extra",
}

# {companion: {tensor of the network: what goes with it}}
Companions = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        architecture: the network before pruning.
        preprocessing: how images are prepared, see :mod:`tpp.models.preparation`, or None.
        extra: whatever the writer added, such as class names, stage or metrics.
        shapes: shape of every tensor of the network's ``state_dict``.
        widths: [inputs, outputs] of every Conv2d and Linear layer.
        ties: names of tensors that are the same as another: {alias: name}.
        sha256: hash of the bytes of every stored tensor.
        companions: names of the sets of tensors that belong to the network's.
    """

    architecture: Architecture
    preprocessing: dict[str, Any] | None
    extra: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    widths: dict[str, list[int]]
    ties: dict[str, str]
    sha256: dict[str, str]
    companions: tuple[str, ...]


def save_model(
    path: PathLike,
    model_or_tensors: nn.Module | Mapping[str, Tensor],
    *,
    architecture: Architecture | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    companions: Companions | None = None,
) -> None:
    """Write a checkpoint; the file appears whole and verified, or not at all.

    The same network and arguments give the same bytes. Tensors on the CPU are written from where
    they are, without a copy.

    Args:
        path: where to; missing folders are made.
        model_or_tensors: a network, pruned or not, or its ``state_dict``; any device and dtype.
            Its classifier may have another width than the architecture's.
        architecture: the dense network; by default what the model carries, or else, of a class of
            your own, ``FILE.py:CLASS`` with as many classes as there are outputs. A file only
            names that class.
        preprocessing: how images are prepared; by default what the model carries. Plain data.
        extra: anything else worth keeping. Plain data.
        companions: sets of tensors that belong to the network's: ``ema``, ``mask``, or an
            optimiser's states as ``optimizer.momentum_buffer`` and the like.

    Raises:
        UserError: the architecture is not known, the tensors do not fit it or each other, or the
            file cannot be written or does not read back as what was meant.
    """
    tensors: Mapping[str, Tensor]
    own: nn.Module | None = None
    if isinstance(model_or_tensors, nn.Module):
        architecture = architecture or architecture_of(model_or_tensors)
        preprocessing = preprocessing or getattr(model_or_tensors, "preprocessing", None)
        tensors = model_or_tensors.state_dict()
        if architecture is None:
            architecture, own = architecture_of_own(model_or_tensors), model_or_tensors
        elif is_own(architecture.name) and not is_known(architecture.name):
            own = model_or_tensors
    else:
        tensors = model_or_tensors
    path = Path(path)
    if architecture is None:
        raise UserError(
            f"{path}: the network does not say which one it is; name the dense network that it "
            'came from, as in architecture=tpp.Architecture("resnet50", 1000), by a name that '
            "torchvision, timm (timm:NAME) or this project has"
        )
    try:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        network = fitted(architecture, shapes, network=own, images=preprocessing)
    except UserError as error:
        raise UserError(f"{path}: cannot save as {architecture.name}: {error}") from None
    save_tensors(
        path, tensors, network, preprocessing=preprocessing, extra=extra, companions=companions
    )


def architecture_of_own(network: nn.Module) -> Architecture | None:
    """Of a network in memory that is of a class of the user's own."""
    name = own_name(network)
    # As many classes as it turns out to have.
    return None if name is None else Architecture(name, 1)


def save_tensors(
    path: PathLike,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    companions: Companions | None = None,
) -> None:
    """Write a checkpoint of a network that has been run without memory, see :func:`save_model`.

    Args:
        path, preprocessing, extra, companions: as there.
        tensors: its ``state_dict``.
        network: one with these shapes that has been seen to run, on the meta device.

    Raises:
        UserError: as there, and if the shapes are not those of the network.
    """
    path = Path(path)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError(f"{path}: the tensors are not of the network's shapes")
    ties = find_ties(tensors)
    stored = {name: tensor for name, tensor in tensors.items() if name not in ties}
    for companion, members in (companions or {}).items():
        stored |= {f"{companion}:{name}": tensor for name, tensor in members.items()}
    stored = storable(stored)
    own = architecture_of(network)
    assert own is not None
    metadata = {
        "version": VERSION,
        "architecture": own.to_dict(),
        "widths": layer_widths(network),
        "ties": ties,
        "sha256": sha256_of_all(stored),
        "companions": list(companions or {}),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "extra": dict(extra or {}),
    }
    _write(path, stored, metadata)


def load_model(
    path: PathLike, *, companion: str | None = None, network: nn.Module | None = None
) -> nn.Module:
    """Rebuild the network of a checkpoint, pruned or not, from the file alone.

    Args:
        path: the file, or ``hf-hub:OWNER/NAME[@REVISION]`` for one on the Hub (docs/hub.md).
        companion: take these weights instead of the network's, such as ``ema``.
        network: a dense network of the class that the file only names, where that is one of your
            own: no file brings code along. It is left alone; its widths become the file's.

    Returns:
        The network on the CPU in evaluation mode, with attributes ``architecture`` and
        ``preprocessing``.

    Raises:
        UserError: the file is missing, truncated, damaged, of another format or version, or
            its tensors contradict what it says about itself or each other.
    """
    path = local(path)
    tensors, companions, info = read_checkpoint(path)
    if companion is not None:
        if companion not in companions:
            held = ", ".join(companions) or "no companions at all"
            raise UserError(f"{path}: holds no {companion!r}; it has {held}")
        tensors = tensors | dict(companions[companion])
    model = network_of(info, source=str(path), network=network)
    assign_tensors(model, tensors)
    load_dense_buffers(path, model, network)
    return model.eval()


def load_dense_buffers(path: PathLike, model: nn.Module, network: nn.Module | None = None) -> None:
    """Give a network the buffers that no file holds, from a dense one that is built if need be.

    Args:
        path: its checkpoint, for whose size the dense one must not be too large.
        model: the network with its tensors; it says which one it is.
        network: the dense one, where there is one.

    Raises:
        UserError: it would be too large.
    """
    if not any(buffer.is_meta for buffer in model.buffers()):
        return
    if network is None:
        arch = architecture_of(model)
        assert arch is not None
        _check_dense_size(local(path), arch)
        with torch.random.fork_rng(devices=[]):
            network = build_model(arch.name, arch.num_classes, **arch.args)
    fill_buffers(model, network)


def _check_dense_size(path: Path, architecture: Architecture) -> None:
    dense = build_on_meta(architecture)
    size = sum(t.numel() * t.element_size() for t in (*dense.parameters(), *dense.buffers()))
    if size > _MOST_TIMES_LARGER * path.stat().st_size + _SMALL:
        raise UserError(
            f"{path}: is said to be of {architecture.name}, which has {size:,} bytes; the file is "
            "too small for what could be left of it"
        )


def read_companion(path: PathLike, name: str) -> dict[str, Tensor]:
    """Tensors that a checkpoint holds beside the network's; empty where it has none of that name.

    Without reading the file where its head says so.

    Raises:
        UserError: as :func:`read_checkpoint`.
    """
    if name not in read_metadata(path).companions:
        return {}
    _, companions, _ = read_checkpoint(path)
    return dict(companions[name])


def load_optimizer_state(path: PathLike, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take an optimiser's state out of a checkpoint, so that training goes on where it was.

    Args:
        path: a checkpoint with companions called ``optimizer.KEY``, as the pruner writes them
            when its input has an optimiser's state.
        model: the network that :func:`load_model` made of the same file.
        optimizer: a fresh optimiser of its parameters; learning rates and the like are its own.

    Returns:
        Of how many parameters the state was taken up.

    Raises:
        UserError: the file holds no optimiser's state, or one of other shapes.
    """
    _, companions, _ = read_checkpoint(path)
    states = {
        k.removeprefix(OPTIMIZER): v for k, v in companions.items() if k.startswith(OPTIMIZER)
    }
    if not states:
        raise UserError(f"{path}: holds no optimiser's state")
    taken = set()
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        for key, tensors in states.items():
            tensor = tensors.get(name)
            if tensor is None or id(parameter) not in ours:
                continue
            if tensor.dim() and tensor.shape != parameter.shape:
                raise UserError(
                    f"{path}: {key} of {name} is of shape {tuple(tensor.shape)}, "
                    f"the parameter of {tuple(parameter.shape)}"
                )
            # As torch.optim does: a step counter stays on the CPU, all else goes to the parameter.
            if not tensor.dim():
                optimizer.state[parameter][key] = tensor.to("cpu", copy=True)
            else:
                kind = parameter.dtype if tensor.is_floating_point() else tensor.dtype
                optimizer.state[parameter][key] = tensor.to(parameter.device, kind, copy=True)
            taken.add(name)
    return len(taken)


def read_metadata(path: PathLike) -> CheckpointInfo:
    """Read what a checkpoint says about itself, without reading its tensors.

    Raises:
        UserError: the file is missing, truncated, or of another format or version.
    """
    path = local(path)
    with _open_ours(path) as file:
        return _parse(path, file)


def find_metadata(path: PathLike) -> CheckpointInfo | None:
    """What a file says about itself; its tensors are not read.

    Returns:
        None for a folder, and for a file that is not one of ours.

    Raises:
        UserError: the file is missing, of a kind that holds no weights, or one of ours that is
            damaged or of another version.
    """
    path = local(path)
    if path.is_dir() or not is_safetensors(path):
        return None
    with open_safetensors(path) as file:
        return _parse(path, file) if is_ours(file) else None


def read_checkpoint(
    path: PathLike,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], CheckpointInfo]:
    """The network's tensors, its companions, and the description of one of our checkpoints.

    Tensors are mapped from the file, not read into memory, until they are used.

    Raises:
        UserError: the file is missing, truncated, damaged, or of another format or version.
    """
    path = local(path)
    with _open_ours(path) as file:
        info = _parse(path, file)
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        _verify_tensors(stored, info.sha256)
    except OSError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    tensors = {name: tensor for name, tensor in stored.items() if name in info.shapes}
    tensors |= {alias: tensors[name] for alias, name in info.ties.items()}
    companions: dict[str, dict[str, Tensor]] = {name: {} for name in info.companions}
    for name, tensor in stored.items():
        companion, colon, member = name.partition(":")
        if colon:
            companions[companion][member] = tensor
    return tensors, companions, info


def network_of(info: CheckpointInfo, *, source: str, network: nn.Module | None = None) -> nn.Module:
    """The network that a checkpoint describes, on the meta device.

    Args:
        info: what it says.
        source: the file, for errors.
        network: see :func:`load_model`.
    """
    try:
        images = info.preprocessing
        model = fitted(info.architecture, info.shapes, network=network, images=images)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if architecture_of(model) != info.architecture:
        raise UserError(
            f"{source}: is said to have {info.architecture.num_classes} outputs, but its tensors "
            f"give another number"
        )
    for layer, width in layer_widths(model).items():
        if info.widths.get(layer) != width:
            raise UserError(
                f"{source}: {layer}.weight has [inputs, outputs] {width}, "
                f"but the file says {info.widths.get(layer)}"
            )
    set_preprocessing(model, info.preprocessing)
    return model


def is_ours(file: Any) -> bool:
    """Whether an open safetensors file is a checkpoint of ours."""
    return FORMAT in (file.metadata() or {})


def _open_ours(path: Path) -> Any:
    """Open a file that should be one of ours; say what it is where it cannot be."""
    if path.is_dir():
        raise UserError(
            f"{path}: a folder, not a {FORMAT}: name a file in it, or {_make_ours(path)}"
        )
    if not is_safetensors(path):
        begins_as_torch(path)
        raise UserError(
            f"{path}: a file of torch.save, not a {FORMAT}: {_UNSAID}; {_make_ours(path)}"
        )
    return open_safetensors(path)


def _make_ours(path: Path) -> str:
    """What to do with a checkpoint that is none of ours, or is not one file."""
    # What training resumes from says the network.
    model = "" if (path / "manifest.json").is_file() else " --model NAME"
    return (
        f"make one of it: tpp prune {shlex.quote(str(path))}{model} "
        "--ratio '*=0' --output NEW.safetensors"
    )


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    aside = aside_of(path)
    if path.is_dir():
        raise UserError(f"{path}: cannot write the checkpoint: it is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry only: safetensors writes several in random order, and the same checkpoint
        # should be the same bytes.
        mode = new_file(aside)
        save_file(tensors, aside, metadata={FORMAT: json.dumps(metadata)})
        aside.chmod(mode)
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
    for name, found in sha256_of_all(tensors).items():
        if found != sha256[name]:
            raise OSError(f"the bytes of {name} are not those that were meant")


def _parse(path: Path, file: Any) -> CheckpointInfo:
    text = (file.metadata() or {}).get(FORMAT)
    if text is None:
        raise UserError(f"{path}: plain safetensors, not a {FORMAT}: {_UNSAID}; {_make_ours(path)}")
    data = parse_json(text, f"{path}: the metadata")
    version = data.get("version") if isinstance(data, dict) else None
    if version not in (1, VERSION):
        raise UserError(f"{path}: {FORMAT} version {version!r}, expected {VERSION}")
    if version == 1:  # from before there were companions
        data.setdefault("companions", [])
    if set(data) != _FIELDS or not _well_formed(data):
        raise UserError(f"{path}: the metadata must hold {', '.join(sorted(_FIELDS))}")
    shapes = {}
    for name in file.keys():  # noqa: SIM118
        companion, colon, _ = name.partition(":")
        if not colon:
            shapes[name] = tuple(file.get_slice(name).get_shape())
        elif companion not in data["companions"]:
            raise UserError(f"{path}: {name} is of a companion that the file does not name")
    stored = set(shapes)
    for alias, name in data["ties"].items():
        if name not in stored or alias in stored:
            raise UserError(f"{path}: {alias} is said to be {name}, which is missing")
        shapes[alias] = shapes[name]
    architecture = Architecture.from_dict(data["architecture"], source=str(path))
    rest = {key: data[key] for key in ("preprocessing", "extra", "widths", "ties", "sha256")}
    companions = tuple(data["companions"])
    return CheckpointInfo(architecture=architecture, shapes=shapes, companions=companions, **rest)


def _well_formed(data: Mapping[str, Any]) -> bool:
    """Whether the fields are of the right kinds; what is in them is checked where it is used."""
    return (
        all(isinstance(data[key], dict) for key in ("widths", "ties", "sha256", "extra"))
        and all(isinstance(name, str) for name in (*data["ties"].values(), *data["ties"]))
        and isinstance(data["companions"], list)
        and all(isinstance(name, str) for name in data["companions"])
        and isinstance(data["preprocessing"], dict | None)
    )
