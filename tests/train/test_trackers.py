"""Runs that real services are shown: MLflow's server, wandb's files, and one that never answers."""

import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fork_server import BARE, wait_for_all
from mlflow_server import mlflow_server

from tpp.common.errors import UserError
from train.config.config import load_config
from train.config.tracking import TrackingSection
from train.tags import points_of
from train.track import main as track
from train.trackers.memory import Memory
from train.trackers.points import LogReader, Places
from train.trackers.services import About, Mlflow, Wandb
from train.trackers.wandb_files import records, row_of

ROOT = Path(__file__).resolve().parents[2]
MARK = "Xq7secret"
LIBRARIES = pytest.mark.processes  # wandb's and MLflow's own, for themselves
TRAINED = ("dense", "regularize", "finetune")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        for service in (Mlflow, Wandb):  # while the server starts
            service.load(service)
        yield url


@pytest.fixture
def services(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where both are, and keys to them."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{MARK}-of-mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", f"{MARK}-of-wandb")
    return server


@pytest.fixture
def shown(tiny_config: dict, request: pytest.FixtureRequest) -> dict:
    """A tiny run that MLflow and wandb are shown, in a project of this test's own."""
    tiny_config["trackers"] = ["tensorboard", "mlflow", "wandb"]
    project = re.sub(r"\W", "_", request.node.name)[:60]
    tiny_config["tracking"] = {"project": project, "group": "sweep", "tags": ["tiny"], "wait": 60}
    return tiny_config


def logged(run: Path) -> dict[str, dict[int, float]]:
    """What log.jsonl says, by tag and step over all stages, without single layers."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    ends = {
        e["stage"]: e["step"] for e in lines if (e["event"], e.get("status")) == ("stage", "end")
    }
    found: dict[str, dict[int, float]] = {}
    for entry in lines:
        before = TRAINED[: TRAINED.index(entry["stage"])]
        for tag, value in points_of(entry, layers=False).items():
            at = sum(ends[stage] + 1 for stage in before) + entry["step"]
            assert at not in found.setdefault(tag, {})
            found[tag][at] = value
    return found


def told_mlflow(url: str, project: str) -> tuple[object, dict[str, list[tuple[int, float]]]]:
    """The one run of an experiment, and its metrics' histories."""
    from mlflow import MlflowClient

    client = MlflowClient(url)
    experiment = client.get_experiment_by_name(project)
    (run,) = client.search_runs([experiment.experiment_id])
    names = run.data.metrics
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return run, {
        name: [(metric.step, metric.value) for metric in history]
        for name, history in histories.items()
    }


def told_wandb(run: Path) -> tuple[set[str], list[dict[str, object]], dict[str, object]]:
    """Identities, rows of the history in the order in which they get to a server, and summary."""
    identities, rows, summary = set(), [], {}
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                identities.add(record.run.run_id)
                assert (record.run.run_group, [*record.run.tags]) == ("sweep", ["tiny"])
            elif kind == "history":
                rows.append(row_of(record))
            elif kind == "summary":
                for i in record.summary.update:
                    summary[i.key or "/".join(i.nested_key)] = json.loads(i.value_json)
    return identities, rows, summary


def curves(rows: list[dict[str, object]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for tag, value in row.items():
            found.setdefault(tag, {})[row["_step"]] = value
    return found


@LIBRARIES
def test_stopped_and_resumed_it_is_one_run_with_each_point_once(
    shown, run_inside, services, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    monkeypatch.setattr("train.trackers.trackers._WAIT_STOPPED", 60.0)
    with pytest.raises(SystemExit, match="0"):
        run_inside(shown, "--until", "regularize:7")
    run_inside(shown)
    want = logged(run)
    found, metrics = told_mlflow(services, shown["tracking"]["project"])
    for tag, points in want.items():
        assert sorted(metrics[tag]) == sorted(points.items()), tag
    assert found.info.status == "FINISHED" and found.info.run_name == "tiny"
    params = found.data.params
    assert params["stages.finetune.optimizer.lr"] == "0.02"
    assert json.loads(params["pruning.ratios"]) == {"layer*.conv1": 0.5}
    assert found.data.tags["group"] == "sweep" and found.data.tags["tiny"] == "true"
    results = json.loads((run / "results.json").read_text())
    evaluate = results["stages"]["evaluate"]
    for key in ("top1", "macs", "parameters", "speedup"):
        assert found.data.metrics[f"final/{key}"] == evaluate[key]
        assert found.data.metrics[f"dense/{key}"] == results["stages"]["dense"][key]

    identities, rows, summary = told_wandb(run)
    assert len(identities) == 1
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    drawn = curves(rows)
    for tag, points in want.items():
        assert drawn[tag] == pytest.approx(points, rel=1e-12), tag
    assert [*Counter(row["stage"] for row in rows)] == [1, 2, 3]
    assert summary["final/top1"] == evaluate["top1"]
    check_against_tensorboard(run)

    out = capsys.readouterr()
    assert out.out.count("trackers: mlflow: experiment") == 2  # once in each process
    assert "not sent" not in out.out and MARK not in out.out + out.err
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"trackers.json", "mlflow.db"} & {path.name for path in files} == {"trackers.json"}
    assert not [path for path in files if MARK.encode() in path.read_bytes()]


def check_against_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    places, steps = Places(TRAINED), {"dense": 6, "regularize": 20}
    for stage in TRAINED:
        places.add(stage, steps)
    reader, points = LogReader(run / "log.jsonl", layers=True), []
    while some := reader.read(places, most=3):
        points += some
    assert [point.at for point in points] == sorted({point.at for point in points})
    for stage in TRAINED:
        events = EventAccumulator(str(run / stage), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()["scalars"]
        of_stage = [point for point in points if point.stage == stage]
        assert {tag for point in of_stage for tag in point.values} == set(tags)
        for tag in tags:
            drawn = {event.step: event.value for event in events.Scalars(tag)}
            read = {p.step: p.values[tag] for p in of_stage if tag in p.values}
            assert read == pytest.approx(drawn, rel=1e-6), tag


@LIBRARIES
def test_killed_on_two_ranks_it_goes_on_as_the_same_run(shown, forks, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of this process
    shown["trackers"] = ["wandb"]
    shown["stages"]["dense"]["epochs"] = 200
    shown["checkpoints"] = {"every": "60 steps"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(shown, sort_keys=False))
    command, environment = ["--config", str(path)], {**os.environ, **BARE}
    main = ROOT / "train" / "main.py"
    started = forks.start_ranks(2, main, command, tmp_path, environment)
    until = time.monotonic() + 120
    # Some steps told are done again, and the next checkpoint is far: training is ahead of both.
    while newest_checkpoint(run) < 0 or not 4 <= steps_told(run) - newest_checkpoint(run) <= 30:
        assert all(rank.poll() is None for rank in started), started[0].output()
        assert time.monotonic() < until
        time.sleep(0.01)
    for rank in started:
        rank.kill()
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert 0 < newest_checkpoint(run) < last
    command += ["--until", f"dense:{last + 6}"]
    done = wait_for_all(forks.start_ranks(2, main, command, tmp_path, environment), 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trackers: wandb:") == 1  # of two ranks
    identities, rows, _ = told_wandb(run)
    assert len(identities) == 1 and len([*(run / "wandb").glob("offline-run-*")]) == 2
    steps = [row["_step"] for row in rows if "train/loss" in row]
    assert steps == [*range(2, max(steps) + 1, 2)] and max(steps) >= last + 4


def newest_checkpoint(run: Path) -> int:
    """Its step; -1: the first one is still being written."""
    found = [
        re.fullmatch(r"\D*(\d+)", path.name) for path in (run / "dense" / "checkpoints").glob("*")
    ]
    return max((int(match[1]) for match in found if match), default=-1)


def steps_told(run: Path) -> int:
    try:
        (known,) = json.loads((run / "trackers.json").read_text())["services"].values()
    except (FileNotFoundError, ValueError):
        return -1
    return known.get("step", -1)


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@LIBRARIES
def test_a_service_that_never_answers_is_waited_for_by_nobody_and_told_later(
    shown, run_inside, server, silent, tmp_path, monkeypatch, capsys
):
    run, project = tmp_path / "run", shown["tracking"]["project"]
    shown["trackers"], shown["tracking"]["wait"] = ["mlflow"], 0.2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_inside(shown, "--until", "dense")
    points = {at for points in logged(run).values() for at in points}
    out = capsys.readouterr().out
    said = f"trackers: mlflow: {len(points)} of {len(points)} points were not sent"
    (line,) = (line for line in out.splitlines() if line.startswith(said))
    assert line.startswith(f"{said} to {silent}")
    assert line.endswith(f"; sent when the run goes on, or by tpp track --to mlflow {run}")
    assert ("no answer so far" in line) == ("training goes on" not in out)
    assert out.count("trackers:") - out.count("training goes on") == 1  # where it timed out
    assert out.count("training goes on") <= 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    for _ in range(2):  # again, nothing is doubled
        track([str(run)])
        found, metrics = told_mlflow(server, project)
        assert sorted(metrics["train/loss"]) == sorted(logged(run)["train/loss"].items())
    assert found.data.metrics["dense/macs"] > 0


@LIBRARIES
def test_one_that_cannot_be_reached_is_said_once_in_one_line(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{MARK}@127.0.0.1:{port}")
    monkeypatch.setattr("train.trackers.trackers._PAUSES_AT_END", (0.1, 0.1))
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)  # by themselves they are minutes
    a_run_folder(tmp_path)
    with pytest.raises(SystemExit) as ended:
        track([str(tmp_path), "--to", "mlflow", "--wait", "20"])
    assert ended.value.code == 1
    out = capsys.readouterr()
    first, last = (line for line in out.out.splitlines() if line.startswith("trackers:"))
    assert str(port) in first and first.endswith("; it is asked again")
    assert last == (
        f"trackers: mlflow: 1 of 1 points were not sent to http://127.0.0.1:{port}; "
        f"sent by tpp track --to mlflow {tmp_path}"
    )
    assert MARK not in out.out + out.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorboard", "--to tensorboard: nothing is sent there, as its events are in the run"),
        ("foo", "--to: unknown service 'foo'; did you mean"),
    ],
)
def test_what_is_no_service_is_refused_with_those_that_are(tmp_path, name, said):
    a_run_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        track([str(tmp_path), "--to", name])
    error = str(caught.value)
    assert error.startswith(said) and "mlflow, trackio, wandb" in error
    assert error.count("tensorboard") == (name == "tensorboard")


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        (f"http://someone:{MARK}@host:5000", "http://host:5000"),
        (f"http://{MARK}@host/x?token={MARK}", "http://...@host/x?..."),
        (f"http://host/{MARK}-of-mlflow", "http://host/..."),
        ("", ""),
    ],
)
def test_where_a_service_is_stands_there_without_secrets(monkeypatch, tmp_path, uri, address):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{MARK}-of-mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Mlflow(About("run", tmp_path, TrackingSection(), {})).address == address


def a_run_folder(folder: Path) -> None:
    """Of a run of one stage with one point."""
    (folder / "config.yaml").write_text("stages: {dense: {kind: dense}}\n")
    (folder / "results.json").write_text('{"name": "one", "status": "stopped"}')
    lines = [
        {"event": "train", "stage": "dense", "time": 1.0, "step": 2, "loss": 0.5},
        {"event": "stage", "stage": "dense", "time": 2.0, "step": 2, "status": "end"},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_was_left_by_a_killed_process_counts_when_its_stage_is_open(tmp_path):
    log = tmp_path / "log.jsonl"

    def write(*steps: int) -> None:
        lines = [
            {"event": "train", "stage": "dense", "time": 1, "step": s, "loss": s} for s in steps
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))

    places, reader = Places(("dense",)), LogReader(log, layers=False)
    assert reader.read(places) == []  # there is no file
    write(1, 2, 3)
    assert reader.read(places) == []
    write(1, 2)  # as the stage begins, what comes after its checkpoint goes
    places.add("dense", {})
    assert [point.at for point in reader.read(places)] == [1]
    with log.open("a") as file:
        file.write(
            json.dumps({"event": "evaluate", "stage": "dense", "time": 1, "step": 2, "top1": 1})
        )
        file.flush()
        assert reader.read(places) == []  # not a whole line yet
        file.write(
            '\n{"event": "stage", "stage": "dense", "time": 1, "step": 2, "status": "end"}\n'
        )
    (point,) = reader.read(places)
    assert (point.at, point.values) == (2, {"train/loss": 2, "val/top1": 1})


def test_a_stage_that_is_run_again_with_other_settings_is_another_run(tmp_path):
    Memory(tmp_path, {"dense": "a", "finetune": "b"}).note("wandb offline", id="first", step=9)
    same = Memory(tmp_path, {"dense": "a", "finetune": "b", "another": "c"})
    assert (same.begun_anew, same.of("wandb offline")["id"]) == (False, "first")
    assert same.id_of("wandb") == "first" and same.id_of("mlflow") is None
    assert Memory(tmp_path, None).of("wandb offline")["step"] == 9
    other = Memory(tmp_path, {"dense": "a", "finetune": "x"})
    assert (other.begun_anew, other.of("wandb offline")) == (True, {})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trackers=[wnadb]", "unknown tracker 'wnadb'; did you mean 'wandb'?"),
        (f"trackers={{wandb: {{api_key: {MARK}}}}}", "trackers.wandb.api_key: looks like it holds"),
        (f"model.args={{hf_token: {MARK}}}", "model.args.hf_token: looks like it holds a password"),
        (f"data.root=s3://key:{MARK}@host/x", "data.root: looks like it holds a password"),
        (f"name=hf_{MARK}{'x' * 30}", "name: looks like it holds a password"),
    ],
)
def test_a_mistake_or_a_secret_is_refused_and_no_secret_is_repeated(override, said):
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert said in str(caught.value) and MARK not in str(caught.value)


def test_names_that_only_sound_like_secrets_are_fine():
    load_config(None, ["model.args={num_tokens: 4, token_mixer: pool, secret_length: 3}"])


def test_what_is_missing_is_said_before_anything_begins(
    shown, run_inside, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for trackers, line in (
        (["trackio"], "error: trackers: trackio is not installed; pip install trackio"),
        (["wandb"], "error: trackers: wandb: there is no key; set WANDB_API_KEY"),
    ):
        run_inside({**shown, "trackers": trackers}, expect=2)
        assert capsys.readouterr().err.startswith(line)
    assert not (tmp_path / "run").exists()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {MARK}\n")
    run_inside({**shown, "trackers": ["wandb"]}, "--dry-run")
