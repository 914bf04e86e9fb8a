"""The teacher of a training stage."""

import hashlib

import torch
from torch import nn

from tpp.checkpoints.safetensors_files import sha256_of
from tpp.common.errors import UserError
from tpp.models.architecture import example_input_for
from train.distillation.distillation import Distillation
from train.distillation.settings import DENSE
from train.distributed.collectives import EveryRankError, from_main_rank, on_every_rank
from train.run import Run
from train.run_folder.log import say
from train.run_folder.networks import dense_network, place
from train.teachers import load_teacher


class Teaching:
    """Reads a stage's teacher once, and puts it beside whatever network the stage has.

    Args:
        run, name: the stage.

    Attributes:
        fingerprint: of the teacher's weights; None without a teacher, or as long as none was read.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._settings = run.config.stages[name].distill
        self._teacher: nn.Module | None = None
        self.fingerprint: str | None = None

    def beside(self, network: nn.Module, fingerprint: str | None) -> Distillation | None:
        """The teacher beside a network, which is placed; all ranks have to call it.

        Args:
            network: what the stage trains; it gets hooks where features are compared.
            fingerprint: that the teacher had when the stage began; None where it begins now.

        Raises:
            UserError: there is no such teacher, it is another than it was, or the two do not go
                together.
        """
        settings, run = self._settings, self._run
        if settings is None:
            return None
        key = f"stages.{self._name}.distill"
        if self._teacher is None:
            self._teacher = self._read()
            self.fingerprint = fingerprint_of(self._teacher)
            if from_main_rank(run.accelerator, lambda: self.fingerprint) != self.fingerprint:
                raise UserError(
                    f"{key}.teacher: {settings.teacher} is another network on this node than on "
                    "the main rank's; give every node the same"
                )
        if fingerprint not in (None, self.fingerprint):
            raise EveryRankError(
                f"{key}.teacher: {settings.teacher} is another network than when the stage began; "
                f"give it the same again, or delete {run.stage_folder(self._name)} to run the "
                "stage again"
            )
        teacher = self._teacher
        return on_every_rank(
            run.accelerator,
            lambda: Distillation(
                settings,
                network,
                teacher,
                example=example_input_for(network, side=run.config.data.train_size),
                preprocessing=run.config.data.preprocessing(),
                key=key,
            ),
        )

    def _read(self) -> nn.Module:
        run, settings = self._run, self._settings
        assert settings is not None
        if settings.teacher == DENSE:
            return dense_network(run, run.config.stages[self._name].input)
        network = on_every_rank(
            run.accelerator,
            lambda: load_teacher(
                settings.teacher,
                run.architecture,
                run.data.train.index.classes,
                key=f"stages.{self._name}.distill.teacher",
                say=say if run.is_main else lambda _: None,
            ),
        )
        return place(run, network).eval().requires_grad_(False)


def fingerprint_of(network: nn.Module) -> str:
    """A hash of a network's weights and their names, the same on every machine."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().to("cpu", memory_format=torch.contiguous_format)
        found.update(f"{name} {sha256_of(plain)}\n".encode())
    return found.hexdigest()
