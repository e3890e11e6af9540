"""Episodes as a part of the page: classes with support and related images, and queries with their probabilities."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

MAX_QUERIES = 150  # shown of an episode
QUALITY = 80  # of the images in the page
# Of queries, in the order in which they are shown; those without a known class are changed or unchanged.
KINDS = ("put right", "put wrong", "changed", "wrong", "right", "unchanged")


@dataclass(frozen=True)
class Picture:
    """An image on the page: its source, as a data URI, and what it shows."""

    source: str
    alt: str


@dataclass(frozen=True)
class Related:
    """A related base class: its score and images, if they are known."""

    name: str
    score: float | None = None
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Query:
    """A query: its class, if known, probabilities (n_way) before and after alignment, and the images nearest to it.

    picture: makes its image, if it is to be shown. nearest: numbers of images, counted through as EpisodeView says.
    """

    picture: Callable[[], Picture]
    truth: int | None
    before: list[float]
    after: list[float]
    nearest: list[int]

    @property
    def kind(self) -> str:
        """One of KINDS: what alignment did to the label, or whether it is right."""
        was, now = (max(range(len(p)), key=p.__getitem__) for p in (self.before, self.after))
        if self.truth is None:
            return "unchanged" if was == now else "changed"
        if was == now:
            return "right" if now == self.truth else "wrong"
        return "put right" if now == self.truth else "put wrong" if was == self.truth else "changed"


@dataclass(frozen=True)
class EpisodeView:
    """What is shown of an episode; support and related have a list a class.

    The images that queries are near to are the related ones, class by class, or, without any, the support's, which
    may be empty. aligned: whether there is a before and an after. note: a line below the title.
    """

    title: str
    class_names: list[str]
    support: list[list[Picture]]
    related: list[list[Related]]
    queries: list[Query]
    aligned: bool = True
    note: str = ""


def picture(image: Image.Image, alt: str) -> Picture:
    """An image for the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=QUALITY)
    return Picture(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", alt)


def picture_of(image: Tensor, alt: str) -> Picture:
    """A uint8 image (3, s, s) for the page."""
    return picture(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), alt)


def view_of(record: dict[str, Any], title: str) -> EpisodeView:
    """The view of a saved episode; one that an earlier version kept has no queries."""
    names = record["class_names"]
    images = record.get("images", {"support": record["support_images"], "query": []})
    of_class = images["support"].unflatten(0, (len(names), -1))
    support = [[picture_of(x, f"support image of {name}") for x in of_class[w]] for w, name in enumerate(names)]
    related = [
        [
            Related(r["name"], r["score"], tuple(picture_of(x, f"base image of {r['name']}") for x in r["images"]))
            for r in row
        ]
        for row in record["related_classes"]
    ]
    if "logits" not in record:
        note = "Its queries were not kept: --overwrite runs it again, and keeps them."
        return EpisodeView(title, names, support, related, [], note=note)
    truth, nearest = record["query"]["labels"].tolist(), record["nearest"].tolist()
    before, after = (record["logits"][when].float().softmax(1).tolist() for when in ("before", "after"))
    queries = [
        Query(partial(picture_of, x, f"query {i}, of {names[truth[i]]}"), truth[i], before[i], after[i], nearest[i])
        for i, x in enumerate(images["query"])
    ]
    return EpisodeView(title, names, support, related, queries)


def img(shown: Picture, identity: str = "", of_class: str = "") -> str:
    """An image with its alternative text, and, if queries are near to it, a name to find it by and its class."""
    found = f' id="{identity}" data-class="{escape(of_class)}"' if identity else ""
    return f'<img src="{shown.source}" alt="{escape(shown.alt)}"{found}>'


def percent(p: float) -> str:
    """A probability: `82 %`, never rounded to a certainty."""
    return "&gt; 99\u00a0%" if p >= 0.995 else "&lt; 1\u00a0%" if p < 0.005 else f"{100 * p:.0f}\u00a0%"


def class_block(view: EpisodeView, w: int, key: str, numbers: dict[int, str]) -> str:
    """A novel class: its name and support images, and its related base classes. numbers: names of images, added to."""
    name = view.class_names[w]
    any_related = any(r.images for row in view.related for r in row)
    shots = []
    for shown in view.support[w]:
        identity = "" if any_related else numbers.setdefault(len(numbers), f"{key}-{len(numbers)}")
        shots.append(img(shown, identity, name))
    tiles = []
    for r in view.related[w]:
        if not r.images and r.score is None:
            tiles.append(f"<li>{escape(r.name)}</li>")
            continue
        images = [img(x, numbers.setdefault(len(numbers), f"{key}-{len(numbers)}"), r.name) for x in r.images]
        tiles.append(
            f'<li><div class="tiles">{"".join(images)}</div><span class="name">{escape(r.name)}</span>'
            f'<span class="score"><i style="--p:{100 * (r.score or 0):.0f}%"></i></span>'
            f'<span class="soft">score {r.score or 0:.2f}</span></li>'
        )
    look = "related" if any_related else "names"
    related = f'<ul class="{look}" aria-label="base classes related to {escape(name)}">{"".join(tiles)}</ul>'
    if any_related:  # it scrolls, and so it must take the focus
        related = related.replace("<ul ", '<ul tabindex="0" ')
    return (
        f'<div class="class"><div><div class="shots">{"".join(shots)}</div><h4>{escape(name)}</h4></div>'
        f"{related if tiles else ''}</div>"
    )


def probability_table(view: EpisodeView, query: Query) -> str:
    """The probability of each class before and after alignment, as numbers and bars."""
    columns = [("before alignment", query.before), ("after alignment", query.after)]
    columns = columns if view.aligned else [("probability", query.after)]
    rows = []
    for c, name in enumerate(view.class_names):
        cells = "".join(
            f"<td{' class=top' if p[c] == max(p) else ''}>"
            f'<div>{percent(p[c])}<i style="--p:{100 * p[c]:.1f}%"></i></div>'
            for _, p in columns
        )
        own = ' class="true"' if c == query.truth else ""
        rows.append(f'<tr><th scope="row"{own}>{escape(name)}{" (its class)" if own else ""}</th>{cells}')
    head = "".join(f'<th scope="col">{title}</th>' for title, _ in columns)
    return f'<table class="probabilities"><thead><tr><th scope="col">class</th>{head}<tbody>{"".join(rows)}</table>'


def query_block(view: EpisodeView, query: Query, numbers: dict[int, str]) -> str:
    """A query, closed: image, label, whether it is right; the nearest images when it is pointed at or has the focus.

    Open: the probability of each class too.
    """
    was, now = (max(range(len(p)), key=p.__getitem__) for p in (query.before, query.after))
    right = query.truth is None or now == query.truth
    mark = ""
    if query.truth is not None:
        mark = '<b class="mark-right">✓</b>' if right else '<b class="mark-wrong">✗</b>'
    shown = query.picture()
    kind = query.kind if view.aligned or query.truth is not None else ""
    more = []
    if view.aligned and was != now:
        more.append(f"was {escape(view.class_names[was])}, {percent(query.before[was])}")
    if not right and query.truth is not None:
        more.append(f"is {escape(view.class_names[query.truth])}")
    near = ""
    if numbers:
        ids = " ".join(numbers[n] for n in query.nearest if n in numbers)
        of = "related images" if any(r.images for row in view.related for r in row) else "example"
        near = f'<span class="near" data-near="{ids}"><b>nearest {of}</b></span>'
    return (
        f'<details class="query {"right" if right else "wrong"}" data-kind="{query.kind}"><summary>'
        f"{img(shown)}"
        f'<span class="verdict">{mark}{kind}<br>{percent(query.after[now])}</span>'
        f'<span class="label">{escape(view.class_names[now])}<span class="more">{"<br>".join(more)}</span></span>'
        f"{near}</summary>"
        f'<div class="open"><p class="note">{escape(shown.alt)}</p>{probability_table(view, query)}</div></details>'
    )


def summary_text(view: EpisodeView) -> str:
    """How many queries are right before and after, and what alignment changed."""
    n, known = len(view.queries), [q for q in view.queries if q.truth is not None]
    kinds = [query.kind for query in view.queries]
    parts = [f"{n} {'query' if n == 1 else 'queries'}"]
    after = sum(q.kind in ("right", "put right") for q in known)
    before = sum(q.kind in ("right", "put wrong") for q in known)
    if known and len(known) == n:
        share = f"{100 * after / n:.1f} % right"
        parts.append(f"{100 * before / n:.1f} % right before alignment, {share} after" if view.aligned else share)
    if view.aligned:
        changed = {kind: kinds.count(kind) for kind in KINDS[:3]}
        words = [f"{count} {kind}" for kind, count in changed.items() if count and kind != "changed"]
        parts.append(f"alignment changed {sum(changed.values())} labels" + (f" ({', '.join(words)})" if words else ""))
    return "; ".join(parts)


def episode_section(view: EpisodeView, key: str, is_open: bool) -> str:
    """An episode, to be opened: its classes, then its queries, those that alignment changed first.

    key: begins the names of its images, and differs between the episodes of a page.
    """
    numbers: dict[int, str] = {}
    classes = "".join(class_block(view, w, key, numbers) for w in range(len(view.class_names)))
    ordered = sorted(view.queries, key=lambda q: (KINDS.index(q.kind), max(q.after)))[:MAX_QUERIES]
    kinds = [query.kind for query in ordered]
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{str(not kind).lower()}">{kind or "all"} '
        f"{kinds.count(kind) if kind else len(kinds)}</button>"
        for kind in ("", *KINDS)
        if not kind or kind in kinds
    )
    cut = f", the first {MAX_QUERIES} of {len(view.queries)}" if len(view.queries) > MAX_QUERIES else ""
    queries = ""
    if ordered:
        blocks = "".join(query_block(view, query, numbers) for query in ordered)
        how = "Point at a query, or move to it with the Tab key, for the images nearest to it; open it for all classes."
        how = how if numbers else "Open a query for all classes."
        queries = (
            f'<h3>Queries{cut}</h3><p class="note">{how}</p>'
            f'<div class="filters" role="group" aria-label="which queries to show" hidden>{buttons}</div>'
            f'<div class="queries">{blocks}</div>'
        )
    any_related = any(view.related)
    note = f'<p class="note">{escape(view.note)}</p>' if view.note else ""
    about = (
        "Classes, and the base classes related to each"
        if any_related
        else f"Classes{' and their examples' * any(view.support)}"
    )
    return (
        f'<details class="episode"{" open" if is_open else ""}><summary><strong>{escape(view.title)}</strong>'
        f'<span class="soft">{summary_text(view)}</span></summary><div class="inside">'
        f"{note}<h3>{about}</h3>{classes}{queries}</div></details>"
    )
