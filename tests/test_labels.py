"""labels.py: the file, the comparison, every source of labels with what can go wrong, and training with features masked by label."""
import argparse
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
import labels
import train
from common import ROOT, off, small_gemma, small_sae
from gemma import UserError, load_tokenizer
from sae import JumpReLUSAE, load_sae, save_sae


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
    return JumpReLUSAE(torch.zeros(2, width), torch.zeros(width), torch.zeros(width, 2), torch.zeros(2), torch.zeros(width), layer=layer, source=source)


def row(index, said, **more):
    return {"index": index, "labels": said, "description": f"feature {index}", **more}


# ---- the file ----------------------------------------------------------------------------------------------------------------

def test_the_file_goes_round(tmp_path):
    sae = small_sae(small_gemma())
    labels.write_labels(tmp_path / "new" / "labels.jsonl", [row(7, ["style", "alignment"], choices=["bold"]), row(3, []), row(5, None), row(1, ["style"])], sae, "hand")
    lines = [json.loads(line) for line in (tmp_path / "new" / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == [1, 3, 5, 7] and all(line["by"] == "hand" and line["sae"] == sae.identity() for line in lines)
    assert list(lines[0]) == ["index", "labels", "description", "by", "sae"] and [p.name for p in (tmp_path / "new").iterdir()] == ["labels.jsonl"]
    rows = labels.read_labels(tmp_path / "new" / "labels.jsonl", sae)
    assert list(rows) == [1, 3, 5, 7] and rows[7]["choices"] == ["bold"] and rows[5]["labels"] is None and rows[3]["labels"] == []
    g = labels.groups(rows, 32)
    assert {name: x.nonzero()[:, 0].tolist() for name, x in g.items()} == {"style": [1, 7], "alignment": [7], "known": [1, 3, 7]}
    assert labels.shares(rows, 32) == {"style": 2 / 32, "alignment": 1 / 32, "both": 1 / 32, "neither": 1 / 32, "unlabelled": 29 / 32}


GOOD = {"index": 3, "labels": ["style"], "description": "", "by": "hand"}


@pytest.mark.parametrize("line, message", [
    ("{\"index\": 3", "line 2: not valid JSON"), ("[3]", "line 2: a label is an object"), ({**GOOD, "index": "3"}, "line 2: index is '3'"), ({**GOOD, "index": True}, "line 2: index is True"),
    ({**GOOD, "index": 32}, "line 2: feature 32 does not exist; this SAE has features 0 to 31"), ({**GOOD, "index": -1}, "line 2: feature -1 does not exist"),
    ({**GOOD, "index": 0}, "line 2: feature 0 is there twice"), ({**GOOD, "labels": ["tone"]}, r"line 2: labels is \['tone'\]; it has to be a list of some of style, alignment, or null"),
    ({**GOOD, "labels": "style"}, "line 2: labels is 'style'"), ({**GOOD, "labels": ["style", "style"]}, "line 2: labels is"), ({**GOOD, "labels": [["style"]]}, "line 2: labels is"),
    ({k: v for k, v in GOOD.items() if k != "labels"}, "line 2: labels is 'missing'"), ({**GOOD, "sae": "0" * 16}, "line 2: labels of another SAE .digest 0000000000000000.; random has"),
    (b"\xff\xfe", "cannot be read")])
def test_bad_lines(tmp_path, line, message):
    sae, path = small_sae(small_gemma()), tmp_path / "labels.jsonl"
    first = json.dumps({**GOOD, "index": 0, "sae": sae.identity()}).encode() + b"\n"
    path.write_bytes(first + (line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps({"sae": sae.identity(), **line}).encode()))
    with pytest.raises(UserError, match=message) as error:
        labels.read_labels(path, sae)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_file_an_empty_one_and_nothing_to_write(tmp_path):
    sae = small_sae(small_gemma())
    with pytest.raises(UserError, match="no such label file; `python analyze.py --make-labels KIND` makes one"):
        labels.read_labels(tmp_path / "none", sae)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="no label in it"):
        labels.read_labels(tmp_path / "empty", sae)
    for rows, message in (([], "no label to write"), ([row(99, [])], "feature 99 does not exist"), ([row(1, []), row(1, [])], "there twice"), ([row(1, ["x"])], "labels is")):
        with pytest.raises(UserError, match=message):
            labels.write_labels(tmp_path / "out", rows, sae, "hand")
    assert not (tmp_path / "out").exists()


def test_where_labels_lie(tmp_path):
    inside = ROOT / "tiny/sae/layer_3/width_1k/average_l0_16"
    sae = load_sae("tiny/sae")
    assert labels.default_path(sae).resolve() == (inside / "labels.jsonl").resolve()
    sae.source = str(inside)
    assert labels.default_path(sae) == inside / "labels.jsonl"
    assert labels.default_path(scope()) == Path("runs/labels/google__gemma-scope-2b-pt-res/layer_12__width_1k__average_l0_21.jsonl")


# ---- two files compared --------------------------------------------------------------------------------------------------------

def two(tp, fp, fn, tn):
    cells = [(["style"], ["style"])] * tp + [([], ["style"])] * fp + [(["style"], [])] * fn + [(["alignment"], [])] * tn
    return tuple({i: row(i, pair[side]) for i, pair in enumerate(cells)} for side in (0, 1))


def test_agreement_by_hand():
    a, b = two(6, 2, 1, 11)
    b[1000], a[2000], a[2001], b[2001] = row(1000, ["style"]), row(2000, ["style"]), row(2001, None), row(2001, ["style"])     # not known in both
    m = labels.agreement(a, b, "style")
    assert m["both"] == 20 and m["confusion"] == [[6, 2], [1, 11]] and m["precision"] == 6 / 8 and m["recall"] == 6 / 7
    assert m["mcc"] == pytest.approx((6 * 11 - 2 * 1) / math.sqrt(8 * 7 * 13 * 12)) and m["mcc_low"] < m["mcc"] < m["mcc_high"] <= 1
    assert m == labels.agreement(a, b, "style") and m["mcc_low"] != labels.agreement(a, b, "style", seed=1)["mcc_low"]
    assert labels.agreement(b, a, "style")["confusion"] == [[6, 1], [2, 11]], "the first is the reference"
    m = labels.agreement(*two(0, 0, 0, 12), "style")
    assert m["confusion"] == [[0, 0], [0, 12]] and all(math.isnan(m[k]) for k in ("precision", "recall", "mcc", "mcc_low", "mcc_high"))
    assert labels.agreement(*two(6, 0, 0, 6), "style")["mcc"] == 1.0
    with pytest.raises(UserError, match="only 9 features are judged in both"):
        labels.agreement(*two(3, 2, 2, 2), "style")
    with pytest.raises(UserError, match="label is 'tone'"):
        labels.agreement(a, b, "tone")


def test_the_interval_covers():
    """95% of samples of 200 features hold the true correlation in their interval, give or take the simulation's own error."""
    g, p = np.random.default_rng(0), np.array([.3, .1, .1, .5])
    true, hits = labels._mcc(p), 0
    for i in range(200):
        m = labels.agreement(*two(*g.multinomial(200, p)), "style", samples=400, seed=i)
        hits += m["mcc_low"] <= true <= m["mcc_high"]
    assert 0.90 <= hits / 200 <= 0.99


# ---- where a feature is strongest ------------------------------------------------------------------------------------------------

def random_rows(model, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[2, *torch.randint(3, model.config.vocab_size, (n,), generator=g).tolist()] for n in lengths]


def brute(model, sae, rows, count):
    """Each row alone, everything kept, sorted by value, then row, then position."""
    found = [[] for _ in range(sae.d_sae)]
    for r, ids in enumerate(rows):
        f = sae.encode(model.blocks(model.embed(torch.tensor([ids])), 0, sae.layer + 1))[0]
        for p, i in enumerate(ids):
            if i not in (0, 1, 2):
                for k in (f[p] > 0).nonzero()[:, 0].tolist():
                    found[k].append((-f[p, k].item(), r, p))
    return [sorted(some)[:count] for some in found]


@pytest.mark.parametrize("limits", ["real", "small"])
def test_top_contexts(limits):
    model = small_gemma(dtype=torch.float64)
    sae = small_sae(model, features=48)
    with torch.no_grad():
        sae.threshold[:8] = torch.tensor([1e9, 15, 12, 15, 14, 16, 14, 20])      # features that fire never and rarely
    rows = random_rows(model, [5, 17, 1, 30, 8, 0, 22, 9, 3, 12])
    rows[4][3], rows[6][2], rows[6][5] = 1, 0, 2                  # EOS, padding and BOS inside a row are skipped too
    if limits == "small":                                         # many chunks, pruned often, too dense each
        source = (ROOT / "labels.py").read_text(encoding="utf-8")
        assert source.count("2**20") == 2 and source.count("2**23 // F") == 1
        module = dict(vars(labels))
        exec(compile(source.replace("2**20", "20").replace("2**23 // F", "7"), "labels.py", "exec"), module)
        top_contexts = module["top_contexts"]
    else:
        top_contexts = labels.top_contexts
    want = brute(model, sae, rows, 6)
    assert any(0 < len(some) < 6 for some in want) and any(not some for some in want)
    for batch_size in (1, 3, 10):
        value, at, position = top_contexts(model, sae, rows, 6, batch_size=batch_size)
        assert value.shape == at.shape == position.shape == (48, 6) and value.dtype == torch.float32 and at.dtype == torch.long
        for k, some in enumerate(want):
            n = len(some)
            assert list(zip(at[k, :n].tolist(), position[k, :n].tolist())) == [(r, p) for _, r, p in some], (batch_size, k)
            assert n == 0 or off(value[k, :n], torch.tensor([-v for v, _, _ in some])) < 1e-6
            assert not value[k, n:].any()


def test_ties_and_no_rows():
    """The same row three times: the first one, then the next. One that is longer changes the batches, not the order."""
    model = small_gemma(dtype=torch.float64)
    sae, same = small_sae(model), random_rows(model, [6])[0]
    value, at, _ = labels.top_contexts(model, sae, [same, same, same], 3, batch_size=1)
    fires = value[:, 0] > 0
    assert fires.any() and ((at[fires, 0] <= at[fires, 1]) | (value[fires, 0] > value[fires, 1])).all() and (at[fires, 0] == 0).all()
    assert not labels.top_contexts(model, sae, [], 3)[0].any() and labels.top_contexts(model, sae, [[2]], 3)[0].shape == (32, 3)


# ---- Neuronpedia's descriptions -----------------------------------------------------------------------------------------------------

def record(index, description, layer="12-gemmascope-res-1k__l0-21", **more):
    return {"modelId": "gemma-2-2b", "layer": layer, "index": str(index), "description": description, "explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair", **more}


RECORDS = [record(4, "an old\nguess", explanationModelName="other"), record(4, "bold  words"), record(4, "later"), record(2, ""), record(2, "half \ud800 a pair", typeName="np_max-act-logits"),
           record(2, "second", typeName="np_max-act-logits"), record(9, None)]


def test_explanations_in_every_form(tmp_path):
    sae, want = scope(), {2: "half ? a pair", 4: "bold words"}
    lines = [json.dumps(r) + "\n" for r in RECORDS]
    for name, data in (("list", RECORDS), ("features", {"features": RECORDS}), ("items", {"items": RECORDS}), ("data", {"data": RECORDS})):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        assert labels.read_explanations(tmp_path / f"{name}.json", sae) == want
    (tmp_path / "x.jsonl").write_text("".join(lines))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "batch-0.jsonl.gz").write_bytes(gzip.compress("".join(lines[:3]).encode()))
    (tmp_path / "folder" / "batch-1.jsonl").write_text("".join(lines[3:]))
    (tmp_path / "folder" / "notes.jsonl").write_text("no JSON")
    for name in ("x.jsonl", "x.jsonl.gz", "folder"):
        assert labels.read_explanations(tmp_path / name, sae) == want
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode())[:-20])
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text(json.dumps(record(1, "")) + "\n")
    (tmp_path / "plain.jsonl").write_text('{"index": 1}\n')
    for name, message in (("broken.jsonl.gz", "cannot be read"), ("none", "no batch-"), ("absent", "no such file or folder"), ("bad.json", "neither a list"), ("empty.jsonl", "no description in it"),
                          ("plain.jsonl", "line 1: not a record of Neuronpedia")):
        with pytest.raises(UserError, match=message):
            labels.read_explanations(tmp_path / name, sae)
    for index in ("1024", "-1", "x"):
        (tmp_path / "far.json").write_text(json.dumps([record(1, "a"), record(index, "b")]))
        with pytest.raises(UserError, match=f"record 2: index is '{index}'; this SAE has features 0 to 1023"):
            labels.read_explanations(tmp_path / "far.json", sae)


SCOPE = "google/gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_"


@pytest.mark.parametrize("source_id, sae_source, message", [
    ("12-gemmascope-res-65k__l0-21", SCOPE + "21", None), ("12-gemmascope-res-65k", SCOPE + "72", None),
    ("12-gemmascope-res-65k", SCOPE + "21", "without a suffix it is the one of L0 72, not 21; look for 12-gemmascope-res-65k__l0-21"),
    ("12-gemmascope-res-65k__l0-72", SCOPE + "21", "L0 72, not 21"), ("11-gemmascope-res-65k__l0-21", SCOPE + "21", "layer 11, not 12"),
    ("12-gemmascope-res-16k__l0-21", SCOPE + "21", "16k features, not 65k"), ("12-gemmascope-mlp-65k", SCOPE + "72", "residual stream"), ("nonsense", SCOPE + "72", "layer is 'nonsense'"),
    ("12-gemmascope-res-65k", SCOPE.replace("2b", "9b") + "72", "of gemma-2-2b, not gemma-2-9b"), ("12-gemmascope-res-65k", SCOPE.replace("2b-pt", "2b-it") + "72", "not gemma-2-2b-it"),
])
def test_explanations_of_another_sae(source_id, sae_source, message, capsys):
    """The paper's own labels were those of the SAE with L0 72, used for the one with L0 21."""
    sae = scope(65536, source=sae_source)
    if message is None:
        labels.check_source("gemma-2-2b", source_id, sae, "f, line 1")
        assert capsys.readouterr().err == ""
    else:
        with pytest.raises(UserError, match=message) as error:
            labels.check_source("gemma-2-2b", source_id, sae, "f, line 1")
        assert str(error.value).startswith("f, line 1: ")


def test_what_cannot_be_checked_is_said(capsys):
    labels.check_source("gemma-2-2b", "20-gemmascope-res-1k", scope(layer=20), "f")                    # a canonical L0 not known here
    labels.check_source("gemma-2-2b", "12-gemmascope-res-1k__l0-5", scope(source="somewhere"), "f")    # an SAE that does not say its own
    assert capsys.readouterr().err.count("cannot be checked") == 2
    labels.check_source("gemma-2-2b", "12-gemmascope-res-1m", scope(2**20, source="somewhere"), "f")
    for model, width, l0 in (("gemma-2-2b", 16384, 82), ("gemma-2-2b", 65536, 72), ("gemma-2-9b", 16384, 130)):
        with pytest.raises(UserError, match=f"it is the one of L0 {l0}, not 5"):
            labels.check_source(model, f"12-gemmascope-res-{width // 1000}k", scope(width, source="x:average_l0_5"), "f")


# ---- the judge ------------------------------------------------------------------------------------------------------------------------

def test_yes_no_and_neither():
    assert all(labels.verdict(text) is True for text in ("Yes", " yes\n", "`YES`", "Yes.", "`Yes`.", "Yes (log p -0.1 against -2.3)"))
    assert all(labels.verdict(text) is False for text in ("No", "no.", " `No` "))
    assert all(labels.verdict(text) is None for text in ("", "Yes, it", "Maybe", "Yes No", "nope", "Yes!", "not"))
    assert set(labels.CRITERIA) == set(labels.LABELS) and all(60 <= len(text.split()) <= 100 for text in labels.CRITERIA.values())
    assert "bold words" in labels.question("style", "bold words") != labels.question("alignment", "bold words")


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint. says(prompt) -> answer, or a number: an HTTP error; asked: the prompts; sent: the bodies and headers."""
    says, asked, sent = None, [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.asked.append(prompt)
        self.sent.append((self.path, body, self.headers.get("Authorization")))
        said = type(self).says(prompt)
        code = said if isinstance(said, int) else 200
        out = {"error": "refused for " + str(self.headers.get("Authorization"))} if code != 200 else {
            "id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)      # that is about the Hub; this server is here
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("FSRL_JUDGE_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Endpoint.asked, Endpoint.sent = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


ABOUT = {3: "bold marks", 8: "refusing harm", 11: "cats", 12: "bold refusals"}


def expert(prompt):
    style = prompt.startswith(labels.CRITERIA["style"])
    text = prompt.removeprefix(labels.CRITERIA["style" if style else "alignment"])
    return "Yes." if ("bold" if style else "refus") in text else " `no`"


def test_endpoint(tmp_path, endpoint, monkeypatch, capsys):
    """What is asked, in which form; rows in order; nothing is asked twice; another judge or description is."""
    monkeypatch.setenv("FSRL_JUDGE_KEY", "very-secret")
    Endpoint.says, raw = staticmethod(expert), tmp_path / "labels.raw.jsonl"
    ask = labels.endpoint_judge(endpoint, "wise", workers=3)
    rows = labels.judge_labels(ABOUT, ask, raw, scope())
    assert [(r["index"], r["labels"]) for r in rows] == [(3, ["style"]), (8, ["alignment"]), (11, []), (12, ["style", "alignment"])]
    assert len(Endpoint.asked) == 8 and "8 questions asked, 0 answers reused, 0 answers neither Yes nor No, 0 errors" in capsys.readouterr().out
    path, body, authorization = Endpoint.sent[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer very-secret"
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "seed")} == {"model": "wise", "max_tokens": 5, "temperature": 0, "seed": 0}
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 8 and all(list(line) == ["index", "criterion", "description", "judge", "answer", "prompt"] and line["judge"] == "wise" for line in lines)
    assert labels.judge_labels(ABOUT, ask, raw, scope()) == rows and len(Endpoint.asked) == 8
    assert "0 questions asked, 8 answers reused" in capsys.readouterr().out
    labels.judge_labels({**ABOUT, 3: "bold words"}, ask, raw, scope())
    assert len(Endpoint.asked) == 10
    labels.judge_labels(ABOUT, labels.endpoint_judge(endpoint, "other"), raw, scope())
    assert len(Endpoint.asked) == 18
    monkeypatch.setitem(labels.CRITERIA, "style", labels.CRITERIA["style"] + " Really.")
    labels.judge_labels(ABOUT, ask, raw, scope())
    assert len(Endpoint.asked) == 22, "a question in other words is another question"
    labels.write_labels(tmp_path / "labels.jsonl", rows, scope(), f"judge {ask.name}")
    assert labels.read_labels(tmp_path / "labels.jsonl", scope())[12]["by"] == "judge wise"
    assert not any("very-secret" in p.read_text(encoding="utf-8") for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="explanation of feature 5000"):
        labels.judge_labels({5000: "x"}, ask, raw, scope())


def test_nonsense_is_unknown_and_not_asked_again(tmp_path, endpoint, capsys):
    Endpoint.says, raw = staticmethod(lambda prompt: "I think so" if "cats" in prompt else expert(prompt)), tmp_path / "raw"
    ask = labels.endpoint_judge(endpoint, "wise")
    for asked in (8, 0):
        rows = labels.judge_labels(ABOUT, ask, raw, scope())
        assert {r["index"]: r["labels"] for r in rows}[11] is None and rows[0]["labels"] == ["style"]
        out = capsys.readouterr().out
        assert f"{asked} questions asked" in out and "2 answers neither Yes nor No" in out and "1 features stay unknown" in out
    assert len(Endpoint.asked) == 8


def test_an_endpoint_that_dies_is_gone_on_with(tmp_path, endpoint, monkeypatch, capsys):
    """Answers before its death are kept, also half a line of a crash does no harm, and only the rest is asked for."""
    monkeypatch.setenv("FSRL_JUDGE_KEY", "very-secret")
    many, raw = {i: f"bold {i}" for i in range(20)}, tmp_path / "raw"
    Endpoint.says = staticmethod(lambda prompt: expert(prompt) if len(Endpoint.asked) <= 13 else 500)
    ask = labels.endpoint_judge(endpoint, "wise", workers=1)
    with pytest.raises(UserError, match=r"judge wise: 5 questions in a row failed .*; 13 of 40 answers are kept in .*raw, and the same command goes on from there") as error:
        labels.judge_labels(many, ask, raw, scope())
    assert len(Endpoint.asked) < 24 and "500" in str(error.value)
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    assert sum("answer" in line for line in lines) == 13 and sum("error" in line for line in lines) >= 5
    assert "very-secret" not in raw.read_text(encoding="utf-8") + str(error.value), "the endpoint repeated it"
    with open(raw, "a", encoding="utf-8") as file:
        file.write('{"index": 3, "criterion": "sty')
    Endpoint.says, Endpoint.asked = staticmethod(expert), []
    rows = labels.judge_labels(many, ask, raw, scope())
    assert len(Endpoint.asked) == 27 and all(r["labels"] == ["style"] for r in rows) and "27 questions asked, 13 answers reused" in capsys.readouterr().out
    assert len([json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]) == len(lines) + 27


def test_some_errors_are_unknown_for_now(tmp_path, endpoint, capsys):
    Endpoint.says = staticmethod(lambda prompt: (time.sleep(0.6), "Yes")[1] if "cats" in prompt else expert(prompt))
    rows = labels.judge_labels(ABOUT, labels.endpoint_judge(endpoint, "wise", timeout=0.2, workers=1), tmp_path / "raw", scope())
    out = capsys.readouterr().out
    assert [r["labels"] for r in rows] == [["style"], ["alignment"], None, ["style", "alignment"]] and "2 errors; 1 features stay unknown, and the same command asks the failed" in out
    assert sum("timed out" in line for line in (tmp_path / "raw").read_text().splitlines()) == 2
    Endpoint.says, Endpoint.asked = staticmethod(expert), []
    rows = labels.judge_labels(ABOUT, labels.endpoint_judge(endpoint, "wise"), tmp_path / "raw", scope())
    assert rows[2]["labels"] == [] and len(Endpoint.asked) == 2


def test_failures_between_successes_do_not_stop_it(tmp_path):
    """Four of five questions fail; but for the fifth, the endpoint would be taken to be down."""
    calls = []

    def ask(prompt):
        calls.append(prompt)
        if len(calls) % 5:
            raise ConnectionError("busy")
        return "Yes"
    rows = labels.judge_labels({i: str(i) for i in range(20)}, ask, tmp_path / "raw", scope())
    assert len(calls) == 40 and len(rows) == 20 and sum('"answer"' in line for line in (tmp_path / "raw").read_text().splitlines()) == 8


def test_the_order_of_answers_does_not_matter(tmp_path):
    def ask(prompt):
        time.sleep(0.02 * (hash(prompt) % 5))
        return expert(prompt)
    assert labels.judge_labels(ABOUT, ask, tmp_path / "a", scope(), workers=5) == labels.judge_labels(ABOUT, expert, tmp_path / "b", scope())


def test_no_endpoint(tmp_path, endpoint, monkeypatch):
    for url in ("localhost:8000", "ftp://x/v1", ""):
        with pytest.raises(UserError, match="give the http"):
            labels.endpoint_judge(url, "wise")
    with pytest.raises(UserError, match="5 questions in a row failed"):
        labels.judge_labels(ABOUT, labels.endpoint_judge("http://127.0.0.1:9/v1", "wise"), tmp_path / "raw", scope())
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    Endpoint.says = staticmethod(expert)
    labels.endpoint_judge(endpoint, "wise")("x")
    assert Endpoint.sent[0][2] == "Bearer none", "the Hub's token goes to the Hub's own endpoints only"
    (tmp_path / "other").write_text('{"index": 1}\n')
    with pytest.raises(UserError, match="other, line 1: not an answer of a judge"):
        labels.judge_labels(ABOUT, expert, tmp_path / "other", scope())


def test_local_judge(tmp_path, lab, tokenizer, capsys):
    """Two answers of several tokens each: their log-probabilities are those of the whole answers."""
    ask = labels.local_judge(lab, tokenizer)
    said = ask("Is it?")
    assert said == ask("Is it?") and labels.verdict(said) is not None
    from gemma import encode_prompt, encode_text
    ids, score = encode_prompt(tokenizer, "Is it?"), {}
    for word in ("Yes", "No"):
        answer = encode_text(tokenizer, word)
        assert len(answer) > 1
        logp = lab.logits(lab(torch.tensor([ids + answer]))[0]).log_softmax(-1)
        score[word] = sum(logp[len(ids) + i - 1, t].item() for i, t in enumerate(answer))
    best, other = sorted(score, key=score.get, reverse=True)
    assert said == f"{best} (log p {score[best]:.4f} against {score[other]:.4f})"
    few = {3: ABOUT[3]}                                     # the lab's tokenizer spells such words out
    rows = labels.judge_labels(few, ask, tmp_path / "raw", scope())
    assert all(r["labels"] is not None for r in rows) and ask.name == f"gemma {lab.identity()}"
    assert labels.judge_labels(few, labels.local_judge(lab, tokenizer), tmp_path / "raw", scope()) == rows and "2 answers reused" in capsys.readouterr().out


# ---- rules and sheets -----------------------------------------------------------------------------------------------------------------

def test_rules_by_hand():
    says = labels.rule_labels
    for case in (("x", "**", "y"), ("a", "\n\n", "b"), ("a", ".", ""), ("", "🎉", ""), ("model\n", "Sure", "! I"), ("x\n", " Great", ", so"), ("\n", "2", ". b"), ("", "#", " A"), ("\n", "-", " a")):
        assert says(*case) == ["style"], case
    for case in (("I can", "'t", " help"), ("I", " can", "'t do"), ("that is un", "eth", "ical"), ("I", " refuse", "."), ("", " harmful", ""), ("", " perhaps", " not"), ("he", " lied", " to")):
        assert says(*case) == ["alignment"], case
    for case in (("the", " cat", " sat"), ("", "Great", " apes are"), ("in ", "2", " days"), ("", "\ufffd", "x"), ("x", "<end_of_turn>", "\n"), ("the", " lieutenant", ""), ("", "", "")):
        assert says(*case) == [], case


class Planted:
    """Stands in for top_contexts: feature 0 on "!", feature 1 half and half, feature 2 on refusals, feature 3 nowhere."""

    def __init__(self, tokenizer):
        self.one = tokenizer.token_to_id

    def rows(self):
        return [[2, self.one("Sure"), self.one("!"), self.one("▁the"), self.one("▁steal")]]

    def __call__(self, model, sae, rows, *args, **kwargs):
        value = torch.tensor([[3., 2., 0.], [5., 5., 0.], [4., 1., 0.], [0., 0., 0.]])
        position = torch.tensor([[2, 2, 0], [2, 3, 0], [4, 3, 0], [0, 0, 0]])
        return value, torch.zeros(4, 3, dtype=torch.long), position


def test_rules_labels(tokenizer, monkeypatch):
    planted = Planted(tokenizer)
    assert None not in planted.rows()[0]
    monkeypatch.setattr(labels, "top_contexts", planted)
    rows = labels.rules_labels(None, None, tokenizer, planted.rows())
    assert [(r["index"], r["labels"]) for r in rows] == [(0, ["style"]), (1, ["style"]), (2, ["alignment"])]
    assert rows[0]["description"] == 'strongest on "!"' and '" the"' in rows[1]["description"]


def test_sheet(tmp_path, lab, tokenizer):
    sae, path = small_sae(lab), tmp_path / "new" / "sheet.csv"
    rows = random_rows(lab, [20] * 6)
    assert labels.sheet(path, lab, sae, tokenizer, rows, features=12, seed=3) == 12
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    fires = (labels.top_contexts(lab, sae, rows)[0][:, 0] > 0).nonzero()[:, 0].tolist()
    index = [int(line["index"]) for line in lines]
    assert index == sorted(set(index)) and set(index) <= set(fires) and len(index) == 12
    assert all(1 <= line["contexts"].count("«") == line["contexts"].count("»") <= 5 and line["style"] == line["alignment"] == "" for line in lines)
    with pytest.raises(UserError, match="exists and may be filled in"):
        labels.sheet(path, lab, sae, tokenizer, rows)
    labels.sheet(tmp_path / "other.csv", lab, sae, tokenizer, rows, features=12, seed=4)
    assert (tmp_path / "other.csv").read_text() != path.read_text()
    with pytest.raises(UserError, match="nothing is filled in"):
        labels.read_sheet(path, sae)

    def fill(*cells, delimiter=","):
        with open(tmp_path / "filled.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, labels.COLUMNS, delimiter=delimiter)
            writer.writeheader()
            writer.writerows({**line, "style": s, "alignment": a} for line, (s, a) in zip(lines, cells))
        return tmp_path / "filled.csv"
    for delimiter in ",;":
        got = labels.read_sheet(fill(("y", "N"), (" YES ", "1"), ("", ""), ("0", "no"), delimiter=delimiter), sae)
        assert [(r["index"], r["labels"]) for r in got] == [(index[0], ["style"]), (index[1], ["style", "alignment"]), (index[3], [])]
    labels.write_labels(tmp_path / "labels.jsonl", got, sae, "hand")
    assert len(labels.read_labels(tmp_path / "labels.jsonl", sae)) == 3
    for cell, message in ((("maybe", "n"), "line [0-9]+: style is 'maybe'; it has to be y or n"), (("y", ""), "only one of style and alignment is filled in")):
        with pytest.raises(UserError, match=message):
            labels.read_sheet(fill(("y", "y"), cell), sae)
    with pytest.raises(UserError, match="a sheet of another SAE"):
        labels.read_sheet(fill(("y", "y")), small_sae(lab, seed=5))
    for text, message in (("index,style,alignment\n5,y,n\n5,y,n\n", "line 3: feature 5 is there twice"), ("index,style,alignment\n99,y,n\n", "line 2: feature 99 does not exist"),
                          ("index,style,alignment\nx,y,n\n", "line 2: index is 'x'"), ("index,style\n1,y\n", "not a sheet of labels"), ("", "not a sheet of labels")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            labels.read_sheet(tmp_path / "bad.csv", sae)
    with pytest.raises(UserError, match="cannot be read"):
        labels.read_sheet(tmp_path / "none.csv", sae)


# ---- the command line -------------------------------------------------------------------------------------------------------------------

def command(*argv):
    parser = argparse.ArgumentParser()
    labels.add_arguments(parser)
    return labels.make(parser.parse_args(argv))


@pytest.fixture
def tiny(tmp_path, lab):
    """The options of a small model and SAE in files, with the lab's tokenizer and ten pairs."""
    from test_gemma import write_model
    folder = write_model(tmp_path / "model", lab)
    (folder / "tokenizer.json").write_bytes((ROOT / "tiny/model/tokenizer.json").read_bytes())
    save_sae(small_sae(lab), tmp_path / "sae" / "layer_1" / "average_l0_9")
    (tmp_path / "train.jsonl").write_text("\n".join((ROOT / "tiny/pairs/style/train.jsonl").read_text(encoding="utf-8").splitlines()[:10]), encoding="utf-8")
    return ["--model", str(folder), "--sae", str(tmp_path / "sae"), "--pairs", str(tmp_path), "--device", "cpu"], tmp_path / "sae" / "layer_1" / "average_l0_9" / "labels.jsonl"


def test_rules_sheet_and_agreement_from_the_command_line(tmp_path, tiny, capsys):
    options, path = tiny
    assert command("--make-labels", "rules", *options) == 0 and path.exists()
    assert "unlabelled" in (out := capsys.readouterr().out) and "both at once" in out and str(path) in out
    with pytest.raises(UserError, match=r"exists \(made by rules\); --force replaces it, --out names another"):
        command("--make-labels", "rules", *options)
    before = path.read_bytes()
    assert command("--make-labels", "rules", "--force", *options) == 0 and path.read_bytes() == before
    assert command("--make-labels", "sheet", "--features", "15", *options) == 0 and "write y or n" in capsys.readouterr().out
    page = path.with_suffix(".csv")
    with pytest.raises(UserError, match="exists and may be filled in"):
        command("--make-labels", "sheet", *options)
    with open(page, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    with open(page, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, labels.COLUMNS)
        writer.writeheader()
        writer.writerows({**line, "style": "yn"[i % 2], "alignment": "n"} for i, line in enumerate(lines))
    assert len(lines) >= 10
    with pytest.raises(UserError, match="--force replaces it"):
        command("--make-labels", str(page), *options)
    assert command("--make-labels", str(page), "--out", str(tmp_path / "hand.jsonl"), *options) == 0
    assert {json.loads(line)["by"] for line in (tmp_path / "hand.jsonl").read_text().splitlines()} == {"hand"}
    capsys.readouterr()
    assert command("--agree", str(tmp_path / "hand.jsonl"), str(path), *options) == 0
    out = capsys.readouterr().out
    assert out.count("features judged in both") == 2 and out.count("MCC") == 2 and f"style: {len(lines)} features" in out


def test_judge_from_the_command_line(tmp_path, tiny, endpoint, capsys):
    options, path = tiny
    sae = load_sae(options[3])
    assert sae.d_sae == 32 and sae.layer == 1
    (tmp_path / "np.json").write_text(json.dumps([record(i, text, layer="1-lab-res-0k__l0-9") for i, text in ABOUT.items()]))
    judge = ["--make-labels", "judge", "--explanations", str(tmp_path / "np.json"), *options]
    Endpoint.says = staticmethod(expert)
    for _ in range(2):                                           # the same judge may replace its own file
        assert command(*judge, "--judge", endpoint, "--judge-model", "wise") == 0
    assert len(Endpoint.asked) == 8 and {r["by"] for r in labels.read_labels(path, sae).values()} == {"judge wise"} and path.with_suffix(".raw.jsonl").exists()
    with pytest.raises(UserError, match=r"made by judge wise"):
        command(*judge, "--judge", "model")
    (tmp_path / "np.json").write_text(json.dumps([record(3, "x", layer="1-lab-res-0k__l0-9")]))
    assert command(*judge, "--judge", "model", "--force") == 0
    assert next(iter(labels.read_labels(path, sae).values()))["by"].startswith("judge gemma ")
    for bad in (["--judge", endpoint], ["--judge-model", "wise"]):
        with pytest.raises(UserError, match="needs --explanations FILE, --judge URL"):
            command(*judge, *bad)


def test_lab_from_the_command_line(tiny, monkeypatch):
    import sys
    import types
    options, path = tiny
    stub = types.ModuleType("tiny.features")
    stub.lab_labels = lambda model, tokenizer, sae, progress: ([row(1, ["style"])], [row(2, ["alignment"]), row(3, None)])
    monkeypatch.setitem(sys.modules, "tiny.features", stub)
    assert command("--make-labels", "lab", *options) == 0
    sae = load_sae(options[3])
    assert labels.read_labels(path, sae)[1]["by"] == "lab, writes" and labels.read_labels(path.with_name("labels_reads.jsonl"), sae)[2]["by"] == "lab, reads"
    with pytest.raises(UserError, match="made by lab, writes"):
        command("--make-labels", "lab", *options)


@pytest.mark.parametrize("args, message", [(["--make-labels", "magic"], "it has to be one of lab, rules, judge, sheet, or a filled-in FILE.csv"), (["--make-labels", "sheet", "--features", "0"], "--features is 0"),
                                           (["--make-labels", "none.csv", "--out", "runs/never.jsonl"], "none.csv: cannot be read")])
def test_mistakes_on_the_command_line(args, message):
    with pytest.raises(UserError, match=message):
        command(*args)


def test_options_that_the_caller_has_are_skipped():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    labels.add_arguments(parser, skip=("model",))
    assert parser.parse_args(["--model", "x"]).make_labels is None


# ---- training with features masked by label ----------------------------------------------------------------------------------------------

SHORT = ["--steps", "2", "--eval-pairs", "4", "--train-pairs", "16", "--batch-size", "4", "--lr", "0.1"]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The lab's SAE with every third feature style, every fifth alignment, the first 600 known."""
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    labels.write_labels(path, [row(i, [name for name, n in (("style", 3), ("alignment", 5)) if i % n == 0]) for i in range(600)], load_sae(str(ROOT / "tiny/sae")), "hand")
    return str(path)


@pytest.mark.parametrize("more, want", [(["--mask-labels", "style"], {i for i in range(600) if i % 3 == 0}), (["--mask-labels", "alignment,style", "--mask", "1,1000"], {i for i in range(600) if i % 3 == 0 or i % 5 == 0} | {1, 1000})])
def test_masked_by_label(tmp_path, by_hand, more, want, capsys):
    assert train.main([*SHORT, "--runs", str(tmp_path), "--run", "a", "--labels", by_hand, *more]) == 0
    assert f"Masked: {len(want)} of 1024 features may not be steered" in (out := capsys.readouterr().out) and "labelled" in out
    opened = fsrl.load_run(tmp_path / "a")
    assert set(opened.steering.masked) == want
    v = opened.steering.features(torch.randn(50, 128, generator=torch.Generator().manual_seed(0)) * 20)
    masked = torch.tensor(sorted(want))
    free = torch.tensor(sorted(set(range(1024)) - want))
    assert not v[:, masked].any() and v[:, free].any()


def test_masked_at_random(tmp_path, by_hand, capsys):
    sae = load_sae("tiny/sae")
    def masked(**how):
        return train.masked_features(train.TrainConfig(**how), sae)
    named, sets = set(masked(mask_labels="style", labels=by_hand)), []
    for seed in range(3):
        got = masked(mask_labels="style", labels=by_hand, mask_random=200, seed=seed, mask="1,2")
        assert len(got) == 202 and not named & set(got) and {1, 2} <= set(got)
        assert got == masked(mask_labels="style", labels=by_hand, mask_random=200, seed=seed, mask="1,2")
        sets.append(set(got))
    assert sets[0] != sets[1] != sets[2]
    assert len(masked(mask_random=824, mask_labels="style", labels=by_hand)) == 824 and len(masked(mask_random=1023)) == 1023
    with pytest.raises(UserError, match="nothing is left to steer with"):
        masked(mask_random=1024)
    assert masked() == [] and named & set(masked(mask_random=500))
    capsys.readouterr()
    assert train.main([*SHORT, "--runs", str(tmp_path), "--run", "r", "--labels", by_hand, "--mask-labels", "style", "--mask-random", "200"]) == 0
    assert "Masked: 200 of 1024 features may not be steered (200 at random, none of the 200 labelled style)" in capsys.readouterr().out
    assert not named & set(fsrl.load_run(tmp_path / "r").steering.masked)


@pytest.mark.parametrize("args, message", [
    (["--mask-labels", "tone"], "--mask-labels is tone; it has to be style, alignment, or style,alignment"), (["--mask-labels", "style,"], "--mask-labels is style,"),
    (["--labels", "x.jsonl"], "--labels says where the labels of --mask-labels are read"), (["--mask-random", "-1"], "--mask-random is -1; it has to be at least 0"),
    (["--mask-random", "1025"], "--mask-random is 1025; only 1024 of the SAE's 1024 features are left"), (["--mask-labels", "style", "--labels", "none.jsonl"], "none.jsonl: there is no such label file")])
def test_mask_mistakes(tmp_path, args, message, capsys):
    assert train.main([*SHORT, "--runs", str(tmp_path / "runs"), *args]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_masks_that_are_not_asked_for_leave_old_results_their_keys():
    import sys
    sys.path.insert(0, str(ROOT / "docs"))
    import results
    kept = results.settings("style", 0)
    assert not {"mask_labels", "labels", "mask_random"} & set(kept) and results.key("style", 0) in json.loads(results.DATA.read_text(encoding="utf-8"))["runs"]
