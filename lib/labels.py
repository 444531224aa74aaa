"""Which features of an SAE are about style and which about alignment: the file labels.jsonl.

A label belongs to a feature of one SAE, not to a run; the file lies beside the SAE. One feature a line:

    {"index": 17, "labels": ["style"], "description": "opens with Sure!", "by": "rules", "sae": "0123…"}

    labels   ["style"], ["alignment"], both, [] (judged: neither), or null (asked, no usable answer)
    by       who said so
    sae      identity() of the SAE, so that no other SAE's labels are read by mistake

Other keys are kept. A feature without a line is unlabelled, like one with null: that is not "neither".
`python -m instruments.labels` makes such files. `sae` is anything with identity(), d_sae and source.
"""
import json
from pathlib import Path

import torch

from lib.files import ROOT, UserError, json_lines, text_lines, write_text

LABELS = ("style", "alignment")
ALLOWED = ([], ["style"], ["alignment"], ["style", "alignment"], ["alignment", "style"], None)


def write_labels(path, rows, sae, by):
    """rows: dicts with index, labels, description, other keys. The file is there whole or not at all."""
    lines = []
    for row in sorted(rows, key=lambda row: row["index"]):
        line = {key: row.get(key, "") for key in ("index", "labels", "description")}
        line |= {"by": by, "sae": sae.identity()}      # these keys come first, and win
        lines.append(json.dumps({**line, **row, **line}, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"{path}: there is no label to write")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))


def read_labels(path, sae):
    """-> {index: row}. Raises UserError, with file and line, for what is no label of this SAE."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such label file; python -m instruments.labels makes one")
    rows, identity = {}, sae.identity()
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a label is an object with index, labels, description, by and sae")
        index, labels = row.get("index"), row.get("labels", "missing")
        if type(index) is not int or not 0 <= index < sae.d_sae:      # isinstance takes True for an int
            raise UserError(f"{where}: index is {index!r}; this SAE has features 0 to {sae.d_sae - 1}")
        if index in rows:
            raise UserError(f"{where}: feature {index} is there twice; keep one of the two")
        if labels not in ALLOWED:
            raise UserError(f"{where}: labels is {labels!r}; a list of style and alignment, or null")
        if row.get("sae") != identity:
            raise UserError(f"{where}: labels of another SAE (digest {row.get('sae')}); "
                            f"{sae.source} has {identity}")
        rows[index] = row
    if not rows:
        raise UserError(f"{path}: there is no label in it")
    return rows


def groups(rows, d_sae):
    """{index: row} -> {"style", "alignment", "known"}: bool (F,) each; known: judged, be it neither."""
    out = {name: torch.zeros(d_sae, dtype=torch.bool) for name in (*LABELS, "known")}
    for index, row in rows.items():
        if row["labels"] is not None:
            for name in (*row["labels"], "known"):
                out[name][index] = True
    return out


def shares(rows, d_sae):
    """{index: row} -> shares of all F features: style + alignment - both + neither + unlabelled = 1."""
    style, alignment, known = groups(rows, d_sae).values()
    parts = {"style": style, "alignment": alignment, "both": style & alignment}
    parts |= {"neither": known & ~style & ~alignment, "unlabelled": ~known}
    return {name: part.double().mean().item() for name, part in parts.items()}


def sae_folder(sae):
    """The folder with the weights of a local SAE, where load_sae finds it; None for one of the Hub."""
    given = Path(sae.source).expanduser()
    for folder in (given, ROOT / given) if sae.source else ():
        weights = [*folder.rglob("params.npz"), *folder.rglob("cfg.json")]
        if weights:
            return min(weights, key=lambda file: len(file.parts)).parent
    return None


def default_path(sae):
    """labels.jsonl beside a local SAE; runs/labels/REPO/INSIDE.jsonl, / become __, for the Hub's."""
    if folder := sae_folder(sae):
        return folder / "labels.jsonl"
    repo, _, inside = sae.source.replace("/", "__").partition(":")
    return Path("runs") / "labels" / (repo or "sae") / f"{inside.strip('_') or 'labels'}.jsonl"


def masked_features(mask):
    """--mask -> feature numbers: 3,17,900, or those in a file, where # begins a comment."""
    given = [("--mask", mask)] if set(mask) <= set("0123456789, ") else text_lines(mask)
    found = set()
    for where, line in given:
        for word in line.partition("#")[0].replace(",", " ").split():
            if not word.isdecimal():
                raise UserError(f"{where}: {word!r} is not the number of a feature")
            found.add(int(word))
    if mask and not found:
        raise UserError(f"--mask {mask}: there is no feature number in it")
    return sorted(found)
