"""Statistics: intervals drawn over clusters, rank correlation, evenness.

An interval is {"value", "low", "high", "se"}: 95%, by bootstrap over whole clusters. Tokens and pairs
of one question are not independent, so they are drawn together or not at all.
"""
import math

import numpy as np

FEWEST = 10              # clusters that an interval needs


def bootstrap(columns, clusters, statistic, samples=2000):
    """A statistic of the sums of columns (n,), with its 95% interval. -> interval

    clusters (n,): whose entries belong together, such as those of one prompt; whole clusters are drawn
    with replacement. Percentile bootstrap (Efron and Tibshirani 1993, ch. 13); draws in which the
    statistic is no number are left out. Fewer than FEWEST clusters have no interval: nan.
    """
    _, member = np.unique(clusters, return_inverse=True)
    n = len(np.unique(member))
    totals = np.stack([np.bincount(member, x, n) for x in columns])
    drawn = np.array([])
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(*totals.sum(1))
        if n >= FEWEST:
            rng = np.random.default_rng(0)
            draws = rng.multinomial(n, np.full(n, 1 / n), samples)               # (samples, n)
            drawn = statistic(*(totals @ draws.T))
    drawn = drawn[np.isfinite(drawn)]
    low, high, error = math.nan, math.nan, math.nan
    if len(drawn):
        low, high = np.percentile(drawn, [2.5, 97.5])
        error = drawn.std()
    return {"value": float(value), "low": float(low), "high": float(high), "se": float(error)}


def ratio(num, den=None, clusters=None, **how):
    """Σ num / Σ den (den None: ones, so a mean); clusters None: each entry stands alone. -> interval"""
    if den is None:
        den = np.ones(len(num))
    if clusters is None:
        clusters = range(len(num))
    return bootstrap([num, den], clusters, np.divide, **how)


def leaves_out_zero(interval):
    return interval.get("low", math.nan) > 0 or interval.get("high", math.nan) < 0


def mean_and_error(x):
    """Mean and its standard error, entries independent. x (n,) tensor"""
    error = x.std() / math.sqrt(len(x)) if len(x) > 1 else x.new_tensor(math.nan)
    return x.mean().item(), error.item()


def number_equal(things):
    """Equal things get equal numbers, (n,)."""
    number = {}
    return np.array([number.setdefault(x, len(number)) for x in things])


def gini(x):
    """0: all alike, towards 1: one has all. x >= 0, zeros included if they are meant to count."""
    x = np.sort(np.asarray(x, dtype=np.float64))
    n, total = len(x), x.sum()
    if total <= 0:
        return math.nan
    rank = np.arange(1, n + 1)
    return float((2 * rank - n - 1) @ x / (n * total))


def ranks(x):
    """Rank of each entry, ties at their mean rank."""
    below = np.less.outer(x, x).sum(0)
    level = np.equal.outer(x, x).sum(0)
    return below + level / 2


def spearman(a, b):
    """Rank correlation; nan for fewer than three or a constant."""
    a, b = ranks(a), ranks(b)
    if len(a) < 3 or not a.std() or not b.std():
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
