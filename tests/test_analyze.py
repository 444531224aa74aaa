"""analyze.py: statistics worked out by hand, ledgers that add up, masks that are exact, intervals that cover, and the command."""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import fsrl
import labels as feature_labels
import simpo
from analyze import Material
from common import mutant, small_gemma, small_sae, some_pairs
from gemma import UserError
from sae import JumpReLUSAE

WORDS = SimpleNamespace(decode=lambda ids, **_: "".join(f" w{i}" if i % 7 else "**" for i in ids), token_to_id=lambda s: None, id_to_token=str)


# ---- statistics ----------------------------------------------------------------------------------------------------------

def test_gini_and_usage_by_hand():
    assert analyze.gini([1, 1, 1, 1]) == 0 and analyze.gini([0, 0, 0, 5]) == .75 and math.isnan(analyze.gini([]))
    # 8, 4, 2, 1 of 16 positions and four features that are never used
    u = analyze.usage_statistics([4, 0, 8, 0, 1, 0, 2, 0], 16)
    assert u["used"] == 4 and u["events"] == 15 and u["curve"] == [.5, .25, .125, .0625] and u["rank"] == [1, 2, 3, 4]
    assert u["slope"] == pytest.approx(-math.log10(2)) and u["top1"] == u["top10"] == 8 / 15
    # Σ (2i - n - 1) x_i / (n Σ x) with x = 1 2 4 8: (-3 - 2 + 4 + 24) / 60
    assert u["gini_used"] == pytest.approx(23 / 60) and u["gini_all"] > u["gini_used"]
    assert math.isnan(analyze.usage_statistics([0, 0], 5)["slope"])


def test_directions_by_hand():
    value, vector, d = analyze.directions(torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0])))
    assert value[:2].tolist() == [3, 1] and abs(vector[1, 0]) == 1 and d == {"participation": pytest.approx(1.6), "d90": 2, "d95": 2}
    assert analyze.directions(torch.eye(10, dtype=torch.float64))[2] == {"participation": pytest.approx(10), "d90": 9, "d95": 10}
    assert analyze.directions(torch.zeros(3, 3))[2]["participation"] == 0


def test_ratio_by_hand():
    r = analyze.ratio([1.0] * 12, [2.0] * 12)
    assert r == {"value": .5, "low": .5, "high": .5, "se": 0}
    with pytest.raises(UserError, match="9 prompts are too few"):
        analyze.ratio(np.arange(50.0), clusters=np.arange(50) % 9)
    assert analyze.ratio([1.0] * 5 + [0.0] * 5)["value"] == .5 and analyze.apart({"low": .1, "high": 2}) and not analyze.apart({"low": -.1, "high": 2})


@pytest.mark.parametrize("clustered", [True, False])
def test_intervals_cover_at_their_rate(clustered):
    """Clusters of 8 alike: intervals over clusters hold the true mean 95 times in 100; over single entries, as the paper has it, far less often."""
    rng, inside, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        x = np.repeat(rng.normal(size=40), 8) + .1 * rng.normal(size=320) + 1
        r = analyze.ratio(x, clusters=np.repeat(np.arange(40), 8) if clustered else None, samples=400)
        inside += r["low"] <= 1 <= r["high"]
    assert (.90 <= inside / trials <= .98) if clustered else inside / trials < .7


def test_shares_cover_too():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(300):
        gain = 1 + rng.normal(size=60)
        part = .3 * gain + .2 * rng.normal(size=60)
        r = analyze.ratio(part, gain, samples=400)
        inside += r["low"] <= .3 <= r["high"]
    assert .90 <= inside / 300 <= .98


# ---- three features on paper -----------------------------------------------------------------------------------------------

class Paper(torch.nn.Module):
    """A model of one number: block 1 and the norm do nothing, so log p of token 1 is log σ(x) and of token 0 log σ(-x), x the state."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, final_logit_softcapping=300.0, pad_token_id=0, vocab_size=2, bos_token_id=0)
        self.embed_tokens = torch.nn.Embedding(2, 1, _weight=torch.tensor([[0.0], [1.0]], dtype=torch.float64)).requires_grad_(False)
        self.norm = torch.nn.Identity()
        self.device = torch.device("cpu")

    def embed(self, ids):
        return torch.zeros(*ids.shape, 1, dtype=torch.float64)

    def blocks(self, h, start, stop, **_):
        return h


class Fixed(torch.nn.Module):
    """Moves the three features by the same amounts everywhere."""

    def forward(self, x):
        return torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64).expand(len(x), 3)


def paper(groups=None):
    """d = 1, 2, -1 and v = 1, 1, -1: the state goes from 0 to 1 + 2 + 1 = 4 at every steered token. Chosen: tokens 1 1, rejected: 0 0."""
    d = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    sae = JumpReLUSAE(torch.zeros(1, 3), torch.tensor([1.0, -1.0, 1.0]), d, torch.zeros(1), torch.zeros(3), layer=0, source="paper", dtype=torch.float64)
    pairs = [simpo.Pair((0, *([1] * (i + 1))), (1, 1), (0, 0), f"question {i}") for i in range(12)]
    run = fsrl.Run(Paper(), WORDS, sae, fsrl.Steering(sae, Fixed()), {}, "none")
    m = Material(run, pairs, {}, None, batch_size=5, progress=False)
    m.labels, m.groups = None, None
    if groups:
        m.groups = {name: torch.tensor([i in groups[name] for i in range(3)]) for name in ("style", "alignment", "known")}
    return m


ARGS = SimpleNamespace(steps=4, ledger_pairs=12, draw_pairs=12, dashboards=3, draws=9, probe_answers=2, answers=2, max_new_tokens=2, answer_batch=4, adapter=None)


def test_ledger_and_masks_on_paper():
    m = paper({"style": [1], "alignment": [0], "known": [0, 1, 2]})
    sigma = lambda x: 1 / (1 + math.exp(-x))      # noqa: E731
    gain = math.log(sigma(4)) - math.log(sigma(-4))                       # = 4: log-odds are the state
    assert gain == pytest.approx(4) and np.allclose(m.base, 0) and np.allclose(m.full, 4, rtol=1e-3)     # the soft-cap of 300 is not quite nothing
    out = analyze.ledger(m, ARGS)
    assert {x["feature"]: round(x["nats"], 2) for x in out["features"]} == {0: 1, 1: 2, 2: 1}          # v_i d_i of 4, along one line
    assert out["groups"]["style"]["total"]["value"] == pytest.approx(2, rel=1e-3) and out["groups"]["style"]["total"]["share"]["value"] == pytest.approx(.5, rel=1e-3)
    assert {x["feature"]: (round(x["first_in"], 2), round(x["last_out"], 2)) for x in out["features"]} == {0: (1, 1), 1: (2, 2), 2: (1, 1)}
    assert out["completeness"] < 1e-4 and out["tokens_error"] < 1e-12
    keep = torch.tensor([1.0, 0.0, 1.0])
    assert np.allclose(m.margins(keep), 2, rtol=1e-3) and np.allclose(m.margins(1 - keep), 2, rtol=1e-3)
    assert m.mass().tolist() == pytest.approx([x * m.events("v")[0] for x in (1, 2, 1)])


def test_rates_on_paper():
    """At every token three features are steered and two of the SAE fire (0 and 2); feature 2 cannot be judged."""
    m = paper({"style": [1], "alignment": [0], "known": [0, 1]})
    out = analyze.rates(m, ARGS)
    for region in analyze.REGIONS:
        style, alignment = (out["regions"][region][label] for label in feature_labels.LABELS)
        assert style["steering"]["value"] == .5 and style["sae"]["value"] == 0 and alignment["sae"]["value"] == 1 and math.isnan(style["p"])      # from nothing to something
        assert alignment["steering"]["value"] == .5 and alignment["change"]["value"] == pytest.approx(-.5)
    assert out["theory"] == {"style": .5, "alignment": .5} and out["mass"]["style"] == pytest.approx(2 / 3)
    assert analyze.usage(m, ARGS)["regions"]["chosen"]["steering"]["l0"]["value"] == 3


def test_rates_compare_the_same_tokens():
    """Feature 1 fires with 0 where the policy steers; elsewhere 0 fires alone. Averaged over tokens of its own, the SAE's share of 1 would be far below 1/2."""
    m = paper({"style": [1], "alignment": [0], "known": [0, 1, 2]})
    for r in m.rows:
        v, f = torch.zeros(len(r.row), 3, dtype=torch.float64), torch.zeros(len(r.row), 3, dtype=torch.float64)
        f[:, 0] = 1
        last = r.branch == 1
        v[last, 1], f[last, 1] = 1.0, 1.0
        r.v, r.f = analyze.Sparse.of(v), analyze.Sparse.of(f)
    out = analyze.rates(m, ARGS)
    assert set(out["regions"]) == {"chosen"} and out["regions"]["chosen"]["style"]["sae"]["value"] == .5
    assert out["regions"]["chosen"]["style"]["change"]["value"] == pytest.approx(1) and out["regions"]["chosen"]["alignment"]["change"]["value"] == pytest.approx(-1)


def test_a_policy_that_does_nothing_has_no_shares(monkeypatch):
    m = paper({"style": [1], "alignment": [0], "known": [0, 1, 2]})
    m.steering.strength = 0.0
    m = Material(m.run, m.pairs, {}, None, batch_size=5, progress=False)
    m.labels, m.groups = None, {"style": torch.tensor([False, True, False]), "alignment": torch.tensor([True, False, False]), "known": torch.ones(3, dtype=torch.bool)}
    monkeypatch.setattr(analyze, "health", lambda *a, **k: ({"parse": 1.0}, []))
    out = analyze.causes(m, ARGS)
    assert out["sets"] == {} and "no share" in out["silent"] and out["gain"]["value"] == 0
    ledger = analyze.ledger(m, ARGS)
    assert ledger["chance"] == {} and "share" not in ledger["groups"]["style"]["total"] and ledger["features"] == []
    out = analyze.geometry(m, ARGS)
    assert analyze.rates(m, ARGS)["regions"] == {} and out["participation"] == 0 and math.isnan(out["mean_only"]["gain"])


def test_geometry_on_paper():
    out = analyze.geometry(paper(), ARGS)
    assert out["constant"] == pytest.approx(1) and out["participation"] == pytest.approx(1) and out["size"] == pytest.approx(4)
    assert out["mean_only"]["gain"] == pytest.approx(1) and out["without_mean"]["gain"] == pytest.approx(0, abs=1e-9)
    assert out["directions"][-1]["top"]["gain"] == pytest.approx(1)


# ---- a real model: small, random -------------------------------------------------------------------------------------------

def small(batch_size=4, permute=None, fusion="additive", top_k=None, dtype=torch.float64, pairs=None, module=analyze):
    model = small_gemma(dtype=dtype)
    sae = small_sae(model)
    torch.manual_seed(0)
    adapter = fsrl.Adapter(sae.d_in, sae.d_sae, "soft", init=.02).to(dtype)
    if permute is not None:
        sae = JumpReLUSAE(sae.W_enc[:, permute], sae.b_enc[permute], sae.W_dec[permute], sae.b_dec, sae.threshold[permute], layer=sae.layer, source="permuted", dtype=dtype)
        with torch.no_grad():
            adapter.adapter_linear.weight.copy_(adapter.adapter_linear.weight[permute].clone())
            adapter.soft_threshold.copy_(adapter.soft_threshold[permute].clone())
    pairs = pairs or some_pairs([(3 + i % 4, 4 + i % 5, 2 + i % 6) for i in range(14)])
    run = fsrl.Run(model, WORDS, sae, fsrl.Steering(sae, adapter, fusion=fusion, top_k=top_k), {}, "none")
    m = module.Material(run, pairs, {}, None, batch_size=batch_size, progress=False)
    style = torch.arange(32) % 3 == 0
    m.labels, m.groups = None, {"style": style, "alignment": torch.arange(32) % 3 == 1, "known": torch.arange(32) < 30}
    if permute is not None:
        m.groups = {name: x[permute] for name, x in m.groups.items()}
    return m


@pytest.mark.parametrize("fusion, top_k", [("additive", None), ("relu", None), ("additive", 5)])
def test_margins_are_those_of_the_policy(fusion, top_k):
    m = small(fusion=fusion, top_k=top_k)
    assert abs(np.mean(m.full) - simpo.evaluate(m.model, m.pairs, m.steering)["margin"]) < 1e-9
    assert abs(np.mean(m.full - m.base)) > 1e-3


def test_masking_everything_is_the_base_model_bit_for_bit():
    m = small(dtype=torch.float32)
    none = torch.zeros(32)
    plain = np.concatenate([[*(simpo.response_logps(m.model, r.batch)[0] - simpo.response_logps(m.model, r.batch)[1]).double().tolist()] for r in m.rows])
    assert np.array_equal(m.base, m.margins(none)) and np.array_equal(m.base[np.concatenate([r.index for r in m.rows])], plain)
    edits = analyze.Kept(m.steering, none).edits()
    for r in m.rows:
        assert all(torch.equal(a, b) for a, b in zip(simpo.response_logps(m.model, r.batch), simpo.response_logps(m.model, r.batch, edits)))
    keep = (torch.arange(32) % 2).float()
    masked = fsrl.Steering(m.sae, m.steering.adapter, masked=[i for i in range(32) if not keep[i]])
    kept = analyze.Kept(m.steering, keep)
    x = torch.randn(3, 5, 24)
    where = torch.ones(3, 5, dtype=torch.bool)
    assert torch.equal(masked(x, where), kept(x, where))


def test_both_ledgers_sum_to_the_gain():
    m = small(batch_size=14)
    out = analyze.ledger(m, SimpleNamespace(**{**vars(ARGS), "steps": 24}))      # random weights bend the path far more than trained ones
    gain = np.mean(m.full - m.base)
    assert out["gain"]["value"] == pytest.approx(gain)
    assert sum(x["value"] for x in out["tokens"].values()) == pytest.approx(gain, abs=1e-12) and out["tokens_error"] < 1e-9
    assert sum(x["total"]["value"] for x in out["groups"].values()) == pytest.approx(gain, rel=1e-2) and out["completeness"] < .01
    assert sum(x["value"] for x in out["regions"].values()) == pytest.approx(gain, rel=1e-2)
    assert np.allclose(m.by_feature.sum(1), (m.full - m.base)[m.by_feature_index], rtol=.02, atol=1e-3)


@pytest.mark.parametrize("change", [
    ("F.embedding_bag(v.feature, W, v.start, mode=\"sum\", per_sample_weights=weight.to(W.dtype))", "F.embedding_bag(v.feature, W, v.start, mode=\"mean\") if len(v.start) else W"),
    ("for t, w in zip((node + 1) / 2, weight / 2):", "for t, w in zip((node + 1) / 2, weight):")])
def test_broken_ledgers_do_not(change):
    broken = mutant("analyze", change)
    m = small(batch_size=14, module=broken)
    if "mean" in change[1]:
        assert abs(np.mean(m.full) - simpo.evaluate(m.model, m.pairs, m.steering)["margin"]) > 1e-6
    else:
        assert broken.ledger(m, ARGS)["completeness"] > .5


def test_permuting_features_permutes_the_results():
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    a, b = (analyze.ledger(small(batch_size=14, permute=p), ARGS) for p in (None, order))
    first, second = ({x["feature"]: x["nats"] for x in out["features"]} for out in (a, b))
    assert {order[i].item(): pytest.approx(v, abs=1e-9) for i, v in second.items()} == first
    m, n = small(), small(permute=order)
    ra, rb = analyze.rates(m, ARGS), analyze.rates(n, ARGS)
    for region in analyze.REGIONS:
        assert ra["regions"][region]["style"]["change"]["value"] == pytest.approx(rb["regions"][region]["style"]["change"]["value"])
    assert analyze.usage(m, ARGS)["regions"] == analyze.usage(n, ARGS)["regions"]
    assert np.allclose(m.mass()[order.numpy()], n.mass())


def test_padding_and_batch_size_change_nothing():
    a, b = small(batch_size=3), small(batch_size=14)
    assert np.allclose(a.full, b.full, atol=1e-10) and np.allclose(a.mass(), b.mass()) and np.array_equal(a.events("f"), b.events("f"))
    for section in (analyze.usage, analyze.rates, analyze.geometry):
        one, other = (json.dumps(analyze.plain(rounded(section(m, ARGS)))) for m in (a, b))
        assert one == other
    one, other = (analyze.ledger(m, ARGS) for m in (a, b))
    assert one["groups"]["style"]["total"]["value"] == pytest.approx(other["groups"]["style"]["total"]["value"], abs=1e-9)


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, (list, tuple)) else round(float(x), 6) + 0.0 if isinstance(x, (float, np.floating)) else x


def test_parts_of_the_pairs():
    m = small(batch_size=4, pairs=some_pairs([(3 + i % 4, 4 + i % 5, 2 + i % 6) for i in range(50)]))
    some = m.some(24)
    index = np.sort(np.concatenate([r.index for r in some]))
    assert len(index) == 24 and np.ptp(np.diff(index)) <= 1                                       # evenly spaced
    part = m.margins(rows=some)
    assert np.allclose(part[index], m.full[index]) and np.isnan(part).sum() == 26
    few = np.full(50, np.nan)
    few[:3] = 1, 2, 3
    assert m.mean(few)["value"] == 2 and math.isnan(m.mean(few)["low"]) and not analyze.apart(m.mean(few)) and math.isnan(m.mean(np.full(50, np.nan))["value"])
    assert analyze.apart({"low": 1, "high": 2}) and not analyze.apart({"low": 1, "high": 2, "facts_low": -1, "facts_high": 3})


def test_matched_sets():
    rng, mass = np.random.default_rng(0), np.concatenate([np.linspace(1, 2, 20), np.linspace(1, 2, 40), [100.0]])
    named, pool = np.arange(20), np.arange(20, 60)
    drawn, match = analyze.matched_set(named, mass, pool, rng)
    assert len(set(drawn)) == 20 and not set(drawn) & set(named) and match > .95
    drawn, match = analyze.matched_set(np.array([60]), mass, pool[:30], rng)                     # nothing is as large: many small ones, and no claim
    assert len(drawn) == 30 and match == pytest.approx(mass[pool[:30]].sum() / 100) and match < .8
    drawn, match = analyze.matched_set(np.array([60]), mass, np.arange(60), rng)
    assert match >= .8 and len(drawn) > 1


# ---- text ------------------------------------------------------------------------------------------------------------------

def test_text_statistics_by_hand():
    t = analyze.text_statistics(["a b c d a b c d", "# One\ntwo é"])
    # 5 + 1 four-grams, abcd twice; 4 + 4 distinct words of 12
    assert t["words"] == 6 and t["repetition"] == 1 / 6 and t["distinct"] == 8 / 12 and t["markdown"] == .5 and t["non_ascii"] == 1 / 26
    assert [analyze.text_statistics([a])["markdown"] for a in ("### Sum", "2. x", "a\n  - b", "`x`", "3 - 2", "#x")] == [1, 1, 1, 0, 0, 0]
    base = {"parse": .98, "repetition": 0.0, "non_ascii": 0.0, "perplexity": 2.0, "words": 10.0}
    assert analyze.alarms(base, base | {"kl": .01}) == []
    assert analyze.alarms(base, base | {"parse": .93}, 20) == [] and len(analyze.alarms(base, base | {"parse": .93}, 1000)) == 1        # one answer of 20 is no news
    assert len(analyze.alarms(base, {"parse": .9, "repetition": .2, "non_ascii": .1, "perplexity": 4.0, "kl": 1.0, "words": 2.0})) == 6


@pytest.mark.parametrize("text, before, expected", [
    ("**", "a ", "markdown"), ("#", "", "heading"), ("#", "see ", "punctuation"), ("-", "One:\n", "list marker"), ("-", "well", "punctuation"), ("1", "", "list marker"),
    (".", "\n1", "list marker"), (".", "So it is", "punctuation"), ("Sure", "", "opener"), ("sure", "I am not quite", "rest"), (" cannot", "I", "refusal"), (" perhaps", "It is", "hedge"),
    ("\n\n", "One.", "punctuation"), ("1984", "", "rest"), ("0", "\n1", "list marker"), ("t", "I can'", "refusal"), ("<end_of_turn>", "x", "end"), (" river", "The", "rest")])
def test_rules(text, before, expected):
    assert analyze.rule(text, before) == expected


def test_shares_of_choices_are_the_chain_rule(lab):
    """Against probabilities written out: the first token of a plain answer."""
    from tiny import measure, world
    q = world.Question("fact", "Kalor", "food", 0)
    text = f"It is {world.RELATIONS['food'][0]}."
    ids = [lab.tokenizer.token_to_id(t) for t in world.pieces(text)] + [lab.tokenizer.token_to_id(world.END)]
    shares = measure.shares_of_choices(lab.tokenizer, q, ids)
    assert [name for name, _, _ in shares[0]] == ["heading", "opener", "bullets", "restate"] and [name for name, _, _ in shares[-1]] == ["filler", "closer", "form"]
    p = torch.rand(576, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p /= p.sum()
    mass = lambda gone: 1 - p[list(gone)].sum()      # noqa: E731
    parts = [(torch.log(p[ids[0]] / mass(before)) if after is None else torch.log(mass(after) / mass(before))).item() for _, before, after in shares[0]]
    assert sum(parts) == pytest.approx(p[ids[0]].log().item())
    starts = {lab.tokenizer.token_to_id("#")}
    assert parts[0] == pytest.approx(math.log(1 - p[list(starts)].sum()))
    assert measure.shares_of_choices(lab.tokenizer, q, ids[:-1])[0] == [("form", (), None)]


# ---- the lab and the command -------------------------------------------------------------------------------------------------

SMALL = ["--limit", "60", "--answers", "12", "--probe-answers", "4", "--max-new-tokens", "8", "--draws", "2", "--draw-pairs", "30", "--ledger-pairs", "30", "--dashboards", "3", "--quiet"]


def test_the_command(lab, capsys, monkeypatch):
    assert analyze.main([str(lab.folder), *SMALL]) == 0
    out = capsys.readouterr().out
    a = json.loads((lab.folder / "analysis.json").read_text(encoding="utf-8"))
    assert set(analyze.SECTIONS) < set(a["sections"]) and (lab.folder / "report.html").stat().st_size > 10_000
    assert a["verdict"]["sentences"][0] in out and "SimPO (β 10, γ/β 0.5) + 5 × NLL" in a["verdict"]["sentences"][0]
    ledger = a["sections"]["ledger"]
    assert ledger["completeness"] < .01 and ledger["tokens_error"] < 1e-4
    assert sum(x["value"] for x in ledger["tokens"].values()) == pytest.approx(ledger["gain"]["value"], abs=1e-6)
    assert a["sections"]["usage"]["seeds"]["runs"] == ["two"]
    for pair in a["sections"]["examples"]:
        moved = sum(t["nats"] for side in ("chosen", "rejected") for t in pair[side])
        assert moved == pytest.approx(pair["steered"] - pair["base"], abs=1e-5)
    one = a["sections"]["causes"]["strength"]
    assert one[0]["strength"] == 0 and one[0]["accuracy"]["value"] == pytest.approx(np.mean([x > 0 for x in bases(lab)]), abs=.05)
    # --only with other options would lose them, and says so
    assert analyze.main([str(lab.folder), *SMALL, "--only", "geometry", "--limit", "50"]) == 2 and "made with --limit 60" in capsys.readouterr().err
    assert json.loads((lab.folder / "analysis.json").read_text(encoding="utf-8")) == a
    # --only keeps the other sections; without matplotlib there are tables, which also is faster
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyze.main([str(lab.folder), *SMALL, "--only", "geometry"]) == 0
    assert json.loads((lab.folder / "analysis.json").read_text(encoding="utf-8"))["sections"]["ledger"] == ledger


def bases(lab):
    pairs, _ = simpo.encode_pairs(lab.tokenizer, simpo.read_held_out("tiny/pairs/style", "test", 60))
    return Material(lab.run, pairs, *simpo.judge_of("tiny/pairs/style"), progress=False).base


def test_without_labels_and_on_any_model(lab, tmp_path, monkeypatch, capsys):
    """No labels: everything that needs none. No judge: rules instead of the grammar."""
    monkeypatch.setattr(feature_labels, "default_path", lambda sae: tmp_path / "none.jsonl")
    monkeypatch.setattr(simpo, "judge_of", lambda source: ({}, None))
    a = analyze.analyze(lab.folder, limit=40, answers=4, probe_answers=4, draws=2, draw_pairs=20, ledger_pairs=20, dashboards=2, max_new_tokens=8, steps=2, batch_size=8, quiet=True)
    with pytest.raises(UserError, match="--only rates needs labels"):
        analyze.analyze(lab.folder, only="rates", limit=40, quiet=True)
    assert "rates" not in a["sections"] and not a["sections"]["causes"]["sets"] and set(a["sections"]["ledger"]["tokens"]) == set(analyze.RULES)
    assert a["sections"]["ledger"]["tokens_error"] < 1e-4 and "parse" not in a["sections"]["behaviour"]["greedy"]["base"]
    (lab.folder / "analysis.json").unlink()


def test_users_mistakes(lab, tmp_path, capsys):
    def said(*argv):
        assert analyze.main([*map(str, argv), "--quiet"]) == 2
        text = capsys.readouterr().err
        assert text.startswith("analyze.py: ") and text.count("\n") == 1
        return text
    (tmp_path / "empty").mkdir()
    assert "is not a finished run" in said(tmp_path / "empty")
    assert "name one run's folder" in said() and "name one run's folder" in said(lab.folder, lab.folder)
    assert "'colour' is no section" in said(lab.folder, "--only", "colour") and "'' is no section" in said(lab.folder, "--only", "")
    assert "take no run" in said(lab.folder, "--make-labels", "rules") and "take no run" in said("--calibrate", lab.folder, "--only", "usage")
    assert "too few for an interval" in said(lab.folder, "--limit", "6")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"index": 0, "labels": [], "description": "", "by": "me", "sae": "0" * 16}) + "\n")
    assert "labels of another SAE" in said(lab.folder, "--labels", other)
    for flag in ("--draws", "--steps", "--answers", "--limit", "--batch-size"):
        assert analyze.main([str(lab.folder), flag, "0"]) == 2 and f"{flag}: 0 is not a whole number above 0" in capsys.readouterr().err
    assert "no such label file" in said(lab.folder, "--labels", tmp_path / "none.jsonl")
    assert not (lab.folder / "analysis.json").exists() or json.loads((lab.folder / "analysis.json").read_text(encoding="utf-8"))


def test_what_was_computed_is_kept(lab, monkeypatch):
    """A section that fails leaves those before it in analysis.json."""
    (lab.folder / "analysis.json").unlink(missing_ok=True)
    def fail(m, args):
        raise KeyboardInterrupt
    monkeypatch.setattr(analyze, "geometry", fail)
    assert analyze.main([str(lab.folder), *SMALL, "--only", "usage,geometry", "--limit", "50"]) == 130
    assert set(json.loads((lab.folder / "analysis.json").read_text(encoding="utf-8"))["sections"]) == {"usage"}
