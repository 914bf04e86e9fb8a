"""A rank with synchronised BatchNorm; started by test_sync_batchnorm.py.

    sync_batchnorm_worker.py FOLDER NETWORK ...

Writes, per network, what rank 0 computes of its half of the images, and its buffers afterwards.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpp.models.architecture import build_model
from train.distributed.sync_batchnorm import convert_sync_batchnorm

IMAGES = 6


class Kinds(nn.Module):
    """BatchNorm of 1 and 3 dimensions, one with a momentum of 0 and one that averages all."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.volume = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm3d(3, momentum=0.0)
        self.part = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.volume(x[:, :, None, :4, :4])
        return self.line(self.part(x.flatten(1)))


def network(name: str) -> nn.Module:
    """The same on every rank, with some statistics to start from."""
    torch.manual_seed(0)
    if name == "kinds":
        return Kinds()
    built = build_model(name, 4)
    for module in built.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.p = module.drop_prob = 0.0  # drawn by each rank for itself
    return built


def images() -> Tensor:
    """Of all ranks."""
    return torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def main() -> None:
    """Two batches in training mode, then one in evaluation mode."""
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = images()[rank::ranks]
    for name in names:
        model = convert_sync_batchnorm(network(name)).train()
        model(mine)
        found = {"outputs": model(mine), "evaluated": model.eval()(mine)}
        if rank == 0:
            found |= {f"buffer {key}": value for key, value in model.named_buffers()}
            torch.save(found, folder / f"{name.replace(':', '-')}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
