"""Precision: of the forward pass, of a step, and a loss that is not finite."""

import math

import pytest
import torch

from engine import precision
from engine.errors import UserError
from engine.precision import Losses, Precision, choose_precision


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_that_of_the_forward_pass_and_weights_stay_float32(name, dtype):
    layer = torch.nn.Linear(4, 2)
    with Precision(name, "cpu").autocast():
        assert layer(torch.randn(3, 4)).dtype == dtype
    assert layer(torch.randn(3, 4)).dtype == torch.float32 and layer.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_step_is_the_optimisers_own(name):
    def stepped(step):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        weight.grad = torch.full((3,), 5.0)  # of an earlier step
        assert step((weight**2).sum(), torch.optim.SGD([weight], lr=0.1)) == 14.0
        return weight.detach()

    def plain_step(loss, optimizer):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    torch.testing.assert_close(stepped(Precision(name, "cpu").backward_and_step), stepped(plain_step))


def test_losses_are_read_seldom_to_the_last_bit_and_the_first_that_is_not_finite_names_its_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(precision.time, "monotonic", lambda: clock[0])
    losses, values = Losses("epoch 3, batch"), torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    read = []
    for now, row in zip((0.0, 0.1, 0.4, 0.6), values, strict=True):
        clock[0] = now
        read.append(losses.add(*row))
    assert read == [True, False, False, True]  # the first, so that a bar has one to show; then every half second
    assert losses.read() == losses.rows == [tuple(row) for row in values.tolist()]
    losses.add(torch.tensor(1.0), torch.tensor(math.nan))  # of a row the loss alone
    losses.add(torch.tensor(math.inf), torch.tensor(1))
    losses.add(torch.tensor(math.nan), torch.tensor(1))
    with pytest.raises(UserError, match="the loss became inf at epoch 3, batch 5: lower --lr"):
        losses.read()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", "bf16"),
        ("fpu amx_bf16 amx_tile", "bf16"),
        ("asimd sve bf16", "bf16"),
        ("fpu avx512f avx512_vnni", "fp32"),
        (None, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_has_units_for_it(monkeypatch, tmp_path, flags, expected):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    assert choose_precision("auto", "cpu") == expected
    assert [choose_precision(name, "cpu") for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert choose_precision("auto", "mps") == "fp32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_gpu_supports_it(monkeypatch, supported, expected):
    asks = "is_bf16_supported"
    monkeypatch.setattr(torch.cuda, asks, lambda including_emulation: supported and not including_emulation)
    assert choose_precision("auto", "cuda") == expected
