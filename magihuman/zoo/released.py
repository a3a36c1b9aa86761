"""Configs of the published weights, from tensor shapes and the folder's name.

Shapes give the architecture (`infer_model`), so tiny files of the same layout work too. Sampling settings and local
attention follow from the folder's name (SPEC 9) or the setting role=.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from magihuman.codecs.bundle import RELEASED_REPO, ROLES
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.io.export import ExportConfig, Sampling, Size
from magihuman.models.config import EXPERTS, Contract, DiTConfig, PackConfig, local_layers

PATCH = 2
FRAMES = 101  # 4 s at 25 frames per second (SPEC 4.1)

TensorShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Role:
    """Sampling settings, clip size and coordinates of a published model (SPEC 3.5, 4.1, 4.3, 4.4).

    Attributes:
        coords_style: v2 for base models, v1 for super-resolution.
        local: local attention in most layers (SPEC 1.6).
    """

    sampling: Sampling
    size: Size
    coords_style: str = "v2"
    local: bool = False


_NOT_IT = "give the folder of a network, such as base or distill"
_NONE = Guidance(1.0, 1.0, audio=1.0)
# The published settings run super-resolution without guidance (SPEC 4.4).
_SR = Sampling("unipc", steps=5, shift=5.0, guidance=_NONE)

_SETTINGS = {
    "base": Role(Sampling("unipc", steps=32, shift=5.0, guidance=Guidance(5.0, 2.0, 500, 5.0)), Size(FRAMES, 256, 448)),
    "distill": Role(Sampling("renoise", steps=8, shift=5.0, guidance=_NONE), Size(FRAMES, 256, 448)),
    "540p_sr": Role(_SR, Size(FRAMES, 512, 896), "v1"),
    "1080p_sr": Role(_SR, Size(FRAMES, 1088, 1920), "v1", local=True),
}


def config_for(role: str, shapes: TensorShapes, source: object) -> ExportConfig:
    """The config of a published model.

    Args:
        shapes: of all its tensors, by name; source: its name in messages.

    Raises:
        UserError: unknown role, or tensors of another network.
    """
    if role not in ROLES:
        raise UserError(f"role={role} is unknown; choose one of {', '.join(ROLES)}")
    facts, model = _SETTINGS[role], infer_model(shapes, source)
    if facts.local:
        model = replace(model, local_attn_layers=local_layers(model.num_layers))
    return ExportConfig(
        model=model,
        pack=PackConfig(patch_size=PATCH, coords_style=facts.coords_style),
        codecs="released",
        contract=Contract(
            video_codec="wan2.2",
            audio_codec="stable-audio-oobleck",
            text_encoder="t5gemma-9b-9b-ul2",
            video_channels=model.video_in_channels // PATCH**2,
            audio_channels=model.audio_in_channels,
            text_channels=model.text_in_channels,
            video_stride=(4, 16, 16),
            fps=25.0,
            audio_rate=51200,
            waveform_channels=2,
        ),
        sampling=facts.sampling,
        size=facts.size,
        provenance={"released": role, "repository": RELEASED_REPO},
    )


def infer_model(shapes: TensorShapes, source: object) -> DiTConfig:
    """Hyperparameters from the tensors' shapes (SPEC 1.2).

    H and input widths are the embedders' shapes; D is 8 times the number of rotary bands; a layer has experts where its
    norm has 3H elements, and GELU7 where the up projection is as wide as the input of the down projection (SwiGLU7:
    twice as wide). The fused projection has (H/D + 2G) D rows, and H/D more with gates; gates are assumed where both
    would give whole heads, since the release has them.

    Raises:
        UserError: a tensor that is needed for this is missing or has an unexpected shape.
    """

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != ndim or 0 in found:
            what = "lacks" if found is None else f"has an unexpected shape {list(found)} for"
            raise UserError(f"{source} is not a daVinci-MagiHuman network: it {what} {key}; {_NOT_IT}")
        return found

    hidden, video = shape("adapter.video_embedder.weight", 2)
    head_dim = 8 * shape("adapter.rope.bands", 1)[0]
    layers = {int(found[1]) for key in shapes if (found := re.match(r"block\.layers\.(\d+)\.", key))}
    if not layers:
        raise UserError(f"{source} is not a daVinci-MagiHuman network: it lacks block.layers.0; {_NOT_IT}")
    count = max(layers) + 1
    experts, gelu, post_norm = [], [], []
    for i in range(count):
        prefix = f"block.layers.{i}"
        if shape(f"{prefix}.attention.pre_norm.weight", 1)[0] == EXPERTS * hidden:
            experts.append(i)
        rows = shape(f"{prefix}.mlp.up_gate_proj.weight", 2)[0] // (EXPERTS if i in experts else 1)
        if rows == shape(f"{prefix}.mlp.down_proj.weight", 2)[1]:
            gelu.append(i)
        if f"{prefix}.attn_post_norm.weight" in shapes:
            post_norm.append(i)
    heads = hidden // head_dim
    fused = shape("block.layers.0.attention.linear_qkv.weight", 2)[0] // (EXPERTS if 0 in experts else 1)
    shared = fused - heads * head_dim  # rows of keys and values, and of gates
    gated = shared > heads and (shared - heads) % (2 * head_dim) == 0
    return DiTConfig(
        num_layers=count,
        hidden_size=hidden,
        head_dim=head_dim,
        num_query_groups=(shared - heads * gated) // (2 * head_dim),
        video_in_channels=video,
        audio_in_channels=shape("adapter.audio_embedder.weight", 2)[1],
        text_in_channels=shape("adapter.text_embedder.weight", 2)[1],
        mm_layers=tuple(experts),
        gelu7_layers=tuple(gelu),
        post_norm_layers=tuple(post_norm),
        enable_attn_gating=gated,
    )
