"""The lab's labels and the calibration: what features write, against the model run out in full; agreement on numbers worked out by hand; resuming."""
import json

import numpy as np
import pytest
import torch

import analyze
import labels as feature_labels
from common import ROOT
from gemma import UserError
from tiny import calibrate, features, measure, world


def test_spearman_by_hand():
    assert calibrate.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1) and calibrate.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert calibrate.spearman([1, 1, 2], [5, 6, 7]) == pytest.approx(3 ** .5 / 2)           # ranks .5 .5 2 against 0 1 2
    assert np.isnan(calibrate.spearman([1, 1, 1], [1, 2, 3]))


def test_half_of_the_mass():
    mass = torch.zeros(11)
    mass[world.CHOICES.index("bold")] = 5
    mass[world.CHOICES.index("truth")] = 3
    mass[10] = 2
    assert features.labelled(mass) == (["style"], ["bold"])
    mass[10] = 3                                                                            # 5 of 11
    assert features.labelled(mass) == ([], []) and features.labelled(torch.zeros(11)) == ([], [])
    mass[:] = torch.tensor([2.0, 2, 2, 0, 0, 0, 0, 4, 0, 0, 0])                             # no choice has half, the group has
    assert features.labelled(mass) == (["style"], [])


def test_chance_gets_no_label():
    """Ten effects of noise: one in a hundred is labelled, where "beyond two standard deviations" alone would label every third. A real effect is."""
    g = torch.Generator().manual_seed(5)
    chance, noise = (torch.randn(n, 10, generator=g, dtype=torch.float64) * torch.arange(1, 11) for n in (256, 2000))
    named = [bool(features.labelled(x)[0]) for x in features.excess(noise, chance)]
    assert np.mean(named) < .03 and ((noise / chance.std(0)).abs() > 2).any(1).double().mean() > .3
    real = torch.zeros(1, 10, dtype=torch.float64)
    real[0, world.CHOICES.index("bold")] = 6 * (1 + world.CHOICES.index("bold"))
    assert features.labelled(features.excess(real, chance)[0]) == (["style"], ["bold"])


def test_moves_in_one_row_are_moves_one_by_one(lab):
    """features.log_odds against whole passes with an edit at the last token, and against the probabilities of measure.py."""
    model, sae = lab.run.model, lab.run.sae
    pairs = features.label_pairs(lab.tokenizer)[:40]
    places = features.deciding(lab.tokenizer, pairs, 2)
    assert all(len(some) == 2 for some in places.values())
    moves = torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(0))
    moves[0] = 0
    for name in ("heading", "truth", "closer"):
        ids, gone, yes = places[name][0]
        odds = features.log_odds(model, sae.layer, ids, gone, yes, moves, chunk=2)
        for k, move in enumerate(moves):
            def edit(h, where, move=move):
                h = h.clone()
                h[:, -1] += move
                return h
            edit.positions = "all"
            with torch.no_grad():
                p = model.logits(model(torch.tensor([ids]), edits={sae.layer: edit})[0, -1:])[0].double().softmax(-1)
            on, off = p[yes].sum(), 1 - p[gone + yes].sum()
            assert odds[k].item() == pytest.approx((on / off).log().item(), abs=1e-4)
    # the base model's rate of "heading" at its first deciding position is the one measure.py reads off the pair's row
    own = [p for p in pairs if list(p.prompt) == places["heading"][0][0]][:1]
    with torch.no_grad():
        rates = measure.choice_rates(model, lab.tokenizer, own)
    ids, gone, yes = places["heading"][0]
    assert torch.sigmoid(features.log_odds(model, sae.layer, ids, gone, yes, moves[:1]))[0].item() == pytest.approx(rates["heading"], abs=1e-5)


def test_committed_labels_are_the_lab_s(lab):
    """The files beside the SAE are of this SAE and cover it; three features made again from scratch are what they say."""
    folder = feature_labels.default_path(lab.run.sae).parent
    writes, reads = (feature_labels.read_labels(folder / name, lab.run.sae) for name in ("labels.jsonl", "labels_reads.jsonl"))
    assert len(writes) == len(reads) == lab.run.sae.d_sae and {r["by"] for r in writes.values()} == {"lab, writes"}
    pairs = features.label_pairs(lab.tokenizer)
    push = features.push_of(lab.run.model, lab.run.sae, pairs)
    some = [0, 100, 1023]
    unit = torch.nn.functional.normalize(lab.run.sae.W_dec[some], dim=-1) * push
    for name, places in features.deciding(lab.tokenizer, pairs, features.EACH).items():
        if name in ("bold", "admit"):
            odds = torch.stack([features.log_odds(lab.run.model, lab.run.sae.layer, *place, torch.cat([unit, -unit])) for place in places]).mean(0)
            assert ((odds[:3] - odds[3:]) / 2).tolist() == pytest.approx([writes[i]["writes"][name] for i in some], abs=2e-3)


def a_policy(weights=None, probe=None, says=None):
    weights = {**dict.fromkeys(world.CHOICES, 0.0), **(weights or {})}
    value = lambda c: (probe or {}).get(c, 0.0)      # noqa: E731
    own = {name: {c: (says or {}).get(c, 0.0) for c in (*world.CHOICES, "style", "alignment")} for name in calibrate.INSTRUMENTS}
    return {"run": "x", "kind": "style", "weights": weights, "answers": {c: .5 + .1 * weights[c] for c in world.CHOICES},
            "probe": {c: {"value": value(c), "low": value(c) - .1, "high": value(c) + .1} for c in world.CHOICES}, "instruments": {"own": {**own, "gain": {"value": 1.0}}}}


def test_planted_against_behaviour_by_hand():
    base = {"answers": dict.fromkeys(world.CHOICES, .5)}
    p = calibrate.planted(a_policy({"heading": 2.0, "closer": -1.0}), base)
    assert p["slope"] == pytest.approx(10) and p["spearman"] == pytest.approx(1) and (p["decoys_moved"], p["decoys"], p["negatives_up"], p["negatives"]) == (0, 8, 0, 1)
    off = a_policy({"heading": 2.0, "closer": -1.0})
    off["answers"] |= {"filler": .6, "closer": .7}
    assert [calibrate.planted(off, base)[k] for k in ("decoys_moved", "negatives_up")] == [1, 1]
    assert calibrate.planted(a_policy(), base)["slope"] is None


def test_agreement_by_hand():
    """The policy moves heading up and closer down; every instrument names heading, and filler, which did not move."""
    p = a_policy(probe={"heading": 2.0, "closer": -1.0}, says={"heading": 1.0, "filler": 1.0, "style": 3.0, "alignment": 1.0})
    out = calibrate.agreement(p)
    for name in calibrate.INSTRUMENTS:
        assert (out[name]["hits"], out[name]["false"], out[name]["missed"], out[name]["moved"]) == (1, 1, 1, 2) and out[name]["style_share"] == .75
    assert out["behaviour"]["style_share"] == 1
    silent = a_policy(probe={"heading": 2.0})
    silent["instruments"]["own"]["masking"] = dict.fromkeys((*world.CHOICES, "style", "alignment"))
    assert calibrate.agreement(silent)["masking"]["silent"] and calibrate.agreement(silent)["masking"]["missed"] == 1


def test_the_command_resumes(lab, tmp_path, monkeypatch, capsys):
    for name, value in {"PAIRS": 40, "LEDGER": 20, "ANSWERS": 1}.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(world, "split", lambda name, real=world.split: {k: q[:16] for k, q in real(name).items()})
    monkeypatch.setattr(measure, "read_probe", lambda tokenizer, real=measure.read_probe: {c: pairs[:20] for c, pairs in real(tokenizer).items()})
    file = tmp_path / "calibration.json"
    assert analyze.main(["--calibrate", str(lab.root / "one"), "--out", str(file), "--quiet"]) == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    p, = data["policies"].values()
    assert p["kind"] == "style, steps 25, lr 0.02" and set(p["instruments"]) == {"own"} and len(data["tables"]) >= 5          # a recipe of its own stands in a row of its own
    tokens = p["instruments"]["own"]["tokens"]
    assert sum(tokens[c]["value"] for c in world.STYLE) == pytest.approx(tokens["style"]["value"])
    assert "Do the instruments rank the choices" in capsys.readouterr().out
    monkeypatch.setattr(calibrate, "policy", lambda folder, args: pytest.fail("made twice") if folder.name == "one" else {**p, "run": folder.name})
    assert analyze.main(["--calibrate", str(lab.root / "one"), str(lab.root / "two"), "--out", str(file), "--quiet"]) == 0
    assert len(json.loads(file.read_text(encoding="utf-8"))["policies"]) == 2
    assert analyze.main(["--calibrate", "--quiet"]) == 2 and analyze.main(["--calibrate", str(tmp_path), "--quiet"]) == 2


def test_committed_calibration_is_what_its_policies_say():
    """Tables and sentences of tiny/calibration.json are made from its policies alone."""
    data = json.loads((ROOT / "tiny" / "calibration.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(analyze.plain(calibrate.tables(data)))) == data["tables"] and calibrate.sentences(data) == data["sentences"]
    assert analyze.plain(calibrate.label_agreement()) == data["labels"]
    assert data["threshold"] == calibrate.THRESHOLD


def test_only_the_lab_is_labelled_by_the_lab(lab):
    class Other:
        def token_to_id(self, token):
            return None

        def encode(self, text, **_):
            raise UserError("unknown")
    with pytest.raises(UserError):
        features.lab_labels(lab.run.model, Other(), lab.run.sae)
