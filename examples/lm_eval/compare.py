"""Compare the answers of two runs of lm-eval, question by question. Both runs need --log_samples.

    python compare.py RUN OTHER [--tolerance 1e-4]

It prints a line for each task. The exit code is 1 if a choice, a text or a log-likelihood differs.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FLOAT32 = 2**-23  # relative precision of a sum of many log-probabilities in float32
_DATE_LENGTH = len("2026-01-01T00-00-00.000000")  # the date follows the task's name in the name of a file


@dataclass(slots=True)
class Comparison:
    answers: int = 0
    texts: int = 0  # texts that differ
    choices: int = 0  # questions with another likeliest choice
    greedy: int = 0  # answers that are those of greedy decoding in only one of the runs
    apart: int = 0  # log-likelihoods that differ by more than the tolerance
    largest: float = 0.0  # the largest difference of two log-likelihoods

    @property
    def same(self) -> bool:
        return not (self.texts or self.choices or self.greedy or self.apart)

    def __str__(self) -> str:
        differing = (
            f"{self.texts} texts, {self.choices} choices, {self.greedy} greedy marks, {self.apart} log-likelihoods"
        )
        return f"{self.answers} answers; {differing} differ; log-likelihoods within {self.largest:.2e}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="--output_path of one run")
    parser.add_argument("other", type=Path, help="--output_path of the other run")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="allowed difference of log-likelihoods (at least 2**-23 of them)"
    )
    return parser.parse_args()


def samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the answers of the latest run in a folder for each task, in the order of the questions."""
    found = {}
    for file in sorted(folder.rglob("samples_*.jsonl"), key=lambda file: file.stem[-_DATE_LENGTH:]):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        found[file.stem[len("samples_") : -_DATE_LENGTH - 1]] = sorted(rows, key=lambda row: int(row["doc_id"]))
    return found


def answers(row: dict[str, Any]) -> list[Any]:
    """Return the answers to a question: texts, (log-likelihood, is it greedy), or log-likelihoods of whole texts."""
    asked = row["arguments"].values()
    return [_parsed(each[0], whole=len(arguments) == 1) for each, arguments in zip(row["resps"], asked, strict=True)]


def _parsed(answer: Any, *, whole: bool) -> Any:
    """Return an answer with its numbers parsed, since lm-eval writes numbers as texts."""
    if isinstance(answer, list):
        return float(answer[0]), answer[1] in (True, "True")
    return float(answer) if whole else answer


def compare(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], tolerance: float) -> Comparison:
    found = Comparison()
    for row, other in zip(rows, others, strict=True):
        if row["doc"] != other["doc"]:
            raise SystemExit(f"question {row['doc_id']} is not the same in both runs")
        scores = []
        for left, right in zip(answers(row), answers(other), strict=True):
            found.answers += 1
            if isinstance(left, str):
                found.texts += left != right
            elif isinstance(left, tuple):
                found.greedy += left[1] != right[1]
                scores.append((left[0], right[0]))
            else:
                scores.append((left, right))
        for left, right in scores:
            found.largest = max(found.largest, abs(left - right))
            found.apart += not math.isclose(left, right, rel_tol=_FLOAT32, abs_tol=tolerance)
        found.choices += _likeliest([left for left, _ in scores]) != _likeliest([right for _, right in scores])
    return found


def _likeliest(scores: Sequence[float]) -> int:
    return scores.index(max(scores)) if scores else -1


def main() -> int:
    arguments = parse_arguments()
    runs, others = samples(arguments.run), samples(arguments.other)
    if not runs or set(runs) != set(others):
        raise SystemExit(f"the runs have different tasks: {sorted(runs)} and {sorted(others)}")
    same = True
    for task, rows in sorted(runs.items()):
        found = compare(rows, others[task], arguments.tolerance)
        print(f"{task}: {found}")
        same &= found.same
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
