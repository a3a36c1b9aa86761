"""`eval.conditioning`: the conditioning reaches the network, and the metrics show a student that ignores it."""

import json
import shutil

import numpy as np
import pytest
import torch

from eval import conditioning
from eval.clips import Clips, ground_truth, held_out, through_codec
from magihuman import zoo
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("conditions")
    shutil.copytree(zoo.find("tiny/base"), folder / "teacher")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    config["sampling"]["steps"] = 8  # faster than its 32
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    values = conditioning.run("tiny/distill", str(folder / "teacher"), clips=2, output=str(folder), progress=False)
    return values, json.loads((folder / "conditions.json").read_text())


def test_every_set_has_the_three_ways_and_known_figures(result) -> None:
    values, written = result
    assert values["sets"].keys() == written["sets"].keys() == conditioning.CONDITIONING.keys()
    for given, columns in written["sets"].items():
        assert list(columns) == [
            "teacher, 8 steps, CFG", "teacher, 8 re-noise steps, no CFG", "student, 8 re-noise steps, no CFG",
        ]  # fmt: skip
        for column in columns.values():
            assert column["attributes"]["value"] == 1
            assert column["sync_skill"]["value"] > 0.85
            assert (column["skin"]["value"] is None) == (given == "audio")
            if "frame" in given:
                assert column["skin"]["value"] == 1


def test_a_skin_tone_that_was_not_given_is_counted() -> None:
    puppets = held_out(12)
    truth = through_codec(ground_truth(puppets), load_bundle("tiny"))
    bound = truth.score()
    assert conditioning.conditioning_column(bound, puppets, first_frame=True)["skin"]["value"] == 1
    others = [*puppets[1:], puppets[0]]
    found = conditioning.conditioning_column(bound, others, first_frame=True)["skin"]["value"]
    assert found == pytest.approx(np.mean([a.skin == b.skin for a, b in zip(puppets, others, strict=True)]))
    assert found < 0.8


def test_what_is_given_is_in_the_samples() -> None:
    """The sampled clip begins with the frame and has the sound, both as the codecs have them."""
    from inference.pipeline import Pipeline
    from magihuman import zoo

    world, puppets = load_bundle("tiny"), held_out(2)
    truth, made = ground_truth(puppets), Clips()
    pipeline = Pipeline(zoo.load("tiny/distill"), world)
    way = conditioning.Sampler("student", pipeline, pipeline.settings(steps=2))
    conditioning._sample(way, truth, slice(0, 2), (True, True), 0, made)
    coded = through_codec(truth, world)
    for own, wanted in zip(made.waves, coded.waves, strict=True):
        np.testing.assert_allclose(own, wanted, atol=2e-3)
    first = torch.from_numpy(np.stack(truth.frames))[:, :1].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    alone = world.video_codec.decode(world.video_codec.encode(first)).clamp(-1, 1)
    for own, wanted in zip(made.frames, alone, strict=True):
        error = own[0].astype(float) - 127.5 * (wanted[:, 0].permute(1, 2, 0).numpy() + 1)
        assert np.abs(error).mean() < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clips": 1}, "clips=1"), ({"student": "no/such"}, "neither a folder nor a shipped name")],
)
def test_bad_settings_are_told(settings, message) -> None:
    with pytest.raises(UserError, match=message):
        conditioning.run(
            **{"student": "tiny/distill", "teacher": "tiny/base", "clips": 2, "progress": False, **settings}
        )
