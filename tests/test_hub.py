"""The loaders against a hub on this machine: the same readers read a folder and a repo id."""
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import ROOT, small_gemma, small_sae
from sae import save_sae
from test_gemma import write_model

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that huggingface_hub uses for public downloads. files: {(kind, repo): {path: bytes}}."""
    files, log = {}, []

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.log.append(path)
        kind = "datasets" if "/datasets/" in path or path.startswith("/datasets/") else "models"
        for (its, repo), files in self.files.items():
            if its != kind or f"/{repo}/" not in path + "/":
                continue
            if files is None:
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
            rest = path.split(f"/{repo}", 1)[1]
            if rest.startswith("/tree/"):
                return self.answer(200, json.dumps([{"type": "file", "oid": hashlib.sha1(b).hexdigest(), "size": len(b), "path": p} for p, b in files.items()]).encode(),
                                   Content_Type="application/json")
            if rest.startswith("/resolve/"):
                name = rest.split("/", 3)[3]
                if name in files:
                    return self.answer(200, files[name], X_Repo_Commit=SHA, ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            return self.answer(200, json.dumps({"id": repo, "sha": SHA, "private": False, "siblings": [{"rfilename": p} for p in files]}).encode(),
                               Content_Type="application/json")
        self.answer(404 if path.startswith("/api/agent") else 401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


CLIENT = """
import json, sys
import gemma, sae, simpo
out = {}
def tried(name, do):
    try:
        out[name] = do()
    except gemma.UserError as error:
        out[name] = str(error)
model = gemma.load_gemma("org/model")
out["parameters"] = sum(p.numel() for p in model.parameters())
out["tokens"] = gemma.load_tokenizer("org/model").get_vocab_size()
s = sae.load_sae("org/scope:layer_1/width_32/average_l0_9")
out["sae"] = [s.d_in, s.d_sae, s.layer]
out["pairs"] = len(simpo.read_pairs("org/pairs", "train"))
tried("gated", lambda: gemma.load_gemma("org/gated"))
tried("absent", lambda: gemma.load_gemma("org/absent"))
tried("no sae", lambda: sae.load_sae("org/scope:layer_2/width_32/average_l0_9"))
tried("no split", lambda: simpo.read_pairs("org/pairs", "test"))
print(json.dumps(out))
"""


def test_hub(tmp_path):
    model = small_gemma()
    folder = write_model(tmp_path / "model", model)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files["tokenizer.json"] = (ROOT / "tiny" / "model" / "tokenizer.json").read_bytes()
    save_sae(small_sae(model), tmp_path / "sae")
    scope = {f"layer_1/width_32/average_l0_{n}/params.npz": (tmp_path / "sae" / "params.npz").read_bytes() for n in (9, 80)}
    pair = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode() + b"\n"
    Hub.files = {("models", "org/model"): {**files, "pytorch_model.bin": b"a pickle"}, ("models", "org/scope"): scope, ("models", "org/gated"): None,
                 ("datasets", "org/pairs"): {"train.jsonl": pair * 2, "huge.bin": b"x"}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", CLIENT], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["parameters"] == sum(p.numel() for p in model.parameters()) and out["sae"] == [24, 32, 1] and out["pairs"] == 2 and out["tokens"] > 500
    assert "accept its licence on https://huggingface.co/org/gated" in out["gated"] and "no such model on the Hub" in out["absent"]
    assert "has no SAE under layer_2" in out["no sae"] and "no pairs of the split 'test'" in out["no split"]
    assert not any(name in path for path in Hub.log for name in ("pytorch_model.bin", "average_l0_80/", "huge.bin")), "only what is needed is fetched"


def test_offline_is_one_sentence():
    from gemma import UserError, fetch
    with pytest.raises(UserError, match="could not be asked"):
        fetch("org/never-seen", ["config.json"])
