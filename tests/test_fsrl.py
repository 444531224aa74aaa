"""The adapter's activations by hand, steering against its definition, what it must not touch, and its files."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fsrl
from common import mutant, off, small_gemma, small_sae, some_pairs
from fsrl import Adapter, Steering, load_adapter, save_adapter
from gemma import UserError
from simpo import collate, response_logps, simpo_loss, steered_logps


def set_up(activation="soft", seed=0, dtype=torch.float32, **how):
    model = small_gemma(seed, dtype)
    sae = small_sae(model)
    adapter = Adapter(sae.d_in, sae.d_sae, activation, init=0.05).to(dtype)
    with torch.no_grad():
        adapter.adapter_linear.bias.normal_(0, 0.3)
    return model, sae, adapter, Steering(sae, adapter, **how)


def test_activations_by_hand():
    """p = 2x + 1 on x = -2, -0.4, 0, 1: -3, 0.2, 1, 3; thresholds 0.5."""
    x, want = torch.tensor([[-2.0], [-0.4], [0.0], [1.0]]), {"relu": [0, .2, 1, 3], "soft": [-2.5, 0, .5, 2.5], "jumprelu": [0, 0, 1, 3]}
    for activation, v in want.items():
        adapter = Adapter(1, 1, activation)
        with torch.no_grad():
            adapter.adapter_linear.weight.fill_(2), adapter.adapter_linear.bias.fill_(1)
            for name, p in adapter.named_parameters():
                if "threshold" in name:
                    p.fill_(0.5 if activation == "soft" else torch.tensor(0.5).log())
        assert off(adapter(x)[:, 0], torch.tensor(v, dtype=torch.float32)) < 1e-6, activation


def test_soft_threshold_below_zero():
    """Files of the authors may hold one: sign(p)(|p| - θ) as it is written; training keeps θ >= 0."""
    adapter = Adapter(1, 1, "soft")
    with torch.no_grad():
        adapter.adapter_linear.weight.fill_(1), adapter.soft_threshold.fill_(-0.5)
    assert adapter(torch.tensor([[1.0], [-1.0]]))[:, 0].tolist() == [1.5, -1.5]
    adapter.project()
    assert adapter.soft_threshold.item() == 0


@pytest.mark.parametrize("activation", fsrl.ACTIVATIONS)
def test_every_parameter_gets_a_gradient_at_the_start(activation):
    """W_a starts tiny and not at zero, which would be a dead point."""
    model, sae, _, _ = set_up()
    adapter = Adapter(sae.d_in, sae.d_sae, activation, bandwidth=1.0)
    chosen, rejected, _, _ = steered_logps(model, collate(some_pairs([(3, 4, 5)] * 4)), Steering(sae, adapter))
    simpo_loss(chosen, rejected, 1.0).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    dead = Adapter(sae.d_in, sae.d_sae, "relu", init=1e-30)
    with torch.no_grad():
        dead.adapter_linear.weight.zero_()
    chosen, rejected, _, _ = steered_logps(model, collate(some_pairs([(3, 4, 5)] * 4)), Steering(sae, dead))
    simpo_loss(chosen, rejected, 1.0).mean().backward()
    assert dead.adapter_linear.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("fusion", fsrl.FUSIONS)
def test_fusion_is_decode_plus_error(fusion):
    """The paper's form, decode(f + v) + error, rectified sum for relu fusion; float64. Broken: the bias counted twice, the error dropped."""
    model, sae, adapter, steering = set_up(dtype=torch.float64, fusion=fusion)
    x = model.blocks(model.embed(torch.randint(4, 97, (1, 20))), 0, 2)[0, 1:]
    f = sae.encode(x)
    assert 0.05 < (f > 0).double().mean() < 0.9
    total = f + adapter(x)
    want = sae.decode(total.relu() if fusion == "relu" else total) + (x - sae.decode(f))
    where = torch.ones(1, len(x), dtype=torch.bool)
    got = steering(x[None], where)[0]
    assert off(got, want) < 1e-12
    assert off(sae.decode(total) + x - sae.decode(f), got) < 1e-12 if fusion == "additive" else off(x + adapter(x) @ sae.W_dec, got) > 0.01
    assert off(x + sae.decode(adapter(x)), got) > 0.01                                   # a "shortcut" that adds b_dec
    assert off(sae.decode(total.relu() if fusion == "relu" else total), got) > 0.01      # without the error


def test_relu_fusion_counts_what_is_added():
    """Pushing an inactive feature down does nothing: no L0, no L1, no gradient."""
    model, sae, adapter, _ = set_up()
    with torch.no_grad():
        adapter.adapter_linear.weight.zero_(), adapter.adapter_linear.bias.fill_(-1000.0)
    x = model.blocks(model.embed(torch.randint(4, 97, (1, 20))), 0, 2)[0, 1:]
    f, v = sae.encode(x), Steering(sae, adapter, fusion="relu").features(x)
    assert torch.equal(v, -f) and (v != 0).sum() == (f > 0).sum() < f.numel()
    v.sum().backward()
    assert adapter.adapter_linear.bias.grad.abs().sum() == 0
    assert (Steering(sae, adapter).features(x) != 0).all()


@pytest.mark.parametrize("fusion", fsrl.FUSIONS)
def test_off_is_the_base_model_bit_for_bit(fusion):
    model, sae, adapter, steering = set_up(fusion=fusion)
    batch = collate(some_pairs([(5, 4, 7), (2, 9, 1)]))
    base = torch.stack(response_logps(model, batch))
    moved = torch.stack(response_logps(model, batch, steering.edits()))
    assert not torch.equal(moved, base)
    for off_switch in ({"strength": 0.0}, {"masked": range(sae.d_sae)}):
        assert torch.equal(torch.stack(response_logps(model, batch, Steering(sae, adapter, fusion=fusion, **off_switch).edits())), base)
    assert torch.equal(torch.stack(steered_logps(model, batch, Steering(sae, adapter, fusion=fusion, strength=0.0))[:2]), base)


@pytest.mark.parametrize("positions", fsrl.POSITIONS)
def test_what_steering_touches(positions):
    """BOS and padding are untouched by `text` and `response`; padding by all three."""
    model, sae, adapter, steering = set_up(positions=positions)
    batch = collate(some_pairs([(5, 4, 7), (2, 3, 1)]))
    h = model.blocks(model.embed(batch.ids), 0, 2, positions=batch.position, mask=batch.mask())
    changed = (steering(h, batch.where(positions)) != h).any(-1)
    assert torch.equal(changed, batch.where(positions))
    assert not changed[batch.branch < 0].any() and changed[:, 0].all() == (positions == "all")
    broken = mutant("gemma", ("positions >= 0 if kind == \"all\" else positions > 0", "positions >= 0"))
    assert not torch.equal(broken.steerable("text", batch.position), batch.where("text"))


def test_gradients_reach_the_adapter_alone():
    model, sae, adapter, steering = set_up(fusion="relu")
    for p in (*model.parameters(), *sae.parameters()):
        assert not p.requires_grad
    chosen, rejected, _, l1 = steered_logps(model, collate(some_pairs([(5, 4, 7)])), steering)
    (simpo_loss(chosen, rejected) + l1).sum().backward()
    assert all(p.grad is None for p in (*model.parameters(), *sae.parameters())) and all(p.grad is not None for p in adapter.parameters())


def test_top_k_and_masks():
    """Masked features use up no budget; k as a number and as a share of F."""
    model, sae, adapter, _ = set_up()
    x = torch.randn(6, 24) * 5
    v = Steering(sae, adapter).features(x)
    best = v.abs().topk(3, -1).indices
    kept = Steering(sae, adapter, top_k=3).features(x)
    assert ((kept != 0).sum(-1) == 3).all() and torch.equal(kept.gather(-1, best), v.gather(-1, best))
    banned = best[0].tolist()
    both = Steering(sae, adapter, top_k=3, masked=banned).features(x)
    assert ((both != 0).sum(-1) == 3).all() and (both[:, banned] == 0).all()
    assert Steering(sae, adapter, top_k=0.1).top_k == 3 and Steering(sae, adapter, top_k=1e-9).top_k == 1
    for bad in ({"top_k": 0}, {"top_k": 33}, {"top_k": 1.5}, {"masked": [32]}, {"masked": [-1]}, {"fusion": "x"}, {"positions": "x"}):
        with pytest.raises(UserError):
            Steering(sae, adapter, **bad)


def test_statistics_leave_out_bos_and_padding():
    """L0 and L1 of a pair against a loop over its steered tokens; counting BOS, or padding as the authors' code does, gives other numbers."""
    model, sae, adapter, steering = set_up()
    pairs = some_pairs([(5, 4, 7), (2, 2, 2)])
    batch = collate(pairs)
    *_, l0, l1 = steered_logps(model, batch, steering)
    h = model.blocks(model.embed(batch.ids), 0, 2, positions=batch.position, mask=batch.mask())
    for b in range(2):
        v = torch.stack([adapter(h[b, t]) for t in range(batch.ids.shape[1]) if batch.position[b, t] > 0])
        assert off(l1[b], v.abs().sum(-1).mean()) < 1e-5 and off(l0[b], (v != 0).float().sum(-1).mean()) < 1e-5
        everything = adapter(h[b])
        assert off(l1[b], everything.abs().sum(-1).mean()) > 1e-2
    *_, alone_l0, alone_l1 = steered_logps(model, collate(pairs[1:]), steering)
    assert off(alone_l1[0], l1[1]) < 1e-5 and off(alone_l0[0], l0[1]) < 1e-5


def test_statistics_by_hand():
    """A v that is the same everywhere: two features move, by 2.0 together."""
    model, sae, adapter, _ = set_up()
    with torch.no_grad():
        adapter.adapter_linear.weight.zero_(), adapter.adapter_linear.bias.zero_(), adapter.soft_threshold.fill_(0.5)
        adapter.adapter_linear.bias[:3] = torch.tensor([1.0, -2.0, 0.4])          # v = .5, -1.5, 0
    for positions in fsrl.POSITIONS:
        *_, l0, l1 = steered_logps(model, collate(some_pairs([(5, 4, 7), (2, 2, 2)])), Steering(sae, adapter, positions=positions))
        assert off(l0, torch.full((2,), 2.0)) < 1e-6 and off(l1, torch.full((2,), 2.0)) < 1e-6


# ---- files -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", fsrl.ACTIVATIONS)
def test_save_and_load(tmp_path, activation):
    _, sae, adapter, steering = set_up(activation)
    save_adapter(adapter, tmp_path, **fsrl.steering_facts(steering, "google/gemma-2-2b-it"))
    again, facts = load_adapter(tmp_path)
    x = torch.randn(4, 24)
    assert torch.equal(again(x), adapter(x)) and facts["fusion"] == "additive" and facts["sae_identity"] == sae.identity()
    assert facts["activation_type"] == fsrl.THEIR_NAMES[activation] and facts["model_name"] == "gemma-2-2b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_weights.safetensors", "fsrl_adapter_config.json"]


def test_the_authors_files(tmp_path):
    """bf16, their two files, older flags, a gate per feature; a threshold below zero loads as it is."""
    W, b = torch.randn(7, 5).bfloat16(), torch.randn(7).bfloat16()
    def write(config, **tensors):
        save_file({"adapter_linear.weight": W, "adapter_linear.bias": b, **tensors}, tmp_path / fsrl.WEIGHTS)
        (tmp_path / fsrl.CONFIG).write_text(json.dumps({"base_sae_release": "gemma-scope-2b-pt-res", "base_sae_id": "layer_12/width_65k/average_l0_72", **config}))
        return load_adapter(tmp_path)[0]
    x = torch.randn(3, 5)
    p = x @ W.float().T + b.float()
    assert off(write({})(x), p.relu()) < 1e-6
    theta = torch.full((7,), -0.25).bfloat16()
    soft = write({"activation_type": "soft_threshold", "use_steering_magnitude": False}, soft_threshold=theta)
    assert off(soft(x), p.sign() * (p.abs() + 0.25)) < 1e-6 and soft.soft_threshold.dtype == torch.float32
    jump = write({"use_jump_relu": True, "bandwidth": 0.05}, log_threshold=torch.zeros(7))
    assert off(jump(x), p * (p > 1)) < 1e-6 and jump.bandwidth == 0.05
    gate = write({"activation_type": "relu", "use_steering_magnitude": True}, steering_magnitude=torch.linspace(-1, 2, 7))
    assert off(gate(x), p.relu() * torch.linspace(-1, 2, 7).clamp(0, 1)) < 1e-6
    assert off(write({"activation_type": "relu", "use_steering_magnitude": True})(x), p.relu()) < 1e-6      # missing gates are ones
    for config, tensors, message in (({"activation_type": "soft_threshold"}, {}, "does not fit"), ({}, {"extra": b.clone()}, "does not fit"), ({"activation_type": "x"}, {}, "activation_type is")):
        with pytest.raises(UserError, match=message):
            write(config, **tensors)


def test_a_subclass_is_somebody_elses(tmp_path):
    """An adapter with a forward of its own never loads as ours, whatever its attributes are called."""
    class Twice(Adapter):
        def forward(self, x):
            return 2 * super().forward(x)
    _, sae, _, steering = set_up()
    save_adapter(Twice(sae.d_in, sae.d_sae), tmp_path, **fsrl.steering_facts(steering, "m"))
    with pytest.raises(UserError, match="--adapter FILE.py:Twice"):
        load_adapter(tmp_path)
    assert isinstance(load_adapter(tmp_path, Twice)[0], Twice)


def test_half_precision():
    """bf16 weights beside a float32 adapter: v and its sums are float32, also for an adapter that computes in bf16."""
    model, sae, adapter, _ = set_up()
    model, sae = model.to(torch.bfloat16), small_sae(model, dtype=torch.bfloat16)
    steering, batch = Steering(sae, adapter), collate(some_pairs([(5, 4, 7), (2, 3, 1)]))
    v = steering.features(torch.randn(3, 24).bfloat16())
    assert v.dtype == torch.float32
    chosen, rejected, l0, l1 = steered_logps(model, batch, steering)
    assert {x.dtype for x in (chosen, rejected, l0, l1)} == {torch.float32}
    (simpo_loss(chosen, rejected) + l1).sum().backward()
    assert adapter.adapter_linear.weight.grad.dtype == torch.float32 and adapter.adapter_linear.weight.grad.abs().sum() > 0
    own = torch.nn.Sequential(torch.nn.Linear(24, 32))
    assert Steering(sae, own).features(torch.randn(3, 24).bfloat16()).dtype == torch.float32


def test_nothing_is_half_written(tmp_path):
    _, _, adapter, steering = set_up()
    save_adapter(adapter, tmp_path)
    before = load_file(tmp_path / fsrl.WEIGHTS)
    with pytest.raises(RuntimeError):
        fsrl.atomically(tmp_path / fsrl.WEIGHTS, lambda path: (path.write_bytes(b"half"), (_ for _ in ()).throw(RuntimeError("disk full")))[0])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), load_file(tmp_path / fsrl.WEIGHTS).values()))
    assert not list(tmp_path.glob("*.tmp"))


def test_layer_and_width_have_to_fit():
    model, sae, _, _ = set_up()
    for change, message in (({"layer": 4}, "layers 0 to 3"), ({"layer": None}, "written neither")):
        for name, value in change.items():
            setattr(sae, name, value)
        with pytest.raises(UserError, match=message):
            fsrl.check_fit(model.config, sae)
    with pytest.raises(UserError, match="width 24"):
        sae.layer = 1
        fsrl.check_fit(small_gemma(hidden_size=16).config, sae)


def test_side_by_side():
    text = fsrl.side_by_side("short", "a line\n\nand one that is longer than a column can be", width=43)
    assert text.splitlines()[0].split("|")[1].strip() == "steered" and all(len(line) <= 43 for line in text.splitlines()) and "(nothing)" in fsrl.side_by_side("", "x")
