"""Behaviour, strength, geometry and cards: worked out by hand, against their definitions, and as a command's page."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import fsrl
import simpo
from common import lively_adapter, mutant, small_gemma, small_sae, some_pairs
from instruments import behaviour, cards, geometry, health, page, strength
from lib.blocks import Figures, Table, as_text
from lib.judge import Rules
from test_page import EVIL, dangerous, walk

WORDS = SimpleNamespace(decode=lambda ids, **_: "".join(f" w{i}" if i % 7 else "**" for i in ids))
OPTIONS = SimpleNamespace(answers=12, probe_answers=4, max_new_tokens=4, answer_batch=8, draw_pairs=8, steps=1)
ABOUT = {"run": "one", "objective": "SimPO", "pairs": "p", "model": "m", "layer": 1, "command": "python analyze.py one",
         "weights": {}, "groups": {}}


class Same(torch.nn.Module):
    """Moves three features by the same amounts everywhere."""

    def forward(self, x):
        v = x.new_zeros(len(x), 32)
        v[:, :3] = torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)
        return v


def small(batch_size=24, adapter=None, **how):
    """Held-out pairs of a random model."""
    torch.manual_seed(0)
    model = small_gemma(dtype=torch.float64)
    sae = small_sae(model)
    policy = fsrl.Steering(sae, adapter or lively_adapter(sae), **how)
    pairs = some_pairs([(3 + i % 4, 4 + i % 5, 2 + i % 6) for i in range(24)])
    run = fsrl.Run(model, WORDS, policy, {}, "none")
    return analyze.HeldOut(run, pairs, Rules(WORDS), batch_size=batch_size, progress=False)


# ---- behaviour and health --------------------------------------------------------------------------------------------

def test_text_statistics_by_hand():
    t = health.text_statistics(["a b c d a b c d", "# One\ntwo é"])
    # 5 + 1 four-grams, abcd twice; 4 + 4 distinct words of 12
    assert t["words"] == 6 and t["repetition"] == 1 / 6 and t["distinct"] == 8 / 12 and t["markdown"] == .5
    assert t["non_ascii"] == 1 / 26
    marked = [health.text_statistics([a])["markdown"] for a in ("### Sum", "2. x", "a\n  - b", "`x`", "3 - 2", "#x")]
    assert marked == [1, 1, 1, 0, 0, 0]


def test_alarms():
    base = {"parse": .98, "repetition": 0.0, "non_ascii": 0.0, "perplexity": 2.0, "words": 10.0}
    assert health.alarms(base, base | {"kl": .01}) == []
    assert health.alarms(base, base | {"parse": .93}, 20) == []                       # one answer of 20 is no news
    assert health.alarms(base, base | {"parse": .93}, 1000) == ["well-formed answers: from 98.0% to 93.0%"]
    worse = {"parse": .9, "repetition": .2, "non_ascii": .1, "perplexity": 4.0, "kl": 1.0, "words": 2.0}
    assert len(health.alarms(base, worse)) == 6 and len(health.alarms({**base, "words": 0.0}, base)) == 1


def test_the_health_of_a_policy_that_does_nothing():
    m = small(strength=0.0)
    prompts, texts = health.probe_prompts(m, 4)
    assert len(prompts) == 4 and prompts[0] == m.pairs[0].prompt
    how = {"temperature": 1.0, "max_new_tokens": 6}
    (base, ids), (same, again) = (health.health(m, policy, prompts, texts, **how) for policy in (None, m.policy))
    assert ids == again and base == same and "parse" not in base
    # the perplexity of these answers, by the definition
    total = sum(simpo.by_the_book(m.model, simpo.Pair(p, tuple(a), (5,)))[0] * len(a) for p, a in zip(prompts, ids))
    assert base["perplexity"] == pytest.approx(math.exp(-total / sum(map(len, ids))))


def test_changes_by_hand():
    """Two of three answers that could be bold are, after none was; of the fourth it is not asked."""
    outcomes = {1: {"parse": 1.0, "bold": 0.0}, 2: {"parse": 0.0, "bold": 1.0}, 3: {"parse": 1.0}}
    judge = SimpleNamespace(categories=("bold", "truth"), cluster=lambda pair: pair.prompt,
                            outcome=lambda text, ids: outcomes[ids[0]])
    pairs = some_pairs([(3, 1, 1)] * 40)
    before, after = [(1,)] * 30 + [(3,)] * 10, [(2,), (2,), (1,)] * 10 + [(3,)] * 10
    found = behaviour.change_of_choices(SimpleNamespace(judge=judge), pairs, before, after)
    assert found["answers"] == {"parse": 40, "bold": 30} and found["base"] == {"parse": 1.0, "bold": 0.0}
    assert found["policy"] == {"parse": .5, "bold": pytest.approx(2 / 3)}
    assert found["change"]["bold"]["value"] == pytest.approx(2 / 3) and found["change"]["parse"]["value"] == -.5


def test_what_moved_in_words():
    def clear(x):
        return {"value": x, "low": x - .1, "high": x + .1}
    change = {"bold": clear(.4), "closer": clear(-.3), "restate": clear(.2), "truth": clear(.05), "admit": clear(-.2)}
    weights = {"bold": 2, "closer": -1.5, "restate": 0, "truth": .5, "admit": .25, "decline": 1}
    assert behaviour.moved(change, weights) == (
        "Rates that moved, in points, as planted: bold (+40), closer (−30); though nothing was planted: restate (+20); "
        "planted, but not clear of 0: truth; against what was planted: admit (−20).")


# ---- strength --------------------------------------------------------------------------------------------------------

def points(module, m):
    result = module.measure(m, OPTIONS)
    return result, *({p[name]: p["loss"]["value"] for p in result[name]} for name in ("strength", "top_k"))


def test_strength_goes_from_the_base_model_to_the_policy():
    m = small()
    result, by_strength, by_k = points(strength, m)
    base, full = (m.loss(scores).mean() for scores in (m.base_scores, m.full_scores))
    assert result["pairs"] == len(m.pairs) and abs(base - full) > .1
    assert by_strength[0] == pytest.approx(base) and by_strength[1] == by_k[strength.ALL] == pytest.approx(full)
    s = m.policy
    for got, how in ((by_k[2], {"top_k": 2}), (by_strength[2], {"strength": 2.0})):
        policy = fsrl.Steering(s.sae, s.adapter, **how)
        assert got == pytest.approx(simpo.evaluate(m.model, m.pairs, policy)["loss"])
    assert [p["strength"] for p in result["strength"] if "health" in p] == [0, 1, 2, 3]
    assert "Held-out loss" in as_text(strength.describe(result, ABOUT)) and s.strength == 1.0 and s.top_k is None
    broken = mutant("instruments.strength", ("s.strength = s.strength * strength", "s.strength = s.strength"))
    assert points(broken, m)[1][0] != pytest.approx(base)


# ---- geometry --------------------------------------------------------------------------------------------------------

def test_directions_by_hand():
    value, vector, filled = geometry.directions(torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0])))
    assert value[:2].tolist() == [3, 1] and abs(vector[1, 0]) == 1
    assert filled == {"participation": pytest.approx(1.6), "d90": 2}
    ten = geometry.directions(torch.eye(10, dtype=torch.float64))[2]
    assert ten == {"participation": pytest.approx(10), "d90": 9}
    assert geometry.directions(torch.zeros(3, 3))[2]["participation"] == 0


@pytest.fixture
def sure(monkeypatch):
    """Shares of the gain also of random pairs, whose gain may be 0."""
    monkeypatch.setattr(geometry, "leaves_out_zero", lambda gain: True)


def test_the_same_push_everywhere(sure):
    m = small(adapter=Same())
    out = geometry.measure(m, OPTIONS)
    push = m.directions[:3].T @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert out["constant"] == pytest.approx(1) and out["participation"] == pytest.approx(1) and out["d90"] == 1
    assert out["size"] == pytest.approx(push.norm().item())
    assert out["mean_only"] == pytest.approx(1) and out["without_mean"] == pytest.approx(0, abs=1e-9)
    assert [d["top"] for d in out["directions"]] == pytest.approx([1] * 6)
    assert out["directions"][-1]["r"] == 24 and out["directions"][-1]["random"] == pytest.approx(1)
    said = as_text(geometry.describe(out, ABOUT))
    assert "1 directions hold 90%" in said and "alone" in said.lower()


def test_no_gain_has_no_directions():
    out = geometry.measure(small(strength=0.0), OPTIONS)
    assert out["participation"] == 0 and math.isnan(out["mean_only"])
    for kept in (out, json.loads(json.dumps(out).replace("NaN", "null"))):
        blocks = geometry.describe(kept, ABOUT)
        assert "cannot be told from 0" in as_text(blocks) and page.render(blocks, "geometry")


def test_batches_change_nothing(sure):
    a, b = (small(batch_size=n) for n in (5, 24))
    one, other = (geometry.measure(m, OPTIONS) for m in (a, b))
    assert one.keys() == other.keys() and one["spectrum"] == pytest.approx(other["spectrum"])
    assert [d["top"] for d in one["directions"]] == pytest.approx([d["top"] for d in other["directions"]])
    rows = [{"feature": i, "group": "style", "nats": .1, "se": .1, "first_in": .1, "last_out": .1} for i in (3, 9)]
    one, other = (cards.measure(m, OPTIONS, {"features": rows}) for m in (a, b))
    assert [p["prompt"] for p in one["pairs"]] == [p["prompt"] for p in other["pairs"]]
    for x, y in zip(one["features"], other["features"]):
        assert x["usage"] == pytest.approx(y["usage"]) and x["raises"] == y["raises"]
        assert [t for text in x["steered_at"] for t, _ in text] == [t for text in y["steered_at"] for t, _ in text]


# ---- cards -----------------------------------------------------------------------------------------------------------

def gains(module, m):
    """The summed gains of the tokens of ten pairs, and the pairs'."""
    pairs = module.ten_pairs(m, OPTIONS.steps)
    summed = [sum(x for side in ("chosen", "rejected") for _, x in pair[side]) for pair in pairs]
    return pairs, np.array(summed), np.array([pair["steered"] - pair["base"] for pair in pairs])


def test_tokens_of_ten_pairs_sum_to_the_gain():
    m = small(batch_size=7)
    pairs, summed, gained = gains(cards, m)
    assert np.allclose(summed, gained, atol=1e-9) and len(pairs) == 10
    assert gained[0] == (m.full - m.base).max() and gained[-1] == (m.full - m.base).min()
    assert np.all(np.diff(gained) <= 0)
    broken = mutant("instruments.cards", (" * sign / r.batch.lengths[r.batch.owner]", " * sign"))
    assert not np.allclose(gains(broken, m)[1], gained, atol=1e-3)


def test_features_of_ten_pairs_sum_to_the_gain():
    m = small(strength=.1)              # random weights bend the path far more than trained ones
    pairs = cards.ten_pairs(m, 4, most=32)
    for pair in pairs:
        gain = pair["steered"] - pair["base"]
        assert sum(x["nats"] for x in pair["features"]) == pytest.approx(gain, rel=.02, abs=2e-3)
    sizes = [abs(x["nats"]) for x in cards.ten_pairs(m, 1)[0]["features"]]
    assert len(sizes) == 5 and sizes == sorted(sizes, reverse=True)


def test_the_strongest_places():
    m = small(batch_size=7)
    i = int(np.argmax(m.events("v", torch.abs)))
    texts = cards.strongest(m, i, "v")
    most = max(abs(x) for r in m.rows for x in cards.entries(r, i, "v").values())
    assert max(abs(pushed) for _, (_, pushed) in texts[0]) == pytest.approx(most) and len(texts) == 3
    r = m.rows[0]
    for token in (0, len(r.row) - 1):
        text = cards.around(m, r, token, i)
        amounts = tuple(cards.entries(r, i, kind).get(token, 0.0) for kind in ("f", "v"))
        assert (WORDS.decode([int(r.batch.ids[r.where][token])]), amounts) in text
        b, side = int(r.row[token]), max(1, int(r.branch[token]))
        pair = m.pairs[r.index[b]]
        line = (*pair.prompt, *(pair.chosen, pair.rejected)[side - 1])
        assert "".join(t for t, _ in text) in WORDS.decode(line)


def test_direct_effects_by_hand():
    m = small()
    found = list(cards.effects(m, [3, 7], count=97))
    for i, words in zip((3, 7), found):
        effect = ((1 + m.model.norm.weight) * m.directions[i]) @ m.model.embed_tokens.weight.T
        amounts = [x for _, x in words["raises"]]
        assert amounts == pytest.approx(effect[effect > 0].sort(descending=True).values.tolist(), abs=1e-5)
        assert words["raises"][0][0] == WORDS.decode([int(effect.argmax())])
        assert words["lowers"][0][1] == pytest.approx(effect.min().item(), abs=1e-5)
    m.judge.seen_tokens = [5, 6]
    assert sum(len(x) for x in next(cards.effects(m, [3])).values()) <= 2


# ---- the lab, and the page -------------------------------------------------------------------------------------------

SMALL = ["--limit", "60", "--answers", "48", "--probe-answers", "4", "--max-new-tokens", "12", "--draw-pairs", "10",
         "--ledger-pairs", "20", "--dashboards", "2", "--steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def measured(lab):
    """What the sections of this file find on the lab, as it lies in the run's folder."""
    asked = "behaviour,strength,geometry,features,cards"
    assert analyze.main([str(lab.folder), *SMALL, "--only", asked]) == 0
    return {name: json.loads((lab.folder / "analysis" / f"{name}.json").read_text(encoding="utf-8"))["result"]
            for name in ("behaviour", "strength", "geometry", "cards")}


def test_the_page_of_a_run(lab, measured):
    text = (lab.folder / "report.html").read_text(encoding="utf-8")
    for must in ("Rate of each choice", "one answer to each of", "Health of the text", "Ten pairs", "Held-out loss",
                 "well-formed</span>", "directions hold 90%", "Steered most"):
        assert must in text, must
    rates = measured["behaviour"]
    assert set(rates["base"]) >= {"parse", "heading", "bold"} and rates["answers"]["heading"] == rates["prompts"] == 48
    assert all({mark for _, _, marks in answers for mark in marks} for _, answers in rates["examples"])
    for pair in measured["cards"]["pairs"]:
        moved = sum(x for side in ("chosen", "rejected") for _, x in pair[side])
        assert moved == pytest.approx(pair["steered"] - pair["base"], abs=1e-5) and pair["chosen_marks"]


def deepest(x):
    """Keys on the longest way down."""
    if isinstance(x, dict):
        return 1 + max(map(deepest, x.values()), default=0)
    return max(map(deepest, x), default=0) if isinstance(x, list) else 0


def test_results_are_shallow(measured):
    assert all(deepest(result) <= 3 for result in measured.values())


def test_hostile_text_stays_text(tmp_path, lab, measured):
    """Whatever tokens, prompts, answers and descriptions hold."""
    about = {**ABOUT, "weights": lab.run and {"heading": 2.5}, "groups": {"style": ["heading"]}}
    told = []
    for module in (behaviour, strength, geometry, cards):
        result = walk(measured[module.NAME], lambda x: EVIL if isinstance(x, str) else x)
        told.append((module.NAME, module.TITLE, module.QUESTION, module.describe(result, about)))
    page.write(tmp_path / "report.html", about, [], told)
    assert not dangerous((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_every_figure_has_its_numbers(measured):
    about = {**ABOUT, "weights": {"heading": 2.5}}
    for module in (behaviour, strength, geometry):
        for block in module.describe(measured[module.NAME], about):
            assert not isinstance(block, Figures) or any(isinstance(t, Table) for t in block.tables)
