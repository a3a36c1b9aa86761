"""The network that is timed, with random weights made on the device or of a checkpoint, and its error against the reference.

One network serves all stages of a clip.
"""

import copy
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inference.benchmark.budget import TRACE, StepTimeout
from inference.benchmark.components import reason_of
from inference.benchmark.roofline.cases import ClipCase, DenoisingStage
from inference.fast import prepare
from inference.fast.transformer import LONGEST_GRAPH, FastDenoiser
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.denoiser import Denoiser
from magihuman.models.tokens import Layout

LARGE = 2_000_000_000
"""Parameters above which one network is on the device at a time, and none on a CPU."""
LONGEST_FP32 = 20_000
"""Tokens up to which the fp32 reference is computed as well; a 1080p pass of it takes minutes."""
SEED = 0
Velocities = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Inputs of one pass of a stage: video [1,C,T,h,w], audio [1,A,Ca], text [S,Ct]."""

    video: Tensor
    audio: Tensor
    text: Tensor


def refuse_hopeless(case: ClipCase, device: torch.device) -> None:
    """Raises UserError where a CPU would have to hold a network for GPUs."""
    if device.type == "cpu" and case.stages[0].config.parameter_count() > LARGE:
        raise UserError(f"size={case.size} of {case.model} needs a GPU; on a CPU choose size=tiny or size=layer")


def dtype_for(case: ClipCase, device: torch.device) -> torch.dtype:
    """Of products and matrices: bf16 for the released sizes and on a GPU, else fp32."""
    return torch.bfloat16 if case.released or device.type == "cuda" else torch.float32


def build(case: ClipCase, device: torch.device, dtype: torch.dtype, checkpoint: str | None) -> tuple[Denoiser, str]:
    """The network of a clip's last stage, on the device, and a description of its weights.

    The other stage runs on the same weights (`view`): times do not depend on them, memory does.

    Args:
        checkpoint: instead of random weights.

    Raises:
        UserError: a checkpoint that is not of this case's shape.
    """
    stage = case.stages[-1]
    shared = ", the same for both stages" if len(case.stages) > 1 else ""
    kind = str(dtype).removeprefix("torch.")
    if checkpoint is not None:
        loaded = zoo.load(checkpoint, device, dtype)
        if loaded.config.model != case.stages[0].config:
            raise UserError(f"checkpoint={checkpoint} is not of the shape of {case.model}; leave checkpoint= out")
        return loaded.denoiser, f"{checkpoint}, {kind}{shared}"
    denoiser = random_network(stage, dtype, device)
    return denoiser.eval().requires_grad_(False), f"random, {kind}{shared}"


@torch.no_grad()
def random_network(stage: DenoisingStage, dtype: torch.dtype, device: torch.device) -> Denoiser:
    """Random weights on the device; the output heads are not zero, as they would be at initialisation."""
    made = zoo.build(stage.config, stage.pack, compute_dtype=dtype, linear_dtype=dtype, device=device, seed=SEED)
    generator = torch.Generator(device=device).manual_seed(SEED + 1)
    for head in (made.model.final_linear_video, made.model.final_linear_audio):
        nn.init.normal_(head.weight, std=head.in_features**-0.5, generator=generator)
    return made


def view(denoiser: Denoiser, stage: DenoisingStage) -> Denoiser:
    """The same network and weights as the given stage's: its coordinates, its windows or none."""
    pack = replace(stage.pack, frame_receptive_field=-1) if stage.window is None else stage.pack
    seen = _shallow(denoiser)
    seen.pack, seen._layouts = pack, {}
    seen.model.frame_receptive_field = pack.frame_receptive_field
    return seen


def in_fp32(denoiser: Denoiser) -> Denoiser:
    """The same weights, computed with in fp32 throughout; reference network only.

    Attention goes frame by frame, in memory that grows with a frame: torch's fused kernels of a GPU take no shared
    key heads in fp32, so that it would hold all scores instead, 70 GB of them for the 14,802 tokens of 540p.
    """
    seen = _shallow(denoiser)
    seen.model.compute_dtype = torch.float32
    seen.model.attention_backend = "windowed"
    return seen


def _shallow(denoiser: Denoiser) -> Any:
    """Another denoiser and model of the same parameters and parts, with attributes of their own."""
    seen: Any = copy.copy(denoiser)
    model: Any = copy.copy(denoiser.model)
    model._modules = dict(denoiser.model._modules)
    seen._modules = {**denoiser._modules, "model": model}
    return seen


def draw(stage: DenoisingStage, denoiser: Denoiser, device: torch.device, seed: int = SEED) -> Inputs:
    """Standard normal inputs of one pass, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    config = stage.config
    return Inputs(
        normal(1, denoiser.latent_channels, stage.frames, stage.height, stage.width),
        normal(1, stage.audio, config.audio_in_channels),
        normal(stage.text, config.text_in_channels),
    )


@torch.no_grad()
def one_pass(denoiser: Denoiser, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Velocities of video and audio."""
    return denoiser(inputs.video, inputs.audio, [inputs.text], _layout(denoiser, inputs))


def _layout(denoiser: Denoiser, inputs: Inputs) -> Layout:
    return denoiser.layout_for(inputs.video.shape, inputs.audio.shape[1], [len(inputs.text)], inputs.video.device)


def first_passes(
    denoiser: Denoiser, every: Iterable[Denoiser], inputs: Inputs
) -> tuple[tuple[Tensor, Tensor], dict[str, str]]:
    """Velocities of a first pass; of a second one where that is recorded as a CUDA graph.

    Options that fail here are given up in `every` view of the network: a row that names what it lacks is of use.

    Returns:
        and why options were given up, by option: the reason in the first line, the traceback in those below.

    Raises:
        Exception: of a pass that fails without compilation too, or for want of memory.
    """
    if not isinstance(denoiser, FastDenoiser):
        return one_pass(denoiser, inputs), {}
    reasons: dict[str, str] = {}

    def give_up(option: str, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))[-TRACE:]
        reasons[option] = f"{reason_of(error)}\n{trace}"
        for view in every:
            model: Any = view.model
            model.give_up(option)
            view.options = model.options

    try:
        velocities = one_pass(denoiser, inputs)
    except (Exception, StepTimeout) as error:  # compilers fail in many ways, and can take forever
        if isinstance(error, (torch.OutOfMemoryError, UserError)) or denoiser.options.compile == "off":
            raise
        give_up("compile", error)
        velocities = one_pass(denoiser, inputs)
    if denoiser.options.graphs and _layout(denoiser, inputs).length <= LONGEST_GRAPH:
        try:
            velocities = one_pass(denoiser, inputs)
        except Exception as error:
            give_up("graphs", error)
    return velocities, reasons


def facts(network: Denoiser) -> dict[str, Any]:
    """Options of a tier, and the attention kernels of all stages that have run; empty for the reference."""
    if not isinstance(network, FastDenoiser):
        return {"options": {}}
    model: Any = network.model
    return {"options": asdict(network.options), "attention_kernel": " and ".join(model.kernels())}


def kernel_of(denoiser: Denoiser, inputs: Inputs) -> dict[str, Any]:
    """The attention kernel of one stage's view, and why faster ones were passed over; nothing for the reference.

    Raises:
        UserError: the kernel named in the options fails at this stage's lengths.
    """
    if not isinstance(denoiser, FastDenoiser):
        return {}
    model: Any = denoiser.model
    plan = model.plan(_layout(denoiser, inputs))
    kernel = "the reference's" if plan.kernel is None else plan.kernel.name
    return {"attention_kernel": kernel, "passed_over": list(plan.passed_over)}


def named(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names from `a,b`.

    Raises:
        UserError: an unknown name.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{option}={name} is unknown; choose from {', '.join(known)}")
    return names


def options_from(text: str | None) -> dict[str, Any]:
    """Changes of a tier from `compile=static,graphs=false`.

    Raises:
        UserError: not of this form.
    """
    changes: dict[str, Any] = {}
    for part in (text or "").split(","):
        key, equals, value = part.strip().partition("=")
        if part.strip() and not equals:
            raise UserError(f"options={text}: {part!r} is not of the form name=value")
        if equals:
            # Words such as "off" are truth values to YAML and names to the options.
            changes[key] = value == "true" if value in ("true", "false") else value
    return changes


def faster(denoiser: Denoiser, tier: str, device: torch.device, release: bool, changes: Mapping[str, Any]) -> Denoiser:
    """`inference.fast.prepare`; a clip's stages share the result (`view`).

    Raises:
        UserError: as `prepare`.
    """
    with torch.no_grad():
        return prepare(denoiser, tier, device=device, release=release, **changes)


# -- distance from the reference


def affordable(stage: DenoisingStage) -> bool:
    """Whether one pass of a stage in fp32 takes seconds on a GPU."""
    return stage.tokens.total <= LONGEST_FP32


def distance(found: Velocities, wanted: Velocities) -> dict[str, float]:
    """Relative L2 and largest absolute distance of video and audio velocities."""
    values = {}
    for name, a, b in zip(("video", "audio"), found, wanted, strict=True):
        a, b = a.float().cpu(), b.float().cpu()
        values[f"{name}_relative_l2"] = float(f"{float((a - b).norm() / b.norm()):.4g}")
        values[f"{name}_max_abs"] = float(f"{float((a - b).abs().max()):.4g}")
    return values


class ReferenceOutput:
    """Velocities of the reference for a stage's inputs, kept on the CPU so that the reference may give up its layers.

    Args:
        reference: the network as written, in its dtype.
        exact: compute it in fp32 too; `affordable` says when that takes seconds and not minutes.
    """

    def __init__(self, reference: Denoiser, inputs: Inputs, exact: bool) -> None:
        self.dtype = str(reference.model.compute_dtype).removeprefix("torch.")
        self.why_not: dict[str, str] = {}
        self.own = self._computed(self.dtype, reference, inputs)
        self.exact: Velocities | None = None
        if self.dtype == "float32":
            self.exact = self.own
        elif exact:
            self.exact = self._computed("float32", in_fp32(reference), inputs)
        else:
            self.why_not["float32"] = "not computed: fp32 takes too long at this size"

    def _computed(self, dtype: str, reference: Denoiser, inputs: Inputs) -> Velocities | None:
        """A pass of the reference, or None where it fails: the times of faster networks are still of use."""
        try:
            video, audio = one_pass(reference, inputs)
            return video.float().cpu(), audio.float().cpu()
        except Exception as error:  # its windows are compiled, and compilers fail in many ways
            self.why_not[dtype] = f"the reference could not be computed: {reason_of(error)}"
            return None

    def errors(self, found: Velocities) -> dict[str, Any]:
        """Of a faster network's velocities: against the reference in its dtype, and against it in fp32 with the
        reference's own distance from that.

        Raises:
            ValueError: velocities that are not finite.
        """
        if not all(bool(torch.isfinite(part).all()) for part in found):
            raise ValueError("the network's velocities are not finite")
        values = {f"against_{self.dtype}_reference": self._distance(found, self.dtype, self.own)}
        if self.dtype != "float32":
            values["against_float32_reference"] = self._distance(found, "float32", self.exact)
            if self.own is not None and self.exact is not None:
                values["reference_against_float32"] = distance(self.own, self.exact)
        return values

    def _distance(self, found: Velocities, dtype: str, wanted: Velocities | None) -> dict[str, Any]:
        if wanted is None:
            return {"status": "n/a", "reason": self.why_not[dtype]}
        return distance(found, wanted)
