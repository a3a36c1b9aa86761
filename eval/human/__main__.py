"""The command line: plan, serve, report, coverage."""

from typing import Any

from eval.human.study_plan import StudySettings

PROGRAM = "python -m eval.human"


def plan(settings: StudySettings) -> dict[str, Any]:
    """Plan a study."""
    from eval.human.study_plan import plan_study

    return plan_study(settings)


def serve(study: str = "study", port: int = 8000, host: str = "127.0.0.1", url: str | None = None) -> None:
    """Serve a study to its raters until Ctrl-C; every vote that the page confirms is on the disk.

      python -m eval.human serve study=study
      python -m eval.human serve study=study url=https://example.trycloudflare.com

    Prints a link per rater and writes them to links.txt. Start it again at any time: raters go on where they were.

    Args:
        study: folder made by `plan`
        port: 0: any free one
        host: 0.0.0.0 for all machines of the network
        url: address under which raters reach the server, for the links; none is http://HOST:PORT

    Raises:
        UserError: no study there, votes of another plan, the port is taken, or url is no address.
    """
    from eval.human.study_server import serve_study

    serve_study(study, port, host, url)


def report(study: str = "study", output: str | None = None) -> dict[str, Any]:
    """Report a study, finished or not: win, tie and loss per opponent with intervals, agreement, biases, raters.

      python -m eval.human report study=study

    Writes report.html (one file, opens without a network), report.md, report.json, votes.csv and votes.jsonl.

    Args:
        study: folder made by `plan`
        output: folder; none is report/ in the study's folder

    Raises:
        UserError: no study there, or votes of another plan.
    """
    from eval.human.study_report import report_study

    return report_study(study, output)


def coverage(
    output: str | None = None, studies: int = 1000, raters: int = 10, pairs: int = 100, rater_sd: float = 0.5,
    prompt_sd: float = 1.0, win: float = 0.8, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Simulate studies: how often the intervals hold the true share of wins, and how wide they are.

      python -m eval.human coverage raters=5 pairs=40

    Use it to plan: a study of R raters and P pairs can tell differences of about half the width.

    Args:
        output: result file; none: only print
        studies: simulated, of each kind
        raters: of each study
        pairs: of each rater with one opponent
        rater_sd: standard deviation of raters, on the logit scale
        prompt_sd: of prompts
        win: share of wins of an average rater for an average prompt
        seed: of the simulation

    Raises:
        UserError: impossible settings.
    """
    from eval.human.interval_coverage import simulate_coverage

    return simulate_coverage(output, studies, raters, pairs, rater_sd, prompt_sd, win, seed)


if __name__ == "__main__":
    from magihuman.cli import run_one

    run_one({"plan": plan, "serve": serve, "report": report, "coverage": coverage}, PROGRAM)
