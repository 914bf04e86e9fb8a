"""Feature-flow regularisation: short, straight paths of features through the layers.

Wu, Lan, Zhang, Xiang, "Feature Flow Regularization: Improving Structured Sparsity in Deep Neural
Networks" (arXiv:2106.02914; Neural Networks 2023, pp. 598-613). Of both versions only the abstracts
could be read. They fix that training adds a term of the features of successive hidden layers, with
a part for the length of their trajectory and one for its curvature, and that filters are removed
afterwards. Which features, the norm, the weights, the form of the curvature and how filters are
picked are inferred here, and are settings: a reconstruction.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.methods import base
from tpp.models.architecture import example_input_for, meta_copy


class Settings(base.Settings):
    """Hyper-parameters of feature-flow regularisation; the values are ours.

    Attributes:
        length: weight of the trajectories' length in the loss.
        curvature: weight of their curvature.
        form: of the curvature: the ``second_difference`` of successive features (arXiv version), or
            the ``angle`` between successive steps, in radians (journal version: total absolute
            curvature).
        norm: of a step: 1, divided by the number of its elements, or 2.
        features: patterns of the modules whose outputs are followed. By default those of residual
            blocks, or, in a network without any, those of activations behind one another.
    """

    length: Annotated[float, Field(ge=0)] = 0.05
    curvature: Annotated[float, Field(ge=0)] = 0.05
    form: Literal["second_difference", "angle"] = "second_difference"
    norm: Literal[1, 2] = 1
    features: Annotated[list[str], Field(min_length=1)] | None = None


class FFR(base.Method):
    """Train with feature-flow regularisation, then remove filters."""

    name = "ffr"
    title = "FFR"
    settings_type: ClassVar[type[base.Settings]] = Settings
    picks = "after"
    faithful = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._seen: list[_Seen] = []

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Raise UserError where no two successive features have one shape."""
        if stage != "regularize":
            return
        copy = meta_copy(model).eval()
        self._follow(copy)
        with torch.no_grad():
            copy(example_input_for(model, "meta").to(next(copy.parameters()).dtype))
        if not any(len(path) > 1 for path in _paths(self._take())):
            raise UserError(
                "features: no two features one after the other are of the same shape, so "
                "nothing flows; name modules whose outputs have one shape"
            )

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Look at the features while the dense network is trained on."""
        if context.stage == "regularize" and (self.settings.length or self.settings.curvature):
            self._follow(model)

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """Length and curvature, means over the images; of the last forward pass in training."""
        paths, settings, terms = _paths(self._take()), self.settings, {}
        if paths and settings.length:
            lengths = [length(path, settings.norm) for path in paths]
            terms["length"] = settings.length * torch.stack(lengths).sum()
        if paths and settings.curvature:
            bends = [curvature(path, settings.form, settings.norm) for path in paths]
            terms["curvature"] = settings.curvature * torch.stack(bends).sum()
        return terms

    def _follow(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name in followed(model, self.settings.features):
            keep = _Keep(self._seen, is_block=_layers_in(modules[name]) > 0)
            modules[name].register_forward_hook(keep)

    def _take(self) -> "list[_Seen]":
        seen = list(self._seen)
        self._seen.clear()
        return seen


@dataclass(frozen=True)
class _Seen:
    """What went into a module and came out; the first only of one with layers in it."""

    before: Tensor | None
    after: Tensor


class _Keep:
    """Keeps features of training forward passes, and of those that a check makes on meta."""

    def __init__(self, seen: list[_Seen], *, is_block: bool) -> None:
        self._seen, self._is_block = seen, is_block

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training or output.is_meta:
            self._seen.append(_Seen(inputs[0] if self._is_block else None, output))


def followed(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of the modules whose outputs are followed.

    Args:
        model: a network.
        patterns: of names; None for the outermost blocks in sequences, which are modules with two
            convolutions or linear layers and more, or else for the activations in sequences.

    Raises:
        UserError: a pattern matches nothing, or there are no such modules.
    """
    modules = dict(model.named_modules())
    if patterns is not None:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in modules if name):
                raise UserError(f"features: {pattern!r} matches no module")
        return [n for n in modules if n and any(fnmatchcase(n, pattern) for pattern in patterns)]
    in_sequence = {
        f"{name}.{child}" if name else child: module
        for name, parent in modules.items()
        if isinstance(parent, nn.Sequential)
        for child, module in parent.named_children()
    }
    blocks = [name for name, module in in_sequence.items() if _layers_in(module) > 1]
    outermost = [n for n in blocks if not any(n.startswith(f"{other}.") for other in blocks)]
    if outermost:
        return outermost
    kinds = nn.ReLU | nn.SiLU | nn.GELU
    activations = [name for name, module in in_sequence.items() if isinstance(module, kinds)]
    if not activations:
        raise UserError(
            f"features: {type(model).__name__} has neither blocks nor activations in "
            "sequences; name the modules whose outputs are to be followed"
        )
    return activations


def _layers_in(module: nn.Module) -> int:
    return sum(isinstance(inner, nn.Conv2d | nn.Linear) for inner in module.modules())


def _paths(seen: Sequence[_Seen]) -> list[list[Tensor]]:
    """Trajectories: stretches of features of one shape, from what goes into their first block."""
    paths: list[list[Tensor]] = []
    for one in seen:
        if paths and paths[-1][-1].shape == one.after.shape:
            paths[-1].append(one.after)
        elif one.before is not None and one.before.shape == one.after.shape:
            paths.append([one.before, one.after])
        else:
            paths.append([one.after])
    return [[_flat(feature) for feature in path] for path in paths]


def _flat(feature: Tensor) -> Tensor:
    """(n, elements), float32 at least: differences of bf16 features are mostly rounding."""
    return feature.flatten(1).to(torch.promote_types(feature.dtype, torch.float32))


def length(path: Sequence[Tensor], norm: int) -> Tensor:
    r"""Length of a trajectory, mean over the images.

    .. math:: mean_n \sum_l \|x_{l+1} - x_l\|_p, for p = 1 divided by the number of elements

    Args:
        path: m + 1 features (n, elements); 0 for one alone.
        norm: p.
    """
    return _mean_of([_size(step, norm) for step in _steps(path)], path)


def curvature(path: Sequence[Tensor], form: str, norm: int) -> Tensor:
    r"""Curvature of a trajectory, mean over the images.

    .. math:: mean_n \sum_l \|x_{l+1} - 2 x_l + x_{l-1}\|_p

    or, in the form ``angle``, the sum of the angles between successive steps u and v,
    :math:`2 atan2(\| u |v| - v |u| \|, \| u |v| + v |u| \|)`, which is exact for parallel ones.

    Args:
        path: m + 1 features (n, elements); 0 for fewer than three.
        form: ``second_difference`` or ``angle``.
        norm: p, of ``second_difference``.
    """
    steps = _steps(path)
    pairs = itertools.pairwise(steps)
    if form == "angle":
        return _mean_of([_angle(u, v) for u, v in pairs], path)
    return _mean_of([_size(v - u, norm) for u, v in pairs], path)


def _steps(path: Sequence[Tensor]) -> list[Tensor]:
    return [after - before for before, after in itertools.pairwise(path)]


def _size(step: Tensor, norm: int) -> Tensor:
    """Of each image; the gradient of a norm at zero is zero."""
    size = torch.linalg.vector_norm(step, ord=norm, dim=1)
    return size / step.shape[1] if norm == 1 else size


def _angle(u: Tensor, v: Tensor) -> Tensor:
    lengths = [torch.linalg.vector_norm(step, dim=1, keepdim=True) for step in (u, v)]
    one, other = u * lengths[1], v * lengths[0]
    apart, along = (torch.linalg.vector_norm(w, dim=1) for w in (one - other, one + other))
    # A step of no length has no direction: no angle, and no gradient.
    none = (apart == 0) & (along == 0)
    return 2 * torch.atan2(apart, torch.where(none, 1.0, along))


def _mean_of(terms: Sequence[Tensor], path: Sequence[Tensor]) -> Tensor:
    if not terms:
        return path[0].new_zeros(())
    return torch.stack(list(terms)).sum(0).mean()
