"""Whose checkpoints are read: every row of docs/checkpoints.md, pruned."""

import re
from pathlib import Path

import pytest
import torch
from checkpoint_rows import ROWS

from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import load_model, read_checkpoint
from tpp.checkpoints.prune_file import read_dense, write_pruned
from tpp.checkpoints.sources import load_weights
from tpp.models.architecture import Architecture, build_model
from tpp.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
MADE_HERE = {name: make for name, make in ROWS.items() if callable(make)}


def rows_of(page, heading):
    """The first column of the table under a heading."""
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [line.split("|")[1].strip() for line in lines[2:]]


def test_the_page_has_the_rows_that_are_tested():
    page = (ROOT / "docs/checkpoints.md").read_text()
    assert sorted(rows_of(page, "What is read")) == sorted(ROWS)
    for name, elsewhere in ROWS.items():
        if not callable(elsewhere):
            path, _, test = elsewhere.partition("::")
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.M), name


def same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_checkpoint_is_pruned_with_what_belongs_to_it(tmp_path, name):
    made = MADE_HERE[name](tmp_path)
    given = Architecture(made.name, 1000) if made.name else None
    dense = read_dense(made.path, given)
    layer = made.model.get_submodule(made.layer)
    plan = PruningPlan({made.layer: layer.out_channels}, {made.layer: [0, 3]})
    _, done = write_pruned(dense, plan, tmp_path / "out")
    pruned = load_model(tmp_path / "out")
    same(pruned.state_dict(), prune_model(made.model, plan).state_dict())
    assert done.notes[-1].startswith("the filters that go are not at zero")
    notes = done.notes[:-1]
    for said in made.notes:
        assert sum(said in note for note in notes) == 1, (said, notes)
    assert len(notes) == len(made.notes), notes
    _, companions, _ = read_checkpoint(tmp_path / "out")
    expected = set()
    if made.optimizer is not None:
        expected.add("optimizer.momentum_buffer")
        states = made.optimizer.state
        parameters = made.optimizer.param_groups[0]["params"]
        buffers = [states[parameter]["momentum_buffer"] for parameter in parameters]
        names = [n for n, _ in made.model.named_parameters()]
        full = dict(zip(names, buffers, strict=True))
        found = companions["optimizer.momentum_buffer"]
        assert found.keys() == full.keys()
        kept = plan.kept(made.layer)
        for own, buffer in full.items():
            if own == f"{made.layer}.weight":
                buffer = buffer[kept]
            if found[own].shape == buffer.shape:
                assert torch.equal(found[own], buffer), own
        assert torch.equal(found[f"{made.layer}.weight"], full[f"{made.layer}.weight"][kept])
    if made.average is not None:
        expected.add("ema")
        average = load_model(tmp_path / "out", companion="ema")
        same(average.state_dict(), prune_model(made.average, plan).state_dict())
    assert companions.keys() == expected


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_checkpoint_is_loaded_into_its_network(tmp_path, name):
    made = MADE_HERE[name](tmp_path)
    dense = read_dense(made.path, Architecture(made.name, 1000) if made.name else None).model
    model = build_model(dense.architecture.name, dense.architecture.num_classes)
    notes = load_weights(model, made.path)
    expected = made.model.float().state_dict()
    same(model.state_dict(), expected)
    assert all(any(said in note for note in notes) for said in made.notes if "float16" not in said)
