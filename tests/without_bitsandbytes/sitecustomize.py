"""Hides bitsandbytes from the programs that tests start, as if it were not installed, which it is for few users.

PEFT imports it wherever it is, and it imports torch.compile's compiler: two seconds of every start. Python runs this
file at its start when the folder is in PYTHONPATH. Tests of 4 bit start theirs with PYTHONPATH="".
"""

import sys

sys.modules["bitsandbytes"] = None
