"""JumpReLU by hand and by finite differences, encode and decode, the two file formats, the trainer and its command."""
import itertools
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

import sae as sae_module
from common import mutant, off, small_gemma, small_sae
from gemma import decode, load_gemma, load_tokenizer
from lib.files import UserError
from lib.sae_files import NAMES
from sae import JumpReLUSAE, SAETrain, collect, jumprelu, load_sae, quality, rows_of, save_sae, step, train_sae


def test_by_hand():
    """Two features, a value just below, at and above the threshold (strictly above fires)."""
    W_dec = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    b_dec, threshold = torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.5])
    sae = JumpReLUSAE(torch.eye(2), torch.tensor([0.0, 1.0]), W_dec, b_dec, threshold)
    x = torch.tensor([[0.4, -0.6], [0.5, -0.5], [0.6, 1.0], [-3.0, -3.0]])
    f = sae.encode(x)
    assert f.tolist() == [[0.0, 0.0], [0.0, 0.0], [pytest.approx(0.6), 2.0], [0.0, 0.0]]
    assert off(sae.decode(f)[2], torch.tensor([11.6, 21.0])) < 1e-6
    below_zero = jumprelu(torch.tensor([[-0.2, 0.3]]), torch.tensor([-1.0, -1.0]))
    assert below_zero.tolist() == [[0.0, pytest.approx(0.3)]]                       # a ReLU
    assert off(jumprelu(x + sae.b_enc, sae.threshold), f) == 0


BROKEN_SLOPES = {
    "real": [],
    "half bandwidth": [(".sum(0) / ctx.bandwidth", ".sum(0) / ctx.bandwidth * 2")],
    "wrong sign": [(".sum(0) / ctx.bandwidth", ".sum(0) / -ctx.bandwidth")],
    "no threshold": [("-threshold * _at_threshold", "-_at_threshold")],
}


@pytest.mark.parametrize("which", BROKEN_SLOPES)
def test_straight_through_gradients(which):
    """Against finite differences of the smoothed step, and of the expectation of JumpReLU over a spread of inputs."""
    m = mutant("sae", *BROKEN_SLOPES[which]) if BROKEN_SLOPES[which] else sae_module
    n, width, eps = 200_001, 0.2, 0.01
    p = torch.linspace(0, 2, n, dtype=torch.float64)[:, None].requires_grad_()       # uniform density

    def smoothed(t):
        """The step whose derivative the straight-through one is: a ramp."""
        return ((p - t) / width + 0.5).clamp(0, 1).mean()

    def expected(t):
        return (p * (p > t)).mean().item()
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    m.step(p, threshold, width).mean().backward()
    finite = (smoothed(0.7 + eps) - smoothed(0.7 - eps)) / (2 * eps)
    good = abs(threshold.grad.item() - finite.item()) < 1e-3 and p.grad is None
    threshold.grad = None
    m.jumprelu(p, threshold, width).mean().backward()
    finite = (expected(0.7 + eps) - expected(0.7 - eps)) / (2 * eps)
    good &= abs(threshold.grad.item() - finite) < 1e-3
    assert good is (which == "real")
    if which == "real":
        assert torch.equal(p.grad[:, 0] * n, (p[:, 0] > 0.7).double())
    assert step(torch.tensor([[0.8, 0.6]]), torch.tensor([0.7, 0.7])).tolist() == [[1.0, 0.0]]


def test_thresholds_stay_in_float32():
    sae = small_sae(small_gemma(), dtype=torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16 and sae.threshold.dtype == sae.b_enc.dtype == torch.float32
    assert sae.encode(torch.randn(3, 24).bfloat16()).dtype == torch.float32


# ---- files ---------------------------------------------------------------------------------------

def test_gemma_scope_files(tmp_path):
    sae, folder = small_sae(small_gemma()), tmp_path / "layer_12" / "width_16k" / "average_l0_82"
    save_sae(sae, folder)
    again = load_sae(folder)
    x = torch.randn(5, 24)
    assert off(again.encode(x), sae.encode(x)) == 0 and again.layer == 12 and again.identity() == sae.identity()
    assert small_sae(small_gemma(), seed=9).identity() != sae.identity()
    assert load_sae(tmp_path / "layer_12", dtype=torch.bfloat16).identity() == sae.identity()
    again.W_dec.copy_(normalize(torch.randn(again.W_dec.shape), dim=-1))
    assert again.identity() != sae.identity()           # the same encoder on other directions is another SAE
    with np.load(folder / "params.npz") as arrays:      # lower-case names, as some files have them
        np.savez_compressed(folder / "params.npz", **{k.lower(): v for k, v in arrays.items()})
    assert off(load_sae(folder).decode(sae.encode(x)), sae.decode(sae.encode(x))) == 0
    np.savez(folder / "params.npz", W_enc=np.zeros((2, 3)))
    with pytest.raises(UserError, match="does not hold an SAE .*b_enc"):
        load_sae(folder)


BAD_ARRAYS = [("b_dec", 7, 0.0, r"b_dec has shape \(7,\)"), ("W_enc", 3, 0.0, r"W_enc has shape \(3,\)"),
              ("threshold", 32, float("inf"), "threshold holds NaN or infinity"),
              ("W_dec", (32, 24), float("nan"), "W_dec holds NaN or infinity")]


@pytest.mark.parametrize("name, shape, value, message", BAD_ARRAYS)
def test_arrays_that_are_no_sae(tmp_path, name, shape, value, message):
    arrays = {name: p.numpy() for name, p in small_sae(small_gemma()).named_parameters()}
    arrays[name] = np.full(shape, value, np.float32)
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


def test_the_labs_sae_has_kept_its_name():
    """Labels, results and calibration are keyed by this digest."""
    assert load_sae("tiny/sae").identity() == "5db2b0ff94b4115b"


OTHER_PLACES = ["gemma-scope-2b-pt-mlp", "gemma-scope-9b-pt-att", "gemma-scope-2b-pt-transcoders", "mlp_out",
                "models--google--gemma-scope-2b-pt-mlp/snapshots/0", "blocks.5.attn.hook_z"]


@pytest.mark.parametrize("name", OTHER_PLACES)
def test_an_sae_of_another_place_is_known_by_its_name(tmp_path, name):
    folder = tmp_path / name / "layer_12" / "width_16k" / "average_l0_82"
    save_sae(small_sae(small_gemma()), folder)
    with pytest.raises(UserError, match="its name says .* output of a block"):
        load_sae(folder)


def saelens(folder, sae, tensors=None, **cfg):
    folder.mkdir(exist_ok=True)
    cfg = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": "none",
           "metadata": {"hook_name": "blocks.5.hook_resid_post"}, **cfg}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {**{name: getattr(sae, name).detach().clone() for name in NAMES}, **(tensors or {})}
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


OTHER_KINDS = [({"architecture": "topk"}, "architecture is topk"),
               ({"normalize_activations": "layer_norm"}, "normalize_activations is"),
               ({"metadata": {"hook_name": "blocks.5.hook_mlp_out"}}, "steers the output of a block"),
               ({"metadata": {}, "reshape_activations": "hook_z"}, "'hook_z'.* output of a block")]


@pytest.mark.parametrize("cfg, message", OTHER_KINDS)
def test_saelens_files_of_another_kind(tmp_path, cfg, message):
    with pytest.raises(UserError, match=message):
        load_sae(saelens(tmp_path, small_sae(small_gemma()), **cfg))


FOLDED_IN_HALF = [('["b_dec"].float() @ tensors["W_enc"].float()', '["b_dec"] @ tensors["W_enc"]')]


@pytest.mark.parametrize("changes", [[], FOLDED_IN_HALF])
def test_a_half_precision_file_is_folded_in_float32(tmp_path, changes):
    """A large b_dec: what is subtracted from it inside the SAE has to be subtracted as precisely from the bias."""
    read = mutant("lib.sae_files", *changes).read_sae if changes else sae_module.read_sae
    sae = small_sae(small_gemma(), dtype=torch.float64)
    half = {name: getattr(sae, name).half() for name in NAMES}
    half["b_dec"] = half["b_dec"] * 300
    tensors, _ = read(str(saelens(tmp_path, sae, half, apply_b_dec_to_input=True)))
    x = (torch.randn(50, 24, dtype=torch.float64) + half["b_dec"].double())
    exact = {name: t.double() for name, t in half.items()}
    p = (x - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]
    error = (x @ tensors["W_enc"].double() + tensors["b_enc"].double() - p).abs().max()
    assert (error.item() < 0.001) is (not changes)


def test_a_finetuned_saelens_file(tmp_path):
    """decode(f) is (f · factor) W_dec + b_dec there, and f is left as it is."""
    sae, x = small_sae(small_gemma()), torch.randn(5, 24)
    factor = torch.rand(32) + .5
    for name in ("finetuning_scaling_factor", "scaling_factor"):         # older files call it so
        tuned = load_sae(saelens(tmp_path / name, sae, {name: factor}, finetuning_scaling_factor=True))
        f = sae.encode(x)
        assert torch.equal(tuned.encode(x), f) and off(tuned.decode(f), sae.decode(f * factor)) < 1e-6
        assert off(tuned.decode(f), sae.decode(f)) > 0.1
    with pytest.raises(UserError, match="holds a scaling factor"):
        load_sae(saelens(tmp_path / "a", sae, {"scaling_factor": factor}))
    idle = load_sae(saelens(tmp_path / "a", sae, {"scaling_factor": torch.ones(32)}))
    assert torch.equal(idle.W_dec, sae.W_dec)


def test_no_sae_there(tmp_path):
    with pytest.raises(UserError, match="neither params.npz"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_sae(tmp_path / "layer_1")
    with pytest.raises(UserError, match="could not be asked"):
        load_sae("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82")
    (tmp_path / "params.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="does not hold an SAE"):
        load_sae(tmp_path)


# ---- training ------------------------------------------------------------------------------------

def sparse_data(n=8000, D=16, features=32, seed=0):
    """States that are sums of about three of the true directions. -> states (n,D), directions (features,D)"""
    g = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(features, D, generator=g), dim=-1)
    used = (torch.rand(n, features, generator=g) < 3 / features) * (1 + torch.rand(n, features, generator=g))
    return used @ directions * 5 + torch.randn(D, generator=g), directions


def test_training_finds_sparse_structure():
    x, _ = sparse_data()
    sae = train_sae(x[:7000], 48, l0=4.0, steps=600, batch_size=512, layer=2, progress=False)
    q = quality(sae, x[7000:])
    assert q["fvu"] < 0.15 and q["l0"] < 6 and sae.layer == 2, q
    assert off(sae.W_dec.norm(dim=-1), torch.ones(48)) < 1e-5
    assert (sae.threshold > 0).all() and not sae.threshold.requires_grad


def test_a_dictionary_wider_than_needed_does_no_harm():
    """Three times as many features as there are directions. When dead features were pointed at what is badly
    reconstructed, they fired everywhere, and the penalty raised all thresholds: .977, L0 4.9, FVU .13 here."""
    x, directions = sparse_data(D=32, features=64, seed=1)
    sae = train_sae(x[:7000], 192, l0=2.0, steps=1500, batch_size=128, seed=1, progress=False)
    q, found = quality(sae, x[7000:]), (directions @ sae.W_dec.T).amax(1).mean()
    assert found > 0.99 and q["l0"] < 4 and q["fvu"] < 0.12, (found, q)


def lab_states(conversations=400):
    """What `python sae.py --pairs tiny/pairs/style` trains on, the first of it."""
    rows = rows_of(SAETrain(pairs="tiny/pairs/style", out="x"), load_tokenizer("tiny/model"))
    return collect(load_gemma("tiny/model"), list(itertools.islice(rows, conversations)), 3, progress=False)


def test_dead_features_are_pulled_back():
    """On the lab's states, hurried so that many die: the pull brings back a third of them, and costs nothing."""
    x, results = lab_states(), []
    for m in (sae_module, mutant("sae", ("+ PULL * pull", ""))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(m, "SILENT", 20)
            sae = m.train_sae(x[:-2000], 256, l0=1.0, steps=600, batch_size=32, lr=0.01, seed=2, progress=False)
        results.append(quality(sae, x[-2000:]))
    pulled, left = results
    assert pulled["dead"] < 0.8 * left["dead"] and pulled["fvu"] < 1.02 * left["fvu"], results


def test_where_the_states_lie_does_not_matter():
    """A mean of any size, and any unit: the same features."""
    x, _ = sparse_data(n=1000)
    how = dict(l0=4.0, steps=60, batch_size=256, progress=False)
    near, far = train_sae(x, 48, **how), train_sae(3 * (x + 100), 48, **how)
    assert off(far.W_dec, near.W_dec) < 1e-3 and off(far.threshold / 3, near.threshold) < 1e-3
    assert off(far.decode(far.encode(3 * (x + 100))) / 3 - 100, near.decode(near.encode(x))) < 0.01
    assert torch.equal(train_sae(x, 48, **how).W_enc, near.W_enc)                    # and the same each time


def test_training_that_cannot_work():
    x, _ = sparse_data(n=300)
    with pytest.raises(UserError, match="300 token states are too few"):
        train_sae(x, 8, progress=False)
    for bad in (torch.ones(300, 16), x * torch.nan):
        with pytest.raises(UserError, match="NaN, or are all the same"):
            train_sae(bad, 8, batch_size=64, progress=False)
    with pytest.raises(FloatingPointError, match="at step 50; lower lr"):
        train_sae(x, 8, batch_size=64, steps=60, lr=1e30, progress=False)


def test_quality_by_hand():
    sae = JumpReLUSAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), torch.tensor([0.5, 9.0]))
    # The second feature never fires; the first not at 0.2.
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0], [0.2, 1.0]])
    q = quality(sae, x)
    assert q["l0"] == 0.75 and q["dead"] == 0.5
    assert q["fvu"] == pytest.approx((4 * 1.0 + 0.04) / (x - x.mean(0)).square().sum().item())


def test_states_leave_out_bos_and_padding():
    model = small_gemma()
    rows = [[2, 5, 6, 7], [2, 9], [2, 8, 1]]
    x = collect(model, rows, 1, progress=False)
    assert len(x) == 5 and off(x[:3], model.blocks(model.embed(torch.tensor(rows[:1])), 0, 2)[0, 1:]) < 1e-5


# ---- the command ---------------------------------------------------------------------------------

SMALL = ["--width", "64", "--l0", "8", "--steps", "20"]


def test_on_text(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("The color of Mara is red.\nIt is blue.\n\nThey said <start_of_turn> to <end_of_turn>.\n" * 100)
    out = tmp_path / "out"
    assert sae_module.main(["--text", str(text), "--out", str(out), *SMALL]) == 0
    said = capsys.readouterr()
    assert "FVU" in said.out and len(list(out.glob("layer_3/width_64/average_l0_*/params.npz"))) == 1
    notes = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "line 4 holds <start_of_turn>" in notes[0] and "--pairs" in notes[0]
    (tmp_path / "t.jsonl").write_text('{"text": "It is blue."}\n\n{"text": " "}\n{"text": "Red"}')
    tokenizer = load_tokenizer("tiny/model")
    rows = list(rows_of(SAETrain(text=str(tmp_path / "t.jsonl"), out="x"), tokenizer))
    assert [decode(tokenizer, row) for row in rows] == ["It is blue.", "Red"] and rows[0][0] == 2


def test_on_pairs(tmp_path, capsys):
    """Both conversations of a pair, in the chat format that training and chat use."""
    out = tmp_path / "out"
    args = ["--pairs", "tiny/pairs/style", "--max-tokens", "4000", "--out", str(out), *SMALL]
    assert sae_module.main(args) == 0
    states = int(re.search(r"on (\d+) held-out", capsys.readouterr().out)[1])
    assert 300 < states <= 400          # a tenth, BOS left out
    pairs = tmp_path / "p.jsonl"
    pairs.write_text(json.dumps({"prompt": "What is red?", "chosen": "Mara is.", "rejected": "No."}))
    tokenizer = load_tokenizer("tiny/model")
    rows = rows_of(SAETrain(pairs=str(pairs), out="x"), tokenizer)
    rows = [tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    start = "<bos><start_of_turn>user\nWhat is red?<end_of_turn>\n<start_of_turn>model\n"
    assert rows == [start + "Mara is.<end_of_turn>", start + "No.<end_of_turn>"]
    pairs.write_text(json.dumps({"prompt": [{"role": "system", "content": "a"}], "chosen": "b", "rejected": "c"}))
    assert sae_module.main(["--pairs", str(pairs), "--out", str(tmp_path / "no")]) == 2
    assert "p.jsonl, line 1: the prompt has the roles ['system']" in capsys.readouterr().err


MISTAKES = [
    ("--text t.txt --out there", "--out there exists; name a folder that does not"),
    ("--text none.txt", "none.txt: cannot be read"),
    ("", "one of the two"),
    ("--text t.txt --pairs tiny/pairs/style", "one of the two"),
    ("--text t.txt --layer 6", "--layer is 6; this model has blocks 0 to 5"),
    ("--text t.txt --layer -1", "--layer is -1; it has to be at least 0"),
    ("--text t.txt --width 0", "--width is 0; it has to be at least 1"),
    ("--text t.txt --lr inf", "--lr is inf; it has to be a finite number"),
    ("--text t.txt --l0 nan", "--l0 is nan; it has to be a finite number"),
    ("--text t.txt", "token states are too few for an SAE"),
    ("--text t.jsonl", 'line 2: not a JSON object with a "text"'),
]


@pytest.mark.parametrize("args, message", MISTAKES)
def test_one_sentence_for_each_mistake(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "t.txt").write_text("It is red.\n")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    assert sae_module.main(args.split()) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae.py: ")]
    assert len(said) == 1 and message in said[0] and not (tmp_path / "my_sae").exists()
