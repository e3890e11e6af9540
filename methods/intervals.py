"""95% intervals of a mean over episodes: for other episodes of the same classes, and for other classes.

Over classes it is a jackknife (Quenouille, 1956; Tukey, 1958): each class is left out, with all episodes that hold it.
The mean of the others is of fewer episodes, and how much it differs for that reason alone is subtracted.
"""

import math

from torch import Tensor

# The 0.975 quantile of Student's t with 1 to 28 degrees of freedom; beyond, it is close to the normal 1.96.
# fmt: off
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
)
# fmt: on

# Episodes from which a class must be missing, so that leaving it out leaves something to be told by.
LEAST_WITHOUT = 10


def t_975(degrees: int) -> float:
    """The 0.975 quantile of Student's t; 1.96 from 29 degrees of freedom on."""
    return T_975[degrees - 1] if degrees <= len(T_975) else 1.96


def mean_and_ci95(values: Tensor) -> tuple[float, float]:
    """Mean of n values (n,) and the half-width of its 95% interval, t std / sqrt(n); of a single value it is NaN.

    t is 1.96, or the 0.975 quantile of Student's t with n - 1 degrees of freedom for fewer than 30 values.
    """
    values, n = values.double(), len(values)
    if n < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), t_975(n - 1) * values.std().item() / math.sqrt(n)


def ci95_over_classes(values: Tensor, classes: Tensor) -> float:
    """Half-width of the 95% interval of the mean of values (E,) for other classes than those of the episodes.

    classes (E, n_way): of each episode. NaN where one is missing from fewer than LEAST_WITHOUT episodes. The degrees of
    freedom of Student's t are fewer by the share of the jackknife that is noise. At most the plain jackknife, which
    covers more than 95%, and at least the interval over episodes.
    """
    values, n = values.double(), len(values)
    index = classes.unique(return_inverse=True)[1]
    n_class = int(index.max()) + 1
    held = values.new_zeros(n, n_class).scatter_(1, index, 1.0)
    having = held.sum(0)
    without = n - having
    if without.min() < LEAST_WITHOUT:
        return math.nan
    square = ((values.sum() - values @ held) / without - values.mean()).square()
    total = (values - values.mean()).square().sum()
    # What the spread of episodes around the means of those with and those without a class makes up.
    within = (total - square * n * without / having) / (n - 2)
    noise = within * having / (n * without)
    jackknife = (n_class - 1) / n_class * square.sum().item()
    of_classes = jackknife - (n_class - 1) / n_class * noise.sum().item()
    variance = max(0.0, of_classes) + total.item() / (n - 1) / n
    degrees = int((n_class - 1) * variance / jackknife) if jackknife else 1
    half = t_975(min(max(1, degrees), n_class - 1)) * math.sqrt(variance)
    return max(mean_and_ci95(values)[1], min(half, t_975(n_class - 1) * math.sqrt(jackknife)))


def mean_record(shares: Tensor, classes: Tensor | None) -> dict[str, float | None]:
    """Mean of shares or of their differences (E,), with both intervals, in %; None where an interval is not known.

    classes (E, n_way): of each episode, None where they are not known.
    """
    mean, ci95 = mean_and_ci95(shares)
    numbers = {"accuracy": mean, "ci95": ci95}
    numbers["ci95_classes"] = math.nan if classes is None else ci95_over_classes(shares, classes)
    return {name: None if math.isnan(number) else 100 * number for name, number in numbers.items()}
