"""The optimiser with its parameter groups, and the learning rate as a pure function of the step."""

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tpp.common.errors import UserError, reason_of
from tpp.models.architecture import architecture_of
from tpp.models.classifier import classifier_tensors
from train.config.optimizer import SGD, OptimizerSection
from train.distributed.engine import portable


def make_optimizer(
    model: nn.Module, settings: OptimizerSection, *, scaled: bool = False
) -> Optimizer:
    """The optimiser of all of a network's parameters, in its groups.

    Each group's ``lr_scale`` says what the stage's learning rate is multiplied with.

    Args:
        model: the network, on its device.
        settings: of the stage.
        scaled: whether a gradient scaler (fp16) may leave steps out. PyTorch's fused SGD is then
            called all the same, and begins with a momentum that nobody has written.

    Raises:
        UserError: the settings do not go with the network, or with each other; names the key.
    """
    return _make(parameter_groups(model, settings), settings, may_fuse=not scaled)


def parameter_groups(model: nn.Module, settings: OptimizerSection) -> list[dict[str, Any]]:
    """A network's parameters by weight decay and learning rate, each in one group.

    By default there is one group: weight decay on every parameter, as in the paper.

    Raises:
        UserError: ``layer_decay`` for a network that does not say what its layers are, or
            ``head_lr_factor`` for one without classes; names the key.
    """
    named = dict(model.named_parameters())
    scales = {name: 1.0 for name in named}
    if settings.layer_decay is not None:
        scales = _layer_scales(model, settings.layer_decay)
    if settings.head_lr_factor != 1:
        for name in _classifier(model):
            scales[name] *= settings.head_lr_factor
    spared = set() if settings.decay_norms_and_biases else _spared(model, named)
    # What a method has put on the network and regularises itself.
    spared |= {name for name, parameter in named.items() if getattr(parameter, "spared", False)}
    groups: dict[tuple[bool, float], list[str]] = {}
    for name in named:
        groups.setdefault((name in spared, scales[name]), []).append(name)
    if [*groups] == [(False, 1.0)]:
        return [{"params": [*named.values()]}]
    return [
        {
            "params": [named[name] for name in names],
            # Beside the numbers, which count through the groups: readers of a state go by these.
            "param_names": names,
            "weight_decay": 0.0 if free else settings.weight_decay,
            "lr_scale": scale,
        }
        for (free, scale), names in groups.items()
    ]


def check_optimizer(settings: OptimizerSection, key: str, *, split: bool = False) -> None:
    """Try an optimiser out on a few numbers before anything is loaded.

    It has to be made of these settings, to go on to the bit from what a checkpoint keeps of it,
    and, if its tensors are split over the ranks, to look at each number by itself.

    Args:
        settings: of a stage.
        key: of them.
        split: whether ZeRO stage 1 or 2 splits its tensors over the ranks.

    Raises:
        UserError: names the key.
    """
    if settings.name == SGD:
        return
    try:
        undisturbed, resumed = _tried(settings, _SHAPES), _tried(settings, _SHAPES, resume=True)
    except Exception as error:  # whatever constructors and steps say to arguments
        raise UserError(f"{key}: {settings.name}: {reason_of(error)}") from None
    if not undisturbed.equal(resumed):
        raise UserError(
            f"{key}.name: {settings.name} does not go on from its state as if nothing had "
            "happened: a run with it would not survive being broken off"
        )
    if split and not is_elementwise(settings):
        raise UserError(
            f"{key}.name: {settings.name} looks at whole tensors, of which each rank has but a "
            "part under ZeRO stage 1 and 2; use stage 0, or training.deepspeed=null"
        )


def is_elementwise(settings: OptimizerSection) -> bool:
    """Whether an optimiser looks at each number by itself, whatever tensor it stands in; tried."""
    if settings.name == SGD:
        return True
    apart, together = _tried(settings, _SHAPES), _tried(settings, ((_COUNT,),))
    return torch.allclose(apart, together, rtol=1e-4, atol=1e-7)


def learning_rate(settings: OptimizerSection, epoch: float, total_epochs: float) -> float:
    """Learning rate at the fractional ``epoch`` of a stage of ``total_epochs``.

    Of a network that lost weights see :mod:`train.schedules`.

    Linear warm-up over ``warmup_epochs``, from ``warmup_from`` to 1, scales whatever the schedule
    says at that epoch: at the stage's, or, with ``warmup_prefix``, at those since the warm-up.
    """
    lr, floor, since = settings.lr, settings.min_lr, epoch
    if settings.warmup_prefix:
        since = max(epoch - settings.warmup_epochs, 0.0)
        total_epochs = max(total_epochs - settings.warmup_epochs, 0.0)
    if settings.schedule == "step":
        passed = sum(since >= milestone for milestone in settings.milestones)
        lr = max(lr * settings.gamma**passed, floor)
    elif settings.schedule == "cosine":
        done = min(since / total_epochs, 1.0) if total_epochs else 0.0
        lr = floor + (lr - floor) * (0.5 * (1.0 + math.cos(math.pi * done)))
    elif settings.schedule == "linear":
        done = min(since / total_epochs, 1.0) if total_epochs else 0.0
        lr = floor + (lr - floor) * (1.0 - done)
    if epoch < settings.warmup_epochs:
        start = settings.warmup_from
        lr *= start + (1.0 - start) * (epoch / settings.warmup_epochs)
    return lr


def _make(
    groups: list[dict[str, Any]], settings: OptimizerSection, *, may_fuse: bool = True
) -> Optimizer:
    if settings.name == SGD:
        return torch.optim.SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            # One kernel for all parameters; on the CPU PyTorch's own choice.
            fused=(may_fuse and all(p.is_cuda for group in groups for p in group["params"]))
            or None,
        )
    from timm.optim import create_optimizer_v2  # a second or two

    given: dict[str, Any] = {
        "betas": None if settings.betas is None else tuple(settings.betas),
        "eps": settings.eps,
    }
    made: Optimizer = create_optimizer_v2(
        groups,
        settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        **{key: value for key, value in given.items() if value is not None},
        **settings.args,
    )
    return made


def _spared(model: nn.Module, named: Mapping[str, Tensor]) -> set[str]:
    """The parameters without weight decay: biases, norms, and what the network itself names."""
    # A method of timm's networks; those of others have none.
    excepted: set[str] = getattr(model, "no_weight_decay", lambda: set())()
    return {
        name
        for name, parameter in named.items()
        if parameter.dim() <= 1
        or name.rpartition(".")[2] == "bias"
        or any(fnmatchcase(name, pattern) for pattern in excepted)
    }


def _layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Of each parameter decay^(number of layers above it), layers being timm's (BEiT, 2022)."""
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"layer_decay: {type(model).__name__} does not say what its layers are, as timm's "
            "networks do (model.name: timm:NAME)"
        )
    from timm.models import group_parameters

    layers = group_parameters(model, matcher(coarse=False), reverse=True)
    top = max(layers.values())
    # What a method has put on the network is of no layer, and learns as fast as the uppermost.
    return {name: decay ** (top - layers.get(name, top)) for name, _ in model.named_parameters()}


def _classifier(model: nn.Module) -> set[str]:
    architecture = architecture_of(model)
    names = classifier_tensors(architecture) if architecture is not None else set()
    found = {name for name, _ in model.named_parameters() if name in names}
    if not found:
        raise UserError("head_lr_factor: this network has no classifier")
    return found


# A few tensors of different kinds, large enough for what treats matrices in its own way, and how
# many numbers they have.
_Shapes = tuple[tuple[int, ...], ...]
_SHAPES: _Shapes = ((16, 16), (5,), (8, 4, 3, 3))
_COUNT = 549
_STEPS = 6


def _tried(settings: OptimizerSection, shapes: _Shapes, *, resume: bool = False) -> Tensor:
    """The same numbers after some steps, however they are cut into tensors; shape (_COUNT,)."""
    numbers = torch.Generator().manual_seed(0)
    start = torch.randn(_COUNT, generator=numbers)
    parameters = [nn.Parameter(value.clone()) for value in _cut(start, shapes)]
    optimizer = _make([{"params": parameters}], settings)
    for step in range(_STEPS):
        gradient = torch.randn(_COUNT, generator=numbers)
        if step % 2:  # at right angles to the weights, which some look for
            gradient -= start * (gradient @ start) / (start @ start)
        for parameter, part in zip(parameters, _cut(gradient, shapes), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
        if resume and step == _STEPS // 2:
            state = optimizer.state_dict()
            optimizer = _make([{"params": parameters}], settings)
            optimizer.load_state_dict(_as_read(state))
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _cut(values: Tensor, shapes: _Shapes) -> list[Tensor]:
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _as_read(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state as a checkpoint gives it back: tensors, and the rest through JSON."""

    def read(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else json.loads(json.dumps(value))

    kept = portable(state, range(len(state["state"])))
    try:
        entries = {
            number: {key: read(value) for key, value in own.items()}
            for number, own in kept["state"].items()
        }
        groups = read(kept["param_groups"])
    except TypeError:
        state = {}
    if state.keys() != kept.keys():
        raise ValueError("has a state that no checkpoint here can keep")
    return {"state": entries, "param_groups": groups}
