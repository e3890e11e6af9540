"""Centroid alignment: equations 4-5 of Afrasiyabi et al., ECCV 2020.

Related base samples are pulled to the centroid of the novel class that they were assigned to, and away from the
other centroids: the negative log-likelihood of a softmax over minus squared Euclidean distances.
"""

from torch import Tensor

from models.heads import mean_cross_entropy, one_hot_of


def centroid_alignment_loss(
    z_support: Tensor, y_support: Tensor, z_related: Tensor, y_related: Tensor, n_way: int
) -> Tensor:
    """Mean of -log softmax_k(-|z - mu_k|^2) at the assigned class, mu_k the mean of the support of class k.

    z_support (..., k, d), y_support (..., k) with every novel class in it, z_related (..., n, d), y_related (..., n) ->
    scalar, summed over episodes. No temperature, features not normalised, in float32; the gradient flows through
    related samples and centroids.

    The logits are 2 z mu_k - |mu_k|^2: |z|^2 is the same for all classes. Nor does the origin change them; from the
    mean of the centroids, no large numbers cancel.
    """
    member = one_hot_of(y_support, n_way).mT
    centroids = member @ z_support.float() / member.sum(-1, keepdim=True)
    origin = centroids.detach().mean(-2, keepdim=True)
    z, mu = z_related.float() - origin, centroids - origin
    return mean_cross_entropy(2 * z @ mu.mT - mu.square().sum(-1).unsqueeze(-2), y_related)
