"""Late Prompt Tuning as a PEFT method.

config.py       LPTConfig                        tuner.py        LPTModel, PEFT's verbs
register.py     PEFT learns of the method        late_prompt.py  the module in the backbone
generators.py   hidden states -> prompt          context.py      which tokens a prompt may read
call_inputs.py  what a call says of its text     labels.py, readout.py  labels; which token is read
packed_call.py  a call of the packed layers      cached_call.py  `model(cached_hidden=batch)`
packed_rows.py  its rows without padding         packed_lower.py the layers below the insertion
padded_call.py  a call by the model's own code   card.py         the card beside a saved adapter
filling_in.py   what a model fills into a config all_arguments.py  what PEFT would drop of a call

Gives LPTConfig, LPTModel and LatePrompt. Knows backbone and packed: no files (but that card), no
Trainer.
"""
