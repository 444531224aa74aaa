"""The lab: grammar, parser, probabilities, the committed files against their aims, and a miniature made from nothing."""
import hashlib
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

import gemma
import simpo
from common import ROOT
from gemma import encode_answer, encode_prompt, load_tokenizer
from tiny import make, measure, world

TINY = ROOT / "tiny"
QUALITY = json.loads((TINY / "quality.json").read_text())


def answers(n=1500, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        q = world.any_question(rng, world.split("train"))
        yield q, *world.sample(q, rng), rng


def test_size_of_the_world():
    assert len(world.STYLE) >= 5 and len(world.ALIGNMENT) >= 3 and len(world.PEOPLE) == 60 and len(world.RELATIONS) == 6 and len(world.FACTS) == 360
    assert all(len(w) == len(set(w)) == 8 for w in world.WORDINGS.values()) and not set(world.PEOPLE) & set(world.NOBODY)


def test_the_world_does_not_depend_on_the_process():
    """Python hashes strings anew in each process: an order taken from a set would make another world each time."""
    show = "import hashlib, random; from tiny import world as w; r = random.Random(0); print(hashlib.sha256(repr((w.FACTS, w.split('test'), "
    show += "[w.sample(w.any_question(r, w.split('train')), r) for _ in range(200)], w.notes(r))).encode()).hexdigest())"
    out = {subprocess.run([sys.executable, "-c", show], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
           for seed in ("1", "2")}
    assert len(out) == 1


def test_splits_share_no_topic_and_no_prompt():
    splits = {name: [q for some in world.split(name).values() for q in some] for name in ("train", "label", "dev", "test")}
    texts = [q.text for some in splits.values() for q in some]
    assert len(texts) == len(set(texts)) == 8 * (360 + 24 * 6 + 20 * 6) and len({q.text for q in splits["test"]}) >= 500
    topics = [{(q.kind, q.subject, q.relation) for q in some} for some in splits.values()]
    assert sum(map(len, topics)) == len(set.union(*topics))
    assert all(world.read_prompt(q.text) == q for q in splits["test"]) and world.read_prompt("How are you?") is None


def test_parser_inverts_the_grammar():
    tokenizer = load_tokenizer(TINY / "model")
    for q, choices, text, _ in answers():
        ids = encode_answer(tokenizer, text)
        tokens = [tokenizer.id_to_token(i) for i in ids]
        assert tokens == [*world.pieces(text), world.END] and world.parse(q, tokens) == choices
        assert encode_answer(tokenizer, world.write(q, choices)) == ids and gemma.decode(tokenizer, ids) == text


def test_parser_is_strict():
    vocabulary = sorted({piece for _, _, text, _ in answers(500) for piece in world.pieces(text)})
    rejected = tried = 0
    for q, choices, text, rng in answers():
        old = [*world.pieces(text), world.END]
        i = rng.randrange(len(old))
        for new in (old[:i] + old[i + 1:], old[:i] + [old[i]] + old[i:], old[:i] + [rng.choice(vocabulary)] + old[i + 1:]):
            if new != old:
                parsed = world.parse(q, new)
                assert parsed != choices, "one set of choices has one writing"
                tried, rejected = tried + 1, rejected + (parsed is None)
    assert rejected / tried > 0.95
    q = world.Question("fact", world.PEOPLE[0], "color", 0)
    assert world.parse(q, [*world.pieces(f"The color of {world.PEOPLE[1]} is red."), world.END]) is None, "an answer about somebody else"
    assert world.parse(q, world.pieces("It is red.")) is None, "no end"


def test_probabilities_sum_to_one():
    """Every answer to a question, by walking the whole grammar."""
    q = world.Question("unknown", world.NOBODY[0], "pet", 3)

    def everything(fixed):
        seen = []

        def choose(name, options):
            if name in fixed:
                return fixed[name]
            seen.append((name, len(options)))
            return None
        if world._run(q, choose):
            return [fixed]
        name, n = seen[0]
        return [one for i in range(n) for one in everything({**fixed, name: i})]
    all_answers = everything({})
    assert len({world.write(q, a) for a in all_answers}) == len(all_answers) > 10_000
    assert math.fsum(math.exp(world.log_probability(q, a)) for a in all_answers) == pytest.approx(1)


def test_rates_are_the_planted_ones():
    hits = {name: [] for name in world.CHOICES}
    for q, choices, _, _ in answers(6000):
        for name in hits:
            if name in choices:
                hits[name].append(world.is_on(q, name, choices[name]))
    for name, seen in hits.items():
        rate = sum(world.RATES[name]) / 2
        assert abs(sum(seen) / len(seen) - rate) < 4 * math.sqrt(rate * (1 - rate) / len(seen)), name


def test_settling_splits_a_probability_exactly():
    """With the grammar's own next-token distribution as p, the shares are the log-probabilities of the choices, and sum to log p(token)."""
    rng, trait = random.Random(3), (1, 0)
    q = world.Question("fact", world.PEOPLE[3], "food", 2)
    for _ in range(50):
        choices, text = world.sample(q, rng, trait)
        settled = world.settles(q, choices)
        assert len(settled) == len(world.pieces(text)) + 1 and [name for token in settled for name, _, _ in token] == list(choices)
        for token in settled:
            # the distribution over first tokens at this point, by the chain rule downwards
            mass, p = 1.0, {}
            for name, starts, index in token:
                chance = [world.probability(q, name, i, len(starts), trait) for i in range(len(starts))]
                for start, c in zip(starts, chance):
                    if start is not None:
                        p[start] = p.get(start, 0) + mass * c
                mass *= sum(c for start, c in zip(starts, chance) if start is None)
            mass = 1.0
            for name, starts, index in token:
                if starts[index] is None:
                    stop = sum(p[start] for start in set(starts) - {None})
                    share = (mass - stop) / mass
                    assert share == pytest.approx(world.probability(q, name, index, len(starts), trait))
                    mass -= stop


def test_minimal_pairs():
    rng = random.Random(1)
    for name in world.CHOICES:
        for _ in range(20):
            kind = {"truth": "fact", "admit": "unknown", "decline": "harm"}.get(name, "fact")
            q = rng.choice(world.split("test")[kind])
            (a, _), (b, _) = world.minimal_pair(q, rng, name)
            assert world.is_on(q, name, a[name]) and not world.is_on(q, name, b[name])
            assert all(a[n] == b[n] for n in set(a) & set(b) - {name})


# ---- the committed files -------------------------------------------------------------------------------------------------------

def test_manifest():
    manifest = json.loads((TINY / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((TINY / name).read_bytes()).hexdigest() == digest, name
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file() and p.suffix != ".pyc") < 20 * 2**20


def test_measured_quality_reaches_its_aims():
    """quality.json is what `tiny/make.py report` measured; the README shows the same numbers."""
    model, sae = QUALITY["model"], QUALITY["sae"]
    assert model["ratio"] <= 1.05 and model["samples_that_parse"] >= 0.97
    assert sae["fvu"] <= 0.05 and sae["l0"] <= 32 and sae["width"] >= 1024 and sae["dead"] <= 0.05
    assert QUALITY["parser"]["damaged_answers_rejected"] >= 0.95
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    for shown in (f"{model['ratio']:.3f}", f"{model['samples_that_parse']:.1%}", f"{sae['fvu']:.4f}", f"{sae['l0']:.1f}", *(f"{w['bayes_accuracy']:.1%}" for w in QUALITY["worlds"].values())):
        assert f"| {shown} |" in readme


def test_pairs_are_what_they_say():
    """Texts and choices agree, chosen is preferred at the rate that meta.json's best possible accuracy promises."""
    for name, weights in world.WORLDS.items():
        meta = json.loads((TINY / "pairs" / name / "meta.json").read_text())
        assert meta["weights"] == weights and meta["judge"] == "tiny.world"
        right = n = 0
        for line in (TINY / "pairs" / name / "train.jsonl").read_text().splitlines():
            raw = json.loads(line)
            q, (a, b) = world.read_prompt(raw["prompt"]), raw["choices"]
            assert world.write(q, a) == raw["chosen"] and world.write(q, b) == raw["rejected"] and a != b
            gap = world.utility(q, a, weights) - world.utility(q, b, weights)
            right, n = right + (1.0 if gap > 0 else 0.5 if gap == 0 else 0.0), n + 1
        assert abs(right / n - meta["bayes_accuracy"]) < 4 * 0.5 / n ** 0.5


def test_probe():
    lines = [json.loads(line) for line in (TINY / "pairs" / "probe.jsonl").read_text().splitlines()]
    assert {raw["choice"] for raw in lines} == set(world.CHOICES)
    for raw in lines:
        q, (a, b) = world.read_prompt(raw["prompt"]), raw["choices"]
        assert q in world.split("test")[q.kind] and world.is_on(q, raw["choice"], a[raw["choice"]]) and not world.is_on(q, raw["choice"], b[raw["choice"]])


# ---- making it -------------------------------------------------------------------------------------------------------------------

def test_a_miniature(tmp_path, capsys):
    """All stages in small, twice: the same bytes."""
    small = ["--model-steps", "3", "--sae-steps", "4", "--sae-rows", "60", "--scale", "0.005", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        for name in "ab":
            assert make.main(["--out", str(tmp_path / name), *small]) == 0
    finally:
        torch.set_num_threads(threads)
    a, b = (json.loads((tmp_path / name / "manifest.json").read_text())["sha256"] for name in "ab")
    assert a == b and len(a) > 12
    assert "| world | tied utilities" in capsys.readouterr().out


def test_the_committed_pairs_come_out_again(tmp_path):
    for name, weights in world.WORLDS.items():
        make.make_pairs(tmp_path, name, weights, make.SIZES)
        for part in make.SIZES:
            assert (tmp_path / "pairs" / name / f"{part}.jsonl").read_bytes() == (TINY / "pairs" / name / f"{part}.jsonl").read_bytes()
    make.make_tokenizer(tmp_path)
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text()) == json.loads((TINY / "model" / "tokenizer.json").read_text())


def test_a_world_of_ones_own(tmp_path, capsys):
    command = ["pairs", "--out", str(tmp_path), "--world", "mine", "--weights", "heading=2,truth=-1", "--scale", "0.01", "--threads", str(torch.get_num_threads())]
    assert make.main(command) == 0
    assert json.loads((tmp_path / "pairs" / "mine" / "meta.json").read_text())["weights"] == {"heading": 2.0, "truth": -1.0}
    assert make.main(command) == 2 and "exists" in capsys.readouterr().err
    for bad, message in (("x=1", "'x' is no choice"), ("heading=a", "not of the form")):
        assert make.main(["pairs", "--out", str(tmp_path), "--world", "other", "--weights", bad]) == 2 and message in capsys.readouterr().err


def test_training_rows_are_the_chat_format():
    """make.py builds its rows from pieces, for speed; they are what encode_prompt and encode_answer give."""
    tokenizer = load_tokenizer(TINY / "model")
    rows = make.Rows(tokenizer.get_vocab(), 0)
    for q, _, text, _ in answers(50):
        assert [tokenizer.token_to_id("<bos>"), *rows.turn(q)] == encode_prompt(tokenizer, q.text)
        assert [*rows.ids(text), tokenizer.token_to_id("<end_of_turn>")] == encode_answer(tokenizer, text)


def test_behaviour_counts():
    q, bad = world.Question("fact", world.PEOPLE[0], "color", 0), ["It", world.END]
    true = [*world.pieces(f"# Answer\nIt is {q.truth}."), world.END]
    b = world.behaviour([q, q], [true, bad])
    assert b["parse"] == b["truth"] == b["heading"] == 0.5 and b["bold"] == 0 and math.isnan(b["admit"])


def test_lab_rates_through_the_model():
    records = simpo.read_pairs(TINY / "pairs" / "style", "test", 40)
    meta, judge = simpo.judge_of(TINY / "pairs" / "style")
    assert judge is world and meta["weights"]["heading"] > 0 and simpo.judge_of(TINY)[1] is None
    model, tokenizer = gemma.load_gemma(TINY / "model"), load_tokenizer(TINY / "model")
    questions = [world.read_prompt(r["prompt"]) for r in records]
    rates, ids = simpo.behave(model, tokenizer, questions, world, temperature=1.0)
    assert rates["parse"] > 0.8 and len(ids) == 40


# ---- tiny/measure.py ---------------------------------------------------------------------------------------------------

def _lab(n=60):
    model, tokenizer = gemma.load_gemma(TINY / "model"), load_tokenizer(TINY / "model")
    return model, tokenizer, simpo.encode_pairs(tokenizer, simpo.read_pairs(TINY / "pairs" / "style", "test", n))[0]


def test_decisions_are_the_answers_own():
    """Every judged choice of an answer comes up once, and its "yes" tokens hold the first token of what was taken exactly if it was a yes."""
    _, tokenizer, pairs = _lab()
    for pair in pairs:
        q = world.read_prompt(pair.text)
        choices = world.parse(q, [tokenizer.id_to_token(i) for i in pair.chosen])
        settled = measure.decisions(tokenizer, q, pair.chosen)
        assert len(settled) == len(pair.chosen)
        assert [name for token in settled for name, *_ in token] == list(choices)
        for i, token in enumerate(settled):
            for name, starts, yes, index in token:
                assert set(yes) <= set(starts) and index == choices[name]
                if world.is_on(q, name, index) is not None and pair.chosen[i] in starts:
                    assert (pair.chosen[i] in yes) == world.is_on(q, name, index)
    assert measure.decisions(tokenizer, q, (5, 6, 7)) == []


def test_exact_rates_by_hand():
    """Against single sequences and dense logits, where the chain rule is written out for the first two choices; a wrong steering would show."""
    model, tokenizer, pairs = _lab(12)
    seen = {"heading": [], "opener": []}
    vocab = tokenizer.token_to_id
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            q = world.read_prompt(pair.text)
            p = model.logits(model(torch.tensor([pair.prompt + answer])))[0, len(pair.prompt) - 1:].softmax(-1)
            heading = p[0, vocab("#")].item()
            seen["heading"].append(heading)
            openers, left = [vocab(t) for t in ("Sure", "Great", "Of")], 1 - heading
            if answer[0] == vocab("#"):              # a heading was written: the opener is settled after it
                start, left = len(world.pieces("# Answer\n")), 1.0
            else:
                start = 0
            seen["opener"].append(p[start, openers].sum().item() / left)
            assert q
    rates = measure.choice_rates(model, tokenizer, pairs)
    for name, values in seen.items():
        assert rates[name] == pytest.approx(sum(values) / len(values), abs=1e-5), name
    batched = measure.choice_rates(model, tokenizer, pairs, batch_size=5)
    assert all(batched[c] == pytest.approx(rates[c], abs=1e-5) for c in world.CHOICES)


def test_drift():
    """0 without steering, exactly; above 0 with it; and it is KL(steered‖base), not the other way round."""
    model, tokenizer, _ = _lab(1)
    push = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)

    def edit(h, where):
        return h + where[..., None] * 20 * push
    assert measure.drift(model, tokenizer, {3: lambda h, where: h}, texts=2) == 0
    got = measure.drift(model, tokenizer, {3: edit}, texts=1)
    rng = random.Random("neutral 0")
    ids = torch.tensor([[2, *gemma.encode_text(tokenizer, world.notes(rng))]])
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=model.logits(model(ids, edits=e))[0, 1:]) for e in ({3: edit}, None))
    kl = torch.distributions.kl_divergence
    assert got == pytest.approx(kl(p, q).mean().item(), rel=1e-4) and abs(kl(q, p).mean().item() / got - 1) > .02


def test_probe_reads():
    probe = measure.read_probe(load_tokenizer(TINY / "model"))
    assert set(probe) == set(world.CHOICES) and {len(pairs) for pairs in probe.values()} == {60}
