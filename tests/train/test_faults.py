"""What may go wrong around a run: full disks, other settings, other networks, other ranks."""

import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from poison_main import Poison
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tpp.checkpoints.training_state import read_state, state_folders, write_state
from tpp.common.errors import UserError
from tpp.methods import available_methods
from train.monitor import Monitor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken_off(tiny_config, run_inside, capsys, monkeypatch):
    """A run of one stage that ended at its seventh step, with checkpoints 3 and 6."""
    monkeypatch.setitem(available_methods(), "poison", Poison)
    method = {"name": "poison", "steps": [6], "slope": "nan"}
    tiny_config["training"]["log_every"] = 1
    tiny_config["checkpoints"] = {"every": "3 steps"}
    tiny_config["stages"] = {"finetune": {"epochs": 2, "optimizer": {"lr": 0.02}, "method": method}}
    run_inside(tiny_config, expect=2)
    capsys.readouterr()
    return tiny_config


def checkpoints(config: dict[str, Any]) -> Path:
    return Path(config["output"]) / "finetune" / "checkpoints"


def logged(config: dict[str, Any], event: str) -> list[dict[str, Any]]:
    lines = (Path(config["output"]) / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def test_harmless_changes_go_on_and_others_are_all_named(broken_off, run_inside, capsys):
    changed = ["seed=7", "training.batch_size=8", "training.log_every=3"]
    run_inside(broken_off, *changed, expect=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log_every" not in error
    assert "seed was 0 and is 7, training.batch_size was 16 and is 8; choose another" in error
    run_inside(broken_off, "training.on_bad_step=skip", "checkpoints.every=1 minute")
    assert "finetune: resumed after 6 steps" in capsys.readouterr().out
    assert [entry["step"] for entry in logged(broken_off, "bad_step")] == [7]


def test_tensorboard_goes_on_without_a_gap_or_a_doubled_step(broken_off, run_inside):
    run_inside(broken_off, "training.on_bad_step=skip", "training.evaluate_every=0.5")
    events = EventAccumulator(str(checkpoints(broken_off).parent))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == [*range(1, 7), *range(8, 13)]  # step 7 was left out
    assert [event.step for event in events.Scalars("val/top1")] == [9, 12]
    assert [entry["step"] for entry in logged(broken_off, "train")] == steps


def test_a_checkpoint_of_another_network_is_refused(broken_off, run_inside, capsys):
    newest = state_folders(checkpoints(broken_off))[0]
    state = read_state(newest)
    narrow = {name: tensor[:1] if tensor.dim() else tensor for name, tensor in state.model.items()}
    write_state(newest, replace(state, model=narrow))
    before = sorted(path.name for path in newest.iterdir())
    run_inside(broken_off, "training.on_bad_step=skip", expect=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {newest.parent}: holds a checkpoint of another network")
    assert error.count("\n") == 1
    assert sorted(path.name for path in newest.iterdir()) == before


def test_a_newer_version_is_refused_and_not_passed_over(broken_off, run_inside, capsys):
    newest = state_folders(checkpoints(broken_off))[0]
    manifest = newest / "manifest.json"
    content = json.loads(manifest.read_text()) | {"version": 3}
    del content["sha256"]
    text = json.dumps(content, indent=1) + "\n"
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(content, indent=1) + "\n")
    run_inside(broken_off, "training.on_bad_step=skip", expect=2)
    error = capsys.readouterr().err
    assert str(newest) in error and "version 3" in error and error.count("\n") == 1


class Filler(Poison):
    """Fills the disk after one step and makes room again after another."""

    folder: Path
    full: int | None = 4
    room = 9

    def after_step(self, step: int) -> None:
        super().after_step(step)
        filler = self.folder / "filler"
        if step == self.full:
            # Checkpoints are written in the background; the disk is full for what comes next.
            with filler.open("wb") as file:
                free = shutil.disk_usage(self.folder).free
                file.write(b"x" * (free - 150_000))
        if step == self.room:
            filler.unlink(missing_ok=True)


@pytest.fixture
def filling(tiny_config, small_disk, monkeypatch):
    monkeypatch.setitem(available_methods(), "poison", Filler)
    monkeypatch.setattr(Filler, "folder", small_disk, raising=False)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    tiny_config["output"] = str(small_disk / "run")
    tiny_config["checkpoints"] = {"every": "3 steps", "asynchronous": False}
    method = {"name": "poison", "steps": []}
    tiny_config["stages"] = {"finetune": {"epochs": 2, "optimizer": {"lr": 0.02}, "method": method}}
    return tiny_config


def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoint(
    filling, run_inside, capsys, monkeypatch
):
    run_inside(filling, expect=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step-00000006" in error, error
    assert "it needs 6" in error and " kB are free" in error
    assert [path.name for path in state_folders(checkpoints(filling))] == ["step-00000003"]
    (Path(filling["output"]).parent / "filler").unlink()
    monkeypatch.setattr(Filler, "full", None)
    run_inside(filling)
    assert "finetune: resumed after 3 steps" in capsys.readouterr().out


def test_a_run_may_go_on_over_a_full_disk(filling, run_inside, capsys):
    """Two checkpoints cannot be written; nothing is lost of the run."""
    filling["checkpoints"] |= {"on_error": "continue", "keep": 1, "keep_every": 1}
    run_inside(filling)
    out = capsys.readouterr().out
    assert out.count("are free") == 2 and "step-00000006" in out and "step-00000009" in out
    assert [path.name for path in state_folders(checkpoints(filling))] == ["step-00000003"]
    assert (checkpoints(filling).parent / "model.safetensors").exists()


def test_a_run_folder_that_cannot_be_written(tiny_config, small_disk, run_inside, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    tiny_config["output"] = str(small_disk / "run")
    run_inside(tiny_config, expect=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and tiny_config["output"] in error
    assert "Read-only file system" in error


class Vanisher(Poison):
    """Removes the run folder in the middle of a stage, as an unmounted disk would be gone."""

    folder: Path

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if step == 4:
            self.folder.rename(self.folder.with_name("elsewhere"))


def test_a_vanished_run_folder_ends_the_run_and_is_not_made_anew(
    tiny_config, run_inside, capsys, monkeypatch
):
    monkeypatch.setitem(available_methods(), "poison", Vanisher)
    folder = Path(tiny_config["output"])
    monkeypatch.setattr(Vanisher, "folder", folder, raising=False)
    tiny_config["training"]["log_every"] = 50
    method = {"name": "poison", "steps": []}
    finetune = {"epochs": 2, "optimizer": {"lr": 0.02}, "method": method}
    tiny_config["stages"] = {"finetune": finetune}
    run_inside(tiny_config, expect=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder) in error
    assert not folder.exists()
    found = state_folders(folder.with_name("elsewhere") / "finetune" / "checkpoints")
    assert not found or read_state(found[0]).step == 5


def test_a_run_goes_on_with_another_number_of_ranks(tiny_config, run_main):
    """The same images in the same order; with BatchNorm over all ranks, the same to rounding."""
    tiny_config["training"] |= {"sync_batchnorm": True, "log_every": 1}
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.001}}}
    undisturbed = copy.deepcopy(tiny_config)
    undisturbed["output"] += "-undisturbed"
    run_main(undisturbed)
    folder = Path(tiny_config["output"]) / "regularize"
    run_main(tiny_config, kill_when=folder / "checkpoints" / "step-00000005")
    resumed = run_main(tiny_config, ranks=2)
    assert "regularize: resumed after " in resumed.stdout
    one = load_file(folder / "model.safetensors")
    other = load_file(Path(undisturbed["output"]) / "regularize" / "model.safetensors")
    assert 0 < max((one[k].double() - other[k].double()).abs().max().item() for k in one) < 2e-4
    losses = [
        torch.tensor([entry["loss"] for entry in logged(config, "train")])
        for config in (tiny_config, undisturbed)
    ]
    assert torch.allclose(*losses, rtol=1e-4, atol=1e-6)


def test_two_runs_on_one_folder(tiny_config, run_inside, capsys, tmp_path):
    """The second is refused while the first lives, and takes over after it died."""
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.01}}}
    folder = Path(tiny_config["output"])
    path = tmp_path / "first.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--config", str(path)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as first:
        try:
            while not (folder / "regularize" / "checkpoints" / "step-00000005").exists():
                assert first.poll() is None
                time.sleep(0.005)
            first.send_signal(signal.SIGSTOP)  # it lives, and cannot end meanwhile
            os.waitpid(first.pid, os.WUNTRACED)
            before = sorted(folder.rglob("*"))
            run_inside(tiny_config, expect=2)
        finally:
            first.kill()
    error = capsys.readouterr().err
    holder = f"process {first.pid} on "
    assert error.startswith(f"error: {folder}: another run has this folder: {holder}")
    assert error.count("\n") == 1 and sorted(folder.rglob("*")) == before
    run_inside(tiny_config)
    printed = capsys.readouterr()
    assert f"taken over from a run that died: {holder}" in printed.err
    assert "regularize: resumed after " in printed.out


def test_a_stopped_rank_is_named_and_the_restarted_run_ends_the_same(
    tiny_config, run_main, tmp_path
):
    """One rank of two is stopped in the middle of training; torchrun starts both again."""
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.01}}}
    tiny_config["training"]["rank_timeout"] = 5.0
    undisturbed = copy.deepcopy(tiny_config)
    undisturbed["output"] += "-undisturbed"
    run_main(undisturbed, ranks=2)
    folder = Path(tiny_config["output"]) / "regularize"
    path = tmp_path / "stopped.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += ["--nproc_per_node=2", str(ROOT / "train" / "main.py"), "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as launcher:
        while not (folder / "checkpoints" / "step-00000005").exists():
            assert launcher.poll() is None
            time.sleep(0.005)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        (second,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
        second.suspend()
        _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    assert err.count("rank 1 (host ") == 1
    assert f"pid {second.pid}) has given no sign of life for 5 s" in err
    one = load_file(folder / "model.safetensors")
    other = load_file(Path(undisturbed["output"]) / "regularize" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}', '{"settings": 3, "results": 4}'])
def test_a_damaged_done_marker_is_named(tiny_config, run_inside, capsys, content):
    marker = Path(tiny_config["output"]) / "dense" / "done.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(content)
    run_inside(tiny_config, expect=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {marker}: not ") and error.count("\n") == 1
    assert marker.read_text() == content


def test_a_log_keeps_what_it_can_and_is_not_written_through_a_link(tmp_path):
    """Half a line of a killed run, and what others wrote, go; entries of other stages stay."""
    lines = [
        '{"stage": "dense", "event": "train", "step": 9}',
        '{"stage": "finetune", "event": "train", "step": 3}',
        '{"stage": "finetune", "event": "train", "step": 4}',
        '{"stage": "finetune", "event": "stage"}',
        '{"event": "train"}',
        "[]",
        '{"stage": "finetune", "event": "tr',
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    Monitor(tmp_path, "finetune", 10, 3, before=0, configuration="", enabled=True).close()
    assert log.read_text().splitlines() == [lines[0], lines[1], lines[3]]
    log.rename(tmp_path / "elsewhere")
    log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"log\.jsonl: a symbolic link"):
        Monitor(tmp_path, "finetune", 10, 3, before=0, configuration="", enabled=True)
