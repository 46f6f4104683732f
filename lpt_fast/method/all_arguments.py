"""Every argument of a call reaches the model.

PEFT's model for question answering names `token_type_ids` and `position_ids` and hands neither on
(0.21), so that a text came out otherwise than in the base model, and than from a cache, which
keeps them.
"""

from __future__ import annotations

import functools
import inspect

from peft import PeftModelForQuestionAnswering

from .config import LPT

_OURS = "_hands_on_all"  # (PEFT may wrap its own, too.)


def hand_on_all() -> None:
    """With a late prompt, calls of PEFT's question answering models go on with all that they got;
    other methods' calls stay PEFT's.
    """
    own = PeftModelForQuestionAnswering.forward
    if getattr(own, _OURS, False):
        return
    signature = inspect.signature(own)

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        if self.active_peft_config.peft_type != LPT:
            return own(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        del given["self"]
        with self._enable_peft_forward_hooks(**given):
            # What only PEFT reads is no argument of the model.
            own_words = {"task_ids", *self.special_peft_forward_args}
            return self.base_model(**{k: v for k, v in given.items() if k not in own_words})

    setattr(forward, _OURS, True)
    PeftModelForQuestionAnswering.forward = forward
