"""Several providers in a row: own nodes before rented ones, one cloud before another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event

from kaito_flows.errors import CapacityError, SchedulingError
from kaito_flows.nodes.base import Holder, NodeLease, NodeProvider, NodeRequest, Tell


class Chain:
    """The provider that asks others, by their names, one after the other."""

    def __init__(self, providers: Mapping[str, NodeProvider]) -> None:
        self._providers = dict(providers)

    def check(self, request: NodeRequest) -> Mapping[str, str]:
        """What speaks against offers; it is no fault as long as one provider can do without."""
        found: dict[str, str] = {}
        errors: list[SchedulingError] = []
        for name, provider in self._providers.items():
            try:
                found |= {f"{name}: {offer}": reason for offer, reason in provider.check(request).items()}
            except SchedulingError as exc:
                errors.append(exc)
                found[name] = exc.message
        if len(errors) == len(self._providers):
            raise _all_of(errors)
        return found

    def lease(self, request: NodeRequest, tell: Tell, stop: Event | None = None) -> NodeLease:
        """The first lease that can be had.

        Raises:
            SchedulingError: (code `no-node`) none, with what each provider says.
        """
        errors: list[SchedulingError] = []
        for name, provider in self._providers.items():
            try:
                return provider.lease(request, tell, stop)
            except SchedulingError as exc:
                if stop is not None and stop.is_set():
                    raise
                errors.append(exc)
                tell("moving on", {"offer": name, "code": exc.code, "reason": exc.message})
        raise _all_of(errors)

    def renew(self, lease: NodeLease, *, followed: bool = False) -> NodeLease:
        """By the provider that leased it."""
        return self._providers[lease.provider].renew(lease, followed=followed)

    def alive(self, lease: NodeLease) -> bool:
        """By the provider that leased it."""
        return self._providers[lease.provider].alive(lease)

    def release(self, holder: Holder, *, keep: bool = False) -> None:
        """At each provider: a run that comes again does not know where it had leased."""
        for provider in self._providers.values():
            provider.release(holder, keep=keep)

    def hand_over(self, holder: Holder, nodes: Sequence[str]) -> None:
        """At each provider: whose the nodes are is for them to see."""
        for provider in self._providers.values():
            provider.hand_over(holder, nodes)


def _all_of(errors: Sequence[SchedulingError]) -> SchedulingError:
    cls = CapacityError if all(isinstance(exc, CapacityError) for exc in errors) else SchedulingError
    last = errors[-1]
    return cls("; ".join(exc.message for exc in errors), place=last.place, hint=last.hint, code=last.code)
