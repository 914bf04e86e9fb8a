"""The dense network at fewer pixels: evaluated, reported, and compared at equal cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tpp.checkpoints.model_file import load_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from train.config.config import Config, load_config
from train.data import preprocessing_at
from train.report import main as report
from train.reporting.grids import rivals
from train.reporting.latency import Latency
from train.reporting.picture import draw
from train.reporting.rival import Between, Measured, interpolated, verdicts
from train.reporting.rows import load_run, summary_rows
from train.run_folder.results import Results

CURVE = [Measured(1.0, 60.0, 128), Measured(2.0, 70.0, 176), Measured(4.0, 76.0, 224)]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (2.0, Between(70.0, (176, 176))),
        (4.0, Between(76.0, (224, 224))),
        (3.0, Between(73.0, (176, 224))),
        (1.25, Between(62.5, (128, 176))),
        (0.99, None),
        (4.01, None),
    ],
)
def test_the_curve_is_linear_between_sizes_and_ends_with_them(cost, expected):
    assert interpolated(CURVE, cost) == expected
    assert interpolated(CURVE[::-1], cost) == expected


def test_a_noisy_time_counts_for_the_larger_sizes():
    noisy = [Measured(3.0, 60.0, 128), Measured(2.0, 70.0, 176), Measured(4.0, 76.0, 224)]
    assert interpolated(noisy, 2.5) == Between(71.5, (176, 224))


@pytest.mark.parametrize(("resize", "expected"), [(256, 183), (None, 160)])
def test_as_much_of_an_image_is_seen_at_any_size(resize, expected, tmp_path):
    data = {"root": str(tmp_path), "image_size": 224, "resize": resize}
    config = Config.model_validate(
        {
            "name": "x",
            "model": {"name": "resnet18", "num_classes": 4},
            "data": data,
            "stages": {"evaluate": {"image_sizes": [160]}},
        }
    )
    before = config.data.preprocessing()
    after = preprocessing_at(config, 160)
    assert (after["image_size"], after["resize"]) == (160, expected)
    assert preprocessing_at(config, None) == before == config.data.preprocessing()


def run_of(folder: Path, sizes: list[dict[str, Any]], **changes: Any) -> Path:
    """A run folder whose dense network has 76.0 at 4 G, and TPP's 72.0 at 2.5 G."""
    pruned = {"top1": 72.0, "parameters": 15, "macs": 2_500_000_000, "speedup": 1.6}
    stages = {
        "dense": {"kind": "evaluate", "input": None, "top1": 76.0, "parameters": 25,
                  "macs": 4_000_000_000, "speedup": 1.0, "sizes": sizes},
        "regularize": {"kind": "regularize", "method": "tpp", "title": "TPP", "input": None},
        "prune": {"kind": "prune", "method": "tpp", "title": "TPP", "input": "regularize"},
        "finetune": {"kind": "finetune", "title": "TPP", "input": "prune", **pruned},
        "evaluate": {"kind": "evaluate", "title": "TPP", "input": "finetune", **pruned},
    }  # fmt: skip
    content = {
        "name": "r",
        "image": [3, 224, 224],
        "dense": {"top1": 76.0, "parameters": 25, "macs": 4_000_000_000},
        "stages": stages,
        **changes,
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    return folder


SIZES = [
    {"image_size": 128, "top1": 60.0, "parameters": 25, "macs": 1_000_000_000},
    {"image_size": 176, "top1": 70.0, "parameters": 25, "macs": 2_000_000_000},
]


def test_a_report_says_what_the_dense_network_scores_at_equal_macs(tmp_path):
    run = load_run(run_of(tmp_path / "run", SIZES))
    assert [(row.network, row.score, row.speedup) for row in summary_rows(run.results)] == [
        ("Dense", 76.0, 1.0),
        ("Dense at 176 px", 70.0, 2.0),
        ("Dense at 128 px", 60.0, 4.0),
        ("TPP", 72.0, 1.6),
    ]
    (cells,) = rivals([run]).rows
    assert cells == [
        "TPP", "2.5 G MACs", "72.00", "71.50", "between 176 and 224 px", "+0.50"
    ]  # fmt: skip
    # No log: there is nothing to draw but the networks, and the dense one's sizes.
    assert len(draw([run]).axes) == 2


def test_nothing_is_said_beyond_the_sizes(tmp_path):
    run = load_run(run_of(tmp_path / "run", SIZES[:1]))
    (verdict,) = verdicts(run)
    assert verdict.rival == Between(68.0, (128, 224))
    sizes = [{**SIZES[1], "macs": 3_000_000_000}]
    (cells,) = rivals([load_run(run_of(tmp_path / "other", sizes))]).rows
    assert cells[3:] == ["-", "not measured there", "-"]


def test_without_sizes_a_report_is_as_it_was(tmp_path):
    run = load_run(run_of(tmp_path / "run", []))
    assert [row.network for row in summary_rows(run.results)] == ["Dense", "TPP"]
    assert not rivals([run]).rows and len(draw([run]).axes) == 1


def test_a_report_compares_at_equal_time(tmp_path, monkeypatch, capsys):
    folder, file = run_of(tmp_path / "run", SIZES), tmp_path / "latency.json"
    times = {(25, 4_000_000_000): 8.0, (25, 2_000_000_000): 5.0, (15, 2_500_000_000): 6.5}
    rows = [
        {"batch": batch, "parameters": parameters, "macs": macs, "median_ms": batch * ms}
        for batch in (1, 16)
        for (parameters, macs), ms in times.items()
    ]
    file.write_text(json.dumps({"results": rows}))
    found = [*verdicts(load_run(folder), Latency.read(file))]
    assert [(v.cost, v.batch) for v in found] == [(2.5e9, None), (6.5, 1), (104.0, 16)]
    assert found[1].rival == found[2].rival == Between(73.0, (176, 224))
    assert found[1].gain == -1.0
    monkeypatch.setattr("sys.argv", ["report", str(folder), "--latency", str(file)])
    report()
    assert "6.5 ms, batch 1" in capsys.readouterr().out
    assert "104 ms, batch 16" in (folder / "report.html").read_text()
    file.write_text('{"results": [{"batch": 1}]}')
    with pytest.raises(UserError, match=r"not what tpp latency --json writes"):
        Latency.read(file)


def test_a_pruned_network_has_the_rival_that_it_comes_from(tmp_path):
    """A network that was trained here is not held against the starting weights."""
    folder = run_of(tmp_path / "run", SIZES)
    content = json.loads((folder / "results.json").read_text())
    stages = {"trained": {"kind": "dense", "input": None, "macs": 4_000_000_000}}
    stages |= content["stages"]
    stages["regularize"]["input"] = "trained"
    (folder / "results.json").write_text(json.dumps({**content, "stages": stages}))
    assert not [*verdicts(load_run(folder))]
    stages["dense"]["input"] = "trained"
    (folder / "results.json").write_text(json.dumps({**content, "stages": stages}))
    assert len([*verdicts(load_run(folder))]) == 1


def test_a_run_evaluates_at_other_sizes(tiny_config, run_inside, capsys):
    """Against a loop over single images, scaled by Pillow."""
    tiny_config["stages"] = {
        "dense": {**tiny_config["stages"]["dense"]},
        "sizes": {"kind": "evaluate", "image_sizes": [24, 16]},
        "prune": {"input": "dense"},
        "finetune": {"epochs": 0.2, "optimizer": {"lr": 0.01}},
        "evaluate": {},
    }
    tiny_config["method"] = {"name": "l1"}
    run_inside(tiny_config)
    folder = Path(tiny_config["output"])
    results = Results.model_validate(json.loads((folder / "results.json").read_text()))
    sizes = results.stages["sizes"].sizes
    assert sizes is not None and [size.image_size for size in sizes] == [24, 16]
    full = results.stages["sizes"]
    assert full.macs == results.dense.macs and sizes[0].macs < full.macs
    model = load_model(folder / "dense" / "model.safetensors").eval()
    losses = []
    for label, where in enumerate(sorted((Path(tiny_config["data"]["root"]) / "val").iterdir())):
        for path in where.iterdir():
            small = Image.open(path).convert("RGB").resize((24, 24), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
            config = load_config(folder / "config.yaml")
            mean, std = (
                torch.tensor(v)[:, None, None] for v in (config.data.mean, config.data.std)
            )
            with torch.no_grad():
                logits = model((pixels - mean) / std)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    assert sizes[0].images == len(losses) == 40
    assert sizes[0].scores["loss"] == pytest.approx(np.mean(losses), rel=5e-4)
    assert sizes[0].scores["loss"] != full.scores["loss"]
    assert sizes[0].macs == count(model, example_input=torch.empty(1, 3, 24, 24)).macs
    out = capsys.readouterr().out
    assert "sizes at 24 pixels: top-1" in out and "Dense at 16 px" in out
    # What was done is done, and another size is another stage.
    run_inside(tiny_config)
    assert "sizes: done before, skipped" in capsys.readouterr().out
    tiny_config["stages"]["sizes"]["image_sizes"] = [24]
    run_inside(tiny_config, expect=2)
    assert "image_sizes was [24, 16] and is [24]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "model", "message"),
    [
        ({"evaluate": {"image_sizes": [16]}}, "timm:vit_tiny_patch16_224",
         "stages.evaluate.image_sizes: timm:vit_tiny_patch16_224 is not evaluated at 16 pixels"),
        ({"evaluate": {"image_sizes": []}}, "cifar_resnet8", "at least 1 item"),
        ({"evaluate": {"image_sizes": [16, 16]}}, "cifar_resnet8", "a size stands there twice"),
        ({"dense": {"epochs": 1, "optimizer": {"lr": 0.1}, "image_sizes": [16]}}, "cifar_resnet8",
         "stages of kind dense take no image_sizes"),
    ],
)  # fmt: skip
def test_what_is_refused(stages, model, message, tiny_config, run_inside, capsys):
    tiny_config |= {"stages": stages, "model": {"name": model}}
    run_inside(tiny_config, expect=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_two_ranks_find_what_one_finds(tiny_config, run_main):
    """Each image counts once at every size; starting weights need no stage before them."""
    tiny_config["stages"] = {"dense": {"kind": "evaluate", "image_sizes": [24, 16]}}
    found = []
    for ranks in (1, 2):
        output = f"{tiny_config['output']}-{ranks}"
        run_main({**tiny_config, "output": output}, ranks=ranks)
        results = json.loads((Path(output) / "results.json").read_text())
        found.append(results["stages"]["dense"]["sizes"])
    for one, two in zip(*found, strict=True):
        assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
        assert one == two and one["images"] == 40


@pytest.mark.parametrize(("sizes", "left"), [([24, 32, 48], [24]), ([32], None)])
def test_sizes_that_are_not_smaller_are_left_out(tiny_config, run_inside, capsys, sizes, left):
    tiny_config["stages"] = {"dense": {"kind": "evaluate", "image_sizes": sizes}}
    assert tiny_config["data"]["image_size"] == 32
    run_inside(tiny_config)
    results = json.loads((Path(tiny_config["output"]) / "results.json").read_text())
    assert results["status"] == "finished"
    found = results["stages"]["dense"].get("sizes")
    assert (found and [size["image_size"] for size in found]) == left
    others = ", ".join(str(size) for size in sizes if size != 24)
    line = f"dense: image_sizes {others} left out: not smaller than data.image_size=32"
    out = capsys.readouterr().out
    assert out.count("left out") == 1 and line in " ".join(out.split())


@pytest.mark.parametrize("check", ["--dry-run", "launch.check"])
def test_a_size_that_cannot_be_is_found_before_the_run(check, tmp_path, run_main):
    config = {
        "name": "x",
        "output": str(tmp_path / "run"),
        "model": {"name": "timm:vit_tiny_patch16_224", "num_classes": 4},
        "data": {"root": str(tmp_path / "nowhere"), "image_size": 224},
        "stages": {"evaluate": {"image_sizes": [160]}},
    }
    if check == "--dry-run":
        done = run_main(config, check, expect=2)
    else:
        done = run_main(config, script=check, expect=2)
    assert "stages.evaluate.image_sizes: timm:vit_tiny_patch16_224 is not" in done.stderr
