"""LPTModel: Late Prompt Tuning as a PEFT method (the tuner behind
`get_peft_model(model, LPTConfig(...))`).
"""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from typing import ClassVar

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..backbone.copies import LATE_PROMPT
from ..backbone.families import (
    Family,
    find_backbone,
    frozen_below,
    get_layers,
    head_modules,
    is_causal_lm,
)
from ..backbone.low_rank import ALL_LINEAR, find_targets
from .all_arguments import hand_on_all
from .config import LPT, NO_PROMPT, PREFIX, LPTConfig
from .filling_in import fill_in
from .labels import set_labels
from .late_lora import lora_targets, merge_lora
from .late_prompt import NO_MERGE, LatePrompt
from .mixed import mixing

_HALF = (torch.float16, torch.bfloat16)


class LPTModel(BaseTuner):
    """Adds late prompts to a Hugging Face model of a known family.

    What it adapts is the backbone as a whole: a `LatePrompt` becomes its child and takes over its
    forward. Heads and losses stay those of the Hugging Face model. Late prompts cannot be merged;
    one adapter is active at a time, and `adapter_names` runs several in one call (mixed.py).
    """

    prefix = PREFIX
    tuner_layer_cls = LatePrompt
    target_module_mapping: ClassVar[dict] = {}

    def forward(self, *args, **kwargs):
        """The model's own forward."""
        # By call and not by .forward(), which would pass by the hook that notes labels and context
        # lengths.
        return self.model(*args, **kwargs)

    # -- injection ---------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: LPTConfig, model_config) -> LPTConfig:
        """Nothing: `inject_adapter` has filled it in."""
        return peft_config

    def _fill(self, peft_config: LPTConfig) -> None:
        """Fills in what depends on the model and checks it."""
        name, backbone, family = find_backbone(self.model)
        depth = len(get_layers(backbone, family))
        k = peft_config.insertion_layer
        if depth < 2:
            raise ValueError(
                "Late Prompt Tuning needs a model of at least 2 layers to insert a prompt between, "
                f"got {depth}."
            )
        if k is None:
            peft_config.insertion_layer = k = depth // 2
        if not 1 <= k <= depth - 1:
            raise ValueError(
                f"`insertion_layer` must be between 1 and {depth - 1} for this model of {depth} "
                f"layers, got {k}."
            )
        layers = f"{name}.{family.layers}" if name else family.layers
        peft_config.target_modules = {f"{layers}.{k}"}
        if peft_config.lora_r is not None:
            self._choose_lora_targets(peft_config, name, backbone, family)
        heads = head_modules(self.model, name, backbone, family)
        if heads:
            self._take_labels(peft_config)
            if peft_config.train_head:
                chosen = list(peft_config.modules_to_save or [])
                peft_config.modules_to_save = [*chosen, *(h for h in heads if h not in chosen)]
        self._check_trainable(peft_config, backbone, family)

    def _choose_lora_targets(
        self, peft_config: LPTConfig, name: str, backbone: nn.Module, family: Family
    ) -> None:
        """What late LoRA updates where the user has not said it; checks what was said."""
        if peft_config.lora_target_modules is None:
            peft_config.lora_target_modules = ALL_LINEAR
        if peft_config.lora_alpha is None:
            peft_config.lora_alpha = 2 * peft_config.lora_r
        k = peft_config.insertion_layer
        find_targets(name, backbone, family, k, peft_config.lora_target_modules)

    def _check_name(self, adapter_name: str, peft_config: LPTConfig) -> None:
        """Refuses names that other adapters' late LoRA has in those of its parameters: PEFT takes
        such a parameter for one of this adapter and leaves it out of the other's file; and those
        that no module can have.
        """
        if hasattr(nn.ModuleDict, adapter_name):
            raise ValueError(
                f"The adapter name {adapter_name!r} is that of a method of torch.nn.ModuleDict, in "
                "which adapters are kept, expected another one; choose another name."
            )
        late = self._late_prompt()
        if late is None:
            return
        names = {other: updates.names for other, updates in late.lpt_lora.items()}
        if peft_config.lora_r is not None:
            names[adapter_name] = [found[:2] for found in lora_targets(late, peft_config)]
        for owner, targets in names.items():
            for layer, module in targets:
                full = f"{layer}.{module}.lora_A.weight"
                parts = {*full.split("."), "lora_B"}
                for name in {*late.lpt_generator, adapter_name} - {owner}:
                    if name in parts:
                        raise ValueError(
                            f"The adapter name {name!r} is part of the parameter {full} of late "
                            f"LoRA in {owner!r}, which PEFT would leave out of that adapter's "
                            "file; choose another name."
                        )

    def _check_trainable(self, peft_config: LPTConfig, backbone: nn.Module, family: Family) -> None:
        """Refuses modules_to_save at or below the insertion, which no gradient ever reaches."""
        below = set()
        for part in frozen_below(backbone, family, peft_config.insertion_layer):
            below.update(part.modules())
        for wanted in peft_config.modules_to_save or ():
            for name, module in self.model.named_modules():
                if name.endswith(wanted) and module in below:
                    raise ValueError(
                        f"`modules_to_save` names {wanted!r}, which matches {name}: it lies at or "
                        f"below insertion_layer={peft_config.insertion_layer}, where nothing "
                        "trains. Leave it out, or use another method for it."
                    )

    def _take_labels(self, peft_config: LPTConfig) -> None:
        """Keeps the model's labels with the adapter, unless the adapter brings its own."""
        existing = getattr(getattr(self.model, "config", None), "id2label", None)
        late = self._late_prompt()
        if late is not None:  # the base model's labels, not the active adapter's
            existing = (late.base_labels or (None, existing))[1]
        if peft_config.num_labels is None and existing is not None:
            peft_config.num_labels = len(existing)
        if peft_config.id2label is None and existing and len(existing) == peft_config.num_labels:
            peft_config.id2label = dict(existing)

    @staticmethod
    def _check_target_module_exists(peft_config: LPTConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _check_target_module_compatiblity(self, peft_config, model, target_name) -> None:
        """PEFT's check is about linear layers of state space models."""

    def _late_prompt(self) -> LatePrompt | None:
        _, backbone, _ = find_backbone(self.model)
        return backbone._modules.get(LATE_PROMPT)

    def _create_and_replace(
        self,
        peft_config,
        adapter_name,
        target,
        target_name,
        parent,
        current_key,
        parameter_name=None,
    ) -> None:
        """`target` is the first layer above the insertion; what is added belongs to the backbone
        around it.
        """
        late = self._late_prompt()
        if late is None:
            _, backbone, family = find_backbone(self.model)
            causal_lm = family.causal and is_causal_lm(self.model)
            late = LatePrompt(self.model, backbone, family, causal_lm)
            late.attach()
            late.train(backbone.training)
        late.add_generator(adapter_name, peft_config, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            # PEFT adds adapters switched off; nn.Parameter is born trainable.
            late.freeze(adapter_name)

    def inject_adapter(
        self,
        model,
        adapter_name,
        autocast_adapter_dtype=True,
        low_cpu_mem_usage=False,
        state_dict=None,
    ) -> None:
        """Puts a late prompt into the backbone; arguments as of PEFT's BaseTuner.

        What depends on the model (`filling_in.FIELDS`) is filled into the config that the user
        gave, or into a copy of it where it serves another model already with other values.
        """
        config = self.peft_config[adapter_name]

        def fill(own: LPTConfig) -> None:
            self._fill(own)
            self._check_name(adapter_name, own)

        self.peft_config[adapter_name] = fill_in(config, fill)
        # Where the prompt goes follows from the config alone; a state dict has nothing to add.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._fit_head(adapter_name)
        if adapter_name in self.active_adapters:
            self._late_prompt()._sync()

    def _fit_head(self, adapter_name: str) -> None:
        """Gives the adapter's copy of the head as many outputs as the adapter has labels.

        `AutoPeftModelForSequenceClassification` builds the base model with two labels before it
        looks at the adapter.
        """
        config = self.peft_config[adapter_name]
        wanted, base = config.num_labels, (self._late_prompt().base_labels or (None,))[0]
        if wanted is None or wanted == base or config.task_type == TaskType.QUESTION_ANS:
            return
        std = getattr(self.model.config, "initializer_range", 0.02)
        for wrapper in self.model.modules():
            if not (
                isinstance(wrapper, ModulesToSaveWrapper)
                and adapter_name in wrapper.modules_to_save
            ):
                continue
            head = wrapper.modules_to_save[adapter_name]
            for name, module in list(head.named_modules()):
                if not (isinstance(module, nn.Linear) and module.out_features == base):
                    continue
                weight = module.weight
                linear = nn.Linear(
                    module.in_features,
                    wanted,
                    bias=module.bias is not None,
                    device=weight.device,
                    dtype=weight.dtype,
                )
                if not weight.is_meta:
                    nn.init.normal_(linear.weight, std=std)
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)
                linear.requires_grad_(weight.requires_grad)
                if name == "":
                    wrapper.modules_to_save[adapter_name] = linear
                else:
                    head.set_submodule(name, linear)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """fp32 masters for the generator and for the head: in half precision small steps would
        be lost.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        for wrapper in self.model.modules():
            if (
                isinstance(wrapper, ModulesToSaveWrapper)
                and adapter_name in wrapper.modules_to_save
            ):
                head = wrapper.modules_to_save[adapter_name]
                if any(p.dtype in _HALF for p in head.parameters()):
                    head.to(torch.float32)
                    head.register_forward_pre_hook(_cast_to_head)

    # -- what does not work with late prompts ------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        late = self._late_prompt()
        config = None if late is None else late.active_config
        if config is None or config.generator != NO_PROMPT:
            raise ValueError(NO_MERGE)

    def unmerge_adapter(self) -> None:
        """Raises ValueError: nothing was merged."""
        raise ValueError(NO_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if kwargs.get("alora_offsets") is not None:  # which PEFT takes out of the call
            raise ValueError(
                "Late Prompt Tuning got `alora_offsets`, expected none: they are for activated "
                "LoRA. Leave it out; `context_lengths` says where a decoder's context ends."
            )
        if names is None:
            yield
            return
        with mixing(self._late_prompt(), names):
            yield

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: a prompt is no low-rank update."""
        return False

    # -- leaving -----------------------------------------------------------------------------------

    def _unload_and_optionally_merge(
        self, merge=True, progressbar=False, safe_merge=False, adapter_names=None
    ) -> nn.Module:
        late = self._late_prompt()
        if merge:
            self._check_merge_allowed()
            merged = self._check_merged_names(late, adapter_names)
            merge_lora(late, merged, safe_merge)
        if late is not None:
            late.detach()
        if merge and late.lpt_config[merged].num_labels:
            config = late.lpt_config[merged]
            set_labels(self.model, (config.num_labels, config.id2label))
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                # PEFT would leave the trained head behind. Without the prompt it is worth nothing,
                # so the base model gets back its own; with merged weights it belongs to them.
                own = module.original_module
                if merge and merged in module.modules_to_save:
                    own = module.modules_to_save[merged]
                self.model.set_submodule(name, own)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @staticmethod
    def _check_merged_names(late: LatePrompt, names: list[str] | None) -> str:
        active = late.active_adapters[0]
        if names is not None and list(names) != [active]:
            raise ValueError(
                f"merge got adapter_names={names}, expected the active adapter alone ({active!r}): "
                "each has a head of its own. Call set_adapter() first."
            )
        return active

    def fold_adapter(self, adapter_name: str = "default") -> None:
        """Turns a trained `residual` adapter into the `static` one that gives the same prompt.

        Args:
            adapter_name: which adapter.

        Raises:
            ValueError: when its generator is not `residual`.
        """
        late = self._late_prompt()
        if adapter_name not in late.lpt_generator:
            raise ValueError(
                f"There is no adapter {adapter_name!r} to fold, only {sorted(late.lpt_generator)}."
            )
        config = self.peft_config[adapter_name]
        if config.generator != "residual":
            raise ValueError(
                f"Only a 'residual' generator folds to a static prompt; adapter {adapter_name!r} "
                f"has {config.generator!r}."
            )
        old = late.lpt_generator[adapter_name]
        trains = any(p.requires_grad for p in old.parameters())
        late.lpt_generator[adapter_name] = old.fold().requires_grad_(trains)
        config = copy.copy(config)  # (The user's object may serve other models.)
        config.generator = "static"
        self.peft_config[adapter_name] = config
        late.lpt_config[adapter_name] = copy.deepcopy(config)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...lpt_generator.<adapter>.proj_down.weight` -> `...lpt_generator.proj_down.weight`, and
        the same of `lpt_lora`.

        PEFT's own rule takes the name from the second to last place of the key; these are modules
        with parameters deeper than that.
        """
        place = rf"(\.{PREFIX}(?:generator|lora))\.{re.escape(adapter_name)}\."
        return re.sub(place, r"\1.", key, count=1)


def _cast_to_head(module: nn.Module, args: tuple) -> tuple:
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)


def register() -> None:
    """Makes PEFT know the method. `peft.utils.register_peft_method` refuses: its enum of methods
    is closed.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[LPT] = LPTConfig
    PEFT_TYPE_TO_TUNER_MAPPING[LPT] = LPTModel
    PEFT_TYPE_TO_PREFIX_MAPPING[LPT] = PREFIX
    hand_on_all()
