"""A small made-up data set: shapes and textures in coloured clutter, as JPEGs in class folders.

``python -m data_pipelines.demo DIR`` writes it. Position, size, rotation, colours, background,
occlusion and noise come from the same ranges for every class, so only the form tells them apart.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.images.order import uniforms
from data_pipelines.settings import DemoData
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.common.paths import user_path
from tpp.common.reading import read_json

Field = NDArray[np.floating]
"""One number per pixel: shape (images, image_size, image_size)."""

SETTINGS_FILE = "demo.json"
# Part of the settings: to be raised with every change of what is drawn.
_VERSION = 1
_QUALITY = 90
_AT_ONCE = 250


def _disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.85


def _square(x: Field, y: Field) -> Field:
    return np.maximum(abs(x), abs(y)) - 0.75


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum(np.sqrt(3) * abs(x) + y, -2 * y) / 2 - 0.5


def _ring(x: Field, y: Field) -> Field:
    return abs(np.hypot(x, y) - 0.68) - 0.22


def _cross(x: Field, y: Field) -> Field:
    longer, shorter = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(longer - 0.95, shorter - 0.3)


def _star(x: Field, y: Field) -> Field:
    """Five points: fold the plane onto half a point, whose edge is one straight line."""
    angle = abs((np.arctan2(x, y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    inner_x, inner_y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
    length = np.hypot(1.05 - inner_x, inner_y)
    across = (radius * np.cos(angle) - 1.05) * inner_y
    along = radius * np.sin(angle) * (1.05 - inner_x)
    return (across + along) / length


def _crescent(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y) - 0.95, 0.72 - np.hypot(x - 0.45, y))


def _stripes(x: Field, y: Field) -> Field:
    return np.sin(7 * x)


def _checks(x: Field, y: Field) -> Field:
    return np.sin(6 * x) * np.sin(6 * y)


def _dots(x: Field, y: Field) -> Field:
    return np.cos(8 * x) + np.cos(8 * y) - 0.7


# Of a shape, the distance to its outline (negative inside); of a texture, a wave whose sign
# chooses between two colours. Both in the figure's own frame, where it reaches from -1 to 1.
_Form = Callable[[Field, Field], Field]
SHAPES: dict[str, _Form] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
}
TEXTURES: dict[str, _Form] = {"stripes": _stripes, "checks": _checks, "dots": _dots}
# Alternating, so that a few classes are already a mix.
CLASSES = (
    *("disc", "stripes", "triangle", "ring", "checks"),
    *("square", "star", "dots", "cross", "crescent"),
)


def generate_demo(root: str | os.PathLike[str], demo: DemoData, *, image_size: int = 32) -> None:
    """Write ROOT/{train,val}/<class>/NNNN.jpg, unless the same data is already there.

    The folder appears whole or not at all, also when several processes write it at once. An image
    depends on the seed, its class and its number alone, not on how many others there are.

    Args:
        root: the folder to make; its parents are made too.
        demo: how many classes and images, and the seed.
        image_size: side in pixels.

    Raises:
        UserError: a number is out of range, or ``root`` exists and holds something else.
    """
    root = Path(root)
    counts = {"train": demo.train_per_class, "val": demo.val_per_class}
    _check(demo.classes, min(counts.values()), image_size)
    settings = {
        "version": _VERSION,
        **demo.model_dump(exclude={"seed"}),
        "image_size": image_size,
        "seed": demo.seed,
    }
    if _holds(root, settings):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as aside:
            made = Path(aside) / "data"
            for split, (name, count) in enumerate(counts.items()):
                for label in range(demo.classes):
                    folder = made / name / CLASSES[label]
                    _write_class(folder, split, label, count, image_size, demo.seed)
            (made / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")
            _move(made, root, settings)
    except OSError as error:
        raise UserError(f"{root}: cannot write the demo data ({error.strerror})") from None


def _check(classes: int, fewest: int, image_size: int) -> None:
    """Check what is asked for: also the command's options, which no section has seen."""
    if not 2 <= classes <= len(CLASSES):
        raise UserError(f"demo data: classes must be 2 to {len(CLASSES)}, not {classes}")
    if fewest < 1 or image_size < 8:
        raise UserError("demo data: needs 1 image per class or more, of 8 pixels or more")


def _move(made: Path, root: Path, settings: dict[str, int]) -> None:
    """Rename ``made`` to ``root``, unless another process was faster with the same data."""
    try:
        made.rename(root)
    except OSError:
        if not _holds(root, settings):
            raise


def _holds(root: Path, settings: dict[str, int]) -> bool:
    """Whether ``root`` holds the data of ``settings``; False if it does not exist or is empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = read_json(root / SETTINGS_FILE, "the settings of demo data")
    except UserError:
        raise UserError(
            f"{root}: exists and is not demo data; choose another folder or remove this one"
        ) from None
    if found != settings:
        raise UserError(
            f"{root}: holds demo data with other settings than {settings}; "
            "choose another folder or remove this one"
        )
    return True


def _write_class(
    folder: Path, split: int, label: int, count: int, image_size: int, seed: int
) -> None:
    folder.mkdir(parents=True)
    for start in range(0, count, _AT_ONCE):
        numbers = np.arange(start, min(start + _AT_ONCE, count), dtype=np.int64)
        samples = numbers + (split << 48) + (label << 32)
        for number, pixels in zip(numbers, _draw(label, samples, image_size, seed), strict=True):
            Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=_QUALITY)


class _Draws:
    """The random numbers of some images, dealt out in the order asked for."""

    def __init__(self, seed: int, samples: NDArray[np.int64], count: int) -> None:
        self._numbers = uniforms(seed, samples, count).astype(np.float32)
        self._next = 0

    def __call__(self, low: float, high: float, *shape: int) -> Field:
        """Uniform numbers in [low, high), shape (images, *shape)."""
        count = int(np.prod(shape))
        taken = self._numbers[:, self._next : self._next + count]
        self._next += count
        return low + (high - low) * taken.reshape(-1, *shape)


def _draw(label: int, samples: NDArray[np.int64], side: int, seed: int) -> NDArray[np.uint8]:
    """Images of one class, uint8 (len(samples), side, side, 3)."""
    draw = _Draws(seed, samples, 200 + 3 * side * side)
    pixel = 2 / side
    axis = (np.arange(side, dtype=np.float32) + 0.5) * pixel - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")

    ground = draw(0, 1, 1, 1, 3)
    colour = (ground + draw(0.25, 0.75, 1, 1, 3)) % 1
    second = (colour + draw(0.25, 0.75, 1, 1, 3)) % 1
    image = ground + _clouds(draw, side) + draw(-0.15, 0.15, 1, 1, 3) * x[..., None]
    for _ in range(2):
        image = _paint(image, _speck(draw, x, y) / pixel, draw(0, 1, 1, 1, 3))

    size = draw(0.55, 0.85, 1, 1)
    across, along = _own_frame(draw, x, y, size)
    roundness = draw(2, 8, 1, 1)
    name = CLASSES[label]
    if name in SHAPES:
        image = _paint(image, SHAPES[name](across, along) * size / pixel, colour)
    else:
        # A patch between a disc and a square in outline, and larger, for its pattern to show.
        patch = (abs(across) ** roundness + abs(along) ** roundness) ** (1 / roundness) - 0.95
        image = _paint(image, patch * size / pixel, colour)
        # Where the waves cross zero their slope is about 7: divided by it, they are distances.
        pattern = np.maximum(TEXTURES[name](across, along) / 7, patch)
        image = _paint(image, pattern * size / pixel, second)

    image = _paint(image, _bar(draw, x, y) / pixel, ground)
    image = image + draw(0.0, 0.08, 1, 1, 1) * draw(-1, 1, side, side, 3)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _paint(image: Field, distance: Field, colour: Field) -> Field:
    """Fill where ``distance`` (pixels, negative inside) says, with antialiased edges."""
    cover = (0.5 - distance).clip(0, 1)[..., None]
    return image + cover * (colour - image)


def _own_frame(draw: _Draws, x: Field, y: Field, size: Field) -> tuple[Field, Field]:
    """The pixels' coordinates in the frame of a figure at a random place and rotation."""
    x, y = x - draw(-0.2, 0.2, 1, 1), y - draw(-0.2, 0.2, 1, 1)
    angle = draw(0, 2 * np.pi, 1, 1)
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    return cos * x + sin * y, cos * y - sin * x


def _clouds(draw: _Draws, side: int) -> Field:
    """Soft colour variation: a random 5x5 grid, interpolated linearly; (images, side, side, 3)."""
    places = np.linspace(0, 4, side, dtype=np.float32)
    weights = (1 - abs(places[:, None] - np.arange(5, dtype=np.float32))).clip(0)
    grid = draw(-0.12, 0.12, 5, 5, 3)
    return np.einsum("yi,xj,nijc->nyxc", weights, weights, grid, optimize=True)


def _speck(draw: _Draws, x: Field, y: Field) -> Field:
    """Distance to a small rounded line somewhere in the image: clutter."""
    size = draw(0.1, 0.3, 1, 1)
    x, y = x - draw(-1, 1, 1, 1), y - draw(-1, 1, 1, 1)
    angle = draw(0, 2 * np.pi, 1, 1)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    return np.hypot(along - along.clip(-size, size), across) - draw(0.04, 0.14, 1, 1)


def _bar(draw: _Draws, x: Field, y: Field) -> Field:
    """Distance to a straight bar through the middle, which hides part of the figure."""
    angle = draw(0, 2 * np.pi, 1, 1)
    across = np.cos(angle) * x + np.sin(angle) * y - draw(-0.5, 0.5, 1, 1)
    return abs(across) - draw(-0.08, 0.08, 1, 1)


def make_parser(prog: str = "python -m data_pipelines.demo") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Write a small made-up data set: shapes and textures in class folders.",
        examples=["/tmp/shapes --classes 4 --train-per-class 100 --val-per-class 20"],
    )
    parser.add_argument(
        "folder", type=user_path, metavar="DIR", help="folder to make, with train/ and val/"
    )
    add = parser.add_argument
    add("--classes", type=int, default=10, metavar="N", help="2 to 10 (default: 10)")
    add("--train-per-class", type=int, default=500, metavar="N", help="images (default: 500)")
    add("--val-per-class", type=int, default=100, metavar="N", help="images (default: 100)")
    share(parser, "--image-size", type=int, default=32)
    share(parser, "--seed", default=0)
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m data_pipelines.demo") -> None:
    """Write the demo data set and say so in one line; ``prog`` is how it was called."""
    options = vars(make_parser(prog).parse_args(words))
    folder, image_size = options.pop("folder"), options.pop("image_size")
    fewest = min(options["train_per_class"], options["val_per_class"])
    _check(options["classes"], fewest, image_size)
    demo = DemoData(**options)
    generate_demo(folder, demo, image_size=image_size)
    train, val = demo.classes * demo.train_per_class, demo.classes * demo.val_per_class
    print(f"{folder}: {demo.classes} classes, {train} training and {val} validation images")


if __name__ == "__main__":
    run_command(main)
