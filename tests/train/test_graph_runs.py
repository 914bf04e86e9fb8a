"""tpp graphs: a run, its folder, a stop and a kill, and mistakes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import BARE
from in_process import in_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tpp.checkpoints.training_state import read_state, state_folders
from tpp.common.errors import UserError
from train.config.config import load_config as load_pruning
from train.distributed.stopping import SIGNALS
from train.graphs.__main__ import main
from train.graphs.config import load_config
from train.graphs.graph import Graph, ba15, degree_attack, resilience_sum

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "graphs"
TINY: dict[str, Any] = {
    "name": "tiny",
    "network": {"hidden": 8, "filtration": 1, "jumping": 4},
    "training": {
        "steps": 8 * 48,
        "environments": 8,
        "batch": 48,
        "epochs": 2,
        "minibatch": 24,
        "imitation": 0.5,
        "imitated": 2,
    },
    "rewirings": 5,
    "checkpoint_every": 3,
    "evaluation": {"every": 2, "episodes": 20},
    "search": {"greedy": 4, "beam": 3, "annealing": 1, "annealing_steps": 300},
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Put back what a run in this process has set."""
    handlers, threads = (
        {number: signal.getsignal(number) for number in SIGNALS},
        torch.get_num_threads(),
    )
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command in this process."""

    return in_process(tmp_path, monkeypatch, "train.graphs", main)


def logged(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_and_what_is_in_its_folder(graphs, tmp_path, capsys):
    run = tmp_path / "run"
    graphs(TINY, f"output={run}")
    said = capsys.readouterr().out
    assert "train: iteration 8 of 8, ends 0." in said and "F at the ends, in 1/225" in said
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "finished" and results["start"] == 51 / 225
    assert (results["iterations"], results["environment_steps"]) == (8, 384)
    names = [row["name"] for row in results["rows"]]
    assert names == [
        "policy, most probable",
        "policy, sampled",
        "greedy search",
        "beam search (3)",
        "simulated annealing",
    ]
    assert [row["runs"] for row in results["rows"]] == [1, 20, 4, 1, 1]
    for row in results["rows"]:
        graph = Graph.of_edges(15, row["edges"])
        assert graph.degrees == ba15().degrees
        assert row["score"] == resilience_sum(graph, degree_attack(graph)) / 225
        assert row["worst"] <= row["median"] <= row["score"] <= row["on_the_way"]
    best = Graph.of_edges(15, results["training_best_edges"])
    assert results["training_best"] == resilience_sum(best, degree_attack(best)) / 225

    entries = logged(run)
    assert [entry["step"] for entry in entries] == [*range(1, 9)]
    assert ["greedy/end" in entry for entry in entries] == [False, True] * 4
    events = EventAccumulator(str(run / "train")).Reload()
    for name in (
        "episode/return",
        "episode/end",
        "loss/entropy",
        "loss/kl",
        "loss/policy",
        "loss/value",
        "best",
    ):
        points = {point.step: point.value for point in events.Scalars(name)}
        expected = {entry["step"]: entry[name] for entry in entries if name in entry}
        assert points == pytest.approx(expected)
    assert load_config(run / "config.yaml").training.environments == 8

    # Done: it is judged again, as the settings of that may differ, and trained no further.
    newest = read_state(state_folders(run / "train" / "checkpoints")[0])
    assert newest.step == 8
    graphs(TINY, f"output={run}", "search.greedy=0", "search.annealing=0")
    again = json.loads((run / "results.json").read_text())
    assert again["rows"][0]["score"] == results["rows"][0]["score"]
    assert again["rows"][1]["mean"] == results["rows"][1]["mean"]
    assert [row["name"] for row in again["rows"][2:]] == ["beam search (3)"]
    assert logged(run) == entries
    graphs(TINY, f"output={run}", "training.lr=1e-3", expect=2)
    assert (
        "settings: training.lr was 0.0007 and is 0.001; choose another" in capsys.readouterr().err
    )


def test_stopped_and_killed_it_goes_on_to_the_bit(graphs, tmp_path, forks):
    settings = {**TINY, "training": {**TINY["training"], "steps": 14 * 48, "epochs": 1}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    graphs(settings, f"output={whole}")
    command = ["--config", str(tmp_path / "config.yaml"), f"output={broken}"]

    def started(signal_number: int, after: int) -> subprocess.CompletedProcess[str]:
        process = forks.start("train.graphs", command, ROOT, {**os.environ, **BARE})
        while len(logged(broken)) < after:
            assert process.poll() is None, process.output()
            time.sleep(0.01)
        process.kill(signal_number)
        code = process.wait(60)
        return subprocess.CompletedProcess(command, code, *process.output())

    stopped = started(signal.SIGTERM, 2)
    assert stopped.returncode == 75, stopped
    assert "stopped by SIGTERM after " in stopped.stdout and not stopped.stderr
    done = len(logged(broken))
    assert read_state(state_folders(broken / "train" / "checkpoints")[0]).step == done
    assert json.loads((broken / "results.json").read_text())["status"] == "stopped"
    killed = started(signal.SIGKILL, done + 3)
    assert f"train: goes on after {done} of 14 iterations" in killed.stdout
    graphs(settings, f"output={broken}")
    one, two = (read_state(state_folders(r / "train" / "checkpoints")[0]) for r in (whole, broken))
    assert one.step == two.step == 14
    assert one.model.keys() == two.model.keys()
    assert all(one.model[name].equal(two.model[name]) for name in one.model)
    for index, values in one.optimizer["state"].items():
        assert all(values[key].equal(two.optimizer["state"][index][key]) for key in values)
    for entry, other in zip(logged(whole), logged(broken), strict=True):
        assert {**entry, "time": 0} == {**other, "time": 0}
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (whole, broken)]
    assert [row | {"seconds": 0} for row in rows[0]] == [row | {"seconds": 0} for row in rows[1]]


def test_another_seed_is_another_run(graphs, tmp_path):
    short = {**TINY, "training": {**TINY["training"], "steps": 48}}
    states = []
    for seed in (0, 0, 1):
        run = tmp_path / str(len(states))
        graphs(short, f"output={run}", f"seed={seed}")
        states.append(read_state(state_folders(run / "train" / "checkpoints")[0]).model)
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert not states[0]["policy.merge.weight"].equal(states[2]["policy.merge.weight"])


def test_a_drawn_graph_and_one_of_a_file_are_trained_on(graphs, tmp_path):
    (tmp_path / "ring.txt").write_text("0 1\n1 2\n2 3\n3 4\n4 5\n5 6\n6 7\n7 0\n")
    short: dict[str, Any] = {**TINY, "training": {**TINY["training"], "steps": 48}}
    ring = {"kind": "file", "file": str(tmp_path / "ring.txt")}
    drawn = {"kind": "barabasi_albert", "nodes": 50, "attached": 2}
    other = {"attack": "betweenness", "alpha": 0.5, "utility": "le"}
    for name, graph, more in (("ring", ring, {"objective": other}), ("drawn", drawn, {})):
        run = tmp_path / name
        graphs(
            {**short, "graph": graph, "search": {"beam": 0, "greedy": 0}, **more}, f"output={run}"
        )
        results = json.loads((run / "results.json").read_text())
        assert results["edges"] == {"ring": 8, "drawn": 96}[name]
        assert results["status"] == "finished"


def test_a_dry_run_writes_nothing(graphs, tmp_path, capsys):
    graphs(TINY, f"output={tmp_path / 'run'}", "--dry-run")
    said = capsys.readouterr().out
    assert "graph: 15 nodes, 27 edges, F 0.226667" in said and "116 swaps" in said
    assert "train: 8 iterations of 48 steps in 8 environments" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
        ("training.lr=0", "training.lr: input should be greater than 0, not 0"),
        ("objective.attack=random", "objective.attack: input should be 'degree' or 'betweenness'"),
        ("network.filtration=-1", "network.filtration"),
        ("graph.kind=barabasi_albert", ": graph.nodes: is needed"),
        ("graph.nodes=20", "graph.nodes: goes with kind: barabasi_albert"),
        ("graph={kind: file, file: /nowhere/x}", "/nowhere/x"),
        ("graph={kind: barabasi_albert, nodes: 5, attached: 5}", "less than the 5 nodes"),
        ("graph={kind: barabasi_albert, nodes: 5, attached: 4}", "no two of its 4 edges can be"),
        ("search.cold=1.0", "search.cold: not above search.hot"),
        ("rewirings", "expected key.sub=value"),
    ],
)
def test_mistakes_are_one_line(graphs, override, said, capsys):
    graphs(TINY, "--dry-run", override, expect=2)
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0] and all(line.startswith("error: ") for line in lines)
    assert len(lines) == 1 or "filtration" in override


def test_a_run_that_prunes_is_told_where_to_go(tmp_path):
    with pytest.raises(UserError, match=r"a run that prunes a network; train/main.py --config"):
        load_config(ROOT / "configs" / "demo.yaml")
    with pytest.raises(UserError, match=r"prunes no network; tpp graphs --config"):
        load_pruning(CONFIGS / "ba15.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations(path):
    config, text = load_config(path), path.read_text()
    assert f"tpp graphs --config configs/graphs/{path.name}" in text
    assert config.name == f"graphs_{path.stem}"
    graph = config.graph.make()
    nodes, edges = {"ba15": (15, 27), "ba50": (50, 96)}[path.stem.removesuffix("_published")]
    assert (len(graph), len(graph.edges)) == (nodes, edges)


def test_the_published_settings_are_those_of_the_sheet():
    config = load_config(CONFIGS / "ba15_published.yaml")
    training, network = config.training, config.network
    assert (training.steps, training.batch, training.minibatch) == (800_000, 4096, 256)
    assert (training.epochs, training.lr, training.value_lr) == (10, 7e-4, 7e-4)
    assert (training.entropy, training.gradient_clip, training.adam_epsilon) == (0.01, 0.5, 1e-5)
    assert (training.discount, training.gae, training.clip, training.dual_clip) == (
        0.99, 0.95, 0.2, 10.0,
    )  # fmt: skip
    assert training.imitation == 0 and training.value_clip is None
    assert (network.hidden, network.layers, network.norm) == (64, 5, "batch")
    assert network.filtration == "full" and config.rewirings == 20
    assert config.objective.alpha == 0 and config.objective.scale == 10
