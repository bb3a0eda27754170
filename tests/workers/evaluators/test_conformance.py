"""What every evaluator must do; a new one needs only a case in cases.py."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from optimizer.errors import InvalidCheckpoint, InvalidData, RetryableError
from optimizer.fitness.aggregate import ItemScores
from tests.workers.evaluators.cases import CASES, FIELD, as_rows, build, open_model
from workers.evaluators.base import EVALUATORS, Cancelled

Scores = Mapping[str, ItemScores]
Checkpoint = Callable[[str], Path]

every_evaluator = pytest.mark.parametrize("name", sorted(CASES))
with_data = pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.own is None))
with_roles = pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.bad))


def same(one: Scores, two: Scores, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert that two evaluations have the same scores, bit for bit unless tolerances are given."""
    assert one.keys() == two.keys()
    for metric in one:
        np.testing.assert_allclose(one[metric].values, two[metric].values, rtol=rtol, atol=atol, err_msg=metric)


def test_every_evaluator_has_a_case() -> None:
    """Those that ask services look at no model; they have tests of their own."""
    assert set(CASES) == {name for name, cls in EVALUATORS.items() if cls.auto_class}
    for name, case in CASES.items():
        assert bool(case.bad) == bool(EVALUATORS[name].columns), name
        assert (case.own is not None) == EVALUATORS[name].own_items, name


@every_evaluator
def test_all_metrics_for_every_item(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    evaluator = build(name, checkpoint(name), case.rows, **case.options)
    scores = evaluator.evaluate(open_model(name, checkpoint(name)))
    assert len(evaluator) == len(case.rows)
    assert list(scores) == list(evaluator.metrics)
    if EVALUATORS[name].metrics:  # else they depend on the options
        assert set(scores) <= set(EVALUATORS[name].metrics)
    assert evaluator.whole_only <= set(evaluator.metrics)
    assert scores.cost.items == len(evaluator)
    for metric, items in scores.items():
        assert items.values.shape == (len(case.rows),), metric
        assert items.values.dtype == np.float32
        assert np.isfinite(items.values).all()
        assert items.weights is None or (items.weights.dtype == np.float32 and (items.weights > 0).all())
        assert np.isfinite(items.mean())


@every_evaluator
def test_repeats_bit_for_bit(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    one, two = (build(name, checkpoint(name), case.rows, **case.options) for _ in range(2))
    first = one.evaluate(model)
    same(first, one.evaluate(model))
    same(first, two.evaluate(model))


@every_evaluator
def test_scores_stand_in_the_order_of_the_rows(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    forward = build(name, checkpoint(name), case.rows, **case.options).evaluate(model)
    backward = build(name, checkpoint(name), case.rows[::-1], **case.options).evaluate(model)
    turned = {metric: ItemScores(items.values[::-1]) for metric, items in backward.items()}
    same(forward, turned, rtol=1e-4, atol=1e-5)
    assert any(len(set(items.values.tolist())) == len(case.rows) for items in forward.values()), "the items must differ"


@every_evaluator
@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_size_does_not_matter(name: str, size: int, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    whole = build(name, checkpoint(name), case.rows, **case.options).evaluate(model)
    parts = build(name, checkpoint(name), case.rows, **{**case.options, "batch_size": size}).evaluate(model)
    same(whole, parts, rtol=1e-4, atol=1e-5)


@every_evaluator
def test_first_items_score_as_they_do_among_all(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    whole = build(name, checkpoint(name), case.rows, **case.options).evaluate(model)
    part = build(name, checkpoint(name), case.rows, **case.options).subset([0, 1, 2])
    few = part.evaluate(model)
    assert len(part) == 3
    assert few.cost.items == 3
    independent = [metric for metric in few if metric not in part.whole_only]
    same(
        {metric: ItemScores(whole[metric].values[:3]) for metric in independent},
        {metric: few[metric] for metric in independent},
        rtol=1e-4,
        atol=1e-5,
    )


@every_evaluator
def test_a_subset_keeps_its_order_and_has_a_digest_of_its_own(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    evaluator = build(name, checkpoint(name), case.rows, **case.options)
    whole, part = evaluator.evaluate(model), evaluator.subset([4, 0, 2])
    few = part.evaluate(model)
    independent = [metric for metric in few if metric not in part.whole_only]
    same(
        {metric: ItemScores(whole[metric].values[[4, 0, 2]]) for metric in independent},
        {metric: few[metric] for metric in independent},
        rtol=1e-4,
        atol=1e-5,
    )
    assert len({evaluator.digest, part.digest, evaluator.subset([0, 4, 2]).digest}) == 3
    assert part.digest == evaluator.subset([4, 0, 2]).digest


@every_evaluator
def test_bfloat16(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    if case.smooth is None:
        pytest.skip("its metrics change in steps: rounding changes none of them or much")
    model = open_model(name, checkpoint(name))
    evaluator = build(name, checkpoint(name), case.rows, **case.options)
    exact = evaluator.evaluate(model)[case.smooth].mean()
    rounded = evaluator.evaluate(model.bfloat16())[case.smooth].mean()
    assert rounded == pytest.approx(exact, rel=case.loose)
    assert rounded != exact


@every_evaluator
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    evaluator = build(name, checkpoint(name), case.rows, **case.options)
    on_cpu = evaluator.evaluate(model)
    torch.nn.Module.cuda(model)
    on_gpu = evaluator.evaluate(model)
    same(on_gpu, evaluator.evaluate(model))
    if case.smooth is not None:
        same({case.smooth: on_cpu[case.smooth]}, {case.smooth: on_gpu[case.smooth]}, rtol=1e-2, atol=1e-3)


@every_evaluator
def test_leaves_the_model_as_it_was(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    next(model.children()).train()
    modes = [module.training for module in model.modules()]
    build(name, checkpoint(name), case.rows, **case.options).evaluate(model)
    assert modes == [module.training for module in model.modules()]
    assert any(modes)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every_evaluator
def test_dropout_is_off(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    evaluator = build(name, checkpoint(name), case.rows, **case.options)
    still = evaluator.evaluate(model)
    same(still, evaluator.evaluate(model.train()))


@every_evaluator
def test_cancellation_between_batches(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    evaluator = build(name, checkpoint(name), case.rows, **{**case.options, "batch_size": 1})
    for allowed in (0, 2):
        answers = iter([False] * allowed + [True])
        with pytest.raises(Cancelled) as caught:
            evaluator.evaluate(model, lambda answers=answers: next(answers))  # type: ignore[misc]
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), RetryableError)
        assert next(answers, None) is None, "it was asked again after it was called off"
    same(evaluator.evaluate(model), evaluator.evaluate(model, lambda: False))


@every_evaluator
def test_a_broken_model_has_no_finite_scores(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for metric, items in build(name, checkpoint(name), case.rows, **case.options).evaluate(model).items():
        assert not np.isfinite(items.values).any(), metric


@with_roles
@pytest.mark.parametrize("place", [0, 4])
def test_bad_values_are_refused_by_row(name: str, place: int, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    for role, values in case.bad.items():
        for value in [*values, None]:
            rows = [dict(row) for row in case.rows]
            rows[place][role] = value
            with pytest.raises(InvalidData) as caught:
                build(name, checkpoint(name), rows, **case.options)
            assert caught.value.field == f"{FIELD}.data.columns.{role}", (role, value)
            assert f"line {place + 1}:" in caught.value.message, (role, value)


@with_roles
def test_a_missing_column_is_named_with_those_that_exist(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    for role in case.bad:
        rows = [{**{key: row[key] for key in row if key != role}, "other": 1} for row in case.rows]
        with pytest.raises(InvalidData, match="other") as caught:
            build(name, checkpoint(name), rows, **case.options)
        assert caught.value.field == f"{FIELD}.data.columns.{role}"


@with_data
def test_columns_can_have_other_names(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    renamed = [{f"my {key}": value for key, value in row.items()} for row in case.rows]
    rows = as_rows(renamed, {role: f"my {role}" for role in case.rows[0]})
    expected = build(name, checkpoint(name), case.rows, **case.options).evaluate(model)
    same(expected, build(name, checkpoint(name), rows, **case.options).evaluate(model))


@with_roles
def test_an_unknown_role_is_refused(name: str, checkpoint: Checkpoint) -> None:
    case = CASES[name]
    with pytest.raises(InvalidData, match="no column role 'nonsense'") as caught:
        build(name, checkpoint(name), as_rows(case.rows, {"nonsense": "text"}), **case.options)
    assert caught.value.field == f"{FIELD}.data.columns.nonsense"
    assert all(role in str(caught.value.remedy) for role in EVALUATORS[name].columns)


@every_evaluator
@pytest.mark.parametrize("missing", ["everything", "all but the config"])
def test_an_incomplete_checkpoint_is_refused(name: str, missing: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    case = CASES[name]
    if missing == "all but the config":
        (tmp_path / "config.json").write_bytes((checkpoint(name) / "config.json").read_bytes())
    with pytest.raises(InvalidCheckpoint) as caught:
        build(name, tmp_path, case.rows, **case.options)
    assert caught.value.field == f"{FIELD}.evaluator"
    with pytest.raises(InvalidCheckpoint, match="no checkpoint directory"):
        build(name, tmp_path / "nowhere", case.rows, **case.options)


@every_evaluator
def test_standard_output_and_error_stay_empty(
    name: str, checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    model = open_model(name, checkpoint(name))
    capfd.readouterr()
    build(name, checkpoint(name), case.rows, **case.options).evaluate(model)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records  # whether they reach a terminal depends on who set up logging, and when


@every_evaluator
def test_options_and_columns_are_described(name: str, checkpoint: Checkpoint) -> None:
    cls = EVALUATORS[name]
    info = cls.info()
    schema: dict[str, Any] = json.loads(info.model_dump_json())["options_schema"]
    assert schema["additionalProperties"] is False
    assert "batch_size" in schema["properties"]
    for option, part in schema["properties"].items():
        assert part.get("description"), option
        assert "default" in part, option
    assert info.name == name
    assert info.summary.endswith(".")
    assert all(description.endswith((".", ")")) for description in info.columns.values())
    assert set(info.metrics.values()) <= {"maximise", "minimise"}
    assert set(CASES[name].bad) <= set(info.columns)
    for bad in ({"nonsense": 1}, {"batch_size": 0}, {"batch_size": 10**6}):
        with pytest.raises(ValidationError):
            cls.Options.model_validate(bad)
