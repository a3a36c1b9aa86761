"""FLOPs and memory traffic of the transformer, in inference and in training; no torch.

FLOPs are multiply-adds x 2 of matrix products and attention, nothing else. Those of training are model FLOPs, as their
utilisation wants them (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): activations that checkpointing computes
again do not count, nor do optimisers, codecs and the heads of a discriminator. A forward pass is F = P + S: P of products
with weights, S of attention; A is a forward pass through the products of a LoRA. Then
    all weights trained        3 F: forward, gradients of inputs, gradients of weights
    frozen, passed through     2 P + 3 S: no gradients of weights, but both factors of attention are activations
    frozen, with a LoRA        2 P + 3 S + 3 A
By convention the first product counts like all others, though nobody needs the gradients of a network's inputs.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from magihuman.models.config import DiTConfig, LoraConfig, PackConfig, TreadConfig

BF16, FP32 = 2, 4
"""Bytes of a number."""


# -- one forward pass


@dataclass(frozen=True)
class ForwardFlops:
    """Of all samples' tokens: the blocks' products, attention (scores and values), embedders and final linears."""

    products: int
    attention: int
    ends: int

    @property
    def total(self) -> int:
        return self.products + self.attention + self.ends


def forward_flops(
    config: DiTConfig,
    video: int,
    audio: int,
    text: int,
    *,
    frames: int = 0,
    window: int | None = None,
    layers: int | None = None,
    tread: TreadConfig | None = None,
) -> ForwardFlops:
    """FLOPs of one sample's forward pass. Each token runs through one expert.

    Example:
        >>> forward_flops(zoo.arch("15b"), video=3584, audio=126, text=340, frames=32).total / 1e12

    Args:
        video, audio, text: tokens of the sample.
        frames: latent frames; window: frames that a video token of a local layer attends to on each side. Without a
            window all layers attend to everything.
        layers: number of first blocks to count, with the embedders but without the final linears, for a feature of the
            last of them; None is the whole network.
        tread: routing in training, by which a span of layers processes a share of each modality's tokens.
    """
    hidden, whole = config.hidden_size, (video, audio, text)
    products = attention = 0
    for layer in range(config.num_layers if layers is None else layers):
        video, audio, text = whole
        if tread is not None and tread.start_layer <= layer <= tread.end_layer:
            video, audio, text = (min(n, max(1, round(tread.selection_rate * n))) for n in whole)
        length = video + audio + text
        columns = config.qkv_width + hidden + config.up_width(layer) + config.intermediate_size(layer)
        products += 2 * length * hidden * columns
        local = window is not None and layer in config.local_attn_layers
        pairs = attention_pairs(video, audio + text, frames, window if local else None)
        attention += 4 * pairs * hidden
    video, audio, text = whole
    channels = video * config.video_in_channels + audio * config.audio_in_channels
    heads = channels if layers is None else 0
    return ForwardFlops(products, attention, 2 * hidden * (channels + text * config.text_in_channels + heads))


def lora_flops(config: DiTConfig, lora: LoraConfig, tokens: int, *, layers: int | None = None) -> int:
    """FLOPs of the products x A' and (x A') B' that a LoRA adds to every block matrix in one forward pass.

    Its embedders and final linears replace those of the base network and are counted there.

    Args:
        tokens: of the sample, each of which runs through one expert; layers: as for `forward_flops`.
    """
    layers = config.num_layers if layers is None else layers
    return 2 * tokens * lora.rank * sum(lora_sides(config, layer) for layer in range(layers))


def lora_sides(config: DiTConfig, layer: int) -> int:
    """Rows + columns of all matrices of a block, one expert's: numbers of a LoRA of rank 1."""
    hidden, inner = config.hidden_size, config.intermediate_size(layer)
    return (hidden + config.qkv_width) + 2 * hidden + (hidden + config.up_width(layer)) + (inner + hidden)


def attention_pairs(video: int, others: int, frames: int = 0, window: int | None = None) -> int:
    """Pairs of query and key: all, or with a window those of SPEC 1.6.

    Args:
        others: audio and text tokens together, which attend to everything and are attended to by everything.
    """
    length = video + others
    if window is None or not frames:
        return length * length
    area = video // frames
    near = sum(min(frames, i + window + 1) - max(0, i - window) for i in range(frames))
    return near * area * area + video * others + others * length


# -- memory traffic of one forward pass


def product_bytes(config: DiTConfig, tokens: int) -> int:
    """Bytes that products and attention of one pass read and write in bf16, apart from weights."""
    total = 0
    for layer in range(config.num_layers):
        inner, up = config.intermediate_size(layer), config.up_width(layer)
        rotated = (config.num_heads + 2 * config.num_query_groups) * config.head_dim
        total += 5 * config.hidden_size + config.qkv_width + rotated + up + inner
    return BF16 * tokens * total


def pointwise_bytes(config: DiTConfig, tokens: int) -> int:
    """Bytes that norms, residual sums, rotation, gates and activations of one pass move, each group fused to one kernel.

    Twice per layer a residual sum with the norm after it: the change and the residual in, the residual (fp32) and its
    norm out; queries and keys in and out; the attention's result in and out; the up product in, the inner width out.
    """
    total = 0
    for layer in range(config.num_layers):
        heads = (config.num_heads + config.num_query_groups) * config.head_dim
        sums = 2 * (2 * BF16 + 2 * FP32) * config.hidden_size
        activation = BF16 * (config.up_width(layer) + config.intermediate_size(layer))
        total += sums + 2 * BF16 * heads + 2 * BF16 * config.hidden_size + activation
    return tokens * total


# -- training


@dataclass(frozen=True)
class SampleTokens:
    """Size of one sample, on which the FLOPs of its passes depend.

    Attributes:
        video, audio, text: tokens.
        frames: latent frames; window: frames that local layers attend to on each side, None for all.
    """

    video: int
    audio: int
    text: int
    frames: int = 0
    window: int | None = None


def samples(pack: PackConfig, video: Sequence[int], audio: int, text: Iterable[int]) -> list[SampleTokens]:
    """The samples of a batch.

    Args:
        video: shape of the latents, [...,T,h,w]; audio: latents of each sample; text: tokens of each.
    """
    tokens = prod(video[-3:]) // pack.patch_size**2
    window = pack.frame_receptive_field if pack.frame_receptive_field >= 0 else None
    return [SampleTokens(tokens, audio, words, video[-3], window) for words in text]


@dataclass(frozen=True)
class Passes:
    """FLOPs of one sample's passes through one network.

    Attributes:
        forward: without gradients; through: forward and backward to the input, nothing trained; update: forward and
            backward, with the gradients of the trained weights.
    """

    forward: int
    through: int
    update: int


def passes(
    config: DiTConfig,
    sample: SampleTokens,
    *,
    lora: LoraConfig | None = None,
    layers: int | None = None,
    tread: TreadConfig | None = None,
) -> Passes:
    """FLOPs of a network whose weights are all trained, or of a frozen one with a trained LoRA.

    Args:
        layers, tread: as for `forward_flops`.
    """
    tokens = sample.video, sample.audio, sample.text
    base = forward_flops(config, *tokens, frames=sample.frames, window=sample.window, layers=layers, tread=tread)
    through = 2 * (base.products + base.ends) + 3 * base.attention
    if lora is None:
        return Passes(base.total, through, 3 * base.total)
    own = lora_flops(config, lora, sum(tokens), layers=layers)
    # With `heads` the LoRA's own embedders and final linears replace the base's and are trained as full matrices.
    ends = base.ends if lora.heads else 0
    return Passes(base.total + own, through + 2 * own, through + 3 * own + ends)


def distillation_flops(
    config: DiTConfig,
    sample: SampleTokens,
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
    discriminator_updates: int | None = None,
) -> int:
    """FLOPs of one iteration with a student, a teacher and a fake score of the same architecture, of one sample.

    Args:
        loras: roles out of student, fake_score and teacher that are a LoRA of size `lora` on a frozen network; in the
            others all weights are trained.
        steps: forward passes of the student per rollout; a rollout serves `samples_per_rollout` updates.
        updates: of the fake score; student_updated: whether one update of the student follows them.
        null_text: tokens of the negative prompt, if the teacher is guided.
        discriminator: role of the network whose features the discriminator heads read, teacher or fake_score;
            None without a GAN loss; discriminator_layers: blocks up to the last feature. Each update of the heads takes
            three forward passes (real, generated and perturbed latents), that of the student one forward and backward.
            The blocks after the last feature are not computed.
        discriminator_updates: of the heads; None: one with each update of the fake score.
    """
    sizes = {role: lora if role in loras else None for role in ("student", "fake_score", "teacher")}
    student, fake_score, teacher = (passes(config, sample, lora=size) for size in sizes.values())
    rollouts = -(-(updates + student_updated) // samples_per_rollout)
    total = rollouts * steps * student.forward + updates * fake_score.update
    if student_updated:
        total += student.update + teacher.forward + fake_score.forward
        if null_text is not None:
            total += passes(config, replace(sample, text=null_text)).forward
    if discriminator is not None:
        features = passes(config, sample, lora=sizes[discriminator], layers=discriminator_layers)
        trained = updates if discriminator_updates is None else min(updates, discriminator_updates)
        total += 3 * trained * features.forward + student_updated * features.through
    return total
