"""Serve a model over HTTP with OpenAI's audio API (docs/serve.md)."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from csm import WATERMARKS, CSMError, Generator, Guards, RoomWarning, load_watermark
from csm.command_line import add_guard_options, add_tokenizer_option
from csm.generator import DEFAULT_MODEL

if TYPE_CHECKING:
    from csm.serve.service import Service
    from csm.serve.settings import Settings

KEYS_VARIABLE = "CSM_API_KEYS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"hub name, folder, GGUF file, or tiny (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--lora", type=Path, help="folder of an adapter for the model")
    add_tokenizer_option(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--voices", type=Path, help="folder of voices; uploads are kept there")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--allowed-host", action="append", default=[], help="a name that a proxy before this server is reached by"
    )
    parser.add_argument("--max-streams", type=int, default=8, help="requests generated at a time (default: 8)")
    parser.add_argument("--max-queue", type=int, default=64, help="requests that may wait; then 429 (default: 64)")
    parser.add_argument("--max-seconds", type=float, default=90.0, help="most audio of a request (default: 90)")
    parser.add_argument("--request-timeout", type=float, default=300.0, help="seconds for a request (default: 300)")
    parser.add_argument("--api-key", action="append", default=[], help=f"required from clients; or ${KEYS_VARIABLE}")
    parser.add_argument("--api-key-file", type=Path, help="a file with an API key on each line")
    parser.add_argument("--unload-after", type=float, help="free the model after so many idle seconds")
    parser.add_argument("--watermark", choices=WATERMARKS, help="mark the audio as generated (docs/watermark.md)")
    parser.add_argument(
        "--watermark-for",
        choices=("all", "added-voices", "requests"),
        default="all",
        help="which speech: all of it; that in added voices or after a context; or where a request asks (default: all)",
    )
    add_guard_options(parser)


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings. Raises CSMError."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import soundfile  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise CSMError(f"serve needs the package {error.name}: pip install 'csm[serve]'") from error
    from csm.serve.settings import Settings, read_keys

    return Settings(
        model=args.model,
        voices=args.voices,
        host=args.host,
        port=args.port,
        allowed_hosts=tuple(args.allowed_host),
        max_streams=args.max_streams,
        max_queue=args.max_queue,
        max_seconds=args.max_seconds,
        request_timeout=args.request_timeout,
        unload_after=args.unload_after,
        api_keys=read_keys(args.api_key, args.api_key_file, os.environ.get(KEYS_VARIABLE)),
        watermark=args.watermark,
        watermark_for=args.watermark_for,
        guards=Guards.without(*args.no_guards),
    )


def open_service(args: argparse.Namespace, settings: Settings) -> Service:
    """What the routes share, with the model loaded and warmed up. Raises CSMError."""
    from csm.serve.service import Service

    def load() -> Generator:
        generator = Generator.from_pretrained(
            args.model,
            args.device,
            lora=args.lora,
            max_streams=settings.max_streams,
            progress=sys.stderr.isatty(),
            tokenizer=args.tokenizer,
        )
        generator.warmup([1, settings.max_streams])
        return generator

    warnings.simplefilter("ignore", RoomWarning)  # a client's long prompt is no matter for the server's log
    service = Service(settings, load, None if args.watermark is None else load_watermark(args.watermark))
    service.load_now()
    return service


def run(args: argparse.Namespace) -> str:
    """Serve until a signal ends it. Prints nothing at the end."""
    settings = read_settings(args)
    from csm.serve.app import create_app
    from csm.serve.server import Server

    service = open_service(args, settings)
    if not settings.is_local and not settings.api_keys:
        print("warning: no API key: everyone who reaches this address can use the server", file=sys.stderr)
    print(f"serving {settings.model} on http://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
    Server(create_app(service), settings).run()
    return ""
