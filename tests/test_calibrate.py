"""The lab's labels and the calibration: what features write, against the model run out in full; an instrument against
behaviour on numbers worked out by hand; resuming."""
import json

import numpy as np
import pytest
import torch

from common import ROOT, mutant
from gemma import UserError
from lib import labels as label_file
from tiny import calibrate, features, judge, world


def test_half_of_the_mass():
    mass = torch.zeros(11)
    mass[world.CHOICES.index("bold")] = 5
    mass[world.CHOICES.index("truth")] = 3
    mass[10] = 2
    assert features.labelled(mass) == (["style"], ["bold"])
    mass[10] = 3                                                                            # 5 of 11
    assert features.labelled(mass) == ([], []) and features.labelled(torch.zeros(11)) == ([], [])
    mass[:] = torch.tensor([2.0, 2, 2, 0, 0, 0, 0, 4, 0, 0, 0])                             # no choice, but the group
    assert features.labelled(mass) == (["style"], [])


def test_chance_gets_no_label():
    """Ten effects of noise: one in a hundred is labelled, where "beyond two standard deviations" alone would label
    every third. A real effect is."""
    g = torch.Generator().manual_seed(5)
    scale = torch.arange(1, 11)
    chance, noise = (torch.randn(n, 10, generator=g, dtype=torch.float64) * scale for n in (256, 2000))
    assert np.mean([bool(features.labelled(x)[0]) for x in features.excess(noise, chance)]) < .03
    assert ((noise / chance.std(0)).abs() > 2).any(1).double().mean() > .3
    real = torch.zeros(1, 10, dtype=torch.float64)
    real[0, world.CHOICES.index("bold")] = 6 * (1 + world.CHOICES.index("bold"))
    assert features.labelled(features.excess(real, chance)[0]) == (["style"], ["bold"])


def moved_in_full(model, layer, ids, off, yes, move):
    """The log-odds of one move from a whole pass with an edit at the last token."""
    def edit(h, where):
        h = h.clone()
        h[:, -1] += move
        return h
    edit.positions = "all"
    with torch.no_grad():
        p = model.logits(model(torch.tensor([ids]), edits={layer: edit})[0, -1:])[0].double().softmax(-1)
    return (p[yes].sum() / (1 - p[off + yes].sum())).log().item()


def test_moves_in_one_row_are_moves_one_by_one(lab):
    """features.log_odds against whole passes, and against the exact rates of the judge."""
    model, sae = lab.run.model, lab.run.policy.sae
    pairs = features.label_pairs(lab.tokenizer)[:40]
    places = features.deciding(lab.tokenizer, pairs, 2)
    assert all(len(some) == 2 for some in places.values())
    moves = 3 * torch.randn(8, sae.d_in, generator=torch.Generator().manual_seed(0))
    moves[0] = 0
    blind, wrong = mutant("tiny/features", ("mask[n:, n:] = torch.eye(M, dtype=torch.bool)", "pass")), 0.0
    for name in ("heading", "truth", "closer"):
        ids, off, yes = places[name][0]
        true = [moved_in_full(model, sae.layer, ids, off, yes, move) for move in moves]
        in_one_row = features.log_odds(model, sae.layer, ids, off, yes, moves)
        assert in_one_row.tolist() == pytest.approx(true, abs=1e-4)
        mixed = blind.log_odds(model, sae.layer, ids, off, yes, moves).tolist()
        wrong = max(wrong, *(abs(a - b) for a, b in zip(mixed, true)))
    assert wrong > 1e-3, "copies that see each other are another row"
    # the base model's rate of "heading" at its first deciding position is the one read off the pair's row
    ids, off, yes = places["heading"][0]
    own = [p for p in pairs if list(p.prompt) == ids][:1]
    odds = features.log_odds(model, sae.layer, ids, off, yes, moves[:1])
    rates = judge.choice_rates(model, lab.tokenizer, own)
    assert torch.sigmoid(odds)[0].item() == pytest.approx(rates["heading"], abs=1e-5)


def test_committed_labels_are_the_lab_s(lab):
    """The files beside the SAE are of this SAE and cover it; three features made again from scratch are what they
    say."""
    model, sae = lab.run.model, lab.run.policy.sae
    folder = label_file.default_path(sae).parent
    writes, reads = (label_file.read_labels(folder / name, sae) for name in ("labels.jsonl", "labels_reads.jsonl"))
    assert len(writes) == len(reads) == sae.d_sae and {r["by"] for r in writes.values()} == {"lab, writes"}
    pairs = features.label_pairs(lab.tokenizer)
    some, push = [0, 100, 1023], features.push_of(model, sae, pairs)
    unit = torch.nn.functional.normalize(sae.W_dec[some], dim=-1) * push
    places = features.deciding(lab.tokenizer, pairs, features.EACH)
    for name in ("bold", "admit"):
        odds = [features.log_odds(model, sae.layer, *place, torch.cat([unit, -unit])) for place in places[name]]
        effect = torch.stack(odds).mean(0)
        made = ((effect[:3] - effect[3:]) / 2).tolist()
        assert made == pytest.approx([writes[i]["writes"][name] for i in some], abs=2e-3)


def test_what_a_feature_reads_is_what_its_tokens_settle(lab):
    """On a few pairs, against a loop over tokens; the committed file says the same of what fires most."""
    model, sae = lab.run.model, lab.run.policy.sae
    pairs = features.label_pairs(lab.tokenizer)[:6]
    mass, names = torch.zeros(sae.d_sae, 11, dtype=torch.float64), [*world.CHOICES, None]
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + answer])
            with torch.no_grad():
                f = sae.encode(model.blocks(model.embed(ids), 0, sae.layer + 1))[0, len(pair.prompt):].double()
            q = world.read_prompt(pair.text)
            for row, settled in zip(f, judge.decisions(lab.tokenizer, q, answer)):
                made = [name for name, *_ in settled if name in names] or [None]
                for name in made:
                    mass[:, names.index(name)] += row / len(made)
    assert torch.allclose(features.reads(model, sae, lab.tokenizer, pairs), mass, atol=1e-3)


def test_only_the_lab_is_labelled_by_the_lab(lab):
    class Other:
        def token_to_id(self, token):
            return None
    with pytest.raises(UserError, match="its own model"):
        features.lab_labels(lab.run.model, Other(), lab.run.policy.sae)


# ---- the calibration ---------------------------------------------------------------------------------------------

def a_policy(probe=None, says=None):
    """A made-up policy: every instrument says the same."""
    changes = {c: (probe or {}).get(c, 0.0) for c in world.CHOICES}
    measured = {"probe": {c: {"value": x, "low": x - .1, "high": x + .1} for c, x in changes.items()}}
    said = {"own": {name: (says or {}).get(name, 0.0) for name in calibrate.SETS}}
    return {"measured": measured | dict.fromkeys(calibrate.INSTRUMENTS, said)}


def test_instruments_against_behaviour_by_hand():
    """The policy moves heading up and closer down; every instrument names heading, and filler, which did not move."""
    p = a_policy(probe={"heading": 2.0, "closer": -1.0, "bold": .05},
                 says={"heading": 1.0, "filler": 1.0, "style": 3.0, "alignment": 1.0})
    for name in calibrate.INSTRUMENTS:
        x = calibrate.against_behaviour(p, name)
        assert [x[n] for n in ("found", "wrong", "moved")] == [1, 1, 2] and x["style"] == .75 and x["behaviour"] == 1
    assert calibrate.against_behaviour(p, "writes")["rank"] != calibrate.against_behaviour(p, "tokens")["rank"]
    silent = a_policy(probe={"heading": 2.0})
    silent["measured"]["masking"] = {"own": {}}
    x = calibrate.against_behaviour(silent, "masking")
    assert np.isnan(x["rank"]) and np.isnan(x["style"]) and x["found"] == 0 and x["moved"] == 1


def test_what_it_says_of_an_instrument():
    """The sentence that a verdict quotes has the numbers of the table "How much of it is style?"."""
    p = a_policy(probe={"heading": 3.0, "truth": 1.0}, says={"style": .9, "alignment": .1})
    told = calibrate.compared({"policies": {"style-0": p}})
    said = calibrate.sentences(told)
    assert set(said) == set(calibrate.INSTRUMENTS)
    assert said["tokens"] == ("In the lab, where 75% of what a policy changed was style, the token ledger said 90%; "
                              "of 2.0 choices that moved it named 0.0, and 0.0 others.")
    styles = next(t for t in calibrate.tables(told, {}) if t["title"] == "How much of it is style?")
    assert styles["rows"] == [["style", 1, "0.75", *["0.90"] * 5]]
    assert calibrate.sentences({"mine": told["style"]}) == {}


@pytest.fixture
def small(monkeypatch):
    """A calibration of seconds."""
    monkeypatch.setattr(calibrate, "PAIRS", 40)
    monkeypatch.setattr(calibrate, "LEDGER", 20)
    probe = judge.read_probe
    monkeypatch.setattr(calibrate, "read_probe", lambda tokenizer: {c: p[:20] for c, p in probe(tokenizer).items()})


def test_the_command_resumes(lab, tmp_path, monkeypatch, capsys, small):
    file = tmp_path / "calibration.json"
    command = [str(lab.root / "one"), "--out", str(file)]
    assert calibrate.main(command) == 0
    data, first = (json.loads(file.read_text(encoding="utf-8")) for _ in "12")
    p = first["policies"]["one"]
    assert [table["rows"][0][0] for table in first["tables"]] == ["one", "one", "one", "style"]
    tokens = p["measured"]["tokens"]["own"]
    assert sum(tokens[c] for c in world.STYLE) == pytest.approx(tokens["style"])
    assert set(p["measured"]) == {"probe", *calibrate.INSTRUMENTS}
    assert str(file) in capsys.readouterr().out

    def fails(*_):
        pytest.fail("measured twice")
    # A new instrument measures nothing else again, and other runs are not touched.
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "probe", fails)
        asks = {name: fails for name in calibrate.INSTRUMENTS} | {"masking": lambda m: {"heading": len(m.pairs)}}
        patch.setattr(calibrate, "INSTRUMENTS", asks)
        del data["policies"]["one"]["measured"]["masking"]
        file.write_text(json.dumps(data), encoding="utf-8")
        assert calibrate.main(command) == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["policies"]["one"]["measured"]["masking"] == {"own": {"heading": 40}}
    # Another adapter under the same name is measured anew.
    data["policies"]["one"]["adapter"] = "another"
    file.write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.setattr(calibrate, "probe", lambda *_: p["measured"]["probe"])
    assert calibrate.main(command) == 0
    again = json.loads(file.read_text(encoding="utf-8"))["policies"]["one"]
    assert again["adapter"] == p["adapter"] and again["measured"]["masking"] == p["measured"]["masking"]


def test_what_it_refuses(tmp_path, capsys):
    for command, message in (([], "name runs"), (["--tables", "x"], "name runs"), ([str(tmp_path)], "config.json")):
        assert calibrate.main([*command, "--out", str(tmp_path / "c.json")]) == 2
        assert message in capsys.readouterr().err


def test_committed_calibration_is_what_its_policies_say(tmp_path):
    """Tables, sentences and trust of tiny/calibration.json are made from its policies alone, by --tables."""
    committed = (ROOT / "tiny" / "calibration.json").read_text(encoding="utf-8")
    copy = tmp_path / "calibration.json"
    copy.write_text(committed, encoding="utf-8")
    assert calibrate.main(["--tables", "--out", str(copy)]) == 0
    assert json.loads(copy.read_text(encoding="utf-8")) == json.loads(committed)
