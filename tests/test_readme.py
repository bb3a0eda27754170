"""The README's tables and commands are those of the code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from api.documents import parse_document
from api.endpoint.offer import parse_offer
from optimizer.algorithms.base import parse_options
from optimizer.spec import parse_spec
from tests.readme_tables import ENDPOINT_OPENAPI, ENDPOINT_PAGE, README, TABLES, endpoint_openapi, render
from workers.evaluators.base import parse_evaluator
from workers.merging.operator import operator_info, parse_operator_options


def test_every_table_is_there_and_current() -> None:
    texts = [page.read_text(encoding="utf-8") for page in (README, ENDPOINT_PAGE)]
    assert sorted(re.findall(r"<!-- table: (\w+) -->", "".join(texts))) == sorted(TABLES)
    assert [render(text) for text in texts] == texts, "run `make readme`"


def test_the_endpoints_openapi_file_is_current() -> None:
    assert ENDPOINT_OPENAPI.read_text(encoding="utf-8") == endpoint_openapi(), "run `make readme`"


def test_the_make_targets_it_names_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z-]+)", README.read_text(encoding="utf-8")))
    assert {"demo", "test", "setup"} <= named <= set(targets)


def examples() -> list[dict[str, Any]]:
    """The README's YAML, in its order: the job first."""
    blocks = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [parse_document(block, "yaml", "job") for block in blocks]


def with_evaluator(name: str) -> dict[str, Any]:
    """The example whose first objective has this evaluator, as a part of the job or as one of its own."""
    job, *others = examples()
    (found,) = (one for one in others if one.get("objectives", [{}])[0].get("evaluator") == name)
    return found if "parameters" in found else job | found


def test_its_job_is_one_and_so_it_stays_with_everything_that_may_be_varied() -> None:
    job, fragment, search, *_ = examples()
    spec = parse_spec(job)
    varied = parse_spec(job | fragment)
    searched = parse_spec({key: value for key, value in job.items() if key != "algorithm"} | search)
    parse_options(spec.algorithm)
    assert len([parse_options(phase.algorithm) for phase in searched.phases]) > 1
    parse_operator_options(varied.merge.operator, varied.merge.options)
    for modifier in varied.merge.modifiers:
        assert operator_info(modifier.operator).modifier
        parse_operator_options(modifier.operator, modifier.options)
    assert [parse_evaluator(objective, n)[0].name for n, objective in enumerate(spec.objectives)] == ["causal_lm"] * 2
    assert operator_info(spec.merge.operator).name == spec.merge.operator


def test_its_thrifty_job_is_one() -> None:
    job, *others = examples()
    (thrift,) = (one for one in others if "fitness" in one)
    thrifty = parse_spec(job | thrift)
    assert thrifty.objectives[0].test is not None
    assert thrifty.fitness.racing.enabled and thrifty.fitness.estimation.method == "weighted"


def test_its_objectives_of_ones_own_are_such() -> None:
    (task,) = (one for one in examples() if "task" in one)
    for evaluator in ("lm_eval", "python"):
        (objective,) = parse_spec(with_evaluator(evaluator)).objectives
        assert parse_evaluator(objective, 0)[0].name == evaluator
        assert objective.options.get("tasks", [task["task"]]) == [task["task"]]


def test_its_graded_answers_are_generated_once() -> None:
    graded = parse_spec(with_evaluator("generation"))
    answers = [parse_evaluator(objective, n) for n, objective in enumerate(graded.objectives)]
    assert [cls.name for cls, _ in answers] == ["generation"] * 3
    assert answers[0][1] == answers[1][1], "one generation for correctness and length"


@pytest.mark.parametrize("evaluator", ["http", "chat", "chat_mix"])
def test_its_jobs_behind_services_are_such(evaluator: str) -> None:
    job = {"name": "behind services", "budget": {"evaluations": 10}} | with_evaluator(evaluator)
    spec = parse_spec(job)
    assert spec.parameters
    assert parse_evaluator(spec.objectives[0], 0)[0].name == evaluator


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8")))))
def test_the_files_it_links_to_exist(link: str) -> None:
    assert (README.parent / link).exists()


def test_the_endpoints_page_offers_what_can_be_offered() -> None:
    text = ENDPOINT_PAGE.read_text(encoding="utf-8")
    job, offer = (parse_document(block, "yaml", "file") for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    assert parse_offer(offer).uploads is not None
    assert parse_spec(job).endpoint is not None
    documented = set(re.findall(r"^\| (\d{3}) \| `(\w+)`", text, re.MULTILINE))
    statuses = {
        (status, example["error"]["code"])
        for operations in json.loads(endpoint_openapi())["paths"].values()
        for operation in operations.values()
        for status, response in operation["responses"].items()
        if (example := response.get("content", {}).get("application/json", {}).get("example", {}))
        and "error" in example
    }
    assert {status for status, _ in documented} == {status for status, _ in statuses} - {"500"}
