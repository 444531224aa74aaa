"""Statistics: intervals drawn over clusters, rank correlation, evenness.

An interval is {"value", "low", "high", "se"}: 95%, by bootstrap over whole clusters. Tokens and pairs
of one question are not independent, so they are drawn together or not at all.
"""
import math

import numpy as np

from lib.files import UserError

FEWEST = 10              # clusters that an interval needs


def bootstrap(columns, clusters, statistic, *, samples=2000, seed=0):
    """A statistic of the sums of columns (n,), with its 95% interval. -> interval

    clusters (n,): whose entries belong together, such as those of one prompt; whole clusters are drawn
    with replacement. Percentile bootstrap (Efron and Tibshirani 1993, ch. 13); draws in which the
    statistic is no number are left out.
    """
    _, member = np.unique(clusters, return_inverse=True)
    n = member.max() + 1 if len(member) else 0
    if n < FEWEST:
        raise UserError(f"{n} prompts are too few for an interval; it needs at least {FEWEST} "
                        "(more held-out pairs, or a larger --limit)")
    totals = np.stack([np.bincount(member, x, n) for x in columns])
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), samples)   # (samples, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = statistic(*totals.sum(1)), statistic(*(totals @ draws.T))
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return {"value": float(value), "low": math.nan, "high": math.nan, "se": math.nan}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high), "se": float(drawn.std())}


def ratio(num, den=None, clusters=None, **how):
    """Σ num / Σ den (den None: ones, so a mean); clusters None: each entry stands alone. -> interval"""
    den = np.ones(len(num)) if den is None else den
    clusters = np.arange(len(num)) if clusters is None else clusters
    return bootstrap([num, den], clusters, np.divide, **how)


def leaves_out_zero(interval):
    return interval.get("low", math.nan) > 0 or interval.get("high", math.nan) < 0


def mean_and_error(x):
    """Mean and its standard error, entries independent. x (n,) tensor"""
    error = (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.nan
    return x.mean().item(), error


def number_equal(things):
    """Equal things get equal numbers, (n,)."""
    number = {}
    return np.array([number.setdefault(x, len(number)) for x in things])


def gini(x):
    """0: all alike, towards 1: one has all. x >= 0, zeros included if they are meant to count."""
    x = np.sort(np.asarray(x, dtype=np.float64))
    if not len(x) or x.sum() <= 0:
        return math.nan
    rank = np.arange(1, len(x) + 1)
    return float((2 * rank - len(x) - 1) @ x / (len(x) * x.sum()))


def ranks(x):
    """Rank of each entry, ties at their mean rank."""
    x = np.asarray(x, dtype=np.float64)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def spearman(a, b):
    """Rank correlation; nan for fewer than three or a constant."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() and b.std() else math.nan
