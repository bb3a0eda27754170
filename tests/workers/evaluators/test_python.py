"""The evaluator `python`: what a user's function gets, and what it may return."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.errors import InfeasibleCandidate, InvalidInput
from tests.workers.evaluators import functions
from tests.workers.evaluators.cases import FIELD, FUNCTIONS, as_rows, open_model
from tests.workers.models import tiny_llama
from workers.evaluators import python
from workers.evaluators.base import EVALUATORS, Cancelled, Evaluator, Inputs
from workers.policy import Policy

NAME = "python"
ROWS = [{"word": word} for word in ("w1", "w22", "w3 w4")]
EVERYTHING = Policy(entry_points=tuple(f"{FUNCTIONS}:{name}" for name in dir(functions)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def make(checkpoint: Path, name: str, policy: Policy = EVERYTHING, **arguments: Any) -> Evaluator:
    """Return the evaluator over `ROWS` that calls one of `functions`."""
    cls = EVALUATORS[NAME]
    options = cls.Options.model_validate({"function": f"{FUNCTIONS}:{name}", "arguments": arguments})
    return cls(options, Inputs(as_rows(ROWS), checkpoint, FIELD, policy))


def test_nothing_is_imported_that_the_server_does_not_allow(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cls = EVALUATORS[NAME]
    for function in ("intruder:run", "os:system", ""):
        with pytest.raises(InvalidInput, match=r"does not allow|no function is named") as caught:
            cls(
                cls.Options.model_validate({"function": function}),
                Inputs(as_rows(ROWS), llama, FIELD, Policy(entry_points=("a.b:c",))),
            )
        assert caught.value.field == f"{FIELD}.options.function"
        assert "a.b:c" in str(caught.value.remedy)
    assert "intruder" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_there", "cannot be imported"),
        ("FUNCTION", "cannot be imported"),
        ("undeclared", "does not declare its metrics"),
        ("wrongly_declared", "does not declare its metrics: metrics.seen"),
        ("positional", "cannot be given by name"),
    ],
)
def test_functions_that_are_no_measures(name: str, message: str, llama: Path) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        make(llama, name, Policy(entry_points=(f"{FUNCTIONS}:{name}",)))
    assert caught.value.field == f"{FIELD}.options.function"


def test_arguments_go_by_name(llama: Path) -> None:
    model = open_model(NAME, llama)
    assert make(llama, "echo", found="words").evaluate(model)["seen"].values.tolist() == [2, 3, 5]
    assert make(llama, "echo", found="more", a=1, b=2).evaluate(model)["seen"].values.tolist() == [2, 2, 2]
    with pytest.raises(InvalidInput, match="needs the argument 'found'") as caught:
        make(llama, "echo")
    assert caught.value.field == f"{FIELD}.options.arguments.found"
    with pytest.raises(InvalidInput, match="takes no argument 'extra'") as caught:
        make(llama, "other", found=0, extra=1)
    assert caught.value.field == f"{FIELD}.options.arguments.extra"
    with pytest.raises(InvalidInput, match="takes no argument 'model'"):
        make(llama, "whole", model=1)


def test_what_a_function_declares(llama: Path) -> None:
    evaluator = make(llama, "other", found=0)
    assert evaluator.metrics == {"seen": "minimise"}
    assert evaluator.auto_class == "AutoModelForSequenceClassification"
    assert make(llama, "likelihood").auto_class == "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("found", "weights"),
    [
        ([1, 2, 3], None),
        ([True, False, True], None),
        ([1.0, float("nan"), float("inf")], None),
        ([1, 2, 3], [1, 2, 0.5]),
    ],
)
def test_good_returns(found: list[Any], weights: list[Any] | None, llama: Path) -> None:
    scores = make(llama, "echo", found=found, weights=weights).evaluate(open_model(NAME, llama))["seen"]
    np.testing.assert_array_equal(scores.values, np.array(found, dtype=np.float32))
    assert (scores.weights is None) == (weights is None)
    if weights is not None:
        assert scores.mean() == pytest.approx(np.average(found, weights=weights))


@pytest.mark.parametrize(
    ("found", "weights", "message"),
    [
        ([1, 2], None, r"shape \(2,\), but must be shape \(3,\)"),
        ([[1], [2], [3]], None, r"shape \(3, 1\)"),
        (0.5, None, "aggregate=True"),
        (["a", "b", "c"], None, "no array of numbers"),
        ([1, None, 2], None, "no array of numbers"),
        ([[1], [2, 3], 4], None, "no array of numbers"),
        ("raise", None, "raised ValueError: no such luck"),
        ([1, 2, 3], [1, 0, 1], "must be positive"),
        ([1, 2, 3], [1, 1], "the weights of 'seen' has shape"),
    ],
)
def test_bad_returns_name_the_function(found: Any, weights: Any, message: str, llama: Path) -> None:
    evaluator = make(llama, "echo", found=found, weights=weights)
    with pytest.raises(InfeasibleCandidate, match=message) as caught:
        evaluator.evaluate(open_model(NAME, llama))
    assert caught.value.field == f"{FIELD}.options.function"
    assert f"{FUNCTIONS}:echo" in caught.value.message


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1, 2, 3], "not a dictionary"),
        ({"seen": [1, 2, 3], "more": [1, 2, 3]}, "declares seen"),
        ({}, "the metrics none"),
    ],
)
def test_bad_metrics(found: Any, message: str, llama: Path) -> None:
    with pytest.raises(InfeasibleCandidate, match=message):
        make(llama, "other", found=found).evaluate(open_model(NAME, llama))


def test_measures_of_the_whole_are_one_item(llama: Path) -> None:
    model = open_model(NAME, llama)
    evaluator = make(llama, "whole")
    scores = evaluator.evaluate(model)
    assert len(evaluator) == 1
    assert evaluator.subset([0]) is evaluator
    assert scores["norm"].mean() == pytest.approx(next(model.parameters()).detach().norm().item(), rel=1e-6)
    assert scores["layers"].values.tolist() == [2]


def test_tokens_are_counted_and_the_hook_is_gone(llama: Path) -> None:
    model = open_model(NAME, llama)
    cls = EVALUATORS[NAME]
    rows = as_rows([{"text": "w1 w2 w3"}, {"text": "w4 w5"}])
    options = cls.Options.model_validate({"function": f"{FUNCTIONS}:likelihood"})
    assert cls(options, Inputs(rows, llama, FIELD, EVERYTHING)).evaluate(model).cost.tokens == 5
    assert not model._forward_pre_hooks


def test_a_function_that_returns_when_called_off_has_no_scores(llama: Path) -> None:
    answers = iter([False, True])
    with pytest.raises(Cancelled):
        make(llama, "echo", found=[1, 2, 3]).evaluate(open_model(NAME, llama), lambda: next(answers))


def test_digest_holds_the_functions_source(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = make(llama, "echo", found="words").digest
    assert first == make(llama, "echo", found="words").digest
    assert first != make(llama, "other", found="words").digest
    changed = tmp_path / "functions.py"
    changed.write_bytes(Path(str(functions.__file__)).read_bytes() + b"\n# a change\n")
    monkeypatch.setattr(functions, "__file__", str(changed))
    assert make(llama, "echo", found="words").digest != first
    assert python._version("numpy") == f"{np.__version__}"
    assert "scikit-learn==" in python._version("sklearn")


def test_functions_get_rows_of_their_own(llama: Path) -> None:
    evaluator = make(llama, "echo", found="words")
    before = [dict(row) for row in evaluator._inputs.rows.items]
    with torch.no_grad():
        evaluator.evaluate(open_model(NAME, llama))
    assert evaluator._inputs.rows.items == before
