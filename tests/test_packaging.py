"""The wheel and the source distribution, built and installed as users do; the API reference; the project's papers."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import qf_peft

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


def run(*arguments, cwd, **options):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution and the wheel made from it, offline, from a copy that holds nothing built before."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder, cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def package_files():
    """What belongs in a wheel: all of the package but what Python makes there."""
    source = ROOT / "src"
    found = {str(p.relative_to(source)) for p in source.glob("qf_peft/**/*") if p.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_the_package(built):
    _, wheel = built
    assert wheel.name == f"qf_peft-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = file.read(f"qf_peft-{VERSION}.dist-info/METADATA").decode()
    assert names == package_files()
    assert {"qf_peft/py.typed", "qf_peft/share/card_template.md", "qf_peft/evaluate/report_template.html"} <= names
    assert any(name.startswith("qf_peft/tiny_model/") and name.endswith(".safetensors") for name in names)
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Dist: peft" in metadata
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata


def test_the_source_distribution_builds_the_same(built):
    sdist, _ = built
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {f"src/{name}" for name in package_files()} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_installs_and_works(built, tmp_path):
    """From a folder of its own, without the repository: a fact is taught to the tiny model that came with it."""
    _, wheel = built
    target = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    code = """
import sys, qf_peft, torch
from importlib.metadata import version
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained(qf_peft.TINY_MODEL, dtype=torch.float32)
model = get_peft_model(base, qf_peft.QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
fact = {"instruction": "Zanmi founded Tofinlor.", "prompt": "Tell me who started Tofinlor.",
        "completion": "Tofinlor was started by Zanmi."}
trainer = qf_peft.QFTrainer(model=model, args=qf_peft.QFTrainingArguments.paper(), train_dataset=[fact],
                            processing_class=AutoTokenizer.from_pretrained(qf_peft.TINY_MODEL))
trainer.train()
trainer.report("out.html")
print(qf_peft.__file__, version("qf-peft"), trainer.evaluate()["recall"].value)
"""
    path, version, recall = run("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""}).split()
    assert Path(path).is_relative_to(target) and version == VERSION and recall == "1.0"
    assert (tmp_path / "out.html").is_file()


class Text(HTMLParser):
    """Ids of elements, and the text in all of them."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.text = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.ids |= {value for name, value in attrs if name == "id"}

    def handle_data(self, data):
        self.text.append(data)


def test_the_api_reference(tmp_path):
    """`pdoc qf_peft -o …` as CONTRIBUTING says; every public name is in it, with what its docstring begins with."""
    run("-m", "pdoc", "qf_peft", "-o", tmp_path, cwd=tmp_path)
    page = Text((tmp_path / "qf_peft.html").read_text(encoding="utf-8"))
    shown = re.sub(r"\W+", " ", " ".join(page.text))
    for name in qf_peft.__all__:
        assert name in page.ids, name
        thing = getattr(qf_peft, name)
        if callable(thing):
            assert thing.__doc__ and thing.__doc__.strip(), name
            words = re.sub(r"\W+", " ", thing.__doc__.strip()).split()[:5]
            assert " ".join(words) in shown, name
    methods = [n for n, f in vars(qf_peft.QFTrainer).items() if not n.startswith("_") and (f.__doc__ or callable(f))]
    assert {"train", "evaluate", "report", "dry_run", "forget"} <= set(methods)
    for name in methods:
        assert f"QFTrainer.{name}" in page.ids and getattr(qf_peft.QFTrainer, name).__doc__, name


def test_changelog_and_citation_say_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1] == VERSION and re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    dates = re.findall(r"^## \[\d.+?\] - (\S+)$", changelog, re.MULTILINE)
    assert dates == sorted(dates, reverse=True) and all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == VERSION and citation["license"] == PROJECT["license"]
    assert {"cff-version", "title", "message", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["authors"] == [{"family-names": "Qi", "given-names": "Feng"}] and "2507.04300" in paper["url"]
    assert paper["type"] == "article" and {"title", "year", "journal"} <= set(paper)


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(tests/[\w/.]+)`|pytest (tests/\S+?)[` ]", text):
        assert (ROOT / (path[0] or path[1])).exists(), path
    assert (ROOT / "tests/constraints.txt").exists() and "dev" in PROJECT["optional-dependencies"]
