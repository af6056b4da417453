"""The commands that the documentation shows, so that the tests run or compose what a reader copies."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shown(page, part):
    """The commands in the bash blocks of ``page`` that contain ``part``, each as a list of words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if part in line]


def overrides(command):
    """The hydra overrides of a command."""
    return [word for word in command if re.match(r"[+~]*[a-z][\w.]*=", word)]
