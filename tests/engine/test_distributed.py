"""Ranks: their shares, a process alone, and the first to fail."""

from datetime import timedelta

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.distributed import (
    ALONE,
    Ranks,
    copy_rank_0,
    data_parallel,
    first_to_fail,
    gather_objects,
    gather_rows,
    join_ranks,
    rank_0_first,
)


@given(st.integers(0, 200), st.integers(1, 20))
def test_shares_are_consecutive_and_even(n_items, n_ranks):
    items = range(5, 5 + 3 * n_items, 3)
    shares = [Ranks(rank, n_ranks).share(items) for rank in range(n_ranks)]
    assert [i for share in shares for i in share] == list(items)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_a_process_alone_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_ranks() == ALONE and ALONE.first and not dist.is_initialized()
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(gather_rows([rows[:1], rows[1:]], ALONE), rows) and gather_objects(5, ALONE) == [5]
    layer = nn.Linear(2, 2)
    assert data_parallel(layer, ALONE) is layer
    before = layer.weight.clone()
    copy_rank_0([layer], ALONE)
    assert torch.equal(layer.weight, before) and first_to_fail()
    with rank_0_first(ALONE):
        pass


def test_the_first_to_fail_is_one(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [first_to_fail() for _ in range(3)] == [True, False, False]
    monkeypatch.delenv("MASTER_PORT")
    assert first_to_fail()
