import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpp.common.errors import UserError, printable
from tpp.measure.timing import LatencySettings
from tpp.selection.budget import BUDGET_KINDS, Budget
from tpp.selection.selection import Selection
from tpp.selection.settings import BudgetSection
from train.config.config import Config, load_config, save_config, steps_for
from train.run_folder.same_run import stage_settings

VALID: dict[str, Any] = {
    "name": "run",
    "model": {"name": "cifar_resnet20", "args": {"a": 1, "b": 2}},
    "data": {"root": "images"},
    "training": {"batch_size": 64},
    "pruning": {"ratios": {"layer*.conv1": 0.5}},
    "method": {"name": "tpp", "delta": 1e-3, "tau": 1.0},
    "stages": {
        "regularize": {"optimizer": {"lr": 0.001}},
        "prune": None,
        "finetune": {
            "epochs": 3,
            "optimizer": {"lr": 0.01, "schedule": "step", "milestones": [1, 2]},
        },
        "evaluate": None,
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml", VALID)


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    """The one line that loading ends in."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.augmentation=none", "stages.finetune.augment={mixup: 1}"],
            "stages.finetune.augment: with augmentation: none there is no augmentation to add to",
        ),
        (
            ["data.channels=1", "data.mean=[0]", "data.std=[1]", "data.augment={color_jitter: {}}"],
            "data.augment: color_jitter, rand_augment, trivial_augment need 3 channels",
        ),
        (
            [
                "data.augmentation=cifar",
                "stages.finetune.augment={progressive: {start_size: 8, end_epoch: 1}}",
            ],
            "stages.finetune.augment.progressive: goes with augmentation: imagenet only",
        ),
    ],
)
def test_augmentations_must_go_with_the_recipe(
    file: Path, overrides: list[str], expected: str
) -> None:
    assert error_of(file, *overrides) == f"override {overrides[-1]!r}: {expected}"


def test_the_augmentation_of_a_stage_replaces_that_of_the_data(file: Path) -> None:
    config = load_config(
        file,
        [
            "data.augment={mixup: 0.2, repeats: 3}",
            "stages.finetune.augment={random_erasing: 0.1}",
        ],
    )
    assert config.stage_augment("regularize").mixup == 0.2
    finetune = config.stage_augment("finetune")
    assert (finetune.mixup, finetune.repeats, finetune.random_erasing) == (0.0, 1, 0.1)
    nothing = load_config(file, ["data.augment={mixup: 0.2}", "stages.finetune.augment={}"])
    assert nothing.stage_augment("finetune").mixup == 0.0


def test_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.output == "runs/run"
    assert [stage.input for stage in config.stages.values()] == [
        None,
        "regularize",
        "prune",
        "finetune",
    ]
    assert [stage.kind for stage in config.stages.values()] == list(config.stages)
    assert config.stage_method("regularize").steps() == 10 * 1000 + 10_000 + 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batch_sise=3", "training.batch_sise: unknown key; did you mean 'batch_size'?"),
        ("stages.finetune.epoch=3", "stages.finetune.epoch: unknown key; did you mean 'epochs'?"),
        (
            "stages.finetune.optimizer.momentun=0",
            "stages.finetune.optimizer.momentun: unknown key; did you mean 'momentum'?",
        ),
        ("nme=x", "nme: unknown key; did you mean 'name'?"),
        ("data.demo={clases: 3}", "data.demo.clases: unknown key; did you mean 'classes'?"),
        ("extends=x", "extends: unknown key; there are: name, output, seed, model"),
        (
            "training.batch_size=1.5",
            "training.batch_size: input should be a valid integer, not 1.5",
        ),
        (
            "training.batch_size=yes",
            "training.batch_size: input should be a valid integer, not True",
        ),
        (
            "training.batch_size=0",
            "training.batch_size: input should be greater than or equal to 1",
        ),
        ("name=5", "name: input should be a valid string, not 5"),
        ("name=a/b", "name: string should match pattern"),
        ("training=5", "training: input should be a valid dictionary"),
        ("pruning.ratios={conv1: 1.0}", "pruning.ratios.conv1: input should be less than 1, not 1"),
        (
            "pruning.ratios={conv1: -0.1}",
            "pruning.ratios.conv1: input should be greater than or equal to 0, not -0.1",
        ),
        ("pruning.ratios={conv1: .nan}", "pruning.ratios.conv1: input should be a finite number"),
        (
            "pruning.ratios={}",
            "stages.regularize: pruning.ratios says of no layer what goes, and there is no "
            "pruning.budget",
        ),
        (
            "pruning.budget={}",
            "pruning.budget: exactly one of speedup, macs, parameters, latency_ms, "
            "latency_speedup is needed",
        ),
        (
            "pruning.budget={speedup: 2, macs: 1G}",
            "pruning.budget: exactly one of speedup, macs, parameters, latency_ms, "
            "latency_speedup is needed, not speedup and macs",
        ),
        ("pruning.budget.speedup=0.9", "pruning.budget.speedup: input should be greater than or"),
        ("pruning.budget.speedup=2x", "pruning.budget.speedup: input should be a valid number"),
        (
            "pruning.budget.macs=2B",
            "pruning.budget.macs: '2B' is no number above 0 such as 2000000, 2e6, 2M (k, M, G)",
        ),
        ("pruning.budget.parameters=-1", "pruning.budget.parameters: -1 is no number above 0"),
        ("pruning.budget.parameters=[1]", "pruning.budget.parameters: [1] is no number above 0"),
        ("pruning.budget.latency_ms=0", "pruning.budget.latency_ms: input should be greater than"),
        (
            "pruning.budget={latency_ms: 5, bach: 2}",
            "pruning.budget.bach: unknown key; did you mean 'batch'?",
        ),
        ("pruning.budget={speedup: 2, batch: 2}", "pruning.budget: batch goes with latency_ms"),
        (
            "pruning.budget={latency_ms: 5, device: tpu}",
            "pruning.budget.device: input should be 'cpu' or 'cuda', not 'tpu'",
        ),
        ("pruning.criterion=l3", "pruning.criterion: input should be 'l1', 'l2', 'bn_scale'"),
        ("pruning.round_to=0", "pruning.round_to: input should be greater than or equal to 1"),
        ("pruning.round_to=8.0", "pruning.round_to: input should be a valid integer, not 8.0"),
        (
            "pruning.floors={conv1: 1.5}",
            "pruning.floors.conv1: a floor must be a whole number of filters from 1 on or a "
            "share in (0, 1], not 1.5",
        ),
        ("pruning.floors={conv1: 0}", "pruning.floors.conv1: a floor must be a whole number"),
        ("pruning.floors={conv1: .nan}", "pruning.floors.conv1: a floor must be a whole number"),
        ("pruning.floors={conv1: yes}", "pruning.floors.conv1: a floor must be a number, not True"),
        ("pruning.skip=conv1", "pruning.skip: input should be a valid list, not 'conv1'"),
        ("pruning.coupled=1", "pruning.coupled: input should be a valid boolean, not 1"),
        ("pruning.rounds=1", "pruning.rounds: unknown key; did you mean 'round_to'?"),
        ("stages.finetune.epochs=-3", "stages.finetune.epochs: input should be greater than 0"),
        ("stages.finetune.epochs=.nan", "stages.finetune.epochs: input should be a finite number"),
        ("stages.finetune.epochs=nan", "stages.finetune.epochs: input should be a valid number"),
        ("stages.finetune.epochs=null", "stages.finetune: a finetune stage needs epochs"),
        (
            "stages.finetune.optimizer.lr=.inf",
            "stages.finetune.optimizer.lr: input should be a finite number, not inf",
        ),
        ("stages.finetune.optimizer=null", "stages.finetune: a finetune stage needs an optimizer"),
        (
            "stages.finetune.optimizer.milestones=[2, 1]",
            "stages.finetune.optimizer: milestones must be in rising order",
        ),
        (
            "stages.finetune.optimizer.schedule=cosine",
            "stages.finetune.optimizer: milestones (in epochs) and schedule: step go together",
        ),
        (
            "stages.finetune.kind=tune",
            "stages.finetune.kind: input should be 'dense', 'regularize'",
        ),
        (
            "data.augmint={mixup: 1}",
            "data.augmint: unknown key; did you mean 'augment'?",
        ),
        (
            "data.augment.color_jitter={hue: 0.7}",
            "data.augment.color_jitter.hue: input should be less than or equal to 0.5, not 0.7",
        ),
        (
            "data.augment.rand_augment={magnitude: 31}",
            "data.augment.rand_augment: magnitude (31) must be below bins (31)",
        ),
        (
            "data.augment.rand_augment={operations: 5}",
            "data.augment.rand_augment.operations: input should be less than or equal to 4, not 5",
        ),
        (
            "data.augment.progressive={start_size: 256, end_epoch: 3}",
            "data.augment.progressive.start_size (256) must not be larger than image_size (224)",
        ),
        (
            "data.augment.progressive={start_size: 128, start_epoch: 3, end_epoch: 3}",
            "data.augment.progressive: end_epoch (3.0) must come after start_epoch (3.0)",
        ),
        (
            "stages.finetune.augment={random_erasing: 1.5}",
            "stages.finetune.augment.random_erasing: input should be less than or equal to 1",
        ),
        (
            "stages.evaluate.augment={mixup: 1}",
            "stages.evaluate: stages of kind evaluate take neither epochs nor optimizer nor",
        ),
        ("data.on_error=ignore", "data.on_error: input should be 'fail' or 'skip', not 'ignore'"),
        ("data.max_skipped=2", "data.max_skipped: input should be less than 1, not 2"),
        ("stages.extra={}", "stages.extra.kind: this key is missing"),
        (
            "stages.evaluate.epochs=1",
            "stages.evaluate: stages of kind evaluate take neither epochs",
        ),
        ("method={name: l1}", "stages.regularize.epochs: method 'l1' needs the stage's length"),
        (
            "stages.finetune.input=evaluate",
            "stages.finetune.input: 'evaluate' is no earlier stage; there are: regularize, prune",
        ),
        ("stages.prune.input=dense", "stages.prune.input: 'dense' is no earlier stage"),
        ("stages.regularize.input=x", "stages.regularize.input: 'x' is no earlier stage"),
        (
            "stages.again={kind: finetune, input: evaluate, epochs: 1, optimizer: {lr: 1}}",
            "stages.again.input: 'evaluate' makes no checkpoint",
        ),
        ("stages={a b: {}}", "stages: stage name 'a b': use a string of letters"),
        ("stages={3: {}}", "stages: stage name 3: use a string of letters"),
        ("stages=null", "stages: input should be a valid dictionary"),
        ("method.name=tp", "method.name: unknown method 'tp'; did you mean 'tpp'?"),
        ("method.name=3", "method.name: expected a method's name, not 3"),
        (
            "stages.finetune.method={name: l2}",
            "stages.finetune.method.name: unknown method 'l2'; did you mean 'l1'?",
        ),
        ("method.gram_wieght=1", "method.gram_wieght: unknown key; did you mean 'gram_weight'?"),
        ("method.tau=big", "method.tau: input should be a valid number"),
        ("method.delta=1e-320", "stages.regularize: with these settings of 'tpp' it never ends"),
        (
            "stages.prune.method={name: l1, tau: 1}",
            "stages.prune.method.tau: unknown key; there are: name",
        ),
        ("method=tpp", "method: input should be a valid dictionary, not 'tpp'"),
        ("data.mean=[0.5]", "data: mean and std need 3 values, one per channel"),
        ("data.resize=200", "data: resize (200) must not be smaller than image_size (224)"),
        ("data.std=[1, 0, 1]", "data.std.1: input should be greater than 0, not 0"),
        ("data.loader=pil", "data.loader: input should be 'auto', 'dali' or 'torchvision'"),
        ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
        ("model.args={3: 1}", "model.args.3: keys should be strings, not 3"),
        ("published={top1: 75}", "published.source: this key is missing"),
    ],
)
def test_mistake_is_one_line_with_file_and_key(file: Path, override: str, expected: str) -> None:
    line = error_of(file, override)
    assert line.startswith(f"override {printable(override, 100)!r}: {expected}")


def test_every_mistake_has_its_line(file: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, ["seed=-1", "data.channels=2", "training.batch_sise=1"])
    lines = str(caught.value).splitlines()
    keys = ("seed", "data.channels", "training.batch_sise")
    assert len(lines) == 3
    for key in keys:
        assert sum(f"': {key}: " in line for line in lines) == 1


def test_stages_must_not_be_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**VALID, "stages": {}})
    assert error_of(path) == f"{path}: stages: at least one is needed"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("batch_size", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("training.=3", "expected key.sub=value"),
        ("training.batch_size=[", "not valid YAML"),
        ("training.batch_size=!!int ''", "not valid YAML"),
        ("data.root=!!timestamp x", "not valid YAML"),
        ("training.batch_size=" + "[" * 200, "not valid YAML: nested too deeply (line 1)"),
        ("pruning.ratios.layer1.0.conv1=0.5", "pruning.ratios is replaced as a whole"),
        ("pruning.floors.layer1.0.conv1=3", "pruning.floors is replaced as a whole"),
        ("model.args.width=3", "model.args is replaced as a whole"),
    ],
)
def test_bad_override_is_one_line_that_repeats_it(file: Path, override: str, expected: str) -> None:
    line = error_of(file, override)
    assert line.startswith(f"override {override!r}: {expected}")


def test_overrides_are_yaml_and_the_last_wins(file: Path) -> None:
    config = load_config(
        file,
        [
            "stages.finetune.epochs=5",
            "stages.finetune.epochs=0.5",
            "stages.finetune.optimizer.lr=1e-4",
            "data.resize=null",
            "data.root=/a=b",
            "pruning.ratios={'layer1*': 0.25}",
            "training.precision=bf16",
        ],
    )
    finetune = config.stages["finetune"]
    assert finetune.optimizer is not None
    assert (finetune.epochs, finetune.optimizer.lr) == (0.5, 1e-4)
    assert finetune.optimizer.milestones == [1, 2]
    assert config.data.resize is None
    assert config.data.root == "/a=b"
    assert config.pruning.ratios == {"layer1*": 0.25}
    assert config.training.precision == "bf16"


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("1E3", 1000.0), ("2.5e+1", 25.0), ("-1e2", -100.0)]
)
def test_numbers_with_an_exponent_are_numbers(file: Path, text: str, number: float) -> None:
    config = load_config(file, [f"model.args={{x: {text}}}"])
    assert config.model.args == {"x": number}
    assert isinstance(config.model.args["x"], float)


def test_off_is_off_without_quotes_too(file: Path) -> None:
    for text in ("off", "'off'"):
        assert load_config(file, [f"training.compile={text}"]).training.compile == "off"
    with pytest.raises(UserError, match=r"training\.compile: input should be 'off'"):
        load_config(file, ["training.compile=on"])


def test_method_may_leave_the_name_to_the_default(tmp_path: Path) -> None:
    content = {key: value for key, value in VALID.items() if key != "method"}
    config = load_config(write(tmp_path / "a.yaml", content), ["method.gram_weight=7"])
    assert config.stage_method("regularize").settings.gram_weight == 7


def test_method_of_a_stage_takes_over_the_settings_of_the_same_method(file: Path) -> None:
    config = load_config(
        file, ["stages.finetune.method={gram_weight: 3}", "stages.prune.method={name: l1}"]
    )
    finetune = config.stage_method("finetune")
    assert (finetune.name, finetune.settings.gram_weight, finetune.settings.delta) == (
        "tpp",
        3,
        1e-3,
    )
    assert config.stage_method("prune").name == "l1"


def test_input_passes_over_an_evaluation(tmp_path: Path) -> None:
    stages = dict(VALID["stages"])
    stages = {
        "dense": {"epochs": 1, "optimizer": {"lr": 1}},
        "look": {"kind": "evaluate"},
        **stages,
    }
    config = load_config(write(tmp_path / "a.yaml", {**VALID, "stages": stages}))
    assert config.stages["look"].input == "dense"
    assert config.stages["regularize"].input == "dense"


def test_extending_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", VALID)
    (tmp_path / "sub").mkdir()
    middle = {
        "extends": "../base.yaml",
        "training": {"accumulation": 2},
        "stages": {"finetune": {"optimizer": {"milestones": [1.5]}}},
    }
    write(tmp_path / "sub" / "middle.yaml", middle)
    last = {"extends": "middle.yaml", "name": "last", "training": {"log_every": 3}}
    config = load_config(write(tmp_path / "sub" / "last.yaml", last))
    training = config.training
    assert (training.batch_size, training.accumulation, training.log_every) == (64, 2, 3)
    assert list(config.stages) == list(VALID["stages"])
    optimizer = config.stages["finetune"].optimizer
    assert optimizer is not None
    assert (optimizer.lr, optimizer.milestones) == (0.01, [1.5])
    assert config.name == "last"


@pytest.mark.parametrize(
    ("extension", "expected"),
    [
        ({"pruning": {"ratios": {"layer2*": 0.1}}}, {"layer2*": 0.1}),
        ({"pruning": {}}, {"layer*.conv1": 0.5}),
    ],
)
def test_ratios_are_replaced_as_a_whole(
    tmp_path: Path, extension: dict[str, Any], expected: dict[str, float]
) -> None:
    write(tmp_path / "base.yaml", VALID)
    path = write(tmp_path / "a.yaml", {"extends": "base.yaml", **extension})
    assert load_config(path).pruning.ratios == expected


def test_floors_are_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", put(VALID, ("pruning", "floors"), {"a*": 3, "b*": 0.5}))
    extension = {"extends": "base.yaml", "pruning": {"floors": {"c*": 1.0}}}
    floors = load_config(write(tmp_path / "a.yaml", extension)).pruning.floors
    assert floors == {"c*": 1.0} and isinstance(floors["c*"], float)


@pytest.mark.parametrize(
    ("base", "override", "expected"),
    [
        ({"speedup": 2.0}, "pruning.budget.speedup=3", Budget("speedup", 3)),
        ({"speedup": 2.0}, "pruning.budget.macs=1.5G", Budget("macs", 1_500_000_000)),
        ({"macs": "2G"}, "pruning.budget.parameters=2.5e6", Budget("parameters", 2_500_000)),
        (
            {"latency_ms": 5, "batch": 16},
            "pruning.budget.dtype=bf16",
            Budget("latency_ms", 5, LatencySettings(batch=16, dtype="bf16")),
        ),
        ({"latency_ms": 5, "batch": 16}, "pruning.budget={speedup: 2}", Budget("speedup", 2)),
        ({"speedup": 2}, "pruning.budget=null", None),
    ],
)
def test_a_budget_of_another_kind_replaces_the_old_one(
    tmp_path: Path, base: dict[str, Any], override: str, expected: Budget | None
) -> None:
    path = write(tmp_path / "a.yaml", put(VALID, ("pruning", "budget"), base))
    config = load_config(path, [override])
    assert config.selection().budget == expected
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml", [override]) == config


def test_a_budget_measures_under_all_conditions_that_there_are() -> None:
    conditions = {field.name for field in dataclasses.fields(LatencySettings)}
    assert set(BudgetSection.model_fields) == {*BUDGET_KINDS, "table", *conditions}
    assert BudgetSection(latency_ms=5.0).budget() == Budget("latency_ms", 5, LatencySettings())


def test_the_pruning_section_is_a_selection(tmp_path: Path) -> None:
    pruning = {
        "ratios": {"layer*.conv1": 0.5},
        "budget": {"speedup": 2},
        "criterion": "bn_scale",
        "round_to": 8,
        "floors": {"layer1*": 4, "*": 0.25},
        "skip": ["conv1"],
        "coupled": True,
    }
    config = load_config(write(tmp_path / "a.yaml", {**VALID, "pruning": pruning, "seed": 7}))
    assert config.selection() == Selection(
        ratios={"layer*.conv1": 0.5},
        criterion="bn_scale",
        round_to=8,
        floors={"layer1*": 4, "*": 0.25},
        skip=("conv1",),
        coupled=True,
        budget=Budget("speedup", 2.0),
        seed=7,
    )


def test_a_budget_will_do_without_ratios(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**VALID, "pruning": {"budget": {"parameters": "10M"}}})
    assert load_config(path).selection() == Selection(budget=Budget("parameters", 10_000_000))


def test_what_a_stage_remembers_of_pruning_is_what_was_said(tmp_path: Path) -> None:
    """Runs that were begun before the other settings existed are compared too."""
    path = write(tmp_path / "a.yaml", VALID)
    remembered = [
        json.loads(json.dumps(stage_settings(load_config(path, overrides), "prune")["pruning"]))
        for overrides in ([], ["pruning.round_to=8", "pruning.budget.macs=2G"])
    ]
    ratios = {"layer*.conv1": 0.5}
    assert remembered[0] == {"ratios": ratios}
    assert remembered[1] == {"ratios": ratios, "round_to": 8, "budget": {"macs": 2_000_000_000}}


def test_model_arguments_and_another_method_are_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", VALID)
    same = {"extends": "base.yaml", "model": {"args": {"c": 3}}, "method": {"tau": 0.5}}
    config = load_config(write(tmp_path / "same.yaml", same))
    assert config.model.name == "cifar_resnet20"
    assert config.model.args == {"c": 3}
    assert config.method == {"name": "tpp", "delta": 1e-3, "tau": 0.5}
    other = {"extends": "same.yaml", "method": {"name": "scratch"}}
    other["stages"] = {"regularize": {"epochs": 1}}
    assert load_config(write(tmp_path / "other.yaml", other)).method == {"name": "scratch"}


def test_stage_called_method_is_merged_like_any_stage(tmp_path: Path) -> None:
    stage = {"kind": "finetune", "epochs": 1, "optimizer": {"lr": 1, "weight_decay": 0.5}}
    write(tmp_path / "base.yaml", {**VALID, "stages": {"method": stage}})
    extension = {"extends": "base.yaml", "stages": {"method": {"optimizer": {"lr": 2}}}}
    config = load_config(write(tmp_path / "a.yaml", extension))
    optimizer = config.stages["method"].optimizer
    assert optimizer is not None
    assert (optimizer.lr, optimizer.weight_decay) == (2, 0.5)


def test_extending_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    line = error_of(tmp_path / "a.yaml")
    assert "a.yaml: extends itself by way of" in line
    assert line.endswith("b.yaml")


def test_extending_a_missing_file_names_both(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"extends": "nowhere.yaml"})
    line = error_of(path)
    assert line.startswith(f"{tmp_path / 'nowhere.yaml'}: cannot read the configuration")
    assert f"which {path} extends" in line


def test_extends_must_be_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"extends": ["b.yaml"]})
    assert error_of(path) == f"{path}: extends: expected the path of a YAML file"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: [1", "not valid YAML: "),
        (b"name: a\nseed: 1\nname: b\n", "not valid YAML: key 'name' is there twice (line 3)"),
        (b"data: {root: a, root: b}\n", "not valid YAML: key 'root' is there twice (line 1)"),
        (b"? [1]\n: 2\n", "not valid YAML: found unhashable key"),
        (b"seed: !!int ''\n", "not valid YAML: "),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "cannot read the configuration (not a text file)"),
        (b"\x00\x01\x02", "not valid YAML: "),
        (b"", "a configuration is a mapping of keys to values"),
        (b"- 1\n", "a configuration is a mapping of keys to values"),
    ],
)
def test_file_that_is_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: {expected}")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert error_of(path) == f"{path}: cannot read the configuration (No such file or directory)"
    assert error_of(tmp_path) == f"{tmp_path}: cannot read the configuration (Is a directory)"


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    text = yaml.safe_dump({**VALID, "stages": None}).replace("stages: null\n", "")
    text += (
        "stages:\n"
        "  dense: {epochs: 1, optimizer: &sgd {lr: 0.1, momentum: 0.5}}\n"
        "  finetune: {epochs: 1, optimizer: {<<: *sgd, lr: 0.01}}\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    optimizer = load_config(tmp_path / "a.yaml").stages["finetune"].optimizer
    assert optimizer is not None
    assert (optimizer.lr, optimizer.momentum) == (0.01, 0.5)


def test_resolved_configuration_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(
        file,
        [
            "data.root='1e5'",
            "model.args={a: [1, .5, 1e-7, '1e7', null, true, 'yes', été]}",
            "stages.prune.method={name: l1}",
            "published={source: x, top1: 75.6}",
            "data.demo={seed: 3}",
        ],
    )
    path = tmp_path / "resolved.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resolved.yaml", "run.yaml"]
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["training"]["log_every"] == 50  # a default


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.sampled_from(["1e-4", "tpp", "l1", "prune", "evaluate", ".", "a.b", "step"]),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)
# Any key of a valid configuration, to put anything in its place.
PLACES = [
    (),
    *((key,) for key in VALID),
    ("extends",),
    ("output",),
    ("seed",),
    ("published",),
    ("model", "args"),
    ("data", "mean"),
    ("data", "demo"),
    ("method", "name"),
    ("method", "tau"),
    ("method", "delta"),
    ("method", "update_interval"),
    ("pruning", "ratios"),
    ("pruning", "ratios", "layer*.conv1"),
    ("pruning", "budget"),
    ("pruning", "budget", "macs"),
    ("pruning", "budget", "speedup"),
    ("pruning", "budget", "latency_ms"),
    ("pruning", "budget", "latency_speedup"),
    ("pruning", "floors"),
    ("pruning", "floors", "layer*"),
    ("pruning", "skip"),
    ("pruning", "criterion"),
    ("pruning", "round_to"),
    *(("stages", stage) for stage in VALID["stages"]),
    ("stages", "regularize", "optimizer"),
    ("stages", "finetune", "method"),
    ("stages", "finetune", "kind"),
    ("stages", "finetune", "input"),
    ("stages", "finetune", "epochs"),
    ("stages", "finetune", "optimizer", "milestones"),
]


def put(content: Any, place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    return {**content, place[0]: put(content.get(place[0], {}), place[1:], value)}


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.sampled_from(PLACES), value=NESTED)
def test_whatever_stands_in_a_file_gives_a_config_or_a_user_error(
    tmp_path: Path, place: tuple[str, ...], value: Any
) -> None:
    path = write(tmp_path / "any.yaml", put(VALID, place, value))
    try:
        config = load_config(path)
    except UserError as error:
        assert str(error).strip()
        return
    assert isinstance(config, Config)
    save_config(config, tmp_path / "resolved.yaml")
    # Compared as text, for the arguments of a model may hold NaN, which equals nothing.
    assert repr(load_config(tmp_path / "resolved.yaml")) == repr(config)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(alphabet="ab:-[]{}&*!?|>#\"'%@,. \n\t1e", max_size=40))
def test_whatever_an_override_says_gives_a_config_or_a_user_error(file: Path, text: str) -> None:
    for override in (text, f"model.args={text}", f"stages.finetune.epochs={text}"):
        try:
            config = load_config(file, [override])
        except UserError as error:
            assert str(error).strip()
        else:
            assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [(1, 100, 10, 10), (1, 101, 10, 11), (0.1, 1000, 10, 10), (0.001, 10, 10, 1), (3, 7, 7, 3)],
)
def test_steps_for(epochs: float, images: int, batch: int, steps: int) -> None:
    assert steps_for(epochs, images, batch) == steps
