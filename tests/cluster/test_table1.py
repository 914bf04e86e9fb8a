"""slurm/table1.sh on a real scheduler: a tiny sweep as an array, with a task requeued half way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from data_pipelines.demo import generate_demo
from data_pipelines.settings import DemoData
from train.run_folder.lock import holder_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_sweep(tmp_path: Path) -> Path:
    """TPP on a ResNet-8 with two seeds."""
    data = tmp_path / "data"
    generate_demo(data, DemoData(classes=4, train_per_class=16, val_per_class=4, seed=1))
    base: dict[str, Any] = {
        "model": {"name": "cifar_resnet8"},
        "data": {
            "root": str(data),
            "loader": "torchvision",
            "augmentation": "cifar",
            "image_size": 32,
            "resize": None,
            "threads": 1,
        },
        "training": {"batch_size": 16, "evaluate_every": 100},
        "checkpoints": {"every": "1 step"},
    }
    dense = {"name": "x", "stages": {"dense": {"epochs": 1, "optimizer": {"lr": 0.05}}}}
    method = {
        "name": "tpp",
        "delta": 0.1,
        "update_interval": 1,
        "stabilize_steps": 150,  # long enough to be thrown out in the middle of it
        "zero_out_interval": 1,
    }
    stages = {
        "regularize": {"optimizer": {"lr": 0.01}},
        "prune": {},
        "finetune": {"epochs": 1, "optimizer": {"lr": 0.02}},
        "evaluate": {},
    }
    files = {
        "dense.yaml": {**base, **dense},
        "tpp.yaml": {**base, "method": method, "stages": stages},
        "sweep.yaml": {
            "name": "tiny",
            "output": "unused",
            "dense": "dense.yaml",
            "methods": {"tpp": "tpp.yaml"},
            "ratios": {"pr0.5": {"layer*.conv1": 0.5}},
            "finetuning": {"lr0.02": {}, "lr0.002": {"optimizer": {"lr": 0.002}}},
            "seeds": [0, 1],
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "sweep.yaml"


def submit(slurm, sweep: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "CONFIG": str(sweep),
        "OUTPUT": str(sweep.parent / "runs"),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **more,
    }
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / "table1.sh"), *arguments],
        cwd=sweep.parent,  # the script finds the repository by itself
        env={**slurm.environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def ids(printed: str) -> list[str]:
    return [line.rpartition("job ")[2] for line in printed.splitlines() if ": job " in line]


def jobs_of(slurm, *arrays: str) -> dict[str, str]:
    """The states of these arrays' tasks; the cluster may know of other tests' jobs."""
    return {job: state for job, state in slurm.jobs().items() if job.partition("_")[0] in arrays}


def test_a_sweep_as_an_array_with_a_task_requeued(slurm, tiny_sweep: Path) -> None:
    runs = tiny_sweep.parent / "runs"
    done = submit(slurm, tiny_sweep, "--comment=x", "training.log_every=5")
    assert done.returncode == 0, done.stderr
    dense, array = ids(done.stdout)
    assert done.stdout.startswith(f"dense network: job {dense}\nruns 1-2: job {array}\n")
    jobs = jobs_of(slurm, dense, array)
    assert set(jobs) == {f"{dense}_0", f"{array}_1", f"{array}_2"}
    assert jobs[f"{array}_1"] == jobs[f"{array}_2"] == "PENDING"
    shown = slurm.command("scontrol", "show", "job", f"{array}_1")
    assert "Comment=x" in shown and f"Dependency=afterok:{dense}_*" in shown
    assert "Requeue=1" in shown and "gpu:1" in shown

    # Both nodes work at once; one task is thrown out half way, and has to start again.
    folder = runs / "tpp_pr0.5_seed0"
    checkpoints = folder / "regularize" / "checkpoints"
    slurm.wait_until("checkpoint of task 1", lambda: any(checkpoints.glob("step-*")), 200)
    assert (runs / "dense" / "dense" / "done.json").exists(), "the array has not waited"
    slurm.command("scontrol", "requeue", f"{array}_1")
    log = runs / "logs" / f"{array}_1.log"
    slurm.wait_until("requeued task", lambda: slurm.jobs()[f"{array}_1"] == "PENDING", 60)
    assert not (folder / "regularize" / "done.json").exists()
    slurm.release(f"{array}_1")
    slurm.wait_until(
        "end", lambda: set(jobs_of(slurm, dense, array).values()) == {"COMPLETED"}, 250
    )

    text = log.read_text()
    assert text.count("run 1 (tpp_pr0.5_seed0): ") == 2, "the second attempt's log replaced it"
    assert "regularize: resumed after" in text
    for name in ("dense", "tpp_pr0.5_seed0", "tpp_pr0.5_seed1"):
        results = json.loads((runs / name / "results.json").read_text())
        assert results["status"] == "finished"
    assert {"evaluate", "evaluate_lr0.002"} < set(results["stages"])
    one, other = (
        load_file(runs / f"tpp_pr0.5_seed{seed}" / "finetune" / "model.safetensors")
        for seed in (0, 1)
    )
    assert any(not one[key].equal(other[key]) for key in one)

    again = submit(slurm, tiny_sweep)
    assert again.stdout == f"nothing to do: all runs in {runs} are done\n"


def test_runs_are_cancelled_where_the_dense_network_fails(slurm, tiny_sweep: Path) -> None:
    mistaken = submit(slurm, tiny_sweep, "training.batch_siz=8")
    assert mistaken.returncode == 2 and mistaken.stdout == ""
    assert "did you mean 'batch_size'?" in mistaken.stderr
    done = submit(slurm, tiny_sweep, f"data.root={tiny_sweep.parent / 'nowhere'}")
    dense, array = ids(done.stdout)
    ended = {f"{dense}_0": "FAILED", f"{array}_1": "CANCELLED", f"{array}_2": "CANCELLED"}
    slurm.wait_until("end", lambda: ended.items() <= slurm.jobs().items(), 150)
    log = (tiny_sweep.parent / "runs" / "logs" / f"{dense}_0.log").read_text()
    assert "nowhere" in log and "Traceback" not in log


@pytest.fixture
def sharing_sweep(tiny_sweep: Path) -> Path:
    """KernOrth + L1 at two ratios, which have the regularised stage in common."""
    sweep, run = (
        yaml.safe_load((tiny_sweep.parent / name).read_text())
        for name in ("sweep.yaml", "tpp.yaml")
    )
    run["method"] = {"name": "kernorth+l1"}
    run["stages"]["regularize"]["epochs"] = 200  # long enough to be lost in the middle of it
    run["checkpoints"]["every"] = "10 steps"
    run["model"]["num_classes"] = 4
    sweep["methods"] = {"kernorth": "kernorth.yaml"}
    sweep["ratios"]["pr0.7"] = {"layer*.conv1": 0.7}
    sweep["finetuning"], sweep["seeds"] = {"x": {}}, [0]
    for name, content in (("kernorth.yaml", run), (tiny_sweep.name, sweep)):
        (tiny_sweep.parent / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return tiny_sweep


def test_a_shared_stage_whose_job_is_lost_is_taken_over_by_one_of_the_runs(
    slurm, sharing_sweep: Path
) -> None:
    """The runs are one task, two at once on its GPU; the shared stage is another one's."""
    runs = sharing_sweep.parent / "runs"
    done = submit(slurm, sharing_sweep, JOBS="2")
    assert done.returncode == 0, done.stderr
    dense, shared, array = ids(done.stdout)
    assert "shared stages s1: job" in done.stdout and "runs 1-2: job" in done.stdout
    # The runs begin when their stage's task is lost, or they might be the ones that train it.
    slurm.command("scontrol", "hold", array)
    checkpoints = "regularize-*/regularize/checkpoints/step-*"
    slurm.wait_until("checkpoint", lambda: any((runs / "shared").glob(checkpoints)), 250)
    # It stands still until it is cancelled: a slow scheduler would come too late.
    (folder,) = (runs / "shared").iterdir()
    holder = holder_of(folder)
    assert holder is not None, "the stage has ended"
    os.kill(holder.pid, signal.SIGSTOP)
    slurm.command("scancel", f"{shared}_1")
    slurm.command("scontrol", "release", array)
    ended = {f"{dense}_0": "COMPLETED", f"{shared}_1": "CANCELLED", f"{array}_1": "COMPLETED"}
    slurm.wait_until("end", lambda: jobs_of(slurm, dense, shared, array) == ended, 250)

    text = (runs / "logs" / f"{array}_1.log").read_text()
    assert "shared s1 (regularize, of runs 1, 2): started" in text
    taken_over = runs / "logs" / f"{folder.name}.log"
    assert "regularize: resumed after" in taken_over.read_text()
    files = []
    for ratio in ("pr0.5", "pr0.7"):
        run = runs / f"kernorth_{ratio}_seed0"
        assert json.loads((run / "results.json").read_text())["status"] == "finished"
        files.append(load_file(run / "regularize" / "model.safetensors"))
    one, other = files
    assert all(one[key].equal(other[key]) for key in one)
