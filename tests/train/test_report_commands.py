"""The commands on a report's page do what they say from any folder, to the run that it is of."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from own_page import write_example
from report_page import Page
from torch import nn

from tpp.checkpoints.model_file import save_model
from tpp.models.architecture import Architecture
from train.config.config import load_config
from train.report import show_end
from train.reporting.commands import commands_of, started_in
from train.reporting.page import page_of
from train.reporting.rows import load_run

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).with_name("old_run_folder")
GO_ON, AGAIN = "Go on with the run, where it is not done", "Run it again, in another folder"
PROGRAMS = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def typed(command: str, folder: str | Path = "/") -> str:
    """What comes of a command, typed in a folder."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=PROGRAMS, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_at(folder: Path, *, started: Path | None = None, name: str = "x", **config: Any) -> Path:
    folder.mkdir(parents=True)
    results: dict[str, Any] = {
        "name": "x",
        "status": "finished",
        "model": name,
        "dense": None,
        "stages": {},
    }
    if started is not None:
        results["started_in"] = str(started)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "x", **config}))
    return folder


def by_purpose(folder: Path) -> dict[str, str]:
    return dict(commands_of(load_run(folder)))


def test_those_of_a_network_of_ones_own(tmp_path: Path) -> None:
    write_example(net := tmp_path / "my net")
    typed("tpp train --config own.yaml", net)
    run = net / "runs" / "own"
    assert json.loads((run / "results.json").read_text())["started_in"] == str(net)
    commands = by_purpose(run)
    assert set(commands.values()) <= set(Page(page_of([load_run(run)])).commands)

    said = typed(commands[GO_ON])
    assert "dense: done before, skipped" in said and "evaluate: done before, skipped" in said
    top1 = json.loads((run / "results.json").read_text())["stages"]["evaluate"]["top1"]
    assert f"top-1 {top1:.2f}%" in typed(commands["Evaluate the TPP network"])
    (python,) = (text for purpose, text in commands.items() if purpose.startswith("Load the TPP"))
    shown = shlex.quote(f"{python}\nprint(model.blocks[0].near.out_channels)")
    assert typed(f"python -c {shown}").strip() == "8"
    own = f" --model {shlex.quote(f'{net}/net.py:MyNet')} "
    assert own in commands["Measure latency, and show it in this report"]
    assert commands["Describe a network layer by layer"].endswith(own.rstrip())
    *begin, override = shlex.split(commands[AGAIN])
    assert begin == shlex.split(commands[GO_ON]) and override == f"output={net}/runs/own-again"


def test_the_folder_of_a_run_that_was_started_elsewhere(tmp_path: Path) -> None:
    begin = tmp_path / "begin"
    of_place = run_at(begin / "runs" / "x", output="runs/x", data={"root": "images"})
    assert by_purpose(of_place)[GO_ON] == f"cd {begin} && tpp train --config {of_place}/config.yaml"
    # Nothing in the place of an output elsewhere says where the images are; results.json does.
    away = run_at(tmp_path / "away", started=begin, output=f"{tmp_path}/away")
    assert by_purpose(away)[GO_ON] == f"cd {begin} && tpp train --config {away}/config.yaml"
    beyond = run_at(tmp_path / "beyond", started=begin, output="../beyond")
    assert started_in(load_run(beyond)) == begin
    # A folder of runs that is a link: its own place would say another one.
    (tmp_path / "disk").mkdir()
    (begin / "linked").symlink_to(tmp_path / "disk")
    linked = run_at(tmp_path / "disk" / "x", started=begin, output="linked/x")
    assert started_in(load_run(linked)) == begin
    # Moved, with all that is around it, while another run has the old place.
    moved = shutil.copytree(begin / "runs", tmp_path / "moved" / "runs") / "x"
    results = json.loads((moved / "results.json").read_text())
    (moved / "results.json").write_text(json.dumps(results | {"started_in": str(begin)}))
    assert started_in(load_run(moved)) == tmp_path / "moved"


@pytest.mark.parametrize("started", [True, False])
def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path: Path, started: bool) -> None:
    begin = tmp_path / "begin"
    run_at(begin / "runs" / "x")  # what is there by now
    copy = run_at(tmp_path / "a: copy", started=begin if started else None, output="runs/x")
    *start, program, verb, option, config, override = shlex.split(by_purpose(copy)[GO_ON])
    assert start == (["cd", str(begin), "&&"] if started else [])
    assert [program, verb, option, config] == ["tpp", "train", "--config", f"{copy}/config.yaml"]
    # The value is YAML, where ": " has a meaning.
    assert load_config(OLD / "config.yaml", [override]).output == str(copy)


def test_a_resolved_configuration_can_be_run_again() -> None:
    again = shlex.split(by_purpose(OLD)[AGAIN])
    program, config, override = again[:-2], again[-2], again[-1]
    assert program == ["tpp", "train", "--config"]
    assert load_config(Path(config), [override]).output == f"{OLD}-again"


def test_the_images_are_found_from_any_folder(tmp_path: Path) -> None:
    for root, there in (("images", f"{tmp_path}/images/val"), ("/data/x", "/data/x/val")):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        run = run_at(tmp_path / "runs" / "x", output="runs/x", data={"root": root})
        shutil.copyfile(OLD / "results.json", run / "results.json")
        for name in json.loads((OLD / "results.json").read_text())["stages"]:
            (run / name).mkdir()
            (run / name / "model.safetensors").write_bytes(b"")
        texts = [text for text in by_purpose(run).values() if text.startswith("tpp evaluate")]
        assert texts and all(text.endswith(f"--data {there}") for text in texts)


@pytest.mark.parametrize(
    ("source", "called"),
    [
        (
            "class Net:\n    def __init__(self, width, num_classes=4): ...\n",
            "num_classes=4, width=2",
        ),
        ("class Net:\n    def __init__(self, width): ...\n", "width=2"),
        ("def Net(width): ...\n", "width=2"),
        ("def Net(**all): ...\n", "num_classes=4, width=2"),
        ("class Net(Other): ...\n", "num_classes=4, width=2"),
        ("class Net(:\n", "num_classes=4, width=2"),
        (None, "num_classes=4, width=2"),
    ],
)
def test_what_a_class_is_called_with(tmp_path: Path, source: str | None, called: str) -> None:
    file = tmp_path / "my-net.py"  # whose name no import statement takes
    if source is not None:
        file.write_text(f"raise SystemExit('never run')\n{source}")
    run = run_at(tmp_path / "run", output="run", model={"name": f"{file}:Net"})
    stages = {"dense": {"kind": "dense", "top1": 50.0}}
    content = json.loads((run / "results.json").read_text()) | {"stages": stages}
    (run / "results.json").write_text(json.dumps(content))
    (run / "dense").mkdir()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.image_shape = (3, 8, 8)  # type: ignore[assignment]
    model.architecture = Architecture("my-net.py:Net", 4, {"width": 2})  # type: ignore[assignment]
    save_model(run / "dense" / "model.safetensors", model)
    text = by_purpose(run)["Load the dense network, in Python"]
    assert f"network = Net({called})\n" in text
    assert "Net = importlib.import_module('my-net').Net\n" in text
    compile(text, "text", "exec")


def test_the_end_of_a_run_says_the_documented_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(OLD, tmp_path / "run")
    show_end(folder)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("report: "))
    program, *rest = shlex.split(line.removeprefix("report: "))
    assert Path(program).is_file() and Path(program).name == "tpp"
    assert rest == ["report", str(folder)]


def test_tables_keep_their_rules_and_say_that_they_scroll() -> None:
    style = page_of([load_run(OLD)]).partition("</style>")[0]
    # A shared border lies below the background of the cells that stay in view.
    assert "border-collapse: separate; border-spacing: 0" in style
    assert "no-repeat local" in style and "thead th { white-space: normal; }" in style
