"""What a method is told of its stage's first step: against autograd in float64, over ranks."""

import copy
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from first_batch_worker import STAGE, network, opened
from torch import nn

from tpp.common.errors import UserError
from train.stages.first_batch import FirstBatch

WORKER = Path(__file__).with_name("first_batch_worker.py")


def written(tiny_config, tmp_path: Path, **training) -> Path:
    tiny_config["model"]["num_classes"] = 4
    tiny_config["training"] |= training
    tiny_config["stages"] = {STAGE: {"epochs": 1, "optimizer": {"lr": 0.02}}, "evaluate": {}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tiny_config))
    return path


def truth(run, model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    """The mean over micro-batches, each with its own BatchNorm statistics."""
    wide = copy.deepcopy(model).double().train()
    with closing(run.data.train_batches(STAGE, 0, 1)) as batches:
        parts = [(images.double(), labels.clone()) for images, labels in batches]
    torch.manual_seed(1_000_003 * run.config.seed + seed)  # of the first step's dropout
    loss = sum(F.cross_entropy(wide(images), labels) for images, labels in parts) / len(parts)
    return [*torch.autograd.grad(loss, [*wide.parameters()])]


def close(one, other, rtol: float = 1e-4) -> None:
    for mine, its in zip(one, other, strict=True):
        assert (mine.double() - its).norm() <= rtol * its.norm()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_those_of_autograd_and_nothing_else_changes(
    tiny_config, tmp_path, accumulation
):
    run = opened(written(tiny_config, tmp_path, accumulation=accumulation), Accelerator(cpu=True))
    model = network()
    model.layer1.train()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    unused = torch.zeros(2, requires_grad=True)
    *found, nothing = FirstBatch(run, STAGE, model).gradients([*model.parameters(), unused])
    assert torch.get_rng_state().equal(numbers)
    close(found, truth(run, model))
    assert nothing.equal(torch.zeros(2))
    assert [module.training for module in model.modules()] == modes
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_the_precision_of_training_and_with_its_random_numbers(tiny_config, tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.in_bf16 = True  # as under DeepSpeed
    run = opened(written(tiny_config, tmp_path, precision="bf16"), accelerator)
    model, kinds = network(), []
    model.linear = nn.Sequential(nn.Dropout(0.5), model.linear)
    model.conv1.register_forward_hook(lambda *called: kinds.append(called[-1].dtype))
    first = FirstBatch(run, STAGE, model)
    one = first.gradients([model.conv1.weight])[0]
    torch.manual_seed(11)
    assert first.gradients([model.conv1.weight])[0].equal(one)
    assert one.dtype == torch.float32 and {*kinds} == {torch.bfloat16}
    close([one], truth(run, model)[:1], rtol=0.2)
    assert (one - truth(run, model, seed=1)[0]).norm() > 0.5 * one.norm()


def test_weights_that_give_no_numbers_are_one_line(tiny_config, tmp_path):
    run = opened(written(tiny_config, tmp_path), Accelerator(cpu=True))
    model = network()
    model.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="before the first step are not finite"):
        FirstBatch(run, STAGE, model).gradients([model.conv1.weight])


def test_two_ranks_are_one_that_has_all_images(tiny_config, tmp_path, forks):
    """With BatchNorm over all of them; to the bit the same on both."""
    path = written(tiny_config, tmp_path)
    done = forks.run(2, WORKER, [str(path), str(tmp_path)], tmp_path, 120)
    assert done.returncode == 0, done.stderr
    here, there = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(mine.equal(its) for mine, its in zip(here[0], there[0], strict=True))
    assert here[1].tolist() == there[1].tolist() == [0.5, 3.0]
    close(here[0], truth(opened(path, Accelerator(cpu=True)), network()))
