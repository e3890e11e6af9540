"""Settings and fixtures that several test modules share."""

import os
import shutil

import pytest
import torch
from hypothesis import settings

from engine.errors import UserError
from engine.run import select_device
from tests.helpers import CURVE, DEVICE, TRAIN, call, folders, make_benchmark

# What is not marked `device` is the same on every machine: the scripts' --device auto finds no GPU.
if DEVICE.type == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread a test: the tensors are tiny, and threads that wait for each other on a busy machine are far slower.
torch.set_num_threads(1)
# The same examples in every run; no files.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("fixed")


def pytest_configure(config):
    """End with one line when AA_DEVICE names a device that is not there."""
    try:
        select_device(DEVICE.type)
    except UserError as error:
        pytest.exit(str(error).replace("--device ", "AA_DEVICE="), returncode=2)


@pytest.fixture
def default_device(monkeypatch):
    """Tensors that the test makes without naming a device are on DEVICE, and products there are exact float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with DEVICE:
        yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny benchmark and the files of a finished stage 1. Tests must not write to it."""
    root = tmp_path_factory.mktemp("trained")
    make_benchmark(root / "benchmarks" / "tiny")
    outcome = call("transferLearning", *TRAIN, *folders(root))
    assert outcome.status == 0, outcome.err
    return root


@pytest.fixture
def workspace(trained, tmp_path):
    """A copy of `trained` that a test may spoil."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="session")
def aligned(trained, tmp_path_factory):
    """A folder with a tiny benchmark and finished stages 1 and 3, drawn. Tests must not write to it."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("aligned") / "copy")
    outcome = call("associative_alignment", *CURVE, *folders(root))
    assert outcome.status == 0, outcome.err
    outcome = call("reporting.figures", root / "results")
    assert outcome.status == 0 and outcome.out.count("skipped") == 1 and "skipped shots.png" in outcome.out, outcome
    return root


@pytest.fixture
def aligned_copy(aligned, tmp_path):
    """A copy of `aligned` that a test may spoil."""
    return shutil.copytree(aligned, tmp_path / "copy")
