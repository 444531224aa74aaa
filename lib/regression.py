"""Logistic regression on differences: ridge by L-BFGS, ℓ1 by proximal steps, folds of whole clusters.

Row x_p is what one answer has more of than the other, y_p is 1 if that one was chosen, else -1:

    p(y | x) = σ(y · x w)          swapping the answers turns x and y around, so there is no intercept
    loss(w)  = Σ_p m_p softplus(-y_p · x_p w) / Σ m_p   + strength · (‖w‖² / 2   or   ‖w‖₁)

m_p is how often a row counts: 0 leaves it out (a fold), 2 takes it twice (a bootstrap). All in float64.
Columns are divided by their root mean square and never centred: a mean, too, would name a side.
"""
import warnings

import numpy as np
import torch
from torch.nn.functional import softplus


class Rows:
    """A sparse matrix X (n,K) and its transpose, from entries value (nnz,) at row and column."""

    def __init__(self, row, column, value, shape, scale=None):
        """scale (K,): what columns are divided by; None: their root mean square, 1 where that is 0"""
        value = value.double()
        if scale is None:
            squares = torch.zeros(shape[1], dtype=torch.float64).index_add(0, column, value.square())
            scale = (squares / shape[0]).sqrt()
            scale[scale == 0] = 1.0
        self.shape, self.scale = shape, scale
        with warnings.catch_warnings():                  # torch calls its sparse rows a beta
            warnings.simplefilter("ignore")
            X = torch.sparse_coo_tensor(torch.stack([row, column]), value / scale[column], shape)
            self.X, self.XT = X.to_sparse_csr(), X.t().to_sparse_csr()

    def mean(self, m=None):
        """Σ m_p x_p / Σ |m_p|, (K,); m None: ones"""
        m = torch.ones(self.shape[0], dtype=torch.float64) if m is None else m
        return self.XT @ m / m.abs().sum()


def loss(X, y, m, w):
    """The loss without its penalty, and its gradient. -> scalar, (K,)"""
    z, m = y * (X.X @ w), m / m.sum()
    return (m * softplus(-z)).sum(), X.XT @ (-m * y * torch.sigmoid(-z))


def ridge(X, y, m, strength, start, enough=1e-4):
    """The w (K,) where loss + strength · ‖w‖² / 2 is least: no slope above `enough` is left."""
    w = start.clone()
    how = {"max_iter": 500, "tolerance_grad": enough, "tolerance_change": 0, "history_size": 20}
    optimizer = torch.optim.LBFGS([w], line_search_fn="strong_wolfe", **how)

    def closure():
        value, gradient = loss(X, y, m, w)
        w.grad = gradient + strength * w
        return value + strength * w.square().sum() / 2
    optimizer.step(closure)
    return w


def lasso(X, y, m, strength, start, enough=1e-4, steps=5000):
    """The same for strength · ‖w‖₁: proximal steps with momentum, begun again where they overshoot
    (FISTA, Beck and Teboulle 2009; restart, O'Donoghue and Candès, arXiv 1204.3982)."""
    # The steepest curvature: the largest eigenvalue of Xᵀ diag(m) X / 4 Σm by the power method, which
    # comes from below, and a tenth more.
    v = torch.ones(X.shape[1], dtype=torch.float64)
    for _ in range(30):
        v = X.XT @ (m * (X.X @ (v / v.norm().clamp_min(1e-12)))) / (4 * m.sum())
    size = 1 / (1.1 * v.norm().clamp_min(1e-12))
    w, ahead, speed = start, start, 1.0                  # ahead: where the slope is taken
    for _ in range(steps):
        p = ahead - size * loss(X, y, m, ahead)[1]
        new = p.sign() * (p.abs() - size * strength).clamp_min(0)
        moved, back = new - w, ahead - new
        if back.abs().max() / size < enough:
            return new
        if back @ moved > 0:                             # uphill
            speed = 1.0
        faster = (1 + (1 + 4 * speed ** 2) ** .5) / 2
        w, ahead, speed = new, new + (speed - 1) / faster * moved, faster
    return w


def cross_validated(fit, X, y, clusters, count):
    """-> the strength with the least loss on folds left out, and w (K,) of all rows with it
    clusters (n,) numbers 0, 1, ...: dealt whole to `count` folds"""
    order = np.random.default_rng(0).permutation(clusters.max() + 1)
    fold = torch.from_numpy(order[clusters] % count)
    m, nothing = torch.ones(len(y), dtype=torch.float64), torch.zeros(X.shape[1], dtype=torch.float64)
    most = loss(X, y, m, nothing)[1].abs().max().item()  # ℓ1 so strong leaves nothing
    strengths = np.logspace(0, -2.5, 6) if fit is ridge else most * np.logspace(-.5, -2, 6)
    left_out = np.zeros(len(strengths))
    for k in range(count):
        w = nothing
        for i, strength in enumerate(strengths):         # the strongest first: the next starts there
            w = fit(X, y, (fold != k) * m, strength, w, 1e-3)
            left_out[i] += loss(X, y, (fold == k) * m, w)[0].item()
    best = strengths[left_out.argmin()].item()
    return best, fit(X, y, m, best, nothing)


def drawn(clusters, rng):
    """Whole clusters drawn with replacement: how often each row counts. (n,) numbers -> (n,)"""
    count = clusters.max() + 1
    return torch.from_numpy(rng.multinomial(count, np.full(count, 1 / count))[clusters]).double()


def accuracy(z):
    """Share of pairs whose chosen answer has the higher score. z (n,): chosen less rejected."""
    return ((z.sign() + 1) / 2).mean().item()


def mirrored_auc(z):
    """Area under the ROC of each pair (z, label 1) and its mirror image (-z, label 0); ties half."""
    z = z.sort().values
    below = torch.searchsorted(z, -z) + torch.searchsorted(z, -z, right=True)
    return (1 - below.double().mean() / (2 * len(z))).item()
