"""Stage 3: align one novel episode with its related base samples (Algorithms 1 and 2 of the paper).

Per episode: fit the head on frozen support features; find the related base samples with it; then alternate three
updates, each with an Adam of its own:
(1) the backbone, in train mode, on the alignment loss between related and support samples, centroid (Algorithm 1) or
    adversarial (Algorithm 2);
(2) the head, on related samples that the backbone embeds in eval mode, with the optimiser that fitted the head,
    moments included;
(3) backbone and head, in train mode, on the support.
The backbone starts each episode from the checkpoint's weights, kept in memory. `naive` is the ablation without (1);
`none` stops at the fitted head. Beyond the paper, the updates may be of the backbone's last blocks alone: what enters
them is then computed once for all episodes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from data.transforms import normalise
from engine.errors import UserError
from engine.generators import make_generator, seeded
from engine.precision import Precision, check_finite
from methods.adversarial_alignment import adversarial_alignment_step
from methods.centroid_alignment import centroid_alignment_step
from methods.novel_finetune import fit_heads
from methods.related_base import RelatedBase, find_related_base
from models import Backbone, build_head
from models.backbone import split_backbone
from models.critic import Critic
from models.heads import Head

# The critic meets features that move with every step: a short memory of its gradients.
CRITIC_BETAS = (0.5, 0.9)
# What the backbone, or its last blocks, take for the images at an index (n,).
Input = Callable[[Tensor], Tensor]
# Base features scored together: their normalised copy stays in a core's cache, which halves the time.
BASE_ROWS = 512
# Queries whose inputs are made together: a folder of them may be larger than memory.
QUERY_ROWS = 512


@dataclass(frozen=True)
class AlignmentSetting:
    """The numbers of one episode of stage 3; each is explained at the flag of the same name."""

    alignment: str
    method: str
    ft_s: float
    ft_m: float
    ft_n_epoch: int
    ft_lr: float
    align_s: float
    align_m: float
    align_iters: int
    align_lr: float
    related_lr: float
    support_lr: float
    align_bn: str
    n_B: int
    aug_size: int
    related_score: str
    record_curve: int
    critic_hidden: int
    critic_steps: int
    critic_lr: float
    critic_constraint: str
    critic_clip: float
    critic_gp_weight: float


@dataclass(frozen=True)
class AlignedEpisode:
    """What one episode gave: the head as it ended, and the scores (q, n_way) of its queries, by fine-tuning and after
    alignment.

    n_drawn: related samples a novel class in an iteration; losses: those of the three updates, a row an iteration;
    curve: scores as `aligned`, after every record_curve iterations. Without alignment the first two are the same.
    """

    head: Head
    finetuned: Tensor
    aligned: Tensor
    related: RelatedBase
    n_drawn: int
    losses: list[tuple[float, float, float]]
    curve: list[Tensor]


@torch.no_grad()
def related_base_of_head(
    head: Head, z_base: Tensor, y_base: Tensor, base_members: list[Tensor], n_B: int, related_score: str
) -> RelatedBase:
    """Related base classes and samples by a fitted head: z_base (N, d), y_base (N,); the rest as find_related_base."""
    logits = torch.cat([head.logits(head(z)) for z in z_base.split(BASE_ROWS)])
    return find_related_base(logits, y_base.to(logits.device), base_members, n_B, related_score)


def draw_related(samples: list[Tensor], aug_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw a = min(aug_size, smallest related set that is not empty) samples a novel class, without replacement.

    samples: n_way index tensors. Returns indices and labels (n,), class-major; a class whose set is empty has none.
    """
    a = drawn_per_class(samples, aug_size)
    filled = [(w, s) for w, s in enumerate(samples) if len(s)]
    picks = [s[torch.randperm(len(s), generator=generator)[:a].to(s.device)] for _, s in filled]
    return torch.cat(picks), torch.tensor([w for w, _ in filled]).repeat_interleave(a)


def drawn_per_class(samples: list[Tensor], aug_size: int) -> int:
    """Related samples drawn a novel class in each iteration; 0 when every related set is empty."""
    return min([aug_size] + [len(s) for s in samples if len(s)]) if any(len(s) for s in samples) else 0


def train_head_on_related(
    backbone: nn.Module,
    head: Head,
    optimizer: torch.optim.Optimizer,
    x_related: Tensor,
    y_related: Tensor,
    precision: Precision,
) -> float:
    """Update (2): one step of the head on related samples; the backbone, in eval mode, needs no gradient."""
    backbone.eval()
    with torch.no_grad(), precision.autocast():
        z_related = backbone(x_related)
    loss = head.loss(head(z_related), y_related)
    optimizer.zero_grad()
    precision.backward_and_step(loss, optimizer)
    return loss.item()


def train_on_support(
    backbone: nn.Module,
    head: Head,
    optimizer: torch.optim.Optimizer,
    x_support: Tensor,
    y_support: Tensor,
    precision: Precision,
) -> float:
    """Update (3): one step of backbone and head on the support, the backbone in the mode it is in."""
    with precision.autocast():
        z_support = backbone(x_support)
    loss = head.loss(head(z_support), y_support)
    optimizer.zero_grad()
    precision.backward_and_step(loss, optimizer)
    return loss.item()


def network_input(images: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Normalised channels-last input (n, 3, s, s) of the uint8 images at `index` (n,)."""
    x = normalise(images[index.to(images.device)].to(device))
    return x.contiguous(memory_format=torch.channels_last)


def stored_input(activations: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Channels-last input (n, c, h, w) of the last blocks: stored activations (N, c, h, w) at `index` (n,)."""
    x = activations[index.to(activations.device)].to(device)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def computed_input(
    below: nn.Module,
    images: Tensor,
    index: Tensor,
    device: torch.device,
    precision: Precision,
    batch_size: int = 64,
) -> Tensor:
    """As stored_input, of uint8 images (N, 3, s, s) whose activations are not stored: `below`, in eval mode, runs."""
    below.eval()
    parts = []
    for part in index.split(batch_size):
        with precision.autocast():
            parts.append(below(network_input(images, part, device)).float())
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


def blocks_to_update(backbone: Backbone, align_blocks: int | None) -> tuple[nn.Sequential | None, nn.Module]:
    """What alignment leaves as it is, None if nothing, and what it updates: the last align_blocks blocks, or all.

    Raises UserError when the backbone has fewer.
    """
    n_blocks = len(backbone.blocks())
    if align_blocks in (None, n_blocks):
        return None, backbone
    if align_blocks > n_blocks:
        raise UserError(f"--align_blocks {align_blocks}, but the backbone has {n_blocks} blocks: give fewer")
    return split_backbone(backbone, align_blocks)


@torch.no_grad()
def predict_queries(
    backbone: nn.Module, head: Head, x_query: Tensor, precision: Precision, batch_size: int = 64
) -> Tensor:
    """Scores (n, n_way) of query images by backbone and head in eval mode: no query sees another."""
    backbone.eval()
    with precision.autocast():
        z_query = torch.cat([backbone(x) for x in x_query.split(batch_size)])
    return head(z_query)


def align_episode(
    backbone: nn.Module,
    initial_state: dict[str, Tensor],
    setting: AlignmentSetting,
    support: Tensor,
    y_support: Tensor,
    query: Tensor,
    z_novel: Tensor,
    novel_input: Input,
    z_base: Tensor,
    y_base: Tensor,
    base_members: list[Tensor],
    base_input: Input,
    seed: int,
    episode: int,
    device: torch.device,
    precision: Precision,
    bar: str = "",
) -> AlignedEpisode:
    """Run one episode of stage 3; the result depends on (seed, episode) and the weights alone.

    backbone, or its last blocks, is overwritten, starting from initial_state. support (k,) and query (q,) index the
    features z_novel (N, d); y_support (k,) holds every class from 0 to n_way - 1, in any number. z_base (M, d) and
    y_base (M,) are the base split, base_members the indices of each base class. novel_input and base_input give what
    the backbone takes, by index. A novel class without related samples takes no part in updates (1) and (2); they are
    left out when no class has any. `bar` names a progress bar over the iterations; empty shows none.
    """
    n_way = int(y_support.max()) + 1
    backbone.load_state_dict(initial_state)
    y_support = y_support.to(device)

    generators = [make_generator(seed, "head", episode)]
    head = build_head(setting.method, z_novel.shape[1], n_way, setting.ft_s, setting.ft_m, generators).to(device)
    head_optimizer = fit_heads(head, z_novel[support.to(device)], y_support, setting.ft_n_epoch, setting.ft_lr)
    with torch.no_grad():
        finetuned = head(z_novel[query.to(device)])
        related = related_base_of_head(head, z_base, y_base, base_members, setting.n_B, setting.related_score)
    n_drawn = drawn_per_class(related.samples, setting.aug_size)
    if setting.alignment == "none" or not setting.align_iters:
        return AlignedEpisode(head, finetuned, finetuned, related, n_drawn, [], [])

    head.rescale(setting.align_s, setting.align_m)
    for group in head_optimizer.param_groups:
        group["lr"] = setting.related_lr
    backbone_optimizer = torch.optim.Adam(backbone.parameters(), lr=setting.align_lr)
    joint_optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=setting.support_lr)
    critic_generator = make_generator(seed, "critic", episode)
    critic = Critic(z_novel.shape[1], n_way, setting.critic_hidden, generator=critic_generator).to(device)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=setting.critic_lr, betas=CRITIC_BETAS)
    x_support = novel_input(support)

    def score_queries() -> Tensor:
        parts = query.split(QUERY_ROWS)
        return torch.cat([predict_queries(backbone, head, novel_input(part), precision) for part in parts])

    generator = make_generator(seed, "related draws", episode)
    losses, curve = [], []
    with seeded(seed, "dropout", episode):
        for iteration in tqdm(range(setting.align_iters), desc=bar, disable=not bar, unit="iteration"):
            align_loss = related_loss = float("nan")
            if n_drawn:
                picks, y_related = draw_related(related.samples, setting.aug_size, generator)
                x_related, y_related = base_input(picks), y_related.to(device)
                backbone.train(setting.align_bn == "train")
                if setting.alignment == "centroid":
                    align_loss = centroid_alignment_step(
                        backbone, backbone_optimizer, x_support, y_support, x_related, y_related, precision
                    )
                elif setting.alignment == "adversarial":
                    align_loss = adversarial_alignment_step(
                        backbone,
                        backbone_optimizer,
                        critic,
                        critic_optimizer,
                        x_support,
                        y_support,
                        x_related,
                        y_related,
                        setting.critic_steps,
                        setting.critic_constraint,
                        setting.critic_clip,
                        setting.critic_gp_weight,
                        critic_generator,
                        precision,
                    )
                related_loss = train_head_on_related(backbone, head, head_optimizer, x_related, y_related, precision)
            backbone.train(setting.align_bn == "train")
            support_loss = train_on_support(backbone, head, joint_optimizer, x_support, y_support, precision)
            losses.append((align_loss, related_loss, support_loss))
            where = f"episode {episode}, iteration {iteration}"
            check_finite(support_loss + (related_loss if n_drawn else 0.0), where)
            if setting.record_curve and (iteration + 1) % setting.record_curve == 0:
                curve.append(score_queries())

    aligned = score_queries()
    return AlignedEpisode(head, finetuned, aligned, related, n_drawn, losses, curve)
