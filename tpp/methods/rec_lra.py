r"""Recursive local representation alignment: training a dense network without a backward pass.

Ororbia, Mali, Kifer & Giles, "Backpropagation-Free Deep Learning with Recursive Local
Representation Alignment", AAAI 2023 (arXiv 2002.03911). It prunes nothing: it trains. Layers are
numbered 1 to L, :math:`h_l` is what the activation :math:`\phi` gets, :math:`z_l = \phi(h_l)`, and
:math:`e_L` is softmax minus labels. Every other layer gets an error through matrices E that are
trained themselves, from the output where l is a multiple of m, and from the next layer elsewhere:

.. math:: d_l = E_l e_L \;\text{or}\; E_l e_{l+1}, \quad
   e_l = z_l - \phi(h_l - \beta d_l), \quad \Delta W_l = \frac{1}{B} \sum e_l z_{l-1}^T

The optimiser takes each Delta for a gradient. No layer's gradient goes through another layer, and
no derivative of the activation is taken.

Here the paper could not be read: the equations are those of a third party's port
(amirhosseinmhd/deep-pc) and of the authors' code of the predecessor (AnkurMali/LRA-E). Inferred, or
ours:

- The rule of E. As printed, the update makes E grow without end; descent on the errors, its
  opposite, makes E vanish, and nothing learns. The default is the predecessor's: E changes as the
  weights' transpose does, by :math:`\gamma z_l e_j^T`.
- E of the next layer has the shape of that layer's weights and is applied as their transpose is, so
  that in convolutional networks it is a convolution; pooling between is gone back through. E from
  the output is a full matrix.
- The mixed error is that of hidden layers; the output's stays the loss's gradient.
- The re-projection is that of each rank's micro-batch. Their mean keeps the bound, but is not the
  re-projection of the mean: more ranks or accumulation are slightly another training.
- What m and the bound c were, the start of W and E in their scale, the learning rate's schedule.

What a step keeps of the activations does not grow with the depth. The network is run a second
time, once :math:`e_L` is known: where l is a multiple of m, layer l needs nothing from above, so
its block of m layers is finished there and then and forgotten. Backpropagation keeps all layers; it
computes about as much (forward, errors, weights; here forward, forward, weights, and the errors
within blocks). What is made meanwhile, the updates, is as large as the gradients are.
"""

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.hooks import RemovableHandle

from tpp.checkpoints.safetensors_files import sha256_of
from tpp.common.errors import UserError, reason_of
from tpp.methods import base
from tpp.models.architecture import example_input_for, meta_copy
from tpp.models.meta_runs import ShapesOnly

# What may stand between weight layers beside activations: nothing that learns or draws numbers.
_BETWEEN = ("torch.nn.modules.pooling", "torch.nn.modules.flatten", "torch.nn.modules.padding")
# Share of the error itself in the mixed one, the rest being its sign (appendix, p. 15).
_MIXED_FROM_OUTPUT, _MIXED_FROM_NEXT = 0.19, 0.24
ERRORS = "errors"  # the name of E on its layer


class Settings(base.Settings):
    """Values are the published ones where any are known.

    Attributes:
        beta: how far a layer's target is from what the layer gives.
        gamma: factor of the update of E, the matrices that carry errors.
        error_skip (layers): one layer in so many gets its error from the output; 0 for none, and
            then a step keeps all layers in memory.
        rule: how E changes: ``lra_e``, ``published`` (by :math:`+d e^T`: E grows), ``descent`` (by
            :math:`-d e^T`: E vanishes) or ``fixed``.
        mixed: whether errors are mixed with their signs.
        reproject: the largest norm of each tensor's update; null for no limit.
        noise: standard deviation of the Gaussian noise on the images in training (published: 0.1,
            on images of deviation 1).
        error_std: standard deviation of E at the start; null for one over the root of its fan-in.

    Example:
        {beta: 0.1, gamma: 0.2, error_skip: 3, rule: fixed, mixed: true, reproject: 2.0, noise: 0.1,
        error_std: 0.05}
    """

    beta: Annotated[float, Field(ge=0)] = 0.1205
    gamma: Annotated[float, Field(ge=0)] = 0.1524
    error_skip: Annotated[int, Field(ge=0)] = 2
    rule: Literal["lra_e", "published", "descent", "fixed"] = "lra_e"
    mixed: bool = False
    reproject: Annotated[float, Field(gt=0)] | None = 1.0
    noise: Annotated[float, Field(ge=0)] = 0.0
    error_std: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _learns(self) -> "Settings":
        if self.rule == "descent" and self.mixed:
            raise ValueError("rule: descent with mixed errors ends at chance; use rule: lra_e")
        return self


class RecLRA(base.Method):
    """Train a dense network's layers each by its own error.

    A reconstruction: what is inferred stands at the head of this module.
    """

    name = "rec_lra"
    title = "rec-LRA"
    settings_type = Settings
    faithful: ClassVar[bool] = False
    trains_dense: ClassVar[bool] = True
    needs_cross_entropy: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._chain: list[_Link] = []
        self._handles: list[RemovableHandle] = []
        self._network: nn.Module | None = None
        self._images: Tensor | None = None
        self._second: _SecondPass | None = None
        self._image: tuple[int, ...] = ()

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Raise UserError if the network is no chain of weight layers and activations."""
        if stage == "dense":
            _chain(model)

    def modify(self, model: nn.Module, stage: str) -> None:
        """Give every layer but the last its E: parameters, or buffers where they are fixed."""
        if stage != "dense":
            return
        self._chain = _chain(model)
        for number, link in enumerate(self._chain[:-1], 1):
            above = self._chain[-1] if self._skips(number) else self._chain[number]
            weight = _weight(model, above.layer)
            outputs = above.size if self._skips(number) else weight[:, 0].numel()
            shape = (link.size, outputs) if self._skips(number) else tuple(weight.shape)
            std = self.settings.error_std or outputs**-0.5
            layer = model.get_submodule(link.layer)
            seed = int(sha256_of(_weight(model, link.layer).detach())[:14], 16)
            errors = std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            if self.settings.rule == "fixed":
                layer.register_buffer(ERRORS, errors)
            else:
                layer.register_parameter(ERRORS, nn.Parameter(errors))

    def restore(self, model: nn.Module) -> None:
        """Take E and the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._network, self._images = [], None, None
        for link in self._chain[:-1]:
            delattr(model.get_submodule(link.layer), ERRORS)

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Cut the network between its layers from now on."""
        if not self._chain:
            return
        self._network, self._image = model, context.example_input.shape[1:]
        self._handles.append(model.register_forward_pre_hook(self._begin))
        for number, link in enumerate(self._chain, 1):
            layer = model.get_submodule(link.layer)
            before = functools.partial(self._before, number)
            self._handles.append(layer.register_forward_pre_hook(before))
            if link.activation is not None:
                activation = model.get_submodule(link.activation)
                after = functools.partial(self._after, number)
                self._handles.append(activation.register_forward_hook(after))

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """The local discrepancy :math:`\\frac{1}{B} \\sum_l \\|e_l\\|^2`, as logged.

        Its gradient is not the discrepancy's own: of every layer's weights but the last one's it is
        Delta W, of each E its Delta, and of the last weights what re-projection changes of the
        task's gradient.
        """
        if self._network is None:
            return {}
        labels = batch[1]
        if labels.dim() == 1:
            labels = F.one_hot(labels, outputs.shape[1])
        logits = _wide(outputs.detach())
        second = _SecondPass(self, logits.softmax(1) - labels)
        self._second = second
        try:
            # Neither through DDP nor compiled, and with the same noise: below its own hooks.
            self._network.forward(self._images)
        finally:
            self._second = self._images = None
        found = second.updates
        value: Tensor = _Given.apply(second.discrepancy, [*found.values()], *found)
        return {"discrepancy": value}

    def _skips(self, number: int) -> bool:
        """Whether a layer gets its error from the output."""
        skip = self.settings.error_skip
        return skip > 0 and number % skip == 0

    def _begin(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not model.training:
            return None
        images = inputs[0]
        if self.settings.error_skip and images.shape[1:] != self._image:
            raise UserError(
                "method.error_skip: E from the output is made for images of "
                f"{tuple(self._image)}, and training has {tuple(images.shape[1:])}: leave "
                "data.train_size out, or use error_skip: 0"
            )
        if self.settings.noise:
            images = images + self.settings.noise * torch.randn_like(images)
        self._images = images
        return (images,)

    def _before(self, number: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """No gradient goes further down than to a layer."""
        if not layer.training:
            return None
        if self._second is not None:
            self._second.arrived(number, layer, inputs[0])
        return (inputs[0].detach(),)

    def _after(
        self, number: int, activation: nn.Module, inputs: tuple[Tensor, ...], z: Tensor
    ) -> Any:
        """Nor past it by a skip connection."""
        if not activation.training:
            return None
        z = z.detach()
        if self._second is not None:
            z = self._second.activated(number, activation, inputs[0].detach(), z)
        return z


@dataclass(frozen=True)
class _Link:
    """A weight layer, and what follows it.

    Attributes:
        layer: its name.
        activation: name of the module that gets its output; None of the last layer.
        size: numbers in an image's output.
    """

    layer: str
    activation: str | None
    size: int


@dataclass
class _Record:
    """What the second pass keeps of a layer until it has its update.

    Attributes:
        layer: Linear or Conv2d.
        path: the layer's input, with its history back to ``below``.
        below: the activation before it that the history begins with; None where none is needed.
        activation, h: what follows the layer, and what that got.
        error: e, float32 or wider.
        delta: of the weights, before re-projection.
    """

    layer: Any
    path: Tensor
    below: Tensor | None
    activation: Any = None
    h: Any = None
    error: Tensor | None = None
    delta: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        return _wide(self.path.detach())


class _SecondPass:
    """The updates of all layers, made block by block while the network runs.

    Args:
        method: says how.
        error: e_L of each image, (B, classes).

    Attributes:
        updates: by parameter.
        discrepancy: sum of the squared errors of the hidden layers, mean over images.
    """

    def __init__(self, method: RecLRA, error: Tensor) -> None:
        self._settings, self._skips = method.settings, method._skips
        self._depth = len(method._chain)
        self._top = error
        self._block: list[_Record] = []
        self._leaf: Tensor | None = None
        self.updates: dict[nn.Parameter, Tensor] = {}
        self.discrepancy = error.new_zeros(())

    def arrived(self, number: int, layer: nn.Module, inputs: Tensor) -> None:
        """Layer ``number`` is about to run."""
        record = _Record(layer, inputs, self._leaf)
        self._leaf = None
        if number < self._depth:
            self._block.append(record)
            return
        record.error = self._top
        with torch.autocast(inputs.device.type, enabled=False), torch.no_grad():
            updates = self._updates(record)
            self._learn(record)
            if self._settings.reproject is not None:
                # The task's own gradient comes to it.
                for parameter, update in updates:
                    self.updates[parameter] = self._bounded(update) - update

    def activated(self, number: int, activation: nn.Module, h: Tensor, z: Tensor) -> Tensor:
        """Layer ``number`` has run; returns what goes on to the next one."""
        record = self._block[-1]
        record.activation, record.h = activation, _wide(h)
        if not self._skips(number):
            self._leaf = z.requires_grad_()
            return z
        with torch.autocast(h.device.type, enabled=False), torch.no_grad():
            self._learn(None)
        return z

    def _learn(self, above: _Record | None) -> None:
        """Work down the block, from layer ``above`` it or from the output."""
        beta, batch = self._settings.beta, len(self._top)
        while self._block:
            record = self._block.pop()  # what is above the layer after it is kept no longer
            phi = record.activation.forward
            z = phi(record.h)
            sent, change = self._sent(record, above, z)
            raw = z - phi(record.h - beta * sent)
            self.discrepancy += raw.square().sum() / batch
            record.error = self._mixed(raw, from_output=above is None)
            for parameter, update in self._updates(record):
                self.updates[parameter] = self._bounded(update)
            if change is not None:
                self.updates[record.layer.errors] = self._bounded(self._settings.gamma * change)
            above = record

    def _sent(
        self, record: _Record, above: _Record | None, z: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The error d that a layer is sent, shaped as its output, and how E changes; None: not."""
        rule = self._settings.rule
        errors = _wide(record.layer.errors.detach())
        if above is None:
            sent = self._top @ errors.T
            local = z.flatten(1) if rule == "lra_e" else sent
            change = local.T @ self._top / len(self._top)
            sent = sent.reshape(z.shape)
        else:
            assert above.error is not None and above.below is not None
            arriving = _sent_down(above.layer, errors, above.inputs, above.error)
            (sent,) = torch.autograd.grad(above.path, above.below, arriving.to(above.path.dtype))
            sent = _wide(sent)
            assert above.delta is not None
            change = above.delta
            if rule != "lra_e":
                change = _of_weights(above.layer, arriving, above.error) / len(self._top)
        if rule == "fixed":
            return sent, None
        return sent, -change if rule == "published" else change

    def _updates(self, record: _Record) -> list[tuple[nn.Parameter, Tensor]]:
        """Of a layer's weights, and biases if it has any, before re-projection."""
        layer, error = record.layer, record.error
        assert error is not None
        record.delta = _of_weights(layer, record.inputs, error) / len(error)
        found = [(layer.weight, record.delta)]
        if layer.bias is not None:
            places = [0, *range(2, error.dim())]
            found.append((layer.bias, error.sum(places) / len(error)))
        return found

    def _mixed(self, error: Tensor, *, from_output: bool) -> Tensor:
        if not self._settings.mixed:
            return error
        share = _MIXED_FROM_OUTPUT if from_output else _MIXED_FROM_NEXT
        return share * error + (1 - share) * error.sign()

    def _bounded(self, update: Tensor) -> Tensor:
        """An update, scaled down to the largest norm there may be."""
        bound = self._settings.reproject
        if bound is None:
            return update
        norm = torch.linalg.vector_norm(update).clamp_min(torch.finfo(update.dtype).tiny)
        return update * (bound / norm).clamp_max(1)


class _Given(torch.autograd.Function):
    """A value whose gradients are given: ``apply(value, gradients, *parameters)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, share: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(share.to(given.dtype) * given for given in ctx.gradients))


def _weight(model: nn.Module, layer: str) -> Tensor:
    found: Any = model.get_submodule(layer)
    weight: Tensor = found.weight
    return weight


def _of_weights(layer: Any, inputs: Tensor, errors: Tensor) -> Tensor:
    """The gradient of ``errors`` times a layer's outputs, summed, with respect to its weights."""
    if isinstance(layer, nn.Linear):
        return errors.T @ inputs
    return conv2d_weight(inputs, layer.weight.shape, errors, *_geometry(layer))


def _sent_down(layer: Any, weights: Tensor, inputs: Tensor, errors: Tensor) -> Tensor:
    """The same gradient with respect to the inputs, had the layer these weights."""
    if isinstance(layer, nn.Linear):
        return errors @ weights
    return conv2d_input(inputs.shape, weights, errors, *_geometry(layer))


def _geometry(layer: nn.Conv2d) -> tuple[Any, Any, Any, int]:
    return layer.stride, layer.padding, layer.dilation, layer.groups


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _chain(model: nn.Module) -> list[_Link]:
    """The weight layers of a network in the order of its forward pass.

    Raises:
        UserError: they are no chain in which an activation follows on each but the last.
    """
    network = meta_copy(model).eval()
    calls: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append((name, module, tuple(output.shape)))

    for name, module in network.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(functools.partial(note, name))
    images = example_input_for(network, "meta").to(next(network.parameters()).dtype)
    try:
        with torch.inference_mode(False), torch.no_grad(), ShapesOnly():
            network(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"name: {type(model).__name__} does not run: {reason_of(error)}") from None

    def refuse(why: str) -> UserError:
        return UserError(
            f"name: rec_lra trains chains of linear layers and convolutions with an activation "
            f"behind each but the last (such as plain_mlp, plain_convnet), and in "
            f"{type(model).__name__} {why}"
        )

    links: list[_Link] = []
    for position, (name, module, shape) in enumerate(calls):
        following = calls[position + 1] if position + 1 < len(calls) else None
        kind = type(module).__name__
        if isinstance(module, nn.Linear | nn.Conv2d):
            if any(link.layer == name for link in links):
                raise refuse(f"{name} runs twice")
            if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(
                getattr(module, "padding", 0), str
            ):
                raise refuse(f"{name} does not pad with a number of zeros")
            if len(shape) != (2 if isinstance(module, nn.Linear) else 4):
                raise refuse(f"{name} is not applied once to an image")
            follows = following is not None and _is_activation(following[1])
            if following is not None and not follows:
                raise refuse(
                    f"{name} is followed by {following[0]} ({type(following[1]).__name__})"
                )
            activation = following[0] if following is not None else None
            links.append(_Link(name, activation, math.prod(shape[1:])))
        elif not _is_activation(module) and type(module).__module__ not in _BETWEEN:
            raise refuse(f"{name} is a {kind}")
        elif getattr(module, "inplace", False):
            raise refuse(f"{name} ({kind}) overwrites what it gets: inplace=False")
    known = {f"{link.layer}.{own}" for link in links for own in ("weight", "bias")}
    foreign = [name for name, _ in network.named_parameters() if name not in known]
    if foreign:
        raise refuse(f"{foreign[0]} is a parameter of no such layer")
    activations = [link.activation for link in links]
    if len(links) < 2 or None in activations[:-1] or activations[-1] is not None:
        raise refuse("the last layer is not the output")
    if len({*activations}) < len(links):
        raise refuse("two layers share one activation module")
    return links


def _is_activation(module: nn.Module) -> bool:
    """Whether it is a function of its input without parameters."""
    known = type(module).__module__ == "torch.nn.modules.activation"
    return isinstance(module, nn.Identity) or (
        known and not isinstance(module, nn.MultiheadAttention | nn.RReLU)
    )
