"""Linear over-parameterisation in whole runs, behind three ways of pruning."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tpp
from tpp.common.errors import UserError
from train.config.config import load_config
from train.dry_run import dry_run

ROWS = {
    "vanilla": {"expand": False},
    "expanded": {"expansion": 2},
    "similar": {"expand": False, "similarity": 5.0},
    "both": {"expansion": 2, "similarity": 5.0},
}
GREG = {"name": "greg1", "delta": 0.2, "update_interval": 1, "stabilize_steps": 2}
TUNED = {"kind": "finetune", "epochs": 0.5, "optimizer": {"lr": 0.02}}


def finetuned(source: str, row: str) -> dict:
    return {**TUNED, "input": source, "method": {"name": "linear_overparam", **ROWS[row]}}


@pytest.mark.timeout(300)
def test_four_rows_after_l1_and_both_together_after_tpp_and_greg(tiny_config, run_inside):
    tiny_config["method"] |= {"delta": 0.5, "stabilize_steps": 8}
    dense, regularize = (tiny_config["stages"][name] for name in ("dense", "regularize"))
    tiny_config["training"]["channels_last"] = True
    tiny_config["stages"] = {
        "dense": dense,
        "l1": {"kind": "prune", "method": {"name": "l1"}},
        **{f"l1_{row}": finetuned("l1", row) for row in ROWS},
        "driven": {**regularize, "kind": "regularize", "input": "dense"},
        "tpp": {"kind": "prune"},
        "tpp_both": finetuned("tpp", "both"),
        "decayed": {**regularize, "kind": "regularize", "input": "dense", "method": GREG},
        "greg": {"kind": "prune", "method": GREG},
        "greg_both": finetuned("greg", "both"),
        "evaluate": {},
    }
    run_inside(tiny_config)
    run = Path(tiny_config["output"])
    stages = json.loads((run / "results.json").read_text())["stages"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = {}
    for name in stages:
        source, _, row = name.partition("_")
        if row not in ROWS:
            continue
        tuned = found[name] = load_file(run / name / "model.safetensors")
        pruned = load_file(run / source / "model.safetensors")
        assert {k: t.shape for k, t in tuned.items()} == {k: t.shape for k, t in pruned.items()}
        for key in ("parameters", "macs"):
            assert stages[name][key] == stages[source][key] < stages["dense"][key]
        terms = {k for e in log if e["event"] == "train" and e["stage"] == name for k in e}
        assert ("loss/similarity" in terms) == bool(ROWS[row].get("similarity")), name
        assert stages[name]["method"] == "linear_overparam"
        tpp.load_model(run / name / "model.safetensors")
    # What was measured with the factors is what the file without them gives.
    assert stages["evaluate"]["loss"] == stages["greg_both"]["loss"]
    rows = [found[f"l1_{row}"]["layer1.0.conv1.weight"] for row in ROWS]
    assert len({tuple(weight.flatten().tolist()) for weight in rows}) == 4
    assert all(torch.isfinite(weight).all() for weight in rows)


def test_a_pattern_of_no_layer_shows_in_the_dry_run(tiny_config, tmp_path):
    method = {"name": "linear_overparam", "layers": ["layer9.*"]}
    tiny_config["stages"]["finetune"]["method"] = method
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    with pytest.raises(UserError, match=r"^stages\.finetune\.method\.layers: 'layer9\.\*' is of"):
        dry_run(load_config(path), ranks=1)
