"""How a device computes: compiled networks, TF32, cuDNN's search, an optimiser's own way."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tpp.common.errors import UserError
from tpp.models.architecture import Architecture
from train.config.config import Config
from train.config.sections import TrainingSection
from train.distributed.arithmetic import (
    compile_network,
    eagerly,
    is_compiled,
    settle_arithmetic,
)
from train.distributed.engine import Engine
from train.preflight import check_optimizers

CPU = torch.device("cpu")


def test_a_compiled_run_is_the_eager_one_but_for_rounding(tiny_config, run_main, monkeypatch):
    """Through a removal in the middle of a stage, and going on from what was compiled before."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.001}}, "prune": {}}
    compiled = copy.deepcopy(tiny_config)
    compiled["output"] += "-compiled"
    compiled["training"] |= {"compile": "default", "trainability_every": 10}
    run_main(tiny_config)
    printed = run_main(compiled).stdout
    assert "step 17: 56 filters removed" in printed
    eager, other = (
        load_file(Path(config["output"]) / "prune" / "model.safetensors")
        for config in (tiny_config, compiled)
    )
    assert eager.keys() == other.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(tensor, other[name], rtol=2e-3, atol=2e-4, msg=name)
    assert not all(tensor.equal(other[name]) for name, tensor in eager.items()), "was not compiled"
    assert any((Path(compiled["output"]) / "compiled").iterdir())


def test_a_compiled_network_runs_eagerly_where_it_is_evaluated():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images = torch.randn(3, 4)
    truth, names = network(images), list(network.state_dict())
    compile_network(network, "off")
    assert not is_compiled(network)
    compile_network(network, "default")
    assert is_compiled(network) and list(network.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    with eagerly(network):
        assert network(images).equal(truth)
    assert not torch._dynamo.utils.counters["frames"], "something was compiled"
    assert not is_compiled(copy.deepcopy(network))


def test_without_a_compiler_it_is_one_line(tiny_config, run_main, monkeypatch):
    tiny_config["training"]["compile"] = "default"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    done = run_main(tiny_config, expect=2)
    assert done.stderr.startswith(
        "error: training.compile: for the CPU PyTorch compiles with a C++"
    )
    assert "use off" in done.stderr and "Traceback" not in done.stderr
    assert not Path(tiny_config["output"]).exists()


def test_a_step_is_captured_on_one_gpu_alone(tiny_config, run_main):
    tiny_config["training"]["capture"] = True
    done = run_main(tiny_config, expect=2)
    assert done.stderr == (
        "error: training.capture: the steps of one rank on a GPU, without DeepSpeed, can be "
        "recorded as a CUDA graph, and this is on the CPU; use capture: false\n"
    )
    assert not Path(tiny_config["output"]).exists()
    done = run_main(tiny_config, ranks=2, expect=2)
    assert "and these are 2 ranks" in done.stderr


def test_what_cannot_be_captured_is_found_beforehand(tiny_config):
    tiny_config["training"] |= {"capture": True, "precision": "fp16"}
    with pytest.raises(ValueError, match="not possible with precision: fp16"):
        Config.model_validate(tiny_config)
    tiny_config["training"]["precision"] = "bf16"
    tiny_config["stages"]["finetune"]["optimizer"] = {"name": "adamw", "lr": 0.001}
    config = Config.model_validate(tiny_config)
    with pytest.raises(UserError, match="records the step of sgd"):
        check_optimizers(config, Architecture("cifar_resnet8", 4))


@pytest.fixture
def backends():
    """PyTorch's, as they were again afterwards."""
    found = torch.backends
    places = (found.cuda.matmul, found.cudnn.conv)
    before, benchmark = [place.fp32_precision for place in places], found.cudnn.benchmark
    for place in places:
        place.fp32_precision = "none"
    yield found
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision
    found.cudnn.benchmark = benchmark


@pytest.mark.parametrize(("said", "kind"), [(True, "tf32"), (False, "ieee"), (None, "none")])
def test_tf32_and_cudnns_search_are_choices(said, kind, backends, tmp_path):
    settle_arithmetic(TrainingSection(tf32=said, cudnn_benchmark=True), CPU, tmp_path)
    assert backends.cuda.matmul.fp32_precision == kind
    assert backends.cudnn.conv.fp32_precision == kind
    assert backends.cudnn.benchmark
    settle_arithmetic(TrainingSection(), CPU, tmp_path)
    assert not backends.cudnn.benchmark


def test_a_state_of_another_device_does_not_say_how_to_compute():
    network = nn.Linear(3, 2)
    engine = Engine(Accelerator(cpu=True), network, torch.optim.SGD(network.parameters(), lr=0.1))
    state = json.loads(json.dumps(engine.state_dict()))
    state["param_groups"][0] |= {"fused": True, "lr": 0.5}
    engine.load_state_dict(state)
    (group,) = engine.state_dict()["param_groups"]
    assert group["fused"] is None and group["lr"] == 0.5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("compile", "fast", "off"), ("tf32", "yes", "boolean"), ("cudnn_benchmark", 3, "boolean")],
)
def test_other_values_are_one_line(tiny_config, key, value, message):
    tiny_config["training"][key] = value
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tiny_config)
