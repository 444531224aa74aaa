"""Labels for the features of an SAE: three ways to make them, none of which is the truth.

    python -m instruments.labels lab                 # what was planted: only the lab in tiny/ knows it
    python -m instruments.labels rules               # on which kinds of tokens a feature fires
    python -m instruments.labels judge --explanations EXPORT --judge URL --judge-model NAME
                                                     # a language model reads Neuronpedia's descriptions
    python -m instruments.labels agree A B           # two label files compared
    python -m instruments.labels pick style --out F  # the features so labelled, for train.py --mask F
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gemma import load_config, load_gemma
from instruments.descriptions import endpoint_judge, judge_labels, read_explanations
from lib.blocks import interval
from lib.files import UserError, explained, write_text
from lib.judge import Rules
from lib.labels import LABELS, default_path, groups, read_labels, shares, write_labels
from lib.pairs import read_pairs
from lib.plugins import check_fit
from lib.settings import check, choose_device, command, one_of, setting
from lib.text import load_tokenizer
from sae import load_sae
from simpo import encode_pairs


# ---- two label files compared --------------------------------------------------------------------

CASES = (True, True), (False, True), (True, False), (False, False)      # in file a, in file b


def compare_labels(a, b, label):
    """How far two label files ({index: row} each) agree on the features that both have judged.

    -> "both": how many; "confusion": [[both yes, only b], [only a, both no]]; "mcc": Matthews'
    correlation with its 95% interval, by a bootstrap over features.
    """
    judged = [(a[i]["labels"], b[i]["labels"]) for i in a if i in b]
    cases = [(label in x, label in y) for x, y in judged if None not in (x, y)]
    n = len(cases)
    if n < 10:
        raise UserError(f"only {n} features are judged in both label files; it needs 10")
    cells = np.array([cases.count(case) for case in CASES])
    # Features drawn anew, with replacement: their four counts are a multinomial draw.
    drawn = np.random.default_rng(0).multinomial(n, cells / n, size=2000)
    value, low, high = matthews(cells), np.nan, np.nan
    if np.isfinite(value):
        low, high = np.nanquantile(matthews(drawn), (0.025, 0.975))
    mcc = {"value": float(value), "low": float(low), "high": float(high)}
    return {"both": n, "confusion": cells.reshape(2, 2).tolist(), "mcc": mcc}


def matthews(cells):
    """Counts (…,4) of CASES -> Matthews' correlation (…), nan where it is 0/0"""
    both, only_b, only_a, none = np.moveaxis(np.asarray(cells, float), -1, 0)
    product = (both + only_b) * (both + only_a) * (none + only_b) * (none + only_a)
    return (both * none - only_b * only_a) / np.sqrt(np.where(product > 0, product, np.nan))


# ---- rules ---------------------------------------------------------------------------------------

# Which kinds of tokens (lib/judge.py) speak for a label.
KINDS = {"style": ("markdown", "list marker", "heading", "punctuation", "opener"),
         "alignment": ("refusal", "hedge")}


@torch.no_grad()
def rules_labels(model, sae, tokenizer, pairs):
    """A feature has a label if half of its activation on the chosen answers lies on tokens of its kinds.

    -> rows for write_labels; features that fire nowhere get none
    """
    judge = Rules(tokenizer)
    names = judge.categories
    mass = torch.zeros(len(names), sae.d_sae, dtype=torch.float64)
    for pair in tqdm(pairs, "reads", disable=None):
        h = model.embed(torch.tensor([pair.prompt + pair.chosen], device=model.device))
        x = model.blocks(h, 0, sae.layer + 1)[0, len(pair.prompt):]
        settled = judge.settles(pair.text, pair.chosen)      # one kind a token
        kinds = [names.index(kind) for [(kind, *_)] in settled]
        mass.index_add_(0, torch.tensor(kinds), sae.encode(x).cpu().double())
    out = []
    for index in mass.sum(0).nonzero()[:, 0].tolist():
        share = mass[:, index] / mass[:, index].sum()
        share = dict(zip(names, share.tolist()))
        labels = [label for label in LABELS if sum(share[kind] for kind in KINDS[label]) >= .5]
        most = sorted(names, key=share.get, reverse=True)[:2]
        said = "fires on " + ", ".join(f"{kind} {share[kind]:.0%}" for kind in most)
        out.append({"index": index, "labels": labels, "description": said})
    return out


# ---- the command line ----------------------------------------------------------------------------

def pick(rows, d_sae, label, random=0, seed=0):
    """The features with a label; as a control instead `random` others, drawn by the seed.

    rows: {index: row}  -> sorted feature numbers
    """
    marked = groups(rows, d_sae)[label]
    if not marked.any():
        raise UserError(f"no feature is labelled {label}")
    if not random:
        return marked.nonzero()[:, 0].tolist()
    others = (~marked).nonzero()[:, 0].tolist()
    if random > len(others):
        raise UserError(f"--random is {random}; only {len(others)} features are not labelled {label}")
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return sorted(others[i] for i in order[:random])


TASKS = {"lab": 0, "rules": 0, "judge": 0, "agree": 2, "pick": 1}      # operands of each


@dataclass
class LabelSettings:
    task: str = setting("", "lab, rules, judge, agree or pick", positional=True, group="task")
    operands: list = setting([], "agree: two label files; pick: style or alignment", positional=True,
                             many=True)
    model: str = setting("tiny/model", "a Gemma-2: local folder or Hub repo id", group="files")
    sae: str = setting("tiny/sae", "its SAE: local folder, or repo:path/inside on the Hub")
    pairs: str = setting("tiny/pairs/style", "rules: pairs, whose chosen answers are read")
    out: str = setting("", "the file to write; default: a file beside the SAE")
    force: bool = setting(False, "replace a file that is there")
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    explanations: str = setting("", "Neuronpedia's export: .jsonl(.gz) or a folder", group="judge")
    judge: str = setting("", "an OpenAI-compatible endpoint")
    judge_model: str = setting("", "the model to ask for at the endpoint")
    labels: str = setting("", "the label file; default: the one beside the SAE", group="pick")
    random: int = setting(0, "so many features instead, none of them labelled so", low=0)
    seed: int = setting(0, "of these", low=0)

    def __post_init__(self):
        check(self)
        one_of("the task", self.task, TASKS)
        count = TASKS[self.task]
        if len(self.operands) != count:
            raise UserError(f"{self.task} takes {count} more words, not {len(self.operands)}")
        if self.task == "pick":
            one_of("pick", self.operands[0], LABELS)
        is_known = self.judge.startswith("http") and self.judge_model
        if self.task == "judge" and not (self.explanations and is_known):
            raise UserError("judge needs --explanations FILE --judge http://... --judge-model NAME")


def run(o):
    """One task. Whether it may write its file is asked before anything is computed."""
    device, dtype = choose_device(o.device)
    sae = load_sae(o.sae, dtype=dtype, device=device)
    if o.task == "agree":
        return agree(*(read_labels(path, sae) for path in o.operands))
    beside = default_path(sae)
    out = free(o.out or ("picked.txt" if o.task == "pick" else beside), o.force)
    if o.task in ("lab", "rules"):
        check_fit(sae, load_config(o.model))
        model, tokenizer = load_gemma(o.model, dtype=dtype, device=device), load_tokenizer(o.model)
    if o.task == "lab":
        from tiny.features import lab_labels
        reads = free(out.with_name(f"{out.stem}_reads{out.suffix}"), o.force)
        write_rows, read_rows = lab_labels(model, tokenizer, sae)
        save(reads, read_rows, sae, "lab, reads")
        save(out, write_rows, sae, "lab, writes")
    elif o.task == "rules":
        pairs, _ = encode_pairs(tokenizer, read_pairs(o.pairs, "train", 2000))
        save(out, rules_labels(model, sae, tokenizer, pairs), sae, "rules")
    elif o.task == "judge":
        explanations = read_explanations(o.explanations, sae)
        judge = endpoint_judge(o.judge, o.judge_model)
        rows = judge_labels(explanations, judge, out.with_suffix(".raw.jsonl"))
        save(out, rows, sae, f"judge {judge.name}")
    else:
        source = o.labels or beside
        picked = pick(read_labels(source, sae), sae.d_sae, o.operands[0], o.random, o.seed)
        what = f"{'not ' * bool(o.random)}labelled {o.operands[0]} by {source}"
        write_text(out, "".join(f"{i}\n" for i in picked))
        print(f"{out}: {len(picked)} of {sae.d_sae} features, {what}")


def free(path, force):
    """A path that may be written to."""
    if Path(path).exists() and not force:
        raise UserError(f"{path} exists; --force replaces it, --out names another file")
    with explained(path, "no file can be made there"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def save(path, rows, sae, by):
    write_labels(path, rows, sae, by)
    share = shares(read_labels(path, sae), sae.d_sae)
    print(f"{path}: {sae.d_sae} features, " + ", ".join(f"{name} {x:.1%}" for name, x in share.items()))


def agree(a, b):
    print("           both  only 2nd  only 1st  neither  correlation")
    for label in LABELS:
        m = compare_labels(a, b, label)
        (both, only_b), (only_a, neither) = m["confusion"]
        mcc = interval(m["mcc"], "+.2f")
        print(f"{label:10} {both:4}  {only_b:8}  {only_a:8}  {neither:7}  {mcc}")


def main(argv=None):
    return command("python -m instruments.labels", LabelSettings, run, argv, "Labels for SAE features.")


if __name__ == "__main__":
    sys.exit(main())
