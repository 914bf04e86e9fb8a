"""Checkpoints of a training stage under way: what resuming needs, without any pickle.

``checkpoints/step-00001000/`` holds the weights and the optimiser's state as safetensors and the
rest as JSON. The folder is written aside, synced and renamed, so it appears whole or not at all;
``state.json`` lists every file's sha256, and a folder that does not match is passed over.
Position in the data and augmentation follow from the step alone, see ``data_pipelines.order``.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tpp.files import aside_of, sync

VERSION = 1
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class TrainingState:
    """Everything that a resumed stage takes up.

    Attributes:
        step: optimiser steps done.
        model: state_dict of the unwrapped network.
        optimizer: the optimiser's state_dict.
        extra: JSON-ready rest (method, loss scaler).
        architecture: which network it is, for those who read the folder on its own.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    extra: dict[str, Any]
    architecture: dict[str, Any] | None = None


def save_state(folder: Path, state: TrainingState, *, keep: int) -> Path:
    """Write ``state`` below ``folder`` and drop all but the ``keep`` newest; returns its path."""
    target = folder / f"step-{state.step:08d}"
    aside = aside_of(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors, optimizer = _flatten_optimizer(state.optimizer)
    model = {name: tensor.cpu().contiguous() for name, tensor in state.model.items()}
    save_file(model, aside / "model.safetensors")
    save_file(tensors, aside / "optimizer.safetensors")
    hashes = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    content = {
        "version": VERSION,
        "step": state.step,
        "architecture": state.architecture,
        "optimizer": optimizer,
        "extra": state.extra,
        "sha256": hashes,
    }
    (aside / "state.json").write_text(json.dumps(content, indent=1))
    for path in (*aside.iterdir(), aside):
        sync(path)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    sync(folder)
    for old in sorted(_steps(folder), reverse=True)[keep:]:
        shutil.rmtree(folder / f"step-{old:08d}")
    return target


def newest_state(folder: Path) -> tuple[TrainingState | None, list[str]]:
    """The newest whole checkpoint below ``folder``, and why newer ones were passed over."""
    passed_over: list[str] = []
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step:08d}"
        try:
            return _load(path), passed_over
        except (OSError, ValueError, KeyError, TypeError) as error:
            passed_over.append(f"{path}: {error}")
    return None, passed_over


def _load(path: Path) -> TrainingState:
    content = json.loads((path / "state.json").read_text())
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}, expected {VERSION}")
    for name in ("model.safetensors", "optimizer.safetensors"):
        if _sha256(path / name) != content["sha256"][name]:
            raise ValueError(f"{name} is damaged: its sha256 is not the one written down")
    tensors = load_file(path / "optimizer.safetensors")
    return TrainingState(
        step=content["step"],
        model=load_file(path / "model.safetensors"),
        optimizer=_unflatten_optimizer(tensors, content["optimizer"]),
        extra=content["extra"],
        architecture=content.get("architecture"),
    )


def _steps(folder: Path) -> Iterator[int]:
    if folder.is_dir():
        for path in folder.iterdir():
            match = _STEP.fullmatch(path.name)
            if match:
                yield int(match[1])


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state_dict into tensors by ``index.key`` and JSON-ready values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in rest["values"].items()
    }
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
