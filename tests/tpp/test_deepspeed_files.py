"""Folders that DeepSpeed itself wrote, on one rank and on two, read without it.

tests/tpp/deepspeed_worker.py runs once for each number of ranks. Weights are compared
with DeepSpeed's zero_to_fp32.py, weights and the optimiser's states with what DeepSpeed gathered
from its ranks, and in float32 with the same training in plain torch.
"""

import copy
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_worker as worker
import pytest
import torch
from fork_server import Forks
from safetensors.torch import load_file
from torch import Tensor

from tpp import prune
from tpp.checkpoints.deepspeed_files import DeepSpeedState, is_deepspeed_folder, read_deepspeed
from tpp.checkpoints.model_file import read_checkpoint
from tpp.common.errors import UserError
from tpp.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZES = (1, 2)
STEP_FOLDER = f"global_step{worker.STEPS}"
CASES = [*worker.ZERO_CASES, *worker.SPECIAL_CASES]
TRAINED = {name for name, p in worker.network().named_parameters() if p.requires_grad}

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folders(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Where the worker wrote its cases, for each number of ranks."""
    found = {}
    for world_size in WORLD_SIZES:
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        result = forks.run(world_size, Path(worker.__file__), [str(folder)], folder, 540)
        assert result.returncode == 0, result.stdout + result.stderr
        found[world_size] = folder
    return found


@pytest.fixture
def copied(folders: dict[int, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one case of two ranks, to damage."""

    def copy_case(case: str) -> Path:
        return Path(shutil.copytree(folders[2] / case, tmp_path / case))

    return copy_case


def parts_of(case: str) -> tuple[int, str, str]:
    return worker.ZERO_CASES[case] if case in worker.ZERO_CASES else worker.SPECIAL_CASES[case][0]


def truth_of(folder: Path, case: str, key: str) -> dict[str, Tensor]:
    start = f"{case}/{key}/"
    truth = load_file(folder / "truth.safetensors")
    return {n.removeprefix(start): tensor for n, tensor in truth.items() if n.startswith(start)}


def assert_equal(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def edit_file(path: Path, edit: Edit) -> None:
    data = torch.load(path, weights_only=False)
    edit(data)
    torch.save(data, path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_and_states_are_what_deepspeed_gathered(folders, world_size, case):
    _, optimizer, _ = parts_of(case)
    found = read_deepspeed(folders[world_size] / case)
    truth = truth_of(folders[world_size], case, "weights")
    assert truth.keys() == TRAINED
    assert_equal({name: found.tensors[name] for name in truth}, truth)
    assert found.optimizer.keys() == set(worker.STATES[optimizer])
    for key, states in found.optimizer.items():
        assert any(state.abs().max() > 0 for state in states.values())
        assert_equal(states, truth_of(folders[world_size], case, key))
    assert found.step == worker.STEPS and found.not_read is None
    assert found.source == folders[world_size] / case / STEP_FOLDER


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_state_dict_is_whole(folders, world_size, case):
    found = read_deepspeed(folders[world_size] / case).tensors
    net = worker.network()
    assert list(found) == list(net.state_dict())
    assert found["head.weight"] is found["fc.weight"]
    assert {t.dtype for t in found.values()} == {torch.float32, torch.int64}
    assert torch.equal(found["scale"], net.scale)
    assert found["bn1.num_batches_tracked"] == worker.STEPS
    net.load_state_dict(found)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("zero0")])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_it_agrees_with_zero_to_fp32(folders, world_size, case):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = read_deepspeed(folders[world_size] / case).tensors
    if case == "zero1-fp32-gradients":
        with pytest.raises(ValueError, match="not a zero checkpoint"):
            get_fp32_state_dict_from_zero_checkpoint(str(folders[world_size] / case))
        return
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folders[world_size] / case))
    # Under ZeRO 1 the frozen parameter is missing there.
    assert found.keys() - theirs.keys() == ({"scale"} if case.startswith("zero1") else set())
    assert_equal(
        {n: found[n] for n in theirs}, {n: t.to(found[n].dtype) for n, t in theirs.items()}
    )


@pytest.mark.parametrize("optimizer", worker.OPTIMIZERS)
@pytest.mark.parametrize("stage", worker.STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_float32_training_is_that_of_plain_torch(folders, world_size, stage, optimizer):
    tensors, states = trained_in_plain_torch(world_size, optimizer)
    found = read_deepspeed(folders[world_size] / f"zero{stage}-{optimizer}-fp32")
    start = worker.network().state_dict()
    for name in TRAINED:
        assert not torch.allclose(tensors[name], start[name], rtol=1e-3, atol=1e-5), name
    for name, tensor in tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    for key, truth in states.items():
        assert found.optimizer[key].keys() == truth.keys() == TRAINED
        for name, tensor in truth.items():
            torch.testing.assert_close(found.optimizer[key][name], tensor, rtol=1e-4, atol=1e-6)
    steps = {"step": dict.fromkeys(TRAINED, float(worker.STEPS))} if optimizer == "adam" else {}
    assert found.scalars == steps


def trained_in_plain_torch(
    world_size: int, kind: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Rank 0's state_dict and the optimiser's states: averaged gradients, BatchNorm by rank."""
    net = worker.network()
    optimizer = worker.optimizer_of(worker.named_groups(net), kind)
    for step in range(worker.STEPS):
        ranks = [net, *(copy.deepcopy(net) for _ in range(1, world_size))]
        for rank, replica in enumerate(ranks):
            replica.zero_grad()
            worker.loss_of(replica(worker.images(rank, step))).backward()
        for parameters in zip(*(replica.parameters() for replica in ranks), strict=True):
            if parameters[0].requires_grad:
                parameters[0].grad = sum(p.grad for p in parameters) / world_size
        optimizer.step()
    named = [pair for group in worker.named_groups(net) for pair in group]
    states = {
        key: {name: optimizer.state[parameter][key] for name, parameter in named}
        for key in worker.STATES[kind]
    }
    return net.state_dict(), states


def test_zero_0_leaves_states_unnamed_that_shapes_do_not_tell_apart(folders):
    found = read_deepspeed(folders[2] / "zero0-ambiguous")
    truth = truth_of(folders[2], "zero0-ambiguous", "weights")
    assert_equal({name: found.tensors[name] for name in truth}, truth)
    assert found.optimizer == {} and found.scalars == {}
    assert "does not record whose they are" in found.not_read


def test_zero_0_gives_up_where_nearly_everything_is_possible(tmp_path):
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(20)))
    optimizer = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    data = {"module": net.state_dict(), "buffer_names": [], "optimizer": optimizer.state_dict()}
    torch.save(data, tmp_path / "mp_rank_00_model_states.pt")
    found = read_deepspeed(tmp_path)
    assert_equal(found.tensors, net.state_dict())
    assert found.optimizer == {} and "in its 40 parameter groups" in found.not_read
    assert found.step is None


def test_zero_0_takes_names_that_the_optimizer_recorded(folders):
    found = read_deepspeed(folders[2] / "zero0-named")
    truth = truth_of(folders[2], "zero0-named", "momentum_buffer")
    assert_equal(found.optimizer["momentum_buffer"], truth)
    assert found.not_read is None


def test_a_folder_of_accelerate(folders):
    folder = folders[2] / "accelerate"
    assert is_deepspeed_folder(folder)
    found = read_deepspeed(folder)
    assert found.source == folder / "pytorch_model"
    same = read_deepspeed(folders[2] / "zero2-sgd-fp32")
    assert_equal(found.tensors, same.tensors)
    assert_equal(found.optimizer["momentum_buffer"], same.optimizer["momentum_buffer"])


def test_a_step_folder_by_itself(folders, tmp_path):
    folder = folders[2] / "zero2-sgd-fp32" / STEP_FOLDER
    assert is_deepspeed_folder(folder)
    assert_equal(read_deepspeed(folder).tensors, read_deepspeed(folder.parent).tensors)
    assert not is_deepspeed_folder(tmp_path)
    assert not is_deepspeed_folder(tmp_path / "missing")
    assert not is_deepspeed_folder(next(folder.glob("*_model_states.pt")))


def test_the_tensors_do_not_depend_on_the_files(copied):
    folder = copied("zero3-sgd-fp32")
    found = read_deepspeed(folder)
    before = copy.deepcopy(found.tensors)
    for file in folder.rglob("*.pt"):
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    assert_equal(found.tensors, before)


def test_gaps_after_single_parameters(copied):
    """As some optimisers want them; DeepSpeed's own reader is the judge."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = copied("zero1-sgd-fp32")
    original = read_deepspeed(folder)
    gaps = [[3, 0, 0], [0] * 7]

    def widened(vector: Tensor) -> Tensor:
        return torch.cat([vector[:135], torch.full((3,), 7.0), vector[135:]])

    def shift(data: dict[str, Any], rank: int) -> None:
        state = data["optimizer_state_dict"]
        state["param_alignment_paddings"] = gaps
        if rank == 0:  # conv1.weight, the first of its group, has 135 values
            vectors = state["single_partition_of_fp32_groups"]
            vectors[0] = widened(vectors[0])
            momentum = state["base_optimizer_state"]["state"][0]
            momentum["momentum_buffer"] = widened(momentum["momentum_buffer"])

    for rank in range(2):
        file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        edit_file(folder / STEP_FOLDER / file, lambda data, rank=rank: shift(data, rank))
    found = read_deepspeed(folder)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    assert_equal({name: found.tensors[name] for name in theirs}, theirs)
    assert_equal(found.tensors, original.tensors)
    assert_equal(found.optimizer["momentum_buffer"], original.optimizer["momentum_buffer"])


def test_states_that_have_no_entry_for_each_weight_are_named(copied):
    folder = copied("zero2-sgd-fp32")

    def shorten(data: dict[str, Any]) -> None:
        state = data["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
        state["momentum_buffer"] = state["momentum_buffer"][:10]

    edit_file(folder / STEP_FOLDER / "zero_pp_rank_1_mp_rank_00_optim_states.pt", shorten)
    found = read_deepspeed(folder)
    assert found.not_read == "the optimizer's momentum_buffer: without an entry for each weight"
    assert "conv1.weight" not in found.optimizer["momentum_buffer"]


# Safety.


class Hostile:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["model", "optim"])
def test_nothing_is_executed(copied, tmp_path, where, zipped):
    folder = copied("zero2-sgd-fp32")
    marker = tmp_path / "executed"
    file = next((folder / STEP_FOLDER).glob(f"*{where}_states.pt"))
    data = torch.load(file, weights_only=False)
    data["extra"] = Hostile(f"touch {marker}")
    torch.save(data, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        read_deepspeed(folder)
    assert not marker.exists()
    message = str(error.value)
    assert message.startswith(f"{file}: holds {os.system.__module__}.system, ")
    assert "zero_to_fp32.py" in message and "\n" not in message
    torch.load(file, weights_only=False)  # ordinary reading does execute it
    assert marker.exists()


def test_an_unknown_class_is_refused(copied):
    folder = copied("zero1-sgd-fp32")
    file = folder / STEP_FOLDER / "mp_rank_00_model_states.pt"
    edit_file(file, lambda data: data.update(buffer=io.BytesIO()))
    with pytest.raises(UserError, match=r"holds _io\.BytesIO, and reading that could run any"):
        read_deepspeed(folder)


def test_the_stand_ins_are_known_during_the_reading_only(folders):
    before = set(torch.serialization.get_safe_globals())
    read_deepspeed(folders[2] / "zero2-objects")
    assert set(torch.serialization.get_safe_globals()) == before
    file = folders[2] / "zero2-objects" / STEP_FOLDER / "mp_rank_00_model_states.pt"
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(file, weights_only=True)


def test_deepspeed_need_not_be_there(folders):
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from tpp.checkpoints.deepspeed_files import read_deepspeed\n"
        "for folder in sys.argv[1:]: print(len(read_deepspeed(folder).tensors))\n"
        "try: import deepspeed\n"
        "except ImportError: print('no deepspeed')\n"
        "print([n for n in sys.modules if n.startswith('deepspeed.')])"
    )
    cases = ["zero0-adam-bf16", "zero1-sgd-fp32", "zero2-objects", "zero3-adam-bf16"]
    result = subprocess.run(
        [sys.executable, "-c", code, *(str(folders[2] / case) for case in cases)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split("\n")[:6] == ["18"] * 4 + ["no deepspeed", "[]"], result.stderr


# Damaged and foreign folders: the message is one line that begins with the path.

MODEL = "mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def edited(file: str, edit: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_file(folder / file, edit)


def cut(folder: Path) -> None:
    file = folder / OPTIM.format(1)
    file.write_bytes(file.read_bytes()[:-2000])


def overwrite(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"not a checkpoint at all")


def widen(data: dict[str, Any]) -> None:
    data["param_shapes"][0]["conv1.weight"] = torch.Size([50, 3, 3, 3])


def to_zero_0(data: dict[str, Any]) -> None:
    data["param_shapes"] = None


def no_frozen(data: dict[str, Any]) -> None:
    data["frozen_param_fragments"] = {}


def fewer_vectors(data: dict[str, Any]) -> None:
    del data["optimizer_state_dict"]["single_partition_of_fp32_groups"][1]


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "last rank": (
        "zero1-sgd-fp32",
        lambda folder: (folder / OPTIM.format(1)).unlink(),
        "2 ranks wrote it, but there are 1 files .*optim_states.pt; copy those of all ranks",
    ),
    "first rank": (
        "zero1-sgd-fp32",
        lambda folder: (folder / OPTIM.format(0)).unlink(),
        "lacks zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
    "no rank": (
        "zero2-sgd-fp32",
        lambda folder: [(folder / OPTIM.format(rank)).unlink() for rank in range(2)],
        "2 ranks wrote it, but there are 0 files",
    ),
    "stage 3 model of a rank": (
        "zero3-sgd-fp32",
        lambda folder: (folder / f"zero_pp_rank_1_{MODEL}").unlink(),
        "2 ranks wrote it, but there are 1 files .*model_states.pt",
    ),
    "truncated": ("zero2-sgd-fp32", cut, "zero_pp_rank_1.*: not a whole PyTorch file"),
    "no file of torch": ("zero2-sgd-fp32", overwrite, ": neither a safetensors file nor"),
    "no dict": (
        "zero2-sgd-fp32",
        lambda folder: torch.save([1], folder / MODEL),
        "not as DeepSpeed 0.19 writes it: it holds of type list",
    ),
    "empty": (
        "zero2-sgd-fp32",
        lambda folder: torch.save({}, folder / MODEL),
        "not as DeepSpeed 0.19 writes it: 'module' is missing|ZeRO 1 to 3, but",
    ),
    "another world size": (
        "zero2-sgd-fp32",
        edited(MODEL, lambda data: data.update(dp_world_size=4)),
        "4 ranks wrote it, but there are 2 files",
    ),
    "another partition count": (
        "zero2-sgd-fp32",
        edited(
            OPTIM.format(1), lambda data: data["optimizer_state_dict"].update(partition_count=[4])
        ),
        r"split into \[4\] parts, but 2 ranks wrote the folder",
    ),
    "tensor parallel file": (
        "zero1-sgd-fp32",
        lambda folder: shutil.copy(folder / MODEL, folder / "mp_rank_01_model_states.pt"),
        "mp_rank_01_model_states.pt: the network was split by tensor, pipeline or expert",
    ),
    "pipeline file": (
        "zero1-sgd-fp32",
        lambda folder: (folder / "layer_00-model_states.pt").touch(),
        "layer_00-model_states.pt: the network was split by tensor, pipeline or expert",
    ),
    "tensor parallel": (
        "zero2-sgd-fp32",
        edited(MODEL, lambda data: data.update(mp_world_size=2)),
        "split by tensor or pipeline parallelism",
    ),
    "pipeline": (
        "zero2-sgd-fp32",
        edited(MODEL, lambda data: data["checkpoint_parallel_dimensions"].update(pp_degree=2)),
        "split by tensor or pipeline parallelism",
    ),
    "another network": (
        "zero2-sgd-fp32",
        edited(MODEL, widen),
        "a group of parameters has 1714 values, but the ranks' vectors hold 499",
    ),
    "another network, stage 3": (
        "zero3-sgd-fp32",
        edited(f"zero_pp_rank_0_{MODEL}", widen),
        "a group of parameters has 858 values, but the ranks' vectors hold 251",
    ),
    "other vectors": (
        "zero2-sgd-fp32",
        edited(OPTIM.format(0), fewer_vectors),
        "'single_partition_of_fp32_groups' are not 2 tensors",
    ),
    "two precisions": (
        "zero2-sgd-fp32",
        lambda folder: shutil.copy(folder / OPTIM.format(0), folder / f"bf16_{OPTIM.format(0)}"),
        "holds both bf16_zero_pp_rank_0.* and zero_pp_rank_0.*; remove that of the older run",
    ),
    "two stages of models": (
        "zero3-sgd-fp32",
        lambda folder: shutil.copy(folder / f"zero_pp_rank_0_{MODEL}", folder / MODEL),
        "of different ZeRO stages; remove the files of the older run",
    ),
    "two stages of states": (
        "zero2-sgd-fp32",
        edited(OPTIM.format(0), lambda data: data["optimizer_state_dict"].update(zero_stage=3)),
        "is of ZeRO 3, but the network's file is not",
    ),
    "stage 0 beside others": (
        "zero2-sgd-fp32",
        edited(MODEL, to_zero_0),
        "is of ZeRO 1 to 3, but mp_rank_00_model_states.pt is of ZeRO 0",
    ),
    "no frozen parameter": (
        "zero3-sgd-fp32",
        edited(f"zero_pp_rank_1_{MODEL}", no_frozen),
        "a rank's file lacks the frozen scale",
    ),
    "no state_dict": (
        "zero0-sgd-fp32",
        edited(MODEL, lambda data: data["module"].update(fc=3)),
        "its 'module' is no state_dict: fc is of type int",
    ),
    "nonsense": (
        "zero2-sgd-fp32",
        edited(MODEL, lambda data: data.update(param_shapes=[{"conv1.weight": "ab"}, {}])),
        "not as DeepSpeed 0.19 writes it",
    ),
    "nowhere": (
        "zero3-sgd-fp32",
        edited(f"zero_pp_rank_0_{MODEL}", lambda data: data["module"].update(x=torch.empty(0))),
        "names x, but no rank's file holds its values",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(copied, damage):
    case, harm, message = DAMAGE[damage]
    folder = copied(case)
    harm(folder / STEP_FOLDER)
    with pytest.raises(UserError, match=message) as error:
        read_deepspeed(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder / STEP_FOLDER))


def test_latest_has_to_name_a_step_folder(copied, tmp_path):
    folder = copied("zero1-sgd-fp32")
    for tag, message in (
        ("global_step9", "latest: names 'global_step9', and there is no such folder beside it"),
        ("", "latest: names ''"),
        ("empty", "empty: holds no "),
    ):
        (folder / "empty").mkdir(exist_ok=True)
        (folder / "latest").write_text(tag)
        assert is_deepspeed_folder(folder)
        with pytest.raises(UserError, match=message):
            read_deepspeed(folder)
    with pytest.raises(UserError, match=r"no DeepSpeed checkpoint: neither latest nor \*_model"):
        read_deepspeed(folder / "empty")
    with pytest.raises(UserError, match="no such folder"):
        read_deepspeed(tmp_path / "missing")


def test_the_result_cannot_be_changed(folders):
    found = read_deepspeed(folders[1] / "zero0-sgd-fp32")
    assert isinstance(found, DeepSpeedState)
    with pytest.raises(AttributeError):
        found.step = 5


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_folder_is_pruned_with_its_momentum(
    folders, tmp_path, monkeypatch, capsys, stage, world_size
):
    case = f"resnet8-zero{stage}"
    out = tmp_path / "pruned.safetensors"
    arguments = ["--checkpoint", str(folders[world_size] / case), "--output", str(out)]
    arguments += ["--model", "cifar_resnet8", "--ratio", "layer*.conv1=0.5"]
    monkeypatch.setattr(sys, "argv", ["prune", *arguments, "--save-plan", str(tmp_path / "plan")])
    prune.main()
    assert "with optimizer.momentum_buffer" in capsys.readouterr().out
    plan = PruningPlan.load(tmp_path / "plan")
    assert len(plan.active_layers) == 3
    tensors, companions, _ = read_checkpoint(out)
    momentum = truth_of(folders[world_size], case, "momentum_buffer")
    weights = truth_of(folders[world_size], case, "weights")
    assert companions["optimizer.momentum_buffer"].keys() == momentum.keys()
    kept = plan.kept("layer2.0.conv1")
    for found, truth in (
        (tensors, weights),
        (companions["optimizer.momentum_buffer"], momentum),
    ):
        assert torch.equal(found["layer2.0.conv1.weight"], truth["layer2.0.conv1.weight"][kept])
        assert torch.equal(found["layer2.0.conv2.weight"], truth["layer2.0.conv2.weight"][:, kept])
        assert torch.equal(found["layer2.0.bn1.bias"], truth["layer2.0.bn1.bias"][kept])
        assert torch.equal(found["linear.weight"], truth["linear.weight"])
