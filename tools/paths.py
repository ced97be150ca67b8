"""What the tools share about files: `~` in the flags that name them, and who may read what was written."""

import os
import re
from dataclasses import fields, replace
from pathlib import Path


def expand_home(args):
    """A dataclass of arguments with `~/` expanded in those whose names end in _path or _dir, input and output.

    A shell expands it at the beginning of a word only, and not in --output_dir=~/merged. A mix `~/a:2,~/b:1` is
    expanded in each of its parts.
    """
    paths = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, str) and field.name.endswith(("_path", "_dir", "input", "output")):
            paths[field.name] = re.sub(r"(^|,)~(?=/)", rf"\1{Path.home()}", value)
    return replace(args, **paths)


def let_others_read(file: Path) -> None:
    """safetensors makes files that only their owner can read; `file` gets the rights that the umask leaves."""
    umask = os.umask(0)  # the only way to read it is to set it
    os.umask(umask)
    file.chmod(0o666 & ~umask)
