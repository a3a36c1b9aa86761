"""The transformer from latents to velocities, in bf16 as released and with every bf16 cast taken out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.tokens import Layout, patchify, unpatchify
from magihuman.zoo.checks import Parameters, Result, Unsupported, VectorCase, compare, compare_relative
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
    Otherwise OTHER_KERNEL is allowed. The samples of a batch attend to each other, as the released code lets them
    (SPEC O1) and ours never does otherwise.

    Raises:
        Unsupported: for parameters that this network does not have.
    """
    config, pack = dit_config(case.meta["model_config"]), pack_config(case.meta["data_proxy"])
    with vector_arithmetic(), torch.no_grad():
        fp32, bf16 = (_run(case, config, pack, dtype) for dtype in (torch.float32, torch.bfloat16))
    embedding = compare("mid/embed", bf16["mid/embed"], case.tensors["mid/embed"], EMBED)
    tokens = case.tensors["mid/tokens"]  # ours keep the video's alone
    rows, width = tokens.shape
    results = [compare("mid/tokens", bf16["mid/tokens"][:rows, :width], tokens)]
    results += [
        compare(f"mid/{name}", bf16[f"mid/{name}"], case.tensors[f"mid/{name}"])
        for name in ("coords", "modality", "cu_seqlens")
    ]
    results += range_results(case, bf16["layout"], pack.frame_receptive_field, "mid")
    results += [compare("mid/rope", bf16["mid/rope"], case.tensors["mid/rope"], ROTARY), embedding]
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


def dit_config(stated: Parameters) -> DiTConfig:
    """Config from a case's parameters.

    Raises:
        Unsupported: for parameters that this network does not have.
    """
    known = {field.name for field in fields(DiTConfig)}
    config = DiTConfig.from_dict({key: stated[key] for key in stated if key in known})
    heads = {"num_heads_q": config.num_heads, "num_heads_kv": config.num_query_groups}
    stated.require(params_dtype="torch.float32", **heads)
    return config


def pack_config(stated: Parameters, coords_style: str | None = None) -> PackConfig:
    """Packing from a case's parameters; `coords_style`: instead of the stated one.

    Raises:
        Unsupported: for tokens of several latent frames.
    """
    stated.require(t_patch_size=1)
    values = stated["patch_size"], coords_style or stated["coords_style"], stated["frame_receptive_field"]
    return PackConfig(*values, stated.get("text_offset", 0))


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


def _run(case: VectorCase, config: DiTConfig, pack: PackConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Packing, embedded tokens and outputs by their names in the vectors, and the layout as "layout"."""
    model = SingleStreamDiT(config, compute_dtype=dtype, linear_dtype=torch.bfloat16)
    model.load_state_dict(case.group("w/"))
    model.attention_backend = "reference"
    denoiser = Denoiser(model, pack).eval()
    video, audio, text = (case.tensors[f"in/{name}"] for name in ("x_t", "audio_x_t", "txt_feat"))
    lengths = list(zip(case.meta["audio_feat_len"], case.meta["txt_feat_len"], strict=True))
    if len(lengths) > 1 and config.local_attn_layers:
        raise Unsupported("local attention of several samples, which the released code refuses too (SPEC O18)")
    inputs = (
        patchify(video, pack.patch_size).flatten(0, 1),
        torch.cat([rows[:length] for rows, (length, _) in zip(audio, lengths, strict=True)]),
        torch.cat([rows[:length] for rows, (_, length) in zip(text, lengths, strict=True)]),
    )
    samples = [denoiser.layout_for(video.shape, sound, [words]) for sound, words in lengths]
    layout, order = _one_sequence(samples)
    seen: list[Tensor] = []
    model.adapter.register_forward_hook(lambda module, _, output: seen.append(output))
    table = model.rotary(layout)
    video_v, audio_v = model(*inputs, layout.with_rotary(table))
    grid = (video.shape[2], video.shape[3], video.shape[4])
    audio_parts = audio_v.split([length for length, _ in lengths])
    none = inputs[2].new_zeros(len(inputs[2]), 0)  # text has no output
    return {
        "layout": layout,
        "mid/tokens": _padded(inputs)[order],
        "mid/coords": layout.coords[order],
        "mid/modality": layout.modality[order],
        "mid/cu_seqlens": torch.tensor([0, *(sum(sample.sizes) for sample in samples)]).cumsum(0).int(),
        "mid/rope": table[order],
        "mid/embed": seen[0][order],
        "packed": _padded((video_v, audio_v, none))[order],
        "video": unpatchify(video_v.unflatten(0, (len(video), -1)), grid, pack.patch_size, video.shape[1]),
        "audio": torch.nn.utils.rnn.pad_sequence(audio_parts, batch_first=True),
    }


def _one_sequence(samples: list[Layout]) -> tuple[Layout, Tensor]:
    """The samples of a batch as one sequence, over which attention spans, as in the released code (SPEC O1).

    Returns:
        the layout, modality-major, and int64 [L], the rows of the vectors' order, sample after sample.
    """
    sizes = [[layout.sizes[modality] for layout in samples] for modality in range(3)]
    video, audio, text = map(sum, sizes)
    length = video + audio + text
    flat = [size for modality in sizes for size in modality]
    numbers = torch.arange(length).split(flat)
    order = torch.cat([numbers[modality * len(samples) + i] for i in range(len(samples)) for modality in range(3)])
    if len(samples) == 1:
        return samples[0], order
    pieces = [layout.coords.split(layout.sizes) for layout in samples]
    coords = torch.cat([piece[modality] for modality in range(3) for piece in pieces])
    modality = torch.repeat_interleave(torch.arange(3), torch.tensor([video, audio, text]))
    ends = torch.tensor([0, length], dtype=torch.int32)
    whole = Layout(video, audio, (text,), 0, coords, modality, None, None, ((1, length),), ends)
    return whole, order


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of video, audio and text in one tensor, padded with zeros to one width."""
    width = max(part.shape[1] for part in rows)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in rows])
