"""The ledger of the data: the regression against finite differences, optimality and planted weights; pooling against
plain loops; what a feature writes for free; intervals over whole prompts; mistakes of the user's."""
import json

import numpy as np
import pytest
import torch

from common import mutant, off, small_gemma, small_sae, some_pairs
from instruments import data
from lib import regression as reg
from lib.files import UserError
from tiny import world


def problem(n=400, K=30, seed=0, true=None):
    """Sparse differences, and labels drawn from planted weights. -> Rows, y, m, the weights in scaled columns"""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, K, generator=g).double() * (torch.rand(n, K, generator=g) < .3)
    X *= torch.logspace(-2, 2, K)                                         # of very different sizes
    row, column = X.nonzero(as_tuple=True)
    rows = reg.Rows(row, column, X[row, column], (n, K))
    true = torch.zeros(K).double() if true is None else true
    p = torch.sigmoid(rows.X @ true)
    y = 2 * torch.bernoulli(p, generator=g) - 1
    return rows, y, torch.randint(0, 3, (n,), generator=g).double(), true


def test_gradient_is_the_loss_s():
    X, y, m, _ = problem()
    w, e = torch.randn(30, generator=torch.Generator().manual_seed(1)).double() / 3, 1e-6
    _, gradient = reg.loss(X, y, m, w)
    steps = torch.eye(30).double() * e
    finite = torch.stack([reg.loss(X, y, m, w + s)[0] - reg.loss(X, y, m, w - s)[0] for s in steps]) / (2 * e)
    assert off(gradient, finite) < 1e-8
    broken = mutant("lib.regression", ("(-m * y * torch.sigmoid(-z))", "(-m * torch.sigmoid(-z))"))
    assert off(broken.loss(X, y, m, w)[1], finite) > .01


def test_ridge_and_lasso_are_optimal():
    """Ridge: no slope is left, from any start. l1: the conditions of Karush, Kuhn and Tucker. A row that counts twice
    is two rows, one that counts 0 is none."""
    X, y, m, _ = problem(true=torch.linspace(-1, 1, 30).double())
    nothing = torch.zeros(30).double()
    w = reg.ridge(X, y, m, .01, nothing, 1e-9)
    assert (reg.loss(X, y, m, w)[1] + .01 * w).abs().max() < 1e-8
    assert off(reg.ridge(X, y, m, .01, nothing + 1, 1e-9), w) < 1e-6
    dense = X.X.to_dense().repeat_interleave(m.long(), 0)
    row, column = dense.nonzero(as_tuple=True)
    again = reg.Rows(row, column, dense[row, column], dense.shape, scale=torch.ones(30).double())
    many = y.repeat_interleave(m.long())
    assert off(reg.ridge(again, many, torch.ones_like(many), .01, nothing, 1e-9), w) < 1e-6

    def violation(w, strength):
        slope = reg.loss(X, y, m, w)[1]
        there = w != 0
        held = (slope + strength * w.sign())[there].abs().max() if there.any() else torch.tensor(0.0)
        return max(held.item(), (slope[~there].abs() - strength).max().item())
    w = reg.lasso(X, y, m, .03, nothing, 1e-10)
    assert 2 < (w != 0).sum() < 28 and violation(w, .03) < 1e-8
    forgets = mutant("lib.regression", ("size * strength).clamp_min", "strength).clamp_min"))
    assert violation(forgets.lasso(X, y, m, .03, nothing, 1e-10), .03) > 1e-3
    most = reg.loss(X, y, m, nothing)[1].abs().max().item()
    assert not reg.lasso(X, y, m, 1.001 * most, nothing).any() and reg.lasso(X, y, m, .98 * most, nothing).any()
    assert not reg.ridge(X, torch.zeros_like(y), m, 1.0, nothing).any()


def test_planted_weights_come_back_and_columns_have_no_names():
    true = torch.zeros(30).double()
    true[[3, 11, 20]] = torch.tensor([1.5, -1.0, .7]).double()
    X, y, _, _ = problem(6000, true=true)
    clusters = np.arange(6000) // 4
    for fit in (reg.ridge, reg.lasso):
        strength, w = reg.cross_validated(fit, X, y, clusters, 5)
        assert strength < .1 and off(w, true) < .15
        order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
        dense = X.X.to_dense()[:, order] * 5                              # permuted, and in another unit
        row, column = dense.nonzero(as_tuple=True)
        turned = reg.Rows(row, column, dense[row, column], dense.shape)
        _, v = reg.cross_validated(fit, turned, y, clusters, 5)
        assert off(v, w[order]) < 1e-3
        _, back = reg.cross_validated(fit, X, -y, clusters, 5)            # the answers swapped: no side has a name
        assert off(-back, w) < 1e-3


def test_folds_and_draws_take_whole_clusters():
    clusters = np.repeat(np.arange(50), 4)
    seen = []

    def spy(X, y, m, strength, start, enough=0):
        seen.append(m.numpy())
        return start
    reg.cross_validated(spy, problem(200)[0], torch.ones(200).double(), clusters, 5)
    for m in [*seen, reg.drawn(clusters, np.random.default_rng(0)).numpy()]:
        assert (m.reshape(50, 4) == m.reshape(50, 4)[:, :1]).all()
    left_out = sum(1 - m for m in seen[:-1])
    assert (left_out == left_out[0]).all() and left_out[0] > 0 and seen[-1].all()


def test_accuracy_and_auc():
    z = torch.tensor([2.0, -1, 0, .5, -.5])
    both = [(a, b) for a in z.tolist() for b in (-z).tolist()]
    assert reg.mirrored_auc(z) == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in both]))
    assert reg.accuracy(z) == .5 and reg.mirrored_auc(torch.zeros(3)) == .5 and reg.mirrored_auc(z.abs() + 1) == 1


# ---- features of pairs -------------------------------------------------------------------------------

def plain(model, sae, pairs):
    """(n,F,3): answer by answer, in one sequence each."""
    out = torch.zeros(len(pairs), sae.d_sae, 3)
    for i, pair in enumerate(pairs):
        for sign, answer in ((1, pair.chosen), (-1, pair.rejected)):
            x = model.blocks(model.embed(torch.tensor([pair.prompt + answer])), 0, sae.layer + 1)
            f = sae.encode(x[0, len(pair.prompt):])
            out[i] += sign * torch.stack([f.mean(0), f.sum(0), f.max(0).values], 1)
    return out


def test_pooling_is_that_of_plain_sequences(monkeypatch):
    """Rows, padding, batch size and the size of a piece change nothing; the prompt does not count."""
    model = small_gemma(dtype=torch.float64)
    sae, pairs = small_sae(model), some_pairs([(1, 1, 1), (7, 1, 13), (9, 8, 8), (3, 2, 1), (2, 20, 3)])
    true = plain(model, sae, pairs)

    def dense(module, **how):
        pair, feature, values = module.differences(model, sae, pairs, **how)
        out = torch.zeros_like(true)
        out[pair, feature] = values
        return out
    assert (true != 0).any(1).all() and off(dense(data), true) < 1e-6
    assert off(dense(data, batch_size=2), true) < 1e-6
    monkeypatch.setattr(data, "CHUNK", 3 * sae.d_sae)
    assert off(dense(data), true) < 1e-6
    prompts = mutant("instruments.data", ("[batch.branch > 0] ", "[batch.branch >= 0][:len(batch.owner)] "))
    padded = mutant("instruments.data", ("total / batch.lengths[answer]", "total / batch.lengths.max()"))
    assert off(dense(prompts), true) > .01 and off(dense(padded), true) > .01

    found = data.differences(model, sae, pairs)
    X = data.rows_of(found, pairs, sae.d_sae, "max")
    back = X.X.to_dense() * X.scale
    assert off(back[:, :-1].float(), true[..., 2]) < 1e-6 and back[:, -1].tolist() == [0, -12, 0, 1, 17]
    rms = X.X.to_dense().square().mean(0).sqrt()                          # scaled, never centred
    assert off(rms[rms > 0], torch.ones(int((rms > 0).sum()))) < 1e-9


def test_free_writes():
    """By hand, one row at a time; the opposite says the opposite; the norm's weight and the soft-cap are in it."""
    model = small_gemma(dtype=torch.float64)
    sae, ids = small_sae(model), {"a": {5}, "b": {7, 90, 12}}
    free = data.direct_writes(model, sae, ids, size=5)
    for i in (0, 17):
        d = sae.W_dec[i]
        x = d / (d.square().mean() + model.config.rms_norm_eps).sqrt() * (1 + model.norm.weight)
        z = 30 * torch.tanh(x @ model.embed_tokens.weight.T / 30)
        by_hand = torch.stack([z[5], z[[7, 90, 12]].mean()]) - z.mean()
        assert off(free[i], by_hand) < 1e-9
    bare = mutant("instruments.data", ("model.logits(model.norm(d.to(model.norm.weight.dtype)))",
                                       "(model.norm(d) @ model.embed_tokens.weight.T)"))
    assert off(bare.direct_writes(model, sae, ids), free) > .01
    sae.W_dec.neg_()
    assert off(data.direct_writes(model, sae, ids), -free) < 1e-12


# ---- calibration -------------------------------------------------------------------------------------

def test_against_planted_weights():
    planted = np.array([[2, -1, 0, .5], [0, 1, 1.5, -2], [1, 0, 0, -1]])
    perfect = data.against(planted / 3, planted)
    # in world 0 one weight is smaller than any in the others, so their threshold misses it: 2 of 3 found, none wrong
    assert [perfect[k] for k in ("rank", "precision", "f1")] == pytest.approx([1, 1, (.8 + 1 + 1) / 3])
    assert perfect["slopes"] == pytest.approx([1 / 3] * 4)
    blind = data.against(np.array([[0, 0, 9, 1], [9, 0, 0, 1], [0, 9, 8, 1.0]]), planted)
    # world 0: in the order 2, 3, 0, 1 three weigh something, found at places 2, 3, 4
    by_hand = [(1 / 2 + 2 / 3 + 3 / 4) / 3] * 2 + [(1 / 3 + 2 / 4) / 2]
    assert blind["precision"] == pytest.approx(np.mean(by_hand))
    own = mutant("instruments.data", ("np.delete(said, i, 0), np.delete(true, i, 0)", "said[i], true[i]"))
    numbers = np.array([[3, 1, .1, .9], [.02, .1, .2, .3], [1, .1, .2, 2]])
    assert own.against(numbers, planted)["f1"] > data.against(numbers, planted)["f1"], "its own threshold flatters"


# ---- the command -------------------------------------------------------------------------------------

SMALL = ["--sae", "tiny/sae", "--train-pairs", "400", "--held-pairs", "100"]


def test_the_command(tmp_path, capsys, monkeypatch):
    """On the lab: what it prints and keeps, and that the parts add up to the whole."""
    monkeypatch.setattr(data, "REFITS", 2)
    out = tmp_path / "new" / "style.json"
    assert data.main(["tiny/pairs/style", *SMALL, "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    for said in ("the longer is chosen", "chosen less rejected", "bold labels_reads", "minimal pairs", "written for"):
        assert said in printed
    scorers = {what.partition(" (")[0]: x for what, x in result["scorers"].items()}
    assert scorers["the planted utility"][0] > .75 and scorers["ridge, mean"][1] > .75
    assert .4 < scorers["ridge, labels shuffled"][1] < .6
    paid = {(x["source"], x["set"]): x for x in result["paid"]}
    assert {name for source, name in paid if source == "minimal pairs"} == set(world.CHOICES)
    assert paid["minimal pairs", "heading"]["ridge"]["value"] > .3 and paid["", "length"]["features"] == 1
    sizes = sum(paid["labels", name]["features"] for name in ("style", "alignment", "rest"))
    assert sizes >= 1024                                                  # some are labelled both
    assert result["audit"]["pairs"] == 400 and result["writes"]["bold"]["rank"] > .5


def test_the_audit_counts(tmp_path, capsys):
    out = tmp_path / "audit.json"
    lines = [{"prompt": f"q{i}", "chosen": "a b c"[:1 + 2 * (i % 3)], "rejected": "a b"} for i in range(9)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in [*lines, *lines[:1]]))
    assert data.main([str(file), "--out", str(out)]) == 0
    audit = json.loads(out.read_text())["audit"]
    assert audit["pairs"] == 6 and audit["dropped"] == 3 and audit["longer"]["value"] == .5 and not audit["choices"]
    assert data.main(["tiny/pairs/style", "--train-pairs", "300", "--out", str(out)]) == 0
    audit = json.loads(out.read_text())["audit"]
    pairs = [json.loads(x) for x in open("tiny/pairs/style/train.jsonl").read().splitlines()[:300]]
    q = [world.read_prompt(p["prompt"]) for p in pairs]
    less = [[world.is_on(a, "bold", p["choices"][k]["bold"]) for k in (0, 1)] for a, p in zip(q, pairs)]
    assert audit["choices"]["bold"]["value"] == pytest.approx(np.mean([int(a) - int(b) for a, b in less]))
    assert audit["planted"]["best"] == .8168
    weights = world.WORLDS["style"]
    u = [[world.utility(a, choices, weights) for choices in p["choices"]] for a, p in zip(q, pairs)]
    assert audit["planted"]["tied"] == pytest.approx(np.mean([chosen == rejected for chosen, rejected in u]))


LAB = "tiny/pairs/style"
FEW = [LAB, "--sae", "tiny/sae", "--train-pairs", "3", "--held-pairs", "9"]
MISTAKES = [
    ([], "name the pairs"),
    ([LAB, "--calibrate"], "one of the two"),
    (FEW, "too few for --folds 5"),
    ([LAB, "--sae", "nowhere"], "nowhere"),
    ([LAB, "--folds", "1"], "--folds is 1; it has to be at least 2"),
]


@pytest.mark.parametrize("argv, said", MISTAKES)
def test_mistakes(argv, said, capsys, tmp_path):
    assert data.main([*argv, "--out", str(tmp_path / "x.json")]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not (tmp_path / "x.json").exists()


def test_another_sae_s_labels_and_another_model_s_sae(tmp_path, capsys):
    from sae import load_sae, save_sae
    sae = load_sae("tiny/sae")
    sae.b_enc += 1
    save_sae(sae, tmp_path / "layer_3" / "width_1k" / "average_l0_1")
    labels = "tiny/sae/layer_3/width_1k/average_l0_16/labels.jsonl"
    few = ["tiny/pairs/style", "--train-pairs", "9", "--held-pairs", "9", "--out", str(tmp_path / "x.json")]
    assert data.main([*few, "--sae", str(tmp_path / "layer_3"), "--labels", labels]) == 2
    assert "labels of another SAE" in capsys.readouterr().err
    save_sae(small_sae(small_gemma()), tmp_path / "other" / "layer_1" / "average_l0_1")
    assert data.main([*few, "--sae", str(tmp_path / "other")]) == 2
    assert "reads states of width 24" in capsys.readouterr().err and not (tmp_path / "x.json").exists()
    with pytest.raises(UserError):
        data.DataSettings(pairs="x", calibrate=True)
