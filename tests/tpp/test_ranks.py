"""The sharded penalty under real ranks: DDP, DeepSpeed, Accelerate, over gloo on the CPU.

tests/tpp/rank_worker.py runs once per number of ranks; what the ranks wrote is compared
here with METHOD's equations in float64, on one process, by plain autograd over full gram matrices.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_worker as worker
import torch
import torch.nn.functional as F
from fork_server import Forks
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
EPSILON = torch.finfo(torch.float32).eps
# Relative, of the norm of each tensor: some roundings of a sum over 48 samples and 4 ranks.
GRADIENT_BOUND = 8 * EPSILON
VALUE_BOUND = 4 * EPSILON

WORLD_SIZES = (1, 2, 3, 4)
ENGINES = (
    "ddp",
    "deepspeed-zero0",
    "deepspeed-zero1",
    "deepspeed-zero2",
    "accelerate-ddp",
    "accelerate-zero0",
    "accelerate-zero1",
    "accelerate-zero2",
)
VECTORS = {"conv1": ["bn1.weight", "bn1.bias"], "conv2": ["conv2.bias"], "fc1": ["fc1.bias"]}


@dataclass
class Ranks:
    """What every rank wrote."""

    tensors: list[dict[str, Tensor]]
    facts: list[dict[str, Any]]

    def of(self, rank: int, prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors[rank].items()
            if name.startswith(start)
        }


@pytest.fixture(scope="module")
def ranks(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """Run the worker on so many ranks, once."""
    done: dict[int, Ranks] = {}
    failed: dict[int, str] = {}

    def run(world_size: int) -> Ranks:
        if world_size not in done and world_size not in failed:
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            sections = ["gradients", "shares"]
            if world_size == 2:
                sections += ["trajectory", "precision", "collectives", "refusals"]
            script = Path(worker.__file__)
            result = forks.run(world_size, script, [str(folder), *sections], folder, 540)
            if result.returncode:
                failed[world_size] = result.stdout + result.stderr
            else:
                done[world_size] = read(folder, world_size)
        if world_size in failed:
            pytest.fail(failed[world_size])
        return done[world_size]

    return run


def read(folder: Path, world_size: int) -> Ranks:
    names = [f"rank{rank}" for rank in range(world_size)]
    return Ranks(
        [load_file(folder / f"{name}.safetensors") for name in names],
        [json.loads((folder / f"{name}.json").read_text()) for name in names],
    )


def penalty_by_hand(parameters: dict[str, Tensor], strength: float) -> Tensor:
    """METHOD.md, section 2: the gram penalty and the decay, as a function to differentiate."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, pruned in worker.PLAN.pruned.items():
        W = parameters[f"{layer}.weight"].flatten(1)
        n = len(W)
        M = torch.zeros(n, n, dtype=torch.float64)
        M[pruned, :] = 1
        M[:, pruned] = 1
        total = total + worker.GRAM_WEIGHT * strength / n**2 * (M * (W @ W.T) ** 2).sum()
        for decayed in (W, *(parameters[name] for name in VECTORS[layer])):
            total = total + strength * decayed[pruned].square().sum() / 2
    return total


def gradients_by_hand(net: nn.Module, strength: float, *, task: bool = True) -> dict[str, Tensor]:
    """Gradients of the whole batch's loss plus penalty; of the penalty alone without ``task``."""
    parameters = dict(net.named_parameters())
    loss = penalty_by_hand(parameters, strength)
    if task:
        images, labels = worker.samples()
        loss = loss + F.cross_entropy(net(images.double()), labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def reference_network() -> nn.Module:
    return worker.network().double().eval()


def relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def test_the_penalty_weighs_as_much_as_the_task():
    """Or else the comparison below would not see it."""
    task = gradients_by_hand(reference_network(), 0.0)
    penalty = gradients_by_hand(reference_network(), 0.4, task=False)
    for layer, vectors in VECTORS.items():
        for name in (f"{layer}.weight", *vectors):
            assert 0.1 < penalty[name].norm() / task[name].norm() < 10, name


@pytest.mark.parametrize("accumulation", worker.ACCUMULATIONS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_averaged_gradient_is_that_of_one_process(ranks, world_size, engine, accumulation):
    strength = worker.GROWTH.strength(worker.STEP)
    assert strength == pytest.approx(0.4)
    truth = gradients_by_hand(reference_network(), strength)
    found = ranks(world_size)
    for rank in range(world_size):
        gradients = found.of(rank, f"gradients/{engine}-{accumulation}")
        assert gradients.keys() == truth.keys()
        for name, gradient in gradients.items():
            assert relative_error(gradient, truth[name]) <= GRADIENT_BOUND, (rank, name)


def weights_by_hand() -> dict[str, Tensor]:
    """SGD with momentum, weight decay and zeroing, in float64."""
    net = reference_network()
    sgd = worker.TRAJECTORY_SGD
    momenta = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in worker.TRAJECTORY:
        gradients = gradients_by_hand(net, min(1.0, 0.1 * step))
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                gradient = gradients[name] + sgd["weight_decay"] * parameter
                momenta[name] = sgd["momentum"] * momenta[name] + gradient
                parameter -= sgd["lr"] * momenta[name]
            for number, (layer, pruned) in enumerate(worker.PLAN.pruned.items()):
                if step - 10 >= number + 1:  # growth ends with step 10, a layer a step follows
                    for name in (f"{layer}.weight", *VECTORS[layer]):
                        net.get_parameter(name)[pruned] = 0.0
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("engine", [name for name in ENGINES if "accelerate" not in name])
def test_trajectory_with_zeroed_layers_is_that_of_one_process(ranks, engine):
    """Also under ZeRO 1 and 2, whose optimiser has a copy of the weights that is not zeroed."""
    truth = weights_by_hand()
    for rank in range(2):
        for name, weight in ranks(2).of(rank, f"trajectory/{engine}").items():
            assert relative_error(weight, truth[name]) <= GRADIENT_BOUND, (rank, name)
        for layer, pruned in worker.PLAN.pruned.items():
            for name in (f"{layer}.weight", *VECTORS[layer]):
                weight = ranks(2).of(rank, f"trajectory/{engine}")[name]
                assert weight[pruned].abs().max() == 0 < weight.abs().max()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_knows_what_every_rank_computes(ranks, world_size):
    shares = [facts["shares"] for facts in ranks(world_size).facts]
    plan, units = shares[0]["plan"], shares[0]["units"]
    assert sum(map(len, plan.values())) == 168  # half of 3 x 16 + 3 x 32 + 3 x 64 filters
    owned: dict[str, list[int]] = {layer: [] for layer in plan}
    for rank, share in enumerate(shares):
        assert share["plan"] == plan and share["units"] == units
        assert share["mine"] == units[rank]
        for layer, rows in units[rank]:
            owned[layer] += rows
    assert owned == plan


PRECISIONS = ("autocast", *(f"deepspeed-bf16-zero{stage}" for stage in worker.STAGES))


@pytest.mark.parametrize("case", PRECISIONS)
def test_penalty_is_computed_in_float32_whatever_the_precision(ranks, case):
    found = ranks(2)
    shares = [facts["precision"][case] for facts in found.facts]
    weights = found.of(0, f"precision/{case}")
    dtype = torch.float32 if case == "autocast" else torch.bfloat16
    assert {weight.dtype for weight in weights.values()} == {dtype}
    truth = penalty_by_hand({name: w.double() for name, w in weights.items()}, 0.4).item()
    assert {share["dtype"] for share in shares} == {"torch.float32"}
    value = sum(share["share"] for share in shares) / 2
    assert abs(value - truth) <= VALUE_BOUND * truth


def test_gradient_of_the_penalty_is_not_lowered_by_autocast(ranks):
    found = ranks(2)
    truth = gradients_by_hand(reference_network(), 0.4, task=False)
    parts = [found.of(rank, "precision/autocast-gradient") for rank in range(2)]
    for name in set(parts[0]) | set(parts[1]):
        gradient = sum(part.get(name, torch.zeros(1)).double() for part in parts) / 2
        assert relative_error(gradient, truth[name]) <= GRADIENT_BOUND, name


@pytest.mark.parametrize("rank", [0, 1])
def test_the_penalty_communicates_nothing(ranks, rank):
    facts = ranks(2).facts[rank]["collectives"]
    assert facts["nothing"] == facts["building"] == []
    # The counter counts: the averaging of all gradients, and one more if there is one.
    assert facts["plain"].count(["gloo:all_reduce", 4 * facts["parameters"]]) == 1
    assert facts["one more"] == sorted([*facts["penalty"], ["gloo:all_reduce", 4 * 17]])
    assert facts["penalty"] == facts["plain"]
    for stage in worker.STAGES:
        without, with_penalty = facts[f"zero{stage}"]
        assert with_penalty == without != []


@pytest.mark.parametrize("case", ["zero3", "fsdp2", "fsdp1", "zero.Init"])
def test_parameters_split_over_ranks_are_refused(ranks, case):
    for facts in ranks(2).facts:
        whole, *refusals = facts["refusals"][case]
        assert whole is None  # the same regulariser worked before
        for message in refusals:
            assert message is not None and "\n" not in message
            assert re.match(r"(conv1|conv2|fc1): its weight is split over ranks", message)
            assert "use DistributedDataParallel or ZeRO stage 0, 1 or 2" in message


@pytest.mark.parametrize("step", ["ddp_step", "deepspeed_step", "accelerate_step"])
def test_documentation_shows_what_the_ranks_ran(step):
    lines = inspect.getsource(getattr(worker, step)).splitlines()
    body = textwrap.dedent("\n".join(lines[lines.index(") -> None:") + 1 :]))
    blocks = re.findall(r"```python\n(.*?)\n```", (ROOT / "docs/distributed.md").read_text(), re.S)
    assert body in blocks
