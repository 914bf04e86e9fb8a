"""A report in a terminal of 80 columns loses nothing, and one of unlike runs is still read."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console, RenderableType

from train.grid import load_sweep
from train.reporting.grids import Grid, grids_of, summary_table, to_rich
from train.reporting.page import page_of
from train.reporting.paper_table import collect
from train.reporting.paper_table import to_rich as to_rich_table
from train.reporting.rows import RunRecord, load_run

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).with_name("old_run_folder")
PUBLISHED = {
    "source": "Wang & Fu, ICLR 2023, Table 1: ResNet-56 on CIFAR-10, PR 0.9, TPP",
    "dense_top1": 93.78,
    "top1": 89.63,
    "top1_std": 0.1,
    "speedup": 11.41,
}


def printed(what: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def words(text: str) -> str:
    """What is in a table, without its frame; a folded cell in one piece."""
    return re.sub(r"[\s┃│┏┓┗┛━┳┻┡┩╇─└┘┴├┤┼]+", "", text)


def run_in(folder: Path, changes: dict[str, Any]) -> RunRecord:
    """A copy of a run folder with other settings, and figures to compare with."""
    shutil.copytree(OLD, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "published": PUBLISHED}))
    return load_run(folder)


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", ["a", "resnet56_tpp_pr0.9_lr0.001_of_today"])
def test_nothing_is_cut(tmp_path: Path, width: int, name: str) -> None:
    runs = [run_in(tmp_path / f"{name}{n}", {"seed": n}) for n in (1, 2, 3)]
    for grid in grids_of(runs):
        text = printed(to_rich(grid, width), width)
        assert "…" not in text
        for column in grid.columns:  # headings are whole, at spaces apart
            for word in column.split():
                assert len(word) > 24 or word in text, (column, text)
        for number, row in enumerate(grid.rows):
            for cell in row:
                assert len(cell) > 24 or cell in text, (number, cell, text)
    assert "…" not in printed(summary_table(runs[0].results), 80)


def test_parts_name_their_rows() -> None:
    columns = ["Run", "Network", *(f"Column{n}" for n in range(12))]
    rows = [["first", "TPP", *(f"1.{n}" for n in range(12))], ["second", "L1", *["-"] * 12]]
    text = printed(to_rich(Grid("Title", columns, rows), 80), 80)
    parts = text.split("Title")[1:]
    assert len(parts) == 3
    for part in parts:
        assert all(
            part.count(word) == 1 for word in ("Run", "Network", "first", "TPP", "second", "L1")
        )
    found = re.findall(r"Column\d+", text)
    assert found == columns[2:]
    assert printed(to_rich(Grid("Title", columns, rows)), 300).count("Title") == 1


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_table_1_keeps_its_methods(width: int) -> None:
    table = collect(load_sweep(ROOT / "configs" / "cifar10" / "table1.yaml"))
    text = printed(to_rich_table(table, width), width)
    assert "…" not in text
    for title in table.titles.values():
        assert title in text
    assert re.findall(r"\bpr0\.\d+", text).count("pr0.95") == 3  # of three blocks
    assert "85.86 (0.08)" in text and "93.16 (0.16)" in text


def test_unlike_runs_differ_in_a_screenful(tmp_path: Path) -> None:
    stages = {
        f"stage{n}": {"kind": "finetune", "epochs": n, "optimizer": {"lr": 0.1, "momentum": 0.9}}
        for n in range(1, 9)
    }
    one = run_in(tmp_path / "one", {})
    other = run_in(tmp_path / "other", {
        "stages": stages,
        "data.demo": {"classes": 4, "seed": 1},
        "seed": 5,
    })  # fmt: skip
    (grid,) = [grid for grid in grids_of([one, other]) if grid.title == "Settings that differ"]
    found = {row[0]: row[1:] for row in grid.rows}
    assert found["stages.stage1"] == ["", "4 settings"]
    assert found["data.demo"] == ["-", "2 settings"] and found["seed"] == ["0", "5"]
    assert not [key for key in found if key.startswith("stages.") and key.count(".") > 1]
    assert len(found) <= 15

    changed = {f"key{n}": n for n in range(60)}
    many = run_in(tmp_path / "many", {"model.args": changed})
    more = run_in(tmp_path / "more", {"model.args": {key: n + 1 for key, n in changed.items()}})
    (grid,) = [grid for grid in grids_of([many, more]) if grid.title == "Settings that differ"]
    text = printed(to_rich(grid, 80), 80)
    assert "...and40more,whichreport.htmlhas" in words(text)
    assert len(set(re.findall(r"model\.args\.key\d+", text))) == 20
    assert page_of([many, more]).count("model.args.key") == 60
