"""Which GPUs the installed PyTorch can use, and which requirement set runs on the others.

PyTorch's own answers come late and are no answers: of a card that it has no code for, a failed
kernel in the first step; of a driver that is too old for it, no GPU, so that a run would go on on
the CPU. Both are known at the start, before images and weights are opened.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, reason_of, run_command

Capability = tuple[int, int]

_PROC = Path("/proc/driver/nvidia")
_BF16 = (8, 0)  # the first with arithmetic in it


@dataclass(frozen=True)
class Pins:
    """A requirement set.

    Attributes:
        file: in the repository's root.
        torch: the version that it pins.
        cuda: that this version is built for, as PyPI has it: 13.2.
        code: what its kernels are compiled for, such as ``sm_80``.
        driver: the first branch of NVIDIA's driver for Linux that runs this CUDA; within one major
            version of CUDA it is one branch ("CUDA Compatibility", minor version compatibility).
    """

    file: str
    torch: str
    cuda: str
    code: tuple[str, ...]
    driver: int


_BLACKWELL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
# What is asked of first comes first.
SETS = (
    Pins("requirements.txt", "2.15.0", "13.2", _BLACKWELL, 580),
    Pins("requirements-cuda12.txt", "2.10.0", "12.8", ("sm_70", *_BLACKWELL), 525),
)


@dataclass(frozen=True)
class Kind:
    """A kind of GPU, as far as programs see it.

    Attributes:
        title: its best-known names.
        pattern: finds it in a name that NVIDIA or SLURM writes, in small letters and with blanks
            for all that is neither letter nor digit.
        capability: the compute capability.
    """

    title: str
    pattern: str
    capability: Capability


# NVIDIA's "CUDA GPU Compute Capability"; what is more special stands first.
KINDS = (
    Kind("GTX 10", r"gtx ?10[5-8]0|titan xp?\b(?! ?rtx)|\bp(4|40|6)\b", (6, 1)),
    Kind("P100", r"\bp100\b", (6, 0)),
    Kind("V100, Titan V", r"v100s?\b|gv100|titan v\b", (7, 0)),
    Kind("T4, RTX 20, GTX 16, Quadro RTX", r"\bt4g?\b|rtx ?20[5-8]0|gtx ?16\d0|titan rtx", (7, 5)),
    Kind("T4, RTX 20, GTX 16, Quadro RTX", r"quadro rtx|\brtx ?[3-8]000\b(?! ada)", (7, 5)),
    Kind("RTX 50, RTX PRO Blackwell", r"rtx ?50[5-9]0|blackwell|rtx pro ?\d", (12, 0)),
    Kind("L4, L40, L40S, RTX 40, RTX Ada", r"\bl(2|4|20|40)[sg]?\b|rtx ?40[5-9]0|\bada\b", (8, 9)),
    Kind("A2, A10, A16, A40, RTX 30, RTX A", r"\ba(2|10|10g|10m|16|40)\b|rtx ?30[5-9]0", (8, 6)),
    Kind("A2, A10, A16, A40, RTX 30, RTX A", r"\brtx ?a\d{3,4}\b|\ba[2456]\d00\b", (8, 6)),
    Kind("A100, A30, A800", r"\ba(100|30|30x|100x|800)\b", (8, 0)),
    Kind("H100, H200, H20, H800, GH200", r"\bg?h(20|100|200|800)\b", (9, 0)),
    Kind("B300, GB300", r"\bg?b300\b", (10, 3)),
    Kind("B100, B200, GB200", r"\bg?b[12]00\b", (10, 0)),
    Kind("GB10 (DGX Spark)", r"\bgb10\b", (12, 1)),
)


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        index: its number, as ``cuda:0`` has it.
        name: as NVIDIA writes it.
        capability: the compute capability; None where it is not known.
    """

    index: int
    name: str
    capability: Capability | None


@dataclass(frozen=True)
class Machine:
    """What a process has before it.

    Attributes:
        driver: the version of NVIDIA's, such as ``535.129.03``; None where there is none.
        cards: that PyTorch sees.
        there: names of those that the driver has and this process may open.
        visible: ``CUDA_VISIBLE_DEVICES``; None where it is not set.
        reason: what PyTorch says if it sees none of them.
    """

    driver: str | None = None
    cards: tuple[Card, ...] = ()
    there: tuple[str, ...] = ()
    visible: str | None = None
    reason: str = ""

    @property
    def hidden(self) -> bool:
        """Whether somebody has said that no GPU is to be used."""
        return self.visible is not None and bool(
            re.match(r"\s*(-|nodevfiles|$)", self.visible, re.I)
        )


@dataclass(frozen=True)
class Build:
    """The PyTorch that is installed.

    Attributes:
        version: such as ``2.15.0+cu132``.
        cuda: that it is built for; None: for the CPU.
        code: what its kernels are compiled for: ``sm_80``, or ``compute_90`` (PTX).
    """

    version: str
    cuda: str | None
    code: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a machine.

    Attributes:
        usable: whether the run can go on.
        line: what there is and what it is good for, or what to do; empty on a CPU.
    """

    usable: bool
    line: str = ""


def runs(capability: Capability, code: Iterable[str]) -> bool:
    """Whether a GPU runs kernels that are compiled for any of ``code``.

    ``sm_86`` runs on 8.6 and 8.9, and on nothing of another major version; ``sm_90a`` on 9.0 alone;
    ``sm_100f`` on its family, 10.0 and 10.3; ``compute_90``, which the driver compiles, on
    everything from 9.0 on.
    """
    major, minor = capability
    for one in code:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", one)
        if match is None:
            continue
        form, of = match[1], (int(match[2]), int(match[3]))
        same_family = of[0] == major and of[1] <= minor
        if match[4] == "a":
            found = of == capability
        elif form == "compute" and not match[4]:
            found = of <= capability
        else:
            found = same_family
        if found:
            return True
    return False


def branch(driver: str) -> int:
    """535, of ``535.129.03``."""
    return int(driver.partition(".")[0])


def kind_of(name: str) -> Kind | None:
    """The kind of GPU that NVIDIA or SLURM calls so, as ``a100`` or ``nvidia_h100_80gb_hbm3``."""
    plain = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    return next((kind for kind in KINDS if re.search(kind.pattern, plain)), None)


def sets_for(
    capabilities: Iterable[Capability], driver: str | None, sets: Sequence[Pins] = SETS
) -> list[Pins]:
    """The requirement sets that run on all of some GPUs, under this driver if one is named."""
    wanted = list(capabilities)
    return [
        pins
        for pins in sets
        if all(runs(one, pins.code) for one in wanted)
        and (driver is None or branch(driver) >= pins.driver)
    ]


def judge(
    machine: Machine, build: Build, *, ranks: int = 1, sets: Sequence[Pins] = SETS
) -> Verdict:
    """What is to be said before a run begins. Reads nothing but what it is given.

    Args:
        machine: what this process has before it.
        build: of PyTorch.
        ranks: of this node: rank k takes card k, and cards beyond are not used.
        sets: the requirement sets there are.
    """
    if machine.cards and build.cuda is not None:
        return _judge_cards(machine, build, machine.cards[: max(ranks, 1)], sets)
    if machine.hidden or machine.driver is None or not machine.there:
        return Verdict(True)
    cards = tuple(
        Card(number, name, kind.capability if (kind := kind_of(name)) else None)
        for number, name in enumerate(machine.there)
    )
    named = _named(cards)
    if build.cuda is None:
        why = f"{named} is here, and PyTorch {build.version} is built without CUDA"
    elif branch(machine.driver) < (needed := _driver_of(build.cuda, sets)):
        why = (
            f"{named}: the NVIDIA driver is {machine.driver}, and PyTorch {build.version} "
            f"(CUDA {build.cuda}) needs {needed} or newer"
        )
    else:
        at = f" (CUDA_VISIBLE_DEVICES={machine.visible})" if machine.visible is not None else ""
        reason = machine.reason or "it sees no GPU"
        return Verdict(
            False,
            f"{named}: the NVIDIA driver {machine.driver} is here, and PyTorch {build.version} "
            f"cannot use it{at}: {reason}; nvidia-smi may say why. {_ON_CPU}",
        )
    return Verdict(False, f"{why}; {_advice(cards, machine.driver, sets)}")


_ON_CPU = "CUDA_VISIBLE_DEVICES= runs it on the CPU"


def _judge_cards(
    machine: Machine, build: Build, used: Sequence[Card], sets: Sequence[Pins]
) -> Verdict:
    bad = [c for c in used if c.capability is not None and not runs(c.capability, build.code)]
    has = f"PyTorch {build.version} has code for {', '.join(build.code) or 'no GPU'}"
    if not bad:
        version = build.version.partition("+")[0]
        mine = next((s.file for s in sets if (s.torch, s.cuda) == (version, build.cuda)), None)
        return Verdict(True, f"{_named(used)}; {has}" + (f" ({mine})" if mine else ""))
    advice = _advice(used, machine.driver, sets)
    if len(bad) == len(used):
        return Verdict(False, f"{_named(bad)}: {has}; {advice}")
    # CUDA counts among those that the variable names.
    names = (machine.visible or "").split(",")
    names = names if len(names) > max(card.index for card in used) else []
    good = [names[card.index] if names else str(card.index) for card in used if card not in bad]
    which = ", ".join(f"cuda:{card.index}" for card in bad)
    return Verdict(
        False,
        f"{_named(bad)}, {which} of {_named(used)}: {has}; CUDA_VISIBLE_DEVICES={','.join(good)} "
        f"leaves out what it cannot use, or {advice}",
    )


def _driver_of(cuda: str, sets: Sequence[Pins]) -> int:
    """The first branch of the driver that runs a CUDA; of one that no set has, the newest known."""
    major = cuda.partition(".")[0]
    return next(
        (pins.driver for pins in sets if pins.cuda.partition(".")[0] == major),
        max((pins.driver for pins in sets), default=0),
    )


def _advice(cards: Sequence[Card], driver: str | None, sets: Sequence[Pins]) -> str:
    known = [card.capability for card in cards if card.capability is not None]
    fits = sets_for(known, driver, sets)
    it = "it" if len(cards) == 1 else "them"
    if fits:
        pins = fits[0]
        return (
            f"{pins.file} (PyTorch {pins.torch}, CUDA {pins.cuda}) runs on {it}: pip install -r "
            f"{pins.file} in an environment of its own. {_ON_CPU}"
        )
    newer = sets_for(known, None, sets)
    if newer and driver is not None:
        pins = min(newer, key=lambda one: one.driver)
        return (
            f"{pins.file} (PyTorch {pins.torch}, CUDA {pins.cuda}) runs on {it} with driver "
            f"{pins.driver} or newer, and here is {driver}. {_ON_CPU}"
        )
    files = " nor ".join(pins.file for pins in sets)
    return f"neither {files} has code for {it} (docs/cards.md). {_ON_CPU}"


def _named(cards: Sequence[Card]) -> str:
    """``4 x Tesla V100-SXM2-16GB (sm_70), NVIDIA A100 (sm_80)``."""
    counts: dict[tuple[str, Capability | None], int] = {}
    for card in cards:
        key = (card.name, card.capability)
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(
        (f"{count} x " if count > 1 else "")
        + name
        + (f" (sm_{capability[0]}{capability[1]})" if capability else "")
        for (name, capability), count in counts.items()
    )


def look(environment: Mapping[str, str]) -> tuple[Machine, Build]:
    """What this process has before it; asks PyTorch and reads the driver's files.

    Args:
        environment: of this process.
    """
    import torch

    driver, there = of_driver()
    reason = ""
    cards: list[Card] = []
    # Their sense is in the verdict, in one line and before anything else.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            found = torch.cuda.get_device_properties(index)
            cards.append(Card(index, found.name, (found.major, found.minor)))
        if there and not cards and torch.version.cuda is not None:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                reason = reason_of(error)
    machine = Machine(driver, tuple(cards), there, environment.get("CUDA_VISIBLE_DEVICES"), reason)
    return machine, installed()


def installed() -> Build:
    """The PyTorch that is installed; one for other makes of GPUs is as one for the CPU."""
    import torch

    # get_arch_list() of PyTorch before 2.12 says nothing where there is no GPU.
    flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else ""
    return Build(torch.__version__, torch.version.cuda, tuple((flags or "").split()))


def of_driver(proc: Path = _PROC, dev: Path = Path("/dev")) -> tuple[str | None, tuple[str, ...]]:
    """The driver's version, and the names of the GPUs that this process may open.

    In a job without GPUs on a node with some, SLURM's cgroups keep their files shut.

    Args:
        proc: where the kernel module tells of itself.
        dev: where the devices are.
    """
    try:
        text = (proc / "version").read_text()
    except OSError:
        return None, ()
    match = re.search(r"Kernel Module\D*?(?:for \S+)?\s+(\d+\.[\d.]+)", text)
    names = []
    for file in sorted(proc.glob("gpus/*/information")):
        said = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", file.read_text(), re.MULTILINE))
        if os.access(dev / f"nvidia{said.get('Device Minor', '')}", os.R_OK | os.W_OK):
            names.append(said.get("Model", "a GPU"))
    return (match[1] if match else None), tuple(names)


def check_cards(environment: Mapping[str, str], precision: str = "fp32") -> list[str]:
    """Find out whether PyTorch can use the GPUs that a run is going to take.

    Args:
        environment: of this process, with its rank.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        What there is to be said of the GPUs, a line each; nothing on a CPU.

    Raises:
        CardError: it cannot; says what to install.
    """
    import torch

    if torch.version.hip is not None:
        return []
    machine, build = look(environment)
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    verdict = judge(machine, build, ranks=ranks)
    if not verdict.usable:
        raise CardError(
            verdict.line, alone=len(machine.cards) < ranks and len(set(machine.there)) > 1
        )
    said = [f"cards       {verdict.line}"] if verdict.line else []
    if precision == "bf16":
        slow = [c for c in machine.cards[:ranks] if c.capability and c.capability < _BF16]
        if slow:
            said.append(
                f"training.precision: {_named(slow)} has no bf16 arithmetic; its mixed precision "
                "is fp16"
            )
    return said


class CardError(UserError):
    """PyTorch cannot use a GPU that the run is going to take.

    Attributes:
        alone: other ranks of this node may see other GPUs, and know nothing of it.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def refuse_by_name(asked: str, names: Iterable[str], build: Build | None = None) -> None:
    """Find out that a job's GPUs are of a kind that the installed PyTorch has no code for.

    Args:
        asked: the option, or what else names them.
        names: as SLURM has them, such as ``v100``; those that say nothing are passed over, and
            one of them that is all right is enough.
        build: of PyTorch; None: the installed one.

    Raises:
        UserError: all of them are; says what to install.
    """
    kinds = [kind_of(name) for name in names]
    if not kinds or None in kinds:
        return
    build = build or installed()
    if build.cuda is None:
        return
    cards = [Card(0, kind.title, kind.capability) for kind in kinds if kind is not None]
    if any(card.capability is not None and runs(card.capability, build.code) for card in cards):
        return
    raise UserError(
        f"{asked}: {_named(cards)}: PyTorch {build.version} has code for "
        f"{', '.join(build.code)}; {_advice(cards, None, SETS).partition('. ' + _ON_CPU)[0]}"
    )


def table() -> str:
    """Kinds of GPUs, and what runs on them, as in docs/cards.md."""
    heads = [f"`{pins.file}`" for pins in SETS]
    rows = [["card", "compute capability", "mixed precision", *heads]]
    titles: dict[str, Capability] = {kind.title: kind.capability for kind in KINDS}
    for title, capability in sorted(titles.items(), key=lambda one: one[1]):
        cells = [f"driver {pins.driver}" if runs(capability, pins.code) else "no" for pins in SETS]
        mixed = "bf16, fp16" if capability >= _BF16 else "fp16"
        rows.append([title, "{}.{}".format(*capability), mixed, *cells])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def make_parser(prog: str = "python -m train.cards") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Say which GPUs are here, what the installed PyTorch runs on, and what to install if it "
        "does not run on them.",
        more="Every run begins with the same check. The exit code is 2 where it would be refused.",
        examples=["", "--table"],
    )
    parser.add_argument(
        "--table", action="store_true", help="the kinds of GPUs and what runs on them, as Markdown"
    )
    parser.add_argument("--quiet", action="store_true", help="say only what is wrong")
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.cards") -> None:
    """Say it; ``prog`` is how it was called, for ``--help``."""
    arguments = make_parser(prog).parse_args(words)
    if arguments.table:
        print(table(), end="")
        return
    machine, build = look(os.environ)
    # Whatever of them a run would take.
    verdict = judge(machine, build, ranks=max(len(machine.cards), 1))
    if not verdict.usable:
        raise UserError(verdict.line)
    if not arguments.quiet:
        driver = f"; NVIDIA driver {machine.driver}" if machine.driver else ""
        print(verdict.line or f"no GPU that is to be used; PyTorch {build.version}{driver}")


if __name__ == "__main__":
    run_command(main)
