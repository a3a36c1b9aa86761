"""Puppets of the tiny world that no training sees (`eval.clips.HELD_OUT_SEED`), with their true clips as references."""

from dataclasses import replace
from pathlib import Path

from eval.suites.suite_items import Suite, SuiteItem, SuiteOptions

COUNT = 200
"""Items of the suite, as many as `eval.puppets` measures by default."""
CRF = 0
"""x264's quality of the references: lossless in its YUV 4:2:0."""


def read_puppets(options: SuiteOptions) -> Suite:
    """The first `COUNT` held-out puppets: captions, and the puppets as drawn and spoken as references.

    Their "speech" is syllables, so they have no language. Pictures are not given: a caption leaves nothing of a puppet
    open but its skin tone.

    Raises:
        UserError: an option that this suite does not have.
    """
    from data.tiny.puppets import draw_puppet
    from eval.clips import HELD_OUT_SEED
    from magihuman.errors import UserError

    for name in ("suite_path", "parts", "transcripts"):
        if (value := getattr(options, name)) is not None:
            raise UserError(f"{name}={value} is not for suite=puppets; leave it out")
    puppets = [draw_puppet(HELD_OUT_SEED, index) for index in range(COUNT)]
    items = tuple(
        SuiteItem(f"puppet-{index:03d}", puppet.caption, dialogue=" ".join(puppet.words))
        for index, puppet in enumerate(puppets)
    )
    return Suite("puppets", items, facts={"held_out_seed": HELD_OUT_SEED}, prepare=_with_reference)


def _with_reference(item: SuiteItem, folder: Path) -> SuiteItem:
    """The item with its true clip, NAME.mp4 in the folder."""
    path = folder / f"{item.name}.mp4"
    if not path.is_file():
        from data.tiny.puppets import FPS, SAMPLE_RATE, draw_puppet, render, synthesise
        from eval.clips import HELD_OUT_SEED
        from magihuman.media.mp4 import write_mp4

        puppet = draw_puppet(HELD_OUT_SEED, int(item.name.rsplit("-", 1)[1]))
        write_mp4(path, render(puppet), FPS, synthesise(puppet)[None], SAMPLE_RATE, crf=CRF)
    return replace(item, reference=path)
