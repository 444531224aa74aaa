"""Many trainings: a sweep chooses on dev, goes on where it stopped, and refuses what does not fit."""
import json
from dataclasses import asdict

import pytest
import torch

from common import ROOT
from experiments import frontier, peers, sweep
from lib.files import read_json, write_json
from sae import JumpReLUSAE, save_sae
from train import TrainConfig

SHORT = ["eval_pairs=24", "steps=2", "train_pairs=40", "batch_size=8", "max_length=64"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """Of layers 1 and 4, with 64 random features."""
    folder, g = tmp_path_factory.mktemp("saes"), torch.Generator().manual_seed(3)
    for layer in (1, 4):
        W = torch.nn.functional.normalize(torch.randn(64, 128, generator=g), dim=-1)
        sae = JumpReLUSAE(W.T.contiguous(), torch.zeros(64), W, torch.zeros(128), torch.ones(64), layer=layer)
        save_sae(sae, folder / f"layer_{layer}")
    return [str(folder / f"layer_{layer}") for layer in (1, 4)]


def swept(folder, saes, *more):
    return sweep.main(["--folder", str(folder), "--saes", *saes, "--fixed", *SHORT, "--processes", "1", *more])


def test_two_stages_and_again(saes, tmp_path, capsys):
    over = ["--over", "l1=0.01,0.3"]
    assert swept(tmp_path, saes, *over) == 0
    out = capsys.readouterr().out
    names = ["layer_1", "layer_4", "l1_0.01", "jumprelu_l1_0.01", "l1_0.3", "jumprelu_l1_0.3"]
    found = read_json(tmp_path / "sweep.json")
    assert [name for runs in found["stages"].values() for name in runs] == names
    assert all(f"| `{name}` |" in out for name in names) and (tmp_path / "sweep.png").stat().st_size > 1000
    losses = {name: row["loss"] for name, row in found["stages"]["1"].items()}
    assert found["best"] == min(losses, key=losses.get)
    config = read_json(tmp_path / "jumprelu_l1_0.3" / "config.json")
    assert config["sae"].endswith(found["best"]) and config["l1"] == .3 and config["activation"] == "jumprelu"
    assert config["eval_split"] == "dev" and config["steps"] == 2
    # half of a run is made again, all others are kept
    half = tmp_path / "l1_0.3" / "metrics.jsonl"
    half.write_text(half.read_text().splitlines()[0] + "\n")
    kept = (tmp_path / "l1_0.01" / "metrics.jsonl").stat().st_mtime_ns
    assert swept(tmp_path, saes, *over) == 0
    again = read_json(tmp_path / "sweep.json")["stages"]
    assert again["1"] == found["stages"]["1"] and again["2"]["l1_0.3"]["loss"] == found["stages"]["2"]["l1_0.3"]["loss"]
    assert (tmp_path / "l1_0.01" / "metrics.jsonl").stat().st_mtime_ns == kept


BAD = {"--over x=1": "train.py has no setting 'x'", "--over l1": "write name=value",
       "--over l1=-1": "l1", "--fixed steps=3": "is of other settings (steps is 2, now 3)",
       "--fixed l1=0.1": "is of other settings (l1 is 0.03, now 0.1)", "--fixed run=x": "run is the sweep's own to set"}


@pytest.mark.parametrize("given", BAD)
def test_sweeps_that_cannot_be(given, saes, tmp_path, capsys):
    (tmp_path / "layer_1").mkdir()
    config = asdict(TrainConfig(eval_split="dev", steps=2, sae=saes[0]))
    (tmp_path / "layer_1" / "config.json").write_text(json.dumps(config))
    flag, value = given.split()
    assert sweep.main(["--folder", str(tmp_path), "--saes", saes[0], "--processes", "1", flag, value]) == 2
    assert BAD[given] in capsys.readouterr().err and not (tmp_path / "sweep.json").exists()


def test_one_sae_a_layer(saes, tmp_path, capsys):
    assert swept(tmp_path, [saes[0], saes[0] + "/../layer_1"]) == 2
    assert "layer 1 has no SAE, or two" in capsys.readouterr().err


def trial(margin, parse):
    return {"base": {"parse_sampled": .98}, "trained": {"margin": margin, "parse_sampled": parse}}


def test_the_chosen_trial_keeps_its_text():
    assert frontier.chosen([trial(.2, .97), trial(.5, .60), trial(.3, .96)]) == 2
    assert frontier.chosen([trial(.5, .60), trial(.2, .70)]) == 1


def test_table_and_figure_of_the_policies(tmp_path, monkeypatch):
    """Means over seeds at strength 1, the base first; the figure has a curve for each."""
    point = dict.fromkeys((*frontier.COLUMNS, "l0"), 0.5)
    curve = {str(x): {**point, "margin": x} for x in frontier.STRENGTHS}
    curve |= {"cost": {"trainable": 1234, "flops": 5e9}, "step": 0.1}
    other = {**curve, "1.0": {**point, "margin": 2.0}}
    policies = {"LoRA": {"curves": {"LoRA-0": curve, "LoRA-0, seed 1": other}}, "Full": {"curves": {"Full-1": curve}}}
    write_json(tmp_path / "policies.json", {"base": point, "policies": policies, "made": "today"})
    monkeypatch.setattr(frontier, "DATA", tmp_path / "policies.json")
    lines = frontier.blocks()["policies"].splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["base", "LoRA", "Full"] and lines[-1] == "(today.)"
    assert "| 1.500 ± 0.707 |" in lines[3] and "| 1,234 | 5.0 |" in lines[3] and "| 1.000 |" in lines[4]
    frontier.drawn(tmp_path / "policies.png", frontier.draw, read_json(frontier.DATA))
    assert (tmp_path / "policies.png").stat().st_size > 10_000


def test_four_trials_each(monkeypatch):
    monkeypatch.setattr(frontier, "sae_of", lambda layer, folder=None: f"sae of {layer}")
    monkeypatch.setattr(frontier.lab, "random_dictionary", str)
    every = frontier.policies()
    assert len(every) == 9 and all(len(trials) == 4 for trials in every.values())
    for trials in every.values():
        assert len({repr(how) for how in trials}) == 4
        for how in trials:
            TrainConfig(**how)


def test_what_the_peers_need_is_said_first(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.main([]) == 2 and "trl is missing: pip install trl" in capsys.readouterr().err
