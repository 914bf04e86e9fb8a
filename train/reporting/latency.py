"""Measured times of the networks of a report, as ``tpp latency --json FILE`` has them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError
from tpp.common.reading import read_json


@dataclass(frozen=True)
class Timing:
    """What one network takes for a batch, in milliseconds.

    Attributes:
        batch: images.
        median: over the timed passes.
        quartiles: the first and the third; None where the file does not say.
    """

    batch: int
    median: float
    quartiles: tuple[float, float] | None = None

    @property
    def images_per_second(self) -> float:
        """Images over the median's time."""
        return 1000 * self.batch / self.median


class Latency:
    """What was measured, on one machine.

    Networks are known by their parameters and multiply-accumulates.

    Attributes:
        conditions: machine, threads, arithmetic in words; "" where the file does not say.
        source: the file, for messages.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], conditions: str = "", source: str = ""
    ) -> None:
        self.conditions = conditions
        self.source = source
        self._times = {}
        for row in rows:
            median = float(row["median_ms"])
            if not 0 < median < math.inf:
                raise ValueError("a time is not above 0")
            key = int(row["batch"]), int(row["parameters"]), int(row["macs"])
            ends = (row.get("low_ms"), row.get("high_ms"))
            quartiles = None if None in ends else (float(ends[0] or 0), float(ends[1] or 0))
            self._times[key] = Timing(key[0], median, quartiles)

    @classmethod
    def read(cls, path: Path) -> "Latency":
        """Read a file.

        Raises:
            UserError: it is none of these.
        """
        content = read_json(path, "the latencies")
        try:
            return cls(content["results"], _conditions(content), str(path))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{path}: not what tpp latency --json writes") from None

    @property
    def batches(self) -> list[int]:
        """The batches that were measured."""
        return sorted({batch for batch, _, _ in self._times})

    def timing(self, batch: int, parameters: int | None, macs: float | None) -> Timing | None:
        """Of a network; None where it was not measured."""
        if parameters is None or macs is None:
            return None
        return self._times.get((batch, parameters, int(macs)))

    def expect_some(self, networks: Iterable[tuple[int | None, float | None]]) -> None:
        """Check that some of the networks were measured.

        Args:
            networks: parameters and multiply-accumulates of each.

        Raises:
            UserError: none was.
        """
        if not any(self.timing(batch, *of) for of in networks for batch in self.batches):
            raise UserError(
                f"{self.source}: none of the networks to report is in it (they are known by their "
                "parameters and multiply-accumulates); tpp latency CHECKPOINT --json "
                "FILE measures them"
            )

    def milliseconds(self, batch: int, parameters: int | None, macs: float) -> float | None:
        """A network's time for a batch; None where it was not measured."""
        timing = self.timing(batch, parameters, macs)
        return None if timing is None else timing.median


def _conditions(content: Mapping[str, Any]) -> str:
    on, settings = content.get("on") or {}, content.get("settings") or {}
    device = on.get("gpu") or ", ".join(
        str(said)
        for said in (
            on.get("machine"),
            on.get("cpu"),
            f"{on['threads']} thread{'' if on['threads'] == 1 else 's'}" if "threads" in on else "",
        )
        if said
    )
    said = [
        device,
        settings.get("dtype"),
        "channels last" if settings.get("channels_last") else "",
        "compiled" if settings.get("compile") else "",
        f"median of {settings['repeats']}" if "repeats" in settings else "",
        f"PyTorch {on['torch']}" if "torch" in on else "",
    ]
    return ", ".join(str(part) for part in said if part)
