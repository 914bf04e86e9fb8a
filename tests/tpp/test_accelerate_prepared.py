"""A network that Accelerate prepared for bf16 is an ordinary one where it is pruned or written."""

import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from zeroing import randomised, relative_difference, zeroed

from tpp.channels.removal import prune_model
from tpp.checkpoints.export_file import export_model
from tpp.models.architecture import plain_copy
from tpp.plan import PruningPlan

PLAN = PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": list(range(8))})
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def of_its_own():
    """Accelerate keeps one state per process, in whose precision all of its objects work."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pair():
    """A network as it is, and as Accelerate prepares it."""
    plain, prepared = (randomised("cifar_resnet8", torch.float32).eval() for _ in range(2))
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(prepared).eval()
    with torch.no_grad():
        assert relative_difference(prepared(IMAGES), plain(IMAGES)) > 1e-4  # it does run in bf16
    return plain, prepared


@torch.no_grad()
def test_pruning_gives_float32(pair):
    plain, prepared = pair
    expected = zeroed(plain, PLAN.pruned, IMAGES)(IMAGES)
    pruned = prune_model(prepared, PLAN)
    assert relative_difference(pruned(IMAGES), expected) < 1e-5
    # The prepared one goes on as before, and the pruned one can be prepared anew.
    assert relative_difference(prepared(IMAGES), plain(IMAGES)) > 1e-4
    again = Accelerator(cpu=True, mixed_precision="bf16").prepare(pruned)
    assert relative_difference(again(IMAGES), expected) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_exporting_gives_float32(pair, tmp_path, ending):
    plain, prepared = pair
    path = tmp_path / f"model.{ending}"
    assert export_model(prepared, path).difference < 1e-5
    if ending == "pt2":
        program = torch.export.load(path)
        assert "bfloat16" not in str(program.graph)
        found = program.module()(IMAGES)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": IMAGES.numpy()})[0])
    assert relative_difference(found, plain(IMAGES)) < 1e-5


@torch.no_grad()
def test_a_forward_of_the_users_own_stays():
    plain = randomised("cifar_resnet8", torch.float32).eval()
    model = randomised("cifar_resnet8", torch.float32).eval()
    usual = type(model).forward
    model.forward = types.MethodType(lambda self, x: 2 * usual(self, x), model)
    assert torch.equal(plain_copy(model)(IMAGES), 2 * plain(IMAGES))
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert torch.equal(plain_copy(prepared)(IMAGES), 2 * plain(IMAGES))
    for parameter in prepared.parameters():
        parameter.zero_()
    assert not prepared(IMAGES).any()
