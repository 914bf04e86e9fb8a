"""Copies of a run in an object store: whole or absent, in nobody's way, and gone on from."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from object_service import BUCKET, SECRETS, ObjectService, object_service
from safetensors.torch import load_file

import tpp.common.object_storage
from data_pipelines.images.image_index import open_images
from data_pipelines.sets.shard_writer import write_shards
from tpp.common.errors import UserError
from tpp.common.object_storage import StorageError, Store
from train.copies import COPY_FILE, RunCopies

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def running():
    with object_service() as service:
        yield service


@pytest.fixture
def service(running: ObjectService, monkeypatch):
    monkeypatch.setattr(tpp.common.object_storage, "_PAUSES", (0.05, 0.1))
    yield running
    running.mend()


@pytest.fixture
def place(request) -> str:
    """A place of the test's own."""
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run folder looks like, in the first steps of a stage."""
    folder = tmp_path / "run"
    step(folder, 1)
    (folder / "config.yaml").write_text("name: run\n")
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    (folder / "run.lock").write_text("{}")
    (folder / "compiled").mkdir()
    (folder / "compiled" / "kernel.py").write_text("x")
    return folder


def step(folder: Path, number: int, size: int = 100_000) -> Path:
    path = folder / "dense" / "checkpoints" / f"step-{number:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(os.urandom(size))
    (path / "state.json").write_text(json.dumps({"step": number}))
    return path


def files(folder: Path) -> dict[str, bytes]:
    """What a copy has of a run folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.lock", COPY_FILE, "kernel.py")
    }


def copy(folder: Path, place: str) -> list[str]:
    """Copy a folder as it is; the lines that are said."""
    copies = RunCopies(folder, place)
    lines = copies.take_up()
    copies.offer("now")
    return lines + copies.close(None)


def fetched(place: str, tmp_path: Path) -> tuple[Path, list[str]]:
    """The copy, taken up on a machine that has nothing."""
    there = tmp_path / f"machine{len([*tmp_path.iterdir()])}" / "run"
    there.mkdir(parents=True)
    copies = RunCopies(there, place)
    try:
        return there, copies.take_up()
    finally:
        copies.close(None)


def test_a_run_goes_on_from_its_copy_on_a_machine_that_has_nothing(
    service, tiny_config, place, run_inside, capsys
):
    stages = {name: tiny_config["stages"][name] for name in ("dense", "finetune")}
    tiny_config |= {"stages": stages, "checkpoints": {"every": "3 steps", "copy_to": place}}
    run = Path(tiny_config["output"])
    undisturbed = run.with_name("undisturbed")
    run_inside(tiny_config, f"output={undisturbed}", "checkpoints.copy_to=null")

    with pytest.raises(SystemExit):
        run_inside(tiny_config, "--until", "finetune:4")
    shutil.rmtree(run)
    capsys.readouterr()
    run_inside(tiny_config)
    printed = capsys.readouterr().out
    assert f"{run}: taken up from {place}/run: " in printed
    assert "dense: done before, skipped" in printed and "resumed after 4 steps" in printed
    for stage in stages:
        one, other = (load_file(f / stage / "model.safetensors") for f in (run, undisturbed))
        assert all(one[key].equal(other[key]) for key in one) and one.keys() == other.keys()
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in logged if e["event"] == "train" and e["stage"] == "finetune"]
    assert steps == [2, 4, 6]

    # The copy is the whole run and nothing more: no checkpoint of a stage that is done.
    there, _ = fetched(place, run.parent)
    assert files(there) == files(run)
    assert not any("checkpoints" in name for name in files(there))
    copied = json.loads(Store(f"{place}/run").read(COPY_FILE))["files"]
    assert len(Store(f"{place}/run").sizes()) == len(copied) + 1
    for text in [*files(run).values(), (run / COPY_FILE).read_bytes()]:
        assert not any(secret.encode() in text for secret in SECRETS.values())


def test_a_copy_follows_the_folder_and_reads_only_what_is_new(service, folder, place, tmp_path):
    copies = RunCopies(folder, place)
    assert copies.take_up() == []
    copies.offer("step 1", is_checkpoint=True)
    wait_until(lambda: copies.take_lines() == [f"checkpoints are copied to {place}/run"])
    there, lines = fetched(place, tmp_path)
    assert files(there) == files(folder)
    assert lines == [f"{there}: taken up from {place}/run: 4 files, 100.0 kB"]

    shutil.rmtree(folder / "dense" / "checkpoints" / "step-00000001")
    step(folder, 2)
    passing = step(folder, 3)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 3}\n')
    service.requests.clear()
    copies.offer("step 3", is_checkpoint=True, passing={passing})
    assert copies.close(None) == []
    assert not any("config.yaml" in request for request in service.requests)
    there, _ = fetched(place, tmp_path)
    expected = {name: data for name, data in files(folder).items() if "00003" not in name}
    assert files(there) == expected
    assert len(Store(f"{place}/run").sizes()) == len(expected) + 1


@pytest.mark.parametrize("fault", ["503", "cut", "refuse"])
def test_faults_that_pass_are_waited_for(service, folder, place, tmp_path, fault):
    service.break_(fault, at="^(PUT|GET|HEAD) .*run/", times=2)
    assert copy(folder, place) == [f"checkpoints are copied to {place}/run"]
    assert service.times == 0
    service.break_(fault, at="^GET .*safetensors", times=2)
    there, _ = fetched(place, tmp_path)
    assert service.times == 0
    assert files(there) == files(folder)


def test_where_the_service_is_gone_the_copy_before_stays(service, folder, place, tmp_path):
    copy(folder, place)
    before = files(folder)
    step(folder, 2)
    service.break_("refuse", at="^PUT .*step-00000002/.*/model.safetensors")
    (line,) = copy(folder, place)
    assert line.startswith(f"now: not copied: {place}/run/dense/checkpoints/step-00000002/")
    assert "cannot be reached" in line and line.endswith("the copy before it stays as it was")
    service.mend()
    there, _ = fetched(place, tmp_path)
    assert files(there) == before
    # And what was uploaded in vain is gone with the next one.
    assert len(copy(folder, place)) == 1
    assert len(Store(f"{place}/run").sizes()) == len(files(folder)) + 1

    # A run that has its folder goes on without the service; one that has not cannot know.
    service.break_("refuse")
    lines = copy(folder, place)
    assert len(lines) == 2 and lines[0].endswith("the run goes on from its own folder")
    with pytest.raises(UserError, match=r"run/copy.json: cannot be reached \(.*\)$"):
        fetched(place, tmp_path)


def test_what_reads_back_as_something_else_is_no_copy(service, folder, place, tmp_path):
    copy(folder, place)
    before = files(folder)
    step(folder, 2)
    service.break_("flip", at="^GET .*step-00000002/.*/model.safetensors")
    (line,) = copy(folder, place)
    # The client compares the service's own checksum, where there is one; the copy its sha256.
    assert "did not match calculated checksum" in line or "reads back as other bytes" in line
    service.mend()
    assert files(fetched(place, tmp_path)[0]) == before


def test_a_damaged_checkpoint_is_left_out_and_another_file_said(service, folder, place, tmp_path):
    newest = step(folder, 2)
    copy(folder, place)
    store = Store(f"{place}/run")
    damaged = next(name for name in store.sizes() if "0002/" in name and "model" in name)
    store.write(damaged, b"x" * store.size(damaged))
    there, lines = fetched(place, tmp_path)
    assert f"{store.url}/{damaged}: damaged: not the 100,000 bytes with" in lines[0]
    assert lines[0].endswith("; this checkpoint is left out")
    expected = {name: data for name, data in files(folder).items() if newest.name not in name}
    assert files(there) == expected
    assert not (there / newest.relative_to(folder)).exists()

    other = next(name for name in store.sizes() if name.endswith("config.yaml"))
    store.write(other, b"name: ruin\n"[: store.size(other)])
    with pytest.raises(UserError, match=r"config.yaml: damaged: not the 10 bytes"):
        fetched(place, tmp_path)


def test_a_hanging_service_holds_nothing_up_and_the_newest_is_copied(
    service, folder, place, tmp_path
):
    copies = RunCopies(folder, place)
    copies.take_up()
    service.break_("hang", at="^PUT ")
    began = time.perf_counter()
    for number in (2, 3, 4):
        path = step(folder, number)
        # As the retention does; what is being copied is read all the same.
        shutil.rmtree(path.with_name(f"step-{number - 1:08d}"))
        copies.offer(f"step {number}", is_checkpoint=True)
        if number == 2:
            wait_until(lambda: copies._pending is None)  # it is under way
    assert time.perf_counter() - began < 2
    assert copies.take_lines() == [
        "step 3: not copied, as the copy before it is still under way; the newer one is next"
    ]
    (line,) = copies.close(0.1)
    assert "not up to date" in line
    # A machine that is lost now has lost no more than what was not copied.
    assert files(fetched(place, tmp_path)[0]) == {}
    service.mend()
    copies._thread.join()
    assert files(fetched(place, tmp_path)[0]) == files(folder)


def test_a_checkpoint_that_the_copy_before_leaves_out_is_read_again(
    service, folder, place, tmp_path, monkeypatch
):
    gates = {what: threading.Event() for what in ("step 2", "step 3", "results")}
    plainly = RunCopies._copy

    def stepped(self, snapshot):
        assert gates[snapshot.what].wait(20)
        plainly(self, snapshot)

    monkeypatch.setattr(RunCopies, "_copy", stepped)
    copies = RunCopies(folder, place)
    copies.take_up()
    passing = step(folder, 2)
    copies.offer("step 2", is_checkpoint=True)
    wait_until(lambda: copies._pending is None)  # it is under way
    step(folder, 3)
    copies.offer("step 3", is_checkpoint=True, passing={passing})
    gates["step 2"].set()
    wait_until(lambda: copies._pending is None)  # step 2 has a copy, which step 3 takes away
    (folder / "results.json").write_text("{}")
    copies.offer("results")
    gates["step 3"].set()
    wait_until(lambda: copies._pending is None)
    gates["results"].set()

    def copied() -> bool:  # before it is closed, which would try again
        return "results.json" in json.loads(Store(f"{place}/run").read(COPY_FILE))["files"]

    wait_until(lambda: copies._lines and (copied() or "not copied" in copies._lines[-1]))
    assert copies.close(None) == [f"checkpoints are copied to {place}/run"]
    assert files(fetched(place, tmp_path)[0]) == files(folder)


@pytest.mark.parametrize("closed_before", [True, False])
def test_what_failed_last_is_tried_once_more_at_the_end(
    service, folder, place, tmp_path, monkeypatch, closed_before
):
    failures, plainly, gate = ["once"], RunCopies._copy, threading.Event()

    def failing(self, snapshot):
        assert gate.wait(20)
        if failures:
            raise StorageError(f"{place}: fails {failures.pop()}")
        plainly(self, snapshot)

    monkeypatch.setattr(RunCopies, "_copy", failing)
    copies = RunCopies(folder, place)
    copies.take_up()
    copies.offer("results")
    said = []
    if closed_before:
        said = copies.close(0.0)
        gate.set()
        copies._thread.join()
    else:
        gate.set()
        wait_until(lambda: copies._lines)
    said += copies.close(None)
    assert said[-1] == f"checkpoints are copied to {place}/run"
    assert sum("fails once; training goes on" in line for line in said) == (not closed_before)
    assert files(fetched(place, tmp_path)[0]) == files(folder)


def test_what_a_start_that_failed_has_left_is_no_run(service, folder, place, tmp_path):
    there = tmp_path / "there" / "run"
    there.mkdir(parents=True)
    for _ in range(2):  # and the second time too
        with pytest.raises(UserError, match=r"no-such-bucket/x/run/copy.json: no such object"):
            RunCopies(there, "s3://no-such-bucket/x").take_up()
    service.break_("refuse")
    with pytest.raises(UserError, match="cannot be reached"):
        RunCopies(there, place).take_up()
    service.mend()
    # With a place where there is a copy, it is as any machine that has nothing.
    copy(folder, place)
    RunCopies(there, place).take_up()
    assert files(there) == files(folder)


def test_two_runs_never_share_a_copy(service, folder, place, tmp_path):
    copy(folder, place)
    other = tmp_path / "other" / "run"
    step(other, 7)
    with pytest.raises(UserError, match=r"run is the copy of another run than the one in .* dense"):
        copy(other, place)

    # The run goes on elsewhere; the old machine comes back.
    there, _ = fetched(place, tmp_path)
    first = RunCopies(folder, place)
    assert first.take_up() == []
    step(there, 5)
    copy(there, place)
    step(folder, 6)
    first.offer("late")
    (line,) = first.close(None)
    assert "another process has made a copy there; this one makes no more" in line
    with pytest.raises(UserError, match=r"the run has gone on elsewhere, .*; delete the folder"):
        copy(folder, place)
    assert files(fetched(place, tmp_path)[0]) == files(there)


def test_fetching_that_was_broken_off_is_begun_again(service, folder, place, tmp_path):
    copy(folder, place)
    there = tmp_path / "there" / "run"
    there.mkdir(parents=True)
    service.break_("refuse", at="^GET .*/log.jsonl")
    with pytest.raises(UserError, match=r"log.jsonl: cannot be reached"):
        RunCopies(there, place).take_up()
    assert (there / "config.yaml").exists()
    service.mend()
    RunCopies(there, place).take_up()
    assert files(there) == files(folder)


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", ".hidden/x", "run.lock"])
def test_a_copy_cannot_write_elsewhere(service, place, tmp_path, name):
    manifest = {"run": "0" * 16, "copy_id": "1" * 16}
    manifest["files"] = {name: {"bytes": 0, "sha256": "0" * 64}}
    manifest |= {"format": "tpp-run-copy", "version": 1}
    Store(f"{place}/run").write(COPY_FILE, json.dumps(manifest).encode())
    with pytest.raises(UserError, match=r"copy.json: '.*' is no name of a file of a run"):
        fetched(place, tmp_path)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("runs/copies", "expected a URL that begins with one of s3://, gs://"),
        ("http://host/bucket", "expected a URL that begins with one of s3://, gs://"),
        ("s3://name:pass@bucket/x", "services take theirs from the environment"),
        ("az://bucket/x?sig=abc", "credentials come from the environment"),
        ("s3://", "expected s3://BUCKET/PATH"),
        ("gs://bucket/runs", "needs the package gcsfs, which is not installed: pip install gcsfs"),
        ("s3://no-such-bucket/runs", "no-such-bucket/runs/run/copy.json: no such object or bucket"),
    ],
)
def test_a_mistake_is_one_line(service, tiny_config, run_inside, capsys, url, says):
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"]}
    run_inside(tiny_config, f"checkpoints.copy_to={url}", expect=2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and ":pass@" not in error


def test_without_credentials_one_line(service, folder, place, monkeypatch):
    for name in SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setattr(
        tpp.common.object_storage, "_filesystem", tpp.common.object_storage._filesystem.__wrapped__
    )
    monkeypatch.setenv("FSSPEC_S3_SKIP_INSTANCE_CACHE", "true")
    import fsspec

    with monkeypatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", {"skip_instance_cache": True})
        with pytest.raises(UserError, match=r"no credentials found .* set them in the environ"):
            copy(folder, place)


def wait_until(true, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.root=s3://me:pass@bucket/x"], "data.root: looks like it holds a password"),
        (["data.cache=/x"], "cache goes with a root in an object store"),
        (["data.root=s3://b/x", "data.train=a-{0..9}.tar"], "train and val are folders in it"),
        (["data.root=s3://b/x", "data.val_list=v.csv"], "there are neither demo nor lists"),
        (["data.root=s3://bucket/none"], "bucket/none/train/.index.safetensors: no such object"),
        (["data.root=gs://b/x"], "gs://b/x/train: needs the package gcsfs"),
    ],
)
def test_a_mistake_in_where_images_are_is_one_line(
    service, tiny_config, run_inside, capsys, settings, says
):
    run_inside(tiny_config, *settings, expect=2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and ":pass@" not in error


def test_a_run_is_the_same_with_its_images_in_an_object_store(
    service, tiny_data, tiny_config, run_inside, tmp_path
):
    for side in ("train", "val"):
        write_shards(open_images(tiny_data / side), tmp_path / "shards" / side, shard_bytes=60_000)
        for path in (tmp_path / "shards" / side).iterdir():
            Store(f"s3://{BUCKET}/tiny").write(f"{side}/{path.name}", path.read_bytes())
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"]}
    weights = []
    for number, root in enumerate((tmp_path / "shards", f"s3://{BUCKET}/tiny")):
        cache = [f"data.cache={tmp_path / 'cache'}"] if number else []
        output = tmp_path / f"run{number}"
        run_inside(tiny_config, f"output={output}", f"data.root={root}", *cache)
        weights.append((output / "dense" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    # The same run goes on with the other root.
    run_inside(tiny_config, f"output={output}", f"data.root={tmp_path / 'shards'}")
