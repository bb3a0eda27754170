"""The OpenAPI document: complete, and true under a bounded fuzz."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app, route_table
from api.endpoint.app import create_endpoint_app
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import JobView
from optimizer.spec import JobSpec
from tests.api.conftest import Service, inspect_spec
from tests.factories import make_spec

DOCUMENT = create_app(SqlStore("sqlite:///unused.db"), Settings(), inspect_spec).openapi()
DOCUMENTS = [DOCUMENT, create_endpoint_app(None, Settings()).openapi()]
OPERATIONS = [
    pytest.param(method, path, operation, id=operation["operationId"])
    for document in DOCUMENTS
    for path, operations in document["paths"].items()
    for method, operation in operations.items()
]
SCHEMAS: dict[str, Any] = {}
for document in DOCUMENTS:
    SCHEMAS |= document["components"]["schemas"]
OPEN = {"get_health", "get_ready", "get_version"}

few, many = (schemathesis.openapi.from_dict(DOCUMENT) for _ in range(2))
few.config.phases.coverage.enabled = False


def test_routes() -> None:
    app = create_app(SqlStore("sqlite:///unused.db"), Settings(), inspect_spec)
    assert sorted((path, method) for method, path, _ in route_table(app)) == sorted(
        (f"/api/v1{path}", method)
        for path, methods in {
            "/jobs": "GET POST",
            "/jobs/validate": "POST",
            "/jobs/{job_id}": "GET DELETE",
            "/jobs/{job_id}/pause": "POST",
            "/jobs/{job_id}/resume": "POST",
            "/jobs/{job_id}/cancel": "POST",
            "/jobs/{job_id}/clone": "POST",
            "/jobs/{job_id}/candidates": "GET POST",
            "/jobs/{job_id}/candidates/{index}": "GET",
            "/jobs/{job_id}/front": "GET",
            "/jobs/{job_id}/progression": "GET",
            "/jobs/{job_id}/events": "GET",
            "/jobs/{job_id}/exports": "GET POST",
            "/events": "GET",
            "/exports/{export_id}": "GET",
            "/algorithms": "GET",
            "/spaces": "GET",
            "/operators": "GET",
            "/evaluators": "GET",
            "/graders": "GET",
            "/schema/job": "GET",
            "/health": "GET",
            "/ready": "GET",
            "/version": "GET",
        }.items()
        for method in methods.split()
    )


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_operation_is_described(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"].endswith(".") or operation["description"].endswith("\n")
    assert operation["tags"]
    assert operation["operationId"].replace("_", "").isalpha()
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_operation_documents_its_errors(method: str, path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    expected = {"403", "500"}
    if operation["operationId"] not in OPEN:
        expected |= {"401"}
    if "{" in path:
        expected |= {"404", "422"}
    if "requestBody" in operation:
        expected |= {"413", "422"}
    assert expected <= set(responses)
    for status, response in responses.items():
        assert response["description"], status
        if not status.startswith("2"):
            content = response["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorView"}
            assert content["example"]["error"]["code"]


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_operation_has_examples(method: str, path: str, operation: dict[str, Any]) -> None:
    success = next(
        response for status, response in operation["responses"].items() if status in ("201", "202", "204", "200")
    )
    if "content" in success:
        assert success["content"]["application/json"]["example"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        of_model = SCHEMAS[body["schema"]["$ref"].rsplit("/", 1)[-1]]["properties"]
        assert body.get("examples") or any("examples" in field for field in of_model.values())
    for parameter in operation.get("parameters", []):
        assert parameter["in"] != "path" or parameter["example" if "example" in parameter else "schema"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=["service", "endpoint"])
def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(ids) == len(set(ids))


def test_nothing_of_the_frameworks_own_error_shape_is_left() -> None:
    assert "HTTPValidationError" not in SCHEMAS


def test_the_example_spec_is_valid() -> None:
    body = DOCUMENT["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/yaml"}
    for example in body["application/json"]["examples"].values():
        JobSpec.model_validate(example["value"])


FITTING = make_spec().model_dump(mode="json")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def check(case: Case[Any], service: Service, job: JobView) -> None:
    """Send a request; the answer is never a 500, and one that the document names."""
    case.headers.pop("Authorization", None)  # a made-up token would be refused before anything else is looked at
    if len(str(case.path_parameters.get("job_id", ""))) % 2:
        case.path_parameters["job_id"] = job.id  # about half of the requests meet a job that exists
    if isinstance(case.body, dict) and "objectives" in case.body and len(str(case.body)) % 2:
        # What refers to each other is seldom right by chance: about half of the specs get parts that fit.
        case.body |= {name: FITTING[name] for name in ("base", "experts", "objectives", "merge")}
    if case.path.endswith("/events") and case.query.get("follow") is not False:
        case.query["follow"] = False  # a stream would not end
    case.call_and_validate(base_url=service.url, checks=CHECKS)


def fuzz(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@few.parametrize()
@fuzz(max_examples=12)
def test_no_request_breaks_it(case: Case[Any], service: Service, job: JobView) -> None:
    """Some requests by the document, and some against it."""
    check(case, service, job)


@pytest.mark.slow
@many.parametrize()
@fuzz(max_examples=200)
def test_no_request_of_many_breaks_it(case: Case[Any], service: Service, job: JobView) -> None:
    """Every bound and every type of every field, one by one, and random ones."""
    check(case, service, job)
