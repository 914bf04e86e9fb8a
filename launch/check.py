"""What can be known to go wrong with a job before it waits in the queue.

`bash slurm/NAME.sh` and launch/submit_chain call it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import add_settings, share
from tpp.common.paths import user_path
from train.run_folder.lock import holder_of, refusal

if TYPE_CHECKING:
    from train.config.config import Config

_SHORT = {
    "-N": "--nodes",
    "-G": "--gpus",
    "-p": "--partition",
    "-n": "--ntasks",
    "-M": "--clusters",
    "-a": "--array",
}
_OF_GPUS = ("--gpus", "--gpus-per-node", "--gpus-per-task")
_OF_ENVIRONMENT = {
    "SBATCH_PARTITION": "--partition",
    "SBATCH_GPUS": "--gpus",
    "SBATCH_GPUS_PER_NODE": "--gpus-per-node",
    "SBATCH_GRES": "--gres",
    "SBATCH_CLUSTERS": "--clusters",
    "SBATCH_ARRAY_INX": "--array",
}


@dataclass(frozen=True)
class Request:
    """What sbatch is asked for, as far as it matters here.

    Attributes:
        partitions: names; empty: the site's default.
        nodes: how many; None for a range of them.
        ranks: one per GPU; None where only the allocation will tell.
        gpus: the kinds of GPUs that are asked for, such as ``a100``; "" is any; none: no GPUs.
        elsewhere: the job goes to another cluster, of which nothing is known.
        tasks: the numbers of a job array's tasks; none: no array.
    """

    partitions: tuple[str, ...] = ()
    nodes: int | None = 1
    ranks: int | None = None
    elsewhere: bool = False
    gpus: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: Sequence[str], script: str, environment: Mapping[str, str]) -> "Request":
        """Read what sbatch would read: a script's #SBATCH lines, the environment, its options.

        Args:
            options: of the command line, which wins.
            script: the text of the batch script.
            environment: of sbatch.
        """
        in_script = re.findall(r"^#SBATCH\s+(.*?)\s*$", script, re.MULTILINE)
        asked = _options([word for line in in_script for word in line.split()])
        asked |= {
            option: environment[key]
            for key, option in _OF_ENVIRONMENT.items()
            if environment.get(key)
        }
        asked |= _options(options)
        partitions = tuple(filter(None, asked.get("--partition", "").split(",")))
        nodes = _count(asked.get("--nodes", "1"))
        wanted = [f"gpu:{asked[option]}" for option in _OF_GPUS if asked.get(option)]
        gpus = _kinds(",".join([*wanted, asked.get("--gres", "")]))
        if "--exclusive" in asked:  # with all that a node has
            gpus = gpus or ("",)
        tasks = _tasks(asked.get("--array", ""))
        return cls(partitions, nodes, _ranks(asked, nodes), "--clusters" in asked, gpus, tasks)


def _options(words: Sequence[str]) -> dict[str, str]:
    """The long names of options, and their values."""
    found: dict[str, str] = {}
    for word, following in zip_longest(words, words[1:], fillvalue="-"):
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--") and len(name) > 2:  # -N4
            name, equals, value = name[:2], "=", name[2:]
        if not equals:
            value = "" if following.startswith("-") else following
        found[_SHORT.get(name, name)] = value
    return found


def _tasks(text: str) -> tuple[int, ...]:
    """Of SLURM's ``0-4:2,7%3`` 0, 2, 4 and 7; none of what it would refuse itself."""
    found: set[int] = set()
    for part in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7})(?::([1-9]\d{0,6}))?)?", part)
        if match is None:
            return ()
        first, last = int(match[1]), int(match[2] or match[1])
        found.update(range(first, last + 1, int(match[3] or 1)))
    return tuple(sorted(found))


def _ranks(asked: Mapping[str, str], nodes: int | None) -> int | None:
    gpus = _count(asked.get("--gpus", ""))
    if gpus is not None:
        return gpus
    in_gres = re.search(r"(?:^|,)(gpu(?::[^,]*)?)", asked.get("--gres", ""))
    per_node = _count(asked.get("--gpus-per-node", in_gres[1] if in_gres else ""))
    return None if per_node is None or nodes is None else nodes * per_node


def _kinds(text: str) -> tuple[str, ...]:
    """Of SLURM's ``gpu:a100:4,gpu:v100:2(S:0-1),shard:8`` a100 and v100; "" of ``gpu:4``."""
    found = re.findall(r"(?:^|,)gpu\b(?::([A-Za-z][\w.-]*))?", text)
    return tuple(dict.fromkeys(found))


def _count(text: str) -> int | None:
    """Of "4", "a100:4" or "gpu:a100:4" the 4; "gpu" is one."""
    if text == "gpu":
        return 1
    match = re.fullmatch(r"(?:[\w.-]+:){0,2}([0-9]{1,6})", text)
    return int(match[1]) if match else None


def resources(config: "Config", name: str) -> str:
    """What a job for a stage asks for: ``training``, ``evaluation``, or ``files`` for no images.

    A stage that removes filters and looks at images for it takes batches of training.
    """
    does = config.stages[name].does
    if does.trains or (config.needs_images(name) and not does.needs_images):
        return "training"
    return "evaluation" if does.needs_images else "files"


def of_tasks(
    files: Sequence[Path], overrides: Sequence[str], tasks: Sequence[int]
) -> dict[str, tuple[Path, list[str]]]:
    """What the tasks of an array are called with, by a name for each of them.

    Args:
        files: the configuration; several: one for each number of a task, from 0 on.
        overrides: settings, with ``%a`` for the number of the task.
        tasks: the numbers that are asked for; none: no array, which is taken to be task 0.

    Returns:
        With one configuration the first task alone, as the others differ by what ``%a`` is in.

    Raises:
        UserError: a task that has no configuration.
    """
    if len(files) == 1:
        # launch/job.sh leaves %a alone where there is no array.
        settings = [one.replace("%a", str(tasks[0])) if tasks else one for one in overrides]
        return {"": (files[0], settings)}
    for task in tasks:
        if task >= len(files):
            raise UserError(f"--array: there is no row {task}; they are 0 to {len(files) - 1}")
    return {
        f"--array: row {task}, {files[task].name}: ": (
            files[task],
            [one.replace("%a", str(task)) for one in overrides],
        )
        for task in tasks or (0,)
    }


def check(config: "Config", request: Request, *, data_on_nodes: bool = False) -> None:
    """Find mistakes in a configuration and in what sbatch is asked for.

    Args:
        config: what the job is to run.
        request: what sbatch is asked for.
        data_on_nodes: the images need not be found on this machine.

    Raises:
        UserError: names what to change.
    """
    from train.preflight import check_network
    from train.teachers import teachers_exist
    from train.weights import starting_weights_exist

    if request.ranks is not None:
        from train.distributed.accelerator import check_batch_size

        check_batch_size(config.training, request.ranks)
    starting_weights_exist(config.model)
    teachers_exist(config)
    architecture = config.make_task().architecture(config.model)
    if architecture is not None:
        check_network(config, architecture)
    if not data_on_nodes and config.data.demo is None:
        check_data(config)
    if not request.elsewhere:
        check_partitions(request.partitions, request.nodes)
        check_gpus(request)
    check_free(Path(config.output))


def check_data(config: "Config") -> None:
    """Check that the images' folders, tars and lists are there."""
    from data_pipelines.sets.inputs import refuse_tables
    from train.data import SIDES, input_of

    for side in SIDES:
        source = input_of(config, side)
        if not source.is_there():
            refuse_tables(source)
            what = f"list {source.listing}" if source.listing else f"folder {source.place}"
            raise UserError(
                f"data.root: there is no {what} on this machine; give another data.root, "
                "or set TPP_DATA_ON_NODES=1 if it is on the compute nodes only"
            )


def check_partitions(names: Sequence[str], nodes: int | None) -> None:
    """Check that SLURM has the partitions, and one of them as many nodes as the job wants."""
    sizes: dict[str, int] = {}
    default = []
    for line in _lines("sinfo", "-h", "-a", "-o", "%P %D"):
        name, _, size = line.partition(" ")
        if name.endswith("*"):
            default.append(name := name[:-1])
        if size.isdigit():
            sizes[name] = sizes.get(name, 0) + int(size)
    for name in names:
        if sizes and name not in sizes:
            there = ", ".join(sorted(sizes))
            raise UserError(f"--partition: there is no partition {name!r} here; there are {there}")
    asked = [name for name in names or default if name in sizes]
    if asked and nodes is not None and nodes > max(sizes[name] for name in asked):
        largest = max(asked, key=lambda name: sizes[name])
        raise UserError(
            f"--nodes: {nodes} nodes are asked for, partition {largest!r} has {sizes[largest]}"
        )


def check_gpus(request: Request) -> None:
    """Check that the installed PyTorch has code for the kinds of GPUs that the job will get.

    SLURM's names of them say which they are at most sites; where they do not, nothing is known.
    """
    from train.cards import refuse_by_name

    if "" not in request.gpus:
        refuse_by_name(" or ".join(request.gpus), request.gpus)
        return
    where = ("-p", ",".join(request.partitions)) if request.partitions else ()
    there = _kinds(",".join(_lines("sinfo", "-h", "-a", *where, "-o", "%G")))
    refuse_by_name(" or ".join(request.partitions) or "this cluster", there)


def check_free(folder: Path) -> None:
    """Check that no other job has the run folder."""
    holder = holder_of(folder)
    if holder is None or not holder.job or holder.released:
        return
    if _lines("squeue", "-h", "-j", holder.job, "-o", "%T"):
        raise refusal(folder, holder)


def _lines(*command: str) -> list[str]:
    """What a command prints; nothing where it does not work."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def make_parser(prog: str = "python -m launch.check") -> Parser:
    """What the command takes, but for what stands behind ``--``."""
    parser = Parser(
        prog,
        "Say what can be known to go wrong with a job before it waits in the queue.",
        more="Prints nothing if nothing is wrong. Behind -- stand options of sbatch.",
        examples=["--config configs/imagenet/resnet50_tpp_2.31x.yaml -- --nodes=4"],
    )
    share(
        parser,
        "--config",
        "; may be repeated, for an array's tasks from 0 on",
        required=True,
        action="append",
    )
    share(parser, "--until")
    parser.add_argument(
        "--script", type=user_path, metavar="FILE", help="a batch script, whose #SBATCH lines count"
    )
    parser.add_argument("--data-on-nodes", action="store_true", help="do not look for the images")
    parser.add_argument(
        "--stages",
        action="store_true",
        help="print names and kinds of the stages, and what they need",
    )
    add_settings(parser)
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m launch.check") -> None:
    """Check, from the command line; ``prog`` is how it was called, for ``--help``."""
    own, options = list(sys.argv[1:] if words is None else words), list[str]()
    if "--" in own:
        place = own.index("--")
        own, options = own[:place], own[place + 1 :]
    arguments = make_parser(prog).parse_args(own)
    from train.config.config import load_config, stages_until

    script = arguments.script.read_text() if arguments.script else ""
    request = Request.of(options, script, os.environ)
    called = of_tasks(arguments.config, arguments.overrides, request.tasks)
    for task, (file, settings) in called.items():
        try:
            config = load_config(file, settings)
            stages_until(config, arguments.until)
            check(config, request, data_on_nodes=arguments.data_on_nodes)
        except UserError as error:
            raise UserError(f"{task}{error}") from error
        if arguments.stages:
            for name, stage in config.stages.items():
                print(name, stage.kind, resources(config, name))


if __name__ == "__main__":
    run_command(main)
