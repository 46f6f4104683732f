"""LatePrompt: the module that makes a backbone run as lower half -> prompt -> upper half
-> strip.
"""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..backbone.arguments import TEXT, cache_name, check_known
from ..backbone.copies import LATE_PROMPT
from ..backbone.families import Family, get_layers, is_language_model
from ..backbone.low_rank import LowRank
from ..backbone.watch import Modes, Watch
from ..packed.compute import ComputeCopy
from . import cached_call as cached
from .call_inputs import attended_of, check_inputs, give_each_a_token
from .config import LPTConfig, check_upper
from .context import Context, parameter_names
from .generators import build_generator, init_from_vocab
from .labels import get_labels, set_labels
from .late_lora import build_lora
from .mixed import generate_mixed
from .packed_call import run_call, takes_packed
from .padded_call import capture, run_padded
from .readout import READOUT, SHIFTED, checked_places, narrow_labels


class LatePrompt(nn.Module, BaseTunerLayer):
    """The adapter's place in a backbone: holds the prompt generators and takes over the backbone's
    forward.

    It is a child of the backbone (`backbone.late_prompt`), not a wrapper around it: the names, the
    class and the tied weights of the base model stay as they are, and a bare `AutoModel` can be
    adapted in place.

    Args:
        root: the whole model, whose calls carry labels and context lengths.
        backbone: the module that is split.
        family: its line of the table of families.
        causal_lm: whether labels of the model are the tokens to generate, so that the context ends
            before them.
    """

    adapter_layer_names = ("lpt_generator", "lpt_lora")
    other_param_names = ("lpt_config",)

    def __init__(self, root: nn.Module, backbone: nn.Module, family: Family, causal_lm: bool):
        super().__init__()
        self.lpt_generator = nn.ModuleDict()
        # Late LoRA of those adapters that have it.
        self.lpt_lora = nn.ModuleDict()
        self.lpt_config: dict[str, LPTConfig] = {}
        self.family = family
        self.causal_lm = causal_lm
        self.merged_adapters = []
        # A list hides them from nn.Module: they hold this module, not the other way round.
        self._outside = [root, backbone]
        self.context = Context(causal_lm)
        self._upper: str | None = None
        # UpperGraphs (graphs.py) where training runs by CUDA graphs, else None.
        self.graphs = None
        self._said: set[str | None] = set()  # why layers ran as they did, said once
        self._compute_dtype: torch.dtype | None = None
        self._copy: ComputeCopy | None = None
        # What was found out of the model's modules, while they stay as they are (watch.py).
        self._modes: Modes | None = None
        self.plain: dict[int, Watch | None] = {}
        self.base_labels = get_labels(root)
        # Whose label space the model has now (None: the base model's), and what is known of each.
        self._labels_of: str | None = None
        problem_type = getattr(getattr(root, "config", None), "problem_type", None)
        self._problem_types: dict[str | None, str | None] = {None: problem_type}

    # -- life of the module ------------------------------------------------------------------------

    @property
    def root(self) -> nn.Module:
        """The model that PEFT was given."""
        return self._outside[0]

    @property
    def backbone(self) -> nn.Module:
        """The model whose layers these are."""
        return self._outside[1]

    def attach(self) -> None:
        """Makes this module a child of the backbone and its forward the backbone's."""
        root, backbone = self.root, self.backbone
        backbone.add_module(LATE_PROMPT, self)
        backbone.forward = self.run
        cache_name(backbone)  # found out here, where torch.compile does not trace
        self._hooks = (
            root.register_forward_pre_hook(self._enter, with_kwargs=True),
            root.register_forward_hook(self.context.forget, always_call=True),
        )
        if hasattr(root, "generate"):
            root.generate = self.generate
        # Trainer takes **kwargs in `forward` as a promise that the loss is divided by
        # num_items_in_batch. Models other than causal language models do not, and with gradient
        # accumulation their loss would come out several times too large.
        self._sets_loss_flag = not self.causal_lm and not hasattr(root, "accepts_loss_kwargs")
        if self._sets_loss_flag:
            root.accepts_loss_kwargs = False

    def detach(self) -> None:
        """Gives the model back as it was."""
        root, backbone = self.root, self.backbone
        del backbone._modules[LATE_PROMPT]
        del backbone.forward
        for hook in self._hooks:
            hook.remove()
        root.__dict__.pop("generate", None)
        if self._sets_loss_flag:
            del root.accepts_loss_kwargs
        set_labels(root, self.base_labels)
        if hasattr(getattr(root, "config", None), "problem_type"):
            root.config.problem_type = self._problem_types[None]
        root.train(root.training)  # frozen layers too are again in the mode of the whole

    def add_generator(self, adapter_name: str, config: LPTConfig, inference_mode: bool) -> None:
        """Adds the generator of a new adapter, on the device of the layer before the insertion."""
        backbone, family = self.backbone, self.family
        dropout = config.prompt_dropout
        if dropout is None:
            dropout = family.default_dropout(backbone.config)
        generator = build_generator(config, backbone.config.hidden_size, dropout, family.causal)
        parts = {self.lpt_generator: generator}
        if config.lora_r is not None:
            parts[self.lpt_lora] = build_lora(self, config)
        weight = next(get_layers(backbone, family)[config.insertion_layer - 1].parameters())
        on_meta = False
        for adapters, part in parts.items():
            part_on_meta = any(p.is_meta for p in part.parameters())
            if not part_on_meta and not weight.is_meta:
                part.to(weight.device)
            if weight.is_floating_point():
                part.to(weight.dtype)
            adapters[adapter_name] = part
            part.train(self.training)
            on_meta |= part_on_meta
        # A copy: who goes on to use the object for another adapter does not change this one.
        self.lpt_config[adapter_name] = copy.deepcopy(config)
        if config.init_from_vocab and not on_meta and not inference_mode:
            init_from_vocab(generator, backbone, family, config)

    def freeze(self, adapter_name: str) -> None:
        """Of an adapter nothing trains."""
        for adapters in (self.lpt_generator, self.lpt_lora):
            if adapter_name in adapters:
                adapters[adapter_name].requires_grad_(False)

    def updates(self, adapter_name: str) -> dict[int, dict[str, LowRank]]:
        """The adapter's late LoRA, by the number of the layer (from 0) and the name in it."""
        if adapter_name not in self.lpt_lora:
            return {}
        return self.lpt_lora[adapter_name].by_layer()

    def adapter_device(self, adapter_name: str) -> torch.device:
        """Where the adapter's parameters are."""
        for adapters in (self.lpt_generator, self.lpt_lora):
            if adapter_name in adapters:
                for p in adapters[adapter_name].parameters():
                    return p.device
        return next(self.backbone.parameters()).device

    # -- PEFT's view -------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The backbone, in PEFT's words."""
        return self.backbone

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter, as PEFT's."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"Late Prompt Tuning runs one adapter for all texts, got {names}. Set one of them, "
                "or name one a text in the call (adapter_names)."
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self._sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off, as PEFT's."""
        super().enable_adapters(enabled)
        for module in self.root.modules():
            # `model.enable_adapters()` of transformers forgets the heads that its
            # disable_adapters() switched off.
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(enabled)
        self._sync()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """After loading with low_cpu_mem_usage: to the device of the backbone; the dtype is the
        adapter's own.
        """
        target = device or next(self.backbone.parameters()).device
        for adapters in (self.lpt_generator, self.lpt_lora):
            if adapter_name in adapters:
                adapters[adapter_name].to(target)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: there is nothing to merge into."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Raises ValueError: nothing was merged."""
        raise ValueError(NO_MERGE)

    @property
    def upper(self) -> str:
        """How the layers above the insertion run: "auto", "packed" or "padded"; the active
        adapter's own setting until another one is set here.
        """
        config = self.active_config
        return self._upper or ("auto" if config is None else config.upper)

    @upper.setter
    def upper(self, value: str | None) -> None:
        if value is not None:
            check_upper(value)
        self._upper = value

    @property
    def active_config(self) -> LPTConfig | None:
        """Configuration of the adapter that runs; None while adapters are disabled or none is
        active.
        """
        names = [n for n in self.active_adapters if n in self.lpt_config]
        return self.lpt_config[names[0]] if names and not self.disable_adapters else None

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """In which the packed layers run, on a CPU; None: in the model's own."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, value: torch.dtype | None) -> None:
        if value != self._compute_dtype:
            self._compute_dtype, self._copy = value, None

    def computing(self, k: int) -> nn.Module:
        """The backbone whose layers above k run packed: a copy of them in `compute_dtype`, or the
        model's own.
        """
        dtype = self.compute_dtype
        if dtype is None:
            return self.backbone
        if self._copy is None or not self._copy.fits(self.backbone, k, dtype):
            self._copy = ComputeCopy(self.backbone, self.family, k, dtype)
        return self._copy.backbone

    # -- modes and labels --------------------------------------------------------------------------

    def train(self, mode: bool = True):
        """As of nn.Module; frozen halves follow as `upper_dropout` says."""
        super().train(mode)
        # nn.Module.train has visited the layers before this youngest child of the backbone.
        self._sync_modes()
        return self

    def _sync(self) -> None:
        """Modes and label space of the adapter that runs, or of the base model."""
        self._sync_modes()
        self._sync_labels()

    def _sync_labels(self) -> None:
        config = self.active_config
        owner = None if config is None else self.active_adapters[0]
        model_config = getattr(self.root, "config", None)
        if owner == self._labels_of or model_config is None:
            return
        # `problem_type` is found out in the first training step; it belongs to the label space.
        self._problem_types[self._labels_of] = getattr(model_config, "problem_type", None)
        self._labels_of = owner
        labels = None if config is None else (config.num_labels, config.id2label)
        set_labels(self.root, labels if labels and labels[0] else self.base_labels)
        if hasattr(model_config, "problem_type"):
            model_config.problem_type = self._problem_types.get(owner, self._problem_types[None])

    def _sync_modes(self, below: bool = True) -> None:
        """Frozen layers in eval mode: below the insertion always, above unless upper_dropout.

        Args:
            below: False where the layers below do not run: whether there are new modules among
                them is then not asked.
        """
        config = self.active_config
        if config is None:
            for name, child in self.backbone.named_children():
                if name != LATE_PROMPT:
                    child.train(self.training)  # the base model is in the mode that was set
            return
        k = config.insertion_layer
        if self._modes is None or not self._modes.fits(k, below):
            self._modes = Modes(self.backbone, self.family, k)
        self._modes.set(self.training and config.upper_dropout)

    # -- the forward -------------------------------------------------------------------------------

    def generate(self, *args, context_lengths=None, **kwargs):
        """The model's own `generate`, in which the context stays the prompt text, with or without a
        KV cache.

        Args:
            args, kwargs: those of `transformers.GenerationMixin.generate`.
            context_lengths: tokens of each example that the prompt is made from; default: all of
                the input's.
        """
        if (mixed := self.context.names_of_call()) is not None:
            names, give_back = mixed
            give_back()
            return generate_mixed(self, names, context_lengths, args, kwargs)
        if kwargs.pop(cached.CACHED, None) is not None:
            raise ValueError(
                f"generate() got `{cached.CACHED}`, expected the text: new tokens go through all "
                "layers and need the KV cache of those up to the insertion. Give input_ids."
            )
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        config = given or getattr(self.root, "generation_config", None)
        names = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens")
        for name in (*names, "guidance_scale"):
            value = kwargs.get(name, getattr(config, name, None))
            if value is not None and (name, value) != ("guidance_scale", 1) and self.active_config:
                raise ValueError(
                    f"generate() got `{name}`, which Late Prompt Tuning does not support: the "
                    "prompt is made once, from the whole context, and stays in the KV cache. Leave "
                    "it out."
                )
        with self.context.generating(context_lengths):
            return type(self.root).generate(self.root, *args, **kwargs)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the whole model: takes what the backbone will not be given."""
        if self.context.names_of_call() is not None:
            return None  # each adapter's texts will come by themselves
        batch = kwargs.pop(cached.CACHED, None)
        place = kwargs.pop(READOUT, None)
        if place is not None:
            self._check_readout()
            kwargs = {
                **dict(zip(parameter_names(type(model).forward), args, strict=False)),
                **kwargs,
            }
            args = ()
        if batch is not None:
            batch, kwargs = cached.enter(self, batch, args, kwargs)
            args = ()
        if place is None:
            return self.context.note(model, args, kwargs, batch)
        tokens, shape, device = attended_of(kwargs)
        place = checked_places(place, tokens, *shape, device)
        self.context.note(model, args, kwargs, batch, place)
        # (The context of a prompt ends where the whole labels begin, so these are noted before.)
        narrow_labels(kwargs, place, tokens, self.causal_lm)
        return args, kwargs

    def _check_readout(self) -> None:
        known = is_language_model(self.root) and not self.family.bias_owner
        if not known or self.active_config is None:
            raise ValueError(
                f"{type(self.root).__name__} got `{READOUT}`, expected it for a masked or causal "
                "language model with an active late prompt: other heads read what they read. Leave "
                "it out."
            )

    def run(self, *args, **kwargs):
        """The backbone's forward. Arguments and output are those of the backbone's class.

        In a call of the whole model with `cached_hidden`, what layers 1..k would give is taken from
        there; everything above is the same.
        """
        backbone = self.backbone
        call = self.context.take()
        if call.given is not None:
            return call.given()
        if kwargs.get(cached.CACHED) is not None:
            raise ValueError(
                f"{type(backbone).__name__} got `{cached.CACHED}`, expected it in the call of the "
                f"whole model, {type(self.root).__name__}. Call that."
            )
        config = self.active_config
        forward = type(backbone).forward
        if config is None:
            return forward(backbone, *args, **kwargs)
        names = parameter_names(forward)
        kwargs.update(zip(names, args, strict=False))
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        check_known(backbone, self.family.causal, kwargs)
        return_dict = kwargs.pop("return_dict", getattr(backbone.config, "return_dict", True))
        if call.cached is not None:
            cached.check_outputs(backbone.config, kwargs)
        wanted = capture(self, kwargs)
        if self.training:
            self._sync_modes(below=call.cached is None)

        inputs = {name: kwargs.pop(name) for name in TEXT if name in kwargs}
        kwargs.pop(SHIFTED, None)
        check_inputs(inputs, kwargs)
        give_each_a_token(inputs)
        if takes_packed(self, call, inputs, kwargs):
            output = run_call(self, call, inputs, kwargs)
            return output if return_dict else output.to_tuple()
        output = run_padded(self, call, inputs, kwargs, wanted)
        return output if return_dict else output.to_tuple()


NO_MERGE = (
    "A late prompt depends on the input and cannot be merged into the weights. Keep the adapter "
    "(save_pretrained), or call unload() for the base model without it. (Late LoRA without a "
    "prompt, generator='none', can: merge_and_unload().)"
)
