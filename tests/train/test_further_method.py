"""A method more is a file more: the tests that go over all methods take it without an edit."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# All that asks which methods there are.
TESTS = (
    "tests/tpp/test_methods.py::test_there_are_the_rows_of_table_1_and_greg",
    "tests/tpp/test_methods.py::test_settings_know_no_other_key",
    "tests/train/test_batch_rule.py::test_what_is_not_counted_in_steps_stays",
    "tests/train/test_method_runs.py::test_mistakes_show_in_the_configuration",
)
FILES = {
    "plain": """
class Plain(Method):
    name = "plain"
    title = "Plain"
""",
    "growing": """
class GrowingSettings(greg1.Settings):
    target: PositiveInt  # a setting without a default

class Growing(greg1.GReg1):
    name = "greg1+target"
    title = "GReg-1 with a target"
    settings_type = GrowingSettings
""",
    "masked": """
class Masked(Method):
    name = "masked"
    title = "Mask"
    picks = "during"

    def remove(self, *arguments, **more):
        raise NotImplementedError
""",
}
HEAD = """
from tpp.common.settings import PositiveInt
from tpp.methods import greg1
from tpp.methods.base import Method
"""
# As if the file lay in tpp/methods/.
PLUGIN = """
import tpp.methods
tpp.methods.__path__.append({folder!r})
assert {{'plain', 'greg1+target', 'masked'}} < set(tpp.methods.available_methods())
"""


def test_tests_take_further_methods(tmp_path: Path) -> None:
    methods = tmp_path / "methods"
    methods.mkdir()
    for file, text in FILES.items():
        (methods / f"{file}_of_mine.py").write_text(HEAD + text)
    (tmp_path / "further.py").write_text(PLUGIN.format(folder=str(methods)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "further", "-p", "no:xdist", *TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
