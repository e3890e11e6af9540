"""MatchingNet: Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016, with full context embeddings.

A bidirectional LSTM reads the support set and adds its states to the support features. Each query is refined by an LSTM
that attends to the support set, in as many steps as there are support samples. Then a query's class probabilities are
its softmax similarities to the support samples, summed per class.

Departures of the published numbers from the paper, which we follow: the similarity is a rectified cosine times 100, and
1e-6 is added to a probability before its logarithm. The LSTM reads the support class by class, so the order of the
classes matters slightly. The inputs of the attention LSTM that do not depend on its state are computed once, at a third
of the work. All is in float32, also under autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.meta_learner import MetaLearner
from models.linear import linear

SIMILARITY_SCALE = 100.0
NORM_EPS = 1e-5
PROBABILITY_EPS = 1e-6


class MatchingNet(MetaLearner):
    """MatchingNet on features. Its scores are log-probabilities; the temperature divides its similarities."""

    def __init__(self, feature_dim: int, map_shape: tuple[int, int, int]):
        super().__init__(feature_dim, map_shape)
        d = feature_dim
        self.support_lstm = nn.LSTM(d, d, batch_first=True, bidirectional=True)
        self.query_lstm = nn.LSTMCell(2 * d, d)

    def embed_support(self, z_support: Tensor) -> Tensor:
        """The support features in context, eq. 7: (E, k, d) -> (E, k, d), k = n_way * n_shot."""
        forward, backward = self.support_lstm(z_support)[0].chunk(2, dim=-1)
        return z_support + forward + backward

    def embed_query(self, z_query: Tensor, support: Tensor) -> Tensor:
        """The query features after k steps of attention, eq. 3-6: (E, n, d) and (E, k, d) -> (E, n, d).

        A step: r = softmax(h support^T) support; h, c = LSTMCell([z_query, r], (h, c)); h = h + z_query.
        """
        cell = self.query_lstm
        from_query, from_support = cell.weight_ih.chunk(2, dim=1)
        bias = cell.bias_ih + cell.bias_hh
        gates_of_query = linear(z_query, from_query, bias)
        gates_of_support = linear(support, from_support)
        h, c = z_query, torch.zeros_like(z_query)
        for _ in range(support.shape[1]):
            attention = (h @ support.transpose(1, 2)).softmax(-1)
            gates = gates_of_query + linear(h, cell.weight_hh) + attention @ gates_of_support
            i, f, g, o = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh() + z_query
        return h

    def forward(self, z_support: Tensor, z_query: Tensor) -> Tensor:
        """z_support (..., n_way, n_shot, d), z_query (..., n, d) -> log-probabilities (..., n, n_way)."""
        n_way, n_shot, d = z_support.shape[-3:]
        with torch.autocast(z_query.device.type, enabled=False):
            support = self.embed_support(z_support.reshape(-1, n_way * n_shot, d).float())
            query = self.embed_query(z_query.reshape(-1, *z_query.shape[-2:]).float(), support)
            support = support / (support.norm(dim=-1, keepdim=True) + NORM_EPS)
            query = query / (query.norm(dim=-1, keepdim=True) + NORM_EPS)
            similarity = SIMILARITY_SCALE / self.temperature * F.relu(query @ support.transpose(1, 2))
            by_class = similarity.softmax(-1).unflatten(-1, (n_way, n_shot)).sum(-1)
            log_probs = (by_class + PROBABILITY_EPS).log()
        return log_probs.reshape(*z_query.shape[:-1], n_way)

    def loss(self, scores: Tensor, y_query: Tensor) -> Tensor:
        """Negative log-likelihood: scores (..., n, n_way), y_query (n,) -> scalar."""
        return F.nll_loss(scores.flatten(0, -2), y_query.expand(scores.shape[:-1]).flatten())
