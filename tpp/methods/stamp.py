r"""Masks that a generator makes of a set of images, learned over many small data sets.

Song, Yoon, Yang, Hwang, "Rapid Structural Pruning of Neural Networks with Set-based Task-Adaptive
Meta-Pruning" (STAMP, arXiv:2006.12139). Only abstract and opening could be read: a network that was
trained once on a reference data set; a generator that reads a *set* of a new data set's images and
says which structures of it stay; meta-learned over subsets of the reference data, so that a few
gradient steps on a new data set give a good small network, which is then trained. Everything more
exact is inferred. It is in the spirit of STAMP, and not the published algorithm.

- Meta-training is a ``dense`` stage on the reference data, in ``episodes`` of a few classes: logits
  are those of the episode's classes, and network and generator are trained together by plain SGD
  over episodes, with no inner loop. The network's file keeps the generator beside it, as its
  companion ``generator``.
- Adaptation is a short ``regularize`` stage on the new data set that starts from this file with a
  classifier of its own (``model.checkpoint``, ``model.head: new``); ``prune`` and ``finetune``
  follow.
- The set :math:`D_s` are the first images of a step in which all channels are open: the first step
  of each episode, and one in ``refresh`` steps of the other stage. The steps behind it have masks
  of this set. No image is read twice for it, and ranks and micro-batches gather the same set.
- With :math:`f_i` what the classifier reads of image i, in training mode and without gradients,
  and :math:`e = relu(W f_i + b)`, the set's encoding s is the mean of the e or, with attention,
  their mean by weights :math:`softmax(q \cdot e / \sqrt{width})`: neither knows an order.
- For each layer that can have gates (:func:`tpp.channels.gates.gated_layers`), two linear layers
  make scores a of s and of the mean over set and positions of the layer's outputs; a filter's keep
  probability is :math:`p = \sigma(a)`.
- Masks multiply channels behind their BatchNorm and before the activation. In training

.. math:: z = \sigma((\log u - \log(1 - u) + a) / \tau)

  (binary concrete: Maddison et al., ICLR 2017), rounded to 0 or 1 with the gradient of z if
  ``hard``. u is drawn from seed and step: it is the same on all ranks and in all micro-batches.
- The budget's term is :math:`\lambda (\Omega - t)^2`, with the expected share of multiply-adds

.. math:: \Omega = \frac{\sum_l c_l \bar{p}_{in} \bar{p}_{out}}{\sum_l c_l}

  over the layers that lose filters or inputs, with means of p over channels. t is ``target`` in
  meta-training, and what ``pruning`` leaves in the other stage.
- For the last part of that stage masks are fixed: the filters of the highest a stay, exactly as
  many as ``pruning`` asks for. It ends with what is left when the others are removed.
"""

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels
from tpp.channels.gates import check_gates, close, gated_layers, hang_in, no_gates, take_off
from tpp.checkpoints.safetensors_files import sha256_of
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.methods import base
from tpp.models.architecture import architecture_of
from tpp.models.classifier import classifier_tensors
from tpp.plan import PruningPlan
from tpp.selection.budget import Unit, WidthCost
from tpp.selection.selection import losses_of, same_on_all_ranks

GENERATOR = "generator"
_STAGES = ("dense", "regularize")


class Settings(base.Settings):
    """Hyper-parameters; the values are ours.

    Attributes:
        set_size (images): the set that the generator reads; fewer where a step has fewer.
        encoder: how the set's encodings are pooled, by ``mean`` or ``attention``.
        width: width of the encoding of a set.
        hidden: width of the hidden layer behind each layer's scores.
        refresh (steps): the interval after which a set is drawn anew, where there are no episodes.
        budget: lambda, weight of the budget's term.
        target: expected share of multiply-adds that meta-training aims at.
        tau: temperature of the masks when a stage begins.
        tau_end: temperature of the masks when a stage ends; from ``tau`` on it falls by the same
            factor in each step.
        hard: whether masks are 0 or 1 in training.
        gradient: what the task's gradient is multiplied by on its way to the masks.
        open: mean of the scores' biases in the beginning.
        spread: standard deviation of the scores' biases in the beginning.
        fixed: share of the regularised stage after which masks are fixed.

    Example:
        {set_size: 128, encoder: attention, width: 64, hidden: 64, refresh: 32, budget: 5.0,
        target: 0.3, tau: 2.0, tau_end: 0.5, hard: false, gradient: 0.5, open: 2.0, spread: 0.25,
        fixed: 0.8}
    """

    set_size: Annotated[int, Field(ge=1)] = 64
    encoder: Literal["mean", "attention"] = "mean"
    width: Annotated[int, Field(ge=1)] = 32
    hidden: Annotated[int, Field(ge=1)] = 32
    refresh: Annotated[int, Field(ge=2)] = 16
    budget: Annotated[float, Field(ge=0)] = 10.0
    target: Annotated[float, Field(gt=0, le=1)] = 0.5
    tau: Annotated[float, Field(gt=0)] = 1.0
    tau_end: Annotated[float, Field(gt=0)] = 0.3
    hard: bool = True
    gradient: Annotated[float, Field(ge=0)] = 1.0
    open: float = 1.0
    spread: Annotated[float, Field(ge=0)] = 0.5
    fixed: Annotated[float, Field(gt=0, le=1)] = 0.7

    def for_batch(self, factor: Fraction) -> Self:
        """The set is drawn anew after as many images."""
        return super().for_batch(factor).changed(refresh=max(2, round(self.refresh / factor)))

    def tau_at(self, step: int, total: int) -> float:
        """Temperature in 0-based ``step`` of ``total`` steps."""
        return self.tau * (self.tau_end / self.tau) ** (step / total)


class STAMP(base.Method):
    """Train a generator of masks beside the weights; what it masks in the end goes."""

    name = "stamp"
    title = "STAMP"
    settings_type: ClassVar[type[base.Settings]] = Settings
    picks = "during"
    faithful = False
    trains_dense = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._stage = ""
        self._found: dict[str, LayerChannels] = {}
        self._reader = ""
        self._gates: dict[str, Gate] = {}
        self._hooks: list[Any] = []
        self._removed: dict[str, list[Any]] = {}
        self._filters: dict[str, int] = {}
        self._target: float = settings.target
        self._taken = 0
        self._plan: PruningPlan | None = None

    @property
    def plan(self) -> PruningPlan | None:
        """The filters that are masked for good; None as long as masks are not fixed."""
        return self._plan

    def check(self, model: nn.Module, plan: PruningPlan) -> None:
        """Raise UserError if a layer that is to lose filters cannot have gates."""
        check_gates(self.name, model, plan)

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Raise UserError where there is no classifier to read, or nothing to mask."""
        if stage in _STAGES:
            reader_of(model)
            if not gated_layers(model):
                raise UserError(
                    "name: stamp masks filters that go alone through a BatchNorm with weights to "
                    f"where they are read, and {type(model).__name__} has none"
                )

    def modify(self, model: nn.Module, stage: str) -> None:
        """Give the classifier the set's encoder, and every layer that can have one its gate."""
        if stage not in _STAGES:
            return
        self._stage, self._reader = stage, reader_of(model)
        self._found = gated_layers(model)
        reader = cast(Any, model.get_submodule(self._reader))
        reader.encoder = Encoder(reader.weight, self.settings)
        for name in self._found:
            layer = cast(Any, model.get_submodule(name))
            layer.gate = Gate(layer.weight, self.settings)

    def restore(self, model: nn.Module) -> None:
        """Close channels that are masked for good by their BatchNorm's entries; take all off."""
        self._take_off(model)
        for name, found in self._found.items():
            layer = cast(Any, model.get_submodule(name))
            close(model, found, layer.gate.stays)
            del layer.gate
        if self._found:
            del cast(Any, model.get_submodule(self._reader)).encoder

    def keeps(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The generator, where it was meta-trained."""
        return {GENERATOR: dict(self._parameters(model))} if self._stage == "dense" else {}

    def refuses_mask(self, stage: str) -> str | None:
        """As in :class:`tpp.methods.base.Method`."""
        return "of filters that will go" if stage == "regularize" else None

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Take up the generator of the stage's input, and hang masks in.

        Raises:
            UserError: a layer that is to lose filters cannot have gates; the stage's input has
                masked weights, or a generator of another network; an episode has but one step.
        """
        if context.stage not in _STAGES:
            return
        self.check_mask(context)
        assert context.total_steps is not None
        self._cycle = context.episode_steps or self.settings.refresh
        if self._cycle < 2:
            raise UserError(
                f"stages: episodes.steps: {self.name} takes the set from the first step of an "
                "episode, and there is no other; use 2 or more"
            )
        self._context, self._model = context, model
        self._encoder: Encoder = cast(Any, model.get_submodule(self._reader)).encoder
        gates = {name: cast(Any, model.get_submodule(name)).gate for name in self._found}
        self._take_up(context.companion(GENERATOR))
        device = next(model.parameters()).device
        names, example = [*self._found], context.example_input
        plan = None
        if context.stage == "regularize":
            names = context.selection.layers(model, example_input=example)
            if missing := [name for name in names if name not in gates]:
                raise no_gates(self.name, missing[0])
            plan = context.selection.select(model, example_input=example)
            if context.world_size > 1:
                plan = same_on_all_ranks(plan)
            self._filters = dict(plan.filters)
        self._gates = {name: gates[name] for name in names}
        for name in gates.keys() - self._gates.keys():
            gates[name].requires_grad_(False)
        if not self._gates:
            self._encoder.requires_grad_(False)
            return
        self._cost = budget_of(model, [self._found[name] for name in names], example).to(device)
        if plan is not None:
            gone = [len(plan.pruned[name]) for name in names]
            self._target = float(self._cost.share(torch.tensor(gone, device=device)))
        # All of this is written anew in every step, and so is no part of a state.
        weight = self._encoder.first
        self._encoder.masks = torch.zeros((), dtype=torch.bool, device=device)
        self._encoder.tau = weight.new_ones(())
        sizes = [len(gate.stays) for gate in self._gates.values()]
        self._noise = weight.new_full((sum(sizes),), 0.5)
        for gate, noise in zip(self._gates.values(), self._noise.split(sizes), strict=True):
            gate.noise = noise
        self._set = torch.zeros_like(self._encoder.images)
        self._means = weight.new_zeros(sum(sizes) + 1)
        if bool(self._encoder.fixed):
            self._write_plan()  # the stage goes on behind that step
        self._hang_in(model)

    def before_step(self, step: int) -> bool:
        """Write temperature and noise of the step, and whether it has masks."""
        if self._gates:
            total = self._context.total_steps
            assert total is not None
            self._encoder.masks.fill_(step % self._cycle > 0)
            self._encoder.tau.fill_(self.settings.tau_at(step, total))
            self._noise.copy_(noise_of(self._context.selection.seed, step, len(self._noise)))
        return False

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """The budget's term; what the micro-batch adds to the set is noted."""
        if not self._gates:
            return {}
        self._gather(len(batch[0]))
        share = self._cost.share(self._going())
        term = self.settings.budget * (share - self._target).square()
        for gate in self._gates.values():
            gate.logits = None
        # Without gradients it has them, of zero: every rank waits for those of all parameters.
        counts = self._encoder.masks & ~self._encoder.fixed
        return {"budget": torch.where(counts, term, 0 * term).to(outputs.dtype)}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take up the set of a step without masks, of all ranks; fix the masks when it is time."""
        if not self._gates or self._plan is not None:
            return
        context, encoder = self._context, self._encoder
        total = context.total_steps
        assert total is not None
        if step % self._cycle == 0:
            mine = torch.cat([self._set.flatten(), self._means])
            everyones = context.average(mine) * context.world_size
            images, means = everyones.split([self._set.numel(), len(self._means)])
            number = means[-1].round()
            # Of no image in a step that is left out, and of no number in one that is bad.
            good = (number > 0) & everyones.isfinite().all()
            encoder.images.copy_(torch.where(good, images.view_as(self._set), encoder.images))
            encoder.number.copy_(torch.where(good, number, encoder.number))
            sizes = [len(gate.stays) for gate in self._gates.values()]
            for gate, mean in zip(
                self._gates.values(), (means[:-1] / number).split(sizes), strict=True
            ):
                gate.outputs.copy_(torch.where(good, mean, gate.outputs))
        self._taken = 0
        self._set.zero_()
        self._means.zero_()
        if self._stage == "regularize" and step + 1 >= self.settings.fixed * total:
            self._fix()

    @torch.no_grad()
    def scalars(self, step: int) -> dict[str, float]:
        """Expected share of multiply-adds, mean keep probability, share of it that is decided."""
        if not self._gates:
            return {}
        p = torch.cat([torch.sigmoid(scores) for scores in self._scores().values()])
        return {
            "macs_expected": float(self._cost.share(self._going(self._scores()))),
            "keep": float(p.mean()),
            "decided": float(((p < 0.1) | (p > 0.9)).float().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What is aimed at, which a budget may find otherwise later; the rest is in tensors."""
        return {"target": self._target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what is aimed at."""
        self._target = float(state["target"])

    def _parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The generator's parameters by names of their own."""
        parts = {"encoder": cast(Any, model.get_submodule(self._reader)).encoder}
        parts |= {name: cast(Any, model.get_submodule(name)).gate for name in self._found}
        return {
            f"{part}.{name}": parameter.detach()
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def _take_up(self, given: Mapping[str, Tensor]) -> None:
        """Begin with the generator that the stage's input keeps, if it keeps one."""
        if bool(self._encoder.begun):
            return
        self._encoder.begun.fill_(True)
        own = self._parameters(self._model)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if given and shapes != {name: tuple(tensor.shape) for name, tensor in given.items()}:
            odd = next(
                name
                for name in sorted({*own, *given})
                if name not in given or shapes.get(name) != tuple(given[name].shape)
            )
            raise UserError(
                f"method {self.name}: the stage's input has a generator of another shape "
                f"({odd}): it takes the same network, method.width, method.hidden and "
                "method.encoder"
            )
        for name, tensor in given.items():
            own[name].copy_(tensor)

    def _hang_in(self, model: nn.Module) -> None:
        reader = model.get_submodule(self._reader)
        self._hooks.append(reader.register_forward_pre_hook(_read))
        for name, gate in self._gates.items():
            layer = model.get_submodule(name)
            self._hooks.append(layer.register_forward_hook(_look))
            self._removed[name] = hang_in(model, self._found[name], gate)
        generate = functools.partial(_generate, self._reader, tuple(self._gates))
        self._hooks.append(model.register_forward_pre_hook(generate))

    def _take_off(self, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, hooks in self._removed.items():
            take_off(model, self._found[name], hooks)
        self._hooks, self._removed = [], {}

    def _scores(self) -> dict[str, Tensor]:
        encoding = self._encoder.encode()
        return {name: gate.scores(encoding) for name, gate in self._gates.items()}

    def _going(self, scores: Mapping[str, Tensor] | None = None) -> Tensor:
        """How many filters of each layer are expected to go, (layers,), float64."""
        if scores is None:
            scores = {name: cast(Tensor, gate.logits) for name, gate in self._gates.items()}
        return torch.stack([torch.sigmoid(-a.double()).sum() for a in scores.values()])

    @torch.no_grad()
    def _gather(self, images: int) -> None:
        """Note what a micro-batch's images are to the set: those with the lowest numbers.

        Ranks take turns in the stream of samples, so that a rank's k-th image of a step is number
        ``k ranks + rank`` of it.
        """
        ranks, rank = self._context.world_size, self._context.rank
        room = len(self._set) - rank - self._taken * ranks
        many = max(0, min(images, -(-room // ranks)))
        first = self._taken * ranks + rank
        self._taken += images
        seen = cast(Tensor, self._encoder.seen)[:many]
        self._set[first : first + many * ranks : ranks] = seen.to(self._set.dtype)
        outputs = torch.cat([cast(Tensor, gate.seen)[:many] for gate in self._gates.values()], 1)
        self._means[:-1] += outputs.to(self._means.dtype).sum(0)
        self._means[-1] += many
        self._encoder.seen = None
        for gate in self._gates.values():
            gate.seen = None

    def _fix(self) -> None:
        """Choose the filters that stay; all ranks find the same."""
        model, context = self._model, self._context
        scores = {name: torch.sigmoid(a.double()) for name, a in self._scores().items()}
        self._take_off(model)  # the network is traced, as an ordinary one
        plan = context.selection.select(model, example_input=context.example_input, scores=scores)
        self._hang_in(model)
        if context.world_size > 1:
            plan = same_on_all_ranks(plan)
        for name, gate in self._gates.items():
            gate.stays.fill_(True)
            gate.stays[plan.pruned[name]] = False
        self._encoder.fixed.fill_(True)
        self._write_plan()

    def _write_plan(self) -> None:
        gone = {
            name: (~gate.stays).nonzero().flatten().tolist() for name, gate in self._gates.items()
        }
        self._plan = PruningPlan.from_indices(self._filters, gone)


class Encoder(nn.Module):
    """What is known of the set, and how it is read; a part of the classifier.

    Neither this nor :class:`Gate` has layers of its own, whose weights would look like the
    network's.

    Args:
        weight: of the classifier, (classes, inputs, ...), on the CPU or the meta device.
        settings: of the method.

    Attributes:
        images: what the classifier reads of each image, (set_size, inputs); the first ``number``.
        begun: whether the stage has begun, and its input's generator has been taken up.
        fixed: whether masks are those of the end.
        masks: whether the step has masks; they are open otherwise.
        tau: temperature of the step.
        seen: what the classifier reads of the images of the batch, (n, inputs).
    """

    images: Tensor
    number: Tensor
    begun: Tensor
    fixed: Tensor

    def __init__(self, weight: Tensor, settings: Settings) -> None:
        super().__init__()
        inputs, width = weight.shape[1], settings.width
        draw = _drawn_by(weight)
        self.first = draw((width, inputs), math.sqrt(2 / inputs))
        self.first_bias = draw((width,), 0)
        if settings.encoder == "attention":
            self.query = draw((width,), 1)
        self._attends = settings.encoder == "attention"
        images = weight.new_zeros(settings.set_size, inputs)
        self.register_buffer("images", images.detach())
        self.register_buffer("number", weight.new_zeros(()).detach())
        for name in ("begun", "fixed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=weight.device))
        self.masks: Any = None
        self.tau: Any = None
        self.seen: Tensor | None = None

    def encode(self) -> Tensor:
        """The set's encoding, (width,); of an empty set it is zero."""
        there = torch.arange(len(self.images), device=self.images.device) < self.number
        each = F.relu(F.linear(_standard(self.images), self.first, self.first_bias))
        if self._attends:
            fits = (each @ self.query) / math.sqrt(len(self.query))
            fits = fits.masked_fill(~there, torch.finfo(fits.dtype).min)
            return (fits.softmax(0) * there) @ each
        return (each * there[:, None]).sum(0) / self.number.clamp_min(1)


class Gate(nn.Module):
    """The masks of one layer's filters; a part of the layer.

    Args:
        weight: of the layer, (filters, ...), on the CPU or the meta device.
        settings: of the method.

    Attributes:
        outputs: mean of the layer's outputs over the set and all positions, (filters,).
        stays: the filters that stay, bool; all of them as long as masks are not fixed. The masks in
            evaluation mode.
        noise: u, (filters,), of the step.
        seen: means over positions of the layer's outputs for the batch, (n, filters).
        logits: a, (filters,), of the forward pass.
        factor: z, (1, filters).
    """

    outputs: Tensor
    stays: Tensor

    def __init__(self, weight: Tensor, settings: Settings) -> None:
        super().__init__()
        filters, inputs = len(weight), settings.width + len(weight)
        self._hard, self._gradient = settings.hard, settings.gradient
        draw = _drawn_by(weight)
        self.first = draw((settings.hidden, inputs), math.sqrt(2 / inputs))
        self.first_bias = draw((settings.hidden,), 0)
        self.second = draw((filters, settings.hidden), 0.5 / math.sqrt(settings.hidden))
        self.second_bias = draw((filters,), settings.spread, settings.open)
        self.register_buffer("outputs", weight.new_zeros(filters).detach())
        self.register_buffer("stays", torch.ones(filters, dtype=torch.bool, device=weight.device))
        self.noise: Tensor | None = None
        self.seen: Tensor | None = None
        self.logits: Tensor | None = None
        self.factor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing of a forward pass, which has its gradients here."""
        return {**self.__dict__, "seen": None, "logits": None, "factor": None}

    def scores(self, encoding: Tensor) -> Tensor:
        """a, (filters,), for a set's encoding."""
        known = torch.cat([encoding, _standard(self.outputs)])
        hidden = F.relu(F.linear(known, self.first, self.first_bias))
        return F.linear(hidden, self.second, self.second_bias)

    def decide(self, encoding: Tensor, encoder: Encoder) -> None:
        """Make the masks of a training step."""
        assert self.noise is not None
        self.logits = self.scores(encoding)
        mask = concrete(self.logits, self.noise, encoder.tau, hard=self._hard)
        mask = self._gradient * mask + (1 - self._gradient) * mask.detach()
        # Where there are none they are computed, and have gradients, of zero: every rank waits for
        # those of all parameters.
        mask = torch.where(encoder.masks, mask, torch.ones_like(mask))
        self.factor = torch.where(encoder.fixed, self.stays.to(mask.dtype), mask)[None]


def concrete(scores: Tensor, uniform: Tensor, tau: Tensor | float, *, hard: bool = False) -> Tensor:
    r"""Relaxed masks, :math:`\sigma((\log u - \log(1 - u) + a) / \tau)`.

    Args:
        scores: a, of any shape.
        uniform: u, of the same, in (0, 1).
        tau: temperature.
        hard: 1 where that is above a half and 0 elsewhere, with its gradient.
    """
    soft = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + scores) / tau)
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach()) if hard else soft


def noise_of(seed: int, step: int, count: int) -> Tensor:
    """u of a step, (count,), float32 in (0, 1), on the CPU: a function of its arguments."""
    numbers = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**62)
    return torch.rand(count, generator=numbers).clamp(2**-20, 1 - 2**-20)


def budget_of(model: nn.Module, layers: list[LayerChannels], example_input: Tensor) -> WidthCost:
    """Multiply-adds as a function of what each layer loses.

    Args:
        model: the network.
        layers: those that may lose filters, tied to no others.
        example_input: a batch (n, c, h, w), of which one image is counted.
    """
    units = [
        Unit((found.layer,), found.filters, 1, 1, found.filters - 1, losses_of([found], 1))
        for found in layers
    ]
    return WidthCost.of_macs(model, count(model, example_input=example_input), units)


def reader_of(model: nn.Module) -> str:
    """Name of the layer that tells classes apart.

    Raises:
        UserError: there is none.
    """
    architecture = architecture_of(model)
    tensors = classifier_tensors(architecture) if architecture is not None else frozenset()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" in tensors
    ]
    if not found:
        raise UserError(
            f"name: stamp reads what the classifier reads, and {type(model).__name__} has none"
        )
    return found[-1]


def _drawn_by(weight: Tensor) -> Callable[..., nn.Parameter]:
    """Draws parameters (shape, deviation, mean), which get no weight decay.

    By the weight itself: the same on all ranks, and however often a stage begins anew.
    """
    numbers = torch.Generator()
    if weight.device.type != "meta":
        numbers.manual_seed(int(sha256_of(weight.detach().contiguous())[:14], 16))

    def draw(shape: tuple[int, ...], deviation: float, mean: float = 0) -> nn.Parameter:
        values = torch.empty(shape).normal_(mean, deviation, generator=numbers)
        parameter = nn.Parameter(values.to(device=weight.device, dtype=weight.dtype))
        cast(Any, parameter).spared = True
        return parameter

    return draw


def _standard(values: Tensor) -> Tensor:
    """Of mean 0 and variance 1 along the last dimension."""
    return F.layer_norm(values, values.shape[-1:])


def _per_image(values: Tensor) -> Tensor:
    """Means over all dimensions but the first and that of the channels, (n, channels)."""
    values = values.detach()
    if values.dim() == 2:
        return values
    return values.flatten(2).mean(2) if values.dim() == 4 else values.flatten(1, -2).mean(1)


# Functions, which a copy of the network shares.
def _read(reader: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if reader.training:
        cast(Any, reader).encoder.seen = _per_image(inputs[0])


def _look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if layer.training:
        cast(Any, layer).gate.seen = _per_image(output)


def _generate(reader: str, layers: tuple[str, ...], model: nn.Module, inputs: Any) -> None:
    gates = [cast(Any, model.get_submodule(name)).gate for name in layers]
    if not model.training:
        for gate in gates:
            gate.factor = gate.stays[None]
        return
    encoder: Encoder = cast(Any, model.get_submodule(reader)).encoder
    with torch.autocast(encoder.first.device.type, enabled=False):
        encoding = encoder.encode()
        for gate in gates:
            gate.decide(encoding, encoder)
