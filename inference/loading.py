"""Resolves checkpoints, codecs, decoder and device of a command, and loads the pipeline.

pipeline = find(InferOptions(checkpoint="scene/base", device="cpu")).load()
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.requests import InferOptions
from inference.settings import parse_output_size, require_role
from inference.torchrun import ranks
from magihuman.codecs.bundle import allow_codecs, bundle_spec, require_allowed
from magihuman.errors import UserError

if TYPE_CHECKING:
    import torch

    from inference.memory.offload import Stages
    from inference.pipeline import Pipeline
    from magihuman.codecs.bundle import CodecBundle
    from magihuman.io.export import ExportConfig
    from magihuman.zoo import Loaded
    from magihuman.zoo.decoders import DecoderConfig


WAN = "wan"
"""turbo= of the published weights' full decoder."""


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

    sibling = zoo.find(checkpoint).parent / f"{resolution}_sr"
    if sibling.is_dir():
        return str(sibling)
    raise UserError(
        f"resolution={resolution} needs a second stage: {sibling} is not there; give sr=CHECKPOINT, the folder "
        f"{resolution}_sr of the published weights"
    )


def chosen_turbo(checkpoint: str, turbo: str | None, codecs: str) -> str | None:
    """The setting turbo= with its default: for the published weights their Turbo decoder where it lies next to the
    checkpoint, as in the release's own settings, else `WAN`; None for other codecs."""
    folder = bundle_spec(codecs).turbo
    if turbo is not None or folder is None:
        return turbo
    from magihuman import zoo

    turbo_folder = zoo.find(checkpoint).parent / folder
    return str(turbo_folder) if turbo_folder.is_dir() else WAN


@dataclass(frozen=True)
class Source:
    """Resolved inputs of an inference run, validated before any weights are loaded.

    Attributes:
        options: the user's, with the second stage, tier, device, dtype and codec files that were chosen for them.
        folder, second_folder: of the checkpoints; config, second: their configs.
        decoder: config of the decoder, where it is one of ours.
        dtype: of the networks' products.
    """

    options: InferOptions
    folder: Path
    second_folder: Path | None
    config: "ExportConfig"
    second: "ExportConfig | None"
    decoder: "DecoderConfig | None"
    device: "torch.device"
    dtype: "torch.dtype"

    @property
    def turbo(self) -> str | None:
        """The light decoder, None where the codecs' own decodes."""
        return None if self.options.turbo == WAN else self.options.turbo

    @property
    def codec_paths(self) -> dict[str, str]:
        """Files of the codec bundle's parts, where it has parts that the user fetches."""
        parts = bundle_spec(self.config.codecs).variables
        return {part: path for part in parts if (path := getattr(self.options, part)) is not None}

    @cached_property
    def parents(self) -> dict[str, Any]:
        """Identity of everything that is loaded, for the record."""
        from magihuman.io.provenance import fingerprint

        def identity(name: str, path: Path) -> dict[str, Any]:
            return {"name": name, **(fingerprint(path) if path.exists() else {})}

        options, lora, sr, turbo = self.options, None, None, None
        if options.lora is not None:
            from magihuman.zoo import lora_files

            lora = identity(options.lora, lora_files.find(options.lora))
        if options.sr is not None and self.second_folder is not None:
            sr = identity(options.sr, self.second_folder)
        if self.turbo is not None:
            from magihuman.zoo import decoders

            turbo = identity(self.turbo, decoders.find(self.turbo) or Path(self.turbo))
        codecs = {part: identity(path, Path(path)) for part, path in self.codec_paths.items()}
        if "text_encoder" in codecs:
            from magihuman.codecs.text_encoders import chosen_attention

            codecs["text_encoder"]["attention"] = chosen_attention()
        return {
            "checkpoint": identity(options.checkpoint, self.folder),
            "lora": lora,
            "sr": sr,
            "turbo": turbo,
            "world": self.config.contract.to_dict(),
            "codecs": codecs,
        }

    def load(self) -> "Pipeline":
        """Everything in memory, ready to run.

        Raises:
            UserError: files that are missing, damaged or of other codecs.
        """
        import torch

        from inference.pipeline import Pipeline
        from magihuman import zoo
        from magihuman.codecs.bundle import load_bundle

        options, cpu, stages = self.options, torch.device("cpu"), None
        if options.memory != "fast":
            from inference.memory.offload import Stages

            stages = Stages(options.memory, self.device)
        # Modules that take turns on the device, and weights that change their form, are read into CPU memory first.
        device = self.device if stages is None else cpu
        weights_device = device if options.weights in (None, "bf16") else cpu
        loaded = zoo.load(options.checkpoint, weights_device, self.dtype, options.lora)
        loaded = self._prepared(loaded, stages, "sample")
        second = None
        if options.sr is not None:
            second = self._prepared(zoo.load(options.sr, weights_device, self.dtype), stages, "refine")
        codecs, decoder = load_bundle(self.config.codecs, device, **self.codec_paths), None
        if self.turbo is not None:
            from magihuman.zoo import decoders

            ours = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            decoder = decoders.load(self.turbo, device, None if self.decoder is None else ours)
        if stages is not None:
            stages.add("condition", codecs.video_codec, codecs.audio_codec)
            stages.add("decode", codecs.audio_codec, decoder or codecs.video_codec)
            stages.add("text")
        codecs = _with_cache(codecs, stages)
        return Pipeline(
            loaded,
            codecs,
            second=second,
            decoder=decoder,
            tile=options.tile,
            stages=stages,
            output_size=None if options.output_size is None else parse_output_size(options.output_size),
            crf=bundle_spec(self.config.codecs).crf if options.crf is None else options.crf,
        )

    def _prepared(self, loaded: "Loaded", stages: "Stages | None", stage: str) -> "Loaded":
        """The network with the options' weight storage, tier and offloading."""
        options, denoiser = self.options, loaded.denoiser
        if options.tier == "reference":
            if stages is not None or options.weights is not None:
                from inference.memory.offload import prepare_transformer

                part = prepare_transformer(denoiser, options.memory, options.weights, self.device)
                if stages is not None:
                    stages.add(stage, part)
            return loaded
        from inference.fast import prepare

        if options.weights is not None:
            from inference.memory.quantization import store_weights

            here = denoiser.model.adapter.rope.bands.device
            store_weights(denoiser.model, options.weights, here, here)
        # A CUDA graph records addresses of weights, so it cannot be used where they come and go.
        fixed = {} if stages is None else {"graphs": False}
        denoiser = prepare(denoiser, str(options.tier), device=self.device, release=True, **fixed)
        if stages is not None:
            stages.add(stage, denoiser)
        else:
            denoiser.to(self.device)
        return replace(loaded, denoiser=denoiser)


def _with_cache(codecs: "CodecBundle", stages: "Stages | None") -> "CodecBundle":
    """The codecs with text features cached on disk, where the text encoder is a network."""
    import torch

    encoder = codecs.text_encoder
    if not issubclass(type(encoder), torch.nn.Module):  # isinstance would make mypy forget the protocol
        return codecs
    from inference.memory.text_cache import CachedText, encoder_identity

    if stages is not None:
        stages.add("text encoder", encoder)

    def encode(prompts: list[str]) -> "list[torch.Tensor]":
        if stages is not None:
            stages.enter("text encoder")
        return encoder.encode(prompts)

    identity = encoder_identity(encoder, codecs.contract.text_encoder)
    return replace(codecs, text_encoder=CachedText(encode, identity, encoder.channels))


def choose_tier(tier: str | None, memory: str, weights: str | None, shared: bool) -> str:
    """The tier of a command.

    None is "exact", the fastest tier that computes the reference's bits (tests hold it to them on the released
    vectors), and "reference" wherever something else decides how the network is kept or computed.

    Args:
        memory, weights: see `inference.memory`; shared: several processes compute one clip together.

    Raises:
        UserError: an unknown tier, or one that does not go with the rest.
    """
    if tier is not None:
        from inference.fast import check_tier

        check_tier(tier)
    reason = None
    if memory == "low":
        reason = "memory=low streams the reference's layers; use memory=balanced"
    elif weights in ("fp8", "int4"):
        reason = f"weights={weights} is the reference's storage; leave weights= out"
    elif shared:
        reason = "several processes compute this clip together as the reference does; give many prompts, or start one"
    if tier not in (None, "reference") and reason is not None:
        raise UserError(f"tier={tier} cannot be used here: {reason}")
    if tier is None:
        return "exact" if reason is None else "reference"
    return tier


def find(options: InferOptions, shared: bool = False) -> Source:
    """Resolve and validate the files, device and compute settings of a command, without reading weights.

    Args:
        shared: several processes compute one clip together, see `choose_tier`.

    Raises:
        UserError: a name, path or setting that does not fit.
    """
    import torch

    from magihuman import zoo

    device, checkpoint = choose_device(options.device), options.checkpoint
    if options.memory != "fast" or options.weights is not None:
        from inference.memory.offload import check_memory

        check_memory(options.memory, options.weights)
    if options.dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={options.dtype} is unknown; choose float32 or bfloat16")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.dtype is not None:
        dtype = getattr(torch, options.dtype)
    tier = choose_tier(options.tier, options.memory, options.weights, shared)
    if tier not in ("reference", "exact"):
        from inference.fast import require_kernel

        require_kernel(tier, device, dtype)
    folder = zoo.find(checkpoint)
    config = zoo.config_of(checkpoint)
    require_role(config, checkpoint, first=True)
    if options.lora is not None:
        from magihuman.zoo import lora_files

        config = lora_files.config_with_lora(config, options.lora, checkpoint)
    if options.codecs not in (None, config.codecs):
        raise UserError(f"codecs={options.codecs}, but checkpoint={checkpoint} was trained with {config.codecs!r}")
    allow_codecs(options.codecs)
    require_allowed(config.codecs)
    given = {part: getattr(options, part) for part in ("video_codec", "audio_codec", "text_encoder")}
    paths = bundle_spec(config.codecs).paths(given)
    sr = second_checkpoint(checkpoint, options.sr, options.resolution, config.codecs)
    second = None
    if sr is not None:
        second = zoo.config_of(sr)
        require_role(second, sr, first=False)
        second.contract.require(config.contract, f"sr={sr}", f"checkpoint={checkpoint}")
    decoder, spec = None, bundle_spec(config.codecs)
    turbo = chosen_turbo(checkpoint, options.turbo, config.codecs)
    if turbo == WAN and not spec.published:
        raise UserError(f"turbo={WAN} is for the published weights; leave turbo= out")
    if turbo not in (None, WAN):
        from magihuman.zoo import decoders

        decoder = decoders.config_of(turbo)
        if decoder is None:
            decoders.require_published(turbo)
        else:
            wanted = decoders.Latents.of(config.contract)
            decoder.latents.require(wanted, f"turbo={turbo}", f"checkpoint={checkpoint}")
    if options.output_size is not None:
        parse_output_size(options.output_size)
    crf = spec.crf if spec.published and options.crf is None else options.crf
    if crf is not None and not 0 <= crf <= 51:
        raise UserError(f"crf={crf} is impossible; give 0 (lossless) to 51")
    if options.tile is not None:
        from inference.decoding import latents_per_tile

        latents_per_tile(options.tile, config.contract.video_stride)
    chosen: dict[str, Any] = {"sr": sr, "turbo": turbo, "crf": crf, "tier": tier, "device": device.type, **paths}
    chosen["dtype"] = str(dtype).removeprefix("torch.")
    return Source(
        options=replace(options, **chosen),
        folder=folder,
        second_folder=None if sr is None else zoo.find(sr),
        config=config,
        second=second,
        decoder=decoder,
        device=device,
        dtype=dtype,
    )


_turbo_decoders: dict[tuple[str, str], Any] = {}


def with_turbo(loaded: "Loaded", codecs: "CodecBundle", checkpoint: str) -> "Pipeline":
    """The network `loaded`, with the published Turbo decoder where that lies next to `checkpoint`."""
    from inference.pipeline import Pipeline
    from magihuman.zoo import decoders

    turbo = chosen_turbo(checkpoint, None, codecs.name)
    if turbo in (None, WAN) or codecs.video_codec is None:  # without codecs this process does not decode
        return Pipeline(loaded, codecs)
    key = turbo, str(next(loaded.denoiser.parameters()).device)
    if key not in _turbo_decoders:
        _turbo_decoders[key] = decoders.load(turbo, key[1], None)
    return Pipeline(loaded, codecs, decoder=_turbo_decoders[key])
