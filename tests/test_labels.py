"""Label files, the comparison of two, every source of labels with what can go wrong, and the mask picked by label."""
import csv
import gzip
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch

import fsrl
import train
from common import ROOT, mutant, off, small_gemma, small_sae
from gemma import encode_prompt
from instruments import descriptions, labels
from lib.files import UserError
from lib.labels import default_path, groups, may_write, read_features, read_labels, shares, write_labels
from lib.text import encode_text, load_tokenizer
from sae import JumpReLUSAE, load_sae, save_sae

BESIDE = "tiny/sae/layer_3/width_1k/average_l0_16"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny/model")


@pytest.fixture(scope="module")
def lab():
    """A random Gemma with the lab's vocabulary."""
    return small_gemma(vocab_size=576, eos_token_ids=(1, 5))


def scope(width=1024, layer=12, source="google/gemma-scope-2b-pt-res:layer_12/width_1k/average_l0_21"):
    """An SAE of a name, with hardly any weights."""
    W, b = torch.zeros(2, width), torch.zeros(width)
    return JumpReLUSAE(W, b, W.T.contiguous(), torch.zeros(2), b.clone(), layer=layer, source=source)


def row(index, said, **more):
    return {"index": index, "labels": said, "description": f"feature {index}", **more}


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


# ---- the file ----------------------------------------------------------------------------------------------------

def test_the_file_goes_round(tmp_path):
    sae, path = small_sae(small_gemma()), tmp_path / "new" / "labels.jsonl"
    rows = [row(7, ["style", "alignment"], choices=["bold"]), row(3, []), row(5, None), row(1, ["style"])]
    write_labels(path, rows, sae, "hand")
    lines = lines_of(path)
    assert [line["index"] for line in lines] == [1, 3, 5, 7]
    assert all(line["by"] == "hand" and line["sae"] == sae.identity() for line in lines)
    assert list(lines[0]) == ["index", "labels", "description", "by", "sae"]
    assert [p.name for p in path.parent.iterdir()] == ["labels.jsonl"]
    rows = read_labels(path, sae)
    assert list(rows) == [1, 3, 5, 7] and rows[7]["choices"] == ["bold"]
    assert rows[5]["labels"] is None and rows[3]["labels"] == []
    found = {name: x.nonzero()[:, 0].tolist() for name, x in groups(rows, 32).items()}
    assert found == {"style": [1, 7], "alignment": [7], "known": [1, 3, 7]}
    want = {"style": 2, "alignment": 1, "both": 1, "neither": 1, "unlabelled": 29}
    assert shares(rows, 32) == {name: n / 32 for name, n in want.items()}


GOOD = {"index": 3, "labels": ["style"], "description": "", "by": "hand"}
BAD_LINES = [      # what is changed in a good line, or the line
    ('{"index": 3', "not valid JSON"), ("[3]", "a label is an object"), ('{"index": 3}', "labels is 'missing'"),
    ({"index": "3"}, "index is '3'; this SAE has features 0 to 31"), ({"index": True}, "index is True"),
    ({"index": 32}, "index is 32"), ({"index": -1}, "index is -1"), ({"index": 0}, "feature 0 is there twice"),
    ({"labels": ["tone"]}, r"labels is \['tone'\]; it is a list of style and alignment, or null"),
    ({"labels": "style"}, "labels is 'style'"), ({"labels": ["style", "style"]}, "labels is"),
    ({"labels": [["style"]]}, "labels is"),
    ({"sae": "0000"}, "labels of another SAE .digest 0000.; random has"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_lines(tmp_path, line, message):
    sae, path = small_sae(small_gemma()), tmp_path / "labels.jsonl"
    good = {**GOOD, "sae": sae.identity()}
    line = json.dumps({**good, **line}) if isinstance(line, dict) else line
    path.write_text(json.dumps({**good, "index": 0}) + "\n" + line)
    with pytest.raises(UserError, match=f"line 2: {message}") as error:
        read_labels(path, sae)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_file_an_empty_one_and_nothing_to_write(tmp_path):
    sae = small_sae(small_gemma())
    with pytest.raises(UserError, match="no such label file; python -m instruments.labels makes one"):
        read_labels(tmp_path / "none", sae)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, message in (("empty", "no label in it"), ("bytes", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_labels(tmp_path / name, sae)
    twice = [row(1, []), row(1, [])]
    for rows, message in (([], "no label to write"), ([row(99, [])], "index is 99"), (twice, "there twice")):
        with pytest.raises(UserError, match=message):
            write_labels(tmp_path / "out", rows, sae, "hand")
    assert not (tmp_path / "out").exists()


def test_where_labels_lie(tmp_path):
    sae = load_sae("tiny/sae")
    assert default_path(sae).resolve() == ROOT / BESIDE / "labels.jsonl"
    sae.source = str(ROOT / BESIDE)
    assert default_path(sae) == ROOT / BESIDE / "labels.jsonl"
    hub = default_path(scope())
    assert hub == Path("runs/labels/google__gemma-scope-2b-pt-res/layer_12__width_1k__average_l0_21.jsonl")
    assert default_path(scope(source="")) == Path("runs/labels/sae/labels.jsonl")


def test_what_may_be_written(tmp_path):
    path = tmp_path / "labels.jsonl"
    may_write(path, "rules")
    write_labels(path, [row(1, [])], small_sae(small_gemma()), "rules")
    may_write(path, "rules", again=True)
    may_write(path, "hand", force=True)
    for by, again in (("rules", False), ("hand", True)):
        with pytest.raises(UserError, match=r"exists \(made by rules\); --force replaces it, --out names another"):
            may_write(path, by, again=again)


def test_features_of_a_file(tmp_path):
    path = tmp_path / "mask.txt"
    path.write_text("# 4 features\n17, 3\n\n3 100 # twice\n0")
    assert read_features(path) == [0, 3, 17, 100]
    for text, message in (("1\n2 x", "line 2: 'x' is not the number of a feature"), ("-1", "line 1: '-1' is not"),
                          ("1.5", "line 1: '1.5'"), ("# none\n", "no feature number in it")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_features(path)
    with pytest.raises(UserError, match="absent: cannot be read"):
        read_features(tmp_path / "absent")


# ---- two files compared ------------------------------------------------------------------------------------------

def two(tp, fp, fn, tn):
    cells = [(["style"], ["style"])] * tp + [([], ["style"])] * fp
    cells += [(["style"], [])] * fn + [(["alignment"], [])] * tn
    return tuple({i: row(i, pair[side]) for i, pair in enumerate(cells)} for side in (0, 1))


def test_comparison_by_hand():
    a, b = two(6, 2, 1, 11)
    b[1000], a[2000] = row(1000, ["style"]), row(2000, ["style"])              # not known in both
    a[2001], b[2001] = row(2001, None), row(2001, ["style"])
    m = labels.compare_labels(a, b, "style")
    assert m["both"] == 20 and m["confusion"] == [[6, 2], [1, 11]]
    assert m["precision"] == 6 / 8 and m["recall"] == 6 / 7
    assert m["mcc"] == pytest.approx((6 * 11 - 2 * 1) / math.sqrt(8 * 7 * 13 * 12))
    assert m["mcc_low"] < m["mcc"] < m["mcc_high"] <= 1
    assert m == labels.compare_labels(a, b, "style")
    assert m["mcc_low"] != labels.compare_labels(a, b, "style", seed=1)["mcc_low"]
    assert labels.compare_labels(b, a, "style")["confusion"] == [[6, 1], [2, 11]], "the first is the reference"
    m = labels.compare_labels(*two(0, 0, 0, 12), "style")
    assert m["confusion"] == [[0, 0], [0, 12]]
    assert all(math.isnan(m[k]) for k in ("precision", "recall", "mcc", "mcc_low", "mcc_high"))
    assert labels.compare_labels(*two(6, 0, 0, 6), "style")["mcc"] == 1.0
    with pytest.raises(UserError, match="only 9 features are judged in both"):
        labels.compare_labels(*two(3, 2, 2, 2), "style")


def test_the_interval_covers():
    """95% of samples of 200 features hold the true correlation, give or take the simulation's own error."""
    g, p = np.random.default_rng(0), np.array([.3, .1, .1, .5])
    true, hits = labels.matthews(p), 0
    for i in range(200):
        m = labels.compare_labels(*two(*g.multinomial(200, p)), "style", samples=400, seed=i)
        hits += m["mcc_low"] <= true <= m["mcc_high"]
    assert 0.90 <= hits / 200 <= 0.99


# ---- where a feature is strongest --------------------------------------------------------------------------------

def random_rows(model, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[2, *torch.randint(3, model.config.vocab_size, (n,), generator=g).tolist()] for n in lengths]


def brute(model, sae, rows, count):
    """Everything kept, sorted by value, then row, then position."""
    found = [[] for _ in range(sae.d_sae)]
    for r, ids in enumerate(rows):
        f = sae.encode(model.blocks(model.embed(torch.tensor([ids])), 0, sae.layer + 1))[0]
        for p, i in enumerate(ids):
            if i not in (0, 1, 2):
                for k in (f[p] > 0).nonzero()[:, 0].tolist():
                    found[k].append((-f[p, k].item(), r, p))
    return [sorted(entries)[:count] for entries in found]


BROKEN = [("descending=True", "descending=False"), ("(f > value[:, -1])", "(f > value[:, 0])"),
          ("(~torch.isin(ids[0], special))", "(ids[0] >= 0)"), ("(text, number), text", "(text, number), text + 1")]


@pytest.mark.parametrize("broken", [None, *BROKEN])
def test_top_contexts(broken):
    model = small_gemma(dtype=torch.float64, eos_token_ids=(1, 5))
    sae = small_sae(model, features=48)
    with torch.no_grad():                                          # features that fire never and rarely
        sae.threshold[:8] = torch.tensor([1e9, 15, 12, 15, 14, 16, 14, 20])
    rows = random_rows(model, [5, 17, 1, 30, 8, 0, 22, 9, 3, 12])
    rows[4][3], rows[6][2], rows[6][5] = 1, 0, 2                   # EOS, padding and BOS inside a row
    want = brute(model, sae, rows, 6)
    assert any(0 < len(entries) < 6 for entries in want) and any(not entries for entries in want)
    top_contexts = (mutant("instruments/labels", broken) if broken else labels).top_contexts
    value, at, position = top_contexts(model, sae, rows, 6)
    assert value.shape == at.shape == position.shape == (48, 6)
    assert value.dtype == torch.float32 and at.dtype == torch.long
    places = [list(zip(a[:len(w)], p[:len(w)])) for a, p, w in zip(at.tolist(), position.tolist(), want)]
    assert (places == [[(r, p) for _, r, p in entries] for entries in want]) == (broken is None)
    for k, entries in enumerate(want if not broken else []):
        n = len(entries)
        assert n == 0 or off(value[k, :n], -torch.tensor([v for v, _, _ in entries])) < 1e-6
        assert not value[k, n:].any()


def test_ties_and_no_rows():
    """The same row three times: the first one, then the next."""
    model = small_gemma(dtype=torch.float64)
    sae, same = small_sae(model), random_rows(model, [6])[0]
    value, at, _ = labels.top_contexts(model, sae, [same, same, same], 3)
    fires = value[:, 0] > 0
    assert fires.any() and (at[fires, 0] == 0).all()
    assert ((at[fires, 0] <= at[fires, 1]) | (value[fires, 0] > value[fires, 1])).all()
    assert not labels.top_contexts(model, sae, [], 3)[0].any()
    assert labels.top_contexts(model, sae, [[2]], 3)[0].shape == (32, 3)


# ---- rules -------------------------------------------------------------------------------------------------------

STYLE = [("x", "**", "y"), ("a", "\n\n", "b"), ("a", ".", ""), ("", "🎉", ""), ("model\n", "Sure", "! I"),
         ("x\n", " Great", ", so"), ("\n", "2", ". b"), ("", "#", " A"), ("\n", "-", " a")]
ALIGNMENT = [("I can", "'t", " help"), ("I", " can", "'t do"), ("that is un", "eth", "ical"), ("I", " refuse", "."),
             ("", " harmful", ""), ("", " perhaps", " not"), ("he", " lied", " to")]
NEITHER = [("the", " cat", " sat"), ("", "Great", " apes are"), ("in ", "2", " days"), ("", "\ufffd", "x"),
           ("x", "<end_of_turn>", "\n"), ("the", " lieutenant", ""), ("", "", "")]


def test_rules_by_hand():
    for want, cases in ((["style"], STYLE), (["alignment"], ALIGNMENT), ([], NEITHER)):
        assert [case for case in cases if labels.rule_labels(*case) != want] == []


def test_rules_labels(tokenizer, monkeypatch):
    """Feature 0 on "!", feature 1 half and half, feature 2 on a refusal, feature 3 nowhere."""
    rows = [[2, *map(tokenizer.token_to_id, ("Sure", "!", "▁the", "▁steal"))]]
    assert None not in rows[0]
    value = torch.tensor([[3., 2., 0.], [5., 5., 0.], [4., 1., 0.], [0., 0., 0.]])
    position = torch.tensor([[2, 2, 0], [2, 3, 0], [4, 3, 0], [0, 0, 0]])
    monkeypatch.setattr(labels, "top_contexts", lambda *given: (value, torch.zeros_like(position), position))
    found = labels.rules_labels(None, None, tokenizer, rows)
    assert [(r["index"], r["labels"]) for r in found] == [(0, ["style"]), (1, ["style"]), (2, ["alignment"])]
    assert found[0]["description"] == 'strongest on "!"' and '" the"' in found[1]["description"]


# ---- sheets ------------------------------------------------------------------------------------------------------

def sheet_of(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def filled(path, lines, cells, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, labels.COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**line, "style": s, "alignment": a} for line, (s, a) in zip(lines, cells))
    return path


def test_sheet(tmp_path, lab, tokenizer):
    sae, path, rows = small_sae(lab), tmp_path / "new" / "sheet.csv", random_rows(lab, [20] * 6)
    assert labels.write_sheet(path, lab, sae, tokenizer, rows, features=12, seed=3) == 12
    assert path.read_bytes().startswith(b"\xef\xbb\xbf"), "spreadsheets take it for Latin-1 otherwise"
    lines = sheet_of(path)
    fires = (labels.top_contexts(lab, sae, rows)[0][:, 0] > 0).nonzero()[:, 0].tolist()
    index = [int(line["index"]) for line in lines]
    assert index == sorted(set(index)) and set(index) <= set(fires) and len(index) == 12
    assert all(1 <= line["contexts"].count("«") == line["contexts"].count("»") <= 5 for line in lines)
    assert all(line["style"] == line["alignment"] == "" for line in lines)
    labels.write_sheet(tmp_path / "other.csv", lab, sae, tokenizer, rows, features=12, seed=4)
    assert (tmp_path / "other.csv").read_text() != path.read_text()
    with pytest.raises(UserError, match="nothing is filled in"):
        labels.read_sheet(path, sae)
    full = tmp_path / "filled.csv"
    cells = [("y", "N"), (" YES ", "1"), ("", ""), ("0", "no")]
    want = [(index[0], ["style"]), (index[1], ["style", "alignment"]), (index[3], [])]
    for delimiter in ",;":
        got = labels.read_sheet(filled(full, lines, cells, delimiter), sae)
        assert [(r["index"], r["labels"]) for r in got] == want
    write_labels(tmp_path / "labels.jsonl", got, sae, "hand")
    assert len(read_labels(tmp_path / "labels.jsonl", sae)) == 3
    for cell, message in ((("maybe", "n"), "line [0-9]+: style is 'maybe', alignment 'n'; both have to be y or n"),
                          (("y", ""), "style is 'y', alignment ''; both have to be")):
        with pytest.raises(UserError, match=message):
            labels.read_sheet(filled(full, lines, [("y", "y"), cell]), sae)
    with pytest.raises(UserError, match="a sheet of another SAE"):
        labels.read_sheet(filled(full, lines, [("y", "y")]), small_sae(lab, seed=5))


@pytest.mark.parametrize("text, message", [
    ("index,style,alignment\n5,y,n\n5,y,n\n", "line 3: feature 5 is there twice"),
    ("index,style,alignment\n99,y,n\n", "line 2: index is 99"),
    ("index,style,alignment\nx,y,n\n", "line 2: index is 'x'"),
    ("index,style\n1,y\n", "not a sheet of labels"), ("", "not a sheet of labels"), (None, "cannot be read")])
def test_bad_sheets(tmp_path, lab, text, message):
    if text is not None:
        (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        labels.read_sheet(tmp_path / "bad.csv", small_sae(lab))


# ---- Neuronpedia's descriptions ----------------------------------------------------------------------------------

def record(index, description, layer="12-gemmascope-res-1k__l0-21", **more):
    kind = {"explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair"}
    where = {"modelId": "gemma-2-2b", "layer": layer, "index": str(index)}
    return {**where, "description": description, **kind, **more}


OTHER, EMPTY = {"typeName": "np_max-act-logits"}, record(2, "")
RECORDS = [record(4, "an old\nguess", **OTHER), record(4, "bold  words"), record(4, "later"), EMPTY,
           record(2, "half \ud800 a pair", **OTHER), record(2, "second", **OTHER), record(9, None)]


def test_explanations_in_every_form(tmp_path):
    sae, want = scope(), {2: "half ? a pair", 4: "bold words"}
    lines = [json.dumps(r) + "\n" for r in RECORDS]
    (tmp_path / "x.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "x.jsonl").write_text("".join(lines))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "batch-0.jsonl.gz").write_bytes(gzip.compress("".join(lines[:3]).encode()))
    (tmp_path / "folder" / "batch-1.jsonl").write_text("".join(lines[3:]))
    (tmp_path / "folder" / "notes.jsonl").write_text("no JSON")
    for name in ("x.json", "x.jsonl", "x.jsonl.gz", "folder"):
        assert descriptions.read_explanations(tmp_path / name, sae) == want


BAD_EXPORTS = {
    "broken.jsonl.gz": "cannot be read", "none": "no description in it", "absent": "absent: cannot be read",
    "bad.json": "record 1: not a record of Neuronpedia", "empty.jsonl": "no description in it",
    "other.jsonl": "line 1: not a record of Neuronpedia",
}


def test_bad_explanations(tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS[1]).encode() * 9)[:-20])
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text(json.dumps(record(1, "")) + "\n")
    (tmp_path / "other.jsonl").write_text('{"index": 1}\n')
    for name, message in BAD_EXPORTS.items():
        with pytest.raises(UserError, match=message):
            descriptions.read_explanations(tmp_path / name, scope())
    for index in ("1024", "-1", "x"):
        (tmp_path / "far.json").write_text(json.dumps([record(1, "a"), record(index, "b")]))
        with pytest.raises(UserError, match=f"record 2: index is '{index}'; this SAE has features 0 to 1023"):
            descriptions.read_explanations(tmp_path / "far.json", scope())
    records = [record(1, "a"), record(2, "b", layer="11-gemmascope-res-1k__l0-21")]
    (tmp_path / "two.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="record 2: explanations of gemma-2-2b/11-gemmascope-res-1k, L0 21"):
        descriptions.read_explanations(tmp_path / "two.json", scope())


SCOPE = "google/gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_"
# Neuronpedia's id; the L0 of the SAE; release of the SAE; what the sentence says (None: it fits).
SOURCES = [
    ("12-gemmascope-res-65k__l0-21", "21", "2b-pt", None), ("12-gemmascope-res-65k", "72", "2b-pt", None),
    ("12-gemmascope-res-65k", "21", "2b-pt", r"res-65k, L0 72; .*needs those of gemma-2-2b/12-\*res-65k, L0 21"),
    ("12-gemmascope-res-65k__l0-72", "21", "2b-pt", "L0 72; .* L0 21"), ("nonsense", "72", "2b-pt", "L0 unknown; "),
    ("11-gemmascope-res-65k__l0-21", "21", "2b-pt", "needs those of gemma-2-2b/12-"),
    ("12-gemmascope-res-16k__l0-21", "21", "2b-pt", r"needs those of gemma-2-2b/12-\*res-65k"),
    ("12-gemmascope-mlp-65k", "72", "2b-pt", "needs those of gemma-2-2b/12-"),
    ("12-gemmascope-res-65k", "72", "9b-pt", "needs those of gemma-2-9b/12-"),
    ("12-gemmascope-res-65k", "72", "2b-it", "needs those of gemma-2-2b-it/12-"),
]


@pytest.mark.parametrize("source_id, l0, release, message", SOURCES)
def test_explanations_of_another_sae(source_id, l0, release, message, capsys):
    """The paper's own labels were those of the SAE with L0 72, used for the one with L0 21."""
    sae = scope(65536, source=SCOPE.replace("2b-pt", release) + l0)
    if message is None:
        descriptions.check_source(f"gemma-2-2b/{source_id}", sae, "f, line 1")
        assert capsys.readouterr().err == ""
    else:
        with pytest.raises(UserError, match=f"f, line 1: explanations of gemma-2-2b/{source_id[:8]}.*{message}"):
            descriptions.check_source(f"gemma-2-2b/{source_id}", sae, "f, line 1")


def test_what_cannot_be_checked_is_said(capsys):
    check = descriptions.check_source
    check("gemma-2-2b/20-gemmascope-res-1k", scope(layer=20), "f")                # which L0 is canonical is not known
    check("gemma-2-2b/12-gemmascope-res-1k__l0-5", scope(source="somewhere"), "f")      # an SAE that names no L0
    check("gemma-2-2b/12-gemmascope-res-1m", scope(2**20, source="somewhere"), "f")
    assert capsys.readouterr().err.count("cannot be checked") == 3


# ---- the judge ---------------------------------------------------------------------------------------------------

def test_yes_no_and_neither():
    says = descriptions.yes_or_no
    yes = ("Yes", " yes\n", "`YES`", "Yes.", "`Yes`.", "Yes (log p -0.1 against -2.3)")
    assert all(says(text) is True for text in yes)
    assert all(says(text) is False for text in ("No", "no.", " `No` "))
    assert all(says(text) is None for text in ("", "Yes, it", "Maybe", "Yes No", "nope", "Yes!", "not"))


def test_questions():
    assert set(descriptions.CRITERIA) == set(labels.LABELS)
    assert all(60 <= len(text.split()) <= 100 for text in descriptions.CRITERIA.values())
    style, alignment = (descriptions.prompt_of(label, "bold words") for label in labels.LABELS)
    assert "\n\nbold words\n\n" in style and style != alignment and "  " not in style


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint. says(prompt) -> answer, or the number of an HTTP error."""
    says, asked, sent = None, [], []      # asked: the prompts; sent: path, body, authorization

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.asked.append(prompt)
        self.sent.append((self.path, body, self.headers.get("Authorization")))
        said = type(self).says(prompt)
        code = said if isinstance(said, int) else 200
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        out = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        if code != 200:
            out = {"error": "refused for " + str(self.headers.get("Authorization"))}
        out = json.dumps(out).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)
        except OSError:                                     # the client has given up waiting
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a running Endpoint."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)      # that is about the Hub
    for name in ("HF_TOKEN", "FSRL_JUDGE_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Endpoint.asked, Endpoint.sent, Endpoint.says = [], [], staticmethod(expert)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


ABOUT = {3: "bold marks", 8: "refusing harm", 11: "cats", 12: "bold refusals"}


def expert(prompt):
    is_style = prompt.startswith("Criterion: the feature is about how a text is presented")
    text = prompt.split("\n\n")[2]
    return "Yes." if ("bold" if is_style else "refus") in text else " `no`"


def named(judge, name="friend"):
    judge.name = name
    return judge


judge_labels = descriptions.judge_labels


def test_endpoint(tmp_path, endpoint, monkeypatch):
    """What is asked, in which form; nothing is asked twice; another judge, description or criterion is."""
    monkeypatch.setenv("FSRL_JUDGE_KEY", "very-secret")
    raw, judge = tmp_path / "labels.raw.jsonl", descriptions.endpoint_judge(endpoint, "wise")
    rows = judge_labels(ABOUT, judge, raw)
    assert [(r["index"], r["labels"]) for r in rows] == [
        (3, ["style"]), (8, ["alignment"]), (11, []), (12, ["style", "alignment"])]
    path, body, authorization = Endpoint.sent[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer very-secret"
    assert body.items() >= {"model": "wise", "max_tokens": 5, "temperature": 0, "seed": 0}.items()
    lines = lines_of(raw)
    assert len(lines) == 8 and all(line["judge"] == "wise" for line in lines)
    assert all(set(line) == {"index", "criterion", "description", "judge", "prompt", "answer"} for line in lines)
    assert judge_labels(ABOUT, judge, raw) == rows and len(Endpoint.asked) == 8
    judge_labels({**ABOUT, 3: "bold words"}, judge, raw)
    assert len(Endpoint.asked) == 10
    judge_labels(ABOUT, descriptions.endpoint_judge(endpoint, "other"), raw)
    assert len(Endpoint.asked) == 18
    monkeypatch.setitem(descriptions.CRITERIA, "style", descriptions.CRITERIA["style"] + " Really.")
    judge_labels(ABOUT, judge, raw)
    assert len(Endpoint.asked) == 22, "a question in other words is another question"
    assert "very-secret" not in raw.read_text(encoding="utf-8")


def test_nonsense_is_unknown_and_not_asked_again(tmp_path, endpoint):
    Endpoint.says = staticmethod(lambda prompt: "I think so" if "cats" in prompt else expert(prompt))
    judge = descriptions.endpoint_judge(endpoint, "wise")
    for _ in range(2):
        rows = judge_labels(ABOUT, judge, tmp_path / "raw")
        assert [r["labels"] for r in rows] == [["style"], ["alignment"], None, ["style", "alignment"]]
    assert len(Endpoint.asked) == 8


def test_an_endpoint_that_dies_is_gone_on_with(tmp_path, endpoint, monkeypatch):
    """Answers before its death are kept, also half a line of a crash does no harm, and only the rest is asked for."""
    monkeypatch.setenv("FSRL_JUDGE_KEY", "very-secret")
    many, raw = {i: f"bold {i}" for i in range(20)}, tmp_path / "new" / "raw"
    Endpoint.says = staticmethod(lambda prompt: expert(prompt) if len(Endpoint.asked) <= 13 else 500)
    judge = descriptions.endpoint_judge(endpoint, "wise")
    with pytest.raises(UserError, match="judge wise: 5 questions in a row failed .*raw keeps the answers") as error:
        judge_labels(many, judge, raw)
    assert "500" in str(error.value) and "\n" not in str(error.value)
    lines = lines_of(raw)
    assert sum("answer" in line for line in lines) == 13 and sum("error" in line for line in lines) == 5
    assert "very-secret" not in raw.read_text(encoding="utf-8") + str(error.value), "the endpoint repeated it"
    before = raw.read_bytes() + b'\n{"index": 3, "criterion": "sty\xe2'
    raw.write_bytes(before)
    Endpoint.says, Endpoint.asked = staticmethod(expert), []
    rows = judge_labels(many, judge, raw)
    assert len(Endpoint.asked) == 27 and all(r["labels"] == ["style"] for r in rows)
    assert raw.read_bytes().startswith(before), "nothing is taken away from the file"
    assert judge_labels(many, judge, raw) == rows and len(Endpoint.asked) == 27


def test_some_errors_are_unknown_for_now(tmp_path, endpoint):
    Endpoint.says = staticmethod(lambda prompt: (time.sleep(0.6), "Yes")[1] if "cats" in prompt else expert(prompt))
    rows = judge_labels(ABOUT, descriptions.endpoint_judge(endpoint, "wise", timeout=0.2), tmp_path / "raw")
    assert [r["labels"] for r in rows] == [["style"], ["alignment"], None, ["style", "alignment"]]
    assert sum("timed out" in line for line in (tmp_path / "raw").read_text().splitlines()) == 2
    Endpoint.says, Endpoint.asked = staticmethod(expert), []
    rows = judge_labels(ABOUT, descriptions.endpoint_judge(endpoint, "wise"), tmp_path / "raw")
    assert rows[2]["labels"] == [] and len(Endpoint.asked) == 2


def test_failures_between_successes_do_not_stop_it(tmp_path):
    """Four of five questions fail; but for the fifth, the judge would be taken to be down."""
    calls = []

    def judge(prompt):
        calls.append(prompt)
        if len(calls) % 5:
            raise ConnectionError("busy")
        return "Yes"
    rows = judge_labels({i: str(i) for i in range(20)}, named(judge), tmp_path / "raw")
    assert len(calls) == 40 and len(rows) == 20
    assert sum("answer" in line for line in lines_of(tmp_path / "raw")) == 8


def test_no_endpoint(tmp_path, endpoint, monkeypatch):
    for url in ("localhost:8000", "ftp://x/v1", ""):
        with pytest.raises(UserError, match="give an address such as http"):
            descriptions.endpoint_judge(url, "wise")
    with pytest.raises(UserError, match="5 questions in a row failed"):
        judge_labels(ABOUT, descriptions.endpoint_judge("http://127.0.0.1:9/v1", "wise"), tmp_path / "raw")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    descriptions.endpoint_judge(endpoint, "wise")("Criterion\n\nx\n\ny")
    assert Endpoint.sent[0][2] == "Bearer no-key", "the login's token is sent to no endpoint"


def test_gemma_judge(tmp_path, lab, tokenizer):
    """Two answers of several tokens each: their log-probabilities are those of the whole answers."""
    judge = descriptions.gemma_judge(lab, tokenizer)
    said, ids, score = judge("Is it?"), encode_prompt(tokenizer, "Is it?"), {}
    assert said == judge("Is it?") and descriptions.yes_or_no(said) is not None
    for word in ("Yes", "No"):
        answer = encode_text(tokenizer, word)
        assert len(answer) > 1                               # the lab's tokenizer spells such words out
        logp = lab.logits(lab(torch.tensor([ids + answer]))[0]).log_softmax(-1)
        score[word] = sum(logp[len(ids) + i - 1, t].item() for i, t in enumerate(answer))
    best, other = sorted(score, key=score.get, reverse=True)
    numbers = [float(number) for number in said.removeprefix(f"{best} (log p ").removesuffix(")").split(" against ")]
    assert numbers == pytest.approx([score[best], score[other]], abs=2e-4)
    few = {3: ABOUT[3]}
    rows = judge_labels(few, judge, tmp_path / "raw")
    assert all(r["labels"] is not None for r in rows) and judge.name == f"gemma {lab.identity()}"
    assert judge_labels(few, named(lambda prompt: 1 / 0, judge.name), tmp_path / "raw") == rows, "asked again"


# ---- the command line --------------------------------------------------------------------------------------------

@pytest.fixture
def command(capsys):
    """command(arguments) -> what was printed; with error=..., the sentence it has to end in."""
    def run(*argv, error=None):
        code, printed = labels.main([*argv]), capsys.readouterr()
        assert code == (2 if error else 0), printed.err
        if error:
            assert error in printed.err and "Traceback" not in printed.err
        return printed.out
    return run


@pytest.fixture
def tiny(tmp_path, lab):
    """The options of a small model and SAE in files, with the lab's tokenizer and ten pairs."""
    from test_gemma import write_model
    folder = write_model(tmp_path / "model", lab)
    (folder / "tokenizer.json").write_bytes((ROOT / "tiny/model/tokenizer.json").read_bytes())
    beside = tmp_path / "sae" / "layer_1" / "average_l0_9"
    save_sae(small_sae(lab), beside)
    pairs = (ROOT / "tiny/pairs/style/train.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    (tmp_path / "train.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    options = ["--model", str(folder), "--sae", str(tmp_path / "sae"), "--pairs", str(tmp_path), "--device", "cpu"]
    return options, beside / "labels.jsonl"


def test_rules_sheet_and_agreement(tmp_path, tiny, command):
    options, path = tiny
    out = command("rules", *options)
    assert path.exists() and str(path) in out and "unlabelled" in out and "both" in out
    command("rules", *options, error="exists (made by rules); --force replaces it, --out names another")
    before = path.read_bytes()
    command("rules", "--force", *options)
    assert path.read_bytes() == before
    page, hand = path.with_suffix(".csv"), tmp_path / "hand.jsonl"
    assert "write y or n" in command("sheet", "--features", "15", *options)
    command("sheet", *options, error="exists and may be filled in")
    lines = sheet_of(page)
    assert len(lines) >= 10
    filled(page, lines, [("yn"[i % 2], "n") for i in range(len(lines))])
    command(str(page), *options, error="--force replaces it")
    command(str(page), "--out", str(hand), *options)
    assert {line["by"] for line in lines_of(hand)} == {"hand"}
    out = command("agree", str(hand), str(path), *options)
    assert out.count("features judged in both") == 2 == out.count("MCC") and f"style: {len(lines)} features" in out


def test_judge_from_the_command_line(tmp_path, tiny, endpoint, command):
    options, path = tiny
    sae = load_sae(options[3])
    export = tmp_path / "np.json"
    export.write_text(json.dumps([record(i, text, layer="1-lab-res-0k__l0-9") for i, text in ABOUT.items()]))
    judge = ["judge", "--explanations", str(export), *options]
    for _ in range(2):                                           # the same judge may replace its own file
        command(*judge, "--judge", endpoint, "--judge-model", "wise")
    assert len(Endpoint.asked) == 8 and path.with_suffix(".raw.jsonl").exists()
    assert {r["by"] for r in read_labels(path, sae).values()} == {"judge wise"}
    command(*judge, "--judge", "model", error="made by judge wise")
    export.write_text(json.dumps([record(3, "x", layer="1-lab-res-0k__l0-9")]))
    command(*judge, "--judge", "model", "--force")
    assert next(iter(read_labels(path, sae).values()))["by"].startswith("judge gemma ")
    command(*judge, "--judge", endpoint, error="needs --judge-model NAME")
    command(*judge, "--judge-model", "wise", error="needs --explanations FILE and --judge URL")


def test_lab_from_the_command_line(tiny, monkeypatch, command):
    from tiny import features
    rows = [row(1, ["style"])], [row(2, ["alignment"]), row(3, None)]
    monkeypatch.setattr(features, "lab_labels", lambda model, tokenizer, sae, progress: rows)
    options, path = tiny
    command("lab", *options)
    sae = load_sae(options[3])
    assert read_labels(path, sae)[1]["by"] == "lab, writes"
    assert read_labels(path.with_name("labels_reads.jsonl"), sae)[2]["by"] == "lab, reads"
    command("lab", *options, error="made by lab, writes")


MISTAKES = {
    "magic": "a task is one of lab, rules, judge, sheet, agree, pick, or a filled-in FILE.csv",
    "sheet --features 0": "--features is 0", "agree a": "agree takes 2 more words, not 1",
    "none.csv --out runs/never.jsonl": "none.csv: cannot be read", "rules x": "rules takes 0 more words",
    "pick style": "pick needs --out FILE", "pick tone --out x": "pick tone: it has to be style",
    "pick style --out README.md": "README.md exists; --force replaces it",
    "pick style --out x --random 2000": "--random is 2000; only",
    "pick style --out x --labels none.jsonl": "none.jsonl: no such label file",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_mistakes_on_the_command_line(args, command):
    command(*args.split(), error=MISTAKES[args])
    assert not Path("x").exists()


# ---- features masked by label ------------------------------------------------------------------------------------

def test_pick(tmp_path, command):
    """The lab's style features; the control has as many others, the same for a seed, and none of them."""
    out = tmp_path / "new" / "mask.txt"
    rows = read_labels(ROOT / BESIDE / "labels.jsonl", load_sae("tiny/sae"))
    style, alignment = ({i for i, r in rows.items() if name in r["labels"]} for name in labels.LABELS)
    printed = command("pick", "style", "--out", str(out))
    assert set(read_features(out)) == style and f"{len(style)} of 1024 features: labelled style" in printed
    command("pick", "style,alignment", "--out", str(out), "--force")
    assert set(read_features(out)) == style | alignment
    drawn = []
    for seed in ("0", "0", "1"):
        command("pick", "style", "--out", str(out), "--random", "200", "--seed", seed, "--force")
        drawn.append(set(read_features(out)))
        assert len(drawn[-1]) == 200 and not drawn[-1] & style
    assert drawn[0] == drawn[1] != drawn[2]
    everything, _ = labels.pick(rows, 1024, "style", random=1024 - len(style))
    assert set(everything) == set(range(1024)) - style
    with pytest.raises(UserError, match="no feature is labelled alignment"):
        labels.pick({1: row(1, ["style"])}, 32, "alignment")


def test_training_with_a_picked_mask(tmp_path, command):
    mask = tmp_path / "mask.txt"
    command("pick", "style", "--out", str(mask))
    short = ["--steps", "2", "--eval-pairs", "4", "--train-pairs", "16", "--batch-size", "4", "--lr", "0.1"]
    assert train.main([*short, "--runs", str(tmp_path), "--run", "a", "--mask", str(mask)]) == 0
    policy, masked = fsrl.load_run(tmp_path / "a").policy, read_features(mask)
    v = policy.action(torch.randn(50, 128, generator=torch.Generator().manual_seed(0)) * 20)
    free = torch.ones(1024, dtype=torch.bool)
    free[masked] = False
    assert not v[:, masked].any() and v[:, free].any()
