"""What a plain ``pip install .`` puts into a clean environment."""

import shutil
import subprocess
import sys
import venv
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
        "csm/evaluate/command.py",
        "csm/finetune/train.py",
        "csm/kernels/attention.py",
        "csm/serve/app.py",
        "csm/weights/hub.py",
        "csm/weights/tiny/model.safetensors",
        "csm/py.typed",
    ):
        assert part in names


def test_it_imports_from_another_folder(wheel, tmp_path):
    """In an environment of its own, which borrows only the dependencies of this one."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    code = "import sys; sys.path += sys.argv[1:]; import csm, csm.kernels, csm.weights; print(csm.__file__)"
    paths = [path for path in sys.path if path.endswith("site-packages")]
    run = subprocess.run([python, "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "env") in run.stdout
