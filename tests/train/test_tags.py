"""What TensorBoard shows of a run, read back as TensorBoard reads it."""

from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.monitor import Monitor
from train.tags import describe_tag


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_curves_say_what_they_show_and_scores_go_on_over_all_stages(tiny_config, run_inside):
    stages = tiny_config["stages"]
    tiny_config["stages"] = {name: stages[name] for name in ("dense", "regularize", "prune")}
    tiny_config["stages"] |= {"finetune": stages["finetune"]}
    tiny_config["training"]["trainability_every"] = 3
    run_inside(tiny_config)
    output, steps = Path(tiny_config["output"]), []
    for stage in ("dense", "regularize", "finetune"):
        events = board(output / stage)
        for tag in events.Tags()["scalars"]:
            assert events.SummaryMetadata(tag).summary_description == describe_tag(tag) != ""
        (text,) = events.Tensors("configuration/text_summary")
        shown = text.tensor_proto.string_val[0].decode()
        resolved = yaml.safe_load(shown.removeprefix("```yaml\n").removesuffix("```"))
        assert resolved == yaml.safe_load((output / "config.yaml").read_text())
        own = {event.step: event.value for event in events.Scalars("val/top1")}
        over_all = board(output / stage / "all_stages").Scalars("all_stages/top1")
        assert [event.value for event in over_all] == [*own.values()]
        steps += [event.step for event in over_all]
    # 6 steps, 20 and 6, evaluated every 12 and at the end; two stages begin with what they got.
    assert steps == [6, 6, 6 + 12, 6 + 20, 6 + 20, 6 + 20 + 6]


def test_a_resumed_stage_shows_each_point_once(tiny_config, run_inside):
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"] | {"epochs": 4}}
    with pytest.raises(SystemExit, match=r"^0$"):
        run_inside(tiny_config, "--until", "dense:15")
    run_inside(tiny_config)
    events = board(Path(tiny_config["output"]) / "dense" / "all_stages")
    assert [event.step for event in events.Scalars("all_stages/top1")] == [12, 24]


def test_what_is_to_be_synced_is_not_looked_for_among_checkpoints(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "dense", 10, 0, before=0, configuration="a: 1\n", enabled=True)
    deeper = tmp_path / "dense" / "checkpoints" / ".step-00000004.1.tmp"
    deeper.mkdir(parents=True)
    (deeper / "events.out.tfevents.1").touch()
    monitor.event("stage", status="start")
    log, *events = monitor.flush()
    monitor.close()
    assert log == tmp_path / "log.jsonl"
    assert {file.parent for file in events} == {
        tmp_path / "dense",
        tmp_path / "dense" / "all_stages",
    }


def test_weights_and_tags_of_somebodys_own() -> None:
    assert describe_tag("val_ema/top1").endswith("in per cent, with the ema weights.")
    assert describe_tag("val/top1").endswith("images, in per cent.")
    assert describe_tag("train/my_own") == ""
