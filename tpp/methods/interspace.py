"""Interspace pruning: filters as combinations of a trained basis, and masks on the coefficients.

Wimmer, Mehnert, Condurache, "Interspace Pruning: Using Adaptive Filter Representations to Improve
Training of Sparse CNNs" (CVPR 2022, arXiv:2203.07808). Known from abstract and captions: every
K x K filter is a linear combination of a filter basis; coefficients are pruned instead of weights,
those that stay are trained together with the basis, and a network of ordinary filters comes out.
Inferred: one basis of K^2 filters per layer, drawn orthonormal, trained at the same learning rate
without weight decay and counted into the sparsity; 1 x 1 convolutions and linear layers pruned the
ordinary way. It goes with any way to score weights, which here score coefficients: magnitude, or
SNIP (Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR
2019, arXiv:1810.02340), abs(lambda * dL/dlambda), of the images of the first step and over all
layers together. Settings and results could not be read: a reconstruction.

A patent application, US 2023/0086617, reads like the same idea: ask before you ship it.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tpp.checkpoints.safetensors_files import sha256_of
from tpp.common.errors import UserError
from tpp.common.settings import Ratio
from tpp.masks import Mask, SparsifySection, Sparsity, select_mask
from tpp.measure.counts import Counts
from tpp.methods import base
from tpp.models.layers import how_computed, make_weights_plain, prunable_layers


class Settings(base.Settings):
    """Its stage is ``finetune``: coefficients are masked when it begins.

    Attributes:
        sparsity: share of the weights of all Conv2d and Linear layers that are gone: coefficients
            that are masked, less the numbers of the bases.
        basis: in which filters are written: ``random``, drawn orthonormal, or ``standard``, in
            which coefficients are weights.
        train_basis: whether bases are trained. With a ``standard`` one that is not, it is pruning
            of weights.
        score: what a coefficient is worth; the lowest go: ``magnitude``, or ``snip``, by the
            gradients of the stage's first step, which is computed twice for it.

    Example:
        {sparsity: 0.9, basis: standard, train_basis: false, score: snip}
    """

    sparsity: Ratio
    basis: Literal["random", "standard"] = "random"
    train_basis: bool = True
    score: Literal["magnitude", "snip"] = "magnitude"


class Interspace(base.Method):
    """Train what a mask on the coefficients leaves, chosen when the finetuning stage begins."""

    name = "interspace"
    title = "Interspace"
    settings_type: ClassVar[type[base.Settings]] = Settings
    faithful = False
    finetunes = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._layers: dict[str, Combination] = {}

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Raise UserError if the bases alone are more than what is to be left."""
        if stage != "finetune":
            return
        layers = [each for each in prunable_layers(model).values() if how_computed(each) is None]
        positions = [layer.weight[0, 0].numel() for layer in layers]
        in_bases = self._numbers_of_bases(number for number in positions if number > 1)
        self._going(sum(layer.weight.numel() for layer in layers), in_bases)

    def modify(self, model: nn.Module, stage: str) -> None:
        """Put coefficients, and bases where a kernel has several positions, in place of weights."""
        if stage != "finetune":
            return
        for name, layer in prunable_layers(model).items():
            if how_computed(layer) is not None:
                continue
            positions = layer.weight[0, 0].numel()
            combination = Combination(layer.weight, self.settings.basis if positions > 1 else None)
            parametrize.register_parametrization(layer, "weight", combination)
            self._layers[name] = combination
            if positions > 1:
                vectors: Any = _originals(layer)[1]
                vectors.spared = True  # decay would act on coefficients and basis both
                vectors.requires_grad_(self.settings.train_basis)

    def restore(self, model: nn.Module) -> None:
        """Multiply out: bit for bit the weights that the last forward pass had."""
        make_weights_plain(model, Combination)

    def refuses_mask(self, stage: str) -> str | None:
        """As in :class:`tpp.methods.base.Method`."""
        return "and the mask here is one of coefficients" if stage == "finetune" else None

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Choose the coefficients that stay, unless a state that was loaded has them.

        Raises:
            UserError: the stage's input has masked weights, or the bases alone are more than what
                is to be left.
        """
        if not self._layers:
            return
        self.check_mask(context)
        if all(bool(combination.is_chosen) for combination in self._layers.values()):
            return
        coefficients = {name: _originals(model.get_submodule(name))[0] for name in self._layers}
        scores = self._scores(coefficients, context)
        for name, stays in self._choose(scores).items():
            combination = self._layers[name.removesuffix(".weight")]
            combination.stays.copy_(stays)
            combination.is_chosen.fill_(True)

    def scalars(self, step: int) -> dict[str, float]:
        """The share that is gone, and how many numbers are left, bases counted in."""
        if not self._layers:
            return {}
        total, left = self._numbers()
        return {"interspace_sparsity": 1 - left / total, "interspace_left": float(left)}

    def left(self, counts: Counts) -> Sparsity | None:
        """As :meth:`scalars` has it; multiplied out, filters keep all their multiply-adds."""
        if not self._layers:
            return None
        total, left = self._numbers()
        return Sparsity(counts.parameters - total + left, counts.macs, 1 - left / total)

    def _numbers(self) -> tuple[int, int]:
        """Weights of the layers, and the numbers that they are made of, bases counted in."""
        total = sum(combination.stays.numel() for combination in self._layers.values())
        left = sum(int(combination.stays.sum()) for combination in self._layers.values())
        return total, left + self._in_bases()

    def _scores(
        self, coefficients: dict[str, Tensor], context: base.TrainingContext
    ) -> dict[str, Tensor]:
        """What every coefficient is worth, and with it what has the same magnitude."""
        if self.settings.score == "magnitude":
            return {name: values.detach() for name, values in coefficients.items()}
        gradients = context.first_gradients([*coefficients.values()])
        return {
            name: values.detach() * gradient
            for (name, values), gradient in zip(coefficients.items(), gradients, strict=True)
        }

    def _choose(self, scores: dict[str, Tensor]) -> Mask:
        total = sum(values.numel() for values in scores.values())
        try:
            going = self._going(total, self._in_bases())
        except UserError as error:
            raise UserError(f"method {self.name}: {error}") from None
        # So many and no other number: the share is made of whole weights.
        settings = SparsifySection(sparsity=going / total)
        tensors = {f"{name}.weight": values for name, values in scores.items()}
        return select_mask(tensors, [*scores], settings)

    def _going(self, total: int, in_bases: int) -> int:
        """How many coefficients of so many are to go."""
        going = round(self.settings.sparsity * total)
        going += in_bases if going else 0
        if going >= total:
            raise UserError(
                f"sparsity: of {total:,} weights {total - going + in_bases:,} would be left, and "
                f"the bases alone are {in_bases:,} numbers; ask for less"
            )
        return going

    def _in_bases(self) -> int:
        """Numbers that are trained besides the coefficients."""
        based = [one.positions for one in self._layers.values() if one.kind is not None]
        return self._numbers_of_bases(based)

    def _numbers_of_bases(self, positions: Iterable[int]) -> int:
        """Of layers whose kernels have so many positions, more than one."""
        if not self.settings.train_basis and self.settings.basis == "standard":
            return 0
        return sum(number**2 for number in positions)


class Combination(nn.Module):
    r"""A weight from coefficients: :math:`h_{ab} = \sum_n \nu_{abn} \lambda_{abn} g_n`.

    Args:
        weight: (n, m, ...) that it is to be in the beginning.
        kind: of the basis; None for none: coefficients are the weights.

    Attributes:
        stays: nu, bool, of the weight's shape.
        is_chosen: whether nu was chosen; in a training state, so that one that goes on keeps it.
        positions: N, of the kernel.
    """

    stays: Tensor
    is_chosen: Tensor

    def __init__(self, weight: Tensor, kind: str | None) -> None:
        super().__init__()
        self.kind, self.positions = kind, weight[0, 0].numel()
        self.register_buffer("stays", torch.ones(weight.shape, dtype=torch.bool))
        self.register_buffer("is_chosen", torch.tensor(False))

    def forward(self, coefficients: Tensor, basis: Tensor | None = None) -> Tensor:
        """The weight (n, m, ...).

        Args:
            coefficients: lambda, of the weight's shape: coefficient n stands at kernel position n.
            basis: g, (N, N), an element of the basis in each row.
        """
        left = coefficients.masked_fill(~self.stays, 0)
        if basis is None:
            return left
        with torch.autocast(left.device.type, enabled=False):
            filters = (left.flatten(2) @ basis).view(left.shape)
        if coefficients.is_contiguous():
            return filters
        return filters.contiguous(memory_format=torch.channels_last)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Coefficients, and the basis if there is one, of a weight on the CPU."""
        if self.kind is None:
            return weight
        size = self.positions
        wide = weight.detach().double()
        vectors = torch.eye(size, dtype=torch.float64)
        if self.kind == "random":
            # By the weight itself: the same on all ranks, and however often a stage begins anew.
            seed = int(sha256_of(weight.detach())[:14], 16)
            numbers = torch.Generator().manual_seed(seed)
            vectors = torch.linalg.qr(
                torch.randn(size, size, dtype=torch.float64, generator=numbers)
            ).Q
        coefficients = (wide.flatten(2) @ vectors.T).view(wide.shape)
        return coefficients.to(weight.dtype), vectors.to(weight.dtype)


def _originals(layer: nn.Module) -> list[Tensor]:
    """What is trained in the place of a layer's weight."""
    parametrizations: Any = layer.parametrizations
    held = parametrizations["weight"]
    return [held.original] if hasattr(held, "original") else [held.original0, held.original1]
