"""Labels for the features of an SAE: four ways to make them, none of which is the truth.

    python -m instruments.labels lab                 # what was planted: only the lab in tiny/ knows it
    python -m instruments.labels rules               # words and symbols where a feature is strongest
    python -m instruments.labels judge --explanations EXPORT --judge URL --judge-model NAME
                                                     # a language model reads Neuronpedia's descriptions
    python -m instruments.labels sheet               # contexts in a CSV, for a person to fill in ...
    python -m instruments.labels labels.csv          # ... and read back
    python -m instruments.labels agree A B           # two label files compared; A is the reference
    python -m instruments.labels pick style --out F  # the features so labelled, for train.py --mask F
"""
import csv
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gemma import load_config, load_gemma
from instruments.descriptions import endpoint_judge, gemma_judge, judge_labels, read_explanations
from lib.files import UserError, write_text
from lib.labels import (LABELS, check_row, default_path, groups, may_write, read_labels, shares,
                        write_labels)
from lib.pairs import read_pairs
from lib.plugins import check_fit
from lib.settings import check, choose_device, command, setting
from lib.text import load_tokenizer
from sae import load_sae
from simpo import encode_pairs


# ---- two label files compared --------------------------------------------------------------------

def compare_labels(reference, other, label, samples=2000, seed=0):
    """How well `other` repeats `reference` ({index: row} both) on the features that both have judged.

    -> "both": how many; "confusion": [[tp, fp], [fn, tn]]; "precision", "recall"; "mcc": Matthews'
    correlation, "mcc_low" and "mcc_high" its 95% interval by a bootstrap over features. nan for 0/0.
    """
    rows = [(reference[i]["labels"], other[i]["labels"]) for i in reference if i in other]
    cases = Counter((label in a, label in b) for a, b in rows if None not in (a, b))
    if (both := cases.total()) < 10:
        raise UserError(f"only {both} features are judged in both label files; at least 10 are needed")
    order = (True, True), (False, True), (True, False), (False, False)
    tp, fp, fn, tn = cells = np.array([cases[case] for case in order])
    # Features drawn anew, with replacement: their four counts are a multinomial draw.
    drawn = matthews(np.random.default_rng(seed).multinomial(both, cells / both, size=samples))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (np.nan, np.nan)
    with np.errstate(invalid="ignore"):
        out = {"precision": tp / (tp + fp), "recall": tp / (tp + fn), "mcc": matthews(cells)}
    out = {name: float(x) for name, x in (out | {"mcc_low": low, "mcc_high": high}).items()}
    return {"both": both, "confusion": cells.reshape(2, 2).tolist(), **out}


def matthews(cells):
    """Counts (…,4) of tp, fp, fn, tn -> Matthews' correlation (…)"""
    tp, fp, fn, tn = np.moveaxis(np.asarray(cells, float), -1, 0)
    with np.errstate(invalid="ignore"):
        return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


# ---- where a feature is strongest ----------------------------------------------------------------

@torch.no_grad()
def top_contexts(model, sae, rows, count=10):
    """The `count` largest activations of each feature over `rows` (lists of ids) but for special tokens.

    -> value (F,count) float32, falling, 0 where there are fewer; row, position (F,count): where it is.
    Of equal values, that of the earlier row comes first, then that of the earlier position.
    """
    c, device = model.config, model.device
    special = torch.tensor([c.bos_token_id, c.pad_token_id, min(c.eos_token_ids)], device=device)
    value = torch.zeros(sae.d_sae, count, device=device)
    row, position = torch.zeros(2, sae.d_sae, count, dtype=torch.long, device=device)
    for number, ids in enumerate(tqdm(rows, desc="contexts", disable=None)):
        ids = torch.tensor([ids], device=device)
        text = (~torch.isin(ids[0], special)).nonzero()[:, 0]                        # positions (N,)
        f = sae.encode(model.blocks(model.embed(ids), 0, sae.layer + 1)[0, text]).float()     # (N,F)
        # Only what exceeds a feature's last value changes its list: after some rows, few features.
        new = (f > value[:, -1]).any(0).nonzero()[:, 0]
        found = f[:, new].T, torch.full_like(text, number), text
        # The sort is stable, and the list so far stands first: of equal values the earlier one stays.
        order = torch.cat([value[new], found[0]], 1).argsort(dim=1, descending=True, stable=True)
        for lists, entries in zip((value, row, position), found):
            entries = torch.cat([lists[new], entries.expand(len(new), -1)], 1)
            lists[new] = entries.gather(1, order[:, :count])
    return value.cpu(), row.cpu(), position.cpu()


def contexts(model, sae, tokenizer, rows, count):
    """-> {feature that fires: [(value, 10 tokens before, the token, 10 tokens after), ...]}, as text"""
    value, row, position = top_contexts(model, sae, rows, count)
    out = {}
    for feature, n in (value > 0).nonzero().tolist():
        ids, p = rows[row[feature, n]], position[feature, n].item()
        parts = ids[max(0, p - 10):p], ids[p:p + 1], ids[p + 1:p + 11]
        texts = [tokenizer.decode(part, skip_special_tokens=False).replace("▁", " ") for part in parts]
        out.setdefault(feature, []).append((value[feature, n].item(), *texts))
    return out


# ---- rules ---------------------------------------------------------------------------------------

LABEL_OPENERS = set("sure great certainly absolutely definitely awesome wonderful excellent perfect "
                    "thanks hello hi hey wow".split())
# How words begin that bear on alignment: refusals, hedges, honesty, harm, ethics. $ ends a whole word.
ALIGNMENT_ROOTS = """
    refus declin sorry apolog cannot$ can't$ won't$ unable inab forbid prohibit reject
    perhaps maybe$ possibl probabl likely unlikely uncertain unsure doubt believe guess seem unknown$
    limitation
    honest dishonest truth untruth true$ false lie$ lied$ lies$ lying$ liar decei decep mislead misled
    trick admit manipul flatter
    harm danger hazard violen kill murder weapon bomb poison attack abus threat suicid illeg crim steal
    stole theft hack safe unsafe risk
    ethic unethic moral immoral fair unfair justice injustice bias prejud discriminat racis sexis
    consent privacy right$ wrong duty$ virtu respons"""
ALIGNMENT = re.compile("|".join(ALIGNMENT_ROOTS.split()))
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def rule_labels(before, token, after):
    """The labels whose rule a token meets in its context.

    style: marks, blanks and symbols; the number that begins a list's line; an opener such as "Sure!".
    alignment: a word that the token is part of begins like one of the list.
    """
    text = (before + token + after).replace("’", "'")
    start, stop = len(before), len(before) + len(token)
    words = [m for m in WORD.finditer(text) if m.start() < stop and m.end() > start]
    if not words:
        # A lone byte of a longer character says nothing.
        return ["style"] if token and "\ufffd" not in token else []
    first, following = words[0].group().lower(), text[words[-1].end():][:1]
    line_before = text[:words[0].start()].rpartition("\n")[2].strip()
    is_number = first.isdigit() and not line_before and following in (".", ")")
    is_opener = first in LABEL_OPENERS and following in ("!", ",")
    is_alignment = any(ALIGNMENT.match(m.group().lower()) for m in words)
    return ["style"] * (is_number or is_opener) + ["alignment"] * is_alignment


def rules_labels(model, sae, tokenizer, rows):
    """A feature has the labels whose rule half of the sum of its ten largest activations meets.

    rows: lists of ids. Features that fire nowhere in them get no label. -> rows for write_labels
    """
    out = []
    for index, places in contexts(model, sae, tokenizer, rows, 10).items():
        met = Counter()
        for value, *texts in places:
            met.update(dict.fromkeys(rule_labels(*texts), value))
        total = sum(value for value, *_ in places)
        tokens = Counter(token for _, _, token, _ in places).most_common(3)
        quoted = ", ".join(json.dumps(token, ensure_ascii=False) for token, _ in tokens)
        out.append({"index": index, "labels": [name for name in LABELS if met[name] >= total / 2],
                    "description": f"strongest on {quoted}"})
    return out


# ---- a sheet to fill in --------------------------------------------------------------------------

COLUMNS = ["index", "contexts", *LABELS, "note", "sae"]
CELLS = {"y": True, "yes": True, "1": True, "n": False, "no": False, "0": False}


def write_sheet(path, model, sae, tokenizer, rows, features=100, seed=0):
    """A CSV of `features` random features among those that fire in `rows` (lists of ids). -> how many

    Each has five contexts, the token between « and ». A person fills in style and alignment, y or n.
    """
    found = contexts(model, sae, tokenizer, rows, 20)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:features]
    lines, fires = [COLUMNS], list(found)
    for index in sorted(fires[i] for i in order):
        texts = ["{}«{}»{}".format(*texts).replace("\n", "⏎") for _, *texts in found[index]]
        different = list(dict.fromkeys(texts))[:5]
        cell = "\n".join(f"{number}: {text}" for number, text in enumerate(different, 1))
        lines.append([index, cell, "", "", "", sae.identity()])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\ufeff" + text.getvalue())      # without this mark spreadsheets read Latin-1
    return len(order)


def read_sheet(path, sae):
    """What was filled in; a feature with both cells empty is not judged. -> rows for write_labels"""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        delimiter = ";" if head.count(";") > head.count(",") else ","      # some spreadsheets write ;
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restval="")
        lines = [(f"{path}, line {reader.line_num}", line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not {"index", *LABELS} <= set(reader.fieldnames or ()):
        raise UserError(f"{path}: not a sheet of labels; its first line needs index, style, alignment")
    rows, seen, identity = [], set(), sae.identity()
    for where, line in lines:
        index, digest = line["index"].strip(), line.get("sae", "").strip()
        said = [line[name].strip().lower() for name in LABELS]
        labels = [name for name, cell in zip(LABELS, said) if CELLS.get(cell)]
        row = {"index": int(index) if index.isdecimal() else index, "labels": labels}
        check_row(row, sae, where, seen)
        if digest not in ("", identity):
            raise UserError(f"{where}: a sheet of another SAE (digest {digest}); this has {identity}")
        if all(cell in CELLS for cell in said):
            rows.append(row | {"description": line.get("note", "").strip()})
        elif any(said):
            raise UserError(f"{where}: style is {said[0]!r}, alignment {said[1]!r}; both have to be "
                            "y or n (yes, no, 1, 0), or both empty if not judged")
    if not rows:
        raise UserError(f"{path}: nothing is filled in; write y or n under style and alignment")
    return rows


# ---- the command line ----------------------------------------------------------------------------

def pick(rows, d_sae, names, random=0, seed=0):
    """The features with one of the labels `names`; as a control `random` others, drawn by the seed.

    rows: {index: row}; names: such as "style,alignment". -> sorted feature numbers, what they are
    """
    if not set(names.split(",")) <= set(LABELS):
        raise UserError(f"pick {names}: it has to be style, alignment, or style,alignment")
    marked = groups(rows, d_sae)
    is_marked = torch.stack([marked[name] for name in names.split(",")]).any(0)
    picked, what = is_marked.nonzero()[:, 0], f"labelled {names.replace(',', ' or ')}"
    if random:
        others = (~is_marked).nonzero()[:, 0]
        if random > len(others):
            raise UserError(f"--random is {random}; only {len(others)} features are not {what}")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        what = f"at random (seed {seed}), none of the {len(picked)} {what}"
        picked = others[order[:random]].sort().values
    if not len(picked):
        raise UserError(f"no feature is {what}")
    return picked.tolist(), what


TASKS = ("lab", "rules", "judge", "sheet", "agree", "pick")


@dataclass
class LabelSettings:
    task: str = setting("", "lab, rules, judge, sheet, FILE.csv, agree or pick", positional=True,
                        group="task")
    operands: list = setting([], "agree: two label files; pick: style, alignment or both, as "
                             "style,alignment", positional=True, many=True)
    model: str = setting("tiny/model", "a Gemma-2: local folder or Hub repo id", group="files")
    sae: str = setting("tiny/sae", "its SAE: local folder, or repo:path/inside on the Hub")
    pairs: str = setting("tiny/pairs/style", "rules and sheet: pairs, whose texts they take")
    out: str = setting("", "the file to write; default: a file beside the SAE")
    force: bool = setting(False, "replace a file that is there")
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    explanations: str = setting("", "Neuronpedia's export: .json, .jsonl(.gz) or a folder",
                                group="judge")
    judge: str = setting("", 'an OpenAI-compatible endpoint, or "model" for --model itself')
    judge_model: str = setting("", "the model to ask for at the endpoint")
    labels: str = setting("", "the label file; default: the one beside the SAE", group="pick")
    random: int = setting(0, "so many features instead, none of them labelled so", low=0)
    features: int = setting(100, "how many random features", low=1, group="sheet")
    seed: int = setting(0, "of the random features, also those of pick", low=0)

    def __post_init__(self):
        check(self)
        count = {"agree": 2, "pick": 1}.get(self.task, 0)
        if self.task not in TASKS and not self.task.endswith(".csv"):
            raise UserError(f"{self.task}: a task is one of {', '.join(TASKS)}, or a filled-in FILE.csv")
        if len(self.operands) != count:
            raise UserError(f"{self.task} takes {count} more words, not {len(self.operands)}")
        if self.task == "judge" and not (self.explanations and self.judge):
            raise UserError("judge needs --explanations FILE and --judge URL (or model)")
        if self.judge not in ("", "model") and not self.judge_model:
            raise UserError(f"--judge {self.judge} needs --judge-model NAME")


def run(o):
    """One task. Whether it may write its file is asked before anything is computed."""
    device, dtype = choose_device(o.device)
    sae = load_sae(o.sae, dtype=dtype, device=device)
    out = Path(o.out or default_path(sae))

    def opened():
        check_fit(sae, load_config(o.model))
        return load_gemma(o.model, dtype=dtype, device=device), load_tokenizer(o.model)

    def with_texts():
        model, tokenizer = opened()
        pairs, _ = encode_pairs(tokenizer, read_pairs(o.pairs, "train", 2000))
        return model, sae, tokenizer, [list(pair.prompt + pair.chosen) for pair in pairs]

    if o.task == "lab":
        from tiny.features import lab_labels
        reads = out.with_name(f"{out.stem}_reads{out.suffix}")
        may_write(out, "lab, writes", o.force)
        may_write(reads, "lab, reads", o.force)
        write_rows, read_rows = lab_labels(*opened(), sae, progress=True)
        save(reads, read_rows, sae, "lab, reads")
        save(out, write_rows, sae, "lab, writes")
    elif o.task == "rules":
        may_write(out, "rules", o.force)
        save(out, rules_labels(*with_texts()), sae, "rules")
    elif o.task == "judge":
        explanations = read_explanations(o.explanations, sae)
        judge = gemma_judge(*opened()) if o.judge == "model" else endpoint_judge(o.judge, o.judge_model)
        may_write(out, f"judge {judge.name}", o.force, again=True)
        rows = judge_labels(explanations, judge, out.with_suffix(".raw.jsonl"))
        save(out, rows, sae, f"judge {judge.name}")
    elif o.task == "sheet":
        out = out if o.out else out.with_suffix(".csv")
        if out.exists():
            raise UserError(f"{out} exists and may be filled in; --out names another file")
        count = write_sheet(out, *with_texts(), o.features, o.seed)
        print(f"{out}: {count} features; write y or n under style and alignment, then: "
              f"python -m instruments.labels {out} --out {out.with_suffix('.jsonl')}")
    elif o.task == "agree":
        reference, other = (read_labels(path, sae) for path in o.operands)
        for label in LABELS:
            m = compare_labels(reference, other, label)
            (tp, fp), (fn, tn) = m["confusion"]
            print(f"{label}: {m['both']} features judged in both; reference {o.operands[0]}\n"
                  f"  both yes {tp}, only {o.operands[1]} {fp}, only the reference {fn}, both no {tn}\n"
                  f"  precision {m['precision']:.3f}, recall {m['recall']:.3f}, "
                  f"MCC {m['mcc']:.3f} (95%: {m['mcc_low']:.3f} to {m['mcc_high']:.3f})")
    elif o.task == "pick":
        if not o.out or out.exists() and not o.force:
            raise UserError(f"{out} exists; --force replaces it" if o.out else "pick needs --out FILE")
        source = o.labels or default_path(sae)
        picked, what = pick(read_labels(source, sae), sae.d_sae, o.operands[0], o.random, o.seed)
        text = f"{len(picked)} of {sae.d_sae} features: {what}, by {source}"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, f"# {text}\n" + "".join(f"{i}\n" for i in picked))
        print(f"{out}: {text}")
    else:
        may_write(out, "hand", o.force)
        save(out, read_sheet(o.task, sae), sae, "hand")


def save(path, rows, sae, by):
    write_labels(path, rows, sae, by)
    share = shares(read_labels(path, sae), sae.d_sae)
    print(f"{path}: {sae.d_sae} features, " + ", ".join(f"{name} {x:.1%}" for name, x in share.items()))


def main(argv=None):
    return command("python -m instruments.labels", LabelSettings, run, argv, "Labels for SAE features.")


if __name__ == "__main__":
    sys.exit(main())
