# SPDX-License-Identifier: Apache-2.0

"""The public names: listed in the stub, imported when they are first used, and otherwise as any module's."""

import pickle
import subprocess
import sys

import pytest

import trl_pgraft


def printed(code: str) -> list[str]:
    """Words that a new process prints, which has imported nothing yet."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_imports_none_of_the_libraries():
    heavy = {"torch", "diffusers", "transformers", "datasets", "peft", "trl", "accelerate", "huggingface_hub", "PIL"}
    loaded = set(printed("import sys, trl_pgraft; print(*sys.modules)"))
    assert "trl_pgraft" in loaded
    assert not loaded & heavy


def test_the_configuration_needs_torch_alone():
    loaded = set(printed("import sys; from trl_pgraft import GraftConfig; GraftConfig(); print(*sys.modules)"))
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "datasets", "peft", "trl"}


def test_built_in_rewards_are_registered():
    assert printed("import trl_pgraft; print(*trl_pgraft.list_rewards())") == ["jpeg_compressibility"]
    found = printed("import trl_pgraft; print(trl_pgraft.get_reward('jpeg_compressibility').__name__)")
    assert found == ["jpeg_compressibility"]


def test_modules_are_attributes_without_an_import_of_their_own():
    code = "import trl_pgraft; print(trl_pgraft.trainer.PGraftTrainer is trl_pgraft.PGraftTrainer, trl_pgraft.core)"
    assert printed(code)[:3] == ["True", "<module", "'trl_pgraft.core'"]


def test_a_star_import_has_every_public_name():
    names: dict = {}
    exec("from trl_pgraft import *", names)
    assert set(trl_pgraft.__all__) == set(names) - {"__builtins__"}
    assert {"GraftConfig", "PGraftTrainer", "accept_top_k", "load_pgraft_adapter"} <= set(names)
    assert set(trl_pgraft.__all__) | {"__all__", "__doc__"} <= set(dir(trl_pgraft))


@pytest.mark.parametrize("name", trl_pgraft.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(trl_pgraft, name)
    assert value.__name__ == name and value is getattr(sys.modules[value.__module__], name)
    assert pickle.loads(pickle.dumps(value)) is value


def test_a_wrong_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'trl_pgraft' has no attribute 'GraftConfg'"):
        trl_pgraft.GraftConfg  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GraftConfg' from 'trl_pgraft'"):
        from trl_pgraft import GraftConfg  # noqa: F401
    assert not hasattr(trl_pgraft, "__wrapped__")
