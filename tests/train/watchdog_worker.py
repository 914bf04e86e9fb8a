"""Ranks that sum a tensor again and again: watchdog_worker.py FOLDER [option=value ...].

Each rank leaves its pid in FOLDER/attempt-A/rank-R once it is in its stride. Options: ``timeout``
and ``stall`` of the watchdog; ``steps`` until the end, ``last_attempt`` in which alone there is
one; ``sleep`` and ``fail``, at step 10 of rank 1 or ``failing``: seconds to sleep, an error to
raise; ``linger``: seconds that rank 1 takes over its end; ``ports`` prints the addresses at which a
rank listens, ``store`` the port of the store at which the ranks meet.
"""

import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from train.distributed.rendezvous import keep_to_loopback, meet_anew_after_restart  # noqa: E402
from train.distributed.watchdog import Watchdog, group_timeout, ranks_named  # noqa: E402


def _listening() -> set[str]:
    """Local addresses of this process's listening TCP sockets, as the kernel writes them."""
    sockets = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def _steps(watchdog: Watchdog, folder: Path, options: dict[str, str]) -> None:
    rank, attempt = int(os.environ["RANK"]), folder.name.removeprefix("attempt-")
    ends = options.get("last_attempt", attempt) == attempt and "steps" in options
    for step in range(int(options["steps"])) if ends else itertools.count():
        watchdog.at(step, "data")
        if rank == int(options.get("failing", 1)) and step == 10:
            time.sleep(float(options.get("sleep", 0)))
            if "fail" in options:
                raise ValueError(options["fail"])
        watchdog.at(step, "step")
        dist.all_reduce(torch.ones(1))
        if step == 5:
            (folder / f"rank-{rank}.part").write_text(str(os.getpid()))
            (folder / f"rank-{rank}.part").rename(folder / f"rank-{rank}")
        time.sleep(0.01)


def main(folder: Path, words: Sequence[str]) -> None:
    """One rank, under torchrun or wherever the environment says which one it is."""
    options = dict(word.split("=", 1) for word in words)
    folder = folder / f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    folder.mkdir(exist_ok=True)
    timeout = float(options.get("timeout", 2))
    stall = float(options["stall"]) if "stall" in options else None
    meet_anew_after_restart()
    if "store" in options:
        print(f"{folder.name} {os.environ['MASTER_PORT']}\n", end="", flush=True)
    keep_to_loopback()
    dist.init_process_group("gloo", timeout=group_timeout(timeout))
    watchdog = Watchdog(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
        stall=stall,
    )
    with ranks_named(watchdog):
        _steps(watchdog, folder, options)
        if "ports" in options:
            print(*sorted(_listening()), flush=True)
        dist.barrier()
        if options.get("linger") and os.environ["RANK"] == "1":
            time.sleep(float(options["linger"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
