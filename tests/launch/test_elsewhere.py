"""Kubernetes, SkyPilot and torchx: what their files call, and how a node's ranks end there."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_tiny_data, tiny_run

from train.config.config import load_config
from train.distributed.watchdog import EXIT_LOST
from train.main import make_parser

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "launch" / "node.sh"


def jobset() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "kubernetes" / "jobset.yaml").read_text())


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())


def calls(script: str, **variables: str) -> list[str]:
    """What a script calls at its end, its variables filled in by the shell itself."""
    script = script.replace("exec bash launch/node.sh", "printf '%s\\n'")
    script = re.sub(r"until getent.*", "", script)
    done = subprocess.run(
        ["bash", "-euc", script],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def is_a_run(words: list[str]) -> None:
    """A command of node.sh: of torchrun, with a configuration and settings that are taken."""
    launcher, layout, python, script, *options = words
    assert launcher == "torchrun" and re.fullmatch(r"\d+x\d+", layout)
    assert Path(python).name.startswith("python") and (ROOT / script).samefile(
        ROOT / "train/main.py"
    )
    arguments = make_parser().parse_args(options)
    config = load_config(ROOT / arguments.config, arguments.overrides)
    assert config.training.batch_size % math.prod(map(int, layout.split("x"))) == 0


def test_the_jobset_fits_the_run() -> None:
    spec = jobset()["spec"]
    (job,) = spec["replicatedJobs"]
    of_job = job["template"]["spec"]
    pod = of_job["template"]["spec"]
    (train,) = pod["containers"]
    variables = {one["name"]: one["value"] for one in train["env"]}
    is_a_run(words := calls(train["args"][0], JOB_COMPLETION_INDEX="1", **variables))
    nodes, gpus = map(int, words[1].split("x"))
    assert of_job["completions"] == of_job["parallelism"] == nodes
    assert train["resources"]["limits"]["nvidia.com/gpu"] == gpus
    name = jobset()["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    assert train["ports"][0]["containerPort"] == int(variables["MASTER_PORT"])
    # As on SLURM: how often it starts again, what is not tried again, how long it may take to stop.
    script = (ROOT / "launch" / "job.sh").read_text()
    assert spec["failurePolicy"]["maxRestarts"] == int(
        re.search(r"TPP_MAX_RESTARTS:-(\d+)", script)[1]
    )
    assert pod["terminationGracePeriodSeconds"] == int(
        re.search(r"--signal=B:USR1@(\d+)", script)[1]
    )
    mistake, again = map(int, re.search(r"MISTAKE=(\d+) AGAIN=(\d+)", script).groups())
    (rule,) = of_job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [mistake] and again == EXIT_LOST
    assert rule["onExitCodes"]["containerName"] == train["name"]
    assert {one["name"] for one in train["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_the_managed_job_fits_the_run() -> None:
    task = skypilot()
    variables = {
        **task["envs"],
        **{"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0"},
        **{"SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "8"},
    }
    is_a_run(words := calls(task["run"], **variables))
    assert words[1] == "1x8" and words[-1] == "output=/runs/resnet50_tpp_2.31x"
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"recover_on_exit_codes": [EXIT_LOST], "max_restarts_on_errors": 0}
    assert (ROOT / task["envs"]["REQUIREMENTS"]).is_file()
    assert set(task["file_mounts"]) == {"/data", "/runs"}


def test_torchx_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchx itself is not installed; its classes are plain ones, and so are these."""
    from types import ModuleType, SimpleNamespace

    specs = SimpleNamespace(
        macros=SimpleNamespace(rank0_env="${rank0_env}", replica_id="1"),
        RetryPolicy=SimpleNamespace(APPLICATION="application"),
        **{name: SimpleNamespace for name in ("Role", "Resource", "AppDef")},
    )
    monkeypatch.setitem(sys.modules, "torchx", module := ModuleType("torchx"))
    monkeypatch.setattr(module, "specs", specs, raising=False)
    monkeypatch.delitem(sys.modules, "launch.torchx", raising=False)
    from launch.torchx import tpp

    settings = ("data.root=/a b", "output=/runs/x")
    config = "configs/imagenet/resnet50_tpp_2.31x.yaml"
    (role,) = tpp(*settings, config=config, nodes=2).roles
    command = role.args[1].replace("$${${rank0_env}", "${RANK0")  # as torchx does
    is_a_run(words := calls(command, RANK0="host0"))
    assert words[1] == "2x8" and words[-2:] == list(settings)
    assert (role.num_replicas, role.max_retries, role.resource.gpu) == (2, 50, 8)
    monkeypatch.delitem(sys.modules, "launch.torchx")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = tiny_run(make_tiny_data(folder / "data"), folder / "out")
    settings["stages"]["regularize"]["epochs"] = 4000  # longer than anybody waits
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        ["bash", str(NODE), *words],
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_containers_sigterm_is_a_checkpoint_and_code_75(config: Path) -> None:
    """Sent to node.sh alone, as to a container's first process; torchrun never sees it."""
    run = start(
        *("torchrun", "1x2", sys.executable, str(ROOT / "train" / "main.py")),
        *("--config", str(config)),
        **{"TPP_NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"},
    )
    try:
        log = config.parent / "out" / "log.jsonl"
        until = time.monotonic() + 120
        while not (log.exists() and '"regularize"' in log.read_text()):
            assert run.poll() is None and time.monotonic() < until, run.communicate()[0]
            time.sleep(0.2)
        os.kill(run.pid, signal.SIGTERM)
        said = run.communicate(timeout=60)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == EXIT_LOST, said
    assert "SIGTERM" in said and "SignalException" not in said
    assert [*(config.parent / "out" / "regularize" / "checkpoints").iterdir()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "LAUNCHER is missing"),
        ("torchrun", "RANKS_OF_EACH_NODE is missing"),
        ("torchrun 2x8", "PYTHON is missing"),
        ("torchrun 2x8 python", "SCRIPT is missing"),
        ("foo 2 python x", "foo: none of torchrun, accelerate, deepspeed"),
        ("torchrun 2y8 python x", "2y8: neither ranks of each node"),
        ("torchrun x8 python x", "x8: neither ranks of each node"),
        ("torchrun 0x8 python x", "0x8: neither ranks of each node"),
        ("torchrun 8,,4 python x", "8,,4: neither ranks of each node"),
        ("torchrun 8,0 python x", "8,0: neither ranks of each node"),
    ],
)
def test_a_node_that_is_called_wrongly(words: str, said: str) -> None:
    """1, as bash ends where it fails itself, would be tried again by Kubernetes."""
    place = {"TPP_NODE_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    run = start(*words.split(), **place)
    error = run.communicate(timeout=30)[0]
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert run.returncode == 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TPP_NODE_RANK": "2"}, "TPP_NODE_RANK='2': not one of 2 node(s), from 0 on"),
        ({}, "TPP_NODE_RANK='': not one of 2 node(s), from 0 on"),
        ({"TPP_NODE_RANK": "1", "MASTER_PORT": "1"}, "MASTER_ADDR and MASTER_PORT have to say"),
    ],
)
def test_a_node_that_does_not_know_its_place(variables: dict[str, str], said: str) -> None:
    run = start("torchrun", "2x8", "python", "train/main.py", **variables)
    assert said in run.communicate(timeout=30)[0] and run.returncode == 2
