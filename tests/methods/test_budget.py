"""What a stage takes of memory is known before it begins. Estimates against measured peaks: tests/budget_run.py."""

import pytest
import torch
from torch import nn

import engine.budget
from methods.budget import outcome, step_of, without_numbers
from models import build_backbone
from tests.helpers import ALIGN, CHECKPOINT, TINY, TRAIN, call, folders


def kept_by_autograd(network: nn.Module, x: torch.Tensor) -> int:
    """The bytes of all that a forward pass keeps, but for parameters, counted on real tensors."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = network(x)
    assert result.requires_grad
    return sum(n_bytes for _, n_bytes in kept.values())


@pytest.mark.parametrize(("name", "img_size"), [("Conv4", 32), ("ResNet12", 32), ("ResNet18", 64)])
def test_a_step_without_numbers_keeps_what_a_real_one_keeps(name, img_size):
    network = build_backbone(name, img_size)
    step = step_of(network, lambda net, x: net(x), 4, 3, img_size, img_size)
    assert step.kept == pytest.approx(kept_by_autograd(network, torch.rand(4, 3, img_size, img_size)), rel=0.1)
    assert outcome(network, img_size) == (network.feature_dim,)


def test_the_network_itself_is_left_as_it_is():
    network = build_backbone("Conv4", 16).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    step_of(network, lambda net, x: net(x), 4, 3, 16, 16)
    assert not network.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.is_meta for p in without_numbers(network).parameters())


def test_a_network_that_asks_for_numbers_is_not_estimated():
    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    assert step_of(Asks(2, 2), lambda net, x: net(x), 1, 2).n_bytes == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--alignment", "adversarial", "--critic_hidden", 10**9], "--critic_hidden"),
        (["--align_blocks", 0, "--aug_size", 10**9], "--aug_size"),
        (["--align_blocks", 0, "--aug_size", 10**9, "--alignment", "centroid", "--align_adapter", 8], "--aug_size"),
    ],
)
def test_huge_flags_end_at_once_in_one_line(workspace, flags, named):
    outcome = call("associative_alignment", *ALIGN, *folders(workspace), *flags, "--align_iters", 1)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: alignment takes ") and named in outcome.err


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        ("transferLearning", [*TRAIN, "--batch_size", 10**7, "--overwrite"], "--batch_size"),
        (
            "metaLearning",
            [*TINY, "--method", "RelationNet", "--train_n_way", 3, "--train_n_query", 4],
            "--train_n_query",
        ),
        ("metaLearning", [*TINY, "--method", "MatchingNet", "--n_epoch", 0, "--init_from", CHECKPOINT], "--n_query"),
        ("associative_alignment", [*ALIGN, "--overwrite"], "--aug_size"),
    ],
)
def test_each_stage_ends_in_one_line_where_memory_is_short(workspace, tmp_path, monkeypatch, script, flags, named):
    (tmp_path / "meminfo").write_text("MemAvailable:     100000 kB\n")
    monkeypatch.setattr(engine.budget, "MEMINFO", tmp_path / "meminfo")
    flags = [workspace / "results" / "models" / flag if flag == CHECKPOINT else flag for flag in flags]
    outcome = call(script, *flags, *folders(workspace))
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "of which 0.1 GB are free" in outcome.err and named in outcome.err
