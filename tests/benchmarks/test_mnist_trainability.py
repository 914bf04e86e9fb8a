"""The MNIST study end to end on a few real digits, and its document against its figures."""

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from benchmarks.mnist_trainability import CONFIGS, METHODS, PLOT, RATES, RESULTS, plot, table

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FOLDER = ROOT / "configs" / "mnist"


@pytest.fixture(scope="module")
def digits(shared_data, tmp_path_factory) -> Path:
    """Real MNIST, 12 training and 8 test images of each digit."""
    root = tmp_path_factory.mktemp("mnist")
    wanted = {"train": 12, "test": 8}
    counts: Counter[tuple[str, str]] = Counter()
    with tarfile.open(shared_data("mnist-png.tar.gz")) as archive:
        for member in archive:
            if member.isfile():
                split, digit, name = Path(member.name).parts[-3:]
                counts[split, digit] += 1
                if counts[split, digit] <= wanted[split]:
                    target = root / split / digit / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
    return root


def study(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.mnist_trainability", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


def test_the_study_end_to_end(digits, tmp_path):
    for name in CONFIGS.values():
        stage = {"epochs": 1, "optimizer": {"milestones": [0.5]}}
        short = {
            "extends": str(CONFIG_FOLDER / f"{name}.yaml"),
            "training": {"batch_size": 20, "trainability_every": 2, "trainability_images": 10},
            "method": {"delta": 0.1, "stabilize_steps": 7, "zero_out_interval": 1},
            "stages": {f"{m}_{suffix}": stage for m in METHODS for suffix in RATES.values()}
            | {"dense": {"epochs": 2, "optimizer": {"milestones": [1]}}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(short))
    paths = [
        "--runs",
        tmp_path / "runs",
        "--output",
        tmp_path / "f.json",
        "--plot",
        tmp_path / "p.png",
    ]
    ran = study("--data", digits, "--seeds", 3, "--configs", tmp_path, *paths)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "f.json").read_text())

    # 120 images in batches of 20 are 6 steps an epoch.
    assert figures["regularize_steps"] == 10
    rows = {(r["ratio"], r["method"], r["learning_rate"]): r for r in figures["rows"]}
    assert set(rows) == {(r, m, lr) for r in CONFIGS for m in METHODS for lr in RATES}
    for (_, method, _), row in rows.items():
        assert row["curves"]["jsv"]["steps"] == [0, 2, 4, 6]
        assert row["curves"]["jsv"]["values"][0][0] == row["jsv_pruned"][0]
        assert row["curves"]["jsv"]["values"][0][-1] == row["jsv"][0]
        assert row["curves"]["top1"]["steps"][-1] == 6
        if method == "orthp":  # exact in a linear network
            assert row["jsv_pruned"] == [pytest.approx(1, abs=1e-5)]
        if method == "l1":
            assert row["jsv_pruned"][0] < 0.1 * figures["dense"]["jsv"][0]
    # Both learning rates start from the same pruned network, both ratios from the same dense one.
    for ratio in CONFIGS:
        for method in METHODS:
            fast, slow = (rows[ratio, method, rate] for rate in RATES)
            assert fast["jsv_pruned"] == slow["jsv_pruned"] and fast["jsv"] != slow["jsv"]
    weights = [tmp_path / "runs" / f"{c}_seed3/dense/model.safetensors" for c in CONFIGS.values()]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert ran.stdout.count("dense: done before, skipped") == 1
    assert table(figures) in ran.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    again = study("--seeds", 3, *paths)
    assert again.returncode == 0
    assert json.loads((tmp_path / "f.json").read_text()) == figures

    results = tmp_path / "runs" / "mlp7_pr0.9_seed3" / "results.json"
    results.write_text(results.read_text().replace('"finished"', '"running"'))
    unfinished = study("--seeds", 3, *paths)
    assert unfinished.returncode == 2
    assert (
        unfinished.stderr
        == f"error: {results}: the run is not finished; go on with it with --data\n"
    )


def test_mistakes_are_one_line(tmp_path):
    missing = study("--runs", tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1 and "mlp7_pr0.8_seed0/results.json" in missing.stderr
    seeds = study("--seeds", "0;1")
    assert seeds.returncode == 2
    assert seeds.stderr == "error: --seeds: expected numbers such as 0,1,2, not '0;1'\n"


def test_table_gives_mean_and_deviation():
    row = {
        "ratio": "0.9",
        "method": "l1",
        "learning_rate": "0.001",
        "jsv_pruned": [1e-4, 2e-4, 3e-4],
        "jsv": [1.0, 2.0, 3.0],
        "top1_pruned": [10.0, 10.0, 10.0],
        "top1": [50.0, 60.0, 70.0],
    }
    figures = {"dense": {"jsv": [1.5, 1.5, 1.5], "top1": [92.0, 92.0, 92.0]}, "rows": [row]}
    assert table(figures).splitlines()[2:] == [
        "| none | dense | | 1.500 (0.000) | | 92.00 (0.00) | |",
        "| 90% | L1 | 0.001 | 2.0e-04 (1.0e-04) | 2.000 (1.000) | 10.00 (0.00) | 60.00 (10.00) |",
    ]


def test_the_document_shows_the_figures_that_are_kept(tmp_path):
    figures = json.loads(RESULTS.read_text())
    assert table(figures) in (ROOT / "docs" / "trainability.md").read_text()
    plot(figures, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0.5 * PLOT.stat().st_size
