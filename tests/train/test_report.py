import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from report_page import Page
from rich.console import Console

from tpp.common.errors import UserError
from train.report import main, show_end, write_report
from train.reporting.grids import comparison, stage_grid, summary_table, to_rich
from train.reporting.picture import draw
from train.reporting.rows import SummaryRow, headline_of, load_run, method_title, summary_rows
from train.run_folder.results import Evaluation, Results, StageResult
from train.tasks.classification import Classification

ROOT = Path(__file__).resolve().parents[2]
DENSE = {"parameters": 855_770, "macs": 125_485_696}
SMALL = {"parameters": 429_436, "macs": 62_955_136, "speedup": 1.9933}
PUBLISHED = {
    "source": "Table 1, PR 0.5, TPP",
    "dense_top1": 93.78,
    "top1": 93.46,
    "top1_std": 0.06,
    "speedup": 1.99,
}


def accuracy(top1: float | None) -> dict[str, Any]:
    return {
        "top1": top1,
        "top5": None if top1 is None else 99.5,
        "loss": None if top1 is None else 0.25,
    }


def stage(
    kind: str,
    source: str | None,
    top1: float | None,
    *,
    title: str = "TPP",
    size: dict[str, Any] = SMALL,
    steps: int | None = None,
    start: float | None = None,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "method": title.lower(),
        "title": title,
        "input": source,
        **accuracy(top1),
        **{"speedup": 1.0, **size},
        "steps": steps,
        "epochs": None if steps is None else steps / 100,
        "wall_seconds": 100.0,
        "start": None if start is None else accuracy(start),
    }


def results(stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "resnet56_tpp_pr0.5",
        "seed": 0,
        "status": "finished",
        "model": "cifar_resnet56",
        "wall_seconds": 3_725.0,
        "versions": {"python": "3.11.9", "torch": "2.15.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "device": "H100",
        "ranks": 2,
        "engine": "DeepSpeed, ZeRO stage 1",
        "published": PUBLISHED,
        "dense": {**accuracy(93.70), **DENSE},
        "stages": stages,
        **changes,
    }


TPP_STAGES = {
    "regularize": {
        **stage("regularize", None, 92.9, size=DENSE, steps=1100, start=93.70),
        "images": 10_000,
    },
    "prune": {**stage("prune", "regularize", 92.8), "removed_magnitude": 0.0125},
    "finetune": stage("finetune", "prune", 93.40, steps=1200, start=92.8),
    "evaluate": stage("evaluate", "finetune", 93.40),
}
L1_STAGES = {
    "prune": stage("prune", None, 20.0, title="L1"),
    "finetune": stage("finetune", "prune", 93.10, title="L1", steps=1200, start=20.0),
    "evaluate": stage("evaluate", "finetune", 93.10, title="L1"),
}


def log_of(stages: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, content in stages.items():
        steps = content["steps"] or 0
        entries.append({"event": "stage", "stage": name, "status": "start"})
        for step in range(100, steps + 1, 100):
            strength = min(1.0, step / 1000)
            train = {"loss": 2 + 100 / step, "loss/task": 1 + 100 / step, "lr": 0.01}
            if content["kind"] == "regularize":
                train |= {"loss/gram": 0.5, "lambda": strength}
                values = {
                    "pruned_magnitude": 0.0 if step == steps else 0.01 / step,
                    "kept_magnitude": 0.02,
                    "correlation": 1e-3 / step**2,
                }
                layers = {"layer1.0.conv1": values, "layer1.1.conv1": values}
                entries.append({"event": "layers", "stage": name, "step": step, "layers": layers})
            entries.append({"event": "train", "stage": name, "step": step, **train})
            top1 = 90 + step / 1000
            entries.append({"event": "evaluate", "stage": name, "step": step, "top1": top1})
        entries.append({"event": "stage", "stage": name, "status": "end"})
    return entries


def write_run(
    folder: Path,
    content: dict[str, Any] | None,
    *,
    log: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "results.json").write_text(json.dumps(content))
        log = log_of(content["stages"]) if log is None else log
    if log is not None:
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def tpp(tmp_path: Path) -> Path:
    config = {"name": "a", "seed": 0, "method": {"name": "tpp"}, "training": {"batch_size": 128}}
    return write_run(tmp_path / "tpp", results(TPP_STAGES), config=config)


@pytest.fixture
def l1(tmp_path: Path) -> Path:
    config = {"name": "b", "seed": 0, "method": {"name": "l1"}, "training": {"batch_size": 128}}
    content = results(L1_STAGES, name="resnet56_l1_pr0.5", published=None)
    return write_run(tmp_path / "l1", content, config=config)


def printed(*renderables: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    for renderable in renderables:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_of_a_finished_run() -> None:
    assert summary_rows(results(TPP_STAGES)) == [
        SummaryRow("Dense", None, True, accuracy(93.70), 855_770, 125_485_696, 1.0),
        SummaryRow("TPP", "evaluate", True, accuracy(93.40), 429_436, 62_955_136, 1.9933),
    ]


def test_rows_of_two_branches_go_by_the_method_that_pruned() -> None:
    stages = {
        "dense": stage("dense", None, 93.7, size=DENSE, steps=100),
        **{
            f"{title}_{kind}": stage(
                kind, f"{title}_{source}" if source else "dense", top1, title=t
            )
            for title, t, top1 in (("a", "TPP", 93.4), ("b", "L1", 93.1))
            for kind, source in (("prune", None), ("finetune", "prune"), ("evaluate", "finetune"))
        },
    }
    # An evaluation takes the run's method where it says nothing of its own.
    stages["b_evaluate"]["title"] = "TPP"
    rows = summary_rows(results(stages))
    assert [(row.network, row.score, row.final) for row in rows] == [
        ("Dense", 93.7, True),
        ("TPP", 93.4, True),
        ("L1", 93.1, True),
    ]


def test_rows_of_one_method_twice_are_told_apart() -> None:
    stages = {
        **TPP_STAGES,
        "longer": stage("finetune", "prune", 93.5, steps=10),
        "longer_evaluate": stage("evaluate", "longer", 93.5),
    }
    rows = summary_rows(results(stages))
    assert [row.network for row in rows] == ["Dense", "TPP (evaluate)", "TPP (longer_evaluate)"]


@pytest.mark.parametrize(
    ("done", "networks"),
    [
        ([], ["Dense"]),
        (["regularize"], ["Dense", "TPP after regularize"]),
        (["regularize", "prune"], ["Dense", "TPP after prune"]),
        (["regularize", "prune", "finetune"], ["Dense", "TPP"]),
    ],
)
def test_rows_of_a_run_under_way(done: list[str], networks: list[str]) -> None:
    rows = summary_rows(results({name: TPP_STAGES[name] for name in done}, status="running"))
    assert [row.network for row in rows] == networks
    assert all(row.final == (row.network in ("Dense", "TPP")) for row in rows)


@pytest.mark.parametrize("known", [True, False])
def test_dense_run_has_one_row(known: bool) -> None:
    stages = {
        "dense": stage("dense", None, 93.6, title="L1", size=DENSE, steps=100),
        "evaluate": stage("evaluate", "dense", 93.6, title="L1", size=DENSE),
    }
    dense = {**accuracy(93.6 if known else None), **DENSE}
    (row,) = summary_rows(results(stages, dense=dense))
    assert (row.network, row.score, row.parameters, row.speedup) == ("Dense", 93.6, 855_770, 1.0)


def test_unknown_dense_network_has_no_row() -> None:
    assert [row.network for row in summary_rows(results(TPP_STAGES, dense=None))] == ["TPP"]


def test_dense_accuracy_may_be_unknown() -> None:
    content = results(L1_STAGES, dense={**accuracy(None), **DENSE})
    assert "Dense" in printed(summary_table(content))
    assert summary_rows(content)[0].score is None


def test_summary_table() -> None:
    lines = printed(summary_table(results(TPP_STAGES))).splitlines()
    (dense,) = [line.split() for line in lines if "Dense" in line]
    (tpp,) = [line.split() for line in lines if "TPP" in line]
    assert dense[1::2][:3] == ["Dense", "93.70", "99.50"]
    assert "855.8 k" in " ".join(dense)
    assert "125.5 M" in " ".join(dense)
    assert "429.4 k (-49.8%)" in " ".join(tpp)
    assert "62.96 M" in " ".join(tpp)
    assert "1.99x" in tpp


def test_report_of_one_run(tpp: Path) -> None:
    page, picture = write_report([load_run(tpp)], tpp)
    assert (page, picture) == (tpp / "report.html", tpp / "report.png")
    found = Page(page)
    assert found.fetched == []
    assert found.rows[0] == [
        *("Network", "Top-1 %", "vs dense", "Published %", "Difference", "Top-5 %"),
        *("Parameters", "MACs", "Speedup"),
    ]
    assert found.rows[1][:5] == ["Dense", "93.70", "-", "93.78", "-0.08"]
    assert found.rows[2][:5] == ["TPP", "93.40", "-0.30", "93.46 (0.06)", "-0.06"]
    cells = {row[0]: row[1:] for row in found.rows}
    assert cells["torch"] == ["2.15.0"]
    assert cells["git commit"] == ["0123456789ab"]
    assert found.facts["Time taken"] == "1 h 02 min" and "wall time" not in cells
    assert cells["regularize"][:6] == ["TPP", "1100", "11.0", "93.70", "92.90", "0.2500"]
    assert cells["regularize"][6:] == [*("855.8 k", "125.5 M", "10000", "-", "100 s")]
    assert cells["prune"][6:] == ["429.4 k", "62.96 M", "-", "0.0125", "100 s"]
    assert found.facts["Engine"] == "DeepSpeed, ZeRO stage 1"
    names = [image.partition("-")[0] for image in found.pictures]
    assert names == ["scores", "loss", "filters", "networks"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.size[0] >= 1200
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50
    assert not list(tpp.glob(".*"))


def test_report_of_runs_beside_each_other(tpp: Path, l1: Path, tmp_path: Path) -> None:
    page, _ = write_report([load_run(tpp), load_run(l1)], tmp_path / "out" / "deep")
    found = Page(page)
    # All together, and what can be said of each alone; L1 logs nothing of its layers.
    assert [image.rpartition("-")[0] for image in found.pictures] == [
        *("scores", "loss", "filters", "networks"),
        *("run1-scores", "run1-filters", "run2-scores"),
    ]
    top1 = {(row[0], row[1]): row[2:6] for row in found.rows if len(row) == 10}
    assert top1["resnet56_l1_pr0.5", "L1"] == ["93.10", "-0.60", "-", "-"]
    assert top1["resnet56_tpp_pr0.5", "TPP"] == ["93.40", "-0.30", "93.46 (0.06)", "-0.06"]
    at = found.rows.index(["Setting", "resnet56_tpp_pr0.5", "resnet56_l1_pr0.5"])
    assert found.rows[at + 1] == ["method.name", "tpp", "l1"]
    assert not any("batch_size" in row[0] for row in found.rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_of_one_name_are_told_apart(tpp: Path, tmp_path: Path, seed: int) -> None:
    other = write_run(tmp_path / "other", results(TPP_STAGES, seed=seed))
    page, _ = write_report([load_run(tpp), load_run(other)], tmp_path / "out")
    labels = [row[0] for row in Page(page).rows if len(row) == 10][1:]
    name = "resnet56_tpp_pr0.5"
    expected = [f"{name}, seed 0", f"{name}, seed 1"] if seed else [str(tpp), str(other)]
    assert labels == ["both runs", *expected]  # the dense network that both began from, once


def test_two_methods_in_one_run_are_not_both_held_against_one_published_row(
    tmp_path: Path,
) -> None:
    stages = {**TPP_STAGES, **{f"l1_{k}": dict(v) for k, v in L1_STAGES.items()}}
    for name in ("l1_finetune", "l1_evaluate"):
        stages[name]["input"] = f"l1_{stages[name]['input']}"
    page, _ = write_report([load_run(write_run(tmp_path / "run", results(stages)))], tmp_path)
    shown = {row[0]: row[4] for row in Page(page).rows if len(row) == 9}
    assert (shown["Dense"], shown["TPP"], shown["L1"]) == ("-0.08", "-", "-")


def test_markup_in_names_is_shown_not_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {name: {**of, "title": "<b>[red]x"} for name, of in TPP_STAGES.items()}
    content = results(stages, name="<b>[red]x", device="<script>")
    folder = write_run(tmp_path / "run", content)
    show_end(folder)
    found = Page(folder / "report.html")
    assert found.text_of("h1") == ["<b>[red]x"] and found.facts["Machine"] == "<script>"
    assert "<b>[red]x" in capsys.readouterr().out


def test_command_prints_whole_tables_into_a_pipe(
    tpp: Path,
    l1: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(tpp), str(l1), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    main()
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if " TPP " in line and "93.40" in line]
    assert "-0.06" in line
    assert "1.99x" in line
    assert "method.name" in text
    assert str(tmp_path / "out" / "report.html") in text
    assert (tmp_path / "out" / "report.png").exists()
    assert not (tpp / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not the results of a run: the file: "),
        ('{"seed": 0}', "not the results of a run: name: field required"),
        ('{"name": "a", "stages": {"x": {"kind": 3}}}', ": stages.x.kind: input should be"),
        ('{"name": "a", "published": {"top1": 3}}', ": published.source: field required"),
        ('{"name": "a", "dense": {"top1": "abc"}}', ": dense.top1: input should be a valid num"),
        (
            '{"name": "a", "stages": {"x": {"kind": "y", "start": {"loss": []}}}}',
            ": stages.x.start.loss: input should be a valid number",
        ),
        ('{"name": "a", "stages": {"scores": {"kind": 3}}}', ": stages.scores.kind: input shou"),
        ('{"name": "a", "dense": 3}', ": dense: input should be"),
        ('{"name": "a", "task": 3}', ": task: input should be a valid string"),
        ('{"name": "a", "task": ["x"]}', ": task: input should be a valid string"),
        (
            '{"name": "a", "task": "super_resolutoin", "dense": {"psnr": 3}}',
            ": task: unknown task 'super_resolutoin'; did you mean 'super_resolution'?",
        ),
    ],
)
def test_broken_results_are_one_line(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_run(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / 'results.json'}: ")
    assert expected in line


def test_command_ends_a_mistake_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: no run folder")
    assert len(done.stderr.splitlines()) == 1


def test_results_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"results\.json: cannot read the results \(not a text"):
        load_run(tmp_path)


def test_no_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder}: no run folder"):
            load_run(folder)


@pytest.mark.parametrize("content", ["a: [", "- 1", "stages: 3", "stages: {a: 1}"])
def test_broken_config_is_named(tpp: Path, content: str) -> None:
    (tpp / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: "):
        load_run(tpp)


def test_output_that_is_a_file(tpp: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot write the report"):
        write_report([load_run(tpp)], tmp_path / "file")


def lines_of(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """The labelled curves of the picture by label, from its first and third plot."""
    figure = draw([load_run(run)])
    found: dict[str, tuple[list[float], list[float]]] = {}
    for axes in figure.axes:  # a run's name stands for its score first, then for its loss
        for line in axes.get_lines():
            points = np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()
            if not str(line.get_label()).startswith("_"):
                found.setdefault(str(line.get_label()), points)
    return found


def test_curves_run_on_through_the_stages(tpp: Path) -> None:
    steps, top1 = lines_of(tpp)["TPP"]
    assert steps == [*range(100, 1101, 100), *range(1200, 2301, 100)]
    assert top1[0] == pytest.approx(90.1)
    assert top1[-1] == pytest.approx(91.2)


def test_curves_of_what_the_method_does(tpp: Path) -> None:
    curves = lines_of(tpp)
    steps, strength = curves["lambda"]
    assert steps == list(range(100, 1101, 100))
    assert strength == [min(1.0, step / 1000) for step in steps]
    _, pruned = curves["mean |w|, pruned"]
    assert pruned[0] == pytest.approx(1e-4)
    assert pruned[-1] == pytest.approx(1e-9)  # zero, on a log axis
    assert curves["correlation"][1][0] == pytest.approx(1e-7)


def test_references_are_drawn(tpp: Path) -> None:
    curves = lines_of(tpp)
    assert set(curves["dense 93.70"][1]) == {93.70}
    assert set(curves["published 93.46"][1]) == {93.46}


def test_branches_begin_where_their_input_ends(tmp_path: Path) -> None:
    stages = {
        "dense": stage("dense", None, 93.7, size=DENSE, steps=500),
        **{
            f"{title}_{kind}": stage(
                kind, (source and f"{title}_{source}") or "dense", 93, title=title
            )
            for title in ("TPP", "L1")
            for kind, source in (("prune", None), ("finetune", "prune"))
        },
    }
    for title, steps in (("TPP", 300), ("L1", 400)):
        stages[f"{title}_finetune"]["steps"] = steps
    folder = write_run(tmp_path / "run", results(stages))
    curves = lines_of(folder)
    assert curves["TPP"][0] == list(range(100, 801, 100))
    assert curves["L1"][0] == list(range(100, 901, 100))
    accuracies, dots = draw([load_run(folder)]).axes[:2]
    colours = {line.get_label(): line.get_color() for line in accuracies.get_lines()}
    shown = [line.get_color() for line in dots.get_lines() if line.get_marker() == "o"]
    assert shown[1:] == [colours["TPP"], colours["L1"]]
    assert shown[0] not in shown[1:]


def test_run_without_results_yet(tmp_path: Path) -> None:
    log = log_of({"regularize": TPP_STAGES["regularize"]})
    config = {
        "name": "x",
        "stages": {
            "regularize": {"kind": "regularize", "input": None},
            "prune": {"kind": "prune", "input": "regularize"},
        },
    }
    folder = write_run(tmp_path / "young", None, log=log, config=config)
    run = load_run(folder)
    assert run.results.status == "running"
    page, _ = write_report([run], folder)
    rows = Page(page).rows
    assert ["nothing is done yet", *["-"] * 6] in rows
    stages = {row[0]: row[1] for row in rows}
    assert stages["regularize"] == "under way, step 1100"
    assert stages["prune"] == "to do"
    assert lines_of(folder)["lambda"][0] == list(range(100, 1101, 100))


def test_log_alone_is_enough(tmp_path: Path) -> None:
    log = log_of({"regularize": TPP_STAGES["regularize"], "finetune": TPP_STAGES["finetune"]})
    folder = write_run(tmp_path / "run", None, log=log)
    steps, _ = lines_of(folder)["finetune"]
    assert steps[-1] == 1100 + 1200


def test_results_alone_are_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results(TPP_STAGES), log=[])
    (folder / "log.jsonl").unlink()
    page, _ = write_report([load_run(folder)], folder)
    assert Page(page).rows[2][1] == "93.40"


def test_cut_last_line_is_ignored(tpp: Path) -> None:
    before = load_run(tpp).log
    with (tpp / "log.jsonl").open("a") as file:
        file.write('{"event": "evaluate", "stage": "finetune", "step": 1300, "to')
    assert load_run(tpp).log == before


def test_steps_logged_again_replace_what_was_logged_before(tmp_path: Path) -> None:
    def logged(*points: tuple[int, float]) -> list[dict[str, Any]]:
        head = {"event": "evaluate", "stage": "finetune"}
        return [{**head, "step": step, "top1": top1} for step, top1 in points]

    log = logged((0, 1.0), (10, 2.0), (20, 3.0), (10, 5.0), (15, 6.0))
    run = load_run(write_run(tmp_path / "run", None, log=log))
    kept = [(entry["step"], entry["top1"]) for entry in run.log["evaluate", "finetune"]]
    assert kept == [(0, 1.0), (10, 5.0), (15, 6.0)]


def test_loss_that_is_no_number_does_not_stop_the_report(tmp_path: Path) -> None:
    content = results(TPP_STAGES)
    log = log_of(TPP_STAGES)
    log += [{"event": "train", "stage": "finetune", "step": 1300, "loss/task": math.nan}]
    log += [{"event": "evaluate", "stage": "finetune", "step": 1300, "top1": None}]
    folder = write_run(tmp_path / "run", content, log=log)
    assert write_report([load_run(folder)], folder)[1].stat().st_size > 10_000


def test_end_of_a_run(tpp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_end(tpp)
    text = capsys.readouterr().out
    assert "93.40" in text
    assert "-0.06" in text
    assert str(tpp / "report.html") in text
    assert (tpp / "report.png").exists()


def magnified(kind: str, source: str | None, psnr: float | None, **changes: Any) -> dict[str, Any]:
    """A stage of a network that magnifies images."""
    content = stage(kind, source, None)
    for key in ("top1", "top5"):
        del content[key]
    rest = {"ssim": None, "loss": None} if psnr is None else {"ssim": 0.8912, "loss": 0.0123}
    return content | {"psnr": psnr} | rest | changes


@pytest.fixture
def super_resolution(tmp_path: Path) -> Path:
    """Trained and pruned; its finetuning is under way."""
    before = {"psnr": 24.5, "ssim": 0.7, "loss": 0.03}
    done = {
        "dense": magnified("dense", None, 31.256, steps=300, **DENSE, speedup=1.0),
        "prune": magnified("prune", "dense", None),
    }
    coming = {
        "finetune": magnified("finetune", "prune", None, steps=200, start=before),
        "evaluate": magnified("evaluate", "finetune", None),
    }
    log = [
        {"event": event, "stage": name, "step": step, "psnr": 25 + step / 60, "loss": 1 / step}
        for name, last in (("dense", 300), ("finetune", 120))
        for step in range(20, last + 1, 20)
        for event in ("evaluate", "train")
    ]
    dense = {"psnr": 31.256, "ssim": 0.8912, "loss": 0.0123, **DENSE}
    changes = {"task": "super_resolution", "model": "edsr", "status": "running", "dense": dense}
    config = {
        "task": {"kind": "super_resolution", "scale": 2},
        "stages": {
            name: {"kind": of["kind"], "input": of["input"]} for name, of in (done | coming).items()
        },
    }
    content = results(done, name="edsr_x2", published=None, **changes)
    return write_run(tmp_path / "sr", content, log=log, config=config)


def test_another_tasks_score_is_in_every_table(super_resolution: Path) -> None:
    run = load_run(super_resolution)
    assert list(comparison([run]).columns) == [
        *("Network", "PSNR dB", "vs dense", "SSIM", "Parameters", "MACs", "Speedup")
    ]
    tables = [to_rich(grid, 200) for grid in (comparison([run]), stage_grid(run))]
    text = printed(summary_table(run.results), *tables)
    # Nothing was published, and no stage that is done began from a network that was measured.
    assert "PSNR dB" in text and "PSNR before" not in text and "Published" not in text
    assert "31.26" in text and "0.8912" in text
    assert "op-1" not in text and "op-5" not in text and "%" not in text.replace("(-49.8%)", "")
    assert headline_of(run) == "PSNR: Dense 31.26 dB - still running"
    page, picture = write_report([run], super_resolution)
    rows = Page(page).rows
    assert next(row for row in rows if row[0] == "Stage") == [
        *("Stage", "Method", "Steps", "PSNR dB", "SSIM", "Loss"),
        *("Parameters", "MACs", "Time"),
    ]
    stages = {row[0]: row[1] for row in rows}
    assert stages["finetune"] == "under way, step 120" and stages["evaluate"] == "to do"
    assert "op-1" not in page.read_text() and picture.stat().st_size > 10_000
    scores, dots, *_ = draw([run]).axes
    assert scores.get_title(loc="left") == "PSNR over all stages (dB)"
    assert dots.get_title(loc="left") == "PSNR of each network (dB)"
    assert lines_of(super_resolution)["TPP"][0] == [*range(20, 301, 20), *range(320, 421, 20)]
    assert set(lines_of(super_resolution)["dense 31.26"][1]) == {31.256}
    assert [text.get_text() for text in dots.texts] == ["31.26  Dense"]


def test_a_dense_network_alone_is_there_once(super_resolution: Path) -> None:
    path = super_resolution / "results.json"
    content = json.loads(path.read_text())
    content["stages"] = {"dense": content["stages"]["dense"]}
    path.write_text(json.dumps(content))
    (super_resolution / "config.yaml").unlink()
    log = (super_resolution / "log.jsonl").read_text().splitlines()
    kept = [line for line in log if json.loads(line)["stage"] == "dense"]
    (super_resolution / "log.jsonl").write_text("\n".join(kept))
    # "dense" and "dense 31.26" were two lines of one network.
    assert [label for label in lines_of(super_resolution) if "dense" in label] == ["dense"]
    assert [row[0] for row in comparison([load_run(super_resolution)]).rows] == ["Dense"]


def test_published_top1_is_not_held_against_another_score(super_resolution: Path) -> None:
    path = super_resolution / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"published": PUBLISHED}))
    run = load_run(super_resolution)
    assert comparison([run]).rows[0][1:5] == ["31.26", "-", "-", "-"]
    assert "93" not in headline_of(run)
    assert not any("published" in label for label in lines_of(super_resolution))


def test_runs_of_two_tasks_do_not_go_beside_each_other(
    super_resolution: Path, tpp: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        write_report([load_run(tpp), load_run(super_resolution)], tmp_path / "out")
    assert str(caught.value) == (
        f"{super_resolution}: its task is super_resolution, and that of {tpp} classification: "
        "they do not go beside each other"
    )


def test_a_run_without_results_has_the_task_of_its_configuration(super_resolution: Path) -> None:
    (super_resolution / "results.json").unlink()
    assert load_run(super_resolution).results.task == "super_resolution"
    (super_resolution / "config.yaml").write_text("task: {kind: x}")
    with pytest.raises(
        UserError, match=r"config\.yaml: task\.kind: unknown task 'x'; did you mean"
    ):
        load_run(super_resolution)


@pytest.mark.parametrize("task", ["classification", "super_resolution"])
def test_what_is_read_is_written_to_the_letter(
    tpp: Path, super_resolution: Path, task: str
) -> None:
    path = (tpp if task == "classification" else super_resolution) / "results.json"
    content = Results.model_validate(json.loads(path.read_text())).to_dict()
    assert ("task" in content) == (task != "classification")
    again = Results.model_validate(content).to_dict()
    assert json.dumps(again) == json.dumps(content)
    assert list(content["stages"]["prune"]) == [
        *("kind", "method", "title", "input", "start", "steps", "epochs"),
        *(["top1", "top5", "loss"] if task == "classification" else ["psnr", "ssim", "loss"]),
        *("parameters", "macs", "speedup"),
        *(["removed_magnitude"] if task == "classification" else []),
        "wall_seconds",
    ]
    before = json.loads(path.read_text())
    assert {**before, **content, "stages": before["stages"]} == before


def test_images_that_the_next_stage_looked_at_come_last() -> None:
    metrics = Classification.metrics
    found = Evaluation.from_dict({**accuracy(92.0), "images": 40}, metrics)
    for kind, place in (("prune", -1), ("finetune", 10)):
        pruned = StageResult.from_dict(stage(kind, "x", None), metrics)
        measured = pruned.measured(found).to_dict()
        assert list(measured)[place] == "images"
        assert measured == pruned.to_dict() | accuracy(92.0) | {"images": 40}
        assert "images" not in pruned.to_dict()


def test_matplotlib_is_not_imported_before_something_is_drawn(tpp: Path) -> None:
    code = "import sys, pathlib, train.report, train.reporting.rows as rows"
    code += "; rows.load_run(pathlib.Path(sys.argv[1]))"
    code += "; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tpp)], cwd=ROOT, check=True)


NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
STAGES = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["dense", "regularize", "prune", "finetune", "evaluate"]),
            "title": st.sampled_from(["TPP", "L1", ""]),
            "input": st.none() | NAMES,  # of a stage that is not there, or in a circle, too
            "top1": st.none() | st.floats(0, 100),
            "parameters": st.none() | st.integers(0, 10**9),
            "macs": st.none() | st.integers(0, 10**10),
            "speedup": st.none() | st.floats(1, 100),
        }
    ),
)


def test_a_way_of_finetuning_that_also_removed_the_filters_is_named_once() -> None:
    method = {"method": "linear_overparam", "title": "Overparam"}
    stages = {
        "prune": StageResult(kind="prune", **method),
        "finetune": StageResult(kind="finetune", input="prune", **method),
    }
    assert method_title(stages, "finetune") == "Overparam (a reconstruction)"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    stages=STAGES,
    dense=st.none() | st.just({"top1": None}) | st.just({"top1": 90.0, "parameters": 10}),
)
def test_any_stages_give_rows_with_names_of_their_own(
    stages: dict[str, Any], dense: dict[str, Any] | None
) -> None:
    content = {"name": "x", "stages": stages, "dense": dense}
    rows = summary_rows(content)
    assert len({row.network for row in rows}) == len(rows)
    assert len(rows) <= len(stages) + 1
    if dense is not None:
        assert rows[0].network == "Dense"
    assert "Network" in printed(summary_table(content))
