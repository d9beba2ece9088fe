"""The server against its own ``/openapi.json``: requests that schemathesis makes up, valid and not."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from test_serve import generator  # noqa: F401 - a fixture
from test_serve_faults import healed, running, use_fast_steps  # noqa: F401 - fixtures

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SPEECH, NEW_VOICE = "POST /v1/audio/speech", "POST /v1/audio/voices"
OPERATIONS = {
    *(SPEECH, NEW_VOICE, "GET /v1/audio/voices", "DELETE /v1/audio/voices/{voice_id}", "GET /v1/audio/models"),
    *("GET /v1/models", "GET /v1/models/{model}", "GET /health", "GET /ready", "GET /metrics"),
}


def statuses_of(operation, examples, mode=GenerationMode.POSITIVE, **fields):
    """The statuses of the responses to made-up requests, each of which passes the checks. ``fields`` are the body's."""
    statuses = set()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        if fields:
            case.body = {**case.body, **fields}
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    check()
    return statuses


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_every_operation_answers_as_documented(running, healed, monkeypatch, examples):  # noqa: F811
    """No 5xx; status, content type and body are documented; afterwards nothing is left in use."""
    use_fast_steps(monkeypatch)
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = {each.label: each for each in (result.ok() for result in schema.get_all_operations())}
    assert set(operations) == OPERATIONS
    statuses = {label: statuses_of(each, examples) for label, each in operations.items()}
    known = {"model": "csm", "voice": "alloy", "context": []}  # else nearly all requests name a model that is not there
    for stream_format in ("audio", "sse"):
        speech = operations[SPEECH]
        statuses[stream_format] = statuses_of(speech, examples, **known, stream_format=stream_format)
    for label in (SPEECH, NEW_VOICE):
        statuses[label] |= statuses_of(operations[label], examples, GenerationMode.NEGATIVE)
    print(statuses)
    assert statuses[SPEECH] >= {400, 404} and 200 in statuses["audio"] & statuses["sse"]
    assert 400 in statuses[NEW_VOICE]
    monkeypatch.undo()
