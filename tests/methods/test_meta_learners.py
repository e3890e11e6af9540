"""The meta-learners against the published numbers, and what must hold of any of them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from methods.meta_learner import MetaLearner
from methods.meta_learners import META_LEARNERS, build_meta_learner
from methods.protonet import protonet_scores
from methods.relationnet import RelationNet
from models.conv4 import Conv4
from tests.helpers import golden

N_WAY, N_SHOT, N_QUERY = 4, 3, 6
ALL = pytest.mark.parametrize("method", META_LEARNERS)


class Shapes:
    """A backbone as far as build_meta_learner is concerned."""

    feature_dim = 12
    map_shape = (3, 10, 10)


def learner_and_episodes(method, seed=0, batch=()):
    torch.manual_seed(seed)
    learner = build_meta_learner(method, Shapes())
    size = Shapes.map_shape if learner.uses_maps else (Shapes.feature_dim,)
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(*batch, N_WAY, N_SHOT, *size, generator=generator)
    query = torch.randn(*batch, N_QUERY, *size, generator=generator)
    return learner, support, query


def published_learner(method, g):
    """A learner with the recorded weights, and the recorded support and query."""
    if method == "MatchingNet":
        learner = build_meta_learner(method, SimpleNamespace(feature_dim=64, map_shape=(64, 1, 1)))
        ours = {"FCE.lstmcell": "query_lstm", "G_encoder": "support_lstm"}
    elif method.startswith("RelationNet"):
        shape = tuple(g["RelationNet.feature_shape"].tolist())
        learner = build_meta_learner(method, SimpleNamespace(feature_dim=math.prod(shape), map_shape=shape))
        ours = {f"layer{i}.trunk.{j}": f"{kind}{i}" for i in (1, 2) for j, kind in enumerate(("conv", "norm"))}
        maps = [g[f"RelationNet.f_{part}"].float().unflatten(-1, shape) for part in ("support", "query")]
        g = {**g, "z_support": maps[0], "z_query": maps[1]}
    else:
        learner, ours = build_meta_learner(method, Shapes()), {}
    prefix = f"{method.removesuffix('_softmax')}.state."
    state = {}
    for key, value in g.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for published, own in ours.items():
                name = name.replace(published, own)
            state[name] = value
    learner.load_state_dict(state)
    return learner, g["z_support"], g["z_query"].flatten(0, 1)


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
@ALL
def test_scores_and_loss_are_the_published_ones(method):
    g = golden("meta_learners")
    learner, support, query = published_learner(method, g)
    scores = learner.train()(support, query)  # batch norm was recorded in train mode
    loss = learner.loss(scores, torch.arange(5).repeat_interleave(6))
    recorded = {"RelationNet": "RelationNet_mse"}.get(method, method)
    wanted = g[f"{recorded}.log_probs" if method == "MatchingNet" else f"{recorded}.scores"]
    torch.testing.assert_close(scores.detach(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach(), g[f"{recorded}.loss"], rtol=1e-4, atol=1e-5)


@ALL
def test_permuting_the_classes_permutes_the_scores(method):
    learner, support, query = learner_and_episodes(method)
    if method == "MatchingNet":
        # The support LSTM reads the classes one after another, so only without it is the order nothing at all.
        for parameter in learner.support_lstm.parameters():
            torch.nn.init.zeros_(parameter)
    order = torch.tensor([2, 0, 3, 1])
    scores = learner(support, query)
    torch.testing.assert_close(learner(support[order], query), scores[:, order], rtol=1e-4, atol=1e-5)


@ALL
def test_a_query_does_not_see_the_others_in_eval_mode(method):
    learner, support, query = learner_and_episodes(method)
    learner(support, query)  # an episode in train mode sets the statistics of batch norm
    learner.eval()
    torch.testing.assert_close(learner(support, query[2:3]), learner(support, query)[2:3], rtol=1e-4, atol=1e-5)


@ALL
def test_many_episodes_at_once_equal_one_by_one(method):
    learner, support, query = learner_and_episodes(method, batch=(2, 3))
    learner(support[0, 0], query[0, 0])
    learner.eval()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    together = learner(support, query)
    assert together.shape == (2, 3, N_QUERY, N_WAY)
    alone = torch.stack([learner(s, q) for s, q in zip(support.flatten(0, 1), query.flatten(0, 1), strict=True)])
    torch.testing.assert_close(together.flatten(0, 1), alone, rtol=1e-4, atol=1e-5)
    losses = torch.stack([learner.loss(scores, y) for scores in alone])
    torch.testing.assert_close(learner.loss(together, y), losses.mean())


@ALL
def test_gradients_reach_support_query_and_every_weight(method):
    learner, support, query = learner_and_episodes(method)
    support, query = (0.3 * support).requires_grad_(), (0.3 * query).requires_grad_()
    learner.loss(learner(support, query), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    for tensor in (support, query, *learner.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert (support.grad.flatten(2).abs().sum(-1) > 0).all()
    assert (query.grad.flatten(1).abs().sum(-1) > 0).all()


@pytest.mark.parametrize("method", ["ProtoNet", "MatchingNet"])
def test_scores_stay_in_float32_under_autocast(method):
    learner, support, query = learner_and_episodes(method)
    with torch.autocast("cpu", torch.bfloat16):
        scores = learner(support, query)
    assert scores.dtype == torch.float32
    if method == "ProtoNet":
        torch.testing.assert_close(scores, learner(support, query), rtol=0, atol=0)


def test_prototype_distances_survive_a_large_common_offset():
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(5, 1, 64, generator=generator)
    query = torch.randn(7, 64, generator=generator)
    exact = -(query.double().unsqueeze(1) - support.double().squeeze(1)).square().sum(-1)
    shifted = protonet_scores(support + 100.0, query + 100.0)
    torch.testing.assert_close(shifted.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["mse", "softmax"])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 9, 10, 19])
def test_relationnet_takes_maps_of_any_size(kind, side):
    torch.manual_seed(0)
    learner = RelationNet(4 * side * side, (4, side, side), kind).eval()
    support, query = torch.randn(N_WAY, N_SHOT, 4, side, side), torch.randn(N_QUERY, 4, side, side)
    scores = learner(support, query)
    assert scores.shape == (N_QUERY, N_WAY)
    pairs = torch.cat([support.mean(1).repeat(N_QUERY, 1, 1, 1), query.repeat_interleave(N_WAY, 0)], 1)
    x = learner.pool(F.relu(learner.norm1(learner.conv1(pairs))))
    x = learner.pool(F.relu(learner.norm2(learner.conv2(x)))).flatten(1)
    by_pairs = learner.fc2(F.relu(learner.fc1(x))).view(N_QUERY, N_WAY)
    torch.testing.assert_close(scores, by_pairs.sigmoid() if kind == "mse" else by_pairs, rtol=1e-4, atol=1e-5)


def test_relationnet_remembers_the_last_training_episode_alone():
    learner, support, query = learner_and_episodes("RelationNet")
    learner(torch.randn_like(support) * 9 + 5, query)
    learner(support, query)
    fresh, _, _ = learner_and_episodes("RelationNet")
    fresh(support, query)
    torch.testing.assert_close(learner.eval()(support, query), fresh.eval()(support, query))


@pytest.mark.parametrize("method", ["ProtoNet", "RelationNet_softmax"])
def test_the_temperature_divides_the_logits(method):
    learner, support, query = learner_and_episodes(method)
    scores = learner.eval()(support, query)
    learner.temperature = 4.0
    torch.testing.assert_close(learner(support, query), scores / 4)


def test_a_temperature_makes_the_probabilities_of_matchingnet_more_even():
    learner, support, query = learner_and_episodes("MatchingNet")
    learner.temperature = 1e6
    torch.testing.assert_close(
        learner(support, query).exp(), torch.full((N_QUERY, N_WAY), 1 / N_WAY), rtol=0, atol=1e-3
    )


# The contract.


@ALL
def test_every_meta_learner_is_one_of_the_contract_and_runs(method):
    backbone = Conv4(16, width=8, relation=META_LEARNERS[method][0].uses_maps)
    learner = build_meta_learner(method, backbone)
    assert type(learner).__bases__ == (MetaLearner,)
    x = torch.randn(3 * 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = (backbone.feature_map(x) if learner.uses_maps else backbone(x)).unflatten(0, (3, 4))
    scores = learner(z[:, :2], z[:, 2:].flatten(0, 1))
    assert scores.shape == (6, 3) and learner.loss(scores, torch.arange(3).repeat_interleave(2)).isfinite()


def test_a_meta_learner_has_nothing_of_its_own_in_its_state():
    contract = MetaLearner(12, (3, 2, 2))
    assert not contract.state_dict() and not list(contract.buffers())
