"""What the tests of planning share: resolved configs, and machines of a known size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from kaito_flows.planning.machine import Machine
from kaito_flows.presets.loader import load_preset, tuning_defaults

Config = dict[str, Any]


@pytest.fixture
def config() -> Callable[..., Config]:
    """The resolved config of a method for a preset, with some keys set to other values, whatever their section."""

    def make(preset: str, method: str = "qlora", **changes: Any) -> Config:
        made = copy.deepcopy(tuning_defaults(method))
        made["LoraConfig"]["target_modules"] = list(load_preset(preset).linear_modules)
        for key, value in changes.items():
            (section,) = [name for name, keys in made.items() if key in keys]
            made[section][key] = value
        return made

    return make


@pytest.fixture
def laptop() -> Machine:
    return Machine(memory=16 * 2**30, cores=4)
