"""LPTConfig: everything that defines a Late Prompt Tuning adapter. A leaf: imports PEFT's config
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from .register import register

GENERATORS = ("static", "npg", "appg", "mppg", "attention", "residual")
NO_PROMPT = "none"  # in the place of a generator: late LoRA alone
UPPER = ("auto", "packed", "padded")
PREFIX = "lpt_"


class _LPTType(str):
    """The string "LPT" that also answers `.value`, as a member of PEFT's closed enum of methods
    would.

    `transformers` reads `config.peft_type.value` when it loads an adapter without PEFT's model
    class.
    """

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        # PEFT's reports take the name from behind the dot. (JSON and f-strings give "LPT".)
        return f"PeftType.{self.value}"

    def __reduce__(self):
        return (_LPTType, (self.value,))


LPT = _LPTType("LPT")


def _whole(name: str, value: object, low: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` must be a whole number of at least {low}{why}, got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_upper(value: object) -> None:
    """Raises ValueError unless `value` is a way to run the layers above the insertion."""
    if value not in UPPER:
        raise ValueError(f"`upper` must be one of {', '.join(UPPER)}, got {value!r}.")


@dataclass
class LPTConfig(PeftConfig):
    """Configuration of a Late Prompt Tuning adapter (Liu et al., Findings of EMNLP 2022,
    section 3). Defaults are what served best on the dev rows of the tasks that were tried
    (bench/results/accuracy.md), not the paper's own (npg, m = 5).

    The layers 1..k (k = `insertion_layer`) run frozen and without gradient. A generator makes m =
    `num_virtual_tokens` prompt rows from the output of layer k. They are put before the first
    token, flow through the layers k+1..L and are removed after the last one.

    With `lora_r` the linear layers above the insertion learn low-rank updates together with the
    prompt, or alone (`generator="none"`): late LoRA. What lies at and below k stays as it is.

    `get_peft_model` and `add_adapter` fill in place what depends on the model: insertion_layer,
    target_modules, lora_alpha, lora_target_modules, num_labels, id2label, modules_to_save. The
    object may serve several models: each is filled from what you gave, and where that differs, the
    later model works on a copy of its own (`model.peft_config[name]`). Changes after that change no
    adapter, only what is saved.

    Raises:
        ValueError: for a value that cannot work; the message names the field, what it got and what
            is allowed. What depends on the model (the range of `insertion_layer`) is checked when
            the adapter is added to it.
    """

    insertion_layer: int | None = field(
        default=None,
        metadata={
            "help": "k: how many frozen layers run before the prompt is inserted, 1 <= k <= L-1. "
            "Default: half the layers (rounded down)."
        },
    )
    num_virtual_tokens: int = field(
        default=10, metadata={"help": "m: the number of prompt rows inserted for each example."}
    )
    generator: str = field(
        default="mppg",
        metadata={
            "help": "How the prompt is made from the hidden states: 'static' (one learned prompt "
            "for all), 'npg' (from the first token, in decoders the last context token), 'appg' / "
            "'mppg' (adaptive average / maximum pooling over the tokens), 'attention' (learned "
            "queries attend over the tokens), 'residual' (a learned prompt with bottleneck "
            "branches; fold() makes it static), 'none' (no prompt: late LoRA alone)."
        },
    )
    bottleneck_size: int = field(
        default=128,
        metadata={"help": "r: width of the generator's bottleneck. Not used by 'static'."},
    )
    prompt_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout on the generated prompt (never on the hidden states). Default: the "
            "backbone's own hidden dropout, 0 where it has none."
        },
    )
    upper_dropout: bool = field(
        default=False,
        metadata={
            "help": "Whether the frozen layers above the insertion keep their dropout in training. "
            "Layers at and below it never do. Off is the default because it is as good or better "
            "where it was measured (bench/results)."
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "Late LoRA: rank of updates B A of linear layers above the insertion (PEFT's "
            "`r`). Default: none, the paper's method."
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Updates are scaled by lora_alpha / lora_r. Default: twice the rank."},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on what the updates read, in training."}
    )
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Which linear layers above the insertion, as PEFT's `target_modules`: endings "
            "of names, a regular expression for whole names, or 'all-linear'. Default: "
            "'all-linear', which was better than PEFT's queries and values at the same cost."
        },
    )
    upper: str = field(
        default="auto",
        metadata={
            "help": "How the layers above the insertion run: 'packed' (without padding, "
            "lpt_fast/packed/stack.py), 'padded' (the model's own code) or 'auto' (packed where "
            "it can be). All give the same numbers."
        },
    )
    init_from_vocab: bool = field(
        default=False,
        metadata={
            "help": "Only for generator='static': start the prompt from what m random vocabulary "
            "tokens look like after layer k, instead of from random numbers."
        },
    )
    num_labels: int | None = field(
        default=None,
        metadata={
            "help": "Number of labels of the head. Default: the model's. Saved with the adapter."
        },
    )
    id2label: dict[int, str] | None = field(
        default=None,
        metadata={"help": "Names of the labels. Default: the model's. Saved with the adapter."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained in full and saved with the adapter. For classification and "
            "question answering the whole head (everything with weights between the last layer and "
            "the logits, a pooler in the backbone included) is added by itself; name more here."
        },
    )
    train_head: bool = field(
        default=True,
        metadata={
            "help": "Whether the head of a classification or question answering model is trained "
            "and saved without being named in modules_to_save. PEFT always trains modules called "
            "'classifier' and 'score'."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        register()
        self.peft_type = LPT
        # PEFT matches modules by this name. LPT adapts one place, the insertion layer, which the
        # tuner finds from the model's family; it is not a field, so that it is neither saved nor
        # set by hand.
        self.target_modules = None
        if self.insertion_layer is not None:
            _whole("insertion_layer", self.insertion_layer, 1, " and below the number of layers")
        known = (*GENERATORS, NO_PROMPT)
        if self.generator not in known:
            raise ValueError(
                f"`generator` must be one of {', '.join(known)}, got {self.generator!r}."
            )
        self._check_lora()
        if self.generator == NO_PROMPT:
            self.num_virtual_tokens = 0
        else:
            _whole(
                "num_virtual_tokens",
                self.num_virtual_tokens,
                1,
                f" (generator={NO_PROMPT!r} makes no prompt)",
            )
        _whole("bottleneck_size", self.bottleneck_size, 1)
        if self.prompt_dropout is not None and not (
            isinstance(self.prompt_dropout, int | float) and 0 <= self.prompt_dropout < 1
        ):
            raise ValueError(
                f"`prompt_dropout` must be in [0, 1) or None, got {self.prompt_dropout!r}."
            )
        if not isinstance(self.upper_dropout, bool):
            raise ValueError(f"`upper_dropout` must be True or False, got {self.upper_dropout!r}.")
        check_upper(self.upper)
        if self.init_from_vocab and self.generator != "static":
            raise ValueError(
                "`init_from_vocab` works with generator='static' only, got "
                f"generator={self.generator!r}."
            )
        if self.num_labels is not None:
            _whole("num_labels", self.num_labels, 1)
        if self.id2label is not None:
            # JSON turns the keys into strings.
            self.id2label = {int(k): str(v) for k, v in self.id2label.items()}
            if self.num_labels is None:
                self.num_labels = len(self.id2label)
            if sorted(self.id2label) != list(range(self.num_labels)):
                raise ValueError(
                    f"`id2label` must name the labels 0..{self.num_labels - 1} "
                    f"(num_labels={self.num_labels}), got the keys {sorted(self.id2label)}."
                )
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"`modules_to_save` must be a list of names, got {self.modules_to_save!r}."
            )

    def _check_lora(self) -> None:
        r, alpha, wanted = self.lora_r, self.lora_alpha, self.lora_target_modules
        if r is None:
            if self.generator == NO_PROMPT:
                raise ValueError(
                    f"`generator` is {NO_PROMPT!r} and `lora_r` None, expected something to train: "
                    "give a rank (lora_r=8), or another generator."
                )
            given = {"lora_alpha": alpha, "lora_target_modules": wanted}
            given["lora_dropout"] = self.lora_dropout or None
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"`{name}` is {value!r} and `lora_r` None, which is no late LoRA: give a "
                        f"rank (lora_r=8), or leave `{name}` out."
                    )
            return
        _whole("lora_r", r, 1, ", or None for no late LoRA")
        if alpha is not None and not (_is_number(alpha) and 0 < alpha < float("inf")):
            raise ValueError(f"`lora_alpha` must be a number above 0 or None, got {alpha!r}.")
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout!r}.")
        if isinstance(wanted, set | tuple):
            self.lora_target_modules = wanted = sorted(wanted)
        names = isinstance(wanted, list) and all(isinstance(n, str) and n for n in wanted)
        if wanted is not None and not (wanted and (names or isinstance(wanted, str))):
            raise ValueError(
                "`lora_target_modules` must be names of linear layers, a regular expression or "
                f"'all-linear', got {wanted!r}."
            )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, and renews the model card beside it (card.py). Every way to save an adapter,
        PEFT's and Transformers', comes by here.
        """
        super().save_pretrained(save_directory, **kwargs)
        from .card import write_card

        write_card(save_directory, self)

    def to_dict(self) -> dict:
        """As PEFT's, with the method's name as a plain string."""
        out = super().to_dict()
        out["peft_type"] = LPT.value
        return out
