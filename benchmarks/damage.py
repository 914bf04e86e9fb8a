"""Damages a checkpoint in every way that a disk does, and counts what is noticed.

A checkpoint of a network with momentum for every weight is written, and damaged N times in each of
its files: a random bit is flipped, or the file is cut to a random length, with every length below
64 bytes and the last 64 among them. Each time it is read as a resuming run reads it, and then
mended. What is loaded all the same is a failure: exit code 1. Results go to
benchmarks/results/damage.json.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from tpp.checkpoints.training_state import (
    DamagedState,
    TrainingState,
    read_state,
    state_folder,
    write_state,
)
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import in_bytes, write_whole
from tpp.common.options import share
from tpp.models.architecture import build_model

RESULTS = Path(__file__).parent / "results" / "damage.json"
_EDGE = 64


def write_checkpoint(folder: Path, model: str) -> Path:
    """Write a checkpoint of a network after one step of SGD with momentum."""
    torch.manual_seed(0)
    network = build_model(model, 10).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    path = state_folder(folder, 1000)
    write_state(path, TrainingState(1000, network.state_dict(), optimizer.state_dict(), {}))
    return path


def flip(content: bytes, random: Random) -> bytes:
    """The content with one bit flipped."""
    damaged = bytearray(content)
    damaged[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def lengths(size: int, count: int, random: Random) -> list[int]:
    """Lengths to cut a file of ``size`` bytes to: those near its ends, and random ones."""
    edges = {*range(min(_EDGE, size)), *range(max(size - _EDGE, 0), size)}
    return sorted(edges) + [random.randrange(size) for _ in range(count - len(edges))]


def damage(path: Path, damages: int, random: Random) -> dict[str, dict[str, int]]:
    """Damage every file of a checkpoint; returns per file what was done and how much was found."""
    found: dict[str, dict[str, int]] = {}
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        cuts = [content[:length] for length in lengths(len(content), damages, random)]
        kinds = {"flipped": [flip(content, random) for _ in range(damages)], "cut": cuts}
        counts = {"bytes": len(content)}
        for kind, damaged in kinds.items():
            counts[kind] = len(damaged)
            counts[f"{kind}_found"] = 0
            for wrong in damaged:
                file.write_bytes(wrong)
                counts[f"{kind}_found"] += _is_noticed(path)
        file.write_bytes(content)
        found[file.name] = counts
    read_state(path)  # it is whole again
    return found


def _is_noticed(path: Path) -> bool:
    try:
        read_state(path)
    except DamagedState:
        return True
    return False


def main() -> None:
    """Damage, show, and write down."""
    parser = Parser.of_script(
        "python -m benchmarks.damage",
        __doc__,
        ["--model cifar_resnet20 --damages 100 --output /tmp/damage.json"],
    )
    share(parser, "--model", default="cifar_resnet20")
    parser.add_argument(
        "--damages",
        type=int,
        default=2000,
        metavar="N",
        help="of each kind and file (default: 2000)",
    )
    share(parser, "--seed", default=0)
    share(parser, "--output", default=RESULTS)
    arguments = parser.parse_args()
    if arguments.damages < 1:
        raise UserError("--damages must be 1 or more")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), arguments.model)
        files = damage(path, arguments.damages, Random(arguments.seed))
    total: dict[str, Any] = {
        key: sum(counts[key] for counts in files.values())
        for key in ("bytes", "flipped", "flipped_found", "cut", "cut_found")
    }
    total["seconds"] = time.perf_counter() - began
    asked = {"model": arguments.model, "seed": arguments.seed}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output, json.dumps({**asked, **total, "files": files}, indent=1) + "\n")
    for name, counts in {**files, "all": total}.items():
        print(
            f"{name:<24}{in_bytes(counts['bytes']):>10}  "
            f"bits flipped {counts['flipped_found']:,} of {counts['flipped']:,} found, "
            f"files cut {counts['cut_found']:,} of {counts['cut']:,} found"
        )
    if (total["flipped_found"], total["cut_found"]) != (total["flipped"], total["cut"]):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
