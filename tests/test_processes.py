"""Several processes under torchrun and accelerate: the adapter is one process's, everywhere; errors are for all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import several_processes
import torch
from conftest import FACT, random_model
from peft import get_peft_model
from torch import nn

import qf_peft
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments

CHILD = Path(__file__).parent / "several_processes.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
ACCELERATE = [  # where there are no GPUs it launches as for several, unless MPI is installed; they talk over gloo
    "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2", "--mixed_precision=no",
    "--dynamo_backend=no", "--main_process_port=0",
]  # fmt: skip


def launch(launcher, folder, *scenarios):
    paths = [str(Path(qf_peft.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", *launcher, str(CHILD), str(folder), *scenarios]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=300
    )


def results(folder, scenario, count):
    return [torch.load(folder / f"{scenario}-{i}.pt", weights_only=False) for i in range(count)]


def check_alike(one, several, near=1e-5):
    """One process's outcome of a scenario, and that of each of several; `near` for sums in another order."""
    for found in several:
        for name in one.keys() - {"metrics", "states"}:
            assert found[name] == one[name], name
        for mine, theirs in zip(one["metrics"], found["metrics"], strict=True):
            assert {k: v for k, v in mine.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in theirs.items() if k != "seconds"}, rel=1e-4, abs=1e-6
            )
        for mine, theirs, first in zip(one["states"], found["states"], several[0]["states"], strict=True):
            assert (mine["logits"] - theirs["logits"]).norm() <= near * mine["logits"].norm()
            for name, change in mine["changes"].items():
                assert change.norm() > 1 and (change - theirs["changes"][name]).norm() <= near * change.norm(), name
                pairs = zip(first["factors"][name], theirs["factors"][name], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), "not the same bits in all processes"


def test_two_processes_by_accelerate(tmp_path):
    """Preserved and contrasting chats, an unread row, a rehearsal, standing instructions, questions."""
    scenarios = ("default", "joint", "standing", "short")
    ran = launch(ACCELERATE, tmp_path, *scenarios)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stderr.count("rows are not read in context") == 3, "the main process alone warns"
    for scenario in scenarios:
        near = 1e-4 if scenario == "joint" else 1e-5  # the processes' moments are added up
        check_alike(getattr(several_processes, scenario)(tmp_path), results(tmp_path, scenario, 2), near)


def test_four_processes_by_torchrun(tmp_path):
    """Uneven shares and none, corrections, forgetting; then processes that fail, and one that dies."""
    ran = launch(TORCHRUN, tmp_path, "paper", "short", "failing", "dying")
    assert ran.returncode != 0
    for scenario in ("paper", "short"):
        check_alike(getattr(several_processes, scenario)(tmp_path), results(tmp_path, scenario, 4))
    assert not list(tmp_path.glob("**/*.tmp"))

    found = results(tmp_path, "failing", 4)
    errors = [each["overflow"]["error"] for each in found]
    assert sum(error.startswith("FloatingPointError: row 3: the activations at") for error in errors) == 1, errors
    assert sum("failed: FloatingPointError: row 3" in e and e.startswith("ProcessFailed") for e in errors) == 3, errors
    for each in found:
        assert each["overflow"]["kept"] and each["different"]["kept"] and each["saved"] and each["after"] == 1
        assert "process 1 has another train_dataset than process 0" in each["different"]["error"]
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()

    for survivor in results(tmp_path, "dying", 3):
        assert survivor["error"].startswith("ProcessFailed: ") and "died" in survivor["error"]
        assert survivor["kept"] and survivor["seconds"] < 30
    assert not (tmp_path / "dying-3.pt").exists()


def test_what_is_wrapped_or_sharded_is_refused(tokenizer):
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = get_peft_model(random_model("llama"), QFConfig(task_type="CAUSAL_LM"))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        options = {"args": QFTrainingArguments.paper(), "train_dataset": [FACT], "processing_class": tokenizer}
        model.get_input_embeddings().weight.requires_grad_(True)  # what DDP is for
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel; give model\.module"):
            QFTrainer(nn.parallel.DistributedDataParallel(model), **options)
        trainer = QFTrainer(model, **options)
        fully_shard(model.get_base_model().model.layers[0])
        with pytest.raises(ValueError, match=r"sharded by FSDP .* give each the whole PeftModel"):
            trainer.train()
    finally:
        torch.distributed.destroy_process_group()
    sharded = get_peft_model(random_model("llama"), QFConfig(task_type="CAUSAL_LM"))
    next(sharded.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO-3"):
        QFTrainer(sharded, **options)
