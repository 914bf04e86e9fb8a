"""How images are prepared for a network where only its name says it: its weights' own way.

What comes out is plain data, the ``preprocessing`` of a checkpoint:

- ``image_size``: side of the square that the network sees, in pixels;
- ``resize``: length that the shorter side is scaled to before the square is cut from the middle,
  in pixels; None: not scaled;
- ``mean``, ``std``: per channel, of values in 0..1; ``channels``: 3 for RGB, 1 for grey;
- ``interpolation``: ``bilinear`` or ``bicubic``, both antialiased; bilinear where it is missing;
- ``crop_mode``: ``center``, or ``squash``: both sides are scaled to ``resize``, or ``whole``: an
  image of any size as it is; center where it is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from torch import nn

from tpp.common.errors import UserError, reason_of
from tpp.common.hub import HUB
from tpp.common.images import CROP_MODES, INTERPOLATIONS
from tpp.models.architecture import (
    LARGEST_IMAGE,
    TIMM,
    Architecture,
    gives_images,
    input_shape,
    set_preprocessing,
)

_NEEDED = {"image_size", "resize", "mean", "std", "channels"}
# How torchvision's public weights are named; tpp.common.hub and timm have names of their own.
TORCHVISION = "torchvision:"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Preparation(NamedTuple):
    """How images are prepared.

    Attributes:
        values: the ``preprocessing`` of a checkpoint.
        source: where what the file does not say comes from, for a line to the user; empty where
            the file says all.
    """

    values: dict[str, Any]
    source: str = ""

    def __str__(self) -> str:
        said = in_words(self.values)
        return f"{said} ({self.source})" if self.source else said

    def changed(self, **options: Any) -> "Preparation":
        """As a user's options want it, see :func:`changed`; those that are None are not given."""
        given = {key: value for key, value in options.items() if value is not None}
        if not given:
            return self
        said = f"{self.source}; " if self.source else ""
        return Preparation(changed(self.values, **given), f"{said}{', '.join(given)} as told")


def find_preparation(
    said: Mapping[str, Any] | None, architecture: Architecture, file: str
) -> Preparation:
    """How images are prepared for the network of a file; what it does not say is assumed.

    Args:
        said: the file's ``preprocessing``, if it has one.
        architecture: the network.
        file: name or path of the file.

    Raises:
        UserError: it is not said, and for such a network cannot be assumed.
    """
    if said is not None and said.keys() >= _NEEDED:
        return Preparation(dict(said))
    values, source = assumed_preparation(architecture, file)
    if said:
        values = changed(values, image_size=said.get("image_size")) | dict(said)
    return Preparation(values, f"assumed, {source}")


def assumed_preparation(
    architecture: Architecture,
    file: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
) -> Preparation:
    """How images are prepared for the public weights of a network.

    timm's configuration for a network of timm; for one of torchvision what belongs to the weights
    of that file name, or else to its default ones. Other networks are taken to see ImageNet's
    mean and deviation, and whole images of the side that they are made for.

    Args:
        architecture: the network.
        file: name or path of the file that the weights come in.
        config: timm's of the weights, where they are not those that its name stands for.

    Raises:
        UserError: the network gives images, or sees none that are cut as squares.
    """
    name = architecture.name
    if gives_images(name):
        raise UserError(f"model {name!r}: nothing says how images are prepared for it")
    if name.startswith(TIMM):
        return _timm(architecture, config)
    known = _torchvision_weights(name)
    if known:
        return _torchvision(architecture, known, file)
    channels, side, _ = input_shape(name, **architecture.args)
    values = _values(side, None, _IMAGENET_MEAN, _IMAGENET_STD, channels, "bilinear")
    return Preparation(values, f"as is usual for {name}")


def changed(
    values: Mapping[str, Any],
    *,
    image_size: int | None = None,
    resize: int | None = None,
    crop_share: float | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Another preparation of images: what is not given stays.

    Args:
        values: the ``preprocessing`` of a checkpoint.
        image_size: in pixels; where ``resize`` is not given, as much of an image is seen as before.
        resize: in pixels; 0: not scaled.
        crop_share: ``image_size / resize``, in (0, 1].
        others: mean, std, interpolation, crop_mode.

    Raises:
        UserError: a value makes no sense, or there are both of ``resize`` and ``crop_share``.
    """
    new = dict(values)
    before, scaled = new.get("image_size"), new.get("resize")
    if image_size is not None:
        if not isinstance(image_size, int) or not 1 <= image_size <= LARGEST_IMAGE:
            raise UserError(f"image_size must be between 1 and {LARGEST_IMAGE}, not {image_size}")
        new["image_size"] = image_size
        if isinstance(before, int) and isinstance(scaled, int) and before > 0:
            new["resize"] = round(image_size * scaled / before)
    if resize is not None and crop_share is not None:
        raise UserError("crop_share is image_size / resize: give one of resize and crop_share")
    if resize is not None:
        new["resize"] = resize or None
    if crop_share is not None:
        if not 0 < crop_share <= 1:
            raise UserError(f"crop_share must be above 0 and at most 1, not {crop_share}")
        new["resize"] = int(new["image_size"] / crop_share)  # rounded down as timm does
    return new | {key: value for key, value in others.items() if value is not None}


def take_image_size(model: nn.Module, image_size: int | None) -> None:
    """Let a network be counted and timed with images of another side; None: as it is.

    Raises:
        UserError: there are no such images.
    """
    if image_size is not None:
        said = getattr(model, "preprocessing", None) or {}
        set_preprocessing(model, changed(said, image_size=image_size))


def in_words(values: Mapping[str, Any]) -> str:
    """A preparation in a line, such as ``224x224 from 256 (bilinear), mean ..., std ...``."""
    size, resize = values.get("image_size"), values.get("resize")
    how = values.get("interpolation", INTERPOLATIONS[0])
    squash = ", squashed" if values.get("crop_mode") == "squash" else ""
    scaled = "as they are" if resize is None else f"scaled to {resize} ({how}{squash})"
    known = [key for key in ("mean", "std") if values.get(key)]
    rest = "".join(f", {key} {_numbers(values[key])}" for key in known)
    if values.get("crop_mode") == "whole":
        return f"whole, one by one{rest}"
    return f"{scaled}, cut to {size}x{size}{rest}"


def _numbers(values: Sequence[float]) -> str:
    # Of one value for all channels it is enough to say it once.
    return " ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _values(
    side: int,
    resize: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
    interpolation: str,
) -> dict[str, Any]:
    return {
        "image_size": side,
        "resize": resize,
        # Networks for grey images are made from those for colour ones.
        "mean": list(mean)[:channels],
        "std": list(std)[:channels],
        "channels": channels,
        "interpolation": interpolation,
    }


def hub_config(source: str, key: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What a repository of timm's form on the Hub says of its weights; downloaded if need be.

    Args:
        source: ``hf-hub:OWNER/REPO@REVISION``.
        key: of it in a configuration.

    Returns:
        timm's configuration of the weights, timm's name of the network, and its arguments.

    Raises:
        UserError: it cannot be fetched, or is none of a network of timm.
    """
    from timm.models import load_model_config_from_hf

    try:
        config, name, args = load_model_config_from_hf(source.removeprefix(HUB))
        given = {key: value for key, value in (args or {}).items() if key != "num_classes"}
        return dict(config), str(name), given
    except Exception as error:  # of whatever library fetches it
        raise UserError(f"{key}: cannot load {source} ({reason_of(error)})") from None


def _timm(architecture: Architecture, config: Mapping[str, Any] | None) -> Preparation:
    name = architecture.name.removeprefix(TIMM)
    channels, height, width = input_shape(architecture.name, **architecture.args)
    import timm
    from timm.data import resolve_data_config

    if config is None:
        own = timm.get_pretrained_cfg(name)
        config = own.to_dict() if own else {"name": name}
    elif "img_size" not in architecture.args:
        height, width = config["input_size"][1:]
    found = resolve_data_config(pretrained_cfg=dict(config))
    if height != width:
        raise UserError(
            f"model {architecture.name!r}: sees images of {height}x{width}, and here images are "
            "cut as squares"
        )
    if found["crop_mode"] not in CROP_MODES or found["interpolation"] not in INTERPOLATIONS:
        raise UserError(
            f"model {architecture.name!r}: timm prepares images for it with crop_mode "
            f"{found['crop_mode']} and interpolation {found['interpolation']}; here there are "
            f"{', '.join((*CROP_MODES, *INTERPOLATIONS))}"
        )
    values = _values(
        height,
        int(height / found["crop_pct"]),
        found["mean"],
        found["std"],
        channels,
        found["interpolation"],
    )
    if found["crop_mode"] != CROP_MODES[0]:
        values["crop_mode"] = found["crop_mode"]
    return Preparation(values, f"as timm's configuration of {name} says")


def _torchvision_weights(name: str) -> list[Any]:
    """Weights that torchvision has for a network, the default ones first."""
    from torchvision.models import get_model_weights

    try:
        known = get_model_weights(name)
    except ValueError:
        return []
    return [*dict.fromkeys([*([known.DEFAULT] if len(known) else []), *known])]


def _torchvision(architecture: Architecture, known: list[Any], file: str | None) -> Preparation:
    name = architecture.name
    _, side, _ = input_shape(name, **architecture.args)
    named = [w for w in known if file and PurePath(w.url).name == PurePath(file).name]
    weights = (named or known)[0]
    # These see images of one side only, which their constructor is told.
    fixed = name.startswith("vit_")
    if fixed and not named:
        fitting = [w for w in known if w.transforms().crop_size[0] == side]
        weights = (fitting or known)[0]
    way = weights.transforms()
    values = _values(
        way.crop_size[0],
        way.resize_size[0],
        way.mean,
        way.std,
        3,
        way.interpolation.value,
    )
    if fixed:
        values = changed(values, image_size=side)
    also = f" (its other weights, {', '.join(w.name for w in known[1:])}, may want another way)"
    also = also if len(known) > 1 and not named and not fixed else ""
    return Preparation(values, f"as torchvision's {weights.name} of {name} wants it{also}")
