"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from ..adapter.checks import qf_adapter
from ..adapter.description import base_model_id
from ..adapter.statistics_file import STATISTICS_NAME
from ..data.ledger import LEDGER_NAME
from ..evaluate.metrics import Metric
from ..runtime.processes import by_main
from .card import model_card, save_card
from .lora_export import export_lora

logger = logging.get_logger(__name__)


@by_main
def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    metrics: Mapping[str, Metric | float] | None = None,
    facts: Iterable[Mapping[str, Any]] | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Push a QF adapter to the Hub, in one commit: the adapter itself; in `lora/` the same as an ordinary LoRA adapter,
    for those without `qf_peft`; and a model card. The taught texts and statistics are not pushed.

    Args:
        model (`PeftModel`): the model with the adapter.
        repo_id (`str`): the repository, `user/name`; it is made if it is not there. A card in it is replaced.
        adapter_name (`str`, *optional*): the adapter to push; by default the active one.
        base_model (`str`, *optional*): the base model's id on the Hub. By default the name it was loaded by; it must be
            given for a model that was loaded from a folder, whose path helps no one and is not pushed.
        metrics (`dict`, *optional*): what [`QFTrainer.evaluate`] returned, for the card.
        facts (list of dicts or `datasets.Dataset`, *optional*): rows to be printed in the card, for all to read.
        license (`str`, *optional*): the adapter's licence, such as `"apache-2.0"`.
        tags (list of `str`, *optional*): more tags for the card.
        private (`bool`, *optional*): whether a repository that is made is private. If it is there already it must
            not be public.
        revision (`str`, *optional*): the branch to push to; it is made if it is not there.
        commit_message, commit_description (`str`, *optional*): of the commit.
        create_pr (`bool`, defaults to `False`): open a pull request instead.
        token (`str`, *optional*): by default the one that `hf auth login` stored.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, and the pull request's address.

    Raises:
        ValueError: there is no such QF adapter, the base model's id is not known, the repository's name is none, a
            private one is wanted and it is public, or the card's contents are of the wrong form. Nothing was pushed.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused or failed. Nothing was committed.

    Example:
        ```python
        push_to_hub(model, "me/what-my-company-does", metrics=trainer.evaluate(), license="apache-2.0", private=True)
        ```
    """
    validate_repo_id(repo_id)
    adapter = qf_adapter(model, adapter_name)
    base = base_model_id(model, adapter, base_model)
    if base is None:
        raise ValueError(
            f"the base model was loaded as {model.peft_config[adapter].base_model_name_or_path!r}, which is no name on "
            "the Hub; give push_to_hub(..., base_model='user/name'), so that others find the model that the adapter is "
            "made for"
        )
    about = {"adapter_name": adapter, "base_model": base, "metrics": metrics, "license": license, "tags": tags}
    about["facts"] = list(facts) if facts is not None else None
    api = HfApi(token=token, library_name="qf_peft")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "saved")
        model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
        if adapter != "default":
            folder = folder / adapter
        for name in (LEDGER_NAME, STATISTICS_NAME):
            (folder / name).unlink(missing_ok=True)
        export_lora(model, folder / "lora", adapter_name=adapter)
        for path in folder.glob(f"**/{CONFIG_NAME}"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = base
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        for path in folder.glob("**/README.md"):
            path.unlink()
        save_card(model_card(model, repo_id=repo_id, **about), folder)
        with _explained(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.repo_info(repo_id).private:
                raise ValueError(f"private=True, but {repo_id} exists and is public; make it private, or take another")
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            save_card(model_card(model, repo_id=repo_id, **about), folder)  # its name has the user's before it now
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload QF adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Adds to the Hub's errors what to do about them."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            advice = "The Hub does not take the token: log in (`hf auth login`), or give token=..."
        elif status == 403:
            advice = (
                f"This token may not write to {repo_id}: take a name of your own or a token with write access, or "
                "propose the adapter to the owner with create_pr=True."
            )
        else:
            advice = f"{repo_id} may have been made, but nothing was put into it: push again when the Hub answers."
        error.append_to_message(f"\n\nThe adapter was not pushed to {repo_id}. {advice}")
        raise
