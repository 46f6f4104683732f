"""`lpt-fast train --lora_r`: late LoRA from the command line, and the same flags for LoRA."""

from __future__ import annotations

import json

import pytest
import torch

from lpt_fast.cli.arguments import TrainArguments
from lpt_fast.cli.inference import Classifier
from lpt_fast.cli.model import adapt
from tests.cli.cases import invoke, refused
from tests.cli.test_cli import run_train
from tests.cli.test_cli_activation_cache import results_of, same_numbers
from tests.tiny import FAMILIES, tiny

ALL = ("--lora_r", 2, "--lora_target_modules", "all-linear")
ALONE = (*ALL, "--generator", "none")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [ALL, ALONE], ids=["npg", "alone"])
def test_train_eval_predict(models_dir, data, tmp_path, flags):
    """From a cache as from the text; eval, predict and export find again what was trained."""
    out = tmp_path / "out"
    how = ("--validation_file", data["test"], "--prompt_dropout", 0, "--max_length", 32)
    how += ("--lora_learning_rate", 5e-3, "--num_train_epochs", 2)
    run_train(models_dir, data, tmp_path / "text", *flags, *how)
    run_train(
        *(models_dir, data, out, *flags, *how),
        *("--activation_cache", tmp_path / "cache", "--upper", "packed"),
    )
    same_numbers(results_of(tmp_path / "text"), results_of(out), rel=0.05)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_r"] == 2 and config["lora_target_modules"] == "all-linear"
    assert results_of(out)["lora_r"] == 2
    model = Classifier(str(out), use_cpu=True).model
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 1e-4]
    assert moved
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5]])
        mine = model(input_ids=ids).logits
        model.get_parameter(moved[0]).zero_()
        assert not torch.equal(model(input_ids=ids).logits, mine)
    shown = invoke("eval", "--adapter", out, "--test_file", data["test"], "--use_cpu").output
    assert f"{100 * results_of(out)['test']['accuracy']:.1f} %" in shown
    done = invoke("predict", "--adapter", out, "--use_cpu", text="a lovely film\na dull film\n")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 3
    done = invoke("export", "--adapter", out, "--format", "torch")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_the_flags_of_lora(models_dir, data, tmp_path):
    run_train(models_dir, data, tmp_path / "out", "--method", "lora", *ALL, "--max_steps", 2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    assert config["lora_dropout"] == 0.1
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        *("query", "key", "value", "dense")
    }
    run_train(models_dir, data, tmp_path / "two", "--method", "lora", "--max_steps", 2)
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert set(config["target_modules"]) == {"query", "value"}


def test_flags_that_do_not_go_together(models_dir, data, tmp_path):
    base = ["train", "--model", models_dir / "bert", "--train_file", data["train"]]
    base += ["--output_dir", tmp_path / "out", "--use_cpu", "--max_length", 32]
    for flags, message in (
        (["--method", "head", "--lora_r", "4"], "`--lora_r` goes with --method lpt or lora, got 4"),
        (
            ["--method", "lora", "--lora_learning_rate", "1e-3"],
            "`--lora_learning_rate` goes with --method lpt, got 0.001",
        ),
        (["--lora_r", "0"], "`lora_r` must be a whole number of at least 1"),
        (["--generator", "none"], "`generator` is 'none' and `lora_r` None"),
        (["--lora_alpha", "4"], "`lora_alpha` is 4.0 and `lora_r` None"),
        (["--lora_r", "2", "--lora_target_modules", "query,nix"], "got 'nix', expected linear"),
        (["--lora_learning_rate", "1e-3"], "no late LoRA, expected one that has"),
    ):
        assert message in refused(*base, *flags)
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_every_family(family):
    """Queries and values, also where PEFT has no default for the architecture."""
    model = tiny(family, "SEQ_CLS")
    args = TrainArguments(model="-", task="subj", train_file="-", method="lora")
    adapted = adapt(model, args, "SEQ_CLS")
    ends = {name.rpartition(".")[2] for name in adapted.targeted_module_names}
    whole = {"in_proj", "c_attn", "Wqkv", "qkv_proj"}  # queries, keys and values in one
    parts = {"query", "value"}, {"query_proj", "value_proj"}, {"q_proj", "v_proj"}, {"q", "v"}
    assert ends in parts or (len(ends) == 1 and ends <= whole)
