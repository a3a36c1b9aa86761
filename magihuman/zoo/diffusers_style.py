"""A checkpoint as a diffusers-style folder: transformer/, vae/, audio_vae/, scheduler/, model_index.json.

diffusers has no class for this network. The class names are those of the public port with the same layout (FastVideo),
whose transformer keeps the release's tensor names; vae/ and audio_vae/ are diffusers models. `magihuman.json` next to
model_index.json is our complete config, so that converting back loses nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magihuman.codecs.bundle import RELEASED_VARIABLES
from magihuman.io.export import ExportConfig, write_json
from magihuman.io.released_files import diffusers_config, locate
from magihuman.io.streamed_safetensors import SafetensorsWriter, Spec, open_tensors, read_specs

STEM = "diffusion_pytorch_model"
OUR_CONFIG = "magihuman.json"


@dataclass(frozen=True)
class Codec:
    """A codec to write: source file, its config.json, and source name -> (name, spec) here."""

    path: Path
    config: dict[str, Any]
    names: dict[str, tuple[str, Spec]]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for _, spec in self.names.values())


def write_configs(folder: Path, config: ExportConfig, codecs: Mapping[str, Codec]) -> None:
    """Write all JSON files except those of the codecs.

    Args:
        codecs: by subfolder name.
    """
    parts = {"transformer": ["diffusers", "MagiHumanDiT"], "scheduler": ["diffusers", "FlowUniPCMultistepScheduler"]}
    parts |= {name: ["diffusers", codec.config["_class_name"]] for name, codec in codecs.items()}
    write_json(folder / "model_index.json", {"_class_name": "MagiHumanPipeline", **parts})
    patch = config.pack.patch_size
    transformer = {"_class_name": "MagiHumanDiT", **config.model.to_dict(), "patch_size": [1, patch, patch]}
    write_json(folder / "transformer" / "config.json", transformer)
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "FlowUniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "shift": config.sampling.shift,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / OUR_CONFIG, config.to_dict())


def find_codecs(given: Mapping[str, str | None]) -> dict[str, Codec]:
    """Codecs to write, of vae and audio_vae: the given files, else those of the environment variables.

    Raises:
        UserError: one is missing (with the command that fetches it) or does not fit its network.
    """
    found = {}
    for name, part, make in (("vae", "video_codec", _wan), ("audio_vae", "audio_codec", _oobleck)):
        source = given[name] or os.environ.get(RELEASED_VARIABLES[part])
        if source:
            found[name] = make(source)
    return found


def write_codec(folder: Path, codec: Codec, scratch: Path) -> None:
    """Write one codec as diffusers saves it."""
    folder.mkdir()
    write_json(folder / "config.json", codec.config)
    with SafetensorsWriter(folder / f"{STEM}.safetensors", dict(codec.names.values())) as writer:
        with open_tensors(codec.path, scratch) as reader:
            for name, (inner, _) in codec.names.items():
                writer.write(inner, reader.blocks(name))


def _wan(source: str) -> Codec:
    from magihuman.codecs import wan

    path = locate(source, wan.FILES, wan.REPO)
    specs = read_specs(path)
    if "quant_conv.weight" in specs:
        return _already(path, specs, "AutoencoderKLWan")
    config, names = wan.to_diffusers({name: spec.shape for name, spec in specs.items()}, path)
    return Codec(path, config, {n: (key, Spec(shape, specs[n].dtype)) for n, (key, shape) in names.items()})


def _oobleck(source: str) -> Codec:
    from magihuman.codecs import oobleck

    path = locate(source, oobleck.FILES, oobleck.REPO)
    specs = read_specs(path)
    prefix = oobleck.PREFIX
    own = {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}
    if not own:
        return _already(path, specs, "AutoencoderOobleck")
    shapes = {name: spec.shape for name, spec in own.items()}
    config, names = oobleck.to_diffusers(shapes, oobleck.autoencoder_config(path), path)
    return Codec(path, config, {prefix + n: (key, Spec(shape, own[n].dtype)) for n, (key, shape) in names.items()})


def _already(path: Path, specs: Mapping[str, Spec], kind: str) -> Codec:
    return Codec(path, diffusers_config(path, kind), {name: (name, spec) for name, spec in specs.items()})
