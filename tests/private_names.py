"""Every name of transformers, peft, torch and triton in use here that they do not promise to keep,
and what happens when it goes.

tests/test_private_names.py fails when one of them is gone, and when the source uses one that is not
listed. Promised are names without an underscore that `transformers`, `peft` or `peft.utils` give,
and all of torch's. What of the models' own modules is needed (paths of layers, norms, poolers) is
in lpt_fast/backbone/families.py and lpt_fast/packed/blocks.py, which tests/backbone and
tests/packed hold against the models; names of arguments are in lpt_fast/backbone/arguments.py.
"""

from __future__ import annotations

_TRAINER = "transformers.Trainer"
_TUNER = "peft.tuners.tuners_utils.BaseTuner"
_MODULE = "torch.nn.Module"
_MOVED = "import fails; the name has moved, look for it"
_NEVER_CALLED = "it is no longer called, so that "

# (where it is, its name) -> what happens when it goes
PRIVATE: dict[tuple[str, str], str] = {
    # -- transformers: Trainer ---------------------------------------------------------------------
    (_TRAINER, "_load_from_checkpoint"): _NEVER_CALLED
    + "weights of another shape end in PyTorch's own error",
    (_TRAINER, "_signature_columns"): "context_lengths are removed from the data: wrong contexts",
    (_TRAINER, "_set_signature_columns_if_needed"): _NEVER_CALLED + "context_lengths are removed",
    (_TRAINER, "_get_collator_with_removed_columns"): _NEVER_CALLED + "columns go twice",
    (_TRAINER, "_remove_unused_columns"): "AttributeError with a cache and a datasets.Dataset",
    (_TRAINER, "_get_dataloader"): _NEVER_CALLED + "a cache is not read (text is, all layers run)",
    (_TRAINER, "_inner_training_loop"): _NEVER_CALLED + "CUDA graphs are not used",
    (_TRAINER, "_prepare_inputs"): _NEVER_CALLED + "batches read ahead reach the model unfinished",
    (_TRAINER, "_track_num_input_tokens"): _NEVER_CALLED + "KeyError: input_ids with a cache",
    (_TRAINER, "_clip_grad_norm"): "nothing: the Trainer's own walks through all parameters",
    (_TRAINER, "_tr_loss"): "AttributeError in the first step: the mean behind a loss that is NaN",
    (_TRAINER, "_globalstep_last_logged"): "AttributeError in the first step, as _tr_loss",
    (_TRAINER, "_train_batch_size"): "AttributeError when training begins: the order of examples",
    (_TRAINER, "_save_rng_state"): _NEVER_CALLED + "checkpoints have no cursor: epochs begin anew",
    (_TRAINER, "_init_training_state"): _NEVER_CALLED + "resuming on other processes is not exact",
    (_TRAINER, "_load_optimizer_and_scheduler"): _NEVER_CALLED + "the schedule restarts on resume",
    ("transformers.trainer", "TRAINER_STATE_NAME"): _MOVED,
    ("transformers.trainer_utils", "PREFIX_CHECKPOINT_DIR"): _MOVED,
    ("transformers.trainer_utils", "has_length"): _MOVED,
    ("transformers.trainer_pt_utils", "BatchRebalanceSampler"): _MOVED,
    ("transformers.trainer_pt_utils", "get_length_grouped_indices"): _MOVED,
    (_TRAINER, "_get_train_sampler"): "AttributeError when training begins: the order of examples",
    ("transformers.utils.generic", "find_labels"): _MOVED,
    # -- transformers: models ----------------------------------------------------------------------
    ("transformers.PreTrainedConfig", "_name_or_path"): "caches no longer say whose they are",
    (
        "transformers.utils.output_capturing",
        "maybe_install_capturing_hooks",
    ): "hidden states that are asked for come twice (caught; tests/backbone fail)",
    ("transformers.PreTrainedModel", "_can_record_outputs"): "as maybe_install_capturing_hooks",
    ("transformers.pytorch_utils", "Conv1D"): _MOVED + "; the packed layers of GPT-2",
    ("transformers.modeling_outputs", "BaseModelOutputWithPastAndCrossAttentions"): _MOVED,
    ("transformers.modeling_outputs", "BaseModelOutputWithPoolingAndCrossAttentions"): _MOVED,
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_MASKED_LM_MAPPING"): _MOVED,
    ("transformers.integrations", "get_available_reporting_integrations"): _MOVED,
    ("transformers.utils", "is_datasets_available"): _MOVED,
    ("transformers.utils", "logging"): _MOVED,
    # -- peft --------------------------------------------------------------------------------------
    ("peft.config", "PeftConfig"): _MOVED,
    ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"): _MOVED + "; PEFT does not know the method",
    ("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"): _MOVED + "; PEFT does not know the method",
    ("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING"): _MOVED + "; PEFT does not know the method",
    ("peft.tuners.tuners_utils", "BaseTuner"): _MOVED,
    ("peft.tuners.tuners_utils", "BaseTunerLayer"): _MOVED,
    ("peft.utils.other", "ModulesToSaveWrapper"): _MOVED + "; heads are not found",
    (_TUNER, "_prepare_adapter_config"): "nothing: `inject_adapter` has filled in what it would",
    (_TUNER, "_check_target_module_exists"): _NEVER_CALLED + "no late prompt is added",
    (
        _TUNER,
        "_check_target_module_compatiblity",
    ): "nothing: PEFT's check, of other methods, is off",
    (_TUNER, "_create_and_replace"): _NEVER_CALLED + "no late prompt is added",
    (_TUNER, "_cast_adapter_dtype"): "AttributeError when an adapter is added",
    (_TUNER, "_check_merge_allowed"): _NEVER_CALLED + "merging ends in another error",
    (_TUNER, "_unload_and_optionally_merge"): _NEVER_CALLED + "unload() leaves the prompt in place",
    (_TUNER, "_remove_adapter_name_from_key"): _NEVER_CALLED + "saved keys hold the adapter's name",
    (
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "_move_adapter_to_device_of_base_layer",
    ): _NEVER_CALLED + "adapters loaded with low_cpu_mem_usage stay on the CPU",
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_active_adapter"): "AttributeError: adapter_names",
    ("peft.tuners.tuners_utils.BaseTunerLayer", "_disable_adapters"): "AttributeError: as above",
    ("peft.utils.other.AuxiliaryTrainingWrapper", "_active_adapter"): "AttributeError: as above",
    ("peft.utils.other.AuxiliaryTrainingWrapper", "_disable_adapters"): "AttributeError: as above",
    ("peft.peft_model", "_enable_peft_forward_hooks"): _NEVER_CALLED + "adapter_names are ignored",
    # -- torch -------------------------------------------------------------------------------------
    (_MODULE, "_modules"): "AttributeError: copies of halves, watching modules",
    (_MODULE, "_parameters"): "AttributeError: copies of halves, watching modules",
    (_MODULE, "_buffers"): "AttributeError: a cache's guard",
    (_MODULE, "_forward_hooks"): "AttributeError: halves without hooks, whether layers are plain",
    (_MODULE, "_forward_pre_hooks"): "AttributeError: as _forward_hooks",
    (_MODULE, "_backward_hooks"): "KeyError: whether layers are plain",
    (
        _MODULE,
        "_backward_pre_hooks",
    ): "layers with such hooks run packed, their hooks are not called",
    ("torch.nn.modules.dropout", "_DropoutNd"): _MOVED + "; the guard of caches",
    ("torch.Tensor", "_version"): "AttributeError: whether weights have changed",
    ("torch", "_assert_async"): "AttributeError on CUDA: checks of masks",
    ("torch", "_softmax_backward_data"): "AttributeError in the packed backward",
    ("torch", "_C"): "as _cuda_endAllocateToPool",
    ("torch._C", "_cuda_endAllocateToPool"): "nothing but after a capture that broke off (caught)",
    ("torch.ops.aten", "_flash_attention_forward"): "caught: the slower attention on CUDA",
    ("torch.ops.aten", "_flash_attention_backward"): "caught: the slower attention on CUDA",
    ("torch.ops.aten._flash_attention_forward.default", "_schema"): "caught: as the operator",
    (
        "torch.ops.mkldnn",
        "_linear_pointwise",
    ): "caught: bf16 arranges weights each time",
    ("torch.ops.mkldnn", "_reorder_linear_weight"): "caught: as the products",
    ("torch.distributed.distributed_c10d", "_set_pg_timeout"): "AttributeError on CPU clusters",
    (
        "torch.nn.parallel.DistributedDataParallel",
        "_set_params_and_buffers_to_ignore_for_model",
    ): "AttributeError in shard_frozen",
    # -- triton ------------------------------------------------------------------------------------
    (
        "triton.runtime.interpreter",
        "_patch_lang_tensor",
    ): "AttributeError in the interpreter's tests",
    ("triton.runtime.JITFunction", "_pack_args"): "AttributeError when compiling ahead for a GPU",
}
