"""How far a faster network is from the reference, on the same inputs and weights. Every time is shown beside it."""

from typing import Any

import torch
from torch import Tensor

from inference.benchmark.bench_networks import Inputs, in_fp32, one_pass
from inference.benchmark.components import reason_of
from inference.benchmark.roofline.cases import Stage
from magihuman.models.denoiser import Denoiser

LONGEST_FP32 = 20_000
"""Tokens up to which the fp32 reference is computed beside the bf16 one; a 1080p pass of it takes minutes."""

Velocities = tuple[Tensor, Tensor]


def affordable(stage: Stage) -> bool:
    """Whether one pass of a stage in fp32 takes seconds on a GPU."""
    return stage.tokens.total <= LONGEST_FP32


def distance(found: Velocities, wanted: Velocities) -> dict[str, float]:
    """Relative L2 and largest absolute distance of video and audio velocities."""
    values = {}
    for name, a, b in zip(("video", "audio"), found, wanted, strict=True):
        a, b = a.float().cpu(), b.float().cpu()
        values[f"{name}_relative_l2"] = _rounded(float((a - b).norm() / b.norm()))
        values[f"{name}_max_abs"] = _rounded(float((a - b).abs().max()))
    return values


class Truth:
    """What the reference makes of a stage's inputs, kept on the CPU so that the reference may give up its layers.

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
        """A pass of the reference, or None: the times of what is compared with it are worth having all the same."""
        try:
            return _on_cpu(one_pass(reference, inputs))
        except Exception as error:  # its windows are compiled, and compilers fail in many ways
            self.why_not[dtype] = f"the reference could not be computed: {reason_of(error)}"
            return None

    def errors(self, found: Velocities) -> dict[str, Any]:
        """Of a faster network's velocities: against the reference in its dtype, and against it in fp32 with the
        reference's own distance from that beside it.

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


def _on_cpu(velocities: Velocities) -> Velocities:
    return velocities[0].float().cpu(), velocities[1].float().cpu()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
