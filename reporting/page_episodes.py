"""Episodes as a part of the page: classes with support and related images, and queries with their probabilities."""

import base64
import io
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

MAX_QUERIES = 150  # shown of an episode
QUALITY = 80  # of the images in the page
KINDS = ("put right", "put wrong", "changed", "wrong", "right")  # of queries, in the order in which they are shown
HOW = "Point at a query, or move to it with the Tab key, for the images nearest to it; open it for all classes."


@dataclass(frozen=True)
class Query:
    """A query image, uint8 (3, s, s), with its class and probabilities (n_way).

    about: the image in words. before, after: by the head before and after alignment. nearest: numbers of the images
    nearest to it, among those of related classes, class by class, or, without any, the support images.
    """

    about: str
    image: Tensor
    truth: int
    before: list[float]
    after: list[float]
    nearest: list[int]

    @property
    def labels(self) -> tuple[int, int]:
        """The predicted classes before and after alignment."""
        return self.before.index(max(self.before)), self.after.index(max(self.after))

    @property
    def kind(self) -> str:
        """One of KINDS: what alignment did to the label, or whether it is right."""
        was, now = self.labels
        if was == now:
            return "right" if self.truth == now else "wrong"
        return "put right" if self.truth == now else "put wrong" if self.truth == was else "changed"


def standing_text(record: dict[str, Any]) -> str:
    """How a saved episode stands among all: `gain +4.0, mean +2.0: better than 80 % of episodes`, if that is known."""
    if not (standing := record.get("standing")):
        return ""
    share = f"better than {100 * standing['better_than']:.0f} % of episodes"
    return f"gain {standing['gain']:+.1f} points, mean of all {standing['mean']:+.1f}: {share}"


def queries_of(record: dict[str, Any]) -> list[Query]:
    """The queries of a saved episode."""
    truth = record["query"]["labels"].tolist()
    before, after = (record["logits"][when].float().softmax(1).tolist() for when in ("before", "after"))
    about = [f"query {i}, of {record['class_names'][c]}" for i, c in enumerate(truth)]
    return [*map(Query, about, record["images"]["query"], truth, before, after, record["nearest"].tolist())]


def img(kind: str, data: bytes, alt: str) -> str:
    """An image file of a kind, such as webp, as an element that holds it."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


def thumbnail_img(image: Tensor, alt: str) -> str:
    """An image, uint8 (3, s, s), as an element."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="webp", quality=QUALITY)
    return img("webp", buffer.getvalue(), alt)


def probability_text(p: float) -> str:
    """A probability: `82 %`, never rounded to a certainty."""
    return "&gt; 99\u00a0%" if p >= 0.995 else "&lt; 1\u00a0%" if p < 0.005 else f"{100 * p:.0f}\u00a0%"


def class_block(name: str, support: Tensor, related_classes: list[dict[str, Any]]) -> str:
    """A novel class: its name and support images, uint8 (k, 3, s, s), and its related base classes."""
    shots = "".join(thumbnail_img(image, f"support image of {name}") for image in support)
    tiles = ""
    for related in related_classes:
        images = "".join(thumbnail_img(x, f"base image of {related['name']}") for x in related["images"])
        score = f'<br><span class="soft">score {related["score"]:.2f}</span>'
        tiles += f'<li><div class="tiles">{images}</div><span class="name">{escape(related["name"])}</span>{score}'
    related_list = f'<ul class="related" tabindex="0">{tiles}</ul>' if tiles else ""  # it scrolls
    return (
        f'<div class="class"><div><div class="shots">{shots}</div><h4 class="name">{escape(name)}</h4></div>'
        f"{related_list}</div>"
    )


def probability_table(names: list[str], query: Query, aligned: bool) -> str:
    """The probability of each class, before and after alignment if there was one, as numbers and bars."""
    columns = {"before alignment": query.before, "after alignment": query.after}
    columns = columns if aligned else {"probability": query.after}
    rows = ""
    for c, name in enumerate(names):
        rows += f'<tr><th scope="row">{escape(name)}{" (its class)" if c == query.truth else ""}</th>'
        for p in columns.values():
            bar = f'<i class="bar" style="--p:{100 * p[c]:.1f}%"></i>'
            rows += f"<td{' class=top' if p[c] == max(p) else ''}><div>{probability_text(p[c])}{bar}</div>"
    head = "".join(f'<th scope="col">{title}</th>' for title in ("class", *columns))
    return f'<table class="probabilities"><thead><tr>{head}<tbody>{rows}</table>'


def query_block(names: list[str], query: Query, aligned: bool) -> str:
    """A query, closed: image, label, whether it is right; the nearest images when it is pointed at or has the focus.

    Open: the probability of each class too.
    """
    was, now = query.labels
    right, more, near = query.truth == now, "", ""
    sign = f'<b class="{"right" if right else "wrong"}">{"✓" if right else "✗"}</b>'
    verdict = f"{sign}{query.kind}<br>{probability_text(query.after[now])}"
    if was != now:
        more = f"was {escape(names[was])}, {probability_text(query.before[was])}"
    if not right:
        more += f"<br>is {escape(names[query.truth])}"
    if query.nearest:
        near = f'<span class="near" data-near="{" ".join(map(str, query.nearest))}"><b>nearest images</b></span>'
    return (
        f'<details class="query{"" if right else " missed"}" data-kind="{query.kind}"><summary>'
        f'{thumbnail_img(query.image, query.about)}<span class="verdict">{verdict}</span>'
        f'<span class="label">{escape(names[now])}<span class="more">{more}</span></span>{near}</summary>'
        f'<div class="open"><p class="note">{escape(query.about)}</p>'
        f"{probability_table(names, query, aligned)}</div></details>"
    )


def summary_text(queries: list[Query], aligned: bool, standing: str) -> str:
    """The number of queries and how many are right before and after alignment; how the episode stands among all."""
    n = len(queries)
    before, after = (100 * sum(query.labels[k] == query.truth for query in queries) / max(n, 1) for k in (0, 1))
    was = f"{before:.1f} % right before alignment, " if aligned else ""
    right = f"{n} queries; {was}{after:.1f} % right{' after' if was else ''}"
    return f"{right}; {standing}" if standing else right


def episode_section(record: dict[str, Any], queries: list[Query], is_open: bool) -> str:
    """A saved episode, to be opened: its classes, then its queries, those that alignment changed first."""
    names, related = record["class_names"], record["related_classes"]
    title = f"Episode {record['episode']}: {record['title']}"
    aligned = any(query.before != query.after for query in queries)
    supports = record["images"]["support"].unflatten(0, (len(names), -1))
    classes = "".join(map(class_block, names, supports, related))
    of_related = ", and the base classes related to each" * any(related)
    ordered = sorted(queries, key=lambda q: (KINDS.index(q.kind), max(q.after)))[:MAX_QUERIES]
    cut = f", the first {MAX_QUERIES} of {len(queries)}" if len(queries) > MAX_QUERIES else ""
    shown = [f'<h3>Queries{cut}</h3><p class="note">{HOW}</p>']
    for kind in KINDS:
        blocks = [query_block(names, query, aligned) for query in ordered if query.kind == kind]
        heading = f"<h4>{kind} ({len(blocks)})</h4>" if len(blocks) < len(ordered) else ""
        shown.append(f'{heading}<div class="queries">{"".join(blocks)}</div>' if blocks else "")
    return (
        f'<details class="episode"{" open" if is_open else ""}><summary><strong>{escape(title)}</strong>'
        f'<span class="soft">{summary_text(queries, aligned, standing_text(record))}</span></summary>'
        f'<div class="inside"><h3>Classes{of_related}</h3>{classes}{"".join(shown)}</div></details>'
    )
