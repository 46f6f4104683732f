"""PEFT knows the method, whoever imports what first."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = (
    "import lpt_fast, peft",
    "import peft, lpt_fast",
    "from lpt_fast import LPTConfig; import peft",
    # Transformers asks whether peft could be imported before anybody imports it.
    "import lpt_fast, importlib.util; importlib.util.find_spec('peft'); import peft",
    "import lpt_fast; from transformers import Trainer; import peft",
    # Inner modules first: they import peft themselves.
    "import lpt_fast.method.config, peft, wave",
    "import lpt_fast.method.generators, peft; from lpt_fast import LPTConfig; LPTConfig()",
    "import lpt_fast.method.late_prompt, peft, wave",
    "from lpt_fast.backbone.families import FAMILIES; import peft",
    # Each module once, also where the one before has imported PEFT.
    "from lpt_fast.method import packed_call, one_pass, mixed; import peft, wave; "
    "assert mixed.joint_outputs.__globals__ is vars(one_pass)",
)
# A fork for each order, of a process that has loaded what has no part in it.
IN_FORKS = """
import os, sys
import torch, transformers.models.bert.modeling_bert
assert not {"peft", "lpt_fast"} & set(sys.modules)
for order in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            exec(order + chr(10) + "assert 'LPT' in peft.PEFT_TYPE_TO_TUNER_MAPPING")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.slow
def test_importing_first_or_last_registers_the_method():
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_FORKS, *ORDERS], check=True)
