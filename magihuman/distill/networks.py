"""Three ways to hold the networks of a distillation.

    full         three networks: frozen teacher, critic and student, both trained whole
    lora_critic  student trained whole; the critic is an adapter on the frozen teacher
    lora         one frozen base: the teacher; student, its average and the critic are adapters on it

A critic that is an adapter starts exactly at the teacher and costs a hundredth of the optimiser's memory; what
it may lose is rank. Memory at 15 B: `python -m magihuman.zoo plan 15b task=dmd2`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from magihuman.models.config import LoraConfig
from magihuman.models.denoiser import Denoiser, WithLora
from magihuman.models.lora import add_lora, copy_lora, lora_of, lora_parameters

HOLDINGS = ("full", "lora_critic", "lora")
ADAPTERS = {"full": (), "lora_critic": ("critic",), "lora": ("student", "critic", "average")}


@dataclass(frozen=True)
class Networks:
    """The roles, as denoisers, and what is trained of them.

    Attributes:
        teacher, critic, student, average: `average` is what is sampled from and exported.
        shared: the base that carries adapters; None where every role is a network of its own.
    """

    teacher: Denoiser
    critic: Denoiser
    student: Denoiser
    average: Denoiser
    shared: Denoiser | None = None

    def role(self, name: str) -> Denoiser:
        return {
            "teacher": self.teacher,
            "critic": self.critic,
            "student": self.student,
            "average": self.average,
        }[name]

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """What an optimiser moves of student or critic."""
        role = self.role(name)
        if isinstance(role, WithLora):
            return lora_parameters(role.model, role.lora)
        return {key: weight for key, weight in role.named_parameters() if weight.requires_grad}


def hold(
    kind: str,
    make: Callable[[bool, Callable[[Denoiser], None]], Denoiser],
    student: tuple[Denoiser, Denoiser] | None,
    lora: LoraConfig,
    seed: int,
) -> Networks:
    """Make the networks that are missing.

    Args:
        kind: one of `HOLDINGS`.
        make: a network with the teacher's weights; takes whether it stays frozen, and what to do to it before
            it is spread over devices.
        student: (trained, averaged) where the student is a network of its own.
        lora: size of the adapters; seed: of their first halves.
    """
    if kind == "full":
        assert student is not None
        return Networks(make(True, _nothing), make(False, _nothing), *student)

    def adapt(network: Denoiser) -> None:
        network.requires_grad_(False)
        for name in ADAPTERS[kind]:
            add_lora(network.model, name, lora, seed)

    shared = make(True, adapt)
    critic = WithLora(shared, "critic")
    if kind == "lora_critic":
        assert student is not None
        return Networks(shared, critic, *student, shared)
    copy_lora(shared.model, "student", "average")
    for weight in lora_parameters(shared.model, "average").values():
        weight.requires_grad_(False)
    return Networks(shared, critic, WithLora(shared, "student"), WithLora(shared, "average"), shared)


def _nothing(network: Denoiser) -> None:
    pass


@torch.no_grad()
def follow(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) weights, in place."""
    torch._foreach_lerp_(list(average), list(weights), 1.0 - decay)


def without_base(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A state dict without the frozen base below `prefix`, whose adapters stay."""
    return {
        key: tensor for key, tensor in state.items() if not key.startswith(prefix) or lora_of(key) is not None
    }


@contextmanager
def resting(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradients for weights that something else is trained through."""
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
