"""The command line: `lpt-fast train | sweep | eval | predict | export | precompute | cache | demo |
env`.

main.py       commands and their flags       arguments.py  what they take, in one dataclass each
                                             precompute_arguments.py  those of precompute
settings.py   flags over YAML over defaults  console.py    tables, colours, clean errors
data.py       texts, tokens, labels          demo_data.py  the demo's data set
clock.py      seconds of training without those of evaluations
outputs.py    what will be written, looked at before work begins
sweep.py      many trainings at once         sweep_*.py    arguments, space, study, trials, output
train.py, inference.py (eval, Classifier), predict.py, export.py, precompute.py, cache.py, demo.py

Heavy imports wait for the command that needs them.
"""
