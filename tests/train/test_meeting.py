"""Ranks that do not come: one line within training.rank_timeout, and a signal ends the others."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from fork_server import BARE, Fork, rank_environments

from tpp.common.errors import UserError
from train.distributed.ranks import settle_ranks
from train.distributed.watchdog import EXIT_LOST

MAIN = Path(__file__).resolve().parents[2] / "train" / "main.py"
# What srun sets for the only process of a shell from `srun --ntasks=4 --pty bash`.
SHELL = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_STEP_NODELIST": "localhost",
}
Start = Callable[..., Fork]


@pytest.fixture
def start(forks, tiny_config, tmp_path: Path) -> Iterator[Start]:
    """Start train/main.py as a rank; what is started is killed in the end."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    begun: list[Fork] = []

    def begin(environment: dict[str, str], timeout: float) -> Fork:
        arguments = ["--config", str(path), f"training.rank_timeout={timeout}"]
        begun.append(forks.start(MAIN, arguments, tmp_path, {**os.environ, **BARE, **environment}))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait(20)


def said(*processes: Fork) -> str:
    return "".join("".join(process.output()) for process in processes)


def accepted(listener: socket.socket) -> socket.socket:
    listener.settimeout(60)
    return listener.accept()[0]


def test_those_that_have_come_are_counted_and_the_others_named(start):
    """A rank that dies in its imports is one that does not come."""
    told = rank_environments(4)
    came = [start(told[rank], 3) for rank in (0, 1, 3)]
    assert [process.wait(60) for process in came] == [EXIT_LOST] * 3
    (line,) = said(*came).splitlines()
    assert line.startswith("3 of 4 ranks have come within 3 s (training.rank_timeout), missing: 2;")
    assert "see their output" in line


def test_without_rank_0_the_first_rank_of_a_node_says_so(start):
    told = rank_environments(3)
    came = [start({**told[rank], "LOCAL_RANK": str(rank - 1)}, 1.5) for rank in (1, 2)]
    assert [process.wait(60) for process in came] == [EXIT_LOST] * 2
    (line,) = said(*came).splitlines()
    place = f"127.0.0.1:{told[0]['MASTER_PORT']}"
    assert line.startswith(f"rank 1 on {socket.gethostname()} has not met rank 0 at {place} within")


def test_a_shell_of_srun_is_told_what_it_is(start):
    alone = start({**SHELL, "SLURM_PTY_PORT": "4711"}, 1)
    assert alone.wait(60) == EXIT_LOST
    (line,) = said(alone).splitlines()
    assert line.startswith("1 of 4 ranks has come within 1 s (training.rank_timeout), missing: 1,")
    assert line.endswith("torchrun, or unset SLURM_STEP_NUM_TASKS for a single one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_wait(start, number):
    told = rank_environments(2)
    waiting = start(told[0], 600)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until it is where the other one would come
        try:
            socket.create_connection(("127.0.0.1", int(told[0]["MASTER_PORT"]))).close()
            break
        except OSError:
            time.sleep(0.05)
    waiting.kill(number)
    assert waiting.wait(20) == -number


def test_a_signal_ends_a_rank_that_somebody_else_keeps_waiting(start):
    """At the ranks' port is a program that is none of them, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = {**rank_environments(2)[1], "MASTER_PORT": str(listener.getsockname()[1])}
        waiting, impatient = start(other, 600), start(other, 2)
        with accepted(listener), accepted(listener):
            waiting.kill(signal.SIGTERM)
            assert waiting.wait(20) == -signal.SIGTERM
            assert impatient.wait(60) == EXIT_LOST
    assert "rank 1 on" in said(impatient) and "has not met rank 0" in said(impatient)
    assert "Traceback" not in said(impatient)


def test_a_port_that_is_taken_is_named(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        first = start({**rank_environments(2)[0], "MASTER_PORT": port}, 600)
        assert first.wait(60) == 2
    (line,) = said(first).splitlines()
    assert line.startswith(f"error: MASTER_PORT={port}: ") and "in use" in line


def test_a_host_that_nobody_knows_is_named(start):
    """Also by a rank that is alone in that: another node's name service may be at fault."""
    told = {"MASTER_ADDR": "nowhere.invalid", "LOCAL_WORLD_SIZE": "1"}
    ranks = [start({**mine, **told, "LOCAL_RANK": "0"}, 600) for mine in rank_environments(2)]
    assert [process.wait(60) for process in ranks] == [2, 2]
    for rank, process in enumerate(ranks):
        (line,) = said(process).splitlines()
        who = f"rank {rank} on {socket.gethostname()}: " if rank else ""
        assert line.startswith(f"error: {who}MASTER_ADDR=nowhere.invalid: ")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set and RANK is not"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "LOCAL_RANK is not set, but RANK=1",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"},
            "MASTER_PORT is not set",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
            | {"MASTER_PORT": "tcp://1"},
            "MASTER_PORT=tcp://1: not a number",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2: mpi"),
        ({"PMI_SIZE": "8"}, "PMI_SIZE=8: mpirun does not say where the ranks meet"),
    ],
)
def test_half_of_what_a_launcher_sets_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(UserError) as caught:
        settle_ranks(environment)
    assert message in str(caught.value) and "torchrun" in str(caught.value)


def test_one_process_may_be_told_that_it_is_one():
    for environment in (
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"PMI_SIZE": "1"},
    ):
        before = dict(environment)
        settle_ranks(environment)
        assert environment == before
