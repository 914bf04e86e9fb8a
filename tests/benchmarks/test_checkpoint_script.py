"""The checkpoint benchmark runs, and measures what it says."""

import json
import threading

import pytest

from benchmarks.checkpoint import Training, main, measure
from tpp.checkpoints.training_state import write_state
from tpp.common.errors import run_command
from train.run_folder import checkpoints as checkpoint
from train.run_folder.checkpoints import newest_state


def test_both_ways_write_checkpoints_that_can_be_resumed_from(tmp_path, monkeypatch):
    in_main_thread = {}

    def recorded(target, state):
        way = target.parent.name
        in_main_thread[way] = threading.current_thread() is threading.main_thread()
        return write_state(target, state)

    monkeypatch.setattr(checkpoint, "write_state", recorded)
    training = Training("cifar_resnet8", "cpu", batch=2, side=16)
    found = measure(training, tmp_path, rounds=2, steps=1)
    assert training.state().optimizer["state"][0]["momentum_buffer"].any()
    assert in_main_thread == {"waiting": True, "beside": False}
    for way in ("waiting", "beside"):
        state, passed_over = newest_state(tmp_path / way)
        assert state is not None and passed_over == []
        assert state.optimizer["state"].keys() == training.state().optimizer["state"].keys()
    assert len(found["rounds"]) == 2
    for one in found["rounds"]:
        assert one["stall_over_synchronous"] == one["stall"] / one["synchronous"]
        assert one["stall_over_step"] == one["stall"] / one["step"]
    assert found["bytes"] > 4 * 2 * sum(
        tensor.numel() for tensor in training.state().model.values() if tensor.dim() == 4
    )


def test_the_script_writes_its_results(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "checkpoint.json"
    tiny = ("--model", "cifar_resnet8", "--rounds", "1", "--steps", "1", "--image-size", "16")
    arguments = [*tiny, "--work", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["checkpoint", *arguments])
    run_command(main)
    results = json.loads(output.read_text())
    assert results["model"] == "cifar_resnet8" and results["on"]["torch"]
    assert f"{results['stall_over_synchronous']:.1%}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # nothing is left behind


PROGRAM = "python -m benchmarks.checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--work", "/no/such/folder"), "error: --work /no/such/folder: no such folder\n"),
        (("--rounds", "0"), f"error: {PROGRAM}: --rounds: must be at least 1, not 0\n"),
    ],
)
def test_mistakes(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["checkpoint", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert (ended.value.code, capsys.readouterr().err) == (2, message)
