"""Ledgers that add up, exact masks, fair controls, sections that are kept or made anew, the verdict, the command."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import fsrl
import simpo
from analyze import HeldOut
from common import mutant, small_gemma, small_sae, some_pairs
from instruments import features, masking, rates, usage, verdict
from lib.blocks import as_text
from lib.counts import Sparse
from lib.files import UserError, read_json
from lib.judge import Rules, judge_of
from lib.pairs import read_held_out
from lib.sections import Section, results
from sae import JumpReLUSAE
from test_train import BIAS, LOSSES

WORDS = SimpleNamespace(decode=lambda ids, **_: "".join(f" w{i}" if i % 7 else "**" for i in ids))
OPTIONS = SimpleNamespace(steps=4, ledger_pairs=12, draw_pairs=12, dashboards=3, draws=9)
ABOUT = {"groups": {}, "weights": {}, "pairs": "pairs", "objective": "SimPO",
         "labels": "me"}


def labelled(*names):
    """Labels of features 0, 1, ... None: nobody could judge it."""
    return {i: {"labels": name if name is None else [name] if name else [], "by": "me"} for i, name in enumerate(names)}


# ---- three features on paper -----------------------------------------------------------------------------------------

class Paper(torch.nn.Module):
    """A model of one number: block 1 and the norm do nothing, so log p of token 1 is log σ(x) and of token 0 log σ(-x),
    x the state."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, final_logit_softcapping=300.0, pad_token_id=0, vocab_size=2,
                                      bos_token_id=0)
        W = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        self.embed_tokens = torch.nn.Embedding(2, 1, _weight=W).requires_grad_(False)
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


def paper(labels=None, **how):
    """d = 1, 2, -1 and v = 1, 1, -1: the state goes from 0 to 1 + 2 + 1 = 4 at every steered token. Chosen: tokens 1 1,
    rejected: 0 0."""
    d = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    b_enc = torch.tensor([1.0, -1.0, 1.0])
    sae = JumpReLUSAE(torch.zeros(1, 3), b_enc, d, torch.zeros(1), torch.zeros(3), layer=0, source="paper",
                      dtype=torch.float64)
    pairs = [simpo.Pair((0, *([1] * (i + 1))), (1, 1), (0, 0), f"question {i}") for i in range(12)]
    run = fsrl.Run(Paper(), WORDS, fsrl.Steering(sae, Fixed(), **how), {}, "none")
    return HeldOut(run, pairs, Rules(WORDS), labels=labels, batch_size=5, progress=False)


KNOWN = labelled("alignment", "style", "")


def test_ledgers_and_masks_on_paper():
    m = paper(KNOWN)
    sigma = {x: 1 / (1 + math.exp(-x)) for x in (4, -4)}
    assert math.log(sigma[4]) - math.log(sigma[-4]) == pytest.approx(4)       # log-odds are the state
    assert np.allclose(m.base, 0) and np.allclose(m.full, 4, rtol=1e-3)       # the soft-cap of 300 is not quite nothing
    found = features.measure(m, OPTIONS)
    rows = {row["feature"]: row for row in found["features"]}
    for i, nats in enumerate((1, 2, 1)):                                      # v_i d_i of 4, along one line
        assert round(rows[i]["nats"], 2) == nats, rows[i]
    style = next(row for row in found["groups"] if row["name"] == "style")
    assert style["nats"]["value"] == pytest.approx(2, rel=1e-3)
    assert style["share"]["value"] == pytest.approx(.5, rel=1e-3)
    assert found["completeness"] < 1e-4 and analyze.ledger(m, OPTIONS)["tokens_error"] < 1e-12
    keep = torch.tensor([1.0, 0.0, 1.0])
    assert np.allclose(m.margins(keep), 2, rtol=1e-3) and np.allclose(m.margins(1 - keep), 2, rtol=1e-3)
    lost, left = analyze.masking(m, [1])
    assert np.allclose(lost, 2, rtol=1e-3) and np.allclose(left, 2, rtol=1e-3)
    assert m.usage().tolist() == pytest.approx([x * m.events("v")[0] for x in (1, 2, 1)])

    def own(chosen, rejected):
        """Sees sums, lengths and the base model."""
        return chosen.sum - chosen.base_sum + rejected.length
    m.objective = own
    assert np.allclose(m.loss(m.full_scores), 2 * (m.full_scores - m.base_scores)[:, 0] + 2)


def test_evenness_by_hand():
    """Four features that are active 8, 4, 2, 1 times, and four that never are."""
    x = usage.evenness([4, 0, 8, 0, 1, 0, 2, 0])
    # Σ (2i - n - 1) x_i / (n Σ x) with x = 1 2 4 8: (-3 - 2 + 4 + 24) / 60
    assert x == {"used": 4, "top10": 8 / 15, "gini": pytest.approx(23 / 60)}
    assert math.isnan(usage.evenness([0, 0])["top10"])


def test_rates_on_paper():
    """At every token three features are steered and two of the SAE fire (0 and 2); feature 2 cannot be judged."""
    m = paper(labelled("alignment", "style", None))
    found = {(row["region"], row["label"]): row for row in rates.measure(m, OPTIONS)["rows"]}
    for region in analyze.REGIONS:
        style, alignment = found[region, "style"], found[region, "alignment"]
        assert style["steering"]["value"] == .5 and style["sae"]["value"] == 0 and math.isnan(style["change"]["low"])
        assert alignment["steering"]["value"] == .5 and alignment["sae"]["value"] == 1
        assert alignment["change"]["value"] == pytest.approx(-.5)
    steering, sae = usage.measure(m, OPTIONS)["rows"][2:4]
    assert steering["region"] == "chosen" and steering["l0"]["value"] == 3 and sae["l0"]["value"] == 2


def test_rates_compare_the_same_tokens():
    """Feature 1 fires with 0 where the policy steers; elsewhere 0 fires alone. Averaged over tokens of its own, the
    SAE's share of 1 would be far below 1/2."""
    m = paper(KNOWN)
    for r in m.rows:
        v, f = (torch.zeros(len(r.row), 3, dtype=torch.float64) for _ in "vf")
        f[:, 0] = 1
        chosen = r.branch == 1
        v[chosen, 1], f[chosen, 1] = 1.0, 1.0
        r.v, r.f = Sparse.of(v), Sparse.of(f)
    style, alignment = rates.measure(m, OPTIONS)["rows"]
    assert style["region"] == alignment["region"] == "chosen" and style["sae"]["value"] == .5
    assert style["change"]["value"] == pytest.approx(1) and alignment["change"]["value"] == pytest.approx(-1)


def test_random_sets_are_drawn_until_the_usage_is_reached(monkeypatch):
    """Usage 1, 2, 1: a set used as much as feature 1 is {1}, {0, 2}, or 1 with one of the others before it."""
    m, sets = paper(KNOWN), []

    def noted(m, drawn, rows=None):
        sets.append(sorted(map(int, drawn)))
        return analyze.masking(m, drawn, rows)
    monkeypatch.setattr(masking, "masking", noted)
    found = masking.measure(m, SimpleNamespace(**{**vars(OPTIONS), "draws": 60}))
    assert sets[0] == [1] and all(len(x) == 1 for x in sets[1:61])                     # as many
    assert {tuple(x) for x in sets[61:121]} == {(1,), (0, 2), (0, 1), (1, 2)}          # as much used
    style, by_size, by_usage = found["rows"][:3]
    assert style["lost"]["value"] == pytest.approx(.5, rel=1e-3) and style["usage"] == .5 and style["features"] == 1
    assert by_size["features"] == 1 and .25 < by_size["lost"]["mean"] < .5
    assert by_size["usage"] < .5 <= by_usage["usage"]
    assert by_usage["lost"]["low"] == pytest.approx(.5, rel=1e-3)
    said = as_text(masking.describe(json.loads(json.dumps(found, default=float)), ABOUT))
    assert "as much used, at random" in said and "style: lost when masked" in said


def test_a_policy_that_does_nothing_has_no_shares():
    m = paper(KNOWN, strength=0.0)
    found = masking.measure(m, OPTIONS)
    assert found["rows"] == [] and "no share" in found["silent"]
    assert "no share" in as_text(masking.describe(found, ABOUT))
    by_token, by_feature = analyze.ledger(m, OPTIONS), features.measure(m, OPTIONS)
    assert by_token["gain"]["value"] == 0 and not any("share" in row for row in by_token["tokens"])
    assert by_feature["features"] == [] and not any("share" in row or "dealt" in row for row in by_feature["groups"])
    assert rates.measure(m, OPTIONS)["rows"] == [] and usage.measure(m, OPTIONS)["rows"][0]["used"] == 0
    for module, found in ((features, by_feature), (usage, usage.measure(m, OPTIONS))):
        assert module.describe(json.loads(json.dumps(found, default=float)), ABOUT), module


# ---- a real model: small, random -------------------------------------------------------------------------------------

PAIRS = [(3 + i % 4, 4 + i % 5, 2 + i % 6) for i in range(14)]
LABELS = labelled(*(("style", "alignment", "")[i % 3] if i < 30 else None for i in range(32)))


def small(batch_size=4, permute=None, dtype=torch.float64, pairs=None, layers=(1,), module=analyze, **how):
    model = small_gemma(dtype=dtype)
    steerings = []
    for layer in layers:
        sae = small_sae(model, layer=layer, seed=layer)
        torch.manual_seed(layer)
        own = fsrl.Adapter(sae.d_in, sae.d_sae, "soft", init=.02).to(dtype)
        if permute is not None:
            weights = sae.W_enc[:, permute], sae.b_enc[permute], sae.W_dec[permute], sae.b_dec, sae.threshold[permute]
            sae = JumpReLUSAE(*weights, layer=layer, source="permuted", dtype=dtype)
            with torch.no_grad():
                for p in own.parameters():
                    p.copy_(p[permute].clone())
        steerings.append(fsrl.Steering(sae, own, **how))
    policy = steerings[0] if len(layers) == 1 else fsrl.Steerings(steerings)
    labels = LABELS if permute is None else {k: LABELS[i] for k, i in enumerate(permute.tolist())}
    run = fsrl.Run(model, WORDS, policy, {}, "none")
    return module.HeldOut(run, pairs or some_pairs(PAIRS), Rules(WORDS), labels=labels, batch_size=batch_size,
                          progress=False)


KINDS = [{}, {"fusion": "relu"}, {"top_k": 5}, {"layers": (0, 2)}, {"layers": (0, 1, 2), "fusion": "relu"}]


@pytest.mark.parametrize("how", KINDS)
def test_margins_are_those_of_the_policy(how):
    m = small(**how)
    assert abs(np.mean(m.full) - simpo.evaluate(m.model, m.pairs, m.policy)["margin"]) < 1e-9
    assert abs(np.mean(m.base) - simpo.evaluate(m.model, m.pairs)["margin"]) < 1e-9
    assert abs(np.mean(m.full - m.base)) > 1e-3
    with torch.no_grad():
        by_hand = [simpo.by_the_book(m.model, pair, m.policy) for pair in m.pairs[:3]]
    assert np.allclose(m.full_scores[:3], by_hand, atol=1e-9)


def test_masking_everything_is_the_base_model_bit_for_bit():
    m = small(dtype=torch.float32)
    plain = np.full(len(m.pairs), np.nan)
    for r in m.rows:
        s = simpo.score(m.model, r.batch)
        plain[r.index] = (s.chosen.mean.double() - s.rejected.mean.double()).numpy()
    assert np.array_equal(m.base, m.margins(torch.zeros(32))) and np.array_equal(m.base, plain)


FINE = SimpleNamespace(**{**vars(OPTIONS), "steps": 24, "ledger_pairs": 14})      # random weights bend the path


@pytest.mark.parametrize("how", [{}, {"layers": (0, 2)}])
def test_both_ledgers_sum_to_the_gain(how):
    m = small(batch_size=14, **how)
    by_token, by_feature = analyze.ledger(m, FINE), features.measure(m, FINE)
    gain = np.mean(m.full - m.base)
    assert by_token["gain"]["value"] == pytest.approx(gain) and by_token["tokens_error"] < 1e-9
    assert sum(row["nats"]["value"] for row in by_token["tokens"]) == pytest.approx(gain, abs=1e-12)
    assert by_feature["completeness"] < .01
    for part in ("groups", "regions"):
        assert sum(row["nats"]["value"] for row in by_feature[part]) == pytest.approx(gain, rel=1e-2)
    rows = m.part(14)
    nats, _ = analyze.feature_ledger(m, rows, 24)
    assert np.allclose(nats.sum(1), (m.full - m.base)[np.concatenate([r.index for r in rows])], rtol=.02, atol=1e-3)
    if "layers" in how:
        every = features.measure(m, SimpleNamespace(**{**vars(FINE), "dashboards": 64}))["features"]
        assert {row["name"].split("/")[0] for row in every} == {"L0", "L2"} and m.feature_name(32) == "L2/0"


def test_broken_ledgers_do_not(monkeypatch):
    broken = mutant("analyze", ("weights / 2):", "weights):"))
    monkeypatch.setattr(features, "feature_ledger", broken.feature_ledger)
    assert features.measure(small(batch_size=14), FINE)["completeness"] > .5
    broken = mutant("lib.counts", ('"per_sample_weights": weight', '"per_sample_weights": None'))
    monkeypatch.setattr(Sparse, "sums", broken.Sparse.sums)
    m = small()
    assert abs(np.mean(m.full) - simpo.evaluate(m.model, m.pairs, m.policy)["margin"]) > 1e-6


def test_a_push_on_the_wrong_layer_is_noticed():
    broken = mutant("analyze", ("delta.chunk(len(self.steerings), 1)", "delta.chunk(len(self.steerings), 1)[::-1]"))
    m = small(layers=(0, 2), module=broken)
    assert abs(np.mean(m.full) - simpo.evaluate(m.model, m.pairs, m.policy)["margin"]) > 1e-6


def test_upper_layers_act_as_in_the_whole_policy():
    """v of layer 2 is read after layer 0 was steered; a mask changes how much is added, not what was read."""
    m = small(layers=(0, 2))
    r, (low, high) = m.rows[0], m.steerings
    h = simpo.prefix(m.model, r.batch, 1)
    h = low(h, r.where)
    state = m.model.blocks(h, 1, 3, position_ids=r.batch.position_ids, mask=r.batch.mask())
    v = torch.zeros(len(r.row), 64, dtype=torch.float64).index_put((r.v.token, r.v.feature), r.v.value)
    assert torch.allclose(v[:, 32:], high.action(state[r.where]), atol=1e-12)
    keep = torch.cat([torch.zeros(32), torch.ones(32)])
    assert torch.allclose(m.delta(r, keep).chunk(2, 1)[1], m.delta(r).chunk(2, 1)[1])
    assert not m.delta(r, keep).chunk(2, 1)[0].any()


def test_permuting_features_permutes_the_results():
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    m, n = small(batch_size=14), small(batch_size=14, permute=order)
    first, second = ({row["feature"]: row["nats"] for row in features.measure(x, OPTIONS)["features"]} for x in (m, n))
    assert {order[i].item(): pytest.approx(x, abs=1e-9) for i, x in second.items()} == first
    for a, b in zip(rates.measure(m, OPTIONS)["rows"], rates.measure(n, OPTIONS)["rows"], strict=True):
        assert a["change"]["value"] == pytest.approx(b["change"]["value"])
    assert usage.measure(m, OPTIONS)["rows"] == usage.measure(n, OPTIONS)["rows"]
    assert np.allclose(m.usage()[order.numpy()], n.usage())


def rounded(x):
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return round(float(x), 6) + 0.0 if isinstance(x, (float, np.floating)) else x


def test_padding_and_batch_size_change_nothing():
    a, b = small(batch_size=3), small(batch_size=14)
    assert np.allclose(a.full, b.full, atol=1e-10) and np.allclose(a.usage(), b.usage())
    assert np.array_equal(a.events("f"), b.events("f"))
    for measure in (usage.measure, rates.measure, analyze.ledger, features.measure):
        one, other = (json.dumps(rounded(measure(m, OPTIONS)), default=float) for m in (a, b))
        assert one == other, measure


def test_parts_of_the_pairs():
    pairs = some_pairs([(3 + i % 4, 4 + i % 5, 2 + i % 6) for i in range(50)])
    m = small(pairs=pairs)
    rows = m.part(24)
    index = np.sort(np.concatenate([r.index for r in rows]))
    assert len(index) == 24 and np.ptp(np.diff(index)) <= 1 and m.part(24) is rows        # evenly spaced; made once
    part = m.margins(rows=rows)
    assert np.allclose(part[index], m.full[index]) and np.isnan(part).sum() == 26
    few = np.full(50, np.nan)
    few[:3] = 1, 2, 3
    assert m.mean(few)["value"] == 2 and math.isnan(m.mean(few)["low"])
    assert math.isnan(m.mean(np.full(50, np.nan))["value"])


# ---- the lab: what a token settles -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def held_out(lab):
    judge = judge_of("tiny/pairs/style", lab.tokenizer)
    pairs, _ = simpo.encode_pairs(lab.tokenizer, read_held_out("tiny/pairs/style", "test", 40))
    return HeldOut(lab.run, pairs, judge, progress=False)


def test_the_ledger_by_token_is_exact(held_out):
    m = held_out
    found = analyze.ledger(m, OPTIONS)
    assert found["tokens_error"] < 1e-4 and {row["name"] for row in found["token_groups"]} == {"style", "alignment"}
    # entries of one pair by the chain rule, from all logits
    r = m.rows[0]
    split, pair = analyze.split_of(m, r), m.pairs[r.index[0]]
    x = m.model.norm(m.base_states(r).flatten(0, 1)[r.batch.read])
    p = m.model.logits(x).double().softmax(-1)
    want = dict.fromkeys(m.judge.categories, 0.0)
    row = 0
    for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
        for token, settled in zip(answer, m.judge.settles(pair.text, answer)):
            for name, before, after in settled:
                end = p[row, token] if after is None else 1 - p[row, list(after)].sum()
                want[name] += sign * math.log(end / (1 - p[row, list(before)].sum())) / len(answer)
            row += 1
    got = analyze.split_margins(m.model, r, m.base_states(r), split)[0]
    assert got.tolist() == pytest.approx(list(want.values()), abs=1e-4)
    broken = mutant("analyze", ("value, left) - mass[split.token, split.before]", "value, left)"))
    wrong = broken.split_margins(m.model, r, m.base_states(r), split).sum(1).detach().numpy()
    assert np.abs(wrong - m.base[r.index]).max() > .01


# ---- sections --------------------------------------------------------------------------------------------------------

def counted(calls, name, read=(), after=()):
    """A section that notes when it is measured, and reads these options."""
    def measure(m, options, *given):
        calls.append(name)
        return {"read": [getattr(options, key) for key in read], "given": [x["read"] for x in given], "nan": math.nan,
                "numpy": np.int64(3)}
    return Section(name, name, name, measure, lambda x, about: [], after)


def test_a_section_is_made_again_when_what_it_read_has_changed(tmp_path, capsys):
    calls = []
    every = {"a": counted(calls, "a", ["steps"]), "b": counted(calls, "b", [], ("a",)),
             "c": counted(calls, "c", ["draws"])}
    options = SimpleNamespace(steps=4, draws=9)

    def made(wanted="abc", identity="x"):
        calls.clear()
        return results(tmp_path, every, list(wanted), identity, options, None), "".join(calls)
    first, called = made()
    assert called == "abc" and first["b"]["given"] == [[4]] and first["a"]["nan"] is None and first["a"]["numpy"] == 3
    assert made() == (first, "") and capsys.readouterr().out.split("\n")[:3] == ["a: kept", "b: kept", "c: kept"]
    options.draws = 10
    assert made()[1] == "c"
    options.steps = 5                                              # what was made from a is made anew with it
    assert made("a")[1] == "a" and set(made("a")[0]) == {"a", "c"}       # b no longer fits, and is not shown
    assert made()[1] == "b"
    assert made(identity="another adapter")[1] == "abc"
    file = read_json(tmp_path / "analysis" / "a.json")
    assert file["options"] == {"steps": 5} and set(file) == {
        "section", "made_from", "options", "seconds", "date", "machine", "result"}


def test_what_was_measured_stays_if_a_section_fails(tmp_path):
    calls = []

    def fail(m, options):
        raise KeyboardInterrupt
    every = {"a": counted(calls, "a"), "b": replace(counted(calls, "b"), measure=fail)}
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path, every, ["a", "b"], "x", None, None)
    assert [p.name for p in (tmp_path / "analysis").iterdir()] == ["a.json"]


# ---- the verdict -----------------------------------------------------------------------------------------------------

def span(value, half=.01):
    return {"value": value, "low": value - half, "high": value + half, "se": half / 2}


def found(gain=.2, lost=.8, other=.5):
    ledger = {"gain": span(gain), "accuracy_base": span(.5), "accuracy_policy": span(.75), "tokens": []}
    ledger["token_groups"] = []
    for name, share in (("style", .9), ("alignment", .1)):
        ledger["token_groups"].append({"name": name, "nats": span(gain * share), "share": span(share)})
    control = {"lost": {"mean": other, "low": other - .1, "high": other + .1}}
    rows = [{"label": "style", "features": 7, "lost": span(lost)}, control, control]
    return {"ledger": ledger, "masking": {"rows": rows}, "behaviour": {"alarms": []}}


def test_the_verdict_is_three_sentences(monkeypatch, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"trust": {"tokens": "It was right on the lab."}}))
    monkeypatch.setattr(verdict, "FILE", tmp_path / "c.json")
    moved, made, trusted = (block.text for block in verdict.verdict(found(), ABOUT))
    assert moved.startswith("Trained with SimPO on pairs") and "+0.200 [+0.190, +0.210] nats" in moved
    assert "ranks 75.0% of the held-out pairs right, the base model 50.0%" in moved
    assert "90% [89, 91] falls on words that settle a style choice" in made and "an alignment choice" in made
    assert "without the 7 features labelled style 80% [79, 81] of it is lost, more than" in made
    assert "random ones used as much (50% [40, 60])" in made
    assert trusted.startswith("How far to trust this: it was right on the lab.")
    assert "no more than without" in verdict.made_of(found(lost=.55)["ledger"], found(lost=.55)["masking"])
    assert "less than without" in verdict.made_of(found(lost=.1)["ledger"], found(lost=.1)["masking"])
    # of a gain that may be 0 nothing is claimed; alarms come first; without the ledger nothing is said
    said = verdict.verdict({**found(gain=.001), "behaviour": {"alarms": ["it repeats"]}}, ABOUT)
    assert [block.kind for block in said] == ["alarm", "verdict", "verdict"] and "cannot be told from 0" in said[2].text
    assert not any("%" in block.text for block in said[2:])
    assert "nothing is said" in verdict.verdict({}, ABOUT)[0].text
    monkeypatch.setattr(verdict, "FILE", tmp_path / "none.json")
    assert "is not known" in verdict.verdict(found(), ABOUT)[2].text
    assert "tiny.calibrate" in verdict.calibration()[3][0].text


class Priced(torch.nn.Module):
    def penalty(self, v):
        return v.square().sum(-1)


WORDED = [
    ({}, "SimPO (β 10, γ/β 0.5)"),
    ({"beta": 2.0, "loss": "hinge", "nll_weight": 5.0, "l1": .03},
     "SimPO (hinge, β 2, γ/β 0.5) + 5 × NLL of the chosen answers + 0.03 × ℓ1 of the steering"),
    ({"simpo_weight": 0, "nll_weight": 1.0}, "1 × NLL of the chosen answers (imitation alone)"),
    ({"objective": "folder/mine.py:dpo", "l1": .1, "own": True},
     "the objective dpo (mine.py) + 0.1 × the penalty of Priced"),
    ({"policy": "a.py:Bias", "l1": .1}, "SimPO (β 10, γ/β 0.5) + 0.1 × the penalty of Bias (a.py), if it has one,"),
    ({"mask": "3,17", "simpo_weight": 2}, "SimPO (β 10, γ/β 0.5) at weight 2, with some features masked,"),
]


@pytest.mark.parametrize("config, words", WORDED)
def test_objective_and_penalty_are_named(config, words):
    steerings = [SimpleNamespace(adapter=Priced())] if config.pop("own", False) else []
    assert verdict.objective(config, steerings) == words


# ---- the command -----------------------------------------------------------------------------------------------------

SMALL = ["--limit", "60", "--answers", "12", "--max-new-tokens", "8", "--draws", "2",
         "--draw-pairs", "30", "--ledger-pairs", "30", "--dashboards", "2", "--steps", "2", "--quiet"]


def test_the_command(lab, capsys):
    assert analyze.main([str(lab.folder), *SMALL]) == 0
    out = capsys.readouterr().out
    files = {p.stem: read_json(p)["result"] for p in (lab.folder / "analysis").iterdir()}
    assert set(files) == set(analyze.ORDER) and (lab.folder / "report.html").stat().st_size > 10_000
    told = " ".join(out.split())
    assert "Trained with SimPO (β 10, γ/β 0.5) + 5 × NLL of the chosen answers + 0.03 × ℓ1 of the steering" in told
    for words in ("all style choices", "as much used", "dealt anew", f"Look at {lab.folder / 'report.html'}"):
        assert words in told
    assert files["features"]["completeness"] < .05 and files["ledger"]["tokens_error"] < 1e-4
    # again: all is kept; --only leaves the others as they are
    assert analyze.main([str(lab.folder), *SMALL]) == 0
    assert capsys.readouterr().out.count(": kept\n") == len(analyze.ORDER)
    before = {p.name: p.stat().st_mtime_ns for p in (lab.folder / "analysis").iterdir()}
    assert analyze.main([str(lab.folder), *SMALL, "--only", "masking", "--draws", "3"]) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (lab.folder / "analysis").iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["masking.json"]
    assert "all style choices" in capsys.readouterr().out


def test_without_labels_judge_and_instruments(lab, monkeypatch, capsys):
    """No labels: what needs them is left out, in words. No judge: rules. No instruments: the ledger by token."""
    monkeypatch.setattr(analyze, "labels_of", lambda policy, given: None)
    monkeypatch.setattr(analyze, "judge_of", lambda source, tokenizer: Rules(tokenizer))
    how = {"limit": 40, "ledger_pairs": 20, "dashboards": 1, "steps": 1, "batch_size": 8, "quiet": True}
    found = analyze.analyze(lab.folder, only="ledger,features,usage", **how)
    assert [row["name"] for row in found["ledger"]["tokens"]] == list(Rules.categories)
    assert found["ledger"]["token_groups"] == [] and found["ledger"]["tokens_error"] < 1e-4
    assert [row["name"] for row in found["features"]["groups"]] == ["not judged"]
    for name in ("rates", "masking"):
        with pytest.raises(UserError, match=f"--only {name}: There are no labels"):
            analyze.analyze(lab.folder, only=name, **how)
    monkeypatch.setattr(analyze, "instrument", lambda name: None)
    assert analyze.main([str(lab.folder), "--limit", "40", "--batch-size", "8", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "kind (the first rule that fits)" in out and "report.html" not in out


def train_one(tmp_path, *more):
    import train
    short = ["--steps", 3, "--lr", 0.02, "--eval-pairs", 4, "--train-pairs", 40, "--runs", tmp_path, "--run", "a"]
    assert train.main([*map(str, (*short, *more))]) == 0
    return tmp_path / "a"


def test_a_policy_that_steers_no_features(tmp_path, capsys):
    """The ledger by token, and behaviour; a sentence for the rest. Its objective is named, and asked for."""
    (tmp_path / "bias.py").write_text(BIAS)
    (tmp_path / "losses.py").write_text(LOSSES)
    own = ["--policy", f"{tmp_path / 'bias.py'}:Bias", "--objective", f"{tmp_path / 'losses.py'}:dpo"]
    folder = train_one(tmp_path, *own, "--l1", .1)
    capsys.readouterr()
    assert analyze.main([str(folder), *SMALL, *own[:2]]) == 2
    assert f"say where it is, --objective {own[3]}" in capsys.readouterr().err
    assert analyze.main([str(folder), *SMALL, *own]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the objective dpo (losses.py) + 5 × NLL" in out and "0.1 × the penalty of Bias (bias.py)" in out
    assert {p.stem for p in (folder / "analysis").iterdir()} == {"behaviour", "ledger"}
    ledger = read_json(folder / "analysis" / "ledger.json")["result"]
    assert ledger["tokens_error"] < 1e-3 and ledger["loss_base"]["value"] == pytest.approx(math.log(2))
    assert "steers no features" in (folder / "report.html").read_text(encoding="utf-8")
    assert analyze.main([str(folder), *SMALL, *own, "--only", "usage"]) == 2
    assert "--only usage: This policy steers no features" in capsys.readouterr().err


MISTAKES = [
    (["--only", "colour"], "'colour' is no section"), (["--only", ""], "'' is no section"),
    (["--limit", "6"], "too few for an interval"), (["--labels", "none.jsonl"], "no such label file"),
    (["--draws", "0"], "--draws is 0"), (["--steps", "0"], "--steps is 0"), (["--answers", "0"], "--answers is 0"),
    (["--limit", "0"], "--limit is 0"), (["--batch-size", "0"], "--batch-size is 0"),
]


@pytest.mark.parametrize("args, message", MISTAKES)
def test_users_mistakes(lab, args, message, capsys):
    assert analyze.main([str(lab.folder), *args, "--quiet"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("analyze.py: ") and text.count("\n") == 1 and message in text


def test_no_run_and_labels_of_another_sae(lab, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"index": 0, "labels": [], "description": "", "by": "me", "sae": "0" * 16}) + "\n")
    wrong = ([tmp_path], "is not a finished run"), ([lab.folder, "--labels", other], "labels of another SAE")
    for args, message in wrong:
        assert analyze.main([*map(str, args), "--quiet"]) == 2 and message in capsys.readouterr().err
    assert analyze.main([]) == 2 and "run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no option 'colour'"):
        analyze.analyze(lab.folder, colour=1)
