"""Ranks from the variables of srun, and accelerate launch that has started too few of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpp.common.errors import UserError
from train.distributed.ranks import (
    asked_of_accelerate,
    expand_counts,
    first_node,
    meeting_place,
    port_of_step,
    settle_ranks,
)

ROOT = Path(__file__).resolve().parents[2]
RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def step(**changed: str) -> dict[str, str]:
    """What srun sets for the fourth of five tasks, on the second of three nodes."""
    return {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "localhost,gpu[07-08]",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
        **changed,
    }


def test_a_task_of_a_step_learns_its_rank() -> None:
    environment = step()
    settle_ranks(environment)
    assert {key: environment[key] for key in RANKS} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port_of_step(123456, 2)),
    }


def test_the_local_number_of_ranks_is_that_of_the_own_node() -> None:
    environment = step(SLURM_NODEID="2", SLURM_PROCID="4", SLURM_LOCALID="0")
    settle_ranks(environment)
    assert (environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("0", "1")


def test_a_step_on_one_node_stays_on_it() -> None:
    environment = step(
        SLURM_STEP_NUM_NODES="1",
        SLURM_STEP_TASKS_PER_NODE="5",
        SLURM_NODEID="0",
        SLURM_STEP_NODELIST="gpu07",
    )
    settle_ranks(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"] == "5"


@pytest.mark.parametrize(
    "environment",
    [
        step(RANK="0", WORLD_SIZE="1"),  # another launcher's, inside of the step
        step(SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1", SLURM_PROCID="0"),
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script
        {},
    ],
    ids=["launched", "one task", "batch script", "no SLURM"],
)
def test_what_is_no_task_of_several_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    settle_ranks(environment)
    assert environment == before


def test_where_ranks_meet() -> None:
    # A node's name that nobody can resolve: srun was called on the first node.
    unknown = step(SLURM_STEP_NODELIST="no-such-node[3-4].invalid")
    assert meeting_place(unknown)[0] == "10.0.0.9"
    assert meeting_place(step(MASTER_ADDR="fast", MASTER_PORT="99")) == ("fast", "99")
    del unknown["SLURM_LAUNCH_NODE_IPADDR"]
    with pytest.raises(UserError, match=r"MASTER_ADDR: no address of node no-such-node3.invalid"):
        meeting_place(unknown)


def test_steps_and_jobs_have_ports_of_their_own() -> None:
    ports = {port_of_step(job, of) for job in range(5000, 5100) for of in range(10)}
    assert len(ports) == 1000
    assert all(12000 <= port_of_step(job, 0) < 32000 for job in (1, 10**6, 2**32))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("gpu[007-009,12]-ib,login1", "gpu007-ib"),
        ("a1,b[2-3]", "a1"),
        ("r[1-2]n[03-04]", "r1n03"),
    ],
)
def test_the_first_node_of_a_list(text: str, first: str) -> None:
    assert first_node(text) == first


@pytest.mark.parametrize("text", ["", "node[", "node[1-", "[]", "a]b"])
def test_lists_of_nodes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        first_node(text)


def test_counts_per_node() -> None:
    assert expand_counts("4(x2),1") == [4, 4, 1]
    assert expand_counts("8") == [8]
    for text in ("", "4x2", "4(x2", "a", "4,,1", "-1"):
        with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
            expand_counts(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "does not fit SLURM_STEP_NUM_TASKS=5"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID=3"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x: not a number"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID=: not a number"),
    ],
)
def test_variables_that_do_not_fit_together(changed: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settle_ranks(step(**changed))


def test_what_accelerate_was_asked_for(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("num_machines: 1\nnum_processes: 4\n")
    launch = ["python", "/x/bin/accelerate", "launch"]
    assert asked_of_accelerate([*launch, "--cpu", "--num_processes", "2", "main.py"]) == 2
    assert asked_of_accelerate([*launch, "--num-processes=3", "main.py"]) == 3
    assert asked_of_accelerate([*launch, "--config_file", str(config), "main.py"]) == 4
    assert asked_of_accelerate([*launch, f"--config_file={config}", "--num_processes=1"]) == 1
    assert asked_of_accelerate([*launch, "main.py"]) == 0
    assert asked_of_accelerate(["python", "-m", "accelerate.commands.launch", "--num_processes=2"])
    assert asked_of_accelerate(["bash", "x.sh", "--num_processes", "2"]) == 0
    assert asked_of_accelerate([]) == 0


@pytest.fixture
def accelerate(tmp_path: Path):
    """Start a script by accelerate launch, on the CPU; it tells its rank."""
    script = tmp_path / "settled.py"
    script.write_text(
        "import os\n"
        "from train.distributed.ranks import settle_ranks\n"
        "from tpp.common.errors import run_command\n"
        "run_command(lambda: settle_ranks(os.environ))\n"
        "os.write(1, f\"rank {os.environ.get('RANK')}\\n\".encode())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(script)],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return launch


def test_accelerate_that_starts_one_process_of_two_is_refused(accelerate) -> None:
    done = accelerate("--cpu", "--num_processes", "2")
    assert done.returncode != 0 and "rank" not in done.stdout
    assert "was asked for 2 processes and has started one; type torchrun --nproc_per_node 2" in (
        done.stderr
    )


def test_the_configuration_for_cpus_starts_them_all(accelerate) -> None:
    done = accelerate("--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml"))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0", "rank 1"]
