"""python -m bench peft_suite --peft FOLDER: PEFT's own generic tests with LPTConfig as the method.

FOLDER holds PEFT's sources (a clone). Its tests are copied to a temporary folder, where their lists
of methods become this project's and their models small random ones that are made here: no hub is
asked. Nothing of PEFT stays. `WHY_NOT` has what cannot apply, with reasons; the rest has to pass.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from .paths import ROOT

# File of PEFT's tests -> task, and {folder name: (class, family)} of the models it gets.
SUITES = {
    "test_decoder_models": (
        "CAUSAL_LM",
        {
            "tiny-random-OPTForCausalLM": ("AutoModelForCausalLM", "opt"),
            "tiny-random-GPT2LMHeadModel": ("AutoModelForCausalLM", "gpt2"),
            "tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama"),
            "tiny-dummy-qwen2": ("AutoModelForCausalLM", "qwen2"),
        },
    ),
    "test_encoder_decoder_models": (
        "SEQ_2_SEQ_LM",
        {"tiny-random-T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "t5")},
    ),
    "test_feature_extraction_models": (
        "FEATURE_EXTRACTION",
        {
            "tiny-random-BertModel": ("AutoModel", "bert"),
            "tiny-random-RobertaModel": ("AutoModel", "roberta"),
            "tiny-random-DebertaModel": ("AutoModel", "deberta"),
            "tiny-random-DebertaV2Model": ("AutoModel", "deberta-v2"),
        },
    ),
    "test_seq_classifier": (
        "SEQ_CLS",
        {
            "tiny-random-BertForSequenceClassification": (
                "AutoModelForSequenceClassification",
                "bert",
            ),
            "tiny-random-RobertaForSequenceClassification": (
                "AutoModelForSequenceClassification",
                "roberta",
            ),
            "tiny-LlamaForSequenceClassification": ("AutoModelForSequenceClassification", "llama"),
        },
    ),
}
GENERATORS = ("static", "npg", "mppg")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_FAMILY = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4,
           "decoder_start_token_id": 0},
}  # fmt: skip
# Part of a test's name -> why it cannot apply to a prompt that is made in the middle of a model.
WHY_NOT = {
    "merge_layers": "a late prompt depends on the input and cannot be merged into weights",
    "targeting_lora_to_embedding_layer": "a test of LoRA's, with a model from the hub",
    "lora_embed_scale": "a test of LoRA's, with a model from the hub",
}


def make_models(folder: Path) -> None:
    """Saves the small random models."""
    import torch
    import transformers

    for _, models in SUITES.values():
        for name, (cls, family) in models.items():
            sizes = {k: v for k, v in SIZES.items() if family != "t5" or "token" in k or "voc" in k}
            config = transformers.AutoConfig.for_model(family, **sizes, **OF_FAMILY.get(family, {}))
            torch.manual_seed(0)
            getattr(transformers, cls).from_config(config).save_pretrained(folder / name)


def with_ours(source: str, task: str, models: list[str]) -> str:
    """The source of a test file with our method and models in its lists."""
    settings = {"task_type": task, "num_virtual_tokens": 3, "bottleneck_size": 8}
    configs = [f"(LPTConfig, {settings | {'generator': g}!r})" for g in GENERATORS]
    lists = {"ALL_CONFIGS": f"[{', '.join(configs)}]"}
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        name = node.targets[0].id if isinstance(node, ast.Assign) and _named(node) else ""
        if name.endswith("_MODELS_TO_TEST") or name == "SMALL_GRID_MODELS":
            lists[name] = repr(models)
        if name in lists:
            lines[node.lineno - 1 : node.end_lineno] = [f"{name} = {lists[name]}"]
    first = next(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    lines.insert(first, "from lpt_fast import LPTConfig")
    return "\n".join(lines) + "\n"


def _named(node: ast.Assign) -> bool:
    return len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def main(arguments: list[str] | None = None) -> int:
    """Runs the tests; returns pytest's exit code, 2 for a folder that is not PEFT's."""
    parser = argparse.ArgumentParser(prog="python -m bench peft_suite", description=__doc__)
    parser.add_argument("--peft", required=True, help="folder of PEFT's sources")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this (may repeat)")
    options, of_pytest = parser.parse_known_args(arguments)  # the rest is pytest's
    tests = Path(options.peft) / "tests"
    if not (tests / "testing_common.py").is_file():
        print(f"{tests} holds no testing_common.py, expected PEFT's sources; clone them there.")
        return 2
    suites = options.suite or list(SUITES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder / "models")
        (folder / "tests").mkdir()
        for name in ("__init__", "conftest", "testing_common", "testing_utils"):
            shutil.copy(tests / f"{name}.py", folder / "tests")
        common = folder / "tests" / "testing_common.py"
        common.write_text(mixing(common.read_text(encoding="utf-8")), encoding="utf-8")
        with open(folder / "tests" / "testing_utils.py", "a", encoding="utf-8") as file:
            # (Other methods' switch; a late prompt changes the output from the start.)
            file.write(
                "\n\ndef set_init_weights_false(config_cls, kwargs):\n    return dict(kwargs)\n"
            )
        if importlib.util.find_spec("diffusers") is None:  # (imported by all, used by others)
            (folder / "diffusers.py").write_text("class StableDiffusionPipeline: pass\n")
        for suite in suites:
            task, models = SUITES[suite]
            source = mixing((tests / f"{suite}.py").read_text(encoding="utf-8"))
            paths = [str(folder / "models" / name) for name in models]
            (folder / "tests" / f"{suite}.py").write_text(with_ours(source, task, paths))
        path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        code = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"),
                *("--junitxml", str(folder / "results.xml"), "-p", "bench.peft_suite"),
                *("--tb", "line", "-o", "addopts="),
                *of_pytest,
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            check=False,
        ).returncode
        if (folder / "results.xml").is_file():  # (else pytest has said why)
            print(table(folder / "results.xml"))
    return code


def mixing(source: str) -> str:
    """Tests of mixed batches that are not left out for other methods than PEFT's own that mix."""
    return re.sub(
        r"if config_cls (?:not in \(LoraConfig,(?: RoadConfig)?\)|!= LoraConfig):"
        r"(?=(?:\s*#.*)*\s*pytest\.skip\(f?\"Mixed adapter)",
        "if False:",
        source,
    )


def table(path: Path) -> str:
    """Test by test, over all models and generators: passed, failed, left out."""
    found: Counter = Counter()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = case.get("name").split("[")[0]
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        found[name, kind] += 1
        found["all", kind] += 1
    kinds = ("passed", "failed", "skipped")
    lines = ["| test | passed | failed | skipped |", "|---|---|---|---|"]
    for name in sorted({name for name, _ in found}):
        lines.append(f"| {name} | {' | '.join(str(found[name, kind]) for kind in kinds)} |")
    return "\n".join(lines)


def pytest_collection_modifyitems(items):
    """(As a plugin of the run.) Leaves out what cannot apply, with its reason."""
    import pytest

    for item in items:
        for part, why in WHY_NOT.items():
            if part in item.name:
                item.add_marker(pytest.mark.skip(reason=why))


if __name__ == "__main__":
    sys.exit(main())
