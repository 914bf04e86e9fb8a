"""What writing a checkpoint costs training, beside it and in its way.

A network trains on random images, with momentum for every weight. In every round it takes some
steps alone, then a checkpoint is written while it stands still, then one while it trains on, and
what is found and read for resuming is timed too.

synchronous  seconds that training stands still for a whole write: files, syncs, reading back
stall        seconds that it stands still when the writing goes on beside it: the tensors are copied
first stall  the same for the first checkpoint of a process, which has to ask for the memory
beside       how much longer a step takes while a checkpoint is being written
resume       finding the newest checkpoint, checking its hashes, and loading it

Numbers are medians over the rounds; a ratio is that of one round. The folder decides about the
disk; without one it is the system's temporary folder. Results go to
benchmarks/results/checkpoint.json.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpp.checkpoints.training_state import TrainingState, state_folders
from tpp.common.command_line import Parser, at_least_one
from tpp.common.errors import UserError, run_command
from tpp.common.files import in_bytes, write_whole
from tpp.common.options import share
from tpp.common.paths import user_path
from tpp.measure.timing import LatencySettings, machine_of
from tpp.models.architecture import build_model
from train.config.sections import CheckpointsSection
from train.run_folder.checkpoints import CheckpointWriter, newest_state

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"

Result = dict[str, Any]


class Training:
    """A network that can take steps, and its state."""

    def __init__(self, model: str, device: str, batch: int, side: int) -> None:
        torch.manual_seed(0)
        self._device = device
        self._network = build_model(model, 1000).to(device)
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=0.01, momentum=0.9)
        self._images = torch.randn(batch, 3, side, side, device=device)
        self._labels = torch.randint(1000, (batch,), device=device)
        self._steps = 0

    def step(self) -> float:
        """Take a step; returns its seconds."""
        began = time.perf_counter()
        self._optimizer.zero_grad()
        nn.functional.cross_entropy(self._network(self._images), self._labels).backward()
        self._optimizer.step()
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._steps += 1
        return time.perf_counter() - began

    def state(self) -> TrainingState:
        """What a checkpoint holds now."""
        model, optimizer = self._network.state_dict(), self._optimizer.state_dict()
        return TrainingState(self._steps, model, optimizer, {})


def _round(
    training: Training, waiting: CheckpointWriter, beside: CheckpointWriter, steps: int
) -> Result:
    """One round: steps alone, a synchronous write, an asynchronous one with steps beside it."""
    alone = [training.step() for _ in range(steps)]
    synchronous = waiting.save(training.state())
    training.step()
    began = time.perf_counter()
    stall = beside.save(training.state())
    during = [training.step()]
    while beside.writing:
        during.append(training.step())
    writing = time.perf_counter() - began
    beside.wait()
    # The last step outlasts the write, so it counts only if there is no other.
    during = during[:-1] or during
    return {
        "step": statistics.median(alone),
        "synchronous": synchronous,
        "stall": stall,
        "written_within": writing,
        "stall_over_synchronous": stall / synchronous,
        "stall_over_step": stall / statistics.median(alone),
        "step_while_writing": statistics.median(during) / statistics.median(alone),
    }


def measure(training: Training, folder: Path, *, rounds: int, steps: int) -> Result:
    """Write checkpoints in ``folder`` both ways, ``rounds`` times, and read them back.

    Returns:
        Medians, in seconds or as ratios, and the rounds themselves.
    """
    waiting, beside = (
        CheckpointWriter(
            folder / name, CheckpointsSection(asynchronous=name == "beside"), say=print
        )
        for name in ("waiting", "beside")
    )
    training.step()
    first = beside.save(training.state())
    beside.wait()
    found = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr)
        found.append(_round(training, waiting, beside, steps))
        found[-1]["resume"] = _seconds(lambda: newest_state(folder / "beside"))
    waiting.close()
    beside.close()
    size = sum(file.stat().st_size for file in state_folders(folder / "beside")[0].iterdir())
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    return {"bytes": size, "first_stall": first, **medians, "rounds": found}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _show(found: Result) -> None:
    for name, value in (
        ("a checkpoint has", in_bytes(found["bytes"])),
        ("synchronous", f"{found['synchronous']:.3f} s"),
        ("stall", f"{1e3 * found['stall']:.1f} ms"),
        ("  of a synchronous write", f"{found['stall_over_synchronous']:.1%}"),
        ("  of a step", f"{found['stall_over_step']:.1%} of {found['step']:.3f} s"),
        ("first stall", f"{1e3 * found['first_stall']:.1f} ms"),
        ("written within", f"{found['written_within']:.3f} s"),
        ("beside: a step takes", f"{found['step_while_writing']:.2f} times as long"),
        ("resume", f"{found['resume']:.3f} s"),
    ):
        print(f"{name:<26}{value}")


def main() -> None:
    """Measure, show, and write down."""
    parser = Parser.of_script(
        "python -m benchmarks.checkpoint",
        __doc__,
        ["--model cifar_resnet8 --rounds 1 --image-size 32"],
    )
    share(parser, "--model", default="resnet50")
    share(parser, "--device", default="cpu")
    share(parser, "--batch-size", default=8)
    share(parser, "--image-size", default=96)
    share(parser, "--rounds", default=9)
    parser.add_argument(
        "--steps",
        type=at_least_one,
        default=5,
        metavar="N",
        help="alone in each round (default: 5)",
    )
    parser.add_argument(
        "--work", type=user_path, metavar="DIR", help="where to write, on the disk to measure"
    )
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    parser.renamed("--side", "--image-size")
    parser.renamed("--folder", "--work")
    arguments = parser.parse_args()
    if arguments.work is not None and not arguments.work.is_dir():
        raise UserError(f"--work {arguments.work}: no such folder")
    training = Training(
        arguments.model, arguments.device, arguments.batch_size, arguments.image_size
    )
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        found = measure(training, Path(folder), rounds=arguments.rounds, steps=arguments.steps)
    asked = {
        "model": arguments.model,
        "batch": arguments.batch_size,
        "side": arguments.image_size,
    }
    on = machine_of(LatencySettings(device=arguments.device))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output, json.dumps({**asked, **found, "on": on}, indent=1) + "\n")
    _show(found)


if __name__ == "__main__":
    run_command(main)
