"""Makes tests/golden.safetensors: weights, input and every stage of transformers' Gemma-2, so that parity is checked
where transformers is not installed. `PYTHONPATH=. python tests/golden.py` (needs requirements-extra.txt)."""
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import CONFIG, small_gemma

HERE = Path(__file__).resolve().parent
TOKENS = 20        # more than three windows


def oracle(model, dtype=torch.float32):
    """transformers' Gemma-2 with the weights of ours, eager attention (its SDPA path has no soft-cap)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    numbers = {name: getattr(model.config, name) for name in CONFIG}
    numbers |= {"rope_theta": 10_000.0, "rms_norm_eps": model.config.rms_norm_eps}
    config = Gemma2Config(**numbers, attn_implementation="eager", pad_token_id=0, bos_token_id=2, eos_token_id=1)
    theirs = Gemma2ForCausalLM(config).to(dtype).eval()
    weights = {f"model.{name}": p for name, p in model.named_parameters()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing, extra = theirs.load_state_dict(weights, strict=False)
    assert not missing and not extra, (missing, extra)
    return theirs


@torch.no_grad()
def stages(theirs, ids):
    """{"embed", "block 0", ..., "logits"} of transformers' model, each block's raw output by a hook:
    hidden_states[-1] would be after the norm."""
    out, hooks = {}, []

    def keep(name):
        def hook(module, args, result):
            out[name] = result[0] if isinstance(result, tuple) else result
        return hook
    for i, layer in enumerate(theirs.model.layers):
        hooks.append(layer.register_forward_hook(keep(f"block {i}")))

    def keep_input(module, args):
        out["embed"] = args[0]
    hooks.append(theirs.model.layers[0].register_forward_pre_hook(keep_input))
    out["logits"] = theirs(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return out


if __name__ == "__main__":
    model = small_gemma()
    ids = torch.randint(4, CONFIG["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(5))
    tensors = {name: t.clone().contiguous() for name, t in stages(oracle(model), ids).items()}
    print({name: round(t.abs().max().item(), 2) for name, t in tensors.items()})
    tensors |= {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    save_file({**tensors, "ids": ids}, HERE / "golden.safetensors", metadata={"format": "pt"})
