"""Files of torch.save, read without running anything that is in them.

``torch.load(weights_only=True)`` builds nothing but plain data and tensors. It does not ask
whether the file is large enough for what it makes: a few bytes may become a tensor of any size.
Of a whole network that was pickled the tensors are read, see
:mod:`tpp.checkpoints.whole_networks`.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.checkpoints.file_kinds import begins_as_torch
from tpp.checkpoints.stand_ins import STAND_INS
from tpp.checkpoints.whole_networks import WantsCallError, networks_in, remains_of
from tpp.common.errors import UserError, reason_of

# Tensors may share memory (ties, views of a flat vector), so together they may have more bytes
# than the file; not many times as many.
_MOST_OFTEN = 4
_SPARE = 2**20
# With which pickles of protocols 3 to 5 mark frames, short names, and what they remember.
_LATER_OPERANDS = (pickle.FRAME, pickle.MEMOIZE, pickle.SHORT_BINUNICODE, pickle.STACK_GLOBAL)


class NeedsPickleError(UserError):
    """The file holds an object of a class that is not plain data.

    Attributes:
        refused: the class or function.
    """

    def __init__(self, path: Path, refused: str) -> None:
        super().__init__(f"{path}: holds {refused}, and reading that could run any code")
        self.refused = refused


def load_torch(path: Path) -> Any:
    """Plain data and tensors of a file that torch.save wrote; mapped, not read, where possible.

    What training scripts keep beside them (arguments, paths, NumPy numbers) becomes one of
    :mod:`tpp.checkpoints.stand_ins`; a whole network becomes its ``state_dict``.

    Args:
        path: an existing file.

    Raises:
        NeedsPickleError: it holds something else, whose class is not on that list.
        UserError: it is damaged, compressed, or no file of torch.save; or a tensor is sparse,
            quantized, complex or without memory, or larger than the file can hold.
    """
    if path.suffix == ".safetensors":
        # torch.load goes by the name.
        raise UserError(f"{path}: a file of torch.save, whatever its name says; rename it to .pth")
    # Only the zip format of torch >= 1.6 can be mapped instead of read.
    mapped = begins_as_torch(path)
    try:
        data = _load(path, mapped)
    except NeedsPickleError as refused:
        if not mapped:
            raise
        data = _load_networks(path, refused)
    _check_tensors(path, data)
    return data


def _load_networks(path: Path, refused: NeedsPickleError) -> Any:
    """What a file holds that holds whole networks; otherwise it is refused as it was."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            known = remains_of(path)
    except Exception:  # a damaged file
        raise refused from None
    try:
        data, networks = networks_in(_load(path, True, known), str(path))
    except WantsCallError as wanted:
        raise NeedsPickleError(path, wanted.called) from None
    if not networks:
        raise refused
    return data


def _load(path: Path, mapped: bool, known: Sequence[Any] = ()) -> Any:
    """Read a file; ``known`` are classes that may stand for others in it."""
    try:
        if mapped:
            _check_archive(path)
        with (
            torch.serialization.safe_globals([*STAND_INS, *known]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about pickle protocols that a damaged file names
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (UserError, WantsCallError):
        raise
    except pickle.UnpicklingError as error:
        raise _unpickled_to(path, str(error)) from None
    except (Exception, MemoryError) as error:
        # A damaged file can make torch's reader stumble anywhere, or ask for any memory.
        reason = "it asks for more memory than there is" if _is_memory(error) else reason_of(error)
        raise UserError(f"{path}: not a whole PyTorch file ({reason})") from None


def _unpickled_to(path: Path, message: str) -> UserError:
    """What PyTorch's reader of plain data stumbled over."""
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused:
        return NeedsPickleError(path, refused[1])
    if "torch.distributed.tensor" in message:
        return NeedsPickleError(path, "a DTensor, one rank's part of a tensor")
    operand = re.search(r"Unsupported operand (\d+)", message)
    if operand and bytes([int(operand[1])]) in _LATER_OPERANDS:
        return UserError(
            f"{path}: written with a pickle protocol above 2, which is not read here; where it was "
            "made, leave pickle_protocol out of torch.save"
        )
    said = re.search(r"WeightsUnpickler error: (.*)", message)
    reason = said[1].strip() if said else message.partition("\n")[0]
    return UserError(f"{path}: not a whole PyTorch file ({reason})")


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate" in str(error)


def _check_archive(path: Path) -> None:
    """Refuse entries that hold more than they take up: torch.save never compresses."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise UserError(f"{path}: its entry {packed.filename} is compressed; torch.save does not")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path}: not a whole PyTorch file (its entries overlap)")


def _check_tensors(path: Path, data: Any) -> None:
    """Refuse tensors of kinds that no network has, and those that are larger than the file."""
    most, total = _MOST_OFTEN * path.stat().st_size + _SPARE, 0
    for name, tensor in _tensors_in(data):
        kind = _unusual(tensor)
        if kind:
            raise UserError(f"{path}: {name} is {kind}, which is no weight of a network")
        total += tensor.numel() * tensor.element_size()
        if total > most:
            raise UserError(f"{path}: {name} is larger than the file can hold")


def _unusual(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "a sparse tensor"
    if tensor.device.type != "cpu":
        return f"a tensor on {tensor.device.type}"
    return "quantized" if tensor.is_quantized else "complex" if tensor.is_complex() else None


def _tensors_in(data: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, once, with its key."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("the file", data)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set):
            waiting += [(name, inner) for inner in value]
