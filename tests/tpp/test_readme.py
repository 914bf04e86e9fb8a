"""What README.md and docs/library.md say about Python, run as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import tpp
from tpp.regularization.regularizer import Regularizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "library.md")


def snippets() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_network_that_a_run_has_made(folder: Path) -> None:
    (loading,) = [code for code in snippets() if "load_model" in code]
    (path,) = re.findall(r'load_model\("(.*)"\)', loading)
    model = torchvision.models.resnet18(num_classes=3)
    tpp.save_model(path, model, architecture=tpp.Architecture("resnet18", 3))
    found: dict[str, Any] = {}
    exec(loading, found)
    assert found["model"](torch.zeros(1, 3, 64, 64)).shape == (1, 3)


class Loader(list[tuple[torch.Tensor, torch.Tensor]]):
    """Batches, for so many epochs and not without end."""

    epochs = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epochs += 1
        assert self.epochs < 30, "the loop does not end"
        return super().__iter__()


def test_a_training_loop_of_your_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all of the stage, after which the removal changes nothing."""
    torch.manual_seed(0)
    dense = torchvision.models.resnet18(num_classes=10)
    torch.save(dense.state_dict(), folder / "resnet18.pth")
    loader = Loader((torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(3))
    steps: list[int] = []
    after_step = Regularizer.after_step

    def counted(self: Regularizer, step: int) -> None:
        steps.append(step)
        after_step(self, step)

    monkeypatch.setattr(Regularizer, "after_step", counted)
    (loop,) = [code for code in snippets() if "Regularizer" in code]
    found: dict[str, Any] = {"loader": loader}
    exec(loop, found)
    assert steps == list(range(found["growth"].total_steps)) and len(steps) == 20 * 3 + 1

    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    model, pruned = (found[name].double().eval() for name in ("model", "pruned"))
    torch.testing.assert_close(pruned(images), model(images), rtol=1e-9, atol=1e-9)
    assert pruned.layer1[0].conv1.out_channels == 25 and pruned.layer4[0].conv1.out_channels == 358
    saved = tpp.load_model("pruned.safetensors").double().eval()
    torch.testing.assert_close(saved(images), pruned(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), torchvision.models.resnet18()])
def test_a_network_that_does_not_say_which_it_is(folder: Path, model: nn.Module) -> None:
    with pytest.raises(tpp.UserError) as error:
        tpp.save_model("x.safetensors", model)
    message = str(error.value)
    assert message.startswith("x.safetensors: ") and "\n" not in message
    assert 'architecture=tpp.Architecture("resnet50", 1000)' in message
    assert not list(folder.iterdir())
