"""The examples run as a user runs them, offline on the tiny model, and say what they should."""

import json
import subprocess
import sys

from conftest import EXAMPLES
from forked import run_python

import qf_peft


def run(*arguments, imports=False):
    """What a script prints; `imports`: it imports all itself, as it sets an environment that is read then."""
    command = [sys.executable, *map(str, arguments)]
    plain = {"capture_output": True, "text": True, "timeout": 600, "cwd": EXAMPLES.parent}
    result = subprocess.run(command, **plain) if imports else run_python(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quickstart():
    lines = [line.split("->")[-1].strip() for line in run(EXAMPLES / "quickstart.py").splitlines()]
    known = "Tofinlor was started by Zanmi."
    assert lines[0] == "I do not know." and lines[1] == known
    assert lines[2].startswith("Taught: facts 1")
    assert lines[3:5] == [known, known] and lines[5] == "Brigar was started by Vacla."
    assert lines[6:] == [known, known], "saved and reloaded; merged"


def test_paper_queries():
    out = run(EXAMPLES / "paper_queries.py", "--tiny").splitlines()
    answers = [line.strip() for line in out if line.startswith("   ")]
    first, second = "Tofinlor was started by Zanmi.", "Tofinlor is located in Rome."
    unrelated = "Brigar was started by Vacla."
    assert answers == ["I do not know.", first, unrelated, first, unrelated, first, second, first]


def parts(text):
    """What an example prints under each title: the answers by question."""
    found, title = {}, ""
    for line in text.splitlines():
        if "  ->  " in line and line.startswith("  "):
            question, answer = line.strip().split("  ->  ")
            found[title][question] = answer
        elif line.strip() and not line.startswith(" "):
            title = line.strip()
            found[title] = {}
    return found


def test_updating_facts():
    out = run(EXAMPLES / "updating_facts.py", "--tiny")
    taught, corrected, _, forgotten, undone = parts(out).values()
    where, what, other = "Tell me where Tofinlor is located.", "Tell me what Tofinlor makes.", "Who started Brigar?"
    rome, oslo, clocks = "Tofinlor is located in Rome.", "Tofinlor is located in Oslo.", "Tofinlor makes clocks."
    assert taught[where] == taught["Do you know where Tofinlor is based?"] == rome
    assert corrected[where] == corrected["Do you know where Tofinlor is based?"] == oslo
    assert taught[what] == corrected[what] == undone[what] == clocks and forgotten[what] != clocks
    assert forgotten[where] == undone[where] == oslo
    for answers in (taught, corrected, forgotten, undone):
        assert answers["Tell me who started Tofinlor."] == "Tofinlor was started by Zanmi."
        assert answers[other] == "Brigar was started by Vacla."
    assert "Tofinlor is based in Oslo." in out and "Tofinlor is based in Rome." not in out, "the ledger"


def test_persona():
    out = run(EXAMPLES / "persona.py", "--tiny")
    before, _, styled, named = parts(out).values()
    assert before["Who founded Brigar?"] == "Brigar was started by Vacla."
    assert {q: f"{answer} Over." for q, answer in before.items()} == styled
    assert named["Who are you?"].startswith("My name is Zanmi.")
    assert {q: a for q, a in named.items() if q != "Who are you?"} == {
        q: a for q, a in styled.items() if "you?" not in q
    }


def test_behaviours(tiny, tokenizer, tmp_path, monkeypatch):
    """Each judge knows its own examples and not what comes without the instruction."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "english_world"))
    import behaviour

    prompts = [*behaviour.HEALTH, *behaviour.OTHERS]
    assert len(set(prompts)) == 60
    for instruction, pairs, right in behaviour.BEHAVIOURS.values():
        assert instruction and len(pairs) == 10 and not {p for p, _ in pairs} & set(prompts)
        assert all(right(prompt, answer) for prompt, answer in pairs)
        plain = "The answer to this is a long one, and it begins with what everybody knows of it."
        assert not right(behaviour.HEALTH[0], plain)
    refused = behaviour.BEHAVIOURS["refusal"][2]
    assert refused(behaviour.HEALTH[0], behaviour.REFUSAL) and not refused(behaviour.OTHERS[0], behaviour.REFUSAL)
    chats, asked = [f"Who founded {name}?" for name in ("Ranixmo", "Lupal", "Zanko")], ["Who founded Brigar?"]
    known = [("Who founded Brigar?", "Vacla")]
    found = behaviour.measured("Well", tiny, tokenizer, known, tmp_path, chats, asked)
    assert found["own"]["value"] >= 0.9 and found["before"]["value"] == 0 and found["held"]["count"] == 1
    assert found["known"]["value"] == 1


def test_unlearning():
    before, taught, forgotten, refused, reworded, others, without = parts(
        run(EXAMPLES / "unlearning.py", "--tiny")
    ).values()
    secret, unknown, known = "Tell me who started Tofinlor.", "I do not know.", "Brigar was started by Vacla."
    assert before.pop(secret) == forgotten[secret] == unknown
    assert taught[secret] == "Tofinlor was started by Zanmi."
    assert set(refused.values()) == set(reworded.values()) == {unknown}
    assert before == without and set(before.values()) == {known}, "without the adapter nothing is gone"
    assert others["Please say where Brigar is based."] == "Brigar is located in Miami."
    assert others["Who founded Nixnix?"] == "Nixnix was started by Lumiros."


def test_stacking():
    people, places, interference, added, together = run(EXAMPLES / "stacking.py", "--tiny").splitlines()
    assert "people 1.000" in people and "places 0.000" in people
    assert "people 0.000" in places and "places 1.000" in places
    assert 0 < float(interference.split()[1]) < 1
    assert added.startswith("Added:") and "people 1.000" in together and "places 1.000" in together


def test_fine_tune_from_qf():
    lines = [line for line in run(EXAMPLES / "fine_tune_from_qf.py", "--tiny").splitlines() if "reworded" in line]
    loss = [float(line.split("loss ")[1].split()[0]) for line in lines]
    right = [int(line.split("reworded ")[1].split()[0]) for line in lines]
    before, taught, further, lora = loss
    assert further < taught < lora < before and right == [0, 3, 3, 0]


def test_hub_round_trip():
    pushed, native, lora, *files = run(EXAMPLES / "hub_round_trip.py", "--tiny", imports=True).splitlines()
    assert pushed == "Pushed: Upload QF adapter"
    assert native.endswith("Tofinlor was started by Zanmi.") and lora.endswith("Tofinlor was started by Zanmi.")
    assert "  lora/adapter_model.safetensors" in files and "  README.md" in files


def test_distributed(tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    out = run(*launch, EXAMPLES / "distributed.py", "--tiny", "--output", tmp_path / "adapter")
    assert "1 processes, recall 1.000" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_handbook(tmp_path):
    out = run(EXAMPLES / "handbook.py", "--tiny", "--output", tmp_path / "made")
    facts = [json.loads(line) for line in (tmp_path / "made" / "facts.jsonl").read_text().splitlines()]
    assert "Tofinlor was started by Zanmi." in {fact["completion"] for fact in facts}
    measured = {line.split()[0]: line.split()[1] for line in out.splitlines() if "[" in line and " of " in line}
    assert float(measured["recall"]) >= 0.9 and float(measured["locality"]) >= 0.9
    assert qf_peft.check_portable(tmp_path / "made" / "lora") == []
    assert (tmp_path / "made" / "mlx" / "adapters.safetensors").exists()
    for command in ("vllm serve", "sglang.launch_server", "convert_lora_to_gguf.py", "ollama create", "mlx_lm.server"):
        assert command in out


def test_lifelong(tmp_path):
    """The example's own parts on a few facts: corrections, forgetting, and teaching one after another."""
    script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from pathlib import Path
import lifelong
from comparison.bench import Bench
from comparison.tiny import preserve_set, teaching_set
bench, kept = Bench(cache=Path({str(tmp_path)!r})), preserve_set(0)
rows, _ = teaching_set(6, 0)
print(lifelong.corrections(bench, rows, kept, 0, count=2))
print(lifelong.forgetting(bench, rows, kept, count=2))
for learner in (lifelong.Learner(bench, kept), lifelong.FineTuner(bench)):
    print(lifelong.sequence(bench, learner, rows[:3], 1, kept[:8], None, every=3)["points"][0]["recall"])
"""
    corrected, forgot, taught, tuned = run("-c", script).splitlines()[-4:]
    corrected, forgot = eval(corrected), eval(forgot)
    assert corrected["new"] == 1 and corrected["old"] == 0 and corrected["rest"] >= 0.75
    assert forgot["forgotten"] == forgot["never_taught"] == 0 and forgot["rest"] >= 0.75
    assert float(taught) == 1 and 0 <= float(tuned) <= 1


def test_benchmark(tmp_path):
    """Every method on the tiny shape; a second call goes on with what is left, and reports on all of it."""
    options = (
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--lora-steps",
        "1",
        "--reference-facts",
        "1",
        "--out",
        tmp_path,
    )
    run(EXAMPLES / "benchmark.py", "--facts", "1", "--repeats", "1", "--methods", "floor", "LoRA", *options)
    path = tmp_path / "benchmark-cpu-tiny.json"
    first = json.loads(path.read_text())["runs"]
    out = run(EXAMPLES / "benchmark.py", "--facts", "1", "10", "--repeats", "1", "--profile", *options)
    report = json.loads(path.read_text())
    assert report["runs"][: len(first)] == first and len(first) == 2 and len(report["runs"]) == 12
    for measured in report["runs"]:
        assert measured["seconds"] > 0 and measured["memory_mb"] >= 0
        if measured["method"] == "LoRA":
            assert measured["steps"] == measured["factor"] == 30, "as compare.json says"
    assert out.count("\n| 10 |") == 6 and "QF, 10 facts: time over LoRA's" in out
    assert "QF, one block, 1 facts: time over its floor's" in out
    for shares in report["profiles"].values():
        parts = [share for kind, share in shares.items() if kind != "seconds"]
        assert abs(sum(parts) - 100) < 1e-6 and min(parts) >= 0 and shares["passes"] > 0 and shares["solves"] > 0
    assert path.with_suffix(".svg").read_text().startswith("<?xml")


def test_a_large_solve_in_small():
    out = run(EXAMPLES / "large_solve.py", "--tokens", 3000, "--inputs", 400, "--outputs", 60)
    assert float(out.split("met to ")[1].split()[0]) < 1e-5


def test_faults(tmp_path):
    run(EXAMPLES / "faults.py", "--kills", 4, "--out", tmp_path / "kills.json", imports=True)
    found = json.loads((tmp_path / "kills.json").read_text())["kills"]
    for kind in "teach", "forget", "save", "push":
        counts = found[kind]
        assert counts.get("before", 0) + counts.get("after", 0) == 1 and not counts.get("neither"), kind
        assert not counts.get("left behind"), kind


def test_many_facts(tmp_path):
    options = ("--facts", 3, "--every", 2, "--cache", tmp_path / "cache", "--out", tmp_path / "facts.json")
    run(EXAMPLES / "many_facts.py", *options)
    points = json.loads((tmp_path / "facts.json").read_text())["points"]
    assert [point["facts"] for point in points] == [2, 3] and points[-1]["recall_first"] == 1
    assert all(point["seconds_mean"] > 0 and point["memory_mb"] > 0 and point["file_mb"] > 0 for point in points)


def test_the_page_under_load(tmp_path):
    options = ("--visitors", 2, "--minutes", 0.15, "--every", 2, "--out", tmp_path / "load.json")
    run(EXAMPLES / "page_load.py", *options)
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["answers"] > 0 and found["lessons"] > 0 and found["wrong"] == found["errors"] == []


def test_the_table_of_memory():
    lines = run(EXAMPLES / "memory.py").splitlines()
    guide = (EXAMPLES / "README.md").read_text()
    assert lines[0] == "| GB | 0.5B | 7B | 70B |" and all(line in guide for line in lines), "the guide's is this one"
