"""train.py as its user meets it: a short run on the lab, what it leaves behind, the doors, mistakes in a sentence."""
import contextlib
import io
import json
import math
import os
import re
import shlex
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import fsrl
import simpo
import train
from common import LENGTHS, ROOT, mutant, off, relative, small_gemma, small_sae, some_pairs
from lib import show
from lib.files import UserError, read_json
from lib.pairs import read_pairs
from lib.plugins import CONFIG, SOURCE, WEIGHTS
from sae import save_sae
from train import TrainConfig

SHORT = ["--steps", "4", "--eval-pairs", "8", "--train-pairs", "60", "--batch-size", "8", "--log-every", "2",
         "--save-every", "2"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(runs, *more):
    return train.main([*SHORT, "--runs", str(runs), *map(str, more)])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run: its folder and what it printed."""
    runs, out, before = tmp_path_factory.mktemp("runs"), io.StringIO(), os.getcwd()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(out):
        assert run(runs) == 0
    os.chdir(before)
    return runs / "style-1", out.getvalue()


# ---- what a run prints and leaves behind ---------------------------------------------------------------------------

WORDS = ["SimPO loss (± s.e.)", "accuracy (best possible 0.", "margin", "L0, features", "L1 a token",
         "well-formed answers, T=1", "truth (+0.5): truthfulness", "heading (+2.5)", "(Loss 5.007 is that"]


def test_what_it_prints(finished):
    folder, text = finished
    lines = text.splitlines()
    assert "Training on tiny/pairs/style: features of tiny/sae." in lines[0]
    assert lines[1].endswith("max difference of log-probabilities 0.0")
    assert re.fullmatch(r"Trainable [\d,]+ of [\d,]+ parameters; 1024 features on layer 3", lines[2])
    assert "⟦" in text and "<end_of_turn>⟧" in text and "warning" not in text
    assert re.search(r"^ step +loss +penalty +margin +acc +L0 +L1 +lr +tokens/s$", text, re.M)
    assert re.search(r"^ +4  +\d", text, re.M)
    for words in WORDS:
        assert words in text
    # three examples, marked true or false, well-formed or not; then what to type
    assert len(re.findall(r"^base, .*(well-formed|malformed) +\| trained, ", text, re.M)) == 3
    assert f"\n    python fsrl.py {folder} --prompt " in text and f"\n    python analyze.py {folder}\n" in text


def test_what_it_leaves_behind(finished):
    folder, _ = finished
    config = read_json(folder / "config.json")
    assert {f.name for f in fields(TrainConfig)} <= set(config) and config["seed"] == 0
    assert config["sae"] == "tiny/sae" and config["device"] == "cpu" and "torch" in config["versions"]
    rows = rows_of(folder)
    assert [row.get("evaluation") for row in rows] == ["base", None, None, "trained"]
    assert [row["step"] for row in rows] == [0, 2, 4, 4]
    assert {"loss", "penalty", "margin", "accuracy", "l0", "l1", "lr", "tokens_per_s"} <= set(rows[1])
    assert {"loss", "loss_se", "accuracy", "margin", "l0", "l1", "parse_sampled", "truth", "style"} <= set(rows[-1])
    facts = read_json(folder / CONFIG)
    assert facts["layer"] == 3 and facts["positions"] == "text" and facts["step"] == 4
    assert facts["activation_type"] == "soft_threshold" and "adapter_args" not in facts
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint", CONFIG, WEIGHTS}


def evaluated(folder, count=8, **how):
    """The policy that load_run opens, on the held-out pairs of its run."""
    opened = fsrl.load_run(folder, **how)
    pairs, _ = simpo.encode_pairs(opened.tokenizer, read_pairs("tiny/pairs/style", "test", count))
    return simpo.evaluate(opened.model, pairs, opened.policy), opened


def test_the_run_opens_and_talks(finished, capsys):
    folder, _ = finished
    assert evaluated(folder)[0]["loss"] == pytest.approx(rows_of(folder)[-1]["loss"], rel=1e-6)
    assert fsrl.main([str(folder), "--prompt", "What is the color of that?", "--max-new-tokens", "8"]) == 0
    assert "| steered" in capsys.readouterr().out
    assert fsrl.main([str(folder / "none")]) == 2 and "not a finished run" in capsys.readouterr().err
    for flag, value in (("--temperature", "-1"), ("--max-new-tokens", "0"), ("--strength", "nan")):
        assert fsrl.main([str(folder), "--prompt", "x", flag, value]) == 2
        assert f"{flag} is" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Also when the prefix is computed anew each time; another seed gives another adapter."""
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--keep-prefix", 0])):
        assert run(tmp_path, "--run", name, "--eval-pairs", 2, *more) == 0
    a, b, c, d = (load_file(tmp_path / name / WEIGHTS) for name in "abcd")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["adapter_linear.weight"], c["adapter_linear.weight"])
    assert relative(d["adapter_linear.weight"], a["adapter_linear.weight"]) < 1e-4


KINDS = [
    {"--activation": "relu", "--fusion": "relu", "--positions": "response", "--top-k": "0.05"},
    {"--activation": "jumprelu", "--init": "0.001", "--loss": "hinge", "--nll-weight": "1", "--threshold-lr": "10"},
    {"--pairs": "tiny/pairs/honest", "--mask": "1,2,3", "--label-smoothing": "0.1", "--positions": "all"}]


@pytest.mark.parametrize("said", KINDS)
def test_every_kind_of_run(tmp_path, said):
    assert run(tmp_path, "--run", "mine", *(word for both in said.items() for word in both)) == 0
    policy = fsrl.load_run(tmp_path / "mine").policy
    assert policy.fusion == said.get("--fusion", "additive") and policy.positions == said.get("--positions", "text")
    assert policy.masked == ([1, 2, 3] if "--mask" in said else [])
    assert policy.top_k == (51 if "--top-k" in said else None)


def test_float64_and_bf16(tmp_path):
    for dtype in ("float64", "bfloat16"):
        assert run(tmp_path, "--dtype", dtype, "--run", dtype, "--eval-pairs", 2, "--steps", 2) == 0
        assert fsrl.load_run(tmp_path / dtype).model.norm.weight.dtype == getattr(torch, dtype)


def test_one_file_of_pairs(tmp_path, capsys):
    lines = (ROOT / "tiny" / "pairs" / "style" / "dev.jsonl").read_text().splitlines()[:40]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    assert run(tmp_path / "runs", "--pairs", tmp_path / "mine.jsonl") == 0
    assert "its last tenth is held out" in (out := capsys.readouterr().out)
    assert (tmp_path / "runs" / "mine-1" / "config.json").exists()
    # no judge that knows: no rates, the first prompts as examples
    assert "well-formed" not in out and "What moved, in answers sampled at T=1 (seed 0):\n" in out


# ---- mistakes ------------------------------------------------------------------------------------------------------

def test_help_explains_every_setting(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert "--" + f.name.replace("_", "-") in text
    for group in ("data", "policy", "objective", "optimisation", "run"):
        assert f"\n{group}:\n" in text


MISTAKES = {
    "--stepz 3": "unrecognized arguments: --stepz",
    "--steps 0": "--steps is 0; it has to be at least 1",
    "--lr -1": "--lr is -1.0; it has to be above 0",
    "--lr nan": "--lr is nan",
    "--beta x": "--beta",
    "--activation tanh": "--activation",
    "--device tpu": "--device tpu --dtype float32: cannot be used",
    "--pairs nowhere": "nowhere: no such folder",
    "--model nowhere": "nowhere: no such folder",
    "--sae nowhere": "nowhere: no such folder",
    "--sae tiny/sae tiny/sae": "two SAEs on one layer",
    "--max-length 2": "--max-length is 2",
    "--mask a": "a: cannot be read",
    "--mask 99999": "masked feature 99999",
    "--top-k 1.5": "top_k is 1.5",
    "--run a/b": "plain name",
    "--label-smoothing 0.7": "at most 0.5",
    "--label-smoothing 0.1 --loss hinge": "belongs to --loss sigmoid",
    "--eval-split nope": "no pairs of the split 'nope'",
    "--simpo-weight 0 --nll-weight 0": "nothing is left to learn from",
    "--bandwidth 0": "--bandwidth is 0.0; it has to be above 0",
    "--adapter x.py": "write FILE.py:Name",
    "--adapter none.py:A": "there is no such file",
    "--adapter a.py:A --activation relu": "--adapter replaces --activation",
    "--adapter a.py:A --policy b.py:B": "--policy replaces both",
    "--policy b.py:B --top-k 3": "--policy replaces the steering, to which the setting top_k belongs",
    "--adapter-args rank=3": "--adapter-args and --policy-args belong to",
    "--objective none.py:dpo": "--objective none.py:dpo: there is no such file",
    "--policy none.py:P": "--policy none.py:P: there is no such file",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_mistakes_cost_one_sentence(tmp_path, args, capsys):
    assert run(tmp_path / "runs", *args.split()) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert MISTAKES[args] in err[-1] and not any("Traceback" in line for line in err)
    assert not (tmp_path / "runs").exists(), "nothing is written before everything is checked"


def test_no_pair_is_left(tmp_path, capsys):
    pair = json.dumps({"prompt": "p", "chosen": "It is a.", "rejected": "It is b."}) + "\n"
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(pair)
    assert run(tmp_path / "runs", "--pairs", tmp_path, "--max-length", 4) == 2
    assert ("no pair of train is left; all 1 have the same answer twice within --max-length 4"
            in capsys.readouterr().err)


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    assert run(tmp_path, "--run", "mine") == 2 and "exists" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]


def random_sae(folder, features=16, layer=1, width=128):
    """A small SAE in FOLDER/layer_N, for a model of this width. -> its path"""
    path = folder / f"layer_{layer}"
    save_sae(small_sae(small_gemma(hidden_size=width, num_hidden_layers=1), features, layer), path)
    return path


def test_an_sae_of_another_model(tmp_path, capsys):
    assert run(tmp_path / "runs", "--sae", random_sae(tmp_path, width=24)) == 2
    assert "reads states of width 24, this model's have 128" in capsys.readouterr().err
    assert run(tmp_path / "runs", "--sae", random_sae(tmp_path, layer=9)) == 2
    assert "this model has layers 0 to 5" in capsys.readouterr().err


def test_a_loss_that_is_no_number(tmp_path, capsys, monkeypatch):
    """It stops, names the step, and keeps what was saved before."""
    real, calls = train.objective, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        preference, side, shown = real(*args, **kwargs)
        return preference * (math.nan if len(calls) == 4 else 1.0), side, shown
    monkeypatch.setattr(train, "objective", poisoned)
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    assert "is not a number at step 4" in err and "keeps the policy of step 2" in err
    assert read_json(tmp_path / "style-1" / CONFIG)["step"] == 2
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "style-1" / WEIGHTS).values())


# ---- what a run shows first ----------------------------------------------------------------------------------------

class Judge:
    """An answer's ids say it all: 1 makes the only choice, 9 breaks the text."""

    def outcome(self, text, ids):
        return {"parse": float(9 not in ids), "bold": float(1 in ids)}

    def mark(self, text, ids):
        return ["malformed"] if 9 in ids else ["well-formed"]


LETTERS = SimpleNamespace(decode=lambda ids, **_: "".join("?b.......!"[i] for i in ids))


def shown(base, trained, capsys):
    """The prompts that are shown, and all that is printed."""
    show.examples(LETTERS, Judge(), base, trained, 0)
    text = capsys.readouterr().out
    return re.findall(r"^> (.*)$", text, re.M), text


def test_examples_show_what_moved(capsys):
    """Three of twenty prompts went the way that all went, the rest stayed; one went against it."""
    base = {f"q{i}": [1 if i == 7 else 0] for i in range(20)}
    trained = base | {"q3": [1], "q11": [1], "q17": [1], "q7": [0]}
    prompts, text = shown(base, trained, capsys)
    assert prompts == ["q3", "q11", "q17"] and "base, well-formed" in text and "seed 0" in text


@pytest.mark.parametrize("how_many", [2, 15])
def test_examples_of_a_broken_policy_show_broken_text(how_many, capsys):
    """Also where what moved most is something else: text that broke in a tenth of the answers is seen."""
    base = {f"q{i}": [0] for i in range(20)}
    trained = {text: [9] if i < how_many else [1] for i, text in enumerate(base)}
    _, text = shown(base, trained, capsys)
    assert "trained, malformed" in text and "| !" in text


def test_examples_without_a_judge_are_the_first_prompts(capsys):
    judge = SimpleNamespace(outcome=lambda text, ids: {}, mark=lambda text, ids: [])
    show.examples(LETTERS, judge, {"p": [0], "q": [1]}, {"p": [1], "q": [0]}, 3)
    out = capsys.readouterr().out
    assert "chosen to show it" not in out and re.findall(r"^> (.*)$", out, re.M) == ["p", "q"]


def test_what_to_type_next_can_be_pasted(tmp_path):
    config = TrainConfig(adapter="my dir/a.py:A", objective="it's.py:dpo")
    text = show.next_commands(config, tmp_path / "a b", "What's \"$HOME\"?\nAnd so on", 3.0)
    talk, read = (shlex.split(line) for line in text.splitlines() if line.startswith("    "))
    folder = str(tmp_path / "a b")
    assert talk == ["python", "fsrl.py", folder, "--adapter", "my dir/a.py:A", "--prompt", "What's \"$HOME\"?"]
    assert read == ["python", "analyze.py", folder, "--adapter", "my dir/a.py:A", "--objective", "it's.py:dpo"]


DEAD = """
from fsrl import Adapter


class Dead(Adapter):
    def __init__(self, d_in, d_sae):
        super().__init__(d_in, d_sae, "relu")
        self.adapter_linear.weight.data.zero_()
"""


def test_a_policy_that_cannot_learn_is_told(tmp_path, capsys):
    """At exactly zero relu passes no gradient: nothing is ever steered."""
    (tmp_path / "dead.py").write_text(DEAD)
    assert run(tmp_path, "--adapter", f"{tmp_path / 'dead.py'}:Dead", "--eval-pairs", 2) == 0
    out = capsys.readouterr().out
    assert out.count("warning: L0 is 0, so no feature is steered") == 1


def test_a_penalty_that_drowns_the_preference_is_told(tmp_path, capsys):
    assert run(tmp_path, "--l1", 3, "--nll-weight", 0, "--eval-pairs", 2) == 0
    assert re.search("warning: the gradient of penalty and NLL is [0-9]{2,} times", capsys.readouterr().out)


def test_warnings_by_hand():
    """Gradients of 3 and 30 are tolerated, 3 and 31 are not; no preference, no ratio."""
    p = torch.ones(1, requires_grad=True)

    def said(preference, side, l0=1.0):
        found = show.early_warnings(p * preference, p * side, {"l0": torch.tensor([l0, 0.0])}, [p])
        return [text.split()[1] for text in found]
    assert said(3.0, 30.0) == [] and said(3.0, 31.0) == ["the"] and said(0.0, 31.0) == []
    assert said(3.0, 0.0, l0=0.0) == ["L0"]
    assert list(show.early_warnings(p * 1.0, torch.zeros(1), {}, [p])) == []


# ---- your own adapter ----------------------------------------------------------------------------------------------

LOW_RANK = """import torch
from torch import nn


class MyAdapter(nn.Module):
    def __init__(self, d_in, d_sae, rank=4):
        super().__init__()
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_sae)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return torch.relu(self.up(self.down(x)))
"""


def write_adapter(folder, source, *changes):
    """-> FILE.py:MyAdapter"""
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / "my_adapter.py").write_text(source)
    return f"{folder / 'my_adapter.py'}:MyAdapter"


def test_own_adapter(tmp_path, capsys):
    spec = write_adapter(tmp_path, LOW_RANK)
    assert run(tmp_path / "runs", "--adapter", spec) == 0
    folder = tmp_path / "runs" / "style-1"
    assert (folder / SOURCE).read_text() == (tmp_path / "my_adapter.py").read_text()
    assert f"python fsrl.py {folder} --adapter {spec} --prompt" in capsys.readouterr().out
    # opening the run asks for the class again: code in a run's folder is never imported
    (folder / SOURCE).write_text("raise SystemExit('imported!')")
    assert fsrl.main([str(folder), "--prompt", "x"]) == 2
    assert "--adapter FILE.py:MyAdapter" in capsys.readouterr().err
    assert fsrl.main([str(folder), "--prompt", "x", "--max-new-tokens", "2", "--adapter", spec]) == 0
    assert "not the source this run was trained with" in capsys.readouterr().err


def test_own_adapter_with_the_names_of_ours(tmp_path):
    """An attribute called `activation` and a helper called `projection` are the student's own business; a file beside
    the adapter's can be imported."""
    (tmp_path / "beside.py").write_text("RANK = 4\n")
    helper = "return torch.relu(self.projection(x))\n\n    def projection(self, x):\n        return self.up"
    spec = write_adapter(tmp_path, "from __future__ import annotations\nfrom beside import RANK\n" + LOW_RANK,
                         ("return torch.relu(self.up(self.down(x)))", helper + "(self.down(x))"),
                         ("rank=4):", "activation='relu'):"), ("super().__init__()", "super().__init__()\n"
                          "        self.activation, rank = activation, RANK"))
    assert run(tmp_path / "runs", "--adapter", spec, "--eval-pairs", 2) == 0
    assert fsrl.load_run(tmp_path / "runs" / "style-1", adapter=spec)


PRICE = "\n    def penalty(self, v):\n        return v.new_full((len(v),), 7.0) + 0 * v.sum(-1)\n"


def test_own_penalty_and_arguments(tmp_path):
    """A price of 7 a token is 7 a pair, times l1, in the loss; rank=2 is recorded, and opening makes it so again."""
    spec = write_adapter(tmp_path, LOW_RANK + PRICE)
    assert run(tmp_path, "--run", "a", "--adapter", spec, "--adapter-args", "rank=2", "--l1", 0.1) == 0
    assert [row["penalty"] for row in rows_of(tmp_path / "a")[1:-1]] == [pytest.approx(0.7)] * 2
    assert read_json(tmp_path / "a" / CONFIG)["adapter_args"] == {"rank": 2}
    m, opened = evaluated(tmp_path / "a", adapter=spec)
    assert opened.policy.adapter.down.weight.shape == (2, 128)
    assert m["loss"] == pytest.approx(rows_of(tmp_path / "a")[-1]["loss"], rel=1e-6)


BAD_ADAPTERS = {
    "is made by MyAdapter(128, 1024, **arguments)": ("d_in, d_sae, rank=4", "d_in"),
    "it has to be (4, 1024)": ("torch.relu(self.up(self.down(x)))", "self.down(x)"),
    "ZeroDivisionError": ("return torch", "return 1 / 0, torch"),
    "forward gave what does not depend on anything that is trained":
        ("nn.init.zeros_(self.up.weight)", "self.requires_grad_(False)"),
    "does not depend on anything that is trained":
        ("torch.relu(self.up(self.down(x)))", "self.up(self.down(x)).detach()"),
    "penality is never called; is it to be penalty?": (
        "def forward(self, x)", "def penality(self, v):\n        return v\n\n    def forward(self, x)"),
    "penalty gave (); it has to be (4,)": (
        "def forward(self, x)", "def penalty(self, v):\n        return v.sum()\n\n    def forward(self, x)"),
    "it has to be a class": ("class MyAdapter(nn.Module)", "MyAdapter = 7\n\n\nclass Other(nn.Module)"),
}


@pytest.mark.parametrize("message", BAD_ADAPTERS)
def test_own_adapters_that_do_not_work(tmp_path, message, capsys):
    assert run(tmp_path / "runs", "--adapter", write_adapter(tmp_path, LOW_RANK, BAD_ADAPTERS[message])) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


# ---- several SAEs --------------------------------------------------------------------------------------------------

def test_two_saes(tmp_path, capsys):
    """Trained, saved, opened and asked together; each adapter lies in a folder of its own."""
    second = random_sae(tmp_path)
    assert run(tmp_path, "--run", "a", "--sae", "tiny/sae", "--sae", second) == 0
    out = capsys.readouterr().out
    assert "16 features on layer 1; 1024 features on layer 3" in out and "L0, features a token (of 1040)" in out
    config = read_json(tmp_path / "a" / "config.json")
    assert config["sae"] == ["tiny/sae", str(second)] and config["d_sae"] == [16, 1024]
    assert len(set(config["sae_identity"])) == 2
    assert [read_json(tmp_path / "a" / f"layer_{n}" / CONFIG)["layer"] for n in (1, 3)] == [1, 3]
    # opened: the same numbers; both act
    m, opened = evaluated(tmp_path / "a")
    last = rows_of(tmp_path / "a")[-1]
    assert m["loss"] == pytest.approx(last["loss"], rel=1e-6) and m["l0"] == pytest.approx(last["l0"], rel=1e-6)
    assert all(s.adapter.adapter_linear.bias.abs().max() > 0 for s in opened.policy.steerings)
    assert fsrl.main([str(tmp_path / "a"), "--prompt", "x", "--max-new-tokens", "2", "--strength", "0.5"]) == 0
    assert "| steered" in capsys.readouterr().out


# ---- your own objective --------------------------------------------------------------------------------------------

LOSSES = """
from torch.nn.functional import logsigmoid


def moved(answer):
    return answer.sum - answer.base_sum


def dpo(chosen, rejected, beta=0.1):
    return -logsigmoid(beta * (moved(chosen) - moved(rejected)))


def ipo(chosen, rejected, tau=0.1):
    return (chosen.mean - chosen.base_mean - rejected.mean + rejected.base_mean - 1 / (2 * tau)) ** 2
"""


@pytest.mark.parametrize("name, start", [("dpo", math.log(2)), ("ipo", 25.0)])
def test_own_objective(tmp_path, name, start, capsys):
    """DPO and IPO: the base model is where they start; they are trained on, evaluated by, and named in the table."""
    (tmp_path / "losses.py").write_text(LOSSES)
    spec = f"{tmp_path / 'losses.py'}:{name}"
    assert run(tmp_path, "--run", "a", "--objective", spec, "--log-every", 1, "--nll-weight", 0, "--l1", 0) == 0
    rows = rows_of(tmp_path / "a")
    assert rows[0]["loss"] == pytest.approx(start, abs=1e-6) and rows[1]["loss"] == pytest.approx(start, rel=1e-3)
    assert rows[4]["loss"] < start < rows[4]["loss"] * 1.9 and rows[-1]["loss"] != rows[0]["loss"]
    out = capsys.readouterr().out
    assert f"{name} loss (± s.e.)" in out and "no preference at all" not in out
    assert f"python analyze.py {tmp_path / 'a'} --objective {spec}" in out
    assert read_json(tmp_path / "a" / "config.json")["objective"] == spec


BAD_OBJECTIVES = {
    "7": "'int' object is not callable",
    "lambda chosen, rejected: (rejected.mean - chosen.mean).mean()": "for 3 pairs it gave (); it has to be (3,)",
    "lambda chosen, rejected: None": "for 3 pairs it gave NoneType",
    "lambda chosen, rejected: chosen.total": "has no attribute 'total'",
    "lambda chosen, rejected: chosen.base_mean": "gave what does not depend on anything that is trained",
}


@pytest.mark.parametrize("source", BAD_OBJECTIVES)
def test_objectives_that_do_not_work(tmp_path, source, capsys):
    (tmp_path / "losses.py").write_text(f"mine = {source}\n")
    assert run(tmp_path / "runs", "--objective", f"{tmp_path / 'losses.py'}:mine") == 2
    assert BAD_OBJECTIVES[source] in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_the_base_models_numbers_are_computed_once_and_kept():
    """Sums of both answers of every pair by the book, whatever the batch; a second time no model is needed."""
    model, pairs, kept = small_gemma(), some_pairs(LENGTHS), {}
    want = torch.tensor([simpo.by_the_book(model, pair) for pair in pairs])

    def means_of(model, index):
        batch = simpo.collate([pairs[i] for i in index])
        return batch, train.kept_rows(kept, batch, index, lambda: simpo.base_means(model, batch).T).T
    for index in ([4, 0], [1, 2, 3, 5, 6]):
        means_of(model, index)
    index = [6, 1, 4]
    batch, means = means_of(None, index)
    assert off(means.T, want[index]) < 1e-5
    s = simpo.with_base(simpo.score(model, batch), means)
    length = torch.tensor([float(len(pairs[i].rejected)) for i in index])
    assert off(s.rejected.base_sum, want[index, 1] * length) < 1e-5


# ---- your own policy -----------------------------------------------------------------------------------------------

BIAS = """
import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Bias(nn.Module):
    positions = "text"

    def __init__(self, model, saes, weight=1.0):
        super().__init__()
        self.layer, self.frozen, self.weight = saes[0].layer, saes[0].layer + 1, weight
        self.bias = nn.Parameter(torch.zeros(saes[0].d_in))

    def forward(self, h, where):
        return h + where[..., None] * self.bias

    def run(self, model, h, batch):
        how = {"position_ids": batch.position_ids, "mask": batch.mask()}
        h = model.blocks(self(h, batch.where("text")), self.frozen, len(model.layers), **how)
        return h, self.weight * self.bias.abs().sum().expand(len(h)), {"size": self.bias.norm().expand(len(h))}

    def acting(self, model):
        return model, {self.layer: self}

    def save(self, folder, **facts):
        save_file({"bias": self.bias.detach()}, folder / "bias.safetensors")

    def load(self, folder):
        self.bias.data = load_file(folder / "bias.safetensors")["bias"]
"""


def test_own_policy(tmp_path, capsys):
    """A vector that is added everywhere goes through training, saving, opening and chat; it steers no features."""
    (tmp_path / "bias.py").write_text(BIAS)
    spec = f"{tmp_path / 'bias.py'}:Bias"
    assert run(tmp_path, "--run", "a", "--policy", spec, "--policy-args", "weight=0.5", "--l1", 0.1) == 0
    out = capsys.readouterr().out
    assert f"Training on tiny/pairs/style: {spec}." in out and "Trainable 128 of" in out and "L0, features" not in out
    rows, folder = rows_of(tmp_path / "a"), tmp_path / "a"
    assert rows[1]["size"] > 0 and rows[1]["penalty"] > 0 and rows[-1]["loss"] != rows[0]["loss"]
    assert (folder / SOURCE).read_text() == BIAS
    # opened: code is not taken from the run's word for it
    assert fsrl.main([str(folder), "--prompt", "x"]) == 2
    assert f"say where it is, --policy {spec}" in capsys.readouterr().err
    m, opened = evaluated(folder, policy=spec)
    assert m["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6) and opened.policy.weight == 0.5
    assert fsrl.main([str(folder), "--prompt", "x", "--max-new-tokens", "2", "--policy", spec]) == 0


BAD_POLICIES = {"def acting": ("def act", "it has no acting"),
                "model, saes": ("model, saes, rank", "missing 1 required positional argument: 'rank'")}


@pytest.mark.parametrize("old", BAD_POLICIES)
def test_policies_that_do_not_work(tmp_path, old, capsys):
    new, message = BAD_POLICIES[old]
    (tmp_path / "bias.py").write_text(BIAS.replace(old, new))
    assert run(tmp_path / "runs", "--policy", f"{tmp_path / 'bias.py'}:Bias") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


# ---- the loop's parts ----------------------------------------------------------------------------------------------

def test_order_of_pairs():
    """Every pair once an epoch, seeded, rows of a step of similar length."""
    pairs = some_pairs([(1 + i % 50, 3, 3) for i in range(640)])
    order = train.pair_order(pairs, 8, seed=3)
    epoch = [next(order) for _ in range(80)]
    assert sorted(i for step in epoch for i in step) == list(range(640))
    again = train.pair_order(pairs, 8, seed=3)
    assert [next(again) for _ in range(80)] == epoch and next(train.pair_order(pairs, 8, seed=4)) != epoch[0]
    lengths = [[len(pairs[i].prompt) for i in step] for step in epoch]
    assert sum(max(some) - min(some) for some in lengths) / 80 < 10
    # a remainder of 28 of 60: it is another one each epoch, not the longest
    order = train.pair_order(pairs[:60], 32, seed=0)
    assert {i for _ in range(40) for i in next(order)} == set(range(60))
    # fewer pairs than a step wants: go round
    assert [len(next(train.pair_order(pairs[:3], 8, seed=0))) for _ in range(2)] == [8, 8]


def test_learning_rate():
    config = TrainConfig(steps=100, warmup=0.1, lr=1.0)
    rates = [train.lr_at(i, config) for i in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0 and rates[99] < 0.001
    constant = TrainConfig(steps=100, warmup=0.0, lr=1.0, schedule="constant")
    assert all(train.lr_at(i, constant) == 1.0 for i in range(100))


SUMMED = ("((preference + side).sum() / len(index)).backward()", "(preference + side).mean().backward()")


@pytest.mark.parametrize("module", ["real", "summed"])
def test_accumulation_is_one_batch(tmp_path, module, monkeypatch):
    """8 x 1 = 1 x 8 through the whole script, one step from the same start. Broken: gradients summed, as in the
    authors' code."""
    m = train if module == "real" else mutant("train", SUMMED)
    adamw = torch.optim.AdamW

    def proportional(groups, lr):
        return adamw(groups, lr=lr, eps=1e3)       # a step is proportional to the gradient, so that a sum shows
    monkeypatch.setattr(torch.optim, "AdamW", proportional)
    weights = []
    how = {"steps": 1, "eval_pairs": 2, "train_pairs": 40, "grad_clip": 0.0, "lr": 1.0, "l1": 0.1, "warmup": 0.0}
    for name, size, times in (("a", 8, 1), ("b", 1, 8)):
        m.train(m.TrainConfig(**how, batch_size=size, accumulation=times, runs=str(tmp_path), run=name))
        weights.append(load_file(tmp_path / name / WEIGHTS)["adapter_linear.weight"])
    assert (relative(*weights) < 1e-3) is (module == "real")


MEANS = ("nll = -chosen.sum / length", "nll = -chosen.mean")


@pytest.mark.parametrize("module", ["real", "mean of means"])
def test_nll_is_a_mean_over_tokens(module):
    """Broken: each answer's mean, by which the tokens of short answers weigh more."""
    m = train if module == "real" else mutant("train", MEANS)
    model, pairs = small_gemma(), some_pairs([(4, 2, 3), (5, 17, 4), (3, 5, 5)])
    sae = small_sae(model)
    length = sum(len(p.chosen) for p in pairs) / len(pairs)
    with torch.no_grad():
        s = simpo.score(model, simpo.collate(pairs), fsrl.Steering(sae, fsrl.Adapter(sae.d_in, sae.d_sae)))
        preference, side, shown = m.objective(s, TrainConfig(nll_weight=2.0, simpo_weight=0.3), 0.1, length)
    logp = -shown["nll"] * torch.tensor([float(len(p.chosen)) for p in pairs])
    by_token = -logp.sum() / sum(len(p.chosen) for p in pairs)
    nll = (side - shown["penalty"]).mean() / 2.0
    assert off(preference, 0.3 * shown["loss"]) < 1e-6 and torch.equal(shown["penalty"], 0.1 * s.penalty)
    assert (off(nll, by_token) < 1e-5) is (module == "real")


def test_config_takes_a_whole_number_for_a_float_and_nothing_else():
    assert TrainConfig(lr=1).lr == 1.0
    for bad in ({"steps": 1.5}, {"lr": "1"}, {"keep_prefix": True}, {"steps": True}):
        with pytest.raises(UserError, match="it has to be of type"):
            TrainConfig(**bad)
    assert TrainConfig().sae == TrainConfig(sae=["tiny/sae"]).sae == TrainConfig(sae="tiny/sae").sae == "tiny/sae"
    assert TrainConfig(sae=["a", "b"]).sae == ["a", "b"]


# ---- presets -------------------------------------------------------------------------------------------------------

def settings_of(monkeypatch, *argv):
    found = []
    monkeypatch.setattr(train, "train", found.append)
    assert train.main(list(argv)) == 0
    return found[0]


def test_presets_are_settings_and_flags_win(monkeypatch):
    for name in ("gemma-2-2b", "gemma-2-9b"):
        config = settings_of(monkeypatch, "--preset", name)
        assert name in config.model and config.sae.startswith("google/gemma-scope-") and config.nll_weight == 0
        assert config.batch_size * config.accumulation == 32 and config.steps == math.ceil(59_876 / 32) - 1
        size, width = re.search(r"scope-(\w+)-pt.*width_(\w+)k", config.sae).groups()
        assert (size, width) in {("2b", "65"), ("9b", "16")}
    config = settings_of(monkeypatch, "--preset", "gemma-2-2b", "--lr", "1e-4", "--sae", "a", "b", "--steps", "7")
    assert (config.lr, config.sae, config.steps, config.l1) == (1e-4, ["a", "b"], 7, 0.1)
    assert settings_of(monkeypatch) == TrainConfig()


def test_a_preset_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.toml").write_text("lr = 0.01\npairs = 'tiny/pairs/honest'\n")
    config = settings_of(monkeypatch, "--preset", str(tmp_path / "mine.toml"))
    assert (config.lr, config.pairs, config.l1) == (0.01, "tiny/pairs/honest", 0.03)
    bad = {"rate = 1": "'rate' is no setting", "lr = ": "cannot be read", "lr = 'a'": "--lr is 'a'"}
    for text, message in bad.items():
        (tmp_path / "mine.toml").write_text(text + "\n")
        assert train.main(["--preset", str(tmp_path / "mine.toml")]) == 2 and message in capsys.readouterr().err
    assert train.main(["--preset", "gemma-7"]) == 2 and "one of gemma-2-2b, gemma-2-9b" in capsys.readouterr().err


def test_epochs(tmp_path):
    assert run(tmp_path, "--run", "a", "--epochs", "0.5") == 0                    # 60 pairs, 8 a step
    config = read_json(tmp_path / "a" / "config.json")
    assert config["steps"] == 4 and rows_of(tmp_path / "a")[-1]["step"] == 4
