"""A closer look: ten pairs, token by token, and cards of the features that did most.

A card shows where a feature is steered most and where it fires most: a policy may use a feature where
it never fires by itself, and then what it fires on does not say what the steering is for.
"""
import numpy as np
import torch

import simpo
from lib.blocks import Answers, Card, Text, Tokens, number, percent

TITLE = "Ten pairs, and the features that did most"
QUESTION = "What happened on single tokens, and what are the features that did most in the ledger?"
CONTEXTS, BEFORE, AFTER = 3, 12, 6      # texts a card; tokens before the strongest, and from it on
PAIRS = ("From the largest gain to the smallest, evenly spaced. A token’s colour is its share of the "
         "gain, green for, red and dotted against the preference: a chosen answer gains when its tokens "
         "become likelier than under the base model (the control), a rejected one when less likely.")
FEATURES = ("On each token: how strongly a feature fires by itself (background), how it is pushed: up "
            "(orange line) or down (violet line). Beside its number: its label, its ledger entry.")


def measure(m, options, ledger):
    """-> pairs, features. ledger: what instruments/features.py found; its largest get cards"""
    tokens = sum(len(r.row) for r in m.rows)
    steered, fires = m.events("v") / tokens, m.events("f") / tokens
    cards = []
    for row in ledger["features"]:
        i = row["feature"]
        label = (m.labels or {}).get(i, {})
        cards.append({
            **row,
            "description": label.get("description", ""),
            "steered": steered[i], "steered_at": strongest(m, i, "v"),
            "fires": fires[i], "fires_at": strongest(m, i, "f"),
        })
    return {"pairs": ten_pairs(m), "features": cards}


# ---- where a feature acts ----

def amounts(r, i, kind):
    """How strongly a feature acts on each token of a batch, (B,T). kind: "v" (steering) or "f"."""
    s = getattr(r, kind)
    mine = s.feature == i
    b, column = r.where.nonzero()[s.token[mine]].T
    out = s.value.new_zeros(r.where.shape)
    out[b, column] = s.value[mine]
    return out


def strongest(m, i, kind):
    """The texts around the tokens where a feature is steered or fires most, no two alike."""
    found, texts = [], []
    for n, r in enumerate(m.rows):
        amount = amounts(r, i, kind)
        b, column = amount.nonzero().T
        numbers = [n] * len(b)
        found += zip(amount[b, column].abs().tolist(), numbers, b.tolist(), column.tolist())
    found.sort(key=lambda place: -place[0])                # the first of equals stays first
    for _, n, b, column in found[:40]:
        text = around(m, m.rows[n], b, column, i)
        if text not in texts and len(texts) < CONTEXTS:
            texts.append(text)
    return texts


def around(m, r, b, column, i):
    """The text around a token of a row, along its own answer. -> [(text, fires, pushed)]"""
    branch = r.batch.branch[b]
    side = max(1, int(branch[column]))                     # a prompt is shown with its chosen answer
    line = ((branch == 0) | (branch == side)).nonzero()[:, 0]
    at = line.tolist().index(column)
    shown = line[max(0, at - BEFORE):at + AFTER]
    words = [piece(m, token) for token in r.batch.ids[b, shown]]
    fires, pushed = (amounts(r, i, kind)[b, shown].tolist() for kind in ("f", "v"))
    return list(zip(words, fires, pushed))


def piece(m, i):
    return m.tokenizer.decode([int(i)], skip_special_tokens=False)


# ---- ten pairs ----

@torch.no_grad()
def token_gains(m, r):
    """What each answer token of a batch added to its pair's gain: the change of its log p over its
    answer's length, negative in the rejected one."""
    gained = 0.0
    for sign, model, h in ((1, m.acting, m.policy_states(r)), (-1, m.model, m.base_states(r))):
        x = model.norm(h.flatten(0, 1)[r.batch.read])
        W, cap = model.embed_tokens.weight, model.config.final_logit_softcapping
        gained = gained + sign * simpo.token_logps(x, W, r.batch.target, cap)
    owner = r.batch.owner
    gained = gained / r.batch.lengths[owner]
    return torch.where(owner < len(r.index), gained, -gained)


def ten_pairs(m, count=10):
    """Pairs evenly spaced in order of their gain, with what each token gained."""
    order = np.argsort(m.base - m.full, kind="stable")
    places = np.linspace(0, len(order) - 1, count).round().astype(int)
    picked = order[np.unique(places)].tolist()
    found = {}
    for r in m.rows_of(picked):
        gains = token_gains(m, r)
        for b, i in enumerate(r.index):
            pair = m.pairs[i]
            row = {"prompt": pair.text, "base": m.base[i], "steered": m.full[i]}
            for side, answer in (("chosen", b), ("rejected", b + len(r.index))):
                mine = r.batch.owner == answer
                words = [piece(m, token) for token in r.batch.target[mine]]
                row[side] = list(zip(words, gains[mine].tolist()))
                row[f"{side}_marks"] = m.judge.mark(pair.text, getattr(pair, side))
            found[i] = row
    return [found[i] for i in picked]


# ---- in words ----

def describe(result, about):
    blocks = [Text("Ten pairs", "heading"), Text(PAIRS, "note")]
    blocks += [pair_block(pair) for pair in result["pairs"]]
    blocks += [Text("Features", "heading"), Text(FEATURES, "note")]
    return blocks + [feature_card(x) for x in result["features"]]


def pair_block(pair):
    most = max(abs(nats) for _, nats in pair["chosen"] + pair["rejected"])
    columns = []
    for side in ("chosen", "rejected"):
        tokens = [(word, 0, nats) for word, nats in pair[side]]
        columns.append((side, Tokens(tokens, (0, most), "nats"), pair[f"{side}_marks"]))
    base, steered = pair["base"], pair["steered"]
    margins = f"margin {number(base, '+.3f')} → {number(steered, '+.3f')}"
    says = f"{margins}, gain {number(steered - base, '+.3f')} nats a token"
    return Answers(pair["prompt"], columns, says)


def feature_card(x):
    tokens = [token for text in x["steered_at"] + x["fires_at"] for token in text]
    most = [max(abs(token[k]) for token in tokens) for k in (1, 2)]
    blocks = []
    for kind, key in (("Steered", "steered_at"), ("Fires", "fires_at")):
        share = percent(x[kind.lower()], ".1f")
        blocks.append(Text(f"{kind} at {share} of tokens, most at:", "note"))
        blocks += [Tokens(text, most) for text in x[key]]
    says = x["description"] or "No description."
    amount = f"{number(x['nats'], '+.4f')} ± {number(x['se'], '.4f')} nats"
    return Card(x["name"], x["group"], amount, says, blocks)
