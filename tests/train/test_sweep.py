"""A sweep that really runs: killed, resumed, with a run that fails; and how Table 1 expands."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tpp.common.errors import UserError, run_command
from train.config.config import Config, load_config
from train.grid import SweepRun, expand, load_sweep, state_of
from train.run_folder.lock import LockWatch
from train.sweep import _as_ranges, _chosen, _launcher, main

ROOT = Path(__file__).resolve().parents[2]
TABLE1 = ROOT / "configs" / "cifar10" / "table1.yaml"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def tiny_sweep(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """Two methods, one ratio, two seeds and two finetunings of a ResNet-8; all runs in seconds."""
    stages = tiny_config.pop("stages")
    for key in ("name", "output", "pruning"):
        del tiny_config[key]
    tiny_config["data"]["loader"] = "torchvision"
    tiny_config["checkpoints"]["every"] = "1 step"
    method = tiny_config.pop("method") | {"delta": 0.2, "stabilize_steps": 8}
    branch = {name: stages[name] for name in ("prune", "finetune", "evaluate")}
    tpp = {"regularize": stages["regularize"], **branch}
    files = {
        "base.yaml": tiny_config,
        "dense.yaml": {
            "extends": "base.yaml",
            "name": "x",
            "stages": {"dense": stages["dense"], "evaluate": {}},
        },
        # As a base of the real configurations is: it names no run, no ratios and no source.
        "l1.yaml": {
            "extends": "base.yaml",
            "method": {"name": "l1"},
            "stages": {"dense": {"kind": "evaluate"}, **branch},
            "published": {"dense_top1": 93.78},
        },
        "tpp.yaml": {"extends": "base.yaml", "method": method, "stages": tpp},
        "sweep.yaml": {
            "name": "tiny",
            "output": "runs",
            "dense": "dense.yaml",
            "methods": {"l1": "l1.yaml", "tpp": "tpp.yaml"},
            "ratios": {"pr0.5": {"layer*.conv1": 0.5}},
            "finetuning": {
                "lr0.02": {"optimizer": {"lr": 0.02}},
                "lr0.002": {"optimizer": {"lr": 0.002, "schedule": "step", "milestones": [0.5]}},
            },
            "seeds": [0, 1],
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "sweep.yaml"


def start(sweep: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.sweep", "--config", sweep.name, *arguments],
        cwd=sweep.parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], expect: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, out + err
    return out, err


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, f"ended before {path} was there"
        time.sleep(0.005)


def is_free(folder: Path) -> bool:
    """Whether no process holds a run folder."""
    return LockWatch(folder).holder() is None


def call(monkeypatch: pytest.MonkeyPatch, sweep: Path, *arguments: str) -> int:
    """The command in this process; returns the exit code."""
    monkeypatch.chdir(sweep.parent)
    monkeypatch.setattr(sys, "argv", ["train.sweep", "--config", sweep.name, *arguments])
    try:
        run_command(main)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def test_a_sweep_survives_kills_and_a_run_that_fails(
    tiny_sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tiny_sweep.parent / "runs"
    l1, tpp = runs / "l1_pr0.5_seed0", runs / "tpp_pr0.5_seed0"
    # The first run cannot go on from what is in its folder; that costs no other run anything.
    (l1 / "prune").mkdir(parents=True)
    (l1 / "prune" / "done.json").write_text("{}")

    # SIGTERM stops sweep and run at once, and the folder is free again.
    process = start(tiny_sweep, "training.log_every=1")
    wait_for(process, tpp / "regularize" / "checkpoints" / "step-00000003")
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 128 + signal.SIGTERM)
    # (A loader's worker may say with a traceback of its own that it was broken off.)
    assert "not a done marker" in err and "sweep.py" not in err
    assert "run 1 (l1_pr0.5_seed0): exit code 2; the sweep goes on" in err
    assert is_free(tpp) and not (tpp / "regularize" / "done.json").exists()

    # A sweep that is killed leaves its run going, and that run is left alone.
    process = start(tiny_sweep, "--only", "2", "training.log_every=1")
    assert process.stdout is not None
    while (line := process.stdout.readline()) and "resumed after" not in line:
        pass
    assert "regularize: resumed after" in line
    process.kill()
    process.wait()
    assert call(monkeypatch, tiny_sweep, "--only", "2") == 0
    assert "run 2 (tpp_pr0.5_seed0): another process is at work" in capsys.readouterr().out
    deadline = time.monotonic() + 120
    while not is_free(tpp):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    out, _ = finish(start(tiny_sweep), 1)
    assert "run 2 (tpp_pr0.5_seed0): done before, skipped" in out
    assert out.splitlines()[-2:] == [
        "run 1 (l1_pr0.5_seed0): exit code 2",
        "tiny: 4 of 5 runs are done",
    ]
    call(monkeypatch, tiny_sweep, "--list")
    assert "4 done, 0 under way, 1 waiting" in capsys.readouterr().out
    call(monkeypatch, tiny_sweep, "--pending")
    assert capsys.readouterr().out == "1\n"

    # Both finetunings start from the one network that the run pruned, and end in different ones.
    dense = json.loads((runs / "dense" / "results.json").read_text())["stages"]["dense"]["top1"]
    for name in ("tpp_pr0.5_seed0", "l1_pr0.5_seed1", "tpp_pr0.5_seed1"):
        results = json.loads((runs / name / "results.json").read_text())
        assert results["dense"]["top1"] == dense
        stages = results["stages"]
        assert list(stages["prune"]) == [
            *("kind", "method", "title", "input", "start", "steps", "epochs"),
            *("top1", "top5", "loss", "parameters", "macs", "speedup"),
            *("removed_share", "norm_before", "norm_after"),
            *("removed_magnitude", "wall_seconds", "images"),  # of the next stage's first look
        ]
        assert stages["finetune"]["input"] == stages["finetune_lr0.002"]["input"] == "prune"
        assert stages["finetune"]["start"] == stages["finetune_lr0.002"]["start"]
        assert stages["evaluate_lr0.002"]["input"] == "finetune_lr0.002"
        one, other = (
            load_file(runs / name / stage / "model.safetensors")
            for stage in ("finetune", "finetune_lr0.002")
        )
        assert any(not one[key].equal(other[key]) for key in one)


def resolved(sweep: Path, *overrides: str, number: int) -> Config:
    run = expand(load_sweep(sweep), overrides)[number]
    assert run.number == number
    return load_config(run.config, run.overrides)


def test_table_1_is_150_runs_and_the_dense_one() -> None:
    sweep = load_sweep(TABLE1)
    runs = expand(sweep, ["data.root=/data/cifar10"])
    assert [run.number for run in runs] == list(range(151))
    assert [run.method for run in runs[:1]] == [None]
    places = {(run.method, run.ratio, run.seed) for run in runs[1:]}
    methods = "scratch l1 l1+orthp l1+kernorth l1+orthconv kernorth+l1 orthconv+l1 greg1 greg2 tpp"
    ratios = (0.3, 0.5, 0.7, 0.9, 0.95)
    assert places == {
        (method, f"pr{ratio}", seed)
        for method in methods.split()
        for ratio in ratios
        for seed in (0, 1, 2)
    }
    assert len({run.folder for run in runs}) == 151
    dense = load_config(runs[0].config, runs[0].overrides)
    assert dense.output == "runs/table1/dense"
    assert (dense.data.root, dense.stages["dense"].epochs) == ("/data/cifar10", 200)
    # Seeds only differ in the seed, so the first 50 runs stand for all in what is slow to read.
    for run in runs[1:51]:
        config = load_config(run.config, run.overrides)
        assert config.method["name"] == run.method
        assert config.pruning.ratios == {"layer*.conv1": float(run.ratio[2:])}  # type: ignore[index]
        assert config.output == f"runs/table1/{run.method}_{run.ratio}_seed0"
        assert config.seed == 0
        assert config.data.root == "/data/cifar10"
        assert config.model.checkpoint == "runs/table1/dense/dense/model.safetensors"
        fast, slow = config.stages["finetune"], config.stages["finetune_lr0.001"]
        assert fast.input == slow.input == "prune"
        assert fast.epochs == slow.epochs == 120
        assert fast.optimizer is not None and slow.optimizer is not None
        assert (fast.optimizer.lr, fast.optimizer.milestones) == (0.01, [60, 90])
        assert (slow.optimizer.lr, slow.optimizer.milestones) == (0.001, [80])
        assert fast.optimizer.weight_decay == slow.optimizer.weight_decay == 5e-4
        assert config.stages["evaluate_lr0.001"].input == "finetune_lr0.001"
    for run in runs[51:]:
        twin = runs[run.number - 50 * run.seed]  # type: ignore[operator]
        changed = {
            one: other
            for one, other in zip(twin.overrides, run.overrides, strict=True)
            if one != other
        }
        assert {text.partition("=")[0] for text in changed} == {"name", "output", "seed"}
        assert f"seed={run.seed}" in run.overrides


def test_overrides_of_a_stage_go_to_the_runs_that_train_in_it(tiny_sweep: Path) -> None:
    overrides = ("stages.finetune.epochs=3", "stages.dense.epochs=7", "training.batch_size=8")
    dense = resolved(tiny_sweep, *overrides, number=0)
    assert list(dense.stages) == ["dense", "evaluate"]
    assert dense.stages["dense"].epochs == 7
    for number in (1, 2):
        config = resolved(tiny_sweep, *overrides, number=number)
        assert config.training.batch_size == 8
        assert config.stages["finetune"].epochs == config.stages["finetune_lr0.002"].epochs == 3


def test_overrides_of_a_cycle_go_to_the_runs_that_have_it() -> None:
    sweep = load_sweep(ROOT / "configs" / "cifar10" / "related.yaml")
    sweep.methods = {name: sweep.methods[name] for name in ("l1+step", "imp+llr")}
    override = "stages.imp.stages.retrain.epochs=0.5"
    _, without, run = expand(sweep, [override, "stages.imp.times=2"])[:3]
    assert override not in without.overrides
    stages = load_config(run.config, run.overrides).stages
    assert stages["imp2_retrain"].epochs == 0.5 and "imp3_retrain" not in stages


def test_a_list_has_the_tasks_score_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROOT / "configs" / "sr" / "related" / "dense.yaml"
    sweep = {
        "name": "sr",
        "output": str(tmp_path / "runs"),
        "methods": {"dense": str(row)},
        "ratios": {"x2": {}},
        "seeds": [0],
    }
    path = tmp_path / "sr.yaml"
    path.write_text(yaml.safe_dump(sweep))
    monkeypatch.setattr("sys.argv", ["sweep", "--config", str(path), "--list"])
    main()
    heading = "\n".join(capsys.readouterr().out.splitlines()[:3])
    assert "PSNR dB" in heading and "Top-1" not in heading


def test_finetuning_needs_its_stage() -> None:
    sweep = load_sweep(ROOT / "configs" / "cifar10" / "related.yaml")
    sweep.methods = {"imp": sweep.methods["imp+llr"]}
    sweep.finetuning = {"short": {"epochs": 1, "optimizer": {"lr": 0.1}}}
    with pytest.raises(UserError, match=r"imp_llr\.yaml: stages: .* of a stage 'finetune'"):
        expand(sweep)


def test_another_seed_leaves_all_numbers_as_they_were(tiny_sweep: Path) -> None:
    before = [run.name for run in expand(load_sweep(tiny_sweep))]
    content = yaml.safe_load(tiny_sweep.read_text())
    content["seeds"].append(2)
    tiny_sweep.write_text(yaml.safe_dump(content, sort_keys=False))
    after = [run.name for run in expand(load_sweep(tiny_sweep))]
    assert after[: len(before)] == before and len(after) == len(before) + 2


def test_another_finetuning_makes_a_finished_run_unfinished(tiny_sweep: Path) -> None:
    run = expand(load_sweep(tiny_sweep))[1]
    folder = tiny_sweep.parent / "runs" / run.name
    run = dataclasses.replace(run, folder=folder)
    assert state_of(run).text == "waiting"
    folder.mkdir(parents=True)
    results: dict[str, Any] = {"name": "x", "status": "finished", "stages": {}}
    results["stages"]["evaluate"] = {"kind": "evaluate", "top1": 50.0}
    (folder / "results.json").write_text(json.dumps(results))
    assert state_of(run).text == "under way, evaluate_lr0.002 to do"
    results["stages"]["evaluate_lr0.002"] = {"kind": "evaluate", "top1": 50.0}
    (folder / "results.json").write_text(json.dumps(results))
    assert state_of(run).done
    results["status"] = "running"
    (folder / "results.json").write_text(json.dumps(results))
    log = [{"event": "train", "stage": "finetune", "step": step} for step in range(3, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log) + '{"eve')
    assert state_of(run).text == "under way, finetune 8"


def numbered(number: int) -> SweepRun:
    nowhere = Path("nowhere")
    return SweepRun(number, "x", None, None, None, None, nowhere, nowhere, (), {}, None)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_numbers_as_slurm_writes_them(numbers: set[int]) -> None:
    runs = [numbered(number) for number in range(31)]
    text = _as_ranges(sorted(numbers))
    assert {run.number for run in _chosen(runs, text)} == numbers
    assert text.count(",") + 1 == sum(n - 1 not in numbers for n in numbers)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--only 5", "--only 5: expected N, N-M or N- within 0-4"),
        ("--only 3-1", "--only 3-1: expected N, N-M or N- within 0-4"),
        ("--only x", "--only x: expected N, N-M or N- within 0-4"),
        ("--only 3", "runs/dense/dense/model.safetensors: run 3 starts from it; run number 0 fir"),
        ("--launcher nosuchprogram", "--launcher nosuchprogram: there is no such program"),
        ("output=x", "override 'output=x': the sweep itself says what output is"),
        ("pruning.ratios={}", "override 'pruning.ratios={}': the sweep itself says what pruning"),
        ("stages.nosuch.epochs=1", "no run of the sweep trains in that stage"),
        (
            "stages.finetune.epochs=-1",
            "override 'stages.finetune.epochs=-1': stages.finetune.epochs: input should be greater",
        ),
        ("training.batch_siz=1", "unknown key; did you mean 'batch_size'?"),
        ("data", "override 'data': expected key.sub=value"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    tiny_sweep: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    line: str,
) -> None:
    assert call(monkeypatch, tiny_sweep, *shlex.split(arguments)) == 2
    out, err = capsys.readouterr()
    assert line in err and err.startswith("error: ") and err.count("\n") == 1
    assert out == "" and not (tiny_sweep.parent / "runs").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": [1]}, "seed: unknown key; did you mean 'seeds'?"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: each may be there once"),
        ({"ratios": {"pr1": {"layer*": 1.0}}}, "ratios.pr1.layer*: input should be less than 1"),
        ({"methods": {"l1/x": "l1.yaml"}}, "string should match pattern"),
        ({"methods": {"l1": "no.yaml"}}, "no.yaml: cannot read the configuration"),
        ({"dense": "l1.yaml"}, "l1.yaml: name: this key is missing"),
        ({"published": {"sauce": "x"}}, "published.sauce: unknown key; did you mean 'source'?"),
        (
            {"published": {"source": "x", "speedup": [1.0, 2.0]}},
            "published.speedup: expected 1, one for each ratio",
        ),
        (
            {"published": {"source": "x", "top1": {"lr0.02": {"tppp": [[90.0]]}}}},
            "published.top1.lr0.02.tppp: not in the sweep; there are: l1, tpp",
        ),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(
    tiny_sweep: Path, change: dict[str, Any], line: str
) -> None:
    content = yaml.safe_load(tiny_sweep.read_text()) | change
    tiny_sweep.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        expand(load_sweep(tiny_sweep))
    assert line in str(caught.value)
    assert str(tiny_sweep.parent) in str(caught.value)


def test_a_pattern_that_matches_nothing_is_said_before_the_dense_network_is_trained(
    tiny_sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(tiny_sweep.read_text())
    content["ratios"] = {"pr0.5": {"layer*.conv1": 0.5}, "pr0.7": {"layr*.conv1": 0.7}}
    content.pop("published", None)
    tiny_sweep.write_text(yaml.safe_dump(content))
    assert call(monkeypatch, tiny_sweep) == 2
    err = capsys.readouterr().err
    assert "pr0.7" in err and "pruning pattern 'layr*.conv1' matches no" in err
    assert err.count("\n") == 1 and not (tiny_sweep.parent / "runs").exists()


@pytest.mark.processes
def test_a_dense_run_that_failed_stops_what_starts_from_it(
    tiny_sweep: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tiny_sweep, "--launcher", "false") == 1
    out, err = capfd.readouterr()
    assert "run 0 (dense): exit code 1; the sweep goes on" in err
    assert out.count("not started, as runs/dense/dense/model.safetensors is not there") == 4
    assert out.splitlines()[-1] == "tiny: 0 of 5 runs are done"


def test_a_launcher_of_this_environment_is_found() -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    assert _launcher("torchrun --nproc_per_node 4") == [str(torchrun), "--nproc_per_node", "4"]
    assert _launcher(None) == [sys.executable]
