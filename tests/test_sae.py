"""JumpReLU by hand and by finite differences, encode and decode, the two file formats, the trainer."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sae as sae_module
from common import mutant, off, small_gemma, small_sae
from gemma import UserError
from sae import JumpReLUSAE, collect, jumprelu, load_sae, quality, save_sae, step, train_sae


def test_by_hand():
    """Two features, a value just below, at and above the threshold (strictly above fires)."""
    sae = JumpReLUSAE(torch.eye(2), torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.5]))
    x = torch.tensor([[0.4, -0.6], [0.5, -0.5], [0.6, 1.0], [-3.0, -3.0]])
    f = sae.encode(x)
    assert f.tolist() == [[0.0, 0.0], [0.0, 0.0], [pytest.approx(0.6), 2.0], [0.0, 0.0]]
    assert off(sae.decode(f)[2], torch.tensor([11.6, 21.0])) < 1e-6
    assert jumprelu(torch.tensor([[-0.2, 0.3]]), torch.tensor([-1.0, -1.0])).tolist() == [[0.0, pytest.approx(0.3)]]       # threshold below zero: a ReLU
    assert off(jumprelu(x + sae.b_enc, sae.threshold), f) == 0


def smoothed(p, threshold, bandwidth):
    """The step whose derivative the straight-through one is: a ramp of width `bandwidth`."""
    return ((p - threshold) / bandwidth + 0.5).clamp(0, 1)


@pytest.mark.parametrize("module", ["real", "half bandwidth", "wrong sign"])
def test_straight_through_gradients(module):
    """Against finite differences of the smoothed step, and of the expectation of JumpReLU over a spread of inputs."""
    changes = {"real": [], "half bandwidth": [("return None, (-1 / ctx.bandwidth", "return None, (-2 / ctx.bandwidth"), ("slope = -(threshold / ctx.bandwidth)", "slope = -(2 * threshold / ctx.bandwidth)")],
               "wrong sign": [("return None, (-1 / ctx.bandwidth", "return None, (1 / ctx.bandwidth"), ("slope = -(threshold / ctx.bandwidth)", "slope = (threshold / ctx.bandwidth)")]}
    m = mutant("sae", *changes[module]) if changes[module] else sae_module
    n, width, eps = 200_001, 0.2, 0.01
    p = torch.linspace(0, 2, n, dtype=torch.float64)[:, None].requires_grad_()       # uniform density
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    m.step(p, threshold, width).mean().backward()
    finite = (smoothed(p, 0.7 + eps, width).mean() - smoothed(p, 0.7 - eps, width).mean()) / (2 * eps)
    good = abs(threshold.grad.item() - finite.item()) < 1e-3 and p.grad is None
    threshold.grad = None
    m.jumprelu(p, threshold, width).mean().backward()
    expected = lambda t: (p * (p > t)).mean().item()      # noqa: E731
    finite = (expected(0.7 + eps) - expected(0.7 - eps)) / (2 * eps)
    good &= abs(threshold.grad.item() - finite) < 1e-3
    assert good is (module == "real")
    if module == "real":
        assert torch.equal(p.grad[:, 0] * n, (p[:, 0] > 0.7).double())
    assert step(torch.tensor([[0.8, 0.6]]), torch.tensor([0.7, 0.7])).tolist() == [[1.0, 0.0]]


def test_thresholds_stay_in_float32():
    model = small_gemma()
    sae = small_sae(model, dtype=torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16 and sae.threshold.dtype == sae.b_enc.dtype == torch.float32
    assert sae.encode(torch.randn(3, 24).bfloat16()).dtype == torch.float32


def test_gemma_scope_files(tmp_path):
    sae, folder = small_sae(small_gemma()), tmp_path / "layer_12" / "width_16k" / "average_l0_82"
    save_sae(sae, folder)
    again = load_sae(folder)
    x = torch.randn(5, 24)
    assert off(again.encode(x), sae.encode(x)) == 0 and again.layer == 12 and again.identity() == sae.identity()
    assert small_sae(small_gemma(), seed=9).identity() != sae.identity()
    assert load_sae(tmp_path / "layer_12", dtype=torch.bfloat16).identity() == sae.identity()
    again.W_dec.copy_(torch.nn.functional.normalize(torch.randn(again.W_dec.shape), dim=-1))          # the same encoder on other directions is another SAE
    assert again.identity() != sae.identity()
    with np.load(folder / "params.npz") as arrays:                      # lower-case names, as some files have them
        np.savez_compressed(folder / "params.npz", **{k.lower(): v for k, v in arrays.items()})
    assert off(load_sae(folder).decode(sae.encode(x)), sae.decode(sae.encode(x))) == 0
    np.savez(folder / "params.npz", W_enc=np.zeros((2, 3)))
    with pytest.raises(UserError, match="b_enc is missing"):
        load_sae(folder)
    np.savez(folder / "params.npz", **{n: getattr(sae, n).numpy() for n in sae_module.NAMES if n != "b_dec"}, b_dec=np.zeros(7, np.float32))
    with pytest.raises(UserError, match=r"b_dec has shape \(7,\)"):
        load_sae(folder)


def saelens(folder, sae, **cfg):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({"architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": "none",
                                                 "metadata": {"hook_name": "blocks.5.hook_resid_post"}, **cfg}))
    tensors = {n: getattr(sae, n).detach().clone() for n in sae_module.NAMES}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_saelens_files(tmp_path):
    sae, x = small_sae(small_gemma()), torch.randn(5, 24)
    a = load_sae(saelens(tmp_path / "a", sae))
    assert off(a.encode(x), sae.encode(x)) == 0 and a.layer == 5
    b = load_sae(saelens(tmp_path / "b", sae, apply_b_dec_to_input=True))                  # x - b_dec goes in
    assert off(b.encode(x), sae.encode(x - sae.b_dec)) < 1e-5 and off(b.encode(x), sae.encode(x)) > 0.1
    c = load_sae(saelens(tmp_path / "c", sae, architecture="standard"))
    assert off(c.encode(x), (x @ sae.W_enc + sae.b_enc).relu()) < 1e-6
    for cfg, message in (({"architecture": "topk"}, "only 'jumprelu' and 'standard'"), ({"normalize_activations": "layer_norm"}, "normalize_activations is"),
                         ({"metadata": {"hook_name": "blocks.5.hook_mlp_out"}}, "steers the output of a block")):
        with pytest.raises(UserError, match=message):
            load_sae(saelens(tmp_path / "d", sae, **cfg))


def test_no_sae_there(tmp_path):
    with pytest.raises(UserError, match="neither params.npz"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_sae(tmp_path / "layer_1")
    with pytest.raises(UserError, match="could not be asked"):
        load_sae("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82")
    (tmp_path / "params.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable npz"):
        load_sae(tmp_path)


def sparse_data(n=8000, D=16, features=32, seed=0):
    """States that are sums of about three of 32 directions."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, D, generator=g), dim=-1)
    used = (torch.rand(n, features, generator=g) < 3 / features) * (1 + torch.rand(n, features, generator=g))
    return used @ directions * 5 + torch.randn(D, generator=g)


def test_training_finds_sparse_structure():
    x = sparse_data()
    sae = train_sae(x[:7000], 48, l0=4.0, steps=600, batch_size=512, layer=2, progress=False)
    q = quality(sae, x[7000:])
    assert q["fvu"] < 0.15 and q["l0"] < 6 and sae.layer == 2, q
    assert off(sae.W_dec.norm(dim=-1), torch.ones(48)) < 1e-5 and (sae.threshold > 0).all() and not sae.threshold.requires_grad
    again = train_sae(x[:7000], 48, l0=4.0, steps=600, batch_size=512, progress=False)
    assert torch.equal(again.W_enc, sae.W_enc)


def test_quality_by_hand():
    sae = JumpReLUSAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), torch.tensor([0.5, 9.0]))
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0], [0.2, 1.0]])       # the second feature never fires; the first not at 0.2
    q = quality(sae, x)
    assert q["l0"] == 0.75 and q["dead"] == 0.5
    assert q["fvu"] == pytest.approx((4 * 1.0 + 0.04) / (x - x.mean(0)).square().sum().item())


def test_states_leave_out_bos_and_padding():
    model = small_gemma()
    rows = [[2, 5, 6, 7], [2, 9], [2, 8, 1]]
    x = collect(model, rows, 1, progress=False)
    assert len(x) == 5 and off(x[:3], model.blocks(model.embed(torch.tensor(rows[:1])), 0, 2)[0, 1:]) < 1e-5


def test_command_line(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("The color of Mara is red.\nIt is blue.\n" * 300)
    out = tmp_path / "out"
    assert sae_module.main(["--text", str(text), "--out", str(out), "--width", "64", "--l0", "8", "--steps", "20"]) == 0
    assert "FVU" in capsys.readouterr().out and len(list(out.glob("layer_3/width_64/average_l0_*/params.npz"))) == 1
    for args, message in ((["--text", str(text), "--out", str(out)], "exists"), (["--text", "none.txt", "--out", "x"], "cannot be read"),
                          (["--text", str(text), "--out", "x", "--layer", "6"], "blocks 0 to 5"), (["--text", str(text), "--out", "x", "--width", "0"], "above 0")):
        assert sae_module.main(args) == 2 and message in capsys.readouterr().err
    bad = tmp_path / "t.jsonl"
    bad.write_text('{"text": "a"}\n{"txt": 1}\n')
    assert sae_module.main(["--text", str(bad), "--out", "x"]) == 2 and "line 2" in capsys.readouterr().err
