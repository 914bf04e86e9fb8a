"""Where the first stage's weights come from."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import torch
from torch import nn

from tpp.checkpoints.model_file import find_metadata, load_model
from tpp.checkpoints.sources import load_weights
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.models.settings import ModelSection

TORCHVISION = "torchvision:"
# Names of a URL's parameters that grant access, those of signed links among them.
_SECRET = re.compile(r"token|sig|secret|passw|credential|auth|api.?key|access.?key", re.IGNORECASE)


def starting_weights_exist(model: ModelSection) -> None:
    """Check a local path, a URL or the name of torchvision weights, without loading anything.

    Raises:
        UserError: no such file, torchvision knows no such weights of this network, or the URL
            holds a password or a token.
    """
    checkpoint = model.checkpoint
    if checkpoint is None:
        return
    if _is_url(checkpoint):
        _holds_no_secret(checkpoint)
        return
    if checkpoint.startswith(TORCHVISION):
        _torchvision_url(model.name, checkpoint)
    elif not Path(checkpoint).is_file():
        raise UserError(f"model.checkpoint: {checkpoint}: no such file")


def weights_missing_here(model: ModelSection) -> str | None:
    """What of the starting weights has yet to be fetched; None where they can be loaded."""
    if model.checkpoint is None or _target(model).is_file():
        return None
    remote = _is_url(model.checkpoint) or model.checkpoint.startswith(TORCHVISION)
    what = "is downloaded when a run starts" if remote else "no such file"
    return f"model.checkpoint: {model.checkpoint}: {what}"


def load_starting_weights(model: ModelSection, architecture: Architecture, seed: int) -> nn.Module:
    """Build the network and give it its starting weights.

    Raises:
        UserError: the file does not fit the network, or cannot be fetched.
    """
    if model.checkpoint is None:
        torch.manual_seed(seed)
        return build_model(architecture.name, architecture.num_classes, **architecture.args)
    path = _local_file(model)
    info = find_metadata(path)
    if info is not None:
        if info.architecture != architecture:
            raise UserError(
                f"model.checkpoint: {path} holds {_in_words(info.architecture)}, "
                f"the configuration asks for {_in_words(architecture)}"
            )
        return load_model(path)  # it may be pruned already: its own widths count
    network = build_model(architecture.name, architecture.num_classes, **architecture.args)
    load_weights(network, path)
    return network


def _in_words(architecture: Architecture) -> str:
    arguments = f", {dict(architecture.args)}" if architecture.args else ""
    return f"{architecture.name} ({architecture.output}{arguments})"


def _local_file(model: ModelSection) -> Path:
    """The checkpoint as a local file, downloaded if need be."""
    url, target = _url(model), _target(model)
    if url is not None and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.checkpoint: cannot download {url} ({error}); on a machine without access "
                f"put the file at {target}, or name a local file with model.checkpoint=FILE"
            ) from None
    return target


def _url(model: ModelSection) -> str | None:
    """Where the checkpoint is downloaded from; None of a local file."""
    assert model.checkpoint is not None
    if model.checkpoint.startswith(TORCHVISION):
        return _torchvision_url(model.name, model.checkpoint)
    if not _is_url(model.checkpoint):
        return None
    _holds_no_secret(model.checkpoint)
    return model.checkpoint


def _target(model: ModelSection) -> Path:
    """The local file; downloads are kept where torch.hub keeps them."""
    assert model.checkpoint is not None
    url = _url(model)
    if url is None:
        return Path(model.checkpoint)
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def _torchvision_url(name: str, checkpoint: str) -> str:
    from torchvision.models import get_model_weights

    weights = checkpoint.removeprefix(TORCHVISION)
    try:
        known = get_model_weights(name)
    except ValueError:
        raise UserError(f"model.checkpoint: torchvision has no weights for {name!r}") from None
    if weights not in known.__members__:
        raise UserError(
            f"model.checkpoint: torchvision has no {weights!r} for {name!r}; "
            f"there are: {', '.join(known.__members__)}"
        )
    return str(known[weights].url)


def _holds_no_secret(url: str) -> None:
    """Refuse a URL that gives access to whoever reads it: the run folder keeps it."""
    try:
        parts = urlparse(url)
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        raise UserError("model.checkpoint: not a valid URL") from None
    if secret or any(_SECRET.search(key) for key in parse_qs(parts.query, keep_blank_values=True)):
        raise UserError(
            f"model.checkpoint: the URL of {parts.hostname} holds a password or a token, which "
            "would be kept in config.yaml; download the file and name it with "
            "model.checkpoint=FILE"
        )


def _is_url(text: str) -> bool:
    return text.startswith(("https://", "http://"))
