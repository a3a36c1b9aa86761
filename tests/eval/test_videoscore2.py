"""VideoScore2: answers in both forms, arithmetic of the scores, input, and a tiny Qwen2.5-VL through the same code."""

import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoded_clip import decoded_clip
from tiny_judge import save_tiny_judge
from torch.multiprocessing.reductions import StorageWeakRef
from toy_metrics import write_clip

from eval import video_judge
from eval.clip_file import ClipFile, MeasurementError
from eval.metrics.registry import measurements
from eval.metrics.videoscore2 import Judge, JudgeOptions
from eval.scoring import Scored, score
from eval.video_judge import Grade, parse_answer, sampled_frames, shown_size, soft_scores, video_patches
from magihuman.errors import UserError

JUDGE = measurements()["videoscore2"]
PLAIN = "visual quality: 4; \ntext-to-video alignment: 3, \nphysical/common-sense consistency: 5"
LISTED = (
    "(1) visual quality – clarity, smoothness, artifacts: 4\n(2) text-to-video alignment – fidelity to the prompt: 3\n"
    "(3) physical/common-sense consistency – naturalness and physics plausibility: 5"
)
REASONING = "<think>\nVisual Quality Analysis: 1080p.\nvisual quality: 1, text-to-video alignment: 1, "
REASONING += "physical/common-sense consistency: 1\n</think>\n\n"


class TestParser:
    @pytest.mark.parametrize(
        "answer", [PLAIN, LISTED, PLAIN.upper(), LISTED.replace("visual quality", "**Visual Quality**")]
    )
    @pytest.mark.parametrize("before", ["", REASONING])
    def test_reads_both_forms_after_the_reasoning(self, answer: str, before: str) -> None:
        grades = parse_answer(before + answer)
        assert [grade.value for grade in grades] == [4, 3, 5]
        assert [(before + answer)[grade.position] for grade in grades] == ["4", "3", "5"]
        assert grades[0].position >= len(before)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("", "no scores in the answer: it is empty"),
            (REASONING + "A good video.", "no scores in the answer: "),
            (REASONING[:-12], "the answer ends within its reasoning: "),
            (PLAIN.replace("5", "6"), "scores 4, 3, 6 are no whole numbers from 1 to 5"),
            (PLAIN.replace("5", "0"), "scores 4, 3, 0 are no"),
            (PLAIN.replace("4", "4.5"), "scores 4.5, 3, 5 are no"),
            (PLAIN.replace("5", "10"), "scores 4, 3, 10 are no"),
            (PLAIN.replace("3,", "-,"), "no scores in the answer: "),
        ],
    )
    def test_anything_else_is_a_failure_and_no_number(self, answer: str, reason: str) -> None:
        with pytest.raises(MeasurementError) as error:
            parse_answer(answer)
        assert reason in str(error.value)

    def test_a_failure_shows_the_end_of_the_answer_on_one_line(self) -> None:
        with pytest.raises(MeasurementError) as error:
            parse_answer("x" * 500 + "\nthe\x18 end")
        assert str(error.value).endswith("xxx the? end")
        assert len(str(error.value)) < 250


class TestScores:
    def test_card_and_expectation_differ_as_in_the_research(self) -> None:
        """p(4) = .38, p(5) = .60: the card gives 3.06 with these alone, the expectation 4.61."""
        logits = np.log([1e-30, 1e-30, 1e-30, 0.38, 0.60])
        card, expected = soft_scores(logits)
        assert card == pytest.approx(5 * 0.60 / 0.98)
        assert expected == pytest.approx((4 * 0.38 + 5 * 0.60) / 0.98)

    def test_five_equal_digits(self) -> None:
        assert soft_scores(np.zeros(5)) == (pytest.approx(0.2), pytest.approx(3.0))

    def test_a_sure_digit_is_itself_whatever_the_logits_level(self) -> None:
        assert soft_scores(np.array([0, 0, 0, 900.0, 0])) == (pytest.approx(4), pytest.approx(4))


class TestInput:
    @pytest.mark.parametrize(
        ("total", "rate", "expected"),
        [(125, 25.0, 10), (50, 25.0, 4), (25, 25.0, 4), (3, 25.0, 2), (24 * 600, 24.0, 768), (251, 25.0, 20)],
    )
    def test_two_frames_per_second_and_an_even_number(self, total: int, rate: float, expected: int) -> None:
        chosen = sampled_frames(total, rate, 2.0)
        assert len(chosen) == expected
        assert (chosen[0], chosen[-1]) == (0, total - 1)

    def test_one_frame_is_no_video(self) -> None:
        with pytest.raises(MeasurementError, match="needs 2 frames, and the clip has 1"):
            sampled_frames(1, 25.0, 2.0)

    def test_sizes_are_those_of_transformers(self) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        rng = np.random.default_rng(0)
        for height, width in [(1080, 1920), (256, 448), (64, 64), *rng.integers(20, 3000, (200, 2)).tolist()]:
            expected = smart_resize(height, width, 28, 128 * 28 * 28, 768 * 28 * 28)
            assert shown_size(height, width, 10) == expected, (height, width)

    def test_long_videos_are_shown_smaller(self) -> None:
        assert shown_size(1080, 1920, 10) == (560, 1008)
        assert shown_size(1080, 1920, 768) == (336, 644)

    def test_patches_are_those_of_transformers(self) -> None:
        """Its image processor sees an image as a video of two equal frames; no scaling, so equal to rounding."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        image = np.random.default_rng(1).integers(0, 256, (336, 364, 3), dtype=np.uint8)
        expected = Qwen2VLImageProcessorPil()(image, return_tensors="np")
        patches, grid = video_patches(np.stack([image, image]))
        assert grid.tolist() == expected["image_grid_thw"].tolist() == [[1, 24, 26]]
        np.testing.assert_allclose(patches.numpy(), expected["pixel_values"], atol=1e-5)

    def test_time_is_the_slowest_axis_and_an_odd_end_is_repeated(self) -> None:
        frames = np.full((3, 336, 336, 3), 255, np.uint8) * np.array([0, 1, 1], np.uint8)[:, None, None, None]
        patches, grid = video_patches(frames)
        assert grid.tolist() == [[2, 24, 24]]
        dark, light = (0 - 0.48145466) / 0.26862954, (1 - 0.48145466) / 0.26862954
        first, last = patches[0].reshape(3, 2, 14, 14), patches[-1].reshape(3, 2, 14, 14)
        assert first[0, 0, 0, 0] == pytest.approx(dark, abs=1e-5)
        assert first[0, 1, 0, 0] == pytest.approx(light, abs=1e-5)
        assert (last[0] - light).abs().max() < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def load(folder: Path, **settings: object) -> Judge:
    options = {"dtype": "float32", "device": "cpu", "max_tokens": 24, **settings}
    return JUDGE.load(JUDGE.options(weights=str(folder), **options))


def clip() -> ClipFile:
    frames = np.random.default_rng(0).integers(0, 256, (10, 48, 64, 3), dtype=np.uint8)
    return decoded_clip(frames, prompt="A woman waves.")


def given(judge: Judge) -> dict[str, torch.Tensor]:
    made = clip()
    return judge.inputs(made.frames, made.fps, made.prompt)


def plant(judge: Judge, monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[Any]:
    """Let the model say `answers` in turn, torn between 4 (.6) and 5 (.4) at every digit; its calls: settings, clips."""
    waiting, calls = list(answers), []

    def generate(batch: dict[str, torch.Tensor], sampling: dict[str, Any]) -> list[tuple[list[int], torch.Tensor]]:
        count = len(batch["input_ids"])
        calls.append((sampling, count))
        made = []
        for ids in (judge.tokenizer.encode(waiting.pop(0), add_special_tokens=False) for _ in range(count)):
            digits = torch.full((len(ids), 5), -30.0)
            digits[[place for place, token in enumerate(ids) if token in judge.digits]] = (
                torch.tensor([0, 0, 0, 0.6, 0.4]).log() + 7
            )
            made.append((ids, digits))
        return made

    monkeypatch.setattr(judge, "_generate", generate)
    return calls


class TestTinyModel:
    def test_special_tokens_in_a_prompt_are_text(self, folder: Path) -> None:
        judge = load(folder)
        plain = judge.inputs(clip().frames, 25.0, "A dog.")
        spelled = judge.inputs(clip().frames, 25.0, "A dog.<|video_pad|><|im_end|>{prompt}")
        token = judge.model.config.video_token_id
        grid = plain["video_grid_thw"][0]
        assert (plain["input_ids"] == token).sum() == (spelled["input_ids"] == token).sum() == grid.prod() // 4
        assert ((plain["mm_token_type_ids"] == 2) == (plain["input_ids"] == token)).all()
        asked = judge.tokenizer.decode(spelled["input_ids"][0].tolist())
        assert "Video prompt: A dog.<|video_pad|><|im_end|>{prompt}\n\nPlease" in asked

    def test_planted_answer_gives_nine_values_and_the_text(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = load(folder)
        calls = plant(judge, monkeypatch, REASONING + LISTED)
        values = JUDGE.measure(clip(), judge)
        assert values.pop("videoscore2_text") == REASONING + LISTED
        assert set(values) == {metric.key for metric in JUDGE.metrics}
        hard = {"visual": 4, "alignment": 3, "physics": 5}
        for key, value in hard.items():
            assert values[f"videoscore2_{key}"] == value
            assert values[f"videoscore2_{key}_soft"] == pytest.approx(2.4)
            assert values[f"videoscore2_{key}_expected"] == pytest.approx(4.4)
        assert [(sampling["do_sample"], count) for sampling, count in calls] == [(False, 1)]

    def test_sampled_answers_are_averaged(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = load(folder, samples=2)
        calls = plant(judge, monkeypatch, PLAIN, PLAIN.replace("4", "1"))
        values = JUDGE.measure(clip(), judge)
        assert values["videoscore2_visual"] == 2.5
        assert calls == [({"do_sample": True, "temperature": 0.7}, 1)] * 2
        assert values["videoscore2_text"].count("visual quality") == 2

    def test_an_answer_without_scores_is_a_failure(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = load(folder, samples=3)
        plant(judge, monkeypatch, PLAIN, "I refuse.", "No.")
        with pytest.raises(
            MeasurementError, match=r"2 of 3 answers have no scores; no scores in the answer: I refuse\."
        ):
            JUDGE.measure(clip(), judge)

    @pytest.mark.parametrize("settings", [{}, {"samples": 1, "temperature": 3.0}], ids=["greedy", "sampled"])
    def test_logits_are_those_of_a_forward_pass(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
    ) -> None:
        """Neither the temperature nor a penalty of the checkpoint changes the probabilities of the digits."""
        judge = load(folder, **settings)
        judge.model.generation_config.repetition_penalty = 1.5
        judge.digits = list(range(judge.model.config.text_config.vocab_size))
        seen: list[list[int]] = []
        inner = judge._scored
        monkeypatch.setattr(judge, "_scored", lambda ids, digits: seen.append(ids) or inner(ids, digits))

        def first_places(text: str) -> tuple[Grade, ...]:
            return tuple(Grade(3, len(judge._text(seen[0][:place]))) for place in (0, 4, 9))

        monkeypatch.setattr("eval.metrics.videoscore2.parse_answer", first_places)
        ((answer,),) = judge.answers([given(judge)])
        whole = given(judge)
        length, ids = whole["input_ids"].shape[1], torch.tensor([seen[0]])
        whole["input_ids"] = torch.cat([whole["input_ids"], ids], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        with torch.inference_mode():
            logits = judge.model(**whole).logits[0, length - 1 :]
        lengths = [len(judge._text(seen[0][:place])) for place in range(len(seen[0]))]
        for found, start in zip(answer.digits, (0, 4, 9), strict=True):
            place = max(n for n, size in enumerate(lengths) if size == lengths[start])
            np.testing.assert_allclose(found, logits[place].numpy(), atol=1e-4)

    def test_same_seed_same_answer_and_the_global_generator_is_left_alone(self, folder: Path) -> None:
        judge = load(folder, samples=1, temperature=2.0)

        def said(judge: Judge) -> str:
            (error,) = judge.answers([given(judge)])
            return str(error)

        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        first = said(judge)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert said(judge) == first
        judge.options.seed = 1
        assert said(judge) != first

    def test_identity_is_of_weights_and_settings(self, folder: Path) -> None:
        def of(**settings: object) -> object:
            return JUDGE.identity(JudgeOptions(weights=str(folder), **settings))

        assert of() == of(device="cpu") == of(seed=7) == of(batch=1)
        assert len({str(of(**s)) for s in ({}, {"fps": 4.0}, {"samples": 1}, {"samples": 1, "seed": 7})}) == 4

    def test_the_same_weights_elsewhere_are_the_same_judge(self, folder: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(folder, tmp_path / folder.name)
        here, there = (JUDGE.identity(JudgeOptions(weights=str(path))) for path in (folder, moved))
        assert here == there
        assert str(tmp_path) not in str(there)

    def test_a_lost_tensor_is_no_random_judge(self, folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        copy = shutil.copytree(folder, tmp_path / "copy")
        weights = load_file(copy / "model.safetensors")
        lost = next(name for name in weights if name.endswith("norm.weight"))
        save_file(
            {name: value for name, value in weights.items() if name != lost},
            copy / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(UserError, match=r"lacks 1 tensors, such as .*norm\.weight; copy it again"):
            load(copy)

    def test_a_foreign_model_is_one_line(self, folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / "config.json").write_text('{"model_type": "other", "auto_map": {"AutoConfig": "evil.Config"}}')
        with pytest.raises(UserError, match=r"^videoscore2.weights=.* cannot be loaded: "):
            load(copy)

    def test_missing_weights_name_the_command(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert JUDGE.missing(JudgeOptions()).remedy == "hf download TIGER-Lab/VideoScore2"
        with pytest.raises(UserError, match=r"^TIGER-Lab/VideoScore2 is not in the local"):
            Judge(JudgeOptions())

    @pytest.mark.parametrize(
        "wrong", [{"batch": 0}, {"samples": -1}, {"fps": 0.0}, {"max_tokens": 0}, {"samples": 1, "temperature": 0.0}]
    )
    def test_wrong_settings_are_one_line(self, wrong: dict[str, float]) -> None:
        with pytest.raises(UserError, match=rf"{list(wrong)[-1]}={list(wrong.values())[-1]}"):
            JudgeOptions(**wrong)


def wide_awake(folder: Path, **settings: object) -> Judge:
    """A judge with larger random weights: it says something else of every clip, and no token twice in a row for long."""
    judge = load(folder, **settings)
    draw = torch.Generator().manual_seed(1)
    for weights in judge.model.parameters():
        if weights.ndim > 1:
            weights.data = 2 * torch.randn(weights.shape, generator=draw) / weights.shape[-1] ** 0.5
    return judge


def clips() -> list[ClipFile]:
    """Of other sizes, lengths and languages."""
    made = []
    for shape, prompt in [((10, 48, 64), "A dog."), ((40, 64, 48), "Ein Hund bellt laut."), ((75, 90, 160), "雨")]:
        frames = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), dtype=np.uint8)
        made.append(decoded_clip(frames, prompt=prompt))
    return made


class TestBatch:
    @pytest.mark.parametrize("penalty", [1.0, 1.5])
    def test_tokens_and_logits_are_those_of_single_clips(self, folder: Path, penalty: float) -> None:
        """Texts of three lengths, videos of three grids; answers that end at three places, one of them at the limit."""
        judge = wide_awake(folder)
        judge.model.generation_config.repetition_penalty = penalty
        inputs = [JUDGE.measure.prepare(made, judge) for made in clips()]
        assert (
            len({one["input_ids"].shape[1] for one in inputs})
            == len({str(one["video_grid_thw"]) for one in inputs})
            == 3
        )
        greedy = {"do_sample": False}
        free = [judge._generate(judge._joined([one]), greedy)[0][0] for one in inputs]
        ends = next(
            {free[0][n], free[1][m]} for n in range(3, 20) for m in range(n + 1, 24)
            if not {free[0][n], free[1][m]} & {*free[0][:n], *free[1][:m], *free[2]}
        )  # fmt: skip
        judge.model.generation_config.eos_token_id = list(ends)
        judge.ends = ends
        alone = [judge._generate(judge._joined([one]), greedy)[0] for one in inputs]
        batch = judge._generate(judge._joined(inputs), greedy)
        assert [ids for ids, _ in batch] == [ids for ids, _ in alone]
        assert len({len(ids) for ids, _ in batch}) == 3
        assert len(batch[2][0]) == judge.options.max_tokens
        for (ids, found), (_, expected) in zip(batch, alone, strict=True):
            assert found.shape == (len(ids), 5)
            assert expected.std() > 0.5
            np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)

    def test_padding_stands_on_the_left_and_adds_no_token(self, folder: Path) -> None:
        """A penalty on repetition looks at all tokens before, also at masked ones."""
        judge = load(folder)
        inputs = [JUDGE.measure.prepare(made, judge) for made in clips()]
        batch = judge._joined(inputs)
        for row, one in enumerate(inputs):
            length = one["input_ids"].shape[1]
            assert set(batch["input_ids"][row].tolist()) == set(one["input_ids"][0].tolist())
            for name in ("input_ids", "mm_token_type_ids", "attention_mask"):
                assert torch.equal(batch[name][row, -length:], one[name][0])
            assert batch["attention_mask"][row].sum() == length
        assert torch.equal(batch["pixel_values_videos"], torch.cat([one["pixel_values_videos"] for one in inputs]))

    def test_of_all_logits_those_of_the_digits_are_kept(self, folder: Path) -> None:
        judge = wide_awake(folder)
        shapes, stored, alive = [], [], []

        def watch(head: Any, hidden: Any, logits: torch.Tensor) -> None:
            alive.append(sum(not storage.expired() for storage in stored))
            shapes.append(tuple(logits.shape))
            stored.append(StorageWeakRef(logits.untyped_storage()))

        judge.model.get_output_embeddings().register_forward_hook(watch)
        inputs = [JUDGE.measure.prepare(made, judge) for made in clips()]
        ((_, digits), *_) = judge._generate(judge._joined(inputs), {"do_sample": False})
        assert digits.shape == (24, 5)
        assert shapes == [(3, 1, judge.model.config.text_config.vocab_size)] * 24
        assert max(alive) <= 1, "of the last token at most"

    @pytest.mark.parametrize("settings", [{}, {"samples": 2, "temperature": 2.0}], ids=["greedy", "sampled"])
    def test_answers_do_not_depend_on_the_batch(self, folder: Path, settings: dict[str, object]) -> None:
        judge = wide_awake(folder, max_tokens=5, **settings)
        inputs = [JUDGE.measure.prepare(made, judge) for made in clips()]
        alone = [judge.answers([one])[0] for one in inputs]
        for order in ([0, 1, 2], [2, 0]):
            for found, number in zip(judge.answers([inputs[number] for number in order]), order, strict=True):
                assert isinstance(found, MeasurementError)
                assert (str(found), found.texts) == (str(alone[number]), alone[number].texts)
        assert len({str(one.texts) for one in alone}) == 3

    def test_values_belong_to_their_clips(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = load(folder)
        calls = plant(judge, monkeypatch, PLAIN, "I refuse.", PLAIN.replace("4", "2"))
        inputs = [JUDGE.measure.prepare(made, judge) for made in clips()]
        first, failed, last = JUDGE.measure.together(inputs, judge)
        assert (first["videoscore2_visual"], last["videoscore2_visual"]) == (4, 2)
        assert isinstance(failed, MeasurementError)
        assert failed.texts == {"videoscore2_text": "I refuse."}
        assert [count for _, count in calls] == [3]


class TestRunner:
    """The way of `eval.score`: file, cache, model, row."""

    def run(self, folder: Path, path: Path, cache: Path, prompt: str = "A dog.") -> Scored:
        options = {"videoscore2": {"weights": str(folder), "dtype": "float32", "device": "cpu", "max_tokens": 24}}
        return score([ClipFile(path, prompt=prompt)], ["videoscore2"], options, cache, progress=False)

    def test_the_model_itself_runs_and_its_nonsense_is_failed(self, folder: Path, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4")
        (row,) = self.run(folder, path, tmp_path / "cache.sqlite").rows
        assert {value.status for value in row.values.values()} == {"failed"}
        assert {value.value for value in row.values.values()} == {None}
        assert "no scores in the answer" in row.values["videoscore2_visual"].reason
        assert row.texts["videoscore2_text"]

    def test_a_second_run_loads_no_model(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, inner = write_clip(tmp_path / "a.mp4"), Judge.__init__

        def planted(judge: Judge, options: JudgeOptions) -> None:
            inner(judge, options)
            plant(judge, monkeypatch, PLAIN, PLAIN)

        monkeypatch.setattr(Judge, "__init__", planted)
        first = self.run(folder, path, tmp_path / "cache.sqlite")
        assert first.rows[0].values["videoscore2_visual_expected"].value == pytest.approx(4.4)
        assert first.rows[0].texts == {"videoscore2_text": PLAIN}
        monkeypatch.setattr(Judge, "__init__", None)  # calling it is an error
        again = self.run(folder, path, tmp_path / "cache.sqlite")
        assert (again.measured, again.rows[0].to_dict()) == (0, first.rows[0].to_dict())

    def test_without_a_prompt_it_is_skipped(self, folder: Path, tmp_path: Path) -> None:
        (row,) = self.run(folder, write_clip(tmp_path / "a.mp4"), tmp_path / "cache.sqlite", prompt="").rows
        assert row.values["videoscore2_visual"].status == "skipped"


def test_the_question_is_the_one_the_model_was_trained_for() -> None:
    """Its text decides the answers: a change here is a change of the judge, and needs another `version`."""
    import hashlib

    assert video_judge.QUESTION.count("–") == 3
    assert hashlib.sha256(video_judge.QUESTION.encode()).hexdigest()[:16] == "875eb882f163a374"
