"""The figure of an episode: its features in two dimensions, and its margins."""

import pytest
import torch

from reporting.episode_figures import (
    MARKERS,
    head_directions,
    margins,
    principal_axes,
    projection_figure,
    scores_of,
    seen_by_head,
)


def projected(z):
    """Features on their principal axes, and the share of variance of each."""
    axes, share = principal_axes(z)
    return (z.double() - z.double().mean(0)) @ axes, share


def test_principal_axes_keep_the_distances_of_features_of_two_dimensions_and_ignore_a_shift():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(40, 2, generator=generator, dtype=torch.double) * torch.tensor([3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(64, 2, generator=generator, dtype=torch.double))
    z = plane @ axes.T
    y, share = projected(z)
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(plane, plane))
    torch.testing.assert_close(projected(z + 7.0)[0], y)
    assert share[0] > share[1] and sum(share) == pytest.approx(1.0)


def test_coordinates_are_centred_uncorrelated_and_of_largest_variance():
    z = torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    y, share = projected(z)
    covariance = torch.cov(y.T)
    assert y.mean(0).abs().max() < 1e-9 and covariance[0, 1].abs() < 1e-9
    top = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    torch.testing.assert_close(covariance.diagonal(), top[:2])
    assert share == pytest.approx((top[:2] / top.sum()).tolist())


@pytest.mark.parametrize("shape", [(6, 1), (2, 5), (1, 5)])
def test_axes_of_few_dimensions_or_points_and_of_equal_points_are_finite(shape):
    for z in (torch.randn(shape), torch.ones(shape)):
        y, _ = projected(z)
        assert y.shape == (shape[0], 2) and torch.isfinite(y).all()
        assert torch.isfinite(head_directions(y, torch.ones(shape[0], 3))).all()


@pytest.mark.parametrize("n", [30, 200])  # fewer queries than dimensions, and more
def test_the_scores_of_queries_give_the_directions_of_the_head_in_their_plane(n):
    generator = torch.Generator().manual_seed(2)
    z, weight = torch.randn(n, 64, generator=generator), torch.randn(5, 64, generator=generator)
    bias = torch.randn(5, generator=generator)
    found = head_directions(projected(z)[0], z @ weight.T + bias)
    torch.testing.assert_close(found, weight.double() @ principal_axes(z)[0], rtol=1e-4, atol=1e-4)


def test_a_margin_is_the_own_logit_minus_the_best_other():
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [1.0, 1.0, 0.0]])
    assert margins(logits, torch.tensor([0, 1, 0])).tolist() == [0.5, -2.0, 0.0]


def test_a_projection_draws_what_the_head_sees_and_the_margins():
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0], [6.0, 8.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])
    record = {kind: {"before": z, "after": z, "labels": labels} for kind in MARKERS}
    record |= {"class_names": ["a", "b"], "episode": 0, "title": "arcMax"}
    assert torch.equal(seen_by_head(z, record | {"method": "softMax"}), z)
    for method in ("cosMax", "arcMax"):
        unit = seen_by_head(z, record | {"method": method})
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
        torch.testing.assert_close(unit[0], unit[2])
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    record |= {"method": "arcMax", "logits": {"before": before, "after": after}}
    record["standing"] = {"gain": -25.0, "mean": 1.5, "better_than": 0.1}
    figure = projection_figure(record)  # in feature space: one panel, both heads in it
    figure.canvas.draw()
    panel, margin = figure.axes
    assert [text.get_text() for text in margin.texts] == ["1 put right", "2 put wrong"]
    assert margin.get_xlim() == margin.get_ylim()
    assert sorted(line.get_linestyle() for line in panel.lines) == ["-", "-", ":", ":"]
    assert "gain -25.0 points, mean of all +1.5: better than 10 % of episodes" in figure.get_suptitle()
    record["query"] = record["query"] | {"after": z.flip(0)}
    assert [[line.get_linestyle() for line in axes.lines] for axes in projection_figure(record).axes[:2]] == [
        [":", ":"],
        ["-", "-"],
    ]


def test_margins_before_and_after_are_on_one_scale():
    logits = {"before": torch.tensor([[5.0, 0.0]]), "after": torch.tensor([[15.0, 0.0]])}
    scores = scores_of({"logits": logits, "scale": {"before": 5.0, "after": 15.0}})
    assert torch.equal(scores["before"], scores["after"])
    assert torch.equal(scores_of({"logits": logits})["after"], logits["after"])  # files of earlier versions
