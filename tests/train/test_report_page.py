"""The page of a report: whole and legal whatever a run is called, readable in either scheme."""

import json
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from report_page import Page

import tpp
from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import save_model
from tpp.common.errors import UserError, printable
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.settings import BudgetSection
from train.report import main, write_report
from train.reporting.axes import plain, span_of
from train.reporting.colours import SCHEMES
from train.reporting.grids import latencies
from train.reporting.latency import Latency
from train.reporting.layers import layer_counts
from train.reporting.page import page_of
from train.reporting.picture import draw, panels
from train.reporting.rows import RunRecord, load_run
from train.run_folder.results import Results
from train.tasks.base import Metric
from train.tasks.classification import TOP1
from train.tasks.super_resolution import PSNR

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).with_name("old_run_folder")
DENSE = {"top1": 93.7, "top5": 99.8, "loss": 0.25, "parameters": 175_258, "macs": 26_400_000}
SMALL = {"parameters": 34_000, "macs": 5_300_000, "speedup": 4.98, "images": 1000}


def run_in(folder: Path, name: str, top1: float, **changes: Any) -> Path:
    """A run folder whose network was pruned by TPP, with curves."""
    kinds = {"regularize": None, "prune": "regularize", "finetune": "prune"}
    stages = {
        kind: {"kind": kind, "method": "tpp", "title": "TPP", "input": source, "top1": top1,
               "top5": 99.0, "loss": 0.3, "steps": None if kind == "prune" else 100, **SMALL}
        for kind, source in kinds.items()
    }  # fmt: skip
    content = {
        **{"name": name, "status": "finished", "seed": 1, "model": "cifar_resnet14", "ranks": 4},
        **{"device": "NVIDIA H200", "engine": "DDP", "image": [3, 32, 32]},
        **{"dense": DENSE, "stages": stages},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))
    log = [
        {"event": event, "stage": stage, "step": step, "time": 1.8e9 + step, "top1": top1 - 1,
         "loss": 1.0}
        for stage in ("regularize", "finetune")
        for step in (50, 100)
        for event in ("train", "evaluate")
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    config = {"name": name, "data": {"root": "photos"}, "pruning": {"ratios": {"a.*": 0.8}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.1 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Ratio of two colours, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WCAG's own example


def schemes_of(page: str) -> list[dict[str, str]]:
    """The colours that a page has by itself, and where a dark one is preferred."""
    light, dark = re.findall(r":root \{([^}]*)\}", page)[:2]
    assert page.index("prefers-color-scheme: dark") < page.index(dark)
    return [dict(re.findall(r"--(\w+): (#\w+);", scheme)) for scheme in (light, dark)]


def test_text_and_curves_stand_out_in_both_schemes() -> None:
    schemes = schemes_of(page_of([load_run(OLD)]))
    assert luminance(schemes[0]["back"]) > 0.9 and luminance(schemes[1]["back"]) < 0.05
    for scheme in schemes:
        assert set(scheme) == set(SCHEMES)
        for text in ("ink", "pale", "link"):
            for behind in ("back", "shade"):
                assert contrast(scheme[text], scheme[behind]) >= 4.5, (text, behind)
        for number in range(1, 9):
            for behind in ("back", "shade"):
                assert contrast(scheme[f"c{number}"], scheme[behind]) >= 3, number


def test_every_colour_of_the_pictures_follows_the_scheme(tmp_path: Path) -> None:
    runs = [load_run(run_in(tmp_path / name, name, 93.0)) for name in ("a", "b")]
    page = Page(write_report(runs, tmp_path / "out")[0])
    pictures = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert pictures.count("<svg") == len(page.pictures) == 5
    assert re.findall(r"#[0-9a-f]{3,6}\b", re.sub(r'href="[^"]*"|url\([^)]*\)', "", pictures)) == []
    used = set(re.findall(r"var\(--(\w+)\)", page.source))
    assert used <= set(SCHEMES) and {"ink", "pale", "line", "back", "c1", "c2"} <= used
    assert page.fetched == []


def test_it_says_what_the_run_is(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "mine", 93.0)
    page = Page(write_report([load_run(folder)], folder)[0])
    assert page.text_of("h1") == ["mine"] and page.text_of("title") == ["mine: pruning run"]
    # 1.8e9 seconds are 20,833 days and 8 hours after 1970-01-01.
    assert page.facts == {
        **{"Network": "cifar_resnet14", "Data set": "photos; 32x32 px, 3 channels"},
        **{"Method": "TPP", "Ratios": "a.*: 0.8", "Machine": "NVIDIA H200", "Ranks": "4"},
        **{"Date": "2027-01-15 08:00 to 08:01 UTC", "Engine": "DDP", "Seed": "1"},
        "Status": "finished",
    }
    assert page.source.count(">mine<") == 1, "the name is the page's title, once"
    text = (folder / "config.yaml").read_text()
    assert text in page.text_of("pre") and "all 3 settings" in page.source


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"speedup": 2}, "2x fewer MACs"),
        ({"macs": "1G"}, "at most 1 G MACs"),
        ({"parameters": 12_300_000}, "at most 12.3 M parameters"),
        ({"latency_ms": 3, "batch": 8}, "at most 3 ms (batch 8 on cpu)"),
        ({"latency_speedup": 2.5, "device": "cuda"}, "2.5x as fast as measured (batch 1 on cuda)"),
    ],
)
def test_a_budget_is_said_in_words(tmp_path: Path, budget: dict[str, Any], said: str) -> None:
    folders = [run_in(tmp_path / name, name, 93.0) for name in ("ratios", "budget")]
    resolved = BudgetSection.model_validate(budget).model_dump(mode="json")  # as config.yaml has it
    config = {"pruning": {"ratios": {}, "budget": resolved}}
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config))
    runs = [load_run(folder) for folder in folders]
    facts = Page(page_of(runs[1:])).facts
    assert facts["Pruning budget"] == said and "Ratios" not in facts
    both = Page(page_of(runs)).facts
    assert both["Pruning budget"] == f"none (ratios); {said} (budget)"
    assert both["Ratios"] == "a.*: 0.8 (ratios); none (budget)"
    config["pruning"]["ratios"] = {"a.*": 0.8}
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config))
    facts = Page(page_of([load_run(folders[1])])).facts
    assert facts["Pruning budget"] == f"{said}; at most a.*: 0.8"


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(
        st.text(st.sampled_from("<>&\"'/ab\n\x00\x1b\u202e#%;:-]é")) | st.text(), min_size=1,
        max_size=3,
    )
)  # fmt: skip
def test_any_name_is_shown_and_none_is_obeyed(names: list[str]) -> None:
    runs = [
        RunRecord(
            folder=Path(f"run{number}"),
            results=Results(name=name, model=name, device=name, stages={}),
            log={},
            settings={"data.root": name},
            stages={},
            config=name,
        )
        for number, name in enumerate(names)
    ]
    page = Page(page_of(runs, output=Path()).encode("utf-8", "strict").decode())
    assert page.fetched == [found for found in page.fetched if found in "".join(names)]
    if len(names) == 1 and names[0].strip():
        shown = page.text_of("h1")[0]
        assert shown == "".join(c if c in "\n\t" else printable(c) for c in names[0])


LOSS, SCORES, FILTERS = "Training loss", "Top-1 over all stages (%)", "Pruned and kept filters"
NETWORKS = "Top-1 of each network (%)"


@pytest.mark.parametrize(
    ("event", "content", "more"),
    [
        ("evaluate", {"top1": 92.0}, {SCORES}),
        ("train", {"loss": 1.0}, {LOSS}),
        ("train", {"loss/task": 1.0}, {LOSS}),
        ("train", {"loss": math.nan}, set()),
        ("train", {"images_per_second": 9.0}, set()),
        ("layers", {"layers": {"a": {"kept_magnitude": 0.1}}}, {FILTERS}),
        ("layers", {"layers": {}}, set()),
        ("layers", {"layers": {"a": {"correlation": math.nan}}}, set()),
    ],
)
def test_a_plot_without_a_point_is_left_out(
    tmp_path: Path, event: str, content: dict[str, Any], more: set[str]
) -> None:
    folder = run_in(tmp_path / "run", "x", 93.0)
    entry = {"event": event, "stage": "finetune", "step": 50, "time": 1.8e9, **content}
    (folder / "log.jsonl").write_text(json.dumps(entry) + "\n")
    run = load_run(folder)
    (line,) = run.log.values()
    assert len(line) == 1, "it was read"
    parts = [axes for panel in panels([run]) for axes in panel.figure.axes]
    for found in (parts, draw([run]).axes):
        assert {axes.get_title(loc="left") for axes in found} == {NETWORKS, *more}
        # A line through one point is not seen.
        assert all(any(of.get_marker() == "o" for of in axes.get_lines()) for axes in found)


def test_names_in_pictures_are_text(tmp_path: Path) -> None:
    names = ['</svg><script>x</script>"><img src=x>', "a\x08\x1b[1mb $x$ &lt;"]
    runs = [load_run(run_in(tmp_path / str(n), name, 93.0)) for n, name in enumerate(names)]
    page = Page(write_report(runs, tmp_path / "out")[0])
    seen = page.text_of("text")
    assert names[0] in seen and "a\ufffd\ufffd[1mb $x$ &lt;" in seen


@given(
    st.lists(st.floats(0, 100), min_size=1), st.sampled_from([TOP1, PSNR, Metric("x", "X", "x")])
)
def test_an_axis_holds_all_values_and_makes_no_chasm(values: list[float], metric: Metric) -> None:
    low, high = span_of(values, metric)
    assert low <= min(values) and max(values) <= high
    least = {"%": 5.0, " dB": 1.0}.get(metric.unit, 0.05 * max(values))
    assert high - low >= least * (1 - 1e-9)
    assert high - low <= max(least or 1, 1.2 * (max(values) - min(values))) * (1 + 1e-9)
    if metric.unit == "%":  # there are no such accuracies
        assert low >= -10 and high <= 110


def test_half_a_point_is_a_tenth_of_the_pictures_axes(tmp_path: Path) -> None:
    run = load_run(run_in(tmp_path / "run", "x", 93.2))
    scores, dots, *_ = draw([run]).axes
    for low, high in (scores.get_ylim(), dots.get_xlim()):
        assert low < 92.2 and high > 93.7 and 0.5 / (high - low) <= 0.1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1 + 0.2, "0.3"),
        (92.5, "92.5"),
        (12_500, "12,500"),
        (1e-4, "0.0001"),
        (1e-6, "0.000001"),
    ],
)
def test_ticks_are_plain_numbers(value: float, text: str) -> None:
    assert plain(value) == text


def test_filters_of_each_layer_are_those_of_the_network(tmp_path: Path) -> None:
    model = build_model("cifar_resnet8", 10)
    layers = [name for name, _ in model.named_modules() if name.endswith("conv1") and "." in name]
    filters = {name: model.get_submodule(name).out_channels for name in layers}
    pruned = {name: list(range(3 + number)) for number, name in enumerate(layers)}
    plan = PruningPlan.from_indices(filters, pruned)
    folder = run_in(tmp_path / "run", "x", 93.0)
    plan.save(folder / "prune" / "plan.json")
    small = prune_model(model, plan)
    run = load_run(folder)
    (found,) = layer_counts(run)
    assert found.network == "TPP" and found.done and list(found.before) == layers
    for name in layers:
        assert found.before[name] == model.get_submodule(name).weight.shape[0]
        assert found.after[name] == small.get_submodule(name).weight.shape[0]
    rows = {row[0]: row[1:] for row in Page(page_of([run])).rows}
    for number, name in enumerate(layers):
        left = filters[name] - 3 - number
        assert rows[name] == [str(filters[name]), str(left), f"{left / filters[name]:.0%}"]
    before, after = sum(found.before.values()), sum(found.after.values())
    assert rows["all of these"] == [str(before), str(after), f"{after / before:.0%}"]


def test_plans_of_two_rounds_add_up_and_one_to_come_is_called_so(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "x", 93.0)
    content = json.loads((folder / "results.json").read_text())
    stages = content["stages"]
    again = {"again": {**stages["prune"], "input": "finetune"}}
    (folder / "results.json").write_text(json.dumps({**content, "stages": {**stages, **again}}))
    PruningPlan({"a": 16}, {"a": [0, 1]}).save(folder / "prune" / "plan.json")
    PruningPlan({"a": 14}, {"a": [5]}).save(folder / "again" / "plan.json")
    (found,) = layer_counts(load_run(folder))
    assert (found.before, found.after) == ({"a": 16}, {"a": 13})
    del stages["prune"], stages["finetune"]
    (folder / "results.json").write_text(json.dumps({**content, "stages": stages}))
    PruningPlan({"a": 16}, {"a": [0]}).save(folder / "regularize" / "plan.json")
    assert "Planned, TPP" in page_of([load_run(folder)])


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "a/b", "x" * 300, "a\x00b", ""])
def test_a_stage_of_any_name_reads_no_other_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "plan.json").write_text("{")  # an error, where it is read
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text("{")
    stages = {name: {"kind": "prune"}}
    folder = run_in(tmp_path / "run", "x", 1.0, stages=stages)
    run = load_run(folder)
    assert run.plans == {} and Page(page_of([run], output=tmp_path)).links == []


def test_a_broken_plan_is_named(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "x", 93.0)
    (folder / "prune").mkdir()
    (folder / "prune" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"prune/plan\.json: not a pruning plan"):
        load_run(folder)


def timed(**changes: Any) -> dict[str, Any]:
    """What tpp.latency writes of the dense and the pruned network of :func:`run_in`."""
    sizes = [(DENSE["parameters"], DENSE["macs"], 8.0), (34_000, 5_300_000, 3.2)]
    rows = [
        {"batch": 16, "parameters": parameters, "macs": macs, "median_ms": ms, "low_ms": ms - 0.1,
         "high_ms": ms + 0.25}
        for parameters, macs, ms in sizes
    ]  # fmt: skip
    on = {"machine": "x86_64", "cpu": "AVX2", "threads": 2, "gpu": None, "torch": "2.15.0"}
    conditions = {"dtype": "fp32", "repeats": 50, "channels_last": True, "compile": False}
    return {"results": rows, "on": on, "settings": conditions, **changes}


def test_latency_dense_beside_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = run_in(tmp_path / "run", "x", 93.0), tmp_path / "latency.json"
    file.write_text(json.dumps(timed()))
    monkeypatch.setattr("sys.argv", ["report", str(folder), "--latency", str(file)])
    main()
    page = Page(folder / "report.html")
    at = page.rows.index(["Network", "Batch", "ms", "Quartiles", "Images/s", "Counted", "Measured"])
    # 16 images in 8 ms are 2,000 a second; 8 / 3.2 = 2.5.
    assert page.rows[at + 1 : at + 3] == [
        ["Dense", "16", "8", "7.9 - 8.25", "2,000", "1.00x", "1.00x"],
        ["TPP", "16", "3.2", "3.1 - 3.45", "5,000", "4.98x", "2.50x"],
    ]
    assert "x86_64, AVX2, 2 threads, fp32, channels last, median of 50" in page.source
    assert "Measured latency" in capsys.readouterr().out


def test_latency_of_other_networks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = run_in(tmp_path / "run", "x", 93.0), tmp_path / "latency.json"
    rows = [{**row, "macs": 7} for row in timed()["results"]]
    file.write_text(json.dumps(timed(results=rows)))
    monkeypatch.setattr("sys.argv", ["report", str(folder), "--latency", str(file)])
    with pytest.raises(UserError, match=r"latency\.json: none of the networks to report is in it"):
        main()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "content", [[], {"results": [{}]}, {"results": 3}, {"results": [{"batch": 1, "parameters": 1,
    "macs": 1, "median_ms": 0}]}, {"on": {"threads": 2}}, {"results": [], "on": 3}],
)  # fmt: skip
def test_what_is_no_latency_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"x\.json: not what tpp latency --json writes"):
        Latency.read(tmp_path / "x.json")


def test_the_commands_do_what_they_say(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "it's a run", "x", 93.0)
    model = build_model("cifar_resnet8", 10).eval()
    (folder / "finetune").mkdir()
    save_model(folder / "finetune" / "model.safetensors", model)
    commands = Page(page_of([load_run(folder)])).commands
    (load,) = [text for text in commands if text.startswith("import tpp")]
    found: dict[str, Any] = {}
    exec(load, found)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(found["model"].eval()(images), model(images))
    assert found["tpp"] is tpp
    whole = "'" + str(folder).replace("'", "'\"'\"'")
    evaluate = f"tpp evaluate {whole}/finetune/model.safetensors'"
    assert f"{evaluate} --data photos/val" in commands
    start = f"accelerate launch --num_processes 4 {ROOT}/train/main.py --config"
    assert any(text.startswith(f"{start} {whole}/config.yaml'") for text in commands)
    assert f"tensorboard --logdir {whole}'" in commands


def test_stages_lead_to_their_events(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "a: #1", "x", 93.0)
    (folder / "finetune").mkdir()
    (folder / "finetune" / "events.out.tfevents.1.x").write_bytes(b"")
    page = Page(write_report([load_run(folder)], tmp_path / "out")[0])
    (link,) = page.links
    assert (tmp_path / "out" / unquote(link)).resolve() == (folder / "finetune").resolve()
    assert ":" not in link.split("/")[0]
    assert sum("tensorboard" in text and "finetune" in text for text in page.commands) == 1


@pytest.mark.parametrize("count", [2, 20])
def test_runs_beside_each_other_have_a_curve_and_a_row_each(tmp_path: Path, count: int) -> None:
    runs = [
        load_run(run_in(tmp_path / f"run{n}", f"run{n}", 90 + n / 10, seed=n)) for n in range(count)
    ]
    page = Page(page_of(runs))
    heading = page.rows[0]
    assert heading[:4] == ["Run", "Network", "Top-1 %", "vs dense"]
    rows = page.rows[1 : count + 2]
    assert rows[0][:2] == ["both runs" if count == 2 else "all 20 runs", "Dense"]
    assert [row[0] for row in rows[1:]] == [run.results.name for run in runs]
    assert [row[2] for row in rows[1:]] == [f"{90 + n / 10:.2f}" for n in range(count)]
    for panel in panels(runs):
        if panel.name in ("scores", "loss"):
            (axes,) = panel.figure.axes
            named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            curves = [named[f"run{n}"] for n in range(count)]
            looks = {
                (line.get_color(), str(line.get_linestyle()), str(line._dash_pattern))
                for line in curves
            }
            assert len(looks) == count, "no two look the same"
            # Names are where they cover nothing; of many curves, once.
            assert bool(panel.figure.legends) == (panel.name == "scores" or count == 2)
    at = next(
        n for n, row in enumerate(page.rows) if row[:2] in (["Run", "status"], ["What", "run0"])
    )
    assert page.rows[at][0] == ("What" if count == 2 else "Run")
    assert latencies(runs, None).rows == []
