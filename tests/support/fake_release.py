"""A whole release in miniature: every folder, file, key, dtype and number of shards of the published one (SPEC 9), with
tiny widths and random weights. Tests use it; by hand: `python tests/support/fake_release.py FOLDER`.

Not tiny are the 48 channels of video latents, because the Wan VAE's statistics are 48 constants, and the strides.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from magihuman import zoo
from magihuman.io.export import INDEX, plan_shards, released_dtypes, weight_files
from magihuman.io.streamed_safetensors import SafetensorsWriter, Spec
from magihuman.models.config import DiTConfig, PackConfig

SHARDS = {"base": 7, "distill": 13, "540p_sr": 13, "1080p_sr": 13}
AUDIO_CHANNELS, TEXT_CHANNELS = 4, 16


@dataclass(frozen=True)
class FakeRelease:
    """Where the parts are; `environment` is what `magihuman.codecs.bundle` reads."""

    weights: Path
    wan: Path
    stable_audio: Path
    t5gemma: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MAGIHUMAN_WAN_VAE": str(self.wan),
            "MAGIHUMAN_STABLE_AUDIO": str(self.stable_audio),
            "MAGIHUMAN_T5GEMMA": str(self.t5gemma),
        }


def make(root: Path, layers: int = 40) -> FakeRelease:
    """Write everything below `root`.

    Args:
        layers: 40 as published, with its 331 tensors; fewer make sampling faster (at least 8).
    """
    release = FakeRelease(
        root / "daVinci-MagiHuman", root / "Wan2.2-TI2V-5B", root / "stable-audio-open-1.0", root / "t5gemma-9b-9b-ul2"
    )
    make_weights(release.weights, layers)
    make_turbo(release.weights / "turbo_vae")
    make_wan(release.wan)
    make_stable_audio(release.stable_audio)
    make_t5gemma(release.t5gemma)
    return release


def dit_config(layers: int = 40) -> DiTConfig:
    """The released structure with H = 32: experts in the first and last four layers, GELU7 in the first four."""
    return DiTConfig(
        num_layers=layers,
        hidden_size=32,
        head_dim=8,
        num_query_groups=2,
        video_in_channels=192,
        audio_in_channels=AUDIO_CHANNELS,
        text_in_channels=TEXT_CHANNELS,
        mm_layers=(*range(4), *range(layers - 4, layers)),
        gelu7_layers=tuple(range(4)),
    )


def make_weights(root: Path, layers: int = 40, roles: tuple[str, ...] = tuple(SHARDS)) -> None:
    """The networks' folders, and the files beside them."""
    config = dit_config(layers)
    for number, role in enumerate(roles):
        state = random_state(config, seed=number)
        # As published: base in mixed types, the others all fp32.
        write_shards(root / role, released_dtypes(state, config) if role == "base" else state, SHARDS[role])
    (root / "config.json").write_text('{"model_type": "davinci-magihuman"}\n')
    (root / "configuration.json").write_text('{"framework": "pytorch", "task": "text-to-video-synthesis"}\n')
    (root / "README.md").write_text("# a fake\n")
    from PIL import Image

    Image.new("RGB", (4, 4)).save(root / "architecture.png")


def random_state(config: DiTConfig, seed: int = 0) -> dict[str, Tensor]:
    """fp32 weights with heads and norms that are not zero."""
    model = zoo.build(config, PackConfig(), compute_dtype=torch.float32, seed=seed).model
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.startswith("final_linear"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return dict(model.state_dict())


def write_shards(folder: Path, state: dict[str, Tensor], count: int) -> None:
    """The state in exactly `count` files with their index."""
    folder.mkdir(parents=True)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    limit = sum(sizes.values()) // count
    while len(plan := plan_shards(sizes, limit)) > count:
        limit += limit // 100 + 1
    assert len(plan) == count
    weight_map = {}
    for number, names in enumerate(plan, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name] for name in names}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def make_hollow(folder: Path, config: DiTConfig, matrices: str = "F32", limit: int = 5 * 10**9) -> None:
    """A network of zeros that takes no room on the disk, whatever its size: the files have holes.

    Args:
        matrices: type of the block matrices, "F32" or "BF16".
    """
    folder.mkdir(parents=True)
    specs = {key: Spec(shape, matrices if is_matrix else "F32") for key, shape, is_matrix in config.tensors()}
    plan = plan_shards({name: spec.nbytes for name, spec in specs.items()}, limit)
    weight_map = {}
    for number, names in enumerate(plan, 1):
        file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        writer = SafetensorsWriter(folder / file, {name: specs[name] for name in names})
        writer.file.truncate(writer.offset + sum(specs[name].nbytes for name in names))
        writer.file.close()
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(s.nbytes for s in specs.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


# The release's settings, with the leftovers of its distillation (SPEC 8.1).
TURBO_SETTINGS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 48,
    "decoder_block_out_channels": [64, 128, 256, 512],
    "decoder_layers_per_block": [2, 2, 2, 3, 3],
    "decoder_spatio_temporal_scaling": [False, True, True, True],
    "decoder_spatio_only": [False, True, False, False],
    "decoder_is_dw_conv": [False] * 5,
    "decoder_dw_kernel_size": 5,
    "patch_size": 2,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "decoder_causal": False,
    "use_unpatchify": True,
    "first_chunk_size": 7,
    "step_size": 7,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
    "aligned_feature_projection_mode": "conv-2layer",
    "aligned_feature_projection_dim": [[512, 1024], [512, 1024]],
    "aligned_blks_indices": [0, 1],
}


def make_turbo(folder: Path) -> None:
    """turbo_vae/: the pickle with its wrapping, and its settings."""
    from magihuman.codecs.turbo_vaed import TurboConfig, TurboDecoder

    small = {"decoder_block_out_channels": [4, 4, 8, 8], "decoder_layers_per_block": [2, 2, 2, 3, 3]}
    settings = {**TURBO_SETTINGS, **small}
    folder.mkdir(parents=True)
    (folder / "TurboV3-Wan22-TinyShallow_7_7.json").write_text(json.dumps(settings, indent=2))
    torch.manual_seed(0)
    decoder = TurboDecoder(TurboConfig.from_json(settings))
    state = {f"module.decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["module.aligned_feature_projection_heads.0.weight"] = torch.zeros(2, 2)
    torch.save({"ema_state_dict": state, "step": 340000}, folder / "checkpoint-340000.ckpt")


def make_wan(folder: Path) -> None:
    """Wan2.2_VAE.pth with the release's strides and latent channels."""
    from diffusers import AutoencoderKLWan

    from magihuman.codecs import wan as codecs_wan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    state = vae.state_dict()
    folder.mkdir(parents=True)
    torch.save(
        {name: state[inner].contiguous() for name, inner in codecs_wan.key_map(vae).items()}, folder / "Wan2.2_VAE.pth"
    )


def make_stable_audio(folder: Path) -> None:
    """model.safetensors (the VAE, and a tensor of the diffusion model beside it) and model_config.json; hop 2048."""
    from diffusers import AutoencoderOobleck

    from magihuman.codecs import oobleck

    shared = {"channels": 2 * AUDIO_CHANNELS, "c_mults": [1] * 5, "strides": [2, 4, 4, 8, 8], "use_snake": True}
    config: dict[str, Any] = {
        "encoder": {"type": "oobleck", "config": {**shared, "in_channels": 2, "latent_dim": 2 * AUDIO_CHANNELS}},
        "decoder": {
            "type": "oobleck",
            "config": {**shared, "out_channels": 2, "latent_dim": AUDIO_CHANNELS, "final_tanh": False},
        },
        "bottleneck": {"type": "vae"},
        "latent_dim": AUDIO_CHANNELS,
        "downsampling_ratio": 2048,
        "io_channels": 2,
    }
    torch.manual_seed(0)
    vae = AutoencoderOobleck(**oobleck.released_config(config, "fake"))
    inner = vae.state_dict()
    state = {}
    for name, key in oobleck.key_map(vae).items():
        snake = name.endswith((".alpha", ".beta"))
        state[oobleck.PREFIX + name] = inner[key].flatten() if snake else inner[key].contiguous()
    state["model.model.to_timestep_embed.0.weight"] = torch.zeros(2)
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "model_config.json").write_text(
        json.dumps({"model": {"pretransform": {"type": "autoencoder", "config": config}}})
    )


def make_t5gemma(folder: Path) -> None:
    """Encoder and decoder as published, with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaForConditionalGeneration

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    side = {
        "vocab_size": len(words),
        "hidden_size": TEXT_CHANNELS,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    config = T5GemmaConfig(encoder=side, decoder=dict(side), vocab_size=len(words))
    folder.mkdir(parents=True)
    T5GemmaForConditionalGeneration(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def tensors_of(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint."""
    return {k: v for file in weight_files(folder, stem=stem) for k, v in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


if __name__ == "__main__":
    made = make(Path(sys.argv[1]))
    print("\n".join(f"export {name}={value}" for name, value in made.environment.items()))
    print("\n".join(f"checkpoint={made.weights / role}" for role in SHARDS))


def left_in(folder: Path) -> list[str]:
    """Names of what lies there."""
    return sorted(path.name for path in folder.iterdir())
