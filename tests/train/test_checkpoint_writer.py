"""When checkpoints are written, which are kept, which is read, and what survives what."""

import errno
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpp.checkpoints.training_state import (
    TrainingState,
    check_state,
    read_notes,
    read_state,
    state_folder,
    state_folders,
    write_state,
)
from tpp.common.errors import UserError
from tpp.common.files import aside_of
from train.config.sections import CheckpointsSection
from train.run_folder import checkpoints as checkpoint
from train.run_folder.checkpoints import CheckpointWriter, newest_state, remove_leftovers

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def state(step, size=4):
    """A state of which every number is its step."""
    optimizer = {
        "state": {0: {"momentum_buffer": torch.full((size,), float(step))}},
        "param_groups": [{"lr": step, "params": [0]}],
    }
    return TrainingState(step, {"w": torch.full((size,), float(step))}, optimizer, {"at": [step]})


def is_of_step(found, step):
    buffer = found.optimizer["state"][0]["momentum_buffer"]
    return (
        (found.step, found.extra["at"], found.optimizer["param_groups"][0]["lr"])
        == (step, [step], step)
        and bool((found.model["w"] == step).all())
        and bool((buffer == step).all())
    )


def writer_of(folder, said=None, **options):
    say = said.append if said is not None else pytest.fail
    return CheckpointWriter(folder, CheckpointsSection(**options), say=say)


def steps_in(folder):
    return [int(path.name.removeprefix("step-")) for path in state_folders(folder)]


def linked(link):
    return int(link.readlink().name.removeprefix("step-")) if link.is_symlink() else None


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def gate(monkeypatch):
    """Holds every write until it is opened."""
    opened = threading.Event()

    def held(target, state):
        assert opened.wait(30)
        return write_state(target, state)

    monkeypatch.setattr(checkpoint, "write_state", held)
    yield opened
    opened.set()


# ---- writing beside training ----


def test_what_is_written_is_the_state_at_the_call(folder, gate):
    writer = writer_of(folder, keep=3)
    live = state(1)
    for step in (1, 2):
        writer.save(live)
        # Training goes on at once, in place.
        for tensor in (live.model["w"], live.optimizer["state"][0]["momentum_buffer"]):
            tensor += 1
        live.extra["at"][0] += 1
        live.optimizer["param_groups"][0]["lr"] += 1
        live = TrainingState(step + 1, live.model, live.optimizer, live.extra)
        if step == 1:
            gate.set()
    writer.close()
    for step in (1, 2):  # the second did not write over the first one's memory
        assert is_of_step(read_state(state_folder(folder, step)), step)


def test_states_of_changing_shapes_share_one_writer(folder):
    writer = writer_of(folder, keep=9)
    states = [state(1, 4), state(2, 6), state(3, 6), state(4, 4)]
    states.append(
        TrainingState(5, {"v": torch.ones(2, 3).half().T}, {"state": {}, "param_groups": []}, {})
    )
    for one in states:
        writer.save(one)
    writer.close()
    for one in states:
        found = read_state(state_folder(folder, one.step))
        assert found.model.keys() == one.model.keys()
        assert all(torch.equal(found.model[key], one.model[key]) for key in one.model)
        assert all(found.model[key].dtype == one.model[key].dtype for key in one.model)


def test_the_copy_takes_one_thread_and_leaves_training_its_own(folder, monkeypatch):
    before, during = torch.get_num_threads(), []
    copies = CheckpointWriter._copies

    def recorded(*arguments):
        during.append(torch.get_num_threads())
        return copies(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_copies", recorded)
    torch.set_num_threads(2)
    try:
        writer = writer_of(folder)
        writer.save(state(1))
        writer.close()
        assert set(during) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_second_save_waits_for_the_first_write(folder, gate):
    writer = writer_of(folder)
    writer.save(state(1))
    assert steps_in(folder) == []  # save came back while nothing is written
    writer.check()
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    stood_still = writer.save(state(2))
    assert gate.is_set() and check_state(state_folder(folder, 1)) == 1
    assert stood_still > 0
    writer.close()
    assert steps_in(folder) == [2, 1]


def test_without_a_thread_it_is_written_at_once(folder, monkeypatch):
    threads = []

    def recorded(target, state):
        threads.append(threading.current_thread())
        return write_state(target, state)

    monkeypatch.setattr(checkpoint, "write_state", recorded)
    writer = writer_of(folder, asynchronous=False)
    for step in (1, 2, 3):
        writer.save(state(step))
        assert is_of_step(read_state(state_folder(folder, step)), step)
    assert steps_in(folder) == [3, 2] and set(threads) == {threading.main_thread()}
    writer.close()
    writer.close()


def test_files_are_on_the_disk_before_the_checkpoint_appears(folder, tmp_path, monkeypatch):
    log, events = tmp_path / "log.jsonl", tmp_path / "events"
    for path in (log, events):
        path.write_text("x")
    target, fsync, early = state_folder(folder, 1), os.fsync, set()

    def record(descriptor):
        if not target.exists():
            early.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    writer = writer_of(folder)
    writer.save(state(1), also_sync=[log, tmp_path / "no longer there", events])
    writer.close()
    assert target.exists() and {path.stat().st_ino for path in (log, events)} <= early


def spoiled(folder, **options):
    """A writer with one checkpoint written, whose next writes fail."""
    said = []
    writer = writer_of(folder, said, **options)
    writer.save(state(1))
    writer.wait()
    kept = folder.rename(folder.with_name("elsewhere"))
    folder.write_text("in the way")
    return writer, said, kept


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("how", ["check", "wait", "save", "close"])
def test_an_error_of_the_writer_is_raised_in_the_run(folder, asynchronous, how):
    writer, said, kept = spoiled(folder, asynchronous=asynchronous)
    message = r"step-00000002: cannot write the checkpoint: "
    with pytest.raises(UserError, match=message):
        writer.save(state(2))
        if how == "check":
            while writer._writing is not None:
                writer.check()
        elif how == "save":
            writer.save(state(3))
        else:
            getattr(writer, how)()
    # It is raised once, and the older one is as it was.
    writer.check()
    writer.close()
    assert said == [] and is_of_step(read_state(kept / "step-00000001"), 1)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_or_said_every_time_and_training_goes_on(folder, asynchronous):
    writer, said, kept = spoiled(folder, asynchronous=asynchronous, on_error="continue")
    for step in (2, 3):
        writer.save(state(step))
        writer.wait()
        assert len(said) == step - 1
        assert f"step-{step:08d}: cannot write the checkpoint: " in said[-1]
        assert said[-1].endswith("; training goes on without it") and "\n" not in said[-1]
    folder.unlink()
    kept.rename(folder)
    writer.save(state(4))
    writer.close()
    assert steps_in(folder) == [4, 1] and len(said) == 2


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_mistake_of_the_program_is_not_swallowed(folder, on_error):
    said = []
    writer = writer_of(folder, said, on_error=on_error)
    writer.save(TrainingState(1, {}, state(1).optimizer, {"not": {1, 2}}))
    with pytest.raises(TypeError):
        writer.wait()
    writer.close()
    assert said == []


def test_close_hides_no_exception_under_way(folder):
    writer, said, _ = spoiled(folder)
    with pytest.raises(ZeroDivisionError):
        try:
            writer.save(state(2))
            raise ZeroDivisionError
        finally:
            writer.close()
    assert len(said) == 1 and "step-00000002: cannot write the checkpoint" in said[0]


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_run_folder_that_vanishes(tmp_path, monkeypatch, when):
    folder = tmp_path / "run" / "dense" / "checkpoints"
    folder.parent.mkdir(parents=True)
    writer = writer_of(folder)
    writer.save(state(1))
    writer.wait()
    fsync = os.fsync

    def vanish(descriptor):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        fsync(descriptor)

    if when == "before":
        shutil.rmtree(tmp_path / "run")
    else:
        monkeypatch.setattr(os, "fsync", vanish)
    writer.save(state(2))
    with pytest.raises(UserError, match=r"cannot write .*: the folder .*checkpoints has vanished"):
        writer.close()
    assert list(tmp_path.iterdir()) == []  # and is not made anew


# ---- full and read-only disks ----


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk(small_disk, on_error):
    folder, said = small_disk / "checkpoints", []
    writer = writer_of(folder, said, on_error=on_error)
    writer.save(state(1, 90_000))  # 720 kB
    writer.wait()
    (small_disk / "filler").write_bytes(bytes(900_000))
    message = (
        f"{folder}/step-00000002: cannot write the checkpoint: No space left on device: it needs "
        r"7\d\d\.\d kB, 4\d\d\.\d kB are free"
    )
    writer.save(state(2, 90_000))
    if on_error == "stop":
        with pytest.raises(UserError, match=message):
            writer.wait()
    else:
        writer.wait()
        assert len(said) == 1
        with pytest.raises(UserError, match=message):
            raise UserError(said[0])
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001"]
    assert newest_state(folder)[0].step == 1
    (small_disk / "filler").unlink()
    writer.save(state(3, 90_000))
    writer.close()
    found, passed_over = newest_state(folder)
    assert is_of_step(found, 3) and passed_over == []


def test_a_disk_that_became_read_only(small_disk):
    folder, said = small_disk / "checkpoints", []
    writer = writer_of(folder, said, on_error="continue")
    for step in (1, 2):
        writer.save(state(step))
        writer.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    writer.save(state(3))
    writer.wait()
    assert len(said) == 1 and "Read-only file system" in said[0]
    # What cannot be deleted is said once.
    writer.clean_up()
    writer.clean_up()
    assert len(said) == 3
    assert all("cannot delete this old checkpoint: Read-only" in line for line in said[1:])
    assert remove_leftovers(small_disk) == []
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    writer.save(state(4))
    writer.close()
    assert steps_in(folder) == [4, 2]


# ---- what is kept ----


@dataclass
class Model:
    """What should be on the disk: {step: [number, score, damage]}."""

    keep: int
    keep_every: int | None
    keep_best: bool
    there: dict

    def whole(self):
        return [step for step in sorted(self.there) if self.there[step][2] is None]

    def save(self, step, score):
        before = [one for one in self.whole() if one < step]
        self.there[step] = [self.there[before[-1]][0] + 1 if before else 1, score, None]
        best = self.best()
        kept = {}
        for one, (number, score, damage) in self.there.items():
            newer = [other for other in self.whole() if other > one]
            for_good = self.keep_every and number % self.keep_every == 0 and damage != "state.json"
            if len(newer) < self.keep or for_good or one == best:
                kept[one] = [number, score, damage]
        self.there = kept

    def best(self):
        scored = [step for step in self.whole() if self.there[step][1] is not None]
        if not self.keep_best or not scored:
            return None
        return max(scored, key=lambda step: (self.there[step][1], -step))


SAVES = st.tuples(st.just("save"), st.integers(1, 3), st.sampled_from([None, 10.0, 20.0, 30.0]))
RESUMES = st.tuples(
    st.just("resume"),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([None, None, "state.json", "model.safetensors"]),
)


@given(
    keep=st.integers(1, 3),
    keep_every=st.sampled_from([None, 1, 2, 3]),
    keep_best=st.booleans(),
    asynchronous=st.booleans(),
    acts=st.lists(SAVES | RESUMES, max_size=14),
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept(keep, keep_every, keep_best, asynchronous, acts):
    """Against a model that knows the whole history and nothing of how it is found again."""
    options = dict(keep=keep, keep_every=keep_every, keep_best=keep_best)
    model = Model(**options, there={})
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        folder = Path(root) / "checkpoints"
        writer = writer_of(folder, **options, asynchronous=asynchronous)
        step = 0
        for act, amount, other in acts:
            if act == "save":
                step += amount
                writer.save(state(step), score=other)
                writer.wait()
                model.save(step, other)
                assert linked(folder / "latest") == step
            else:
                writer.close()
                damaged = sorted(model.there, reverse=True)[amount : amount + 1]
                if other and damaged and model.there[damaged[0]][2] is None:
                    model.there[damaged[0]][2] = other
                    (state_folder(folder, damaged[0]) / other).write_bytes(b"damaged")
                found, passed_over = newest_state(folder)
                whole = model.whole()
                assert (found.step if found else None) == (whole[-1] if whole else None)
                step = whole[-1] if whole else 0
                assert len(passed_over) == sum(one > step for one in model.there)
                writer = writer_of(folder, **options, asynchronous=asynchronous)
            assert steps_in(folder) == sorted(model.there, reverse=True)
            if act == "save":
                assert linked(folder / "best") == model.best()
        writer.clean_up()
        for_good = {
            one
            for one, (number, _, damage) in model.there.items()
            if (keep_every and number % keep_every == 0 and damage != "state.json")
            or one == model.best()
        }
        assert set(steps_in(folder)) == for_good
        assert folder.exists() == bool(for_good)
        writer.close()


def test_a_step_that_is_saved_again_counts_once(folder):
    writer = writer_of(folder)
    for step, score in ((1, None), (2, None), (2, 50.0), (3, None)):
        writer.save(state(step), score=score)
    writer.close()
    found = [read_notes(path) for path in state_folders(folder)]
    assert found == [(3, None), (2, 50.0)]


def test_a_score_that_is_no_number_is_never_the_best(folder):
    writer = writer_of(folder, keep=1, keep_best=True)
    for step, score in ((1, math.nan), (2, 1.0), (3, math.nan), (4, None)):
        writer.save(state(step), score=score)
    writer.close()
    assert steps_in(folder) == [4, 2] and linked(folder / "best") == 2


def test_a_best_one_that_is_damaged_takes_nobodys_place(folder):
    writer = writer_of(folder, keep=1, keep_best=True)
    for step, score in ((1, 70.0), (2, 60.0)):
        writer.save(state(step), score=score)
    writer.close()
    (state_folder(folder, 1) / "model.safetensors").write_bytes(b"damaged")
    writer = writer_of(folder, keep=1, keep_best=True)
    writer.save(state(3), score=50.0)
    writer.close()
    assert steps_in(folder) == [3, 2] and linked(folder / "best") == 2


def test_deleting_never_leaves_a_half_of_one_by_its_name(folder, monkeypatch):
    writer = writer_of(folder, keep=1)
    writer.save(state(1))
    writer.wait()

    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.save(state(2))
        writer.close()
    monkeypatch.undo()
    assert steps_in(folder) == [2]
    removed = remove_leftovers(folder)
    assert len(removed) == 1 and removed[0].name.startswith(".step-00000001.")
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]


def test_where_there_are_no_links_nothing_is_said(folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    writer = writer_of(folder)
    writer.save(state(1))
    writer.close()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


# ---- what is read ----


def test_damaged_ones_are_passed_over_and_written_again(folder):
    writer = writer_of(folder, keep=3)
    for step in (1, 2, 3):
        writer.save(state(step))
    writer.close()
    (state_folder(folder, 3) / "model.safetensors").unlink()
    with (state_folder(folder, 2) / "state.json").open("r+b") as file:
        file.seek(5)
        file.write(b"!")
    found, passed_over = newest_state(folder)
    assert is_of_step(found, 1)
    assert passed_over == [
        f"{folder}/step-00000003/model.safetensors: missing",
        f"{folder}/step-00000002/state.json: damaged: its sha256 is not the one noted",
    ]
    writer = writer_of(folder, keep=3)
    for step in (2, 3):
        writer.save(state(step))
        writer.wait()
        found, _ = newest_state(folder)
        assert is_of_step(found, step) and found.number == step
    writer.close()


def test_nothing_to_resume_from(tmp_path):
    assert newest_state(tmp_path / "nothing") == (None, [])
    assert newest_state(tmp_path) == (None, [])
    state_folder(tmp_path, 1).mkdir()
    found, passed_over = newest_state(tmp_path)
    assert found is None
    assert passed_over == [f"{tmp_path}/step-00000001/manifest.json: missing"]


def failing(monkeypatch, name, error, times):
    """A function of the module that fails some times before it does its work."""
    real, left = getattr(checkpoint, name), iter([error] * times)

    def read(path):
        for found in left:
            raise found
        return real(path)

    monkeypatch.setattr(checkpoint, name, read)
    monkeypatch.setattr(checkpoint, "_WAITS_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def two(folder):
    writer = writer_of(folder)
    for step in (1, 2):
        writer.save(state(step))
    writer.close()
    return folder


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["read_state", "state_folders"])
def test_an_error_that_passes_costs_no_checkpoint(two, monkeypatch, name, code):
    failing(monkeypatch, name, OSError(code, os.strerror(code)), times=3)
    found, passed_over = newest_state(two)
    assert found.step == 2 and passed_over == []


def test_an_error_that_stays(two, monkeypatch):
    error = OSError(errno.EIO, os.strerror(errno.EIO), str(two / "step-00000002" / "state.json"))
    failing(monkeypatch, "read_state", error, times=4)
    found, passed_over = newest_state(two)
    assert found.step == 1
    assert passed_over == [f"{two}/step-00000002/state.json: Input/output error"]
    failing(monkeypatch, "state_folders", error, times=4)
    with pytest.raises(UserError, match=r"checkpoints: cannot read the checkpoints: Input/output"):
        newest_state(two)


def test_what_must_not_be_read_is_not_taken_for_damage(two, monkeypatch):
    place = str(two / "step-00000002" / "model.safetensors")
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)
    failing(monkeypatch, "read_state", error, times=1)
    with pytest.raises(UserError, match=rf"{place}: no permission to read the checkpoint"):
        newest_state(two)


# ---- what a killed process leaves ----


def test_leftovers_go_and_nothing_else(tmp_path):
    stay = ["log.jsonl", ".hidden", ".x.tmp", "x.12.tmp", "dense/.config.12.tmp.yaml"]
    go = [".log.jsonl.12.tmp", "dense/.model.safetensors.7.tmp", "dense/a/.step-00000001.9.tmp/x"]
    for name in (*stay, *go):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".latest.12.tmp").symlink_to("nowhere")
    removed = {str(path.relative_to(tmp_path)) for path in remove_leftovers(tmp_path)}
    assert removed == {".latest.12.tmp", *go[:2], "dense/a/.step-00000001.9.tmp"}
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(stay)
    assert remove_leftovers(tmp_path / "nothing") == []


def test_a_whole_one_is_put_in_its_place(folder):
    """Killed just before its name, or while it was exchanged for another of the same step."""
    old, new = state_folder(folder, 1), state_folder(folder, 2)
    before = aside_of(old.with_name(f"{old.name}.before"))
    for place in (old, new):
        write_state(place, state(1 if place is old else 2))
    shutil.copytree(old, aside_of(old))
    old.rename(before)  # both are whole: the new one counts
    shutil.copytree(new, folder / ".step-00000003.1.tmp")  # whole, but not what its name says
    (folder / ".step-00000004.1.tmp").mkdir()
    removed = remove_leftovers(folder)
    assert {path.name for path in removed} == {
        *(before.name, ".step-00000003.1.tmp", ".step-00000004.1.tmp")
    }
    assert steps_in(folder) == [2, 1] and is_of_step(read_state(old), 1)
    old.rename(before)
    shutil.copytree(new, aside_of(new))  # its place is taken
    assert remove_leftovers(folder) == [aside_of(new)]
    assert steps_in(folder) == [2, 1] and is_of_step(read_state(old), 1)


@pytest.fixture(scope="module")
def processes():
    """Processes of their own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "train.run_folder.checkpoints", "hypothesis"])
    return context


def write_on_and_on(folder, started):
    writer = writer_of(folder, [], keep=1)
    first = (newest_state(folder)[0] or state(0)).step + 1
    for step in range(first, 10**6):
        writer.save(state(step, 200_000))
        started.send(step - 1)  # save waited for the one before, so that is on the disk


def test_a_kill_at_any_moment_costs_the_one_under_way_at_most(folder, processes):
    """Killed with SIGKILL while it writes one checkpoint after the other, each over the last."""
    moments, unfinished = random.Random(0), 0
    for _ in range(12):
        mine, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=write_on_and_on, args=(folder, theirs), daemon=True)
        process.start()
        assert mine.poll(300)  # a busy machine imports slowly
        done, last = mine.recv(), time.monotonic() + moments.uniform(0.0, 0.2)
        while time.monotonic() < last:
            if mine.poll(0.001):
                done = mine.recv()
        process.kill()
        process.join()
        theirs.close()
        try:
            while True:  # what was still in the pipe
                done = mine.recv()
        except EOFError:
            pass
        found, passed_over = newest_state(folder)
        assert passed_over == [] and is_of_step(found, found.step) and found.step >= done
        unfinished += any(path.name.startswith(".step-") for path in folder.iterdir())
        remove_leftovers(folder)
        again, passed_over = newest_state(folder)
        assert passed_over == [] and is_of_step(again, again.step) and again.step >= found.step
        assert not any(path.name.startswith(".") for path in folder.iterdir())
    assert unfinished >= 3  # most of the kills came while something was being written


def end_with_an_error(folder):
    writer_of(folder).save(state(1, 3_000_000))
    raise ZeroDivisionError


def test_a_process_that_ends_with_an_error_still_writes_what_it_began(folder, processes):
    """Without anybody calling close."""
    process = processes.Process(target=end_with_an_error, args=(folder,))
    process.start()
    process.join(300)
    assert process.exitcode == 1
    assert check_state(state_folder(folder, 1)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_are_copied_as_they_are_at_the_call(folder, gate):
    writer = writer_of(folder, keep=3)
    live = torch.zeros(10_000_000, device="cuda")
    for step in (1, 2):
        live += 1
        writer.save(TrainingState(step, {"w": live}, {"state": {}, "param_groups": []}, {}))
        live *= 2
        live /= 2
        gate.set()
    writer.close()
    for step in (1, 2):
        found = read_state(state_folder(folder, step)).model["w"]
        assert found.device.type == "cpu" and bool((found == step).all())
