"""What a training step keeps of its images at most, against depth: backpropagation and rec-LRA.

Plain convolutional networks on images of 32x32. Counted is every tensor whose first dimension is
the batch, activations and errors, from its first operation to its end; not the parameters, their
gradients and updates, which grow with the depth in any case, nor what an operation needs inside.
In brackets stands the time of a step, in milliseconds.
"""

import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import write_whole
from tpp.common.options import share
from tpp.methods.base import TrainingContext
from tpp.methods.rec_lra import RecLRA, Settings
from tpp.models.architecture import build_model, example_input_for
from tpp.selection.selection import Selection

RESULTS = Path(__file__).parent / "results" / "local_memory.json"
# How the columns are called, and m of each: every so-manieth layer's error is the output's.
WAYS: dict[str, int | None] = {"backprop": None, "m=2": 2, "m=4": 4, "m=0": 0}


class PeakOfBatch(TorchDispatchMode):
    """Counts the bytes of live tensors whose first dimension is the batch.

    Args:
        batch: images; no parameter may begin with as many.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self._batch, self._now, self.peak = batch, 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it gives."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and len(tensor) == self._batch:
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._known or not size:
            return
        self._now += size
        self.peak = max(self.peak, self._now)
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self._now -= size


def step_of(
    model: nn.Module, error_skip: int | None, batch: int, images: torch.Tensor | None = None
) -> Callable[[], None]:
    """A training step, without the optimiser's part, of backpropagation (None) or of rec-LRA."""
    model.train()
    method = None
    if error_skip is not None:
        method = RecLRA(Settings(error_skip=error_skip))
        method.modify(model, "dense")
        context = TrainingContext("dense", None, Selection({}), 0, 1, example_input_for(model))
        method.prepare(model, context)
    images = torch.randn(batch, 3, 32, 32) if images is None else images
    labels = torch.randint(0, model(images[:1]).shape[1], (batch,))

    def step() -> None:
        outputs = model(images)
        loss = F.cross_entropy(outputs, labels)
        if method is not None:
            loss = loss + method.batch_terms((images, labels), outputs)["discrepancy"]
        loss.backward()

    return step


def measure(depth: int, error_skip: int | None, width: int, batch: int) -> dict[str, float]:
    """Peak in MiB, and the time of a step, in milliseconds, the second best of five."""
    torch.manual_seed(0)
    model = build_model("plain_convnet", 10, depth=depth, width=width, skip=2)
    step = step_of(model, error_skip, batch)
    times = []
    for _ in range(5):
        model.zero_grad()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    model.zero_grad()
    with PeakOfBatch(batch) as counted:
        step()
    return {"mib": counted.peak / 2**20, "ms": 1000 * sorted(times)[1]}


def main() -> None:
    """Measure every depth and way, and print them as a table."""
    parser = Parser.of_script(
        "python -m benchmarks.local_memory",
        __doc__,
        ["--depths 6,10 --batch-size 8 --output /tmp/local_memory.json"],
    )
    parser.add_argument(
        "--depths",
        default="6,10,18,34",
        metavar="N,N",
        help="numbers of layers (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=16, metavar="N", help="first channels (default: 16)"
    )
    share(parser, "--batch-size", default=48)
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    arguments = parser.parse_args()
    try:
        depths = [int(depth) for depth in arguments.depths.split(",")]
    except ValueError:
        raise UserError(
            f"--depths: expected numbers such as 6,10, not {arguments.depths!r}"
        ) from None
    if arguments.batch_size in (3, 10, *(arguments.width * 2**n for n in range(4))):
        raise UserError(
            f"--batch-size: {arguments.batch_size} is a number of channels here; take another"
        )
    rows = []
    print("| layers | " + " | ".join(f"{way}, MiB (ms)" for way in WAYS) + " |")
    print("|---" * (len(WAYS) + 1) + "|")
    for depth in depths:
        found = {
            way: measure(depth, skip, arguments.width, arguments.batch_size)
            for way, skip in WAYS.items()
        }
        rows.append({"depth": depth, **found})
        cells = [f"{one['mib']:.1f} ({one['ms']:.0f})" for one in found.values()]
        print(f"| {depth} | " + " | ".join(cells) + " |", flush=True)
    figures = {"width": arguments.width, "batch": arguments.batch_size, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output, json.dumps(figures, indent=1) + "\n")
    print(f"figures: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
