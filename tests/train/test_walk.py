"""The road of one training step, as docs/architecture.md draws it."""

import re
import traceback
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

ROOT = Path(__file__).resolve().parents[2]


def test_from_the_command_to_the_forward_pass_are_six_calls(tiny_config, run_inside):
    seen: list[tuple[str, str]] = []

    def look(module: nn.Module, inputs: object) -> None:
        if module.training and not seen:
            frames = traceback.extract_stack()
            names = [(str(Path(f.filename)), f.name) for f in frames]
            seen.extend(
                (str(Path(file).relative_to(ROOT)), name)
                for file, name in names
                if file.startswith(f"{ROOT}/train/") and "/distributed/" not in file
            )

    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"]}
    hook = register_module_forward_pre_hook(look)
    try:
        run_inside(tiny_config)
    finally:
        hook.remove()
    assert seen == [
        ("train/main.py", "main"),
        ("train/stages/sequence.py", "run_stages"),
        ("train/stages/training.py", "train"),
        ("train/loop/loop.py", "train"),
        ("train/loop/step.py", "gradients"),  # the step's, computed or recorded
        ("train/loop/step.py", "gradients"),
        ("train/tasks/classification.py", "loss"),
    ]
    # The page says the same.
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = re.findall(r"^\| `([\w.]+)` \| `(train/[\w/.*]+)` \|", page, re.MULTILINE)
    assert [name.split(".")[-1] for name, _ in told] == [name for _, name in seen]
