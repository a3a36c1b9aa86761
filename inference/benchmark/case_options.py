"""Settings of the commands that are about one clip, from which command line and help derive; without torch."""

from dataclasses import dataclass

from inference.benchmark.roofline.cases import ClipCase, make
from magihuman.cli import option
from magihuman.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """A clip, see `make`."""

    size: str = option("256p, 540p, 1080p, tiny (the puppet world) or layer (one full-width layer)", "tiny")
    model: str | None = option("an architecture or a checkpoint instead of 15b (tiny where the size is tiny)", None)
    steps: int | None = option("of the base stage", None)
    sr_steps: int | None = option("of super-resolution", None)
    seconds: float | None = option("length of the clip", None)
    text: int | None = option("tokens of the prompt", None)
    guided: bool = option("the base stage with guidance, two passes a step", False)

    def case(self, size: str) -> ClipCase:
        """The clip of that size. Raises UserError for settings that cannot be."""
        return make(size, self.steps, self.sr_steps, self.seconds, self.text, self.guided, self.model)


@dataclass(frozen=True, kw_only=True)
class StagesOptions(CaseOptions):
    """Tokens, FLOPs, bytes and least time of every stage."""

    size: str = option("256p, 540p, 1080p, tiny, layer, or all of the first three", "all")
    device: str = option("whose limits: h100, h100-pcie, h200, b200, a100, l40s, 4090, 5090", "h100")
    tflops: float | None = option("measured peak of bf16 products instead of the data sheet's, in TFLOP/s", None)
    bandwidth: float | None = option("measured bandwidth of the memory instead of the data sheet's, in TB/s", None)
    decoder: str = option("turbo, wan, or a student of configs/decoder such as a and b", "turbo")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(CaseOptions):
    """Measure every stage of a clip and write the times to a new file in inference/results/latency.

    Raises:
        UserError: a number that cannot be.
    """

    tier: str = option(
        "of `inference.fast`, or several, such as reference,exact,fast; small networks take turns", "fast"
    )
    decoder: str = option(
        "turbo, wan, or a student of configs/decoder; auto is turbo, and the codecs' own decoder for tiny", "auto"
    )
    checkpoint: str | None = option("weights instead of random ones made on the device; tiny has tiny/base", None)
    options: str | None = option("changes of the tier's options, such as compile=static,graphs=false", None)
    device: str = option("auto, cpu or cuda", "auto")
    warm: int = option("requests before the timed ones", 2)
    repeat: int = option("timed requests, at least", 5)
    budget: float = option("seconds of timed requests after which no more are added", 60.0)
    output: str | None = option("another folder for the result", None)
    check: bool = option("measure nothing; prove that the README's tables are those of the result files", False)

    def __post_init__(self) -> None:
        if self.warm < 1 or self.repeat < 1:
            raise UserError(f"warm={self.warm} repeat={self.repeat} is impossible; give at least 1 each")

    @property
    def weights(self) -> str | None:
        """The checkpoint; that of the tiny world where no other network is named."""
        return "tiny/base" if self.size == "tiny" and not (self.model or self.checkpoint) else self.checkpoint
