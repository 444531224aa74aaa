"""train.py as its user meets it: a short run on the lab, what it leaves behind, and every mistake in one sentence."""
import json
import re
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

import fsrl
import simpo
import train
from common import ROOT, mutant, off, relative, small_gemma, small_sae, some_pairs
from gemma import UserError
from train import TrainConfig

SHORT = ["--steps", "4", "--eval-pairs", "24", "--train-pairs", "60", "--batch-size", "8", "--log-every", "2", "--save-every", "2"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(tmp_path, *more):
    return train.main([*SHORT, "--runs", str(tmp_path), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run, its folder and what it printed."""
    import contextlib
    import io
    import os
    runs, out, here = tmp_path_factory.mktemp("runs"), io.StringIO(), os.getcwd()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(out):
        assert run(runs) == 0
    os.chdir(here)
    return runs / "style-1", out.getvalue()


def test_what_it_prints(finished):
    folder, text = finished
    lines = text.splitlines()
    assert "Training an FSRL adapter" in lines[0] and "some seconds on 2 CPU cores" in lines[0]
    assert "max difference of log-probabilities 0.0" in lines[1] and re.search(r"Trainable [\d,]+ of [\d,]+ parameters", lines[2])
    assert "⟦" in text and "<end_of_turn>⟧" in text
    assert re.search(r"^ step +loss +penalty +margin +acc +L0 +L1 +lr +tokens/s$", text, re.M) and re.search(r"^ +4  +\d", text, re.M)
    for words in ("SimPO loss (± s.e.)", "accuracy (best possible 0.", "margin", "L0, features", "L1 a token", "well-formed answers, T=1", "truth (+0.5): truthfulness", "heading (+2.5)"):
        assert words in text
    assert text.count("base  ") >= 3 and "| steered" in text and f"python fsrl.py {folder} --prompt" in text


def test_what_it_leaves_behind(finished):
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert set(f.name for f in fields(TrainConfig)) <= set(config) and config["seed"] == 0 and "torch" in config["versions"] and config["device"] == "cpu"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("evaluation") for row in rows] == ["base", None, None, "trained"] and [row["step"] for row in rows] == [0, 2, 4, 4]
    assert {"loss", "penalty", "margin", "accuracy", "l0", "l1", "lr", "tokens_per_s"} <= set(rows[1])
    assert {"loss", "loss_se", "accuracy", "margin", "l0", "l1", "parse_greedy", "parse_sampled", "truth", "style"} <= set(rows[-1])
    facts = json.loads((folder / fsrl.CONFIG).read_text())
    assert facts["layer"] == 3 and facts["positions"] == "text" and facts["step"] == 4 and facts["activation_type"] == "soft_threshold"


def test_the_run_opens_and_talks(finished, capsys):
    folder, _ = finished
    opened = fsrl.load_run(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = simpo.read_pairs("tiny/pairs/style", "test", 24)
    m = simpo.evaluate(opened.model, simpo.encode_pairs(opened.tokenizer, records)[0], opened.steering)
    assert m["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert fsrl.main([str(folder), "--prompt", "What is the color of that?", "--max-new-tokens", "8"]) == 0
    assert "| steered" in capsys.readouterr().out
    assert fsrl.main([str(folder / "none")]) == 2 and "not a finished run" in capsys.readouterr().err
    for flag, value in (("--temperature", "-1"), ("--max-new-tokens", "0"), ("--strength", "nan")):
        assert fsrl.main([str(folder), "--prompt", "x", flag, value]) == 2 and f"{flag} is" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Also when the prefix is computed anew each time; another seed gives another adapter."""
    assert run(tmp_path, "--run", "a") == run(tmp_path, "--run", "b") == run(tmp_path, "--run", "c", "--seed", "1") == 0
    a, b, c = (load_file(tmp_path / name / fsrl.WEIGHTS) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["adapter_linear.weight"], c["adapter_linear.weight"])
    d = train.train(TrainConfig(steps=4, eval_pairs=24, train_pairs=60, batch_size=8, runs=str(tmp_path), keep_prefix=0.0))
    d = load_file(f"{d['run']}/{fsrl.WEIGHTS}")
    assert relative(d["adapter_linear.weight"], a["adapter_linear.weight"]) < 1e-4


@pytest.mark.parametrize("more", [["--activation", "relu", "--fusion", "relu", "--positions", "response", "--top-k", "0.05"],
                                  ["--activation", "jumprelu", "--init", "0.001", "--loss", "hinge", "--nll-weight", "1", "--threshold-lr", "10"],
                                  ["--pairs", "tiny/pairs/honest", "--mask", "1,2,3", "--label-smoothing", "0.1", "--positions", "all", "--schedule", "linear"]])
def test_every_kind_of_run(tmp_path, more, capsys):
    assert run(tmp_path, *more) == 0
    folder = tmp_path / ("honest-1" if "--pairs" in more else "style-1")
    opened = fsrl.load_run(folder)
    said = dict(zip(more[::2], more[1::2]))
    assert opened.steering.fusion == said.get("--fusion", "additive") and opened.steering.positions == said.get("--positions", "text")
    assert opened.steering.masked == ([1, 2, 3] if "--mask" in more else []) and opened.steering.top_k == (51 if "--top-k" in more else None)


def test_help_explains_every_setting(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert "--" + f.name.replace("_", "-") in text
    for group in {f.metadata["group"] for f in fields(TrainConfig)}:
        assert f"\n{group}:\n" in text


@pytest.mark.parametrize("args, message", [
    (["--stepz", "3"], "unrecognized arguments: --stepz"), (["--steps", "0"], "--steps is 0; it has to be at least 1"), (["--lr", "-1"], "--lr is -1.0; it has to be above 0"),
    (["--lr", "nan"], "--lr is nan"), (["--beta", "x"], "--beta"), (["--activation", "tanh"], "--activation"), (["--device", "tpu"], "--device tpu cannot be used"),
    (["--pairs", "nowhere"], "nowhere: no such folder"), (["--model", "nowhere"], "nowhere: no such folder"), (["--sae", "nowhere"], "nowhere: no such folder"),
    (["--max-length", "2"], "--max-length is 2"), (["--mask", "a"], "--mask is 'a'"), (["--mask", "99999"], "masked feature 99999"),
    (["--top-k", "1.5"], "--top-k is 1.5"), (["--run", "a/b"], "plain name"), (["--label-smoothing", "0.7"], "at most 0.5"), (["--label-smoothing", "0.1", "--loss", "hinge"], "belongs to --loss sigmoid"), (["--adapter", "x.py"], "FILE.py:ClassName"),
    (["--adapter", "none.py:A"], "there is no file"), (["--eval-split", "nope"], "no pairs of the split 'nope'"),
    (["--simpo-weight", "0", "--nll-weight", "0"], "nothing is left to learn from"), (["--bandwidth", "0"], "--bandwidth is 0.0; it has to be above 0"),
])
def test_mistakes_cost_one_sentence(tmp_path, args, message, capsys):
    assert train.main([*SHORT, "--runs", str(tmp_path / "runs"), *args]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and not any("Traceback" in line for line in err)
    assert not (tmp_path / "runs").exists(), "nothing is written before everything is checked"


def test_no_pair_is_left(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "It is a.", "rejected": "It is b."}) + "\n")
    (tmp_path / "test.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    assert run(tmp_path / "runs", "--pairs", str(tmp_path), "--max-length", "4") == 2
    assert "no pair of train is left; all 1 have the same answer twice within --max-length 4" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    assert run(tmp_path, "--run", "mine") == 2 and "exists" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]
    assert [train.new_folder(TrainConfig(runs=str(tmp_path))).name for _ in range(3)] == ["style-1", "style-2", "style-3"]


def test_an_sae_of_another_model(tmp_path, capsys):
    from common import small_sae
    from sae import save_sae
    save_sae(small_sae(small_gemma()), tmp_path / "layer_1")
    assert run(tmp_path / "runs", "--sae", str(tmp_path / "layer_1")) == 2 and "reads states of width 24, this model's have 128" in capsys.readouterr().err
    wide = small_sae(small_gemma(hidden_size=128, num_hidden_layers=1))
    save_sae(wide, tmp_path / "layer_9")
    assert run(tmp_path / "runs", "--sae", str(tmp_path / "layer_9")) == 2 and "belongs to layer 9; this model has layers 0 to 5" in capsys.readouterr().err


def test_a_loss_that_is_no_number(tmp_path, capsys, monkeypatch):
    """It stops, names the step, and keeps what was saved before."""
    real, calls = train.objective, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        total, shown = real(*args, **kwargs)
        return total * (float("nan") if len(calls) == 4 else 1.0), shown
    monkeypatch.setattr(train, "objective", poisoned)
    assert run(tmp_path) == 1
    assert "is not a number at step 4" in (err := capsys.readouterr().err) and "keeps the adapter of step 2" in err
    assert json.loads((tmp_path / "style-1" / fsrl.CONFIG).read_text())["step"] == 2
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "style-1" / fsrl.WEIGHTS).values())


# ---- your own adapter --------------------------------------------------------------------------------------------------------

def write_adapter(tmp_path, body):
    path = tmp_path / "my_adapter.py"
    path.write_text("import torch\nfrom torch import nn\n\n\nclass MyAdapter(nn.Module):\n" + body)
    return f"{path}:MyAdapter"


LOW_RANK = """    def __init__(self, d_in, d_sae):
        super().__init__()
        self.down, self.up = nn.Linear(d_in, 4, bias=False), nn.Linear(4, d_sae)
        nn.init.zeros_(self.up.weight)
    def forward(self, x):
        return torch.relu(self.up(self.down(x)))
"""


def test_own_adapter_with_the_names_of_ours(tmp_path):
    """Attributes called `activation` and `project` are the student's own business; a dataclass and a file beside it work."""
    (tmp_path / "beside.py").write_text("RANK = 4\n")
    spec = write_adapter(tmp_path, LOW_RANK.replace("        self.down", "        self.activation, self.project = 'relu', nn.Linear(RANK, 2)\n        self.down"))
    (tmp_path / "my_adapter.py").write_text("from __future__ import annotations\nfrom beside import RANK\n" + (tmp_path / "my_adapter.py").read_text())
    assert run(tmp_path / "runs", "--adapter", spec) == 0 and fsrl.load_run(tmp_path / "runs" / "style-1", adapter=spec)


def test_float64_and_bf16(tmp_path):
    for dtype in ("float64", "bfloat16"):
        assert run(tmp_path, "--dtype", dtype, "--run", dtype, "--eval-pairs", "8") == 0
        assert fsrl.load_run(tmp_path / dtype).model.norm.weight.dtype == getattr(torch, dtype)


def test_one_file_of_pairs(tmp_path, capsys):
    lines = (ROOT / "tiny" / "pairs" / "style" / "dev.jsonl").read_text().splitlines()[:40]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    assert run(tmp_path / "runs", "--pairs", str(tmp_path / "mine.jsonl")) == 0
    assert "its last 4 of 40 pairs are held out" in capsys.readouterr().out and (tmp_path / "runs" / "mine-1" / "config.json").exists()


def test_own_adapter(tmp_path, capsys):
    spec = write_adapter(tmp_path, LOW_RANK)
    assert run(tmp_path / "runs", "--adapter", spec) == 0
    folder = tmp_path / "runs" / "style-1"
    assert (folder / fsrl.SOURCE).read_text() == (tmp_path / "my_adapter.py").read_text()
    assert f"python fsrl.py {folder} --adapter {spec} --prompt" in capsys.readouterr().out
    # opening the run asks for the class again: code in a run's folder is never imported
    (folder / fsrl.SOURCE).write_text("raise SystemExit('imported!')")
    assert fsrl.main([str(folder), "--prompt", "x"]) == 2 and "--adapter FILE.py:MyAdapter" in capsys.readouterr().err
    assert fsrl.main([str(folder), "--prompt", "x", "--max-new-tokens", "2", "--adapter", spec]) == 0
    assert "not the source this run was trained with" in capsys.readouterr().err


@pytest.mark.parametrize("body, message", [
    (LOW_RANK.replace("d_in, d_sae):\n        super", "d_in):\n        super"), "is made by MyAdapter"), (LOW_RANK.replace("return torch.relu(self.up(self.down(x)))", "return self.down(x)"), "it has to be (4, 1024)"),
    (LOW_RANK.replace("return torch", "return 1 / 0, torch"), "ZeroDivisionError"), ("    def __init__(self, a, b):\n        super().__init__()\n        self.b = b\n    def forward(self, x):\n        return x.new_zeros(len(x), self.b)\n", "no parameter to train"),
])
def test_own_adapters_that_do_not_work(tmp_path, body, message, capsys):
    assert run(tmp_path / "runs", "--adapter", write_adapter(tmp_path, body)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


# ---- the loop's parts --------------------------------------------------------------------------------------------------------

def test_order_of_pairs():
    """Every pair once an epoch, seeded, rows of a step of similar length."""
    pairs = some_pairs([(1 + i % 50, 3, 3) for i in range(640)])
    order = train.pair_order(pairs, 8, seed=3)
    epoch = [next(order) for _ in range(80)]
    assert sorted(i for step in epoch for i in step) == list(range(640))
    some, seen = pairs[:60], set()                       # a remainder of 28: it is another one each epoch, not the longest
    order = train.pair_order(some, 32, seed=0)
    for _ in range(40):
        seen |= set(next(order))
    assert seen == set(range(60))
    again = train.pair_order(pairs, 8, seed=3)
    assert [next(again) for _ in range(80)] == epoch and next(train.pair_order(pairs, 8, seed=4)) != epoch[0]
    width = lambda some: max(len(pairs[i].prompt) for i in some) - min(len(pairs[i].prompt) for i in some)      # noqa: E731
    assert sum(map(width, epoch)) / 80 < 10
    assert [len(next(train.pair_order(pairs[:3], 8, seed=0))) for _ in range(2)] == [8, 8]


def test_learning_rate():
    config = TrainConfig(steps=100, warmup=0.1, lr=1.0)
    rates = [train.lr_at(i, config) for i in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0 and rates[99] < 0.001
    assert all(train.lr_at(i, TrainConfig(steps=100, warmup=0.0, lr=1.0, schedule="constant")) == 1.0 for i in range(100))


@pytest.mark.parametrize("module", ["real", "summed"])
def test_accumulation_is_one_batch(tmp_path, module):
    """8 x 1 = 1 x 8 through the whole script, plain SGD-like: one step from the same start. Broken: gradients summed, as in the authors' code."""
    m = train if module == "real" else mutant("train", ("(total.sum() / len(index)).backward()", "total.mean().backward()"))
    weights = []
    for name, size, times in (("a", 8, 1), ("b", 1, 8)):
        # without a clip and with huge eps AdamW's step is proportional to the gradient, so that a sum shows
        torch_adamw = torch.optim.AdamW
        m.torch.optim.AdamW = lambda groups, lr: torch_adamw(groups, lr=lr, eps=1e3)      # noqa: B023
        try:
            m.train(m.TrainConfig(steps=1, eval_pairs=4, train_pairs=40, batch_size=size, accumulation=times, grad_clip=0.0, lr=1.0, l1=0.1, warmup=0.0,
                                  runs=str(tmp_path / module), run=name))
        finally:
            m.torch.optim.AdamW = torch_adamw
        weights.append(load_file(tmp_path / module / name / fsrl.WEIGHTS)["adapter_linear.weight"])
    assert (relative(weights[0], weights[1]) < 1e-3) is (module == "real")


@pytest.mark.parametrize("module", ["real", "mean of means"])
def test_nll_is_a_mean_over_tokens(module):
    """Broken: each answer's mean, by which the tokens of short answers weigh more."""
    m = train if module == "real" else mutant("train", ("config.nll_weight / length * chosen * batch.lengths[:len(chosen)]", "config.nll_weight * chosen"))
    model = small_gemma()
    sae = small_sae(model)
    pairs = some_pairs([(4, 2, 3), (5, 17, 4), (3, 5, 5)])
    steering = fsrl.Steering(sae, fsrl.Adapter(sae.d_in, sae.d_sae))
    length = sum(len(p.chosen) for p in pairs) / len(pairs)
    with torch.no_grad():
        total, shown = m.objective(model, simpo.collate(pairs), steering, TrainConfig(nll_weight=2.0), 0.1, length)
        logp = -shown["nll"] * torch.tensor([float(len(p.chosen)) for p in pairs])
    by_token = -logp.sum() / sum(len(p.chosen) for p in pairs)
    nll = (total - shown["loss"] - shown["penalty"]).mean() / 2.0
    assert (off(nll, by_token) < 1e-5) is (module == "real")
    with torch.no_grad():
        alone, shown = train.objective(model, simpo.collate(pairs), steering, TrainConfig(nll_weight=2.0, simpo_weight=0.0), 0.1, length)
    assert off((alone - shown["penalty"]).mean(), 2 * by_token) < 1e-5


def test_config_takes_a_whole_number_for_a_float_and_nothing_else():
    assert TrainConfig(lr=1).lr == 1.0
    for bad in ({"steps": 1.5}, {"lr": "1"}, {"keep_prefix": True}, {"steps": True}):
        with pytest.raises(UserError, match="it has to be of type"):
            TrainConfig(**bad)
