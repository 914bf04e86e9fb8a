"""The parsers of train/: configurations, sweeps, and all that a run folder is reported from."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tests.fuzz.harness import Target, whole
from tpp.common.errors import UserError
from train import grid, sweep
from train.config.config import load_config, save_config
from train.report import write_report
from train.reporting import grids, page
from train.reporting.paper_table import collect, to_csv, to_markdown, to_rich
from train.reporting.rows import load_run
from train.sharing import SweepConfigs

ROOT = Path(__file__).resolve().parents[2]
YAML_TOKENS = (
    *(b"&a ", b"*a", b"<<: *a", b"[", b"]", b"{", b"}", b"!!int ", b"!!binary ", b"!!timestamp "),
    *(b"!!python/object/apply:os.system [ls]", b"!!set ", b"!!omap ", b"? ", b"- ", b": ", b"|\n"),
    *(b".nan", b".inf", b"0x" + b"f" * 400, b"1:1:1", b"2020-01-01", b"\x00", b"\xff\xfe", b"\t"),
    *(
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n",
        b"extends: config.yaml\n",
        b"a: &a [*a]\n",
        b'"\\x1b[31m"',
    ),
)
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "cifar_resnet8", "args": {}, "checkpoint": "dense.safetensors"},
    "data": {"root": "data", "augmentation": "cifar", "image_size": 32, "resize": None},
    "pruning": {"ratios": {"layer*.conv1": 0.5}, "floors": {"*": 2}},
    "method": {"name": "tpp", "delta": 0.1},
    "stages": {
        "dense": {"epochs": 1, "optimizer": {"lr": 0.05}},
        "regularize": {"optimizer": {"lr": 0.01}},
        "prune": {},
        "finetune": {"epochs": 1.5, "optimizer": {"lr": 0.02}},
        "evaluate": {},
    },
    "published": {"source": "a paper", "top1": 93.1},
}


# Configurations


def _json_as_yaml(data: bytes) -> tuple[int, int] | None:
    """JSON is YAML; a file that begins with a brace is mutated as JSON."""
    return whole(data) if data.startswith(b"{") else None


def _config_seeds(folder: Path) -> list[bytes]:
    demo = (ROOT / "configs" / "demo.yaml").read_bytes()
    return [demo, yaml.safe_dump(SETTINGS, sort_keys=False).encode(), json.dumps(SETTINGS).encode()]


def _parse_config(folder: Path, data: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    config = load_config(path)
    for stage in config.stages:
        assert (folder / "run" / stage).resolve().parent == (folder / "run").resolve()
    resolved = folder / "resolved.yaml"
    save_config(config, resolved)
    assert load_config(resolved).model_dump() == config.model_dump()


def _parse_override(folder: Path, data: bytes) -> None:
    path = folder / "config.yaml"
    path.write_text(json.dumps(SETTINGS))
    text = data.decode("utf-8", errors="replace")
    with _named(folder):
        load_config(path, [text])


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """For messages about an override, or about a file that another one names."""
    try:
        yield
    except UserError as error:
        raise UserError("\n".join(f"{folder}: {line}" for line in str(error).split("\n"))) from None


# Sweeps

_SWEEP: dict[str, Any] = {
    "name": "s",
    "output": "runs/s",
    "dense": "tiny.yaml",
    "methods": {"tpp": "tiny.yaml"},
    "ratios": {"0.5": {"layer*.conv1": 0.5}, "0.9": {"layer*.conv1": 0.9}},
    "finetuning": {"short": {"epochs": 1}, "long": {"epochs": 3}},
    "seeds": [1, 2],
    "overrides": ["data.threads=1"],
    "published": {
        "source": "a paper",
        "dense_top1": 93.0,
        "sparsity": [10.0, 20.0],
        "top1": {"short": {"tpp": [[90.0, 0.1], [80.0]]}},
    },
}


def _sweep_seeds(folder: Path) -> list[bytes]:
    return [json.dumps(_SWEEP).encode(), yaml.safe_dump(_SWEEP).encode()]


def _parse_sweep(folder: Path, data: bytes) -> None:
    (folder / "tiny.yaml").write_text(json.dumps(SETTINGS))
    path = folder / "sweep.yaml"
    path.write_bytes(data)
    loaded = grid.load_sweep(path, folder / "runs")
    with _named(folder):
        runs = grid.expand(loaded)
    for run in runs:
        assert run.folder.resolve().parent == (folder / "runs").resolve()


# Run folders

_ACCURACY = {"top1": 50.0, "top5": 90.0, "loss": 1.5}
_NETWORK = {"parameters": 1000, "macs": 20000}


def _results() -> dict[str, Any]:
    """What a finished run writes."""
    stage = {**_ACCURACY, **_NETWORK, "speedup": 1.0, "wall_seconds": 3.5, "start": _ACCURACY}
    stage |= {"images": 40, "removed_magnitude": 0.01}
    kinds = ("dense", "regularize", "prune", "finetune", "evaluate")
    stages = {
        name: {**stage, "kind": name, "input": before, "method": "tpp", "title": "TPP", "steps": 5}
        for before, name in zip((None, *kinds), kinds, strict=False)
    }
    return {
        "name": "tiny",
        "seed": 1,
        "status": "finished",
        "model": "cifar_resnet8",
        "wall_seconds": 17.5,
        "versions": {"torch": "2.15.0"},
        "git_commit": "0" * 40,
        "device": "CPU, 1 thread(s)",
        "ranks": 1,
        "engine": "one process",
        "published": {"source": "a paper", "dense_top1": 93.0, "top1": 92.0, "speedup": 2.0},
        "dense": {**_ACCURACY, **_NETWORK},
        "stages": stages,
    }


def _log() -> str:
    layers = {"conv1": {"pruned_magnitude": 0.1, "kept_magnitude": 0.2, "correlation": 0.3}}
    entries: list[dict[str, Any]] = []
    for step in (2, 4):
        entries += [
            {"event": "train", "stage": "dense", "step": step, "loss": 1.0, "lambda": 0.1},
            {"event": "layers", "stage": "regularize", "step": step, "layers": layers},
            {"event": "evaluate", "stage": "finetune", "step": step, **_ACCURACY},
        ]
    return "".join(json.dumps(entry) + "\n" for entry in entries)


_RUN_FILES = {
    "results.json": lambda: json.dumps(_results()),
    "log.jsonl": _log,
    "config.yaml": lambda: json.dumps(SETTINGS),
}


def _run_seeds(folder: Path) -> list[bytes]:
    return [f"{name}\n{make()}".encode() for name, make in _RUN_FILES.items()]


def _run_json(data: bytes) -> tuple[int, int] | None:
    """The document behind the file's name; of a log its first line."""
    head, newline, content = data.partition(b"\n")
    if not newline:
        return None
    start = len(head) + 1
    return start, start + len(content.split(b"\n")[0] if head == b"log.jsonl" else content)


def _run_folder(folder: Path, data: bytes) -> None:
    head, _, content = data.partition(b"\n")
    names = list(_RUN_FILES)
    known = head.decode("latin-1")
    name = known if known in names else names[len(head) % len(names)]
    folder.mkdir(exist_ok=True)
    for other, make in _RUN_FILES.items():
        (folder / other).write_bytes(content if other == name else make().encode())


def _parse_run(folder: Path, data: bytes) -> None:
    """All that is written for a reader, but the pictures, which take their time."""
    _run_folder(folder, data)
    run = load_run(folder)
    output = io.StringIO()
    console = Console(file=output, width=200)
    for table in [*grids.grids_of([run]), grids.stage_grid(run)]:
        console.print(grids.to_rich(table))
    text = page.page_of([run])
    assert all(line.isprintable() for line in output.getvalue().split("\n")), "escape codes"
    assert "<script" not in text, "markup of a stranger in the page"
    text.encode()


def _parse_drawn_run(folder: Path, data: bytes) -> None:
    _run_folder(folder, data)
    write_report([load_run(folder)], folder)


def _parse_table(folder: Path, data: bytes) -> None:
    """A sweep's table, with one mutated run."""
    (folder / "tiny.yaml").write_text(json.dumps(SETTINGS))
    path = folder / "sweep.yaml"
    path.write_text(json.dumps({**_SWEEP, "output": str(folder / "runs")}))
    loaded = grid.load_sweep(path)
    runs = grid.expand(loaded)
    (folder / "runs").mkdir()
    _run_folder(runs[1].folder, data)
    table = collect(loaded)
    Console(file=io.StringIO(), width=100).print(to_rich(table))
    to_markdown(table)
    to_csv(table)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        sweep._print_list(runs, list(loaded.blocks), [], SweepConfigs(), grid.metric_of(runs))
    assert all(line.isprintable() for line in output.getvalue().split("\n")), "escape codes"


CONFIG = Target("config", _config_seeds, _parse_config, _json_as_yaml, tokens=YAML_TOKENS)
OVERRIDE = Target(
    "override",
    lambda _: [
        b"seed=3",
        b"stages.finetune.epochs=2",
        b"model.args={a: 1}",
        b"pruning.ratios={a: 0.5}",
    ],
    _parse_override,
    tokens=YAML_TOKENS,
)
SWEEP = Target("sweep", _sweep_seeds, _parse_sweep, _json_as_yaml, tokens=YAML_TOKENS)
RUN = Target("run_folder", _run_seeds, _parse_run, _run_json, tokens=YAML_TOKENS)
DRAWN = Target("run_drawn", _run_seeds, _parse_drawn_run, _run_json)
TABLE = Target("table", _run_seeds, _parse_table, _run_json)
TARGETS = [CONFIG, OVERRIDE, SWEEP, RUN, DRAWN, TABLE]
