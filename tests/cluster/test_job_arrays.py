"""One task of an array is requeued by itself, whichever of its tasks has the array's own id."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In the place of Python: a rank that listens to SIGUSR1, and ends as it is told to.
RANK = """\
#!/usr/bin/env bash
[[ "$1" != -c ]] || exit 0
trap 'echo "task $SLURM_ARRAY_TASK_ID: stopped"; exit 75' USR1
touch "started-$SLURM_ARRAY_TASK_ID"
until [[ -f "end-$SLURM_ARRAY_TASK_ID" ]]; do sleep 0.1; done
exit "$(<"end-$SLURM_ARRAY_TASK_ID")"
"""


@dataclass
class Array:
    """Four tasks at once; the last one to start has the array's own id."""

    slurm: Any
    folder: Path
    job: str

    def states(self) -> dict[int, str]:
        found = self.slurm.jobs().items()
        return {int(n.partition("_")[2]): s for n, s in found if n.startswith(f"{self.job}_")}

    def end(self, task: int, code: int) -> None:
        (self.folder / "told").write_text(f"{code}\n")
        (self.folder / "told").rename(self.folder / f"end-{task}")

    def wait_for(self, states: dict[int, str]) -> None:
        self.slurm.wait_until(f"{states} of {self.job}", lambda: self.states() == states)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def array(slurm, tmp_path: Path) -> Iterator[Array]:
    rank = tmp_path / "rank.sh"
    rank.write_text(RANK)
    rank.chmod(0o755)
    (tmp_path / "config.yaml").touch()
    job = slurm.submit(
        *("--array=0-3", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--oversubscribe"),
        *(ROOT / "launch" / "job.sh", "--config", "config.yaml"),
        cwd=tmp_path,
        PYTHON=str(rank),
    )
    array = Array(slurm, tmp_path, job)
    slurm.wait_until("four tasks", lambda: len([*tmp_path.glob("started-*")]) == 4)
    yield array
    slurm.command("scancel", job)


def test_the_task_with_the_arrays_own_id_is_requeued_alone(slurm, array: Array) -> None:
    lines = slurm.command("squeue", "-h", "-r", "-j", array.job, "-o", "%A %K").splitlines()
    task_of = {job: int(task) for job, task in map(str.split, lines)}
    own = task_of.pop(array.job)
    done, cancelled, runs = sorted(task_of.values())
    array.end(done, 0)
    slurm.command("scancel", f"{array.job}_{cancelled}")
    others = {done: "COMPLETED", cancelled: "CANCELLED", runs: "RUNNING"}
    array.wait_for({**others, own: "RUNNING"})

    array.end(own, 75)
    array.wait_for({**others, own: "PENDING"})
    assert f"job {array.job}_{own} is requeued and goes on" in array.logs()
    # Ahead of its time limit, the way of the tasks that have an id of their own.
    slurm.command("scancel", "--signal=USR1", "--batch", f"{array.job}_{runs}")
    array.wait_for({**others, own: "PENDING", runs: "PENDING"})
    assert f"task {runs}: stopped" in array.logs()


def test_a_task_that_fails_or_is_cancelled_stays_so(slurm, array: Array) -> None:
    """Neither is brought back, and none is taken along."""
    array.end(0, 1)
    array.end(1, 2)
    slurm.command("scancel", f"{array.job}_3")
    array.wait_for({0: "FAILED", 1: "FAILED", 2: "RUNNING", 3: "CANCELLED"})
    assert "is requeued" not in array.logs()
