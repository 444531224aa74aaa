"""What do the data pay for? Asked of the pairs themselves, before any training.

    python -m instruments.data PAIRS                      # an audit
    python -m instruments.data PAIRS --model M --sae S    # and the ledger of the data, by SAE feature
    python -m instruments.data --calibrate                # the ledger where the weights are planted

The ledger: logistic regression of the label on the difference of two answers' pooled SAE features and of
their lengths (compare WIMHF, ICLR 2026, arXiv 2510.26202, whose SAE reads embeddings of answers). What
the label pays a set of features is their part of the mean log-odds of held-out pairs, Σ w_i · mean x_i,
in nats. On the lab `minimal pairs` stands beside it: w · x of two answers that differ in one choice, in
the unit of the planted weights, whatever the labels of features are.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import simpo
from gemma import load_gemma
from lib import show
from lib.blocks import Table, as_text, interval, number
from lib.files import UserError
from lib.judge import judge_of, rule
from lib.labels import default_path, groups, read_labels
from lib.pairs import read_held_out
from lib.plugins import check_fit
from lib.regression import Rows, accuracy, cross_validated, drawn, lasso, mirrored_auc, ridge
from lib.sections import MACHINE, save
from lib.settings import check, choose_device, command, setting
from lib.stats import number_equal, ratio, spearman
from lib.text import load_tokenizer
from sae import load_sae

POOLS = ("mean", "sum", "max")             # of a feature over the tokens of an answer
FITS = {"ridge": ridge, "l1": lasso}
CHUNK = 2**25              # elements of a dense (tokens, F) temporary
REFITS, WORLDS = 20, 8                     # bootstrap refits, and shuffles of the labels; drawn worlds


# ---- features of pairs ------------------------------------------------------------------------------

@torch.no_grad()
def differences(model, sae, pairs, batch_size=16):
    """What fires more in chosen than in rejected answers, over their tokens, end included.
    -> sparse: pair (nnz,), feature (nnz,), values (nnz,3) of POOLS"""
    found, F = [], sae.d_sae
    steps = -(-len(pairs) // batch_size)
    for index, batch in tqdm(simpo.batches(pairs, batch_size), "features", steps, disable=None):
        batch, B, parts = batch.to(model.device), len(index), []
        h = simpo.prefix(model, batch, sae.layer + 1)[batch.branch > 0]      # in the order of `owner`
        size = max(1, CHUNK // F)
        for x, owner in zip(h.split(size), batch.owner.split(size)):
            f = sae.encode(x)
            token, feature = f.nonzero(as_tuple=True)
            parts.append((owner[token] * F + feature, f[token, feature].float()))
        key, value = map(torch.cat, zip(*parts))
        key, place = key.unique(return_inverse=True)                         # an answer's feature
        total = value.new_zeros(len(key)).index_add(0, place, value)
        most = torch.zeros_like(total).scatter_reduce(0, place, value, "amax")
        answer = key // F
        pooled = torch.stack([total / batch.lengths[answer], total, most], 1)
        pooled[answer >= B] *= -1                                            # of a rejected one
        key, place = (answer % B * F + key % F).unique(return_inverse=True)  # a pair's feature
        less = pooled.new_zeros(len(key), len(POOLS)).index_add(0, place, pooled)
        found.append((torch.tensor(index)[(key // F).cpu()], (key % F).cpu(), less.cpu()))
    return tuple(map(torch.cat, zip(*found)))


def longer(pairs):
    """Tokens of the chosen answer less those of the rejected one, (n,)"""
    return torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in pairs]).double()


def rows_of(found, pairs, F, pool="mean", scale=None):
    """`differences` as Rows (n,F+1): a column for each feature, the last one for length."""
    (pair, feature, values), n = found, len(pairs)
    row, column = torch.cat([pair, torch.arange(n)]), torch.cat([feature, torch.full((n,), F)])
    value = torch.cat([values[:, POOLS.index(pool)], longer(pairs)])
    return Rows(row, column, value, (n, F + 1), scale)


def sets_of(files, F):
    """{(source, set): columns}: length, and of each label file its labels, the rest, its choices."""
    sets = {("", "length"): [F]}
    for source, rows in files.items():
        marks = groups(rows, F)
        marks["rest"] = ~marks["style"] & ~marks["alignment"]
        for name in ("style", "alignment", "rest"):
            sets[source, name] = marks[name].nonzero()[:, 0].tolist()
        for i, row in rows.items():
            for choice in row.get("choices") or ():
                sets.setdefault((source, choice), []).append(i)
    return sets


# ---- the audit --------------------------------------------------------------------------------------

def made(judge, pairs):
    """{choice: chosen less rejected of each pair (n,), nan where it does not come up}"""
    out, nan = {name: [] for name in judge.weights}, float("nan")
    for pair in pairs:
        a, b = (judge.outcome(pair.text, answer) for answer in (pair.chosen, pair.rejected))
        for name in out:
            out[name].append(a.get(name, nan) - b.get(name, nan))
    return {name: torch.tensor(x).double() for name, x in out.items()}


def utility(weights, choices):
    """Planted utility of chosen less rejected answers, (n,); rounded, so that .1 + .2 ties with .3"""
    return sum(weights[name] * x.nan_to_num() for name, x in choices.items()).round(decimals=9)


def audit(judge, pairs, changed):
    clusters = number_equal([judge.cluster(pair) for pair in pairs])
    tokens = [np.mean([len(getattr(pair, side)) for pair in pairs]) for side in ("chosen", "rejected")]
    more = longer(pairs).sign().numpy()
    out = {"pairs": len(pairs), "prompts": int(clusters.max()) + 1, **changed, "tokens": tokens}
    out |= {"longer": ratio(more / 2 + .5, clusters=clusters), "same length": float((more == 0).mean())}
    out["choices"] = choices = made(judge, pairs)
    if choices:
        u = utility(judge.weights, choices)
        tied = (u == 0).double().mean().item()
        out["planted"] = {"right": accuracy(u), "best": judge.best_accuracy, "tied": tied}
    for name, x in choices.items():
        there = ~x.isnan().numpy()
        choices[name] = ratio(x.numpy()[there], clusters=clusters[there])
    return out


# ---- the ledger -------------------------------------------------------------------------------------

class Data:
    """Pairs to fit, none of a held-out cluster, and held-out ones; what fires in them; what to read."""

    def __init__(self, c, train, held, judge, tokenizer):
        device, dtype = choose_device(c.device)
        self.sae = sae = load_sae(c.sae, device=device)
        self.model = load_gemma(c.model, dtype=dtype, device=device)
        check_fit(sae, self.model.config)
        beside = default_path(sae), default_path(sae).with_name("labels_reads.jsonl")
        files = c.labels or [path for path in beside if path.exists()]
        self.labels = {Path(path).stem: read_labels(path, sae) for path in files}
        apart = {judge.cluster(pair) for pair in held}
        self.pairs = [pair for pair in train if judge.cluster(pair) not in apart], held
        self.clusters = [number_equal([judge.cluster(p) for p in part]) for part in self.pairs]
        if (count := len({*self.clusters[0]})) < c.folds:
            raise UserError(f"{c.pairs}: {count} prompts that are not held out are too few for --folds "
                            f"{c.folds}; give more pairs or fewer folds")
        self.folds = c.folds
        self.found = [differences(self.model, sae, part, c.batch_size) for part in self.pairs]
        # What a fit is asked about: sets of columns, and the mean rows of minimal pairs.
        sets, (X, self.held) = sets_of(self.labels, sae.d_sae), self.rows("mean")
        self.sizes = {name: len(columns) for name, columns in sets.items()}
        self.sets = torch.zeros(len(sets), X.shape[1], dtype=torch.float64)
        for line, columns in zip(self.sets, sets.values()):
            line[columns] = 1
        self.minimal = self.sets[:0]
        if judge.weights:
            from tiny.judge import read_probe
            for choice, pairs in read_probe(tokenizer).items():
                found = differences(self.model, sae, pairs)
                mean = rows_of(found, pairs, sae.d_sae, scale=X.scale).mean()
                self.minimal = torch.cat([self.minimal, mean[None]])
                self.sizes["minimal pairs", choice] = None

    def rows(self, pool):
        """-> Rows of the pairs to fit, and in their scale of the held-out ones"""
        fit, held = zip(self.found, self.pairs)
        X = rows_of(*fit, self.sae.d_sae, pool)
        return X, rows_of(*held, self.sae.d_sae, pool, X.scale)

    def read(self, w, m):
        """(2,·) of `sizes`: what is paid for it, and 1 where chosen answers have more of it, else -1.
        m (n,): how often a held-out pair counts, negative: turned around"""
        mean = self.held.mean(m)
        paid = torch.cat([self.sets @ (w * mean), self.minimal @ w])
        side = (self.sets @ mean).sign()
        return torch.stack([paid, torch.cat([side, torch.ones(len(self.minimal)).double()])]).numpy()


def ledger(data, judge):
    """-> scorers: {what: accuracy and AUC on held-out pairs}; paid: a row for each set, with what a fit
    says, 95 of 100 of its refits (both sides drawn anew), and of fits to coin flips"""
    fitted, held = data.pairs
    y, ones = torch.ones(len(fitted)).double(), torch.ones(len(held)).double()
    scores, said, rng = {"the longer one": longer(held)}, {}, np.random.default_rng(0)
    if judge.weights:
        scores["the planted utility"] = utility(judge.weights, made(judge, held))
    for pool, name in (("mean", "ridge"), ("mean", "l1"), ("sum", "ridge"), ("max", "ridge")):
        (X, Z), fit = data.rows(pool), FITS[name]
        strength, w = cross_validated(fit, X, y, data.clusters[0], data.folds)
        scores[f"{name}, {pool} ({int((w != 0).sum())} columns)"] = Z.X @ w
        if pool == "mean":
            paid, side = data.read(w, ones)
            draws = [[drawn(clusters, rng) for clusters in data.clusters] for _ in range(REFITS)]
            again = [data.read(fit(X, y, m, strength, w, 1e-3), k)[0] for m, k in draws]
            said[name] = paid, *np.percentile(again, [2.5, 97.5], axis=0)
            coins = torch.from_numpy(rng.choice([-1.0, 1.0], (REFITS, len(y))))
            fits = [fit(X, coin, torch.ones_like(y), strength, 0 * w, 1e-3) for coin in coins]
            scores[f"{name}, labels shuffled"] = torch.cat([Z.X @ w for w in fits])
            again = [data.read(w, ones)[0] for w in fits]
            said[f"{name}, shuffled"] = np.percentile(again, [50, 2.5, 97.5], axis=0)
    rows = []
    for i, ((source, name), size) in enumerate(data.sizes.items()):
        rows.append({"source": source, "set": name, "features": size, "side": side[i]})
        for fit, numbers in said.items():
            rows[-1][fit] = {k: x[i] for k, x in zip(("value", "low", "high"), numbers)}
    scorers = {what: [accuracy(z), mirrored_auc(z)] for what, z in scores.items()}
    return {"scorers": scorers, "paid": rows}


# ---- what a feature writes, for free ----------------------------------------------------------------

@torch.no_grad()
def direct_writes(model, sae, ids_by_category, size=64):
    """What decoder rows d by themselves do to the logits of each category's ids, less the mean of all V:
    logits(norm(d)), the final norm's weight and the soft-cap included (both odd: -d says the opposite).
    A logit lens, as in the output score of arXiv 2505.20063.  -> (F,categories)"""
    out = []
    for d in sae.W_dec.split(size):
        z = model.logits(model.norm(d.to(model.norm.weight.dtype))).double()
        means = [z[:, sorted(ids)].mean(1) for ids in ids_by_category.values()]
        out.append(torch.stack(means, 1) - z.mean(1, keepdim=True))
    return torch.cat(out).cpu()


def writes(data, judge, tokenizer):
    """-> {category: its strongest features; on the lab its rank correlation with measured effects}"""
    ids, out = {}, {}
    if judge.weights:
        from tiny.features import EACH, deciding, label_pairs
        for choice, places in deciding(tokenizer, label_pairs(tokenizer), EACH).items():
            ids[choice] = {i for _, _, yes in places for i in yes}
    else:
        for i in range(tokenizer.get_vocab_size()):
            ids.setdefault(rule(tokenizer.decode([i], skip_special_tokens=False), ""), set()).add(i)
    known = [rows for rows in data.labels.values() if all("writes" in row for row in rows.values())]
    for name, free in zip(ids, direct_writes(data.model, data.sae, ids).T.numpy()):
        out[name] = {"features": np.argsort(-free)[:5].tolist()}
        if judge.weights and known:
            measured = [row["writes"][name] for row in known[0].values()]
            out[name]["rank"] = spearman(free[[*known[0]]], np.array(measured))
    return out


# ---- calibration: worlds of drawn weights -----------------------------------------------------------

def calibrated(data, judge):
    """The same pairs, their labels drawn anew, Bradley-Terry on drawn weights; strengths are chosen in
    the first world. -> {instrument: numbers (worlds,choices)}, planted weights (worlds,choices)"""
    (train, held), (X, _) = (made(judge, part) for part in data.pairs), data.rows("mean")
    out, planted, strengths = {}, [], {}
    for world in range(WORLDS):
        rng, coin = random.Random(f"weights {world}"), torch.Generator().manual_seed(world)
        weights = {c: rng.choice([-1, 1]) * rng.uniform(.25, 2.5) * (rng.random() < .6) for c in train}
        chance = [utility(weights, choices).sigmoid() for choices in (train, held)]
        y, m = (2 * torch.bernoulli(p, generator=coin) - 1 for p in chance)
        planted.append([*weights.values()])
        numbers = {"chosen less rejected": [(m * x).nanmean().item() for x in held.values()]}
        coins = 2 * torch.randint(2, y.shape, generator=coin).double() - 1
        for name, labels in {"ridge": y, "l1": y, "coins, ridge": coins}.items():
            fit = FITS[name.removeprefix("coins, ")]
            if fit not in strengths:
                strengths[fit], _ = cross_validated(fit, X, y, data.clusters[0], data.folds)
            nothing = torch.zeros(X.shape[1], dtype=torch.float64)
            w = fit(X, labels, torch.ones_like(y), strengths[fit], nothing, 1e-3)
            said = dict(zip(data.sizes, data.read(w, m).prod(0)))
            for source in (*data.labels, "minimal pairs"):
                numbers[f"{name}, {source}"] = [said.get((source, choice), 0.0) for choice in weights]
        for name, x in numbers.items():
            out.setdefault(name, []).append(x)
    return {name: np.array(x) for name, x in out.items()}, np.array(planted)


def f1(said, true, threshold):
    named = said >= threshold
    return 2 * (named & true).sum() / (named.sum() + true.sum())


def against(numbers, planted):
    """Means over worlds: rank correlation with the weights; of "weighs something" the average precision,
    and F1 from that threshold on which is best in the other worlds; slopes of numbers on weights."""
    said, true, out = np.abs(numbers), planted != 0, []
    for i, (x, weights) in enumerate(zip(numbers, planted)):
        hits = true[i][np.argsort(-said[i], kind="stable")]
        precision = (hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean()
        others = np.delete(said, i, 0), np.delete(true, i, 0)
        best = max(np.unique(others[0]), key=lambda threshold: f1(*others, threshold))
        out.append([spearman(x, weights), precision, f1(said[i], true[i], best)])
    slopes = (numbers * planted).sum(0) / (planted ** 2).sum(0)
    return dict(zip(("rank", "precision", "f1"), np.mean(out, 0))) | {"slopes": slopes.tolist()}


# ---- the command ------------------------------------------------------------------------------------

def says(result):
    """A result as blocks."""
    a, weights, told = result["audit"], result["weights"], result.get("calibration", {})
    rows = [["pairs; prompts", f"{a['pairs']}; {a['prompts']}"]]
    rows += [["cut to fit; left out, the same answer twice", f"{a['cut']}; {a['dropped']}"]]
    rows += [["tokens of chosen; of rejected", "; ".join(number(x, ".1f") for x in a["tokens"])]]
    rows += [["the longer is chosen", interval(a["longer"])], ["same length", number(a["same length"])]]
    rows += [[f"planted utility: {name}", number(x)] for name, x in a.get("planted", {}).items()]
    out = [(["audit", ""], rows)]
    rows = [[c, number(weights[c], "+.2f"), interval(x, "+.3f")] for c, x in a["choices"].items()]
    out.append((["choice", "planted", "chosen less rejected"], rows))
    rows = [[what, *map(number, x)] for what, x in result.get("scorers", {}).items()]
    out.append((["held-out pairs by", "accuracy", "AUC"], rows))
    rows, fits = [], ("ridge", "ridge, shuffled", "l1", "l1, shuffled")
    for x in result.get("paid", ()):
        size, side = str(x["features"] or ""), "more" if x["side"] > 0 else "less"
        said = [interval(x[fit], "+.3f") for fit in fits]
        rows.append([f"{x['set']} {x['source']}", size, side if size else "", *said])
    out.append((["what is paid, nats", "features", "chosen have", *fits], rows))
    rows = [[name, number(x.get("rank"), "+.2f"), " ".join(map(str, x["features"]))]
            for name, x in result.get("writes", {}).items()]
    out.append((["written for free", "rank with measured", "strongest features"], rows))
    measures = {"rank": "rank", "precision": "average precision", "f1": "F1"}
    rows = [[name, *(number(x[k], ".2f") for k in measures)] for name, x in told.items()]
    out.append(([f"{WORLDS} worlds of drawn weights", *measures.values()], rows))
    told = {name: x["slopes"] for name, x in told.items() if "labels" not in name}
    rows = [[c, *(number(x[i], ".2f") for x in told.values())] for i, c in enumerate(weights)]
    out.append((["slope on the weight", *told], rows if told else []))
    return [Table(head, rows, brief=True) for head, rows in out if rows]


@dataclass
class DataSettings:
    pairs: str = setting(None, "preference pairs: file, folder or Hub data set", positional=True)
    model: str = setting("tiny/model", "a Gemma-2: local folder or Hub repo id")
    sae: str = setting("", "its SAE: local folder, or repo:path/inside; without one only the audit")
    labels: list = setting([], "label files of the SAE; default: those beside it", many=True)
    calibrate: bool = setting(False, "instead: worlds of drawn weights, into docs/data.json")
    train_pairs: int = setting(5000, "pairs to fit", low=1)
    held_pairs: int = setting(1000, "pairs to score, of the split test", low=1)
    folds: int = setting(5, "folds of the cross-validation", low=2)
    max_length: int = setting(2048, "tokens of a prompt and its longer answer", low=8)
    batch_size: int = setting(16, "pairs a forward pass", low=1)
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    out: str = setting("", "file of the results; default: runs/data/NAME.json")

    def __post_init__(self):
        check(self)
        if bool(self.pairs) == self.calibrate:
            raise UserError("name the pairs, such as tiny/pairs/style, or --calibrate: one of the two")
        if self.calibrate:
            self.pairs, self.sae = "tiny/pairs/style", self.sae or "tiny/sae"
            self.out = self.out or "docs/data.json"


def run(c):
    tokenizer, parts = load_tokenizer(c.model), []
    judge = judge_of(c.pairs, tokenizer)
    for split, limit in (("train", c.train_pairs), ("test", c.held_pairs))[:1 + bool(c.sae)]:
        records = read_held_out(c.pairs, split, limit)
        pairs, changed = simpo.encode_pairs(tokenizer, records, c.max_length)
        show.cut(c, split, len(pairs), changed)
        parts.append(pairs)
        if split == "train":
            result = {"pairs": c.pairs, "weights": judge.weights, "audit": audit(judge, pairs, changed)}
    if c.sae:
        data = Data(c, *parts, judge, tokenizer)
        result |= {"model": c.model, "sae": c.sae}
        if c.calibrate:
            numbers, planted = calibrated(data, judge)
            result["calibration"] = {name: against(x, planted) for name, x in numbers.items()}
        else:
            result |= ledger(data, judge) | {"writes": writes(data, judge, tokenizer)}
    print(as_text(says(result)))
    path = Path(c.out or f"runs/data/{Path(c.pairs).stem}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, result | {"machine": MACHINE})


def main(argv=None):
    return command("python -m instruments.data", DataSettings, run, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
