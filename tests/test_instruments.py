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
from instruments import behaviour, cards, geometry, health, page, strength, verdict
from lib.blocks import as_text
from lib.judge import Rules
from test_page import EVIL, dangerous, walk

WORDS = SimpleNamespace(decode=lambda ids, **_: "".join(f" w{i}" if i % 7 else "**" for i in ids))
OPTIONS = SimpleNamespace(answers=12, max_new_tokens=4, answer_batch=8, draw_pairs=8)
ABOUT = {"run": "one", "objective": "SimPO", "pairs": "p", "model": "m", "layer": 1, "command": "python analyze.py one",
         "held_out": 9, "weights": {}, "groups": {}, "config": {}}


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
    # 5 + 1 four-grams, abcd twice
    assert t == {"words": 6, "repetition": 1 / 6, "markdown": .5}
    marked = [health.text_statistics([a])["markdown"] for a in ("### Sum", "2. x", "a\n  - b", "`x`", "3 - 2", "#x")]
    assert marked == [1, 1, 1, 0, 0, 0]


def test_alarms():
    base = {"parse": .98, "repetition": 0.0, "perplexity": 2.0, "words": 10.0}
    assert health.alarms(base, base | {"kl": .01}) == []
    assert health.alarms(base, base | {"parse": .93}, 20) == []                       # one answer of 20 is no news
    assert health.alarms(base, base | {"parse": .93}, 1000) == ["well-formed answers: from 98.0% to 93.0%"]
    worse = {"parse": .9, "repetition": .2, "perplexity": 4.0, "kl": 1.0, "words": 2.0}
    assert len(health.alarms(base, worse)) == 5 and len(health.alarms({**base, "words": 0.0}, base)) == 1


def test_the_health_of_a_policy_that_does_nothing():
    m = small(strength=0.0)
    (base, ids), (same, again) = (health.health(m, policy, m.pairs[:4], OPTIONS) for policy in (None, m.policy))
    assert ids == again and base == same and "parse" not in base
    # the perplexity of these answers, by the definition
    answered = [simpo.Pair(pair.prompt, tuple(a), (5,)) for pair, a in zip(m.pairs, ids)]
    total = sum(simpo.by_the_book(m.model, pair)[0] * len(pair.chosen) for pair in answered)
    assert base["perplexity"] == pytest.approx(math.exp(-total / sum(map(len, ids))))


def test_changes_by_hand():
    """Two of three answers that could be bold are, after none was; of the fourth it is not asked."""
    outcomes = {1: {"parse": 1.0, "bold": 0.0}, 2: {"parse": 0.0, "bold": 1.0}, 3: {"parse": 1.0}}
    judge = SimpleNamespace(categories=("bold", "truth"), cluster=lambda pair: pair.prompt,
                            outcome=lambda text, ids: outcomes[ids[0]])
    pairs = some_pairs([(3, 1, 1)] * 40)
    before, after = [(1,)] * 30 + [(3,)] * 10, [(2,), (2,), (1,)] * 10 + [(3,)] * 10
    parse, bold = behaviour.choices(SimpleNamespace(judge=judge), pairs, before, after)
    assert (parse["answers"], parse["base"], parse["policy"], parse["change"]["value"]) == (40, 1.0, .5, -.5)
    assert (bold["answers"], bold["base"]) == (30, 0.0)
    assert bold["policy"] == bold["change"]["value"] == pytest.approx(2 / 3)


# ---- strength --------------------------------------------------------------------------------------------------------

def points(module, m):
    result = module.measure(m, OPTIONS)
    return result, *({p[name]: p["loss"]["value"] for p in result[name]} for name in ("strength", "top_k"))


def test_strength_goes_from_the_base_model_to_the_policy():
    m = small()
    result, by_strength, by_k = points(strength, m)
    base, full = (m.loss(scores).mean() for scores in (m.base_scores, m.full_scores))
    assert result["pairs"] == len(m.pairs) and abs(base - full) > .1
    assert by_strength[0] == pytest.approx(base) and by_strength[1] == by_k[64] == pytest.approx(full)
    s = m.policy
    for got, how in ((by_k[2], {"top_k": 2}), (by_strength[2], {"strength": 2.0})):
        policy = fsrl.Steering(s.sae, s.adapter, **how)
        assert got == pytest.approx(simpo.evaluate(m.model, m.pairs, policy)["loss"])
    assert "Held-out loss" in as_text(strength.describe(result, ABOUT)) and s.strength == 1.0 and s.top_k is None
    broken = mutant("instruments.strength", ("s.strength = s.strength * strength", "s.strength = s.strength"))
    assert points(broken, m)[1][0] != pytest.approx(base)


# ---- geometry --------------------------------------------------------------------------------------------------------

@pytest.fixture
def sure(monkeypatch):
    """Shares of the gain also of random pairs, whose gain may be 0."""
    monkeypatch.setattr(geometry, "leaves_out_zero", lambda gain: True)


def test_the_same_push_everywhere(sure):
    m = small(adapter=Same())
    out = geometry.measure(m, OPTIONS)
    push = m.directions[:3].T @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert out["constant"] == pytest.approx(1) and out["d90"] == 1 and out["mean_only"] == pytest.approx(1)
    assert out["spectrum"] == pytest.approx([push.square().sum().item()] + [0] * 23)
    assert [d["gain"] for d in out["directions"]] == pytest.approx([1] * 6)
    assert out["directions"][-1]["r"] == 24 and out["directions"][-1]["random"] == pytest.approx(1)
    said = as_text(geometry.describe(out, ABOUT))
    assert "1 directions hold 90%" in said and "alone" in said.lower()


def test_no_gain_has_no_directions():
    out = geometry.measure(small(strength=0.0), OPTIONS)
    assert out["spectrum"][0] == 0 and math.isnan(out["mean_only"])
    for kept in (out, json.loads(json.dumps(out).replace("NaN", "null"))):
        blocks = geometry.describe(kept, ABOUT)
        assert "cannot be told from 0" in as_text(blocks) and page.render(blocks)


def test_batches_change_nothing(sure):
    a, b = (small(batch_size=n) for n in (5, 24))
    one, other = (geometry.measure(m, OPTIONS) for m in (a, b))
    assert one.keys() == other.keys() and one["spectrum"] == pytest.approx(other["spectrum"])
    assert [d["gain"] for d in one["directions"]] == pytest.approx([d["gain"] for d in other["directions"]])
    rows = [{"feature": i, "group": "style", "nats": .1, "se": .1} for i in (3, 9)]
    one, other = (cards.measure(m, OPTIONS, {"features": rows}) for m in (a, b))
    assert [p["prompt"] for p in one["pairs"]] == [p["prompt"] for p in other["pairs"]]
    for x, y in zip(one["features"], other["features"]):
        assert x["steered"] == pytest.approx(y["steered"])
        assert [t[0] for text in x["steered_at"] for t in text] == [t[0] for text in y["steered_at"] for t in text]


# ---- cards -----------------------------------------------------------------------------------------------------------

def gains(module, m):
    """The summed gains of the tokens of ten pairs, and the pairs'."""
    pairs = module.ten_pairs(m)
    summed = [sum(x for side in ("chosen", "rejected") for _, x in pair[side]) for pair in pairs]
    return pairs, np.array(summed), np.array([pair["steered"] - pair["base"] for pair in pairs])


def test_tokens_of_ten_pairs_sum_to_the_gain():
    m = small(batch_size=7)
    pairs, summed, gained = gains(cards, m)
    assert np.allclose(summed, gained, atol=1e-9) and len(pairs) == 10
    assert gained[0] == (m.full - m.base).max() and gained[-1] == (m.full - m.base).min()
    assert np.all(np.diff(gained) <= 0)
    broken = mutant("instruments.cards", ("gained / r.batch.lengths[owner]", "gained"))
    assert not np.allclose(gains(broken, m)[1], gained, atol=1e-3)


def test_the_strongest_places():
    m = small(batch_size=7)
    i = int(np.argmax(m.events("v", torch.abs)))
    texts = cards.strongest(m, i, "v")
    most = max(cards.amounts(r, i, "v").abs().max().item() for r in m.rows)
    assert max(abs(pushed) for _, _, pushed in texts[0]) == pytest.approx(most) and len(texts) == 3
    r = m.rows[0]
    fires, pushed = (cards.amounts(r, i, kind) for kind in ("f", "v"))
    assert pushed[r.where].count_nonzero() == (r.v.feature == i).sum() > 0
    for b, column in (r.where.nonzero()[0].tolist(), r.where.nonzero()[-1].tolist()):
        text = cards.around(m, r, b, column, i)
        word = WORDS.decode([int(r.batch.ids[b, column])])
        assert (word, fires[b, column].item(), pushed[b, column].item()) in text
        pair, side = m.pairs[r.index[b]], max(1, int(r.batch.branch[b, column]))
        line = (*pair.prompt, *(pair.chosen, pair.rejected)[side - 1])
        assert "".join(t for t, _, _ in text) in WORDS.decode(line)


# ---- the lab, and the page -------------------------------------------------------------------------------------------

SMALL = ["--limit", "60", "--answers", "48", "--max-new-tokens", "12", "--draw-pairs", "10",
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
    for must in ("one answer to each of", "Health of the text", "Ten pairs", "Held-out loss", "well-formed</span>",
                 "directions hold 90%", "Steered at"):
        assert must in text, must
    found = measured["behaviour"]
    asked = {row["name"]: row["answers"] for row in found["choices"]}
    assert set(asked) >= {"parse", "heading", "bold"} and asked["heading"] == found["prompts"] == 48
    assert all({mark for _, _, marks in answers for mark in marks} for _, answers in found["examples"])
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
    for name, module in zip(measured, (behaviour, strength, geometry, cards)):
        result = walk(measured[name], lambda x: EVIL if isinstance(x, str) else x)
        told.append((name, module.TITLE, module.QUESTION, module.describe(result, about)))
    page.write(tmp_path / "report.html", about, [], told)
    assert not dangerous((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_policy_of_ones_own_is_named():
    said = verdict.objective({"policy": "mine/b.py:LoRA", "l1": .03, "nll_weight": 5.0, "beta": 10, "gamma_ratio": .5})
    assert said.endswith("+ 5 × NLL of the chosen answers + 0.03 × the penalty of LoRA (b.py), if it has one,")
