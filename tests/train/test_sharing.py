"""What runs of a sweep have in common, trained once: the same to the bit, whoever dies."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import BARE, Forks

from tpp.common.errors import UserError
from tpp.methods import available_methods
from train import side_by_side
from train.config.config import stages_until, step_until
from train.grid import SweepRun, expand, load_sweep
from train.run_folder.lock import LockWatch, holder_of
from train.sharing import SharedStage, SweepConfigs, count_steps, shared_stages
from train.side_by_side import Job, Place, Running, places

ROOT = Path(__file__).resolve().parents[2]
TABLE1 = ROOT / "configs" / "cifar10" / "table1.yaml"
KERNORTH = {"name": "kernorth+l1"}
# Decay on all filters for ten steps, then 10 more of growth and 3 to stabilise.
GREG2 = {
    "name": "greg2",
    "pick_delta": 0.1,
    "pick_ceiling": 1.0,
    "delta": 0.1,
    "tau": 2.0,
    "update_interval": 1,
    "stabilize_steps": 3,
}


@pytest.fixture
def tiny_sweep(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """KernOrth + L1, GReg-2 and TPP at two ratios, from one dense ResNet-8."""
    stages = tiny_config.pop("stages")
    for key in ("name", "output", "pruning"):
        del tiny_config[key]
    tiny_config["data"]["loader"] = "torchvision"
    tiny_config["checkpoints"]["every"] = "1 step"
    tiny_config["model"]["num_classes"] = 4
    tpp = tiny_config.pop("method")
    branch = {name: stages[name] for name in ("prune", "finetune", "evaluate")}
    optimizer = {"optimizer": {"lr": 0.01}}
    files: dict[str, Any] = {
        "base.yaml": tiny_config,
        "dense.yaml": {"extends": "base.yaml", "name": "x", "stages": {"dense": stages["dense"]}},
        "sweep.yaml": {
            "name": "tiny",
            "output": str(tmp_path / "runs"),
            "dense": "dense.yaml",
            "methods": {},
            "ratios": {"pr0.5": {"layer*.conv1": 0.5}, "pr0.7": {"layer*.conv1": 0.7}},
            "finetuning": {"x": {}},
            "seeds": [0],
        },
    }
    lengths: dict[str, dict[str, float]] = {"kernorth": {"epochs": 8}, "greg2": {}, "tpp": {}}
    for name, method in (("kernorth", KERNORTH), ("greg2", GREG2), ("tpp", tpp)):
        files["sweep.yaml"]["methods"][name] = f"{name}.yaml"
        files[f"{name}.yaml"] = {
            "extends": "base.yaml",
            "method": method,
            "stages": {"regularize": {**lengths[name], **optimizer}, **branch},
        }
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "sweep.yaml"


def change(path: Path, **changes: Any) -> None:
    content = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def start(sweep: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.sweep", "--config", str(sweep), *arguments],
        cwd=sweep.parent,
        env={**os.environ, **BARE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == expect, out
    return out


def until(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def parts(sweep: Path) -> tuple[list[SweepRun], list[SharedStage]]:
    runs = expand(load_sweep(sweep))
    return runs, shared_stages(runs, SweepConfigs())


def alone(forks: Forks, run: SweepRun, folder: Path) -> None:
    """A run without the sweep, in another folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _, script, *arguments = run.command([sys.executable])
    process = forks.start(
        Path(script), [*arguments, f"output={folder}"], folder.parent, {**os.environ, **BARE}
    )
    assert process.wait(300) == 0, process.output()


def assert_same(one: Path, other: Path, *, networks: int) -> None:
    """Model files are the same to the byte, and results but for the time that they took."""
    found = sorted(path.relative_to(one) for path in one.rglob("model.safetensors"))
    assert len(found) == networks
    for path in found:
        hashes = [sha256((folder / path).read_bytes()).hexdigest() for folder in (one, other)]
        assert hashes[0] == hashes[1], path
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for found_there in results:
        del found_there["wall_seconds"], found_there["git_commit"], found_there["started_in"]
        for stage in found_there["stages"].values():
            del stage["wall_seconds"]
    assert results[0] == results[1]


def test_side_by_side_stopped_and_shared_is_as_one_by_one(
    tiny_sweep: Path, forks: Forks, tmp_path: Path
) -> None:
    runs, (kernorth, greg2) = parts(tiny_sweep)
    chosen = ("--jobs", "2", "--only", "0,2,4")
    process = start(tiny_sweep, *chosen)
    until((kernorth.folder / "regularize/checkpoints/step-00000002").exists, process)
    # Ctrl-C reaches the sweep; both processes end with a checkpoint, and nothing is left behind.
    process.send_signal(signal.SIGINT)
    out = finish(process, 130)
    assert out.endswith("interrupted\n")
    assert LockWatch(kernorth.folder).holder() is LockWatch(greg2.folder).holder() is None
    logs = {path.stem: path for path in (tmp_path / "runs" / "logs").iterdir()}
    assert set(logs) == {"dense", kernorth.folder.name, greg2.folder.name}
    assert "stopped by SIGTERM after step" in logs[kernorth.folder.name].read_text()
    assert "data.threads" not in logs["dense"].read_text()  # one is what it has

    out = finish(start(tiny_sweep, *chosen))
    assert out.splitlines()[-1] == "tiny: 3 of 3 runs are done"
    assert "resumed after" in logs[kernorth.folder.name].read_text()
    assert not (tmp_path / "runs" / runs[1].name).exists()
    assert not (greg2.folder / "regularize" / "model.safetensors").exists()
    text = (tmp_path / "runs" / "logs" / f"{runs[4].name}.log").read_text()
    assert "regularize: resumed after 9 steps" in text
    for run in (runs[2], runs[4]):
        alone(forks, run, tmp_path / "alone" / run.name)
        assert_same(tmp_path / "alone" / run.name, run.folder, networks=3)


def test_rows_that_differ_in_their_finetuning_share_what_is_before_it(
    tiny_sweep: Path, forks: Forks, tmp_path: Path
) -> None:
    longer = {"extends": "tpp.yaml", "stages": {"finetune": {"epochs": 2}}}
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(longer))
    change(
        tiny_sweep,
        dense=None,
        finetuning=None,
        methods={"tpp": "tpp.yaml", "tpp+longer": "longer.yaml"},
    )
    runs, shared = parts(tiny_sweep)
    # TPP drives out what the ratio says: those of one ratio have it in common, and no others.
    assert [(one.stage, one.until, one.runs) for one in shared] == [
        ("regularize", None, (1, 3)),
        ("regularize", None, (2, 4)),
    ]
    finish(start(tiny_sweep, "--only", "1,3"))
    assert not (shared[1].folder).exists()
    for run in (runs[0], runs[2]):
        alone(forks, run, tmp_path / "alone" / run.name)
        assert_same(tmp_path / "alone" / run.name, run.folder, networks=3)
        for plan in ("plan.json", "regularize/plan.json", "prune/plan.json"):
            whole, taken = (tmp_path / "alone" / run.name / plan, run.folder / plan)
            assert whole.read_bytes() == taken.read_bytes()


def test_what_keeps_its_momentum_is_no_other_rows(tiny_sweep: Path, tmp_path: Path) -> None:
    methods = {}
    for name, carried in {"a": False, "b": True, "c": False, "d": True}.items():
        methods[name] = f"{name}.yaml"
        row = {"extends": "tpp.yaml", "stages": {"finetune": {"carry_optimizer": carried}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(row))
    ratios = {"half": {"layer*.conv1": 0.5}}
    change(tiny_sweep, dense=None, finetuning=None, methods=methods, ratios=ratios)
    _, shared = parts(tiny_sweep)
    assert [(one.stage, one.runs) for one in shared] == [
        ("regularize", (1, 3)),
        ("regularize", (2, 4)),
    ]
    assert shared[0].folder != shared[1].folder


def test_who_waits_takes_over_where_the_one_at_work_is_lost(
    tiny_sweep: Path, forks: Forks, tmp_path: Path
) -> None:
    runs, (kernorth, _) = parts(tiny_sweep)
    alone(forks, runs[0], runs[0].folder)
    # As two tasks of an array: the first one trains what both need, and is lost with its node.
    first = start(tiny_sweep, "--only", "1")
    begun = kernorth.folder / "regularize/checkpoints/step-00000003"
    until(begun.exists, first)
    holder = holder_of(kernorth.folder)
    assert holder is not None
    os.kill(holder.pid, signal.SIGSTOP)
    second = start(tiny_sweep, "--only", "2")
    assert second.stdout is not None
    line = second.stdout.readline()
    assert f"waits for process {holder.pid}" in line and str(kernorth.folder) in line
    first.kill()
    os.kill(holder.pid, signal.SIGKILL)
    first.communicate()
    out = finish(second)
    assert "taken over from a run that died" in out and "regularize: resumed after" in out
    alone(forks, runs[2], tmp_path / "alone" / runs[2].name)
    assert_same(tmp_path / "alone" / runs[2].name, runs[2].folder, networks=3)


def test_what_table_1_has_in_common() -> None:
    runs = expand(load_sweep(TABLE1))
    configs = SweepConfigs()
    shared = shared_stages(runs, configs)
    # Per seed the training before L1 picks of two methods, and GReg-2's up to its last step
    # before it picks (10,000 steps of growth); each of five ratios.
    assert [(one.stage, one.until, len(one.runs)) for one in shared] == [
        ("regularize", None, 5),
        ("regularize", None, 5),
        ("regularize", 9_999, 5),
    ] * 3
    methods = [{runs[number].method for number in one.runs} for one in shared]
    assert methods == [{"kernorth+l1"}, {"orthconv+l1"}, {"greg2"}] * 3
    assert len({one.folder for one in shared}) == 9


def test_steps_are_counted(tiny_sweep: Path) -> None:
    runs, shared = parts(tiny_sweep)
    steps = count_steps(runs, shared, SweepConfigs(), [])
    # 96 images in batches of 16: 6 steps an epoch. Dense: 1 epoch; six runs of 1 epoch of
    # finetuning; KernOrth 8 epochs; GReg-2 10 + 10 + 3 (see GREG2) and TPP 10 + 9, and one more
    # of each, with lambda 0.
    assert steps.alone == 6 + 6 * 6 + 2 * (48 + 24 + 20)
    assert steps.saved == 48 + 9
    assert not steps.without_images
    nowhere = expand(load_sweep(tiny_sweep), ["data.root=nowhere"])
    steps = count_steps(nowhere, shared, SweepConfigs(), [])
    assert (steps.alone, steps.saved, steps.without_images) == (2 * (24 + 20), 9, True)


def test_all_methods_that_pick_afterwards_or_halfway_share() -> None:
    found = {}
    for name, method in available_methods().items():
        settings = method.settings_type.model_construct()  # some may have no default
        found[name] = method(settings).steps_before_picking()
        assert found[name] == 0 or method.picks != "before"
    assert {name for name, steps in found.items() if steps} == {
        *("kernorth+l1", "orthconv+l1", "greg2", "ffr")
    }


@pytest.mark.parametrize(
    ("ratios", "common"),
    [
        ({"layer*.conv1": 0.9}, True),
        ({"*.conv1": 0.0, "layer*.conv1": 0.3}, True),  # says the same in other words
        ({"layer1*.conv1": 0.5}, False),  # other layers
        ({"layer*.conv1": 0.5, "layer3*.conv1": 0.0}, False),
    ],
)
def test_ratios_are_common_where_they_are_of_the_same_layers(
    tiny_sweep: Path, ratios: dict[str, float], common: bool
) -> None:
    change(tiny_sweep, ratios={"one": {"layer*.conv1": 0.5}, "other": ratios})
    _, shared = parts(tiny_sweep)
    assert len(shared) == (2 if common else 0)


def test_other_settings_are_not_common(tiny_sweep: Path) -> None:
    two = {"a": "kernorth.yaml", "b": "b.yaml"}
    kernorth = yaml.safe_load((tiny_sweep.parent / "kernorth.yaml").read_text())
    other = tiny_sweep.parent / "b.yaml"
    change(tiny_sweep, methods=two, ratios={"pr0.5": {"layer*.conv1": 0.5}})
    other.write_text(yaml.safe_dump(kernorth, sort_keys=False))
    assert len(parts(tiny_sweep)[1]) == 1  # the same under another label
    for key, value in (
        ("method", {"name": "kernorth+l1", "strength": 0.2}),
        ("training", {"on_bad_step": "skip"}),
        ("stages", kernorth["stages"] | {"regularize": {"epochs": 2, "optimizer": {"lr": 0.01}}}),
    ):
        content = copy.deepcopy(kernorth) | {key: value}
        other.write_text(yaml.safe_dump(content, sort_keys=False))
        assert parts(tiny_sweep)[1] == [], key
    change(tiny_sweep, methods={"a": "kernorth.yaml"}, seeds=[0, 1])
    assert parts(tiny_sweep)[1] == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("regularise", "--until: there is no stage 'regularise'"),
        ("regularize:0", "--until regularize:0: a step is a number from 1 on"),
        ("regularize:x", "--until regularize:x: a step is a number from 1 on"),
        ("prune:3", "--until prune:3: stage 'prune' trains nothing"),
    ],
)
def test_a_mistake_in_until_is_one_line(tiny_sweep: Path, text: str, line: str) -> None:
    config = SweepConfigs().of(expand(load_sweep(tiny_sweep))[1])
    with pytest.raises(UserError, match=f"^{line}"):
        stages_until(config, text)
    assert stages_until(config, "regularize:3") == ["regularize"]
    assert step_until("regularize:3", "regularize") == 3
    assert step_until("regularize:3", "finetune") is step_until(None, "finetune") is None


def test_two_ranks_end_at_a_step_and_stay_there(tiny_config: dict[str, Any], run_main: Any) -> None:
    tiny_config["training"]["batch_size"] = 32
    folder = Path(tiny_config["output"]) / "dense"
    for said in ("dense: 3 steps", ""):
        done = run_main(tiny_config, "--until", "dense:2", ranks=2)
        assert said in done.stdout and "stage dense is at step 2, as far as it was" in done.stdout
        names = {path.name for path in (folder / "checkpoints").glob("step-*")}
        assert names == {"step-00000002"}
    assert not (folder / "done.json").exists()


# ---- side by side --------------------------------------------------------------------------------


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(side_by_side, "_gpus", list)
    assert places(None, with_launcher=False) == [Place()]
    assert places(2, with_launcher=False) == [Place({"OMP_NUM_THREADS": "3"}, 3)] * 2
    assert places(9, with_launcher=True) == [Place()] * 9
    for jobs, line in (
        (0, "--jobs 0: at least 1"),
        (7, "--jobs 7: 7 runs at once, and 6 cores; at most --jobs 6"),
    ):
        with pytest.raises(UserError, match=line):
            places(jobs, with_launcher=False)
    monkeypatch.setattr(side_by_side, "_gpus", lambda: ["3", "5"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a user's own is not raised
    found = places(2, with_launcher=False)
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in found] == ["3", "5", "3", "5"]
    assert {place.threads for place in found} == {1}
    with pytest.raises(UserError, match=r"--jobs 4 on 2 GPUs: 8 runs at once, .*at most --jobs 3"):
        places(4, with_launcher=False)


def job(folder: Path, name: str, script: str, needs: tuple[Job, ...] = ()) -> Job:
    def lacks() -> list[tuple[str, Job | None]]:
        return [(one.label, one) for one in needs if not one.is_done()]

    for one in needs:
        one.needed = True
    made = folder / name
    return Job(
        name,
        folder / f"{name}_run",
        lambda place: ["sh", "-c", f"cd {folder}; {script}"],
        made.exists,
        lacks,
        lambda: None,
        folder / f"{name}.log",
    )


@pytest.mark.processes
def test_jobs_run_at_once_and_wait_for_what_they_need(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait_for = "while [ ! -e {0} ]; do sleep 0.01; done; touch {1}"
    # Either ends only when the other is under way as well.
    first = job(tmp_path, "first", "touch began; " + wait_for.format("other_began", "first"))
    other = job(tmp_path, "other", "touch other_began; " + wait_for.format("began", "other"))
    after = job(tmp_path, "after", "ls first && touch after", (first,))
    fails = job(tmp_path, "fails", "echo no luck; exit 3")
    never = job(tmp_path, "never", "touch never", (fails,))
    last = job(tmp_path, "last", "touch last")
    jobs = [never, after, first, other, fails, last]
    failed = Running(jobs, [Place(), Place()]).to_the_end()
    assert failed == [
        "fails: exit code 3 (no luck)",
        "never: not started, as fails is not there",
    ]
    assert all(one.is_done() for one in (first, other, after, last))
    assert not never.is_done()
    assert capfd.readouterr().err == "fails: exit code 3 (no luck); the sweep goes on\n"


def test_a_silent_holder_of_another_node_counts_as_dead(tmp_path: Path) -> None:
    watch = LockWatch(tmp_path)
    assert watch.holder() is None
    said = {"run": "a", "host": "elsewhere", "pid": 1, "boot": "b", "job": "", "started": "now"}
    write = lambda beat: (tmp_path / "run.lock").write_text(  # noqa: E731
        json.dumps({**said, "every": 0.05, "beat": beat})
    )
    for beat in range(3):
        write(beat)
        assert "process 1 on elsewhere" in str(watch.holder())
        time.sleep(0.1)
    deadline = time.monotonic() + 60
    while watch.holder() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
