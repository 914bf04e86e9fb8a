"""Ranks from what a launcher has set: torchrun's variables where srun or accelerate set others.

Everything behind this module, Accelerate included, reads RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. torchrun, ``accelerate launch`` and ``deepspeed``
set them; ``srun`` has names of its own for what they say.
"""

import re
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import zip_longest
from pathlib import Path

import psutil

from tpp.common.errors import UserError

# Below the range from which Linux gives ports to outgoing connections, above the well-known ones.
_FIRST_PORT, _PORTS = 12000, 20000
_LONGEST_LIST = 100_000
_STARTERS = "torchrun, srun, accelerate launch or deepspeed"
_ALONE = {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def settle_ranks(environment: MutableMapping[str, str]) -> None:
    """Give the tasks of an srun step torchrun's variables; to be called before anything else.

    Nothing is changed where another launcher has set RANK, in a step of one task, and in a batch
    script itself, whose only process is no task of a step.

    Args:
        environment: of this process; ``os.environ``.

    Raises:
        UserError: the variables do not fit together, the ranks were started by mpirun, or
            ``accelerate launch`` was asked for several processes and has started one.
    """
    if "RANK" in environment:
        _check(environment)
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and tasks != "1":
        environment.update(_ranks_of_step(environment))
        return
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        if environment.get(name, _ALONE[name]) != _ALONE[name]:
            raise UserError(
                f"{name}={environment[name]} is set and RANK is not: unset it for one process, or "
                f"start the ranks with {_STARTERS}"
            )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if environment.get(name, "1") != "1":
            raise UserError(
                f"{name}={environment[name]}: mpirun does not say where the ranks meet; start them "
                f"with {_STARTERS}"
            )
    _refuse_missing_processes(psutil.Process().parents())


def _check(environment: Mapping[str, str]) -> None:
    """Check what a launcher has set: one that sets RANK alone has numbered nodes, not ranks."""
    numbers = {"RANK": "0", "WORLD_SIZE": "1"}
    for name, alone in numbers.items():
        text = numbers[name] = environment.get(name, alone)
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UserError(f"{name}={text}: not a number; start the ranks with {_STARTERS}")
    rank, ranks = int(numbers["RANK"]), int(numbers["WORLD_SIZE"])
    if rank >= ranks:
        raise UserError(
            f"RANK={rank} does not fit WORLD_SIZE={ranks}; unset it for one process, or start the "
            f"ranks with {_STARTERS}"
        )
    needed = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if ranks > 1 else ()
    for name in needed:
        text = environment.get(name, "")
        if not text or (name != "MASTER_ADDR" and not re.fullmatch("[0-9]{1,9}", text)):
            what = f"{name}={text}: not a number" if text else f"{name} is not set"
            raise UserError(
                f"{what}, but RANK={rank} and WORLD_SIZE={ranks} are; start the ranks with "
                f"{_STARTERS}"
            )


def _ranks_of_step(slurm: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of an srun step; what the user has set of them stays."""
    node, rank = _number(slurm, "SLURM_NODEID"), _number(slurm, "SLURM_PROCID")
    per_node = expand_counts(_text(slurm, "SLURM_STEP_TASKS_PER_NODE"))
    tasks = _number(slurm, "SLURM_STEP_NUM_TASKS")
    if sum(per_node) != tasks or node >= len(per_node) or rank >= tasks:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={slurm['SLURM_STEP_TASKS_PER_NODE']} does not fit "
            f"SLURM_STEP_NUM_TASKS={tasks}, SLURM_NODEID={node}, SLURM_PROCID={rank}; "
            "start the ranks with one srun of their own"
        )
    address, port = meeting_place(slurm)
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_number(slurm, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
    }


def meeting_place(slurm: Mapping[str, str]) -> tuple[str, str]:
    """Address and port at which the ranks of an srun step meet; what the user has set stays.

    Args:
        slurm: the environment of one of the step's tasks.

    Raises:
        UserError: the first node has no known address.
    """
    address, port = slurm.get("MASTER_ADDR"), slurm.get("MASTER_PORT")
    if not address:
        one_node = _text(slurm, "SLURM_STEP_NUM_NODES") == "1"
        address = "127.0.0.1" if one_node else _address_of_first_node(slurm)
    if not port:
        job, step = _number(slurm, "SLURM_JOB_ID"), _number(slurm, "SLURM_STEP_ID")
        port = str(port_of_step(job, step))
    return address, port


def port_of_step(job: int, step: int) -> int:
    """The port at which a step's ranks meet: all of them find the same, other steps another.

    Args:
        job, step: SLURM's ids.
    """
    return _FIRST_PORT + (job * 101 + step) % _PORTS


def expand_counts(text: str) -> list[int]:
    """SLURM's counts per node written out: ``4(x2),1`` is ``[4, 4, 1]``.

    Raises:
        UserError: they are not written as SLURM writes them.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None or len(counts) > _LONGEST_LIST:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}: not counts such as 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_node(nodes: str) -> str:
    """The first name of a SLURM list of nodes: of ``gpu[007-009,12]-ib,login1`` it is gpu007-ib.

    Raises:
        UserError: it is not written as SLURM writes it.
    """
    # The comma that ends the first name is the first one outside of brackets.
    match = re.match(r"(?:[^,\[\]]|\[[0-9,-]+\])+", nodes)
    if match is None or nodes[match.end() :][:1] not in ("", ","):
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: not a list such as node[01-04]")
    return re.sub(r"\[([0-9]+)[0-9,-]*\]", r"\1", match[0])


def _address_of_first_node(slurm: Mapping[str, str]) -> str:
    """Where rank 0 is found: by the node's name, or where srun was called if that has no address.

    SLURM's names of nodes need not be known to the name service. The batch script, which calls
    srun, runs on the first node.
    """
    name = first_node(_text(slurm, "SLURM_STEP_NODELIST"))
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        address = slurm.get("SLURM_LAUNCH_NODE_IPADDR", "")
        if address:
            return address
        raise UserError(f"MASTER_ADDR: no address of node {name} is known; set it") from None
    return name


def _text(slurm: Mapping[str, str], key: str) -> str:
    if key not in slurm:
        raise UserError(f"{key} is not set in this srun step; start the ranks with srun itself")
    return slurm[key]


def _number(slurm: Mapping[str, str], key: str) -> int:
    text = _text(slurm, key)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{key}={text}: not a number; start the ranks with srun itself")
    return int(text)


def _refuse_missing_processes(ancestors: Sequence[psutil.Process]) -> None:
    """Refuse to be the only one where ``accelerate launch`` was asked for several processes.

    It starts one for ``--cpu --num_processes 2``, and says nothing.
    """
    for process in ancestors[:2]:  # a shell may stand between
        try:
            command = process.cmdline()
        except psutil.Error:
            return
        asked = asked_of_accelerate(command)
        if asked > 1:
            raise UserError(
                f"accelerate launch was asked for {asked} processes and has started one; type "
                f"torchrun --nproc_per_node {asked} train/main.py ..., or accelerate launch "
                f"--config_file launch/accelerate/cpu.yaml --num_processes {asked} train/main.py "
                "..."
            )


def asked_of_accelerate(command: Sequence[str]) -> int:
    """How many processes an ``accelerate launch`` command asks for; 0 if it is none, or says none.

    Args:
        command: a process's arguments.
    """
    names = [Path(part).name for part in command[:4]]
    if not ("accelerate" in names and "launch" in names) and not any(
        name in ("accelerate-launch", "accelerate.commands.launch") for name in names
    ):
        return 0
    options: dict[str, str] = {}
    for part, following in zip_longest(command, command[1:], fillvalue=""):
        name, equals, value = part.partition("=")
        options.setdefault(name.replace("-", "_"), value if equals else following)
    asked = options.get("__num_processes") or _in_file(options.get("__config_file", ""))
    return int(asked) if re.fullmatch("[0-9]{1,6}", asked) else 0


def _in_file(path: str) -> str:
    """What an Accelerate configuration says of the number of processes."""
    try:
        text = Path(path).read_text() if path else ""
    except (OSError, UnicodeDecodeError):
        return ""
    match = re.search(r"^num_processes:\s*([0-9]+)\s*$", text, re.MULTILINE)
    return match[1] if match else ""
