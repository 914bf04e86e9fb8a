"""The losses of training, against the same written down class by class."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from tpp.common.errors import UserError
from tpp.common.settings import mistakes
from train.config.config import Config, load_config, save_config
from train.tasks import make_task
from train.teachers import teachers_exist


def log_sigmoid(x: Tensor) -> Tensor:
    return -(torch.zeros_like(x).maximum(-x) + (1 + (-x.abs()).exp()).log())


def targets(
    labels: Tensor, classes: int, smoothing: float, threshold: float | None
) -> list[list[float]]:
    """Of every image and class, made one by one; of mixed images from those of the two."""
    rows = []
    for label in labels:
        if label.dim():
            shares = label.tolist()
            row = [
                sum(
                    share * ((1 - smoothing) * (c == other) + smoothing / classes)
                    for other, share in enumerate(shares)
                )
                for c in range(classes)
            ]
        else:
            row = [
                (1 - smoothing) * (c == label.item()) + smoothing / classes for c in range(classes)
            ]
        if threshold is not None:
            row = [1.0 if target > threshold else 0.0 for target in row]
        rows.append(row)
    return rows


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_bce_is_a_mean_over_images_and_classes(mixed, smoothing, threshold):
    numbers = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(6, 7, generator=numbers, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 7, (6,), generator=numbers)
    if mixed:
        # The second share is below the threshold for the first three images.
        shares = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]] * 3)
        one, other = F.one_hot(labels, 7), F.one_hot((labels + 2) % 7, 7)
        labels = shares[:, :1] * one + shares[:, 1:] * other
    loss = torch.zeros((), dtype=torch.float64)
    for row, wanted in zip(logits, targets(labels, 7, smoothing, threshold), strict=True):
        for x, t in zip(row, wanted, strict=True):
            loss = loss - (t * log_sigmoid(x) + (1 - t) * log_sigmoid(-x)) / (6 * 7)
    (truth,) = torch.autograd.grad(loss, logits)

    task = make_task({"kind": "classification"})
    task = task.with_loss("bce", label_smoothing=smoothing, bce_threshold=threshold)
    found, outputs = task.loss(lambda images: logits, (torch.zeros(6), labels))
    assert outputs is logits
    (gradient,) = torch.autograd.grad(found, logits)
    # The shares of mixed images are in float32.
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, truth, rtol=1e-6, atol=1e-8)


def test_an_evaluation_has_cross_entropy_whatever_is_trained_with():
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    task = make_task({"kind": "classification"}).with_loss("bce", label_smoothing=0.1)
    found = {
        metric.name: value
        for metric, value in task.sums(lambda x: logits, (logits, labels)).items()
    }
    assert found["loss"].item() == pytest.approx(3 * math.log(4))


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("finetune", {"bce_threshold": 0.2}, "stages.finetune: bce_threshold goes with loss: bce"),
        ("finetune", {"loss": "mse"}, "stages.finetune.loss: input should be 'cross_entropy' or"),
        ("prune", {"loss": "bce"}, "stages.prune: stages of kind prune take neither loss nor"),
    ],
)
def test_a_mistake_is_told_by_its_key(tiny_config, tmp_path, stage, changes, says):
    tiny_config["stages"][stage] |= changes
    with pytest.raises(ValueError) as caught:
        Config.model_validate(tiny_config)
    (line,) = mistakes(caught.value, Config)
    assert line.startswith(says)


def test_another_kind_of_distillation_replaces_the_old_one(tiny_config, tmp_path):
    """What goes with the old one is gone; a change within one kind leaves the rest."""
    tiny_config["stages"]["finetune"]["distill"] = {"kind": "features", "layers": ["layer1"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    key = "stages.finetune.distill"
    found = load_config(path, [f"{key}.kind=logits", f"{key}.temperature=2.0"])
    distill = found.stages["finetune"].distill
    assert distill is not None and distill.layers is None and distill.temperature == 2.0
    found = load_config(path, [f"{key}.weight=10.0"])
    distill = found.stages["finetune"].distill
    assert distill is not None and distill.layers == ["layer1"] and distill.factor == 10
    # What a run writes down can be read again.
    save_config(found, path)
    assert load_config(path, []) == found


def test_what_teaches_where_nobody_said(tiny_config):
    """The network of the starting weights, where no stage made a dense one; else there is none."""
    tiny_config["stages"] = {
        name: {"kind": "finetune", "epochs": 1, "optimizer": {"lr": 0.1}, "distill": {}}
        for name in ("first", "v1.1")
    }
    with pytest.raises(
        UserError, match=r"stages.first.distill.teacher: no dense stage comes before"
    ):
        teachers_exist(Config.model_validate(tiny_config))
    tiny_config["model"]["checkpoint"] = "x.pth"
    teachers_exist(Config.model_validate(tiny_config))
    del tiny_config["model"]["checkpoint"]
    dense = {"dense": {"epochs": 1, "optimizer": {"lr": 0.1}}}
    tiny_config["stages"] = {**dense, **tiny_config["stages"]}
    config = Config.model_validate(tiny_config)
    teachers_exist(config)
    assert config.dense_stage("v1.1") == "dense"


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("loss", "smoothing"), [("cross_entropy", 0.0), ("bce", 0.1)])
def test_in_episodes_the_loss_is_that_of_a_network_of_their_classes(mixed, loss, smoothing):
    torch.manual_seed(0)
    logits = torch.randn(6, 7, dtype=torch.float64).requires_grad_()
    classes = {0: [1, 4, 6], 1: [0, 2, 3]}
    task = make_task({"kind": "classification"}).with_loss(loss, label_smoothing=smoothing)
    narrow, whole = task, task.in_episodes(lambda step: classes[step // 2])
    for step in (0, 2, 1):
        own = torch.tensor(classes[step // 2])
        places = torch.randint(0, 3, (6,))
        labels = own[places]
        if mixed:
            shares = torch.rand(6, 3).softmax(1)
            places, labels = shares, torch.zeros(6, 7).index_copy(1, own, shares)
        whole.before_step(step, torch.device("cpu"))
        found, outputs = whole.loss(lambda images: logits, (torch.zeros(6), labels))
        inner = logits[:, own]
        truth, _ = narrow.loss(lambda images, inner=inner: inner, (torch.zeros(6), places))
        torch.testing.assert_close(found, truth, rtol=1e-14, atol=0)
        (gradient,) = torch.autograd.grad(found, logits)
        others = [c for c in range(7) if c not in own]
        assert gradient[:, own].all() and not gradient[:, others].any()
        assert torch.equal(outputs[:, own], logits[:, own])
        assert {*outputs.argmax(1).tolist()} <= {*own.tolist()}
