"""``profile`` writes a trace of the steps it names, with the parts of each, and is else nothing."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tpp.common.errors import UserError
from train.config.config import load_config
from train.loop.parts import PARTS, part


def trace_of(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Begin and end of the events that ``record_function`` named, by name, in order of time."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            span = event["ts"], event["ts"] + event["dur"]
            named.setdefault(event["name"], []).append(span)
    return {name: sorted(spans) for name, spans in named.items()}


def inside(span: tuple[float, float], outer: tuple[float, float]) -> bool:
    return outer[0] <= span[0] and span[1] <= outer[1]


def test_the_trace_has_the_steps_and_their_parts(tiny_config, run_inside, capsys):
    """Of two micro-batches a step; each part in its step, in the order of the loop."""
    tiny_config["training"] |= {"accumulation": 2, "log_every": 2}
    tiny_config["profile"] = {"from": 4, "steps": 3, "stage": "regularize"}
    run_inside(tiny_config, "--until", "regularize")
    folder = Path(tiny_config["output"])
    assert not (folder / "dense" / "profile").exists()
    path = folder / "regularize" / "profile" / "rank0.pt.trace.json.gz"
    assert f"regularize: profile: steps 4 to 6: {path}" in capsys.readouterr().out

    found = trace_of(path)
    steps = {name: spans for name, spans in found.items() if name.startswith("ProfilerStep#")}
    assert sorted(steps) == ["ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"]
    for name, (step,) in steps.items():
        own = {p: [s for s in found[p] if inside(s, step)] for p in PARTS}
        for once_a_batch in ("load", "forward", "penalty", "backward"):
            assert len(own[once_a_batch]) == 2
        # The gradient's norm, and the step. Sums of each micro-batch, and a report every two.
        assert len(own["optimiser"]) == 2
        assert len(own["log"]) == 2 + (name != "ProfilerStep#5")
        spans = sorted((*s, p) for p, of_part in own.items() for s in of_part)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "none overlap"
        batch = ["load", "forward", "log", "penalty", "backward"]
        assert [p for *_, p in spans][:12] == [*batch, *batch, "optimiser", "optimiser"]
    assert {name: len(found[name]) for name in ("load", "optimiser")} == {"load": 6, "optimiser": 6}

    # Convolutions are in "forward" and "backward", and the penalty's products in its own.
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    where: dict[str, set[str]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            span = event["ts"], event["ts"] + event["dur"]
            within = {p for p in PARTS if any(inside(span, outer) for outer in found[p])}
            where.setdefault(event["name"], set()).update(within)
    assert where["aten::convolution"] == {"forward"}
    assert where["aten::convolution_backward"] == {"backward"}


def weights(config: dict[str, Any]) -> bytes:
    return (Path(config["output"]) / "dense" / "model.safetensors").read_bytes()


def test_what_there_is_of_a_run_that_is_too_short_or_goes_on(tiny_config, run_inside, tmp_path):
    """Of a stage of six steps; weights stay as they are without a profile, to the bit."""
    # The checkpoint after step 5 stays, to go on from.
    tiny_config["checkpoints"] = {"every": "5 steps", "keep_every": 1}
    plain = {**tiny_config, "output": str(tmp_path / "plain")}
    run_inside(plain, "--until", "dense")
    trace = Path(tiny_config["output"]) / "dense" / "profile" / "rank0.pt.trace.json.gz"

    def steps(profile: dict[str, int] | None) -> list[int]:
        run_inside({**tiny_config, "profile": profile}, "--until", "dense")
        assert weights(tiny_config) == weights(plain)
        marks = [name for name in trace_of(trace) if name.startswith("ProfilerStep#")]
        return sorted(int(name.partition("#")[2]) for name in marks)

    assert steps({"from": 3, "steps": 9}) == [3, 4, 5, 6]
    done = Path(tiny_config["output"]) / "dense" / "done.json"
    for profile, expected in (
        ({"from": 2, "steps": 9}, [6]),  # it goes on after step 5
        ({"from": 2, "steps": 4}, [6]),  # these are over, and the trace of before stays
        (None, [6]),
    ):
        done.unlink()
        assert steps(profile) == expected


def test_a_stage_that_ends_before_says_so(tiny_config, run_inside, capsys):
    """So does one that goes on after them, where no trace was left."""
    tiny_config["checkpoints"] = {"every": "5 steps", "keep_every": 1}
    tiny_config["profile"] = {}
    run_inside(tiny_config, "--until", "dense")
    assert "dense: profile: no trace: this ended before step 20\n" in capsys.readouterr().out
    folder = Path(tiny_config["output"]) / "dense"
    (folder / "done.json").unlink()
    tiny_config["profile"] = {"from": 1, "steps": 5}
    run_inside(tiny_config, "--until", "dense")
    assert "dense: profile: no trace: the stage goes on after step 5\n" in capsys.readouterr().out
    assert not (folder / "profile").exists()


def test_nothing_is_named_where_no_profiler_looks():
    nothing = part("load")
    assert part("forward") is nothing
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert isinstance(part("forward"), torch.profiler.record_function)
    assert part("log") is nothing


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("profile={from: 0}", "profile.from: input should be greater than or equal to 1, not 0"),
        ("profile={steps: 101}", "profile.steps: input should be less than or equal to 100"),
        ("profile={form: 3}", "profile.form: unknown key; did you mean 'from'?"),
        ("profile={stage: prune}", "profile.stage: 'prune' is no stage that trains; there are: "),
        ("profile=20", "profile: input should be a valid dictionary or instance of"),
    ],
)
def test_what_is_wrong_is_one_line(override, line):
    with pytest.raises(UserError) as told:
        load_config(None, [override])
    assert line in str(told.value)
    assert "\n" not in str(told.value)
