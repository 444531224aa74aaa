"""Other policies: off they are the base model, by hand they are what they say, and the loop, chat and analysis take
them."""
import re

import pytest
import torch

import fsrl
import simpo
import train
from common import LENGTHS, ROOT, lively_adapter, mutant, off, relative, small_gemma, small_sae, some_pairs
from experiments import baselines
from experiments.baselines import block_numbers
from gemma import generate
from lib.files import UserError
from lib.pairs import read_pairs
from lib.settings import key_values
from simpo import by_the_book, collate, score, simpo_loss

FILE = "experiments/baselines.py"
PAIRS = some_pairs(LENGTHS)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def made(kind, model, module=baselines, **how):
    policy = getattr(module, kind)(model, [small_sae(model)], **how)
    if hasattr(policy, "fit"):
        policy.fit(model, PAIRS)
    return policy


def moved(policy, size=.05):
    """As after a training."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in train.trainable(policy):
            p.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return policy


@torch.no_grad()
def rows(model, policy=None):
    s = score(model, collate(PAIRS), policy)
    return torch.stack([s.chosen.mean, s.rejected.mean], 1)


def sampled(model, policy=None):
    acting, edits = policy.acting(model) if policy else (model, None)
    return generate(acting, [p.prompt for p in PAIRS], max_new_tokens=6, edits=edits, temperature=1.0)


KINDS = {"Constant": {}, "MeanDifference": {}, "ConditionalMap": {"top": 8}, "LoRA": {"rank": 2, "blocks": "1-"},
         "Full": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_base_model(kind):
    """At strength 0, bit for bit, in scores and in answers; at 1 it is not; what runs is what acts."""
    model = small_gemma()
    policy = moved(made(kind, model, **KINDS[kind]))
    base, words = rows(model), sampled(model)
    on = rows(model, policy)
    assert off(on, base) > 1e-4 and sampled(model, policy) != words
    with torch.no_grad():
        book = torch.tensor([by_the_book(model, pair, policy) for pair in PAIRS])
    assert off(on, book) < 2e-5
    policy.strength = 0.0
    assert torch.equal(rows(model, policy), base) and sampled(model, policy) == words
    policy.strength = 1.0
    assert torch.equal(rows(model, policy), on)


@pytest.mark.parametrize("kind", ["Constant", "LoRA", "Full"])
def test_untrained_is_the_base_model(kind):
    model = small_gemma()
    assert torch.equal(rows(model, made(kind, model)), rows(model))


def test_a_lora_that_begins_elsewhere_is_told():
    model = small_gemma()
    broken = mutant("experiments.baselines", ("torch.zeros(out, rank,", "torch.ones(out, rank,"))
    assert not torch.equal(rows(model, made("LoRA", model, broken)), rows(model))


@pytest.mark.parametrize("change", [None, ("2 * self.strength * (self.B", "self.strength * (self.B")])
def test_merged_matrices_do_the_same(change):
    model, x = small_gemma(), torch.randn(5, 24)
    module = mutant("experiments.baselines", change) if change else baselines
    policy = moved(made("LoRA", model, module, rank=3, blocks=(0, 2), matrices="q_proj,up_proj"))
    attention, mlp = policy.tuned.layers[2].self_attn, policy.tuned.layers[2].mlp
    for changed in (attention.q_proj, mlp.up_proj):
        assert (off(x @ changed.merged().T, changed(x)) < 1e-5) is (change is None)
    # where, and nowhere else
    assert len(policy.changes) == 4 and policy.frozen == 0
    assert policy.tuned.layers[1] is not model.layers[1] and not hasattr(policy.tuned.layers[1].mlp.up_proj, "A")
    assert attention.k_proj.weight is model.layers[2].self_attn.k_proj.weight          # shared, not copied
    assert {n.rpartition(".")[2] for n in policy.learned()} == {"A", "B"} and len(policy.learned()) == 8


def test_all_gradients_of_full_fine_tuning():
    """Against transformers' and autograd's through dense logits, the tied embedding among them."""
    pytest.importorskip("transformers", reason="needs requirements-extra.txt")
    from golden import oracle
    model = small_gemma(4, torch.float64)
    policy, theirs, sums = made("Full", model), oracle(model, torch.float64).requires_grad_(True), []
    for pair in PAIRS:
        for answer in (pair.chosen, pair.rejected):
            logp = theirs(torch.tensor([pair.prompt + answer])).logits.log_softmax(-1)[0]
            before = torch.arange(len(pair.prompt) - 1, len(pair.prompt) + len(answer) - 1)
            sums.append(logp[before, torch.tensor(answer)].mean())
    simpo_loss(*torch.stack(sums).view(-1, 2).T, 2.0).mean().backward()
    s = score(model, collate(PAIRS), policy)
    simpo_loss(s.chosen.mean, s.rejected.mean, 2.0).mean().backward()
    wanted = dict(theirs.model.named_parameters())
    for name, p in policy.tuned.named_parameters():
        assert relative(p.grad, wanted[name].grad) < 5e-5, name
    assert all(p.grad is None for p in model.parameters())


# ---- what is measured instead of trained ---------------------------------------------------------------------------

def states(model, ids, layer):
    return model.blocks(model.embed(torch.tensor([ids])), 0, layer + 1)[0]


def test_the_mean_difference_by_hand():
    model, gaps = small_gemma(), []
    for p in PAIRS:
        n = len(p.prompt)
        means = [states(model, p.prompt + answer, 1)[n:].mean(0) for answer in (p.chosen, p.rejected)]
        gaps.append(means[0] - means[1])
    policy = made("MeanDifference", model, strength=3.0)
    assert off(policy.vector, torch.stack(gaps).mean(0)) < 1e-5
    assert not train.trainable(policy) and list(policy.learned()) == ["vector"]
    other = mutant("experiments.baselines", ("chosen - rejected).sum(0)", "chosen).sum(0)"))
    assert off(made("MeanDifference", model, other).vector, policy.vector) > 1e-2


def test_the_conditional_map_by_hand():
    """Loops over pairs and features; the features that are not steered stay."""
    model = small_gemma()
    policy, sae = made("ConditionalMap", model, top=5, strength=2.0), small_sae(model)
    fires, differs = [], []
    for p in PAIRS:
        n = len(p.prompt)
        f = [sae.encode(states(model, p.prompt + a, 1)) for a in (p.chosen, p.rejected)]
        fires.append((f[0][1:n] > 0).any(0))
        differs.append(f[0][n:].mean(0) - f[1][n:].mean(0))
    fires, differs = torch.stack(fires), torch.stack(differs)
    steered = differs.mean(0).abs().topk(5).indices
    assert set(policy.adapter.steered.tolist()) == set(steered.tolist())
    x, want = torch.randn(4, 24) * 2, torch.zeros(4, 32)
    active = sae.encode(x) > 0
    for token in range(4):
        for j in steered.tolist():
            if active[token, j]:
                means = [differs[fires[:, i], j].mean() if fires[:, i].any() else torch.tensor(0.0)
                         for i in range(32) if active[token, i]]
                want[token, j] = 2.0 * sum(means) / len(means)
    assert off(policy.action(x), want) < 1e-5 and (want != 0).any()


# ---- steering twice ------------------------------------------------------------------------------------------------

def test_two_layers_with_one_adapter_at_zero_are_one_layer():
    model = small_gemma()
    low, high = small_sae(model, layer=1), small_sae(model, layer=2, seed=5)
    one = fsrl.Steering(low, lively_adapter(low))
    silent = fsrl.Steering(high, lively_adapter(high))
    silent.strength = 0.0
    both = fsrl.Steerings([silent, one])
    assert off(rows(model, both), rows(model, one)) < 1e-6 < off(rows(model, one), rows(model))
    silent.strength = 1.0
    assert off(rows(model, both), rows(model, one)) > 1e-4


# ---- through the loop ----------------------------------------------------------------------------------------------

LIES = {"a prefix that is not frozen": ("self._strength = min(numbers)", "self._strength = max(numbers)"),
        "answers of the base model": ("return self.tuned, None", "return model, None")}


@pytest.mark.parametrize("lie", [None, *LIES])
def test_a_policy_that_lies_is_caught(lie):
    """Before it is trained, when it still is the base model."""
    model = small_gemma()
    module = mutant("experiments.baselines", LIES[lie]) if lie else baselines
    policy = made("LoRA", model, module, rank=2, blocks="1-")
    if lie:
        with pytest.raises(UserError, match="`run` trains is not what `acting` does"):
            train.check_policy(model, policy, PAIRS, "x.py:Liar")
    assert lie or train.check_policy(model, policy, PAIRS, "x.py:LoRA") == 0
    assert torch.equal(rows(model, policy), rows(model))               # moved back


SHORT = ["--steps", "3", "--eval-pairs", "24", "--train-pairs", "60", "--batch-size", "8", "--lr", "0.01"]


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_opened(kind, tmp_path, capsys):
    arguments = {"ConditionalMap": ["strength=0.5"], "LoRA": ["rank=2", "blocks=4-"]}.get(kind, [])
    given = ["--policy-args", *arguments] if arguments else []
    spec, folder = f"{FILE}:{kind}", tmp_path / "a"
    assert train.main([*SHORT, "--runs", str(tmp_path), "--run", "a", "--policy", spec, *given]) == 0
    last = [line for line in capsys.readouterr().out.splitlines() if "SimPO loss" in line][-1]
    opened = fsrl.load_run(folder, policy=spec)
    pairs, _ = simpo.encode_pairs(opened.tokenizer, read_pairs("tiny/pairs/style", "test", 24))
    loss = simpo.evaluate(opened.model, pairs, opened.policy)["loss"]
    base = simpo.evaluate(opened.model, pairs)["loss"]
    assert f"{loss:.3f}" in last.split("±")[2] and abs(loss - base) > 1e-6
    assert fsrl.main([str(folder), "--policy", spec, "--strength", "0", "--prompt", "x", "--max-new-tokens", "3"]) == 0


def test_the_analysis_of_a_policy_without_features(tmp_path, capsys):
    """The ledger by token adds up for tuned weights; what asks about features says why it has nothing to say."""
    import analyze
    spec, folder = f"{FILE}:LoRA", tmp_path / "a"
    args = [*SHORT, "--runs", str(tmp_path), "--run", "a", "--policy", spec, "--policy-args", "rank=2"]
    assert train.main(args) == 0
    found = analyze.analyze(folder, policy=spec, only="ledger", limit=24, quiet=True)["ledger"]
    total = sum(row["nats"]["value"] for row in found["tokens"])
    assert total == pytest.approx(found["gain"]["value"], abs=1e-6) and found["tokens_error"] < 1e-4
    assert analyze.main([str(folder), "--policy", spec, "--only", "usage", "--limit", "24", "--quiet"]) == 2
    assert "steers no features" in capsys.readouterr().err


# ---- mistakes ------------------------------------------------------------------------------------------------------

BAD = {"LoRA rank=200": "rank is 200; a matrix of", "LoRA rank=0": "rank is 0", "LoRA blocks=9": "blocks is 9",
       "LoRA blocks=2,9": r"blocks is \(2, 9\)", "LoRA blocks=x": "blocks is 'x'",
       "LoRA matrices=w_proj": "'w_proj' is none of q_proj",
       "Constant layer=6": "layer is 6; this model has layers 0 to 5",
       "Constant rank=2": "unexpected keyword argument 'rank'"}


@pytest.mark.parametrize("what", BAD)
def test_settings_that_do_not_fit(what, tmp_path, capsys):
    kind, argument = what.split()
    args = [*SHORT, "--runs", str(tmp_path / "runs"), "--policy", f"{FILE}:{kind}", "--policy-args", argument]
    assert train.main(args) == 2 and not (tmp_path / "runs").exists()
    assert re.search(BAD[what], capsys.readouterr().err)


def test_a_file_of_other_settings(tmp_path):
    model = small_gemma()
    made("LoRA", model, rank=2).save(tmp_path)
    with pytest.raises(UserError, match="written by a policy of other settings"):
        made("LoRA", model, rank=3).load(tmp_path)


def test_which_blocks():
    assert block_numbers("all", 3) == [0, 1, 2] and block_numbers(2, 3) == [2] and block_numbers("1-", 3) == [1, 2]
    assert block_numbers(key_values(["blocks=2,0"], "x")["blocks"], 3) == [0, 2]
