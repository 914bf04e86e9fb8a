"""Networks with the public weights that a name stands for."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tpp.common.errors import UserError, reason_of
from tpp.models.architecture import (
    Architecture,
    build_on_meta,
    set_architecture,
    set_preprocessing,
)
from tpp.models.preparation import assumed_preparation
from tpp.models.settings import ModelSection
from train.weights import (
    TORCHVISION,
    load_starting_weights,
    starting_weights_exist,
    weights_missing_here,
)

TIMM, HUB = "timm:", "hf-hub:"


def is_public(source: str) -> bool:
    """Whether it names public weights: torchvision:NAME[.WEIGHTS], timm:NAME.TAG or hf-hub:REPO."""
    return source.startswith((TORCHVISION, TIMM, HUB))


def outline(source: str, key: str) -> nn.Module | None:
    """The network of public weights without them, on the meta device; None where no name tells.

    Args:
        source: see :func:`is_public`.
        key: of it in the configuration.

    Raises:
        UserError: there is no such network, or there are no such weights of it.
    """
    if source.startswith(TORCHVISION):
        section, classes = _of_torchvision(source, key)
        architecture = Architecture(section.name, classes)
        network = build_on_meta(architecture)
        set_preprocessing(network, _prepared_by_torchvision(section, architecture))
        return network
    if source.startswith(TIMM):
        config = _timm_config(source, key)
        network = build_on_meta(_timm_architecture(source, config))
        set_preprocessing(network, _prepared(config))
        return network
    return None


def missing_here(source: str, key: str) -> str | None:
    """That the weights have yet to be fetched; None where they are sure to be here.

    timm's lie in a cache of their own, which is asked when they are loaded.
    """
    if source.startswith(TORCHVISION):
        section, _ = _of_torchvision(source, key)
        if weights_missing_here(section) is None:
            return None
    return f"{key}: {source}: is downloaded when a run starts"


def load_public(source: str, *, key: str, say: Callable[[str], None]) -> nn.Module:
    """A network with public weights, on the CPU, downloaded if need be.

    What it was trained with is attached as its preprocessing, as far as the mean, the deviation,
    the channels and the image size go, and its architecture where one of our names stands for it.

    Args:
        source: see :func:`is_public`.
        key: of it in the configuration.
        say: told what a user should know of it.

    Raises:
        UserError: there are no such weights, or they cannot be fetched.
    """
    if source.startswith(TORCHVISION):
        section, classes = _of_torchvision(source, key)
        architecture = Architecture(section.name, classes)
        network: nn.Module = _told_as(
            key, lambda: load_starting_weights(section, architecture, 0, say)
        )
        set_preprocessing(network, _prepared_by_torchvision(section, architecture))
        return network
    if source.startswith(TIMM):
        _timm_config(source, key)
    import timm

    name = source.removeprefix(TIMM)
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of whatever library fetches it
        raise UserError(f"{key}: cannot load {source} ({reason_of(error)})") from None
    config: Any = network.pretrained_cfg
    set_preprocessing(network, _prepared(config))
    if source.startswith(TIMM):
        set_architecture(network, _timm_architecture(source, config))
    return network


def _of_torchvision(source: str, key: str) -> tuple[ModelSection, int]:
    name, _, weights = source.removeprefix(TORCHVISION).partition(".")
    section = ModelSection(name=name, checkpoint=f"{TORCHVISION}{weights or 'DEFAULT'}")
    _told_as(key, lambda: starting_weights_exist(section))
    from torchvision.models import get_model_weights

    found = get_model_weights(name)[weights or "DEFAULT"]
    return section, len(found.meta["categories"])


def _prepared_by_torchvision(section: ModelSection, architecture: Architecture) -> dict[str, Any]:
    from torchvision.models import get_model_weights

    assert section.checkpoint is not None
    weights = get_model_weights(section.name)[section.checkpoint.removeprefix(TORCHVISION)]
    return assumed_preparation(architecture, str(weights.url)).values


def _told_as(key: str, do: Callable[[], Any]) -> Any:
    """What ``do`` returns; its mistakes are those of another key than the starting weights'."""
    try:
        return do()
    except UserError as error:
        raise UserError(str(error).replace("model.checkpoint", key)) from None


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


def _timm_architecture(source: str, config: dict[str, Any]) -> Architecture:
    return Architecture(
        f"{TIMM}{source.removeprefix(TIMM).partition('.')[0]}", config["num_classes"]
    )


def _prepared(config: dict[str, Any]) -> dict[str, Any]:
    channels, side, _ = config["input_size"]
    mean, std = (list(config[key]) for key in ("mean", "std"))
    return {"mean": mean, "std": std, "channels": channels, "image_size": side}
