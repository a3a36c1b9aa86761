"""Edit counts of a recognised sequence against a reference, by jiwer.

edits(("ma", "bi"), ("ma", "so", "bi")).insertions   # 1
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Edits:
    """Edit distance of a recognised from a reference sequence, by kind; rate = errors / reference."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def hits(self) -> int:
        return self.reference - self.substitutions - self.deletions


def edits(reference: Sequence[str], recognised: Sequence[str]) -> Edits:
    """Edits of a recognised from a reference sequence of units without spaces: fewest errors, among equals the most hits."""
    import jiwer

    found = jiwer.process_words(" ".join(reference), " ".join(recognised))
    return Edits(found.substitutions, found.deletions, found.insertions, len(reference))
