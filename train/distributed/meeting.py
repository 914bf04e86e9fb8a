"""The ranks of a run meet, or are told who is missing, before the process group is made.

torch would wait for a rank that does not come until the process group's timeout, half an hour or
more, and end in a traceback that names nobody.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from tpp.common.errors import UserError
from train.distributed.rendezvous import agent_hosts_store, host_store
from train.distributed.watchdog import EXIT_LOST, names_of, tell

# How often a rank looks who has come, in seconds.
_LOOK = 0.1


def meet(timeout: float) -> None:
    """Wait until all ranks have come to MASTER_ADDR and MASTER_PORT.

    To be called by every rank, before the process group is made. Where a rank does not come the
    others end with exit code 75, as where one is lost later on: rank 0 says who is missing, and
    where rank 0 itself is, the first rank of each node does.

    Args:
        timeout: seconds that rank 0 waits for the others, and they for rank 0.

    Raises:
        UserError: there is no such address, or its port is taken.
    """
    environment = os.environ
    rank, ranks = (int(environment.get(name, "1")) for name in ("RANK", "WORLD_SIZE"))
    if ranks == 1:
        return
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    place = f"{host}:{port}"
    _check_address(host)
    if rank == 0 and not agent_hosts_store():
        host_store(host, port)
    try:
        store = _connect(host, port, timeout)
        store.set(str(rank), "")
        if rank == 0:
            _call_the_roll(store, ranks, timeout, place)
        else:
            _await_rank_0(store, timeout)
    except RuntimeError:  # the store: it is not there, or no longer
        here = socket.gethostname()
        if rank == 0:
            _end(
                f"rank 0 on {here} has not reached {place}, where the ranks are to meet, within "
                f"{timeout:g} s (training.rank_timeout): see MASTER_ADDR and MASTER_PORT"
            )
        speaks = environment.get("LOCAL_RANK", "0") == "0" or rank == 1
        _end(
            f"rank {rank} on {here} has not met rank 0 at {place} within {timeout:g} s "
            "(training.rank_timeout): it was not started, has ended (see its output), or is not "
            "reached from here"
            if speaks
            else ""
        )


def _call_the_roll(store: dist.Store, ranks: int, timeout: float, place: str) -> None:
    """As rank 0: wait for all others, and tell them that all are there or that some are missing."""
    until = time.monotonic() + timeout
    missing = list(range(1, ranks))
    while missing:
        missing = [rank for rank in missing if not store.check([str(rank)])]
        if missing and time.monotonic() > until:
            store.set("missing", "")
            time.sleep(10 * _LOOK)  # for the others to see it, while the store is there
            _end(_message(missing, ranks, timeout, place))
        if missing:
            time.sleep(_LOOK)
    store.set("all", "")


def _await_rank_0(store: dist.Store, timeout: float) -> None:
    """Wait for rank 0, and for its word; quietly end with it where ranks are missing.

    Raises:
        RuntimeError: it does not come, or has gone.
    """
    store.wait(["0"], timedelta(seconds=timeout))
    until = time.monotonic() + 2 * timeout  # it may have come just now
    while not store.check(["all"]):
        if store.check(["missing"]):
            _end("")
        if time.monotonic() > until:
            raise RuntimeError("rank 0 has gone")
        time.sleep(_LOOK)


def _check_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host}: {socket.gethostname()} knows no such name "
            f"({error.strerror}); it is rank 0's host, by a name or address known to all nodes"
        ) from None


def _connect(host: str, port: int, timeout: float) -> dist.Store:
    until = time.monotonic() + timeout
    while True:  # torch would tell every attempt
        try:
            socket.create_connection((host, port), timeout).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"{host}:{port} is not reached") from error
            time.sleep(_LOOK)
    made: list[dist.TCPStore] = []

    def make() -> None:
        with contextlib.suppress(RuntimeError):
            made.append(
                dist.TCPStore(
                    *(host, port),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=timeout),
                )
            )

    # Where another program listens there, torch waits for its answer without an end.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(max(until - time.monotonic(), _LOOK))
    if not made:
        raise RuntimeError(f"{host}:{port} does not answer")
    store = made[0]
    # By mistake two jobs may meet at one place.
    job = "/".join(os.environ.get(f"SLURM_{name}_ID", "") for name in ("JOB", "STEP"))
    return dist.PrefixStore(f"meeting/{job}/{os.environ['WORLD_SIZE']}", store)


def _message(missing: list[int], ranks: int, timeout: float, place: str) -> str:
    come = ranks - len(missing)
    if "SLURM_PTY_PORT" in os.environ and come == 1:
        advice = (
            "in a shell of srun --pty one process is one task: start the ranks with torchrun, or "
            "unset SLURM_STEP_NUM_TASKS for a single one"
        )
    else:
        advice = (
            f"they were not started, ended before (see their output), or do not reach {place}; "
            "started again, the run goes on from its newest checkpoint"
        )
    return (
        f"{come} of {ranks} ranks {'has' if come == 1 else 'have'} come within {timeout:g} s "
        f"(training.rank_timeout), missing: {names_of(missing)}; {advice}"
    )


def _end(message: str) -> None:
    if message:
        with contextlib.suppress(OSError):
            tell(message)
    sys.stdout.flush()
    os._exit(EXIT_LOST)  # a thread may still wait for an answer
