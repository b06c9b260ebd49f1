"""Policies: who runs next, in which mode, with which adapters.

`POLICIES` is the registry, a literal dict. A package outside adds a policy by an entry point in the group
`valora.policies` whose value is the class; a name that is taken or a class that lacks an attribute is an error.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from policies.costaware import CostAware
from policies.dlora import DLora
from policies.merged_only import MergedOnly
from policies.plan import Plan
from policies.unmerged import Base, Fcfs, Oracle, Punica, SLora
from policies.valora import Valora
from policies.view import View


class Policy(Protocol):
    """A frozen dataclass whose fields are its parameters, and these attributes.

    name: as on the command line. operator: LoRA operator it runs with ("none": free). switch: how it folds adapters in.
    merges: it ever runs merged or mixture, so a pristine copy of the weights is kept. oracle: it may see output lengths.
    """

    name: str
    operator: str
    switch: str
    merges: bool
    oracle: bool

    def decide(self, view: View) -> Plan:
        """A pure function: no clock, no randomness, no state but `view.memo`."""


class PolicyError(ValueError):
    """An unknown policy or parameter, or a plug-in that is not one. The message lists what exists."""


POLICIES: dict[str, type] = {
    "valora": Valora,
    "cost-aware": CostAware,
    "dlora": DLora,
    "slora": SLora,
    "punica": Punica,
    "fcfs": Fcfs,
    "merged-only": MergedOnly,
    "base": Base,
    "oracle": Oracle,
}

GROUP = "valora.policies"
ATTRIBUTES = ("name", "operator", "switch", "merges", "oracle", "decide")


def known_policies() -> dict[str, type]:
    """POLICIES and what other packages bring. Raises PolicyError for a plug-in that is not a policy or takes a name."""
    found = dict(POLICIES)
    for entry in _entries(tuple(sys.path)):
        if entry.name in found:
            raise PolicyError(f"entry point {entry.value}: the policy name {entry.name!r} is taken")
        found[entry.name] = _plug_in(entry)
    return found


@lru_cache(4)
def _entries(_path: tuple[str, ...]) -> list[EntryPoint]:
    """What lies on the path, by name. To look into every package takes 10 ms, and a sweep asks for each of its runs."""
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def _plug_in(entry: EntryPoint) -> type:
    try:
        policy = entry.load()
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise PolicyError(f"entry point {entry.value} of policy {entry.name!r} cannot be loaded: {error!r}") from error
    missing = [attribute for attribute in ATTRIBUTES if not hasattr(policy, attribute)]
    if missing:
        raise PolicyError(f"entry point {entry.value}: the class lacks {', '.join(missing)}")
    if not (isinstance(policy, type) and is_dataclass(policy)):
        raise PolicyError(f"entry point {entry.value}: must be a class under @dataclass(frozen=True)")
    if policy.name != entry.name:
        raise PolicyError(f"entry point {entry.value}: the class calls itself {policy.name!r}, the entry {entry.name!r}")
    return policy


def make_policy(name: str, options: dict[str, str] | None = None) -> Policy:
    """The policy called `name`, with parameters given as text. Raises PolicyError, naming the near ones."""
    known = known_policies()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(f"unknown policy {name!r}; {hint}known policies are {', '.join(known)}")
    parameters = {field.name: field for field in fields(known[name])}
    values = {}
    for key, text in (options or {}).items():
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PolicyError(f"policy {name} has no parameter {key!r}; {hint}it has {', '.join(parameters) or 'none'}")
        values[key] = _parameter(f"policy {name}: {key}={text!r}", type(parameters[key].default), text)
    return known[name](**values)


def _parameter(where: str, kind: type, text: str) -> float | bool | str:
    """The parameter's value, of its default's type: text, a finite number that is not negative, or true|false."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise PolicyError(f"{where} is neither true nor false")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError:
        raise PolicyError(f"{where} is not a {kind.__name__}") from None
    if kind is not str and not 0 <= value < 1e12:
        raise PolicyError(f"{where} must be finite and not negative")
    return value


def policy_options(names: Sequence[str], pairs: Sequence[str]) -> dict[str, dict[str, str]]:
    """--policy-option by policy; one without a policy's name goes to the only policy."""
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        policy, dot, parameter = key.rpartition(".")
        if not dot:
            policy, parameter = names[0], key
            if len(names) > 1:
                raise PolicyError(f"--policy-option {pair}: with several policies say which, as in {names[0]}.{pair}")
        if not equals or policy not in options:
            raise PolicyError(f"--policy-option {pair!r}: expected POLICY.KEY=VALUE with a policy of {', '.join(names)}")
        options[policy][parameter] = value
    return options


def make_policies(names: str, pairs: Sequence[str] = ()) -> list[Policy]:
    """The policies of --policy NAME[,NAME...] with the parameters of --policy-option. PolicyError."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise PolicyError("--policy names no policy")
    options = policy_options(wanted, pairs)
    return [make_policy(name, options[name]) for name in wanted]
