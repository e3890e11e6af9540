"""Algorithm 1 against the published numbers, and what an episode of alignment may and may not touch."""

import dataclasses
import math
from functools import partial

import torch

from args_parser import args_parser
from data.episodes import class_major_labels
from engine.precision import Precision
from methods.alignment import (
    AlignmentSetting,
    align_episode,
    network_input,
    predict_queries,
    stored_input,
    train_head_on_related,
    train_on_support,
)
from methods.centroid_alignment import centroid_alignment_step
from methods.evaluation import embed
from methods.novel_finetune import fit_heads
from models import build_head
from models.backbone import split_backbone
from models.conv4 import Conv4
from tests.helpers import golden

FP32 = Precision("fp32", "cpu")


def published_weights(g: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Conv4 weights of a golden file under our names."""
    state = {}
    for key, value in g.items():
        if key.startswith(prefix + "nConvBlock."):
            block, layer, name = key.removeprefix(prefix + "nConvBlock.").replace("convBlock.", "").split(".")
            state[f"layers.{block}.{'conv' if layer == '0' else 'bn'}.{name}"] = value
    return state


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
    torch.testing.assert_close(predict_queries(net, head, x_query, FP32), g["query_scores_finetune"], **many_steps)

    head.rescale(15.0, 0.001)
    backbone_optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    joint_optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=lr)
    for i, picks in enumerate(g["picks"]):
        x_related = torch.cat([g["x_related"][w, picks[w]] for w in range(5)]).float()
        y_related = class_major_labels(5, picks.shape[1])
        align_loss = centroid_alignment_step(
            net.train(), backbone_optimizer, x_support, y_support, x_related, y_related, FP32
        )
        related_loss = train_head_on_related(net, head, head_optimizer, x_related, y_related, FP32)
        support_loss = train_on_support(net.train(), head, joint_optimizer, x_support, y_support, FP32)
        losses = [align_loss, related_loss, support_loss]
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
    torch.testing.assert_close(predict_queries(net, head, x_query, FP32), g["query_scores_aligned"], **many_steps)


def undetermined(name: str) -> bool:
    """Whether a weight of Conv4 follows from rounding errors as much as from the algorithm."""
    return name.endswith(("conv.bias", "running_mean"))


def tiny_episode_run(n_base_class: int = 6):
    """Everything align_episode needs, small and random: 3-way 2-shot, 3 queries, 16-pixel images."""
    g = torch.Generator().manual_seed(0)
    novel_images = torch.randint(0, 256, (30, 3, 16, 16), generator=g, dtype=torch.uint8)
    base_images = torch.randint(0, 256, (n_base_class * 10, 3, 16, 16), generator=g, dtype=torch.uint8)
    net = Conv4(img_size=16, width=8)
    cpu = torch.device("cpu")
    data = {
        "z_novel": embed(net, novel_images, cpu, FP32),
        "novel_input": partial(network_input, novel_images, device=cpu),
        "z_base": embed(net, base_images, cpu, FP32),
        "y_base": class_major_labels(n_base_class, 10),
        "base_members": list(torch.arange(n_base_class * 10).view(n_base_class, 10)),
        "base_input": partial(network_input, base_images, device=cpu),
    }
    args = args_parser("alignment", "--ft_n_epoch 30 --align_iters 3 --n_B 2 --aug_size 4 --critic_hidden 16".split())
    setting = AlignmentSetting(**{f.name: getattr(args, f.name) for f in dataclasses.fields(AlignmentSetting)})
    index = torch.randperm(30, generator=g)[:15].view(3, 5)
    data |= {"support": index[:, :2].flatten(), "y_support": class_major_labels(3, 2), "query": index[:, 2:].flatten()}
    initial = {name: value.clone() for name, value in net.state_dict().items()}

    def align(episode: int = 0, **changes):
        run = {"backbone": net, "initial_state": initial, "setting": setting, **data, **changes}
        return align_episode(**run, seed=0, episode=episode, device=cpu, precision=FP32)

    align.setting = setting
    return align, data, net


def test_an_episode_leaves_no_trace_in_the_next():
    align, _, _ = tiny_episode_run()
    alone = align(episode=1)
    align(episode=0)
    after_another = align(episode=1)
    assert alone.losses == after_another.losses and torch.equal(alone.aligned, after_another.aligned)


def test_a_query_is_scored_without_regard_to_the_other_queries():
    _, data, net = tiny_episode_run()
    head = build_head("arcMax", net.feature_dim, 3, 15.0, 0.001)
    x = data["novel_input"](torch.arange(30))
    net.train()  # predict_queries must see to the mode itself
    together = predict_queries(net, head, x, FP32)
    alone = torch.cat([predict_queries(net, head, x[i : i + 1], FP32) for i in range(len(x))])
    torch.testing.assert_close(together, alone)


def test_a_novel_class_without_related_images_is_left_out_and_the_rest_goes_on():
    align, data, _ = tiny_episode_run()
    episode = align(z_base=data["z_base"][:1].expand(60, -1))
    assert sorted(len(samples) > 0 for samples in episode.related.samples) == [False, False, True]
    assert episode.n_drawn == 4 and all(map(math.isfinite, episode.losses[-1]))


def test_with_no_related_image_at_all_only_the_support_is_learned():
    align, data, _ = tiny_episode_run()
    none = {"base_members": [torch.empty(0, dtype=torch.long)] * 6}
    episode = align(**none)
    assert episode.n_drawn == 0
    align_loss, related_loss, support_loss = episode.losses[-1]
    assert math.isnan(align_loss) and math.isnan(related_loss) and math.isfinite(support_loss)


def test_the_head_step_on_related_samples_moves_neither_backbone_nor_statistics():
    _, data, net = tiny_episode_run()
    head = build_head("arcMax", net.feature_dim, 3, 15.0, 0.001)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = data["base_input"](torch.arange(9)), class_major_labels(3, 3)
    train_head_on_related(net, head, torch.optim.Adam(head.parameters()), x, y, FP32)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_updates_of_the_last_blocks_leave_those_below_as_they_were_and_move_every_weight_of_theirs():
    align, data, net = tiny_episode_run()
    below, last = split_backbone(net, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def through(enter):
        with torch.no_grad():
            below.eval()
            images = torch.arange(enter.args[0].shape[0])
            return partial(stored_input, below(enter(images)), device=torch.device("cpu"))

    inputs = {name: through(data[name]) for name in ("novel_input", "base_input")}
    initial = {name: value.clone() for name, value in last.state_dict().items()}
    episode = align(backbone=last, initial_state=initial, **inputs)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("layers.3.")}
    # With a rate of nothing the last blocks are those of the whole backbone, and so are the scores.
    still = dataclasses.replace(align.setting, align_lr=1e-30, support_lr=1e-30, related_lr=1e-30, align_bn="eval")
    part = align(backbone=last, initial_state=initial, setting=still, **inputs)
    net.load_state_dict(before)
    whole = align(setting=still)
    torch.testing.assert_close(part.aligned, whole.aligned)
    assert not torch.allclose(part.aligned, episode.aligned)
