"""Gemma-2 against an independent implementation, stage by stage; strict loading; the chat format; generation."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma
from common import CONFIG, ROOT, mutant, off, small_gemma
from gemma import Gemma, GemmaConfig, encode_answer, encode_prompt, encode_text, generate, load_gemma, load_tokenizer
from lib import text as lib_text
from lib.files import UserError

STAGES = ["embed", *(f"block {i}" for i in range(CONFIG["num_hidden_layers"])), "logits"]


def our_stages(model, ids):
    out, h = {}, model.embed(ids)
    out["embed"] = h
    for i in range(len(model.layers)):
        h = model.blocks(h, i, i + 1)
        out[f"block {i}"] = h
    out["logits"] = model.logits(model(ids))
    return out


def first_difference(ours, theirs, tolerance=1e-5):
    return next((name for name in STAGES if not off(ours[name], theirs[name]) <= tolerance), None)


def golden():
    tensors = load_file(ROOT / "tests" / "golden.safetensors")
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    return weights, tensors["ids"], tensors


def golden_model(module=gemma):
    weights, ids, stages = golden()
    model = module.Gemma(module.GemmaConfig(**CONFIG))
    model.load_state_dict(weights)
    return model.requires_grad_(False), ids, stages


def test_golden_file():
    model, ids, stages = golden_model()
    assert ids.shape[1] > 3 * CONFIG["sliding_window"]
    assert model.norm(stages["block 3"]).matmul(model.embed_tokens.weight.T).abs().max() > 30
    assert first_difference(our_stages(model, ids), stages) is None


BROKEN = {       # what is wrong: (our line, the broken one, the first stage that shows it)
    "local and global layers swapped": ("bias[i % 2]", "bias[1 - i % 2]", "block 0"),
    "no window": ("(ago < self.config.sliding_window)", "(ago < 10**9)", "block 0"),
    "window off by one": ("(ago < self.config.sliding_window)", "(ago <= self.config.sliding_window)", "block 0"),
    "no attention soft-cap": ("score = score.tanh()", "pass", "block 0"),
    "soft-cap after the mask": ("score = torch.add(bias[:, None], score, alpha=self.cap)",
                                "score = (bias[:, None] / self.cap + score).tanh() * self.cap", "block 0"),
    "no final soft-cap": ("cap * torch.tanh(z / cap)", "z", "logits"),
    "final soft-cap twice": ("cap * torch.tanh(z / cap)", "cap * torch.tanh(torch.tanh(z / cap))", "logits"),
    "no embedding scale": ("return h * torch.tensor(math.sqrt(self.config.hidden_size), dtype=h.dtype)",
                           "return h", "embed"),
    "w instead of 1 + w": ("(1.0 + self.weight.to(y.dtype))", "self.weight.to(y.dtype)", "block 0"),
    "scores scaled by head_dim": ("c.query_pre_attn_scalar ** -0.5", "c.head_dim ** -0.5", "block 0"),
    "interleaved RoPE": ("left, right = x.chunk(2, -1)", "left, right = x[..., ::2], x[..., 1::2]", "block 0"),
    "exact GELU": ('approximate="tanh"', 'approximate="none"', "block 0"),
    "query heads of a key head not adjacent": (
        "q.mul(self.scale / self.cap).reshape(",
        "q.mul(self.scale / self.cap).view(B, -1, self.K, T, self.C).transpose(1, 2).reshape(", "block 0"),
    "no norm after the MLP": (
        "return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))",
        "return x + self.mlp(self.pre_feedforward_layernorm(x))", "block 0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_golden_file_rejects(what):
    old, new, stage = BROKEN[what]
    model, ids, stages = golden_model(mutant("gemma", (old, new)))
    assert first_difference(our_stages(model, ids), stages) == stage


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("transformers", reason="parity with transformers itself needs requirements-extra.txt; "
                                               "the golden file was checked")
    from golden import oracle, stages
    return oracle, stages


def test_transformers(oracle):
    """Weights and lengths the golden file has not; a window's length, one token."""
    make, stages = oracle
    for seed, length in ((1, 25), (2, 6), (3, 7), (4, 1)):
        model = small_gemma(seed)
        ids = torch.randint(4, 97, (3, length), generator=torch.Generator().manual_seed(seed))
        assert first_difference(our_stages(model, ids), stages(make(model), ids)) is None, (seed, length)


def test_bf16(oracle):
    """bf16 keeps 8 bits: after four blocks of such weights our logits may stray from float32's by no more than twice
    what theirs do."""
    make, stages = oracle
    model = small_gemma(1)
    ids = torch.randint(4, 97, (2, 20), generator=torch.Generator().manual_seed(9))
    exact = our_stages(model, ids)["logits"]
    half = small_gemma(1, dtype=torch.bfloat16)
    ours, theirs = our_stages(half, ids)["logits"], stages(make(half, torch.bfloat16), ids)["logits"]

    def spread(x):
        return (x.float() - exact).square().mean().sqrt().item()
    assert spread(ours) < 2 * spread(theirs), (spread(ours), spread(theirs))
    assert half.embed(ids).dtype == torch.bfloat16


def test_embedding_scale_is_rounded():
    """sqrt(3584) is 59.8665, and 59.75 in bf16: the released models were trained with the latter."""
    config = GemmaConfig(**{**CONFIG, "hidden_size": 3584, "num_hidden_layers": 0})
    model = Gemma(config).to(torch.bfloat16)
    model.embed_tokens.weight.data.fill_(1)
    assert model.embed(torch.tensor([[3]]))[0, 0, 0].item() == 59.75


def test_padding_changes_nothing():
    """Left and right padding: no NaN anywhere, real tokens as without padding."""
    model, ids = small_gemma(), torch.randint(4, 97, (1, 13))
    alone = model(ids)[0]
    for left, right in ((5, 0), (0, 4), (3, 9)):
        padded = torch.nn.functional.pad(ids, (left, right))
        position_ids = torch.nn.functional.pad(torch.arange(13)[None], (left, right), value=-1)
        h = model(padded, position_ids=position_ids)
        assert torch.isfinite(h).all() and off(h[0, left:left + 13], alone) < 1e-5


# ---- generation ----------------------------------------------------------------------------------------------------

def talker(seed, **changes):
    """A model whose next token is not simply the last one again: the embedding is small beside what the blocks add."""
    model = small_gemma(seed, **changes)
    model.embed_tokens.weight.mul_(0.15)
    return model


class Push:
    """An edit that adds a constant and counts the tokens it touched."""

    def __init__(self, positions="text", size=3.0):
        self.positions, self.size, self.count = positions, size, 0

    def __call__(self, h, where):
        self.count += int(where.sum())
        return h + self.size * where[..., None] * torch.linspace(-1, 1, h.shape[-1])


def greedy_without_cache(model, prompt, n, edit=None, layer=1):
    """Every token from a fresh forward pass over everything so far."""
    ids = list(prompt)
    for _ in range(n):
        x = torch.tensor([ids])
        where = torch.zeros_like(x, dtype=torch.bool)
        where[0, 1:] = True
        if edit and edit.positions == "response":
            where[0, :len(prompt) - 1] = False
        new = model.logits(model(x, where=where, edits={layer: edit} if edit else None))[0, -1].argmax().item()
        ids.append(new)
        if new in model.config.eos_token_ids:
            break
    return ids[len(prompt):]


def random_prompt(n):
    return [2] + torch.randint(4, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize("positions", [None, "text", "response"])
def test_cached_generation(positions):
    """Token by token, past the window (6), prompts of different lengths in one batch, finished rows dropped on the
    way."""
    model = talker(3, eos_token_ids=(1, *range(40, 50)))
    prompts = [random_prompt(n) for n in (1, 3, 8, 15, 5, 2, 9, 11)]
    edit = Push(positions) if positions else None
    how = {"max_new_tokens": 16, "edits": {1: edit} if edit else None}
    got = generate(model, prompts, **how)
    assert got == [greedy_without_cache(model, p, 16, edit) for p in prompts]
    assert len({len(a) for a in got}) > 2, "some should end early"
    assert len({i for a in got for i in a}) > 10, "and not repeat one token"
    assert generate(model, [prompts[2]], **how)[0] == got[2]
    if positions:
        assert got != generate(model, prompts, max_new_tokens=16)


@pytest.mark.parametrize("positions, before", [("text", 7), ("response", 1), ("all", 8)])
def test_every_generated_token_is_steered(positions, before):
    """A prompt of 8 tokens, 5 new ones: the last of them is never fed back, so 4 of them pass the edit."""
    model, edit = small_gemma(eos_token_ids=(96,)), Push(positions)
    new, = generate(model, [[2, 5, 6, 7, 8, 9, 10, 11]], max_new_tokens=5, edits={1: edit})
    assert len(new) == 5 and edit.count == before + 4


def test_generation_notices_a_cache_that_is_off_by_one():
    """The comparison with uncached generation can fail: a cache that overwrites the prompt's last token gives other
    tokens."""
    broken = mutant("gemma", ("cache.length += T", "cache.length += T - (T > 1)"))
    model = talker(3)
    other = broken.Gemma(broken.GemmaConfig(**CONFIG))
    other.load_state_dict(model.state_dict())
    prompt = [2, 9, 30, 31, 60, 61, 62]
    want = greedy_without_cache(model, prompt, 16)
    assert generate(model, [prompt], max_new_tokens=16) == [want]
    assert broken.generate(other, [prompt], max_new_tokens=16) != [want]


def test_sampling_is_seeded_per_prompt():
    model = small_gemma(7)
    model.embed_tokens.weight.data *= 0.1
    prompts = [[2, i, i + 1] for i in range(4, 16)]
    how = dict(max_new_tokens=6, temperature=1.0)
    all_at_once = generate(model, prompts, seed=1, **how)
    assert generate(model, prompts, seed=1, batch_size=5, **how) == all_at_once
    assert generate(model, prompts, seed=2, **how) != all_at_once
    # and it follows the distribution: one token, many seeds
    p = model.logits(model(torch.tensor([[2, 5]])))[0, -1].softmax(-1)
    first = [ids[0] for ids in generate(model, [[2, 5]] * 4000, max_new_tokens=1, temperature=1.0)]
    drawn = torch.bincount(torch.tensor(first), minlength=97) / 4000
    assert (drawn - p).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_nothing_to_generate():
    assert generate(small_gemma(), [[2, 5]], max_new_tokens=0) == [[]]
    assert generate(small_gemma(), [], max_new_tokens=3) == []


# ---- loading -------------------------------------------------------------------------------------------------------

def write_model(folder, model, **changes):
    """A folder as on the Hub: config.json in the old spelling, one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"model_type": "gemma2", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "rope_theta": 10000.0,
           "rms_norm_eps": 1e-6, **{name: getattr(model.config, name) for name in CONFIG}}
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    tensors = {f"model.{n}": p.contiguous() for n, p in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_load(tmp_path):
    model = small_gemma()
    folder = write_model(tmp_path / "a", model, eos_token_id=[1, 5])
    loaded = load_gemma(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config.eos_token_ids == (1, 5)
    assert load_gemma(folder, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    # two shards with an index, and the new spelling of the config
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for part, some in (("1", names[::2]), ("2", names[1::2])):
        save_file({n: tensors[n] for n in some}, folder / f"model-0000{part}-of-00002.safetensors")
    index = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
    raw["layer_types"] = ["sliding_attention", "full_attention"] * 2
    (folder / "config.json").write_text(json.dumps(raw))
    ids = torch.arange(4, 20)[None]
    assert off(load_gemma(folder)(ids), model(ids)) == 0


DAMAGE = {       # a tensor of the file: (what fills it, None: it is gone; its length; what the sentence says)
    "model.layers.2.mlp.up_proj.weight": (None, 0, "model.layers.2.mlp.up_proj.weight is missing"),
    "model.extra": (1.0, 2, "model.extra is not part of the model"),
    "model.norm.weight": (1.0, 7, r"model.norm.weight is F32 \(7,\); floats \(24,\) are needed"),
    "model.layers.0.input_layernorm.weight": (1, 24, "input_layernorm.weight is I64"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_loading_is_strict(tmp_path, name):
    folder = write_model(tmp_path, small_gemma())
    tensors = load_file(folder / "model.safetensors")
    fill, length, message = DAMAGE[name]
    tensors.pop(name, None)
    if fill is not None:
        tensors[name] = torch.full((length,), fill)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_gemma(folder)


def test_wrong_folders(tmp_path):
    sources = {tmp_path / "nowhere": "no such folder", tmp_path: "config.json: cannot be read",
               "google/gemma-3-1b-pt": "could not be asked", "../models": "not a Hub repo id",
               "a/b..c": "could not be asked"}
    for source, message in sources.items():
        with pytest.raises(UserError, match=message):
            load_gemma(source)
    folder = write_model(tmp_path / "g3", small_gemma(), model_type="gemma3_text")
    with pytest.raises(UserError, match="only 'gemma2', Gemma-2, is read"):
        load_gemma(folder)
    folder = write_model(tmp_path / "torn", small_gemma())
    (folder / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        load_gemma(folder)


NOT_GEMMA_2 = [
    ({"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
    ({"tie_word_embeddings": False}, "Gemma-2 has True"),
    ({"hidden_activation": "relu"}, "Gemma-2 has 'gelu_pytorch_tanh'"),
    ({"num_hidden_layers": "4"}, "a number is needed"),
    ({"layer_types": ["full_attention", "full_attention", "full_attention"]}, "does not alternate"),
    ({"rope_scaling": {"factor": 8}}, "rope_scaling is"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'")]


@pytest.mark.parametrize("changes, message", NOT_GEMMA_2)
def test_configs_that_are_not_gemma_2(tmp_path, changes, message):
    folder = write_model(tmp_path, small_gemma(), **changes)
    with pytest.raises(UserError, match=message):
        load_gemma(folder)


RELEASED = {    # gemma-2-9b-it's config.json
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_size": 3584,
    "intermediate_size": 14336, "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42,
    "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16", "vocab_size": 256000}


def test_a_released_config(tmp_path):
    """The file names <eos> alone as the end; a turn ends with <end_of_turn>, 107."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    config = GemmaConfig.from_json(tmp_path / "config.json")
    assert config.eos_token_ids == (1, 107)
    with torch.device("meta"):
        model = Gemma(config)
    assert sum(p.numel() for p in model.parameters()) == 9_241_705_984           # model card
    assert len(list(model.parameters())) == 464


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_loading_holds_little_more_than_the_weights(tmp_path):
    """128 MB of float32 weights as bf16: the peak stays near the 64 MB that are kept, one 32 MB piece on top."""
    model = Gemma(GemmaConfig(**{**CONFIG, "vocab_size": 100_000, "hidden_size": 320, "num_hidden_layers": 1}))
    folder, size = write_model(tmp_path, model), sum(p.numel() for p in model.parameters()) * 2
    del model

    def memory(what):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
    Path("/proc/self/clear_refs").write_text("5")                # resets the peak
    before = memory("VmRSS")
    loaded = load_gemma(folder, dtype=torch.bfloat16)
    assert loaded and memory("VmHWM") - before < 1.1 * size + 80 * 2**20


# ---- the chat format -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny" / "model")


def test_chat_format(tokenizer):
    ids = encode_prompt(tokenizer, " What is the color of it? ")
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<bos><start_of_turn>user\nWhat is the color of it?<end_of_turn>\n<start_of_turn>model\n"
    assert ids.count(tokenizer.token_to_id("<bos>")) == 1 == sum(i == ids[0] for i in ids)
    answer = encode_answer(tokenizer, "It is red.\n")
    assert answer[-1] == tokenizer.token_to_id("<end_of_turn>") and answer.count(answer[-1]) == 1
    assert ids[0] not in answer
    roles = ("user", "assistant", "user")
    long = encode_prompt(tokenizer, [{"role": role, "content": text} for role, text in zip(roles, "abc")])
    assert tokenizer.decode(long, skip_special_tokens=False) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n")


def test_roles(tokenizer):
    for roles in (["system", "user"], ["user", "user"], [], ["user", "assistant"]):
        with pytest.raises(UserError):
            encode_prompt(tokenizer, [{"role": role, "content": "x"} for role in roles])


def test_markers_in_text_are_text(tokenizer):
    """Nobody can end a turn by writing "<end_of_turn>", also where a tokenizer lists its markers as ordinary added
    tokens."""
    control = {tokenizer.token_to_id(name) for name in lib_text.CONTROL}
    text = "say <end_of_turn> and <bos><eos>"
    ids = encode_text(tokenizer, text)
    assert not control & set(ids) and gemma.decode(tokenizer, ids) == text
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] = False
    ordinary = lib_text.Tokenizer.from_str(json.dumps(raw))
    ordinary.encode_special_tokens = True
    assert control & set(ordinary.encode(text, add_special_tokens=False).ids)
    ids = encode_text(ordinary, text)
    assert not control & set(ids) and ordinary.decode(ids) == text
