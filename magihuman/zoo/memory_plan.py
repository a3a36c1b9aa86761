"""Memory of inference and training on a GPU, computed before anything is loaded (`zoo plan`, `zoo peaks`).

    request = ClipRequest(zoo.arch("15b"), 2, (4, 16, 16), True, frames=125, audio=126, height=256, width=448)
    peak(request) / GB                        # bytes at the worst moment of the run
    per_gpu(TrainingStep(config, tokens), "dmd2", gpus=8, sharing="lora")

All numbers come from the formulas of `magihuman.zoo.footprint`; none is measured. Gigabytes are decimal.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal, get_args

from magihuman.codecs import costs
from magihuman.codecs.bundle import bundle_spec
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
from magihuman.errors import UserError
from magihuman.models.config import LORAS, Checkpointing, DiTConfig, LoraConfig
from magihuman.models.flops import SampleTokens, forward_flops, lora_flops, passes, pointwise_bytes, product_bytes
from magihuman.models.gpu_specs import Gpu
from magihuman.zoo import footprint
from magihuman.zoo.footprint import ADAM, BF16, FORMS, FP32, TokenCounts

GB = 10**9
RESERVE = int(1.5 * GB)
"""Assumed, not computed: the CUDA context, workspaces of kernels, gaps between allocations."""

Memory = Literal["fast", "balanced", "low"]
MEMORY: tuple[Memory, ...] = get_args(Memory)
SIZES = {name: (*base, larger) for name, (base, larger) in bundle_spec("released").resolutions.items()}
LATENT_COPIES = 12  # latents, noise, velocities, solver state
TURBO_FRAMES, WAN_FRAMES = 28, 4  # decoded at a time
CLUSTERS = (1, 8, 16, 32, 64)

# -- inference --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipRequest:
    """A clip, or several in a batch, whose memory is planned.

    Attributes:
        base: network of the base stage; second: of super-resolution, or None.
        patch, stride: of packing and codec; released: codecs and text encoder are the published ones.
        frames, audio: frames and audio latents; height, width: pixels of the base stage; enlarged: of super-resolution.
        text: tokens of a prompt; batch: clips at once; guided: with an unconditional branch, in the same batch where
            cfg_passes is 1; sr_guided: also in super-resolution.
        turbo: decode with the published Turbo decoder; student: with a causal decoder; tile: pixels per side of its tiles.
        compute: bytes of the compute dtype; memory, weights: as infer's settings.
    """

    base: DiTConfig
    patch: int
    stride: tuple[int, int, int]
    released: bool
    frames: int
    audio: int
    height: int
    width: int
    text: int = costs.USUAL_TEXT
    batch: int = 1
    guided: bool = False
    cfg_passes: int = 1
    second: DiTConfig | None = None
    enlarged: tuple[int, int] = (0, 0)
    sr_guided: bool = False
    turbo: bool = False
    student: CausalDecoderConfig | None = None
    tile: int | None = None
    compute: int = BF16
    memory: str = "fast"
    weights: str | None = None

    @property
    def form(self) -> str:
        """Storage format of the block matrices."""
        return self.weights or ("bf16" if self.compute == BF16 else "fp32")

    def tokens(self, height: int, width: int) -> TokenCounts:
        """TokenCounts of one clip."""
        time, rows, columns = self.stride
        area = (height // rows // self.patch) * (width // columns // self.patch)
        return TokenCounts(((self.frames - 1) // time + 1) * area, self.audio, self.text)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage: weights by network, and activations."""

    stage: str
    weights: dict[str, int]
    activations: int

    @property
    def alone(self) -> int:
        return sum(self.weights.values()) + self.activations


def stage_memory(request: ClipRequest) -> list[StageMemory]:
    """Memory of every stage, in order of execution."""
    size = request.enlarged if request.second else (request.height, request.width)
    pixels = size[0] * size[1]
    if request.released:
        text = {"text encoder": costs.text_encoder_bytes(request.memory == "low")}
        text_work = costs.text_activation_bytes(min(request.text, costs.TEXT_LIMIT))
        video = costs.WAN_ENCODER
        decoder = costs.TURBO_DECODER if request.turbo else costs.WAN_DECODER
        chunk = TURBO_FRAMES if request.turbo else WAN_FRAMES
        if request.student is not None:
            decoder = costs.causal_decoder_memory(request.student, *size, request.tile)
            chunk = request.student.chunk(pixels // prod(request.stride[1:])) * request.stride[0]
        audio, audio_decoder = costs.OOBLECK_ENCODER, costs.OOBLECK_DECODER
    else:
        text, text_work, chunk = {}, 0, request.frames
        video = decoder = costs.TINY_VIDEO
        audio = audio_decoder = costs.TINY_AUDIO
    audio_codec = {"audio codec": audio.weights}
    light = request.turbo or request.student is not None
    decoder_name = "Turbo decoder" if light else "video codec"
    # Tiles of the Wan decoder all keep their cache, whose size was not counted.
    area = min(pixels, request.tile**2) if request.tile and light else pixels
    # Four fp32 copies of a chunk during the conversion to 8-bit frames.
    decode_work = decoder.activations(area) + footprint.clip_bytes(chunk, *size, 4)
    return [
        StageMemory("text", text, text_work),
        StageMemory(
            "condition",
            {"video codec": video.weights, **audio_codec},
            max(video.activations(pixels), audio.activations(request.audio)),
        ),
        _network("sample", request, request.base, (request.height, request.width), request.guided),
        *([_network("refine", request, request.second, request.enlarged, request.sr_guided)] if request.second else []),
        StageMemory(
            "decode",
            {decoder_name: decoder.weights, **audio_codec},
            max(decode_work, audio_decoder.activations(request.audio)),
        ),
    ]


def _network(stage: str, request: ClipRequest, config: DiTConfig, size: tuple[int, int], guided: bool) -> StageMemory:
    branches = 2 if guided and request.cfg_passes == 1 else 1
    one = request.tokens(*size)
    tokens = one.times(request.batch * branches)
    latents = FP32 * (one.video * config.video_in_channels + one.audio * config.audio_in_channels)
    work = (
        footprint.forward_bytes(config, tokens, request.compute)
        + footprint.restored_bytes(config, request.form, request.compute)
        + LATENT_COPIES * request.batch * latents
        + FP32 * tokens.text * config.text_in_channels  # features of the prompts; those of other clips are on the CPU
    )
    weights = footprint.streamed_bytes if request.memory == "low" else footprint.weight_bytes
    return StageMemory(stage, {f"{stage} network": weights(config, request.form)}, work)


def peak(request: ClipRequest) -> int:
    """Peak bytes of the run, with the reserve."""
    stages = stage_memory(request)
    if request.memory != "fast":
        return RESERVE + max(need.alone for need in stages)
    resident: dict[str, int] = {}
    for need in stages:
        resident |= need.weights
    return RESERVE + sum(resident.values()) + max(need.activations for need in stages)


def remedies(request: ClipRequest, available: int) -> list[tuple[str, int]]:
    """Settings that make a request fit, lossless ones first: (settings, bytes then).

    Where memory= and weights= are not enough: memory=low with one guidance branch at a time, one clip at a time, and
    shorter clips.
    """
    found: list[tuple[str, int]] = []
    for form in (None, *FORMS[1:]):
        for memory in MEMORY:
            other = replace(request, memory=memory, weights=form or request.weights)
            changes = [f"memory={memory}"] if memory != request.memory else []
            changes += [f"weights={form}"] if form and form != request.weights else []
            if changes and peak(other) <= available:
                found.append((" ".join(changes), peak(other)))
                break  # a mode that saves more is slower and not needed
    if found:
        return found[:3]
    low = replace(request, memory="low")
    for settings, other in (
        ("cfg_passes=2", replace(low, cfg_passes=2)),
        ("batch=1", replace(low, batch=1)),
        ("cfg_passes=2 batch=1", replace(low, cfg_passes=2, batch=1)),
    ):
        if other != low and peak(other) <= available:
            return [(f"memory=low {settings}", peak(other))]
    smallest = replace(low, cfg_passes=2, batch=1)
    for frames in range(request.frames - 25, 0, -25):
        other = replace(smallest, frames=frames, audio=min(frames, request.audio))
        if peak(other) <= available:
            seconds = (frames - 1) // 25
            return [(f"memory=low cfg_passes=2 batch=1 seconds={seconds}", peak(other))] if seconds else []
    return []


def require_memory(request: ClipRequest, available: int) -> None:
    """Refuse a request that does not fit.

    Args:
        available: bytes of the GPU.

    Raises:
        UserError: the computed bytes and what to change.
    """
    needed = peak(request)
    if needed <= available:
        return
    ways = [f"{settings} ({_gb(size)})" for settings, size in remedies(request, available)]
    worst = max(stage_memory(request), key=lambda need: need.alone if request.memory != "fast" else need.activations)
    raise UserError(
        f"this needs {_gb(needed)} of GPU memory (computed; the stage {worst.stage} decides), and the GPU has "
        f"{_gb(available)}; {'use ' + ', or '.join(ways) if ways else _last_resort(request)}"
    )


def _last_resort(request: ClipRequest) -> str:
    if request.second or request.height * request.width > 256 * 448:
        return "no setting helps at this size; choose a smaller resolution or a larger GPU"
    return "no setting helps; use device=cpu or a larger GPU"


def inference_report(request: ClipRequest, title: str, available: int) -> str:
    """Table of the stages, peak of every mode, and what to change if it does not fit."""
    lines = [f"{title}; every number is computed, none measured"]
    lines.append(f"{'stage':<28}{'weights':>10}{'other':>10}{'alone':>10}  GB")
    for need in stage_memory(request):
        name = need.stage
        if need.stage in ("sample", "refine"):
            size = (request.height, request.width) if need.stage == "sample" else request.enlarged
            name += f" {size[1]}x{size[0]}, {request.tokens(*size).total} tokens"
        cells = (sum(need.weights.values()), need.activations, need.alone)
        lines.append(f"{name:<28}" + "".join(f"{cell / GB:>10.2f}" for cell in cells))
    lines.append(f"{'assumed for CUDA itself':<48}{RESERVE / GB:>10.2f}")
    lines.append("peak by memory= (columns) and weights= (rows)")
    lines.append(f"{'':<28}" + "".join(f"{memory:>10}" for memory in MEMORY) + "  GB")
    for form in (None, *FORMS[1:]):
        peaks = [peak(replace(request, memory=memory, weights=form)) for memory in MEMORY]
        name = form or replace(request, weights=None).form
        lines.append(f"  {name:<26}" + "".join(f"{cell / GB:>10.2f}" for cell in peaks))
    needed = peak(request)
    chosen = f"memory={request.memory}" + (f" weights={request.weights}" if request.weights else "")
    if needed <= available:
        lines.append(f"fits: {chosen} needs {_gb(needed)} of {_gb(available)}")
    else:
        lines.append(f"does not fit: {chosen} needs {_gb(needed)}, there are {_gb(available)}")
        ways = remedies(request, available)
        lines += [f"  {settings} needs {_gb(size)}" for settings, size in ways]
        if not ways:
            lines.append(f"  {_last_resort(request)}")
    return "\n".join(lines)


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingStep:
    """A training step.

    Attributes:
        tokens: of the samples of one GPU in a micro-batch, or of one group of GPUs that share them.
        compute: bytes of the compute dtype.
        checkpointing: see `magihuman.models.config.Checkpointing`.
        ema: device of the EMA weights, "gpu" or "cpu"; rank: of the LoRAs.
        optim: "adamw", or "adamw8bit" for trained networks; LoRAs are counted with fp32 moments.
        context_parallel: GPUs that share the tokens (`magihuman.context_parallel`).
        gan: dmd2: with its GAN loss on features of the teacher.
        teacher: sr: steps of a frozen teacher of the same shape (`recipe.teacher`), 0 for none.
    """

    config: DiTConfig
    tokens: TokenCounts
    compute: int = BF16
    checkpointing: Checkpointing = True
    ema: str = "gpu"
    rank: int = 128
    optim: str = "adamw"
    context_parallel: int = 1
    gan: bool = False
    teacher: int = 0

    @property
    def trained_bytes(self) -> int:
        """fp32 master weights, fp32 gradients and moments of a network that is trained whole."""
        shapes = [shape for _, shape, _ in self.config.tensors()]
        saved = sum(footprint.moment_bytes(shape) - footprint.moment_bytes(shape, self.optim) for shape in shapes)
        return ADAM * self.config.parameter_count() - saved


def state_bytes(step: TrainingStep, task: str, sharing: str = "full") -> int:
    """Weights, gradients, optimiser state and EMA of all GPUs together, with fp32 master weights and Adam; of one replica
    (fsdp2 keeps one per node; strategy.replicas=1 shards over all GPUs).

    Args:
        task: "pretrain", "sr", "lora" or "dmd2"; sharing: of the latter, a key of LORAS.
    """
    count, lora = step.config.parameter_count(), footprint.lora_count(step.config, step.rank)
    ema = FP32 if step.ema == "gpu" else 0
    if task in ("pretrain", "sr"):
        return step.trained_bytes + ema * count + (step.compute * count if step.teacher else 0)
    if task == "lora":  # a frozen base, the trained LoRA, and its EMA
        return BF16 * count + (ADAM + ema) * lora
    roles = {role: role in LORAS[sharing] for role in ("student", "fake_score")}
    trained = sum(ADAM * lora if is_lora else step.trained_bytes for is_lora in roles.values())
    return BF16 * count + trained + ema * (lora if roles["student"] else count)  # BF16: the teacher


def only_loras(task: str, sharing: str) -> bool:
    """Whether nothing but LoRAs is trained; the frozen base is then stored in the compute dtype."""
    return task == "lora" or (task == "dmd2" and sharing == "lora")


def gathered_bytes(step: TrainingStep, task: str, gpus: int, sharing: str = "full") -> int:
    """In addition to its shards: weights of the unit in work and the next one, and one unit's gradient while it is averaged.

    Units are the halves of a block, gathered in the compute dtype, and in fp32 whole blocks (`magihuman.training.parallel`);
    gradients are averaged in fp32.
    """
    if gpus == 1:
        return 0
    if step.compute == FP32:
        return 3 * max(footprint.layer_bytes(step.config, "fp32"))
    unit = max(footprint.half_counts(step.config))
    return 2 * BF16 * unit + (0 if only_loras(task, sharing) else (BF16 + FP32) * unit)


def gan_bytes(step: TrainingStep, own: TokenCounts) -> int:
    """Activations of the pass through the teacher to the last of the default taps (`magihuman.distill.discriminator`), which
    are kept together with the student's until the backward pass."""
    layers = range(3 * step.config.num_layers // 4 + 1)
    if step.checkpointing:
        return len(layers) * footprint.kept_bytes(step.config, own, step.compute, step.checkpointing)
    return sum(footprint.saved_bytes(step.config, i, own, step.compute) for i in layers)


def work_bytes(step: TrainingStep, task: str, sharing: str = "full", gpus: int = 1) -> int:
    """Activations, and copies of fp32 master weights in the compute dtype; sharded ones are gathered in it instead."""
    own = step.tokens.share(step.context_parallel)
    activations = footprint.training_bytes(step.config, own, step.compute, step.checkpointing)
    if step.context_parallel > 1:
        activations += footprint.exchange_bytes(step.config, own, step.compute)
    if task == "dmd2" and step.gan:
        activations += gan_bytes(step, own)
    if only_loras(task, sharing) or gpus > 1:
        return activations
    return activations + footprint.cast_bytes(step.config, step.compute, step.checkpointing)


def per_gpu(step: TrainingStep, task: str, gpus: int, sharing: str = "full") -> int:
    """Peak of one GPU when the state is sharded over all of them."""
    work = work_bytes(step, task, sharing, gpus)
    return state_bytes(step, task, sharing) // gpus + gathered_bytes(step, task, gpus, sharing) + work + RESERVE


UTILISATION = 0.45
"""Assumed, not measured: share of a GPU's bf16 peak that a training step reaches, recomputed products included."""


def predict_step(step: TrainingStep, task: str, clip: SampleTokens, batch: int, gpus: int, device: Gpu) -> float:
    """Predicted seconds of an optimiser step in bf16, without input, launches, communication and validation.

    The larger of two times: products and attention at `UTILISATION`, and the traffic of weights, activations and
    optimiser state at the memory's full rate.

    Args:
        task: "pretrain", "sr" or "lora"; clip: tokens of each of the `batch` clips of a GPU, or of a group that shares them.
    """
    config, tokens = step.config, clip.video + clip.audio + clip.text
    lora = LoraConfig(step.rank) if task == "lora" else None
    batch_share = batch / step.context_parallel
    base = forward_flops(config, clip.video, clip.audio, clip.text, frames=clip.frames, window=clip.window)
    again = 0 if not step.checkpointing else base.products + (base.attention if step.checkpointing is True else 0)
    again += lora_flops(config, lora, tokens) if lora and step.checkpointing else 0
    again += step.teacher * base.total
    flops = batch_share * (passes(config, clip, lora=lora).update + again)
    trained = config.parameter_count() if lora is None else footprint.lora_count(config, step.rank)
    one_pass = footprint.weight_bytes(config, "bf16") + batch_share * (
        product_bytes(config, tokens) + pointwise_bytes(config, tokens)
    )
    moved = ((4 if step.checkpointing else 3) + step.teacher) * one_pass + 2 * ADAM * trained // gpus
    return max(flops / (UTILISATION * device.bf16), moved / device.bandwidth)


def time_report(seconds: float, steps: int, clips: int, gpus: int, device: Gpu) -> str:
    """Step time and GPU-hours of steps of that many clips, labelled as predicted."""
    hours = steps * seconds / 3600
    return (
        f"PREDICTED, not measured: {seconds:.3g} s per step on {device.name} at an assumed {UTILISATION:.0%} of its "
        f"{device.bf16 / 1e12:.0f} TFLOP/s, without input, launches and communication\n"
        f"PREDICTED, {steps} steps of {clips} clips: {hours:.3g} h, {gpus * hours:.3g} GPU-hours on {gpus} GPU"
    )


def training_report(step: TrainingStep, task: str, gpus: int, title: str, available: int) -> str:
    """Memory by kind, a table over cluster sizes, and what to change if it does not fit."""
    ways = list(LORAS) if task == "dmd2" else ["full"]
    lines = [f"{title}; every number is computed, none measured"]
    largest = max(work_bytes(step, task, way, gpus) for way in ways)
    gathered = max(gathered_bytes(step, task, max(gpus, 2), way) for way in ways)
    lines.append(f"{'activations':<28}{largest / GB:>10.2f}  GB per GPU")
    lines.append(f"{'gathered weights':<28}{gathered / GB:>10.2f}  with several GPUs")
    lines.append(f"{'assumed for CUDA itself':<28}{RESERVE / GB:>10.2f}")
    clusters = sorted(n for n in {*CLUSTERS, gpus} if n % step.context_parallel == 0)
    header = "".join(f"{f'{n} GPU':>10}" for n in clusters)
    for name, peak in (("state (sharded)", False), ("peak", True)):
        lines.append(f"{name:<18}{'total':>10}{header}  GB per GPU")
        for way in ways:
            total = state_bytes(step, task, way)
            row = [per_gpu(step, task, n, way) if peak else total // n for n in clusters]
            label = way if task == "dmd2" else task
            cells = "".join(f"{cell / GB:>10.1f}" for cell in row)
            lines.append(f"  {label:<16}{total / GB:>10.1f}{cells}")
    for way in ways:
        label = f"{gpus} GPU" + (f", sharing {way}" if task == "dmd2" else "")
        needed = per_gpu(step, task, gpus, way)
        if needed <= available:
            lines.append(f"fits: {label} needs {needed / GB:.1f} GB of {available / GB:.1f} GB")
        else:
            lines.append(f"does not fit: {label} needs {needed / GB:.1f} GB, there are {available / GB:.1f} GB")
            lines.append(f"  {_advice(step, task, gpus, way, available)}")
    return "\n".join(lines)


def _advice(step: TrainingStep, task: str, gpus: int, sharing: str, available: int) -> str:
    if not step.checkpointing:
        return "recompute blocks in the backward pass: checkpointing=true"
    if step.checkpointing is not True and per_gpu(replace(step, checkpointing=True), task, gpus, sharing) <= available:
        return "recompute attention in the backward pass as well: checkpointing=true"
    if step.ema == "gpu" and per_gpu(replace(step, ema="cpu"), task, gpus, sharing) <= available:
        return "keep the EMA weights on the CPU: ema=cpu"
    for n in (2, 4, 8):
        split = replace(step, context_parallel=n)
        fits = n > step.context_parallel and per_gpu(split, task, gpus, sharing) <= available
        if fits and gpus % n == 0 and step.config.num_query_groups % n == 0:
            return f"share the tokens of a clip between {n} GPUs: context_parallel={n}"
    small = per_gpu(replace(step, optim="adamw8bit"), task, gpus, sharing) <= available
    or_else = ", or store the optimiser's moments in 8 bits: optim=adamw8bit" if small else ""
    for n in (2, 4, 8, 16, 32, 64, 128, 256):
        if n > gpus and per_gpu(step, task, n, sharing) <= available:
            return f"shard over {n} GPUs: gpus={n}" + (" (strategy.replicas=1)" if n > 8 else "") + or_else
    return "the activations alone are too large: fewer clips per GPU, or smaller ones"


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
