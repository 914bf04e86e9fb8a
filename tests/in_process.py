"""A command that is run in the process of its test, which saves the imports."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tpp.common.errors import run_command


def in_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, main: Callable[[], None]
) -> Callable[..., None]:
    """Runs a command in this process: by a configuration, arguments and the exit code expected."""

    def run(settings: dict[str, Any], *arguments: str, expect: int = 0) -> None:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        monkeypatch.setattr(sys, "argv", [program, "--config", str(path), *arguments])
        if expect == 0:
            main()
            return
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == expect

    return run
