"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.datastructures import FormData, UploadFile
from starlette.websockets import WebSocket

from csm import AudioError, Segment
from csm.serve.errors import ApiError, AsciiJSON, add_handlers, documented
from csm.serve.limits import Gate
from csm.serve.pages import add_pages
from csm.serve.schema import SPEECH_RESPONSE, VOICE_REQUEST, SpeechBody
from csm.serve.service import Service
from csm.serve.settings import MAX_INPUT, MAX_UPLOAD
from csm.serve.socket import serve_socket
from csm.serve.speech import speak
from csm.serve.voices import OPENAI_NAMES, all_ids, read_recording

FORM_FIELDS = ("name", "text", "consent", "speaker", "type")
router = APIRouter()


def _service(request: Request) -> Service:
    return request.app.state.service


@router.post(
    "/v1/audio/speech",
    response_class=Response,
    responses={200: SPEECH_RESPONSE, **documented(401, 404, 408, 409, 413, 429, 504)},
)
async def speech(body: SpeechBody, request: Request) -> Response:
    """Generate speech; the audio is streamed while it is generated."""
    service = _service(request)
    service.check_model(body.model)
    accept = request.headers.get("accept", "")
    return await speak(service, body, request.state.owner, accept, request.receive)


@router.websocket("/v1/audio/stream")
async def stream(websocket: WebSocket) -> None:
    """Text in pieces, audio while it is generated."""
    await serve_socket(websocket.app.state.service, websocket, websocket.state.owner)


@router.get("/v1/models", responses=documented(401))
async def models(request: Request) -> dict[str, Any]:
    """The loaded model, and OpenAI's names for it."""
    service = _service(request)
    return {"object": "list", "data": [_model(service, name) for name in service.models()]}


@router.get("/v1/models/{model:path}", responses=documented(401, 404))
async def model(model: str, request: Request) -> dict[str, Any]:
    """One model."""
    _service(request).check_model(model)
    return _model(_service(request), model)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "csm"}


@router.get("/v1/audio/models", responses=documented(401))
async def audio_models(request: Request) -> dict[str, Any]:
    """The models, as Open WebUI asks for them."""
    return {"models": [{"id": name, "name": name} for name in _service(request).models()]}


@router.get("/v1/audio/voices", responses=documented(401))
async def voices(request: Request) -> dict[str, Any]:
    """All voices. ``custom`` ones have a file and can be deleted. ``writable``: the server keeps uploads."""
    service = _service(request)
    custom = await service.list_voices()
    listed = [{"id": name, "name": name, "custom": name in custom} for name in all_ids(custom)]
    writable = service.voices.folder is not None
    return {"object": "list", "voices": listed, "data": listed, "writable": writable}


@router.post("/v1/audio/voices", responses=documented(401, 408, 413), openapi_extra=VOICE_REQUEST)
async def add_voice(request: Request) -> Response:
    """Keep a voice: ``name``, ``audio_sample`` (a file), ``text`` (its transcript), ``consent``, ``speaker``."""
    service = _service(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send multipart/form-data with name, audio_sample, text and consent")
    async with request.form(max_files=1, max_fields=len(FORM_FIELDS), max_part_size=4 * MAX_INPUT) as form:
        fields = _fields(form)
        data = await _upload(form)
    await service.in_thread(service.voices.check_new, fields["name"])
    generator = await service.generator()

    def keep() -> None:
        try:
            audio_N, sample_rate = read_recording(data)
        except AudioError as error:
            raise ApiError(400, str(error), "audio_sample", "invalid_recording") from error
        turn = generator.prepare(Segment(int(fields["speaker"]), fields["text"], audio_N, sample_rate=sample_rate))
        assert turn.codes is not None
        service.voices.add(fields["name"], fields["text"], turn.codes, turn.speaker, fields["consent"])

    await service.in_thread(keep)
    voice = {"id": fields["name"], "object": "audio.voice", "name": fields["name"], "type": "audio_sample"}
    return AsciiJSON({**voice, "created_at": int(time.time())})


def _fields(form: FormData) -> dict[str, str]:
    """The text fields, checked."""
    fields = {"speaker": "0", "type": "audio_sample"}
    for key, value in form.multi_items():
        if key not in (*FORM_FIELDS, "audio_sample", "file"):
            raise ApiError(400, f"unknown field {key[:100]!r}", key[:100], "unknown_parameter")
        if isinstance(value, str):
            fields[key] = value.strip()
    for key in ("name", "text", "consent"):
        if not fields.get(key):
            raise ApiError(400, f"{key} is missing: {_WHY[key]}", key, "missing_required_parameter")
    if fields["type"] != "audio_sample":
        raise ApiError(400, "voices are made from recordings only", "type")
    if not fields["speaker"].isascii() or not fields["speaker"].isdigit() or len(fields["speaker"]) > 9:
        raise ApiError(400, "speaker must be a whole number of at least 0", "speaker")
    if len(fields["text"]) > MAX_INPUT or len(fields["consent"]) > MAX_INPUT:
        raise ApiError(400, f"text and consent have at most {MAX_INPUT} characters")
    return fields


_WHY = {
    "name": "the voice's id, of letters, digits, '_', '-' and '.'",
    "text": "what is said in the recording",
    "consent": "who allowed this voice to be used, and how",
}


async def _upload(form: FormData) -> bytes:
    file = form.get("audio_sample", form.get("file"))
    if not isinstance(file, UploadFile):
        raise ApiError(400, "audio_sample is missing: the recording, as a file", "audio_sample")
    data = await file.read(MAX_UPLOAD + 1)
    if len(data) > MAX_UPLOAD:
        raise ApiError(413, f"the recording has more than {MAX_UPLOAD >> 20} MiB", "audio_sample", "body_too_large")
    return data


@router.delete("/v1/audio/voices/{voice_id}", responses=documented(401, 404))
async def delete_voice(voice_id: str, request: Request) -> dict[str, Any]:
    """Delete a voice that has a file."""
    service = _service(request)
    if not await service.in_thread(service.voices.delete, voice_id):
        built_in = voice_id in OPENAI_NAMES
        reason = "is a name of OpenAI's and has no file" if built_in else "does not exist"
        raise ApiError(404, f"voice {voice_id[:64]!r} {reason}", "voice_id", "voice_not_found")
    return {"id": voice_id, "object": "audio.voice.deleted", "deleted": True}


@router.get("/health", responses=documented())
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", responses=documented(503))
async def ready(request: Request) -> dict[str, str]:
    """The model is loaded and the server is not shutting down; else 503. An unloaded model is loaded on demand."""
    if not _service(request).ready:
        state = "shutting down" if _service(request).draining else "not loaded"
        raise ApiError(503, f"the model is {state}", code="not_ready")
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse, responses=documented(401))
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.render(), media_type="text/plain; version=0.0.4")


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The schema without FastAPI's 422: a wrong body is 400 here."""
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema


def create_app(service: Service) -> FastAPI:
    """The ASGI app over a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        unloading = asyncio.create_task(service.unload_when_idle())
        yield
        unloading.cancel()
        service.close()

    # The pages of /docs load scripts from another host: they are off. /openapi.json has the schema.
    app = _App(title="CSM", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    add_pages(app)
    app.add_middleware(Gate, settings=service.settings)
    add_handlers(app)
    return app
