"""DeepSpeed's ZeRO 0, 1 and 2 train the network that DistributedDataParallel trains."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from engine_worker import CASES, CONFIGS, ENGINES, RESUMED, RESUMED_ADAMW, RESUMED_ON_FOUR
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from train.config.sections import TrainingSection
from train.distributed.accelerator import make_accelerator
from train.distributed.deepspeed_engine import deepspeed_plugin
from train.distributed.engine import settle_buckets

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "engine_worker.py"
# Whichever test is the first waits for all that is trained, and for DeepSpeed's own compiling.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def trained(forks, tmp_path_factory) -> Callable[[int], Path]:
    """What all engines trained on so many ranks; once for all tests."""
    done: dict[int, subprocess.CompletedProcess[str]] = {}
    folder = tmp_path_factory.mktemp("engines")

    def on(ranks: int) -> Path:
        mine = folder / str(ranks)
        if ranks not in done:
            mine.mkdir()
            done[ranks] = forks.run(ranks, WORKER, [str(mine)], mine, 1400)
        assert done[ranks].returncode == 0, done[ranks].stdout[-3000:] + done[ranks].stderr[-3000:]
        assert json.loads((mine / "ranks.json").read_text()) == ranks
        return mine

    return on


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    found = load_file(folder / f"{name}.safetensors")
    return {k: v for k, v in found.items() if v.is_floating_point() and "momentum/" not in k}


def momentum(folder: Path, name: str) -> Tensor:
    """That of the first and the last layer, of which no filter goes."""
    found = load_file(folder / f"{name}.safetensors")
    numbers = sorted(int(key.rpartition("/")[2]) for key in found if "momentum/" in key)
    ends = [found[f"momentum/{number}"] for number in (numbers[0], *numbers[-2:])]
    return torch.cat([tensor.flatten() for tensor in ends])


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative distance (L2) of all weights together."""
    assert one.keys() == other.keys()
    mine, its = (
        torch.cat([v.flatten() for k, v in w.items() if k != "norms"]) for w in (one, other)
    )
    return ((mine - its).norm() / its.norm()).item()


@pytest.mark.parametrize(
    ("ranks", "case"), [*((2, case) for case in (*CASES, "adamw")), (4, "all")]
)
def test_the_engines_agree(trained, ranks, case):
    """After 24 steps, of which the last ones zero layers out, and in the momentum."""
    folder = trained(ranks)
    reference = weights(folder, f"ddp-{case}")
    zeros = reference["layer1.0.conv1.weight"].flatten(1).abs().sum(1) == 0
    assert zeros.sum() == 8, "TPP has not come to its end"
    for engine in ENGINES:
        found = weights(folder, f"{engine}-{case}")
        # Rounding, until the steps have magnified it: a gradient's norm jumps where a unit of ReLU
        # is switched on or off.
        assert torch.allclose(found["norms"][:8], reference["norms"][:8], rtol=1e-5), engine
        assert torch.allclose(found["norms"], reference["norms"], rtol=1e-2), engine
        assert apart(found, reference) < 1e-4, engine
        mine, its = momentum(folder, f"{engine}-{case}"), momentum(folder, f"ddp-{case}")
        assert (mine - its).norm() < 1e-2 * its.norm(), engine
    if case not in ("plain", "all"):
        plain = weights(folder, "ddp-plain")
        assert apart(reference, plain) > 1e-7, "the case makes no difference"


@pytest.mark.parametrize(
    ("first", "second", "case"),
    [*((*pair, "plain") for pair in RESUMED), *((*pair, "adamw") for pair in RESUMED_ADAMW)],
)
def test_a_run_broken_off_goes_on_under_any_engine(trained, first, second, case):
    folder = trained(2)
    resumed = f"{first}-{second}-{'adamw-' if case == 'adamw' else ''}resumed"
    found, whole = weights(folder, resumed), weights(folder, f"{second}-{case}")
    del found["norms"], whole["norms"]  # of the second half only
    if first == second:
        assert all(found[key].equal(whole[key]) for key in whole)
    assert apart(found, whole) < 1e-4
    mine, its = (momentum(folder, name) for name in (resumed, f"{second}-{case}"))
    assert (mine - its).norm() < 1e-2 * its.norm()


@pytest.mark.parametrize(("first", "second"), RESUMED_ON_FOUR)
def test_a_run_of_four_ranks_goes_on_to_the_bit(trained, first, second):
    folder = trained(4)
    found = weights(folder, f"{first}-{second}-resumed")
    whole = weights(folder, f"{second}-all")
    del found["norms"], whole["norms"]  # of the second half only
    assert all(found[key].equal(whole[key]) for key in whole)
    mine, its = (momentum(folder, name) for name in (f"{first}-{second}-resumed", f"{second}-all"))
    assert mine.equal(its)


def test_settling_the_buckets_changes_nothing_else():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = build_model("cifar_resnet8", 4)
        model = DistributedDataParallel(network)
        seen: list[nn.Module] = []
        network.register_forward_hook(lambda module, *_: seen.append(module))
        before = {key: value.clone() for key, value in network.state_dict().items()}
        numbers = torch.get_rng_state()
        settle_buckets(model)
        assert model.module is network and model.broadcast_buffers
        assert all(value.equal(before[key]) for key, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())
        assert torch.get_rng_state().equal(numbers) and not seen
        model(torch.zeros(2, 3, 8, 8)).sum().backward()
        assert seen == [network] and all(p.grad is not None for p in network.parameters())
    finally:
        dist.destroy_process_group()


def test_a_killed_run_goes_on_and_is_pruned_like_any_other(tiny_config, tmp_path, run_main):
    """All stages; by accelerate launch undisturbed, and by torchrun killed and gone on."""
    whole, broken = (copy.deepcopy(tiny_config) for _ in range(2))
    whole["output"], broken["output"] = str(tmp_path / "whole"), str(tmp_path / "broken")
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    launcher = ROOT / "launch" / "accelerate" / "deepspeed_zero2.yaml"
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("accelerate")), "launch"),
            *("--config_file", str(launcher), "--num_processes", "2"),
            *(str(ROOT / "train" / "main.py"), "--config", str(path)),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "extensions").exists(), "something was compiled"
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["engine"] == "DeepSpeed, ZeRO stage 2" and results["ranks"] == 2
    assert results["stages"]["prune"]["removed_magnitude"] == 0

    zero2 = f"training.deepspeed={CONFIGS / 'zero2.json'}"
    checkpoint = tmp_path / "broken" / "regularize" / "checkpoints" / "step-00000005"
    run_main(broken, zero2, ranks=2, kill_when=checkpoint)
    gone_on = run_main(broken, zero2, ranks=2)
    assert "regularize: resumed after" in gone_on.stdout
    one, other = (
        load_file(tmp_path / name / "finetune" / "model.safetensors")
        for name in ("whole", "broken")
    )
    assert all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, "splits every layer's weights over the ranks"),
        ({"zero_optimization": {"stage": "1"}}, 'must be 0, 1 or 2, not "1"'),
        ({"zero_optimization": [1]}, "must be 0, 1 or 2, not null"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is not supported",
        ),
        ({"bf16": {"enabled": True}}, "bf16: training.precision says so"),
        ({"train_batch_size": 64}, "train_batch_size: training.batch_size says so"),
        ([], "an object of keys and values"),
    ],
)
def test_what_deepspeed_may_not_be_told(tmp_path, content: Any, says: str):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        deepspeed_plugin(TrainingSection(deepspeed=str(path)))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message


def test_what_does_not_go_with_deepspeed(tmp_path):
    zero1 = str(CONFIGS / "zero1.json")
    with pytest.raises(UserError, match=r"training.on_bad_step: skip is not possible with DeepS"):
        deepspeed_plugin(TrainingSection(deepspeed=zero1, on_bad_step="skip"))
    with pytest.raises(UserError, match=r"nowhere.json"):
        deepspeed_plugin(TrainingSection(deepspeed=str(tmp_path / "nowhere.json")))
    with pytest.raises(UserError, match=r"fp16 needs a GPU"):
        make_accelerator("fp16")
    assert deepspeed_plugin(TrainingSection()) is None


@pytest.mark.processes
def test_the_shipped_configurations(monkeypatch):
    """Stages 0 to 2 are taken; 3 is refused, and says why."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    for stage in range(3):
        training = TrainingSection(deepspeed=str(CONFIGS / f"zero{stage}.json"))
        plugin = deepspeed_plugin(training)
        assert plugin is not None and plugin.zero_stage == stage
        assert plugin.deepspeed_config["gradient_clipping"] == 0.0
    with pytest.raises(UserError, match="use stage 0, 1 or 2"):
        deepspeed_plugin(TrainingSection(deepspeed=str(CONFIGS / "zero3.json")))
