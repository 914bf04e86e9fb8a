"""Networks with the public weights that a name stands for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tpp.checkpoints.model_file import load_model
from tpp.checkpoints.sources import load_weights
from tpp.common.errors import UserError, reason_of
from tpp.common.hub import CONFIG, FORMAT_KEY, HUB, fetch, reference, small_file
from tpp.common.reading import read_json
from tpp.models.architecture import (
    TIMM,
    Architecture,
    build_model,
    build_on_meta,
    set_architecture,
    set_preprocessing,
)
from tpp.models.preparation import TORCHVISION, assumed_preparation, hub_config
from tpp.models.settings import ModelSection
from train.downloads import fetch as download
from train.downloads import place_of


def is_public(source: str) -> bool:
    """Whether it names public weights: torchvision:NAME[.WEIGHTS], timm:NAME.TAG or hf-hub:REPO."""
    return source.startswith((TORCHVISION, TIMM, HUB))


def named(model: ModelSection) -> str | None:
    """A configuration's checkpoint as a name of public weights; None of others.

    With the name of the network, which ``torchvision:WEIGHTS`` leaves to ``model.name``.
    """
    checkpoint = model.checkpoint
    if checkpoint is None or not is_public(checkpoint):
        return None
    weights = checkpoint.removeprefix(TORCHVISION)
    if checkpoint.startswith(TORCHVISION) and "." not in weights:
        return f"{TORCHVISION}{model.name}.{weights}"
    return checkpoint


def wanted_preparation(model: ModelSection, key: str) -> dict[str, Any] | None:
    """How images are prepared for the starting weights; None where nobody says it.

    Of the Hub's weights a small file is fetched, if it is not there.

    Raises:
        UserError: there are no such weights, or the file cannot be fetched.
    """
    source = named(model)
    if source is None:
        return None
    if source.startswith(HUB) and (own := _own_config(source, key)) is not None:
        said = own.get("preprocessing")
        return said if isinstance(said, dict) else None
    return _prepared(source, _architecture(source, key, dict(model.args)), key)


def published(source: str, key: str) -> Architecture | None:
    """Which network public weights are of; None of the Hub's, where no name tells.

    Args:
        source: see :func:`is_public`.
        key: of it in the configuration.

    Raises:
        UserError: there is no such network, or there are no such weights of it.
    """
    if source.startswith(HUB):
        _check_revision(source, key)
        return None
    return _architecture(source, key)


def outline(source: str, key: str) -> nn.Module | None:
    """That network without weights, on the meta device, with their preprocessing; or None."""
    architecture = published(source, key)
    if architecture is None:
        return None
    network = build_on_meta(architecture)
    set_preprocessing(network, _prepared(source, architecture, key))
    return network


def missing_here(source: str, key: str) -> str | None:
    """That the weights have yet to be fetched; None where they are sure to be here.

    timm's and the Hub's lie in a cache of their own, which is asked when they are loaded.
    """
    if source.startswith(TORCHVISION) and place_of(_torchvision(source, key).url).exists():
        return None
    return f"{key}: {source}: is downloaded when a run starts"


def hub_file(source: str, key: str) -> Path | None:
    """The checkpoint in a repository that ``tpp push`` wrote, fetched; None of timm's repositories.

    Args:
        source: ``hf-hub:OWNER/REPO@REVISION``.
        key: of it in the configuration.

    Raises:
        UserError: there is no such repository or revision, or it cannot be fetched.
    """
    if _own_config(source, key) is None:
        return None
    try:
        return fetch(reference(source)).weights
    except UserError as error:
        raise UserError(f"{key}: cannot load {error}") from None


def _own_config(source: str, key: str) -> dict[str, Any] | None:
    """What the small file beside such a checkpoint says; None of timm's repositories."""
    _check_revision(source, key)
    try:
        path = small_file(reference(source), CONFIG)
    except UserError as error:
        raise UserError(f"{key}: cannot load {error}") from None
    said = read_json(path, "the configuration") if path is not None else None
    return said if isinstance(said, dict) and FORMAT_KEY in said else None


def load_public(
    source: str,
    *,
    key: str,
    say: Callable[[str], None] = lambda _: None,
    args: dict[str, Any] | None = None,
) -> nn.Module:
    """A network with public weights, on the CPU, downloaded if need be.

    It carries its architecture, and how images are prepared for its weights.

    Args:
        source: see :func:`is_public`.
        key: of it in the configuration.
        say: told what a user should know of it.
        args: of the network's constructor.

    Raises:
        UserError: there are no such weights, they are of another network, or they cannot be
            fetched.
    """
    if source.startswith(HUB) and (own := hub_file(source, key)) is not None:
        return load_model(own)
    architecture = _architecture(source, key, args)
    if source.startswith(TORCHVISION):
        path = download(_torchvision(source, key).url, key=key)
        network = build_model(architecture.name, architecture.num_classes, **architecture.args)
        for note in load_weights(network, path):
            say(f"{path}: {note}")
    else:
        import timm

        name = source if source.startswith(HUB) else source.removeprefix(TIMM)
        try:
            network = timm.create_model(name, pretrained=True, **architecture.args)
        except Exception as error:  # of whatever library fetches it
            raise UserError(f"{key}: cannot load {source} ({reason_of(error)})") from None
        set_architecture(network, architecture)
    set_preprocessing(network, _prepared(source, architecture, key))
    return network


def _architecture(source: str, key: str, args: dict[str, Any] | None = None) -> Architecture:
    args = args or {}
    if source.startswith(TORCHVISION):
        name = source.removeprefix(TORCHVISION).partition(".")[0]
        return Architecture(name, len(_torchvision(source, key).meta["categories"]), args)
    if source.startswith(HUB):
        _check_revision(source, key)
        config, name, given = hub_config(source, key)
        return Architecture(f"{TIMM}{name}", config["num_classes"], {**given, **args})
    name = source.removeprefix(TIMM).partition(".")[0]
    return Architecture(f"{TIMM}{name}", _timm_config(source, key)["num_classes"], args)


def _prepared(source: str, architecture: Architecture, key: str) -> dict[str, Any]:
    if source.startswith(TORCHVISION):
        return assumed_preparation(architecture, str(_torchvision(source, key).url)).values
    if source.startswith(HUB):
        return assumed_preparation(architecture, config=hub_config(source, key)[0]).values
    return assumed_preparation(architecture, config=_timm_config(source, key)).values


def _torchvision(source: str, key: str) -> Any:
    """The entry of torchvision's list of weights."""
    from torchvision.models import get_model_weights

    name, _, weights = source.removeprefix(TORCHVISION).partition(".")
    try:
        known = get_model_weights(name)
    except ValueError:
        raise UserError(f"{key}: torchvision has no weights for {name!r}") from None
    weights = weights or "DEFAULT"
    if weights not in known.__members__:
        raise UserError(
            f"{key}: torchvision has no {weights!r} for {name!r}; "
            f"there are: {', '.join(known.__members__)}"
        )
    return known[weights]


def _timm_config(source: str, key: str) -> dict[str, Any]:
    import timm

    name = source.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except (RuntimeError, ValueError):  # no such tag
        config = None
    if config is None or not config.has_weights:
        architecture = name.partition(".")[0]
        known = timm.list_pretrained(f"{architecture}.*") if architecture else []
        there = f"; there are: {', '.join(known)}" if known else ""
        raise UserError(f"{key}: timm has no weights {name!r}{there}")
    values: dict[str, Any] = config.to_dict()
    return values


def _check_revision(source: str, key: str) -> None:
    repository, _, revision = source.removeprefix(HUB).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")) or not revision:
        raise UserError(
            f"{key}: {source}: expected {HUB}OWNER/REPO@REVISION, such as the commit that "
            "the Hub shows: without one the weights may be others tomorrow"
        )
