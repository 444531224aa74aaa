"""experiments/: a run is found by what makes it, what is measured ends in the pages, the commands run."""
import json
from concurrent.futures import Future

import pytest
import torch

import analyze
import train
from common import ROOT, mutant
from experiments import bench, figures, lab, results
from lib.files import read_json
from sae import load_sae
from tiny import make


class InTurn:
    """A pool of this very process."""

    def __init__(self, *how, **more):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *how):
        pass

    def submit(self, work, *given):
        future = Future()
        future.set_result(work(*given))
        return future

    map = staticmethod(map)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---- names of runs ---------------------------------------------------------------------------------------------------

def test_every_experiment_finds_its_run():
    """The 67 runs of results.json and no others, each made by the settings in force, under a name of their own."""
    data = read_json(results.DATA)
    found = {results.key(name, seed): results.settings(name, seed)
             for name, count in results.SEEDS.items() for seed in range(count)}
    assert set(found) == set(data["runs"]) and len(found) == 67
    for key, now in found.items():
        made = data["runs"][key]["settings"]
        assert made.items() <= now.items() and isinstance(made["sae"], str)
    r = results.Results(data)
    assert all(len(r.seeds(name)) == count for name, count in results.SEEDS.items())


def with_a_setting_more(monkeypatch, module):
    """TrainConfig as it may be one day: one setting more, another order, another place for runs."""
    from dataclasses import make_dataclass
    from lib.settings import setting
    more = make_dataclass("More", [("novelty", float, setting(0.0, "..."))], bases=(train.TrainConfig,))
    monkeypatch.setattr(module, "TrainConfig", more)
    return more


def test_a_new_setting_trains_nothing_again(monkeypatch):
    before = results.key("wide null", 2)
    broken = mutant("experiments.results", (" if v != usual[k]}", "}"))
    hashing_all = broken.key("wide null", 2)
    for module in (results, broken):
        with_a_setting_more(monkeypatch, module)
    assert results.key("wide null", 2) == before and broken.key("wide null", 2) != hashing_all
    assert len(results.Results(read_json(results.DATA)).seeds("wide null")) == 3


def test_what_decides_the_outcome_is_in_the_name(monkeypatch):
    how = {"style": {}, "same": {"threads": 2, "runs": "elsewhere", "eval_pairs": 7, "keep_prefix": 0.0, "lr": 2e-3},
           "rate": {"lr": 1e-3}, "sae": {"sae": ["tiny/sae"]}, "two": {"sae": ["tiny/sae", "other"]}}
    monkeypatch.setattr(results, "EXPERIMENTS", how)
    names = {name: results.key(name, 0) for name in how}
    assert names["same"] == names["style"] == names["sae"]
    assert len({names["style"], names["rate"], names["two"], results.key("style", 1)}) == 4


def test_another_default_is_another_outcome(monkeypatch):
    """A run that was made with an older default has the same name, but does not count."""
    data = read_json(results.DATA)
    data["runs"][results.key("style", 0)]["settings"]["l1"] = 0.5
    data["runs"][results.key("style", 1)]["settings"]["a setting of old"] = True
    assert len(results.Results(data).seeds("style")) == 4
    todo = results.still_to_do(results.ResultsConfig(only=["main"]), results.Results(data))
    assert todo == [("style", 0)]


# ---- training and measuring ------------------------------------------------------------------------------------------

def test_each_kind_of_experiment_runs(tmp_path, monkeypatch):
    """Two steps long, through the code that made the tables."""
    short = {"steps": 2, "train_pairs": 16, "batch_size": 4}
    kinds = {"style": {}, "null": {"pairs": lab.COINS}, "random": {"sae": lab.RANDOM}, "constant": results.FREE}
    monkeypatch.setattr(results, "EXPERIMENTS", {name: {**how, **short} for name, how in kinds.items()})
    monkeypatch.setattr(lab, "RUNS", tmp_path)
    monkeypatch.setattr(lab, "measured", lambda model, tokenizer, policy: {"v": policy.action(states).shape})
    monkeypatch.setattr(make, "SIZES", {"train": 20, "dev": 4, "label": 4, "test": 4})
    states, threads = torch.randn(3, 128), torch.get_num_threads()
    for name in kinds:
        kept = lab.one(results.folder(name, 0), results.settings(name, 0))
        assert kept["v"] == (3, 1024) and kept["settings"]["steps"] == 2
        assert lab.finished(f"{name}-0") and not lab.finished(f"{name}-1")
    torch.set_num_threads(threads)
    base, random = load_sae("tiny/sae"), load_sae(str(tmp_path / "random_dictionary" / "layer_3"))
    assert random.W_dec.norm(dim=-1).allclose(torch.ones(1024))
    assert (random.W_dec * base.W_dec).sum(-1).abs().max() < .5


def test_the_base_model_measures_as_it_did(monkeypatch):
    """A part of the questions and pairs, against another way to count and the shape of what is kept."""
    few = lab.read_pairs
    monkeypatch.setattr(lab, "read_pairs", lambda source, split, limit: few(source, split, 12))
    monkeypatch.setattr(lab, "generate", lambda model, prompts, **how: [[5, 1]] * len(prompts))
    new, kept = lab.nothing_trained(), read_json(results.DATA)
    assert new["pairs"] == kept["pairs"] and not new["runs"]
    made, kept = new["base"], kept["base"]
    assert set(made) <= set(kept) and all(set(made[k]) == set(kept[k]) for k in ("answers", "exact", "style"))
    assert made["answers"]["count"] == 2000 and made["answers"]["parse"] == 0 and made["drift"] == 0
    assert abs(made["style"]["loss"] - kept["style"]["loss"]) < 2 and made["style"]["pairs"] == 12


def test_the_command(tmp_path, monkeypatch, capsys):
    """What is there is not trained again; what is trained is kept; the tables are written."""
    done = []
    page = tmp_path / "page.md"
    page.write_text("<!-- main -->\nold\n<!-- /main -->\n", encoding="utf-8")
    monkeypatch.setattr(results, "PAGES", [page])
    monkeypatch.setattr(results, "DATA", tmp_path / "results.json")
    data = read_json(ROOT / "docs" / "results.json")
    lost = data["runs"].pop(results.key("wide", 1))
    results.DATA.write_text(json.dumps(data), encoding="utf-8")

    def works(run, how):
        done.append(run)
        return {k: v for k, v in lost.items() if k != "name"}
    monkeypatch.setattr(results, "ProcessPoolExecutor", InTurn)
    monkeypatch.setattr(lab, "one", works)
    assert results.main(["--only", "main", "--only", "controls"]) == 0 and done == ["wide-1"]
    assert read_json(results.DATA)["runs"][results.key("wide", 1)] == lost
    assert "| `paper` | 2.72" in page.read_text(encoding="utf-8")
    assert results.main(["--only", "nothing"]) == 2 and "controls" in capsys.readouterr().err
    for seed in range(3):
        del data["runs"][results.key("imitation", seed)]
    results.DATA.write_text(json.dumps(data), encoding="utf-8")
    assert results.main(["--table"]) == 2 and "no run yet of imitation" in capsys.readouterr().err


# ---- tables and figures ----------------------------------------------------------------------------------------------

def test_filled():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    assert results.filled(text, {"x": "new\\1\n", "z": "?"}) == text.replace("old\n", "new\\1\n")


def test_spread():
    assert results.spread([1.0, 3.0], "+.1f") == "+2.0 ± 1.4" and results.spread([2.0], ".2f") == "2.00"
    assert results.spread([-1.0, -3.0], "+.1f") == "−2.0 ± 1.4"


def test_tables_by_hand():
    """A few cells, from results.json by another way."""
    data, made = read_json(results.DATA), results.blocks()
    runs = {seed: data["runs"][results.key("style", seed)] for seed in range(5)}
    truth = [run["answers"]["truth"] for run in runs.values()]
    mean = sum(truth) / 5
    sd = (sum((x - mean) ** 2 for x in truth) / 4) ** .5
    row = next(line for line in made["short"].splitlines() if line.startswith("| `style` |"))
    assert row.split(" | ")[5] == f"{mean:.3f} ± {sd:.3f}"
    base = [data["base"][world]["loss"] for world in ("style", "honest")]
    assert all(f"| base, on `{world}` | {loss:.2f} |" in made["main"] for world, loss in zip(("style", "honest"), base))
    assert "| `null` | −7.9 ± 2.5 | −2.0 ± 1.6 | −7.7 ± 2.5 | −1.4 ± 1.4 |" in made["decline"]
    honest = data["runs"][results.key("random honest", 0)]["honest"]["loss"], data["base"]["honest"]["loss"]
    assert results.Results(data).values("random honest", "home loss")[0] == honest[0] != honest[1]


def test_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    monkeypatch.setattr(results, "PAGES", [tmp_path / "page.md"])
    (tmp_path / "page.md").write_text("<!-- closing -->\n<!-- /closing -->\n", encoding="utf-8")
    assert figures.main([]) == 0
    assert "accuracy (best possible 0.817)" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in ("style", "choices", "frontier", "l1"))
    assert figures.main([str(tmp_path)]) == 2 and "is not a finished run" in capsys.readouterr().err


def test_what_a_run_printed(tmp_path, lab, monkeypatch):
    """gather takes the numbers of a run's folder, and what analyze.py prints of it."""
    monkeypatch.setattr(figures, "DOCS", tmp_path)

    def few(argv):
        return command([*argv, "--only", "usage,ledger", "--limit", "12", "--ledger-pairs", "4", "--quiet"])
    command = analyze.main
    monkeypatch.setattr(figures.analyze, "main", few)
    data = figures.gather(lab.folder)
    again = figures.gather(lab.folder)
    assert data["analysis"] == again["analysis"] and data["analysis"]["seconds"] > 0
    assert "kept" not in again["analysis"]["text"] and "Look at" not in again["analysis"]["text"]
    assert data["trained"]["step"] == 25 and data["meta"]["weights"]["heading"] == 2.5 and data["steps"]
    assert (tmp_path / "report.html").is_file()
    monkeypatch.setattr(figures, "DATA", tmp_path / "style.json")
    figures.DATA.write_text(json.dumps(data), encoding="utf-8")
    made = figures.blocks()
    assert "held-out test: 4 pairs" in made["closing"] and data["analysis"]["text"] in made["analysis"]


# ---- speed -----------------------------------------------------------------------------------------------------------

def test_variants_compute_the_same(monkeypatch):
    """The obvious implementation, ours, and ours with the prefix kept: one gradient."""
    pytest.importorskip("transformers")
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    set_threads(1)                           # on a busy machine two wait for each other
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    made = [bench.measure("tiny", variant, 1, {"pairs": 2, "features": 64}) for variant in bench.VARIANTS]
    set_threads(threads)
    sizes = [m["gradient"] for m in made]
    assert min(sizes) > 0 and max(sizes) / min(sizes) - 1 < 1e-5 and all(m["seconds"] > 0 for m in made)


def test_bench_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    asked = []

    def measured(shape, variant, repeats, changes):
        asked.append((shape, variant, changes))
        return {"seconds": {"obvious": 2.0}.get(variant, 0.5), "memory": 2**20, "gradient": 1.0}

    class Pool(InTurn):
        def submit(self, work, *given):
            return super().submit(measured, *given)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "DATA", tmp_path / "bench.json")
    monkeypatch.setattr(results, "PAGES", [])
    assert bench.main(["--rounds", "2"]) == 0
    assert len(asked) == 2 * 2 * 3 + 12 and ("mid", "cold", {"pairs": 2, "answer": (64, 64)}) in asked
    assert "| `tiny`, warm | 0.500 | 4.00× | 1 | 1.00 |" in capsys.readouterr().out
