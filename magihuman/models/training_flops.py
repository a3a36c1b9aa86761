"""Model FLOPs of training, for their utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

Multiply-adds x 2 of matrix products and attention in the transformers, as an algorithm needs them: what activation
checkpointing recomputes does not count, nor do optimisers, codecs and the heads of a discriminator. A forward pass is
F = P + S: P of products with weights, S of attention; A is a forward pass through an adapter's own products. Then
    trained whole              3 F: forward, gradients of inputs, gradients of weights
    frozen, passed through     2 P + 3 S: no gradients of weights, but both factors of attention are activations
    frozen, with an adapter    2 P + 3 S + 3 A
By convention the first product counts like all others, though nobody needs the gradients of a network's inputs.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from magihuman.models.config import DiTConfig, LoraConfig, PackConfig, TreadConfig
from magihuman.models.flops import adapter_flops, forward_flops
from magihuman.models.gpu_specs import recognise


@dataclass(frozen=True)
class Sample:
    """What the passes of one sample depend on.

    Attributes:
        video, audio, text: tokens.
        frames: latent frames; window: frames that local layers see to each side, None for all.
    """

    video: int
    audio: int
    text: int
    frames: int = 0
    window: int | None = None


def samples(pack: PackConfig, video: Sequence[int], audio: int, text: Iterable[int]) -> list[Sample]:
    """The samples of a batch.

    Args:
        video: shape of the latents, [...,T,h,w]; audio: latents of each sample; text: tokens of each.
    """
    tokens = prod(video[-3:]) // pack.patch_size**2
    window = pack.frame_receptive_field if pack.frame_receptive_field >= 0 else None
    return [Sample(tokens, audio, words, video[-3], window) for words in text]


@dataclass(frozen=True)
class Passes:
    """FLOPs of one sample's passes through one network.

    Attributes:
        forward: without gradients; through: forward and backward to the input, nothing trained; update: forward and
            backward, with the gradients of what is trained.
    """

    forward: int
    through: int
    update: int


def passes(
    config: DiTConfig,
    sample: Sample,
    *,
    adapter: LoraConfig | None = None,
    layers: int | None = None,
    tread: TreadConfig | None = None,
) -> Passes:
    """Of a network that is trained whole, or of a frozen one with a trained adapter.

    Args:
        layers: only so many of the first blocks, without the final linears; None is the whole network.
        tread: routing of tokens.
    """
    base = forward_flops(
        config,
        sample.video,
        sample.audio,
        sample.text,
        frames=sample.frames,
        window=sample.window,
        layers=layers,
        tread=tread,
    )
    through = 2 * (base.products + base.ends) + 3 * base.attention
    if adapter is None:
        return Passes(base.total, through, 3 * base.total)
    own = adapter_flops(config, adapter, sample.video + sample.audio + sample.text, layers=layers)
    # With `heads` the adapter's own embedders and final linears take the place of the base's and are trained whole.
    ends = base.ends if adapter.heads else 0
    return Passes(base.total + own, through + 2 * own, through + 3 * own + ends)


def dmd2_flops(
    config: DiTConfig,
    sample: Sample,
    *,
    loras: Collection[str] = (),
    lora: LoraConfig | None = None,
    steps: int,
    updates: int,
    samples_per_rollout: int,
    student_updated: bool,
    null_text: int | None = None,
    discriminator: str | None = None,
    discriminator_layers: int = 0,
) -> int:
    """One iteration of DMD-2 (`recipes.dmd2`), of one sample.

    Args:
        loras: which of student and fake score are LoRAs of size `lora`; the others are networks trained whole.
        steps: forward passes of the student per rollout, K; a rollout serves `samples_per_rollout` updates.
        updates: of the fake score, R; student_updated: whether one update of the student follows them.
        null_text: tokens of the negative prompt, if the teacher is guided.
        discriminator: name of the network whose features the discriminator heads read, teacher or fake_score;
            None without a GAN loss; discriminator_layers: blocks up to the last feature. Each fake-score update takes
            three forward passes (real, generated and perturbed latents), the student update one forward and backward.
            The blocks behind the last feature are computed by the recipe, but not needed, and do not count.
    """
    sizes = {role: lora if role in loras else None for role in ("student", "fake_score", "teacher")}
    student, fake_score, teacher = (passes(config, sample, adapter=size) for size in sizes.values())
    rollouts = -(-(updates + student_updated) // samples_per_rollout)
    total = rollouts * steps * student.forward + updates * fake_score.update
    if student_updated:
        total += student.update + teacher.forward + fake_score.forward
        if null_text is not None:
            total += passes(config, replace(sample, text=null_text)).forward
    if discriminator is not None:
        features = passes(config, sample, adapter=sizes[discriminator], layers=discriminator_layers)
        total += 3 * updates * features.forward + student_updated * features.through
    return total


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a known GPU, or None."""
    if device.type != "cuda":
        return None
    known = recognise(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16
