"""LASSO: which few columns explain a number? Coordinate descent, the penalty chosen by cross-validation.

    min over w of  Σ (y - X w)² / 2n + alpha Σ|w|         X (n,k) with columns of mean 0 and variance 1
"""
import numpy as np

from lib.files import UserError

FOLDS = 5


def standardised(X, like=None):
    """Columns of mean 0 and variance 1 (as in `like`). Constant ones become 0: they say nothing."""
    like = X if like is None else like
    mean, spread = like.mean(0), like.std(0)
    constant = spread <= 1e-12 * np.maximum(1, np.abs(mean))
    return np.where(constant, 0.0, (X - mean) / np.where(constant, 1.0, spread))


def lasso(X, y, alpha, start=None, tolerance=1e-10, most=10_000):
    """-> w (k,). One coordinate at a time has a closed form: a least-squares step, then a soft
    threshold (Friedman, Hastie and Tibshirani 2010)."""
    n, k = X.shape
    w = np.zeros(k) if start is None else start.copy()
    gram, target = X.T @ X / n, X.T @ y / n              # all that is needed of X and y
    for _ in range(most):
        before = w.copy()
        for j in np.flatnonzero(gram.diagonal()):
            pull = target[j] - gram[j] @ w + gram[j, j] * w[j]
            w[j] = np.sign(pull) * max(abs(pull) - alpha, 0) / gram[j, j]
        if np.abs(w - before).max() <= tolerance:
            break
    return w


def ridge(X, y, alpha):
    """min Σ (y - X w)² / 2n + alpha Σ w² / 2, in closed form."""
    n, k = X.shape
    return np.linalg.solve(X.T @ X / n + alpha * np.eye(k), X.T @ y / n)


def penalties(X, y, count=30):
    """From the smallest alpha at which nothing is left to a thousandth of it."""
    top = max(np.abs(X.T @ y).max() / len(y), 1e-12)
    return top * np.geomspace(1, 1e-3, count)


def cross_validated(X, y, clusters):
    """-> {"min", "one_se": {"alpha", "weights"}}, r2: held out, at the best alpha; ridge: its weights

    Whole clusters go into one fold. one_se: the largest alpha whose error is within a standard error of
    the best one's (Breiman's rule).
    """
    names = np.unique(clusters)
    if len(names) < FOLDS:
        raise UserError(f"{len(names)} questions are too few for {FOLDS} folds")
    fold = np.random.default_rng(0).permutation(len(names)) % FOLDS
    fold = fold[np.searchsorted(names, clusters)]
    everything, target = standardised(X), standardised(y[:, None])[:, 0]
    alphas = penalties(everything, target)
    errors = np.zeros((FOLDS, len(alphas)))
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        A, B = standardised(X[train]), standardised(X[test], X[train])
        a, b = (standardised(y[part][:, None], y[train][:, None])[:, 0] for part in (train, test))
        w = None
        for i, alpha in enumerate(alphas):
            w = lasso(A, a, alpha, w)
            errors[k, i] = np.square(b - B @ w).mean()
    mean, error = errors.mean(0), errors.std(0, ddof=1) / FOLDS ** .5
    best = mean.argmin()
    simple = np.flatnonzero(mean <= mean[best] + error[best])[0]
    out = {"r2": float(1 - mean[best] / mean[0]) if mean[0] else float("nan")}
    for name, i in (("min", best), ("one_se", simple)):
        weights = lasso(everything, target, alphas[i])
        out[name] = {"alpha": float(alphas[i]), "weights": weights.tolist()}
    return out | {"ridge": ridge(everything, target, float(alphas[best])).tolist()}


def selected(X, y, alpha, clusters, draws=100):
    """How often each column is chosen when whole clusters are drawn anew. -> (k,)"""
    rng, names, count = np.random.default_rng(0), np.unique(clusters), np.zeros(X.shape[1])
    members = [np.flatnonzero(clusters == name) for name in names]
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        w = lasso(standardised(X[rows]), standardised(y[rows][:, None])[:, 0], alpha, tolerance=1e-6)
        count += w != 0
    return count / draws
