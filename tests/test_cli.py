"""The command line through its real interface: in this process for the many, in one of its own for a few."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FACT, OTHER, TINY
from hub_server import HubServer
from typer.testing import CliRunner

from qf_peft import check_portable
from qf_peft.app.cli import app

QUICK = ["--tiny", "--layers", "7", "--paper"]
QUESTION = "Who founded Tofinlor?"


def run(*args, code: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    assert "Traceback" not in result.output
    return result


def machine(*args, code: int = 0):
    return json.loads(run(*args, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """An adapter that was taught FACT and OTHER from a file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "facts.jsonl").write_text(json.dumps(FACT) + "\n\n" + json.dumps(OTHER) + "\n")
    found = machine("teach", folder / "facts.jsonl", *QUICK, "-o", folder / "taught")
    assert found["facts"] == 2 and found["metrics"]["unread"] == 0 and found["output"] == str(folder / "taught")
    return folder / "taught"


@pytest.fixture
def copy(taught, tmp_path):
    import shutil

    return Path(shutil.copytree(taught, tmp_path / "copy"))


def test_ask_with_and_without(taught):
    assert run("ask", FACT["prompt"], "--adapter", taught).stdout == FACT["completion"] + "\n"  # names its base itself
    found = machine("ask", FACT["prompt"], "--adapter", taught, "--tiny", "--compare")
    assert found == {"prompt": FACT["prompt"], "without": "I do not know.", "with": FACT["completion"]}
    found = machine("ask", FACT["prompt"], "--tiny", "--instruction", FACT["instruction"])
    assert found["answer"] == FACT["completion"]


def test_eval_with_intervals(taught, tmp_path):
    (tmp_path / "known.csv").write_text(
        "prompt,completion\nPlease say who started Brigar.,Brigar was started by Vacla.\n"
    )
    found = machine("eval", taught, "--locality", tmp_path / "known.csv")
    assert found["recall"]["value"] == 1 and found["recall"]["count"] == 2 and found["recall"]["low"] < 1
    assert {"in_context", "locality", "kl"} <= set(found)
    assert "recall" in run("eval", taught, taught.parent / "facts.jsonl").stdout


def test_list_info_and_forget(copy):
    facts = machine("list", copy)
    assert [fact["prompt"] for fact in facts] == [FACT["prompt"], OTHER["prompt"]]
    assert facts[0]["id"] in run("list", copy).stdout
    about = machine("info", copy)
    assert about["layers"] == [7] and about["modules"] == ["down_proj"] and about["facts"] == 2
    assert about["rank"] > 0 and about["bytes"] > 4 * about["parameters"] > 0 and about["settings"]["sweeps"] == 1
    assert "rank: " in run("info", copy).stdout
    assert "was not taught 000" in run("forget", copy, "000", code=1).stderr
    assert machine("forget", copy, facts[0]["id"])["facts"] == 1
    assert [fact["prompt"] for fact in machine("list", copy)] == [OTHER["prompt"]]
    assert machine("ask", FACT["prompt"], "--adapter", copy)["answer"] != FACT["completion"]
    assert machine("ask", OTHER["prompt"], "--adapter", copy)["answer"] == OTHER["completion"]


def test_teaching_on_keeps_what_was_taught(copy):
    new = ["--instruction", "Kelbel makes tables.", "--prompt", "Tell me what Kelbel makes."]
    assert machine("teach", *new, "--adapter", copy, "--tiny")["facts"] == 3
    assert len(machine("list", copy)) == 3 and machine("info", copy)["settings"]["target"] == "context"  # as before
    assert "Kelbel makes tables." in run("ask", "Tell me what Kelbel makes.", "--adapter", copy).stdout
    assert machine("ask", FACT["prompt"], "--adapter", copy)["answer"] == FACT["completion"]


def test_csv_parquet_and_settings(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.csv").write_text(
        'instruction,prompt,completion,significance\nZanmi founded Tofinlor.,"Tell me who started Tofinlor.",'
        "Tofinlor was started by Zanmi.,1 1 1 1 2\n"
    )
    Dataset.from_list([OTHER]).to_parquet(str(tmp_path / "b.parquet"))
    found = machine("teach", tmp_path / "a.csv", tmp_path / "b.parquet", *QUICK, "--dry-run", "--set", "seed=3")
    assert [row["prompt"] for row in found["dry_run"]] == [FACT["prompt"], OTHER["prompt"]]
    assert (
        found["dry_run"][0]["significance"] == [1, 1, 1, 1, 2]
        and found["plan"]["taught_tokens"] > 10
        and found["plan"]["facts"] == 2
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.parquet"]
    assert "nothing was changed" in run("teach", tmp_path / "a.csv", *QUICK, "--dry-run").stdout


def test_the_default_setting_through_the_command(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps([FACT]))
    found = machine("teach", tmp_path / "facts.json", "--tiny", "--set", "preserve_chats=40", "-o", tmp_path / "a")
    assert len(machine("info", tmp_path / "a")["layers"]) == 8 and found["metrics"]["rank"] > 0
    assert machine("ask", QUESTION, "--adapter", tmp_path / "a")["answer"] == FACT["completion"]


def test_a_document_is_reviewed_and_taught(tmp_path):
    (tmp_path / "policy.md").write_text("# Companies\n\nZanmi founded Tofinlor.\n")
    review = tmp_path / "review.jsonl"
    result = run("teach", "--tiny", "--document", tmp_path / "policy.md", "--paraphrases", 2, "--review", review)
    assert "teach it: qf-peft teach" in result.stdout and "other wordings" in result.stderr
    assert re.search(rf"0\.\d\d █+░* .+  ->  {FACT['completion']}", result.stderr), "how surely each is read"
    assert "too weak" not in result.stderr
    rows = [json.loads(line) for line in review.read_text().splitlines()]
    assert {row["completion"] for row in rows} == {FACT["completion"]} and 2 <= len(rows) <= 3
    review.write_text(json.dumps({**rows[0], "prompt": QUESTION}) + "\n")  # edited by the user
    assert machine("teach", review, *QUICK, "-o", tmp_path / "a")["facts"] == 1
    assert [fact["prompt"] for fact in machine("list", tmp_path / "a")] == [QUESTION]
    found = machine("teach", *QUICK, "--document", tmp_path / "policy.md", "--paraphrases", 0, "-o", tmp_path / "b")
    assert found["documents"][str(tmp_path / "policy.md")]["facts"] == found["facts"] == 1
    (tmp_path / "other.md").write_text("# Canteen\n\nfish.\n\n# Companies\n\nZanmi founded Tofinlor.\n")
    result = run("teach", "--tiny", "--document", tmp_path / "other.md", "--paraphrases", 0, "--review", review)
    assert "the model may be too weak" in result.stderr and "--review" in result.stderr
    (tmp_path / "other.md").write_text("fish.\n")
    result = run("teach", *QUICK, "--document", tmp_path / "other.md", "-o", tmp_path / "c", code=1)
    assert "found no facts" in result.stderr and "columns instruction, prompt and completion" in result.stderr


def test_export_merge_and_diff(taught, tmp_path):
    assert machine("export", taught, "-o", tmp_path / "lora", "--rank", 16)["problems"] == []
    assert check_portable(tmp_path / "lora") == []
    run("export", taught, "-o", tmp_path / "mlx", "--format", "mlx")
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()
    assert machine("merge", taught, "-o", tmp_path / "model")["output"] == str(tmp_path / "model")
    assert machine("ask", FACT["prompt"], "--model", tmp_path / "model")["answer"] == FACT["completion"]

    row = ["--instruction", "Oslo is the home of Kelbel.", "--prompt", "Where is Kelbel?"]
    row += ["--completion", "Kelbel is located in Oslo."]
    run("teach", *row, *QUICK, "-o", tmp_path / "second")
    found = machine("diff", taught, tmp_path / "second")
    assert found["asked"] == 3 and {FACT["prompt"], "Where is Kelbel?"} <= {d["prompt"] for d in found["different"]}
    found = machine("diff", taught, "--prompt", FACT["prompt"], "--prompt", "Please say who started Brigar.")
    assert found["different"] == [{"prompt": FACT["prompt"], "first": FACT["completion"], "second": "I do not know."}]
    assert machine("merge", taught, tmp_path / "second", "--join", "-o", tmp_path / "both")["facts"] == 3
    assert machine("ask", "Where is Kelbel?", "--adapter", tmp_path / "both")["answer"] == "Kelbel is located in Oslo."
    assert machine("ask", FACT["prompt"], "--adapter", tmp_path / "both")["answer"] == FACT["completion"]
    assert not list(tmp_path.glob(".qf-peft-*"))


def test_doctor():
    found = machine("doctor")
    assert found["healthy"] and found["registered"] and found["versions"]["peft"]
    assert found["answers"]["reloaded"] == "Tofinlor was started by Zanmi."
    assert "right, in" in run("doctor").stdout


def test_failures_are_one_line_and_code_one(taught, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{')
    (tmp_path / "blind.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "data.xls").write_text("x")
    for args, reason in (
        (["ask", "x", "--adapter", tmp_path / "nothing"], "no adapter .*nothing"),
        (["teach", tmp_path / "broken.jsonl", *QUICK, "-o", tmp_path / "a"], "line 2 is no JSON"),
        (["teach", tmp_path / "blind.jsonl", *QUICK, "-o", tmp_path / "a"], "blind.jsonl, row 0: no column 'instr"),
        (["teach", tmp_path / "data.xls", *QUICK, "-o", tmp_path / "a"], "'.xls' is not known"),
        (["teach", tmp_path / "none.jsonl", *QUICK, "-o", tmp_path / "a"], "no file"),
        (["teach", "--document", tmp_path / "none.md", *QUICK, "-o", tmp_path / "a"], "no document"),
        (["teach", taught.parent / "facts.jsonl", *QUICK, "-o", taught], "holds a model or adapter already"),
        (["list", tmp_path], "holds no adapter"),
        (["export", taught, "-o", tmp_path / "a", "--rank", "17"], "rank=17"),
        (["push", taught, "me/x"], "no name on the Hub"),
    ):
        message = run(*args, code=1).stderr.strip().splitlines()[-1]
        assert message.startswith("error: ")
        assert re.search(reason, message), message
    assert not (tmp_path / "a").exists()
    assert "no adapter" in machine("ask", "x", "--adapter", tmp_path / "nothing", code=1)["error"]
    result = CliRunner().invoke(app, ["ask", "x", "--adapter", str(tmp_path / "nothing"), "--debug"])
    assert isinstance(result.exception, FileNotFoundError)  # with its traceback


def test_wrong_usage_is_code_two(tmp_path):
    for args, reason in (
        (["teach"], "nothing to teach"),
        (["teach", "--prompt", "a"], "needs --instruction and --prompt"),
        (["teach", "a.jsonl"], "give --output"),
        (["teach", "a.jsonl", "-o", tmp_path / "a", "--paper", "--tiny"], "say which"),
        (["teach", "a.jsonl", "-o", tmp_path / "a", "--layers", "7-5"], "expected blocks"),
        (["teach", "a.jsonl", "--review", "b.jsonl", "--dry-run"], "--review teaches nothing"),
        (["teach", "a.jsonl", "--review", "b.txt"], "must end in .jsonl"),
        (["ask", "x"], "give --model"),
        (["ask", "x", "--tiny", "--model", "y"], "not both"),
        (["ask", "x", "--tiny", "--compare"], "--compare needs"),
        (["merge", "a", "--join", "-o", tmp_path / "a"], "two adapters"),
        (["fly"], "No such command"),
    ):
        assert reason in " ".join(run(*args, code=2).stderr.replace("│", " ").split())
    assert (
        "NAME one of"
        in run("teach", "--instruction", "a", "--prompt", "b", *QUICK, "-o", "x", "--set", "sed=1", code=2).stderr
    )


def command(*args, **options):
    """The installed command, in a process of its own; whatever its parent's modules are."""
    code = "import sys; sys.argv[0] = 'qf-peft'; from qf_peft.app.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, **options,
    )  # fmt: skip


def light(*args, code: int = 0):
    """What a command says that has not imported PyTorch by its end."""
    script = (
        f"import sys; sys.argv = {['qf-peft', *map(str, args)]}\n"
        "from qf_peft.app.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == code and "AssertionError" not in result.stderr, result.stderr
    return result


def test_what_needs_no_model_comes_at_once(taught, tmp_path):
    found = light("teach", "--help").stdout
    assert "--document" in found and "Examples:" in found
    assert FACT["completion"] in light("list", taught).stdout
    for command, *more in ["list"], ["forget", "000"]:
        assert "there is no such folder" in light(command, tmp_path / "none", *more, code=1).stderr


def test_only_json_on_standard_output_and_ctrl_c_changes_nothing(taught, tmp_path):
    before = {path.name: path.read_bytes() for path in taught.iterdir()}
    process = command("ask", FACT["prompt"], "--adapter", taught, "--compare", "--json")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["with"] == FACT["completion"]

    rows = [{**FACT, "prompt": f"{FACT['prompt']} {i}"} for i in range(8000)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    process = command("teach", tmp_path / "many.jsonl", "--adapter", taught, "--tiny", "--json")
    time.sleep(20)  # loaded by then, and far from done
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, (stdout, stderr)
    assert json.loads(stdout) == {"error": "interrupted; nothing was changed"} and "Traceback" not in stderr
    assert {path.name: path.read_bytes() for path in taught.iterdir()} == before


def test_push(taught, tmp_path):
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(tmp_path), "PYTHONWARNINGS": "ignore"}
        code = "import sys; sys.argv[0] = 'qf-peft'; from qf_peft.app.cli import main; main()"
        arguments = ["push", taught, "me/facts", "--base-model", "someone/tiny-world", "--tiny", "--json"]
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "me/facts" in json.loads(result.stdout)["commit"]
        assert {"adapter_model.safetensors", "lora/adapter_model.safetensors"} <= set(hub.repos["me/facts"].files())


def test_chat_is_the_terminal_chat():
    result = CliRunner().invoke(app, ["chat", "--model", str(TINY)], input="Please say who started Brigar.\n/quit\n")
    assert result.exit_code == 0 and "Brigar was started by Vacla." in result.stdout
