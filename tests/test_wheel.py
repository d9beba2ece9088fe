"""What a plain ``pip install .`` puts into a clean environment."""

import re
import shutil
import subprocess
import sys
import venv
import wave
import zipfile
from pathlib import Path

import pytest

import generate

pytestmark = pytest.mark.slow
ROOT = Path(generate.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves its build folder behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    return next(folder.glob("csm-*.whl"))


def test_only_csm_is_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"csm"}
    for part in (
        "csm/__main__.py",
        "csm/doctor/command.py",
        "csm/evaluate/command.py",
        "csm/finetune/train.py",
        "csm/kernels/attention.py",
        "csm/serve/app.py",
        *(f"csm/serve/static/{path.name}" for path in (ROOT / "csm/serve/static").iterdir()),
        "csm/weights/hub.py",
        "csm/weights/tiny/model.safetensors",
        "csm/py.typed",
    ):
        assert part in names
    assert not [name for name in names if "recipe" in name], "the recipe runs from a checkout only"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The ``bin`` folder of an environment with the wheel, which borrows only the dependencies of this one."""
    env = tmp_path_factory.mktemp("installed") / "env"
    venv.create(env, with_pip=True)
    subprocess.run([env / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    site = next(env.glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return env / "bin"


def test_it_imports_from_another_folder(installed, tmp_path):
    code = "import csm, csm.kernels, csm.weights; print(csm.__file__)"
    run = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(installed.parent) in run.stdout


def test_the_console_script_in_an_empty_folder(installed, tmp_path):
    def csm(*args):
        return subprocess.run([installed / "csm", *args], cwd=tmp_path, capture_output=True, text=True)

    run = csm("generate", "--model", "tiny", "--text", "Hello there.", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("out.wav: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.wav"]
    with wave.open(str(tmp_path / "out.wav")) as file:
        assert file.getnframes() >= 1920
    run = csm("doctor")
    assert run.returncode in (0, 1, 2), run.stderr
    assert re.search(r"^ok +python ", run.stdout, flags=re.MULTILINE)
    run = csm("eval", "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: csm eval")
    run = csm("generate", "--text", "Hi", "--top-k", "0")
    assert (run.returncode, run.stderr[:27]) == (2, "csm generate: error: top-k ")
