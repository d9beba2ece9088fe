"""House rules that a test can enforce: import order, sizes of functions and files, docstrings, cost of an import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import csm

ROOT = Path(csm.__file__).parent.parent

# A module may import modules of earlier lines only, and its own package.
LAYERS = [
    {"csm.errors", "csm.metrics"},
    {"csm.config", "csm.formats"},
    {"csm.audio", "csm.graph", "csm.kernels", "csm.text", "csm.weights"},
    {"csm.codec_ops", "csm.command_line", "csm.pronounce", "csm.subtitles"},
    {"csm.audio_file", "csm.codec", "csm.cache", "csm.joins", "csm.sampling", "csm.prompt", "csm.watermark"},
    {"csm.prefix_cache", "csm.voices"},
    {"csm.request"},
    {"csm.model"},
    {"csm.align", "csm.lora", "csm.quantize"},
    {"csm.gguf_model"},
    {"csm.frame", "csm.quantized_model", "csm.threads"},
    {"csm.prefill", "csm.opchecks"},
    {"csm.selfcheck", "csm.runner"},
    {"csm.engine"},
    {"csm.worker"},
    {"csm.guards"},
    {"csm.stream"},
    {"csm.generator"},
    {"csm.fingerprint"},
    {"csm.batch", "csm.conversation"},
    {"csm.batch_ray"},
    {"csm.script", "csm.player"},
    {"csm.book"},
    {"csm.finetune"},
    {"csm.evaluate"},
    {"csm.compare", "csm.voice_command"},
    {"csm.bench"},
    {"csm"},
    {"csm.serve"},
    {"csm.doctor", "csm.generate_command", "csm.watermark_command"},
    {"csm.batch_command", "csm.read_command"},
    {"csm.__main__"},
    {"csm.weights.recipe"},
]
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def package_of(name):
    """csm.kernels.attention -> csm.kernels, csm.frame -> csm.frame, csm -> csm."""
    if f"{name}.".startswith("csm.weights.recipe."):
        return "csm.weights.recipe"
    return ".".join(name.split(".")[:2])


FOLDERS = {
    "csm": "csm",
    "csm/bench": "csm.bench",
    "csm/book": "csm.book",
    "csm/doctor": "csm.doctor",
    "csm/evaluate": "csm.evaluate",
    "csm/finetune": "csm.finetune",
    "csm/text": "csm.text",
    "csm/serve": "csm.serve",
    "kernels": "csm.kernels",
    "kernels/native": "csm.kernels.native",
    "weights": "csm.weights",
    "weights/recipe": "csm.weights.recipe",
}


def modules():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            yield path, package if path.stem == "__init__" else f"{package}.{path.stem}"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""


@pytest.mark.parametrize(("path", "module"), list(modules()), ids=lambda value: str(value).replace(f"{ROOT}/", ""))
def test_imports_run_one_way(path, module):
    own = package_of(module)
    for name in imports(path):
        if not name.startswith("csm"):
            peer = module == "csm.bench.peers" and name.startswith("transformers")  # what it is compared with
            assert peer or name.split(".")[0] not in ("transformers", "kernels", "weights"), name
            continue
        other = package_of(name)
        if other != own:
            assert LAYER_OF[other] < LAYER_OF[own], f"{module} imports {name}"


def test_generate_uses_public_names_only():
    assert {name for name in imports(ROOT / "generate.py") if name.startswith("csm")} == {"csm.generate_command"}
    used = {name for name in imports(ROOT / "csm" / "generate_command.py") if name.startswith("csm")}
    assert used == {"csm", "csm.command_line"}


def functions():
    files = [path for path, _ in modules()] + [ROOT / "generate.py"]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_no_function_is_longer_than_forty_lines():
    for path, node in functions():
        docstring = ast.get_docstring(node)
        lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
        assert lines <= 40, f"{path.name}: {node.name} has {lines} lines"


def test_the_model_has_at_most_300_lines():
    assert len((ROOT / "csm" / "model.py").read_text().splitlines()) <= 300


def test_public_functions_are_documented():
    missing = []
    for path in [path for path, _ in modules()]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                bare = isinstance(node, ast.ClassDef) and path.name == "model.py"  # its layers need no docstring
                if not ast.get_docstring(node) and not bare and node.name != "main":
                    missing.append(f"{path.name}: {node.name}")
    assert missing == []


def test_importing_needs_neither_transformers_nor_the_codec():
    code = "import csm, sys; assert not {'transformers', 'bitsandbytes', 'moshi'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
