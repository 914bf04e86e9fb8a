"""What a prune stage finds out on training images: against float64, and the same on any ranks."""

import copy
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from first_batch_worker import opened

from launch.check import resources
from tpp.checkpoints.model_file import load_model, read_metadata
from tpp.models.recalibration import statistics_of
from tpp.plan import PruningPlan
from train.config.config import Config
from train.preflight import only_prunes
from train.run_folder.calibration import gradients

LAYERS = ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1")


@pytest.fixture
def config(tiny_config):
    """A dense network, and a prune stage that looks at three batches."""
    tiny_config["method"] = {"name": "l1"}
    tiny_config["model"]["num_classes"] = 4
    tiny_config["pruning"] |= {"criterion": "taylor", "batches": 3}
    stages = {"dense": {"epochs": 0.5, "optimizer": {"lr": 0.05}}, "prune": {"recalibrate": 2}}
    tiny_config["stages"] = {**stages, "finetune": {"epochs": 0.2, "optimizer": {"lr": 0.01}}}
    tiny_config["training"]["accumulation"] = 2
    return tiny_config


def images_of(config, tmp_path: Path, steps: int):
    """Micro-batches of the first steps, as lists."""
    path = tmp_path / "again.json"
    path.write_text(json.dumps(config))
    run = opened(path, Accelerator(cpu=True))
    with closing(run.data.calibration_batches(steps)) as batches:
        return run, [(images.clone(), labels.clone()) for images, labels in batches]


def test_the_stage_goes_by_its_images(config, tmp_path, run_inside):
    run_inside(config)
    folder = Path(config["output"])
    results = json.loads((folder / "results.json").read_text())["stages"]
    assert results["prune"]["recalibrated_batches"] == 2
    assert "recalibrated_batches" not in results["dense"]
    pruned = folder / "prune" / "model.safetensors"
    assert read_metadata(pruned).extra["recalibrated_batches"] == 2

    run, batches = images_of(config, tmp_path, 3)
    assert [len(labels) for _, labels in batches] == [8] * 6
    dense = load_model(folder / "dense" / "model.safetensors")
    wide = copy.deepcopy(dense).double()
    totals = {layer: 0.0 for layer in LAYERS}
    for step in range(3):
        wide.zero_grad()
        for images, labels in batches[2 * step : 2 * step + 2]:
            (F.cross_entropy(wide(images.double()), labels) / 2).backward()
        for layer in LAYERS:
            norm = wide.get_submodule(layer.replace("conv1", "bn1"))
            change = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
            totals[layer] = totals[layer] + change.detach().square()
    plan = PruningPlan.load(folder / "plan.json")
    for layer, total in totals.items():
        assert plan.pruned[layer] == sorted(total.argsort()[: len(total) // 2].tolist()), layer

    names = ["conv1.weight", "layer3.0.bn1.weight"]
    found = next(iter(gradients(run, "prune", dense, names, 1)))
    wide.zero_grad()
    for images, labels in batches[:2]:
        (F.cross_entropy(wide(images.double()), labels) / 2).backward()
    for name, gradient in zip(names, found, strict=True):
        expected = wide.get_parameter(name).grad
        assert (gradient.double() - expected).norm() <= 1e-4 * expected.norm()
    assert all(parameter.grad is None for parameter in dense.parameters())

    def along(batch, tensors):
        generator = torch.Generator().manual_seed(batch)
        return [torch.randn(t.shape, generator=generator).to(t) for t in tensors]

    found = next(iter(gradients(run, "prune", dense, names, 1, along)))
    tensors = [wide.get_parameter(name) for name in names]
    loss = sum(F.cross_entropy(wide(i.double()), labels) / 2 for i, labels in batches[:2])
    slopes = torch.autograd.grad(loss, tensors, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(slopes, along(0, tensors), strict=True))
    for product, expected in zip(found, torch.autograd.grad(slope, tensors), strict=True):
        assert (product.double() - expected).norm() <= 1e-4 * expected.norm()

    # Of two steps, two micro-batches each; BatchNorm of torch itself, of one batch at a time.
    network = load_model(pruned)
    kept = {name: value.clone() for name, value in statistics_of(network).items()}
    wide = copy.deepcopy(network).double().train()
    sums = {name: 0.0 for name in kept if not name.endswith("tracked")}
    for module in wide.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for images, _ in batches[:4]:
        wide(images.double())
        for name in sums:
            sums[name] = sums[name] + wide.get_buffer(name) / 4
    for name, value in sums.items():
        torch.testing.assert_close(kept[name].double(), value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(kept[name].double(), value * 1.01 + 0.001, rtol=1e-4)


def test_two_ranks_find_what_one_does(config, tmp_path, run_main):
    config["stages"]["dense"]["epochs"] = 0.2
    config["training"]["accumulation"] = 1
    del config["stages"]["finetune"]
    run_main(config, "--until", "dense")
    folders = [Path(config["output"])]
    import shutil

    folders.append(tmp_path / "two")
    shutil.copytree(folders[0], folders[1])
    run_main(config)
    run_main({**config, "output": str(folders[1])}, ranks=2)
    plans = [PruningPlan.load(folder / "plan.json") for folder in folders]
    assert plans[0] == plans[1] and plans[0].active_layers == [*LAYERS]
    one, two = (load_model(folder / "prune" / "model.safetensors") for folder in folders)
    for name, value in statistics_of(one).items():
        torch.testing.assert_close(two.get_buffer(name), value, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(value, two.get_parameter(name)) for name, value in one.named_parameters()
    )


def test_a_stage_that_looks_at_images_needs_them(config):
    def left(**changes) -> bool:
        told = copy.deepcopy(config)
        told["stages"] = {"dense": told["stages"]["dense"], "prune": changes.pop("prune", {})}
        told["pruning"] |= changes
        return only_prunes(Config.model_validate(told), ["prune"])

    assert not left()
    assert left(criterion="group_norm")
    assert not left(criterion="group_norm", prune={"recalibrate": 3})


def test_what_is_wrong_is_one_line(config, run_main):
    told = copy.deepcopy(config)
    told["stages"]["dense"]["recalibrate"] = 3
    done = run_main(told, expect=2)
    assert "stages of kind dense take no recalibrate: prune does" in done.stderr
    told = copy.deepcopy(config)
    told["model"] = {"name": "mlp7_linear", "num_classes": 4}
    told["data"] |= {"channels": 1, "mean": [0.5], "std": [0.5], "image_size": 28}
    told["pruning"]["ratios"] = {"fc1": 0.5}
    done = run_main(told, expect=2)
    assert "stages.prune.recalibrate: mlp7_linear has no BatchNorm" in done.stderr


def test_a_job_for_it_is_one_of_training(config):
    told = Config.model_validate(config)
    assert resources(told, "prune") == "training"
    told.stages["prune"].recalibrate = None
    assert resources(told, "prune") == "training"
    told.pruning = told.pruning.model_copy(update={"criterion": "l1"})
    assert [resources(told, name) for name in told.stages] == ["training", "files", "training"]
