"""Hides bitsandbytes from programs that tests start, as if it were not installed, which it is for few users.

PEFT imports it wherever it is, and it imports torch.compile's compiler: two seconds of every start. Python runs this
file at its start when the folder is in PYTHONPATH; conftest.run_script puts it there.
"""

import sys

sys.modules["bitsandbytes"] = None
