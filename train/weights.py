"""Where the first stage's weights come from."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import torch
from torch import Tensor, nn

from tpp.checkpoints.model_file import find_metadata, load_model, read_companion
from tpp.checkpoints.prune_file import read_dense
from tpp.checkpoints.sources import load_weights
from tpp.common.class_names import few, note_on_order
from tpp.common.errors import UserError
from tpp.common.hub import WEIGHTS, is_reference, kept, reference
from tpp.common.images import CROP_MODES, ImagesSection
from tpp.models.architecture import (
    TIMM,
    Architecture,
    architecture_of,
    as_published,
    build_model,
)
from tpp.models.classifier import classifier_tensors, with_new_classifier
from tpp.models.settings import ModelSection
from train.downloads import check_hash, fetch, place_of
from train.public_weights import (
    hub_file,
    load_public,
    missing_here,
    named,
    published,
    wanted_preparation,
)

KEY = "model.checkpoint"
Companion = dict[str, Tensor]
# Names of a URL's parameters that grant access, those of signed links among them.
_SECRET = re.compile(r"token|sig|secret|passw|credential|auth|api.?key|access.?key", re.IGNORECASE)


def starting_weights_exist(model: ModelSection) -> None:
    """Check a local path, a URL or the name of public weights, without loading anything.

    Raises:
        UserError: no such file, nobody publishes such weights of this network, or the URL holds a
            password or a token.
    """
    checkpoint = model.checkpoint
    if checkpoint is None:
        return
    source = named(model)
    if source is not None:
        found = published(source, KEY)
        if found is not None:
            _check_name(source, found, model.name)
    elif _is_url(checkpoint):
        _holds_no_secret(checkpoint)
    elif not Path(checkpoint).exists():
        raise UserError(f"{KEY}: {checkpoint}: no such file")


def weights_missing_here(model: ModelSection) -> str | None:
    """What of the starting weights has yet to be fetched; None where they can be loaded."""
    if model.checkpoint is None:
        return None
    source = named(model)
    if source is not None:
        return missing_here(source, KEY)
    if _is_url(model.checkpoint):
        there = place_of(model.checkpoint).exists()
        return None if there else f"{KEY}: {model.checkpoint}: is downloaded when a run starts"
    return None if Path(model.checkpoint).exists() else f"{KEY}: {model.checkpoint}: no such file"


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
        seed: of weights that come from no file, those of a new classifier among them.
        say: told what a user should know of a file, such as what is left out of it.

    Raises:
        UserError: the file does not fit the network, or cannot be fetched.
    """
    if model.checkpoint is None:
        torch.manual_seed(seed)
        return build_model(architecture.name, architecture.num_classes, **architecture.args)
    model = _from_hub(model)
    source = named(model)
    if source is not None:
        found = load_public(source, key=KEY, say=say, args=dict(architecture.args))
        of_source = architecture_of(found)
        assert of_source is not None
        _check_name(source, of_source, model.name)
        return _with_classes(found.state_dict(), of_source, architecture, model, seed, say)
    path = _local_file(model)
    if model.head == "new":
        given = read_dense(path, architecture)
        for note in given.notes:
            say(f"{path}: {note}")
        own = architecture_of(given.model)
        assert own is not None
        return _with_classes(given.tensors, own, architecture, model, seed, say)
    info = find_metadata(path)
    if info is not None:
        if info.architecture not in (architecture, as_published(architecture)[0]):
            other = info.architecture
            same = (other.name, other.args) == (architecture.name, architecture.args)
            raise UserError(
                f"{KEY}: {path} holds {_in_words(other)}, the configuration asks for "
                f"{_in_words(architecture)}" + (_ADVICE if same else "")
            )
        return load_model(path)  # it may be pruned already: its own widths count
    network = build_model(architecture.name, architecture.num_classes, **architecture.args)
    try:
        notes = load_weights(network, path)
    except UserError as error:
        raise UserError(f"{error}{_ADVICE if _other_classes(path, architecture) else ''}") from None
    for note in notes:
        say(f"{path}: {note}")
    return network


def starting_companion(model: ModelSection, architecture: Architecture, name: str) -> Companion:
    """What the file of the starting weights holds beside the network's, such as its mask.

    Args:
        model: what the configuration says; a file at a URL has been fetched.
        architecture: the network.
        name: of the companion; empty where there is none of that name.
    """
    path = _own_file(model)
    if path is None:
        return {}
    replaced = {*classifier_tensors(architecture)} if model.head == "new" else set()
    return {key: t for key, t in read_companion(path, name).items() if key not in replaced}


def starts_with(model: ModelSection, companion: str) -> bool:
    """Whether there is such a companion, as far as the file is here."""
    path = _own_file(model)
    info = find_metadata(path) if path is not None else None
    return info is not None and companion in info.companions


def _from_hub(model: ModelSection) -> ModelSection:
    """The section with the file that a repository of ours on the Hub holds, which is fetched."""
    if model.checkpoint is None or not is_reference(model.checkpoint):
        return model
    path = hub_file(model.checkpoint, KEY)
    return model if path is None else model.model_copy(update={"checkpoint": str(path)})


def _own_file(model: ModelSection) -> Path | None:
    """The file of starting weights, if it is one of ours, and here."""
    if model.checkpoint is not None and is_reference(model.checkpoint):
        path = kept(reference(model.checkpoint), WEIGHTS)
        return path if path is not None and find_metadata(path) is not None else None
    if model.checkpoint is None or named(model) is not None:
        return None
    path = place_of(model.checkpoint) if _is_url(model.checkpoint) else Path(model.checkpoint)
    return path if path.is_file() and find_metadata(path) is not None else None


_ADVICE = "; model.head=new gives it a classifier of its own"


def note_on_classes(model: ModelSection, folders: list[str]) -> str | None:
    """What to know where the starting weights were made for other classes than the run's.

    To begin with such weights is right where they are trained on; what they score before is not.

    Args:
        model: the configuration's section; only a local file of ours names its classes.
        folders: names of the class folders, sorted as text.
    """
    if model.checkpoint is None or model.head == "new" or not Path(model.checkpoint).is_file():
        return None
    info = find_metadata(model.checkpoint)
    names = info.extra.get("classes") if info is not None else None
    return note_on_order(names, folders, f"{KEY}: {model.checkpoint}")


def notes_on_images(model: ModelSection, images: ImagesSection) -> list[str]:
    """Where images are prepared in another way than the starting weights were trained with.

    Raises:
        UserError: there are no such weights.
    """
    wanted, notes = wanted_preparation(model, KEY) or {}, []
    if wanted.get("crop_mode", CROP_MODES[0]) != CROP_MODES[0]:
        notes.append(
            f"{KEY}: {model.checkpoint} wants crop_mode {wanted['crop_mode']}, and a run cuts "
            f"images from the {CROP_MODES[0]}"
        )
    for name, value in wanted.items():
        own = getattr(images, name, None)
        if name in images.model_fields_set and own != value:
            notes.append(
                f"{KEY}: {model.checkpoint} wants {name} {value}, and data.{name} is {own}"
            )
    return notes


def _with_classes(
    tensors: dict[str, Tensor],
    given: Architecture,
    architecture: Architecture,
    model: ModelSection,
    seed: int,
    say: Callable[[str], None],
) -> nn.Module:
    """A network of these tensors, of the configuration's name and classes."""
    classes = architecture.num_classes
    wanted = Architecture(architecture.name, classes, given.args)
    if model.head == "new" and classes is not None:
        say(
            f"{KEY}: the classifier for {given.num_classes} classes is left out "
            f"({few(sorted(classifier_tensors(given)))}); the new one for {classes} is random"
        )
        return with_new_classifier(tensors, wanted, seed)
    if given.num_classes != classes:
        raise UserError(
            f"{KEY}: {model.checkpoint} tells {given.num_classes} classes apart, the configuration "
            f"asks for {classes}{_ADVICE}"
        )
    network = build_model(wanted.name, classes, **wanted.args)
    network.load_state_dict(tensors)
    return network


def _other_classes(path: Path, architecture: Architecture) -> bool:
    """Whether a file is of this network, but for the number of its classes."""
    try:
        found = architecture_of(read_dense(path, architecture).model)
    except UserError:
        return False
    return found is not None and found.num_classes != architecture.num_classes


def _in_words(architecture: Architecture) -> str:
    arguments = f", {dict(architecture.args)}" if architecture.args else ""
    return f"{architecture.name} ({architecture.output}{arguments})"


def _check_name(source: str, found: Architecture, name: str) -> None:
    if _plain_name(found.name) != _plain_name(name):
        raise UserError(f"{KEY}: {source} is of {found.name}, and model.name is {name!r}")


def _plain_name(name: str) -> str:
    """Without the tag that tells timm's weights of one network apart."""
    return name.partition(".")[0] if name.startswith(TIMM) else name


def _local_file(model: ModelSection) -> Path:
    """The checkpoint as a local file, downloaded if need be."""
    assert model.checkpoint is not None
    if _is_url(model.checkpoint):
        _holds_no_secret(model.checkpoint)
        return fetch(model.checkpoint, key=KEY, sha256=model.sha256)
    path = Path(model.checkpoint)
    if model.sha256 is not None:
        check_hash(path, model.sha256, KEY)
    return path


def _holds_no_secret(url: str) -> None:
    """Refuse a URL that gives access to whoever reads it: the run folder keeps it."""
    try:
        parts = urlparse(url)
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        raise UserError(f"{KEY}: not a valid URL") from None
    if secret or any(_SECRET.search(key) for key in parse_qs(parts.query, keep_blank_values=True)):
        raise UserError(
            f"{KEY}: the URL of {parts.hostname} holds a password or a token, which "
            "would be kept in config.yaml; download the file and name it with "
            f"{KEY}=FILE"
        )


def _is_url(text: str) -> bool:
    return text.startswith(("https://", "http://"))
