"""Three ways to share weights between teacher, student and fake score of a distillation.

    full             three networks: the teacher is frozen, student and fake score are trained whole
    lora_fake_score  the student is trained whole; the fake score is a LoRA on the frozen teacher
    lora             one frozen network, the teacher; student, its average and fake score are LoRAs on it

A fake score that is a LoRA starts exactly at the teacher and needs a hundredth of the optimiser's memory; its rank
limits what it can fit. Memory at 15B: `python -m magihuman.zoo plan 15b task=dmd2`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from magihuman.models.config import LORAS, LoraConfig
from magihuman.models.denoiser import Denoiser, WithLora
from magihuman.models.lora import add_lora, copy_lora, lora_parameters


@dataclass(frozen=True)
class Networks:
    """The networks of a distillation by role.

    Attributes:
        teacher, fake_score, student: see `recipes.dmd2`.
        average: moving average of the student, which is sampled from and exported.
        shared: the frozen base that carries LoRAs; None if every role is a network of its own.
    """

    teacher: Denoiser
    fake_score: Denoiser
    student: Denoiser
    average: Denoiser
    shared: Denoiser | None = None

    def role(self, name: str) -> Denoiser:
        """ "teacher", "fake_score", "student" or "average"."""
        network: Denoiser = getattr(self, name)
        return network

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """Trainable parameters of a role (of the average: all of its own)."""
        role = self.role(name)
        if isinstance(role, WithLora):
            return lora_parameters(role.model, role.lora)
        return {key: weight for key, weight in role.named_parameters() if weight.requires_grad}


def build_networks(
    sharing: str,
    make: Callable[[bool, Callable[[Denoiser], None]], Denoiser],
    student: tuple[Denoiser, Denoiser] | None,
    lora: LoraConfig,
    seed: int,
) -> Networks:
    """Build the networks of a distillation.

    Args:
        sharing: a key of `LORAS`.
        make: returns a network with the teacher's weights; takes whether it stays frozen, and a function to apply to
            it before it is sharded.
        student: (trained, averaged) if the student is a network of its own.
        lora: size of the LoRAs; seed: of their A matrices.
    """
    if sharing == "full":
        assert student is not None
        return Networks(make(True, lambda _: None), make(False, lambda _: None), *student)

    def add(network: Denoiser) -> None:
        network.requires_grad_(False)
        for name in LORAS[sharing]:
            # The random stream keeps its name of version 0.1.0, so that runs can be reproduced.
            add_lora(network.model, name, lora, seed, {"fake_score": "critic"}.get(name))

    shared = make(True, add)
    fake_score = WithLora(shared, "fake_score")
    if sharing == "lora_fake_score":
        assert student is not None
        return Networks(shared, fake_score, *student, shared)
    copy_lora(shared.model, "student", "average")
    for weight in lora_parameters(shared.model, "average").values():
        weight.requires_grad_(False)
    return Networks(shared, fake_score, WithLora(shared, "student"), WithLora(shared, "average"), shared)


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Set requires_grad=False on parameters within a with block; gradients still pass through to the inputs.

    with frozen(list(discriminator.parameters())):
        student_loss.backward()
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
