"""The gradients of a stage's first step on a rank; see test_first_batch.py.

first_batch_worker.py CONFIG FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from tpp.models.architecture import build_model
from train.config.config import load_config
from train.distributed.accelerator import make_accelerator
from train.distributed.collectives import mean_over_ranks
from train.distributed.stopping import StopRequest
from train.distributed.sync_batchnorm import convert_sync_batchnorm
from train.distributed.watchdog import Watchdog
from train.preflight import preflight
from train.run import Run
from train.stages.first_batch import FirstBatch
from train.stages.sequence import open_run

STAGE = "finetune"


def opened(path: Path, accelerator: Accelerator) -> Run:
    """The run, as a stage finds it."""
    config = load_config(path)
    found = preflight(config, accelerator, [STAGE])
    unwatched = Watchdog(rank=0, world_size=1, timeout=60.0)
    return open_run(config, accelerator, found, unwatched, StopRequest())


def network() -> nn.Module:
    """The same on every rank, in evaluation mode."""
    torch.manual_seed(3)
    return build_model("cifar_resnet8", 4).eval()


def main() -> None:
    """What every rank finds."""
    torch.set_num_threads(1)
    accelerator = make_accelerator("fp32", 60.0)
    run = opened(Path(sys.argv[1]), accelerator)
    model = convert_sync_batchnorm(network())
    rank = dist.get_rank()
    gradients = FirstBatch(run, STAGE, model).gradients([*model.parameters()])
    average = mean_over_ranks(torch.tensor([float(rank), 3.0]))
    torch.save((gradients, average), Path(sys.argv[2]) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
