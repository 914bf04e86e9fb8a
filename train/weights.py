"""Where the first stage's weights come from."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import torch
from torch import nn

from tpp.checkpoints.model_file import find_metadata, load_model
from tpp.checkpoints.sources import load_weights
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, as_published, build_model
from tpp.models.settings import ModelSection
from train.tasks.class_names import few

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
    if checkpoint is not None and _url(model) is None and not Path(checkpoint).exists():
        raise UserError(f"model.checkpoint: {checkpoint}: no such file")


def weights_missing_here(model: ModelSection) -> str | None:
    """What of the starting weights has yet to be fetched; None where they can be loaded."""
    if model.checkpoint is None or _target(model).exists():
        return None
    what = "no such file" if _url(model) is None else "is downloaded when a run starts"
    return f"model.checkpoint: {model.checkpoint}: {what}"


def load_starting_weights(
    model: ModelSection,
    architecture: Architecture,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """Build the network and give it its starting weights.

    Args:
        model: what the configuration says.
        architecture: the network.
        seed: of weights that come from no file.
        say: told what a user should know of a file, such as what is left out of it.

    Raises:
        UserError: the file does not fit the network, or cannot be fetched.
    """
    if model.checkpoint is None:
        torch.manual_seed(seed)
        return build_model(architecture.name, architecture.num_classes, **architecture.args)
    path = _local_file(model)
    info = find_metadata(path)
    if info is not None:
        if info.architecture not in (architecture, as_published(architecture)[0]):
            raise UserError(
                f"model.checkpoint: {path} holds {_in_words(info.architecture)}, "
                f"the configuration asks for {_in_words(architecture)}"
            )
        return load_model(path)  # it may be pruned already: its own widths count
    network = build_model(architecture.name, architecture.num_classes, **architecture.args)
    for note in load_weights(network, path):
        say(f"{path}: {note}")
    return network


def note_on_classes(model: ModelSection, folders: list[str]) -> str | None:
    """What to know where the starting weights were made for other classes than the run's.

    To begin with such weights is right where they are trained on; what they score before is not.

    Args:
        model: the configuration's section; only a local file of ours names its classes.
        folders: names of the class folders, sorted as text.
    """
    if model.checkpoint is None or not Path(model.checkpoint).is_file():
        return None
    info = find_metadata(model.checkpoint)
    names = info.extra.get("classes") if info is not None else None
    if not isinstance(names, list) or len(names) != len(folders) or names == folders:
        return None
    return (
        f"model.checkpoint: {model.checkpoint} is of the classes {few(names)}, the class folders "
        f"are {few(folders)}: its outputs are taken for them in this order"
    )


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
