"""Folders that hold weights: those of Accelerate and of Hugging Face."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tpp.checkpoints.safetensors_files import open_safetensors
from tpp.checkpoints.state_dicts import find_state_dict
from tpp.checkpoints.torch_files import load_torch
from tpp.common.errors import UserError
from tpp.common.reading import read_json
from tpp.models.architecture import Architecture
from tpp.models.fitting import few

# The names that Accelerate, transformers, timm and huggingface_hub give to a network's weights.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PARTS = tuple(f"{name}.index.json" for name in _WEIGHTS)
_OPTIMIZER = "optimizer.bin"
_ENDINGS = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Folder:
    """What a folder of weights holds.

    Attributes:
        tensors: the network's ``state_dict``.
        architecture: the network, if the folder says it (timm's ``config.json``).
        optimizer: an optimiser's ``state_dict``, if there is one (Accelerate's).
    """

    tensors: dict[str, Tensor]
    architecture: Architecture | None
    optimizer: Mapping[str, Any] | None


def read_weights_folder(path: Path) -> Folder:
    """Read a folder of ``Accelerator.save_state`` or of a Hugging Face model.

    Raises:
        UserError: it holds no weights of one network, or what it holds cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weights(path):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as opened:
                part = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            part = find_state_dict(load_torch(file), str(file)).tensors
        tensors |= part
    optimizer = None
    if (path / _OPTIMIZER).is_file():
        state = load_torch(path / _OPTIMIZER)
        if isinstance(state, Mapping) and "param_groups" in state:
            optimizer = state
    return Folder(tensors, _architecture(path), optimizer)


def _weights(path: Path) -> list[Path]:
    """The files with the network's weights."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            others = sorted(path.glob(f"{Path(name).stem}_*{Path(name).suffix}"))
            if others:
                raise UserError(
                    f"{path}: holds several networks, {name} and {others[0].name}; name the file"
                )
            return [path / name]
    for name in _PARTS:
        if (path / name).is_file():
            return _parts(path / name)
    raise UserError(f"{path}: a folder that holds no checkpoint: {_instead(path)}")


def _parts(index: Path) -> list[Path]:
    """The files that an index of a network in several files names."""
    data = read_json(index, "the index of the files")
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise UserError(f"{index}: no index of weights: it has no weight_map")
    names = sorted(set(places.values()))
    for name in names:
        if name != Path(name).name or not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name!r}, and there is no such file beside it")
    return [index.parent / name for name in names]


def _architecture(path: Path) -> Architecture | None:
    """What timm writes beside the weights that it pushes to Hugging Face's hub."""
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json", "the network's configuration")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return None
    args = {key: value for key, value in _dict(config, "model_args").items() if value is not None}
    classes = args.pop("num_classes", config.get("num_classes"))
    size = _dict(config, "pretrained_cfg").get("input_size")
    if isinstance(size, list) and size[:1] == [args.get("in_chans")]:
        del args["in_chans"]
    found = {"name": f"timm:{config['architecture']}", "num_classes": classes, "args": args}
    return Architecture.from_dict(found, source=str(path / "config.json"))


def _dict(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _instead(path: Path) -> str:
    """What a folder holds in place of a checkpoint, and what to do."""
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "it is one of torch.distributed.checkpoint; make one file of it: python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    sharded = next((n for n in names if n.startswith("pytorch_model_fsdp")), None)
    if sharded is not None:
        return f"FSDP's weights in {sharded}; make one file of them: accelerate merge-weights"
    files = [name for name in names if name.endswith(_ENDINGS)]
    if files:
        return f"name a file in it ({few(files)})"
    said = "neither DeepSpeed's, Accelerate's or Hugging Face's, nor a step that training resumes"
    return f"{said} from (checkpoints/step-...)"
