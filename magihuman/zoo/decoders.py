"""Light video decoders by name: architectures, exported folders, run folders, and the published Turbo-VAED.

    codec = decoders.load("scene/turbo")
    frames = codec.decode(latents)

An export is a folder with `model.safetensors` and `config.json`: layout (`causal`, `released`, or `wan` for teachers),
hyperparameters, and the codec whose latents the decoder takes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from magihuman.codecs.tiny_captions import FORMS
from magihuman.errors import UserError
from magihuman.io.files import WEIGHTS
from magihuman.io.text import load_json
from magihuman.schema import PlainConfig, check_limits
from magihuman.zoo import names
from magihuman.zoo.names import choices

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from magihuman.codecs.causal_decoder import CausalDecoder, CausalDecoderCodec
    from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
    from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig
    from magihuman.codecs.wan_decoder import WanDecoder, WanDecoderConfig
    from magihuman.models.config import Contract

FORMAT = "magihuman-decoder/1"
CONFIG, MODEL = "config.json", "model.safetensors"
LAYOUTS = ("causal", "released", "wan")


@dataclass(frozen=True)
class Latents(PlainConfig):
    """Latents that a decoder takes: normalised, of a codec with this name and shape.

    Attributes:
        codec: `Contract.video_codec`, with a content hash where the codec is fitted.
        channels: C; stride: (frames, rows, columns) of pixels per latent.
    """

    codec: str
    channels: int
    stride: tuple[int, int, int]

    @classmethod
    def of(cls, contract: "Contract") -> "Latents":
        """Those of a codec bundle."""
        return cls(contract.video_codec, contract.video_channels, contract.video_stride)

    @property
    def world(self) -> str | None:
        """The puppet world of the codec, with which its name begins; None for codecs of no world."""
        name = self.codec.rpartition("-")[0]
        return name if name in FORMS else None

    def require(self, other: "Latents", mine: str, theirs: str) -> None:
        """Raises UserError unless both are equal; `mine` and `theirs` name the owners in the message."""
        if self != other:
            raise UserError(
                f"{mine} takes latents {_words(self)}, but {theirs} has those {_words(other)}; choose the decoder that "
                "was trained for this codec"
            )


def _words(latents: Latents) -> str:
    return f"of {latents.codec!r} ({latents.channels} channels, stride {list(latents.stride)})"


@dataclass(frozen=True)
class DecoderConfig:
    """Content of an export's config.json.

    Attributes:
        layout: `causal` (ours), `released`, or `wan` (a teacher); network: its hyperparameters, as
            `CausalDecoderConfig.to_dict`, as the release's JSON, or as `WanDecoderConfig.to_dict`.
        latents: its input.
        provenance: facts about the training, such as recipe, seed and steps.

    Raises:
        UserError: an unknown layout, impossible hyperparameters, or a network for other latents.
    """

    layout: str
    network: dict[str, Any]
    latents: Latents
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"decoder layout {self.layout!r} is unknown; choose from {', '.join(LAYOUTS)}")
        check_limits(self.network, "network")
        found = _hyperparameters(self.layout, self.network)
        if (found.latent_channels, found.stride) != (self.latents.channels, self.latents.stride):
            raise UserError(
                f"the decoder's network takes {found.latent_channels} channels and upsamples by {list(found.stride)}, "
                f"but its latents are {_words(self.latents)}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "layout": self.layout,
            "network": self.network,
            "latents": self.latents.to_dict(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """Raises UserError for another format or settings that do not fit."""
        if values.get("format") != FORMAT:
            raise UserError(f"format is {values.get('format')!r}, this version reads {FORMAT!r}")
        try:
            latents = Latents.from_dict(values["latents"])
            return cls(values["layout"], values["network"], latents, values.get("provenance", {}))
        except (KeyError, TypeError) as error:
            raise UserError(f"a decoder's setting is missing or of the wrong type: {error}") from None


def _hyperparameters(layout: str, network: Mapping[str, Any]) -> "CausalDecoderConfig | TurboConfig | WanDecoderConfig":
    if layout == "causal":
        from magihuman.codecs.causal_decoder_config import CausalDecoderConfig

        return CausalDecoderConfig.from_dict(network)
    if layout == "wan":
        from magihuman.codecs.wan_decoder import WanDecoderConfig

        return WanDecoderConfig.from_dict(network)
    from magihuman.codecs.turbo_vaed import TurboConfig

    return TurboConfig.from_json(network)


# -- architectures -------------------------------------------------------------------------------------------------


def arch(name: str) -> dict[str, Any]:
    """An architecture: {"layout", "codecs", "network"} of configs/decoder/NAME.yaml. Raises UserError for an unknown name."""
    return names.arch_settings(name, "decoder")


def summary(name: str) -> str:
    """Size and type of an architecture in a line; without torch."""
    from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
    from magihuman.codecs.costs import TURBO_PARAMETERS

    described = arch(name)
    if described["layout"] == "released":
        return f"{TURBO_PARAMETERS:>14,} parameters  the published Turbo decoder, in windows"
    config = CausalDecoderConfig.from_dict(described["network"])
    widths = ", ".join(str(stage.width) for stage in config.stages)
    return (
        f"{config.parameter_count():>14,} parameters  causal, widths {widths}, stride {list(config.stride)}, "
        f"for the {described['codecs']} codecs"
    )


def build(
    config: DecoderConfig, device: "torch.device | str" = "cpu", seed: int | None = None
) -> "CausalDecoder | TurboCodec | WanDecoder":
    """Build a network for training, with random fp32 weights: normalised latents to frames.

    Args:
        device: "meta" makes shapes only.
        seed: of the initial weights; None draws from torch's default generator.
    """
    import torch

    from magihuman.codecs.causal_decoder import CausalDecoder
    from magihuman.codecs.turbo_vaed import TurboCodec, TurboDecoder
    from magihuman.codecs.wan_decoder import WanDecoder

    network: Any = _hyperparameters(config.layout, config.network)
    with torch.random.fork_rng(enabled=seed is not None), torch.device(device):
        if seed is not None:
            torch.manual_seed(seed)
        if config.layout == "causal":
            return CausalDecoder(network)
        if config.layout == "wan":
            return WanDecoder.build(network)
        return TurboCodec(TurboDecoder(network), network, *_statistics(config.latents))


def _statistics(latents: Latents) -> "tuple[Tensor, Tensor] | tuple[None, None]":
    """Latent statistics that the released layout undoes: Wan's (None), else mean 0 and standard deviation 1."""
    import torch

    if latents.codec == "wan2.2":
        return None, None
    return torch.zeros(latents.channels), torch.ones(latents.channels)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def find(decoder: str | Path) -> Path | None:
    """Folder of an exported decoder: a shipped name, the folder itself, or a run folder; None if it is none of these,
    as for the published Turbo-VAED."""
    if str(decoder) in names.decoder_names():
        return WEIGHTS / str(decoder)
    folder = Path(os.path.expanduser(decoder))
    return next((path for path in (folder, folder / "export") if names.is_decoder(path)), None)


def config_of(decoder: str | Path) -> DecoderConfig | None:
    """Config of an exported decoder, see `find`; None for others.

    Raises:
        UserError: a config that does not fit.
    """
    folder = find(decoder)
    if folder is None:
        return None
    try:
        return DecoderConfig.from_dict(load_json(folder / CONFIG))
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def save(folder: str | Path, state: "Mapping[str, Tensor]", config: DecoderConfig) -> Path:
    """Write an export atomically.

    Args:
        state: state dict of a network from `build`, in the dtypes to store.

    Raises:
        UserError: when the state does not fit the config.
    """
    from safetensors.torch import save_file

    from magihuman.io.export import keep_readme, write_json
    from magihuman.io.files import atomic_path
    from magihuman.io.released_files import require_fit
    from magihuman.io.weight_checks import require_finite, write_checksums

    expected = build(config, "meta").state_dict()
    require_fit(
        {key: tuple(value.shape) for key, value in state.items()},
        {key: tuple(value.shape) for key, value in expected.items()},
        "the state to export",
    )
    require_finite(state, "the state to export")
    with atomic_path(Path(folder), folder=True) as new:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, new / MODEL, metadata={"format": "pt"})
        write_checksums(new)
        write_json(new / CONFIG, config.to_dict())
        keep_readme(Path(folder), new)
    return Path(folder)


def teacher_of(codecs: str) -> str:
    """Name under which the teacher decoder of a puppet world ships: scene -> scene/teacher.

    Raises:
        UserError: codecs of no puppet world, for which none ships.
    """
    if codecs not in FORMS:
        raise UserError(
            f"no teacher decoder ships for the codecs {codecs!r}, only for {', '.join(FORMS)}; give teacher="
        )
    return f"{codecs}/teacher"


def require(decoder: str | Path, setting: str) -> Path:
    """Folder of an exported decoder, see `find`.

    Raises:
        UserError: it is none; `setting` is the name of the user's setting.
    """
    folder = find(decoder)
    if folder is None:
        raise UserError(
            f"{setting}={decoder} is not a decoder; give a run folder, an export, or a shipped name "
            f"({choices(str(decoder), 'decoder')})"
        )
    return folder


def load(
    decoder: str | Path, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "CausalDecoderCodec | TurboCodec | WanDecoder":
    """Load a decoder for inference.

    Args:
        decoder: a name or folder, see `find`, or what `TurboCodec.load` takes.
        dtype: compute dtype; None is bf16 on a GPU and for the published decoder, fp32 elsewhere.

    Raises:
        UserError: when it cannot be found or does not fit.
    """
    import torch

    from magihuman.codecs.causal_decoder import CausalDecoder, CausalDecoderCodec
    from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig
    from magihuman.io.released_files import load_strict, read_state

    folder, config = find(decoder), config_of(decoder)
    if folder is None or config is None:
        require_published(decoder)
        return TurboCodec.load(decoder, device, dtype or torch.bfloat16)
    usual = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    state, chosen = read_state(folder / MODEL), dtype or usual
    if config.layout == "released":
        layout, (mean, std) = TurboConfig.from_json(config.network), _statistics(config.latents)
        return TurboCodec.from_released(state, layout, folder / MODEL, mean, std, chosen).to(device)
    network = build(config, "meta")
    load_strict(network, state, None, folder / MODEL, chosen)
    if isinstance(network, CausalDecoder):
        return CausalDecoderCodec(network).to(device)
    return cast("WanDecoder", network.eval().requires_grad_(False).to(device))


def require_published(decoder: str | Path) -> None:
    """Raises UserError for a decoder that is neither an export nor the published one, with the choices."""
    from magihuman.codecs.turbo_vaed import FILES, REPO
    from magihuman.io.released_files import locate

    text, folder = str(decoder), Path(os.path.expanduser(decoder))
    known = choices(text, "decoder")
    owner, slash, _ = text.partition("/")
    if not folder.exists() and (not slash or owner in {name.partition("/")[0] for name in names.decoder_names()}):
        raise UserError(f"decoder {text!r} is neither a folder nor a shipped name ({known})")
    try:
        locate(decoder, FILES, REPO)
    except UserError as error:
        unfinished = "; it is a run folder whose training has exported nothing yet, or no decoder"
        unfinished = unfinished if (folder / "run.json").is_file() else ""
        raise UserError(f"{error}{unfinished}; decoders that ship with the package: {known}") from None
