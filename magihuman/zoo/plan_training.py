"""What each GPU of a training run has to hold; see `magihuman.zoo.plan`."""

from dataclasses import dataclass

from magihuman.models.config import Checkpointing, DiTConfig
from magihuman.zoo import footprint
from magihuman.zoo.footprint import ADAM, BF16, FP32, Tokens
from magihuman.zoo.plan import GB, RESERVE

CLUSTERS = (1, 8, 16, 32, 64)

WEIGHT_SHARING = ("full", "lora_fake_score", "lora")
"""Weight sharing of DMD-2's networks: none; the fake score is a LoRA on the teacher; student and fake score are."""


@dataclass(frozen=True)
class Run:
    """A training step.

    Attributes:
        tokens: of the samples that one GPU sees at once.
        compute: bytes of the compute dtype.
        checkpointing: what of the blocks is recomputed in the backward pass: nothing (False), everything, or all but
            "attention".
        ema: "gpu" or "cpu"; rank: of adapters.
    """

    config: DiTConfig
    tokens: Tokens
    compute: int = BF16
    checkpointing: Checkpointing = True
    ema: str = "gpu"
    rank: int = 128


def state_bytes(run: Run, task: str, sharing: str = "full") -> int:
    """Weights, gradients, optimiser and average of all GPUs together, by fp32 masters and Adam.

    Args:
        task: "pretrain", "lora" or "dmd2"; sharing: of the latter, one of WEIGHT_SHARING.
    """
    count, lora = run.config.parameter_count(), footprint.lora_count(run.config, run.rank)
    ema = FP32 if run.ema == "gpu" else 0
    if task == "pretrain":
        return (ADAM + ema) * count
    if task == "lora":  # a frozen base, the trained adapter, and its average as another one
        return BF16 * count + (ADAM + ema) * lora
    return {
        "full": (2 * ADAM + BF16 + ema) * count,
        "lora_fake_score": (ADAM + BF16 + ema) * count + ADAM * lora,
        "lora": BF16 * count + (2 * ADAM + ema) * lora,
    }[sharing]


def gathered_bytes(run: Run, gpus: int) -> int:
    """Beside its shards: this and the next block's weights in fp32, and one block's gradient to be reduced."""
    if gpus == 1:
        return 0
    return 3 * max(footprint.layer_bytes(run.config, "fp32"))


def work_bytes(run: Run, task: str, sharing: str = "full") -> int:
    """Activations, and copies of fp32 master weights in the compute dtype.

    Where adapters alone are trained there are no master weights: the frozen base is stored in the compute dtype.
    """
    activations = footprint.training_bytes(run.config, run.tokens, run.compute, run.checkpointing)
    if task == "lora" or (task == "dmd2" and sharing == "lora"):
        return activations
    return activations + footprint.cast_bytes(run.config, run.compute, run.checkpointing)


def per_gpu(run: Run, task: str, gpus: int, sharing: str = "full") -> int:
    """Peak of one GPU when the state is sharded over all of them."""
    work = work_bytes(run, task, sharing)
    return state_bytes(run, task, sharing) // gpus + gathered_bytes(run, gpus) + work + RESERVE


def report(run: Run, task: str, gpus: int, title: str, available: int) -> str:
    """The parts, a table over cluster sizes, and what to change when it does not fit."""
    ways = WEIGHT_SHARING if task == "dmd2" else ("full",)
    lines = [f"{title}; every number is computed, none measured"]
    largest = max(work_bytes(run, task, way) for way in ways)
    lines.append(f"{'activations':<28}{largest / GB:>10.2f}  GB per GPU")
    lines.append(f"{'gathered blocks':<28}{gathered_bytes(run, max(gpus, 2)) / GB:>10.2f}  with several GPUs")
    lines.append(f"{'assumed for CUDA itself':<28}{RESERVE / GB:>10.2f}")
    clusters = sorted({*CLUSTERS, gpus})
    header = "".join(f"{f'{n} GPU':>10}" for n in clusters)
    for name, peak in (("state (sharded)", False), ("peak", True)):
        lines.append(f"{name:<18}{'total':>10}{header}  GB per GPU")
        for way in ways:
            total = state_bytes(run, task, way)
            row = [per_gpu(run, task, n, way) if peak else total // n for n in clusters]
            label = way if task == "dmd2" else task
            cells = "".join(f"{cell / GB:>10.1f}" for cell in row)
            lines.append(f"  {label:<16}{total / GB:>10.1f}{cells}")
    for way in ways:
        label = f"{gpus} GPU" + (f", sharing {way}" if task == "dmd2" else "")
        needed = per_gpu(run, task, gpus, way)
        if needed <= available:
            lines.append(f"fits: {label} needs {needed / GB:.1f} GB of {available / GB:.1f} GB")
        else:
            lines.append(
                f"does not fit: {label} needs {needed / GB:.1f} GB, there are {available / GB:.1f} GB"
            )
            lines.append(f"  {_advice(run, task, gpus, way, available)}")
    return "\n".join(lines)


def _advice(run: Run, task: str, gpus: int, sharing: str, available: int) -> str:
    from dataclasses import replace

    if not run.checkpointing:
        return "recompute blocks in the backward pass: checkpointing=true"
    if (
        run.checkpointing is not True
        and per_gpu(replace(run, checkpointing=True), task, gpus, sharing) <= available
    ):
        return "recompute attention in the backward pass as well: checkpointing=true"
    if run.ema == "gpu" and per_gpu(replace(run, ema="cpu"), task, gpus, sharing) <= available:
        return "keep the average on the CPU: ema=cpu"
    for n in (2, 4, 8, 16, 32, 64, 128, 256):
        if n > gpus and per_gpu(run, task, n, sharing) <= available:
            return f"shard over {n} GPUs: gpus={n}"
    return "the activations alone are too large: fewer clips per GPU, or smaller ones"
