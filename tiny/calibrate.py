"""Do the instruments of analyze.py tell the truth? `python analyze.py --calibrate RUN...` over runs of the lab, where it is known.

For every policy: what it does (its answers, and its log-odds on probe.jsonl, minimal pairs that differ in one choice), and what each instrument says it does.

    (a) planted weights against behaviour: did training do what it was paid for?
    (b) instruments against behaviour, for each choice and policy:
        tokens     the ledger by token: nats of the gain on tokens that settle the choice
        features   the ledger by feature: nats of the gain on features labelled with the choice (what they write)
        masking    share of the gain lost without these features
        rates      the paper's table: change of their share among active features, SAE to policy
        writes     steering where the choice is decided times what a feature writes, summed over all features: no labels, signed

What is measured of a policy is kept in tiny/calibration.json under the digest of its adapter and made only once, so this can be
stopped at any time. Thresholds (`THRESHOLD`) were fixed on the worlds style, honest and null; a world with other weights is reported apart.
"""
import hashlib
import platform
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import analyze  # noqa: E402
import fsrl  # noqa: E402
import labels as feature_labels  # noqa: E402
import simpo  # noqa: E402
from gemma import UserError, load_gemma, load_tokenizer, read_json, write_json  # noqa: E402
from sae import load_sae  # noqa: E402
from tiny import features, measure, world  # noqa: E402

FILE = HERE / "calibration.json"
INSTRUMENTS = ("tokens", "features", "masking", "rates", "writes")
GROUPS = features.GROUPS
PAIRS, LEDGER, ANSWERS = 400, 128, 2                      # held-out pairs, those of the feature ledger, sampled answers to each test question
# From which size on an instrument counts as saying that a policy moves a choice; behaviour: nats of log-odds on the probe.
THRESHOLD = {"behaviour": .3, "tokens": .05, "features": .05, "masking": .05, "rates": .25, "writes": .3}


# ---- one policy --------------------------------------------------------------------------------------------------------

def spearman(a, b):
    """Rank correlation, ties at their mean rank; nan for fewer than three or a constant."""
    def ranks(x):
        x = np.asarray(x, dtype=np.float64)
        return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() and b.std() else float("nan")


@torch.no_grad()
def log_odds(model, tokenizer, edits):
    """log p(with the choice) - log p(without) of whole answers, for the probe's minimal pairs, and what each pair is about.
    -> {choice: ((n,) nats, (n,) facts)}"""
    out = {}
    for name, pairs in measure.read_probe(tokenizer).items():
        odds, questions = np.zeros(len(pairs)), [world.read_prompt(p.text) for p in pairs]
        for index, batch in simpo.batches(pairs, 64):
            chosen, rejected = simpo.response_logps(model, batch, edits)
            n = batch.lengths.double()
            odds[index] = (chosen.double() * n[:len(index)] - rejected.double() * n[len(index):]).numpy()
        out[name] = odds, analyze.numbered([(q.subject, q.relation) for q in questions])
    return out


@lru_cache(None)
def base_log_odds():
    return log_odds(load_gemma("tiny/model"), load_tokenizer("tiny/model"), None)


def rates_of_answers(model, tokenizer, edits):
    """Rates of every choice in sampled answers to all test questions, ANSWERS of each."""
    questions = ANSWERS * [q for some in world.split("test").values() for q in some]
    return simpo.behave(model, tokenizer, questions, world, edits, temperature=1.0)[0]


def material(run, pairs, sae_labels):
    m = analyze.Material(run, pairs, {}, world, progress=False)
    m.labels, m.groups = sae_labels, feature_labels.groups(sae_labels, run.sae.d_sae)
    return m


def labels_beside(run):
    """What the lab says the features of this SAE write; made if it is not there (a random dictionary has none yet)."""
    path = feature_labels.default_path(run.sae)
    if not path.exists():
        rows, _ = features.lab_labels(run.model, run.tokenizer, run.sae, progress=True)
        feature_labels.write_labels(path, rows, run.sae, "lab, writes")
    return feature_labels.read_labels(path, run.sae)


def identity(folder):
    """A digest of a run's adapter and of the labels that it is measured with: with others it is measured anew."""
    path = feature_labels.default_path(load_sae(read_json(folder / "config.json")["sae"]))
    return hashlib.sha256((folder / fsrl.WEIGHTS).read_bytes() + (path.read_bytes() if path.exists() else b"")).hexdigest()[:16]


def instruments(m):
    """What each instrument says about each choice and both groups, on the pairs of m. -> {instrument: {choice or group: ratio or number}}, gain"""
    names = analyze.categories(m)
    gain = m.full - m.base
    whole = m.mean(gain)
    sure = analyze.apart(whole)
    by_token = analyze.token_ledger(m)
    sets = {c: [i for i, row in m.labels.items() if c in (row.get("choices") or [])] for c in world.CHOICES}
    sets |= {g: [i for i, row in m.labels.items() if g in (row["labels"] or [])] for g in GROUPS}
    out = {name: {} for name in INSTRUMENTS}
    for name in sets:
        columns = [names.index(c) for c in GROUPS.get(name, (name,))]
        out["tokens"][name] = {**m.mean(by_token[:, columns].sum(1)), "share": float(by_token[:, columns].sum() / gain.sum()) if sure else None}
        out["masking"][name] = m.mean(m.full - m.margins(m.without(sets[name])), gain) if sure else None
    some = m.some(LEDGER)
    index = np.concatenate([r.index for r in some])
    entries, whole_sum = np.full((len(m.pairs), len(sets)), np.nan), np.zeros(len(m.pairs))
    marks = torch.zeros(m.sae.d_sae, 1 + len(sets))
    marks[:, 0] = m.groups["known"].float()
    for k, name in enumerate(sets):
        marks[sets[name], 1 + k] = 1.0
    for r in some:
        value = analyze.integrated(m, r, 3).sum(1).double()
        whole_sum[r.index] = torch.zeros(len(r.index), dtype=torch.float64).index_add_(0, r.row[r.v.token], value).numpy()
        slots = torch.zeros(len(r.index), len(sets), dtype=torch.float64)
        entries[r.index] = slots.index_add_(0, r.row[r.v.token], value[:, None] * marks[r.v.feature, 1:].double()).numpy()
    share = {"v": 0.0, "f": 0.0}                                                # sums over the same tokens
    for r in m.rows:
        both, shares = analyze.label_shares(r, marks)
        for kind in share:
            share[kind] += shares[kind][both & (r.branch > 0)].sum(0).numpy()
    predicted = written(m)
    for k, name in enumerate(sets):
        out["features"][name] = {**m.mean(entries[:, k]), "share": float(np.nansum(entries[:, k]) / gain[index].sum()) if sure else None}
        out["rates"][name] = float(share["v"][k] / share["f"][k] - 1) if share["f"][k] else None
        out["writes"][name] = float(predicted[name]) if name in predicted else float(sum(abs(predicted[c]) for c in GROUPS[name]))
    out["sizes"] = {name: len(members) for name, members in sets.items()}
    out["completeness"] = float(np.abs(whole_sum[index] - gain[index]).sum() / max(np.abs(gain[index]).sum(), 1e-30))
    return out | {"gain": whole, "sure": bool(sure)}


def written(m):
    """{choice: nats} that the steering should add to its log-odds where it is decided, if effects simply added up. What a feature
    writes was measured for one length of push, so this is Σ_i v_i ‖d_i‖ writes_i / push, a mean over the deciding positions."""
    norm = m.sae.W_dec.norm(dim=-1)
    marks = torch.tensor([[m.labels[i]["writes"][c] if i in m.labels else 0.0 for c in world.CHOICES] for i in range(m.sae.d_sae)]) * norm[:, None] / m.push
    total, count = torch.zeros(len(world.CHOICES), dtype=torch.float64), torch.zeros(len(world.CHOICES), dtype=torch.float64)
    for r in m.rows:
        nats = torch.zeros(len(r.row), len(world.CHOICES)).index_add_(0, r.v.token, r.v.value[:, None] * marks[r.v.feature])
        place = (r.where.flatten().cumsum(0) - 1)[r.batch.read]                # of the state that predicts each answer token, among the steered ones
        split = analyze.split_of(m, r)
        choice = split.slot % len(analyze.categories(m))
        mine = (choice < len(world.CHOICES)) & r.where.flatten()[r.batch.read][split.read]
        here, choice = place[split.read[mine]], choice[mine]
        total.index_add_(0, choice, nats[here, choice].double())
        count += torch.bincount(choice, minlength=len(world.CHOICES))
    return dict(zip(world.CHOICES, (total / count.clamp_min(1)).tolist()))


def policy(folder, args):
    """Everything about one run. -> dict"""
    config = read_json(Path(folder) / "config.json")
    run = fsrl.load_run(folder, adapter=args.adapter if config.get("adapter") else None, device="cpu")
    meta, its_world = simpo.judge_of(config["pairs"])
    if its_world is None:
        raise UserError(f"{folder} was not trained on the lab's pairs ({config['pairs']}); only there the truth is known")
    weights = {c: float(meta["weights"].get(c, 0)) for c in world.CHOICES}
    edits, marks = run.steering.edits(), labels_beside(run)
    push = features.push_of(run.model, run.sae, features.label_pairs(run.tokenizer))
    out = {"run": Path(folder).name, "kind": kind_of(config, weights, run.sae), "weights": weights, "seed": config["seed"], "instruments": {},
           "answers": rates_of_answers(run.model, run.tokenizer, edits)}
    before, after = base_log_odds(), log_odds(run.model, run.tokenizer, edits)
    out["probe"] = {c: analyze.ratio(after[c][0] - before[c][0], clusters=after[c][1]) for c in world.CHOICES}
    cross = {"style": HERE / "pairs" / "style", "honest": HERE / "pairs" / "honest"} if out["kind"] in ("style", "honest") else {}
    for name, source in {"own": config["pairs"], **{k: v for k, v in cross.items() if k != out["kind"]}}.items():
        # The control on coins is judged on pairs that say something, as everywhere in docs/results.md: its own have no truth in them.
        source = source if any(weights.values()) else HERE / "pairs" / "style"
        pairs, _ = simpo.encode_pairs(run.tokenizer, simpo.read_pairs(source, "test", PAIRS))
        m = material(run, pairs, marks)
        m.push = push
        out["instruments"][name] = instruments(m)
    return out


def kind_of(config, weights, sae):
    """What a run is, for the tables: its world, and what is unusual about it."""
    world_name = next((name for name, w in world.WORLDS.items() if {c: float(w.get(c, 0)) for c in world.CHOICES} == weights), None if any(weights.values()) else "null")
    parts = [world_name or "new world"]
    usual = {"beta": 10.0, "gamma_ratio": .5, "nll_weight": 5.0, "steps": 800, "batch_size": 32, "lr": 2e-3, "activation": "soft", "fusion": "additive", "positions": "text", "top_k": None, "mask": "",
             "mask_labels": "", "mask_random": 0, **({} if config.get("adapter") else {"l1": .03})}
    parts += [f"{name} {config[name]}" for name, value in usual.items() if config.get(name, value) != value]
    if not config.get("simpo_weight", 1):
        parts.append("NLL alone")
    if config.get("adapter"):
        parts.append(Path(config["adapter"]).name.rpartition(":")[2].lower())
    if sae.identity() != load_sae(HERE / "sae").identity():
        parts.append("random dictionary")
    return ", ".join(parts)


# ---- all of them ---------------------------------------------------------------------------------------------------------

def planted(p, base):
    """(a) of a policy: behaviour in points against planted weights, over the ten choices."""
    points = np.array([100 * (p["answers"][c] - base["answers"][c]) for c in world.CHOICES])
    weight = np.array([p["weights"][c] for c in world.CHOICES])
    zero, negative = weight == 0, weight < 0
    return {"points": dict(zip(world.CHOICES, points.tolist())), "slope": float(np.polyfit(weight, points, 1)[0]) if weight.std() else None, "spearman": spearman(weight, points) if weight.std() else None,
            "decoys_moved": int((np.abs(points[zero]) > 5).sum()), "decoys": int(zero.sum()), "negatives_up": int((points[negative] > 0).sum()), "negatives": int(negative.sum())}


def value_of(x):
    return None if x is None else x["share"] if isinstance(x, dict) and "share" in x else x["value"] if isinstance(x, dict) else x


def agreement(p, pairs="own"):
    """(b) of a policy: each instrument against the probe. -> {instrument: {spearman, hits, false, missed, ...}}

    signed instruments (tokens on pairs that reward what they reward, features, masking, rates) say how much, not which way: they are compared with the
    size of the change, `writes` with the change itself.
    """
    out, moved = {}, {c: p["probe"][c]["value"] for c in world.CHOICES}
    truth = {c: abs(moved[c]) >= THRESHOLD["behaviour"] and (p["probe"][c]["low"] > 0 or p["probe"][c]["high"] < 0) for c in world.CHOICES}
    for name in INSTRUMENTS:
        says = {c: value_of(p["instruments"][pairs][name][c]) for c in world.CHOICES}
        known = [c for c in world.CHOICES if says[c] is not None]
        size = [moved[c] if name == "writes" else abs(moved[c]) for c in known]
        claims = {c: abs(says[c]) >= THRESHOLD[name] for c in known}
        out[name] = {"spearman": spearman([says[c] for c in known], size), "hits": sum(claims[c] and truth[c] for c in known), "false": sum(claims[c] and not truth[c] for c in known),
                     "missed": sum(truth[c] and not claims.get(c, False) for c in world.CHOICES), "moved": sum(truth.values()), "silent": not known}
        style = value_of(p["instruments"][pairs][name]["style"])
        alignment = value_of(p["instruments"][pairs][name]["alignment"])
        out[name]["style_share"] = abs(style) / (abs(style) + abs(alignment)) if style is not None and alignment is not None and abs(style) + abs(alignment) else None
    total = sum(abs(v) for v in moved.values())
    out["behaviour"] = {"style_share": sum(abs(moved[c]) for c in world.STYLE) / total if total else None}
    return out


def mean_sd(values, form="{:.2f}"):
    values = [v for v in values if v is not None and np.isfinite(v)]
    if not values:
        return "–"
    return form.format(np.mean(values)) + (f" ± {form.format(np.std(values, ddof=1)).lstrip('+')}" if len(values) > 1 else "")


def tables(data):
    """calibration.json's tables and sentences, from its policies."""
    kinds = {}
    for p in data["policies"].values():
        kinds.setdefault(p["kind"], []).append(p)
    order = sorted(kinds, key=lambda k: (["style", "honest", "null"].index(k.split(",")[0]) if k.split(",")[0] in ("style", "honest", "null") else 9, len(k)))
    of = lambda kind, get: [get(p) for p in kinds[kind]]      # noqa: E731
    a = {k: [planted(p, data["base"]) for p in kinds[k]] for k in order}
    b = {k: [agreement(p) for p in kinds[k]] for k in order}
    out = [{"title": "Did training do what was planted?", "head": ["policy", "runs", "slope, points a unit of weight", "rank correlation", "decoys moved by more than 5 points", "negatives that rose"],
            "rows": [[k, len(a[k]), mean_sd([x["slope"] for x in a[k]], "{:.1f}"), mean_sd([x["spearman"] for x in a[k]]), f"{np.mean([x['decoys_moved'] for x in a[k]]):.1f} of {a[k][0]['decoys']}",
                      f"{np.mean([x['negatives_up'] for x in a[k]]):.1f} of {a[k][0]['negatives']}"] for k in order],
            "note": "Change of the rates of sampled answers, in points, against the planted weights, over the ten choices; mean ± standard deviation over seeds. `null` has no weights: every choice is a decoy there."}]
    out.append({"title": "Do the instruments rank the choices as behaviour does?", "first": True, "head": ["policy", "runs", *INSTRUMENTS],
                "rows": [[k, len(b[k]), *(mean_sd([x[i]["spearman"] for x in b[k]]) for i in INSTRUMENTS)] for k in order],
                "note": "Rank correlation over the ten choices between what an instrument says and the change of log-odds on the probe (its size; for `writes` the change itself)."})
    out.append({"title": "Do they find the choices that moved, and no others?", "first": True, "head": ["policy", "moved", *(f"{i}: found, wrong (F1)" for i in INSTRUMENTS)],
                "rows": [[k, f"{np.mean([x['tokens']['moved'] for x in b[k]]):.1f}", *(f"{np.mean([x[i]['hits'] for x in b[k]]):.1f}, {np.mean([x[i]['false'] for x in b[k]]):.1f} (F1 {f1({w: sum(x[i][w] for x in b[k]) for w in ('hits', 'false', 'missed')}):.2f})" if not all(x[i]["silent"] for x in b[k]) else "says nothing" for i in INSTRUMENTS)] for k in order],
                "note": f"Moved: log-odds on the probe changed by {THRESHOLD['behaviour']} nats or more, and its interval leaves out 0. Found: of these, how many the instrument names; wrong: named but not moved. "
                        f"Thresholds: " + ", ".join(f"{i} {THRESHOLD[i]}" for i in INSTRUMENTS) + ". An instrument that gives shares says nothing where the gain cannot be told from 0."})
    out.append({"title": "How much of it is style?", "first": True, "head": ["policy", "behaviour", *INSTRUMENTS],
                "rows": [[k, mean_sd([x["behaviour"]["style_share"] for x in b[k]]), *(mean_sd([x[i]["style_share"] for x in b[k]]) for i in INSTRUMENTS)] for k in order],
                "note": "Share of style in style and alignment together: of the summed sizes of the changes of log-odds on the probe, and of what each instrument gives to the two groups."})
    cross = [[f"{k} policy on {pairs} pairs", *(mean_sd(of(k, lambda p: value_of(p["instruments"][pairs if pairs != k else "own"]["tokens"][g])), "{:.2f}") for g in GROUPS),      # noqa: B023
              *(mean_sd(of(k, lambda p: value_of(p["instruments"][pairs if pairs != k else "own"]["masking"][g])), "{:.2f}") for g in GROUPS),      # noqa: B023
              mean_sd(of(k, lambda p: p["instruments"][pairs if pairs != k else "own"]["gain"]["value"]), "{:+.3f}")]      # noqa: B023
             for k in ("style", "honest") if k in kinds for pairs in ("style", "honest")]
    out.append({"title": "The cross: each policy on each world's pairs", "head": ["", "tokens: style", "tokens: alignment", "masking style", "masking alignment", "gain, nats a token"], "rows": cross,
                "note": "Shares of the gain on tokens that settle a choice of the group, and shares lost when its features are masked."})
    if agree := data.get("labels"):
        out.append({"title": "Does what a feature reads say what it writes?", "first": True, "head": ["label", "features", "both", "reads only", "writes only", "neither", "precision", "recall", "MCC (95%)"],
                    "rows": [[name, x["both"], x["confusion"][0][0], x["confusion"][0][1], x["confusion"][1][0], x["confusion"][1][1], f"{x['precision']:.2f}", f"{x['recall']:.2f}", f"{x['mcc']:+.2f} ({x['mcc_low']:+.2f} to {x['mcc_high']:+.2f})"]
                             for name, x in agree.items()],
                    "note": "The lab's two label files, what features write as the reference. Descriptions of what a feature fires on, such as Neuronpedia's, are labels of the first kind."})
    three = [k for k in ("style", "honest", "null") if k in kinds]
    choices = [[c, *(cell for k in three for cell in (mean_sd(of(k, lambda p: p["probe"][c]["value"]), "{:+.2f}"), mean_sd(of(k, lambda p: value_of(p["instruments"]["own"]["tokens"][c])), "{:+.2f}"),      # noqa: B023
                                                         mean_sd(of(k, lambda p: p["instruments"]["own"]["writes"][c]), "{:+.2f}")))] for c in world.CHOICES]      # noqa: B023
    out.append({"title": "Choice by choice", "head": ["", *(f"{k}: {what}" for k in three for what in ("log-odds", "tokens", "writes"))], "rows": choices,
                "note": "Change of log-odds on the probe in nats; share of the gain on its tokens; steering times what features write, in nats."})
    return out


WHAT = {"tokens": "The ledger by token", "features": "The ledger by feature", "masking": "Masking labelled features", "rates": "The label rates of the paper's table", "writes": "Steering times what features write"}


def label_agreement():
    """The lab's labels by what features read against those by what they write. -> {label: labels.agreement}"""
    sae = load_sae(HERE / "sae")
    writes = feature_labels.default_path(sae)
    both = [feature_labels.read_labels(path, sae) for path in (writes, writes.with_name("labels_reads.jsonl"))]
    return {label: feature_labels.agreement(*both, label) for label in feature_labels.LABELS}


def f1(x):
    """Of naming what moved: found, named wrongly and missed, of one policy or summed over some."""
    return 2 * x["hits"] / max(1e-9, 2 * x["hits"] + x["false"] + x["missed"])


def sentences(data):
    """What the tables say, in words: each instrument on style, honest and null, where its threshold was fixed, and on new weights. The word is for F1 of
    naming what moved (.8 and above, .5 and above, below, or more named wrongly than rightly); ranks are those of style and honest, since coins move nothing."""
    of = lambda *kinds: [agreement(p) for p in data["policies"].values() if p["kind"] in kinds]      # noqa: E731
    known, moving, new, null, out = of("style", "honest", "null"), of("style", "honest"), of("new world"), of("null"), []

    def how(counted, ranked, name):
        total = {k: sum(x[name][k] for x in counted) for k in ("hits", "false", "missed", "moved")}
        rank = float(np.mean([x[name]["spearman"] for x in ranked if np.isfinite(x[name]["spearman"])] or [np.nan]))
        word = "fails" if total["false"] >= total["hits"] or f1(total) < .5 else "recovers what moved" if f1(total) >= .8 else "recovers part of it"
        return (f"{word} (found {total['hits'] / len(counted):.1f} of {total['moved'] / len(counted):.1f} choices that moved, named {total['false'] / len(counted):.1f} wrongly, F1 {f1(total):.2f}, "
                f"rank correlation {rank:.2f})")
    for name in INSTRUMENTS:
        if moving:
            out.append(f"{WHAT[name]} (`{name}`) {how(known, moving, name)}" + (f"; on new weights it {how(new, new, name)}" if new else "") + ".")
    if known:
        out.append(f"(Means over the {len(known)} policies of `style`, `honest` and `null`, ranks without `null`" + (f"; {len(new)} of the new world" if new else "") + ".)")
    if null:
        silent = [name for name in INSTRUMENTS if all(x[name]["silent"] or x[name]["hits"] + x[name]["false"] == 0 for x in null)]
        out.append("Trained on coins, " + (f"{', '.join(f'`{n}`' for n in silent)} name no choice" if silent else "every instrument names some choice")
                   + "".join(f"; `{n}` names {np.mean([x[n]['hits'] for x in null]):.1f} rightly and {np.mean([x[n]['false'] for x in null]):.1f} wrongly" for n in INSTRUMENTS if n not in silent) + ".")
    planted_fit = [planted(p, data["base"])["spearman"] for p in data["policies"].values() if p["kind"] in ("style", "honest")]
    if planted_fit:
        out.append(f"What was planted came out: rank correlation of behaviour with the weights {np.mean(planted_fit):.2f}"
                   + (f", on new weights {np.mean(more):.2f}" if (more := [planted(p, data['base'])["spearman"] for p in data["policies"].values() if p["kind"] == "new world"]) else "") + ".")
    return out


def calibrate(args):
    """analyze.py --calibrate. -> exit code"""
    if not args.run:
        raise UserError("--calibrate needs the folders of runs, such as runs/results/style-0 runs/results/honest-0")
    folders = [Path(f) for f in args.run if (Path(f) / fsrl.CONFIG).exists()]
    if not folders:
        raise UserError(f"--calibrate: {args.run[0]} and the others are no finished runs")
    if left := [f for f in args.run if Path(f) not in folders]:
        print(f"no finished runs, left out: {', '.join(left)}", file=sys.stderr)
    file = Path(args.out) if args.out else FILE
    data = read_json(file) if file.exists() else {"base": None, "policies": {}, "threshold": THRESHOLD}

    def keep():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, analyze.plain(data), indent=1)
    if not data["base"]:
        data["base"] = {"answers": rates_of_answers(load_gemma("tiny/model"), load_tokenizer("tiny/model"), None)}
        keep()
    for folder in tqdm(folders, desc="policies", disable=args.quiet):
        if identity(folder) not in data["policies"]:
            measured = analyze.plain(policy(folder, args))
            data["policies"] = {k: p for k, p in data["policies"].items() if p["run"] != folder.name} | {identity(folder): measured}       # what other labels gave goes
            keep()
    data["labels"] = label_agreement()
    data |= {"tables": tables(data), "sentences": sentences(data), "threshold": THRESHOLD, "made": f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}",
             "command": "python analyze.py --calibrate runs/results/{style,honest,null,imitation,constant,random,mixed}-? --adapter docs/controls.py:Constant"}
    keep()
    for t in data["tables"]:
        print("\n" + t["title"], "| " + " | ".join(t["head"]) + " |", *("| " + " | ".join(map(str, row)) + " |" for row in t["rows"]), t["note"], sep="\n")
    print("", *data["sentences"], f"{file}: {len(data['policies'])} policies", sep="\n")
    return 0
