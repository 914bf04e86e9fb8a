"""Linear over-parameterisation of a pruned network while it is finetuned.

Qian et al., "Boosting Pruned Networks with Linear Over-parameterization", arXiv 2204.11444. Every
convolution and linear layer of the pruned network is expanded into consecutive linear ones, which
are multiplied back into the small layer at the end; meanwhile a similarity-preserving loss (Tung &
Mori, ICCV 2019) keeps near each other what is near in the dense network. It works behind any
pruning: the removal is the pruning stage's method's.

Published, in the abstract: to expand compact layers without changing their output, finetune,
contract without loss, and to distil the similarities of data for each expanded layer. Taken from
its relatives: three factors 1x1, k x k, 1x1 and the rate 4 (Guo et al., "ExpandNets", NeurIPS 2020,
authors' code); the loss (authors' formula, checked by them in RepDistiller). Inferred, as nothing
of it could be read: that no factor has a bias, the start, which layers are expanded (all but
grouped ones) and carry the loss (those that are expanded), and its weight.

The factors are not layers of their own: the kernel is multiplied out in every forward pass, in
float32, and one convolution made with it. Outputs and gradients are those of three convolutions
whose middle one has stride and padding.

Similarities are those among the images of a micro-batch on one rank: more ranks or accumulation at
the same global batch are another loss. Over the 56 layers of ResNet-56 a weight of 50 is as much as
the task's loss at the beginning; with 1000 it was worse than none after 60 steps, in one try.
"""

from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tpp.checkpoints.safetensors_files import sha256_of
from tpp.common.errors import UserError
from tpp.methods import base
from tpp.models.layers import how_computed, make_weights_plain, prunable_layers


class Settings(base.Settings):
    """With ``expand: false`` and ``similarity: 0`` it is plain finetuning.

    Attributes:
        expand: whether each layer is trained as three factors.
        expansion: how many times as wide the inner channels are as the layer's inputs and outputs.
        excess: norm, relative to the layer's weight, of a random part of the middle factor that the
            outer ones multiply to zero. Without it SGD leaves the additional channels unused.
        similarity: weight of the similarity-preserving loss, whose teacher is the dense network; 0
            for none.
        layers: patterns of the layers that are expanded and compared with the teacher.
        weight_decay: weight decay of the weights that the factors make, in place of the optimiser's
            of the factors themselves, which is another regulariser; null for the optimiser's.
            Nothing without ``expand``.

    Example:
        {expansion: 2, excess: 0.5, similarity: 50, layers: [layer*], weight_decay: 5e-4}

        {expand: false, similarity: 50}
    """

    expand: bool = True
    expansion: Annotated[int, Field(ge=1)] = 4
    excess: Annotated[float, Field(ge=0)] = 1.0
    similarity: Annotated[float, Field(ge=0)] = 0.0
    layers: Annotated[list[str], Field(min_length=1)] = ["*"]
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class LinearOverparam(base.Method):
    """Finetune the factors of each layer's weight, with the dense network as teacher."""

    name = "linear_overparam"
    title = "Linear over-parameterization"
    settings_type = Settings
    faithful: ClassVar[bool] = False
    finetunes = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._layers: list[str] = []
        self._hooks: list[Any] = []
        self._ranks = 1
        self._decayed: list[nn.Module] | None = None
        self._teacher: nn.Module | None = None
        self._mine: dict[str, Tensor] = {}
        self._its: dict[str, Tensor] = {}

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Raise UserError if a pattern of ``layers`` is of no layer that can be expanded."""
        names = [name for name in prunable_layers(model) if _is_dense(model.get_submodule(name))]
        for pattern in self.settings.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"layers: {pattern!r} is of no convolution without groups and no linear layer; "
                    f"there are {', '.join(names[:3])}, ..."
                )

    def modify(self, model: nn.Module, stage: str) -> None:
        """Put factors in the place of the weights, if the stage finetunes."""
        if stage != "finetune":
            return
        users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self._layers = [
            name
            for name, layer in prunable_layers(model).items()
            if _is_dense(layer)
            and users[id(layer.weight)] == 1  # factors of tied weights would part them
            and any(fnmatchcase(name, pattern) for pattern in self.settings.layers)
        ]
        if self.settings.expand:
            for name in self._layers:
                factors = Factors(self.settings.expansion, self.settings.excess)
                layer: Any = model.get_submodule(name)
                parametrize.register_parametrization(layer, "weight", factors)
                for parameter in layer.parametrizations.parameters():
                    parameter.spared = self.settings.weight_decay is not None

    def restore(self, model: nn.Module) -> None:
        """Multiply the factors out: bit for bit the weights that the last forward pass had."""
        for hook in self._hooks:
            hook.remove()
        make_weights_plain(model, Factors)

    def refuses_mask(self, stage: str) -> str | None:
        """As in :class:`tpp.methods.base.Method`; without factors there is no reason."""
        if stage != "finetune" or not self.settings.expand:
            return None
        return "which are not held at zero in a product of factors; use expand: false"

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Read the teacher, and look at what the layers of both networks put out.

        Raises:
            UserError: the input has masked weights, which factors cannot hold at zero; or no layer
                puts out something of each image, once per forward pass.
        """
        if context.stage != "finetune":
            return
        self.check_mask(context)
        self._ranks = context.world_size
        if self.settings.expand and self.settings.weight_decay:
            names = self._layers[context.rank :: self._ranks]
            self._decayed = [model.get_submodule(name) for name in names]
            self._zero = torch.zeros((), device=next(model.parameters()).device)
        if not self.settings.similarity:
            return
        teacher = self._teacher = context.dense()
        layers = _once_per_image(teacher, self._layers, context.example_input)
        if not layers:
            raise UserError(
                f"method {self.name}: similarity: none of the layers puts out something of each "
                "image, once per forward pass"
            )
        for name in layers:
            for network, kept in ((model, self._mine), (teacher, self._its)):
                hook = _keep(kept, name, training=network is model)
                self._hooks.append(network.get_submodule(name).register_forward_hook(hook))

    def loss_terms(self) -> dict[str, Tensor]:
        """Weight decay of the products, this rank's share of the layers."""
        if self._decayed is None:
            return {}
        # Of every rank: there may be more of them than layers, and all log the same names.
        squares = self._zero
        for layer in self._decayed:
            squares = squares + _weight(layer).square().sum()
        return {"decay": 0.5 * self.settings.weight_decay * self._ranks * squares}

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """The similarity-preserving loss of the micro-batch, summed over the layers.

        Each rank's and each micro-batch's own: similarities are those among its b images.
        """
        if self._teacher is None:
            return {}
        with torch.no_grad():
            self._teacher(batch[0])
        terms = [similarity_loss(mine, self._its[name]) for name, mine in self._mine.items()]
        self._mine.clear()
        self._its.clear()
        return {"similarity": self.settings.similarity * torch.stack(terms).sum()}


class Factors(nn.Module):
    r"""A weight as a product: :math:`W_k = O M_k I` at each kernel position k.

    The start has :math:`I^T I = 1` and :math:`O O^T = 1`, from QR decompositions of random
    matrices, and :math:`M_k = O^T W_k I^T + N_k` with :math:`O N_k I = 0`: the product is W.

    With N = 0 the gradients of all factors stay in the r-th part of the inner channels that I and O
    span, so that SGD, with momentum and weight decay, moves W just as with r = 1, whatever r is (as
    with r = 1 and I = O = 1, to be exact: it does not tell bases of the inner channels apart). N is
    random, of ``excess`` times the norm of W, so that the other channels learn too.

    Random numbers follow from the weight itself: they are the same on all ranks, and however often
    a stage begins anew, and others for another seed of the run.

    Args:
        expansion: r, of m inputs r m and of n outputs r n channels.
        excess: norm of N, relative to that of W.
    """

    def __init__(self, expansion: int, excess: float) -> None:
        super().__init__()
        self._expansion, self._excess = expansion, excess

    def forward(self, inner: Tensor, middle: Tensor, outer: Tensor) -> Tensor:
        """The weight (n, m, ...), multiplied out in float32 or more.

        Args:
            inner: I, (r m, m).
            middle: M, (r n, r m, ...) with the kernel's positions.
            outer: O, (n, r n).
        """
        with torch.autocast(middle.device.type, enabled=False):
            factors = (_wide(factor) for factor in (inner, middle, outer))
            product = _multiplied(*factors).to(middle.dtype)
        # In the memory format of the middle factor, which decides that of the convolution.
        return product.contiguous() if middle.is_contiguous() else product

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of a weight (n, m, ...) on the CPU."""
        wide = weight.detach().double()
        outputs, inputs = weight.shape[:2]
        numbers = torch.Generator().manual_seed(int(sha256_of(weight.detach())[:14], 16))
        inner = _orthonormal(self._expansion * inputs, inputs, numbers)
        outer = _orthonormal(self._expansion * outputs, outputs, numbers).T
        middle = _multiplied(inner.T, wide, outer.T)
        if self._excess and self._expansion > 1:
            other = torch.randn(middle.shape, dtype=torch.float64, generator=numbers)
            other -= _multiplied(inner.T, _multiplied(inner, other, outer), outer.T)
            middle = middle + self._excess * wide.norm() / other.norm() * other
        return tuple(f.to(weight.dtype).contiguous() for f in (inner, middle, outer))  # type: ignore[return-value]


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far the similarities among a batch's images are apart (Tung & Mori, ICCV 2019).

    .. math:: \frac{1}{b^2} \| \hat G_S - \hat G_T \|_F^2

    with the rows of each matrix divided by their norm.

    Args:
        student: :func:`similarities` (b, b).
        teacher: likewise; no gradient goes there.
    """
    mine, its = F.normalize(student, dim=1), F.normalize(teacher.detach(), dim=1)
    return (mine - its).square().mean()


def similarities(features: Tensor) -> Tensor:
    """Products of every image's features with every other's, (b, b); float32 or more.

    Divided by the mean square of the features, which neither the loss nor its gradient depend on.

    Args:
        features: (b, ...), of any widths.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = _wide(features).flatten(1)
        size = rows.detach().square().mean().sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        # Another tensor than the layer's output, which may be changed in place behind it.
        rows = rows / size
        return rows @ rows.T


def _multiplied(inner: Tensor, middle: Tensor, outer: Tensor) -> Tensor:
    """``outer @ middle @ inner`` at each kernel position, channels in the last place in memory."""
    last = middle.movedim(1, -1)
    rows = (outer @ last.flatten(1)).reshape(-1, last.shape[-1])
    return (rows @ inner).view(len(outer), *last.shape[1:-1], inner.shape[1]).movedim(-1, 1)


def _orthonormal(rows: int, columns: int, numbers: torch.Generator) -> Tensor:
    random = torch.randn(rows, columns, dtype=torch.float64, generator=numbers)
    q: Tensor = torch.linalg.qr(random).Q
    return q


def _is_dense(layer: nn.Module) -> bool:
    """Whether every output depends on every input, by a weight that is a parameter."""
    return getattr(layer, "groups", 1) == 1 and how_computed(layer) is None


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


def _keep(kept: dict[str, Tensor], name: str, *, training: bool) -> Callable[..., None]:
    # A function, which a copy of the network shares.
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training == training:
            kept[name] = similarities(output)

    return hook


@torch.no_grad()
def _once_per_image(teacher: nn.Module, layers: list[str], example: Tensor) -> list[str]:
    """Those layers that put out something of each image, once per forward pass."""
    seen: dict[str, list[int]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[name].append(len(output))

    hooks = [teacher.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    device = next(teacher.parameters()).device
    # Two, since in some networks windows of an image count as images.
    images = example[:1].to(device).expand(2, *example.shape[1:])
    teacher(images)
    for hook in hooks:
        hook.remove()
    return [name for name in layers if seen[name] == [2]]


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or more; gradients go back through it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
