"""Every file in configs/ against METHOD's tables, typed here once more."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.masks import Mask, select_mask
from tpp.measure.counts import Counts, count
from tpp.models.architecture import Architecture, build_model, build_on_meta, set_preprocessing
from tpp.models.layers import prunable_layers
from tpp.selection.criteria import pruned_count
from tpp.selection.selection import select_filters
from train.config.config import Config, load_config, steps_for
from train.grid import expand, load_sweep
from train.preflight import (
    check_image_sizes,
    check_methods,
    check_optimizers,
    check_plans,
    check_training_size,
)

ROOT = Path(__file__).resolve().parents[2]
# A sweep is no configuration of a run; tests/train/test_sweep.py has it. Nor is what has to do with
# graphs; tests/train/test_graph_runs.py has that.
SWEEPS = ("table1", "related", "polarization")
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.stem not in SWEEPS and path.parent.name != "graphs"
)
ROWS_OF_SWEEPS = ("related", "polarization")
BASES = [path for path in CONFIGS if path.stem.endswith("base")]
COMPLETE = [path for path in CONFIGS if path not in BASES]
SHORTENED = [path for path in COMPLETE if path.stem.endswith("_short")]
# name: multiply-accumulates of the dense and the pruned network, the dense network's top-1 and the
# pruned one's, where they are published. The settings are ours, not the paper's.
RECIPES: dict[str, tuple[int, int | None, float | None, float | None]] = {
    "resnet50_dense_v2": (4_089_184_256, None, 80.86, None),
    "resnet50_tpp_2g_advanced": (4_089_184_256, 2_003_939_080, 80.86, 77.75),
    "resnet50_tpp_1g_advanced": (4_089_184_256, 996_359_675, 80.86, 76.52),
    "resnet50_tpp_1.6g_distilled": (4_089_184_256, 1_599_802_760, 80.86, None),
    "convnext_tiny_tpp": (4_455_531_264, 2_788_508_928, 82.1, None),
    "vit_small_tpp": (4_241_218_560, 2_846_874_624, None, None),
}
# Systems that are related to TPP; of what they publish nothing is a row of these tables.
RELATED = {"resnet56_l1_linear_overparam_pr0.9": "resnet56_l1_pr0.9"}
RETRAINED = ("resnet56_l1_llr_pr0.9", "resnet56_imp_allr", "resnet56_bimp", "resnet50_imp_allr")
UNPUBLISHED = {*RELATED, *RETRAINED, "resnet56_ffr_pr0.5", "vgg16_while_training_0.8"}
UNPUBLISHED |= {"resnet56_interspace_0.95", "resnet50_interspace_0.9", "resnet56_polarization"}
# At the filters, and in the steps, of a published row of TPP.
AT_2_56X = ("l1_llr", "tpp_linear_overparam", "while_training")
UNPUBLISHED |= {f"resnet50_{name}_2.56x" for name in AT_2_56X}
UNPUBLISHED.add("convnet18_rec_lra")
ROWS = [
    path
    for path in COMPLETE
    if path.parent.name in ("imagenet", "cifar10")
    and path not in SHORTENED
    and path.stem not in RECIPES
    and path.stem not in UNPUBLISHED
    and not path.stem.endswith("_recipe")
]

# name: dense top-1, top-1, its deviation, published speedup, speedup by counted MACs
PUBLISHED = {
    "resnet34_dense": (73.31, None, None, None, None),
    "resnet50_dense": (76.13, None, None, None, None),
    "resnet34_tpp_1.32x": (73.31, 73.77, None, 1.32, 1.3168),
    "resnet50_tpp_1.49x": (76.13, 76.44, None, 1.49, 1.4894),
    "resnet50_tpp_2.31x": (76.13, 75.60, None, 2.31, 2.3081),
    "resnet50_tpp_2.56x": (76.13, 75.12, None, 2.56, 2.5641),
    "resnet50_tpp_3.06x": (76.13, 74.51, None, 3.06, 3.0634),
    "resnet56_dense": (93.78, None, None, None, None),
    "resnet56_tpp_pr0.3": (93.78, 93.81, 0.11, 1.45, 1.452),
    "resnet56_tpp_pr0.5": (93.78, 93.46, 0.06, 1.99, 1.993),
    "resnet56_tpp_pr0.7": (93.78, 92.35, 0.12, 3.59, 3.593),
    "resnet56_tpp_pr0.9": (93.78, 89.63, 0.10, 11.41, 11.578),
    "resnet56_tpp_pr0.95": (93.78, 85.86, 0.08, 19.31, 19.846),
    "resnet56_l1_pr0.3": (93.78, 93.79, 0.06, 1.45, 1.452),
    "resnet56_l1_pr0.5": (93.78, 93.51, 0.07, 1.99, 1.993),
    "resnet56_l1_pr0.7": (93.78, 92.26, 0.17, 3.59, 3.593),
    "resnet56_l1_pr0.9": (93.78, 86.75, 0.31, 11.41, 11.578),
    "resnet56_l1_pr0.95": (93.78, 83.03, 0.07, 19.31, 19.846),
    "resnet56_scratch_pr0.9": (93.78, 88.36, 0.20, 11.41, 11.578),
    "resnet56_l1_orthp_pr0.9": (93.78, 86.01, 0.34, 11.41, 11.578),
    "resnet56_l1_kernorth_pr0.9": (93.78, 84.78, 0.34, 11.41, 11.578),
    "resnet56_l1_orthconv_pr0.9": (93.78, 84.52, 0.27, 11.41, 11.578),
    "resnet56_kernorth_l1_pr0.9": (93.78, 85.47, 0.20, 11.41, 11.578),
    "resnet56_orthconv_l1_pr0.9": (93.78, 86.70, 0.07, 11.41, 11.578),
    "resnet56_greg1_pr0.9": (93.78, None, None, None, 11.578),
    "resnet56_greg2_pr0.9": (93.78, None, None, None, 11.578),
}
# name: its method with what the authors of each set, and the regularised stage's iterations
RIVALS = {
    "resnet56_scratch_pr0.9": ({"name": "scratch"}, None),
    "resnet56_l1_orthp_pr0.9": ({"name": "l1+orthp", "gain": 2**0.5}, None),
    "resnet56_l1_kernorth_pr0.9": (
        {"name": "l1+kernorth", "strength": 0.1, "squared": False},
        None,
    ),
    "resnet56_l1_orthconv_pr0.9": (
        {"name": "l1+orthconv", "strength": 0.1, "squared": False},
        None,
    ),
    "resnet56_kernorth_l1_pr0.9": (
        {"name": "kernorth+l1", "strength": 0.1, "squared": False},
        50_000,
    ),
    "resnet56_orthconv_l1_pr0.9": (
        {"name": "orthconv+l1", "strength": 0.1, "squared": False},
        50_000,
    ),
    "resnet56_greg1_pr0.9": (
        {
            "name": "greg1",
            "delta": 1e-4,
            "tau": 1.0,
            "update_interval": 10,
            "stabilize_steps": 10_000,
        },
        110_001,
    ),
    "resnet56_greg2_pr0.9": (
        {
            "name": "greg2",
            "pick_delta": 1e-5,
            "pick_ceiling": 0.01,
            "kept_decay": -1e-4,
            "delta": 1e-4,
            "tau": 1.0,
            "update_interval": 10,
            "stabilize_steps": 10_000,
        },
        119_001,
    ),
}
REMOVED_PERCENT = {"0.3": 31.14, "0.5": 49.82, "0.7": 70.58, "0.9": 90.45, "0.95": 95.18}


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def head(path: Path) -> str:
    """The comment block that a file begins with, as one line."""
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(" ".join(line.strip("#\\ ") for line in lines[:end]).split())


def load(name: str) -> Config:
    (path,) = [path for path in ROWS if path.stem == name]
    return load_config(path)


def of_kind(kind: str, dataset: str) -> list[Config]:
    return [
        load(path.stem)
        for path in ROWS
        if kind in path.stem and path.parent.name == dataset and path.stem not in RIVALS
    ]


@pytest.mark.parametrize("path", COMPLETE, ids=by_name)
def test_loads(path: Path) -> None:
    config = load_config(path)
    folder = path.parent.name
    assert config.name == (f"{folder}_" if folder in ROWS_OF_SWEEPS else "") + path.stem


@pytest.mark.parametrize("path", BASES, ids=by_name)
def test_base_is_no_run_of_its_own_and_says_so(path: Path) -> None:
    assert "Not a run of its own" in head(path)
    with pytest.raises(UserError, match="missing"):
        load_config(path)
    extending = [other for other in path.parent.glob("*.yaml") if other != path]
    assert any(f"extends: {path.name}\n" in other.read_text() for other in extending)


def test_there_is_a_file_for_every_published_row() -> None:
    assert {path.stem for path in ROWS} == set(PUBLISHED)


@pytest.mark.parametrize("path", ROWS, ids=by_name)
def test_head_says_what_to_expect_and_what_to_type(path: Path) -> None:
    text = head(path)
    assert f"tpp train --config {by_name(path)} " in text + " "
    assert "data.root=/path/to/" in text
    dense, top1, std, _, speedup = PUBLISHED[path.stem]
    if "_greg" in path.stem:
        assert "no published figure" in text
    else:
        assert f"top-1 {top1 or dense:.2f}" in text
    for part in ("Reproduces:", "Expect:", "Takes:", "Run"):
        assert part in text
    if speedup is not None:
        assert f"speedup {speedup}x" in text
        assert f"dense: {dense:.2f}" in text
    if std is not None:
        assert f"std {std:.2f}" in text


@pytest.mark.parametrize("path", ROWS, ids=by_name)
def test_published_figures(path: Path) -> None:
    published = load_config(path).published
    assert published is not None
    dense, top1, std, speedup, _ = PUBLISHED[path.stem]
    assert (published.dense_top1, published.top1, published.top1_std) == (dense, top1, std)
    assert published.speedup == speedup
    if top1 is not None:
        assert "Wang & Fu, ICLR 2023, Table" in published.source


@pytest.mark.parametrize(
    ("dataset", "update_interval", "stabilize_steps", "weight_decay", "batch", "finetuning"),
    [
        ("imagenet", 5, 40_000, 1e-4, 256, (90, [30, 60, 75])),
        ("cifar10", 10, 10_000, 5e-4, 128, (120, [60, 90])),
    ],
)
def test_published_settings_of_tpp(
    dataset: str,
    update_interval: int,
    stabilize_steps: int,
    weight_decay: float,
    batch: int,
    finetuning: tuple[float, list[float]],
) -> None:
    for config in of_kind("_tpp_", dataset):
        assert [stage.kind for stage in config.stages.values()] == [
            "regularize",
            "prune",
            "finetune",
            "evaluate",
        ]
        assert config.method == {
            "name": "tpp",
            "gram_weight": 1000,
            "delta": 1e-4,
            "tau": 1.0,
            "update_interval": update_interval,
            "stabilize_steps": stabilize_steps,
            "zero_out_interval": 100,
        }
        assert config.stage_method("regularize").steps() == (
            update_interval * 10_000 + stabilize_steps + 1
        )
        assert config.training.batch_size == batch
        regularize = config.stages["regularize"].optimizer
        assert regularize is not None
        assert (regularize.lr, regularize.schedule) == (0.001, "constant")
        assert (regularize.momentum, regularize.weight_decay) == (0.9, weight_decay)
        check_finetuning(config, weight_decay, finetuning)


def test_published_settings_of_l1() -> None:
    for config in of_kind("_l1_", "cifar10"):
        kinds = [stage.kind for stage in config.stages.values()]
        assert kinds == ["evaluate", "prune", "finetune", "evaluate"]  # the dense network first
        assert config.method == {"name": "l1"}
        assert config.training.batch_size == 128
        check_finetuning(config, 5e-4, (120, [60, 90]))


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_differ_from_tpp_in_their_method_alone(name: str) -> None:
    config, tpp = load(name), load("resnet56_tpp_pr0.9")
    method, iterations = RIVALS[name]
    assert config.method == method
    assert (config.pruning, config.data) == (tpp.pruning, tpp.data)
    assert (config.training, config.model) == (tpp.training, tpp.model)
    assert config.stages["finetune"] == tpp.stages["finetune"]
    assert ("regularize" in config.stages) == (iterations is not None)
    if iterations is not None:
        stage = config.stages["regularize"]
        assert stage.optimizer == tpp.stages["regularize"].optimizer
        steps = config.stage_method("regularize").steps()
        assert iterations == (steps or steps_for(stage.epochs or 0, 50_000, 128))
        assert f"{iterations:,}" in head(next(path for path in ROWS if path.stem == name))


@pytest.mark.parametrize("path", SHORTENED, ids=by_name)
def test_shortened_schedule_is_whole_and_alike_for_both(path: Path) -> None:
    """Lambda reaches tau, every layer is zeroed out, and the methods differ in nothing else."""
    config = load_config(path)
    assert "hortened" in head(path) and "beside the published settings" in head(path)
    growth = config.stage_method("tpp_regularize")._growth
    assert growth.strength(growth.growth_steps) == growth.tau
    plan = check_plans(config, Architecture(config.model.name, 10, {}))
    assert plan is not None
    layers = list(prunable_layers(build_on_meta(Architecture(config.model.name, 10, {}))))
    assert growth.zeroed(layers.index(plan.active_layers[-1]), growth.total_steps - 1)
    trained = {"finetune": [], "regularize": []}
    for name, stage in config.stages.items():
        if stage.kind in trained:
            trained[stage.kind].append((stage.epochs, stage.optimizer))
            if stage.kind == "regularize":
                assert stage.input == "dense"
                other = config.stage_method(name)._growth
                assert replace(other, zero_out_interval=None) == replace(
                    growth, zero_out_interval=None
                )
    for settings in trained.values():
        assert all(one == settings[0] for one in settings)
    assert len(trained["finetune"]) >= 2 and config.stages["l1_prune"].input == "dense"


def check_finetuning(
    config: Config, weight_decay: float, finetuning: tuple[float, list[float]]
) -> None:
    stage = config.stages["finetune"]
    optimizer = stage.optimizer
    assert optimizer is not None
    assert (stage.epochs, optimizer.milestones) == finetuning
    assert (optimizer.lr, optimizer.schedule, optimizer.gamma) == (0.01, "step", 0.1)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, weight_decay)
    assert not optimizer.nesterov
    assert stage.label_smoothing == 0


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "milestones", "weight_decay"),
    [
        ("resnet34_dense", 90, 256, [30, 60], 1e-4),
        ("resnet50_dense", 90, 256, [30, 60], 1e-4),
        ("resnet56_dense", 200, 128, [100, 150], 5e-4),
    ],
)
def test_recipes_of_the_dense_networks(
    name: str, epochs: float, batch: int, milestones: list[float], weight_decay: float
) -> None:
    config = load(name)
    assert list(config.stages) == ["dense", "evaluate"]
    assert config.model.checkpoint is None
    stage = config.stages["dense"]
    optimizer = stage.optimizer
    assert optimizer is not None
    assert (stage.epochs, config.training.batch_size) == (epochs, batch)
    assert (optimizer.lr, optimizer.schedule, optimizer.gamma) == (0.1, "step", 0.1)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, weight_decay)
    assert optimizer.milestones == milestones


@pytest.mark.parametrize("name", RELATED)
def test_related_systems_claim_nothing_and_differ_in_their_method(name: str) -> None:
    (path,) = [path for path in COMPLETE if path.stem == name]
    config, plain, text = load_config(path), load(RELATED[name]), head(path)
    for part in ("Reproduces:", "A reconstruction", "Expect: no published figure", "Takes:"):
        assert part in text
    assert f"tpp train --config {by_name(path)} " in text
    published = config.published
    assert published is not None and published.dense_top1 == 93.78
    assert (published.top1, published.speedup) == (None, None)
    assert (config.pruning, config.model, config.data) == (plain.pruning, plain.model, plain.data)
    assert (config.training, config.method) == (plain.training, plain.method)
    for stage, other in zip(config.stages.values(), plain.stages.values(), strict=True):
        assert stage.model_copy(update={"method": None}) == other
    check_finetuning(config, 5e-4, (120, [60, 90]))


@pytest.mark.parametrize("name", AT_2_56X)
def test_others_at_the_filters_of_a_row_of_tpp(name: str) -> None:
    (path,) = [path for path in COMPLETE if path.stem == f"resnet50_{name}_2.56x"]
    config, tpp = load_config(path), load("resnet50_tpp_2.56x")
    assert (config.pruning, config.data) == (tpp.pruning, tpp.data)
    assert config.training == tpp.training
    assert config.published is None or config.published.top1 is None
    stages = config.stages
    if name == "tpp_linear_overparam":
        assert stages["regularize"] == tpp.stages["regularize"]
        finetune = stages["finetune"].model_copy(update={"method": None})
        assert finetune == tpp.stages["finetune"]
    if name == "l1_llr":
        steps = tpp.stage_method("regularize").steps() or 0
        of_tpp = steps / (1_281_167 / 256) + (tpp.stages["finetune"].epochs or 0)
        assert stages["finetune"].epochs == pytest.approx(of_tpp, abs=0.1)


@pytest.mark.parametrize("name", ["mlp_rec_lra", "convnet18_rec_lra"])
def test_training_by_local_errors_and_its_twin(name: str) -> None:
    (path,) = [path for path in COMPLETE if path.stem == name]
    text, config = head(path), load_config(path)
    for part in ("Reproduces:", "reconstruction", "Takes:", "Run"):
        assert part in text
    assert f"tpp train --config {by_name(path)} " in text
    assert config.has_method("dense")
    settings = config.stage_method("dense").settings
    assert (settings.beta, settings.gamma, settings.rule) == (0.1205, 0.1524, "lra_e")
    check_methods(config, Architecture(config.model.name, 10, config.model.args))
    if name == "mlp_rec_lra":
        twin = load_config(path.with_name("mlp_backprop.yaml"))
        assert not twin.has_method("dense")
        assert (twin.model, twin.data, twin.stages) == (config.model, config.data, config.stages)
        assert twin.training == config.training
    else:
        published = config.published
        assert published is not None and published.dense_top1 == 93.88
        assert "93.58" in published.source and "93.58" in text
        assert load_config(path, ["method.name=l1"]).stage_method("dense").name == "l1"


def test_data() -> None:
    for path in ROWS:
        data = load_config(path).data
        assert data.mean == [0.485, 0.456, 0.406]
        assert data.std == [0.229, 0.224, 0.225]
        assert data.loader == "auto"
        expected = (
            ("val", "imagenet", 224, 256)
            if path.parent.name == "imagenet"
            else ("test", "cifar", 32, None)
        )
        assert (data.val, data.augmentation, data.image_size, data.resize) == expected


def test_starting_weights() -> None:
    for config in of_kind("_tpp_", "imagenet"):
        assert config.model.checkpoint == "torchvision:IMAGENET1K_V1"
    dense = load("resnet56_dense")
    for config in (*of_kind("_tpp_", "cifar10"), *of_kind("_l1_", "cifar10")):
        assert config.model.checkpoint == f"{dense.output}/dense/model.safetensors"


def test_lengths_that_the_heads_state() -> None:
    imagenet, cifar = load("resnet50_tpp_2.31x"), load("resnet56_tpp_pr0.5")
    assert imagenet.stage_method("regularize").steps() == 90_001
    assert steps_for(18, 1_281_167, 256) == pytest.approx(90_000, rel=2e-3)
    assert cifar.stage_method("regularize").steps() == 110_001
    assert steps_for(282, 50_000, 128) == pytest.approx(110_000, rel=2e-3)


@pytest.mark.parametrize(
    "name",
    [name for name, f in PUBLISHED.items() if f[4] and "_l1_" not in name and name not in RIVALS],
)
def test_ratios_give_the_published_speedup(name: str) -> None:
    config = load(name)
    dense = build_model(config.model.name, 10 if "resnet56" in name else 1000, **config.model.args)
    plan = select_filters(dense, config.pruning.ratios)
    before, after = count(dense), count(prune_model(dense, plan))
    expected = PUBLISHED[name][4]
    assert expected is not None
    digits = 3 if "resnet56" in name else 4
    assert round(before.macs / after.macs, digits) == expected
    if "resnet56" in name:
        removed = 100 * (1 - after.parameters / before.parameters)
        assert round(removed, 2) == REMOVED_PERCENT[name.rpartition("pr")[2]]


def test_l1_takes_the_filters_that_tpp_takes() -> None:
    for l1 in of_kind("_l1_", "cifar10"):
        assert l1.pruning == load(l1.name.replace("_l1_", "_tpp_")).pruning


def test_resnet34_keeps_the_blocks_that_the_paper_keeps() -> None:
    model = build_model("resnet34", 1000)
    plan = select_filters(model, load("resnet34_tpp_1.32x").pruning.ratios)
    ratios = {"layer1": 0.5, "layer2": 0.6, "layer3": 0.4, "layer4": 0.0}
    kept = {"layer1.0", "layer2.0", "layer2.3", "layer3.0", "layer3.5"}
    expected = {}
    for name, layer in prunable_layers(model).items():
        block = name.rpartition(".")[0]
        ratio = ratios.get(name.partition(".")[0], 0.0)
        if name.endswith(".conv1") and block not in kept and ratio:
            expected[name] = pruned_count(ratio, layer.weight.shape[0])
    assert {name: len(plan.pruned[name]) for name in plan.active_layers} == expected


OURS = [path for path in COMPLETE if path.stem in RECIPES and path.parent.name == "imagenet"]
TRANSFER = [path for path in COMPLETE if path.parent.name == "transfer"]
# pruning ratio: speedup by counted MACs, and per cent of the parameters removed
VGG19 = {
    "0.1": (1.2260, 19.24),
    "0.3": (1.9651, 51.01),
    "0.5": (3.6093, 74.87),
    "0.7": (8.8911, 90.98),
    "0.9": (45.5286, 98.96),
}


def sizes(config: Config, classes: int) -> tuple[Counts, Counts | None]:
    """The dense network's size and the pruned one's, after the checks that a run begins with."""
    architecture = config.make_task().architecture(config.model, classes)
    assert architecture is not None
    plan = check_plans(config, architecture)
    check_optimizers(config, architecture)
    check_training_size(config, architecture)
    check_image_sizes(config, architecture)
    dense = build_on_meta(architecture)
    set_preprocessing(dense, config.data.preprocessing())
    return count(dense), count(prune_model(dense, plan)) if plan is not None else None


@pytest.mark.parametrize("path", OURS, ids=by_name)
def test_recipes_of_our_own(path: Path) -> None:
    config, text = load_config(path), head(path)
    macs, pruned_macs, dense_top1, top1 = RECIPES[path.stem]
    dense, pruned = sizes(config, 1000)
    assert dense.macs == macs and (pruned and pruned.macs) == pruned_macs
    published = config.published
    assert (published and published.dense_top1) == dense_top1
    assert (published and published.top1) == top1
    for part in ("Reproduces:", "Expect:", "Takes:", "Run"):
        assert part in text
    assert f"tpp train --config {by_name(path)} " in text
    if pruned is None:
        return
    assert f"peedup {dense.macs / pruned.macs:.4f}x" in text and "no figure of our own yet" in text
    assert top1 is None or f"top-1 {top1:.2f}" in text
    # The dense network is held against the pruned one, and teaches it.
    first = next(iter(config.stages.values()))
    assert (first.kind, first.input) == ("evaluate", None)
    assert bool(first.image_sizes) == (path.stem != "vit_small_tpp")
    distill = config.stages["finetune"].distill
    assert distill is not None and distill.teacher == "dense"


def test_advanced_rows_differ_in_their_ratios_alone() -> None:
    one, *others = [load_config(path) for path in OURS if "resnet50_tpp" in path.stem]
    for other in others:
        assert other.stages == one.stages and other.method == one.method
        assert (other.model, other.data, other.training) == (one.model, one.data, one.training)
        assert other.pruning != one.pruning
    assert one.stages["finetune"].epochs == 200
    assert one.stage_method("regularize").steps() == 90_001


def test_torchvisions_second_recipe() -> None:
    (path,) = [path for path in OURS if path.stem == "resnet50_dense_v2"]
    config = load_config(path)
    stage, data = config.stages["dense"], config.data
    optimizer, ema = stage.optimizer, stage.ema
    assert optimizer is not None and ema is not None
    assert (config.training.batch_size, stage.epochs, stage.label_smoothing) == (1024, 600, 0.1)
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.5, 0.9, 2e-5)
    assert (optimizer.schedule, optimizer.warmup_epochs, optimizer.warmup_from) == (
        "cosine",
        5,
        0.01,
    )
    assert (data.train_size, data.resize, data.image_size) == (176, 232, 224)
    augment = data.augment
    assert augment.trivial_augment and (augment.random_erasing, augment.repeats) == (0.1, 4)
    assert (augment.mixup, augment.cutmix) == (0.2, 1.0)
    # 1 - decay, times GPUs * images of each * steps between updates / epochs
    assert ema.decay == pytest.approx(1 - (1 - 0.99998) * 8 * 128 * 32 / 600, abs=1e-7)
    assert (ema.every, ema.warmup) == (32, False)


@pytest.mark.parametrize("ratio", VGG19)
@pytest.mark.parametrize("method", ["tpp", "l1"])
def test_vgg19(ratio: str, method: str) -> None:
    (path,) = [path for path in COMPLETE if path.stem == f"vgg19_{method}_pr{ratio}"]
    config, text = load_config(path), head(path)
    dense, pruned = sizes(config, 100)
    assert pruned is not None
    speedup, removed = VGG19[ratio]
    assert round(dense.macs / pruned.macs, 4) == speedup
    assert round(100 * (1 - pruned.parameters / dense.parameters), 2) == removed
    assert f"peedup {speedup:.4f}x" in text and f"{removed}%" in text
    assert config.published is None and "not repeated here" in text
    assert config.training.batch_size == 256 and config.model.num_classes == 100
    check_finetuning(config, 5e-4, (120, [60, 90]))
    if method == "tpp":
        assert config.stage_method("regularize").steps() == 110_001
        assert config.method == load("resnet56_tpp_pr0.9").method
        assert steps_for(563, 50_000, 256) == pytest.approx(110_000, rel=2e-3)


@pytest.mark.parametrize("path", TRANSFER, ids=by_name)
def test_own_classes(path: Path) -> None:
    config, text = load_config(path), head(path)
    dense, pruned = sizes(config, 10)
    assert pruned is not None and f"speedup {dense.macs / pruned.macs:.4f}x" in text
    assert config.model.head == "new" and config.model.num_classes is None
    assert [stage.kind for stage in config.stages.values()] == [
        *("dense", "evaluate", "regularize", "prune", "finetune", "evaluate")
    ]
    assert f"{config.stage_method('regularize').steps():,} iterations" in text
    assert f"--config {by_name(path)} data.root=/path/to/images" in text


@pytest.mark.parametrize("name", [name for name in RETRAINED if "imp" in name])
def test_cycles_come_to_the_sparsity(name):
    (path,) = [path for path in COMPLETE if path.stem == name]
    stages, left = load_config(path).stages, 1.0
    for stage in stages.values():
        left *= 1 - stage.sparsify.fraction if stage.sparsify else 1
    assert left == pytest.approx(0.1)
    retrained = [stage for stage in stages.values() if stage.kind == "finetune"]
    assert len(retrained) == 3
    assert all(stage.optimizer.lr == stage.optimizer.reference.lr == 0.1 for stage in retrained)


def test_ffr_trains_as_the_dense_network_and_finetunes_as_l1() -> None:
    (path,) = [path for path in COMPLETE if path.stem == "resnet56_ffr_pr0.5"]
    config, dense, l1 = load_config(path), load("resnet56_dense"), load("resnet56_l1_pr0.5")
    assert config.published is None and "nothing published" in head(path)
    assert list(config.stages) == ["regularize", "prune", "finetune", "evaluate"]
    (stage, plain) = (config.stages["regularize"], dense.stages["dense"])
    assert (stage.epochs, stage.optimizer) == (plain.epochs, plain.optimizer)
    assert config.stages["finetune"] == l1.stages["finetune"]
    assert (config.pruning, config.data, config.training) == (l1.pruning, l1.data, l1.training)
    before, after = sizes(config, 10)
    assert after is not None
    assert round(before.macs / after.macs, 3) == PUBLISHED["resnet56_l1_pr0.5"][4]


def test_rows_of_the_related_systems_are_trained_alike() -> None:
    """Equal steps from one dense network, and equal numbers that are left."""
    sweep = load_sweep(ROOT / "configs" / "cifar10" / "related.yaml")
    runs = expand(sweep)
    assert len(runs) == 1 + 10 * 3
    model = build_model("cifar_resnet20", 10)
    weights = {
        f"{name}.weight": layer.weight.detach() for name, layer in prunable_layers(model).items()
    }
    rest = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in weights.values())
    for run in runs[1:11]:
        config = load_config(run.config, run.overrides)
        assert config.model.checkpoint == str(runs[0].folder / "dense" / "model.safetensors")
        trained = [name for name, stage in config.stages.items() if stage.does.trains]
        steps = 0
        mask: Mask | None = None
        for name, stage in config.stages.items():
            if stage.does.trains:
                fixed = config.stage_method(name).steps() if stage.does.regularizes else None
                steps += fixed or steps_for(stage.epochs or 0, 50_000, 128)
            if stage.sparsify is not None:
                mask = select_mask(weights, [*prunable_layers(model)], stage.sparsify, mask)
        assert abs(steps - 1172) <= 1, run.name
        if run.method and run.method.startswith("imp"):
            assert len(trained) == 3
            assert mask is not None
            assert rest + sum(int(stays.sum()) for stays in mask.values()) == 26_470
        elif run.method == "interspace":
            total = sum(w.numel() for w in weights.values())
            assert rest + total - round(config.method["sparsity"] * total) == 26_470
        else:
            plan = check_plans(config, Architecture("cifar_resnet20", 10, {}))
            assert plan is not None
            small = prune_model(model, plan, example_input=torch.zeros(1, 3, 32, 32))
            assert sum(p.numel() for p in small.parameters()) == 26_470


def test_rows_of_polarization_leave_out_one_change_each() -> None:
    """What the docstring of tpp/methods/polarization.py lists, and the obvious reading all."""
    runs = expand(load_sweep(ROOT / "configs" / "cifar10" / "polarization.yaml"))
    configs = {run.method: load_config(run.config, run.overrides) for run in runs[:9]}
    assert len(runs) == 9 * 3 == len(configs) * 3
    ours = configs.pop("polarized")
    before = {"slope": "identity", "aim": False, "spread": 0, "gradient": 1, "start": 0, "end": 0}
    found: list[set[str]] = []
    for row, config in configs.items():
        (stage,) = [stage for stage in config.stages.values() if stage.does.trains]
        regularize = ours.stages["regularize"]
        assert (stage.epochs, stage.optimizer) == (regularize.epochs, regularize.optimizer)
        if row in ("plain", "narrow"):
            continue
        assert config.stages == ours.stages
        changed = {key: config.method[key] for key in config.method if key != "name"}
        assert changed.items() <= before.items()
        found.append(set(changed))
    assert found == [{*before}, {"slope"}, {"aim"}, {"spread"}, {"gradient"}, {"start", "end"}]


def test_iss_p_masks_what_it_has_made_small_and_all_rows_are_as_long() -> None:
    """1,800 and 1,200 steps with 450 photographs; alpha and optimiser are the authors'."""
    folder = ROOT / "configs" / "sr"
    runs = expand(load_sweep(folder / "related.yaml"))
    assert len(runs) == (4 * 3 + 1) * 3
    for path in (folder / "edsr_iss_p_x2.yaml", *sorted((folder / "related").glob("*.yaml"))):
        config = load_config(path)
        kind, _, share = path.stem.rpartition("_")
        trained = [stage for stage in config.stages.values() if stage.does.trains]
        assert [steps_for(stage.epochs or 0, 450, 8) for stage in trained] == [1800, 1200]
        for stage in trained:
            assert stage.optimizer is not None
            schedule = "cosine" if stage is trained[-1] else "constant"
            assert (stage.optimizer.name, stage.optimizer.schedule) == ("adam", schedule)
            assert (stage.optimizer.betas, stage.optimizer.weight_decay) == ([0.9, 0.99], 0)
            assert stage.carry_optimizer == (stage is not trained[0])
        architecture = config.make_task().architecture(config.model)
        assert architecture is not None
        assert check_plans(config, architecture) is None, "no filter goes"
        masking = config.stages["sparsify"].sparsify if "sparsify" in config.stages else None
        if path.stem == "dense":
            assert masking is None
            continue
        assert masking is not None and masking.scope == "layer"
        assert masking.sparsity == (0.7 if path.parent == folder else float(share))
        if "regularize" in config.stages:
            settings = config.stage_method("regularize").settings
            assert settings.alpha == (0.0 if kind == "iht" else 0.95)
            assert settings.sparsity == masking.sparsity


def test_swinir_is_trained_as_long_as_the_authors_do() -> None:
    config = load_config(ROOT / "configs" / "sr" / "swinir_light_iss_p_x2.yaml")
    shrinking, tuned = (stage for stage in config.stages.values() if stage.does.trains)
    for stage, steps, df2k in ((shrinking, 100_021, 927.731), (tuned, 200_000, 1855.072)):
        assert steps_for(stage.epochs or 0, 800, config.training.batch_size) == steps
        assert steps_for(df2k, 3450, config.training.batch_size) == steps
        assert stage.optimizer is not None
        assert (stage.optimizer.name, stage.optimizer.lr) == ("adam", 2e-4)
        assert (stage.optimizer.betas, stage.optimizer.weight_decay) == ([0.9, 0.99], 0)
        assert stage.optimizer.schedule == "constant"
    assert tuned.carry_optimizer
    # Patches of 64 pixels, which windows of 8 divide.
    assert config.data.image_size == 64 * config.make_task().settings.scale
    assert config.method == {"name": "iss_p", "alpha": 0.95, "sparsity": 0.9}
    assert config.stages["sparsify"].sparsify.sparsity == 0.9
    text = head(ROOT / "configs" / "sr" / "swinir_light_iss_p_x2.yaml")
    for part in ("Reproduces:", "Expect:", "Takes:", "Run", "927.731", "1855.072"):
        assert part in text
