"""The endpoint's OpenAPI document is true under a bounded fuzz; what each operation says is checked with the service's."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from schemathesis import Case

from api.endpoint.app import create_endpoint_app
from api.settings import Settings
from tests.api.endpoint.conftest import Endpoint
from tests.api.test_openapi import CHECKS, fuzz

few, many = (schemathesis.openapi.from_dict(create_endpoint_app(None, Settings()).openapi()) for _ in range(2))
few.config.phases.coverage.enabled = False


@pytest.fixture(scope="module")
def session(endpoint: Endpoint) -> str:
    """The id of an open session."""
    with endpoint.http() as http:
        return str(http.post("/sessions").json()["id"])


def check(case: Case[Any], endpoint: Endpoint, session: str) -> None:
    """Send a request; the answer is never a 500, and one that the document names."""
    case.headers["Authorization"] = f"Bearer {endpoint.token}"
    if len(str(case.path_parameters.get("session", ""))) % 2 and case.method != "DELETE":
        case.path_parameters["session"] = session
    case.query.pop("wait_s", None)
    case.call_and_validate(base_url=endpoint.url, checks=CHECKS)


@few.parametrize()
@fuzz(max_examples=8)
def test_no_request_breaks_it(case: Case[Any], endpoint: Endpoint, session: str) -> None:
    """Some requests by the document, and some against it."""
    endpoint.desk.rate._left.clear()
    check(case, endpoint, session)


@pytest.mark.slow
@many.parametrize()
@fuzz(max_examples=150)
def test_no_request_of_many_breaks_it(case: Case[Any], endpoint: Endpoint, session: str) -> None:
    """Every bound and every type of every field, one by one, and random ones."""
    endpoint.desk.rate._left.clear()
    check(case, endpoint, session)
