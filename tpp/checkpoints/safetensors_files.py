"""Safetensors files: opened, checked, and which tensors share memory."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpp.checkpoints.file_kinds import check_file
from tpp.common.errors import UserError, reason_of
from tpp.common.reading import check_names

PathLike = str | os.PathLike[str]

_MOST_THREADS = 8  # beyond that memory is what hashing waits for


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        UserError: it is missing, not readable, truncated or not safetensors.
    """
    check_file(path)
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({reason_of(error)})") from None
    check_names(file.keys(), str(path))
    return file


def find_ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one: {alias: name}."""
    seen: dict[Any, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = seen.setdefault(place, name)
        if first != name:
            ties[name] = first
    return ties


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and apart; copied only where they are not so already."""
    result = {}
    end = 0
    host = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
    for name in sorted(host, key=lambda name: host[name].data_ptr()):
        tensor = host[name]
        if not tensor.is_contiguous() or tensor.data_ptr() < end:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        else:
            end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        result[name] = tensor
    return {name: result[name] for name in tensors}


def sha256_of(tensor: Tensor) -> str:
    """Hash of a contiguous CPU tensor's bytes, in hexadecimal."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def sha256_of_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """:func:`sha256_of` of every tensor, on all processors that there are for this process."""
    largest_first = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS)) as pool:
        found = dict(
            zip(
                largest_first,
                pool.map(lambda name: sha256_of(tensors[name]), largest_first),
                strict=True,
            )
        )
    return {name: found[name] for name in tensors}
