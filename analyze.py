"""`python analyze.py RUN`: what does the policy reward? Writes RUN/analysis.json and RUN/report.html, and prints the summary.

    behaviour   what the answers do before and after, and whether the text is still sound
    usage       how many features are steered, and how evenly
    rates       how often they are style or alignment features: the paper's table, with intervals and controls
    causes      what is lost when they are masked, beside random sets and sets of the same usage; strength and top-k
    ledger      where the margin came from: token by token, and feature by feature; both add up to the gain
    geometry    the shape of the steering: effective rank, constant share, what few directions do

Four rules, each a fault of the paper's own analysis that users found (arXiv 2509.12934, sections 4 and 5):
labels belong to one SAE and are refused for another; only EFFECTIVE steering at STEERED positions counts; intervals are bootstrapped over
prompts (on the lab over facts, too), never over tokens; no effect of a feature set stands without sets drawn at random.

Everything is computed on held-out pairs. What lies below the steering never changes, so its output h is computed once. Neither does
the steering itself depend on what is done with it (it reads h, before anything is added), so v is computed once and kept as a sparse list;
masking, scaling and attribution only change how much of it is added.

    python analyze.py runs/style-1
    python analyze.py runs/style-1 --only usage,rates
    python analyze.py --make-labels lab                                       # what each feature is about: labels.py
    python analyze.py --calibrate runs/results/*                              # do the instruments tell the truth? tiny/calibrate.py
"""
import argparse
import hashlib
import json
import math
import platform
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fsrl
import labels as feature_labels
import report
import simpo
from gemma import UserError, decode, generate, read_json, write_json

SECTIONS = ("behaviour", "usage", "rates", "causes", "ledger", "geometry")
REGIONS = ("prompt", "chosen", "rejected")
CALIBRATION = Path(__file__).resolve().parent / "tiny" / "calibration.json"
FEWEST = 10              # clusters that an interval needs


# ---- statistics --------------------------------------------------------------------------------------------------------

def bootstrap(columns, clusters, statistic, *, samples=2000, seed=0):
    """A statistic of the sums of columns (n,), with its 95% interval, drawing whole clusters with replacement. -> {"value", "low", "high", "se"}

    clusters (n,): whose entries belong together, such as those of one prompt. Tokens are never drawn: they are not independent. Percentile
    bootstrap (Efron and Tibshirani 1993, ch. 13); draws in which the statistic is no number are left out.
    """
    _, member = np.unique(clusters, return_inverse=True)
    n = member.max() + 1 if len(member) else 0
    if n < FEWEST:
        raise UserError(f"{n} prompts are too few for an interval; it needs at least {FEWEST} (more held-out pairs, or a larger --limit)")
    totals = np.stack([np.bincount(member, x, n) for x in columns])
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), samples)       # how often each cluster is drawn
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = statistic(*totals.sum(1)), statistic(*(totals @ draws.T))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)
    return {"value": float(value), "low": float(low), "high": float(high), "se": float(drawn.std()) if len(drawn) else math.nan}


def ratio(num, den=None, clusters=None, **how):
    """Σ num / Σ den (den None: ones, so a mean) by `bootstrap`; clusters None: each entry stands alone."""
    return bootstrap([num, np.ones(len(num)) if den is None else den], np.arange(len(num)) if clusters is None else clusters, np.divide, **how)


def apart(x):
    """Whether 0 is left out, by the interval over prompts and, where there is one, by that over facts."""
    return all(x.get(low, math.nan) > 0 or x.get(high, math.nan) < 0 for low, high in (("low", "high"), ("facts_low", "facts_high")) if low in x)


def gini(x):
    """0: all alike, towards 1: one has all. x >= 0, zeros included if they are meant to count."""
    x = np.sort(np.asarray(x, dtype=np.float64))
    return float((2 * np.arange(1, len(x) + 1) - len(x) - 1) @ x / (len(x) * x.sum())) if len(x) and x.sum() > 0 else math.nan


def usage_statistics(count, positions):
    """How evenly features are used. count (F,): positions at which each is active, of `positions`. -> dict

    curve: share of positions of the used features, falling, at up to 200 ranks · slope: of log10(share in percent) per rank, least squares ·
    top1, top10: share of all events that fall on the most used 1% and 10% of all F features · gini_used, gini_all
    """
    count = np.sort(np.asarray(count, dtype=np.float64))[::-1]
    used = count[count > 0]
    at = np.unique(np.geomspace(1, max(1, len(used)), 200).round().astype(int)) if len(used) else np.array([], dtype=int)
    top = lambda share: float(count[:max(1, round(share * len(count)))].sum() / count.sum()) if len(used) else math.nan      # noqa: E731
    slope = float(np.polyfit(np.arange(len(used)), np.log10(100 * used / positions), 1)[0]) if len(used) > 1 else math.nan
    return {"used": len(used), "events": float(count.sum()), "rank": at.tolist(), "curve": (used[at - 1] / max(1, positions)).tolist(), "slope": slope,
            "top1": top(.01), "top10": top(.10), "gini_used": gini(used), "gini_all": gini(count)}


def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else math.nan


def directions(second_moment):
    """Eigenvalues (falling) and eigenvectors (columns) of a symmetric matrix, and how many directions it fills.

    participation: (Σλ)² / Σλ², the number of equal directions that would look like this · d90, d95: how many hold 90% and 95% of Σλ
    """
    value, vector = torch.linalg.eigh(second_moment)
    value, vector = value.flip(0).clamp_min(0), vector.flip(1)
    total = value.sum()
    if total <= 0:
        return value, vector, {"participation": 0.0, "d90": 0, "d95": 0}
    reach = (value.cumsum(0) / total).tolist()
    return value, vector, {"participation": (total ** 2 / value.square().sum()).item(), **{f"d{p}": 1 + sum(r < p / 100 - 1e-12 for r in reach) for p in (90, 95)}}


# ---- what everything below looks at --------------------------------------------------------------------------------------

@dataclass
class Sparse:
    """A few active features at each of N tokens, token by token."""
    token: torch.Tensor      # (n,) which of the N
    feature: torch.Tensor    # (n,) which of F
    value: torch.Tensor      # (n,)
    start: torch.Tensor      # (N,) where each token's entries begin

    @classmethod
    def of(cls, dense):
        token, feature = dense.nonzero(as_tuple=True)
        count = torch.bincount(token, minlength=len(dense))
        return cls(token, feature, dense[token, feature], count.cumsum(0) - count)


@dataclass
class Rows:
    """A batch of held-out pairs with all that never changes."""
    index: list              # B: which of the pairs
    batch: simpo.Batch
    h: torch.Tensor          # (B,T,D) output of the steered layer, before steering
    where: torch.Tensor      # (B,T) steered tokens, N in all
    v: Sparse                # effective steering at these
    f: Sparse                # the SAE's own activations there
    row: torch.Tensor        # (N,) which row of the batch
    branch: torch.Tensor     # (N,) 0 prompt, 1 chosen, 2 rejected
    split: object = None     # see `split_of`


def numbered(things):
    """Equal things get equal numbers, (n,)."""
    number = {}
    return np.array([number.setdefault(x, len(number)) for x in things])


class Material:
    """A run, its held-out pairs, and what is computed once for all sections.

    pairs (P of them), rows (all pairs in batches), prompts and facts (P,): clusters of the bootstrap; facts is prompts outside the lab.
    base, full (P,): margins s(chosen) - s(rejected) of the base model and of the policy, nats a token.
    """

    def __init__(self, run, pairs, meta, world, *, batch_size=32, progress=True):
        self.run, self.model, self.sae, self.steering, self.tokenizer = run, run.model, run.sae, run.steering, run.tokenizer
        self.pairs, self.meta, self.world, self.progress = pairs, meta, world, progress
        self.questions = [world.read_prompt(p.text) if world else None for p in pairs]
        self.prompts = numbered([p.prompt for p in pairs])
        self.facts = numbered([(q.subject, q.relation) if q else p.prompt for q, p in zip(self.questions, pairs)])
        if len(set(self.facts)) < FEWEST:
            raise UserError(f"{len(set(self.facts))} held-out prompts are too few for an interval; it needs at least {FEWEST} (more held-out pairs, or a larger --limit)")
        self.batch_size, self.parts = batch_size, {}
        self.rows = [self._rows(index, batch.to(self.model.device)) for index, batch in self.bar(list(simpo.batches(pairs, batch_size)), "frozen prefix")]
        self.base, self.full = self.margins(torch.zeros(self.sae.d_sae)), self.margins()

    @torch.no_grad()
    def _rows(self, index, batch, h=None):
        h, where = simpo.prefix(self.model, batch, self.sae.layer) if h is None else h, batch.where(self.steering.positions)
        x = h[where]
        return Rows(index, batch, h, where, Sparse.of(self.steering.features(x)), Sparse.of(self.sae.encode(x)), where.nonzero()[:, 0], batch.branch[where])

    def bar(self, items, name):
        return tqdm(items, desc=name, leave=False, dynamic_ncols=True, disable=not self.progress)

    def delta(self, rows, keep=None):
        """What is added at the N steered tokens, (N,D); keep (F,): how much of each feature's steering."""
        v = rows.v
        weight = v.value if keep is None else v.value * keep.to(v.value)[v.feature]
        W = self.sae.W_dec
        if not len(v.feature) or W.device.type == "mps":                          # there is no embedding_bag on mps
            return W.new_zeros(len(v.start), W.shape[1]).index_add(0, v.token, W[v.feature] * weight[:, None].to(W.dtype))
        return F.embedding_bag(v.feature, W, v.start, mode="sum", per_sample_weights=weight.to(W.dtype))

    def above(self, rows, delta):
        """The blocks above the steering, on h with delta (N,D) added. -> (B,T,D)"""
        h = rows.h.clone()
        h[rows.where] = rows.h[rows.where] + delta.to(h.dtype)
        return self.blocks(rows, h)

    def blocks(self, rows, h):
        return self.model.blocks(h, self.sae.layer + 1, self.model.config.num_hidden_layers, positions=rows.batch.position, mask=rows.batch.mask())

    @torch.no_grad()
    def margins(self, keep=None, *, change=None, rows=None):
        """s(chosen) - s(rejected) of each pair, (P,) float64; nan for pairs that are not in `rows`.

        keep (F,): masks features (0), or scales them; what a top_k has chosen stays chosen. change: delta (N,D) -> delta.
        """
        out = np.full(len(self.pairs), np.nan)
        for r in self.rows if rows is None else rows:
            delta = self.delta(r, keep)
            chosen, rejected = simpo.mean_logps(self.model, r.batch, self.above(r, delta if change is None else change(delta)))
            out[r.index] = (chosen - rejected).cpu().double().numpy()
        return out

    def some(self, pairs):
        """So many of the pairs (and enough for an interval), evenly spaced in the file, as batches of their own."""
        n = min(len(self.pairs), max(pairs, 2 * FEWEST))
        if n not in self.parts:
            index = np.linspace(0, len(self.pairs) - 1, n).round().astype(int).tolist()
            kept, self.parts[n] = {i: row for r in self.rows for i, row in zip(r.index, r.h)}, []
            for some, batch in simpo.batches([self.pairs[i] for i in index], self.batch_size):
                some, T = [index[k] for k in some], batch.ids.shape[1]
                h = torch.stack([F.pad(kept[i][:T], (0, 0, 0, T - min(T, len(kept[i])))) for i in some])       # computed once for all sections
                self.parts[n].append(self._rows(some, batch.to(self.model.device), h))
        return self.parts[n]

    def interval(self, statistic, *columns):
        """`bootstrap` over prompts of columns with one value a pair, with the interval over facts beside it on the lab. nan in the first: not measured."""
        there = ~np.isnan(columns[0])
        columns = [np.asarray(x, dtype=np.float64)[there] for x in columns]
        if len(np.unique(self.facts[there])) < FEWEST:                        # of a part of the pairs; the whole was looked at when it was read
            value = statistic(*(x.sum() for x in columns)) if there.any() else math.nan
            return {"value": float(value), "low": math.nan, "high": math.nan, "se": math.nan}
        out = bootstrap(columns, self.prompts[there], statistic)
        if self.world:
            wide = bootstrap(columns, self.facts[there], statistic)
            out |= {"facts_low": wide["low"], "facts_high": wide["high"]}
        return out

    def mean(self, values, den=None):
        """Σ values / Σ den over pairs (den None: their mean), with its interval."""
        return self.interval(np.divide, np.asarray(values, dtype=np.float64), np.ones(len(values)) if den is None else den)

    def without(self, features):
        """keep (F,) that masks these features."""
        keep = torch.ones(self.sae.d_sae)
        keep[features] = 0.0
        return keep

    def loss(self, margins):
        """SimPO's loss at these margins, with the run's β and γ/β. (P,)"""
        c = self.run.config
        m = torch.as_tensor(margins)
        return simpo.simpo_loss(m, torch.zeros_like(m), c.get("beta", 10.0), c.get("gamma_ratio", .5), kind=c.get("loss", "sigmoid"),
                                label_smoothing=c.get("label_smoothing", 0.0)).numpy()

    def events(self, kind, weight=None, branches=(0, 1, 2)):
        """Σ over tokens of these regions of what each feature does there, (F,) float64. kind: "v" or "f"; weight None: one an event,
        else a function of the values."""
        total = torch.zeros(self.sae.d_sae, dtype=torch.float64)
        for r in self.rows:
            s = getattr(r, kind)
            here = torch.isin(r.branch[s.token], torch.tensor(branches, device=s.token.device))
            amount = torch.ones_like(s.value) if weight is None else weight(s.value)
            total += torch.bincount(s.feature[here].cpu(), amount[here].cpu().double(), self.sae.d_sae)
        return total.numpy()

    def mass(self):
        """Usage of each feature: Σ‖v_i d_i‖ over all steered tokens, (F,)."""
        return self.events("v", torch.abs) * self.sae.W_dec.float().norm(dim=-1).cpu().double().numpy()


class Kept:
    """A steering of which only the features in keep (F,) act, as an edit: what Material.margins(keep) scores, for generation."""

    def __init__(self, steering, keep):
        self.steering, self.keep, self.positions = steering, keep, steering.positions

    def __call__(self, h, where):
        return self.steering.add(h, where, self.steering.features(h[where]) * self.keep.to(h.device))

    def edits(self):
        return {self.steering.sae.layer: self}


# ---- behaviour and health ------------------------------------------------------------------------------------------------

# Plain prose on which a policy has no business: KL on it says how far the model has moved where nobody asked. The lab has notes of its own.
NEUTRAL = """The river rises in the hills north of the town and reaches the sea after ninety kilometres. Barges carried slate and wool down to the port until the railway came.
To sharpen a plane iron, set the bevel flat on the stone, lift the heel a little, and draw it back in long even strokes. Turn it over and take off the burr.
The committee met on the second Tuesday of each month. Minutes were kept by the secretary and read aloud at the next meeting before any other business.
Snow fell through the night and by morning the road over the pass was closed. Two lorries waited below the barrier with their engines off.
Water boils at a lower temperature in the mountains, because the air above it presses less. Beans take longer there, and tea tastes flat.
She bought three yards of blue cotton, a reel of thread and a paper of pins, and walked home by way of the market.""".split("\n")
# How far a measure may worsen before the report turns red: shares in points, perplexity and length as factors (length either way), KL in nats a token.
LIMITS = {"parse": -.03, "repetition": .05, "non_ascii": .02, "perplexity": 1.5, "words": 2.5, "kl": .5}
MARKDOWN = re.compile(r"\*\*|```|^\s*(#{1,6} |[-*+] |\d+[.)] |\|)", re.M)


def text_statistics(answers):
    """Of texts: length in words, share of 4-grams of words that occurred before in the same answer, distinct words of all words,
    share of answers with markdown, share of characters beyond ASCII."""
    words = [a.split() for a in answers]
    grams = [[tuple(w[i:i + 4]) for i in range(len(w) - 3)] for w in words]
    total = sum(map(len, grams))
    return {"words": sum(map(len, words)) / max(1, len(answers)), "repetition": sum(len(g) - len(set(g)) for g in grams) / total if total else 0.0,
            "distinct": len({w for a in words for w in a}) / max(1, sum(map(len, words))), "markdown": sum(bool(MARKDOWN.search(a)) for a in answers) / max(1, len(answers)),
            "non_ascii": sum(c > "\x7f" for a in answers for c in a) / max(1, sum(map(len, answers)))}


@torch.no_grad()
def perplexity(model, prompts, answers, batch_size=32):
    """exp of the mean -log p a token of these answers under the model without steering: what is likely for it reads well to it."""
    pairs = [simpo.Pair(tuple(p), tuple(a), tuple(a[-1:])) for p, a in zip(prompts, answers) if a]
    total = tokens = 0.0
    for _, batch in simpo.batches(pairs, batch_size):
        chosen, _ = simpo.response_logps(model, batch.to(model.device))
        lengths = batch.lengths[:len(chosen)].to(chosen)
        total, tokens = total + (chosen * lengths).sum().item(), tokens + lengths.sum().item()
    return math.exp(min(50.0, -total / max(1.0, tokens)))


def neutral_texts(m, count=24):
    if not m.world:
        return NEUTRAL
    from tiny import measure
    return measure.neutral(count)


def health(m, edits, prompts, questions, *, temperature, seed=0, max_new_tokens=64, batch_size=256):
    """Answers of a policy to prompts (ids), and whether they are sound text. -> (dict, answers as ids)"""
    ids = generate(m.model, prompts, max_new_tokens=max_new_tokens, edits=edits, temperature=temperature, seed=seed, batch_size=batch_size)
    out = text_statistics([decode(m.tokenizer, a) for a in ids]) | {"tokens": sum(map(len, ids)) / len(ids), "perplexity": perplexity(m.model, prompts, ids, min(batch_size, 32))}
    if m.world:
        out["parse"] = m.world.behaviour(questions, [[m.tokenizer.id_to_token(i) for i in a] for a in ids])["parse"]
    return out, ids


def alarms(base, steered, n=math.inf):
    """What fell, in words: [] for a healthy policy. n: how many answers; a share of well-formed ones has to fall by more than two standard errors, too"""
    out = []
    noise = 2 * math.sqrt(sum(x["parse"] * (1 - x["parse"]) + 1 / n for x in (base, steered)) / n) if "parse" in base else 0
    if "parse" in base and steered["parse"] < base["parse"] - max(-LIMITS["parse"], noise):
        out.append(f"well-formed answers fell from {base['parse']:.1%} to {steered['parse']:.1%}")
    for name, word in (("repetition", "repeated 4-grams"), ("non_ascii", "characters beyond ASCII")):
        if steered[name] > base[name] + LIMITS[name]:
            out.append(f"{word} rose from {base[name]:.1%} to {steered[name]:.1%}")
    if steered["perplexity"] > base["perplexity"] * LIMITS["perplexity"]:
        out.append(f"the base model's perplexity of the answers rose from {base['perplexity']:.2f} to {steered['perplexity']:.2f}")
    if not base["words"] / LIMITS["words"] <= steered["words"] <= base["words"] * LIMITS["words"]:
        out.append(f"the length of the answers went from {base['words']:.1f} to {steered['words']:.1f} words")
    if steered.get("kl", 0) > LIMITS["kl"]:
        out.append(f"KL from the base model on neutral text is {steered['kl']:.2f} nats a token")
    return out


def behaviour(m, args):
    """Section 1: answers of the base model and of the policy to the held-out prompts, greedy and at T=1."""
    chosen = {p.prompt: (q, fact) for p, q, fact in zip(m.pairs, m.questions, m.facts)}
    prompts = list(chosen)[:args.answers]
    questions, facts = [chosen[p][0] for p in prompts], [chosen[p][1] for p in prompts]
    edits, ids = m.steering.edits(), {}
    out = {"prompts": len(prompts)}
    jobs = [(kind, t, who) for kind, t in (("greedy", 0.0), ("sampled", 1.0)) for who in ("base", "steered")]
    for kind, temperature, who in m.bar(jobs, "answers"):
        out.setdefault(kind, {})[who], ids[kind, who] = health(m, edits if who == "steered" else None, prompts, questions, temperature=temperature,
                                                               max_new_tokens=args.max_new_tokens, batch_size=args.answer_batch)
    out["kl"] = simpo.drift(m.model, m.tokenizer, edits, neutral_texts(m))
    for kind in ("greedy", "sampled"):
        out[kind]["steered"]["kl"] = out["kl"]
        out[kind]["alarms"] = alarms(out[kind]["base"], out[kind]["steered"], len(prompts))
        if m.world:
            both = [[m.world.outcome(q, [m.tokenizer.id_to_token(i) for i in a]) for q, a in zip(questions, ids[kind, who])] for who in ("base", "steered")]
            out[kind]["choices"] = {}
            for name in ("parse", *m.world.CHOICES):
                at = [i for i, o in enumerate(both[0]) if name in o]
                if len({facts[i] for i in at}) >= FEWEST:
                    before, after = (np.array([o[i][name] for i in at]) for o in both)
                    out[kind]["choices"][name] = {"base": before.mean(), "steered": after.mean(), "change": ratio(after - before, clusters=[facts[i] for i in at]),
                                                  "weight": m.meta.get("weights", {}).get(name)}
    out["alarms"] = out["greedy"]["alarms"] + [f"{a} (sampled)" for a in out["sampled"]["alarms"]]
    pick = list(range(0, len(prompts), max(1, len(prompts) // 4)))[:4]
    out["examples"] = [{"prompt": m.tokenizer.decode(list(prompts[i])), **{f"{kind}_{who}": decode(m.tokenizer, a[i]) for (kind, who), a in ids.items()}} for i in pick]
    return out


# ---- usage ---------------------------------------------------------------------------------------------------------------

def usage(m, args):
    """Section 2: how many features a token moves and how evenly they are used, beside the SAE's own activations at the same tokens."""
    out = {"d_sae": m.sae.d_sae, "regions": {}}
    for branch, region in enumerate(REGIONS):
        tokens = np.zeros(len(m.pairs))
        for r in m.rows:
            tokens[r.index] = torch.bincount(r.row[r.branch == branch], minlength=len(r.index)).cpu().numpy()
        if not tokens.sum():
            continue
        here = {"tokens": float(tokens.sum())}
        for kind, name in (("v", "steering"), ("f", "sae")):
            active = np.zeros(len(m.pairs))
            for r in m.rows:
                s = getattr(r, kind)
                active[r.index] = torch.bincount(r.row[s.token[r.branch[s.token] == branch]], minlength=len(r.index)).cpu().numpy()
            has = tokens > 0
            here[name] = {"l0": m.mean(np.where(has, active / np.maximum(tokens, 1), np.nan)), **usage_statistics(m.events(kind, branches=(branch,)), tokens.sum())}
        out["regions"][region] = here
    out["seeds"] = siblings(m, args)
    return out


def siblings(m, args, top=50):
    """Overlap of the most used features (Σ‖v_i d_i‖) with those of runs that differ in their seed alone."""
    here, found = Path(m.run.folder).resolve(), []
    drop = {"seed", "run", "runs", "date", "machine", "versions", "threads", "device", "eval_pairs", "log_every", "save_every", "keep_prefix", "eval_pairs_sha256"}
    same = lambda config: {k: v for k, v in config.items() if k not in drop}      # noqa: E731
    for path in sorted(here.parent.glob("*/config.json")):
        try:
            config = read_json(path)
            if path.parent != here and config.get("seed") != m.run.config.get("seed") and same(config) == same(m.run.config) and (path.parent / fsrl.CONFIG).exists():
                found.append(path.parent)
        except UserError:
            continue
    ranked = [set(np.argsort(-m.mass(), kind="stable")[:top].tolist())]
    for folder in found[:4]:
        adapter, facts = fsrl.load_adapter(folder, fsrl.import_adapter(args.adapter) if args.adapter else None)
        steering = replace_adapter(m.steering, adapter, facts.get("masked", ()))
        mass = torch.zeros(m.sae.d_sae, dtype=torch.float64)
        with torch.no_grad():
            for r in m.some(200):
                mass += steering.features(r.h[r.where]).abs().cpu().double().sum(0)
        ranked.append(set((mass * m.sae.W_dec.float().norm(dim=-1).cpu().double()).argsort(descending=True, stable=True)[:top].tolist()))
    used = int((m.events("v") > 0).sum())
    overlaps = [jaccard(a, b) for i, a in enumerate(ranked) for b in ranked[:i]]
    share = top / max(top, used)
    return {"runs": [f.name for f in found[:4]], "top": top, "jaccard": overlaps, "chance": share / (2 - share)}


def replace_adapter(steering, adapter, masked):
    """The same steering with another adapter and other masked features."""
    like = next(steering.adapter.parameters())
    return fsrl.Steering(steering.sae, adapter.to(like.device, like.dtype).eval(), fusion=steering.fusion, positions=steering.positions,
                         strength=steering.strength, top_k=steering.top_k, masked=masked)


# ---- label rates ---------------------------------------------------------------------------------------------------------

def label_counts(s, tokens, marks):
    """How many active features of each token carry each mark.  marks (F,M) -> (tokens, M)"""
    out = torch.zeros(tokens, marks.shape[1], dtype=torch.float32, device=s.value.device)
    for part in torch.arange(len(s.token), device=s.value.device).split(2**16):
        out.index_add_(0, s.token[part], marks[s.feature[part]])
    return out


def label_shares(r, marks):
    """At each token the share of its judged active features that carries each mark.  marks (F,1+M), the first: judged

    -> both (N,): whether a judged feature is steered and one fires there, {"v": (N,M), "f": (N,M)} float64
    """
    counts = {kind: label_counts(getattr(r, kind), len(r.row), marks.to(r.h.device)).cpu() for kind in ("v", "f")}
    return (counts["v"][:, 0] > 0) & (counts["f"][:, 0] > 0), {kind: (count[:, 1:] / count[:, :1].clamp_min(1)).double() for kind, count in counts.items()}


def rates(m, args, permutations=99):
    """Section 4, the paper's table: of the features that are active at a token, which share is style, which alignment?

    Per position, as in the paper (section 4; macro: each token counts once), and per pair (each pair counts once), steered features
    beside active SAE features at the same tokens: those that have a judged feature of either kind (the paper averages each over tokens of its
    own). Features nobody could judge are left out of both. `change` is relative, with its interval. Control: the labels dealt out anew
    among the judged features; `shuffled` is the range of `change` in 95 of 100 deals, `p` the share of deals that moved it at least as far.
    """
    g = m.groups
    known = g["known"]
    generator = torch.Generator().manual_seed(0)
    where = known.nonzero()[:, 0]
    deals = torch.stack([torch.randperm(len(where), generator=generator) for _ in range(permutations)]) if len(where) else torch.zeros(0, 0, dtype=torch.long)
    out = {"theory": {label: (g[label] & known).sum().item() / max(1, int(known.sum())) for label in feature_labels.LABELS}, "regions": {}}
    out["judged"] = {"features": int(known.sum()), "of": m.sae.d_sae}
    for label in feature_labels.LABELS:
        if not (g[label] & known).any():
            continue
        marks = torch.zeros(m.sae.d_sae, 2 + permutations)
        marks[:, 0], marks[:, 1] = known.float(), (g[label] & known).float()
        for k, deal in enumerate(deals):
            marks[where, 2 + k] = marks[where[deal], 1]
        total = {}                   # per pair: Σ over its tokens of a region of [has a judged feature, share (first true, then dealt)]
        for r in m.bar(m.rows, f"rates, {label}"):
            both, shares = label_shares(r, marks)
            for kind, share in shares.items():
                share = torch.cat([both[:, None].double(), share], 1)
                for branch in range(3):
                    here = both & (r.branch == branch).cpu()
                    sums = torch.zeros(len(r.index), share.shape[1], dtype=torch.float64).index_add_(0, r.row[here.to(r.row.device)].cpu(), share[here])
                    total.setdefault((kind, branch), torch.zeros(len(m.pairs), share.shape[1], dtype=torch.float64))[r.index] = sums
        for branch, region in enumerate(REGIONS):
            v, f = total["v", branch].numpy(), total["f", branch].numpy()
            if not v[:, 0].sum():
                continue
            change = m.interval(lambda a, b, c, d: (a / b) / (c / d) - 1, v[:, 1], v[:, 0], f[:, 1], f[:, 0])
            dealt = (v[:, 2:].sum(0) / v[:, 0].sum()) / np.maximum(f[:, 2:].sum(0) / f[:, 0].sum(), 1e-12) - 1
            per = lambda t: np.where(t[:, 0] > 0, t[:, 1] / np.maximum(t[:, 0], 1), np.nan)      # noqa: E731
            out["regions"].setdefault(region, {})[label] = {
                "steering": m.mean(v[:, 1], v[:, 0]), "sae": m.mean(f[:, 1], f[:, 0]), "change": change,
                "steering_per_pair": m.mean(per(v)), "sae_per_pair": m.mean(per(f)), "shuffled": np.percentile(dealt, [2.5, 97.5]).tolist(),
                "p": float((1 + (np.abs(dealt) >= abs(change["value"])).sum()) / (1 + permutations)) if math.isfinite(change["value"]) else math.nan}
    mass = m.mass()
    out["mass"] = {label: float(mass[(g[label] & known).numpy()].sum() / max(mass[known.numpy()].sum(), 1e-30)) for label in feature_labels.LABELS}
    return out


# ---- causes ----------------------------------------------------------------------------------------------------------------

def matched_set(named, mass, pool, rng):
    """As many features of `pool`, each near in usage to one of `named` (one of the five nearest that are left, by chance). If the pool has
    too little to come to 80% of the usage, more of its largest are added until it does. -> (features, achieved match in [0, 1])"""
    left = pool[np.argsort(mass[pool], kind="stable")].tolist()
    size, drawn = mass[left].tolist(), []
    for i in sorted(named.tolist(), key=lambda i: -mass[i]):
        if not left:
            break
        at = int(np.searchsorted(size, mass[i]))
        low = max(0, min(at - 2, len(left) - 5))
        k = int(rng.integers(low, min(low + 5, len(left))))
        drawn.append(left.pop(k))
        size.pop(k)
    goal = mass[named].sum()
    have = mass[drawn].sum() if drawn else 0.0
    while left and have < .8 * goal:
        drawn.append(left.pop())
        have += mass[drawn[-1]]
    return np.array(drawn, dtype=int), float(min(have, goal) / max(have, goal)) if max(have, goal) > 0 else 0.0


def causes(m, args):
    """Section 5: what is lost when features are masked, and what is left when only they act; sets beside random ones.

    Each set is that part of the labelled features that is steered at all. `lost` is the share of the gain (the policy's margin less the base's) that
    is gone without them; `left` the share that they bring alone. Controls, 99 each: sets of the same size drawn from all steered
    features (`random`, with their mean overlap with the set), and sets outside it of the same usage Σ‖v_i d_i‖ (`matched`;
    below a match of .8 nothing is claimed). Controls are scored on a part of the pairs, and compared with `part`, the set's own share there. A
    gain that cannot be told from 0 has no shares: then nothing is masked, and `silent` says so.
    """
    gain = m.full - m.base
    out = {"gain": m.mean(gain), "loss": {"base": m.mean(m.loss(m.base)), "steered": m.mean(m.loss(m.full))},
           "accuracy": {"base": m.mean(m.base > 0), "steered": m.mean(m.full > 0)}, "sets": {}, "draws": args.draws}
    mass = m.mass()
    used = np.flatnonzero(mass > 0)
    out["used"] = len(used)
    some = m.some(args.draw_pairs)
    part = np.concatenate([r.index for r in some])
    out["draw_pairs"], out["sweep_pairs"] = len(part), sum(len(r.index) for r in m.some(args.draw_pairs * 3))
    part_gain = gain[part].sum()
    texts = probe_prompts(m, args)

    def sound(edits):
        return health(m, edits, *texts, temperature=1.0, max_new_tokens=args.max_new_tokens, batch_size=args.answer_batch)[0]
    out["health"] = {"base": sound(None), "steered": sound(m.steering.edits())}
    sets = {}
    if m.groups and not apart(out["gain"]):
        out["silent"] = "The gain cannot be told from 0, so there is no share of it to lose."
    elif m.groups:
        style, alignment = (np.flatnonzero((m.groups[label] & m.groups["known"]).numpy()) for label in feature_labels.LABELS)
        sets = {"style": style, "alignment": alignment, "both": np.union1d(style, alignment)}
        out["overlap"] = len(np.intersect1d(style, alignment))
    bar = m.bar(range(2 * args.draws * len(sets)), "random sets")
    rng = np.random.default_rng(0)

    def share(keep):                                     # of the gain on a part of the pairs
        return float(np.nansum((m.margins(keep, rows=some) - m.base)[part]) / part_gain)
    for name, labelled in sets.items():
        named = np.intersect1d(labelled, used)
        if not len(named):
            bar.update(2 * args.draws)                   # none of them is steered: there is nothing to lose
            continue
        here = out["sets"][name] = {"labelled": len(labelled), "steered": len(named), "usage": float(mass[named].sum() / max(mass.sum(), 1e-30))}
        for what in ("mask", "keep"):
            keep = m.without(named) if what == "mask" else 1 - m.without(named)
            margins = m.margins(keep)
            moved = m.full - margins if what == "mask" else margins - m.base
            on_part = np.full(len(gain), np.nan)
            on_part[part] = moved[part]
            here[what] = {"share": m.mean(moved, gain), "part": m.mean(on_part, gain), "loss": m.mean(m.loss(margins)), "accuracy": m.mean(margins > 0),
                          "health": sound(Kept(m.steering, keep).edits())}
        outside = np.setdiff1d(used, named)
        for kind in ("random", "matched"):
            lost, left, match, overlap, size, loss, accuracy, texts_left = [], [], [], [], [], [], [], []
            for _ in range(args.draws):
                if kind == "random":
                    drawn = rng.choice(used, len(named), replace=False)
                    fit = 1.0
                else:
                    drawn, fit = matched_set(named, mass, outside, rng)
                keep = m.without(drawn)
                margins = m.margins(keep, rows=some)[part]
                lost.append(1 - float((margins - m.base[part]).sum() / part_gain))
                loss.append(float(m.loss(margins).mean()))
                accuracy.append(float((margins > 0).mean()))
                left.append(share(1 - keep))
                if len(texts_left) < 3:               # answers take long: three sets say enough about the text
                    texts_left.append(sound(Kept(m.steering, keep).edits()))
                match.append(fit)
                size.append(len(drawn))
                overlap.append(len(np.intersect1d(drawn, named)) / len(named))
                bar.update()
            spread = lambda x: {"mean": float(np.mean(x)), "low": float(np.percentile(x, 2.5)), "high": float(np.percentile(x, 97.5))}      # noqa: E731
            here[kind] = {"lost": spread(lost), "left": spread(left), "loss": spread(loss), "accuracy": spread(accuracy),
                          "health": {x: float(np.mean([h[x] for h in texts_left])) for x in texts_left[0]}, "size": float(np.mean(size)), "overlap": float(np.mean(overlap)), "match": float(np.mean(match)),
                          "p_lost": (1 + sum(x >= here["mask"]["part"]["value"] for x in lost)) / (1 + args.draws), "p_left": (1 + sum(x >= here["keep"]["part"]["value"] for x in left)) / (1 + args.draws)}
            here[kind]["claim"] = here[kind]["match"] >= .8
    bar.close()
    if all(label in out["sets"] for label in feature_labels.LABELS):
        out["per_feature"] = loss_per_feature(m, sets, used)
    out["strength"] = [sweep_point(m, args, sound, strength=a) for a in m.bar([0.0, .25, .5, .75, 1.0, 1.25, 1.5, 2.0, 3.0], "strength")]
    widest = max(int(torch.bincount(r.v.token, minlength=1).max()) if len(r.v.token) else 0 for r in m.rows)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if k < min(widest, m.steering.top_k or widest)]
    out["top_k"] = [sweep_point(m, args, sound, top_k=k) for k in m.bar([*ks, None], "top-k")]
    return out


def probe_prompts(m, args):
    """A few held-out prompts (ids) and their questions, for the health of many policies."""
    first = {p.prompt: q for p, q in zip(m.pairs, m.questions)}
    step = max(1, len(first) // args.probe_answers)
    prompts = list(first)[::step][:args.probe_answers]
    return prompts, [first[p] for p in prompts]


def sweep_point(m, args, sound, **change):
    """Loss, accuracy and health (sound: edits -> health) of the policy at another strength or with only the top_k features of a token."""
    s = m.steering
    other = fsrl.Steering(s.sae, s.adapter, fusion=s.fusion, positions=s.positions, masked=s.masked, strength=s.strength * change.get("strength", 1.0),
                          top_k=change.get("top_k") or s.top_k)
    with torch.no_grad():
        margins = m.margins(rows=[replace(r, v=Sparse.of(other.features(r.h[r.where]))) for r in m.some(args.draw_pairs * 3)])
    return {**change, "loss": m.mean(m.loss(margins)), "accuracy": m.mean(np.where(np.isnan(margins), np.nan, margins > 0)), "health": sound(other.edits())}


def loss_per_feature(m, sets, used, errors=(.1, .3)):
    """The paper's footnote: the loss added by masking a set, a feature of it (of all labelled, as there, and of the steered ones), and the ratio style : alignment.

    Its sensitivity: the same ratio when a share of each set is exchanged for steered features outside it, as wrong labels would do (5 draws each, lowest to highest).
    """
    rng, some = np.random.default_rng(0), m.some(256)
    part = np.concatenate([r.index for r in some])
    whole = m.loss(m.full[part]).mean()

    def added(features):
        return float(m.loss(m.margins(m.without(features), rows=some)[part]).mean() - whole)
    steered = {name: np.intersect1d(sets[name], used) for name in feature_labels.LABELS}
    cost = {name: added(steered[name]) for name in steered}
    out = {name: {"added": cost[name], "a_labelled_feature": cost[name] / max(1, len(sets[name])), "a_steered_feature": cost[name] / max(1, len(steered[name]))} for name in steered}
    a, b = (out[name]["a_steered_feature"] for name in feature_labels.LABELS)
    out["ratio"], out["errors"] = a / b if b else math.nan, {}
    for error in errors:
        drawn = []
        for _ in range(5):
            per = []
            for name in feature_labels.LABELS:
                wrong = rng.random(len(steered[name])) < error
                others = np.setdiff1d(used, steered[name])
                swapped = np.concatenate([steered[name][~wrong], rng.choice(others, min(len(others), int(wrong.sum())), replace=False)]).astype(int)
                per.append(added(swapped) / max(1, len(swapped)))
            drawn.append(per[0] / per[1] if per[1] else math.nan)
        out["errors"][str(error)] = [float(np.nanmin(drawn)), float(np.nanmax(drawn))]
    return out


# ---- the ledger ------------------------------------------------------------------------------------------------------------

# Where the grammar is unknown, what a token is for: the first rule that fits (see `rule`).
RULES = ("markdown", "list marker", "heading", "punctuation", "opener", "refusal", "hedge", "end", "rest")
OPENERS = set("sure certainly absolutely great definitely of course okay ok yes hello hi thanks thank happy glad".split())
REFUSALS = set("cannot can't cant won't sorry unable apologize apologise refuse decline inappropriate".split())
HEDGES = set("may might perhaps possibly probably generally typically usually however likely sometimes often could seems seem depending".split())


def rule(text, before):
    """Category of a token from its text and the answer's text before it."""
    line, word = before.rpartition("\n")[2], text.strip()
    start = not line.strip()
    if word.startswith("<") and word.endswith("_turn>"):
        return "end"
    if start and set(word) == {"#"}:
        return "heading"
    if start and (word in ("-", "*", "•", "+") or word.isdigit() and len(word) < 3) or line.strip().isdigit() and (word in (".", ")") or word.isdigit()):
        return "list marker"
    if word and set(word) <= set("*_`|~>"):
        return "markdown"
    if not any(c.isalnum() for c in word):
        return "punctuation"
    low = word.lower().strip(".,!?;:'\"")
    if len(before.split()) < 3 and low in OPENERS:
        return "opener"
    return "refusal" if low in REFUSALS or low == "t" and before.lower().endswith(("can'", "won'", "can’", "won’")) else "hedge" if low in HEDGES else "rest"


@dataclass
class Split:
    """How log-probabilities of a batch's answer tokens split: E entries."""
    read: torch.Tensor        # (E,) which answer token
    before: torch.Tensor      # (E,) which set of ids is off the mass before it
    after: torch.Tensor       # (E,) and after it; -1: the entry takes the token
    slot: torch.Tensor        # (E,) pair * C + category
    weight: torch.Tensor      # (E,) 1 / length of the answer, negative for the rejected one
    sets: object              # (K,V) 0 or 1, or None where every token is one entry


def categories(m):
    return (*m.world.CHOICES, "value", "form") if m.world else RULES


def split_of(m, r):
    """The Split of a batch, made once."""
    if r.split is not None:
        return r.split
    names = {name: i for i, name in enumerate(categories(m))}
    number, entries, B = {(): 0}, [], len(r.index)
    lengths, n = r.batch.lengths.tolist(), 0
    for b, i in enumerate(r.index):
        pair = m.pairs[i]
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            if m.world:
                from tiny import measure
                split = measure.shares_of_choices(m.tokenizer, m.questions[i], answer)
            else:
                split, text = [], ""
                for token in answer:
                    piece = m.tokenizer.decode([token], skip_special_tokens=False)
                    split.append([(rule(piece, text), (), None)])
                    text += piece
            for here in split:
                for name, before, after in here:
                    entries.append((n, number.setdefault(before, len(number)), -1 if after is None else number.setdefault(after, len(number)),
                                    b * len(names) + names[name], (1 - 2 * side) / lengths[b + side * B]))
                n += 1
    device, wide = m.model.device, torch.float32 if m.model.device.type == "mps" else torch.float64
    sets = torch.zeros(len(number), m.model.config.vocab_size, dtype=wide)
    for ids, k in number.items():
        sets[k, list(ids)] = 1.0
    columns = list(zip(*entries))
    r.split = Split(*(torch.tensor(c, device=device) for c in columns[:4]), torch.tensor(columns[4], dtype=wide, device=device), sets.to(device) if m.world else None)
    return r.split


def split_margins(m, r, h):
    """The margins of a batch by category, from the states after the last block (B,T,D). -> (B,C), each row sums to s(chosen) - s(rejected)"""
    split, C = split_of(m, r), len(categories(m))
    x = m.model.norm(h.flatten(0, 1)[r.batch.read])
    if split.sets is None:
        logp = simpo.token_logps(x, m.model.embed_tokens.weight, r.batch.target, m.model.config.final_logit_softcapping)
        value = logp[split.read].to(split.weight.dtype)
    else:                                        # the lab's vocabulary is small: all of it, in double, since masses near 0 are differences
        logp = m.model.logits(x).to(split.weight.dtype).log_softmax(-1)
        mass = torch.log1p(-(logp.exp() @ split.sets.T).clamp(max=1 - 1e-15))
        own = logp.gather(1, r.batch.target[:, None])[:, 0]
        value = torch.where(split.after < 0, own[split.read], mass[split.read, split.after.clamp_min(0)]) - mass[split.read, split.before]
    return value.new_zeros(len(r.index) * C).index_add(0, split.slot, value * split.weight).view(-1, C)


def token_values(m, r, h):
    """What each answer token adds to the margin, (number of answer tokens,): log p over its answer's length, negative in the rejected one."""
    x = m.model.norm(h.flatten(0, 1)[r.batch.read])
    logp = simpo.token_logps(x, m.model.embed_tokens.weight, r.batch.target, m.model.config.final_logit_softcapping)
    sign = torch.where(r.batch.owner < len(r.index), 1.0, -1.0)
    return logp * sign / r.batch.lengths[r.batch.owner]


def integrated(m, r, steps):
    """Integrated gradients of a batch's margins by category (Sundararajan et al. 2017), from the base model to the policy.

    The effective v is what it is at the unsteered h; only its scale goes from 0 to 1 (Gauss-Legendre points). With G_c = the mean over that path of
    d margin_c / dh at a token, v_i d_i · G_c is what feature i did there. -> (n entries of r.v, C), whose sum over a pair's entries is its gain
    """
    node, weight = np.polynomial.legendre.leggauss(steps)
    delta, C = m.delta(r), len(categories(m))
    wide = torch.promote_types(torch.float32, delta.dtype)
    pull = torch.zeros(C, *delta.shape, dtype=wide, device=delta.device)
    for t, w in zip((node + 1) / 2, weight / 2):
        step = (delta * float(t)).requires_grad_(True)
        margin = split_margins(m, r, m.above(r, step)).sum(0)
        for c in range(C):
            pull[c] += float(w) * torch.autograd.grad(margin[c], step, retain_graph=c + 1 < C)[0].to(wide)
    s, out = r.v, torch.empty(len(r.v.token), C, dtype=wide, device=delta.device)
    for part in torch.arange(len(s.token), device=delta.device).split(2**13):
        d = m.sae.W_dec[s.feature[part]].to(wide)
        out[part] = s.value[part, None] * torch.einsum("nd,cnd->nc", d, pull[:, s.token[part]])
    return out


GROUPS = ("style", "alignment", "both", "neither", "not judged")


def group_of_features(m):
    """For each feature its place in GROUPS, (F,)."""
    g = m.groups
    if not g:
        return torch.full((m.sae.d_sae,), 4)
    style, alignment = g["style"] & g["known"], g["alignment"] & g["known"]
    return torch.where(~g["known"], 4, torch.where(style & alignment, 2, torch.where(style, 0, torch.where(alignment, 1, 3))))


def token_ledger(m):
    """The gain of each pair by what its answer tokens settle, (P,C); a row sums to the pair's gain."""
    out = np.zeros((len(m.pairs), len(categories(m))))
    for r in m.bar(m.rows, "ledger, tokens"):
        with torch.no_grad():
            out[r.index] = (split_margins(m, r, m.above(r, m.delta(r))) - split_margins(m, r, m.blocks(r, r.h))).cpu().double().numpy()
    return out


def ledger(m, args):
    """Section 6: the gain in s(chosen) - s(rejected) over the base, in nats a token, taken apart twice. Both sums are the gain.

    tokens     by what each answer token settles: on the lab the choices, exactly (tiny/world.py, settles); elsewhere by `rule`
    features   by integrated gradients; with first-in and last-out effects of the largest, whose difference is interaction
    groups     feature group × category, nats ± s.e.; control: the same share for labels dealt out anew among the judged, steered features
    """
    names, C = categories(m), len(categories(m))
    P, by_token = len(m.pairs), token_ledger(m)
    gain = m.full - m.base
    whole = m.mean(gain)
    out = {"gain": whole, "tokens": {name: entry(m, by_token[:, c], gain, whole) for c, name in enumerate(names)}, "tokens_error": float(np.abs(by_token.sum(1) - gain).sum() / max(np.abs(gain).sum(), 1e-30))}
    if m.world:
        for group, some in (("style", m.world.STYLE), ("alignment", m.world.ALIGNMENT)):
            out.setdefault("token_groups", {})[group] = entry(m, by_token[:, [names.index(n) for n in some]].sum(1), gain, whole)

    some, group = m.some(args.ledger_pairs), group_of_features(m)
    index = np.concatenate([r.index for r in some])
    place = {i: n for n, i in enumerate(index)}
    feature, region = np.zeros((len(index), m.sae.d_sae), dtype=np.float32), np.full((P, 3), np.nan)
    table = np.full((P, len(GROUPS), C), np.nan)
    for r in m.bar(some, "ledger, features"):
        value, s = integrated(m, r, args.steps).cpu().double(), r.v
        row, which = r.row[s.token].cpu(), s.feature.cpu()
        total = value.sum(1)
        slots = row * m.sae.d_sae + which
        feature[[place[i] for i in r.index]] = torch.bincount(slots, total, len(r.index) * m.sae.d_sae).view(len(r.index), -1).float().numpy()
        region[r.index] = torch.bincount(row * 3 + r.branch[s.token].cpu(), total, len(r.index) * 3).view(-1, 3).numpy()
        table[r.index] = torch.zeros(len(r.index) * len(GROUPS), C, dtype=torch.float64).index_add_(0, row * len(GROUPS) + group[which], value).view(-1, len(GROUPS), C).numpy()
    m.by_feature, m.by_feature_index = feature, index
    error = table[index].sum((1, 2)) - gain[index]
    out["completeness"] = float(np.abs(error).sum() / max(np.abs(gain[index]).sum(), 1e-30))
    out["feature_pairs"], part = len(index), np.where(np.isnan(table[:, 0, 0]), np.nan, gain)
    whole = m.mean(part)                                          # shares below are of the gain of these pairs
    out["regions"] = {name: entry(m, region[:, k], part, whole) for k, name in enumerate(REGIONS)}
    out["groups"] = {name: {"total": entry(m, table[:, k].sum(1), part, whole), **{c: {x: y for x, y in m.mean(table[:, k, j]).items() if x in ("value", "se")} for j, c in enumerate(names)}}
                     for k, name in enumerate(GROUPS) if int((group == k).sum())}
    sums = feature.sum(0, dtype=np.float64)
    out["chance"] = chance_of_groups(m, sums, group.numpy()) if apart(whole) else {}
    order = np.argsort(-np.abs(sums), kind="stable")[:args.dashboards]
    order = order[np.abs(sums[order]) > 0]
    out["features"] = []
    for i in m.bar(order.tolist(), "first in, last out"):
        keep = m.without([i])
        values = np.full(P, np.nan)
        values[index] = feature[:, i]
        se = m.mean(values)["se"]
        out["features"].append({"feature": i, "group": GROUPS[group[i]], "nats": sums[i] / len(index), "se": se,
                                "first_in": float(np.nanmean((m.margins(1 - keep, rows=some) - m.base)[index])), "last_out": float(np.nanmean((m.full - m.margins(keep, rows=some))[index]))})
    out["concentration"] = {str(k): float(np.sort(np.abs(sums))[::-1][:k].sum() / max(np.abs(sums).sum(), 1e-30)) for k in (1, 10, 30, 100)}
    return out


def entry(m, values, gain, whole):
    """Nats with its interval and, where the whole gain's interval leaves out 0, its share of it."""
    out = m.mean(values)
    if apart(whole):
        out["share"] = m.mean(values, gain)
    return out


def chance_of_groups(m, sums, group, deals=999):
    """The share of the feature ledger that falls on each label when the labels are dealt out anew among the steered, judged features."""
    used = np.flatnonzero((m.events("v") > 0) & (group != 4))
    rng, out = np.random.default_rng(0), {}
    total = sums.sum()
    for k, name in enumerate(GROUPS[:3]):
        size = int((group[used] == k).sum())
        if size and total:
            dealt = [sums[rng.choice(used, size, replace=False)].sum() / total for _ in range(deals)]
            true = sums[used][group[used] == k].sum() / total
            out[name] = {"share": float(true), "features": size, "mean": float(np.mean(dealt)), "low": float(np.percentile(dealt, 2.5)), "high": float(np.percentile(dealt, 97.5)),
                         "p": (1 + sum(abs(d - np.mean(dealt)) >= abs(true - np.mean(dealt)) for d in dealt)) / (1 + deals)}
    return out


# ---- geometry ---------------------------------------------------------------------------------------------------------------

def geometry(m, args):
    """Section 8: the shape of the steering Δh = v W_dec over answer tokens.

    spectrum of its second moment (about 0, so that a constant vector counts) and about its mean · constant: share of Σ‖Δh‖² explained by the mean ·
    cosine of the mean with the mean difference of states, chosen less rejected (what activation addition would add; chance: ±2/√D) ·
    the loss when only the top r directions act, beside r random directions of the same space, and when only the mean acts.
    """
    D, wide = m.sae.d_in, torch.float32 if m.model.device.type == "mps" else torch.float64
    second, total, n = torch.zeros(D, D, dtype=wide, device=m.model.device), torch.zeros(D, dtype=wide, device=m.model.device), 0
    state, count, energy = torch.zeros(2, D, dtype=wide, device=m.model.device), torch.zeros(2), 0.0
    for r in m.bar(m.rows, "geometry"):
        here = r.branch > 0
        d = m.delta(r)[here].to(wide)
        second, total, n = second + d.T @ d, total + d.sum(0), n + len(d)
        h = r.h[r.where].to(wide)
        energy += h[here].square().sum().item()
        for side in (1, 2):
            state[side - 1] += h[r.branch == side].sum(0)
            count[side - 1] += int((r.branch == side).sum())
    mean = total / max(1, n)
    value, vector, about0 = directions(second / max(1, n))
    centred = directions(second / max(1, n) - torch.outer(mean, mean))[2]
    difference = state[0] / count[0] - state[1] / count[1]
    norm = lambda x: x.norm().clamp_min(1e-30)      # noqa: E731
    out = {"d_in": D, "tokens": n, "spectrum": value[:200].tolist(), **about0, "centred": centred, "constant": (mean.square().sum() / value.sum().clamp_min(1e-30)).item(),
           "size": math.sqrt(value.sum().item()), "state_size": math.sqrt(energy / max(1, n)),
           "cosine": (mean @ difference / (norm(mean) * norm(difference))).item(), "chance": 2 / math.sqrt(D), "directions": []}
    some = m.some(args.draw_pairs * 3)
    part = np.concatenate([r.index for r in some])
    random_basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].to(value)

    sure = apart(m.mean(m.full - m.base))

    def scored(change):
        margins = m.margins(change=change, rows=some)[part]
        whole = (m.full - m.base)[part].mean() if sure else 0.0                        # no share of a gain that cannot be told from 0
        return {"loss": float(m.loss(margins).mean()), "gain": float((margins - m.base[part]).mean() / whole) if whole else math.nan}
    for k in m.bar([r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if r < D] + [D], "directions"):
        def project(basis):
            basis = basis[:, :k].to(m.sae.W_dec)      # noqa: B023
            return lambda d: (d @ basis) @ basis.T
        out["directions"].append({"r": k, "top": scored(project(vector)), "random": scored(project(random_basis))})
    out["mean_only"] = scored(lambda d: mean.to(d).expand_as(d))
    out["without_mean"] = scored(lambda d: d - mean.to(d))
    return out


# ---- what the report shows of single features and pairs -----------------------------------------------------------------------

def piece(m, i):
    return m.tokenizer.decode([int(i)], skip_special_tokens=False)


def sequence(r, b, side):
    """Places in row b of the prompt and of one of its answers."""
    branch = r.batch.branch[b]
    return ((branch == 0) | (branch == side)).nonzero()[:, 0].tolist()


def dashboards(m, ledger_features, contexts=3, width=12):
    """For each feature of the ledger: usage, direct effect on the logits (d_i through the final norm's weight and the head: the
    path around the blocks in between), and the tokens where it is steered and where it fires most, with their neighbours."""
    wanted = torch.tensor([x["feature"] for x in ledger_features], dtype=torch.long)
    if not len(wanted):
        return []
    slot = torch.full((m.sae.d_sae,), -1)
    slot[wanted] = torch.arange(len(wanted))
    values, best = {"v": [], "f": []}, {}
    for kind in ("v", "f"):
        for n, r in enumerate(m.rows):
            s = getattr(r, kind)
            which = slot[s.feature.cpu()]
            at = (which >= 0).nonzero()[:, 0]
            dense = torch.zeros(len(r.row), len(wanted))
            dense[s.token.cpu()[at], which[at]] = s.value.cpu()[at].float()
            values[kind].append(dense)
        flat = torch.cat([x.abs() for x in values[kind]])
        best[kind] = flat.topk(min(40, len(flat)), dim=0).indices.T.tolist()
    starts = np.cumsum([0] + [len(x) for x in values["v"]])
    tokens = sum(len(r.row) for r in m.rows)
    count = {kind: m.events(kind) for kind in ("v", "f")}
    sign = m.events("v", torch.sign)
    mass = m.mass()
    rows = m.labels or {}
    weight = (1 + m.model.norm.weight.float()) * m.sae.W_dec[wanted.to(m.model.device)].float()
    effect = torch.cat([weight @ part.float().T for part in m.model.embed_tokens.weight.split(16384)], 1).cpu()
    if m.world:                  # the lab's model has never seen most of its byte tokens, and what their rows hold is noise
        seen = torch.unique(torch.cat([r.batch.ids[r.batch.branch >= 0].cpu() for r in m.rows]))
        unseen = torch.ones(effect.shape[1], dtype=torch.bool)
        unseen[seen] = False
        effect[:, unseen] = 0.0

    def context(place):
        n = int(np.searchsorted(starts, place, side="right")) - 1
        r, at = m.rows[n], place - starts[n]
        b, side = int(r.row[at]), int(r.branch[at])
        line = sequence(r, b, side or 1)
        where = r.where.nonzero().cpu()
        t, mine = int(where[at, 1]), (where[:, 0] == b).nonzero()[:, 0]
        steered = dict(zip(where[mine, 1].tolist(), mine.tolist()))
        middle = line.index(t)
        shown = line[max(0, middle - width):middle + width // 2]
        return [{"token": piece(m, r.batch.ids[b, u]), **{kind: float(values[kind][n][steered[u], k]) if u in steered else 0.0 for kind in ("v", "f")}} for u in shown]
    out = []
    for k, x in enumerate(ledger_features):
        i, label = x["feature"], rows.get(x["feature"], {})
        found = {}
        for kind in ("v", "f"):
            texts = []
            for place in best[kind][k]:
                n = int(np.searchsorted(starts, place, side="right")) - 1
                if values[kind][n][place - starts[n], k] == 0 or len(texts) == contexts:
                    break
                if (text := context(place)) not in texts:
                    texts.append(text)
            found[kind] = texts
        order = effect[k].argsort(descending=True, stable=True)
        out.append({**x, "labels": label.get("labels"), "description": label.get("description", ""), "by": label.get("by"), "steered": count["v"][i] / tokens, "up": float((sign[i] / max(1, count["v"][i]) + 1) / 2),
                    "fires": count["f"][i] / tokens, "usage": float(mass[i] / max(mass.sum(), 1e-30)),
                    "raises": [[piece(m, j), float(effect[k, j])] for j in order[:8] if effect[k, j] > 0], "lowers": [[piece(m, j), float(effect[k, j])] for j in order.flip(0)[:8] if effect[k, j] < 0],
                    "steered_at": found["v"], "fires_at": found["f"]})
    return out


def ten_pairs(m, count=10, top=5):
    """Pairs evenly spaced in order of their gain, the largest and the smallest included, with what each token and the first features did."""
    gain = (m.full - m.base)[m.by_feature_index]
    order = np.argsort(-gain, kind="stable")
    picked = {int(m.by_feature_index[order[k]]): int(order[k]) for k in np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))}
    out = {}
    for r in m.rows:
        if not set(r.index) & set(picked):
            continue
        with torch.no_grad():
            change = (token_values(m, r, m.above(r, m.delta(r))) - token_values(m, r, m.blocks(r, r.h))).cpu().double()
        owner, target = r.batch.owner.cpu(), r.batch.target.cpu()
        for b, i in enumerate(r.index):
            if i in picked:
                sides = [[{"token": piece(m, t), "nats": float(x)} for t, x in zip(target[owner == o].tolist(), change[owner == o].tolist())] for o in (b, b + len(r.index))]
                mine = m.by_feature[picked[i]]
                best = np.argsort(-np.abs(mine), kind="stable")[:top]
                out[i] = {"prompt": m.pairs[i].text, "base": m.base[i], "steered": m.full[i], "chosen": sides[0], "rejected": sides[1],
                          "features": [{"feature": int(j), "nats": float(mine[j]), "labels": (m.labels or {}).get(int(j), {}).get("labels"),
                                        "description": (m.labels or {}).get(int(j), {}).get("description", "")} for j in best if mine[j]]}
    return [out[i] for i in picked]


# ---- the command ------------------------------------------------------------------------------------------------------------------

def plain(x):
    """Numbers that JSON knows: nan and infinity become null."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    if isinstance(x, (float, np.floating)):
        return float(x) if math.isfinite(x) else None
    return int(x) if isinstance(x, np.integer) else x


def open_material(folder, args):
    """Everything a user can get wrong is looked at here, before anything is computed. -> Material with .labels (or None) and .groups"""
    run = fsrl.load_run(folder, adapter=args.adapter, device=args.device, dtype=None if args.dtype == "auto" else args.dtype)
    meta, world = simpo.judge_of(run.config["pairs"])
    path = Path(args.labels) if args.labels else feature_labels.default_path(run.sae)
    labels = feature_labels.read_labels(path, run.sae) if args.labels or path.exists() else None
    for name, lab, other in (("limit", 1000, 200), ("answers", 1000, 64), ("probe_answers", 200, 32), ("max_new_tokens", 64, 128), ("answer_batch", 256, 16), ("batch_size", 32, 2)):
        if getattr(args, name) is None:
            setattr(args, name, lab if world else other)
    records = simpo.read_held_out(run.config["pairs"], run.config.get("eval_split", "test"), args.limit)
    pairs, _ = simpo.encode_pairs(run.tokenizer, records, run.config.get("max_length", 2048))
    m = Material(run, pairs, meta, world, batch_size=args.batch_size, progress=not args.quiet)
    m.labels, m.groups = labels, feature_labels.groups(labels, run.sae.d_sae) if labels else None
    return m


def analyze(run, **options):
    """Analyses a run's folder. options: those of the command line, by name. -> what analysis.json holds; it is written after every section."""
    args = parser().parse_args([str(run)])
    for name, value in options.items():
        if not hasattr(args, name):
            raise UserError(f"analyze has no option {name!r}")
        setattr(args, name, value)
    wanted = list(SECTIONS) if args.only is None else args.only.split(",")
    if bad := [s for s in wanted if s not in SECTIONS]:
        raise UserError(f"--only {args.only}: {bad[0]!r} is no section; there are {', '.join(SECTIONS)}")
    folder, started = Path(run), time.time()
    m = open_material(folder, args)
    c, out = m.run.config, folder / "analysis.json"
    digest = hashlib.sha256((folder / fsrl.WEIGHTS).read_bytes()).hexdigest()[:16]
    same = {"adapter": digest, "pairs_sha256": simpo.digest(m.pairs), "labels_sha256": hashlib.sha256(json.dumps(m.labels, sort_keys=True).encode()).hexdigest()[:16] if m.labels else None}
    a = {"run": folder.name, "objective": report.objective(c), "pairs": c["pairs"], "split": c.get("eval_split", "test"), "held_out": len(m.pairs), "prompts": int(m.prompts.max()) + 1, "facts": int(m.facts.max()) + 1,
         "lab": bool(m.world), "model": c["model"], "sae": m.sae.source, "layer": m.sae.layer, "config": c, **same, "labels": None, "limits": LIMITS, "options": {k: v for k, v in vars(args).items() if k in OPTIONS}, "folder": str(run),
         "choices": {"style": m.world.STYLE, "alignment": m.world.ALIGNMENT} if m.world else None, "sections": {}}
    if m.labels:
        a["labels"] = {"by": sorted({str(r.get("by")) for r in m.labels.values()}), **feature_labels.shares(m.labels, m.sae.d_sae)}
    if args.only and "rates" in wanted and not m.labels:
        raise UserError("--only rates needs labels of this SAE: `python analyze.py --make-labels KIND` makes them, --labels names a file")
    old = read_json(out) if out.exists() else {}
    options = plain({**a["options"], "labels": None, "adapter": None})                  # the labels' own digest is among `same`
    before = {**old.get("options", {}), "labels": None, "adapter": None}
    if all(old.get(k) == v for k, v in same.items()) and options == before:
        a["sections"] = old["sections"]            # what is not made again stays, also if this is interrupted
    elif old.get("sections") and args.only:
        other = [f"--{k.replace('_', '-')} {v}" for k, v in before.items() if options.get(k) != v] or ["other labels, another adapter or other pairs"]
        raise UserError(f"{out} holds sections made with {', '.join(other)}, which would be lost: give the same, or remove the file to start anew")
    a |= {"verdict": report.verdict(a), "seconds": 0.0}
    for name in m.bar(wanted, "sections"):
        if name == "rates" and not m.labels:
            continue
        a["sections"][name] = plain(globals()[name](m, args))
        if name == "ledger":
            a["sections"]["features"], a["sections"]["examples"] = plain(dashboards(m, a["sections"]["ledger"]["features"])), plain(ten_pairs(m))
        a |= {"verdict": report.verdict(a), "seconds": time.time() - started, "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"}
        write_json(out, a, indent=1)
    return a


OPTIONS = ("limit", "answers", "probe_answers", "max_new_tokens", "draws", "draw_pairs", "ledger_pairs", "steps", "dashboards", "batch_size", "adapter", "labels")


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def parser():
    out = argparse.ArgumentParser(prog="analyze.py", description="What does the policy reward? Analyses a run, or labels features, or calibrates the instruments on runs of the lab.")
    out.add_argument("run", nargs="*", help="a run's folder, such as runs/style-1 (several with --calibrate)")
    out.add_argument("--only", help=f"sections to compute, with commas between them: {', '.join(SECTIONS)} [all]; what analysis.json holds of the others stays")
    out.add_argument("--labels", help="label file [labels.jsonl beside the SAE]")
    out.add_argument("--adapter", help="FILE.py:ClassName of a run that was trained with one")
    out.add_argument("--limit", type=positive, help="held-out pairs [1000 on the lab, else 200]")
    out.add_argument("--answers", type=positive, help="prompts that are answered for the behaviour section [1000, else 64]")
    out.add_argument("--probe-answers", type=positive, help="prompts that are answered for the health of every mask and strength [200, else 32]")
    out.add_argument("--max-new-tokens", type=positive, help="longest answer [64, else 128]")
    out.add_argument("--draws", type=positive, default=99, help="random sets of each kind [99]")
    out.add_argument("--draw-pairs", type=positive, default=64, help="pairs that random sets are scored on [64]")
    out.add_argument("--ledger-pairs", type=positive, default=256, help="pairs of the feature ledger [256]")
    out.add_argument("--steps", type=positive, default=4, help="points of integrated gradients [4]")
    out.add_argument("--dashboards", type=positive, default=30, help="features with a dashboard [30]")
    out.add_argument("--batch-size", type=positive, help="pairs a forward pass [32, else 2]")
    out.add_argument("--answer-batch", type=positive, help="prompts answered at once [256, else 16]")
    out.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the best there is")
    out.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float64"), help="of the frozen weights [as in training]")
    out.add_argument("--quiet", action="store_true", help="no progress bars")
    out.add_argument("--calibrate", action="store_true", help="compare the instruments with the planted truth over several runs of the lab, writes tiny/calibration.json")
    feature_labels.add_arguments(out, skip=("device",))
    return out


def main(argv=None):
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        if sum(map(bool, (args.make_labels or args.agree, args.calibrate))) + bool(args.only is not None) > 1 or args.run and (args.make_labels or args.agree):
            raise UserError("--make-labels and --agree take no run, and neither they nor --calibrate go with --only or with each other")
        if args.make_labels or args.agree:
            return feature_labels.make(args)
        if args.calibrate:
            from tiny import calibrate
            return calibrate.calibrate(args)
        if len(args.run) != 1:
            raise UserError("name one run's folder, such as runs/style-1 (several only with --calibrate)")
        a = analyze(args.run[0], **{k: v for k, v in vars(args).items() if k != "run"})
        page = report.write(a, Path(args.run[0]) / "report.html", read_json(CALIBRATION) if CALIBRATION.exists() else None)
        print(report.summary(a))
        print("\n" + "\n".join(a["verdict"]["sentences"] + [f"RED: {x}" for x in a["verdict"]["alarms"]]))
        print(f"\n{a['seconds']:.0f} s. {Path(args.run[0]) / 'analysis.json'}; look at {page}")
    except UserError as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("analyze.py: interrupted; what analysis.json holds is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
