# SPDX-License-Identifier: Apache-2.0

"""A token, hostile prompts, and commands as a user runs them, for tests of what goes to the Hub."""

import os
import shlex
import subprocess
import sys
from pathlib import Path


MALICIOUS = [
    "``` </code></pre>\n# heading\n---\nlicense: evil\n---",
    "| a | b |\n| --- | --- |",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[link](javascript:alert(1)) ![image](https://example.org/x.png)",
    "{{ card_data }} {% for x in y %} ${HOME} $$x$$",
    "\x00\x01\x1b[31mred\x1b[0m\u202eright to left\u2028line",
    "'\"\\ \"\"\" ''' \\x60 \\n",
    "!!python/object/apply:os.system [x]\n- a: &b *c",
    "`",
    "",
    " \n\t ",
    "x" * 1_000_000,
    "🦊" * 3000,
]
TOKEN = {"token": "hf_write"}


def run_printed_command(error):
    """Run the last line of an error's message in a shell of its own, logged in by HF_TOKEN."""
    command = str(error).splitlines()[-1]
    assert "hf_write" not in command and shlex.split(command)[:2] == ["hf", "upload"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_TOKEN": "hf_write"}
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True, timeout=120)
