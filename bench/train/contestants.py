"""Who takes part in `python -m bench train`: names and how each runs. (models.py makes them.)"""

from __future__ import annotations

# Late prompts: how the layers above the insertion run, and whether those below are in a cache.
LATE = {
    "recipe": ("padded", False),
    "recipe_bf16": ("padded", False),
    "uncached": ("packed", False),
    "cached": ("padded", True),
    "cached_packed": ("packed", True),
    "cached_graphs": ("packed", True),
    "cached_held": ("packed", True),
}
# Late LoRA with a prompt and alone, run as LPTTrainer does; its recipes are what it has to equal.
_UPDATES = {"lora_r": 8, "lora_target_modules": "all-linear"}
ALONE = {**_UPDATES, "generator": "none"}
LORA = {"lpt_lora": _UPDATES, "late_lora": ALONE}
RECIPES = {name: f"recipe_{name}" for name in LORA}
LORA |= {RECIPES[name]: settings for name, settings in LORA.items()}
LATE |= {name: ("padded", False) if name in RECIPES.values() else ("packed", True) for name in LORA}
# On a CPU, beside those in fp32: layers in bf16 as LPTTrainer has them, and what users do there.
OWN_BF16 = ("ours_bf16", "late_lora_bf16")
LATE |= dict.fromkeys(OWN_BF16, ("packed", True))
LORA["late_lora_bf16"] = ALONE
AUTOCAST = ("recipe_autocast", "lora_autocast")
LATE["recipe_autocast"] = ("padded", False)
LPTRAINER = "lptrainer"  # whole steps of a training in bf16 (whole_loop.py)
LATE[LPTRAINER] = ("packed", True)
OURS = ("uncached", "cached", "cached_packed", "cached_graphs", "cached_held", *RECIPES, *OWN_BF16)
OURS += (LPTRAINER,)
GRAPHS = "cached_graphs"  # the same by CUDA graphs (lpt_fast/packed/graphs.py)
HELD = "cached_held"  # the same with projections held in memory (lpt_fast/train/projections.py)
# Who runs on one kind of device alone.
ONLY_ON = {GRAPHS: "cuda", HELD: "cpu"}
HOLDS = (HELD, *RECIPES, *OWN_BF16, LPTRAINER)  # on the CPU
OTHERS = ("prompt_tuning", "lora", "lora_bf16", "lora_autocast", "full", "head")
# With --dtype bf16 everything runs under bf16 autocast. These hold their frozen weights in bf16
# besides (what trains is fp32), as one may whose weights are frozen.
HALF = {"recipe_bf16", "lora_bf16", "head", *OURS}


def contestants_of(dtype: str, device: str) -> list[tuple[str, bool]]:
    """Names, and whether there is one for each k."""
    left_out = {*RECIPES.values()}
    left_out |= {"recipe_bf16", "lora_bf16"} if dtype == "fp32" else set()
    left_out |= set() if (dtype, device) == ("fp32", "cpu") else {*OWN_BF16, *AUTOCAST, LPTRAINER}
    names = [n for n in (*LATE, *OTHERS) if n not in left_out and ONLY_ON.get(n, device) == device]
    return [(name, name in LATE) for name in names]


def called(name: str, dtype: str, device: str) -> str:
    """A contestant by the name that it has beside those in fp32: `recipe_bf16` and `lora_bf16` are
    there what users run on a CPU, autocast over fp32 weights.
    """
    plain = name.removesuffix("_bf16")
    if (dtype, device) == ("fp32", "cpu") and f"{plain}_autocast" in AUTOCAST:
        return f"{plain}_autocast" if name.endswith("_bf16") else name
    return name


def method_of(name: str) -> str:
    """The method of lpt_fast.cli.train.LEARNING_RATES."""
    return "lpt" if name in LATE else name.removesuffix("_bf16").removesuffix("_autocast")
