"""The lab: grammar, parser, probabilities, its judge, the committed files against their aims, a miniature."""
import json
import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gemma
import simpo
from common import ROOT, mutant
from lib.judge import judge_of
from lib.pairs import read_pairs
from sae import load_sae
from tiny import judge, make, world

TINY = ROOT / "tiny"
QUALITY = json.loads((TINY / "quality.json").read_text(encoding="utf-8"))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(n=1500, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        q = world.any_question(rng, world.split("train"))
        yield q, *world.sample(q, rng), rng


def written(q, choices):
    """The text of these choices."""
    return world.sample(q, random, world.TRAITS[0], choices)[1]


def lab_judge(weights=()):
    return judge.Lab(gemma.load_tokenizer(TINY / "model"), {"weights": dict(weights)})


# ---- the world ---------------------------------------------------------------------------------------------------

def test_size_of_the_world():
    assert len(world.STYLE) >= 5 and len(world.ALIGNMENT) >= 3
    assert len(world.PEOPLE) == 60 and len(world.RELATIONS) == 6 and len(world.FACTS) == 360
    assert all(len(w) == len(set(w)) == 8 for w in world.WORDINGS.values())
    assert not set(world.PEOPLE) & set(world.NOBODY)


SHOW = """
import hashlib, random
from tiny import world as w
r = random.Random(0)
answers = [w.sample(w.any_question(r, w.split('train')), r) for _ in range(200)]
print(hashlib.sha256(repr((w.FACTS, w.split('test'), answers, w.notes(r))).encode()).hexdigest())
"""


def test_the_world_does_not_depend_on_the_process():
    """Python hashes strings anew in each process: an order taken from a set would make another world each time."""
    def shown(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        how = dict(cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return subprocess.run([sys.executable, "-c", SHOW], **how).stdout
    assert shown("1") == shown("2")


def test_splits_share_no_topic_and_no_prompt():
    splits = {name: [q for some in world.split(name).values() for q in some]
              for name in ("train", "label", "dev", "test")}
    texts = [q.text for some in splits.values() for q in some]
    assert len(texts) == len(set(texts)) == 8 * (360 + 24 * 6 + 20 * 6)
    assert len({q.text for q in splits["test"]}) >= 500
    topics = [{(q.kind, q.subject, q.relation) for q in some} for some in splits.values()]
    assert sum(map(len, topics)) == len(set.union(*topics))
    assert all(world.read_prompt(q.text) == q for q in splits["test"]) and world.read_prompt("How are you?") is None


def test_parser_inverts_the_grammar():
    tokenizer = gemma.load_tokenizer(TINY / "model")
    for q, choices, text, _ in answers():
        ids = gemma.encode_answer(tokenizer, text)
        tokens = [tokenizer.id_to_token(i) for i in ids]
        assert tokens == [*world.pieces(text), world.END] and world.parse(q, tokens) == choices
        assert gemma.encode_answer(tokenizer, written(q, choices)) == ids and gemma.decode(tokenizer, ids) == text


def test_parser_is_strict():
    vocabulary = sorted({piece for _, _, text, _ in answers(500) for piece in world.pieces(text)})
    rejected = []
    for q, choices, text, rng in answers():
        old = [*world.pieces(text), world.END]
        i = rng.randrange(len(old))
        before, after = old[:i], old[i + 1:]
        for new in (before + after, before + [old[i], old[i]] + after, before + [rng.choice(vocabulary)] + after):
            if new != old:
                parsed = world.parse(q, new)
                assert parsed != choices, "one set of choices has one writing"
                rejected.append(parsed is None)
    assert sum(rejected) / len(rejected) > 0.95
    q = world.Question("fact", world.PEOPLE[0], "color", 0)
    another = world.pieces(f"The color of {world.PEOPLE[1]} is red.")
    assert world.parse(q, [*another, world.END]) is None, "an answer about somebody else"
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
    every = everything({})
    assert len({written(q, a) for a in every}) == len(every) > 10_000
    assert math.fsum(math.exp(world.log_probability(q, a)) for a in every) == pytest.approx(1)


def test_rates_are_the_planted_ones():
    hits = {name: [] for name in world.CHOICES}
    for q, choices, _, _ in answers(6000):
        for name in hits:
            if name in choices:
                hits[name].append(world.is_on(q, name, choices[name]))
    for name, seen in hits.items():
        rate = sum(world.RATES[name]) / 2
        assert abs(sum(seen) / len(seen) - rate) < 4 * math.sqrt(rate * (1 - rate) / len(seen)), name


def chances(q, name, starts, trait):
    """Of a choice's options, by the first token of each."""
    return [(start, world.probability(q, name, i, len(starts), trait)) for i, start in enumerate(starts)]


def test_settling_splits_a_probability_exactly():
    """With the grammar's own next-token distribution as p, the shares are the log-probabilities of the choices."""
    rng, trait = random.Random(3), (1, 0)
    q = world.Question("fact", world.PEOPLE[3], "food", 2)
    for _ in range(50):
        choices, text = world.sample(q, rng, trait)
        settled = world.settles(q, choices)
        assert len(settled) == len(world.pieces(text)) + 1
        assert [name for token in settled for name, _, _ in token] == list(choices)
        for token in settled:
            # the distribution over first tokens at this point, by the chain rule downwards
            mass, p = 1.0, {}
            for name, starts, _ in token:
                for start, chance in chances(q, name, starts, trait):
                    if start is not None:
                        p[start] = p.get(start, 0) + mass * chance
                mass *= sum(chance for start, chance in chances(q, name, starts, trait) if start is None)
            # and back: the share of an empty option is its probability
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


# ---- the committed files -----------------------------------------------------------------------------------------

def test_it_is_small():
    files = [p for p in TINY.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(p.stat().st_size for p in files) < 20 * 2**20


# The README's tables.
TABLE = """\
| what | measured | aim |
|---|---|---|
| model: cross-entropy of answers, nats a token | {model[cross_entropy]:.4f} | |
| its ratio to the grammar's own entropy, {model[true_entropy]:.4f} | {model[ratio]:.3f} | ≤ 1.05 |
| share of its own samples that parse (T=1) | {model[samples_that_parse]:.1%} | ≥ 97% |
| fact questions answered truly (planted 60%) | {model[truth]:.1%} | |
| unknown people admitted, harmful requests declined (planted 55%) \
| {model[admit]:.1%}, {model[decline]:.1%} | |
| SAE: FVU | {sae[fvu]:.4f} | ≤ 0.05 |
| L0 | {sae[l0]:.1f} | ≤ 32 |
| features that are dead, of {sae[width]} | {sae[dead]:.1%} | ≤ 5% |
| loss added by its reconstruction, nats a token | {sae[loss_added]:.4f} | |

| world | tied utilities | best possible accuracy | "the longer one is chosen" |
|---|---|---|---|
"""
WORLD = "| {} | {tie_rate:.1%} | {bayes_accuracy:.1%} | {longer_accuracy:.1%} |\n"


def test_measured_quality_reaches_its_aims():
    """quality.json is what `python -m tiny.make report` measured; the README shows the same numbers, and of the pairs
    those of their meta.json."""
    model, sae = QUALITY["model"], QUALITY["sae"]
    assert model["ratio"] <= 1.05 and model["samples_that_parse"] >= 0.97
    assert sae["fvu"] <= 0.05 and sae["l0"] <= 32 and sae["width"] >= 1024 and sae["dead"] <= 0.05
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    metas = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
             for path in sorted((TINY / "pairs").glob("*/meta.json"))}
    rows = "".join(WORLD.format(name, **meta) for name, meta in metas.items())
    assert TABLE.format(**QUALITY) + rows in readme
    assert [sum(world.RATES[name]) / 2 for name in world.ALIGNMENT] == [.6, .55, .55], "as that table says"


def test_pairs_are_what_they_say():
    """Texts and choices agree; chosen is preferred at the rate that meta.json's best possible accuracy promises."""
    for name, weights in world.WORLDS.items():
        meta = json.loads((TINY / "pairs" / name / "meta.json").read_text(encoding="utf-8"))
        assert meta["weights"] == weights and meta["judge"] == "tiny.world"
        right = []
        for raw in lines_of(TINY / "pairs" / name / "train.jsonl"):
            q, (a, b) = world.read_prompt(raw["prompt"]), raw["choices"]
            assert written(q, a) == raw["chosen"] and written(q, b) == raw["rejected"] and a != b
            gap = world.utility(q, a, weights) - world.utility(q, b, weights)
            right.append(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
        assert abs(sum(right) / len(right) - meta["bayes_accuracy"]) < 4 * 0.5 / len(right) ** 0.5


def test_probe():
    lines = lines_of(TINY / "pairs" / "probe.jsonl")
    assert {raw["choice"] for raw in lines} == set(world.CHOICES)
    for raw in lines:
        q, (a, b), name = world.read_prompt(raw["prompt"]), raw["choices"], raw["choice"]
        assert q in world.split("test")[q.kind] and world.is_on(q, name, a[name]) and not world.is_on(q, name, b[name])
    probe = judge.read_probe(gemma.load_tokenizer(TINY / "model"))
    assert set(probe) == set(world.CHOICES) and {len(pairs) for pairs in probe.values()} == {60}


# ---- making it ---------------------------------------------------------------------------------------------------

@pytest.fixture
def _threads_as_they_are(monkeypatch):
    monkeypatch.setattr(make, "THREADS", torch.get_num_threads())


def test_a_miniature(tmp_path, capsys, _threads_as_they_are):
    """All stages in small, twice: the same bytes."""
    for name in "ab":
        assert make.main(["--out", str(tmp_path / name), "--scale", "0.001"]) == 0
    made = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(made) > 12 and {"model.safetensors", "params.npz", "quality.json"} <= {path.name for path in made}
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in made)
    assert "report" in capsys.readouterr().out
    # only when asked for: an SAE for every layer, and the control; those that are there stay
    assert make.main(["saes", "--out", str(tmp_path / "a"), "--scale", "0.001"]) == 0
    saes = [load_sae(path.parent) for path in sorted((tmp_path / "a" / "saes").rglob("params.npz"))]
    assert [sae.layer for sae in saes] == list(range(6)) and not (tmp_path / "b" / "saes").exists()
    drawn = torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))
    drawn = torch.nn.functional.normalize(drawn, dim=-1)
    moved = [(sae.W_dec - drawn).abs().max() for sae in (load_sae(tmp_path / "a" / "saes_frozen"), saes[3])]
    assert moved[0] < 1e-6 and moved[1] > 1e-4


def test_the_committed_pairs_come_out_again(tmp_path):
    for name, weights in world.WORLDS.items():
        make.make_pairs(tmp_path, name, weights)
    make.make_probe(tmp_path, 60)
    make.make_tokenizer(tmp_path)
    made = [*(f"pairs/{name}/{part}.jsonl" for name in world.WORLDS for part in make.SIZES), "pairs/probe.jsonl"]
    for name in made:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    tokenizer = [json.loads((at / "model" / "tokenizer.json").read_text(encoding="utf-8")) for at in (tmp_path, TINY)]
    assert tokenizer[0] == tokenizer[1]


def test_a_world_of_ones_own(tmp_path, capsys, _threads_as_they_are):
    pairs = ["pairs", "--out", str(tmp_path), "--scale", "0.01", "--world"]
    assert make.main([*pairs, "mine", "--weights", "heading=2,truth=-1"]) == 0
    meta = json.loads((tmp_path / "pairs" / "mine" / "meta.json").read_text(encoding="utf-8"))
    assert meta["weights"] == {"heading": 2.0, "truth": -1.0}
    wrong = {"mine --weights heading=2": "exists", "a/b --weights heading=2": "folder's name",
             "other --weights x=1": "is one of heading", "other --weights heading=a": "choice=number",
             "other --weights heading": "name=value", "other": "go together"}
    for options, message in wrong.items():
        assert make.main([*pairs, *options.split()]) == 2 and message in capsys.readouterr().err
    assert make.main(["sae", "--out", str(tmp_path)]) == 2 and "no such folder" in capsys.readouterr().err


def test_training_rows_ask_for_every_answer_token():
    """Each scored id is the one that follows its state within its branch; the four first ones follow the prompt."""
    rows = make.Rows(gemma.load_tokenizer(TINY / "model"), 0)
    for _ in range(20):
        ids, branch, position, scored = rows.row(1)
        for place, wanted in scored:
            after = [k for k in range(len(ids)) if position[k] == position[place] + 1
                     and branch[place] in (0, branch[k])]
            assert wanted in {ids[k] for k in after}
        if any(branch):
            first = [place for place, _ in scored[-4:]]
            assert len(set(first)) == 1 and branch[first[0]] == 0 and branch[first[0] + 1] == 1
            assert sum(b > 0 for b in branch) == sum(branch[place] > 0 for place, _ in scored) + 4


# ---- tiny/judge.py -----------------------------------------------------------------------------------------------

def test_judging_by_hand():
    lab = lab_judge({"heading": 2.0})
    q, reworded = (world.Question("fact", world.PEOPLE[0], "color", wording) for wording in (0, 5))
    unknown = world.Question("unknown", world.NOBODY[0], "pet", 0)
    true = f"# Answer\nIt is {world.FACTS[q.subject, q.relation]}."
    ids = [gemma.encode_answer(lab.tokenizer, text) for text in (true, "It is")]
    outcome = lab.outcome(q.text, ids[0])
    assert outcome == {"parse": 1, **dict.fromkeys(world.STYLE, 0), "heading": 1, "truth": 1}
    assert set(lab.outcome(q.text, ids[1]).values()) == {0}, "a malformed answer has made no choice"
    rates = lab.rates([q.text, q.text], ids)
    assert rates["parse"] == rates["truth"] == rates["heading"] == 0.5 and rates["bold"] == 0
    assert math.isnan(rates["admit"])
    assert lab.mark(q.text, ids[0]) == ["true", "well-formed"] and lab.mark(q.text, ids[1]) == ["malformed"]
    admits = gemma.encode_answer(lab.tokenizer, "I do not know.")
    assert lab.mark(unknown.text, admits) == ["admits", "well-formed"]
    assert lab.outcome("How are you?", admits) == {} and lab.mark("How are you?", admits) == []
    assert lab.weights["heading"] == 2 and lab.weights["truth"] == 0
    clusters = [lab.cluster(simpo.Pair((2,), (3,), (4,), text)) for text in (q.text, reworded.text, "?")]
    assert clusters == [(q.subject, "color"), (q.subject, "color"), (2,)]


def test_the_judge_of_the_pairs():
    lab = judge_of(TINY / "pairs" / "style", gemma.load_tokenizer(TINY / "model"))
    assert lab.name == "tiny.world" and lab.weights["heading"] > 0 and lab.best_accuracy == pytest.approx(.8168)
    assert judge_of(TINY, lab.tokenizer).name == "rules"
    assert lab.neutral(2) == lab.neutral(3)[:2] and all(lab.question(text) is None for text in lab.neutral(2))


def _lab(n=60):
    model, tokenizer = gemma.load_gemma(TINY / "model"), gemma.load_tokenizer(TINY / "model")
    return model, tokenizer, simpo.encode_pairs(tokenizer, read_pairs(TINY / "pairs" / "style", "test", n))[0]


def test_lab_rates_through_the_model():
    model, tokenizer, pairs = _lab(40)
    prompts = [list(p.prompt) for p in pairs]
    ids = gemma.generate(model, prompts, max_new_tokens=64, temperature=1.0)
    rates = lab_judge().rates([p.text for p in pairs], ids)
    assert rates["parse"] > 0.8 and len(ids) == 40


def test_decisions_are_the_answers_own():
    """Every choice of an answer comes up once; its "yes" tokens hold the first token of what was taken exactly if it
    was a yes."""
    _, tokenizer, pairs = _lab()
    for pair in pairs:
        q = world.read_prompt(pair.text)
        choices = world.parse(q, [tokenizer.id_to_token(i) for i in pair.chosen])
        settled = judge.decisions(tokenizer, q, pair.chosen)
        assert len(settled) == len(pair.chosen)
        assert [name for token in settled for name, *_ in token] == list(choices)
        for i, token in enumerate(settled):
            for name, starts, yes, index in token:
                assert set(yes) <= set(starts) and index == choices[name]
                if world.is_on(q, name, index) is not None and pair.chosen[i] in starts:
                    assert (pair.chosen[i] in yes) == world.is_on(q, name, index)
    assert judge.decisions(tokenizer, q, (5, 6, 7)) == []


def shares_of(settled, p, token):
    """What `settles` says of one token, worked out from a softmax p (V,): [(category, share in nats)]"""
    def mass(off):
        return 1 - p[list(off)].sum() if off else torch.ones((), dtype=p.dtype)
    out = []
    for category, before, after in settled:
        taken = p[token] if after is None else mass(after)
        out.append((category, (taken / mass(before)).log().item()))
    return out


def test_shares_sum_to_the_log_probability():
    """Through the model: what a token settles adds up to its log p; an answer that does not parse is all form."""
    model, tokenizer, pairs = _lab(12)
    broken = mutant("tiny/judge", ("out.append((category, off, after))", "out.append((category, (), after))"))
    lab, other, seen, off, wrong = lab_judge(), broken.Lab(tokenizer, {"weights": {}}), set(), 0.0, 0.0
    for pair in pairs:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([pair.prompt + pair.chosen])))[0, len(pair.prompt) - 1:-1]
        p, settled = logits.double().softmax(-1), lab.settles(pair.text, pair.chosen)
        assert len(settled) == len(pair.chosen)
        for row, token, entries, broke in zip(p, pair.chosen, settled, other.settles(pair.text, pair.chosen)):
            true = row[token].log().item()
            off = max(off, abs(sum(x for _, x in shares_of(entries, row, token)) - true))
            wrong = max(wrong, abs(sum(x for _, x in shares_of(broke, row, token)) - true))
            seen |= {category for category, *_ in entries}
        assert lab.settles(pair.text, (5, 6)) == [[("form", (), None)]] * 2 == lab.settles("How are you?", (5, 6))
    assert set(lab.categories) >= seen >= {"heading", "restate", "bold", "truth", "form", "value"}
    assert off < 1e-9 and wrong > .1


def test_exact_rates_by_hand():
    """Against single sequences and dense logits, the chain rule written out for the first two choices."""
    model, tokenizer, pairs = _lab(12)
    seen, vocab = {"heading": [], "opener": []}, tokenizer.token_to_id
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            with torch.no_grad():
                p = model.logits(model(torch.tensor([pair.prompt + answer])))[0, len(pair.prompt) - 1:].softmax(-1)
            heading = p[0, vocab("#")].item()
            seen["heading"].append(heading)
            openers, start, left = [vocab(t) for t in ("Sure", "Great", "Of")], 0, 1 - heading
            if answer[0] == vocab("#"):              # a heading was written: the opener is settled after it
                start, left = len(world.pieces("# Answer\n")), 1.0
            seen["opener"].append(p[start, openers].sum().item() / left)
    rates = judge.choice_rates(model, tokenizer, pairs)
    for name, values in seen.items():
        assert rates[name] == pytest.approx(sum(values) / len(values), abs=1e-5), name
    batched = judge.choice_rates(model, tokenizer, pairs, batch_size=5)
    assert all(batched[c] == pytest.approx(rates[c], abs=1e-5) for c in world.CHOICES)
    still = SimpleNamespace(acting=lambda model: (model, {3: lambda h, where: h}))
    assert judge.choice_rates(model, tokenizer, pairs, still) == rates
    moved = SimpleNamespace(acting=lambda model: (model, {3: lambda h, where: h + 9 * where[..., None]}))
    assert judge.choice_rates(model, tokenizer, pairs, moved)["heading"] != pytest.approx(rates["heading"], abs=1e-3)


def test_drift():
    """0 without steering, exactly; above 0 with it; and it is KL(steered‖base), not the other way round."""
    from instruments.health import drift
    model, tokenizer, _ = _lab(1)
    texts = lab_judge().neutral(2)
    push = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)

    def edit(h, where):
        return h + where[..., None] * 20 * push
    policies = [SimpleNamespace(acting=lambda m, e=e: (m, {3: e})) for e in (lambda h, where: h, edit)]
    assert drift(model, tokenizer, policies[0], texts) == 0
    got = drift(model, tokenizer, policies[1], texts[:1])
    ids = torch.tensor([[2, *gemma.encode_text(tokenizer, texts[0])]])
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=model.logits(model(ids, edits=e))[0, 1:])
                for e in ({3: edit}, None))
    kl = torch.distributions.kl_divergence
    assert got == pytest.approx(kl(p, q).mean().item(), rel=1e-4) and abs(kl(q, p).mean().item() / got - 1) > .02
