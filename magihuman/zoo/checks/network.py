"""The transformer from latents to velocities, in bf16 as released and with every bf16 cast taken out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.tokens import Layout, patchify
from magihuman.zoo.checks import Result, Unsupported, VectorCase, compare, compare_relative
from magihuman.zoo.checks.packing import ROTARY, range_results

FP32 = 2e-5
EMBED = 1e-5
OTHER_KERNEL = (0.1, 0.02)
"""Largest absolute and relative L2 error of bf16 outputs where the vectors' arithmetic cannot be repeated."""
LOCAL = (0.06, 0.015)
"""The same for local layers: the vectors merge two rounded partial attentions, a mask rounds once."""
THREADS = 2
"""Threads the vectors were computed with; the sum order of fp32 products depends on it."""


def check_dit(case: VectorCase) -> list[Result]:
    """Packing, then `ref_fp32/*` in fp32 compute, then `out/*` in bf16 compute.

    With full attention `out/*` must be equal bit for bit, provided that this machine's products can be: its fp32
    ones repeat the stored embedding, its bf16 ones run on the instructions that the vectors were made with.
    Otherwise OTHER_KERNEL is allowed.

    Raises:
        Unsupported: for more than one sample, whose released outputs leak between samples (SPEC O1).
    """
    if len(case.tensors["in/x_t"]) != 1:
        raise Unsupported("batches in the vectors attend across samples (SPEC O1)")
    config, pack = dit_config(case.meta["model_config"]), _pack_config(case)
    with vector_arithmetic(), torch.no_grad():
        layout, _, fp32 = _run(case, config, pack, torch.float32)
        _, embedded, bf16 = _run(case, config, pack, torch.bfloat16)
    assert layout.rotary is not None
    embedding = compare("mid/embed", embedded, case.tensors["mid/embed"], EMBED)
    results = [
        *_packing_results(case, layout, pack),
        compare("mid/rope", layout.rotary, case.tensors["mid/rope"], ROTARY),
        embedding,
    ]
    for name, stored in case.group("ref_fp32/").items():
        results.append(compare(f"ref_fp32/{name}", fp32[name], stored, FP32))
    for name, stored in case.group("out/").items():
        ours = bf16[name]
        if not config.local_attn_layers and embedding.error == 0 and _rounds_alike():
            results.append(compare(f"out/{name}", ours, stored))
            continue
        absolute, relative = LOCAL if config.local_attn_layers else OTHER_KERNEL
        results.append(compare(f"out/{name}", ours, stored, absolute))
        results.append(compare_relative(f"out/{name}", ours, stored, relative))
    return results


def dit_config(values: dict[str, object]) -> DiTConfig:
    """Config from a vector's meta data, which also holds settings of no effect (SPEC O8)."""
    known = {field.name for field in fields(DiTConfig)}
    return DiTConfig.from_dict({k: v for k, v in values.items() if k in known})


@contextmanager
def vector_arithmetic() -> Iterator[None]:
    """Thread count of the machine that computed the vectors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rounds_alike() -> bool:
    """bf16 products run on AVX512-BF16, as the vectors' did; AMX and older CPUs sum in another order."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def _pack_config(case: VectorCase) -> PackConfig:
    proxy = case.meta["data_proxy"]
    return PackConfig(proxy["patch_size"], proxy["coords_style"], proxy["frame_receptive_field"])


def _run(
    case: VectorCase, config: DiTConfig, pack: PackConfig, dtype: torch.dtype
) -> tuple[Layout, Tensor, dict[str, Tensor]]:
    """Layout, embedded tokens, and outputs by their names in the vectors."""
    model = SingleStreamDiT(config, compute_dtype=dtype, linear_dtype=torch.bfloat16)
    model.load_state_dict(case.group("w/"))
    model.attention_backend = "reference"
    denoiser = Denoiser(model, pack).eval()
    video = case.tensors["in/x_t"]
    audio = case.tensors["in/audio_x_t"][:, : case.meta["audio_feat_len"][0]]
    text = case.tensors["in/txt_feat"][0, : case.meta["txt_feat_len"][0]]
    layout = denoiser.layout_for(video.shape, audio.shape[1], [len(text)])
    seen: dict[str, Any] = {}
    model.adapter.register_forward_hook(lambda module, inputs, output: seen.update(embed=output))
    model.register_forward_hook(lambda module, inputs, output: seen.update(rows=output))
    video_v, audio_v = denoiser(video, audio, [text], layout)
    return layout, seen["embed"], {"video": video_v, "audio": audio_v, "packed": _pack(seen["rows"], layout)}


def _pack(rows: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """The release's output: video and audio rows padded to one width, zeros for text."""
    width = max(part.shape[1] for part in rows)
    padded = [F.pad(part, (0, width - part.shape[1])) for part in rows]
    return torch.cat([*padded, rows[0].new_zeros(layout.sizes[2], width)])


def _packing_results(case: VectorCase, layout: Layout, pack: PackConfig) -> list[Result]:
    tokens = patchify(case.tensors["in/x_t"], pack.patch_size)[0]
    stored = case.tensors["mid/tokens"][: layout.video_len, : tokens.shape[1]]
    results = [
        compare("mid/tokens (video)", tokens, stored),
        compare("mid/coords", layout.coords, case.tensors["mid/coords"]),
        compare("mid/modality", layout.modality, case.tensors["mid/modality"]),
        compare("mid/cu_seqlens", layout.cu_seqlens, case.tensors["mid/cu_seqlens"]),
    ]
    return results + range_results(case, layout, pack.frame_receptive_field, "mid")
