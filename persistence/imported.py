"""What a checkpoint of another repository holds: a backbone of ours, how its images are made, and its head if known.

It is recognised by its tensors and, where several networks have the same, by the key of the file or by `--from`. The
authors' own files of base training have a head as well, and class names by their benchmark.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from engine.errors import UserError
from engine.foreign import Inert, read_foreign
from engine.normalisation import Normalisation
from models import HEADS
from persistence.peers import AUTHORS, PEERS, Peer, our_state, recognised, shapes_of

KEYS = ("", "state", "state_dict", "model", "model_sd", "params", "embedding")  # where a file may have a state dict


@dataclass(frozen=True)
class Imported:
    """A network of a repository, its state dict by our names, and its head, or ""."""

    repository: str
    peer: Peer
    state: dict[str, Tensor]
    epoch: int = -1
    accuracy: float = math.nan
    method: str = ""
    head_state: dict[str, Tensor] | None = None
    s: float = 0.0
    m: float = 0.0


def state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file, by the key under which they lie, "" for a bare one."""
    if not isinstance(content, dict):
        return {}
    found: dict[str, object] = {"": content} | {key: content.get(key) for key in KEYS if key}
    return {key: state for key, state in found.items() if is_tensors(state)}


def turned_round(imported: Imported) -> Imported:
    """The network that gives RGB images the features that this one gives the same images in BGR order."""
    mean, std = imported.peer.normalisation
    state = {k: v.flip(1) if v.dim() == 4 and v.shape[1] == 3 else v for k, v in imported.state.items()}
    peer = replace(imported.peer, normalisation=Normalisation(mean[::-1], std[::-1]))
    return replace(imported, state=state, peer=peer)


def is_tensors(value: object) -> TypeGuard[dict[str, Tensor]]:
    """Whether a value is a dictionary of tensors by name, one or more."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items())
    )


def number_or(value: object, otherwise: float) -> float:
    """A number of the file as a float; `otherwise` when it is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else otherwise


def read_imported(path: Path, asked: str | None = None) -> Imported:
    """What a file of another repository holds, running nothing of it; `asked` names the repository where several fit.

    Raises UserError, saying what the file is, when it is none of a network that we have; ValueError, with the reason,
    when it cannot be read or holds no state dict.
    """
    content = read_foreign(path)
    states = state_dicts(content)
    if not states:
        holds = f"a {type(content).__name__}" if not isinstance(content, dict) else ", ".join(map(str, content))[:80]
        raise ValueError(f"it holds no state dict of a network, but {holds}")
    found = [each for key, state in states.items() for each in ((state, *f) for f in recognised(state, key, asked))]
    if not found:
        state, as_one = max(states.values(), key=len), f" as one of {asked}" if asked else ""
        raise UserError(f"{path} holds {describe(state)}: it is no network that can be imported{as_one}")
    if len({(peer.backbone, peer.normalisation, peer.resize, peer.refused) for _, _, peer, _ in found}) > 1:
        names = ", ".join(dict.fromkeys(name for _, name, _, _ in found))
        raise UserError(f"{path} fits networks of {names}: give --from NAME to persistence.import_checkpoint")
    state, name, peer, prefix = found[0]
    if peer.refused:
        raise UserError(f"{path} is {name}'s {peer.backbone}, which cannot be imported: {peer.refused}")
    epoch = content.get("epoch")
    return Imported(
        repository=name,
        peer=peer,
        state=our_state(peer, prefix, state),
        epoch=epoch if isinstance(epoch, int) else -1,
        **(base_head(path, content) if name == AUTHORS else {}),
    )


def describe(state: dict[str, Tensor]) -> str:
    """What a state dict looks like: its first names, and the network of PEERS that shares most of them."""
    best, looks = 0.2, "like none of the networks that are known"
    for name, networks in PEERS.items():
        for peer, prefix in [(each, prefix) for each in networks for prefix in each.prefixes]:
            shapes = shapes_of(peer.backbone, peer.img_size)
            theirs = [(state.get(prefix + peer.names(ours)), shape) for ours, shape in shapes.items()]
            n_fit = sum(value is not None and value.shape == shape for value, shape in theirs)
            if n_fit / len(shapes) > best:
                best = n_fit / len(shapes)
                looks = f"most like {name}'s {peer.backbone}, with {n_fit} of its {len(shapes)} tensors"
    return f"{len(state)} tensors ({', '.join(list(state)[:3])}, ...), {looks}"


def base_head(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The fields of Imported of the head in the authors' files, an object of a class that is not ours.

    Raises UserError when there is none.
    """
    head = content.get("base_clf")
    method, record = type(head).__name__, head.state if isinstance(head, Inert) else {}
    parameters = record.get("_parameters")
    if method not in HEADS or not is_tensors(parameters):
        raise UserError(f"{path} has no base head 'base_clf' of {', '.join(HEADS)}: give a checkpoint of base training")
    return {
        "accuracy": number_or(content.get("max_acc"), math.nan),
        "method": method,
        "head_state": {name: value.detach() for name, value in parameters.items()},
        "s": number_or(record.get("s"), 0.0),
        "m": number_or(record.get("margin"), 0.0),
    }
