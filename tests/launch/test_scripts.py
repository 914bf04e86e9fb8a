"""What the shell scripts say: their help, and what SLURM refuses, which is never passed over."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    path
    for folder in ("slurm", "launch")
    for path in sorted((ROOT / folder).iterdir())
    # site.sh is settings, which the others read.
    if path.is_file() and path.read_bytes()[:2] == b"#!" and path.name != "site.sh"
]


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder that is first on PATH, with a SLURM that refuses everything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sinfo", "squeue"):
        write(folder / name, f'echo "{name}: error: refused" >&2; exit 1')
    return folder


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def bash(
    stub: Path, *command: str | Path, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", *map(str, command)],
        cwd=cwd or stub.parent,
        env={
            **kept,
            "PATH": f"{stub}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def table1(stub: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    output = {"OUTPUT": str(stub.parent / "runs")} | variables
    return bash(stub, ROOT / "slurm" / "table1.sh", *arguments, **output)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(stub: Path, script: Path, option: str) -> None:
    called = stub.parent / "called"
    for program in stub.iterdir():
        write(program, f'echo "$0 $*" >>"{called}"; exit 1')
    write(stub / "python", f'echo "$0 $*" >>"{called}"; exit 1')
    done = bash(stub, script, option, PYTHON=str(stub / "python"), TPP_SITE="/no/such/file")
    assert (done.returncode, done.stderr) == (0, "")
    head = script.read_text().splitlines()[1]
    assert done.stdout.splitlines()[0] == head.removeprefix("# ")
    assert "#" not in done.stdout[:1] and "SBATCH " not in done.stdout
    assert "set -euo" not in done.stdout
    assert not called.exists(), "help asks nobody"


def test_help_after_other_arguments(stub: Path) -> None:
    done = table1(stub, "--partition=gpu", "seed=1", "--help")
    assert done.returncode == 0 and done.stdout.startswith("The whole of Table 1")
    done = bash(stub, ROOT / "slurm" / "table2.sh", "seed=1", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Table 2 as an array")


def test_a_row_that_table_2_does_not_have(stub: Path) -> None:
    done = bash(stub, ROOT / "slurm" / "table2.sh", "seed=1", SLURM_ARRAY_TASK_ID="9")
    assert done.returncode == 2
    assert done.stderr == "error: --array: there is no row 9; they are 0 to 4\n"


def test_every_row_of_table_2_is_checked(stub: Path, tmp_path: Path) -> None:
    """Each that is asked for, and no other; %a is the row's number, as in its task."""
    script = ROOT / "slurm" / "table2.sh"
    for row in (1, 2, 3):
        for side in ("train", "val"):
            (tmp_path / str(row) / side).mkdir(parents=True)
    data = f"data.root={tmp_path}/%a"
    done = bash(stub, script, "--array=2-4", data, TPP_PRINT="1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    said = "error: --array: row 4, resnet50_tpp_3.06x.yaml: data.root: there is no folder"
    assert done.stderr.startswith(f"{said} {tmp_path}/4/train ")
    done = bash(stub, script, "--array=1-3", data, TPP_PRINT="1")
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == ["sbatch", "--array=1-3", str(script), data]
    done = bash(stub, script, "--array=3,9", data)
    assert done.returncode == 2
    assert done.stderr == "error: --array: there is no row 9; they are 0 to 4\n"


def test_a_scripts_own_configuration_is_not_passed_on(stub: Path) -> None:
    """In the job the script names it again; the user's own has to come through."""
    script = ROOT / "slurm" / "resnet50_tpp.sh"
    settings = ("data.root=/none", "seed=%a")
    print_only = {"TPP_PRINT": "1", "TPP_DATA_ON_NODES": "1"}
    done = bash(stub, script, "--array=3-4", *settings, **print_only)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == ["sbatch", "--array=3-4", str(script), *settings]
    own = ROOT / "configs" / "imagenet" / "resnet50_tpp_1.49x.yaml"
    done = bash(stub, script, f"--config={own}", "data.root=/none", **print_only)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == [
        "sbatch", str(script), "--config", str(own), "data.root=/none",
    ]  # fmt: skip


def test_table_1_refused(stub: Path) -> None:
    done = table1(stub)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "sbatch: error: refused",
        "error: sbatch refuses the job of the dense network, see above; nothing is submitted",
    ]


def test_table_1_only_printed(stub: Path) -> None:
    """TPP_PRINT=1 prints what would be called: nothing is submitted, and nothing written."""
    called, python = stub.parent / "called", stub / "python"
    write(
        python,
        'case "$*" in *"--only 0") echo 0 ;; *s1-) printf "s1-2\\n" ;; *) printf "1-9\\n" ;; esac',
    )
    write(stub / "sbatch", f'touch "{called}"; echo 5')
    done = table1(stub, "--partition=a", "seed=1", PYTHON=str(python), TPP_PRINT="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert not called.exists() and not (stub.parent / "runs").exists()
    dense, shared, runs = map(shlex.split, done.stdout.splitlines())
    for line, array in ((dense, "0"), (shared, "1-2%8"), (runs, "1-9%8")):
        assert line[0] == "sbatch" and f"--array={array}" in line and "--partition=a" in line
        assert line[line.index("slurm/table1.sh") + 3 :][:3] == [str(python), "-m", "train.sweep"]
    assert not any("dependency" in word for word in dense)
    assert "--dependency=afterok:JOB_OF_dense" in shared
    assert "--dependency=afterok:JOB_OF_dense" in runs


def test_table_1_with_its_array_refused(stub: Path) -> None:
    counted = 'case "$*" in *--array=0*) echo "17;far" ;; *) echo "sbatch: no" >&2; exit 1 ;; esac'
    write(stub / "sbatch", counted)
    done = table1(stub)
    assert (done.returncode, done.stdout) == (2, "dense network: job 17\n")
    (no, error) = done.stderr.splitlines()
    assert no == "sbatch: no" and "refuses the array of shared stages s1-9" in error
    assert "job 17 of the dense network is in the queue: scancel 17" in error


def test_table_1_with_several_runs_a_task(stub: Path) -> None:
    """What is asked of SLURM, and what a task that SLURM starts so does with its number."""
    asked, python = stub.parent / "asked", stub / "python"
    write(
        python,
        'case "$*" in *--pending*"--only 0") ;; *--pending*s1-) printf "s1-2\\ns3\\n" ;; '
        '*--pending*) printf "1-2\\n4,7\\n9\\n" ;; *) echo "does $*" ;; esac',
    )
    write(stub / "sbatch", f'printf "%q " "$@" >>"{asked}"; echo >>"{asked}"; echo 5')
    done = table1(stub, "seed=1", JOBS="2", PARALLEL="3", PYTHON=str(python))
    assert done.stdout.startswith("shared stages s1-2, s3: job 5\nruns 1-2, 4,7, 9: job 5\n")
    shared, runs = asked.read_text().splitlines()
    assert "--array=1,3%3" in shlex.split(shared) and "--array=1,4,9%3" in shlex.split(runs)
    assert "--cpus-per-task=2" in shared
    for line, number, only in ((shared, 1, "s1-2"), (shared, 3, "s3"), (runs, 4, "4,7")):
        command = line[line.index("slurm/table1.sh") :]
        task = bash(stub, "-c", f"bash {command}", cwd=ROOT, SLURM_ARRAY_TASK_ID=str(number))
        assert task.stdout.startswith("does -m train.sweep --config"), task.stderr
        assert task.stdout.rstrip().endswith(f"seed=1 --jobs 2 --only {only}")


def test_table_1_with_one_run_a_task(stub: Path) -> None:
    write(stub / "does", 'echo "does $*"')
    for prefix, only in (("", "4"), ("s", "s4")):
        script = ROOT / "slurm" / "table1.sh"
        task = bash(stub, script, prefix, "", stub / "does", "x", SLURM_ARRAY_TASK_ID="4")
        assert task.stdout == f"does x --only {only}\n"


def test_table_1_without_a_jobs_id(stub: Path) -> None:
    write(stub / "sbatch", "echo Submitted, I think")
    done = table1(stub)
    assert done.returncode == 2 and "job of the dense network" in done.stderr
    assert "dense network: job" not in done.stdout


def test_table_1_where_there_is_no_slurm(stub: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "sed", "mkdir"):
        found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (tools / name).symlink_to(found)
    done = table1(stub, PATH=str(tools))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "there is no SLURM here" in done.stderr and "-m train.sweep --config" in done.stderr


def test_a_row_refused(stub: Path, tmp_path: Path) -> None:
    done = bash(
        stub, ROOT / "slurm" / "resnet50_tpp.sh", "data.demo={}", f"output={tmp_path / 'run'}",
        "model.checkpoint=null",
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "sbatch: error: refused"
    assert done.stderr.splitlines()[1].startswith("error: sbatch refuses it")


@pytest.mark.parametrize("image", ["{}/x.sif", "sub/x.sif", "{}/x.sqsh", "~/x.sif"])
def test_an_image_that_is_not_there(stub: Path, image: str) -> None:
    script, image = ROOT / "slurm" / "resnet50_tpp.sh", image.format(stub)
    variables = {"TPP_PRINT": "1", "TPP_CONTAINER": image, "HOME": str(stub)}
    done = bash(stub, script, "data.root=/none", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    file = image.replace("~", str(stub))
    assert done.stderr.startswith(f"error: TPP_CONTAINER: there is no {file} on this machine")
    assert done.stderr.count("\n") == 1
    place = stub.parent / file
    place.parent.mkdir(exist_ok=True)
    place.touch()
    done = bash(stub, script, "data.root=/none", **variables)
    assert done.returncode == 0 and done.stdout.startswith("sbatch ")


@pytest.mark.parametrize(
    "image", ["docker://me/tpp", "dockerd://tpp", "me/tpp:1", "nvcr.io#me/tpp"]
)
def test_an_image_of_a_registry_is_not_looked_for(stub: Path, image: str) -> None:
    script = ROOT / "slurm" / "resnet50_tpp.sh"
    done = bash(stub, script, "data.root=/none", TPP_PRINT="1", TPP_CONTAINER=image)
    assert done.returncode == 0 and done.stdout.startswith("sbatch ")
    assert done.stderr.count("\n") == 1 and "not checked here" in done.stderr


def test_the_images_test_without_an_image(stub: Path) -> None:
    smoke = ROOT / "launch" / "container" / "smoke.sh"
    done = bash(stub, smoke, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    bare = bash(stub, smoke)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr == f"error: IMAGE is missing\n{done.stdout}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x.sif", "--gpu"), "x.sif: there is no such file"),
        (("there.sif", "--gpu"), "there.sif: apptainer is not found"),
        (("tpp",), "tpp: no-docker is not found"),
        (("tpp", "--gpus"), "--gpus: behind the image only --gpu is understood"),
        (("tpp", "--gpu", "1"), "1: behind the image only --gpu is understood"),
        (("--gpu",), "--gpu: IMAGE comes first"),
    ],
)
def test_an_image_that_cannot_be_started(stub: Path, arguments: tuple[str, ...], said: str) -> None:
    (stub.parent / "there.sif").touch()
    which = subprocess.run(["which", "bash"], capture_output=True, text=True).stdout.strip()
    (stub / "bash").symlink_to(which)  # and no apptainer
    smoke = ROOT / "launch" / "container" / "smoke.sh"
    done = bash(stub, smoke, *arguments, TPP_DOCKER="no-docker", PATH=str(stub))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


def test_a_chain_refused(stub: Path, tmp_path: Path) -> None:
    done = bash(
        stub, ROOT / "launch" / "submit_chain", "--config", "configs/demo.yaml",
        f"output={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert "error: sbatch refuses stage dense" in done.stderr


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("exit 1", "scontrol does not say what the job was given"),
        ('[[ "$2" == job ]] || exit 1', "scontrol does not say which nodes node[1-2] are"),
    ],
)
def test_a_controller_that_does_not_answer(stub: Path, answers: str, expected: str) -> None:
    """Without its answer the job would take its nodes for ones without GPUs."""
    write(stub / "scontrol", answers)
    done = bash(
        stub, ROOT / "launch" / "job.sh", "--config", "configs/demo.yaml",
        SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[1-2]", TPP_PRINT="1",
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert expected in done.stderr


def test_an_archive_with_something_hidden_beside_its_folder(stub: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "imagenet" / "train").mkdir(parents=True)
    (source / "imagenet" / "train" / "1.jpg").write_bytes(b"1")
    (source / ".DS_Store").touch()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in source.iterdir():
            archive.add(path, path.name)
    done = bash(stub, ROOT / "launch" / "stage_data.sh", tmp_path / "a.tar", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / "train" / "1.jpg").read_bytes() == b"1"


def test_a_launcher_that_starts_no_rank(stub: Path, tmp_path: Path) -> None:
    """Its exit code comes through where no rank has left one."""
    write(stub / "accelerate", "exit 9")
    write(stub / "python", "exit 1")
    done = bash(
        stub, ROOT / "launch" / "node.sh", "accelerate", "1,1", stub / "python", "main.py",
        SLURM_NODEID="0", MASTER_ADDR="here", MASTER_PORT="1", TMPDIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 9
    assert not list(tmp_path.glob("tmp.*"))


def test_a_home_folder_in_quotes(stub: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "c.yaml").write_text("name: x\n")
    write(stub / "sbatch", "echo 5")
    done = table1(stub, HOME=str(home), OUTPUT="~/runs")
    assert done.returncode == 0, done.stderr
    assert (home / "runs" / "logs").is_dir() and f"--output {home}/runs" in done.stdout
    done = bash(stub, ROOT / "launch" / "job.sh", "--config=~/c.yaml", HOME=str(home))
    assert done.returncode == 2 and f"error: {home}/c.yaml: " in done.stderr


@pytest.mark.parametrize(
    "script", [p for p in SCRIPTS if p.name[:6] == "resnet"], ids=lambda p: p.name
)
def test_each_row_names_itself_and_a_configuration(script: Path) -> None:
    text = script.read_text()
    (config,) = re.findall(r"--row (configs/\S+\.yaml) ", text)
    (job,) = re.findall(r"^#SBATCH --job-name=(\S+)$", text, re.MULTILINE)
    assert (ROOT / config).is_file() and Path(config).stem == job
    assert f"sbatch --nodes=4 slurm/{script.name} " in text
    assert f"bash slurm/{script.name} --nodes=4 " in text
    assert f"| `slurm/{script.name}` |" in (ROOT / "docs" / "cluster.md").read_text()
    assert os.access(script, os.X_OK)
