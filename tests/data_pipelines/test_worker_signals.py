"""Loader processes live through the signals that SLURM and torchrun send to all of a rank's."""

import os
import signal
import subprocess
import time
from functools import partial

from torch.utils.data import DataLoader

from data_pipelines.loading.torch_loader import _end_with, _worker_context


def test_only_the_owner_ends_a_worker() -> None:
    loader = DataLoader(
        range(4096),  # type: ignore[arg-type]
        num_workers=2,
        multiprocessing_context=_worker_context(),
        worker_init_fn=partial(_end_with, os.getpid()),
    )
    batches = iter(loader)
    for _ in range(2):  # one of each worker
        next(batches)
    workers = batches._workers  # type: ignore[attr-defined]
    for name in ("TERM", "TERM", "USR1", "TERM"):  # from another process
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(100):  # more than is read ahead
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    deadline = time.monotonic() + 60
    while workers[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers[0].exitcode in (128 + signal.SIGTERM, 255)  # the server may not know it
    assert workers[1].is_alive()
