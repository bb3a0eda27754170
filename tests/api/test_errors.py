"""Errors: from exceptions to JSON and back; the one shape over every route."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from api.app import create_app
from api.errors import error_view, rebuild
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import ErrorBody, ErrorView
from optimizer.errors import (
    Forbidden,
    InvalidProblems,
    MergeoptError,
    NotFound,
    Unauthorized,
    Unavailable,
    UserError,
)
from tests.api.conftest import Service, inspect_spec
