"""Places that a command is told to write to: looked at before anything is done."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from tpp.common.errors import UserError

PathLike = str | os.PathLike[str]

# Endings that say what a file is, and so would lie about one of another kind.
_KINDS = {
    "a file of torch.save": (".pth", ".pt", ".th", ".bin", ".ckpt", ".pkl", ".pickle", ".t7"),
    "safetensors": (".safetensors",),
    "ONNX": (".onnx",),
    "an exported program": (".pt2",),
    "a NumPy array": (".npy", ".npz"),
    "HDF5": (".h5", ".hdf5"),
    "JSON": (".json",),
    "lines of JSON": (".jsonl",),
    "YAML": (".yaml", ".yml"),
    "text": (".txt", ".log", ".md"),
    "a table": (".csv", ".tsv"),
    "a web page": (".html", ".htm"),
    "a picture": (".png", ".svg", ".pdf", ".jpg", ".jpeg"),
    "an archive": (".tar", ".zip", ".gz", ".tgz", ".xz", ".bz2"),
    "a program": (".py", ".sh"),
}


def check_output(
    option: str,
    path: PathLike,
    *,
    kind: str,
    ending: str,
    overwrite: bool,
    inputs: Iterable[PathLike] = (),
) -> None:
    """Find out whether a file may be written, before the work of making it.

    Args:
        option: what the user called it, such as ``--output``.
        path: the file.
        kind: what it will be, such as ``safetensors``; names without an ending, and with one that
            says nothing, are free.
        ending: what its name should end in.
        overwrite: whether it may take the place of a file that is there.
        inputs: files that are read, whose place it may not take.

    Raises:
        UserError: it is a folder, or no plain file, or an input; a file is there; its ending
            belongs to another kind of file; or its folder cannot be made or written.
    """
    path = Path(path)
    said = f"{option} {path}"
    if path.is_dir():
        raise UserError(f"{said}: is a folder; name a file")
    if path.name in ("", ".", ".."):
        raise UserError(f"{said}: no name of a file")
    suffix = path.suffix.lower()
    other = next((k for k, endings in _KINDS.items() if suffix in endings and k != kind), None)
    if other is not None and suffix != ending:
        name = path.with_suffix(ending).name
        raise UserError(f"{said}: it is {kind}, and {path.suffix} says {other}; call it {name}")
    for source in map(Path, inputs):
        if _same(path, source):
            raise UserError(f"{said}: is an input, which stays as it is; name another file")
    if os.path.lexists(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{said}: is no plain file")
        if not overwrite:
            raise UserError(f"{said}: is there already; --overwrite replaces it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{said}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{said}: no permission to write in {folder}")


def check_apart(outputs: Collection[tuple[str, PathLike]]) -> None:
    """Raise UserError if two outputs, each an option and its path, are one file."""
    seen: list[tuple[str, Path]] = []
    for option, path in outputs:
        for before, earlier in seen:
            if _same(Path(path), earlier):
                raise UserError(f"{before} and {option} are the same file, {path}")
        seen.append((option, Path(path)))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()
