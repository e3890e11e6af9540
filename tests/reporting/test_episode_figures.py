"""The figure of an episode: its features in two dimensions, and its margins."""

import pytest
import torch

from reporting.episode_figures import KINDS, margins, pca, projection_figure, seen_by_head


def test_pca_keeps_the_distances_of_features_of_two_dimensions_and_ignores_a_shift():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(40, 2, generator=generator, dtype=torch.double) * torch.tensor([3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(64, 2, generator=generator, dtype=torch.double))
    z = plane @ axes.T
    y, share = pca(z)
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(plane, plane))
    torch.testing.assert_close(pca(z + 7.0)[0], y)
    assert share[0] > share[1] and sum(share) == pytest.approx(1.0)


def test_pca_is_centred_uncorrelated_and_of_largest_variance():
    z = torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    y, share = pca(z)
    covariance = torch.cov(y.T)
    assert y.mean(0).abs().max() < 1e-9 and covariance[0, 1].abs() < 1e-9
    top = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    torch.testing.assert_close(covariance.diagonal(), top[:2])
    assert share == pytest.approx((top[:2] / top.sum()).tolist())


@pytest.mark.parametrize("shape", [(6, 1), (2, 5), (1, 5)])
def test_pca_of_few_dimensions_or_points_and_of_equal_points_is_finite(shape):
    for z in (torch.randn(shape), torch.ones(shape)):
        y, _ = pca(z)
        assert y.shape == (shape[0], 2) and torch.isfinite(y).all()


def test_a_margin_is_the_own_logit_minus_the_best_other():
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [1.0, 1.0, 0.0]])
    assert margins(logits, torch.tensor([0, 1, 0])).tolist() == [0.5, -2.0, 0.0]


def test_a_projection_draws_what_the_head_sees_and_the_margins():
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0], [6.0, 8.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])
    record = {kind: {"before": z, "after": z, "labels": labels} for kind in KINDS}
    record |= {"class_names": ["a", "b"], "episode": 0, "result": "r"}
    assert torch.equal(seen_by_head(z, record | {"method": "softMax"}), z)
    for method in ("cosMax", "arcMax"):
        unit = seen_by_head(z, record | {"method": method})
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
        torch.testing.assert_close(unit[0], unit[2])
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    figure = projection_figure(record | {"method": "arcMax", "logits": {"before": before, "after": after}})
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[2].texts] == ["1 put right", "2 put wrong"]
