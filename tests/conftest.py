"""No test asks a real hub; every test starts from the same random numbers; one pair of short runs for all."""
import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")                # before huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Two short trainings on the lab that differ in their seed, the first of them opened."""
    import fsrl
    import train
    root = tmp_path_factory.mktemp("runs")
    short = ["--steps", "25", "--lr", "0.02", "--eval-pairs", "4", "--train-pairs", "200", "--runs", str(root)]
    for seed, name in enumerate(("one", "two")):
        assert train.main([*short, "--run", name, "--seed", str(seed)]) == 0
    run = fsrl.load_run(root / "one")
    return SimpleNamespace(folder=root / "one", root=root, run=run, tokenizer=run.tokenizer)
