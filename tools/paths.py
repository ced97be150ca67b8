"""`--output_dir=~/merged`: a shell expands `~` at the beginning of a word only, so the programs do it for the rest."""

import re
from dataclasses import fields, replace
from pathlib import Path


def expand_home(args):
    """A dataclass of arguments with `~/` expanded in those whose names end in _path or _dir, input and output.

    A mix `~/a:2,~/b:1` is expanded in each of its parts.
    """
    paths = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, str) and field.name.endswith(("_path", "_dir", "input", "output")):
            paths[field.name] = re.sub(r"(^|,)~(?=/)", rf"\1{Path.home()}", value)
    return replace(args, **paths)
