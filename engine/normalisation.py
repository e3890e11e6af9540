"""How the values of images are scaled for a network: a property of the network, which data and models share."""

from typing import NamedTuple


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, of values in 0..1; raises ValueError when made of anything else."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, mean: object, std: object) -> "Normalisation":
        """Of what a library, a user's network or a file says. Raises ValueError when that is not 3 numbers each."""
        try:
            values = [tuple(float(v) for v in part) for part in (mean, std)]  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            values = []
        if [len(part) for part in values] != [3, 3] or not all(0 < s < 1e6 for s in values[1]):
            raise ValueError(f"mean {mean!r:.40} and std {std!r:.40} are not 3 numbers each, of std above 0")
        return cls(*values)  # type: ignore[arg-type]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
