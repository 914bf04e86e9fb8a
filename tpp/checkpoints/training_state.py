"""What a training stage resumes from: a folder that is whole or is known not to be.

``checkpoints/step-00001000/`` holds

- ``model.safetensors``: the network's weights and buffers; as ``ema:NAME`` their moving averages,
  where there are any,
- ``optimizer.safetensors``: the optimiser's tensors, by ``INDEX.KEY`` (``12.momentum_buffer``),
- ``state.json``: the rest of the optimiser, the architecture, and whatever the stage adds,
- ``manifest.json``: size and sha256 of these three, and a sha256 of itself.

The folder is written aside, synced, read back, and renamed. A reader opens nothing before its hash
fits: any bit flipped, any byte missing, any file too many or too few makes it a
:class:`DamagedState`. There is no pickle in it. Numbers that are not finite are written as Python's
``json`` does, as ``NaN`` and ``Infinity``.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from tpp.checkpoints.safetensors_files import storable
from tpp.common.errors import UserError, reason_of
from tpp.common.files import aside_of, forget, in_bytes, move, new_file, sync

FORMAT = "tpp-training-state"
VERSION = 2
_MODEL, _OPTIMIZER, _STATE = _FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_MANIFEST = "manifest.json"
_AVERAGE = "ema:"  # as a companion of a model file is called
_NOT_OURS = f"whole, but not as version {VERSION} writes it"
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
# Beside the tensors: what a header says of each, and the part of a block that a file leaves empty.
_BYTES_PER_TENSOR, _BYTES_PER_FILE = 128, 4096


@dataclass(frozen=True)
class TrainingState:
    """Everything that a resumed stage takes up.

    Attributes:
        step: optimiser steps done.
        model: state_dict of the unwrapped network.
        optimizer: the optimiser's state_dict.
        extra: JSON-ready rest (method, loss scaler).
        architecture: which network it is, for those who read the folder on its own.
        number: how many checkpoints the stage has written, this one included.
        score: what the best checkpoint has most of, such as top-1 in per cent; None if it was
            not measured.
        average: the moving averages of ``model``; empty where none are kept.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    extra: dict[str, Any]
    architecture: dict[str, Any] | None = None
    number: int = 0
    score: float | None = None
    average: dict[str, Tensor] = field(default_factory=dict)


class DamagedState(Exception):  # noqa: N818 (what it is, as a reader of the code meets it)
    """A checkpoint that is not whole; the message is one line: which file, and what is wrong."""


class _Part(BaseModel, extra="forbid", strict=True):
    """What is noted of a file."""

    bytes: int
    sha256: str


class _Manifest(BaseModel, extra="forbid", strict=True):
    """``manifest.json``, without its own hash."""

    format: str
    version: int
    step: int
    files: dict[str, _Part]


class _OptimizerRest(BaseModel, extra="forbid", strict=True):
    values: dict[str, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Rest(BaseModel, extra="forbid", strict=True):
    """``state.json``."""

    step: int
    number: int
    score: float | None
    architecture: dict[str, Any] | None
    optimizer: _OptimizerRest
    extra: dict[str, Any]


def state_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies below ``folder``."""
    return folder / f"step-{step:08d}"


def state_folders(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, whole or not, newest first; none if it is not there."""
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := _named(path))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found, reverse=True)]


def write_state(target: Path, state: TrainingState) -> int:
    """Write a checkpoint; it appears whole and verified, or not at all.

    The same state gives the same bytes. A checkpoint that is at ``target`` already is exchanged
    for the new one once that is whole.

    Args:
        target: the folder to make, see :func:`state_folder`. Its parent is made if need be, but
            nothing above: where a file system is gone, nothing is written in its place.
        state: tensors may be on any device.

    Returns:
        The number of bytes written.

    Raises:
        UserError: it cannot be written, or does not read back as what was meant; the message
            says why, and on a full disk how much was needed and how much is free.
        TypeError: something beside the tensors is not ready for JSON.
    """
    aside = aside_of(target)
    numbered, rest = _flatten_optimizer(state.optimizer)
    averages = {f"{_AVERAGE}{name}": tensor for name, tensor in state.average.items()}
    tensors = {_MODEL: storable({**state.model, **averages}), _OPTIMIZER: storable(numbered)}
    text = _encode(
        {
            "step": state.step,
            "number": state.number,
            "score": state.score,
            "architecture": state.architecture,
            "optimizer": rest,
            "extra": state.extra,
        }
    )
    needed = len(text) + _BYTES_PER_FILE * (1 + len(_FILES))
    for members in tensors.values():
        needed += sum(tensor.nbytes + _BYTES_PER_TENSOR for tensor in members.values())
    try:
        _make_parent(target)
        shutil.rmtree(aside, ignore_errors=True)
        if needed > shutil.disk_usage(target.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()
        manifest = _write_files(aside, state.step, tensors, text)
        _put(aside, target, manifest)
    except (OSError, SafetensorError, DamagedState) as error:
        shutil.rmtree(aside, ignore_errors=True)  # now, for what it takes is not what is free
        reason = _reason(error, needed, target.parent)
        raise UserError(f"{target}: cannot write the checkpoint: {reason}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(part.bytes for part in manifest.files.values()) + len(_encode_manifest(manifest))


def read_state(path: Path) -> TrainingState:
    """Read a checkpoint of which every byte is as it was written; tensors are on the CPU.

    Raises:
        DamagedState: it is not whole.
        UserError: another version of this program wrote it.
        OSError: the file system cannot read it now; that may pass.
    """
    parts = _read_manifest(path).files
    rest = _read_rest(path, parts)
    try:
        tensors = load(_read(path / _MODEL, parts[_MODEL]))
        numbered = load(_read(path / _OPTIMIZER, parts[_OPTIMIZER]))
        optimizer = _unflatten_optimizer(numbered, rest.optimizer)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedState(f"{path}: {_NOT_OURS} ({reason_of(error)})") from None
    averaged = [name for name in tensors if name.startswith(_AVERAGE)]
    return TrainingState(
        step=rest.step,
        model={name: tensor for name, tensor in tensors.items() if not name.startswith(_AVERAGE)},
        optimizer=optimizer,
        extra=rest.extra,
        architecture=rest.architecture,
        number=rest.number,
        score=rest.score,
        average={name.removeprefix(_AVERAGE): tensors[name] for name in averaged},
    )


def read_notes(path: Path) -> tuple[int, float | None]:
    """A checkpoint's ``number`` and ``score``, without reading its tensors.

    Raises:
        DamagedState, UserError, OSError: as :func:`read_state`, of the files that are read.
    """
    rest = _read_rest(path, _read_manifest(path).files)
    return rest.number, rest.score


def check_state(path: Path) -> int:
    """Check that every byte of a checkpoint is as it was written; returns its step.

    Raises:
        DamagedState, UserError, OSError: as :func:`read_state`.
    """
    manifest = _read_manifest(path)
    for name, part in manifest.files.items():
        with _open(path / name) as file:
            size = os.fstat(file.fileno()).st_size
            _compare(path / name, size, hashlib.file_digest(file, "sha256").hexdigest(), part)
    return manifest.step


def _named(path: Path) -> re.Match[str] | None:
    return _STEP.fullmatch(path.name)


def _encode(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode("ascii")


def _encode_manifest(manifest: _Manifest) -> bytes:
    return _with_hash(manifest.model_dump())


def _with_hash(content: Mapping[str, Any]) -> bytes:
    return _encode({**content, "sha256": hashlib.sha256(_encode(content)).hexdigest()})


def _make_parent(target: Path) -> None:
    folder = target.parent
    if not folder.is_dir():
        folder.mkdir()
        sync(folder.parent)


def _write_files(
    folder: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], text: bytes
) -> _Manifest:
    """Write, sync and read back all files of a checkpoint."""
    meant = {_STATE: _Part(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())}
    (folder / _STATE).write_bytes(text)
    for name, members in tensors.items():
        _save_tensors(folder / name, members)
        meant[name] = _meant(folder / name, members)
    manifest = _Manifest(format=FORMAT, version=VERSION, step=step, files=meant)
    raw = _encode_manifest(manifest)
    (folder / _MANIFEST).write_bytes(raw)
    for name in (*_FILES, _MANIFEST):
        sync(folder / name)
        forget(folder / name)
    sync(folder)
    if (folder / _MANIFEST).read_bytes() != raw:
        raise DamagedState(f"{_MANIFEST} is not what was written")
    check_state(folder)
    return manifest


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    mode = new_file(path)
    try:
        save_file(tensors, path)  # without Python's lock, so that training goes on
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
    path.chmod(mode)


def _meant(path: Path, tensors: Mapping[str, Tensor]) -> _Part:
    """Size and sha256 that a file of ``tensors`` is to have.

    The hash is of the tensors in memory, not of what became of them in the file. Of the header,
    which safetensors makes, what it says is compared.
    """
    with safe_open(path, "pt") as file:
        order: list[str] = file.offset_keys()
        stored = {name: file.get_tensor(name) for name in order}
    same = stored.keys() == tensors.keys() and all(
        tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        for name, tensor in stored.items()
    )
    if not same:
        raise DamagedState(f"{path.name} holds other tensors")
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as raw:
        digest.update(raw.read(size - sum(tensor.nbytes for tensor in tensors.values())))
    for name in order:
        memory: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        digest.update(memory)
    return _Part(bytes=size, sha256=digest.hexdigest())


def _put(aside: Path, target: Path, manifest: _Manifest) -> None:
    """Rename a whole checkpoint into its place; an older one there is kept until that is done."""
    raw = _encode_manifest(manifest)
    older = aside_of(target.with_name(f"{target.name}.before"))
    if os.path.lexists(target):
        shutil.rmtree(older, ignore_errors=True)
        target.rename(older)
    try:
        move(aside, target, lambda: (target / _MANIFEST).read_bytes() == raw)
    finally:
        if os.path.lexists(target):
            shutil.rmtree(older, ignore_errors=True)
        else:
            with suppress(OSError):
                older.rename(target)


def _reason(error: Exception, needed: int, folder: Path) -> str:
    if not isinstance(error, OSError):
        return f"it does not read back as what was meant: {error}"
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT and not folder.is_dir():
        return f"the folder {folder} has vanished"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = shutil.disk_usage(folder).free
            reason += f": it needs {in_bytes(needed)}, {in_bytes(free)} are free"
    return reason


def _read_manifest(path: Path) -> _Manifest:
    """The manifest of a folder in which no file is too many; one that is missing is met later."""
    place = path / _MANIFEST
    try:
        raw = _read(place)
    except DamagedState:
        _refuse_version_1(path)
        raise
    manifest = _parse_manifest(place, raw)
    named = _named(path.resolve())
    if named and int(named[1]) != manifest.step:
        raise DamagedState(f"{place}: is of step {manifest.step}, not of {named[0]}")
    for entry in path.iterdir():
        if entry.name not in (*_FILES, _MANIFEST):
            raise DamagedState(f"{entry}: not a part of the checkpoint")
    return manifest


def _parse_manifest(place: Path, raw: bytes) -> _Manifest:
    try:
        content = json.loads(raw.decode("ascii"))
        content.pop("sha256")
        whole = _with_hash(content) == raw
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedState(f"{place}: damaged: it does not fit the sha256 that it holds")
    version = content.get("version")
    # Only now, when it cannot be a flipped bit that made it a newer one.
    if content.get("format") == FORMAT and isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{place}: a training checkpoint of version {version}, this is version {VERSION}; go "
            "on with the newer program that wrote it, or delete it to resume from an older one"
        )
    try:
        manifest = _Manifest.model_validate(content)
    except ValueError:
        manifest = None
    if (
        manifest is None
        or (manifest.format, manifest.version) != (FORMAT, VERSION)
        or manifest.files.keys() != {*_FILES}
    ):
        raise DamagedState(f"{place}: {_NOT_OURS}")
    return manifest


def _refuse_version_1(path: Path) -> None:
    """Raise UserError for a checkpoint from before there were manifests."""
    place = path / _STATE
    try:
        content = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict) and content.get("version") == 1:
        raise UserError(
            f"{place}: a training checkpoint of version 1, this is version {VERSION}; finish the "
            "stage with the version of the program that began it, or delete the checkpoint"
        )


def _read_rest(path: Path, parts: Mapping[str, _Part]) -> _Rest:
    raw = _read(path / _STATE, parts[_STATE])
    try:
        return _Rest.model_validate(json.loads(raw))
    except (ValueError, RecursionError):
        raise DamagedState(f"{path / _STATE}: {_NOT_OURS}") from None


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedState(f"{path}: missing") from None
    except IsADirectoryError:
        raise DamagedState(f"{path}: a folder") from None


def _read(path: Path, part: _Part | None = None) -> bytes:
    """A file's bytes, which must be those noted: what is checked is what is used."""
    with _open(path) as file:
        data: bytes = file.read()
    if part is not None:
        _compare(path, len(data), hashlib.sha256(data).hexdigest(), part)
    return data


def _compare(path: Path, size: int, sha256: str, part: _Part) -> None:
    if size != part.bytes:
        raise DamagedState(f"{path}: damaged: it has {size} bytes instead of {part.bytes}")
    if sha256 != part.sha256:
        raise DamagedState(f"{path}: damaged: its sha256 is not the one noted")


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state_dict into tensors by ``INDEX.KEY`` and JSON-ready values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        values[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values[str(index)][key] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: Mapping[str, Tensor], rest: _OptimizerRest) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in rest.values.items()
    }
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": rest.param_groups}
