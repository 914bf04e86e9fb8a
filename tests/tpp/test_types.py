"""Networks whose weights are not float32: loaded, pruned, and gone on with."""

import pytest
import torch

from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import load_model, load_optimizer_state, save_model
from tpp.models.architecture import build_model, example_input_for
from tpp.models.preparation import take_image_size
from tpp.plan import PruningPlan
from tpp.prune import main as prune
from tpp.selection.selection import select_filters

TYPES = [torch.half, torch.bfloat16, torch.double]
# With buffers that are in no file: filters against aliasing, a bias of keys that is always 0,
# positions of attention.
RELATIVE = "timm:vit_relpos_small_patch16_224"
BEIT = "timm:beit_base_patch16_224"
NETWORKS = [
    ("timm:resnetblur18", "layer1.*.conv1", torch.bfloat16),
    ("timm:resnetblur18", "layer1.*.conv1", torch.double),
    ("timm:test_vit3", "blocks.0.mlp.fc1", torch.half),
    (BEIT, "blocks.0.mlp.fc1", torch.half),
    (BEIT, "blocks.0.mlp.fc1", torch.double),
    (RELATIVE, "blocks.0.mlp.fc1", torch.bfloat16),
]
ONE_BLOCK = {
    "timm:beit_base_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "timm:vit_relpos_small_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 2},
}


@pytest.mark.parametrize(("name", "pattern", "dtype"), NETWORKS)
def test_a_network_runs_in_its_own_type_and_is_pruned_in_it(name, pattern, dtype, tmp_path):
    torch.manual_seed(0)
    args = ONE_BLOCK.get(name, {})
    model = build_model(name, 4, **args).eval().to(dtype)
    take_image_size(model, 64 if "resnet" in name else None)
    save_model(tmp_path / "dense", model)
    loaded = load_model(tmp_path / "dense")
    image = torch.rand(example_input_for(model).shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image.to(dtype)), model(image.to(dtype)))
        pruned = prune_model(loaded, select_filters(loaded, {pattern: 0.5}))
        out = pruned(image.to(dtype))
    assert {b.dtype for b in pruned.buffers() if b.is_floating_point()} <= {dtype}
    command = ["--checkpoint", str(tmp_path / "dense"), "--output", str(tmp_path / "pruned")]
    prune([*command, "--ratio", f"{pattern}=0.5"])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "pruned")(image.to(dtype)), out)


@pytest.mark.parametrize("dtype", TYPES)
def test_momentum_gets_the_type_of_its_parameter(dtype, tmp_path):
    model = build_model("mlp7_linear", 3, width=4, image_size=2).to(dtype)
    momentum = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    save_model(tmp_path / "a", model, companions={"optimizer.momentum_buffer": momentum})
    model = load_model(tmp_path / "a").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert load_optimizer_state(tmp_path / "a", model, optimizer) == len(momentum)
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.float32}
    model(torch.ones(1, 1, 2, 2)).sum().backward()
    optimizer.step()


def test_buffers_that_are_no_numbers_with_a_point_keep_their_type(tmp_path):
    model = build_model(RELATIVE, 2, **ONE_BLOCK[RELATIVE]).half()
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert torch.int64 in before.values()
    plan = PruningPlan({}, {})
    save_model(tmp_path / "a", prune_model(model, plan))
    found = {name: buffer.dtype for name, buffer in load_model(tmp_path / "a").named_buffers()}
    assert found == before
