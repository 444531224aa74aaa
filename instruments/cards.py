"""A closer look: ten pairs, token by token, and cards of the features that did most.

A card shows where a feature is steered most and where it fires most: a policy may use a feature where
it never fires by itself, and then what it fires on does not say what the steering is for.
"""
import numpy as np
import torch

import simpo
from analyze import integrated
from lib.blocks import Answers, Card, Table, Text, Tokens, number, percent

NAME, TITLE = "cards", "Ten pairs, and the features that did most"
QUESTION = "What happened on single tokens, and what are the features that did most in the ledger?"
CONTEXTS, BEFORE, AFTER = 3, 12, 6      # texts a card; tokens before the strongest, and from it on
PAIRS = ("From the largest gain to the smallest, evenly spaced. A token’s colour is its share of the "
         "gain, green for, red and dotted against the preference: a chosen answer gains when its tokens "
         "become likelier than under the base model (the control), a rejected one when less likely.")
FEATURES = ("On each token: how strongly a feature fires by itself (background), how it is pushed: up "
            "(orange line) or down (violet line). Beside its number: its label, its entry in the ledger "
            "± s.e. Likelier: by its direct effect, around the blocks in between, without a control.")


def measure(m, options, ledger):
    """-> pairs, features. ledger: what analyze.ledger found; its features get cards"""
    return {"pairs": ten_pairs(m, options.steps), "features": features(m, ledger["features"])}


def features(m, rows):
    """The ledger's rows, each with its label, its use, its texts, and what pushing it makes likelier."""
    tokens, usage = sum(len(r.row) for r in m.rows), m.usage()
    steered, signs, fires = m.events("v"), m.events("v", torch.sign), m.events("f")
    out = []
    for row, likelier in zip(rows, effects(m, [row["feature"] for row in rows])):
        i = row["feature"]
        card = {**row, **label(m, i), "fires": fires[i] / tokens, "steered": steered[i] / tokens}
        card["up"] = (signs[i] / max(1, steered[i]) + 1) / 2
        card["usage"] = usage[i] / max(usage.sum(), 1e-30)
        card |= {"steered_at": strongest(m, i, "v"), "fires_at": strongest(m, i, "f"), **likelier}
        out.append(card)
    return out


def label(m, i):
    row = (m.labels or {}).get(i, {})
    return {"name": m.feature_name(i), "description": row.get("description", ""), "by": row.get("by")}


def effects(m, wanted, count=8):
    """Tokens whose logits rise and fall most when a feature is pushed up: directly, through the final
    norm's weight and the head, around the blocks in between."""
    weight = (1 + m.model.norm.weight.float()) * m.directions[wanted].float()
    parts = m.model.embed_tokens.weight.split(16384)
    effect = torch.cat([weight @ part.float().T for part in parts], 1).cpu()
    seen = m.judge.seen_tokens
    if seen is not None:          # what the rows of other tokens hold is noise
        effect = torch.zeros_like(effect).index_copy(1, torch.tensor(seen), effect[:, seen])
    for values in effect:
        order = values.argsort(descending=True, stable=True)
        up, down = ([(piece(m, j), values[j].item()) for j in x[:count]] for x in (order, order.flip(0)))
        yield {"raises": [x for x in up if x[1] > 0], "lowers": [x for x in down if x[1] < 0]}


def entries(r, i, kind):
    """{token: value} of a feature in a batch. kind: "v", its steering, or "f", its activation"""
    s = getattr(r, kind)
    mine = s.feature == i
    return dict(zip(s.token[mine].tolist(), s.value[mine].tolist()))


def strongest(m, i, kind):
    """The texts around the tokens where a feature is steered or fires most, no two alike."""
    found, texts = [], []
    for n, r in enumerate(m.rows):
        found += [(-abs(x), n, token) for token, x in entries(r, i, kind).items()]
    for _, n, token in sorted(found)[:40]:
        text = around(m, m.rows[n], token, i)
        if text not in texts and len(texts) < CONTEXTS:
            texts.append(text)
    return texts


def around(m, r, token, i):
    """The text around one of the N tokens, along its own answer. -> [(text, (fires, pushed))]"""
    places = r.where.nonzero().tolist()                    # (row, column) of each of the N
    b, column = places[token]
    branch = r.batch.branch[b]
    side = max(1, int(branch[column]))                     # a prompt is shown with its chosen answer
    line = ((branch == 0) | (branch == side)).nonzero()[:, 0].tolist()
    fires, pushed = ({tuple(places[n]): x for n, x in entries(r, i, k).items()} for k in ("f", "v"))
    at = line.index(column)
    shown = [(b, c) for c in line[max(0, at - BEFORE):at + AFTER]]
    return [(piece(m, r.batch.ids[x]), (fires.get(x, 0.0), pushed.get(x, 0.0))) for x in shown]


def piece(m, i):
    return m.tokenizer.decode([int(i)], skip_special_tokens=False)


@torch.no_grad()
def token_gains(m, r):
    """What each answer token of a batch added to its pair's gain: the change of its log p over its
    answer's length, negative in the rejected one."""
    acting, _ = m.policy.acting(m.model)
    base = simpo.prefix(m.model, r.batch, m.model.config.num_hidden_layers)
    logps = []
    for model, h in ((m.model, base), (acting, m.policy.run(m.model, r.h, r.batch)[0])):
        x, W = model.norm(h.flatten(0, 1)[r.batch.read]), model.embed_tokens.weight
        logps.append(simpo.token_logps(x, W, r.batch.target, model.config.final_logit_softcapping))
    sign = torch.where(r.batch.owner < len(r.index), 1, -1)
    return (logps[1] - logps[0]) * sign / r.batch.lengths[r.batch.owner]


def ten_pairs(m, steps, count=10, most=5):
    """Pairs evenly spaced in order of their gain, with what each token gained and the first features."""
    order = np.argsort(m.base - m.full, kind="stable")
    picked = order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))].tolist()
    found = {}
    for r in m.rows_of(picked):
        sums = torch.zeros(len(r.index), m.d_sae, dtype=torch.float64)
        place = r.row[r.v.token].cpu(), r.v.feature.cpu()
        sums.index_put_(place, integrated(m, r, steps).sum(1).cpu().double(), accumulate=True)
        gained = list(zip(r.batch.owner.tolist(), r.batch.target.tolist(), token_gains(m, r).tolist()))
        for b, i in enumerate(r.index):
            pair, first = m.pairs[i], sums[b].abs().topk(most).indices.tolist()
            out = found[i] = {"prompt": pair.text, "base": m.base[i], "steered": m.full[i]}
            out["features"] = [{**label(m, j), "nats": sums[b, j].item()} for j in first if sums[b, j]]
            for side, mine in (("chosen", b), ("rejected", b + len(r.index))):
                out[side] = [(piece(m, token), nats) for owner, token, nats in gained if owner == mine]
                out[f"{side}_marks"] = m.judge.mark(pair.text, getattr(pair, side))
    return [found[i] for i in picked]


def describe(result, about):
    pairs = [block for pair in result["pairs"] for block in pair_blocks(pair)]
    cards = [feature_card(x, n < 6) for n, x in enumerate(result["features"])]
    return [Text("Ten pairs", "heading"), Text(PAIRS, "note"), *pairs,
            Text("Features", "heading"), Text(FEATURES, "note"), *cards]


def pair_blocks(pair):
    sides = ("chosen", "rejected")
    top = max(abs(x) for side in sides for _, x in pair[side])
    columns = [(side, Tokens("", pair[side], top=top), pair[f"{side}_marks"]) for side in sides]
    gain = pair["steered"] - pair["base"]
    base, steered, gain = (number(x, "+.3f") for x in (pair["base"], pair["steered"], gain))
    says = f"margin {base} → {steered}, gain {gain} nats a token"
    rows = [[x["name"], number(x["nats"], "+.4f"), x["description"]] for x in pair["features"]]
    table = Table(["feature", "nats", "what it is about"], rows)
    first = ", ".join(f"{row[0]} ({row[1]})" for row in rows)
    return [Answers(pair["prompt"], columns, says), Card("First features", "", [], [table], first)]


def feature_card(x, is_open):
    def tokens(key):
        return ", ".join(f"{word.replace(' ', '␣')} {number(amount, '+.2f')}" for word, amount in x[key])
    first, last = (number(x[key], "+.4f") for key in ("first_in", "last_out"))
    steered = f"at {percent(x['steered'], '.1f')} of tokens, {percent(x['up'])} of them up"
    lines = [("first in / last out", f"{first} / {last}"), ("steered", steered)]
    lines += [("fires", f"at {percent(x['fires'], '.1f')} of tokens")]
    lines += [("usage", f"{percent(x['usage'], '.1f')} of all steering")]
    lines += [("likelier", tokens("raises")), ("less likely", tokens("lowers"))]
    amounts = [both for key in ("steered_at", "fires_at") for text in x[key] for _, both in text]
    top, shown = [max(map(abs, column)) for column in zip(*amounts)], []
    for key, title in (("steered_at", "Steered most"), ("fires_at", "Fires most")):
        shown += [Tokens("" if n else title, text, "feature", top) for n, text in enumerate(x[key])]
    says = (x["description"] or "No description.") + (f" (by {x['by']})" if x["by"] else "")
    amount = f"{number(x['nats'], '+.4f')} ± {number(x['se'], '.4f')} nats"
    return Card(x["name"], x["group"], lines, shown, says, amount, is_open)
