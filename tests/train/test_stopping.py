"""Runs that are asked to stop by a signal, as SLURM does it, and go on from the very step."""

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from poison_main import Poison
from safetensors.torch import load_file

from tpp.checkpoints.training_state import read_state, state_folders
from tpp.methods import available_methods
from train.distributed.stopping import SIGNALS

WORKER = Path(__file__).parent / "poison_main.py"
EXIT = 75


@pytest.fixture
def own_signals():
    """Put back what a run in this process has set."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopping(config: dict[str, Any], output: Path, epochs: int, **settings: Any) -> dict[str, Any]:
    """A finetune stage that is signalled; 6 steps are an epoch."""
    config = copy.deepcopy(config)
    method = {"name": "poison", "steps": [], **settings}
    stage = {"epochs": epochs, "optimizer": {"lr": 0.02}, "method": method}
    # No checkpoint is due before the end.
    return config | {
        "output": str(output),
        "checkpoints": {"every": "1000 steps"},
        "stages": {"finetune": stage, "evaluate": {}},
    }


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return load_file(Path(config["output"]) / "finetune" / "model.safetensors")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def logged(config: dict[str, Any], event: str) -> list[dict[str, Any]]:
    lines = (Path(config["output"]) / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [entry for entry in found if entry["event"] == event]


def newest(config: dict[str, Any]) -> int:
    return read_state(state_folders(Path(config["output"]) / "finetune" / "checkpoints")[0]).step


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_it_stops_at_the_step_and_ends_as_if_it_had_not(
    tiny_config, tmp_path, run_inside, capsys, monkeypatch, own_signals, name
):
    monkeypatch.setitem(available_methods(), "poison", Poison)
    tiny_config["training"] |= {"log_every": 1, "evaluate_every": 1, "statistics_every": 3}
    whole = stopping(tiny_config, tmp_path / "whole", 3)
    run_inside(whole)
    # Step 6 is the end of an epoch: an evaluation is due there, and must not be lost.
    broken = stopping(tiny_config, tmp_path / "broken", 3, signal=name, steps=[5])
    capsys.readouterr()
    run_inside(broken, expect=EXIT)
    out = capsys.readouterr().out
    assert f"stopped by {name} after step 6 of stage finetune; started again, the run" in out
    assert newest(broken) == 6
    assert [entry["step"] for entry in logged(broken, "evaluate")] == []
    status = json.loads((tmp_path / "broken" / "results.json").read_text())["status"]
    assert status == "stopped"

    run_inside(broken)
    assert "finetune: resumed after 6 steps" in capsys.readouterr().out
    assert same(weights(broken), weights(whole))
    for event in ("evaluate", "train"):
        expected = [entry["step"] for entry in logged(whole, event)]
        assert [entry["step"] for entry in logged(broken, event)] == expected
    assert logged(broken, "evaluate")[0]["top1"] == logged(whole, "evaluate")[0]["top1"]


def test_a_signal_before_a_stage_stops_it_there(
    tiny_config, tmp_path, run_inside, capsys, monkeypatch, own_signals
):
    """The last step of a stage is its end, and the stop comes after it."""
    monkeypatch.setitem(available_methods(), "poison", Poison)
    config = stopping(tiny_config, tmp_path / "run", 1, signal="SIGUSR1", steps=[5])
    run_inside(config, expect=EXIT)
    assert "stopped by SIGUSR1 before stage evaluate" in capsys.readouterr().out
    assert (tmp_path / "run" / "finetune" / "done.json").exists()
    run_inside(config)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "finished"


def test_one_rank_is_signalled_and_all_stop_at_the_same_step(tiny_config, tmp_path, run_main):
    tiny_config["training"] |= {"evaluate_every": 100, "log_every": 100}
    # More steps than the ranks ever let pass between two questions.
    whole = stopping(tiny_config, tmp_path / "whole", 24)
    run_main(whole, ranks=2, script=WORKER)
    broken = stopping(tiny_config, tmp_path / "broken", 24, signal="SIGTERM", steps=[10], rank=1)
    stopped = run_main(broken, ranks=2, script=WORKER, expect=EXIT)
    assert stopped.stdout.count("stopped by SIGTERM after step ") == 1, stopped
    step = newest(broken)
    assert f"stopped by SIGTERM after step {step} of" in stopped.stdout
    assert 10 < step < 144
    run_main(broken, ranks=2, script=WORKER)
    assert same(weights(broken), weights(whole))


def test_a_loaders_processes_outlive_the_signal(tiny_config, tmp_path, run_main):
    """SLURM signals every process of a step, and the step under way needs its loader."""
    name = "SIGUSR1"  # for SIGTERM see test_worker_signals.py
    tiny_config["data"] |= {"loader": "torchvision", "threads": 2}
    tiny_config["training"]["evaluate_every"] = 100
    config = stopping(tiny_config, tmp_path / "run", 8, signal=name, group=True, steps=[20])
    for expect, said in ((EXIT, f"stopped by {name} after step 21 of"), (0, "after 21 steps")):
        done = run_main(config, script=WORKER, expect=expect)
        assert said in done.stdout, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "died" not in done.stderr
