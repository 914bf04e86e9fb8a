"""What is really in wandb's files of a run without a way out.

wandb's process keeps the newest rows in memory, and a kill loses them.
"""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The blocks of LevelDB's logs, behind a header of wandb's own.
_HEADER, _BLOCK = 7, 2**15
_PART = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, as wandb's protobuf messages; a torn end is left out."""
    from google.protobuf.message import DecodeError

    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, content = path.read_bytes(), _HEADER, b""
    while at + _PART.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _PART.size:
            at += left
            continue
        _, length, kind = _PART.unpack_from(data, at)
        at += _PART.size
        if kind == 0 or at + length > len(data):
            return
        content += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            record = messages.Record()
            try:
                record.ParseFromString(content)
            except DecodeError:
                return
            yield record
            content = b""


def row_of(record: Any) -> dict[str, Any] | None:
    """A row of the history by its keys; None of another record."""
    if record.WhichOneof("record_type") != "history":
        return None
    items = record.history.item
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def last_step(folder: Path, identity: str) -> int:
    """The last step in all files of a run below ``folder``; -1 where there is none."""
    last = -1
    for path in folder.glob(f"offline-run-*-{identity}/run-{identity}.wandb"):
        rows = filter(None, map(row_of, records(path)))
        last = max(last, max((row.get("_step", -1) for row in rows), default=-1))
    return last
