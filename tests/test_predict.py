"""The model of a frame's time: its calibration, and what it must get right whatever its constants are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import csm
from csm.bench import predict
from csm.bench.launches import frame_sequence
from csm.bench.machine_code import Compiled
from csm.bench.predict import GPUS, L2, Work, programs_per_multiprocessor, simulate
from csm.bench.rows import frame_bytes
from csm.config import CSM_1B
from csm.kernels.launch import Launch

H200, RTX_4090 = GPUS["h200"], GPUS["4090"]
PRODUCT = Work("product", "", 512, 4, 64, 0, 1 << 24, 1 << 15, 1 << 12, 300)


def microseconds(works, gpu=H200):
    return simulate(works, gpu)[0]


def test_calibration():
    """A published step: the roofline of its 2.47 GB is 0.572 ms."""
    assert predict.calibration() == pytest.approx(predict.PUBLISHED_MS, rel=0.01)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_no_frame_is_faster_than_its_bytes(gpu):
    works = [PRODUCT] * 50
    floor = 50 * PRODUCT.weight_bytes / gpu.bytes_per_us
    assert floor < microseconds(works, gpu) < 2 * floor


def test_what_makes_a_kernel_slower():
    """Each property alone, between kernels that are as they were."""
    between = [PRODUCT] * 3
    usual = microseconds([*between, PRODUCT, *between])
    small = PRODUCT._replace(weight_bytes=132 << 16, programs=132, early_bytes=1 << 16)  # one program each
    for slower in (
        PRODUCT._replace(after_wait=3000),
        PRODUCT._replace(early_bytes=0, late_bytes=1 << 15),
        PRODUCT._replace(weight_bytes=1 << 25),
    ):
        assert microseconds([*between, slower, *between]) > usual + 0.3
    whole_multiprocessor = small._replace(num_warps=16, registers=128)
    assert microseconds([small, whole_multiprocessor] * 20) > microseconds([small] * 40) + 5
    assert microseconds([small._replace(triggers_late=True)] * 40) > microseconds([small] * 40) + 5


def test_dependent_launch_hides_what_comes_before_the_wait():
    assert microseconds([PRODUCT] * 20, H200) < microseconds([PRODUCT] * 20, H200._replace(gpu_arch=89)) - 10


def test_residency():
    assert programs_per_multiprocessor(PRODUCT, H200) == 8  # 65536 / (64 x 128)
    assert programs_per_multiprocessor(PRODUCT._replace(num_warps=16, registers=128), H200) == 1
    assert programs_per_multiprocessor(PRODUCT._replace(registers=16), RTX_4090) == 12  # 1536 threads
    assert programs_per_multiprocessor(PRODUCT._replace(shared_bytes=48 << 10), RTX_4090) == 2


def test_the_oldest_weights_leave_the_cache():
    cache = L2(100)
    assert not cache.read((1, 0), 40) and cache.read((1, 0), 40)
    assert not cache.read((2, 0), 50) and cache.read((1, 0), 40)
    assert not cache.read((3, 0), 50)
    assert cache.read((1, 0), 40) and not cache.read((2, 0), 50)


def test_every_weight_of_a_frame_is_counted_and_none_comes_from_l2():
    """Against the shapes of the checkpoint. Nothing is compiled: the counts do not depend on it."""
    fake = Compiled("", "", 90, 1, 4, 64, 10.0, 0, 0, 128, 0, 0, 0, 300, 300, 300)
    for gpu in GPUS.values():
        cache = L2(gpu.l2_mb * 1e6 * predict.L2_SHARE)
        kernels = [one for one in frame_sequence(CSM_1B, 1, torch.bfloat16) if isinstance(one, Launch)]
        works = [predict.launch_work(launch, fake, cache) for launch in kernels]
        gathered = 30 * 2 * CSM_1B.depth_decoder.qkv_dim * CSM_1B.depth_decoder.dim  # layer 0's q, k and v, by code
        expected = frame_bytes(CSM_1B, torch.bfloat16) - gathered
        assert sum(work.weight_bytes for work in works) == pytest.approx(expected, rel=1e-3)
        assert not any(work.in_l2 for work in works)


def test_kept_weights_stay_in_the_cache():
    cache = L2(100)
    assert not cache.read((1, 0), 60, keep=True) and not cache.read((2, 0), 30)
    assert not cache.read((3, 0), 35)
    assert cache.read((1, 0), 60, keep=True) and not cache.read((2, 0), 30)


@pytest.mark.parametrize(("scheme", "gigabytes"), [("int8", 4.72), ("fp8", 4.45), ("int4-depth", 3.02)])
def test_bytes_of_quantised_weights_and_their_scales(scheme, gigabytes):
    """8.5 bits a weight in int8, 4.5 in int4; 30 depth passes take their first q, k and v from the table.

    The cache of a 4090 keeps the depth decoder's MLPs in int4, no other.
    """
    fake = Compiled("", "", 89, 1, 4, 64, 10.0, 0, 0, 128, 0, 0, 0, 300, 300, 300)
    gpu = GPUS["4090"]
    budget = int(gpu.l2_mb * 1e6 * predict.L2_SHARE)
    cache, sequence = L2(budget), frame_sequence(CSM_1B, 1, torch.bfloat16, scheme, budget)
    works = [predict.launch_work(launch, fake, cache) for launch in sequence if isinstance(launch, Launch)]
    assert sum(work.weight_bytes for work in works) == pytest.approx(gigabytes * 1e9, rel=2e-3)
    from_l2 = sum(work.weight_bytes for work in works if work.in_l2)
    assert 0 < from_l2 <= 30 * budget and (scheme != "int4-depth" or from_l2 > 0.95 * 30 * budget)


def test_a_frame_is_kernels_and_a_few_plain_ops():
    sequence = frame_sequence(CSM_1B, 1, torch.bfloat16)
    plain = [one for one in sequence if isinstance(one, str)]
    assert 0 < len(plain) < 40 and len(sequence) <= 640
    assert sequence[-1].name == "advance_slot"


QUANTISED_MS = {("h200", "int8"): 2.0, ("5090", "int8"): 3.3, ("4090", "int4-depth"): 4.0}


def predicted(gpu, *options):
    """What ``bench.py`` prints, in another process: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "bench.py", "--predict", gpu, "--quiet", *options]
    root = Path(csm.__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("PREDICTION, not a measurement")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "scheme"), QUANTISED_MS)
def test_a_frame_with_quantised_weights_is_predicted(gpu, scheme):
    prediction = predicted(gpu, "--quantize", scheme)["prediction"]
    assert prediction["weights"] == scheme and prediction["predicted_ms"] <= QUANTISED_MS[gpu, scheme]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_a_frame_is_predicted(gpu):
    result = predicted(gpu)
    prediction = result["prediction"]
    assert prediction["weights_at_copy_bandwidth_ms"] < prediction["predicted_ms"] < 15
    assert gpu != "h200" or prediction["predicted_ms"] <= 3.3
    assert sum(row["predicted_frame_us"] for row in result["kernels"]) == pytest.approx(
        1e3 * prediction["predicted_ms"]
    )
