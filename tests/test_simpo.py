"""Rows against separate sequences, the chunked head against a dense one, the loss by hand, data that is wrong."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import simpo
from common import CONFIG, ROOT, mutant, off, relative, small_gemma, small_sae, some_pairs
from fsrl import Adapter, Steering
from gemma import UserError, load_tokenizer
from simpo import Pair, collate, encode_pairs, evaluate, read_pairs, response_logps, simpo_loss, steered_logps, token_logps

# (prompt, chosen, rejected) lengths; the window is 6: one-token prompts and answers, and lengths past the window
LENGTHS = [(1, 1, 1), (1, 9, 2), (7, 1, 13), (9, 8, 8), (3, 2, 1), (15, 4, 9), (2, 20, 3)]


def separate(model, pair, adapter=None, sae=None):
    """s(chosen), s(rejected) from two plain sequences, dense logits, by the book; additive steering of all but BOS."""
    out = []
    for answer in (pair.chosen, pair.rejected):
        ids = torch.tensor([pair.prompt + answer])
        h = model.embed(ids)
        n = len(model.layers)
        if adapter is None:
            h = model.blocks(h, 0, n)
        else:
            h = model.blocks(h, 0, sae.layer + 1)
            v = adapter(h)
            v = torch.cat([torch.zeros_like(v[:, :1]), v[:, 1:]], 1)
            h = model.blocks(h + v @ sae.W_dec, sae.layer + 1, n)
        logp = model.logits(model.norm(h)).log_softmax(-1)[0]
        at = torch.arange(len(pair.prompt) - 1, len(pair.prompt) + len(answer) - 1)
        out.append(logp[at, torch.tensor(answer)].mean())
    return out


def lively_adapter(sae, activation="soft", seed=3):
    adapter = Adapter(sae.d_in, sae.d_sae, activation, init=0.05).to(sae.W_dec.dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.adapter_linear.bias.copy_(torch.randn(sae.d_sae, generator=g) * .2)
    return adapter


@pytest.mark.parametrize("module", [simpo, None])
def test_rows_are_separate_sequences(module):
    """Real module: equal to 1e-5. A mask that lets the answers see each other is noticed."""
    broken = module is None
    module = module or mutant("simpo", ("((k == 0) | (k == q)) & (k >= 0) & earlier", "(k >= 0) & earlier"))
    model, pairs = small_gemma(), some_pairs(LENGTHS)
    got = torch.stack(module.response_logps(model, module.collate(pairs)), 1)
    want = torch.stack([torch.stack(separate(model, p)) for p in pairs])
    assert (off(got, want) < 1e-5) is not broken


@pytest.mark.parametrize("old, new", [
    ("first = start + len(tokens), n if side else 0", "first = start + len(tokens), start"),             # positions that do not restart
    ("read += [b * T + n - 1] + [b * T + t for t in range(start, stop - 1)]", "read += [b * T + t for t in range(start - 1, stop - 1)]"),
    ("(total / batch.lengths)", "total"),
])
def test_rows_notice(old, new):
    broken = mutant("simpo", (old, new))
    model, pairs = small_gemma(), some_pairs(LENGTHS)
    got = torch.stack(broken.response_logps(model, broken.collate(pairs)), 1)
    assert off(got, torch.stack([torch.stack(separate(model, p)) for p in pairs])) > 1e-3


def test_rows_against_transformers():
    pytest.importorskip("transformers", reason="needs requirements-extra.txt")
    from golden import oracle
    model, pairs = small_gemma(4), some_pairs(LENGTHS, seed=4)
    theirs, want = oracle(model), []
    with torch.no_grad():
        for p in pairs:
            for answer in (p.chosen, p.rejected):
                logp = theirs(torch.tensor([p.prompt + answer])).logits.log_softmax(-1)[0]
                at = torch.arange(len(p.prompt) - 1, len(p.prompt) + len(answer) - 1)
                want.append(logp[at, torch.tensor(answer)].mean())
    got = torch.stack(response_logps(model, collate(pairs)), 1)
    assert off(got, torch.stack(want).view(-1, 2)) < 1e-5


def gradients(adapter, loss):
    adapter.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in adapter.parameters()])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_adapter_gradients(dtype, tolerance):
    """Rows, chunked head and custom backward against autograd through separate sequences and dense logits."""
    model, pairs = small_gemma(5, dtype), some_pairs(LENGTHS, seed=5)
    sae = small_sae(model)
    adapter = lively_adapter(sae)
    chosen, rejected, _, _ = steered_logps(model, collate(pairs), Steering(sae, adapter))
    got = gradients(adapter, simpo_loss(chosen, rejected, 2.0).mean())
    s = [separate(model, p, adapter, sae) for p in pairs]
    want = gradients(adapter, torch.stack([simpo_loss(c, r, 2.0) for c, r in s]).mean())
    assert want.norm() > 0.01 and relative(got, want) < tolerance
    assert all(p.grad is None for p in (*model.parameters(), *sae.parameters()))
    # the broken variant: a head whose gradient forgets the slope of the soft-cap
    broken = mutant("simpo", ("((rest * (1 - y * y))[:, None] * own - pull)", "(rest[:, None] * own - pull)"))
    chosen, rejected, _, _ = broken.steered_logps(model, broken.collate(pairs), Steering(sae, adapter))
    assert relative(gradients(adapter, simpo_loss(chosen, rejected, 2.0).mean()), want) > 10 * tolerance


def test_independent_of_padding_order_and_accumulation():
    """8 x 1 = 1 x 8, loss and penalty included; more padding and another order change nothing."""
    model, pairs = small_gemma(6, torch.float64), some_pairs(LENGTHS + [(4, 4, 4)], seed=6)
    sae = small_sae(model)
    adapter = lively_adapter(sae)
    steering = Steering(sae, adapter)

    def gradient(groups):
        total = 0
        for group in groups:
            chosen, rejected, _, l1 = steered_logps(model, collate(group), steering)
            total = total + (simpo_loss(chosen, rejected) + 0.1 * l1).sum() / len(pairs)
        return gradients(adapter, total)
    at_once = gradient([pairs])
    assert relative(gradient([[p] for p in pairs]), at_once) < 1e-12
    assert relative(gradient([pairs[::-1]]), at_once) < 1e-12
    assert relative(gradient([pairs[:3], pairs[3:]]), at_once) < 1e-12
    longer = collate(pairs + some_pairs([(30, 30, 30)]))
    s = torch.stack(steered_logps(model, longer, steering))[:, :len(pairs)]
    assert off(s, torch.stack(steered_logps(model, collate(pairs), steering))) < 1e-12


def test_kept_prefix_and_edits_give_the_same():
    model, pairs = small_gemma(7), some_pairs(LENGTHS, seed=7)
    sae = small_sae(model)
    for fusion in ("additive", "relu"):
        for positions in ("text", "response", "all"):
            steering, batch = Steering(sae, lively_adapter(sae), fusion=fusion, positions=positions), collate(pairs)
            chosen, rejected, _, _ = steered_logps(model, batch, steering)
            again = steered_logps(model, batch, steering, simpo.prefix(model, batch, sae.layer))
            edited = response_logps(model, batch, steering.edits())
            resumed = response_logps(model, batch, steering.edits(), h=model.embed(batch.ids), start=0)
            for other in (again[:2], edited, resumed):
                assert off(torch.stack(other), torch.stack((chosen, rejected))) < 1e-6


def test_where():
    batch = collate(some_pairs([(3, 2, 2), (1, 1, 3)]))
    show = lambda kind: ["".join(".x"[int(w)] for w in row) for row in batch.where(kind)]      # noqa: E731
    assert show("text") == [".xxxxxx", ".xxxx.."]          # row: b p p c c r r; the second: b c r r r - -
    assert show("all") == ["xxxxxxx", "xxxxx.."]
    assert show("response") == ["..xx.x.", "..xx..."]      # a BOS that predicts stays untouched


# ---- the head ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("V, budget", [(97, None), (3000, 300), (3000, 10**6)])
def test_chunked_head(V, budget):
    """Value and gradient against dense float64; in float32 and float64, any chunk size."""
    g = torch.Generator().manual_seed(8)
    x, W = torch.randn(50, 24, generator=g, dtype=torch.float64) * 2, torch.randn(V, 24, generator=g, dtype=torch.float64) * 2
    target, weight = torch.randint(V, (50,), generator=g), torch.randn(50, generator=g, dtype=torch.float64)
    x.requires_grad_()
    logits = 30 * torch.tanh(x @ W.T / 30)
    assert (x @ W.T).abs().max() > 30
    want = logits.log_softmax(-1)[torch.arange(50), target]
    slope, = torch.autograd.grad((want * weight).sum(), x)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        y = x.detach().to(dtype).requires_grad_()
        got = token_logps(y, W.to(dtype), target, 30.0, budget)
        (got * weight.to(dtype)).sum().backward()
        assert got.dtype == dtype and off(got.double(), want) < tolerance and relative(y.grad.double(), slope) < tolerance * 10


def test_head_of_half_precision_sums_in_float32():
    g = torch.Generator().manual_seed(9)
    x, W, target = torch.randn(9, 24, generator=g).bfloat16(), torch.randn(500, 24, generator=g).bfloat16(), torch.randint(500, (9,), generator=g)
    got = token_logps(x, W, target, 30.0)
    want = (30 * torch.tanh(x.double() @ W.double().T / 30)).log_softmax(-1)[torch.arange(9), target]
    assert got.dtype == torch.float32 and off(got.double(), want) < 1e-5


@pytest.mark.parametrize("module", ["real", "cancelling"])
def test_head_gradient_of_confident_tokens_in_bf16(module):
    """p of the target above .99: the gradient is a small rest, which is lost where the target's own term is summed and then taken off."""
    m = simpo if module == "real" else mutant("simpo", ("e[here, at[here]] = 0.0", "pass"), ("rest, total = total, total + (cap * (y - 1)).exp()", "rest = total"))
    g = torch.Generator().manual_seed(2)
    W, target = torch.randn(2000, 64, generator=g).bfloat16(), torch.arange(40)
    x = (W[:40].float() * 0.35 + 0.02 * torch.randn(40, 64, generator=g)).bfloat16()
    def slopes(x, head):
        x = x.clone().requires_grad_()
        p = head(x)
        p.sum().backward()
        return p.detach(), x.grad.double()
    logp, want = slopes(x.double(), lambda x: (30 * torch.tanh(x @ W.double().T / 30)).log_softmax(-1)[torch.arange(40), target])
    assert logp.exp().median() > 0.99
    _, got = slopes(x, lambda x: m.token_logps(x, W, target, 30.0))
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert bool(errors.median() < 0.01) is (module == "real")


# ---- the loss --------------------------------------------------------------------------------------------------------------

def test_simpo_by_hand():
    zero = torch.zeros(1)
    assert simpo_loss(zero, zero, 10.0, 0.5).item() == pytest.approx(5.0067, abs=5e-5)
    assert simpo_loss(zero, zero, 2.0, 0.5).item() == pytest.approx(1.3133, abs=5e-5)
    a, b = torch.tensor([-0.5]), torch.tensor([-1.5])
    z = 2.0 * (1.0 - 0.5)
    assert simpo_loss(a, b, 2.0, 0.5).item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-6)
    assert simpo_loss(a, b, 2.0, 0.5, kind="hinge").item() == pytest.approx(max(0, 1 - z))
    want = 0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z))
    assert simpo_loss(a, b, 2.0, 0.5, label_smoothing=0.1).item() == pytest.approx(want, rel=1e-6)
    assert simpo_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    with pytest.raises(UserError):
        simpo_loss(a, b, kind="dpo")


def test_mean_and_not_sum():
    """The length normalisation, on answers worked out by hand: a model whose embedding is 0 gives log(1/V) a token."""
    model = small_gemma()
    model.embed_tokens.weight.data.zero_()
    chosen, rejected = response_logps(model, collate(some_pairs([(3, 2, 9)])))
    assert chosen.item() == pytest.approx(-math.log(97), rel=1e-6) and rejected.item() == pytest.approx(-math.log(97), rel=1e-6)


def test_evaluate():
    model, pairs = small_gemma(), some_pairs(LENGTHS)
    m = evaluate(model, pairs, batch_size=3)
    s = torch.stack([torch.stack(separate(model, p)) for p in pairs]).double()
    loss = simpo_loss(s[:, 0], s[:, 1])
    assert m["loss"] == pytest.approx(loss.mean().item(), rel=1e-5) and m["loss_se"] == pytest.approx(loss.std().item() / len(pairs) ** .5, rel=1e-4)
    assert m["accuracy"] == (s[:, 0] > s[:, 1]).double().mean().item() and m["margin"] == pytest.approx((s[:, 0] - s[:, 1]).mean().item(), rel=1e-4)
    assert m["l0"] == m["l1"] == 0


# ---- data ------------------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Which pet?", "chosen": "It is a cat.", "rejected": "It is a dog."}


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


def test_layouts(tmp_path):
    chat = {"prompt": "Which pet?", **{k: [{"role": "user", "content": "Which pet?"}, {"role": "assistant", "content": GOOD[k]}] for k in ("chosen", "rejected")}}
    a, b = read_pairs(write(tmp_path / "train.jsonl", GOOD, "", chat))
    assert a["chosen"] == b["chosen"] and a["at"].endswith("line 1") and b["at"].endswith("line 3")
    assert b["prompt"] == [{"role": "user", "content": "Which pet?"}]
    assert len(read_pairs(tmp_path, "train", limit=1)) == 1


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs requirements-extra.txt")
    import pyarrow.parquet
    rows = [{**GOOD, "chosen": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}],
             "rejected": [{"content": "q", "role": "user"}, {"content": "b", "role": "assistant"}]}] * 3
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
    assert [r["rejected"] for r in read_pairs(tmp_path)] == ["b"] * 3
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="not a readable parquet"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("line, message", [
    ({"prompt": "x"}, "line 2: chosen is missing"), ({**GOOD, "rejected": " "}, "line 2: rejected is empty"), ('{"prompt": ', "line 2: not valid JSON"),
    ({**GOOD, "prompt": [1]}, "line 2: prompt holds a message"), ({**GOOD, "prompt": [{"role": "user"}]}, "line 2: prompt holds a message"),
    ({**GOOD, "chosen": [{"content": "x"}, {"role": "assistant", "content": "y"}]}, "line 2: chosen holds a message"), ({**GOOD, "chosen": "\ud800"}, "line 2: chosen holds a lone"),
    ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "y"}], "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "z"}]}, "different prompts"),
    ({**GOOD, "prompt": ""}, "line 2: prompt is missing"), ([1], "line 2: a pair is an object"), ({**GOOD, "chosen": [{"role": "user", "content": "x"}]}, "line 2: chosen is a list"),
])
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path / "p.jsonl", GOOD, line))


def test_empty_and_absent(tmp_path):
    for source, message in ((write(tmp_path / "e.jsonl", ""), "no pairs"), (tmp_path, "no pairs of the split 'train'"), (tmp_path / "no", "no such folder")):
        with pytest.raises(UserError, match=message):
            read_pairs(source)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny" / "model")


def test_truncation(tokenizer):
    """From the prompt's left, <bos> and one token stay; then the answers keep their first tokens. Cut and dropped are counted."""
    records = [{**GOOD, "at": "1"}]
    (full,), count = encode_pairs(tokenizer, records)
    n, longest = len(full.prompt), max(len(full.chosen), len(full.rejected))
    assert count == {"cut": 0, "dropped": 0} and encode_pairs(tokenizer, records, n + longest)[0] == [full]
    (cut,), count = encode_pairs(tokenizer, records, n + longest - 3)
    assert count["cut"] == 1 and cut.prompt == full.prompt[:1] + full.prompt[4:] and cut.chosen == full.chosen
    (cut,), _ = encode_pairs(tokenizer, [{**GOOD, "chosen": "Zebra.", "at": "1"}], 2 + 4)
    assert len(cut.prompt) == 2 and cut.prompt == (full.prompt[0], full.prompt[-1]) and len(cut.chosen) == len(cut.rejected) == 4
    none, count = encode_pairs(tokenizer, records, 5)                 # "It is a" is all that is left of both
    assert none == [] and count == {"cut": 1, "dropped": 1}
    with pytest.raises(UserError):
        encode_pairs(tokenizer, records, 2)


def test_truncation_at_random(tokenizer):
    g = torch.Generator().manual_seed(1)
    for _ in range(200):
        n, c, r, limit = (int(torch.randint(low, 40, (1,), generator=g)) for low in (1, 1, 1, 3))
        record = {"prompt": "a" * n, "chosen": "b" * c, "rejected": "c" * r, "at": "x"}
        (pair,), _ = encode_pairs(tokenizer, [record], limit)
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= max(limit, 3) and len(pair.prompt) >= 2 and pair.chosen and pair.rejected
        assert pair.prompt.count(tokenizer.token_to_id("<bos>")) == 1 == pair.prompt.index(tokenizer.token_to_id("<bos>")) + 1


def test_an_empty_answer_is_refused():
    with pytest.raises(UserError):
        collate([Pair((2, 5), (6,), ())])


def test_config_of_these_tests_hits_every_branch():
    assert CONFIG["hidden_size"] ** .5 % 1 and CONFIG["num_attention_heads"] * CONFIG["head_dim"] != CONFIG["hidden_size"]
    assert CONFIG["num_key_value_heads"] < CONFIG["num_attention_heads"] and max(p + max(c, r) for p, c, r in LENGTHS) > 3 * CONFIG["sliding_window"]
    assert F.softplus(torch.tensor(5.0)).item() == pytest.approx(5.0067, abs=1e-4)
