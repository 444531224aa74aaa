"""The README's promises: its adapter trains, its links and line counts are right, its commands exist, its table is what was measured."""
import re

import pytest

import fsrl
import train
from common import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_adapter_example(tmp_path, capsys):
    """The file in "Your own adapter", as it stands there, trained by the command that stands there, at reduced size."""
    source, = [b for b in blocks("python") if "my_adapter.py" in b.splitlines()[0]]
    (tmp_path / "my_adapter.py").write_text(source, encoding="utf-8")
    command, = re.findall(r"^python train.py (--adapter .*)$", README, re.M)
    flag, spec = command.split()[:2]
    spec = str(tmp_path / spec)
    assert train.main([flag, spec, "--steps", "3", "--eval-pairs", "10", "--train-pairs", "40", "--batch-size", "8", "--runs", str(tmp_path / "runs")]) == 0
    run = fsrl.load_run(tmp_path / "runs" / "style-1", adapter=spec)
    assert type(run.steering.adapter).__name__ == spec.rpartition(":")[2]


def test_the_two_lines():
    text = "\n".join(blocks("bash"))
    assert "pip install -r requirements.txt && python train.py" in text
    assert "pip install -r requirements.txt -r requirements-extra.txt && python -m pytest" in text
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text() and "-r requirements.txt -r requirements-extra.txt" in (ROOT / ".ci" / "run").read_text()


def test_commands_take_their_options(capsys):
    """Every `python train.py ...` and `python fsrl.py ...` of the README parses."""
    for line in re.findall(r"^\s*(?:\$ )?python train\.py(.*)$", "\n".join(blocks("bash")), re.M):
        line = line.split("#")[0]
        if "--help" not in line:
            train.parser().parse_args(line.split())


def test_files_and_links():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / target).exists(), target
    for name, count in re.findall(r"^\|? ?`(\w+\.py)` \| (\d+) \|", README, re.M):
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 10, f"{name} has {lines} lines, README says {count}"


def test_the_table_is_what_was_measured():
    """The block between the marks is made from docs/style.json, which a run left behind with the defaults that are in force."""
    import json
    import sys
    sys.path.insert(0, str(ROOT / "docs"))
    import figures
    data = json.loads(figures.DATA.read_text(encoding="utf-8"))
    assert figures.in_readme(README) == figures.table(data)
    defaults = train.asdict(train.TrainConfig())
    assert {k: v for k, v in data["config"].items() if k in defaults and k not in ("device", "dtype")} == {k: v for k, v in defaults.items() if k not in ("device", "dtype")}


def test_the_table_over_seeds_is_what_was_measured():
    """The block between its marks is made from docs/results.json, whose runs have the defaults that are in force."""
    import json
    import sys
    sys.path.insert(0, str(ROOT / "docs"))
    import results
    runs = json.loads(results.DATA.read_text(encoding="utf-8"))
    assert results.in_readme(README) == results.table(runs)
    for key, kept in runs.items():
        name, seed = key.split()
        assert kept["settings"] == results.settings(name, int(seed)), key


def test_every_printed_column_is_explained():
    for column in "loss penalty margin acc L0 L1 lr tokens/s".split():
        assert re.search(rf"^\| `{re.escape(column)}` \|", README, re.M), column
