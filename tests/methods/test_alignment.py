"""Algorithm 1 against the published numbers, and what an episode of alignment may and may not touch."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn

from args_parser import args_parser, from_flags
from data.episodes import Episodes, class_major_labels
from engine.precision import Precision
from engine.run import Run
from methods.alignment import ALIGNMENTS, AlignmentSetting, Batch, Updates, align_episode
from methods.centroid_alignment import centroid_alignment_loss
from methods.features import Source, TrainableBlocks, image_source, trainable_blocks, updated_features
from methods.novel_finetune import fit_heads
from models import build_head
from models.conv4 import Conv4
from tests.helpers import DEVICE, golden, make_split


def published_weights(g: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Conv4 weights of a golden file under our names."""
    state = {}
    for key, value in g.items():
        if key.startswith(prefix + "nConvBlock."):
            block, layer, name = key.removeprefix(prefix + "nConvBlock.").replace("convBlock.", "").split(".")
            state[f"layers.{block}.{'conv' if layer == '0' else 'bn'}.{name}"] = value
    return state


def scores_of(net: nn.Module, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Scores (n, n_way) of the input x (n, 3, h, w), as those of queries are made."""
    source = Source(torch.empty(0), lambda index: x[index], make_split())
    with torch.no_grad():
        return head(updated_features(TrainableBlocks(None, net, {}), source, torch.arange(len(x)), Precision()))


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
def test_two_iterations_of_algorithm_1_follow_the_published_trace():
    g = golden("alignment_trace")
    net = Conv4(img_size=32, width=8)
    initial = published_weights(g, "net_init.")
    net.load_state_dict({**net.state_dict(), **initial})
    x_support, x_query = g["x_support"].float(), g["x_query"].float()
    y_support = torch.arange(5)
    lr = float(g["lr"])

    head = build_head("arcMax", net.feature_dim, 5, 5.0, 0.001)
    head.weight.data = g["clf_init"].clone()
    net.eval()
    with torch.no_grad():
        z_support = net(x_support)
    head_optimizer = fit_heads(head, z_support, y_support, int(g["finetune_steps"]), lr)
    many_steps = {"rtol": 2e-3, "atol": 2e-4}
    torch.testing.assert_close(head.weight.data, g["clf_after_finetune"], **many_steps)
    torch.testing.assert_close(scores_of(net, head, x_query), g["query_scores_finetune"], **many_steps)

    head.rescale(15.0, 0.001)
    setting = AlignmentSetting(align_lr=lr, related_lr=lr, support_lr=lr)
    updates = Updates(net, head, head_optimizer, partial(centroid_alignment_loss, n_way=5), setting, Precision())
    support = Batch(x_support, y_support)
    for i, picks in enumerate(g["picks"]):
        x_related = torch.cat([g["x_related"][w, picks[w]] for w in range(5)]).float()
        related = Batch(x_related, class_major_labels(5, picks.shape[1], DEVICE))
        losses = [updates.align(support, related), updates.train_head(related), updates.train_on_support(support)]
        torch.testing.assert_close(torch.tensor(losses), g["losses"][i], **many_steps)
        torch.testing.assert_close(head.weight.data, g[f"iter{i + 1}.clf"], **many_steps)
        published = published_weights(g, f"iter{i + 1}.net.")
        for name, value in published.items():
            # A bias before batch norm has no gradient but rounding, of which Adam makes steps of +-lr: bias and
            # running mean, which contains it, are determined up to those steps alone, on any machine.
            tolerance = {"rtol": 0.0, "atol": 2 * 2 * lr * (i + 1)} if undetermined(name) else many_steps
            torch.testing.assert_close(net.state_dict()[name], value, **tolerance)
    # With the published draw of those undetermined numbers, the scores must be the published ones.
    net.load_state_dict(net.state_dict() | {name: value for name, value in published.items() if undetermined(name)})
    torch.testing.assert_close(scores_of(net, head, x_query), g["query_scores_aligned"], **many_steps)


def undetermined(name: str) -> bool:
    """Whether a weight of Conv4 follows from rounding errors as much as from the algorithm."""
    return name.endswith(("conv.bias", "running_mean"))


def tiny_episode_run(n_base_class: int = 6):
    """What align_episode needs, small: 3-way 2-shot, 3 queries, 16-pixel images.

    Returns align(episode=0, **changes), an episode whose arguments may be changed, those arguments, and the backbone.
    """
    torch.manual_seed(0)
    run, net = Run(), Conv4(img_size=16, width=8)
    flags = "--ft_n_epoch 30 --align_iters 3 --n_B 2 --aug_size 4 --critic_hidden 16".split()
    blocks = trainable_blocks(net, None)
    novel, base = make_split((10,) * 3), make_split((10,) * n_base_class, seed=1, split="base")
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:15].view(1, 3, 5)
    given = {
        "blocks": blocks,
        "task": Episodes(index, torch.arange(3).view(1, 3), n_shot=2).task(0),
        "novel": image_source(net, blocks, novel, run),
        "base": image_source(net, blocks, base, run),
        "setting": from_flags(AlignmentSetting, args_parser("alignment", flags)),
        "run": run,
    }

    def align(episode: int = 0, **changes):
        return align_episode(**{**given, **changes}, i=episode)

    return align, given, net


def test_an_episode_leaves_no_trace_in_the_next():
    align, _, _ = tiny_episode_run()
    alone = align(episode=1)
    align(episode=0)
    after_another = align(episode=1)
    assert alone.losses == after_another.losses and torch.equal(alone.aligned, after_another.aligned)


def test_in_fp16_too_an_episode_depends_on_none_before_it():
    align, _, _ = tiny_episode_run()
    run = Run(precision=Precision("fp16"))
    first = align(run=run)
    run.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)  # as overflows would leave it
    assert align(run=run).losses == first.losses and run.precision.scaler.get_scale() == 2.0**-12


def test_a_query_is_scored_without_regard_to_the_other_queries():
    _, given, net = tiny_episode_run()
    head = build_head("arcMax", net.feature_dim, 3, 15.0, 0.001)
    x = given["novel"].block_inputs(torch.arange(30))
    net.train()  # updated_features must see to the mode itself
    together = scores_of(net, head, x)
    alone = torch.cat([scores_of(net, head, x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone)


def test_a_novel_class_without_related_images_is_left_out_and_the_rest_goes_on():
    align, given, _ = tiny_episode_run()
    base = given["base"]
    episode = align(base=dataclasses.replace(base, features=base.features[:1].expand(60, -1)))
    assert sorted(len(samples) > 0 for samples in episode.related.samples) == [False, False, True]
    assert episode.n_drawn == 4 and all(map(math.isfinite, episode.losses[-1]))


@pytest.mark.parametrize("n_base_class", [0, 2])  # no base set; fewer base classes than novel ones
def test_with_no_related_image_at_all_only_the_support_is_learned(n_base_class):
    align, given, _ = tiny_episode_run(n_base_class or 6)
    episode = align(base=given["base"] if n_base_class else None)
    assert episode.n_drawn == 0
    align_loss, related_loss, support_loss = episode.losses[-1]
    assert math.isnan(align_loss) and math.isnan(related_loss) and math.isfinite(support_loss)


def test_updates_of_the_last_blocks_leave_those_below_as_they_were_and_move_all_of_theirs():
    align, given, net = tiny_episode_run()
    before = copy.deepcopy(net.state_dict())
    blocks = trainable_blocks(net, 1)
    sources = {name: image_source(net, blocks, given[name].split, given["run"]) for name in ("novel", "base")}
    episode = align(blocks=blocks, **sources)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("layers.3.")} - {"layers.3.conv.bias"}
    # With a rate of nothing the last blocks are those of the whole backbone, and so are the scores.
    rates = {"align_lr": 1e-30, "support_lr": 1e-30, "related_lr": 1e-30}
    still = dataclasses.replace(given["setting"], **rates, align_bn="eval")
    part = align(blocks=blocks, setting=still, **sources)
    whole = align(setting=still)
    torch.testing.assert_close(part.aligned, whole.aligned)
    assert not torch.allclose(part.aligned, episode.aligned)


# The three updates.


CENTROID_3_WAY = partial(centroid_alignment_loss, n_way=3)


def tiny_updates(alignment_loss=CENTROID_3_WAY, **setting):
    """Updates of a small Conv4 and a head fitted in 3 steps at 0.1, with 6 support and 9 related images."""
    _, given, net = tiny_episode_run()
    head = build_head("arcMax", net.feature_dim, 3, 15.0, 0.001)
    support = Batch(given["novel"].block_inputs(given["task"].support), given["task"].y_support)
    related = Batch(given["base"].block_inputs(torch.arange(9)), class_major_labels(3, 3))
    fitted = fit_heads(head, given["novel"].features[given["task"].support], support.y, 3, 0.1)
    return Updates(net, head, fitted, alignment_loss, AlignmentSetting(**setting), Precision()), support, related


def changed_by(updates, update, *labelled):
    """The names of the weights and statistics of the backbone that an update changes, and whether it does the head."""
    head, backbone = (copy.deepcopy(module.state_dict()) for module in (updates.head, updates.backbone))
    assert math.isfinite(update(*labelled))
    names = {name for name, value in updates.backbone.state_dict().items() if not torch.equal(value, backbone[name])}
    return names, not torch.equal(updates.head.weight, head["weight"])


def test_each_update_has_an_optimiser_of_its_own_with_its_rate_and_the_heads_is_the_one_that_fitted_it():
    updates, _, _ = tiny_updates(align_lr=0.25, related_lr=0.5, support_lr=0.75)
    backbone, head = list(updates.backbone.parameters()), list(updates.head.parameters())
    expected = {"align_optimizer": (0.25, backbone), "related_optimizer": (0.5, head)}
    expected |= {"support_optimizer": (0.75, [*backbone, *head])}
    for name, (lr, parameters) in expected.items():
        (group,) = getattr(updates, name).param_groups
        assert group["lr"] == lr
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in parameters]
    moments = updates.related_optimizer.state[updates.head.weight]
    assert moments["step"] == 3 and moments["exp_avg"].any()
    assert not updates.align_optimizer.state and not updates.support_optimizer.state


@pytest.mark.parametrize("align_bn", ["train", "eval"])
def test_each_update_changes_what_it_should_and_nothing_else(align_bn):
    updates, support, related = tiny_updates(align_bn=align_bn)
    expected = {name for name, _ in updates.backbone.named_parameters()}
    if align_bn == "train":  # where a batch norm takes the bias of a convolution out again
        expected = {name for name in updates.backbone.state_dict() if not name.endswith("conv.bias")}
    assert changed_by(updates, updates.align, support, related) == (expected, False)
    assert changed_by(updates, updates.train_head, related) == (set(), True)
    assert changed_by(updates, updates.train_on_support, support) == (expected, True)


# What alignment is listed as.


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_every_alignment_runs_and_only_those_with_a_loss_make_update_1(alignment):
    align, given, _ = tiny_episode_run()
    episode = align(setting=dataclasses.replace(given["setting"], alignment=alignment))
    assert episode.aligned.shape == episode.finetuned.shape == (9, 3) and episode.aligned.isfinite().all()
    if alignment == "none":
        assert episode.losses == [] and torch.equal(episode.aligned, episode.finetuned)
        return
    assert len(episode.losses) == 3 and not torch.equal(episode.aligned, episode.finetuned)
    for align_loss, related_loss, support_loss in episode.losses:
        assert math.isfinite(align_loss) == (alignment not in ("naive", "head"))
        assert math.isfinite(related_loss) and math.isfinite(support_loss)


def test_the_curve_has_the_scores_after_every_so_many_iterations():
    align, given, _ = tiny_episode_run()
    curve = align(setting=dataclasses.replace(given["setting"], record_curve=1)).curve
    plain = align()
    assert len(curve) == 3 and plain.curve == []
    torch.testing.assert_close(curve[-1], plain.aligned)
    assert not torch.equal(curve[0], curve[-1])
