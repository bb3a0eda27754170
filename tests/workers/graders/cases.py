"""One case for each grader: rows, answers with the scores they must get, and rows that must be refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.workers.evaluators.cases import FIELD, Row, as_rows
from tests.workers.models import tiny_bert
from workers.graders.base import Answers, Grader, GraderInputs, GraderSpec, make_grader
from workers.policy import Policy
from workers.roots import Roots

WHERE = f"{FIELD}.options.graders.score"


@dataclass(frozen=True)
class Case:
    """What the conformance suite needs to know of a grader.

    Attributes:
        rows: good rows.
        right: an answer to each that scores 1 (more than 0.99).
        wrong: an answer to each that scores 0 (less than 0.5).
        bad: for each role, values that must be refused.
        options: of the grader; a value that is a function gets a directory below the roots.
    """

    rows: Sequence[Row]
    right: Sequence[str]
    wrong: Sequence[str]
    bad: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_WORDS: dict[str, Any] = {
    "rows": [{"answer": "the cat sat on the mat"}, {"answer": ["no, never at all", "yes we can do it"]}],
    "right": ["the cat sat on the mat", "yes we can do it"],
    "wrong": ["xylophone quartz", ""],
    "bad": {"answer": [[], {}, True, ["\ud800"]]},
}

CASES: dict[str, Case] = {
    "exact_match": Case(
        rows=[{"answer": "Paris"}, {"answer": ["four", "4"]}, {"answer": 7}],
        right=[" Paris\n", "4", "7"],
        wrong=["paris", "five", ""],
        bad={"answer": [[], {}, True, "\ud800", [["Paris"]]]},
    ),
    "regex": Case(
        rows=[{"pattern": r"\d+"}, {"pattern": "^yes"}],
        right=["it is 12", "Well.\nyes"],
        wrong=["none", "no, yes"],
        bad={"pattern": ["(", 7, "a" * 3000]},
    ),
    "number": Case(
        rows=[{"answer": "#### 1,234"}, {"answer": [0.5, 1]}, {"answer": -3}],
        right=["So 2 + 2 is not 3, but 1234.", "0.5", "x = −3 metres"],
        wrong=["1,234 or 1,235", "none", "3"],
        bad={"answer": ["none", True, [], "."]},
    ),
    "json": Case(
        rows=[{"schema": {"type": "object", "required": ["a"]}}, {"schema": '{"type": "integer"}'}],
        right=['Here:\n```json\n{"a": 1}\n```\nDone.', " 12 "],
        wrong=["{}", '"12"'],
        bad={"schema": [7, "{", {"type": "nonsense"}, {"$ref": "http://example.com/x"}, {"pattern": "("}]},
    ),
    "bleu": Case(**_WORDS),
    "chrf": Case(**_WORDS),
    "rouge": Case(**_WORDS),
    "refusal": Case(
        rows=[{}, {}], right=["I’m sorry, but I can't.", "Sorry. I cannot help."], wrong=["Sure: first,", ""]
    ),
    "classifier": Case(
        rows=[{}, {}],
        right=["w1 w2", "w3"],
        wrong=["", "w5"],
        options={"path": lambda root: tiny_bert(root / "judge").name, "label": "LABEL_0", "threshold": 0.0},
    ),
    "code": Case(
        rows=[
            {"tests": "assert double(3) == 6", "before": ""},
            {"tests": "assert half(3) == 1.5", "before": "def half(x):\n"},
        ],
        right=["Sure:\n```python\ndef double(x):\n    return 2 * x\n```", "    return x / 2"],
        wrong=["def double(x): return x", "    return x / 0"],
        bad={"tests": ["assert", 7]},
    ),
}


def make(name: str, rows: Sequence[Row], root: Path, policy: Policy | None = None, **options: Any) -> Grader:
    """Return a grader over rows; checkpoints may be below ``root``, and programs run unless ``policy`` forbids it."""
    given = {key: value(root) if callable(value) else value for key, value in options.items()}
    policy = policy or Policy(code_execution=True)
    return make_grader(
        GraderSpec(name=name, options=given), GraderInputs(as_rows(rows), WHERE, policy, Roots([root], policy))
    )


def grade(grader: Grader, texts: Sequence[str]) -> list[float]:
    """Return the scores of answers."""
    return list(grader.grade(Answers(texts, lambda: False)))
