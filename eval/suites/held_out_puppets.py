"""Puppets that no training sees (`eval.clips.HELD_OUT_SEED`), with their true clips as references."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from eval.suites.suite_items import Suite, SuiteItem, SuiteOptions

COUNT = 200
"""Items of the suite, as many as `eval.puppets` measures by default."""
CRF = 0
"""x264's quality of the references: lossless in its YUV 4:2:0."""


def read_puppets(options: SuiteOptions) -> Suite:
    """The first `COUNT` held-out puppets of the checkpoint's world (`scene` without a checkpoint): captions, and the puppets as
    drawn and spoken as references.

    Their "speech" is syllables, so they have no language. Pictures are not given: they would show what captions leave open.

    Raises:
        UserError: an option that this suite does not have, or a checkpoint that is of no puppet world.
    """
    from eval.clips import HELD_OUT_SEED, held_out
    from eval.generate import require_tiny
    from magihuman.errors import UserError

    for name in ("suite_path", "parts", "transcripts"):
        if (value := getattr(options, name)) is not None:
            raise UserError(f"{name}={value} is not for suite=puppets; leave it out")
    world = "scene" if options.checkpoint is None else require_tiny("suite=puppets", options.checkpoint)
    puppets = held_out(COUNT, world)
    items = tuple(
        SuiteItem(f"puppet-{index:03d}", puppet.caption, dialogue=" ".join(puppet.words))
        for index, puppet in enumerate(puppets)
    )
    named = {} if world == "tiny" else {"world": world}  # folders of earlier versions do not say it
    facts = {"held_out_seed": HELD_OUT_SEED, **named}
    return Suite("puppets", items, facts=facts, prepare=partial(_with_reference, world=world))


def _with_reference(item: SuiteItem, folder: Path, world: str) -> SuiteItem:
    """The item with its true clip, NAME.mp4 in the folder."""
    path = folder / f"{item.name}.mp4"
    if not path.is_file():
        from data.tiny.puppets import FPS, SAMPLE_RATE, draw_puppet, render, synthesise
        from eval.clips import HELD_OUT_SEED
        from magihuman.media.mp4 import write_mp4

        puppet = draw_puppet(HELD_OUT_SEED, int(item.name.rsplit("-", 1)[1]), world, novel=True)
        write_mp4(path, render(puppet), FPS, synthesise(puppet)[None], SAMPLE_RATE, crf=CRF)
    return replace(item, reference=path)
