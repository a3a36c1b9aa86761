"""One clip over all processes of a torchrun command (Ulysses); many prompts are shared out instead."""

from typing import TYPE_CHECKING

from torch import distributed

from inference.context_parallel import parallelise, require_divisible_heads

if TYPE_CHECKING:
    from inference.loading import Source
    from inference.pipeline import Pipeline


def check_spread(source: "Source", processes: int) -> None:
    """Raises UserError when a network of the command cannot be split over that many processes."""
    for config in (source.config, source.second):
        if config is not None:
            require_divisible_heads(config.model, processes)


def spread(pipeline: "Pipeline") -> None:
    """Make the pipeline's networks compute together with those of the other processes.

    Every process reads the same prompt, draws the same noise and ends with the same latents.
    """
    group = distributed.new_group(backend="nccl") if pipeline.device.type == "cuda" else None
    for loaded in (pipeline.denoiser, None if pipeline.second is None else pipeline.second.denoiser):
        if loaded is not None:
            parallelise(loaded.model, group)
