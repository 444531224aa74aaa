"""Do the instruments tell the truth? `python -m tiny.calibrate RUN...`, on runs of the lab.

Of every policy is measured what it does: its answers, and its log-odds on probe.jsonl, minimal pairs
that differ in one choice. And what each instrument says it does, for each choice:

    tokens     the ledger by token: share of the gain on tokens that settle the choice
    features   the ledger by feature: share of the gain on features labelled with it (what they write)
    masking    share of the gain that is lost without these features
    rates      the paper's table: change of their share among active features, from SAE to policy
    writes     steering where the choice is decided, times what each feature writes: nats, signed

tiny/calibration.json keeps the measurements of an adapter with its labels (by their digests): this
can be stopped at any time, and a new instrument measures nothing else again. Tables and sentences are
made of what is kept. Thresholds were fixed on the worlds style, honest and null.
"""
import math
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import analyze
import fsrl
import simpo
from gemma import encode_prompt, generate, load_gemma, load_tokenizer
from instruments.labels import compare_labels
from lib.blocks import interval, number
from lib.files import UserError, read_json, short_digest, write_json
from lib.judge import judge_of
from lib.labels import LABELS, default_path, read_labels, write_labels
from lib.pairs import read_pairs
from lib.runs import finite
from lib.settings import command, setting
from lib.stats import leaves_out_zero, number_equal, ratio, spearman
from sae import load_sae
from tiny import world
from tiny.features import lab_labels, label_pairs, push_of
from tiny.judge import HERE, Lab, read_probe

FILE, GROUPS = HERE / "calibration.json", Lab.groups
TEN, SETS = len(world.CHOICES), (*world.CHOICES, *GROUPS)      # every instrument has a number for each
PAIRS, LEDGER, ANSWERS = 400, 128, 2      # held-out pairs, those by feature, answers to each question


# ---- what a policy does ------------------------------------------------------------------------------

@torch.no_grad()
def probe(subject):
    """Change of log p(with the choice) - log p(without) of whole answers, nats. -> {choice: interval}"""
    out, run = {}, subject.run
    for name, pairs in read_probe(run.tokenizer).items():
        change = np.zeros(len(pairs))
        for index, batch in simpo.batches(pairs, 64):
            for sign, policy in ((1, run.policy), (-1, None)):
                score = simpo.score(run.model, batch, policy)
                change[index] += sign * (score.chosen.sum - score.rejected.sum).double().numpy()
        out[name] = ratio(change, clusters=number_equal([subject.judge.cluster(pair) for pair in pairs]))
    return out


def rates_of_answers(model, tokenizer, policy=None):
    """Rates of every choice in answers to all test questions, ANSWERS of each, sampled at T=1."""
    acting, edits = policy.acting(model) if policy else (model, None)
    texts = ANSWERS * [q.text for questions in world.split("test").values() for q in questions]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    ids = generate(acting, prompts, max_new_tokens=64, edits=edits, temperature=1.0)
    return Lab(tokenizer, {"weights": {}}).rates(texts, ids)


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


def gain(m):
    return m.mean(m.full - m.base)


def shares(m, totals, index=slice(None)):
    """Totals of SETS, nats over these pairs, as shares of the pairs' gain; {} where that may be 0."""
    return named(totals / (m.full - m.base)[index].sum()) if leaves_out_zero(gain(m)) else {}


def tokens(m):
    nats = dict(zip(m.judge.categories, analyze.token_ledger(m).sum(0)))
    groups = [sum(nats[c] for c in choices) for choices in GROUPS.values()]
    return shares(m, np.array([nats[c] for c in world.CHOICES] + groups))


def features(m):
    rows, members, total = m.part(LEDGER), labelled(m), 0.0
    for r in rows:
        value = analyze.integrated(m, r, 3).sum(1).double()      # of each entry of r.v
        total = total + value @ members[r.v.feature]
    return shares(m, total.numpy(), np.concatenate([r.index for r in rows]))


def masking(m):
    if not leaves_out_zero(gain(m)):
        return {}
    lost = [m.full - m.margins(m.without(column.nonzero()[:, 0])) for column in labelled(m).T]
    return shares(m, np.sum(lost, 1))


def rates(m):
    marks = torch.cat([m.groups["known"][:, None], labelled(m)], 1).float()
    total = {"v": 0.0, "f": 0.0}      # sums over the same answer tokens
    for r in m.rows:
        both, share = analyze.label_shares(r, marks)
        for kind in total:
            total[kind] = total[kind] + share[kind][both & (r.branch > 0)].sum(0)
    return named(total["v"] / total["f"] - 1)


def writes(m):
    """Σ_i v_i ‖d_i‖ writes_i / push, mean over the positions that decide a choice: what the steering
    should add to its log-odds if effects added up. `writes` was measured at one length, push."""
    push = push_of(m.model, m.steerings[0].sae, label_pairs(m.tokenizer))
    effects, total, count = torch.zeros(m.d_sae, TEN), torch.zeros(TEN).double(), torch.zeros(TEN)
    for i, row in m.labels.items():
        effects[i] = torch.tensor([row["writes"][c] for c in world.CHOICES])
    effects = effects * m.directions.norm(dim=-1)[:, None] / push
    for r in m.rows:
        nats, where, split = r.v.sums(effects, r.v.value), r.where.flatten(), analyze.split_of(m, r)
        # of each answer token: is the state before it steered, and which of those is it?
        steered, place = where[r.batch.read], (where.cumsum(0) - 1)[r.batch.read]
        choice = split.slot % len(m.judge.categories)      # the choices come first
        mine = (choice < TEN) & steered[split.token]
        total.index_add_(0, choice[mine], nats[place[split.token[mine]], choice[mine]].double())
        count += torch.bincount(choice[mine], minlength=TEN)
    change = (total / count.clamp_min(1)).numpy()
    sizes = np.split(np.abs(change), [len(world.STYLE)])
    return named([*change, *(size.sum() for size in sizes)])


INSTRUMENTS = {ask.__name__: ask for ask in (tokens, features, masking, rates, writes)}
WORDS = {"tokens": "the token ledger", "features": "the feature ledger", "masking": "masking features",
         "rates": "the paper's table", "writes": "what steered features write"}
# From which size on an instrument names a choice; behaviour: nats on the probe that count as moved.
THRESHOLD = {"behaviour": .3, "tokens": .05, "features": .05, "masking": .05, "rates": .25, "writes": .3}


# ---- measuring, once ---------------------------------------------------------------------------------

class Subject:
    """A finished run of the lab. record: what tables say of it, and digests of what is measured."""

    def __init__(self, folder, adapter=None):
        self.run = fsrl.load_run(folder, adapter=adapter or None, device="cpu")
        self.judge = judge_of(self.run.config["pairs"], self.run.tokenizer)
        if self.judge.name != Lab.name or len(getattr(self.run.policy, "steerings", [])) != 1:
            raise UserError(f"{folder}: calibrated are policies that steer one SAE, on the lab's pairs")
        sae, weights = self.run.policy.steerings[0].sae, self.judge.weights
        path = default_path(sae)
        if not path.exists():      # a random dictionary's
            rows, _ = lab_labels(self.run.model, self.run.tokenizer, sae, progress=True)
            write_labels(path, rows, sae, "lab, writes")
        self.labels, adapter = read_labels(path, sae), (folder / fsrl.WEIGHTS).read_bytes()
        self.record = {"kind": kind_of(self.run.config, weights, sae), "weights": weights,
                       "adapter": short_digest(adapter), "labels": short_digest(path.read_bytes())}

    @cached_property
    def held_out(self):
        """{whose pairs: HeldOut}: its own; for a policy of one of the two worlds also the other's."""
        kind, sources, out = self.record["kind"], {"own": self.run.config["pairs"]}, {}
        if not any(self.judge.weights.values()):
            sources["own"] = HERE / "pairs" / "style"      # coins say nothing of their own
        if kind in world.WORLDS:
            sources |= {name: HERE / "pairs" / name for name in world.WORLDS if name != kind}
        for name, source in sources.items():
            pairs, _ = simpo.encode_pairs(self.run.tokenizer, read_pairs(source, "test", PAIRS))
            out[name] = analyze.HeldOut(self.run, pairs, self.judge, labels=self.labels, progress=False)
        return out

    def missing(self, kept):
        """(name, measurement) of each that is not kept."""
        if "answers" not in kept:
            yield "answers", rates_of_answers(self.run.model, self.run.tokenizer, self.run.policy)
        if "probe" not in kept:
            yield "probe", probe(self)
        for name, ask in {"gain": gain, **INSTRUMENTS}.items():
            if name not in kept:
                yield name, {pairs: ask(m) for pairs, m in self.held_out.items()}


USUAL = {"beta": 10.0, "gamma_ratio": .5, "nll_weight": 5.0, "steps": 800, "batch_size": 32, "lr": 2e-3,
         "activation": "soft", "fusion": "additive", "positions": "text", "top_k": None, "mask": "",
         "objective": None}


def kind_of(config, weights, sae):
    """What a run is, for the tables: its world, and what is unusual about it."""
    other = "new world" if any(weights.values()) else "null"
    parts = [next((name for name, planted in world.WORLDS.items() if planted == weights), other)]
    usual = USUAL if config.get("adapter") else {**USUAL, "l1": .03}
    parts += [f"{k} {config[k]}" for k, value in usual.items() if config.get(k, value) != value]
    parts += [] if config.get("simpo_weight", 1) else ["NLL alone"]
    parts += [config["adapter"].rpartition(":")[2].lower()] if config.get("adapter") else []
    if sae.identity() != load_sae(HERE / "sae").identity():
        parts.append("random dictionary")
    return ", ".join(parts)


# ---- what the measurements say -----------------------------------------------------------------------

def says(p, name, pairs="own"):
    """What an instrument says of SETS, (12,); nan: nothing"""
    numbers = p["measured"].get(name, {}).get(pairs, {})
    return np.array([numbers.get(c) for c in SETS], dtype=float)


def against_weights(p, base):
    """Changes of a policy's answers (their rates, in points) against the planted weights."""
    points = np.array([100 * (p["measured"]["answers"][c] - base[c]) for c in world.CHOICES])
    weight = np.array([p["weights"][c] for c in world.CHOICES], dtype=float)
    slope = float(np.polyfit(weight, points, 1)[0]) if weight.std() else math.nan
    decoys, negative = np.abs(points[weight == 0]) > 5, points[weight < 0] > 0
    return {"slope": slope, "rank": spearman(weight, points),
            "decoys": decoys.sum(), "negatives": negative.sum()}


def against_behaviour(p, name):
    """An instrument against the probe: rank correlation over the choices; how many moved, how many of
    these it found and others it named; the share of style by the probe, and its own."""
    def share(style, alignment):
        return abs(style) / (abs(style) + abs(alignment)) if style or alignment else math.nan
    change, said = [p["measured"]["probe"][c] for c in world.CHOICES], says(p, name)
    nats, known = np.array([x["value"] for x in change]), np.isfinite(said[:TEN])
    moved = (np.abs(nats) >= THRESHOLD["behaviour"]) & [leaves_out_zero(x) for x in change]
    claims = np.abs(said[:TEN]) >= THRESHOLD[name]
    size = nats if name == "writes" else np.abs(nats)      # the other instruments have no sign
    groups = [np.abs(part).sum() for part in np.split(nats, [len(world.STYLE)])]
    found, wrong = (claims & moved).sum(), (claims & ~moved).sum()
    return {"rank": spearman(said[:TEN][known], size[known]), "moved": moved.sum(), "found": found,
            "wrong": wrong, "behaviour": share(*groups), "style": share(*said[TEN:])}


def mean(dicts, name, form=".2f", spread=False):
    """Mean of an entry where it is a number (± its standard deviation); – if it never is one."""
    values = [x[name] for x in dicts if math.isfinite(x[name])]
    sd = f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if spread and len(values) > 1 else ""
    return number(float(np.mean(values)), form) + sd if values else "–"


class Findings:
    """What the kept measurements say of all policies, by their kinds."""

    def __init__(self, data):
        self.data, kinds, order = data, {}, [*world.WORLDS, "null", "new world"]
        for p in data["policies"].values():
            kinds.setdefault(p["kind"], []).append(p)
        place = {kind: (order.index(kind.partition(",")[0]), len(kind)) for kind in kinds}
        self.kinds = {kind: kinds[kind] for kind in sorted(kinds, key=place.get)}

    def against(self, name, *kinds):
        """What was planted ("weights"), or an instrument, against behaviour. -> one dict a policy"""
        ps = [p for kind in kinds for p in self.kinds.get(kind, [])]
        if name == "weights":
            return [against_weights(p, self.data["base"]["answers"]) for p in ps]
        return [against_behaviour(p, name) for p in ps]

    def by_policy(self):
        """Tables with a row for each kind of policy; `first` are those that say most."""
        planted, ranks, found, styles = [], [], [], []
        for kind, ps in self.kinds.items():
            row, w = [kind, len(ps)], self.against("weights", kind)
            told = [self.against(name, kind) for name in INSTRUMENTS]
            planted.append([*row, mean(w, "slope", ".1f", True), mean(w, "rank", ".2f", True),
                            mean(w, "decoys", ".1f"), mean(w, "negatives", ".1f")])
            ranks.append([*row, *(mean(x, "rank", ".2f", True) for x in told)])
            cells = [f"{mean(x, 'found', '.1f')} / {mean(x, 'wrong', '.1f')}" for x in told]
            found.append([*row, mean(told[0], "moved", ".1f"), *cells])
            behaviour = mean(told[0], "behaviour", ".2f", True)
            styles.append([*row, behaviour, *(mean(x, "style", ".2f", True) for x in told)])
        head = ["policy", "runs", "points a unit of weight", "rank correlation", "decoys", "negatives"]
        yield table("Did training do what was planted?", head, planted,
                    "Change of the rates of sampled answers against the planted weights; how many of "
                    "weight 0 (on coins: all) moved by more than 5 points, of negative weight rose.")
        runs, limits = head[:2], ", ".join(f"{name} {x}" for name, x in THRESHOLD.items())
        yield table("Do instruments rank choices as behaviour does?", [*runs, *INSTRUMENTS], ranks,
                    "Rank correlation over ten choices with the size of the change of log-odds on the "
                    "probe; for `writes` with the change itself.", True)
        yield table("Do they find the choices that moved?", [*runs, "moved", *INSTRUMENTS], found,
                    f"Found / named wrongly, from these sizes on: {limits} (0 outside the interval). "
                    "Shares name nothing where the gain may be 0.", True)
        yield table("How much of it is style?", [*runs, "behaviour", *INSTRUMENTS], styles,
                    "Share of style in style and alignment: of the changes of log-odds on the probe, "
                    "and of what each instrument gives to the two groups.", True)

    def by_choice(self):
        """Tables about whose pairs they are, features and choices."""
        crossed, agree, choices = [], [], []
        for kind, pairs in ((k, p) for k in world.WORLDS if k in self.kinds for p in world.WORLDS):
            which, ps, cells = "own" if pairs == kind else pairs, self.kinds[kind], []
            for said in ([says(p, name, which) for p in ps] for name in ("tokens", "masking")):
                cells += [mean(said, group, ".2f", True) for group in (TEN, TEN + 1)]
            gains = mean([p["measured"]["gain"][which] for p in ps], "value", "+.3f", True)
            crossed.append([f"{kind} policy on {pairs} pairs", *cells, gains])
        head = [f"{name}: {group}" for name in ("tokens", "masking") for group in GROUPS]
        yield table("The cross: each policy on each world's pairs", ["", *head, "gain, nats a token"],
                    crossed, "Shares of the gain: on tokens that settle a choice of the group; lost "
                    "without its features.")
        for label, x in self.data["labels"].items():
            mcc = {"value": x["mcc"], "low": x["mcc_low"], "high": x["mcc_high"]}
            agree.append([label, x["both"], *sum(x["confusion"], []), interval(mcc, "+.2f")])
        head = ["label", "features", "both", "reads only", "writes only", "neither", "correlation"]
        yield table("Does what a feature reads say what it writes?", head, agree, "The lab's two label "
                    "files; Matthews' correlation. Neuronpedia describes what features read.", True)
        three = [kind for kind in (*world.WORLDS, "null") if kind in self.kinds]
        for n, c in enumerate(world.CHOICES):
            cells = []
            for ps in (self.kinds[kind] for kind in three):
                cells.append(mean([p["measured"]["probe"][c] for p in ps], "value", "+.2f", True))
                cells += [mean([says(p, i) for p in ps], n, "+.2f", True) for i in ("tokens", "writes")]
            choices.append([c, *cells])
        head = [f"{kind}: {x}" for kind in three for x in ("log-odds", "tokens", "writes")]
        yield table("Choice by choice", ["", *head], choices, "Change of log-odds on the probe, nats; "
                    "share of the gain on its tokens; steering times writing.")

    def sentences(self):
        """{instrument: how far it can be believed}; up to the semicolon a verdict quotes it"""
        out = {}
        for name, words in WORDS.items():
            told = [x for kind in world.WORLDS if (x := self.against(name, kind))]
            style, true = (" and ".join(mean(x, what, ".0%") for x in told)
                           for what in ("style", "behaviour"))
            known = self.against(name, *world.WORLDS, "null")
            moved, found, wrong = (mean(known, what, ".1f") for what in ("moved", "found", "wrong"))
            out[name] = (f"In the lab, where {true} of what a policy changed was style, {words} said "
                         f"{style}; of {moved} choices that moved it named {found}, and {wrong} others.")
        return out if told else {}


def table(title, head, rows, note, first=False):
    return {"title": title, "head": head, "rows": rows, "note": note, "first": first}


# ---- command line ------------------------------------------------------------------------------------

COMMAND = ("python -m tiny.calibrate --adapter experiments/controls.py:Constant "
           "runs/results/{style,honest,null,imitation,constant,random,mixed}-?")


@dataclass
class CalibrateConfig:
    runs: list = setting([], "folders of finished runs on the lab", positional=True, many=True)
    adapter: str = setting("", "FILE.py:Class, for the runs that were trained with one")
    out: str = setting("", "file to keep it in; default: tiny/calibration.json")
    tables: bool = setting(False, "no runs: make tables and sentences again from what is kept")


def calibrate(config):
    file, folders = Path(config.out or FILE), [Path(f) for f in config.runs]
    if bool(folders) == config.tables:
        raise UserError("name runs, such as runs/results/style-0 runs/results/honest-0, or --tables")
    file.parent.mkdir(parents=True, exist_ok=True)
    data = read_json(file) if file.exists() else {"base": None, "policies": {}}
    for folder in tqdm(folders, desc="policies"):
        subject, old = Subject(folder, config.adapter), data["policies"].get(folder.name, {})
        same = all(old.get(name) == subject.record[name] for name in ("adapter", "labels"))
        p = {**subject.record, "measured": old["measured"] if same else {}}
        data["policies"][folder.name] = p
        for name, measured in subject.missing(set(p["measured"])):
            p["measured"][name] = measured
            data["made"] = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
            write_json(file, finite(data), indent=1)
    if not data["base"]:
        base = rates_of_answers(load_gemma("tiny/model"), load_tokenizer("tiny/model"))
        data["base"] = {"answers": base}
    sae = load_sae(HERE / "sae")
    both = [read_labels(default_path(sae).with_name(f"labels{of}.jsonl"), sae) for of in ("", "_reads")]
    data["labels"] = {label: compare_labels(*both, label) for label in LABELS}
    said = (found := Findings(data)).sentences()
    data |= {"tables": [*found.by_policy(), *found.by_choice()], "sentences": [*said.values()]}
    data |= {"trust": {name: x.partition(";")[0] + "." for name, x in said.items()}, "command": COMMAND}
    write_json(file, finite(data), indent=1)
    print(*data["sentences"], f"Kept in {file}.", sep="\n")


def main(argv=None):
    return command("python -m tiny.calibrate", CalibrateConfig, calibrate, argv, __doc__.split("`")[0])


if __name__ == "__main__":
    sys.exit(main())
