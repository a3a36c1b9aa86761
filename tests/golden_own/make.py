"""Compute our own small vectors, in the format of the released implementation's.

They guard a plain clone against drift. Made once this implementation had passed the released vectors; made again
only where a change of numbers is wanted and explained:

    python tests/golden_own/make.py
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from magihuman.flow.solvers import SDE, FlowUniPC, ReNoise, Solver
from magihuman.models.attention import local_ranges
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.rotary import rotary_bands, rotary_table
from magihuman.models.tokens import Layout, patchify
from magihuman.zoo.checks.network import vector_arithmetic

HERE = Path(__file__).resolve().parent
SHARED = {"video_in_channels": 12, "audio_in_channels": 6, "text_in_channels": 10}
DITS = {
    "dit_own_sandwich": (DiTConfig(4, 48, 16, 1, **SHARED, mm_layers=(0, 3), gelu7_layers=(0,)), PackConfig(2, "v2")),
    "dit_own_plain": (
        DiTConfig(2, 32, 16, 2, **SHARED, post_norm_layers=(1,), enable_attn_gating=False),
        PackConfig(2, "v1"),
    ),
    "dit_own_local": (
        DiTConfig(3, 32, 16, 1, **SHARED, mm_layers=(0,), local_attn_layers=(0, 2)),
        PackConfig(2, "v1", frame_receptive_field=1),
    ),
}


def main() -> None:
    """Write every vector file and the manifest beside this script."""
    entries = {}
    with vector_arithmetic(), torch.no_grad():
        for seed, (name, (config, pack)) in enumerate(DITS.items()):
            entries[name] = _write(name, *_dit(config, pack, seed))
        entries["unipc_own"] = _write("unipc_own", *_trajectory(FlowUniPC(6, 3.0), {"steps": 6, "shift": 3.0}))
        entries["ddim_own"] = _write("ddim_own", *_trajectory(ReNoise(4, 5.0), {"steps": 4, "shift": 5.0}))
        entries["sde_own"] = _write("sde_own", *_trajectory(SDE(6, 2.0), {"steps": 6, "shift": 2.0}))
        entries["coords_own"] = _write("coords_own", *_coords())
    manifest = {"set": "own", "files": entries}
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _write(name: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    path = HERE / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    shapes = {k: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in tensors.items()}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": digest, "meta": meta, "tensors": shapes}


def _dit(config: DiTConfig, pack: PackConfig, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    video, audio, text = draw(1, 3, 4, 4, 6), draw(1, 13, 6), draw(1, 7, 10)
    text_len = 5
    state = {}
    for key, shape, is_bf16 in config.tensors():
        # Norm offsets and heads away from their initial zeros, activations beyond the limit of 7 now and then.
        weight = 0.2 * draw(*shape) if len(shape) == 1 else 2 * draw(*shape) / shape[1] ** 0.5
        state[key] = weight.to(torch.bfloat16 if is_bf16 else torch.float32)
    state["adapter.rope.bands"] = rotary_bands(config.head_dim)
    tensors = {f"w/{k}": v for k, v in state.items()}
    tensors |= {"in/x_t": video, "in/audio_x_t": audio, "in/txt_feat": text}
    for prefix, dtype in (("out", torch.bfloat16), ("ref_fp32", torch.float32)):
        model = SingleStreamDiT(config, compute_dtype=dtype, linear_dtype=torch.bfloat16)
        model.load_state_dict(state)
        model.attention_backend = "reference"
        denoiser = Denoiser(model, pack)
        layout = denoiser.layout_for(video.shape, audio.shape[1], [text_len])
        video_v, audio_v = denoiser(video, audio, [text[0, :text_len]], layout)
        tensors |= {f"{prefix}/video": video_v, f"{prefix}/audio": audio_v}
    tokens = patchify(video, pack.patch_size)
    embed = model.adapter(tokens[0], audio[0], text[0, :text_len])
    queries, keys = local_ranges(layout.video_len, audio.shape[1] + text_len, layout.frames, pack.frame_receptive_field)
    assert layout.rotary is not None
    tensors |= {
        "mid/tokens": tokens[0],
        "mid/coords": layout.coords,
        "mid/modality": layout.modality,
        "mid/cu_seqlens": layout.cu_seqlens,
        "mid/q_ranges": queries,
        "mid/k_ranges": keys,
        "mid/rope": layout.rotary,
        "mid/embed": embed,
    }
    meta = {
        "model_config": config.to_dict(),
        "data_proxy": pack.to_dict(),
        "audio_feat_len": [audio.shape[1]],
        "txt_feat_len": [text_len],
        "seed": seed,
    }
    return meta, tensors


def _trajectory(solver: Solver, meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shape = (1, 3, 2, 2, 2)
    velocity = torch.randn(solver.steps, *shape, generator=generator)
    noise = torch.randn(solver.steps, *shape, generator=generator)
    samples = [torch.randn(shape, generator=generator)]
    corrected = []
    for i in range(solver.steps):
        samples.append(solver.step(velocity[i], i, samples[-1], noise[i]))
        if isinstance(solver, FlowUniPC) and solver.corrected is not None:
            corrected.append(solver.corrected)
    tensors = {
        "sigmas": solver.sigmas,
        "timesteps": solver.timesteps,
        "x0": samples[0],
        "velocity": velocity,
        "noise": noise,
        "latents": torch.stack(samples),
    }
    if corrected:
        tensors["corrected_samples"] = torch.stack(corrected)
    if isinstance(solver, SDE):
        tensors["theta"] = torch.tensor(solver.theta)
    return meta, tensors


def _coords() -> tuple[dict[str, Any], dict[str, Tensor]]:
    cases: list[dict[str, Any]] = [
        {"style": "v2", "T": 2, "H": 4, "W": 2, "La": 5, "Lt": 3},
        {"style": "v1", "T": 2, "H": 2, "W": 4, "La": 6, "Lt": 2, "text_offset": 1},
    ]
    tensors = {"bands_hd56": rotary_bands(56)}
    for i, case in enumerate(cases):
        grid = (case["T"], case["H"] // 2, case["W"] // 2)
        offset = case.get("text_offset", 0)
        layout = Layout.build(grid, case["La"], [case["Lt"]], coords_style=case["style"], text_offset=offset)
        tensors[f"{i}/coords"], tensors[f"{i}/modality"] = layout.coords, layout.modality
        tensors[f"{i}/rope_hd56"] = rotary_table(layout.coords, rotary_bands(56))
    return {"cases": cases}, tensors


if __name__ == "__main__":
    main()
