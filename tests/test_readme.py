"""The README's promises: its adapter trains, its links and line counts are right, its commands exist, its table is what was measured."""
import json
import re
import shlex
import sys

import pytest
import torch

import fsrl
import train
from common import ROOT
from sae import load_sae
from tiny import make

sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "tests")]
import bench  # noqa: E402
import results  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_adapter_example(tmp_path, capsys):
    """The file in "Your own adapter", as it stands there, trained by the command that stands there, at reduced size."""
    source, = [b for b in blocks("python") if "my_adapter.py" in b.splitlines()[0]]
    (tmp_path / "my_adapter.py").write_text(source, encoding="utf-8")
    command, = re.findall(r"^python train.py (--adapter .*)$", README, re.M)
    flag, spec = command.split()[:2]
    spec = str(tmp_path / spec)
    assert train.main([flag, spec, "--steps", "3", "--eval-pairs", "10", "--train-pairs", "40", "--batch-size", "8", "--runs", str(tmp_path / "runs")]) == 0
    run = fsrl.load_run(tmp_path / "runs" / "style-1", adapter=spec)
    assert type(run.steering.adapter).__name__ == spec.rpartition(":")[2]


def test_the_two_lines():
    text = "\n".join(blocks("bash"))
    assert "pip install -r requirements.txt && python train.py" in text
    assert "pip install -r requirements.txt -r requirements-extra.txt && python -m pytest" in text
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text() and "-r requirements.txt -r requirements-extra.txt" in (ROOT / ".ci" / "run").read_text()


SMALL = ["--steps", "2", "--eval-pairs", "4", "--train-pairs", "16", "--batch-size", "4"]
COMMANDS = sorted({line.strip() for line in re.findall(r"^\s*(?:\$ )?(python [^#\n]+?)\s*(?:#.*)?$", "\n".join(blocks("bash")), re.M)}
                  | {" ".join(c.split()) for c in re.findall(r"`(python [^`]+)`", README) if "..." not in c})


def test_every_command_is_known():
    known = r"python (train\.py|fsrl\.py runs/style-\d|analyze\.py|docs/results\.py|docs/figures\.py|tests/bench\.py|-m pytest|-m venv)( |$)"
    assert len(COMMANDS) > 12 and not [c for c in COMMANDS if not re.match(known, c)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py") and "my_adapter" not in c])
def test_training_commands_run(command, tmp_path, capsys):
    """At reduced size: the same options, fewer steps and pairs, a folder of its own."""
    args = shlex.split(command)[2:]
    if "--help" in args:
        assert train.main(args) == 0 and "--nll-weight" in capsys.readouterr().out
    else:
        assert train.main([*args, *SMALL, "--runs", str(tmp_path)]) == 0
        assert "The run lies in" in capsys.readouterr().out


def test_analysis_commands_are_understood():
    """Their options exist and fit; tests/test_analyze.py, test_labels.py and test_calibrate.py run them."""
    import analyze
    listed = re.findall(r"^    (python analyze.py [^#\n]+?)(?: &&.*| *#.*)?$", README.replace("\\\n", " "), re.M)
    commands = [shlex.split(c)[2:] for c in COMMANDS + listed if c.startswith("python analyze.py")]
    assert len(commands) > 6
    for args in commands:
        analyze.parser().parse_args(args)


def test_talking_commands_run(tmp_path, capsys):
    assert train.main([*SMALL, "--runs", str(tmp_path), "--run", "style-1"]) == 0
    commands = [shlex.split(c) for c in COMMANDS if c.startswith("python fsrl.py") and "--adapter" not in c]
    assert commands
    for _, _, run, *rest in commands:
        assert fsrl.main([run.replace("runs", str(tmp_path)), *rest]) == 0
        assert "base" in capsys.readouterr().out


def test_figures_command_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import figures
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(figures, "FIGURE", tmp_path / "style.png")
    monkeypatch.setattr(figures, "README", tmp_path / "README.md")
    figures.README.write_text(README, encoding="utf-8")
    assert figures.main([]) == 0
    assert figures.README.read_text(encoding="utf-8") == README
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in ("style", "choices", "frontier", "l1"))
    assert figures.main([str(tmp_path)]) == 2 and "is not a finished run" in capsys.readouterr().err


def test_results_command_runs(tmp_path, monkeypatch, capsys):
    """One experiment of each kind, two steps long, through the code that made the tables."""
    experiments = {"style": {}, "null": {"pairs": results.COINS}, "random": {"sae": results.RANDOM}, "constant": {"adapter": results.CONSTANT}}
    monkeypatch.setattr(results, "EXPERIMENTS", {n: {**how, "steps": 2, "train_pairs": 16, "batch_size": 4} for n, how in experiments.items()})
    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(results, "measured", lambda model, tokenizer, steering, split: {"l0": steering.features(torch.randn(3, 128)).shape[-1]})
    monkeypatch.setattr(make, "SIZES", {"train": 20, "dev": 4, "label": 4, "test": 4})
    for name in experiments:
        kept = results.one(name, 0, "test")
        assert kept["l0"] == 1024 and kept["settings"]["steps"] == 2 and kept["settings"]["seed"] == 0
    base, random = load_sae("tiny/sae"), load_sae(str(tmp_path / "random_dictionary" / "layer_3"))
    assert random.W_dec.norm(dim=-1).allclose(torch.ones(1024)) and (random.W_dec * base.W_dec).sum(-1).abs().max() < .5
    assert results.main(["--only", "nothing"]) == 2


@pytest.mark.parametrize("variant", ["cold", "warm"])
def test_bench_command_runs(variant, capsys):
    threads = torch.get_num_threads()
    bench.work("tiny", variant, 1, pairs=2, features=64)
    torch.set_num_threads(threads)
    m = json.loads(capsys.readouterr().out)
    assert m["seconds"] > 0 and m["flop"] > 1e6 and m["gradient"] > 0


def test_files_and_links():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / target).exists(), target
    for name, count in re.findall(r"^\|? ?`(\w+\.py)` \| (\d+) \|", README, re.M):
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 10, f"{name} has {lines} lines, README says {count}"


def test_the_table_is_what_was_measured():
    """The block between the marks is made from docs/style.json, which a run left behind with the defaults that are in force."""
    import figures
    data = json.loads(figures.DATA.read_text(encoding="utf-8"))
    assert figures.in_readme(README) == figures.table(data) and figures.in_readme(README, "analysis") == figures.analysis(data)
    defaults = train.asdict(train.TrainConfig())
    assert {k: v for k, v in data["config"].items() if k in defaults and k not in ("device", "dtype")} == {k: v for k, v in defaults.items() if k not in ("device", "dtype")}


def test_the_tables_of_results_are_what_was_measured():
    """Every block of README.md and docs/results.md is made from docs/results.json or docs/bench.json, whose runs have the defaults in force."""
    data = json.loads(results.DATA.read_text(encoding="utf-8"))
    made = {**results.Results(data).blocks(), **bench.tables(json.loads(bench.DATA.read_text(encoding="utf-8")))}
    for page in results.PAGES:
        text = page.read_text(encoding="utf-8")
        assert results.filled(text, made) == text, page
        assert set(re.findall(r"<!-- (\w+) -->", text)) - {"closing", "analysis"} <= set(made)
    used = set(re.findall(r"<!-- (\w+) -->", README + (ROOT / "docs/results.md").read_text(encoding="utf-8")))
    assert used == {*made, "closing", "analysis"}
    for name, (experiments, seeds) in results.GROUPS.items():
        for experiment in experiments:
            for seed in range(seeds):
                run = data["runs"][results.key(experiment, seed)]
                assert run["settings"] == results.settings(experiment, seed), (name, experiment)
    assert data["pairs"] == results.pairs_say()


def test_blocks_and_spread():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    assert results.filled(text, {"x": "new\\1\n", "z": "?"}) == text.replace("old\n", "new\\1\n")
    assert results.spread([1.0, 3.0], "{:+.1f}") == "+2.0 ± 1.4" and results.spread([2.0], "{:.2f}") == "2.00"


def test_every_printed_column_is_explained():
    for column in "loss penalty margin acc L0 L1 lr tokens/s".split():
        assert re.search(rf"^\| `{re.escape(column)}` \|", README, re.M), column
