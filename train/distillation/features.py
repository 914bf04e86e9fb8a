"""Which outputs inside a network are compared with a teacher's, and keeping them for a moment."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError
from train.distillation.losses import attention_map

_TOKEN_STAGES = 4  # of a network whose outputs inside are all of one size


@dataclass(frozen=True)
class Output:
    """What a module was seen to put out.

    Attributes:
        shape: with the number of images.
        side: height of the images that it took; None where it took none.
        calls: how often it was asked in one pass.
        changed: whether something changed it in place afterwards.
    """

    shape: tuple[int, ...]
    side: int | None
    calls: int = 1
    changed: bool = False

    @property
    def channels(self) -> int | None:
        """Which dimension the channels are; None where there are no places to tell apart.

        Images are squares: of (n, a, b, c) those two that are alike are the places.
        """
        if len(self.shape) == 3:
            return 2
        if len(self.shape) != 4 or max(self.places) < 2:
            return None
        return 3 if self._channels_last else 1

    @property
    def places(self) -> tuple[int, ...]:
        """Height and width, or the number of tokens."""
        if len(self.shape) == 3:
            return self.shape[1:2]
        return self.shape[1:3] if self._channels_last else self.shape[2:4]

    @property
    def _channels_last(self) -> bool:
        _, first, second, third = self.shape
        return first == second != third


@torch.no_grad()
def look_inside(network: nn.Module, images: Tensor) -> dict[str, Output]:
    """What every module of a network puts out, by name, in the order in which they are done.

    One pass in evaluation mode; the network is left as it was.

    Args:
        network: on the images' device.
        images: (n, c, h, w); n other than 1, as windows of an image count as images in some.
    """
    held: dict[str, tuple[Tensor, int]] = {}
    found: dict[str, Output] = {}

    def watch(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        before = found.pop(name, None)
        taken = inputs[0] if inputs else None
        side = None
        if isinstance(taken, Tensor) and taken.dim() == 4:
            side = Output(tuple(taken.shape), None).places[0]
        calls = before.calls + 1 if before else 1
        found[name] = Output(tuple(output.shape), side, calls)
        held[name] = output, output._version

    def hook(name: str) -> Any:
        return lambda module, inputs, output: watch(name, inputs, output)

    modes = {module: module.training for module in network.modules()}
    handles = [m.register_forward_hook(hook(name)) for name, m in network.named_modules() if name]
    try:
        network.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return {
        name: replace(output, changed=held[name][0]._version != held[name][1])
        for name, output in found.items()
        if output.shape[:1] == images.shape[:1]
    }


def find_stages(network: nn.Module, seen: Mapping[str, Output]) -> dict[tuple[int, ...], str]:
    """The modules whose outputs end what a network does at one resolution, by that.

    Those are ``layer1`` to ``layer4`` of a ResNet, ``features.N`` or ``stages.N`` of others: the
    last one at each resolution among the network's parts, taken apart as long as a part goes
    through several resolutions; parts with parts of their own where there are such, which leaves
    out a stem's single layers. What is changed in place later on is passed over.

    A network whose parts have all one number of tokens has four: of its longest row of blocks, the
    last one of each quarter; they go by (tokens, quarter).

    Args:
        network: what was looked at.
        seen: as :func:`look_inside` found it.
    """
    units = {name: network.get_submodule(name) for name in _units(network, "", seen)}
    stages: dict[tuple[int, ...], str] = {}
    for only_parted in (True, False):
        for name, module in units.items():
            if not only_parted or any(True for _ in module.children()):
                stages[seen[name].places] = name
        if len(stages) > 1 or not only_parted:
            break
        stages.clear()
    return stages if len(stages) > 1 else _quarters(seen) or stages


def _units(module: nn.Module, prefix: str, seen: Mapping[str, Output]) -> Iterator[str]:
    """Names of the parts that keep to one resolution, and go down once at most."""
    for part, child in module.named_children():
        name = f"{prefix}{part}"
        output = seen.get(name)
        if output is None or _goes_through_several(name, output, seen):
            yield from _units(child, f"{name}.", seen)
        elif len(output.shape) == 4 and _usable(output):
            yield name


def _usable(output: Output) -> bool:
    return output.channels is not None and output.calls == 1 and not output.changed


def _goes_through_several(name: str, output: Output, seen: Mapping[str, Output]) -> bool:
    inside = {
        other.places[0]
        for key, other in seen.items()
        if key.startswith(f"{name}.") and len(other.shape) == 4 and other.channels is not None
    }
    if not inside:
        return False
    is_image = len(output.shape) == 4
    first = max(inside) if output.side is None else output.side
    last = output.places[0] if is_image and output.channels is not None else min(inside) - 1
    return any(last < side < first for side in inside)


def _quarters(seen: Mapping[str, Output]) -> dict[tuple[int, ...], str]:
    rows: dict[tuple[str, int], list[str]] = {}
    parted = {name.rpartition(".")[0] for name in seen}
    for name, output in seen.items():
        if len(output.shape) == 3 and name in parted and _usable(output):
            row = rows.setdefault((name.rpartition(".")[0], output.places[0]), [])
            row.append(name)
    if not rows:
        return {}
    (_, tokens), longest = max(rows.items(), key=lambda item: len(item[1]))
    count = min(_TOKEN_STAGES, len(longest))
    last = [-(-len(longest) * (quarter + 1) // count) - 1 for quarter in range(count)]
    return {(tokens, quarter): longest[place] for quarter, place in enumerate(last)}


def choose_layers(
    student: nn.Module,
    in_student: Mapping[str, Output],
    teacher: nn.Module,
    in_teacher: Mapping[str, Output],
    layers: Sequence[str] | None,
    key: str,
) -> list[tuple[str, str]]:
    """Names of the modules whose outputs are compared: of the student, and of the teacher.

    Args:
        student, teacher: the networks.
        in_student, in_teacher: as :func:`look_inside` found them.
        layers: names in both; None for the :func:`find_stages` of both at the same resolution.
        key: of ``layers`` in the configuration.

    Raises:
        UserError: there are none, or a name is none, or of a module whose outputs cannot be
            compared.
    """
    if layers is None:
        mine, its = find_stages(student, in_student), find_stages(teacher, in_teacher)
        pairs = [(name, its[places]) for places, name in mine.items() if places in its]
        if not pairs:
            raise UserError(f"{key}: network and teacher have no resolution in common; name layers")
        return pairs
    for whose, seen in (("network", in_student), ("teacher", in_teacher)):
        for name in layers:
            _check_layer(name, seen, whose, key)
    for name in layers:
        one, other = in_student[name], in_teacher[name]
        alike = len(one.shape) == len(other.shape) == 4 or one.places == other.places
        if not alike:
            raise UserError(
                f"{key}: {name} has {one.places} places in the network and {other.places} in the "
                "teacher"
            )
    return [(name, name) for name in layers]


def _check_layer(name: str, seen: Mapping[str, Output], whose: str, key: str) -> None:
    output = seen.get(name)
    if output is None:
        near = difflib.get_close_matches(name, seen, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{key}: the {whose} has no module {name!r} that gives activations of images{hint}"
        )
    if output.channels is None:
        raise UserError(f"{key}: {name} of the {whose} tells no places of an image apart")
    if output.calls > 1:
        raise UserError(f"{key}: {name} of the {whose} is used {output.calls} times in one pass")
    if output.changed:
        raise UserError(
            f"{key}: what {name} of the {whose} gives is changed in place afterwards; name the "
            "block around it"
        )


class Attention:
    """Keeps the attention maps of some modules of a network until they are taken.

    Args:
        network: gets a hook on each of them.
        channels: which dimension of their outputs is that of the channels, by name.
        training: whether maps are kept of passes in training mode, or of those in evaluation mode;
            the others leave nothing.
    """

    def __init__(self, network: nn.Module, channels: Mapping[str, int], *, training: bool) -> None:
        self._maps: dict[str, Tensor] = {}
        self._names = list(channels)
        for name, dimension in channels.items():
            module = network.get_submodule(name)
            module.register_forward_hook(_keep(self._maps, name, dimension, training))

    def take(self) -> list[Tensor]:
        """The maps of the last pass, which are then forgotten."""
        maps = [self._maps[name] for name in self._names]
        self._maps.clear()
        return maps


def _keep(maps: dict[str, Tensor], name: str, channels: int, training: bool) -> Any:
    # A function, which a copy of the network shares: a bound method would be copied with all that
    # it holds.
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training == training:
            maps[name] = attention_map(output, channels)

    return hook
