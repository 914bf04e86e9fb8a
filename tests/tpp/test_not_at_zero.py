"""Filters that go although they are not at zero: said once, with the share of the norm."""

import math
import warnings

import pytest
import torch

from tpp import prune as command
from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import save_model
from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.common.errors import Note, run_command
from tpp.models.architecture import build_model, meta_copy
from tpp.selection.selection import select_filters

RATIOS = {"layer1.0.conv1": 0.5, "layer2.0.conv1": 0.25}


def pruned_by(factor):
    """A network, and a plan whose filters have so much of their norm."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    plan = select_filters(model, RATIOS)
    gone = total = 0.0
    for layer, filters in plan.pruned.items():
        weight = model.get_submodule(layer).weight.data
        weight[filters] *= factor
        gone += (weight[filters] ** 2).sum().item()
        total += (weight**2).sum().item()
    return model, plan, math.sqrt(gone / total)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_it_is_said_once_with_the_share(factor, tmp_path):
    model, plan, share = pruned_by(factor)
    with pytest.warns(Note) as said:
        prune_model(model, plan)
    (line,) = (str(w.message) for w in said)
    assert f"they hold {100 * share:.0f}% of the norm" in line
    save_model(tmp_path / "dense", model)
    report = prune_checkpoint(tmp_path / "dense", plan, tmp_path / "pruned")
    assert report.norm_share == pytest.approx(share, rel=1e-5)
    assert report.notes == (line,)


@pytest.mark.parametrize("factor", [0.0, 1e-3])
def test_nothing_is_said_of_zeros(factor, tmp_path):
    model, plan, share = pruned_by(factor)
    save_model(tmp_path / "dense", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(model, plan)
        prune_model(meta_copy(build_model("cifar_resnet8", 10)), plan)  # nothing is known of it
        report = prune_checkpoint(tmp_path / "dense", plan, tmp_path / "pruned")
    assert report.notes == () and report.norm_share == pytest.approx(share, abs=1e-6)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    save_model(tmp_path / "dense", pruned_by(1.0)[0])
    paths = ["--checkpoint", str(tmp_path / "dense"), "--output", str(tmp_path / "o.safetensors")]
    command.main([*paths, "--ratio", "layer1.0.conv1=0.5"])
    printed, errors = capsys.readouterr()
    assert printed.count("of the norm") == 1 and "note: the filters that go are not" in printed
    assert not errors


def test_a_commands_warnings_have_no_file_and_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    run_command(lambda: None)
    assert warnings.formatwarning("look\x1bhere", Note, "file", 1) == "note: look\\x1bhere\n"
    assert "file:1: RuntimeWarning" in warnings.formatwarning("x", RuntimeWarning, "file", 1)
