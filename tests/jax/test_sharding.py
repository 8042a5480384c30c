"""Many devices: scores sharded like the batch, reports equal to those of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WAYS = ("auto", "explicit", "shard_map", "pmap", "tensor_parallel_head")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((4, 8), id="4 devices, narrow head"),
        pytest.param((8, 16), id="8 devices, head wider than its input", marks=pytest.mark.slow),
    ],
)
def results(request, tmp_path_factory) -> dict:
    devices, classes = map(str, request.param)
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded.py"), devices, classes],
        env={
            **os.environ,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        cwd=tmp_path_factory.mktemp("sharded"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_scores_and_reports_equal_those_of_one_device(results, way):
    one, many = results["one_device"], results[way]
    np.testing.assert_allclose(many["scores"], one["scores"], atol=1e-6)
    assert many["report"].pop("count") == one["report"].get("count") == 128
    for name, value in many["report"].items():
        assert value == pytest.approx(one["report"][name], rel=1e-5, abs=1e-6), name
    assert sum(many["bins"]) == 128
    assert many["seen"] == 32
    assert many["faults"] == {"samples without ids": 96}  # of the last three updates


@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map", "tensor_parallel_head"])
def test_scores_come_out_sharded_like_the_batch(results, way):
    assert results[way]["spec"] == ["d"]
