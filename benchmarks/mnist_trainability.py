"""Trainability of MLP-7-Linear on MNIST before and after pruning (Wang & Fu, ICLR 2023).

Runs configs/mnist/mlp7_pr0.8.yaml and mlp7_pr0.9.yaml for every seed through train/main.py, and
writes the figures to benchmarks/results/mnist_trainability.json, the table to standard output and
the picture to docs/mnist_trainability.png. What is done is not done again: an interrupted study
goes on where it stopped, and a finished one is only collected. 20 minutes on one CPU core.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import write_whole
from tpp.common.options import share
from tpp.common.paths import user_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mnist_trainability.json"
PLOT = ROOT / "docs" / "mnist_trainability.png"

CONFIGS = {"0.8": "mlp7_pr0.8", "0.9": "mlp7_pr0.9"}
RATES = {"0.01": "lr1e-2", "0.001": "lr1e-3"}
METHODS = {"l1": "L1", "orthp": "L1 + OrthP", "tpp": "TPP"}
# Okabe and Ito's colours, which the colour-blind tell apart; the markers say it without colour.
STYLES: dict[str, dict[str, Any]] = {
    "l1": {"color": "#D55E00", "marker": "s", "linewidth": 1.6},
    "orthp": {"color": "#E69F00", "marker": "^", "linewidth": 3.0},  # shows behind TPP's
    "tpp": {"color": "#0072B2", "marker": "o", "linewidth": 1.4},
}

Figures = dict[str, Any]


def run_study(data: Path, runs: Path, seeds: Sequence[int], configs: Path) -> None:
    """Run both ratios for every seed; what is done already is skipped by the runs themselves."""
    for seed in seeds:
        before: Path | None = None
        for config in CONFIGS.values():
            folder = runs / f"{config}_seed{seed}"
            dense = folder / "dense"
            if before is not None and not dense.exists():
                # Both ratios start from one dense network: the second finds its stage done.
                shutil.copytree(before / "dense", dense)
            command = [sys.executable, str(ROOT / "train" / "main.py")]
            command += ["--config", str(configs / f"{config}.yaml")]
            command += [f"data.root={data.resolve()}", f"seed={seed}", f"output={folder}"]
            if subprocess.run(command).returncode:
                raise UserError(f"{folder}: the run failed; the same command goes on with it")
            before = folder


def collect(runs: Path, seeds: Sequence[int]) -> Figures:
    """Read the study's figures from its run folders.

    Returns:
        Plain data: ``dense`` and one row in ``rows`` for each ratio, method and learning rate,
        with the values of all seeds; in ``curves`` the same rows over the finetuning's steps.

    Raises:
        UserError: a run is missing or not finished.
    """
    first = _results(runs / f"{CONFIGS['0.8']}_seed{seeds[0]}")
    network = first["stages"]["tpp_regularize"]
    figures: Figures = {
        "seeds": list(seeds),
        "versions": first["versions"],
        "git_commit": first["git_commit"],
        "device": first["device"],
        "wall_seconds": 0.0,
        "dense": {"jsv": [], "top1": []},
        "regularize_steps": network["steps"],
        "rows": [],
    }
    for ratio, config in CONFIGS.items():
        folders = [runs / f"{config}_seed{seed}" for seed in seeds]
        results = [_results(folder) for folder in folders]
        logs = [_log(folder) for folder in folders]
        if ratio == "0.8":  # the other ratio's runs start from copies of its dense networks
            for log, result in zip(logs, results, strict=True):
                figures["dense"]["jsv"].append(log["trainability", "dense"][-1]["jsv_mean"])
                figures["dense"]["top1"].append(result["stages"]["dense"]["top1"])
        else:
            for result in results:
                result["wall_seconds"] -= result["stages"]["dense"]["wall_seconds"]
        figures["wall_seconds"] += sum(result["wall_seconds"] for result in results)
        for method in METHODS:
            for rate, suffix in RATES.items():
                stage = f"{method}_{suffix}"
                jsv = [log["trainability", stage] for log in logs]
                top1 = [log["evaluate", stage] for log in logs]
                figures["rows"].append(
                    {
                        "ratio": ratio,
                        "method": method,
                        "learning_rate": rate,
                        "jsv_pruned": [points[0]["jsv_mean"] for points in jsv],
                        "top1_pruned": [points[0]["top1"] for points in top1],
                        "jsv": [points[-1]["jsv_mean"] for points in jsv],
                        "top1": [points[-1]["top1"] for points in top1],
                        "curves": {"jsv": _curve(jsv, "jsv_mean"), "top1": _curve(top1, "top1")},
                    }
                )
    return figures


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run the study with --data first")
    results: dict[str, Any] = json.loads(path.read_text())
    if results["status"] != "finished":
        raise UserError(f"{path}: the run is not finished; go on with it with --data")
    return results


def _log(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The entries of log.jsonl by event and stage."""
    entries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entries.setdefault((entry["event"], entry["stage"]), []).append(entry)
    return entries


def _curve(seeds: list[list[dict[str, Any]]], key: str) -> dict[str, list[Any]]:
    """Steps, and for each seed the values at them."""
    return {
        "steps": [point["step"] for point in seeds[0]],
        "values": [[point[key] for point in points] for points in seeds],
    }


def table(figures: Figures) -> str:
    """The study's rows in Markdown, as mean (standard deviation) over the seeds."""
    dense = figures["dense"]
    lines = [
        "| neurons removed | method | learning rate | JSV pruned | JSV finetuned | top-1 pruned "
        "| top-1 finetuned |",
        "|---|---|---|---|---|---|---|",
        f"| none | dense | | {_spread(dense['jsv'], 3)} | | {_spread(dense['top1'], 2)} | |",
    ]
    for row in figures["rows"]:
        cells = [
            f"{float(row['ratio']):.0%}",
            METHODS[row["method"]],
            row["learning_rate"],
            _spread(row["jsv_pruned"], 3),
            _spread(row["jsv"], 3),
            _spread(row["top1_pruned"], 2),
            _spread(row["top1"], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """Mean (standard deviation), in powers of ten where the digits would show nothing but zeros."""
    mean = statistics.fmean(values)
    style = f".{digits}f" if mean >= 10 ** (1 - digits) else ".1e"
    if len(values) == 1:
        return f"{mean:{style}}"
    return f"{mean:{style}} ({statistics.stdev(values):{style}})"


def plot(figures: Figures, path: Path) -> None:
    """JSV and accuracy over finetuning: a column for each ratio and learning rate."""
    figure, axes = plt.subplots(
        2, 4, figsize=(11, 5.2), sharex=True, sharey="row", layout="constrained"
    )
    panels = [(ratio, rate) for ratio in CONFIGS for rate in RATES]
    for column, (ratio, rate) in enumerate(panels):
        for axis, key in zip(axes[:, column], ("jsv", "top1"), strict=True):
            level = statistics.fmean(figures["dense"][key])
            axis.axhline(level, color="0.35", linestyle="--", linewidth=1.2, label="dense")
            for row in figures["rows"]:
                if (row["ratio"], row["learning_rate"]) == (ratio, rate):
                    _band(axis, row["curves"][key], row["method"])
            axis.grid(color="0.9", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(f"{float(ratio):.0%} removed, finetuning at {rate}", fontsize=10)
        axes[1, column].set_xlabel("finetuning step")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("mean Jacobian singular value")
    axes[1, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylim(0, 100)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    # Written aside first: a picture appears whole or not at all.
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=130)
    part.replace(path)
    plt.close(figure)


def _band(axis: Axes, curve: dict[str, list[Any]], method: str) -> None:
    """The mean over the seeds, in the band of all of them."""
    at_steps = list(zip(*curve["values"], strict=True))
    means = [statistics.fmean(values) for values in at_steps]
    style = STYLES[method]
    lowest, highest = [min(v) for v in at_steps], [max(v) for v in at_steps]
    axis.fill_between(curve["steps"], lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
    axis.plot(
        curve["steps"],
        means,
        markevery=max(1, len(means) // 6),
        markersize=4.5,
        label=METHODS[method],
        **style,
    )


def main() -> None:
    """Run what is missing of the study, and collect it."""
    parser = Parser.of_script(
        "python -m benchmarks.mnist_trainability", __doc__, ["--data /data/mnist --seeds 0"]
    )
    share(parser, "--data", ", in train/ and test/; without it nothing is run")
    parser.add_argument(
        "--seeds", default="0,1,2", metavar="N,N", help="of the runs (default: 0,1,2)"
    )
    add = parser.add_argument
    add(
        "--runs",
        type=user_path,
        default=Path("runs/mnist_trainability"),
        metavar="DIR",
        help="folder of the runs (default: %(default)s)",
    )
    add(
        "--configs",
        type=user_path,
        default=ROOT / "configs" / "mnist",
        metavar="DIR",
        help="folder of the configurations (default: configs/mnist)",
    )
    share(parser, "--output", default=RESULTS)
    add("--plot", type=user_path, default=PLOT, metavar="FILE", help="picture of the results")
    arguments = parser.parse_args()
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds: expected numbers such as 0,1,2, not {arguments.seeds!r}"
        ) from None
    if arguments.data is not None:
        run_study(arguments.data, arguments.runs, seeds, arguments.configs)
    figures = collect(arguments.runs, seeds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output, json.dumps(figures, indent=1) + "\n")
    plot(figures, arguments.plot)
    print(table(figures))
    print(f"figures: {arguments.output}\nplot:    {arguments.plot}")


if __name__ == "__main__":
    run_command(main)
