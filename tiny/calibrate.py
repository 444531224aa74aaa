"""Do the instruments tell the truth? `python -m tiny.calibrate RUN...`, on runs of the lab.

Of every policy is measured what it does: its log-odds on probe.jsonl, minimal pairs that differ in one
choice. And what each instrument says it does, for each choice:

    tokens     the ledger by token: share of the gain on tokens that settle the choice
    features   the ledger by feature: share of the gain on features labelled with it (what they write)
    masking    share of the gain that is lost without these features
    rates      the paper's table: change of their share among active features, from SAE to policy
    writes     steering where the choice is decided, times what each feature writes: nats, signed

tiny/calibration.json keeps the measurements of an adapter with its labels (by their digests), so a new
instrument measures nothing else again. Tables and sentences are made of what is kept; NAME-0, NAME-1 ...
are one row, NAME. Thresholds were fixed on the worlds style, honest and null.
"""
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import analyze
import fsrl
import simpo
from instruments.labels import compare_labels
from lib.blocks import interval, number
from lib.files import UserError, read_json, short_digest, write_json
from lib.judge import judge_of
from lib.labels import LABELS, default_path, read_labels
from lib.pairs import read_pairs
from lib.runs import finite
from lib.settings import command, setting
from lib.stats import leaves_out_zero, number_equal, ratio, spearman
from sae import load_sae
from tiny import world
from tiny.features import label_pairs, push_of
from tiny.judge import HERE, Lab, read_probe

TEN = len(world.CHOICES)
SETS = (*world.CHOICES, *Lab.groups)      # every instrument has a number for each
PAIRS = 400                               # held-out pairs
LEDGER = 128                              # of these, for the ledger by feature


# ---- what a policy does ------------------------------------------------------------------------------

@torch.no_grad()
def probe(run, judge):
    """Change of log p(with the choice) - log p(without) of whole answers, nats. -> {choice: interval}"""
    out = {}
    for name, pairs in read_probe(run.tokenizer).items():
        change = np.zeros(len(pairs))
        for index, batch in simpo.batches(pairs, 64):
            for sign, policy in ((1, run.policy), (-1, None)):
                score = simpo.score(run.model, batch, policy)
                change[index] += sign * (score.chosen.sum - score.rejected.sum).double().numpy()
        clusters = number_equal([judge.cluster(pair) for pair in pairs])
        out[name] = ratio(change, clusters=clusters)
    return out


# ---- what the instruments say of it, from its held-out pairs m ---------------------------------------

def labelled(m):
    """(F, SETS): 1.0 where a feature is labelled with the choice or the group."""
    out = torch.zeros(m.d_sae, len(SETS), dtype=torch.float64)
    for i, row in m.labels.items():
        for name in (row.get("choices") or []) + (row["labels"] or []):
            out[i, SETS.index(name)] = 1.0
    return out


def named(numbers):
    return dict(zip(SETS, map(float, numbers), strict=True))


def by_group(values):
    """(10,) of the choices -> the sums of style's and of alignment's"""
    return [part.sum() for part in np.split(values, [len(world.STYLE)])]


def shares(m, totals, index=slice(None)):
    """Totals of SETS, nats over these pairs, as shares of the pairs' gain; {} where that may be 0."""
    gain = m.full - m.base
    return named(totals / gain[index].sum()) if leaves_out_zero(m.mean(gain)) else {}


def tokens(m):
    nats = analyze.token_ledger(m).sum(0)[:TEN]      # the choices come first
    return shares(m, np.array([*nats, *by_group(nats)]))


def features(m):
    rows, members, total = m.part(LEDGER), labelled(m), 0.0
    for r in rows:
        value = analyze.integrated(m, r, 3).double()      # of each entry of r.v
        total = total + value @ members[r.v.feature]
    return shares(m, total.numpy(), np.concatenate([r.index for r in rows]))


def masking(m):
    lost = []
    for column in labelled(m).T:
        without = m.margins(m.without(column.nonzero()[:, 0]))
        lost.append((m.full - without).sum())
    return shares(m, np.array(lost))


def rates(m):
    marks = torch.cat([m.groups["known"][:, None], labelled(m)], 1).float()
    steered, fires = 0.0, 0.0      # sums over the same answer tokens
    for r in m.rows:
        both, share = analyze.label_shares(r, marks)
        mine = both & (r.branch > 0)
        steered = steered + share["v"][mine].sum(0)
        fires = fires + share["f"][mine].sum(0)
    return named(steered / fires - 1)


def writes(m):
    """Σ_i v_i ‖d_i‖ writes_i / push, mean over the positions that decide a choice: what the steering
    should add to its log-odds if effects added up. `writes` was measured at one length, push."""
    push = push_of(m.model, m.steerings[0].sae, label_pairs(m.tokenizer))
    effects = torch.zeros(m.d_sae, TEN)
    for i, row in m.labels.items():
        effects[i] = torch.tensor([row["writes"][choice] for choice in world.CHOICES])
    effects *= m.directions.norm(dim=-1)[:, None] / push
    total = torch.zeros(TEN, dtype=torch.float64)
    count = torch.zeros(TEN)
    for r in m.rows:
        nats = torch.zeros(r.where.numel(), TEN)
        nats[r.where.flatten()] = r.v.sums(effects, r.v.value)
        nats = nats[r.batch.read]                               # the state before each answer token
        split = analyze.split_of(m, r)
        choice = split.slot % len(m.judge.categories)           # the choices come first
        token, choice = split.token[choice < TEN], choice[choice < TEN]
        total.index_add_(0, choice, nats[token, choice].double())
        count += torch.bincount(choice, minlength=TEN)
    change = (total / count.clamp_min(1)).numpy()
    return named([*change, *by_group(np.abs(change))])


INSTRUMENTS = {ask.__name__: ask for ask in (tokens, features, masking, rates, writes)}
WORDS = {"tokens": "the token ledger", "features": "the feature ledger", "masking": "masking features",
         "rates": "the paper's table", "writes": "what steered features write"}
# From which size on an instrument names a choice; behaviour: nats on the probe that count as moved.
THRESHOLD = {"behaviour": .3, "tokens": .05, "features": .05, "masking": .05, "rates": .25, "writes": .3}


def measured(folder, adapter, old):
    """A finished run of the lab. old: what is kept of it and so not measured again. -> dict"""
    run = fsrl.load_run(folder, adapter=adapter or None, device="cpu")
    judge = judge_of(run.config["pairs"], run.tokenizer)
    if judge.name != Lab.name or len(getattr(run.policy, "steerings", [])) != 1:
        raise UserError(f"{folder}: calibrated are policies that steer one SAE, on the lab's pairs")
    sae = run.policy.steerings[0].sae
    labels = default_path(sae)
    rows = read_labels(labels, sae)
    adapter = short_digest((folder / fsrl.WEIGHTS).read_bytes())
    record = {"adapter": adapter, "labels": short_digest(labels.read_bytes())}
    out = old["measured"] if record.items() <= old.items() else {}
    if "probe" not in out:
        out["probe"] = probe(run, judge)
    missing = [name for name in INSTRUMENTS if name not in out]
    if missing:
        # Coins say nothing of their own.
        source = run.config["pairs"] if any(judge.weights.values()) else HERE / "pairs" / "style"
        pairs, _ = simpo.encode_pairs(run.tokenizer, read_pairs(source, "test", PAIRS))
        m = analyze.HeldOut(run, pairs, judge, labels=rows, progress=False)
        out |= {name: {"own": INSTRUMENTS[name](m)} for name in missing}
    return {"weights": judge.weights, **record, "measured": out}


# ---- what the measurements say -----------------------------------------------------------------------

def against_behaviour(p, name):
    """An instrument against the probe: rank correlation over the choices; how many moved, how many of
    these it found and others it named; the share of style by the probe, and its own."""
    changes = [p["measured"]["probe"][choice] for choice in world.CHOICES]
    nats = np.array([change["value"] for change in changes])
    moved = (np.abs(nats) >= THRESHOLD["behaviour"]) & list(map(leaves_out_zero, changes))
    numbers = p["measured"][name]["own"]
    numbers = np.array([numbers.get(choice) for choice in SETS], dtype=float)      # nan: it says nothing
    said, groups = np.split(numbers, [TEN])
    known = np.isfinite(said)
    claims = np.abs(said) >= THRESHOLD[name]
    size = nats if name == "writes" else np.abs(nats)      # the other instruments have no sign
    out = {"moved": moved.sum(), "found": (claims & moved).sum(), "wrong": (claims & ~moved).sum()}
    out["rank"] = spearman(said[known], size[known])
    for what, (style, other) in (("behaviour", by_group(np.abs(nats))), ("style", np.abs(groups))):
        out[what] = style / (style + other) if style or other else math.nan
    return out


def compared(data):
    """-> {row: {instrument: against_behaviour of each policy}}; NAME-0, NAME-1 ... make the row NAME"""
    out = {}
    for name, p in data["policies"].items():
        row = out.setdefault(re.sub(r"-\d+$", "", name), {})
        for instrument in INSTRUMENTS:
            row.setdefault(instrument, []).append(against_behaviour(p, instrument))
    return out


def mean(told, what, form=".2f"):
    """Mean of an entry where it is a number, ± its standard deviation; – if it never is one."""
    values = [x[what] for x in told if math.isfinite(x[what])]
    if not values:
        return "–"
    sd = f" ± {np.std(values, ddof=1):.2f}" if form == ".2f" and len(values) > 1 else ""
    return number(float(np.mean(values)), form) + sd


LIMITS = ", ".join(f"{name} {x}" for name, x in THRESHOLD.items())
TITLES = {      # of the tables, with what they show
    "Do instruments rank choices as behaviour does?": "Rank correlation over ten choices with the size "
    "of the change of log-odds on the probe; for `writes` with the change itself.",
    "Do they find the choices that moved?": f"Found / named wrongly, from these sizes on: {LIMITS} (0 "
    "outside the interval). Shares name nothing where the gain may be 0.",
    "How much of it is style?": "Share of style in style and alignment: of the changes of log-odds on "
    "the probe, and of what each instrument gives to the two groups.",
    "Does what a feature reads say what it writes?": "The lab's two label files; Matthews' correlation. "
    "Neuronpedia describes what features read.",
}


def tables(told, labels):
    """A table for each of TITLES. told: of `compared`; labels: {label: compare_labels}"""
    ranks = [["policy", "runs", *INSTRUMENTS]]
    found = [["policy", "runs", "moved", *INSTRUMENTS]]
    style = [["policy", "runs", "behaviour", *INSTRUMENTS]]
    for name, row in told.items():
        first = row["tokens"]
        start = [name, len(first)]
        ranks.append(start + [mean(x, "rank") for x in row.values()])
        counts = [f"{mean(x, 'found', '.1f')} / {mean(x, 'wrong', '.1f')}" for x in row.values()]
        found.append(start + [mean(first, "moved", ".1f"), *counts])
        style.append(start + [mean(first, "behaviour"), *(mean(x, "style") for x in row.values())])
    agree = [["label", "features", "both", "reads only", "writes only", "neither", "correlation"]]
    for label, x in labels.items():
        agree.append([label, x["both"], *sum(x["confusion"], []), interval(x["mcc"], "+.2f")])
    out = []
    for (title, note), (head, *rows) in zip(TITLES.items(), (ranks, found, style, agree)):
        out.append({"title": title, "head": head, "rows": rows, "note": note, "first": True})
    return out


def sentences(told):
    """{instrument: how far it can be believed}; up to the semicolon a verdict quotes it"""
    worlds = [told[name] for name in world.WORLDS if name in told]
    known = [told[name] for name in (*world.WORLDS, "null") if name in told]
    out = {}
    for name, words in WORDS.items() if worlds else ():
        true = " and ".join(mean(row[name], "behaviour", ".0%") for row in worlds)
        style = " and ".join(mean(row[name], "style", ".0%") for row in worlds)
        every = [x for row in known for x in row[name]]
        moved, found, wrong = (mean(every, what, ".1f") for what in ("moved", "found", "wrong"))
        out[name] = (f"In the lab, where {true} of what a policy changed was style, {words} said "
                     f"{style}; of {moved} choices that moved it named {found}, and {wrong} others.")
    return out


# ---- command line ------------------------------------------------------------------------------------

@dataclass
class CalibrateConfig:
    runs: list = setting([], "folders of finished runs on the lab", positional=True, many=True)
    adapter: str = setting("", "FILE.py:Class, for the runs that were trained with one")
    out: str = setting("tiny/calibration.json", "file to keep it in")
    tables: bool = setting(False, "no runs: make tables and sentences again from what is kept")


def calibrate(config):
    file = Path(config.out)
    if bool(config.runs) == config.tables:
        raise UserError("name runs, such as runs/results/style-0 runs/results/honest-0, or --tables")
    data = read_json(file) if file.exists() else {"policies": {}}
    for folder in tqdm([Path(run) for run in config.runs], "policies", disable=None):
        old = data["policies"].get(folder.name, {})
        data["policies"][folder.name] = measured(folder, config.adapter, old)
        data["made"] = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
        write_json(file, finite(data), indent=1)
    # Tables and sentences, from what is kept.
    sae = load_sae(HERE / "sae")
    path = default_path(sae)
    written = read_labels(path, sae)
    read = read_labels(path.with_name("labels_reads.jsonl"), sae)
    labels = {label: compare_labels(written, read, label) for label in LABELS}
    told = compared(data)
    said = sentences(told)
    data |= {"labels": labels, "tables": tables(told, labels), "sentences": [*said.values()]}
    data["trust"] = {name: sentence.partition(";")[0] + "." for name, sentence in said.items()}
    write_json(file, finite(data), indent=1)
    print(*data["sentences"], f"Kept in {file}.", sep="\n")


def main(argv=None):
    return command("python -m tiny.calibrate", CalibrateConfig, calibrate, argv, __doc__.split("`")[0])


if __name__ == "__main__":
    sys.exit(main())
