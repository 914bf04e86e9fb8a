"""The script of rec-LRA's memory runs, and shows what it is for."""

import json
import sys

from benchmarks import local_memory


def test_deeper_networks_need_no_more(tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures.json"
    arguments = ["--depths", "18,34", "--width", "2", "--batch-size", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["local_memory", *arguments])
    local_memory.main()
    assert len(capsys.readouterr().out.splitlines()) == 5
    one, other = json.loads(output.read_text())["rows"]
    assert (one["depth"], other["depth"]) == (18, 34)
    assert other["m=2"]["mib"] < 1.01 * one["m=2"]["mib"]
    assert other["backprop"]["mib"] > 1.5 * one["backprop"]["mib"]
