"""What Accelerate, DeepSpeed and torch read from the environment changes no run behind its back."""

import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from tpp.common.errors import UserError
from train.config.sections import TrainingSection
from train.distributed.accelerator import make_accelerator, make_engine
from train.distributed.deepspeed_engine import deepspeed_plugin
from train.distributed.environment import settle_environment

ROOT = Path(__file__).resolve().parents[2]
ZERO = ROOT / "launch" / "deepspeed"
CONFIGURED = TrainingSection(precision="bf16", accumulation=4, clip_gradient_norm=0.5)


def settled(training: TrainingSection | None = None, **variables: str) -> dict[str, str]:
    """What is left of some variables."""
    environment = dict(variables)
    precision = training.precision if training else "fp32"
    settle_environment(environment, precision, training)
    return environment


@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "training.accumulation says so, and is 1"),
        ("ACCELERATE_GRADIENT_CLIPPING=1.0", "training.clip_gradient_norm says so, and is null"),
        ("ACCELERATE_MIXED_PRECISION=bf16", "training.precision says so, and is fp32"),
        ("ACCELERATE_MIXED_PRECISION=fp8", "training.precision says so, and is fp32"),
        ("ACCELERATE_USE_FSDP=true", "the correlation of two filters needs both"),
        ("ACCELERATE_USE_MEGATRON_LM=true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "the whole network"),
        ("ACCELERATE_USE_SAGEMAKER=true", "SageMaker"),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "torch.compile is not supported"),
        ("ACCELERATE_TORCH_DEVICE=cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu", "offloading is not supported"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=nvme", "offloading is not supported"),
        ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES=Experts", "no network here has experts"),
        ("DS_ACCELERATOR=xpu", "leave it out"),
    ],
)
def test_what_would_change_a_run_is_refused_by_name(variable: str, setting: str):
    name, _, value = variable.partition("=")
    with pytest.raises(UserError) as caught:
        settled(TrainingSection(), **{name: value})
    message = str(caught.value)
    assert message.startswith(variable) and setting in message and "\n" not in message


@pytest.mark.parametrize(
    ("training", "variables"),
    [
        (
            CONFIGURED,
            {
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
                "ACCELERATE_GRADIENT_CLIPPING": "0.50",
                "ACCELERATE_MIXED_PRECISION": "bf16",
            },
        ),
        (
            CONFIGURED,
            {
                # What accelerate launch sets where nobody asked for anything.
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_DYNAMO_BACKEND": "no",
                "ACCELERATE_DYNAMO_MODE": "default",
                "ACCELERATE_USE_FSDP": "false",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
                "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
                "FSDP_VERSION": "2",
                "MEGATRON_LM_GRADIENT_CLIPPING": "1.0",
            },
        ),
        # Nothing is trained, and so nothing accumulated or clipped.
        (None, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
    ],
    ids=["as configured", "launcher's defaults", "evaluation"],
)
def test_what_agrees_is_taken_out(training: TrainingSection | None, variables: dict[str, str]):
    assert settled(training, **variables, HOME="/home") == {"HOME": "/home"}


def test_a_wish_for_accumulation_that_says_one_is_one():
    assert settled(TrainingSection(), ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1") == {}
    with pytest.raises(UserError, match=r"training.accumulation says so, and is 4"):
        settled(CONFIGURED, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1")


def test_cpu_means_no_gpu_for_everything():
    """Accelerate alone would leave DeepSpeed out, and all else would still use the GPUs."""
    assert settled(ACCELERATE_USE_CPU="true") == {"CUDA_VISIBLE_DEVICES": ""}
    assert settled(ACCELERATE_USE_CPU="False", CUDA_VISIBLE_DEVICES="1") == {
        "CUDA_VISIBLE_DEVICES": "1"
    }
    assert "DS_ACCELERATOR" in settled(ACCELERATE_USE_CPU="1", DS_ACCELERATOR="cpu")


def test_what_changes_rounding_is_said():
    for name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"):
        environment = {name: "1"}
        (line,) = settle_environment(environment, "fp32")
        assert line.startswith(f"{name}=1 ") and environment == {name: "1"}
    assert settle_environment({"OMP_NUM_THREADS": "2"}, "fp32") == []


def test_a_debugging_aid_that_crashes_the_ranks_is_refused():
    """torch 2.15: a segmentation fault in the first step, for DistributedDataParallel over gloo."""
    ranks = {"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(UserError, match=r"^TORCH_DISTRIBUTED_DEBUG=DETAIL: .* use INFO$"):
        settled(**ranks, TORCH_DISTRIBUTED_DEBUG="detail")
    for fine in ({**ranks, "TORCH_DISTRIBUTED_DEBUG": "INFO"}, {"TORCH_DISTRIBUTED_DEBUG": "OFF"}):
        assert settled(**fine) == fine


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_gradient_is_what_the_loss_says(monkeypatch, fresh_accelerator):
    """Whatever is in the environment when the engine is made."""
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator("fp32")
    network = torch.nn.Linear(3, 1, bias=False)
    engine = make_engine(accelerator, network, torch.optim.SGD(network.parameters(), lr=0.1))
    outputs = engine.forward(torch.tensor([[3.0, 0.0, 4.0]]))
    engine.backward(outputs.sum(), last=True)
    assert engine.gradient_norm().item() == 5.0
    assert outputs.item() == (network.weight @ torch.tensor([3.0, 0.0, 4.0])).item()


def test_a_run_that_is_told_otherwise_ends_in_one_line(tiny_config, run_main, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    done = run_main(tiny_config, ranks=2, expect=2)
    assert done.stderr.startswith("error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, as accelerate")
    assert done.stderr.count("\n") == 1
    assert not Path(tiny_config["output"]).exists()


def test_accelerates_own_questionnaire_for_deepspeed(tiny_config, tmp_path):
    """What `accelerate config` writes, with the run's precision; and SGD without momentum."""
    file = {
        "compute_environment": "LOCAL_MACHINE",
        "deepspeed_config": {
            "gradient_accumulation_steps": 1,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero3_init_flag": False,
            "zero_stage": 1,
        },
        "distributed_type": "DEEPSPEED",
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16",
        "num_machines": 1,
        "num_processes": 1,
        "use_cpu": False,
    }
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(file))
    del tiny_config["stages"]["finetune"], tiny_config["stages"]["evaluate"]
    tiny_config["stages"]["dense"]["optimizer"]["momentum"] = 0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file"),
            *(str(tmp_path / "accelerate.yaml"), str(ROOT / "train" / "main.py")),
            *("--config", str(tmp_path / "run.yaml"), "--until", "dense"),
            "training.precision=bf16",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = (Path(tiny_config["output"]) / "results.json").read_text()
    assert "DeepSpeed, ZeRO stage 1" in results


def test_a_file_for_deepspeed_beside_a_precision(tiny_config, run_main, monkeypatch):
    """A mixed_precision line, even "no", beside deepspeed_config_file."""
    for name, value in {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO / "zero1.json"),
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag,mixed_precision",
        "ACCELERATE_MIXED_PRECISION": "no",
    }.items():
        monkeypatch.setenv(name, value)
    run_main(tiny_config, "--until", "dense")
    assert "ZeRO stage 1" in (Path(tiny_config["output"]) / "results.json").read_text()


def test_a_run_without_momentum_goes_on_under_zero(tiny_config, run_main, tmp_path):
    """Broken off after a checkpoint, and as one process trains it."""
    tiny_config["stages"] = {"dense": {"epochs": 2, "optimizer": {"lr": 0.05, "momentum": 0}}}
    for section in ("method", "pruning"):
        del tiny_config[section]
    zero = f"training.deepspeed={ZERO / 'zero2.json'}"
    run = Path(tiny_config["output"])
    run_main(tiny_config, zero, kill_when=run / "dense" / "checkpoints" / "step-00000005")
    gone_on = run_main(tiny_config, zero)
    assert "dense: resumed after 5 steps" in gone_on.stdout
    run_main(tiny_config, f"output={tmp_path / 'plain'}")
    one, other = (load_file(p / "dense" / "model.safetensors") for p in (run, tmp_path / "plain"))
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


def test_zero_stages_of_accelerate_launch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage, said in [("3", "stage 3 splits"), ("x", 'must be 0, 1 or 2, not "x"')]:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        with pytest.raises(UserError, match=said):
            deepspeed_plugin(TrainingSection())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ZERO / "zero1.json"))
    with pytest.raises(UserError, match=r"ACCELERATE_DEEPSPEED_ZERO_STAGE=2: .*zero1.json"):
        deepspeed_plugin(TrainingSection())


def test_the_table_knows_every_variable_of_accelerates():
    """docs/distributed.md says of each what becomes of it."""
    table = (ROOT / "docs" / "distributed.md").read_text()
    begins = set(re.findall(r"`([A-Z0-9_]+_)\*`", table))
    told = set(re.findall(r"`([A-Z0-9_]+)`", table))
    read: set[str] = set()
    package = Path(accelerate.__file__).parent
    for path in package.rglob("*.py"):
        if "test_utils" in path.parts or path.is_relative_to(package / "commands"):
            continue
        read |= set(re.findall(r"""["'](ACCELERATE_[A-Z0-9_]+[A-Z0-9])["']""", path.read_text()))
    assert len(read) > 30
    assert {n for n in read - told if not n.startswith(tuple(begins))} == set()
