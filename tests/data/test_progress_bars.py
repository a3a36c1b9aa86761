"""Progress bars in a log."""

import subprocess
import sys

LONG = """
import time
from magihuman.cli import run

def work(progress: bool = True) -> None:
    \"\"\"Work.\"\"\"
    from tqdm import tqdm

    for _ in tqdm(range(30), desc="work"):
        time.sleep(0.02)

run(work, "work", [])
"""


def test_a_bar_in_a_file_is_its_beginning_and_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
    assert len(bars) == 2  # at ten lines a second it were seven
    assert bars[-1].startswith("work: 100%")
