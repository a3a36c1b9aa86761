"""From what the command line names to a pipeline: checkpoints, codecs, decoder, device, place in memory."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.checks import require_role
from magihuman.codecs.bundle import allow_codecs, bundle_spec, require_allowed
from magihuman.errors import UserError

if TYPE_CHECKING:
    import torch

    from inference.memory import Stages
    from inference.pipeline import Pipeline
    from magihuman.codecs.bundle import CodecBundle
    from magihuman.io.export import ExportConfig
    from magihuman.zoo import Loaded
    from magihuman.zoo.decoders import DecoderConfig


def ranks() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without it."""
    rank, processes, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    return rank, processes, local


def choose_device(device: str) -> "torch.device":
    """`auto` is the GPU of this process where there is one.

    Raises:
        UserError: unknown, or not on this machine.
    """
    import torch

    if device == "auto":
        device = f"cuda:{ranks()[2]}" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device={device} is unknown; choose auto, cpu, cuda or cuda:0")
    if device != "cpu" and torch.device(device).index not in (None, *range(torch.cuda.device_count())):
        raise UserError(f"device={device}, but torch sees {torch.cuda.device_count()} GPUs here")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch finds no GPU here; use device=cpu")
    return torch.device(device)


def second_checkpoint(checkpoint: str, sr: str | None, resolution: str | None, codecs: str) -> str | None:
    """The second stage's checkpoint: the given one, or the published one next to the base.

    Raises:
        UserError: resolution= needs one, and none is given or found.
    """
    if sr is not None or bundle_spec(codecs).resolutions.get(resolution or "", (None, None))[1] is None:
        return sr
    from magihuman import zoo

    beside = zoo.find(checkpoint).parent / f"{resolution}_sr"
    if beside.is_dir():
        return str(beside)
    raise UserError(
        f"resolution={resolution} needs a second stage: {beside} is not there; give sr=CHECKPOINT, the folder "
        f"{resolution}_sr of the published weights"
    )


@dataclass(frozen=True)
class Source:
    """What a command computes with, found and read but for the weights, so that mistakes show before they load.

    Attributes:
        checkpoint, lora, sr, turbo: as named by the user; sr also as found beside the base.
        folder, second_folder: of the checkpoints; config, second: their configs.
        decoder: config of the decoder, where it is one of ours; tile: see `inference.decoding`.
        dtype: of the networks' products.
        memory, weights: see `inference.memory`; tier: see `inference.fast`.
        codecs: own codec bundle that the user named, or None.
        codec_paths: paths of the released codecs' parts; empty for others.
    """

    checkpoint: str
    lora: str | None
    sr: str | None
    turbo: str | None
    folder: Path
    second_folder: Path | None
    config: "ExportConfig"
    second: "ExportConfig | None"
    decoder: "DecoderConfig | None"
    tile: int | None
    device: "torch.device"
    dtype: "torch.dtype"
    memory: str
    weights: str | None
    tier: str
    codec_paths: dict[str, str]
    codecs: str | None = None

    @property
    def dtype_name(self) -> str:
        """Such as "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def parents(self) -> dict[str, Any]:
        """Identity of all that is loaded, for the record."""
        from magihuman.io.provenance import fingerprint
        from magihuman.zoo import decoders, lora_files

        def identity(name: str, path: Path) -> dict[str, Any]:
            return {"name": name, **(fingerprint(path) if path.exists() else {})}

        return {
            "checkpoint": identity(self.checkpoint, self.folder),
            "lora": None if self.lora is None else identity(self.lora, lora_files.find(self.lora)),
            "sr": None
            if self.sr is None or self.second_folder is None
            else identity(self.sr, self.second_folder),
            "turbo": None
            if self.turbo is None
            else identity(self.turbo, decoders.find(self.turbo) or Path(self.turbo)),
            "world": self.config.contract.to_dict(),
            "codecs": {part: identity(path, Path(path)) for part, path in self.codec_paths.items()},
        }

    def load(self) -> "Pipeline":
        """Everything in memory, ready to run.

        Raises:
            UserError: files that are missing, damaged or of other codecs.
        """
        import torch

        from inference.memory import Stages
        from inference.pipeline import Pipeline
        from magihuman import zoo
        from magihuman.codecs.bundle import load_bundle
        from magihuman.zoo import decoders

        fast, cpu = self.memory == "fast", torch.device("cpu")
        stages = Stages(self.memory, self.device)
        # What shall not be on the device at once, or in another form, is read into CPU memory first.
        codec_place = self.device if fast else cpu
        weights_place = self.device if fast and self.weights in (None, "bf16") else cpu
        decoder: Any = None
        if self.turbo is not None:
            ours = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            decoder = decoders.load(self.turbo, codec_place, None if self.decoder is None else ours)
        codecs = load_bundle(self.config.codecs, codec_place, **self.codec_paths)
        loaded = zoo.load(self.checkpoint, weights_place, self.dtype, self.lora)
        loaded = self._placed(loaded, stages, "sample")
        second = None
        if self.sr is not None:
            second = self._placed(zoo.load(self.sr, weights_place, self.dtype), stages, "refine")
        stages.add("condition", codecs.video_codec, codecs.audio_codec)
        stages.add("decode", codecs.audio_codec, decoder or codecs.video_codec)
        codecs = _with_cache(codecs, stages)
        return Pipeline(loaded, codecs, second=second, decoder=decoder, tile=self.tile, stages=stages)

    def _placed(self, loaded: "Loaded", stages: "Stages", stage: str) -> "Loaded":
        """A network in its form, tier and place."""
        from inference.fast import prepare
        from inference.memory import prepare_transformer, store_weights

        denoiser = loaded.denoiser
        if self.tier == "reference":
            stages.add(stage, prepare_transformer(denoiser, self.memory, self.weights, self.device))
            return loaded
        if self.weights is not None:
            place = denoiser.model.adapter.rope.bands.device
            store_weights(denoiser.model, self.weights, place, place)
        # A recorded graph knows where weights are, so it cannot be where they come and go.
        fixed = {} if self.memory == "fast" else {"graphs": False}
        denoiser = prepare(denoiser, self.tier, device=self.device, release=True, **fixed)
        stages.add(stage, denoiser)
        return replace(loaded, denoiser=denoiser)


def _with_cache(codecs: "CodecBundle", stages: "Stages") -> "CodecBundle":
    """The codecs with their text features kept on disk, where the encoder is a network; it comes when it is needed."""
    import torch

    from inference.memory import CachedText, encoder_identity

    encoder = codecs.text_encoder
    stages.add("text")
    if not issubclass(type(encoder), torch.nn.Module):  # isinstance would make mypy forget the protocol
        return codecs
    stages.add("text encoder", encoder)

    def encode(prompts: list[str]) -> "list[torch.Tensor]":
        stages.enter("text encoder")
        return encoder.encode(prompts)

    identity = encoder_identity(encoder, codecs.contract.text_encoder)
    return replace(codecs, text_encoder=CachedText(encode, identity, encoder.channels))


def find(
    checkpoint: str,
    sr: str | None = None,
    turbo: str | None = None,
    resolution: str | None = None,
    tile: int | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    memory: str = "fast",
    weights: str | None = None,
    codecs: str | None = None,
    codec_paths: dict[str, str | None] | None = None,
    lora: str | None = None,
    tier: str | None = None,
    shared: bool = False,
) -> Source:
    """Look at everything that the command names, without reading weights.

    Args:
        lora: adapter of the base, see `magihuman.zoo.lora_files`.
        tier, shared: see `inference.fast.tiers.choose_tier`.
        codecs: name of an own codec bundle that may be imported.
        codec_paths: paths of the released codecs' parts, by the names of `magihuman.codecs.bundle.load_bundle`; what is None
            comes from the environment.

    Raises:
        UserError: a name or path that does not fit.
    """
    import torch

    from inference.decoding import latents_per_tile
    from inference.fast import choose_tier, require_kernel
    from inference.memory import check_memory
    from magihuman import zoo
    from magihuman.zoo import decoders, lora_files

    place = choose_device(device)
    check_memory(memory, weights)
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype} is unknown; choose float32 or bfloat16")
    usual = torch.bfloat16 if place.type == "cuda" else torch.float32
    own = usual if dtype is None else getattr(torch, dtype)
    tier = choose_tier(tier, place.type, memory, weights, shared)
    require_kernel(tier, place, own)
    folder, config = zoo.find(checkpoint), zoo.config_of(checkpoint)
    require_role(config, checkpoint, first=True)
    if lora is not None:
        config = lora_files.config_with_lora(config, lora, checkpoint)
    if codecs not in (None, config.codecs):
        raise UserError(f"codecs={codecs}, but checkpoint={checkpoint} was trained with {config.codecs!r}")
    allow_codecs(codecs)
    require_allowed(config.codecs)
    paths = bundle_spec(config.codecs).paths(codec_paths or {})
    sr = second_checkpoint(checkpoint, sr, resolution, config.codecs)
    second = None
    if sr is not None:
        second = zoo.config_of(sr)
        require_role(second, sr, first=False)
        second.contract.require(config.contract, f"sr={sr}", f"checkpoint={checkpoint}")
    decoder = None if turbo is None else decoders.config_of(turbo)
    if decoder is not None:
        wanted = decoders.Latents.of(config.contract)
        decoder.latents.require(wanted, f"turbo={turbo}", f"checkpoint={checkpoint}")
    latents_per_tile(tile, config.contract.video_stride)
    return Source(
        checkpoint=checkpoint,
        lora=lora,
        sr=sr,
        turbo=turbo,
        folder=folder,
        second_folder=None if sr is None else zoo.find(sr),
        config=config,
        second=second,
        decoder=decoder,
        tile=tile,
        device=place,
        dtype=own,
        memory=memory,
        weights=weights,
        tier=tier,
        codec_paths=paths,
        codecs=codecs,
    )
