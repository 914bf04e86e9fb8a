"""What launch/job.sh makes of an allocation, seen without training: TPP_PRINT=1 prints it."""

import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "resnet50_tpp.sh"
CONFIG = "configs/imagenet/resnet50_tpp_2.31x.yaml"
PRINT = {"PYTHON": sys.executable, "TPP_PRINT": "1"}


def bash(slurm, folder: Path, *command: str | Path, **variables: str):
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**slurm.environment, **PRINT, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def logs_of(slurm, folder: Path, job: str) -> list[str]:
    """The logs of a job, or of an array's tasks, when it has ended well."""

    def states() -> list[str]:
        found = slurm.jobs().items()
        return [state for name, state in found if name == job or name.startswith(f"{job}_")]

    slurm.wait_until("end of the job", lambda: not {*states()} & {"PENDING", "RUNNING"}, 90)
    slurm.wait_until("end of the job", lambda: {*states()} == {"COMPLETED"}, 20)
    return [path.read_text() for path in sorted(folder.glob("*.log"))]


@pytest.mark.parametrize("by", ["sbatch", "bash"])
def test_table_2_is_an_array_of_its_rows(slurm, tmp_path: Path, by: str) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    script, settings = ROOT / "slurm" / "table2.sh", ("data.root=/far away/imagenet", "seed=%a")
    words = ["--nodes=2", script, *settings]
    if by == "bash":  # what it calls when it has found nothing wrong
        done = bash(slurm, folder, "bash", script, "--nodes=2", *settings, TPP_DATA_ON_NODES="1")
        assert (done.returncode, done.stderr) == (0, "")
        sbatch, *words = shlex.split(done.stdout)
        assert sbatch == "sbatch"
    job = slurm.submit(*words, cwd=folder, **PRINT)
    logs = logs_of(slurm, folder, job)
    rows = ["resnet34_tpp_1.32x", *(f"resnet50_tpp_{row}x" for row in (1.49, 2.31, 2.56, 3.06))]
    called = {line for log in logs for line in log.splitlines() if line.startswith("srun ")}
    assert len(called) == len(logs) == 5
    for task, row in enumerate(rows):
        (line,) = (line for line in called if f"/{row}.yaml" in line)
        assert rf"data.root=/far\ away/imagenet seed={task} " in f"{line.rstrip()} "
        # One node has a GPU and the other two.
        assert "--ntasks=3 --distribution=arbitrary" in line


def test_an_interactive_allocation_is_used(slurm, tmp_path: Path) -> None:
    done = bash(
        slurm, tmp_path, "salloc", "--nodes=2", "--gpus-per-node=1", "--quiet",
        "bash", SCRIPT, "training.batch_size=128",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, called = done.stdout.splitlines()
    assert "2 rank(s) on 2 node(s) by srun: node1:1 node2:1" in said
    assert "--ntasks=2 --ntasks-per-node=1" in called
    assert f"train/main.py --config {ROOT}/{CONFIG} training.batch_size=128" in called


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("tpp.sif", "apptainer exec --nv --bind {root}:{root}"),
        ("tpp.sqsh", "--container-image=tpp.sqsh --container-mounts={root}:{root},"),
    ],
)
def test_a_container(slurm, tmp_path: Path, image: str, expected: str) -> None:
    job = slurm.submit(
        "--nodes=1", SCRIPT, "data.root=/data/imagenet",
        cwd=tmp_path, **PRINT, TPP_CONTAINER=image, TPP_MOUNTS="/scratch:/fast",
    )  # fmt: skip
    (log,) = logs_of(slurm, tmp_path, job)
    line = " ".join(shlex.split(log.splitlines()[-1]))
    assert expected.format(root=ROOT) in line
    assert "/data/imagenet:/data/imagenet" in line and "/scratch:/fast" in line


def test_the_site_file_and_a_wrong_one(slurm, tmp_path: Path) -> None:
    site = tmp_path / "my site.sh"
    site.write_text(': "${TPP_LAUNCHER=torchrun}"\nexport SBATCH_PARTITION=nowhere\n')
    sizes = ("--nodes=2", "--gpus-per-node=1")
    job = slurm.submit(*sizes, SCRIPT, cwd=tmp_path, **PRINT, TPP_SITE=str(site))
    (log,) = logs_of(slurm, tmp_path, job)
    assert "by torchrun: node1:1 node2:1" in log and "launch/node.sh torchrun 1\\,1" in log
    # Read before the queue where bash submits.
    refused = bash(slurm, tmp_path, "bash", SCRIPT, "data.root=/", TPP_SITE=str(site))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    site.write_text("export TPP_LAUNCHER=mpirun\n")
    wrong = bash(slurm, tmp_path, "bash", SCRIPT, TPP_SITE=str(site))
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "error: TPP_LAUNCHER: 'mpirun' is none of srun, torchrun, accelerate, deepspeed\n"
    )


def stage_data(source: Path, copy: Path) -> str:
    command = ["bash", str(ROOT / "launch" / "stage_data.sh"), str(source), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_data_is_copied_to_a_nodes_disk_once(tmp_path: Path, kind: str) -> None:
    source, copy = tmp_path / "my data", tmp_path / "local disk" / "data"
    (source / "train" / "cat").mkdir(parents=True)
    (source / "train" / "cat" / "1.jpg").write_bytes(b"1")
    origin = source
    if kind == "archive":
        origin = tmp_path / "my data.tar"
        with tarfile.open(origin, "w") as archive:
            archive.add(source, "imagenet")
    assert "copied" in stage_data(origin, copy)
    assert (copy / "train" / "cat" / "1.jpg").read_bytes() == b"1"
    assert "is there already" in stage_data(origin, copy)
    # One that was broken off has no name yet, and one of another source is made anew.
    (copy.with_name("data.from")).write_text("something else")
    assert "copied" in stage_data(origin, copy)
    missing = subprocess.run(
        ["bash", str(ROOT / "launch" / "stage_data.sh"), str(tmp_path / "no"), str(copy)],
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2 and f"there is no {tmp_path / 'no'}" in missing.stderr
