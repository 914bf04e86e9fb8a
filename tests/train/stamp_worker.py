"""The masks of a few steps on a rank of two; see test_stamp_runs.py.

stamp_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tpp.methods.base import TrainingContext
from tpp.methods.stamp import STAMP, Settings
from tpp.models.architecture import build_model
from tpp.selection.selection import Selection
from train.distributed.collectives import mean_over_ranks


def main() -> None:
    """Train on this rank's own images, and write the masks down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 4)
    method = STAMP(Settings(set_size=7, width=5, hidden=4, refresh=3, fixed=0.8))
    method.modify(model, "regularize")
    method.prepare(
        model,
        TrainingContext(
            *("regularize", None, Selection({"layer*.conv1": 0.5}), rank, dist.get_world_size()),
            torch.zeros(1, 3, 16, 16),
            total_steps=6,
            average=mean_over_ranks,
        ),
    )
    network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = []
    torch.manual_seed(100 + rank)
    for step in range(6):
        images, labels = torch.randn(6, 3, 16, 16), torch.randint(0, 4, (6,))
        method.before_step(step)
        outputs = network.train()(images)
        terms = method.batch_terms((images, labels), outputs)
        masks.append(torch.cat([gate.factor[0].detach() for gate in method._gates.values()]))
        optimizer.zero_grad()
        (F.cross_entropy(outputs, labels) + sum(terms.values())).backward()
        optimizer.step()
        method.after_step(step)
    found = {"masks": torch.stack(masks), "set": method._encoder.images, "plan": method.plan}
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
