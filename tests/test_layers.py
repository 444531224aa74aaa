"""The layer probe where the truth is known: nothing changed, one block changed, few directions changed."""
import math

import numpy as np
import pytest
import torch

from common import ROOT, lively_adapter, mutant, small_gemma, small_sae, some_pairs
from experiments import planted
from experiments.baselines import Full, LoRA
from fsrl import Steering
from instruments import layers, shifts
from instruments.layers import Patch, Side
from lib import lasso
from lib.lasso import cross_validated, ridge, standardised
from simpo import batches, evaluate

PAIRS = some_pairs([(3 + i % 5, 2 + i % 7, 1 + (3 * i) % 8) for i in range(24)])
CLUSTERS = np.arange(24)


def lora(model, blocks, seed=3, size=.2, **how):
    torch.manual_seed(seed)
    policy = LoRA(model, [], rank=2, blocks=blocks, **how)
    with torch.no_grad():
        for change in policy.changes:
            change.B.copy_(size * torch.randn(change.B.shape))
    return policy


def sides_of(model, policy):
    return [Side(model), Side(*policy.acting(model))]


def moved(sides, *wanted, module=layers):
    """{patch: ρ of the gain}, margins (2,P)"""
    found, margins, _ = module.activation_patching(sides, list(batches(PAIRS, 8)), len(PAIRS), wanted, False)
    gain = margins[1] - margins[0]
    return {p: (x * gain).sum() / max((gain * gain).sum(), 1e-30) for p, x in found.items()}, margins, found


def every(site, count=4, **how):
    return [Patch(site=site, layers=(i,), **how) for i in range(count)]


def test_nothing_changed():
    """K1: a model beside itself. All effects are exactly 0, no layer explains anything, nothing divides by zero."""
    model = small_gemma()
    sides = [Side(model), Side(model)]
    found = layers.measure(sides, PAIRS, CLUSTERS, layers.ALL, False)
    assert found["gain"]["value"] == 0 and all(row["nats"]["value"] == 0 for row in found["patching"])
    assert not any("rho" in row for row in found["patching"]) and found["weights"] == []
    assert all(not any(x["one_se"]["weights"]) and math.isnan(x["r2"]) for x in found["shifts"]["lasso"].values())
    assert "cannot be told from 0" in layers.as_text(layers.describe(found, None))


@pytest.mark.parametrize("k", [0, 2, 3])
def test_one_block_changed(k):
    """K2: everything at k and nothing before, by activations, by weights, and by what the block does alone."""
    model = small_gemma()
    sides = sides_of(model, lora(model, k))
    for way in layers.WAYS:
        rho = list(moved(sides, *every("update", way=way))[0].values())
        assert rho[k] == pytest.approx(1, abs=1e-4) and rho[:k] == [0] * k
    half = np.arange(24) % 2 == 0
    numbers, *_ = shifts.collected(sides, list(batches(PAIRS, 8)), half)
    local = numbers["local"].mean(0)
    assert local[k] > .01 and np.abs(np.delete(local, k)).max() < 1e-5
    assert (numbers["distance"].mean(0)[:k] == 0).all() and (numbers["stream"].mean(0)[k:] > 1e-3).all()
    margins = moved(sides)[1]
    changes = layers.weight_patching(sides, list(batches(PAIRS, 8)), margins)
    gain = margins[1] - margins[0]
    for way in layers.WAYS:
        assert np.abs(changes[way, "block", k] - gain).max() < 1e-5
        assert all(np.abs(changes[way, "block", i]).max() < 1e-5 for i in range(4) if i != k)


def test_what_has_to_name_the_block_does():
    model = small_gemma()
    found = layers.measure(sides_of(model, lora(model, 2)), PAIRS, CLUSTERS, layers.ALL, False)
    named = planted.named(found)
    assert [named[instrument] for instrument in planted.ALGEBRA] == [2, 2] and len(named) == 22


def test_all_updates_and_the_last_stream_are_the_tuned_model():
    """K6, K7: norm and head are shared; the increments of the stream add up to 1."""
    model = small_gemma()
    sides = sides_of(model, lora(model, "all"))
    wanted = [Patch(layers=(0, 1, 2, 3)), *every("resid")]
    rho, margins, found = moved(sides, *wanted)
    for patch in (wanted[0], wanted[-1]):
        assert np.abs(found[patch] - (margins[1] - margins[0])).max() < 1e-4
    increments = np.diff([0, *(rho[p] for p in wanted[1:])])
    assert increments.sum() == pytest.approx(1, abs=1e-4) and np.abs(increments).max() < 2
    # the margins are those of training and analysis
    assert margins[1].mean() == pytest.approx(evaluate(model, PAIRS, lora(model, "all"))["margin"], abs=1e-5)


def test_steering_lives_at_its_layer():
    """K4: 0 below L; from L on the stream holds all of it. The steering belongs to the update of block L."""
    model = small_gemma()
    sae = small_sae(model, layer=1)
    sides = sides_of(model, Steering(sae, lively_adapter(sae)))
    stream = list(moved(sides, *every("resid"))[0].values())
    update = list(moved(sides, *every("update"))[0].values())
    assert stream[0] == 0 and stream[1:] == [pytest.approx(1, abs=1e-4)] * 3
    assert update[0] == 0 and update[1] == pytest.approx(1, abs=1e-4)
    assert layers.weight_patching(sides, [], np.zeros((2, 0))) == {}


def test_sites_lie_after_the_post_norms():
    """The tuned model has another post-norm of attention in block 2: all of it is in attn_out, which a site before
    the norm would miss."""
    model = small_gemma()
    policy = Full(model, [])
    with torch.no_grad():
        policy.tuned.layers[2].post_attention_layernorm.weight.mul_(1.5)
    for module, right in ((layers, True), (mutant("instruments.layers", (
            '("attn_out", block.post_attention_layernorm)', '("attn_out", block.self_attn)')), False)):
        sides = [module.Side(model), module.Side(policy.tuned)]
        rho = moved(sides, module.Patch(site="attn_out", layers=(2,)), module=module)[0]
        assert bool(abs(list(rho.values())[0] - 1) < 1e-4) is right


def test_places():
    """Prompt and answer together are all; the last prompt token is one a row, the one before the answers."""
    for _, batch in batches(PAIRS, 8):
        where = {place: layers.at_place(batch, place) for place in layers.PLACES}
        assert torch.equal(where["prompt"] | where["answer"], where["all"])
        assert not (where["prompt"] & where["answer"]).any()
        assert (where["last prompt"].sum(1) == 1).all()
        flat = where["last prompt"].flatten().nonzero()[:, 0].tolist()
        assert set(flat) <= set(batch.read.tolist())


def test_the_other_pair_by_loops():
    """A token's partner has the same branch and the same distance from the answer's start. Broken: one off."""
    _, batch = next(iter(batches(PAIRS, 8)))
    change = torch.randn(*batch.ids.shape, 3)

    def by_loops():
        out = torch.zeros_like(change)
        rows = [[(int(b), int(p) - int((row == 0).sum())) for b, p in zip(row, places)]
                for row, places in zip(batch.branch, batch.position_ids)]
        for i, keys in enumerate(rows):
            other = (i + 1) % len(rows)
            for t, key in enumerate(keys):
                if key[0] >= 0 and key in rows[other]:
                    out[i, t] = change[other, rows[other].index(key)]
        return out
    assert torch.equal(layers.shifted(change, *layers.another_pair(batch)), by_loops())
    broken = mutant("instruments.layers", ("batch.position_ids - prompt", "batch.position_ids"))
    assert not torch.equal(broken.shifted(change, *broken.another_pair(batch)), by_loops())


def test_two_directions_changed():
    """K3: an edit along two directions: the stream's change has rank 2, and these two bring all of the gain."""
    model = small_gemma()
    g = torch.Generator().manual_seed(5)
    W = torch.randn(2, 24, generator=g)

    class Two:
        positions = "text"

        def __call__(self, h, where):
            push = torch.tanh(h @ W.T) @ W
            return h + where[..., None] * push
    sides = [Side(model), Side(model, {1: Two()})]
    found = layers.measure(sides, PAIRS, CLUSTERS, layers.ALL, False)["shifts"]
    assert found["at"] == 1 and found["rank"][1]["d95"] <= 2 and found["rank"][1]["participation"] < 2.01
    by_k = {row["k"]: row for row in found["causal"]}
    assert by_k[2]["size"] == pytest.approx(1, abs=1e-3) and by_k[2]["random"] < .7 and by_k[1]["effect"] < .999


def test_spinals_traces_by_hand():
    """Slope of a spectrum that is a power law; the angle between two predictions. A model beside itself: no change."""
    model = small_gemma()
    slopes, lengths = shifts.spinal(Side(model), list(batches(PAIRS, 8)))
    _, batch = next(iter(batches(PAIRS[:1], 1)))
    states = Side(model).record(batch)
    one = shifts.spinal(Side(model), [([0], batch)])[1]
    for layer in range(3):
        p, q = (model.logits(model.norm(states["resid", i].flatten(0, 1)[batch.read])).softmax(-1)
                for i in (layer, layer + 1))
        angle = 2 * torch.arccos((p * q).sqrt().sum(-1).clamp(max=1)).mean()
        assert one[layer] == pytest.approx(angle.item(), abs=1e-4)
    assert len(slopes) == 4 and len(lengths) == 3 and all(0 < x < math.pi for x in lengths)


# ---- LASSO ---------------------------------------------------------------------------------------------------------

def drawn(n=400, k=6, seed=0):
    rng = np.random.default_rng(seed)
    X = standardised(rng.standard_normal((n, k)) @ rng.standard_normal((k, k)))
    y = X @ np.array([1.0, 0, 0, -.5, 0, 0]) + .3 * rng.standard_normal(n)
    return X, standardised(y[:, None])[:, 0]


@pytest.mark.parametrize("module", ["real", "broken"])
def test_lasso_meets_its_conditions(module):
    """KKT: the pull on a column is alpha · sign(w) where w is not 0, and within ± alpha elsewhere, to 1e-8."""
    m = lasso if module == "real" else mutant("lib.lasso", ("abs(pull) - alpha, 0)", "abs(pull) - alpha / 2, 0)"))
    X, y = drawn()
    for alpha in (.01, .1, .4):
        w = m.lasso(X, y, alpha)
        pull = X.T @ (y - X @ w) / len(y)
        on = w != 0
        fits = np.abs(pull[on] - alpha * np.sign(w[on])).max() < 1e-8 and np.abs(pull).max() < alpha + 1e-8
        assert bool(fits) is (module == "real")


def test_closed_forms():
    """Orthogonal columns: LASSO is a soft threshold of least squares. Ridge's slope is 0."""
    rng = np.random.default_rng(1)
    X = np.linalg.qr(rng.standard_normal((50, 4)))[0] * 50 ** .5
    y = rng.standard_normal(50)
    b = X.T @ y / 50
    assert np.allclose(lasso.lasso(X, y, .1), np.sign(b) * np.maximum(np.abs(b) - .1, 0), atol=1e-10)
    w = ridge(X, y, .3)
    assert np.abs(X.T @ (y - X @ w) / 50 - .3 * w).max() < 1e-12


def test_cross_validation_keeps_what_is_true_and_little_else():
    X, y = drawn()
    X = np.concatenate([X, np.ones((len(X), 1))], 1)                    # a constant column says nothing
    found = cross_validated(X, y, np.arange(len(y)) // 4)
    kept = np.flatnonzero(found["one_se"]["weights"])
    assert {0, 3} <= set(kept) and found["r2"] > .8 and 6 not in kept
    null = cross_validated(X, np.random.default_rng(3).permutation(y), np.arange(len(y)) // 4)
    assert np.count_nonzero(null["one_se"]["weights"]) <= 1 and null["r2"] < .05


# ---- the command -----------------------------------------------------------------------------------------------------

MISTAKES = {"": "name a run, or --base", "x --base y --tuned z": "name a run, or --base",
            "--base tiny/model --tuned tiny/model": "on which pairs", "x --only y": "'y' is none of",
            "--base tiny/model --tuned tiny/model --pairs tiny/pairs/style --limit 4": "questions are too few"}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes(given, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert layers.main(given.split()) == 2 and MISTAKES[given] in capsys.readouterr().err
