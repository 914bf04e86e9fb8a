"""Which of a foreign file's tensors are a network's, and what they are called there.

Wrappers put words into names, whole networks sit below a prefix, and counters, losses and heads
for training lie beside them. A tensor is left out only if it can be told to be no part of the
network: one that could be a layer of it means that the network is another.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tpp.common.errors import UserError
from tpp.models.fitting import few

# Words that wrappers put in, at any place: DataParallel and DDP, torch.compile, Lightning and
# Accelerate, FSDP, activation checkpointing.
_WRAPPERS = {
    *("module", "_orig_mod", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
_COUNTER = "num_batches_tracked"
_THOP = ("total_ops", "total_params")  # what thop.profile leaves behind in every module
# What Swin Transformers compute from their sizes and may keep beside their weights.
OF_WINDOWS = ("relative_position_index", "attn_mask")
_HEAD = re.compile(r"aux", re.IGNORECASE)
_LOSS = re.compile(r"(.*_)?(loss|losses|criterion|criteria)(_.*|\d*)", re.IGNORECASE)
# How weights are called that are computed from others, and what makes plain ones of them.
_COMPUTED = {
    r"\.?(weight|bias)_(orig|mask)$": "torch.nn.utils.prune.remove",
    r"\.?weight_[gvu]$": "torch.nn.utils.remove_weight_norm (or remove_spectral_norm)",
    r"\.?parametrizations\.": "torch.nn.utils.parametrize.remove_parametrizations",
}
_MOST_BEGINNINGS = 4


@dataclass(frozen=True)
class Match:
    """Where the tensors of a network are.

    Attributes:
        names: {name in the network: name in the file}; those that count batches may be missing.
        left_out: names in the file that are no part of the network.
        notes: what of it a user should know.
    """

    names: dict[str, str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _File:
    """The tensors of a file by their names without wrappers' words."""

    tensors: Mapping[str, Tensor]
    bare: dict[str, str] = field(init=False)
    twice: set[str] = field(init=False)

    def __post_init__(self) -> None:
        counts = Counter(map(_bare, self.tensors))
        self.twice = {name for name, count in counts.items() if count > 1}
        self.bare = {_bare(name): name for name in reversed(list(self.tensors))}


def match_names(tensors: Mapping[str, Tensor], wanted: Sequence[str], network: str) -> Match:
    """Find a network's tensors in a foreign file.

    Args:
        tensors: what the file holds, by name.
        wanted: the names in the network's ``state_dict``.
        network: what to call it in messages.

    Raises:
        UserError: it is not all there, or is there more than once, or beside it are tensors that
            could be layers of another network of its kind.
    """
    needed = [name for name in wanted if not name.endswith(_COUNTER)]
    if all(name in tensors for name in needed):
        names = {name: name for name in wanted if name in tensors}
        return _without_the_rest(tensors, names, {"": needed}, network)
    file = _File(tensors)
    bare = {_bare(name): name for name in wanted}
    if len(bare) < len(wanted):  # the network itself has modules that are called as wrappers are
        bare = {name: name for name in wanted}
    parts = _prefixes(file, [name for name, own in bare.items() if own in set(needed)], network)
    if parts is None:
        raise UserError(_misfit(tensors, needed, network))
    names = {}
    for prefix, members in parts.items():
        inside = {name.partition(".")[0] for name in members}
        for name, own in bare.items():
            place = prefix + name
            if name.partition(".")[0] in inside and place in file.bare:
                if place in file.twice:
                    raise UserError(
                        f"holds {own} more than once, as {few(_all_called(place, tensors))}"
                    )
                names[own] = file.bare[place]
    names = {name: names[name] for name in wanted if name in names}
    return _without_the_rest(tensors, names, parts, network)


def rename_part(
    tensors: Mapping[str, Tensor], match: Match, wanted: Collection[str], network: str
) -> dict[str, Tensor]:
    """Give a set of tensors that go with a network's, such as a momentum, the network's names.

    The set need not be complete. Where its names cannot be understood they stay as they are.

    Args:
        tensors: by the names of their file.
        match: of the file that the network's tensors came from.
        wanted: the names in the network's ``state_dict``.
        network: what to call it in messages.
    """
    try:
        whole = match_names(tensors, list(wanted), network)
        return {own: tensors[name] for own, name in whole.names.items()}
    except UserError:
        pass
    known = {name: own for own, name in match.names.items()}
    known |= {_bare(name): own for own, name in match.names.items()}
    known |= {_bare(own): own for own in wanted} | {own: own for own in wanted}
    renamed = {}
    for name, tensor in tensors.items():
        if name in match.left_out or (_foreign(_bare(name), tensor) and _bare(name) not in known):
            continue
        own = known.get(name, known.get(_bare(name), name))
        renamed[own] = tensor
    return renamed


def beginnings(names: Collection[str]) -> str:
    """What the names of a file begin with, for a message."""
    counts = Counter(name.partition(".")[0] + ("." if "." in name else "") for name in names)
    shown = [
        f"{start} ({count})" if start.endswith(".") else start
        for start, count in counts.most_common(_MOST_BEGINNINGS)
    ]
    return ", ".join(shown) + (", ..." if len(counts) > _MOST_BEGINNINGS else "")


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _all_called(bare: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if _bare(name) == bare]


def _prefixes(file: _File, needed: Sequence[str], network: str) -> dict[str, list[str]] | None:
    """{prefix: the network's names that lie below it}; None if not all can be found."""
    everything = [prefix for prefix in _candidates(file, needed) if _covers(file, prefix, needed)]
    if len(everything) > 1:
        # The one that is this network and nothing more, if there is one such.
        exact = [p for p in everything if not _unexplained(file, {p: list(needed)})]
        if len(exact) != 1:
            raise UserError(
                f"holds {network} {len(everything)} times, with names that begin with "
                f"{few(everything)}; save the one that is meant"
            )
        everything = exact
    if everything:
        return {everything[0]: list(needed)}
    # A backbone and its head, which are apart.
    children: dict[str, list[str]] = {}
    for name in needed:
        children.setdefault(name.partition(".")[0], []).append(name)
    largest = max(children, key=lambda child: len(children[child]))
    found = []
    for prefix in _candidates(file, children[largest]):
        if _covers(file, prefix, children[largest]):
            inside = [child for child, names in children.items() if _covers(file, prefix, names)]
            found.append((len(inside), prefix, inside))
    if not found or sum(count == max(found)[0] for count, _, _ in found) > 1:
        return None
    _, body, inside = max(found)
    parts = {body: [name for child in inside for name in children[child]]}
    used = {body + name for name in parts[body]}
    for child in children.keys() - set(inside):
        places = [
            prefix
            for prefix in _candidates(file, children[child])
            if _covers(file, prefix, children[child])
            and not any(prefix + name in used for name in children[child])
        ]
        if len(places) != 1:
            return None
        parts.setdefault(places[0], []).extend(children[child])
    return parts


def _candidates(file: _File, names: Sequence[str]) -> list[str]:
    """Prefixes below which the longest of ``names`` lies."""
    if not names:
        return []
    longest = max(names, key=len)
    return [
        place.removesuffix(longest)
        for place in file.bare
        if place == longest or place.endswith(f".{longest}")
    ]


def _covers(file: _File, prefix: str, names: Sequence[str]) -> bool:
    return all(prefix + name in file.bare for name in names)


def _without_the_rest(
    tensors: Mapping[str, Tensor],
    names: dict[str, str],
    parts: Mapping[str, Sequence[str]],
    network: str,
) -> Match:
    """The match, if all that is left over can be told to be no part of the network."""
    used = set(names.values())
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    unknown = [name for name, tensor in rest.items() if not _no_part(name, tensor, parts)]
    if unknown:
        raise UserError(f"does not fit {network}: has unknown {few(unknown)}")
    notes = [
        f"read without the beginning {prefix!r} of the names" for prefix in parts if prefix != ""
    ]
    heads = sorted({n.partition(".")[0] for n in map(_bare, rest) if _is_head(n)})
    others = [name for name in rest if not _is_head(_bare(name)) and not name.endswith(_COUNTER)]
    if heads:
        notes.append(f"left out: {', '.join(heads)}, auxiliary heads that only training uses")
    if others:
        notes.append(f"left out: {few(others)}, no part of {network}")
    return Match(names, tuple(rest), tuple(notes))


def _unexplained(file: _File, parts: Mapping[str, Sequence[str]]) -> bool:
    used = {prefix + name for prefix, names in parts.items() for name in names}
    return any(
        not _no_part(name, file.tensors[name], parts)
        for bare, name in file.bare.items()
        if bare not in used
    )


def _no_part(name: str, tensor: Tensor, parts: Mapping[str, Sequence[str]]) -> bool:
    """Whether a tensor beside a network that lies below these prefixes is none of its layers."""
    bare = _bare(name)
    within = [bare.removeprefix(prefix) for prefix in parts if bare.startswith(prefix)]
    return all(_foreign(inner, tensor) for inner in within) or _foreign(bare, tensor)


def _foreign(bare: str, tensor: Tensor) -> bool:
    """Whether a tensor is known to be no layer's, by its name inside of the network."""
    first, dot, _ = bare.partition(".")
    last = bare.rpartition(".")[2]
    return (
        last in (*_THOP, _COUNTER, *OF_WINDOWS)
        or (not dot and tensor.numel() <= 1)
        or _is_head(bare)
        or _LOSS.fullmatch(first) is not None
    )


def _is_head(bare: str) -> bool:
    return _HEAD.match(bare) is not None


def _misfit(tensors: Mapping[str, Tensor], needed: Sequence[str], network: str) -> str:
    for pattern, remedy in _COMPUTED.items():
        computed = [name for name in tensors if re.search(pattern, name)]
        if computed:
            return (
                f"does not fit {network}: {computed[0]} is what a weight is computed from; where "
                f"it was made, call {remedy} before saving"
            )
    missing = [name for name in needed if name not in tensors]
    message = f"does not fit {network}: lacks {few(missing)}"
    if 2 * len(missing) > len(needed):
        message += f"; the file's names begin with {beginnings(tensors)}"
    return message
