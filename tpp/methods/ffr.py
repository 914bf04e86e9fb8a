"""FFR: short and straight paths of features in the loss (Wu et al., arXiv:2106.02914, 2021).

A reconstruction. The two abstracts that can be read (the other is of Neural Networks 2023,
doi 10.1016/j.neunet.2023.02.013) say: the features of successive hidden layers are points on a
trajectory; its length and its total absolute curvature are in the loss of an ordinary training,
which drives filters to zero; these go afterwards. The earlier abstract names gradient and curvature
of the flow. All else is inferred:

- Which features: outputs of residual blocks, and what goes into the first one; in a plain network
  convolutions after their activation. A trajectory ends where the shape changes. In networks whose
  blocks have parallel branches, such as GoogLeNet, only the user can say what follows on what.
- Length: the sum of the norms of the steps from one feature to the next. Curvature: that of the
  norms of the differences of successive steps (``second_difference``), or of the angles between
  them (``angle``). Both are means over the images.
- The norm, that the 1-norm is divided by the number of elements, and all values of the weights.
  The gradient of an angle grows as the steps beside it shrink: the second difference's does not.
- Filters are picked after it, as the configuration's ``pruning`` says, and not by a threshold.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpp.common.errors import UserError, reason_of
from tpp.methods import base
from tpp.models.architecture import example_input_for, meta_copy
from tpp.models.fitting import few
from tpp.models.meta_runs import ShapesOnly
from tpp.plan import PruningPlan

Form = Literal["second_difference", "angle"]
Norm = Literal[1, 2]
_NonNegative = Annotated[float, Field(ge=0)]
# What goes into a block, and what comes out of a module.
_Kept = tuple[Tensor | None, Tensor]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SEQUENCES = (nn.Sequential, nn.ModuleList)


class Settings(base.Settings):
    """No published value is known. Begin where each term is 1 to 10% of the task's loss.

    Attributes:
        length: weight in the loss of the length of the features' path from block to block.
        curvature: weight in the loss of how much that path bends.
        form: how the curvature is measured: by the norms of the differences of successive steps
            (``second_difference``), or by the angles between them (``angle``), whose gradients are
            large where steps are short.
        norm: norm of the steps and of their differences: 2 for the 2-norm, or 1 for the 1-norm
            divided by the number of elements.
        features: patterns of names of the modules whose outputs are the features, in the order of
            the forward pass; of a module and those in it the outer one. null: the outputs of
            residual blocks, and what goes into the first one; in a plain network those of
            convolutions after their activation.

    Example:
        {length: 1e-3, curvature: 1e-3, form: angle, norm: 2, features: [layer1.*, layer2.*]}
    """

    length: _NonNegative
    curvature: _NonNegative
    form: Form = "second_difference"
    norm: Norm = 1
    features: Annotated[list[str], Field(min_length=1)] | None = None


def steps_of(points: Sequence[Tensor]) -> list[Tensor]:
    """The steps of a trajectory, (n, elements) each, in float32 or wider.

    Args:
        points: two features or more of one shape, (n, ...), of n images.
    """
    wide = [point.to(torch.promote_types(point.dtype, torch.float32)) for point in points]
    return [(b - a).flatten(1) for a, b in itertools.pairwise(wide)]


def length(steps: Sequence[Tensor], norm: Norm) -> Tensor:
    """Sum of the steps' norms, mean over images; gradient 0 where a step is 0."""
    return torch.stack([_norm(step, norm) for step in steps]).sum(0).mean()


def curvature(steps: Sequence[Tensor], form: Form, norm: Norm) -> Tensor:
    """How much a trajectory bends, mean over images; 0 of a single step.

    Args:
        steps: see :func:`steps_of`.
        form: ``second_difference``: sum of the norms of differences of successive steps; ``angle``:
            sum of the angles between them, in radians; 0 beside a step of length 0.
        norm: of ``second_difference``.
    """
    pairs = list(itertools.pairwise(steps))
    if not pairs:
        return steps[0].new_zeros(())
    if form == "angle":
        bends = [_angle(one, other) for one, other in pairs]
    else:
        bends = [_norm(other - one, norm) for one, other in pairs]
    return torch.stack(bends).sum(0).mean()


def _norm(rows: Tensor, norm: Norm) -> Tensor:
    return rows.abs().mean(1) if norm == 1 else torch.linalg.vector_norm(rows, dim=1)


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Between rows; unlike the arc cosine it is exact, and has a gradient, where they are parallel.

    W. Kahan's formula: 2 atan2(|u |v| - v |u||, |u |v| + v |u||).
    """
    u, v = _scaled(one), _scaled(other)
    u_norm, v_norm = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (u, v))
    apart = torch.linalg.vector_norm(u * v_norm - v * u_norm, dim=1)
    along = torch.linalg.vector_norm(u * v_norm + v * u_norm, dim=1)
    return 2 * torch.atan2(apart, along)


def _scaled(rows: Tensor) -> Tensor:
    """Rows of length 1, or 0: so that squares of products neither overflow nor vanish.

    The factor is a constant to autograd, which changes nothing, as an angle does not depend on it.
    """
    norms = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    return rows / norms.masked_fill(norms == 0, 1)


class FFR(base.Method):
    """Train on with length and curvature of the features' paths in the loss, then remove filters.

    A reconstruction from two abstracts: what is inferred stands at the head of this module.
    """

    name = "ffr"
    title = "FFR"
    settings_type = Settings
    picks = "after"
    faithful: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._features: _Features | None = None

    def steps_before_picking(self) -> float:
        """All: the terms know nothing of the filters that go afterwards."""
        return math.inf

    def check(self, model: nn.Module, plan: PruningPlan) -> None:
        """Raise UserError if there is no trajectory in this network."""
        self._find(model)

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Keep features from now on, if this is the stage that has the terms."""
        if context.stage == "regularize":
            names = self._find(model)
            if self.settings.length or self.settings.curvature:
                self._features = _Features(model, names)

    def restore(self, model: nn.Module) -> None:
        """Take the hooks off."""
        if self._features is not None:
            self._features.remove()
            self._features = None

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """Length and curvature, summed over the trajectories, those whose weight is not 0."""
        if self._features is None:
            return {}
        settings = self.settings
        paths = [steps_of(points) for points in self._features.read()]
        terms = {}
        if settings.length:
            lengths = [length(steps, settings.norm) for steps in paths]
            terms["flow_length"] = settings.length * torch.stack(lengths).sum()
        if settings.curvature:
            bends = [curvature(steps, settings.form, settings.norm) for steps in paths]
            terms["flow_curvature"] = settings.curvature * torch.stack(bends).sum()
        return terms

    def _find(self, model: nn.Module) -> list[str]:
        """Names of the modules whose outputs are the features.

        Raises:
            UserError: they are no features, or no trajectory.
        """
        model = meta_copy(model).eval()
        patterns = self.settings.features
        names = _blocks(model) if patterns is None else _matching(model, patterns)
        if not names:
            names = _activated(model)
        paths = trajectories(_tried(model, names))
        if not paths:
            chosen = "by default" if patterns is None else f"by {', '.join(patterns)}"
            raise UserError(
                f"method.features: no two successive features have the same shape ({chosen}: "
                f"{few(names, 6)}); give patterns of modules whose outputs have"
            )
        if not self.settings.length and self.settings.curvature and max(map(len, paths)) < 3:
            raise UserError(
                "method.curvature: no three successive features have the same shape, so nothing "
                f"can bend ({few(names, 6)}); give method.length a weight, or other method.features"
            )
        return names


def trajectories(kept: Sequence[_Kept]) -> list[list[Tensor]]:
    """The stretches of equal shapes, two or more, among features in the order in which they came.

    What goes into a block begins a trajectory that the block's output would begin alone.
    """
    found: list[list[Tensor]] = []
    for before, after in kept:
        if found and found[-1][-1].shape == after.shape:
            found[-1].append(after)
        elif before is not None and before.shape == after.shape:
            found.append([before, after])
        else:
            found.append([after])
    return [points for points in found if len(points) > 1]


class _Features:
    """Keeps the features of the last forward pass in training mode until they are read.

    Args:
        model: gets hooks.
        names: of the modules.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._kept: list[_Kept] = []
        self._training = False
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]
        for name in names:
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._keep))

    def read(self) -> list[list[Tensor]]:
        """The trajectories; they are forgotten."""
        kept, self._kept = self._kept, []
        return trajectories(kept)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._training = model.training
        if self._training:
            self._kept = []

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._training:
            self._kept.append(_of_call(module, inputs, output))


def _of_call(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> _Kept:
    """What is kept of a call: a leaf's input is no feature, but half-way to one."""
    is_block = any(True for _ in module.children())
    before = inputs[0] if is_block and inputs and isinstance(inputs[0], Tensor) else None
    return before, output


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Modules that a pattern matches and that are in no other such module."""
    known = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(
                f"method.features: pattern {pattern!r} matches no module; there are {few(known, 6)}"
            )
    found: list[str] = []
    for name in known:  # from the outside inwards
        inside = bool(found) and name.startswith(f"{found[-1]}.")
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            found.append(name)
    return found


def _blocks(model: nn.Module, name: str = "", *, in_sequence: bool = False) -> list[str]:
    """Blocks: modules of a network's own classes that stand in a row and hold layers.

    Where such a module holds a row of blocks itself it is a stage, and they are meant.
    """
    sequence = isinstance(model, _SEQUENCES)
    inner: list[str] = []
    for child, module in model.named_children():
        inner += _blocks(module, f"{name}.{child}" if name else child, in_sequence=sequence)
    own = not sequence and not type(model).__module__.startswith("torch.nn.")
    layers = (*_CONVOLUTIONS, nn.Linear)
    if in_sequence and own and len(inner) < 2:
        return [name] if any(isinstance(m, layers) for m in model.modules()) else []
    return inner


def _activated(model: nn.Module) -> list[str]:
    """The activation behind each convolution, in a network whose activations are modules."""
    found: list[str] = []
    pending = False
    for call in _calls(model, [name for name, _ in model.named_modules() if name]):
        if isinstance(call.module, _CONVOLUTIONS):
            pending = True
        elif isinstance(call.module, nn.Linear):
            pending = False
        elif pending and type(call.module).__module__ == "torch.nn.modules.activation":
            pending = False
            if call.name not in found:
                found.append(call.name)
    if not found:
        raise UserError(
            f"method.features: {type(model).__name__} has neither blocks in a row nor modules that "
            "are the activations of convolutions; give patterns of modules whose outputs are meant"
        )
    return found


class _Call(NamedTuple):
    """One call of a module; ``version`` is that of the output when it was made."""

    name: str
    module: nn.Module
    before: Tensor | None
    output: Any
    version: int


def _tried(model: nn.Module, names: Sequence[str]) -> list[_Kept]:
    """What modules give on the meta device, in the order in which they are called."""
    calls = _calls(model, names)
    for call in calls:
        if not isinstance(call.output, Tensor):
            kind = type(call.output).__name__
            raise UserError(f"method.features: the output of {call.name} is no tensor, but {kind}")
        if call.output._version != call.version:
            raise UserError(
                f"method.features: what follows {call.name} overwrites its output in place; name "
                "that instead"
            )
    return [(call.before, call.output) for call in calls]


def _calls(model: nn.Module, names: Sequence[str]) -> list[_Call]:
    """The calls of modules in a run on the meta device."""
    calls: list[_Call] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        version = output._version if isinstance(output, Tensor) else 0
        calls.append(_Call(name, module, *_of_call(module, inputs, output), version))

    handles = [
        model.get_submodule(name).register_forward_hook(functools.partial(note, name))
        for name in names
    ]
    images = example_input_for(model, "meta").to(next(model.parameters()).dtype)
    try:
        with torch.inference_mode(False), torch.no_grad(), ShapesOnly():
            model(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"{type(model).__name__} does not run: {reason_of(error)}") from None
    finally:
        for handle in handles:
            handle.remove()
    return calls
