"""Every method through whole runs of train/main.py on tiny data."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tpp
from tpp.common.errors import UserError
from tpp.methods import method_class
from tpp.plan import PruningPlan
from tpp.selection.selection import select_filters
from train.config.config import load_config
from train.dry_run import dry_run

REGULARIZED: dict[str, dict[str, Any]] = {  # settings for a dozen steps, and the stage's epochs
    "tpp": {"delta": 0.2, "update_interval": 1, "stabilize_steps": 9, "zero_out_interval": 1},
    "greg1": {"delta": 0.2, "update_interval": 1, "stabilize_steps": 5},
    "greg2": {
        "delta": 0.2,
        "update_interval": 1,
        "stabilize_steps": 3,
        "pick_delta": 0.1,
        "pick_ceiling": 0.4,
    },
    "kernorth+l1": {"epochs": 1},
    "orthconv+l1": {"epochs": 1},
    "ffr": {"epochs": 1, "length": 0.3, "curvature": 0.3, "features": ["*.conv?", "*.bn?"]},
}
# Those whose outcome is written down below; a further one has a test of its own beside its file.
METHODS = (
    *("scratch", "l1", "l1+orthp", "l1+kernorth", "l1+orthconv", "kernorth+l1", "orthconv+l1"),
    *("greg1", "greg2", "tpp"),
)
WIDTHS = {"layer1.0.conv1": 8, "layer2.0.conv1": 16, "layer3.0.conv1": 32}


def branch(name: str) -> dict[str, Any]:
    """The stages of one method, from the dense network on."""
    settings = dict(REGULARIZED.get(name, {}))
    epochs = settings.pop("epochs", None)
    method = {"name": name, **settings}
    optimizer = {"lr": 0.02}
    stages: dict[str, Any] = {}
    if name in REGULARIZED:
        stages["regularize"] = {"optimizer": {"lr": 0.1}, **({"epochs": epochs} if epochs else {})}
    stages |= {"prune": {}, "finetune": {"epochs": 0.5, "optimizer": optimizer}, "evaluate": {}}
    first, *_ = stages
    stages[first]["input"] = "dense"
    return {
        f"{name}_{kind}": {"kind": kind, "method": method, **stage}
        for kind, stage in stages.items()
    }


def folder(config: dict, stage: str) -> Path:
    return Path(config["output"]) / stage


def weights(config: dict, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder(config, stage) / "model.safetensors")


def logged(config: dict, stage: str) -> list[dict]:
    lines = map(json.loads, (Path(config["output"]) / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "train" and line["stage"] == stage]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


def test_every_method_here_from_the_dense_network_to_a_finetuned_smaller_one(
    tiny_config, run_main, tmp_path, capsys
):
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"]}
    for name in METHODS:
        tiny_config["stages"] |= branch(name)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    dry_run(load_config(path), ranks=2)
    assert "layer3.0.conv1 │      64 │     32 │   32" in capsys.readouterr().out
    assert not Path(tiny_config["output"]).exists()
    run_main(tiny_config)
    results = json.loads((Path(tiny_config["output"]) / "results.json").read_text())
    assert results["status"] == "finished"
    stages = results["stages"]
    dense = tpp.load_model(folder(tiny_config, "dense") / "model.safetensors")
    l1_plan = select_filters(dense, {"layer*.conv1": 0.5})
    plans = {}
    for name in METHODS:
        method = method_class(name)
        small = tpp.load_model(folder(tiny_config, f"{name}_finetune") / "model.safetensors")
        found = {layer: small.get_submodule(layer).out_channels for layer in WIDTHS}
        assert found == WIDTHS, name
        finetuned = stages[f"{name}_finetune"]
        assert finetuned["title"] == method.title and finetuned["method"] == name
        assert stages[f"{name}_evaluate"]["top1"] == finetuned["top1"], name
        assert finetuned["parameters"] == stages["l1_finetune"]["parameters"], name
        plans[name] = PruningPlan.load(folder(tiny_config, f"{name}_prune") / "plan.json")

        # What was removed are the filters with the smallest norms of the network that was pruned,
        # or, where they are picked first, of the dense one.
        late = method.picks == "after"
        source = f"{name}_regularize" if late else "dense"
        pruned = tpp.load_model(folder(tiny_config, source) / "model.safetensors")
        if method.picks != "during":
            assert plans[name] == select_filters(pruned, {"layer*.conv1": 0.5}), name
        written = (folder(tiny_config, f"{name}_regularize") / "plan.json").exists()
        assert written == (name in REGULARIZED and not late), name
    for name in ("greg2", "kernorth+l1", "orthconv+l1"):
        assert plans[name] != l1_plan, f"{name} has trained on, but picks what L1 picks"
    # The run's plan is that of its first stage that has one.
    assert PruningPlan.load(Path(tiny_config["output"]) / "plan.json") == plans["greg1"]

    # The terms were in the loss of the stage that they belong to, and nowhere else.
    for name in METHODS:
        terms = {
            kind: {key for e in logged(tiny_config, f"{name}_{kind}") for key in e} & TERMS
            for kind in ("regularize", "finetune")
        }
        assert terms == {"regularize": set(), "finetune": set(), **EXPECTED.get(name, {})}, name

    # GReg's filters are small when they go, TPP's are zero; OrthP's layers are orthonormal.
    assert stages["greg1_prune"]["removed_magnitude"] > 0
    assert stages["greg1_prune"]["removed_magnitude"] < stages["l1_prune"]["removed_magnitude"]
    assert stages["greg2_prune"]["removed_magnitude"] > 0
    assert stages["tpp_prune"]["removed_magnitude"] == 0
    for key, weight in weights(tiny_config, "l1+orthp_prune").items():
        if weight.dim() > 1:
            values = torch.linalg.svdvals(weight.flatten(1))
            torch.testing.assert_close(values, torch.ones_like(values), msg=key)


TERMS = {
    *("loss/gram", "loss/decay", "loss/kept_decay", "loss/orthogonality"),
    *("loss/flow_length", "loss/flow_curvature"),
}
EXPECTED = {
    "tpp": {"regularize": {"loss/gram", "loss/decay"}},
    "greg1": {"regularize": {"loss/decay"}},
    "greg2": {"regularize": {"loss/decay", "loss/kept_decay"}},
    "kernorth+l1": {"regularize": {"loss/orthogonality"}},
    "orthconv+l1": {"regularize": {"loss/orthogonality"}},
    "l1+kernorth": {"finetune": {"loss/orthogonality"}},
    "l1+orthconv": {"finetune": {"loss/orthogonality"}},
}


def test_greg2_killed_after_it_has_picked(tiny_config, run_main):
    """18 steps of picking, 22 of growth and 20 more; a checkpoint every five."""
    tiny_config["method"] = {
        "name": "greg2",
        "delta": 0.025,
        "update_interval": 1,
        "stabilize_steps": 20,
        "pick_delta": 0.025,
        "pick_ceiling": 0.45,
    }
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.1}}, "prune": {}}
    undisturbed = copy.deepcopy(tiny_config)
    undisturbed["output"] += "-undisturbed"
    run_main(undisturbed)
    checkpoints = folder(tiny_config, "regularize") / "checkpoints"
    run_main(tiny_config, kill_when=checkpoints / "step-00000025")
    newest = max(checkpoints.glob("step-*"))
    truth = PruningPlan.load(folder(undisturbed, "prune") / "plan.json")
    assert PruningPlan.from_dict(plan_in(newest)) == truth
    assert not (Path(tiny_config["output"]) / "plan.json").exists()
    resumed = run_main(tiny_config)
    assert f"regularize: resumed after {int(newest.name[5:])} steps" in resumed.stdout
    for stage in ("regularize", "prune"):
        assert largest_difference(weights(undisturbed, stage), weights(tiny_config, stage)) == 0
        assert PruningPlan.load(folder(tiny_config, stage) / "plan.json") == truth
    assert PruningPlan.load(Path(tiny_config["output"]) / "plan.json") == truth


def plan_in(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "state.json").read_text())["extra"]["method"]["plan"]


def test_one_rank_and_two_ranks_give_the_same_trajectory(tiny_config, run_main):
    """With BatchNorm over all ranks; terms are shared or means, plans agreed on without a word."""
    methods = ["kernorth+l1", "orthconv+l1", "greg2", "ffr"]
    tiny_config["training"] |= {"sync_batchnorm": True}
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"]}
    for name in methods:
        regularize, prune, *_ = branch(name).items()
        tiny_config["stages"] |= dict([regularize, prune])
    for stage in tiny_config["stages"].values():
        if "optimizer" in stage:
            # Low, to keep some steps from amplifying the last bit of float32 into chaos.
            stage["optimizer"] = {"lr": 0.001}
    two = copy.deepcopy(tiny_config)
    two["output"] += "-two"
    run_main(tiny_config)
    run_main(two, ranks=2)
    for name in methods:
        stage = f"{name}_regularize"
        one_rank, two_ranks = weights(tiny_config, stage), weights(two, stage)
        assert 0 < largest_difference(one_rank, two_ranks) < 2e-4
        plans = [folder(config, f"{name}_prune") / "plan.json" for config in (tiny_config, two)]
        assert PruningPlan.load(plans[0]) == PruningPlan.load(plans[1])
        pairs = zip(logged(tiny_config, stage), logged(two, stage), strict=True)
        for one, other in pairs:
            terms = TERMS & one.keys()
            assert terms == TERMS & other.keys() != set()
            for term in terms:
                assert one[term] == pytest.approx(other[term], rel=1e-4)


def test_a_stale_plan_is_not_taken_for_one_that_comes_after(tiny_config, run_main):
    """Another method's stage that was broken off at its start has left its plan behind."""
    filters = {layer: 2 * kept for layer, kept in WIDTHS.items()}
    stale = PruningPlan(filters, {layer: [0, 1, 2] for layer in WIDTHS})
    folder(tiny_config, "regularize").mkdir(parents=True)
    stale.save(folder(tiny_config, "regularize") / "plan.json")
    tiny_config["method"] = {"name": "kernorth+l1"}
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.1}, "epochs": 0.5}, "prune": {}}
    run_main(tiny_config)
    network = tpp.load_model(folder(tiny_config, "regularize") / "model.safetensors")
    truth = select_filters(network, tiny_config["pruning"]["ratios"])
    assert PruningPlan.load(folder(tiny_config, "prune") / "plan.json") == truth


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method={name: greg2, pick_ceiling: 2.0}", "pick_ceiling (2) must not be above tau (1)"),
        ("method={name: greg1, gram_weight: 5}", "method.gram_weight: unknown key"),
        ("method={name: kernorth+l1}", "method 'kernorth+l1' needs the stage's length"),
        ("method={name: l1+orthp, gain: 0}", "method.gain: input should be greater than 0"),
        ("method={name: l1+ortconv}", "did you mean 'l1+orthconv'?"),
    ],
)
def test_mistakes_show_in_the_configuration(tiny_config, tmp_path, override, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert message in str(error.value) and "\n" not in str(error.value)
