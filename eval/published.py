"""Published values that scores of a suite stand beside: the quality table of the daVinci-MagiHuman paper.

    published_rows(("visual_quality",))["LTX 2.3"]     # {"videoscore2_visual": 4.76}

They are reproducible in form only. The paper fixes VideoScore2 on Verse-Bench's prompts, and GLM-ASR's word error rate, by
characters for Chinese, Japanese and Korean, on TalkVid-Bench. It leaves open what the settings of `eval.run` name: the parts
of the suites, the text of the prompts, seeds and clips per prompt, the reference text, normalisation, pooled or mean, and which
of the judge's scores.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from magihuman.errors import UserError

SOURCE = "daVinci-MagiHuman (arXiv:2603.21986), quality table; reproducible in form only, since the paper leaves settings open"

# Metric -> system -> value: VideoScore2's 1 to 5, and a share of wrong words, which the paper gives in per cent.
TABLE: Mapping[str, Mapping[str, float]] = {
    "visual_quality": {"Ovi 1.1": 4.73, "LTX 2.3": 4.76, "daVinci-MagiHuman": 4.80},
    "text_alignment": {"Ovi 1.1": 4.10, "LTX 2.3": 4.12, "daVinci-MagiHuman": 4.18},
    "physical_consistency": {"Ovi 1.1": 4.41, "LTX 2.3": 4.56, "daVinci-MagiHuman": 4.52},
    "word_error_rate": {"Ovi 1.1": 0.4045, "LTX 2.3": 0.1923, "daVinci-MagiHuman": 0.1460},
}
JUDGE_SCORES = {"hard": "", "soft": "_soft", "expected": "_expected"}
"""Which of VideoScore2's scores is compared -> ending of the metric's key."""
WER_AVERAGES = {"pooled": "wer", "mean": "wer_clip_mean"}
"""How word error rates are averaged -> the metric's key."""
_JUDGED = {
    "visual_quality": "videoscore2_visual",
    "text_alignment": "videoscore2_alignment",
    "physical_consistency": "videoscore2_physics",
}


@dataclass(frozen=True)
class ComparedMetrics:
    """Which of our metrics stands beside a published one, where the paper leaves it open.

    Attributes:
        judge_score: hard, soft or expected, see `eval.metrics.videoscore2`.
        wer_average: pooled over all words, or mean of clips.

    Raises:
        UserError: an unknown one.
    """

    judge_score: str = "hard"
    wer_average: str = "pooled"

    def __post_init__(self) -> None:
        for name, known in (("judge_score", JUDGE_SCORES), ("wer_average", WER_AVERAGES)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name}={value} is unknown; choose {', '.join(known)}")

    def key(self, metric: str) -> str:
        """Key of our metric for a row of `TABLE`."""
        if metric == "word_error_rate":
            return WER_AVERAGES[self.wer_average]
        return _JUDGED[metric] + JUDGE_SCORES[self.judge_score]


def published_rows(metrics: Iterable[str], compared: ComparedMetrics | None = None) -> dict[str, dict[str, float]]:
    """System -> key of our metric -> published value.

    Args:
        metrics: of `TABLE`, such as `Suite.published`.
    """
    compared = compared or ComparedMetrics()
    rows: dict[str, dict[str, float]] = {}
    for metric in metrics:
        for system, value in TABLE[metric].items():
            rows.setdefault(system, {})[compared.key(metric)] = value
    return rows
