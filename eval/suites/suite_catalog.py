"""The suites by name.

suite = read_suite(SuiteOptions(suite="versebench", suite_path="verse_bench"))
suite.items[0].prompt
"""

from collections.abc import Callable, Mapping

from eval.suites.held_out_puppets import read_puppets
from eval.suites.prompt_file import read_prompt_file
from eval.suites.suite_items import Suite, SuiteOptions
from eval.suites.talkvid import read_talkvid
from eval.suites.versebench import read_versebench

SUITES: Mapping[str, Callable[[SuiteOptions], Suite]] = {
    "versebench": read_versebench,
    "talkvid": read_talkvid,
    "puppets": read_puppets,
}


def read_suite(options: SuiteOptions) -> Suite:
    """The suite that the options name, else the file of prompts.

    Raises:
        UserError: an unknown suite, no local copy (with the command that fetches it), or a copy of another layout.
    """
    options.check()
    return SUITES.get(options.suite, read_prompt_file)(options)
