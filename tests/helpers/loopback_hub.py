# SPDX-License-Identifier: Apache-2.0

"""One Hub on loopback for all tests of a process; importing this makes it the client's Hub."""

import os
import shutil
import sys
import tempfile

from hub_server import Hub


# The client reads its environment once, so that this has to come before it.
assert "huggingface_hub" not in sys.modules

HUB = Hub()
# Its cache and token are apart from the user's; the folder is removed when the tests end.
HF_HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": HF_HOME.name, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def forget_downloads() -> None:
    """Empty the client's cache: a repository of a new test is not that of the last one."""
    for name in ("hub", "datasets"):
        shutil.rmtree(os.path.join(HF_HOME.name, name), ignore_errors=True)
