"""The model card of a checkpoint: what was pruned, by what, and what of it was measured.

Nothing is said that is not in the checkpoint, in the run that it lies in, or in what the user hands
over; what nobody measured is said not to be measured.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tpp.checkpoints.model_file import FORMAT, VERSION, CheckpointInfo, network_of, read_metadata
from tpp.common.errors import UserError, printable
from tpp.common.hub import FORMAT_KEY, HUB, MAIN, WEIGHTS, Reference
from tpp.common.numbers import in_short
from tpp.common.own_code import is_own
from tpp.common.reading import read_json, read_text
from tpp.common.yaml_files import parse_yaml
from tpp.masks import COMPANION as MASK
from tpp.measure.counts import Counts, count
from tpp.models.architecture import TIMM, build_on_meta, set_preprocessing
from tpp.models.preparation import in_words

PAPER = "https://arxiv.org/abs/2207.12534"
# Of a run's figures: how each is called, its unit, and its name among the Hub's metrics.
_SCORES = {
    "top1": ("top-1", " %", "accuracy"),
    "top5": ("top-5", " %", "accuracy"),
    "psnr": ("PSNR", " dB", "psnr"),
    "ssim": ("SSIM", "", "ssim"),
}
_PIPELINES = {"classification": "image-classification", "super_resolution": "image-to-image"}
_MOST_LAYERS = 200
_NOT_MEASURED = "Not measured."


@dataclass(frozen=True)
class Told:
    """What the user says of a checkpoint.

    Attributes:
        accuracy: with its source, in words.
        pruned_by: method, criterion and plan, in words.
        license: the Hub's name of it.
        dataset: the Hub's name of the data that it was trained and measured on.
        base_model: the Hub's name of what it was pruned from.
        latency: a file of ``tpp latency --json``.
    """

    accuracy: str | None = None
    pruned_by: str | None = None
    license: str | None = None
    dataset: str | None = None
    base_model: str | None = None
    latency: Path | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint.

    Attributes:
        info: what it says of itself.
        dense: parameters and multiply-accumulates of its architecture.
        now: its own.
        results: of its run, if it lies in one; empty if not.
        stage: its entry in them.
        config: the run's.
        timings: rows of a measurement of latency, of this network and the dense one.
        machine: what these were measured on, in words.
    """

    info: CheckpointInfo
    dense: Counts
    now: Counts
    results: Mapping[str, Any] = field(default_factory=dict)
    stage: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    machine: str = ""

    @property
    def pruned(self) -> list[tuple[str, int, int]]:
        """Layers that lost filters: name, how many are left, of how many."""
        layers = zip(self.now.layers, self.dense.layers, strict=True)
        return [(n.name, n.outputs, d.outputs) for n, d in layers if n.outputs < d.outputs]

    @property
    def masked(self) -> bool:
        """Whether it has a mask of weights that are zero."""
        return MASK in self.info.companions

    @property
    def task(self) -> str:
        """What the network is for."""
        task = self.info.extra.get("task")
        kind = task.get("kind") if isinstance(task, dict) else None
        return kind if isinstance(kind, str) else "classification"

    @property
    def speedup(self) -> float:
        """In multiply-accumulates."""
        return self.dense.macs / self.now.macs


def facts_of(path: Path, latency: Path | None = None) -> Facts:
    """What is known of one of our checkpoints.

    Args:
        path: the file. Where it is a stage's, the run's results and configuration are read too.
        latency: see :class:`Told`.

    Raises:
        UserError: it is none of ours, or the latency was measured of another network.
    """
    info = read_metadata(path)
    network = network_of(info, source=str(path))
    dense = build_on_meta(info.architecture)
    set_preprocessing(dense, info.preprocessing)
    before, now = count(dense), count(network)
    results, stage, config = _run_of(path, info)
    timings, machine = _timings(latency, now) if latency is not None else ([], "")
    return Facts(info, before, now, results, stage, config, timings, machine)


def config_json(facts: Facts) -> str:
    """``config.json`` beside the weights: which network it is, for people and for the Hub."""
    info = facts.info
    said = {
        FORMAT_KEY: FORMAT,
        "version": VERSION,
        "library_name": "tpp",
        "network": info.architecture.to_dict(),
        "widths": info.widths,
        "preprocessing": info.preprocessing,
        "parameters": facts.now.parameters,
        "macs": facts.now.macs,
        "image": list(facts.now.image),
    }
    return json.dumps(said, indent=2) + "\n"


def card(facts: Facts, told: Told, target: Reference) -> str:
    """The model card, as Markdown with the Hub's block of metadata.

    Args:
        facts: what is known.
        told: what the user says beside it.
        target: where on the Hub, and on which branch.
    """
    parts = [
        f"# {target.repository.partition('/')[2]}",
        _headline(facts),
        "## What was pruned",
        *_pruning(facts, told),
        "## Size",
        _sizes(facts),
        "## Accuracy",
        _accuracy(facts, told),
        "## Latency",
        _latency(facts),
        "## How to load it",
        *_loading(facts, target),
    ]
    return f"---\n{_metadata(facts, told, target.repository)}---\n\n" + "\n\n".join(parts) + "\n"


def _run_of(
    path: Path, info: CheckpointInfo
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Results, the stage's entry and configuration of the run whose stage wrote a file."""
    folder = path.resolve().parent
    place = folder.parent / "results.json"
    if path.name != WEIGHTS or info.extra.get("stage") != folder.name or not place.is_file():
        return {}, {}, {}
    results = _dict(read_json(place, "the results"))
    stage = _dict(_dict(results.get("stages")).get(folder.name))
    if results.get("name") != info.extra.get("run") or not stage:
        return {}, {}, {}
    config = folder.parent / "config.yaml"
    if not config.is_file():
        return results, stage, {}
    said = parse_yaml(read_text(config, "the configuration"), str(config))
    return results, stage, _dict(said)


def _timings(path: Path, now: Counts) -> tuple[list[dict[str, Any]], str]:
    data = _dict(read_json(path, "the latency"))
    rows = [row for row in data.get("results", []) if isinstance(row, dict)]
    try:
        own = [r for r in rows if (r["parameters"], r["macs"]) == (now.parameters, now.macs)]
        of_dense = {(row["dense"], row["batch"]) for row in own}
        found = [r for r in rows if r in own or (r["network"], r["batch"]) in of_dense]
        for row in found:
            float(row["median_ms"]), float(row["real_speedup"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--latency {path}: not what tpp latency --json writes") from None
    if not own:
        raise UserError(
            f"--latency {path}: has no row of this network ({now.parameters:,} parameters, "
            f"{now.macs:,} MACs); measure it with tpp latency --json"
        )
    conditions = {**_dict(data.get("settings")), **_dict(data.get("on"))}
    return found, ", ".join(f"{key} {value}" for key, value in conditions.items() if value)


def _headline(facts: Facts) -> str:
    arch = facts.info.architecture
    what = f"{arch.name.removeprefix(TIMM)}, {arch.output}"
    if not facts.pruned:
        how = "no filters removed, but weights masked to zero" if facts.masked else "not pruned"
        return f"{_text(what)}: {how}, {in_short(facts.now.macs)} multiply-accumulates."
    return (
        f"{_text(what)}, with filters removed: {facts.speedup:.2f} times fewer "
        f"multiply-accumulates ({in_short(facts.now.macs)} of {in_short(facts.dense.macs)}) and "
        f"{facts.now.parameters / facts.dense.parameters:.1%} of the parameters of the dense "
        "network. What is left is an ordinary dense network of smaller layers."
    )


def _pruning(facts: Facts, told: Told) -> Iterator[str]:
    rows = [("network", facts.info.architecture.name), *_method(facts, told)]
    yield _table(("", ""), rows)
    layers = facts.pruned
    if layers:
        gone = sum(before - left for _, left, before in layers)
        yield f"{gone:,} filters of {len(layers)} layers are gone:"
        shown = [(f"`{name}`", f"{left} of {d}") for name, left, d in layers[:_MOST_LAYERS]]
        if len(layers) > _MOST_LAYERS:
            shown.append((f"and {len(layers) - _MOST_LAYERS} more", ""))
        yield _table(("layer", "filters left"), shown)


def _method(facts: Facts, told: Told) -> Iterator[tuple[str, str]]:
    if told.pruned_by is not None:
        yield "pruned by", told.pruned_by
    elif not facts.pruned and not facts.masked:
        # The run's plan is of stages after this one.
        yield "pruned by", "nothing: every filter and weight is there"
    elif not facts.config:
        yield "pruned by", "not recorded in the file"
    else:
        yield from _plan_of(facts)
    origin = facts.info.extra.get("pruned_from")
    if isinstance(origin, dict) and isinstance(origin.get("file"), str):
        yield "from the file", origin["file"]
    base = _base_model(facts, told)
    if base is not None:
        yield "began as", base


def _plan_of(facts: Facts) -> Iterator[tuple[str, str]]:
    """How the run that it lies in pruned it."""
    method = _dict(facts.config.get("method"))
    yield "method", _plain(facts.stage.get("title") or method.get("name", ""))
    settings = {key: value for key, value in method.items() if key != "name"}
    if settings:
        yield "its settings", _plain(settings)
    pruning = _dict(facts.config.get("pruning"))
    yield "criterion", _plain(pruning.get("criterion", "l1"))
    for key in ("ratios", "budget", "floors", "skip", "round_to", "coupled"):
        if pruning.get(key) not in (None, {}, [], False, 1):
            yield key.replace("_", " "), _plain(pruning[key])
    yield "stages", ", ".join(_stages_up_to(facts))
    if facts.results.get("seed") is not None:
        yield "seed", _plain(facts.results["seed"])


def _stages_up_to(facts: Facts) -> list[str]:
    """The stages that this network went through, by what each says that it began with."""
    stages, way = _dict(facts.results.get("stages")), []
    name = facts.info.extra.get("stage")
    while isinstance(name, str) and name in stages and name not in way:
        way.append(name)
        name = _dict(stages[name]).get("input")
    return way[::-1]


def _sizes(facts: Facts) -> str:
    dense, now = facts.dense, facts.now
    rows = [
        ("parameters", f"{now.parameters:,}", f"{dense.parameters:,}"),
        (f"MACs for {now.of_image}", f"{now.macs:,}", f"{dense.macs:,}"),
        ("speedup, counted", f"{facts.speedup:.4f}x", "1x"),
    ]
    return _table(("", "this network", "dense"), rows)


def _accuracy(facts: Facts, told: Told) -> str:
    if told.accuracy is not None:
        return f"As who uploaded it says: {_text(told.accuracy)}"
    scores, source = _scores(facts)
    if not scores:
        return _NOT_MEASURED
    said = _in_words(scores)
    dense = _of_scores(_dict(facts.results.get("dense")))
    beside = f" The dense network of the run: {_in_words(dense)}." if dense else ""
    return f"{said}, {source}.{beside}"


def _scores(facts: Facts) -> tuple[dict[str, float], str]:
    """What was measured, by the metrics' names, and where that is from."""
    name, stage = facts.info.extra.get("run"), facts.info.extra.get("stage")
    who = f"stage {_text(str(stage))} of the run {_text(str(name))}"
    measured = _of_scores(facts.stage)
    if measured:
        return measured, f"{_images(facts.stage)}by {who} (its results.json)"
    own = _dict(facts.info.extra.get("accuracy"))
    return _of_scores(own), f"{_images(own)}by {who} (kept in the checkpoint)"


def _images(found: Mapping[str, Any]) -> str:
    images = found.get("images")
    return f"measured over {images:,} images " if isinstance(images, int) else "measured "


def _of_scores(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(found[key]) for key in _SCORES if isinstance(found.get(key), int | float)}


def _in_words(scores: Mapping[str, float]) -> str:
    return ", ".join(
        f"{_SCORES[key][0]} {value:.2f}{_SCORES[key][1]}" for key, value in scores.items()
    )


def _latency(facts: Facts) -> str:
    if not facts.timings:
        return _NOT_MEASURED
    rows = [
        (
            _plain(row["network"]),
            _plain(row["batch"]),
            f"{float(row['median_ms']):.3f}",
            f"{float(row['real_speedup']):.2f}x",
        )
        for row in facts.timings
    ]
    table = _table(("network", "batch", "median ms per batch", "speedup, measured"), rows)
    return f"{table}\n\nMeasured by `tpp latency` on: {_text(facts.machine)}."


def _loading(facts: Facts, target: Reference) -> Iterator[str]:
    info = facts.info
    yield (
        "With the package `tpp` (TPP at cluster scale); nothing in the file is run, and every "
        "tensor is checked by its hash:"
    )
    lines = ["import tpp", ""]
    own = is_own(info.architecture.name)
    if own:
        lines += ["# The file only names the network's class: a dense one of it, yours to bring."]
    more = ", network=Net()" if own else ""
    branch = target.revision or MAIN
    at = f"{HUB}{target.repository}@{branch}"
    lines += [f'model = tpp.load_model("{at}"{more})  # or @COMMIT, which stays']
    yield "```python\n" + "\n".join(lines) + "\n```"
    pulled = target.repository if branch == MAIN else f"{target.repository}@{branch}"
    yield f"```bash\ntpp pull {pulled} --output {WEIGHTS}\n```"
    if info.preprocessing:
        yield f"Images: {_text(in_words(info.preprocessing))}."
    classes = info.extra.get("classes")
    if isinstance(classes, list) and classes:
        yield f"The file names its {len(classes):,} classes, in the order of the outputs."
    yield f"TPP: Huan Wang and Yun Fu, Trainability Preserving Neural Pruning, ICLR 2023, {PAPER}"


def _metadata(facts: Facts, told: Told, repository: str) -> str:
    arch = facts.info.architecture.name.removeprefix(TIMM)
    pipeline = _PIPELINES.get(facts.task)
    said: dict[str, Any] = {"license": told.license} if told.license else {}
    said |= {"library_name": "tpp"}
    said |= {"pipeline_tag": pipeline} if pipeline else {}
    tags = ["pruning", "structured-pruning"] if facts.pruned else []
    pruned = facts.pruned or facts.masked
    if pruned and _dict(facts.config.get("method")).get("name") == "tpp":
        tags.append("trainability-preserving-pruning")
    said["tags"] = ["tpp", *tags, arch]
    base = _base_model(facts, told)
    if base is not None and "/" in base and not base.startswith("http"):
        said["base_model"] = base
    if told.dataset:
        said["datasets"] = [told.dataset]
    scores = {} if told.accuracy is not None else _scores(facts)[0]
    if scores:
        said["metrics"] = [*dict.fromkeys(_SCORES[key][2] for key in scores)]
    # The Hub's table of results names the data; without their name there is none.
    if scores and told.dataset and pipeline:
        metrics = [
            {"type": _SCORES[key][2], "name": _SCORES[key][0], "value": round(value, 4)}
            for key, value in scores.items()
        ]
        result = {
            "task": {"type": pipeline},
            "dataset": {"type": told.dataset, "name": told.dataset},
            "metrics": metrics,
        }
        said["model-index"] = [{"name": repository.partition("/")[2], "results": [result]}]
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def _base_model(facts: Facts, told: Told) -> str | None:
    """What it was pruned from, where that is public: by the Hub's name if it has one there."""
    if told.base_model is not None:
        return told.base_model
    checkpoint = _dict(facts.config.get("model")).get("checkpoint")
    if not isinstance(checkpoint, str):
        return None
    if checkpoint.startswith(TIMM):
        return f"timm/{checkpoint.removeprefix(TIMM)}"
    if checkpoint.startswith(HUB):
        return checkpoint.removeprefix(HUB).partition("@")[0]
    # A file's path says more of somebody's machine than of the network.
    return checkpoint if checkpoint.startswith("torchvision:") else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *(list(map(_text, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Plain data in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _text(text: str) -> str:
    """Text of any origin that is neither markup nor the end of a table's cell."""
    return printable(text, 2000).replace("<", "&lt;").replace("|", "\\|")
