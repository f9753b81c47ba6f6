"""The model card of a QF adapter: what the Hub and its readers need to know, from what the model itself remembers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, PeftModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..adapter.checks import qf_adapter
from ..adapter.description import base_model_id, blocks_in_words, versions
from ..adapter.model import QFModel
from ..data.rows import read_rows
from ..data.writing import whole_file
from ..evaluate.metrics import RESULTS, Metric

TEMPLATE = Path(__file__).with_name("card_template.md")
MARK = "<!-- Written by qf_peft."


def model_card(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    metrics: Mapping[str, Metric | float] | None = None,
    facts: Iterable[Mapping[str, Any]] | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
) -> ModelCard:
    """The card of one QF adapter. What the model does not know, such as what an adapter from a file was taught, is left
    out.

    Args:
        model: the model with the adapter.
        adapter_name: which; by default the active one.
        repo_id: where [`push_to_hub`] puts it, `user/name`; by default the card is of a folder and its adapter only.
        base_model: the base model's id on the Hub; by default the name it was loaded by, if that is one.
        metrics: what [`QFTrainer.evaluate`] returned; the card holds it as a table and as `model-index` results.
        facts: rows to be printed in the card. By default none of the taught texts is.
        license: its identifier, such as `"apache-2.0"`.
        tags: to be added to the card's own.

    Returns:
        The card: `card.data`, `card.text`, `card.save(path)`.

    Raises:
        ValueError: there is no such QF adapter, `base_model` is no id, `metrics` holds something else than results
            of `evaluate`, or a row of `facts` is of the wrong form.
    """
    adapter = qf_adapter(model, adapter_name)
    tuner: QFModel = model.base_model
    config, taught = model.peft_config[adapter], tuner.taught.get(adapter)
    layers = tuner.adapter_layers(adapter)
    if taught is not None and not all(taught.holds(name, tuner.factors(adapter, name)) for name in layers):
        taught = None  # its weights came from elsewhere since
    base_model = base_model_id(model, adapter, base_model)
    title = repo_id.split("/")[-1] if repo_id else "QF adapter"
    options = {
        "target_modules": config.target_modules
        if isinstance(config.target_modules, str)
        else sorted(config.target_modules or ()),
        "layers_to_transform": config.layers_to_transform,
        "r": None if config.grows else config.r,
        "task_type": getattr(config.task_type, "value", config.task_type),
    }
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        library_name="peft",
        license=license,
        pipeline_tag="text-generation" if _generates_text(model) else None,
        tags=sorted(
            {"lora", "qf", "transformers", *([f"base_model:adapter:{base_model}"] if base_model else []), *(tags or [])}
        ),
        model_name=title if metrics else None,
        eval_results=_eval_results(metrics or {}) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        base_model=base_model,
        repo_id=repo_id,
        location=repo_id or ("path/to/this/folder" + (f"/{adapter}" if adapter != "default" else "")),
        where=blocks_in_words(list(layers)),
        rank=config.r,
        facts=sum(not entry.settled for entry in taught.entries) if taught else None,  # settled ones it held before
        continued=bool(taught and taught.foundation),
        listed=_listed(facts) if facts is not None else "",
        results=[(RESULTS[name][0], _text(value)) for name, value in (metrics or {}).items()],
        settings=f"{_call('QFConfig', {k: v for k, v in options.items() if v is not None})}\n"
        f"{_call('QFTrainingArguments', taught.settings)}"
        if taught
        else "",
        versions=list(versions()),
    )


def save_card(card: ModelCard, folder: str | Path) -> None:
    """Write `README.md` into a folder. If one is there that `qf_peft` did not write, its text stays, and only its
    metadata is put right."""
    path = Path(folder, "README.md")
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        theirs = ModelCard.load(path, ignore_metadata_errors=True)
        for name, value in card.data.to_dict().items():
            if name == "tags":
                value = sorted({*value, *(theirs.data.get("tags") or [])})
            if name != "model-index":
                theirs.data[name] = value
        card = theirs
    with whole_file(path) as file:
        card.save(file)


def _generates_text(model: PeftModel) -> bool:
    causal = type(model.get_base_model()).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return causal or isinstance(model, PeftModelForCausalLM)


def _eval_results(metrics: Mapping[str, Metric | float]) -> list[EvalResult]:
    results = []
    for name, value in metrics.items():
        if name not in RESULTS or not isinstance(value, (Metric, float, int)):
            raise ValueError(
                f"metrics has {name!r}: {value!r}; expected what trainer.evaluate(...) returned, by the names "
                f"{list(RESULTS)}"
            )
        measured = RESULTS[name][1]
        if measured is None:
            continue
        dataset, dataset_name, kind = measured
        extent = None
        if isinstance(value, Metric):
            ends = [round(end, 6) for end in (value.low, value.high) if math.isfinite(end)]
            extent = {"count": value.count, **({"interval_95": ends} if len(ends) == 2 else {})}
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=dataset_name,
                metric_type=kind,
                metric_name=name,
                metric_value=round(float(value.value if isinstance(value, Metric) else value), 6),
                metric_args=extent,
            )
        )
    return results


def _text(value: Metric | float) -> str:
    return str(value) if isinstance(value, Metric) else f"{value:.3f}"


def _listed(facts: Iterable[Mapping[str, Any]]) -> str:
    """The rows as JSON, one a line: a line that begins with a brace cannot end the code block around it."""
    rows = read_rows(facts, "facts")
    texts = [{"instruction": row.instruction, "prompt": row.prompt, "completion": row.completion} for row in rows]
    return "\n".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call with keyword arguments, as Python source, with the quotes that formatters put."""
    literals = {key: repr(value) for key, value in arguments.items()}
    literals = {key: text if '"' in text else text.replace("'", '"') for key, text in literals.items()}
    return "\n".join([f"{name}(", *(f"    {key}={text}," for key, text in literals.items()), ")"])
