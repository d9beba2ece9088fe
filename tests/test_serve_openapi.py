"""The server against its own ``/openapi.json``: requests that schemathesis makes up, valid and not."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from test_serve import Running, generator  # noqa: F401 - a fixture
from test_serve_faults import counts, healed, running, use_fast_steps  # noqa: F401 - fixtures

schemathesis = pytest.importorskip("schemathesis", reason="only the dev extra brings it")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 20  # of each operation, valid and again invalid
OPERATIONS = {
    *("POST /v1/audio/speech", "GET /v1/models", "GET /v1/models/{model}", "GET /v1/audio/models"),
    *("GET /v1/audio/voices", "POST /v1/audio/voices", "DELETE /v1/audio/voices/{voice_id}"),
    *("GET /health", "GET /ready", "GET /metrics"),
}


def call_all(operation, mode):
    """The statuses of the responses; each response has passed the checks."""
    statuses = set()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    check()
    return statuses


def test_every_operation_answers_as_documented(running, healed, monkeypatch):  # noqa: F811
    """No 5xx; status, content type and body are documented; afterwards nothing is left in use."""
    use_fast_steps(monkeypatch)
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = {each.label: each for each in (result.ok() for result in schema.get_all_operations())}
    assert set(operations) == OPERATIONS
    statuses = {label: call_all(each, GenerationMode.POSITIVE) for label, each in operations.items()}
    for label in ("POST /v1/audio/speech", "POST /v1/audio/voices"):
        statuses[label] |= call_all(operations[label], GenerationMode.NEGATIVE)
    print(statuses)
    assert statuses["POST /v1/audio/speech"] >= {400, 404}
    monkeypatch.undo()
