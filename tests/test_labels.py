"""Label files, the comparison of two, every source of labels with what can go wrong, and the mask picked by label."""
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
from common import ROOT, small_gemma, small_sae
from instruments import descriptions, labels
from lib.files import UserError
from lib.labels import default_path, groups, masked_features, read_labels, shares, write_labels
from lib.text import load_tokenizer
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
    ({"labels": ["tone"]}, r"labels is \['tone'\]; a list of style and alignment, or null"),
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
    with pytest.raises(UserError, match="no label to write"):
        write_labels(tmp_path / "out", [], sae, "hand")
    assert not (tmp_path / "out").exists()


def test_where_labels_lie(tmp_path):
    sae = load_sae("tiny/sae")
    assert default_path(sae).resolve() == ROOT / BESIDE / "labels.jsonl"
    sae.source = str(ROOT / BESIDE)
    assert default_path(sae) == ROOT / BESIDE / "labels.jsonl"
    hub = default_path(scope())
    assert hub == Path("runs/labels/google__gemma-scope-2b-pt-res/layer_12__width_1k__average_l0_21.jsonl")
    assert default_path(scope(source="")) == Path("runs/labels/sae/labels.jsonl")


def test_features_of_a_file(tmp_path):
    path = tmp_path / "mask.txt"
    path.write_text("# 4 features\n17, 3\n\n3 100 # twice\n0")
    assert masked_features(str(path)) == [0, 3, 17, 100]
    assert masked_features("17,3, 3") == [3, 17] and masked_features("") == []
    for text in ("1\n2 x", "1.5", "# none\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="number|cannot be read"):
            masked_features(str(path))
    for mask in (str(tmp_path / "absent"), str(tmp_path), ",", "x" * 999):
        with pytest.raises(UserError, match="number|cannot be read"):
            masked_features(mask)


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
    assert m["mcc"]["value"] == pytest.approx((6 * 11 - 2 * 1) / math.sqrt(8 * 7 * 13 * 12))
    assert m["mcc"]["low"] < m["mcc"]["value"] < m["mcc"]["high"] <= 1
    assert m == labels.compare_labels(a, b, "style")
    assert labels.compare_labels(b, a, "style")["confusion"] == [[6, 1], [2, 11]]
    m = labels.compare_labels(*two(0, 0, 0, 12), "style")
    assert m["confusion"] == [[0, 0], [0, 12]] and all(map(math.isnan, m["mcc"].values()))
    assert labels.compare_labels(*two(6, 0, 0, 6), "style")["mcc"]["value"] == 1.0
    with pytest.raises(UserError, match="only 9 features are judged in both"):
        labels.compare_labels(*two(3, 2, 2, 2), "style")


def test_the_interval_covers():
    """95% of samples of 200 features hold the true correlation, give or take the simulation's own error."""
    g, p = np.random.default_rng(0), np.array([.3, .1, .1, .5])
    true, hits = labels.matthews(1000 * p), 0
    for _ in range(200):
        mcc = labels.compare_labels(*two(*g.multinomial(200, p)), "style")["mcc"]
        hits += mcc["low"] <= true <= mcc["high"]
    assert 0.90 <= hits / 200 <= 0.99


# ---- rules -------------------------------------------------------------------------------------------------------

def test_rules_labels(lab, tokenizer):
    """Against a loop over tokens; a feature that fires on full stops alone is one of style."""
    from lib.judge import rule
    from lib.pairs import read_pairs
    from simpo import encode_pairs
    sae = small_sae(lab)
    pairs, _ = encode_pairs(tokenizer, read_pairs("tiny/pairs/style", "train", 4))
    found = {r["index"]: r for r in labels.rules_labels(lab, sae, tokenizer, pairs)}
    mass = {}
    for pair in pairs:
        ids = torch.tensor([pair.prompt + pair.chosen])
        f = sae.encode(lab.blocks(lab.embed(ids), 0, sae.layer + 1))[0, len(pair.prompt):].double()
        before = ""
        for i, values in zip(pair.chosen, f):
            token = tokenizer.decode([i], skip_special_tokens=False)
            kind = rule(token, before)
            mass[kind] = mass.get(kind, 0) + values
            before += token
    total = sum(mass.values())
    assert set(found) == set(total.nonzero()[:, 0].tolist()) and len(found) > 10
    for i, row in found.items():
        share = {label: sum(mass.get(kind, total * 0)[i] for kind in kinds) / total[i]
                 for label, kinds in labels.KINDS.items()}
        assert row["labels"] == [label for label in labels.LABELS if share[label] >= .5]
        most = max(mass, key=lambda kind: mass[kind][i])
        assert row["description"].startswith(f"fires on {most} {mass[most][i] / total[i]:.0%}")
    assert {label for row in found.values() for label in row["labels"]} == {"style"}


# ---- Neuronpedia's descriptions ----------------------------------------------------------------------------------

def record(index, description, layer="12-gemmascope-res-1k__l0-21", **more):
    kind = {"explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair"}
    where = {"modelId": "gemma-2-2b", "layer": layer, "index": str(index)}
    return {**where, "description": description, **kind, **more}


RECORDS = [record(4, "bold \nwords"), record(4, "later"), record(2, ""), record(2, "the  first"),
           record(2, "second"), record(9, None)]


def test_explanations_in_every_form(tmp_path):
    sae, want = scope(), {2: "the first", 4: "bold words"}
    lines = [json.dumps(r) + "\n" for r in RECORDS]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "batch-0.jsonl.gz").write_bytes(gzip.compress("".join(lines[:3]).encode()))
    (tmp_path / "folder" / "batch-1.jsonl").write_text("".join(lines[3:]))
    (tmp_path / "folder" / "notes.jsonl").write_text("no JSON")
    for name in ("x.jsonl", "x.jsonl.gz", "folder"):
        assert descriptions.read_explanations(tmp_path / name, sae) == want


BAD_EXPORTS = {
    "broken.jsonl.gz": "cannot be read", "none": "no description in it", "absent": "absent: cannot be read",
    "bad.jsonl": "line 1: not a record with modelId", "empty.jsonl": "no description in it",
    "other.jsonl": "line 1: not a record with modelId", "x.jsonl": "line 1: not a record with modelId",
}


def test_bad_explanations(tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS[1]).encode() * 9)[:-20])
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.jsonl").write_text("[]")
    (tmp_path / "x.jsonl").write_text(json.dumps(record("x", "a")))
    (tmp_path / "empty.jsonl").write_text(json.dumps(record(1, "")) + "\n")
    (tmp_path / "other.jsonl").write_text('{"index": 1}\n')
    for name, message in BAD_EXPORTS.items():
        with pytest.raises(UserError, match=message):
            descriptions.read_explanations(tmp_path / name, scope())
    for index in ("1024", "-1"):
        (tmp_path / "far.jsonl").write_text("\n".join(map(json.dumps, [record(1, "a"), record(index, "b")])))
        with pytest.raises(UserError, match=f"line 2: index is {index}; this SAE has features 0 to 1023"):
            descriptions.read_explanations(tmp_path / "far.jsonl", scope())
    records = [record(1, "a"), record(2, "b", layer="11-gemmascope-res-1k__l0-21")]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(UserError, match="line 2: explanations of gemma-2-2b/11-gemmascope-res-1k, L0 21"):
        descriptions.read_explanations(tmp_path / "two.jsonl", scope())


SCOPE = "google/gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_"
# Neuronpedia's id; the L0 of the SAE; what the sentence says (None: it fits).
SOURCES = [
    ("12-gemmascope-res-65k__l0-21", "21", None), ("12-gemmascope-res-65k", "72", None),
    ("12-gemmascope-res-65k", "21", r"res-65k, L0 72; .*needs those of layer 12, res-65k, L0 21"),
    ("12-gemmascope-res-65k__l0-72", "21", "L0 72; .* L0 21"), ("nonsense", "72", "L0 unknown; "),
    ("11-gemmascope-res-65k__l0-21", "21", "needs those of layer 12"),
    ("12-gemmascope-res-16k__l0-21", "21", "needs those of layer 12, res-65k"),
    ("12-gemmascope-mlp-65k", "72", "needs those of layer 12, res-65k"),
]


@pytest.mark.parametrize("source_id, l0, message", SOURCES)
def test_explanations_of_another_sae(source_id, l0, message):
    """The paper's own labels were those of the SAE with L0 72, used for the one with L0 21."""
    sae = scope(65536, source=SCOPE + l0)
    if message is None:
        descriptions.check_source(f"gemma-2-2b/{source_id}", sae, "f, line 1")
    else:
        with pytest.raises(UserError, match=f"f, line 1: explanations of gemma-2-2b/{source_id[:8]}.*{message}"):
            descriptions.check_source(f"gemma-2-2b/{source_id}", sae, "f, line 1")


def test_an_l0_that_is_not_known():
    check = descriptions.check_source
    check("gemma-2-2b/20-gemmascope-res-1k", scope(layer=20), "f")                # which L0 is canonical is not known
    check("gemma-2-2b/12-gemmascope-res-1k__l0-5", scope(source="somewhere"), "f")      # an SAE that names no L0
    check("gemma-2-2b/12-gemmascope-res-1m", scope(2**20, source="somewhere"), "f")


# ---- the judge ---------------------------------------------------------------------------------------------------

def test_yes_no_and_neither():
    says = descriptions.yes_or_no
    yes = ("Yes", " yes\n", "`YES`", "Yes.", "`Yes`.")
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
    """Answers before its death are kept, and only the rest is asked for."""
    monkeypatch.setenv("FSRL_JUDGE_KEY", "very-secret")
    many, raw = {i: f"bold {i}" for i in range(20)}, tmp_path / "new" / "raw"
    Endpoint.says = staticmethod(lambda prompt: expert(prompt) if len(Endpoint.asked) <= 13 else 500)
    judge = descriptions.endpoint_judge(endpoint, "wise")
    with pytest.raises(UserError, match="judge wise gave no answer .*500.*those before are kept") as error:
        judge_labels(many, judge, raw)
    assert "\n" not in str(error.value)
    assert len(lines_of(raw)) == 13
    assert "very-secret" not in raw.read_text(encoding="utf-8") + str(error.value), "the endpoint repeated it"
    before = raw.read_bytes()
    Endpoint.says, Endpoint.asked = staticmethod(expert), []
    rows = judge_labels(many, judge, raw)
    assert len(Endpoint.asked) == 27 and all(r["labels"] == ["style"] for r in rows)
    assert raw.read_bytes().startswith(before), "nothing is taken away from the file"
    assert judge_labels(many, judge, raw) == rows and len(Endpoint.asked) == 27


def test_no_endpoint(tmp_path, endpoint, monkeypatch):
    Endpoint.says = staticmethod(lambda prompt: (time.sleep(0.6), "Yes")[1])
    with pytest.raises(UserError, match="wise gave no answer .*timed out"):
        judge_labels(ABOUT, descriptions.endpoint_judge(endpoint, "wise", timeout=0.2), tmp_path / "raw")
    with pytest.raises(UserError, match="wise gave no answer"):
        judge_labels(ABOUT, descriptions.endpoint_judge("http://127.0.0.1:9/v1", "wise"), tmp_path / "raw")
    Endpoint.says, Endpoint.sent = staticmethod(expert), []
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    descriptions.endpoint_judge(endpoint, "wise")("Criterion\n\nx\n\ny")
    assert Endpoint.sent[0][2] == "Bearer no-key", "the login's token is sent to no endpoint"


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


def test_rules_and_agreement(tmp_path, tiny, command):
    options, path = tiny
    out = command("rules", *options)
    assert path.exists() and str(path) in out and "unlabelled" in out and "both" in out
    command("rules", *options, error="exists; --force replaces it, --out names another")
    before = path.read_bytes()
    command("rules", "--force", *options)
    assert path.read_bytes() == before
    hand, lines = tmp_path / "hand.jsonl", lines_of(path)
    rows = [line | {"labels": ["style"] if i < 7 else []} for i, line in enumerate(lines)]
    hand.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = command("agree", str(hand), str(path), *options).splitlines()
    style, alignment = (list(map(int, line.split()[1:5])) for line in out[1:])
    assert style[0] + style[2] == 7 and sum(style) == sum(alignment) == len(lines)


def test_judge_from_the_command_line(tmp_path, tiny, endpoint, command):
    options, path = tiny
    sae = load_sae(options[3])
    export = tmp_path / "np.jsonl"
    export.write_text("\n".join(json.dumps(record(i, text, layer="1-lab-res-0k__l0-9")) for i, text in ABOUT.items()))
    judge = ["judge", "--explanations", str(export), *options]
    for _ in range(2):
        command(*judge, "--judge", endpoint, "--judge-model", "wise", "--force")
    assert len(Endpoint.asked) == 8 and path.with_suffix(".raw.jsonl").exists()
    assert {r["by"] for r in read_labels(path, sae).values()} == {"judge wise"}
    needs = "judge needs --explanations FILE --judge http://... --judge-model NAME"
    for given in (["--judge", endpoint], ["--judge-model", "wise"], ["--judge", "localhost", "--judge-model", "wise"]):
        command(*judge, *given, error=needs)


def test_lab_from_the_command_line(tiny, monkeypatch, command):
    from tiny import features
    rows = [row(1, ["style"])], [row(2, ["alignment"]), row(3, None)]
    monkeypatch.setattr(features, "lab_labels", lambda model, tokenizer, sae: rows)
    options, path = tiny
    command("lab", *options)
    sae = load_sae(options[3])
    assert read_labels(path, sae)[1]["by"] == "lab, writes"
    assert read_labels(path.with_name("labels_reads.jsonl"), sae)[2]["by"] == "lab, reads"
    command("lab", *options, error="exists; --force replaces it")
    path.unlink()
    command("lab", *options, error="labels_reads.jsonl exists; --force replaces it")


MISTAKES = {
    "magic": "the task is magic; it has to be one of lab, rules, judge, agree, pick",
    "rules --seed -1": "--seed is -1", "agree a": "agree takes 2 more words, not 1",
    "rules x": "rules takes 0 more words", "pick tone --out x": "pick is tone; it has to be one of style, alignment",
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
    style = {i for i, r in rows.items() if "style" in r["labels"]}
    printed = command("pick", "style", "--out", str(out))
    assert set(masked_features(str(out))) == style
    assert f"{len(style)} of 1024 features, labelled style" in printed
    drawn = []
    for seed in ("0", "0", "1"):
        command("pick", "style", "--out", str(out), "--random", "200", "--seed", seed, "--force")
        drawn.append(set(masked_features(str(out))))
        assert len(drawn[-1]) == 200 and not drawn[-1] & style
    assert drawn[0] == drawn[1] != drawn[2]
    everything = labels.pick(rows, 1024, "style", random=1024 - len(style))
    assert set(everything) == set(range(1024)) - style
    with pytest.raises(UserError, match="no feature is labelled alignment"):
        labels.pick({1: row(1, ["style"])}, 32, "alignment")


def test_training_with_a_picked_mask(tmp_path, command):
    mask = tmp_path / "mask.txt"
    command("pick", "style", "--out", str(mask))
    short = ["--steps", "2", "--eval-pairs", "4", "--train-pairs", "16", "--batch-size", "4", "--lr", "0.1"]
    assert train.main([*short, "--runs", str(tmp_path), "--run", "a", "--mask", str(mask)]) == 0
    policy, masked = fsrl.load_run(tmp_path / "a").policy, masked_features(str(mask))
    v = policy.action(torch.randn(50, 128, generator=torch.Generator().manual_seed(0)) * 20)
    free = torch.ones(1024, dtype=torch.bool)
    free[masked] = False
    assert not v[:, masked].any() and v[:, free].any()
