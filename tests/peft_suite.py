"""PEFT's own tests with QF as the method: `python tests/peft_suite.py FOLDER`, where FOLDER holds PEFT's repository.

Its tests are run twice, as they are and with `QFConfig` in the place of `LoraConfig`; those of other methods are left
out. What needs the Hub fails alike for both if there is none. Printed are the numbers, and the tests that pass with
`LoraConfig` and not with `QFConfig`; the exit code is 0 if each of these fails for a reason that `BY_DESIGN` states.

The same file is the pytest plugin that puts `QFConfig` in the place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FILES = ["tests/test_custom_models.py", "tests/test_config.py", "tests/test_decoder_models.py"]
BY_DESIGN: dict[str, str] = {
    # what the test's name or its error says: why QF does otherwise
    "an option of LoRA that a QF adapter does not have": (
        "the option puts something else than B @ A beside the weight, or changes the base weight"
    ),
    "of its tensors belong to no target module": (
        "a file changes nothing of the base model that its configuration does not name; LoRA's may overwrite any weight"
    ),
    "a pickle, which can run code": "adapters from strangers are loaded from safetensors only",
    "with this model's layer it must be": (
        "a file that does not fit its model is refused as a whole, by a ValueError that names the tensor"
    ),
    "so the default target_modules cannot be found": (
        "the default modules are those that write into the residual stream, found in the model, not a list by its type"
    ),
    "test_mixed_adapter_batches_mlp[LoRA mixed adapter-config00-": (
        "float32's rounding, as of LoraConfig(r=1, lora_alpha=1), which are QF's defaults, on the same values"
    ),
    "is not compatible with the `PeftMixedModel`": "PEFT has a closed list of the types that can be mixed",
}
_METHOD, _RESULTS = "PEFT_SUITE_METHOD", "PEFT_SUITE_RESULTS"
_found: dict[str, dict[str, str]] = {}


def pytest_configure() -> None:
    """Before a test file is imported: from here on `peft.LoraConfig` is `QFConfig`."""
    if os.environ.get(_METHOD) == "QFConfig":
        import peft

        from qf_peft import QFConfig

        peft.LoraConfig = QFConfig


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other methods: those with parameters that are configurations, none of them LoRA's."""
    from peft import LoraConfig, PeftConfig

    def others(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        classes = [value if isinstance(value, type) else type(value) for value in values]
        classes = [each for each in classes if issubclass(each, PeftConfig)]
        return bool(classes) and not any(each is LoraConfig for each in classes)

    utilities = sys.modules.get("tests.testing_utils")
    if utilities is not None and os.environ.get("HF_HUB_OFFLINE") == "1":
        utilities._HUB_MODEL_ACCESSES = _Cached()  # which else go online all the same, for what they have not seen
    left_out = [item for item in items if others(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not others(item)]


class _Cached(Counter):
    """What was downloaded, by model: everything."""

    def __contains__(self, model_id: object) -> bool:
        return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.replace("QFConfig", "LoraConfig")
    if report.when == "call" or report.outcome != "passed":
        known = _found.get(name, {}).get("outcome")
        if known != "failed":
            _found[name] = {"outcome": report.outcome, "error": report.longreprtext if report.failed else ""}


def pytest_sessionfinish() -> None:
    Path(os.environ[_RESULTS]).write_text(json.dumps(_found), encoding="utf-8")


def run(folder: Path, method: str, options: list[str]) -> dict[str, dict[str, str]]:
    """The tests' outcomes and errors by name, with `method` in the place of LoRA."""
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary, "results.json")
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        variables = {_METHOD: method, _RESULTS: str(results), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        wanted = [] if any(option.startswith("tests/") for option in options) else FILES
        subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "peft_suite", "-p", "no:cacheprovider", "-o", "addopts=", "-q",
             "--tb=short", *wanted, *options],
            cwd=folder, env={**os.environ, **variables}, stdout=sys.stderr, check=False,
        )  # fmt: skip
        return json.loads(results.read_text(encoding="utf-8"))


def reason(name: str, error: str) -> str | None:
    """Why QF fails a test by design, or None."""
    return next((why for said, why in BY_DESIGN.items() if said in name or said in error), None)


def compare(lora: dict[str, Any], qf: dict[str, Any]) -> int:
    """Print the outcomes side by side; how many tests pass with LoRA alone for no stated reason."""
    outcomes = ("passed", "failed", "skipped")
    print(f"{'':12}" + "".join(f"{outcome:>10}" for outcome in outcomes))
    for name, found in (("LoraConfig", lora), ("QFConfig", qf)):
        counts = Counter(each["outcome"] for each in found.values())
        print(f"{name:12}" + "".join(f"{counts[outcome]:>10}" for outcome in outcomes))
    passed = [name for name, found in lora.items() if found["outcome"] == "passed"]
    worse = {n: qf.get(n, {"outcome": "missing", "error": ""}) for n in passed}
    worse = {name: found for name, found in worse.items() if found["outcome"] != "passed"}
    print(f"\n{len(passed)} tests pass with LoraConfig, {len(passed) - len(worse)} of these with QFConfig")
    why = Counter(reason(name, found["error"]) for name, found in worse.items())
    for text, count in why.items():
        if text is not None:
            print(f"{count} fail by design: {text}")
    rest = {name: found for name, found in worse.items() if reason(name, found["error"]) is None}
    print(f"{len(rest)} fail for no stated reason")
    for name, found in rest.items():
        lines = re.findall(r"^E +(.+)$", found["error"], re.MULTILINE)
        print(f"  {name}\n      {found['outcome']}: {lines[0][:200] if lines else ''}")
    return len(rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="PEFT's repository at the version installed")
    parser.add_argument("--lora", type=Path, help="keep LoRA's outcomes in this file, and take them from it")
    given, options = parser.parse_known_args()
    if given.lora is not None and given.lora.is_file():
        lora = json.loads(given.lora.read_text(encoding="utf-8"))
    else:
        lora = run(given.folder, "LoraConfig", options)
        if not any(found["outcome"] == "passed" for found in lora.values()):
            sys.exit("nothing passes with LoraConfig: the tests could not be run, see above")
        if given.lora is not None:
            given.lora.write_text(json.dumps(lora), encoding="utf-8")
    qf = run(given.folder, "QFConfig", options)
    if options:  # a selection of the tests whose outcomes the file holds
        lora = {name: found for name, found in lora.items() if name in qf}
    sys.exit(compare(lora, qf) > 0)


if __name__ == "__main__":
    main()
