"""The codec, audio files, and the sound device."""

from __future__ import annotations

from importlib import import_module

from csm.doctor.finding import ERROR, OK, WARNING, Finding


def import_failure(package: str) -> str | None:
    """Why a package cannot be imported, or None. "missing" if it is not installed."""
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        return "missing" if error.name == package.partition(".")[0] else str(error)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a shared library, or versions that differ
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return None


def check_codec() -> Finding:
    """The codec's package."""
    failure = import_failure("moshi.models")
    if failure is not None:
        advice = "pip install --force-reinstall moshi==0.2.13"
        return Finding("codec", ERROR, f"the package moshi cannot be imported: {failure}", advice)
    return Finding("codec", OK, "moshi can be imported")


def check_formats() -> Finding:
    """The packages that read and write audio files. None needs the program ffmpeg."""
    formats = ["sphn reads WAV, FLAC, MP3 and Ogg"]
    for package, name, use in (
        ("soundfile", "soundfile", "FLAC, MP3, Ogg and Opus"),
        ("av", "PyAV", "AAC and chapters"),
    ):
        failure = import_failure(package)
        if failure is None:
            formats.append(f"{name} writes {use}")
        elif failure != "missing":
            return Finding("formats", WARNING, f"{name} cannot be imported: {failure}", f"pip install -U {package}")
    return Finding("formats", OK, "; ".join(formats))


def check_sound() -> Finding:
    """The sound device. A WAV file needs none."""
    failure = import_failure("sounddevice")
    if failure == "missing":
        return Finding("sound", OK, "sounddevice is not installed: audio goes to files (pip install sounddevice)")
    if failure is not None:
        advice = "install PortAudio (Debian, Ubuntu: apt install libportaudio2)"
        return Finding("sound", WARNING, f"sounddevice cannot be imported: {failure}", advice)
    name = output_device()
    if name is None:
        return Finding("sound", WARNING, "there is no sound device", "write files, and play them on another machine")
    return Finding("sound", OK, name)


def output_device() -> str | None:
    """The name of the default output device, or None."""
    import sounddevice

    try:
        return str(sounddevice.query_devices(kind="output")["name"])
    except (sounddevice.PortAudioError, ValueError):
        return None
