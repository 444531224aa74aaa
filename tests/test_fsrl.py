"""The adapter by hand, steering against its definition and what it must not touch, several SAEs, files."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fsrl
from common import lively_adapter, mutant, off, relative, small_gemma, small_sae, some_pairs
from fsrl import Adapter, Steering, Steerings, load_adapter, save_adapter
from lib.files import UserError, atomically
from lib.plugins import CONFIG, THEIR_NAMES, WEIGHTS, check_fit
from sae import load_sae
from simpo import by_the_book, collate, score, simpo_loss


def set_up(activation="soft", seed=0, dtype=torch.float32, **how):
    model = small_gemma(seed, dtype)
    sae = small_sae(model)
    adapter = Adapter(sae.d_in, sae.d_sae, activation, init=0.05).to(dtype)
    with torch.no_grad():
        adapter.adapter_linear.bias.normal_(0, 0.3)
    return model, sae, adapter, Steering(sae, adapter, **how)


def states(model, batch):
    """The output of block 1, (B,T,D)."""
    return model.blocks(model.embed(batch.ids), 0, 2, position_ids=batch.position_ids, mask=batch.mask())


def some_states(model, n=20):
    """Of one sequence, BOS left out, (n - 1,D)."""
    return model.blocks(model.embed(torch.randint(4, 97, (1, n))), 0, 2)[0, 1:]


def means(model, batch, policy=None):
    """s(chosen), s(rejected), (2,B)."""
    s = score(model, batch, policy)
    return torch.stack([s.chosen.mean, s.rejected.mean])


def loss_of(s, beta=10.0):
    return simpo_loss(s.chosen.mean, s.rejected.mean, beta)


BY_HAND = {"relu": [0, .2, 1, 3], "soft": [-2.5, 0, .5, 2.5], "jumprelu": [0, 0, 1, 3]}


def test_activations_by_hand():
    """p = 2x + 1 on x = -2, -0.4, 0, 1: -3, 0.2, 1, 3; thresholds 0.5."""
    x = torch.tensor([[-2.0], [-0.4], [0.0], [1.0]])
    for activation, v in BY_HAND.items():
        adapter = Adapter(1, 1, activation)
        with torch.no_grad():
            adapter.adapter_linear.weight.fill_(2)
            adapter.adapter_linear.bias.fill_(1)
            for name, p in adapter.named_parameters():
                if "threshold" in name:
                    p.fill_(0.5 if activation == "soft" else torch.tensor(0.5).log())
        assert off(adapter(x)[:, 0], torch.tensor(v, dtype=torch.float32)) < 1e-6, activation


@pytest.mark.parametrize("theta", [-0.5, 0.0, 0.5])
def test_soft_threshold_is_the_written_formula(theta):
    """sign(p) max(|p| - θ, 0), values and gradients; θ below zero is possible in the authors' files."""
    adapter = Adapter(5, 7, "soft", init=1.0).double()
    with torch.no_grad():
        adapter.adapter_linear.bias.normal_()
        adapter.soft_threshold.fill_(theta)
    x = torch.randn(9, 5, dtype=torch.float64)
    weight = torch.randn(9, 7, dtype=torch.float64)
    p = adapter.adapter_linear(x)
    want = p.sign() * (p.abs() - adapter.soft_threshold).clamp_min(0)
    assert 0.2 < (want != 0).double().mean() < 0.9 if theta > 0 else (want != 0).all()
    parameters = list(adapter.parameters())
    slopes = torch.autograd.grad((want * weight).sum(), parameters)
    got = adapter(x)
    assert off(got, want) < 1e-12
    for ours, theirs in zip(torch.autograd.grad((got * weight).sum(), parameters), slopes):
        assert relative(ours, theirs) < 1e-12
    # the broken variant: what lies between -θ and θ keeps a sign for θ < 0
    broken = mutant("fsrl", ("sign * (sign * p).sub_(self.soft_threshold).relu_()", "sign * (p - self.soft_threshold)"))
    other = broken.Adapter(5, 7, "soft").double()
    other.load_state_dict(adapter.state_dict())
    assert off(other(x), want) > 0.1


def test_training_keeps_thresholds_above_zero():
    adapter = Adapter(1, 1, "soft")
    with torch.no_grad():
        adapter.adapter_linear.weight.fill_(1)
        adapter.soft_threshold.fill_(-0.5)
    assert adapter(torch.tensor([[1.0], [-1.0]]))[:, 0].tolist() == [1.5, -1.5]
    adapter.project()
    assert adapter.soft_threshold.item() == 0


@pytest.mark.parametrize("activation", fsrl.ACTIVATIONS)
def test_every_parameter_gets_a_gradient_at_the_start(activation):
    """W_a starts tiny and not at zero, which would be a dead point."""
    model, sae, _, _ = set_up()
    batch = collate(some_pairs([(3, 4, 5)] * 4))
    adapter = Adapter(sae.d_in, sae.d_sae, activation, bandwidth=1.0)
    loss_of(score(model, batch, Steering(sae, adapter)), 1.0).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    dead = Adapter(sae.d_in, sae.d_sae, "relu")
    with torch.no_grad():
        dead.adapter_linear.weight.zero_()
    loss_of(score(model, batch, Steering(sae, dead)), 1.0).mean().backward()
    assert dead.adapter_linear.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("fusion", fsrl.FUSIONS)
def test_fusion_is_decode_plus_error(fusion):
    """The paper's form, decode(f + v) + error, rectified sum for relu fusion; float64. Broken: the bias counted
    twice, the error dropped, the other fusion."""
    model, sae, adapter, steering = set_up(dtype=torch.float64, fusion=fusion)
    x = some_states(model)
    f, v = sae.encode(x), adapter(x)
    assert 0.05 < (f > 0).double().mean() < 0.9
    total, other = f + v, (f + v).relu()
    if fusion == "relu":
        total, other = other, total
    error = x - sae.decode(f)
    got = steering(x[None], torch.ones(1, len(x), dtype=torch.bool))[0]
    assert off(got, sae.decode(total) + error) < 1e-12
    assert off(got, sae.decode(other) + error) > 0.01
    assert off(got, x + sae.decode(v)) > 0.01              # a "shortcut" that adds b_dec
    assert off(got, sae.decode(total)) > 0.01              # without the error


def test_relu_fusion_counts_what_is_added():
    """Pushing an inactive feature down does nothing: no L0, no L1, no gradient."""
    model, sae, adapter, _ = set_up()
    with torch.no_grad():
        adapter.adapter_linear.weight.zero_()
        adapter.adapter_linear.bias.fill_(-1000.0)
    x = some_states(model)
    f, v = sae.encode(x), Steering(sae, adapter, fusion="relu").action(x)
    assert torch.equal(v, -f) and (v != 0).sum() == (f > 0).sum() < f.numel()
    v.sum().backward()
    assert adapter.adapter_linear.bias.grad.abs().sum() == 0
    assert (Steering(sae, adapter).action(x) != 0).all()


@pytest.mark.parametrize("module", ["real", "halves"])
def test_relu_fusion_keeps_the_gradient_at_ties(module):
    """v = f = 0 on a feature whose threshold is near: the straight-through gradient passes whole. Broken:
    torch.maximum gives each of two equal arguments half."""
    m = fsrl if module == "real" else mutant("fsrl", ("torch.where(v < floor, floor, v)", "torch.maximum(v, floor)"))
    _, sae, _, _ = set_up()
    adapter = m.Adapter(sae.d_in, sae.d_sae, "jumprelu", init=0.5, bandwidth=0.4)
    with torch.no_grad():
        adapter.adapter_linear.weight.zero_()
        adapter.adapter_linear.bias.fill_(0.4)                      # under the threshold by less than half a bandwidth
    x = torch.randn(6, sae.d_in)
    slopes = []
    for fusion in m.FUSIONS:
        v = m.Steering(sae, adapter, fusion=fusion).action(x)
        assert (v == 0).all() and (sae.encode(x) == 0).any()
        adapter.zero_grad()
        v.sum().backward()
        slopes.append(adapter.log_threshold.grad.clone())
    assert slopes[0].abs().min() > 0 and torch.equal(*slopes) is (module == "real")


@pytest.mark.parametrize("fusion", fsrl.FUSIONS)
def test_off_is_the_base_model_bit_for_bit(fusion):
    model, sae, adapter, steering = set_up(fusion=fusion)
    pairs = some_pairs([(5, 4, 7), (2, 9, 1)])
    batch = collate(pairs)
    base = means(model, batch)
    assert not torch.equal(means(model, batch, steering), base)
    for switch in ({"strength": 0.0}, {"masked": range(sae.d_sae)}):
        silent = Steering(sae, adapter, fusion=fusion, **switch)
        assert torch.equal(means(model, batch, silent), base)
        assert by_the_book(model, pairs[0], silent) == by_the_book(model, pairs[0])


@pytest.mark.parametrize("positions", fsrl.POSITIONS)
def test_what_steering_touches(positions):
    """BOS and padding are untouched by `text` and `response`; padding by all three."""
    model, sae, adapter, steering = set_up(positions=positions)
    batch = collate(some_pairs([(5, 4, 7), (2, 3, 1)]))
    h = states(model, batch)
    changed = (steering(h, batch.where(positions)) != h).any(-1)
    assert torch.equal(changed, batch.where(positions))
    assert not changed[batch.branch < 0].any() and changed[:, 0].all() == (positions == "all")
    broken = mutant("gemma", ('position_ids >= 0 if kind == "all" else position_ids > 0', "position_ids >= 0"))
    assert not torch.equal(broken.steerable("text", batch.position_ids), batch.where("text"))


def test_gradients_reach_the_adapter_alone():
    model, sae, adapter, steering = set_up(fusion="relu")
    frozen = [*model.parameters(), *sae.parameters()]
    assert not any(p.requires_grad for p in frozen)
    s = score(model, collate(some_pairs([(5, 4, 7)])), steering)
    (loss_of(s) + s.penalty).sum().backward()
    assert all(p.grad is None for p in frozen) and all(p.grad is not None for p in adapter.parameters())


BAD = [{"top_k": 0}, {"top_k": 33}, {"top_k": 1.5}, {"masked": [32]}, {"masked": [-1]}, {"fusion": "x"},
       {"positions": "x"}]


def test_top_k_and_masks():
    """Masked features use up no budget; k as a number and as a share of F."""
    model, sae, adapter, _ = set_up()
    x = torch.randn(6, 24) * 5
    v = Steering(sae, adapter).action(x)
    best = v.abs().topk(3, -1).indices
    kept = Steering(sae, adapter, top_k=3).action(x)
    assert ((kept != 0).sum(-1) == 3).all() and torch.equal(kept.gather(-1, best), v.gather(-1, best))
    banned = best[0].tolist()
    both = Steering(sae, adapter, top_k=3, masked=banned).action(x)
    assert ((both != 0).sum(-1) == 3).all() and (both[:, banned] == 0).all()
    assert Steering(sae, adapter, top_k=0.1).top_k == 3 and Steering(sae, adapter, top_k=1e-9).top_k == 1
    for bad in BAD:
        with pytest.raises(UserError):
            Steering(sae, adapter, **bad)


def test_statistics_leave_out_bos_and_padding():
    """L0 and L1 of a pair against a loop over its steered tokens; counting BOS, or padding as the authors' code does,
    gives other numbers."""
    model, sae, adapter, steering = set_up()
    pairs = some_pairs([(5, 4, 7), (2, 2, 2)])
    batch = collate(pairs)
    shown = score(model, batch, steering).shown
    h = states(model, batch)
    for b in range(2):
        v = torch.stack([adapter(h[b, t]) for t in range(batch.ids.shape[1]) if batch.position_ids[b, t] > 0])
        assert off(shown["l1"][b], v.abs().sum(-1).mean()) < 1e-5
        assert off(shown["l0"][b], (v != 0).float().sum(-1).mean()) < 1e-5
        assert off(shown["l1"][b], adapter(h[b]).abs().sum(-1).mean()) > 1e-2
    alone = score(model, collate(pairs[1:]), steering).shown
    assert off(alone["l1"][0], shown["l1"][1]) < 1e-5 and off(alone["l0"][0], shown["l0"][1]) < 1e-5


def test_statistics_by_hand():
    """A v that is the same everywhere: two features move, by 2.0 together."""
    model, sae, adapter, _ = set_up()
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
        adapter.soft_threshold.fill_(0.5)
        adapter.adapter_linear.bias[:3] = torch.tensor([1.0, -2.0, 0.4])          # v = .5, -1.5, 0
    batch = collate(some_pairs([(5, 4, 7), (2, 2, 2)]))
    for positions in fsrl.POSITIONS:
        s = score(model, batch, Steering(sae, adapter, positions=positions))
        for x in (s.shown["l0"], s.shown["l1"], s.penalty):
            assert off(x, torch.full((2,), 2.0)) < 1e-6


class Pricey(Adapter):
    """An adapter with a price of its own: Σ v²."""

    def penalty(self, v):
        return v.square().sum(-1)


def test_a_penalty_of_the_adapters_own():
    """It is averaged over a pair's steered tokens, as ℓ1 is; what the log shows stays ℓ1."""
    model, sae, adapter, steering = set_up(positions="response", fusion="relu")
    own = Pricey(sae.d_in, sae.d_sae)
    own.load_state_dict(adapter.state_dict())
    batch = collate(some_pairs([(5, 4, 7), (2, 3, 2)]))
    s = score(model, batch, Steering(sae, own, positions="response", fusion="relu"))
    h, where = states(model, batch), batch.where("response")
    want = torch.stack([steering.action(h[b, where[b]]).square().sum(-1).mean() for b in range(2)])
    assert off(s.penalty, want) < 1e-6 and off(s.shown["l1"], want) > 0.01
    assert torch.equal(s.shown["l1"], score(model, batch, steering).penalty)


# ---- several SAEs --------------------------------------------------------------------------------------------------

def two(model, strengths=(1.0, 1.0), positions=("text", "text")):
    """Steerings at layers 1 and 2; the deeper one is given first."""
    saes = [small_sae(model, layer=layer, seed=layer) for layer in (2, 1)]
    some = [Steering(sae, lively_adapter(sae), strength=x, positions=where)
            for sae, x, where in zip(saes, strengths, positions)]
    return Steerings(some), some


@pytest.mark.parametrize("silent", [0, 1])
def test_an_adapter_that_does_nothing_changes_nothing(silent):
    """Two Steerings of which one gives exactly zero are the other one alone, bit for bit."""
    model, batch = small_gemma(), collate(some_pairs([(5, 4, 7), (2, 9, 1)]))
    both, some = two(model, strengths=[0.0 if i == silent else 1.0 for i in (0, 1)])
    alone = some[1 - silent]
    assert torch.equal(means(model, batch, both), means(model, batch, alone))
    assert not torch.equal(means(model, batch, both), means(model, batch))
    s, one = score(model, batch, both), score(model, batch, alone)
    assert torch.equal(s.penalty, one.penalty) and torch.equal(s.shown["l0"], one.shown["l0"])


def test_steering_at_two_layers_is_two_edits():
    """Row and blocks by turns against two plain sequences with both edits; penalties add up."""
    model, pairs = small_gemma(dtype=torch.float64), some_pairs([(5, 4, 7), (2, 9, 1)])
    both, some = two(model)
    assert both.frozen == 2 and [s.sae.layer for s in both.steerings] == [1, 2]
    s = score(model, collate(pairs), both)
    want = torch.stack([torch.stack(by_the_book(model, p, both)) for p in pairs], 1)
    assert off(torch.stack([s.chosen.mean, s.rejected.mean]), want) < 1e-12
    first = score(model, collate(pairs), some[1])                       # the lower layer does not see the upper one
    assert (s.penalty > first.penalty).all() and torch.equal(s.penalty, s.shown["l1"])
    # the broken variant: each steering starts again from the frozen blocks' output
    broken = mutant("fsrl", ("h, start = s.add(h, where, v), layer + 1", "h = s.add(h, where, v)"))
    other = broken.Steerings([broken.Steering(x.sae, x.adapter) for x in some])
    assert off(means(model, collate(pairs), other), want) > 1e-3


def test_layers_and_positions_of_several_saes():
    model = small_gemma()
    sae = small_sae(model)
    with pytest.raises(UserError, match="two SAEs on one layer"):
        Steerings([Steering(sae, lively_adapter(sae)), Steering(sae, lively_adapter(sae))])
    with pytest.raises(UserError, match="agree on `positions`"):
        by_the_book(model, some_pairs([(2, 3, 4)])[0], two(model, positions=("text", "all"))[0])


# ---- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", fsrl.ACTIVATIONS)
def test_save_and_load(tmp_path, activation):
    _, sae, adapter, steering = set_up(activation, fusion="relu", top_k=5)
    steering.save(tmp_path, base_model="google/gemma-2-2b-it", step=7)
    again, facts = load_adapter(tmp_path)
    x = torch.randn(4, 24)
    assert torch.equal(again(x), adapter(x)) and facts["sae_identity"] == sae.identity()
    assert facts["fusion"] == "relu" and facts["top_k"] == 5 and facts["step"] == 7
    assert facts["activation_type"] == THEIR_NAMES[activation] and facts["model_name"] == "gemma-2-2b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_weights.safetensors", "fsrl_adapter_config.json"]


SCOPE = {"base_sae_release": "gemma-scope-2b-pt-res", "base_sae_id": "layer_12/width_65k/average_l0_72"}
NO_ADAPTERS = [({"activation_type": "soft_threshold"}, {}, "does not fit"), ({}, {"extra": [1.0]}, "does not fit"),
               ({"activation_type": "x"}, {}, "activation_type is")]


def test_the_authors_files(tmp_path):
    """bf16, their two files, older flags, a gate per feature; a threshold below zero loads as it is."""
    W, b = torch.randn(7, 5).bfloat16(), torch.randn(7).bfloat16()

    def write(config, **tensors):
        tensors = {"adapter_linear.weight": W, "adapter_linear.bias": b, **tensors}
        save_file(tensors, tmp_path / WEIGHTS)
        (tmp_path / CONFIG).write_text(json.dumps({**SCOPE, **config}))
        return load_adapter(tmp_path)[0]
    x = torch.randn(3, 5)
    p = x @ W.float().T + b.float()
    assert off(write({})(x), p.relu()) < 1e-6
    # thresholds
    theta = torch.full((7,), -0.25).bfloat16()
    soft = write({"activation_type": "soft_threshold", "use_steering_magnitude": False}, soft_threshold=theta)
    assert off(soft(x), p.sign() * (p.abs() + 0.25)) < 1e-6 and soft.soft_threshold.dtype == torch.float32
    jump = write({"use_jump_relu": True, "bandwidth": 0.05}, log_threshold=torch.zeros(7))
    assert off(jump(x), p * (p > 1)) < 1e-6 and jump.bandwidth == 0.05
    # gates: only with their flag, ones where they are missing
    gates = torch.linspace(-1, 2, 7)
    gated = {"activation_type": "relu", "use_steering_magnitude": True}
    assert off(write(gated, steering_magnitude=gates)(x), p.relu() * gates.clamp(0, 1)) < 1e-6
    assert off(write(gated)(x), p.relu()) < 1e-6
    ignored = write({**gated, "use_steering_magnitude": False}, steering_magnitude=gates)
    assert off(ignored(x), p.relu()) < 1e-6 and ignored.steering_magnitude is None
    for config, tensors, message in NO_ADAPTERS:
        with pytest.raises(UserError, match=message):
            write(config, **{name: torch.tensor(t) for name, t in tensors.items()})


class Twice(Adapter):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_is_somebody_elses(tmp_path):
    """An adapter with a forward of its own never loads as ours, whatever its attributes are called."""
    _, sae, _, _ = set_up()
    Steering(sae, Twice(sae.d_in, sae.d_sae)).save(tmp_path)
    with pytest.raises(UserError, match="--adapter FILE.py:Twice"):
        load_adapter(tmp_path)
    assert isinstance(load_adapter(tmp_path, Twice)[0], Twice)


def test_half_precision():
    """bf16 weights beside a float32 adapter: v and its sums are float32, also for an adapter that computes in bf16."""
    model, sae, adapter, _ = set_up()
    model, sae = model.to(torch.bfloat16), small_sae(model, dtype=torch.bfloat16)
    steering, batch = Steering(sae, adapter), collate(some_pairs([(5, 4, 7), (2, 3, 1)]))
    assert steering.action(torch.randn(3, 24).bfloat16()).dtype == torch.float32
    s = score(model, batch, steering)
    assert {x.dtype for x in (s.chosen.mean, s.rejected.mean, s.penalty, *s.shown.values())} == {torch.float32}
    (loss_of(s) + s.penalty).sum().backward()
    slope = adapter.adapter_linear.weight.grad
    assert slope.dtype == torch.float32 and slope.abs().sum() > 0
    own = torch.nn.Sequential(torch.nn.Linear(24, 32))
    assert Steering(sae, own).action(torch.randn(3, 24).bfloat16()).dtype == torch.float32


def test_nothing_is_half_written(tmp_path):
    _, _, adapter, _ = set_up()
    save_adapter(adapter, tmp_path)
    before = load_file(tmp_path / WEIGHTS)

    def write(path):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")
    with pytest.raises(RuntimeError):
        atomically(tmp_path / WEIGHTS, write)
    after = load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("*.tmp"))


def test_layer_and_width_have_to_fit():
    model, sae, _, _ = set_up()
    for layer, message in ((4, "layers 0 to 3"), (None, "its layer is neither")):
        sae.layer = layer
        with pytest.raises(UserError, match=message):
            check_fit(sae, model.config)
    sae.layer = 1
    with pytest.raises(UserError, match="width 24"):
        check_fit(sae, small_gemma(hidden_size=16).config)


def test_authors_adapter_of_an_sae_that_subtracts_b_dec(tmp_path):
    """Theirs reads x - b_dec where the SAE does; ours says so by another bias, and leaves files of ours alone."""
    g = torch.Generator().manual_seed(0)
    W, b_dec, x = (torch.randn(*shape, generator=g) for shape in ((7, 5), (5,), (3, 5)))
    arrays = {"W_enc": torch.randn(5, 7, generator=g), "W_dec": torch.randn(7, 5, generator=g), "b_dec": b_dec,
              "b_enc": torch.zeros(7), "threshold": torch.zeros(7)}
    save_file({name: t.contiguous() for name, t in arrays.items()}, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": True,
              "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = load_sae(str(tmp_path))
    save_file({"adapter_linear.weight": W, "adapter_linear.bias": torch.zeros(7)}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"activation_type": "relu"}))
    assert off(load_adapter(tmp_path, sae=sae)[0](x), ((x - b_dec) @ W.T).relu()) < 1e-6
    (tmp_path / CONFIG).write_text(json.dumps({"activation_type": "relu", "fusion": "additive"}))
    assert off(load_adapter(tmp_path, sae=sae)[0](x), (x @ W.T).relu()) < 1e-6
