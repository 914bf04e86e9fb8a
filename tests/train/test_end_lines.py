"""The lines that a run prints at its end can be pasted into a terminal that is anywhere."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from train.report import show_end

OLD = Path(__file__).with_name("old_run_folder")


@pytest.mark.parametrize("name", ["run", "it's my run [1]"])
def test_they_work_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = Path("runs") / name
    shutil.copytree(OLD, folder)
    show_end(folder)
    printed = capsys.readouterr().out.splitlines()
    lines = dict(line.split(":", 1) for line in printed if line.split(":", 1)[0] in LINES)
    assert tuple(lines) == LINES
    whole = tmp_path / "here" / "runs" / name
    assert shlex.split(lines["run folder"]) == [str(whole)]
    assert shlex.split(lines["report page"]) == [str(whole / "report.html")]
    program, *options = shlex.split(lines["TensorBoard"])
    assert options == ["--logdir", str(whole)] and Path(program).is_file()
    (whole / "report.html").unlink()
    done = subprocess.run(
        ["bash", "-c", lines["report"]], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (whole / "report.html").exists()


LINES = ("run folder", "TensorBoard", "report", "report page")
