"""slurm/*.sh on a real scheduler: two nodes, stopped, preempted, requeued, and with a node lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny_run import make_tiny_data, tiny_run

from launch.check import main
from tpp.common.errors import run_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "resnet50_tpp.sh"
VARIABLES = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TPP_SETTLED_AFTER": "0"}
# One rank on each node; node2 has a second GPU.
TWO = ("--nodes=2", "--gpus-per-node=1")


@dataclass
class Site:
    """A folder of configuration and data, with a space in its path, and the cluster."""

    slurm: Any
    folder: Path

    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "tiny.yaml").read_text())

    def submit(
        self, run: str, *options: str, settings: tuple[str, ...] = (), **variables: str
    ) -> str:
        """Submit the shipped script for tiny data; ``run`` is the folder of the run."""
        overrides = ("--config", "tiny.yaml", f"output={self.folder / run}", *settings)
        return self.slurm.submit(
            *options, SCRIPT, *overrides, cwd=self.folder, **{**VARIABLES, **variables}
        )

    def log(self, job: str) -> str:
        found = list(self.folder.glob(f"*-{job}.log"))
        return found[0].read_text() if found else ""

    def bash(self, script: Path, *arguments: str, **variables: str) -> Any:
        return subprocess.run(
            ["bash", str(script), *arguments],
            cwd=self.folder,
            env={**self.slurm.environment, **VARIABLES, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def wait_for(self, job: str, *states: str, seconds: float = 400) -> None:
        self.slurm.wait_until(
            f"{' or '.join(states)} of job {job}; its log:\n{self.log(job)}",
            lambda: self.slurm.jobs().get(job) in states,
            seconds,
        )

    def wait_for_checkpoint(self, run: str, job: str) -> None:
        """Wait until the regularised stage has a checkpoint."""
        folder = self.folder / run / "regularize"
        there = (folder / "checkpoints").glob
        ended = ("FAILED", "COMPLETED")
        self.slurm.wait_until(
            f"checkpoint of {run}",
            lambda: any(there("step-*")) or self.slurm.jobs().get(job) in ended,
            300,
        )
        assert any(there("step-*")), self.log(job)
        assert not (folder / "done.json").exists(), "too late to disturb"

    def weights(self, run: str) -> dict[str, Any]:
        return load_file(self.folder / run / "finetune" / "model.safetensors")

    def assert_as_undisturbed(self, run: str) -> None:
        one, other = self.weights("undisturbed"), self.weights(run)
        assert one.keys() == other.keys()
        assert [key for key in one if not one[key].equal(other[key])] == []


@pytest.fixture(scope="module")
def site(slurm, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("a site")
    config = tiny_run(make_tiny_data(folder / "tiny data"), folder / "unused")
    config["training"] |= {"sync_batchnorm": True, "rank_timeout": 8, "evaluate_every": 100}
    config["method"]["stabilize_steps"] = 40  # long enough to be hit in the middle
    del config["stages"]["dense"]
    for stage in ("regularize", "finetune"):  # so that one process can be compared with two
        config["stages"][stage]["optimizer"]["lr"] = 0.002
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Site(slurm, folder)


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> str:
    """The job of a run on two nodes that nothing happened to."""
    job = site.submit("undisturbed", *TWO)
    site.wait_for(job, "COMPLETED", "FAILED")
    assert site.slurm.jobs()[job] == "COMPLETED", site.log(job)
    return job


def test_two_nodes_give_what_one_process_gives(site: Site, undisturbed: str) -> None:
    assert f"job {undisturbed}: 2 rank(s) on 2 node(s) by srun: node1:1 node2:1" in site.log(
        undisturbed
    )
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--config", "tiny.yaml"]
    environment = {**os.environ, **VARIABLES, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [*command, "output=alone"], cwd=site.folder, env=environment, check=True, timeout=400
    )
    two, one = (
        json.loads((site.folder / run / "results.json").read_text())
        for run in ("undisturbed", "alone")
    )
    assert (two["status"], two["ranks"], one["ranks"]) == ("finished", 2, 1)
    assert list(two["stages"]) == ["regularize", "prune", "finetune", "evaluate"]
    for name, stage in two["stages"].items():
        for key in ("kind", "steps", "parameters", "macs"):
            assert stage[key] == one["stages"][name][key]
        assert stage["loss"] == pytest.approx(one["stages"][name]["loss"], rel=1e-2)


def test_the_chain_runs_to_the_report(site: Site, undisturbed: str) -> None:
    chain = ROOT / "launch" / "submit_chain"
    overrides = ("--config", "tiny.yaml", f"output={site.folder / 'chain'}")
    done = site.bash(chain, *TWO, *overrides, TPP_LAUNCHER="deepspeed")
    assert done.returncode == 0, done.stderr
    names, jobs = zip(*(line.split(": job ") for line in done.stdout.splitlines()), strict=True)
    assert names == ("regularize", "prune", "finetune", "evaluate")
    shown = [site.slurm.command("scontrol", "show", "job", job) for job in jobs]
    assert "Dependency=(null)" in shown[0] and "NumNodes=2" in shown[0]
    assert f"Dependency=afterok:{jobs[0]}" in shown[1] and "NumNodes=1-1 NumCPUs=1 " in shown[1]
    assert f"Dependency=afterok:{jobs[1]}" in shown[2] and "NumNodes=2" in shown[2]
    assert f"Dependency=afterok:{jobs[2]}" in shown[3] and "gpu:1" in shown[3]
    site.wait_for(jobs[-1], "COMPLETED", "FAILED", "CANCELLED")
    logs = [site.log(job) for job in jobs]
    assert site.slurm.jobs()[jobs[-1]] == "COMPLETED", "\n".join(logs)
    assert "2 rank(s) on 2 node(s) by deepspeed" in logs[0] and "1 rank(s) on 1 node(s)" in logs[1]
    assert "finetune:" not in logs[1] and "prune: done before, skipped" in logs[2]
    site.assert_as_undisturbed("chain")
    results = json.loads((site.folder / "chain" / "results.json").read_text())
    assert results["status"] == "finished" and results["stages"]["evaluate"]["top1"] is not None
    assert (site.folder / "chain" / "report.html").exists()


def stopped_before_the_limit(site: Site, job: str) -> None:
    site.slurm.command("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@180 does


def requeued(site: Site, job: str) -> None:
    site.slurm.command("scontrol", "requeue", job)


def preempted(site: Site, job: str) -> None:
    urgent = site.slurm.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", cwd=site.folder
    )
    site.wait_for(urgent, "COMPLETED")


def node_lost(site: Site, job: str) -> None:
    site.slurm.kill_node("node2")


@pytest.mark.parametrize(
    ("disturb", "launcher", "said"),
    [
        (stopped_before_the_limit, "srun", "stopped by SIGUSR1"),
        (requeued, "torchrun", "stopped by SIG"),
        # SLURM's SIGTERM reaches the ranks, and so does the SIGUSR1 that the script makes of it.
        (preempted, "accelerate", "stopped by SIG"),
        (node_lost, "srun", "has given no sign of life for 8 s"),
    ],
    ids=["limit", "requeued", "preempted", "node"],
)
def test_a_disturbed_run_ends_with_the_same_weights(
    site: Site, undisturbed: str, disturb: Callable[[Site, str], None], launcher: str, said: str
) -> None:
    """All launchers end in the same run: the undisturbed one was started by srun."""
    run = disturb.__name__
    job = site.submit(run, *TWO, TPP_LAUNCHER=launcher)
    site.wait_for_checkpoint(run, job)
    disturb(site, job)
    site.wait_for(job, "PENDING", "FAILED", "COMPLETED", seconds=200)
    first = site.log(job)
    assert site.slurm.jobs()[job] == "PENDING", first
    assert said in first, first
    if disturb is node_lost:
        site.slurm.start_node("node2")
    site.slurm.release(job)
    site.wait_for(job, "COMPLETED", "FAILED")
    second = site.log(job)[len(first) :]
    assert f"by {launcher}: node1:1 node2:1 (restart 1)" in second
    assert "regularize: resumed after" in second, second
    site.assert_as_undisturbed(run)


def test_a_second_job_on_the_same_folder_is_refused(site: Site) -> None:
    # Without exclusive nodes both run at once.
    sizes = ("--nodes=1", "--gpus-per-node=1", "--oversubscribe", "--cpus-per-task=1")
    # Long enough to be there still when the second one comes; it is cancelled in the end.
    endless = ("method.stabilize_steps=100000",)
    first = site.submit("contested", *sizes, settings=endless)
    site.wait_for_checkpoint("contested", first)
    second = site.submit("contested", *sizes, settings=endless)
    early = site.bash(SCRIPT, "--config", "tiny.yaml", f"output={site.folder / 'contested'}")
    assert early.returncode == 2 and f"SLURM job {first}, since" in early.stderr
    site.wait_for(second, "FAILED", "COMPLETED")
    log = site.log(second)
    assert site.slurm.jobs()[second] == "FAILED"
    assert "another run has this folder" in log and f"SLURM job {first}, since" in log
    assert "Traceback" not in log
    # A cancelled job stays cancelled.
    site.slurm.command("scancel", first)
    site.wait_for(first, "CANCELLED", "PENDING")
    assert site.slurm.jobs()[first] == "CANCELLED"
    assert "is requeued" not in site.log(first)


def test_mistakes_are_told_before_the_queue(site: Site) -> None:
    before = site.slurm.jobs()
    for arguments, said in [
        (("--partition=nope",), "there is no partition 'nope' here; there are all, urgent"),
        (("--until", "nothing"), "--until: there is no stage 'nothing'; there are regularize"),
        (("word",), "word: neither a setting (key.sub=value) nor an option"),
    ]:
        done = site.bash(SCRIPT, "--config", "tiny.yaml", *arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert said in done.stderr and done.stderr.count("\n") == 1
    assert set(site.slurm.jobs()) <= set(before), "something was submitted"


def test_the_check_before_the_queue_asks_the_scheduler(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """launch.check as the scripts call it, see the test above; here it needs no imports."""
    monkeypatch.chdir(site.folder)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, site.slurm.environment[name])
    nowhere = site.folder / "nowhere"
    for options, settings, said in [
        (("--nodes=5",), (), "--nodes: 5 nodes are asked for, partition 'all' has 2"),
        (("--gpus=3",), ("training.batch_size=256",), "256 is not divisible by 3 rank(s)"),
        ((), (f"data.root={nowhere}",), f"there is no folder {nowhere}/train on this machine"),
    ]:
        command = ["check", "--config", "tiny.yaml", *settings, "--script", str(SCRIPT), "--"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_mistakes_are_told_in_the_log(site: Site) -> None:
    three = site.slurm.submit(
        "--nodes=2", SCRIPT, "--config", "tiny.yaml", "output=three", cwd=site.folder, **VARIABLES
    )
    site.wait_for(three, "FAILED", "COMPLETED")
    log = site.log(three)
    # Whole nodes, with one GPU and two of them.
    assert f"job {three}: 3 rank(s) on 2 node(s) by srun: node1:1 node2:2" in log
    assert "16 is not divisible by 3 rank(s)" in log and "Traceback" not in log
    assert not (site.folder / "three").exists() or not list((site.folder / "three").glob("*/*"))
