"""LPTTrainer: the Hugging Face Trainer, with the frozen layers' outputs from a cache."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.utils.generic import find_labels

from ..cache import ActivationCache
from ..method.cached_call import CACHED
from ..method.context import parameter_names
from ..method.late_prompt import LatePrompt
from ..method.readout import READOUT
from ..packed.graphs import UpperGraphs
from ..packing import PackedBatch
from .cached_dataset import PendingBatch, ReadAhead
from .cached_loading import CachedLoading
from .collators import IGNORED, CachedCollator, LabelRules
from .compute_dtype import ComputingTraining, parse
from .exact_resume import CountedTraining
from .figures import write_figures
from .learning_rates import check_rate, give_rate
from .quick_steps import QuickSteps
from .training_record import compare_names

logger = logging.getLogger(__name__)

# Heads whose logits are [B, S, V] and that take `readout`.
_READABLE = ("ForMaskedLM", "ForCausalLM", "LMHeadModel")


class LPTTrainer(CachedLoading, ComputingTraining, QuickSteps, CountedTraining, Trainer):
    """Trains a model with a late prompt, from its text or from a cache of its frozen layers.

    With `activation_cache`, layers 1..k run once for each text of the training and evaluation data
    that the cache does not hold yet, and never again. All else is Trainer's: arguments, order of
    the examples, collator, callbacks, checkpoints. The examples have to be tokenised text; the
    collator is called on them as ever, and its text is replaced.

    Example:
        trainer = LPTTrainer(model, args, train_dataset=rows, activation_cache="cache")
        trainer.train()

    Args:
        model, args, more, named: those of `transformers.Trainer`, in its order.
        activation_cache: folder of caches (see `ActivationCache.open`; made where there is none),
            or an open ActivationCache, which says the store, the tier and the like. None: from
            the text.
        upper: how layers k+1..L run, "auto", "packed" or "padded"; None: as the adapter says.
        cuda_graphs: whether the packed layers of a training step run as CUDA graphs, one for each
            token bucket (graphs.py). None: on an NVIDIA GPU, in a single process; what cannot run
            so runs as ever. True: also in each of several processes.
        hold_projections: on the CPU with a cache, training holds what the first layer above the
            insertion projects the training texts to (projections.py). None: in a single process
            without dataloader_num_workers, where it takes at most a tenth of the memory and half
            of what is free; True: whatever it takes; False: not.
        lora_learning_rate: peak learning rate of late LoRA (`LPTConfig(lora_r=...)`), with the
            schedule of all; None: `args.learning_rate`.
        compute_dtype: of the packed layers on a CPU, "float32" or "bfloat16" ("fp32", "bf16" or a
            torch.dtype). None: bfloat16 with `args.bf16`, and where a test of a second finds
            that the processor multiplies it faster; a resumed training has its checkpoint's. The
            model keeps its weights, the layers run on a copy; what trains stays float32.
        readout_only: language models whose examples have one label each: predictions are the logits
            of that token alone, [B, 1, V], and label_ids that label, [B, 1].

    Raises:
        ValueError: for a model without a late prompt, and for arguments that do not go together.
        CacheError: from `train`, `evaluate` and `predict`, as of `ActivationCache.ensure`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args=None,
        *more,
        activation_cache: str | Path | ActivationCache | None = None,
        upper: str | None = None,
        cuda_graphs: bool | None = None,
        hold_projections: bool | None = None,
        lora_learning_rate: float | None = None,
        compute_dtype: str | torch.dtype | None = None,
        readout_only: bool = False,
        **named,
    ):
        known = (str, Path, ActivationCache, type(None))
        if not isinstance(activation_cache, known):
            raise ValueError(
                f"`activation_cache` is a {type(activation_cache).__name__}, expected a folder or "
                "an ActivationCache; ActivationCache.open(folder, model) gives one."
            )
        if isinstance(activation_cache, str | Path):  # wherever the process goes later
            activation_cache = Path(activation_cache).expanduser().absolute()
        self.activation_cache = activation_cache
        self._upper, self._cuda_graphs = upper, cuda_graphs
        self.hold_projections, self.readout_only = hold_projections, readout_only
        self.lora_learning_rate = lora_learning_rate
        self.compute_dtype = parse(compute_dtype)
        self._ahead = ReadAhead()
        self._holding: CachedCollator | None = None
        self._filters = False
        self._forget_rows()
        if model is not None:
            self._prepare_model(model)
        super().__init__(model, args, *more, **named)
        if self.args.label_names is None:
            base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            self.label_names = find_labels(type(base))
        self._check_arguments()

    def _check_arguments(self) -> None:
        args = self.args
        self._check_compute_dtype()
        if self.lora_learning_rate is not None:
            check_rate(self.lora_learning_rate, self._late_prompt, self.optimizer)
        if self._cuda_graphs and args.device.type != "cuda":
            raise ValueError(
                f"`cuda_graphs` is True and the model trains on {args.device.type!r}, expected a "
                "CUDA device; leave it out."
            )
        if self._cuda_graphs and (args.n_gpu > 1 or self.is_fsdp_enabled):
            got = "FSDP" if self.is_fsdp_enabled else f"{args.n_gpu} GPUs in one process"
            raise ValueError(
                f"`cuda_graphs` is True with {got}, expected a GPU for each process and whole "
                "weights in each; leave it out."
            )
        if self.readout_only and not self._reads_one_token():
            raise ValueError(
                f"`readout_only` is True for {type(self._late_prompt.root).__name__}, expected a "
                "masked or causal language model without label smoothing and without a loss "
                "function of one's own; leave it out."
            )
        if self.activation_cache is None:
            if self.hold_projections:
                raise ValueError(
                    "`hold_projections` is True without `activation_cache`, expected both or none: "
                    "they are of rows that a cache has. Give a cache, or leave it out."
                )
            return
        for name in ("bf16_full_eval", "fp16_full_eval", "neftune_noise_alpha"):
            value = getattr(args, name, None)
            if value:
                raise ValueError(
                    f"`{name}` is {value!r} together with `activation_cache`, expected neither or "
                    "one of them: it changes what the frozen layers give. Leave one out."
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"`activation_cache` got {args.n_gpu} GPUs in one process, expected one: "
                "DataParallel cannot divide packed batches. Start with torchrun, a process for "
                "each GPU."
            )

    # -- the model ---------------------------------------------------------------------------------

    def _prepare_model(self, model: nn.Module) -> None:
        late = find_late_prompt(model)
        if self._upper is not None:
            late.upper = self._upper
        self._late_prompt = late
        compare_names(late)

    def call_model_init(self, trial=None):
        """As Trainer's; the new model's late prompt is the one that counts."""
        model = super().call_model_init(trial)
        self._prepare_model(model)
        self._forget_rows()  # which may have been another model's
        return model

    def _reads_one_token(self) -> bool:
        """Whether `readout` leaves the loss what it is."""
        late = self._late_prompt
        names = [cls.__name__ for cls in type(late.root).__mro__]
        return (
            any(name.endswith(_READABLE) for name in names)
            and not late.family.bias_owner
            and late.active_config is not None
            and self.label_smoother is None
            and self.compute_loss_func is None
            # Somebody's own loss wants the logits that it knows.
            and not self._has_own_loss()
        )

    def _has_own_loss(self) -> bool:
        stock = (Trainer.compute_loss, CountedTraining.compute_loss)
        return type(self).compute_loss not in stock

    def _label_rules(self) -> LabelRules:
        late = self._late_prompt
        names = [cls.__name__ for cls in type(late.root).__mro__]
        per_token = ("ForTokenClassification", "ForPreTraining", *_READABLE)
        return LabelRules(
            names=tuple(self.label_names),
            token_level=any(name.endswith(per_token) for name in names),
            places=any(name.endswith("ForQuestionAnswering") for name in names),
            readout=self._reads_one_token(),
            causal=late.causal_lm,
        )

    def create_optimizer(self, *args, **kwargs):
        """As Trainer's; late LoRA gets its own learning rate, where there is one."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.lora_learning_rate is not None:
            give_rate(optimizer, self._late_prompt.lpt_lora, self.lora_learning_rate)
        return optimizer

    # -- columns -----------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            more = ["context_lengths"]  # which the late prompt takes out of the call
            if "kwargs" in self._signature_columns:
                # Somebody's own head that hands on what it does not name.
                named = parameter_names(type(self._late_prompt.backbone).forward)
                more += [name for name in ("position_ids", "token_type_ids") if name in named]
            self._signature_columns += more

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        if isinstance(data_collator, CachedCollator):
            return data_collator  # the one inside it has removed them
        return super()._get_collator_with_removed_columns(data_collator, description)

    # -- the adapter's card ------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; the model card gets the figures of the evaluations so far."""
        super().save_model(output_dir, _internal_call)
        self._write_figures(output_dir)

    def create_model_card(self, *args, **kwargs) -> None:
        """As Trainer's; what the card says of the adapter is kept."""
        super().create_model_card(*args, **kwargs)
        self._write_figures(None)

    def _write_figures(self, folder: str | None) -> None:
        if self.args.should_save:
            best = bool(self.args.load_best_model_at_end)
            write_figures(folder or self.args.output_dir, self._late_prompt, self.state, best)

    # -- loops -------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As Trainer's."""
        try:
            with self._ahead.running():
                return super().train(*args, **kwargs)
        finally:
            self._filter_again()
            self._let_go()

    def _inner_training_loop(self, *args, **kwargs):
        # Here the model is the one that trains, also in a search of hyperparameters. Graphs go with
        # the training, for they hold memory.
        late = self._late_prompt
        own = late.graphs is None and self._takes_graphs()
        if own:
            late.graphs = UpperGraphs(late)
        try:
            with self._computing():
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            if own:
                logger.info(
                    "%d batches ran by %d CUDA graphs.", late.graphs.replayed, len(late.graphs)
                )
                late.graphs = None

    def _takes_graphs(self) -> bool:
        args = self.args
        if self._cuda_graphs is not None:
            return self._cuda_graphs
        # (Seen on NVIDIA's GPUs alone. FSDP and DeepSpeed run several processes too, mostly.)
        usual = args.device.type == "cuda" and torch.version.hip is None
        single = args.world_size == 1 and args.n_gpu <= 1
        return usual and single and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def evaluation_loop(self, *args, **kwargs):
        """As Trainer's."""
        with self._ahead.running(), self._computing():
            return super().evaluation_loop(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        batch = inputs.get(CACHED)
        if isinstance(batch, PendingBatch):
            inputs = {**inputs, CACHED: batch.result()}
        return super()._prepare_inputs(inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As Trainer's; with `readout_only` logits [B, 1, V] and labels [B, 1].

        Raises:
            ValueError: with `readout_only`, a text with no label or several.
        """
        given = inputs
        if self.readout_only and READOUT not in inputs and inputs.get("labels") is not None:
            raise ValueError(
                "`readout_only` is True and a text of the batch has not exactly one label other "
                f"than {IGNORED}, expected one each; leave readout_only out."
            )
        if not (prediction_loss_only or self.readout_only):
            inputs = {name: value for name, value in inputs.items() if name != READOUT}
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        if self.readout_only and isinstance(labels, torch.Tensor):
            labels = labels.amax(1, keepdim=True)  # the one above -100
        if "inputs" in self.args.include_for_metrics and CACHED in given:
            # Trainer takes them from this very mapping when the step is done.
            batch = self._prepare_inputs({CACHED: given[CACHED]})[CACHED]
            given[self._main_input] = batch.pad(batch.input_ids, self._pad_token)
        return loss, logits, labels

    # -- Trainer's numbers, which it takes from input_ids ------------------------------------------

    @property
    def _pad_token(self) -> int:
        own = getattr(self.processing_class, "pad_token_id", None)
        return own if own is not None else getattr(self.model.config, "pad_token_id", None) or 0

    def tokens_in(self, inputs) -> int:
        """Tokens of a batch, padding among them, wherever its rows come from."""
        batch = inputs.get(CACHED)
        if isinstance(batch, PackedBatch | PendingBatch):
            return len(batch) * batch.max_seqlen
        return super().tokens_in(inputs)

    # -- losses that are no numbers ----------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        """As Trainer's. Of a loss that is NaN or infinite it adds the mean of those before to the
        logged sum (`logging_nan_inf_filter`), and waits for the GPU in each step to see whether it
        is. Here that is chosen on the device, and the Trainer does not look.
        """
        loss = super().training_step(*args, **kwargs)
        if not self.args.logging_nan_inf_filter:
            return loss
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        self.args.logging_nan_inf_filter, self._filters = False, True
        return torch.where(torch.isfinite(loss), loss, self._tr_loss / steps)

    def _filter_again(self) -> None:
        """When the Trainer has added the loss: evaluation and checkpoints see the argument as it
        was given.
        """
        if self._filters:
            self.args.logging_nan_inf_filter, self._filters = True, False

    def floating_point_ops(self, inputs) -> int:
        """As Trainer's, which counts all layers for all tokens and padding, cached or not."""
        self._filter_again()  # (it is what the loop asks for next)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            batch = inputs.get(CACHED)
            if isinstance(batch, PackedBatch | PendingBatch):  # nothing but sizes is looked at
                lengths = torch.as_tensor(batch.lengths)
                places = torch.arange(batch.max_seqlen, device=lengths.device)
                text = torch.empty(len(batch), batch.max_seqlen, device="meta")
                inputs = {self._main_input: text, "attention_mask": places < lengths[:, None]}
            super()._track_num_input_tokens(inputs)


def find_late_prompt(model: nn.Module) -> LatePrompt:
    """The late prompt of a model, whatever is wrapped around it.

    Raises:
        ValueError: there is none.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    late = next((m for m in modules if isinstance(m, LatePrompt)), None)
    if late is None:
        methods = sorted({str(c.peft_type) for c in getattr(model, "peft_config", {}).values()})
        with_ = f" with {', '.join(methods)}" if methods else ""
        raise ValueError(
            f"LPTTrainer got a {type(model).__name__}{with_}, expected one with a late prompt, "
            "get_peft_model(model, LPTConfig(...)); transformers.Trainer trains the others."
        )
    return late
