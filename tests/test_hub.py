"""Pushing to the Hub and loading from it: the real client, in processes of its own, against a server on loopback."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from conftest import FACT, TINY
from hub_server import READER, HubServer, Repo
from huggingface_hub import ModelCard

TESTS = Path(__file__).parent
BASE = "someone/tiny-world"
FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
}  # fmt: skip

TEACH = f"""
import json, sys, tempfile
from pathlib import Path
import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, push_to_hub

BASE, TINY, FACT = {BASE!r}, {str(TINY)!r}, {FACT!r}
tokenizer = AutoTokenizer.from_pretrained(TINY)

def teach(base=BASE, adapter="default"):
    base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(base, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"), adapter_name=adapter)
    args = QFTrainingArguments.paper()
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT])
    trainer.train()
    return model, trainer

@torch.no_grad()
def logits(model):
    return model(**tokenizer(FACT["prompt"], return_tensors="pt")).logits

def failing(act):
    try:
        act()
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(f"{{type(error).__name__}}: {{error}}")
            error = error.__cause__
        return "\\n".join(causes)
    return None
"""

LOGITS = f"""
from transformers import AutoTokenizer
@torch.no_grad()
def logits(model):
    tokens = AutoTokenizer.from_pretrained({str(TINY)!r})({FACT["prompt"]!r}, return_tensors="pt")
    return model(**tokens).logits
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer() as server:
        server.add(BASE, TINY)
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run Python in a fresh process that knows the server; returns what it printed last, as JSON."""

    def run(code, token=None, cache="home"):
        environment = {**os.environ, **hub.environment(tmp_path / cache, **({"token": token} if token else {}))}
        environment["TMPDIR"] = str(tmp_path / "tmp")
        (tmp_path / "tmp").mkdir(exist_ok=True)
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300,
            cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        left = [path.name for path in (tmp_path / "tmp").iterdir() if "torchinductor" not in path.name]
        assert left == [], "nothing is left in the temporary folder"
        return json.loads(result.stdout.splitlines()[-1]) if result.stdout.strip() else None

    return run


def metadata(files):
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def test_push_and_load_back(hub, client, tmp_path):
    client(
        TEACH
        + """
model, trainer = teach()
metrics = trainer.evaluate(locality=[{"prompt": "Who started Brigar?", "completion": "Brigar was started by Vacla."}])
commit = push_to_hub(model, "me/facts", metrics=metrics, license="apache-2.0", tags=["companies"])
assert commit.commit_message == "Upload QF adapter" and "/me/facts/commit/" in commit.commit_url
torch.save(logits(model), "logits.pt")
""",
    )
    files = hub.repos["me/facts"].files()
    assert set(files) == FILES
    assert len(hub.repos["me/facts"].refs["main"]) == 2, "one commit after the repository's first"
    assert files["adapter_model.safetensors"] in hub.large.values(), "large files go by the large files' way"
    everything = b"\n".join(files.values()).decode(errors="ignore")
    assert "Tofinlor" not in everything and str(TESTS.parent) not in everything

    data = metadata(files)
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter" and data["license"] == "apache-2.0"
    assert {"lora", "qf", "companies", f"base_model:adapter:{BASE}"} <= set(data["tags"])
    card = ModelCard(files["README.md"].decode())
    results = {result.metric_name: result for result in card.data.eval_results}
    assert set(results) == {"recall", "locality", "kl"} and results["recall"].metric_value == 1.0
    assert results["recall"].metric_args == {"count": 1, "interval_95": [0.206549, 1.0]}
    assert "1 fact." in card.text and "block 7" in card.text and 'target="context"' in card.text
    for folder, kind in (("", "QF"), ("lora/", "LORA")):
        config = json.loads(files[folder + "adapter_config.json"])
        assert config["peft_type"] == kind and config["base_model_name_or_path"] == BASE

    client(
        "import torch, qf_peft\nfrom peft import AutoPeftModelForCausalLM\n"
        + LOGITS
        + 'model = AutoPeftModelForCausalLM.from_pretrained("me/facts", dtype=torch.float32)\n'
        'assert type(model.base_model).__name__ == "QFModel"\n'
        'config = qf_peft.QFConfig.from_pretrained("me/facts", local_files_only=True)\n'
        'assert config.r == model.peft_config["default"].r\n'
        'assert torch.equal(logits(model), torch.load("logits.pt"))',
        cache="second home",
    )
    without = "\n".join(card.text.split("```python\n")[2].split("```")[0].splitlines())
    assert 'subfolder="lora"' in without and "qf_peft" not in without
    client(
        "import sys, torch\nsys.modules['qf_peft'] = None\n"  # it cannot be imported
        + without.replace('device_map="auto"', "dtype=torch.float32")
        + LOGITS
        + 'assert type(model.base_model).__name__ == "LoraModel"\n'
        'assert torch.allclose(logits(model), torch.load("logits.pt"), atol=1e-5)',
        cache="third home",
    )


def test_options_arrive(hub, client):
    client(
        TEACH
        + """
model, trainer = teach(base=TINY, adapter="mine")
said = dict(base_model=BASE, facts=[FACT])
push_to_hub(model, "secret", private=True, commit_message="One fact", commit_description="About a company.", **said)
push_to_hub(model, "me/secret", revision="second", commit_message="On a branch", **said)
push_to_hub(model, "me/secret", revision="second", commit_message="Again", **said)
commit = push_to_hub(model, "me/secret", create_pr=True, commit_message="Proposed", **said)
assert commit.pr_num == 1 and commit.pr_revision == "refs/pr/1"
commit = push_to_hub(model, BASE, create_pr=True, commit_message="For you", **said)
assert commit.pr_num == 1
push_to_hub(model, "me/secret", private=True, **said)
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), "me/secret",
                                   revision="second")
assert torch.equal(logits(loaded), logits(model))
assert list(model.peft_config) == ["mine"] and model.peft_config["mine"].base_model_name_or_path == TINY
"""
    )
    repo = hub.repos["me/secret"]
    assert repo.private
    told = {ref: [(c["summary"], c.get("description")) for c in commits[1:]] for ref, commits in repo.refs.items()}
    first = ("One fact", "About a company.")
    assert told == {
        "main": [first, ("Upload QF adapter", "")],
        "second": [first, ("On a branch", ""), ("Again", "")],
        "refs/pr/1": [first, ("Proposed", "")],
    }
    assert hub.repos[BASE].head("refs/pr/1")["summary"] == "For you"
    assert len(hub.repos[BASE].refs["main"]) == 2, "only proposed"
    files = repo.files()
    assert set(files) == FILES, "an adapter of another name is at the root too"
    assert json.dumps(FACT["instruction"]) in files["README.md"].decode(), "the facts, because they were asked for"
    assert 'from_pretrained(base, "me/secret")' in files["README.md"].decode()
    assert str(TINY).encode() not in b"\n".join(files.values())


def test_failures_leave_nothing(hub, client):
    hub.add("someone/taken", TINY)
    hub.add("me/public", TINY)
    taken, public = (len(hub.repos[name].refs["main"]) for name in ("someone/taken", "me/public"))
    errors = client(
        TEACH
        + """
model, trainer = teach()
local, _ = teach(base=TINY)
before = model.peft_config["default"].to_dict()
errors = {
    "token": failing(lambda: push_to_hub(model, "me/refused", token="hf_wrong")),
    "no token": failing(lambda: push_to_hub(model, "me/refused", token=False)),
    "read only": failing(lambda: push_to_hub(model, "me/refused", token="READER")),
    "taken": failing(lambda: push_to_hub(model, "someone/taken")),
    "nobody's": failing(lambda: push_to_hub(model, "else/new")),
    "public": failing(lambda: push_to_hub(model, "me/public", private=True)),
    "folder": failing(lambda: push_to_hub(local, "me/refused")),
    "base": failing(lambda: push_to_hub(local, "me/refused", base_model="./tiny")),
    "name": failing(lambda: push_to_hub(model, "a/b/c")),
    "adapter": failing(lambda: push_to_hub(model, "me/refused", adapter_name="gone")),
    "metrics": failing(lambda: push_to_hub(model, "me/refused", metrics={"facts": 1})),
    "facts": failing(lambda: push_to_hub(model, "me/refused", facts=[{"prompt": "x"}])),
    "method": failing(lambda: local.push_to_hub("me/refused")),
    "revision": failing(lambda: push_to_hub(model, "me/public", revision="refs/pr/7")),
}
assert model.peft_config["default"].to_dict() == before
print(json.dumps(errors))
""".replace("READER", READER)
    )
    assert "me/refused" not in hub.repos and "else/new" not in hub.repos
    assert len(hub.repos["someone/taken"].refs["main"]) == taken and len(hub.repos["me/public"].refs["main"]) == public
    expected = {
        "token": "does not take the token", "no token": "log in", "read only": "may not write to me/refused",
        "taken": "take a name of your own", "nobody's": "may not write to else/new", "public": "exists and is public",
        "folder": "give push_to_hub(..., base_model=", "base": "./tiny", "name": "a/b/c",
        "adapter": "adapter_name='gone' is no QF adapter", "metrics": "metrics has 'facts': 1; expected what trainer",
        "facts": "facts, row 0: no column 'instruction'", "method": "base_model=", "revision": "not pushed",
    }  # fmt: skip
    for case, message in expected.items():
        assert errors[case] is not None and message in errors[case], (case, errors[case])


def test_a_server_that_fails_midway(hub, client):
    api = "POST /api/models/me/broken"
    places = {  # what was uploaded is not asked for again, so uploads come first
        "me/broken-0": ("PUT /upload/me/broken-0", 403, "Error while uploading"),
        "me/broken-1": ("POST /verify/me/broken-1", 400, "Error while uploading"),
        "me/broken-2": ("POST /me/broken-2.git/info/lfs", 403, "may not write to me/broken-2"),
        "me/broken-3": (f"{api}-3/preupload", 400, "The adapter was not pushed to me/broken-3"),
        "me/broken-4": (f"{api}-4/commit", 500, "me/broken-4 may have been made, but nothing was put into it"),
        "me/broken-5": (f"{api}-5/commit", None, "disconnected"),
        "me/broken-6": (f"{api}-6/branch/x", 503, "The adapter was not pushed to me/broken-6"),
    }
    code = TEACH + "model, _ = teach()\nerrors = {}\n"
    for repo_id, (place, status, _) in places.items():
        hub.failures[place] = status
        branch = ", revision='x'" if "branch" in place else ""
        code += f"errors[{repo_id!r}] = failing(lambda: push_to_hub(model, {repo_id!r}{branch}))\n"
    hub.large.clear()
    errors = client(code + "print(json.dumps(errors))")
    hub.failures.clear()
    for repo_id, (_, _, message) in places.items():
        assert errors[repo_id] is not None and message in errors[repo_id], (repo_id, errors[repo_id])
        if repo_id in hub.repos:
            assert hub.repos[repo_id].files() == {} and len(hub.repos[repo_id].refs["main"]) == 1


def test_peft_models_own_push(hub, client):
    """`PeftModel.push_to_hub` gives what qf_peft's does; for other adapters it is PEFT's."""
    client(
        TEACH
        + """
from peft import LoraConfig
model, _ = teach()
model.push_to_hub("me/by-method", commit_message="By method", private=True, max_shard_size="1GB", tags=["x"])
base = AutoModelForCausalLM.from_pretrained(BASE)
get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).push_to_hub("me/a-lora", tags=["y"])
"""
    )
    repo = hub.repos["me/by-method"]
    assert set(repo.files()) == FILES and repo.private and repo.head("main")["summary"] == "By method"
    data = metadata(repo.files())
    assert data["library_name"] == "peft" and data["base_model"] == BASE and "x" in data["tags"]
    lora = hub.repos["me/a-lora"].files()
    assert set(lora) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert metadata(lora)["library_name"] == "transformers" and metadata(lora)["tags"] == ["y"]


def test_weights_on_the_hub_that_are_a_pickle_are_refused(hub, client):
    config = {"peft_type": "QF", "r": 1, "target_modules": ["down_proj"], "base_model_name_or_path": BASE}
    hub.repos["me/pickled"] = Repo()
    pickled = b"cos\nsystem\n(S'touch ran'\ntR."
    made = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": pickled}
    hub.repos["me/pickled"].commit("main", made)
    error = client(
        TEACH
        + """
base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
print(json.dumps(failing(lambda: PeftModel.from_pretrained(base, "me/pickled"))))
assert not Path("ran").exists()
"""
    )
    assert "a pickle, which can run code" in error
    assert not any("adapter_model.bin" in request for request in hub.requests if request.startswith("GET"))
