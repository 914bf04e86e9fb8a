"""Options of tpp.prune that do not go together are refused by name, before anything is read."""

import json

import pytest
import torch

from tpp.checkpoints.model_file import load_model, save_model
from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.plan import PruningPlan
from tpp.prune import main

FILES = ("--checkpoint", "none", "--output", "out")
HOW = (
    *(["--criterion", "l2"], ["--round-to", "16"], ["--floor", "*=8"]),
    *(["--skip", "conv1"], ["--coupled"], ["--seed", "0"]),
)


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        main([*FILES, *map(str, arguments)])
    return str(caught.value)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("source", ["--plan", "--config"])
def test_what_has_no_effect_is_refused(source, how):
    assert refusal(source, "FILE", *how).startswith(f"{how[0]} has no effect with {source}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "P", "--config", "C"], "--plan and --config do not go together: both say"),
        (["--config", "C", "--speedup", "2"], "--config and --speedup do not go together: both"),
        (["--config", "C", "--ratio", "a=0.5"], "--config and --ratio do not go together"),
        (["--plan", "P", "--max-macs", "1G"], "--plan and --max-macs do not go together"),
        (["--plan", "P", "--speedup", "0"], "--plan and --speedup do not go together"),
        (["--ratio", "a=0.5", "--seed", "1"], "--seed has no effect without --criterion random"),
        (["--speedup", "2", "--criterion", "l2", "--seed", "0"], "--seed has no effect without"),
        (["--round-to", "8"], "say what to prune: --plan FILE, or"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    assert refusal(*arguments).startswith(message)


def test_a_network_is_named_once(tmp_path):
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    save_model(tmp_path / "in", model)
    config = tmp_path / "c.yaml"
    pruning = {"ratios": {"layer1.0.conv1": 0.5}}
    config.write_text(json.dumps({"model": {"name": "cifar_resnet8"}, "pruning": pruning}))
    files = ["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"--model cifar_resnet14 and --config .*, whose model is"):
        main([*files, "--model", "cifar_resnet14", "--config", str(config)])
    with pytest.raises(UserError, match="in: holds a cifar_resnet8, and is said to be a cifar_res"):
        main([*files, "--model", "cifar_resnet14", "--ratio", "*=0"])
    plan = PruningPlan({"conv1": 16}, {"conv1": []})
    with pytest.raises(UserError, match="holds a cifar_resnet8, and is said to be"):
        prune_checkpoint(
            tmp_path / "in", plan, tmp_path / "out", architecture=Architecture("resnet18", 10)
        )
    assert not (tmp_path / "out").exists()
    main([*files, "--model", "cifar_resnet8", "--config", str(config)])
    assert load_model(tmp_path / "out").layer1[0].conv1.out_channels == 8


def test_another_networks_configuration_is_said(tmp_path, capsys):
    save_model(tmp_path / "in", build_model("cifar_resnet8", 10))
    config = tmp_path / "c.yaml"
    pruning = {"ratios": {"layer1.0.conv1": 0.5}}
    config.write_text(json.dumps({"model": {"name": "cifar_resnet14"}, "pruning": pruning}))
    files = ["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    main([*files, "--config", str(config)])
    note = f"note: what goes is said by {config}, which is of cifar_resnet14"
    assert note in capsys.readouterr().out


def test_a_plan_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"plan.json: cannot write the plan: "):
        PruningPlan({}, {}).save(tmp_path / "file" / "plan.json")
    PruningPlan({}, {}).save(tmp_path / "new" / "plan.json")
    assert PruningPlan.load(tmp_path / "new" / "plan.json") == PruningPlan({}, {})


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "vit_tiny_patch16_224", "repvit_m1"])
def test_a_name_of_timm_is_suggested_as_one(name):
    with pytest.raises(UserError, match=f"no model is called '{name}'; timm has it: timm:{name}"):
        build_model(name, 10)


def test_other_names_are_suggested_as_before():
    for name in ("resnet19", "resnet18.none_such"):
        with pytest.raises(UserError, match="did you mean resnet"):
            build_model(name, 10)


@pytest.mark.filterwarnings("ignore::tpp.common.errors.Note")
def test_layers_that_go_along_are_named(tmp_path, capsys):
    torch.manual_seed(0)
    save_model(tmp_path / "in", build_model("resnet18", 10))
    files = [str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--overwrite"]
    main([*files, "--ratio", "layer1.*.conv2=0.5", "--coupled"])
    assert "note: coupled to these, so pruned along with them: conv1\n" in capsys.readouterr().out
    for alone in (
        ["--ratio", "layer1.*.conv1=0.5"],
        ["--ratio", "layer1.*.conv1=0.3", "--speedup", "1.05"],
    ):
        main([*files, *alone])
        assert "pruned along" not in capsys.readouterr().out


def test_a_count_is_refused_with_its_option():
    for option in ("--max-macs", "--max-parameters"):
        assert refusal(option, "2Q").startswith(f"{option}: '2Q' is no number above 0 such as")


def test_a_plan_for_another_network_is_named(tmp_path):
    save_model(tmp_path / "in", build_model("cifar_resnet8", 10))
    PruningPlan({"layer1.0.convX": 16}, {"layer1.0.convX": [1]}).save(tmp_path / "p.json")
    files = ["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    said = r"p\.json: no Conv2d or Linear layer is called 'layer1\.0\.convX'; did you mean"
    with pytest.raises(UserError, match=said):
        main([*files, "--plan", str(tmp_path / "p.json")])


def test_a_budget_that_takes_nothing_is_said(tmp_path, capsys):
    save_model(tmp_path / "in", build_model("cifar_resnet8", 10))
    main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-macs", "10G"])
    said = "note: the dense network meets 10,000,000,000 MACs: nothing was pruned"
    assert said in capsys.readouterr().out
