"""An optimiser's state from one training stage into the next, through what removes or masks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpp.checkpoints.model_file import OPTIMIZER, read_checkpoint
from train.config.config import Config
from train.config.sections import MODEL_FILE
from train.distributed.collectives import EveryRankError
from train.distributed.engine import Engine
from train.run import Run


def is_carried(config: Config, name: str) -> bool:
    """Whether a later stage goes on with the state of the optimiser of training stage ``name``."""
    return any(
        stage.carry_optimizer and config.trained_before(other) == name
        for other, stage in config.stages.items()
    )


def state_to_carry(
    config: Config, name: str, network: nn.Module, engine: Engine
) -> dict[str, dict[str, Tensor]]:
    """An optimiser's state as companions of a checkpoint, which are cut and masked along.

    To be asked for on all ranks, each of which may have but a part, and before the accelerator's
    memory is freed, which parts ZeRO's optimiser from the parameters: their state would be zeros.
    Empty where no later stage goes on with it.

    Args:
        config: of the run.
        name: of the training stage that ends.
        network: as it was trained.
        engine: what trained it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    if not is_carried(config, name):
        return found
    names = [parameter for parameter, _ in network.named_parameters()]
    for number, entries in engine.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found.setdefault(f"{OPTIMIZER}{key}", {})[names[number]] = value
    return found


def fitting(companions: Mapping[str, Mapping[str, Tensor]], network: nn.Module) -> dict[str, Any]:
    """Those of parameters that a network has, once what a method added is off it again."""
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    return {
        key: {n: t for n, t in members.items() if t.shape in ((), shapes.get(n))}
        for key, members in companions.items()
    }


def take_up_carried(run: Run, name: str, network: nn.Module, engine: Engine) -> None:
    """Let a stage that begins go on with the optimiser's state that its input holds.

    Raises:
        EveryRankError: it holds none, as an earlier stage was done before one was asked for.
    """
    stage = run.config.stages[name]
    assert stage.input is not None
    path = run.stage_folder(stage.input) / MODEL_FILE
    _, companions, _ = read_checkpoint(path)
    numbers = {key: number for number, (key, _) in enumerate(network.named_parameters())}
    entries: dict[int, dict[str, Tensor]] = {}
    for key, members in companions.items():
        if key.startswith(OPTIMIZER):
            for parameter, value in members.items():
                if parameter in numbers:
                    own = entries.setdefault(numbers[parameter], {})
                    own[key.removeprefix(OPTIMIZER)] = value
    if not entries:
        trained = str(run.config.trained_before(name))
        raise EveryRankError(
            f"stages.{name}.carry_optimizer: {path} holds no optimiser's state, as stage "
            f"{trained!r} was done before any was asked for; delete {run.stage_folder(trained)} "
            "and what comes after it to run it again"
        )
    groups = engine.state_dict()["param_groups"]
    engine.load_state_dict({"state": dict(sorted(entries.items())), "param_groups": groups})
