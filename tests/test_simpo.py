"""The fast against the plain: rows and two sequences, chunked head and dense one; the loss by hand; text to ids."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

import simpo
from common import CONFIG, LENGTHS, ROOT, lively_adapter, mutant, off, relative, small_gemma, small_sae, some_pairs
from fsrl import FUSIONS, POSITIONS, Steering
from gemma import load_tokenizer
from lib.files import UserError
from simpo import Pair, by_the_book, collate, dense_logps, encode_pairs, evaluate, score, simpo_loss, token_logps


def by_rows(module, model, pairs, policy=None):
    """s(chosen), s(rejected) of each pair, (P,2), from one batch of rows."""
    s = module.score(model, module.collate(pairs), policy)
    return torch.stack([s.chosen.mean, s.rejected.mean], 1)


def by_sequences(model, pairs, policy=None):
    """The same by the book."""
    return torch.stack([torch.stack(by_the_book(model, pair, policy)) for pair in pairs])


# ---- rows ----------------------------------------------------------------------------------------------------------

def test_rows_are_separate_sequences():
    model, pairs = small_gemma(), some_pairs(LENGTHS)
    assert off(by_rows(simpo, model, pairs), by_sequences(model, pairs)) < 1e-5


BROKEN_ROWS = {
    "answers see each other": ("((key == 0) | (key == query)) & (key >= 0) & earlier", "(key >= 0) & earlier"),
    "positions go on": ("start + len(part), n if side else 0", "start + len(part), start"),
    "rejected read after chosen": ("read += [b * T + n - 1] ", "read += [b * T + start - 1] "),
    "sums for means": ("(total / batch.lengths)", "total"),
}


@pytest.mark.parametrize("what", BROKEN_ROWS)
def test_broken_rows_are_noticed(what):
    broken, model, pairs = mutant("simpo", BROKEN_ROWS[what]), small_gemma(), some_pairs(LENGTHS)
    assert off(by_rows(broken, model, pairs), by_sequences(model, pairs)) > 1e-3


def test_the_book_against_transformers():
    pytest.importorskip("transformers", reason="needs requirements-extra.txt")
    from golden import oracle
    model, pairs = small_gemma(4), some_pairs(LENGTHS, seed=4)
    theirs, want = oracle(model), []
    with torch.no_grad():
        for answer, prompt in ((a, p.prompt) for p in pairs for a in (p.chosen, p.rejected)):
            logp = theirs(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0]
            before = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            want.append(logp[before, torch.tensor(answer)].mean())
    want = torch.stack(want).view(-1, 2)
    assert off(by_sequences(model, pairs), want) < 1e-5 and off(by_rows(simpo, model, pairs), want) < 1e-5


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in module.parameters() if p.grad is not None])


BENT = ("((others * (1 - y * y))[:, None] * own - pull)", "(others[:, None] * own - pull)")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_adapter_gradients(dtype, tolerance):
    """Rows, chunked head and custom backward against autograd through two sequences and dense logits. Broken: a head
    whose gradient forgets the slope of the soft-cap."""
    model, pairs = small_gemma(5, dtype), some_pairs(LENGTHS, seed=5)
    sae = small_sae(model)
    adapter = lively_adapter(sae)
    policy = Steering(sae, adapter)

    def gradient(s):
        return gradients(adapter, simpo_loss(*s.T, 2.0).mean())
    want, got = gradient(by_sequences(model, pairs, policy)), gradient(by_rows(simpo, model, pairs, policy))
    assert want.norm() > 0.01 and relative(got, want) < tolerance
    assert all(p.grad is None for p in (*model.parameters(), *sae.parameters()))
    bent = gradient(by_rows(mutant("simpo", BENT), model, pairs, policy))
    assert relative(bent, want) > 10 * tolerance


def test_independent_of_padding_order_and_accumulation():
    """8 x 1 = 1 x 8, loss and penalty included; more padding and another order change nothing."""
    model, pairs = small_gemma(6, torch.float64), some_pairs(LENGTHS + [(4, 4, 4)], seed=6)
    sae = small_sae(model)
    policy = Steering(sae, lively_adapter(sae))

    def gradient(groups):
        total = 0
        for group in groups:
            s = score(model, collate(group), policy)
            loss = simpo_loss(s.chosen.mean, s.rejected.mean) + 0.1 * s.penalty
            total = total + loss.sum() / len(pairs)
        return gradients(policy, total)
    at_once = gradient([pairs])
    for groups in ([[p] for p in pairs], [pairs[::-1]], [pairs[:3], pairs[3:]]):
        assert relative(gradient(groups), at_once) < 1e-12
    longer = by_rows(simpo, model, pairs + some_pairs([(30, 30, 30)]), policy)[:-1]
    assert off(longer, by_rows(simpo, model, pairs, policy)) < 1e-12


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_policy_is_its_edits_and_may_go_on_from_a_kept_prefix(fusion, positions):
    """`run` on rows, `run` from kept states, and `acting`'s edits on plain sequences: three ways, one policy."""
    model, pairs = small_gemma(7), some_pairs(LENGTHS, seed=7)
    sae = small_sae(model)
    policy, batch = Steering(sae, lively_adapter(sae), fusion=fusion, positions=positions), collate(pairs)
    want = by_rows(simpo, model, pairs, policy)
    kept = score(model, batch, policy, simpo.prefix(model, batch, policy.frozen))
    assert torch.equal(torch.stack([kept.chosen.mean, kept.rejected.mean], 1), want)
    assert off(by_sequences(model, pairs, policy), want) < 1e-5
    assert off(by_sequences(model, pairs), want) > 0.01


def picture(where):
    return ["".join(".x"[int(w)] for w in row) for row in where]


def test_where():
    batch = collate(some_pairs([(3, 2, 2), (1, 1, 3)]))
    assert picture(batch.where("text")) == [".xxxxxx", ".xxxx.."]         # row: b p p c c r r; b c r r r - -
    assert picture(batch.where("all")) == ["xxxxxxx", "xxxxx.."]
    assert picture(batch.where("response")) == ["..xx.x.", "..xx..."]     # a BOS that predicts stays untouched


# ---- the head ------------------------------------------------------------------------------------------------------

def random_head(n, V, D=24, scale=2.0, dtype=torch.float64, seed=8):
    g = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(k, D, generator=g, dtype=torch.float64) * scale for k in (n, V))
    return x.to(dtype), W.to(dtype), torch.randint(V, (n,), generator=g)


@pytest.mark.parametrize("V, budget", [(97, None), (3000, 300), (3000, 10**6)])
def test_chunked_head(V, budget):
    """Value and gradient against the dense head in float64; in float32 and float64, any chunk size."""
    x, W, target = random_head(50, V)
    weight = torch.randn(50, dtype=torch.float64)
    assert (x @ W.T).abs().max() > 30
    x.requires_grad_()
    want = dense_logps(x, W, target, 30.0)
    slope, = torch.autograd.grad((want * weight).sum(), x)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        y = x.detach().to(dtype).requires_grad_()
        got = token_logps(y, W.to(dtype), target, 30.0, budget)
        (got * weight.to(dtype)).sum().backward()
        assert got.dtype == dtype and off(got.double(), want) < tolerance
        assert relative(y.grad.double(), slope) < tolerance * 10


def test_heads_of_half_precision_sum_in_float32():
    x, W, target = random_head(9, 500, scale=1.0, dtype=torch.bfloat16)
    want = dense_logps(x.double(), W.double(), target, 30.0)
    for head in (token_logps, dense_logps):
        got = head(x, W, target, 30.0)
        assert got.dtype == torch.float32 and off(got.double(), want) < 1e-5


CANCELLING = [("e[inside, column[inside]] = 0.0", "pass"),
              ("others, total = total, total + (cap * (y - 1)).exp()", "others = total")]


@pytest.mark.parametrize("module", ["real", "cancelling"])
def test_head_gradient_of_confident_tokens_in_bf16(module):
    """p of the target above .99: the gradient is a small rest, which is lost where the target's own term is summed and
    then taken off."""
    m = simpo if module == "real" else mutant("simpo", *CANCELLING)
    g = torch.Generator().manual_seed(2)
    W, target = torch.randn(2000, 64, generator=g).bfloat16(), torch.arange(40)
    x = (W[:40].float() * 0.35 + 0.02 * torch.randn(40, 64, generator=g)).bfloat16()

    def slopes(head, x, W):
        x = x.clone().requires_grad_()
        p = head(x, W, target, 30.0)
        p.sum().backward()
        return p.detach(), x.grad.double()
    logp, want = slopes(dense_logps, x.double(), W.double())
    assert logp.exp().median() > 0.99
    _, got = slopes(m.token_logps, x, W)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert bool(errors.median() < 0.01) is (module == "real")


class Finetuned(nn.Module):
    """A policy that steers nothing: all weights of a copy of the model are trained."""
    frozen = None

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(True)

    def run(self, model, h, batch):
        m, how = self.model, {"position_ids": batch.position_ids, "mask": batch.mask()}
        h = m.blocks(m.embed(batch.ids), 0, len(m.layers), **how)
        return h, h.new_zeros(len(h)), {}

    def acting(self, model):
        return self.model, None


@pytest.mark.parametrize("module", ["real", "frozen head"])
def test_the_tied_embedding_learns_through_the_head_too(module):
    """Full fine-tuning: norm and head are the acting model's, and W gets its gradient from both of its uses. Broken:
    the fast head, which leaves W alone."""
    change = ("dense_logps if learning else token_logps", "token_logps")
    m = simpo if module == "real" else mutant("simpo", change)
    model, pairs = small_gemma(5, torch.float64), some_pairs(LENGTHS, seed=5)
    policy = Finetuned(model)
    with torch.no_grad():
        policy.model.embed_tokens.weight.mul_(1.01)

    def gradient(s):
        gradients(policy, simpo_loss(*s.T, 2.0).mean())
        return policy.model.embed_tokens.weight.grad.clone()
    want = gradient(by_sequences(model, pairs, policy))
    assert off(by_rows(simpo, model, pairs, policy), by_sequences(model, pairs)) > 1e-4
    assert (relative(gradient(by_rows(m, model, pairs, policy)), want) < 1e-8) is (module == "real")


# ---- the loss ------------------------------------------------------------------------------------------------------

def test_simpo_by_hand():
    zero = torch.zeros(1)
    assert simpo_loss(zero, zero, 10.0, 0.5).item() == pytest.approx(5.0067, abs=5e-5)
    assert simpo_loss(zero, zero, 2.0, 0.5).item() == pytest.approx(1.3133, abs=5e-5)
    a, b = torch.tensor([-0.5]), torch.tensor([-1.5])
    z = 2.0 * (1.0 - 0.5)
    right, wrong = math.log1p(math.exp(-z)), math.log1p(math.exp(z))
    assert simpo_loss(a, b, 2.0, 0.5).item() == pytest.approx(right, rel=1e-6)
    assert simpo_loss(a, b, 2.0, 0.5, kind="hinge").item() == pytest.approx(max(0, 1 - z))
    smooth = simpo_loss(a, b, 2.0, 0.5, label_smoothing=0.1).item()
    assert smooth == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-6)
    assert simpo_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_a_runs_settings_decide_the_loss():
    """What config.json says, all of it; and a function of the user's own instead."""
    a, b = (simpo.Answer(torch.tensor([x]), torch.tensor([4.0]), torch.tensor([-1.0])) for x in (-0.5, -1.5))
    config = {"beta": 3.0, "gamma_ratio": 0.2, "label_smoothing": 0.1, "loss": "sigmoid", "steps": 5}
    want = simpo_loss(a.mean, b.mean, 3.0, 0.2, label_smoothing=0.1)
    assert torch.equal(simpo.preference_loss(a, b, config), want)
    hinge = simpo_loss(a.mean, b.mean, 3.0, 0.2, kind="hinge")
    assert torch.equal(simpo.preference_loss(a, b, {**config, "loss": "hinge"}), hinge)
    assert torch.equal(simpo.preference_loss(a, b, {}), simpo_loss(a.mean, b.mean))
    assert simpo.preference_loss(a, b, config, lambda chosen, rejected: chosen.sum - chosen.base_sum).item() == 2.0


def test_mean_and_not_sum():
    """The length normalisation, by hand: a model whose embedding is 0 gives log(1/V) a token."""
    model = small_gemma()
    model.embed_tokens.weight.data.zero_()
    s = score(model, collate(some_pairs([(3, 2, 9)])))
    for answer, n in ((s.chosen, 2), (s.rejected, 9)):
        assert answer.mean.item() == pytest.approx(-math.log(97), rel=1e-6) and answer.length.item() == n
        assert answer.sum.item() == pytest.approx(-n * math.log(97), rel=1e-6)


def test_evaluate():
    model, pairs = small_gemma(), some_pairs(LENGTHS)
    s = by_sequences(model, pairs).double()
    loss, margin = simpo_loss(*s.T), s[:, 0] - s[:, 1]
    m = evaluate(model, pairs, batch_size=3)
    assert m["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert m["loss_se"] == pytest.approx(loss.std().item() / len(pairs) ** .5, rel=1e-4)
    assert m["accuracy"] == (margin > 0).double().mean().item() and m["l0"] == m["l1"] == 0
    assert m["margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert m["chosen"] == pytest.approx(s[:, 0].mean().item(), rel=1e-5)


def test_what_an_objective_sees():
    """Sums, means and lengths under the policy and under the base model, against the book, in evaluation too."""
    model, pairs, seen = small_gemma(dtype=torch.float64), some_pairs(LENGTHS), []
    sae = small_sae(model)
    policy = Steering(sae, lively_adapter(sae))

    def objective(chosen, rejected):
        seen.append((chosen, rejected))
        return chosen.sum - rejected.base_sum
    m = evaluate(model, pairs, policy, objective=objective, batch_size=len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: simpo.tokens(pairs[i]))
    pairs = [pairs[i] for i in order]
    now, before = by_sequences(model, pairs, policy), by_sequences(model, pairs)
    for side, answer in enumerate(seen[0]):
        length = torch.tensor([float(len((p.chosen, p.rejected)[side])) for p in pairs])
        assert torch.equal(answer.length, length.double())
        assert off(answer.mean, now[:, side]) < 1e-12 and off(answer.base_mean, before[:, side]) < 1e-12
        assert off(answer.sum, now[:, side] * length) < 1e-12
        assert off(answer.base_sum, before[:, side] * length) < 1e-12
    assert m["loss"] == pytest.approx((seen[0][0].sum - seen[0][1].base_sum).mean().item())


# ---- from text -----------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Which pet?", "chosen": "It is a cat.", "rejected": "It is a dog.", "at": "line 1"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny" / "model")


def test_truncation(tokenizer):
    """From the prompt's left, <bos> and one token stay; then the answers keep their first tokens. Cut and dropped are
    counted."""
    (full,), count = encode_pairs(tokenizer, [GOOD])
    n, longest = len(full.prompt), max(len(full.chosen), len(full.rejected))
    assert count == {"cut": 0, "dropped": 0} and encode_pairs(tokenizer, [GOOD], n + longest)[0] == [full]
    (cut,), count = encode_pairs(tokenizer, [GOOD], n + longest - 3)
    assert count["cut"] == 1 and cut.prompt == full.prompt[:1] + full.prompt[4:] and cut.chosen == full.chosen
    (cut,), _ = encode_pairs(tokenizer, [{**GOOD, "chosen": "Zebra."}], 2 + 4)
    assert cut.prompt == (full.prompt[0], full.prompt[-1]) and len(cut.chosen) == len(cut.rejected) == 4
    none, count = encode_pairs(tokenizer, [GOOD], 5)                 # "It is a" is all that is left of both
    assert none == [] and count == {"cut": 1, "dropped": 1}


def test_truncation_at_random(tokenizer):
    g, bos = torch.Generator().manual_seed(1), tokenizer.token_to_id("<bos>")
    for _ in range(200):
        n, c, r, limit = (int(torch.randint(low, 40, (1,), generator=g)) for low in (1, 1, 1, 3))
        record = {"prompt": "a" * n, "chosen": "b" * c, "rejected": "c" * r, "at": "x"}
        (pair,), _ = encode_pairs(tokenizer, [record], limit)
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= limit
        assert len(pair.prompt) >= 2 and pair.chosen and pair.rejected
        assert pair.prompt.count(bos) == 1 and pair.prompt[0] == bos


def test_an_empty_answer_is_refused():
    with pytest.raises(UserError):
        collate([Pair((2, 5), (6,), ())])


def test_config_of_these_tests_hits_every_branch():
    c = CONFIG
    assert c["hidden_size"] ** .5 % 1 and c["num_attention_heads"] * c["head_dim"] != c["hidden_size"]
    assert c["num_key_value_heads"] < c["num_attention_heads"]
    assert max(p + max(c, r) for p, c, r in LENGTHS) > 3 * CONFIG["sliding_window"]
    assert nnf.softplus(torch.tensor(5.0)).item() == pytest.approx(5.0067, abs=1e-4)
