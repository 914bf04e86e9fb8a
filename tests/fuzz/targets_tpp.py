"""The parsers of tpp/: plans, checkpoints of every kind, and what a checkpoint says of itself."""

import contextlib
import functools
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.fuzz.harness import Target, whole
from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import save_model
from tpp.checkpoints.sources import load_weights, name_optimizer_state, read_source
from tpp.checkpoints.training_state import TrainingState, write_state
from tpp.describe import print_description
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.selection import select_filters


def tiny_network() -> nn.Module:
    """Seven linear layers, 2x2 images in, 65 parameters or so."""
    torch.manual_seed(0)
    return build_model("mlp7_linear", 2, width=3, image_size=2)


def optimizer_state(model: nn.Module) -> dict[str, Any]:
    """The state of SGD with momentum after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 1, 2, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


# Plans


def _plan_seeds(folder: Path) -> list[bytes]:
    path = folder / "plan.json"
    model = build_model("cifar_resnet8", 10)
    select_filters(model, {"layer*.conv1": 0.2}).save(path)
    PruningPlan({"a": 3, "b": 2}, {"a": [0, 2], "b": []}).save(folder / "small.json")
    return [path.read_bytes(), (folder / "small.json").read_bytes()]


def _parse_plan(folder: Path, data: bytes) -> None:
    path = folder / "plan.json"
    path.write_bytes(data)
    plan = PruningPlan.load(path)
    for layer in plan.active_layers:
        assert len(plan.kept(layer)) + len(plan.pruned[layer]) == plan.filters[layer]
    plan.save(path)
    assert PruningPlan.load(path) == plan


# Safetensors


def _safetensors_header(data: bytes) -> tuple[int, int] | None:
    """Where the header lies, whatever its length field says."""
    with contextlib.suppress(ValueError, RecursionError):
        text = data[8:].decode("latin-1")
        _, stop = json.JSONDecoder().raw_decode(text)
        return 8, 8 + stop
    return None


def _repair_safetensors(data: bytes) -> bytes:
    """Say the header's true length, and the tensors' true hashes in the metadata of ours."""
    span = _safetensors_header(data)
    if span is None:
        return data
    header, rest = data[8 : span[1]], data[span[1] :]
    spaces = len(rest) - len(rest.lstrip(b" "))
    header, rest = header + rest[:spaces], rest[spaces:]
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        tensors = json.loads(header)
        said = json.loads(tensors.pop("__metadata__")["tpp-checkpoint"])["sha256"]
        for name, old in said.items():
            start, stop = tensors[name]["data_offsets"]
            new = hashlib.sha256(rest[start:stop]).hexdigest()
            if len(old) == len(new):
                header = header.replace(old.encode(), new.encode())
    return struct.pack("<Q", len(header)) + header + rest


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    dense, pruned, path = tiny_network(), build_model("cifar_resnet8", 3), folder / "x.safetensors"
    momentum = {name: torch.ones_like(p) for name, p in dense.named_parameters()}
    extra = {"classes": ["a", "b"], "accuracy": {"top1": 12.5}}
    preprocessing = {"image_size": 2, "resize": None, "mean": [0.5], "std": [0.5], "channels": 1}
    seeds = []
    save_model(
        path,
        dense,
        preprocessing=preprocessing,
        extra=extra,
        companions={"optimizer.momentum_buffer": momentum, "ema": dense.state_dict()},
    )
    seeds.append(path.read_bytes())
    plan = select_filters(pruned, {"layer*.conv1": 0.9})
    save_model(path, prune_model(pruned, plan))
    seeds.append(path.read_bytes())
    return seeds


def _parse_checkpoint(folder: Path, data: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    source = read_source(path)
    if source.info is None:
        load_weights(tiny_network(), path)
        return
    from tpp.checkpoints.model_file import load_model

    load_model(path)
    output = io.StringIO()
    print_description(str(path), Console(file=output, width=120))
    lines = output.getvalue().split("\n")
    assert all(line.isprintable() for line in lines), "escape codes in what is printed"


def _safetensors_seeds(folder: Path) -> list[bytes]:
    tensors = {f"module.{name}": t for name, t in tiny_network().state_dict().items()}
    save_file(tensors, folder / "x.safetensors", metadata={"format": "pt"})
    return [(folder / "x.safetensors").read_bytes()]


# Files of torch.save


def _repair_zip(data: bytes) -> bytes:
    """Put the true checksums into the entries of a zip archive."""
    fixed = bytearray(data)
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        directory = archive.start_dir
        for entry in archive.infolist():
            local = entry.header_offset
            name, more = struct.unpack("<HH", data[local + 26 : local + 30])
            start = local + 30 + name + more
            crc = struct.pack("<I", zlib.crc32(data[start : start + entry.compress_size]))
            lengths = struct.unpack("<HHH", data[directory + 28 : directory + 34])
            fixed[directory + 16 : directory + 20] = crc
            if data[local + 14 : local + 18] != bytes(4):  # else it stands behind the entry
                fixed[local + 14 : local + 18] = crc
            directory += 46 + sum(lengths)
    return bytes(fixed)


def _saved(data: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _training_script() -> dict[str, Any]:
    """What a training script writes."""
    model = tiny_network()
    return {
        "epoch": 3,
        "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
        "model_ema": {"n_averaged": torch.tensor(3), **model.state_dict()},
        "optimizer": optimizer_state(model),
    }


def _torch_seeds(folder: Path) -> list[bytes]:
    return [_saved(tiny_network().state_dict()), _saved(_training_script())]


def _legacy_seeds(folder: Path) -> list[bytes]:
    return [
        _saved(tiny_network().state_dict(), legacy=True),
        _saved(_training_script(), legacy=True),
    ]


def _parse_torch(folder: Path, data: bytes) -> None:
    path = folder / "model.pth"
    path.write_bytes(data)
    _use(path)


def _use(path: Path) -> None:
    """All that becomes of a foreign checkpoint before it is pruned."""
    source, model = read_source(path), tiny_network()
    if source.optimizer is not None:
        name_optimizer_state(source.optimizer, model)
    load_weights(model, path)
    for companion in source.companions.values():
        for tensor in companion.values():
            tensor.sum()


# DeepSpeed's folders, without DeepSpeed

_MODEL = "mp_rank_00_model_states.pt"
_ZERO_2, _ZERO_3 = "zero_pp_rank_{}_mp_rank_00_optim_states.pt", "zero_pp_rank_{}_mp_rank_00_"


def _deepspeed_zero0() -> dict[str, bytes]:
    model = tiny_network()
    state = optimizer_state(model)
    data = {"module": model.state_dict(), "buffer_names": [], "optimizer": state}
    return {_MODEL: _saved({**data, "global_steps": 1, "dp_world_size": 1, "mp_world_size": 1})}


def _deepspeed_zero2() -> dict[str, bytes]:
    model = tiny_network()
    shapes = OrderedDict((name, p.shape) for name, p in model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    data = {"module": model.state_dict(), "buffer_names": [], "param_shapes": [shapes]}
    files = {_MODEL: _saved({**data, "global_steps": 1, "dp_world_size": 2, "mp_world_size": 1})}
    for rank, part in enumerate(_halves(flat)):
        state = {
            "zero_stage": 2,
            "partition_count": [2],
            "single_partition_of_fp32_groups": [part],
            "base_optimizer_state": {"state": {0: {"momentum_buffer": part.clone(), "step": 3}}},
        }
        files[_ZERO_2.format(rank)] = _saved({"optimizer_state_dict": state})
    return files


def _deepspeed_zero3() -> dict[str, bytes]:
    model = tiny_network()
    shapes = OrderedDict((name, p.shape) for name, p in model.named_parameters())
    parts = [_halves(p.detach().reshape(-1)) for p in model.parameters()]
    empty = {name: torch.empty(0) for name in shapes}
    files = {}
    for rank in range(2):
        data = {"module": empty, "buffer_names": [], "param_shapes": [shapes]}
        data |= {"frozen_param_shapes": {}, "frozen_param_fragments": {}}
        name = _ZERO_3.format(rank)
        files[f"{name}model_states.pt"] = _saved({**data, "dp_world_size": 2, "global_steps": 1})
        flat = torch.cat([part[rank] for part in parts])
        state = {
            "zero_stage": 3,
            "partition_count": 2,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": {0: {"exp_avg": flat.clone(), "step": 3}}},
        }
        files[f"{name}optim_states.pt"] = _saved({"optimizer_state_dict": state})
    return files


def _halves(flat: Tensor) -> list[Tensor]:
    half = -(-flat.numel() // 2)
    padded = torch.cat([flat, torch.zeros(2 * half - flat.numel())])
    return [padded[:half].clone(), padded[half:].clone()]


def _deepspeed(make: Callable[[], dict[str, bytes]]) -> Target:
    """A folder of which one file is mutated: an input is the file's name, a newline, its bytes."""
    files = functools.cache(lambda: {"latest": b"global_step1\n", **make()})

    def seeds(folder: Path) -> list[bytes]:
        return [name.encode() + b"\n" + content for name, content in files().items()]

    def parse(folder: Path, data: bytes) -> None:
        head, _, content = data.partition(b"\n")
        names = list(files())
        known = head.decode("latin-1")
        name = known if known in names else names[len(head) % len(names)]
        step = folder / "global_step1"
        step.mkdir()
        for other, valid in files().items():
            where = folder if other == "latest" else step
            (where / other).write_bytes(content if other == name else valid)
        _use(folder)

    def repair(data: bytes) -> bytes:
        head, newline, content = data.partition(b"\n")
        return head + newline + _repair_zip(content)

    tokens = (b"/etc", b"..", b"\0", b"\x1b[31m", *PICKLE_TOKENS)
    return Target(make.__name__.lstrip("_"), seeds, parse, repair=repair, tokens=tokens)


# Opcodes of pickle, alone and as a call of something that the reader has to refuse.
PICKLE_TOKENS = (
    *(b"(", b".", b"0", b"2", b"N", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"]", b"}", b")"),
    *(b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q", b"u", b"s", b"e", b"h\0", b"q\0", b"\x81"),
    *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G\x7f\xf0" + bytes(6), b"X\x03\0\0\0../"),
    b"cos\nsystem\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch\nfloat8_e4m3fn\n",
)


# Folders that a training stage resumes from


def _state_seeds(folder: Path) -> list[bytes]:
    return [(_write_state(folder) / "state.json").read_bytes()]


def _write_state(folder: Path) -> Path:
    torch.manual_seed(0)
    network = build_model("cifar_resnet8", 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    architecture = {"name": "cifar_resnet8", "num_classes": 4, "args": {}}
    extra = {"method": {"step": 3}, "start": None, "settings": {"seed": 0}}
    path = folder / "step-00000003"
    state = TrainingState(3, network.state_dict(), optimizer.state_dict(), extra, architecture)
    write_state(path, state)
    return path


def _parse_state(folder: Path, data: bytes) -> None:
    """The mutated state.json with hashes that fit, as somebody who means harm would have them."""
    path = _write_state(folder)
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": digest}
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    source = read_source(path)
    if source.optimizer is not None:
        name_optimizer_state(source.optimizer, build_model("cifar_resnet8", 4))


PLAN = Target("plan", _plan_seeds, _parse_plan, json_inside=whole)
CHECKPOINT = Target(
    "checkpoint",
    _checkpoint_seeds,
    _parse_checkpoint,
    json_inside=_safetensors_header,
    repair=_repair_safetensors,
)
SAFETENSORS = Target(
    "safetensors",
    _safetensors_seeds,
    _parse_checkpoint,
    json_inside=_safetensors_header,
    repair=_repair_safetensors,
    tokens=(b"F64", b"BF16", b"F8_E4M3", b"BOOL", b"I64", b"U16", b"C64"),
)
TORCH = Target("torch", _torch_seeds, _parse_torch, repair=_repair_zip, tokens=PICKLE_TOKENS)
LEGACY = Target("torch_legacy", _legacy_seeds, _parse_torch, tokens=PICKLE_TOKENS)
STATE = Target("training_state", _state_seeds, _parse_state, json_inside=whole)
TARGETS = [
    *(PLAN, CHECKPOINT, SAFETENSORS, TORCH, LEGACY, STATE),
    *map(_deepspeed, (_deepspeed_zero0, _deepspeed_zero2, _deepspeed_zero3)),
]
