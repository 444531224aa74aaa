"""Makes tests/golden.safetensors: weights, input and every stage of transformers' Gemma-2, so that parity is checked
where transformers is not installed. `python tests/golden.py` (needs requirements-extra.txt)."""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from common import CONFIG, small_gemma  # noqa: E402

TOKENS = 20        # more than three windows


def oracle(model, dtype=torch.float32):
    """transformers' Gemma-2 with the weights of ours, eager attention (its SDPA path has no soft-cap)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    c = {name: getattr(model.config, name) for name in CONFIG}
    theirs = Gemma2ForCausalLM(Gemma2Config(**c, attn_implementation="eager", rope_theta=10_000.0, rms_norm_eps=model.config.rms_norm_eps,
                                            pad_token_id=0, bos_token_id=2, eos_token_id=1)).to(dtype).eval()
    weights = {f"model.{name}": p for name, p in model.named_parameters()}
    missing, extra = theirs.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, strict=False)
    assert not missing and not extra, (missing, extra)
    return theirs


@torch.no_grad()
def stages(theirs, ids):
    """{"embed", "block 0", ..., "logits"} of transformers' model, each block's raw output by a hook: hidden_states[-1] would be after the norm."""
    out = {}
    hooks = [layer.register_forward_hook(lambda m, args, result, i=i: out.__setitem__(f"block {i}", result[0] if isinstance(result, tuple) else result))
             for i, layer in enumerate(theirs.model.layers)]
    hooks.append(theirs.model.layers[0].register_forward_pre_hook(lambda m, args: out.__setitem__("embed", args[0])))
    out["logits"] = theirs(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return out


if __name__ == "__main__":
    model = small_gemma()
    ids = torch.randint(4, CONFIG["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(5))
    tensors = {name: t.clone().contiguous() for name, t in stages(oracle(model), ids).items()}
    tensors |= {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    save_file({**tensors, "ids": ids}, HERE / "golden.safetensors", metadata={"format": "pt"})
    print({name: round(t.abs().max().item(), 2) for name, t in tensors.items() if not name.startswith("model.")})
