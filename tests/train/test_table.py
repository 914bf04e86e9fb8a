"""Table 1 from hand-made results, against means and deviations worked out by hand."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tpp.common.errors import UserError, run_command
from train.grid import expand, load_sweep
from train.report import main
from train.reporting.paper_table import Cell, collect, to_markdown
from train.reporting.sweep_picture import draw_sweep

ROOT = Path(__file__).resolve().parents[2]
TABLE1 = ROOT / "configs" / "cifar10" / "table1.yaml"

# METHOD's table, typed here once more: mean and deviation of three runs.
PUBLISHED = """
scratch     93.16 (.16) 92.78 (.23) 92.11 (.12) 88.36 (.20) 84.60 (.14)
l1          93.79 (.06) 93.51 (.07) 92.26 (.17) 86.75 (.31) 83.03 (.07)
l1+orthp    93.69 (.02) 93.36 (.19) 91.96 (.06) 86.01 (.34) 82.62 (.05)
l1+kernorth 93.49 (.04) 93.30 (.19) 91.71 (.14) 84.78 (.34) 80.87 (.47)
l1+orthconv 92.54 (.09) 92.41 (.07) 91.02 (.16) 84.52 (.27) 80.23 (1.19)
kernorth+l1 93.49 (.07) 92.82 (.10) 90.54 (.25) 85.47 (.20) 79.48 (.81)
orthconv+l1 93.63 (.17) 93.28 (.20) 92.27 (.13) 86.70 (.07) 83.21 (.61)
tpp         93.81 (.11) 93.46 (.06) 92.35 (.12) 89.63 (.10) 85.86 (.08)
"""


def write_results(
    folder: Path, dense: float | None, stages: dict[str, float], status: str = "finished"
) -> None:
    size = {"parameters": 81_650, "macs": 10_838_000, "speedup": 11.578}
    content = {
        "name": folder.name,
        "status": status,
        "dense": {"top1": dense, "top5": None, "loss": None, "parameters": 855_770, "macs": 1},
        "stages": {
            name: {"kind": "evaluate", "top1": top1, **size} for name, top1 in stages.items()
        },
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Of PR 0.9: TPP with all three seeds at 0.01, L1 with two, and one of TPP at 0.001."""
    write_results(tmp_path / "dense", 93.70, {})
    for seed, (fast, slow) in enumerate([(89.50, 89.00), (89.80, None), (89.95, None)]):
        stages = {"evaluate": fast} | ({} if slow is None else {"evaluate_lr0.001": slow})
        # A run under way counts for the branches that are done.
        write_results(tmp_path / f"tpp_pr0.9_seed{seed}", 93.70, stages, "running")
    for seed, fast in enumerate([86.0, 87.0]):
        write_results(tmp_path / f"l1_pr0.9_seed{seed}", 93.70, {"evaluate": fast})
    return tmp_path


def report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["train.report", *arguments])
    main()
    return capsys.readouterr().out.splitlines()


def test_published_figures_are_the_papers() -> None:
    published = load_sweep(TABLE1).published
    assert published is not None
    expected: dict[str, list[list[float]]] = {}
    for line in PUBLISHED.strip().splitlines():
        method, *numbers = line.replace("(", "").replace(")", "").split()
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        expected[method] = [[float(mean), float(std)] for mean, std in pairs]
    assert published.top1["lr0.01"] == expected
    assert published.top1["lr0.001"] == {
        "l1": [[93.43], [93.12], [91.77], [87.57], [83.10]],
        "tpp": [[93.54], [93.32], [92.00], [89.09], [85.47]],
    }
    assert published.sparsity == [31.14, 49.82, 70.57, 90.39, 95.19]
    assert published.speedup == [1.45, 1.99, 3.59, 11.41, 19.31]
    assert published.dense_top1 == 93.78


def test_each_run_carries_its_published_figure() -> None:
    for run in expand(load_sweep(TABLE1)):
        if (run.method, run.ratio) == ("l1", "pr0.95"):
            (text,) = [o for o in run.overrides if o.startswith("published=")]
            published = yaml.safe_load(text.partition("=")[2])
            assert (published["top1"], published["top1_std"]) == (83.03, 0.07)
            assert (published["dense_top1"], published["speedup"]) == (93.78, 19.31)


def test_the_terminal_shows_it_beside_the_paper(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = report(monkeypatch, capsys, "--table", "1", "--runs", str(measured))
    assert max(len(line) for line in lines if not line.startswith("written")) <= 100
    assert lines[0] == "Dense: 93.70 (published 93.78)"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    sizes, fast = rows[:4], rows[4 : 4 + 10 + 8 + 2]
    # 100 * (1 - 81650 / 855770) = 90.4589
    assert sizes == [
        ["Sparsity", "", "", "", "90.46%", ""],
        ["published", "31.14%", "49.82%", "70.57%", "90.39%", "95.19%"],
        ["Speedup", "", "", "", "11.58x", ""],
        ["published", "1.45x", "1.99x", "3.59x", "11.41x", "19.31x"],
    ]
    # Mean of 89.50, 89.80, 89.95: 89.75. Squared deviations .0625 + .0025 + .04 = .105; over
    # n - 1 = 2, the root is 0.2291. Of 86, 87: 86.5 and 0.7071.
    tpp = [row for row in fast if row[0] == "TPP"]
    assert tpp == [["TPP", "", "", "", "89.75 (0.23)", ""]]
    after = fast[fast.index(tpp[0]) + 1 :]
    assert after[0][4] == "89.63 (0.10)" and after[0][1] == "93.81 (0.11)"
    assert after[1] == ["difference", "", "", "", "+0.12", ""]
    l1 = fast.index(["L1", "", "", "", "86.50 (0.71)", ""])
    assert fast[l1 + 2] == ["difference", "", "", "", "-0.25 [2/3]", ""]
    titles = [row[0] for row in fast if row[0] not in ("published", "difference")]
    assert titles[:2] == ["Scratch", "L1"] and titles[-1] == "TPP" and len(titles) == 10
    slow = rows[4 + len(fast) :]
    one = next(row for row in slow if row[0] == "TPP")
    assert one == ["TPP", "", "", "", "89.00", ""]
    assert slow[slow.index(one) + 1][4] == "89.09"
    assert slow[slow.index(one) + 2][4] == "-0.09 [1/3]"


def test_files_in_the_sweeps_folder(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report(monkeypatch, capsys, "--table", "1", "--runs", str(measured))
    text = (measured / "table1.md").read_text()
    assert text.startswith("# table1\n\nDense: 93.70 (published 93.78).")
    # Bold is the best of a column, and only that.
    bold = [line for line in text.splitlines() if "**" in line]
    assert bold == ["| TPP |  |  |  | **89.75 (0.23)** |  |", "| TPP |  |  |  | **89.00** |  |"]
    with (measured / "table1.csv").open(newline="") as file:
        found = {(r["method"], r["ratio"], r["finetuning"]): r for r in csv.DictReader(file)}
    assert len(found) == 10 * 5 * 2
    tpp, greg1 = found["tpp", "pr0.9", "lr0.01"], found["greg1", "pr0.9", "lr0.01"]
    assert (tpp["seeds_done"], tpp["seeds"]) == ("3", "3")
    assert float(tpp["top1_mean"]) == 89.75
    assert float(tpp["top1_std"]) == pytest.approx(math.sqrt(0.0525), abs=1e-4)
    assert float(tpp["difference"]) == pytest.approx(0.12)
    assert (greg1["seeds_done"], greg1["top1_mean"], greg1["published_mean"]) == ("0", "", "")


def test_nothing_done_yet_is_blank(tmp_path: Path) -> None:
    table = collect(load_sweep(TABLE1, tmp_path / "none"))
    assert all(cell.scores == () for cell in table.cells.values())
    text = to_markdown(table)
    assert "Dense: - (published 93.78)" in text and "**" not in text
    assert "difference" not in text and "| published | 93.81 (0.11) |" in text


def test_ties_are_all_bold(tmp_path: Path) -> None:
    for method, top1 in (("tpp", 89.751), ("l1", 89.754), ("greg1", 89.70)):
        write_results(tmp_path / f"{method}_pr0.9_seed0", None, {"evaluate": top1})
    text = to_markdown(collect(load_sweep(TABLE1, tmp_path)))
    bold = [line for line in text.splitlines() if "**" in line]
    assert [line.split("|")[1].strip() for line in bold] == ["L1", "TPP"]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=5), st.floats(0, 100))
def test_a_cell_sums_up_its_seeds(top1: list[float], published: float) -> None:
    cell = Cell(tuple(top1), 5, (published, 0.1))
    n = len(top1)
    mean = sum(top1) / n
    assert cell.mean == pytest.approx(mean)
    assert cell.std == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in top1) / (n - 1)))
    assert cell.difference == pytest.approx(mean - published)
    assert Cell((50.0,), 5, None).std is None and Cell((50.0,), 5, None).difference is None


def test_a_broken_result_is_named(measured: Path) -> None:
    path = measured / "tpp_pr0.9_seed1" / "results.json"
    path.write_text("{")
    with pytest.raises(UserError, match=str(path)):
        collect(load_sweep(TABLE1, measured))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name run folders, or a sweep with --config or --table"),
        (["run", "--table", "1"], "name run folders, or a sweep with --config or --table"),
        (["run", "--config", "x.yaml"], "name run folders, or a sweep with --config or --table"),
        (["--table", "7"], "--table: '7' is none of 1"),
        (["--table", "1", "--config", "no.yaml"], "no.yaml: cannot read the configuration"),
    ],
)
def test_a_mistake_ends_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.report", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    assert line in capsys.readouterr().err


def other_sweep(tmp_path: Path) -> dict[str, Any]:
    base = ROOT / "configs" / "cifar10"
    return {
        "name": "other",
        "output": str(tmp_path / "runs"),
        "methods": {"l1": str(base / "resnet56_l1_base.yaml")},
        "ratios": {"half": {"layer*.conv1": 0.5}},
        "finetuning": {"short": {"epochs": 3}},
        "seeds": [4],
    }


def test_another_sweep_without_published_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(other_sweep(tmp_path), sort_keys=False))
    write_results(tmp_path / "runs" / "l1_half_seed4", 93.0, {"evaluate": 91.25})
    lines = report(monkeypatch, capsys, "--table", "1", "--config", str(path))
    assert lines[0] == "Dense: 93.00"
    text = (tmp_path / "runs" / "other.md").read_text()
    assert "| L1 | **91.25** |" in text and "published" not in text


def related_results(folder: Path) -> None:
    """Two seeds of three rows of related.yaml: filters gone, weights masked, a sparse basis."""
    sizes = {
        "tpp+step": {"parameters": 26_470, "macs": 3_760_768, "speedup": 10.78},
        "imp+llr": {"parameters": 269_722, "macs": 40_551_040, "speedup": 1.0},
        "interspace": {"parameters": 269_722, "macs": 40_551_040, "speedup": 1.0},
    }
    for (method, size), (first, second) in zip(
        sizes.items(), ((70.0, 72.0), (75.0, 76.0), (66.0, 66.0)), strict=True
    ):
        left = {} if method == "tpp+step" else {"nonzero_parameters": 26_470}
        for seed, top1 in enumerate((first, second)):
            made = {"kind": "finetune", "steps": 572, "input": "regularize"}
            stages = {
                "regularize": {"kind": "regularize", "steps": 600},
                "finetune": made,
                "evaluate": {"kind": "evaluate", "input": "finetune", "top1": top1} | size | left,
            }
            dense = {"top1": 83.0, "parameters": 269_722, "macs": 40_551_040}
            content = {"name": "x", "status": "finished", "dense": dense, "stages": stages}
            place = folder / f"{method}_pr0.9_seed{seed}"
            place.mkdir(parents=True)
            (place / "results.json").write_text(json.dumps(content))


def test_rows_of_unlike_sizes_each_say_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    related_results(tmp_path)
    config = ROOT / "configs" / "cifar10" / "related.yaml"
    lines = report(monkeypatch, capsys, "--config", str(config), "--runs", str(tmp_path))
    text = (tmp_path / "related.md").read_text()
    assert "| tpp+step | 71.00 (1.41) |" in text and "| imp+llr | **75.50 (0.71)** |" in text
    assert "| tpp+step | 26,470 | 26,470 | 3,760,768 | 1,172 |" in text
    assert "| imp+llr | 269,722 | 26,470 | 40,551,040 | 1,172 |" in text
    assert "Finetuning" not in text and "/" not in text.split("##")[1]
    assert lines[-1].endswith(f"{tmp_path / 'related.png'}")
    with (tmp_path / "related.csv").open(newline="") as file:
        found = {row["method"]: row for row in csv.DictReader(file)}
    assert found["interspace"]["nonzero_parameters"] == "26470"
    assert found["imp+ft"]["macs"] == ""


def test_the_picture_has_each_row_over_what_it_costs(tmp_path: Path) -> None:
    related_results(tmp_path)
    table = collect(load_sweep(ROOT / "configs" / "cifar10" / "related.yaml", tmp_path))
    figure = draw_sweep(table)
    assert figure is not None
    by_macs, by_left = figure.axes
    for axes, costs in ((by_macs, (3_760_768, 40_551_040)), (by_left, (26_470, 26_470))):
        points = {
            str(shown.get_label()): shown.lines[0].get_xydata()[0]
            for shown in axes.containers
            if len(shown.lines[0].get_xydata())
        }
        for method, cost, top1 in (("tpp+step", costs[0], 71.0), ("imp+llr", costs[1], 75.5)):
            x, y = points[method]
            assert y == top1
            assert abs(math.log10(x / cost)) < 0.03, "beside its cost, no further"
        xs = [x for x, _ in points.values()]
        assert len({round(math.log10(x), 4) for x in xs}) == 3, "none on another"
    assert draw_sweep(collect(load_sweep(TABLE1, tmp_path / "none"))) is None


@pytest.mark.parametrize("macs", [None, 0])
def test_scores_without_sizes_are_no_points(tmp_path: Path, macs: int | None) -> None:
    sizes = {"parameters": 1, "macs": macs}
    stages = {"evaluate": {"kind": "evaluate", "top1": 70.0, **sizes}}
    folder = tmp_path / "tpp+step_pr0.9_seed0"
    folder.mkdir()
    content = {"name": "x", "dense": sizes, "stages": stages}
    (folder / "results.json").write_text(json.dumps(content))
    table = collect(load_sweep(ROOT / "configs" / "cifar10" / "related.yaml", tmp_path))
    figure = draw_sweep(table)
    assert figure is not None and "| tpp+step | **70.00** |" in to_markdown(table)
    assert not any(len(shown.lines[0].get_xydata()) for shown in figure.axes[0].containers)
