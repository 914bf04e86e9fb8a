"""The page and the pictures of a sweep, from results that were typed here."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from report_page import Page

from tpp.common.errors import UserError
from train.grid import load_sweep
from train.report import main
from train.reporting.latency import Latency
from train.reporting.paper_table import ResultTable, collect, to_markdown
from train.reporting.sweep_picture import draw_sweep, sweep_panels

ROOT = Path(__file__).resolve().parents[2]
RELATED = ROOT / "configs" / "cifar10" / "related.yaml"
SUPER = ROOT / "configs" / "sr" / "related.yaml"
BIG = {"parameters": 269_722, "macs": 40_551_040}
SMALL = {"parameters": 26_470, "macs": 3_760_768}


def write_run(folder: Path, scores: dict[str, float], size: dict[str, Any], **more: Any) -> None:
    """A finished run that evaluated one network."""
    made = {"kind": "finetune", "steps": 572}
    last = {"kind": "evaluate", "input": "finetune", **scores, **size, **more.pop("stage", {})}
    dense = more.pop("dense", {"top1": 83.0})
    content = {
        **{"name": "x", "status": "finished", "model": "net", "device": "H200", "ranks": 2},
        **{"dense": {**dense, **BIG}, "stages": {"finetune": made, "evaluate": last}},
        **more,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture
def related(tmp_path: Path) -> Path:
    """Two seeds of TPP and one of a masked network; one run has a report of its own."""
    folder = tmp_path / "their runs"
    for seed, top1 in enumerate((70.0, 72.0)):
        write_run(folder / f"tpp+step_pr0.9_seed{seed}", {"top1": top1}, SMALL)
    masked = {"nonzero_parameters": 26_470}
    write_run(folder / "imp+llr_pr0.9_seed0", {"top1": 75.0}, BIG, stage=masked)
    (folder / "tpp+step_pr0.9_seed1" / "report.html").write_text("")
    return folder


@pytest.fixture
def latency(tmp_path: Path) -> Path:
    """4 ms for the dense network, 1 ms for TPP's, each a batch of 8."""
    rows = [{"batch": 8, **size, "median_ms": ms} for size, ms in ((BIG, 4.0), (SMALL, 1.0))]
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"results": rows, "on": {"gpu": "H200"}}))
    return path


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.report", *map(str, arguments)])
    main()


def test_the_page_has_a_row_for_each_network(
    related: Path, latency: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    report(
        monkeypatch,
        *("--config", RELATED, "--runs", related, "--output", output, "--latency", latency),
    )
    # The report is where it was asked for, and nothing of it is beside the runs.
    names = {f"related.{ending}" for ending in ("html", "md", "csv", "svg", "png")}
    assert {path.name for path in output.iterdir()} == names
    assert all("_seed" in path.name for path in related.iterdir())
    page = Page(output / "related.html")
    assert page.text_of("h1") == ["related"] and page.fetched == []
    assert page.facts["Network"] == "net" and page.facts["Machine"] == "H200"
    assert page.facts["Networks evaluated"] == "3 of 30" and page.facts["Ranks"] == "2"
    assert page.rows[0] == [
        *("Method", "Ratio", "Top-1 %", "vs dense", "Parameters", "Non-zero", "MACs", "Steps"),
        *("ms, batch 8", "Runs by seed"),
    ]
    rows = {row[0]: row[1:] for row in page.rows[1:11]}
    # Of 70 and 72: mean 71, sample deviation the root of 2; 71 - 83 = -12.
    assert rows["tpp+step"] == [
        *("pr0.9", "71.00 ± 1.41 [2/3]", "-12.00", "26,470", "26,470", "3,760,768", "572"),
        *("1", "0 1 2"),
    ]
    assert rows["imp+llr"][1:8] == [
        *("75.00 [1/3]", "-8.00", "269,722", "26,470", "40,551,040", "572", "4")
    ]
    assert rows["imp+ft"][1:7] == ["-"] * 6
    (link,) = page.links
    own = related / "tpp+step_pr0.9_seed1" / "report.html"
    assert (output / unquote(link)).resolve() == own.resolve()
    assert [name.split("-figure")[0] for name in page.pictures] == [
        *("block0-macs", "block0-parameters", "block0-latency-8")
    ]
    with (output / "related.csv").open(newline="") as file:
        found = {row["method"]: row for row in csv.DictReader(file)}
    assert found["tpp+step"]["milliseconds_batch_8"] == "1.0000"
    assert found["imp+ft"]["milliseconds_batch_8"] == ""
    assert "<svg" in (output / "related.svg").read_text()
    with Image.open(output / "related.png") as picture:
        assert picture.size[0] > 2000


def labelled(figure: Any) -> list[list[str]]:
    return [axes.get_legend_handles_labels()[1] for axes in figure.axes]


def points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        str(shown.get_label()): [tuple(at) for at in shown.lines[0].get_xydata()]
        for shown in axes.containers
        if len(shown.lines[0].get_xydata())
    }


def test_points_lie_over_their_measured_time(
    related: Path, latency: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = collect(load_sweep(RELATED, related))
    panels = sweep_panels(table, Latency.read(latency))
    (axes,) = panels[-1].figure.axes
    assert axes.get_xlabel() == "measured milliseconds for 8 images"
    found = points(axes)
    for method, ms, top1 in (("tpp+step", 1.0, 71.0), ("imp+llr", 4.0, 75.0)):
        ((x, y),) = found[method]
        assert y == top1 and abs(math.log10(x / ms)) < 0.03
    low, high = axes.get_ylim()
    assert low < 71 - math.sqrt(2) and high > 83, "deviations and the dense network are on it"


def super_resolution(folder: Path) -> ResultTable:
    """Three seeds of the dense row, one of a masked one."""
    dense = {"psnr": 36.4}
    for seed, psnr in enumerate((36.4, 36.5, 36.6)):
        write_run(
            folder / f"dense_x2_seed{seed}",
            {"psnr": psnr},
            BIG,
            dense=dense,
            task="super_resolution",
        )
    write_run(
        folder / "l1_0.5_x2_seed0",
        {"psnr": 36.2},
        BIG,
        dense=dense,
        task="super_resolution",
        stage={"nonzero_parameters": 130_000},
    )
    return collect(load_sweep(SUPER, folder))


def test_a_dense_row_is_the_only_dense_network(tmp_path: Path) -> None:
    table = super_resolution(tmp_path / "runs")
    assert table.dense_row == "dense"
    figure = draw_sweep(table)
    assert figure is not None
    for labels in labelled(figure):
        assert labels.count("dense") == 1
    ((_, mean),) = points(figure.axes[0])["dense"]
    assert mean == pytest.approx(36.5), "its seeds, not the first alone"
    text = to_markdown(table)
    assert "Dense:" not in text and text.count("dense") == 1


def test_without_such_a_row_the_dense_network_is_a_point(related: Path) -> None:
    table = collect(load_sweep(RELATED, related))
    assert table.dense_row is None and "Dense: 83.00" in to_markdown(table)
    figure = draw_sweep(table)
    assert figure is not None and all(labels.count("dense") == 1 for labels in labelled(figure))


def test_nothing_done_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    command = [sys.executable, "-m", "train.report", "--config", str(RELATED)]
    done = subprocess.run(
        [*command, "--runs", str(folder), "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: {folder}: none of the 31 runs of the sweep related has a result there yet "
        f"(0 under way); tpp sweep --config {RELATED} runs them; --runs DIR reports "
        "those of another folder\n"
    )
    assert not folder.exists() and not (tmp_path / "out").exists()


def test_the_runs_of_a_sweep_go_with_a_sweep(
    related: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--runs goes with a sweep: --config or --table"):
        report(monkeypatch, related / "tpp+step_pr0.9_seed0", "--runs", related)


@pytest.mark.parametrize("column", ["macs", "parameters"])
def test_a_latency_of_other_networks_is_said(
    related: Path, latency: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    content = json.loads(latency.read_text())
    for row in content["results"]:
        row[column] += 1
    latency.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"latency\.json: none of the networks to report is in it"):
        report(monkeypatch, "--config", RELATED, "--runs", related, "--latency", latency)
    assert not (related / "related.html").exists()
