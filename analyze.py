"""What does the policy reward?  `python analyze.py runs/style-1` asks held-out pairs.

The gain of a pair is its margin s(chosen) - s(rejected) under the policy, less that under the base
model, in nats a token. This file takes it apart:

    the ledger by token      on which tokens of the answers does the gain fall?
    the ledger by feature    which features brought it there?
    masking                  what is lost without some features, what is left with no others?
    label rates              how often are style and alignment features steered: the paper's table

instruments/ holds what these are set beside (controls, intervals, words) and asks more of the pairs.
Each question is a section: it measures plain numbers, which go to RUN/analysis/, and describes them in
words, for the terminal and for RUN/report.html. The ledger by token is one, at the end of this file.

Four rules, each against a fault of the paper's own analysis (arXiv 2509.12934, sections 4 and 5): labels
belong to one SAE and are refused for another; only effective steering at steered tokens counts;
intervals draw whole questions, never tokens; no effect of a set of features stands without sets drawn
at random.

Letters, beside those of the README: m the held-out pairs (`HeldOut`), r a batch of them (`Rows`); P
pairs, B of them in a batch, C categories of tokens, S steerings, one for each steered layer.
"""
import importlib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import fsrl
import simpo
from lib.blocks import Table, Text, as_text, group_of, interval, number, percent
from lib.counts import Counts, Sparse, widest
from lib.files import ROOT, UserError, read_json
from lib.judge import judge_of
from lib.labels import groups
from lib.pairs import read_held_out
from lib.plugins import own_objective
from lib.sections import Section, about_run, chosen, identity_of, labels_of, missing, results
from lib.settings import check, command, setting
from lib.stats import FEWEST, leaves_out_zero, number_equal

REGIONS = ("prompt", "chosen", "rejected")      # the branches of a row


# ---- the ledger by token ---------------------------------------------------------------------------

def token_ledger(m):
    """The gain of each pair by what its answer tokens settle. -> (P,C), a row sums to the pair's gain

    A margin is a sum over answer tokens, so nothing has to be assumed to take it apart.
    """
    gained = np.zeros((len(m.pairs), len(m.judge.categories)))
    for r in m.bar(m.rows, "ledger, tokens"):
        split = split_of(m, r)
        with torch.no_grad():
            after = split_margins(m.acting, r, m.policy_states(r), split)
            before = split_margins(m.model, r, m.base_states(r), split)
        gained[r.index] = (after - before).cpu().double().numpy()
    return gained


@dataclass
class Split:
    """How the log-probabilities of a batch's answer tokens split among categories, in E entries.

    One token may settle several things: that no heading comes first, and then which word does. With
    mass(S) = 1 - p(S), what a set S of ids leaves to all others, an entry is log mass(after) - log
    mass(before); a token's last entry has log p(token) for log mass(after). So its entries sum to
    log p(token).
    """
    token: torch.Tensor       # (E,) which answer token
    before: torch.Tensor      # (E,) which set
    after: torch.Tensor       # (E,) which set; -1: the entry takes the token
    slot: torch.Tensor        # (E,) row of the batch * C + category
    weight: torch.Tensor      # (E,) 1 / length of the answer, negative for the rejected one
    sets: torch.Tensor        # (sets,V) 0 or 1; the first is empty
    shape: tuple              # (B,C)


def split_of(m, r):
    """What each token settles is the judge's to say; where no grammar is known, one thing a token."""
    category = {name: c for c, name in enumerate(m.judge.categories)}
    numbers = {(): 0, None: -1}                         # of the sets, as they come up
    entries = []
    token = 0
    for b, i in enumerate(r.index):
        pair = m.pairs[i]
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            weight = sign / len(answer)
            for settled in m.judge.settles(pair.text, answer):
                for name, *sets in settled:
                    before, after = (numbers.setdefault(ids, len(numbers) - 1) for ids in sets)
                    slot = b * len(category) + category[name]
                    entries.append((token, before, after, slot, weight))
                token += 1
    # As tensors: the entries by column, the sets as rows of zeros and ones.
    device = m.model.device
    wide = widest(device)
    *columns, weights = zip(*entries)
    columns = [torch.tensor(column, device=device) for column in columns]
    weights = torch.tensor(weights, dtype=wide, device=device)
    marks = torch.zeros(len(numbers) - 1, m.model.config.vocab_size, dtype=wide)
    for ids, k in numbers.items():
        marks[k, list(ids or ())] = 1.0
    shape = len(r.index), len(category)
    return Split(*columns, weights, marks.to(device), shape)


def split_margins(model, r, h, split):
    """A batch's margins by category, from the states after the last block (B,T,D). -> (B,C)

    Each row sums to s(chosen) - s(rejected). `model` has the norm and the head that read the states.
    """
    wide = split.weight.dtype
    x = model.norm(h.flatten(0, 1)[r.batch.read])
    W, cap = model.embed_tokens.weight, model.config.final_logit_softcapping
    value = simpo.token_logps(x, W, r.batch.target, cap).to(wide)[split.token]
    if len(split.sets) > 1:
        # The lab's vocabulary is small: all of it, in double, since masses near 0 are differences.
        p = model.logits(x).to(wide).softmax(-1)
        mass = torch.log1p(-(p @ split.sets.T).clamp(max=1 - 1e-15))        # (tokens, sets)
        left = mass[split.token, split.after.clamp_min(0)]
        value = torch.where(split.after < 0, value, left) - mass[split.token, split.before]
    sums = value.new_zeros(split.shape).flatten()
    return sums.index_add(0, split.slot, value * split.weight).view(split.shape)


# ---- the ledger by feature -------------------------------------------------------------------------

def integrated(m, r, steps):
    """What each entry of r.v did for its pair's margin. -> (entries,)

    Integrated gradients (Sundararajan et al. 2017) from the base model to the policy: v stays what it
    is, its scale goes from 0 to 1. With G the mean over that path of the gradient of a margin towards
    the state, v_i d_i · G is what feature i did there; a pair's entries sum to its gain, as exactly as
    the points integrate (Gauss-Legendre).
    """
    points, weights = np.polynomial.legendre.leggauss(steps)                # on [-1, 1]
    delta = m.delta(r)
    wide = torch.promote_types(torch.float32, delta.dtype)
    pull = 0.0                                                              # G, (N,S*D)
    for scale, weight in zip((points + 1) / 2, weights / 2):
        scaled = (delta * float(scale)).requires_grad_(True)
        chosen, rejected = simpo.mean_logps(m.model, r.batch, m.above(r, scaled))
        towards, = torch.autograd.grad((chosen - rejected).sum(), scaled)
        pull = pull + float(weight) * towards.to(wide)
    # Each entry against G at its own bag: a token, at one steered layer.
    pull = pull.view(-1, m.directions.shape[1])                             # (N*S,D)
    out = pull.new_empty(len(r.v.value))
    for some in torch.arange(len(out), device=delta.device).split(2**13):
        d = m.directions[r.v.feature[some]].to(wide)
        out[some] = r.v.value[some] * (d * pull[r.v.bag[some]]).sum(-1)
    return out


def feature_ledger(m, rows, steps):
    """Integrated gradients of the n pairs in `rows`. -> by feature (n,F); by region of the row (n,3)"""
    parts = []
    for r in m.bar(rows, "ledger, features"):
        nats = integrated(m, r, steps).cpu().double()
        token = r.v.token.cpu()
        row, region = r.row.cpu()[token], r.branch.cpu()[token]

        def sums(which, count):
            """Σ of each pair's entries with equal `which`. -> (B,count)"""
            out = torch.zeros(len(r.index) * count, dtype=torch.float64)
            return out.index_add_(0, row * count + which, nats).view(-1, count).numpy()
        parts.append((sums(r.v.feature.cpu(), m.d_sae), sums(region, len(REGIONS))))
    return [np.concatenate(part) for part in zip(*parts)]


# ---- masking ---------------------------------------------------------------------------------------

def masking(m, features, rows=None):
    """Nats that are lost when these features are masked, and left when they alone act: (P,) each.

    Where the two differ, features interact. A share of the gain is no finding by itself: random sets of
    features lose and leave some of it, too (instruments/masking.py).
    """
    keep = m.without(features)
    lost = m.full - m.margins(keep, rows=rows)
    left = m.margins(1 - keep, rows=rows) - m.base
    return lost, left


# ---- label rates -----------------------------------------------------------------------------------

def label_shares(r, marks):
    """At each token, which share of the judged features that are active there carries each mark?

    marks (F,1+M), the first: judged. -> (N,) bool, whether a judged feature is steered and one fires;
    {"v": (N,M), "f": (N,M)}, shares of the steered features and of the SAE's active ones. They compare
    at the same tokens only; the paper averages each over tokens of its own.
    """
    shares = {}
    both = True
    for kind in ("v", "f"):
        sums = getattr(r, kind).sums(marks.to(r.h.device))
        count = sums.view(len(r.row), -1, marks.shape[1]).sum(1).cpu()      # over steered layers
        judged, marked = count[:, :1], count[:, 1:]
        both = both & (judged[:, 0] > 0)
        shares[kind] = (marked / judged.clamp_min(1)).double()
    return both, shares


# ---- the held-out pairs, computed once -------------------------------------------------------------

@dataclass(eq=False)
class Rows:
    """A batch of pairs with all that never changes; the last five where features are steered."""
    index: list                   # B: which of the pairs
    batch: simpo.Batch
    h: torch.Tensor               # (B,T,D) output of the policy's frozen blocks; None: none is frozen
    where: torch.Tensor = None    # (B,T) steered tokens, N in all
    v: Sparse = None              # effective steering at these, as the whole policy has it
    f: Sparse = None              # the SAE's own activations there
    row: torch.Tensor = None      # (N,) which row of the batch
    branch: torch.Tensor = None   # (N,) 0 prompt, 1 chosen, 2 rejected


class HeldOut(Counts):
    """A run's held-out pairs: what every question looks at, computed once.

    What lies below the steering never changes, so its output h is kept. Neither does the steering v, a
    sparse list: masking, scaling and attribution only change how much of it is added. Where several
    SAEs are steered, their features are numbered on, F in all.

    rows          all pairs, in batches
    clusters      (P,) numbers, equal for pairs that an interval has to draw together
    base, full    (P,) margins of the base model and of the policy
    labels        {feature: row} or None; groups: {"style", "alignment", "known"}: (F,) bool
    directions    (F,D) the features' decoder rows
    """

    def __init__(self, run, pairs, judge, *, labels=None, objective=None, batch_size=32, progress=True):
        self.model, self.policy = run.model, run.policy
        self.tokenizer, self.config, self.objective = run.tokenizer, run.config, objective
        self.pairs, self.judge = pairs, judge
        self.batch_size, self.progress = batch_size, progress
        self.clusters = number_equal([judge.cluster(pair) for pair in pairs])
        if (count := len(set(self.clusters))) < FEWEST:
            raise UserError(f"{count} held-out questions are too few for an interval; it needs at least "
                            f"{FEWEST} (more held-out pairs, or a larger --limit)")

        # Whose norm and head read the policy's states, and whose features it steers.
        self.acting, _ = self.policy.acting(self.model)
        self.steerings = list(getattr(self.policy, "steerings", []))
        decoders = [s.sae.W_dec for s in self.steerings]
        self.d_sae = sum(len(W) for W in decoders)
        self.directions = decoders[0] if decoders else None
        if len(decoders) > 1:
            self.directions = torch.cat(decoders)
        self.labels = labels
        self.groups = groups(labels, self.d_sae) if labels else None

        # The forward passes that all others are compared with.
        batches = self.bar(list(simpo.batches(pairs, batch_size)), "frozen blocks")
        self.rows = [self._rows(index, batch) for index, batch in batches]
        self._parts = {}
        self.base_scores = self._scores(self.rows, self.base_states, self.model)
        self.full_scores = self._scores(self.rows, self.policy_states, self.acting)
        self.base = np.subtract(*self.base_scores.T)
        self.full = np.subtract(*self.full_scores.T)

    @torch.no_grad()
    def _rows(self, index, batch, h=None):
        batch, layer = batch.to(self.model.device), self.policy.frozen
        if h is None and layer is not None:
            h = simpo.prefix(self.model, batch, layer)
        if not self.steerings:
            return Rows(index, batch, h)
        where = batch.where(self.steerings[0].positions)
        state, v, f = h, [], []
        for s in self.steerings:
            state = self._blocks(batch, state, layer, s.frozen)
            layer = s.frozen
            x = state[where]
            v.append(s.action(x))
            f.append(s.sae.encode(x))
            state = s.add(state, where, v[-1])
        found = Sparse.of(*v), Sparse.of(*f)
        row, branch = where.nonzero()[:, 0], batch.branch[where]
        return Rows(index, batch, h, where, *found, row, branch)

    def rows_of(self, index):
        """These pairs alone, in batches of their own; their h is there already."""
        kept, out = {}, []
        for r in self.rows:
            kept |= dict(zip(r.index, r.h))
        pairs = [self.pairs[i] for i in index]
        for places, batch in simpo.batches(pairs, min(16, self.batch_size)):       # less padding
            these = [index[place] for place in places]
            T = batch.ids.shape[1]
            h = pad_sequence([kept[i][:T] for i in these], batch_first=True)
            out.append(self._rows(these, batch, h))
        return out

    def part(self, count):
        """The rows of so many pairs (and enough for an interval), evenly spaced; made once."""
        count = min(len(self.pairs), max(count, 2 * FEWEST))
        if count not in self._parts:
            spaced = np.linspace(0, len(self.pairs) - 1, count).round().astype(int)
            self._parts[count] = self.rows_of(spaced.tolist())
        return self._parts[count]

    # What lies above the frozen blocks, as often as it is asked for.

    def _blocks(self, batch, h, start, stop):
        if start == stop:
            return h
        how = {"position_ids": batch.position_ids, "mask": batch.mask()}
        return self.model.blocks(h, start, stop, **how)

    def delta(self, r, keep=None):
        """What is added at the N steered tokens, (N,S*D). keep (F,): how much of each feature's part"""
        weight = r.v.value
        if keep is not None:
            weight = weight * keep.to(weight)[r.v.feature]
        added = r.v.sums(self.directions, weight.to(self.directions.dtype))
        return added.view(len(r.row), -1)

    def above(self, r, delta):
        """All blocks above h, delta (N,S*D) added on the way, D of it at each layer. -> (B,T,D)"""
        h, layer = r.h, self.policy.frozen
        for s, part in zip(self.steerings, delta.chunk(len(self.steerings), 1)):
            h = self._blocks(r.batch, h, layer, s.frozen)
            layer = s.frozen
            steered = h[r.where] + part.to(h.dtype)
            h = h.index_put((r.where,), steered)
        return self._blocks(r.batch, h, layer, self.model.config.num_hidden_layers)

    def base_states(self, r):
        """The base model's states after the last block."""
        last = self.model.config.num_hidden_layers
        if self.steerings:
            return self._blocks(r.batch, r.h, self.policy.frozen, last)
        return simpo.prefix(self.model, r.batch, last)

    def policy_states(self, r):
        """The policy's, under which it scores and answers."""
        if self.steerings:
            return self.above(r, self.delta(r))
        return self.policy.run(self.model, r.h, r.batch)[0]

    @torch.no_grad()
    def _scores(self, rows, states, model):
        out = np.full((len(self.pairs), 2), np.nan)
        for r in rows:
            both = torch.stack(simpo.mean_logps(model, r.batch, states(r)), 1)
            out[r.index] = both.cpu().double().numpy()
        return out

    def scores(self, keep=None, *, change=None, rows=None):
        """s(chosen), s(rejected) of each pair, (P,2) float64; nan for pairs that are not in `rows`.

        keep (F,): masks features (0) or scales them; what a top_k has chosen stays chosen.
        change: delta (N,S*D) -> delta
        """
        def states(r):
            delta = self.delta(r, keep)
            return self.above(r, change(delta) if change else delta)
        return self._scores(rows or self.rows, states, self.model)

    def margins(self, keep=None, **how):
        """s(chosen) - s(rejected) of these scores, (P,)"""
        return np.subtract(*self.scores(keep, **how).T)

    def loss(self, scores):
        """The preference loss that the run was trained with, at scores (P,2). -> (P,)"""
        lengths = [[len(pair.chosen), len(pair.rejected)] for pair in self.pairs]
        columns = [torch.tensor(x).double() for x in (scores, lengths, self.base_scores)]
        answers = [simpo.Answer(*(x[:, k] for x in columns)) for k in (0, 1)]
        return simpo.preference_loss(*answers, self.config, self.objective).numpy()


# ---- a section: the ledger by token, measured and described ----------------------------------------

def ledger(m, options):
    """-> gain; loss and accuracy, of base model and policy; tokens, token_groups: rows of name, nats,
    share; tokens_error: what the rows lack of the gain"""
    names, gained = m.judge.categories, token_ledger(m)
    every = np.arange(len(m.pairs))
    out = {"gain": m.mean(m.full - m.base)}
    for who, scores in (("base", m.base_scores), ("policy", m.full_scores)):
        out[f"loss_{who}"] = m.mean(m.loss(scores))
        out[f"accuracy_{who}"] = m.mean(np.subtract(*scores.T) > 0)
    out["tokens"] = entries(m, every, names, gained)
    out["token_groups"] = []
    for group, members in m.judge.groups.items():
        columns = [names.index(category) for category in members]
        together = gained[:, columns].sum(1, keepdims=True)
        out["token_groups"] += entries(m, every, [group], together)
    out["tokens_error"] = lack(gained.sum(1), m.full - m.base)
    return out


def entries(m, index, names, values):
    """Rows of a ledger. values (n,k) of the pairs `index` -> for each name its nats a token and, if
    the gain of these pairs can be told from 0, its share of it."""
    gain = m.spread(index, (m.full - m.base)[index])
    is_sure = leaves_out_zero(m.mean(gain))
    rows = []
    for name, x in zip(names, m.spread(index, values).T, strict=True):
        row = {"name": name, "nats": m.mean(x)}
        if is_sure:
            row["share"] = m.mean(x, gain)
        rows.append(row)
    return rows


def lack(sums, gain):
    """How far sums are from the gain that they should add up to, as a share of it."""
    whole = np.abs(gain).sum()
    return np.abs(sums - gain).sum() / max(whole, 1e-30)


def describe_ledger(x, about):
    """x: what `ledger` found. about: facts of the run (lib/sections.py, about_run). -> blocks"""
    known = about["groups"]
    rows, plots = [], []
    for row in (*x["tokens"], *x["token_groups"]):
        name, group = f"all {row['name']} choices", row["name"]
        if row in x["tokens"]:
            name, group = row["name"], group_of(row["name"], known)
        rows.append([name, interval(row["nats"], "+.4f"), percent(row.get("share"))])
        plots.append({"x": row["nats"], "group": group})
    how = "what it settles (exact: the grammar is known)" if known else "kind (the first rule that fits)"
    accuracy, loss = [], []
    for who in ("base", "policy"):
        accuracy.append(percent(x[f"accuracy_{who}"]["value"], ".1f"))
        loss.append(number(x[f"loss_{who}"]["value"]))
    said = (f"The gain is {interval(x['gain'], '+.3f')} nats a token: accuracy {' → '.join(accuracy)}, "
            f"loss {' → '.join(loss)}. It falls on tokens of the answers; each by {how}:")
    note = (f"The entries add up to the gain but for {x['tokens_error']:.1e} of it, which is rounding. "
            "The control is the base model’s log-probability of the same token.")
    head = ["tokens", "nats a token", "share of the gain"]
    return [Text(said), Table(head, rows, note, True, plots)]


QUESTION = "On which tokens of the answers does the gain fall? The entries add up to it."
LEDGER = Section("ledger", "The ledger", QUESTION, ledger, describe_ledger)


# ---- the command -----------------------------------------------------------------------------------

# The sections in the order of the report: "ledger" from above, the others from instruments/.
ORDER = ("behaviour", "ledger", "features", "cards", "masking", "strength", "usage", "rates",
         "geometry")
AFTER = {"cards": ("features",)}                 # whose results a section is given
ELSEWHERE = ("layers",)                          # shown if its own command has measured it
# Defaults for the lab, whose model is tiny, and for others.
DEFAULTS = {
    "limit": (1000, 200), "answers": (1000, 64),
    "max_new_tokens": (64, 128), "answer_batch": (256, 16), "batch_size": (32, 2),
}


@dataclass
class Options:
    """The command line; a section depends on those of these that it reads."""
    run: str = setting("", "its folder, such as runs/style-1", positional=True, group="a run")
    adapter: str = setting(None, "FILE.py:Class of a run that was trained with one")
    policy: str = setting(None, "FILE.py:Class of a run that was trained with one")
    objective: str = setting(None, "FILE.py:function of a run that was trained with one")
    labels: str = setting(None, "label file [labels.jsonl beside the SAE]")
    only: str = setting(None, f"sections, with commas: {', '.join(ORDER)} [all]", group="what")
    limit: int = setting(None, "held-out pairs [1000 on the lab, else 200]", low=1)
    answers: int = setting(None, "prompts that are answered [1000, else 64]", low=1)
    max_new_tokens: int = setting(None, "longest answer [64, else 128]", low=1)
    draws: int = setting(49, "random sets of each kind", low=1)
    draw_pairs: int = setting(64, "pairs that random sets are scored on", low=1)
    ledger_pairs: int = setting(256, "pairs of the ledger by feature", low=1)
    steps: int = setting(4, "points of integrated gradients", low=1)
    dashboards: int = setting(30, "features with a card", low=1)
    batch_size: int = setting(None, "pairs a forward pass [32, else 2]", low=1, group="machine")
    answer_batch: int = setting(None, "prompts answered at once [256, else 16]", low=1)
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    dtype: str = setting(None, "of the frozen weights [as in training]",
                         choices=("float32", "bfloat16", "float64"))
    quiet: bool = setting(False, "no progress bars")
    __post_init__ = check


def instrument(name):
    """The module instruments/NAME.py, or None: this file works without."""
    if (ROOT / "instruments" / f"{name}.py").is_file():
        return importlib.import_module(f"instruments.{name}")
    return None


def sections():
    """{name: Section} of those that are there, in the order of the report."""
    out = {}
    for name in ORDER:
        if name == "ledger":
            out[name] = LEDGER
        elif x := instrument(name):
            after = AFTER.get(name, ())
            out[name] = Section(name, x.TITLE, x.QUESTION, x.measure, x.describe, after)
    return out


def open_run(o):
    """All that a user can get wrong is looked at before anything is computed. -> HeldOut"""
    own = {"adapter": o.adapter, "policy": o.policy}
    run = fsrl.load_run(o.run, **own, device=o.device, dtype=o.dtype)
    config = run.config
    judge = judge_of(config["pairs"], run.tokenizer)
    for name, (lab, other) in DEFAULTS.items():
        if getattr(o, name) is None:
            setattr(o, name, lab if judge.weights else other)
    if config.get("objective") and not o.objective:
        raise UserError(f"{o.run} was trained with an objective of its user's: say where it is, "
                        f"--objective {config['objective']}")
    objective = own_objective(o.objective) if o.objective else None
    labels = labels_of(run.policy, o.labels)
    records = read_held_out(config["pairs"], config.get("eval_split", "test"), o.limit)
    length = config.get("max_length", 2048)
    pairs, _ = simpo.encode_pairs(run.tokenizer, records, length)
    given = {"labels": labels, "objective": objective}
    return HeldOut(run, pairs, judge, **given, batch_size=o.batch_size, progress=not o.quiet)


def answered(o):
    """Measures what is wanted and not yet there. -> HeldOut, {name: Section}, {name: result}"""
    every = sections()
    wanted = chosen(o.only, every)
    m = open_run(o)
    for name in wanted if o.only else ():
        if why := missing(name, m):
            raise UserError(f"--only {name}: {why}")
    # Sections that are there and fit are kept; --only leaves all others as they are.
    possible = {name: section for name, section in every.items() if not missing(name, m)}
    identity = identity_of(o.run, m, simpo.digest(m.pairs))
    return m, every, results(o.run, possible, wanted, identity, o, m)


def analyze(run, **options):
    """Analyses a run's folder. options: those of the command line, by name. -> {section: result}"""
    if unknown := set(options) - {f.name for f in fields(Options)}:
        raise UserError(f"analyze has no option {min(unknown)!r}")
    return answered(Options(run=str(run), **options))[2]


def report(o):
    """The command: measures, prints, and writes the page."""
    m, every, found = answered(o)
    verdict = instrument("verdict")
    page = instrument("page")
    trained = verdict.objective(m.config, m.steerings) if verdict else o.objective or "SimPO"
    about = about_run(o.run, m, trained)
    told, says = [], []
    for name, section in every.items():
        why = missing(name, m)
        blocks = [Text(why, "missing")] if why else None            # None: not computed
        if name in found:
            blocks = section.describe(found[name], about)
            print(f"\n{section.title}\n{as_text(blocks)}")
        told.append((name, section.title, section.question, blocks))
    for name in ELSEWHERE:
        path, x = Path(o.run) / "analysis" / f"{name}.json", instrument(name)
        if x and path.is_file():
            blocks = x.describe(read_json(path)["result"], about)
            told.append((name, x.TITLE, x.QUESTION, blocks))
    if verdict:
        says = verdict.verdict(found, about)
        told.append(verdict.calibration())
        print(f"\n{as_text(says)}")
    if page:
        print(f"\nLook at {page.write(Path(o.run) / 'report.html', about, says, told)}")


def main(argv=None):
    return command("analyze.py", Options, report, argv, "What does the policy reward?")


if __name__ == "__main__":
    sys.exit(main())
