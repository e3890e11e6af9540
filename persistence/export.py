"""Give a checkpoint's backbone to another repository: python -m persistence.export CHECKPOINT OUT --to rfs

The weights get the names, and lie under the key of the file, that the repository reads. Heads are not exported.
"""

import argparse
from pathlib import Path
from typing import Any

from engine.errors import OneLineParser, UserError
from engine.files import save_atomically
from engine.script import run_script
from persistence.checkpoints import Checkpoint, load_checkpoint
from persistence.peers import PEERS

STATE_DICT = "state_dict"
TARGETS = ("feat", "rfs", "easyfsl", "libfewshot", STATE_DICT)


def exported(checkpoint: Checkpoint, target: str) -> dict[str, Any]:
    """What the file for a repository holds; for state_dict, the backbone's state dict under our names.

    Raises UserError when the repository has no such network.
    """
    state = checkpoint.backbone_state
    if target == STATE_DICT:
        return dict(state)
    peer = next((peer for peer in PEERS[target] if peer.backbone == checkpoint.backbone), None)
    if peer is None:
        theirs = ", ".join(peer.backbone for peer in PEERS[target])
        raise UserError(f"{target} has no {checkpoint.backbone}, only {theirs}: choose another --to")
    renamed = {peer.prefixes[0] + peer.names(name): value for name, value in state.items()}
    return {peer.holds[0]: renamed} if peer.holds[0] else renamed


def main() -> None:
    parser = OneLineParser(
        prog="python -m persistence.export",
        description="Write the backbone of a checkpoint as another repository reads it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint of stage 1 or 2")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write; it must not exist")
    parser.add_argument("--to", choices=TARGETS, default=STATE_DICT, help="the repository that will read it")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists already: delete it, or give another file to write")
    checkpoint = load_checkpoint(args.checkpoint)
    save_atomically(args.out, exported(checkpoint, args.to))
    mean, std = checkpoint.normalisation
    print(
        f"{args.out}: {checkpoint.backbone} for {args.to}, images of {checkpoint.img_size} px, mean {mean}, std {std}"
    )


if __name__ == "__main__":
    run_script(main)
