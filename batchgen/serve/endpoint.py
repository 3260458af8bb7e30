"""What the app's handlers share: the spec, the state, who may call, and a word to the conductor."""

from collections.abc import Callable
from dataclasses import dataclass, field

from batchgen.serve.keys import KeyRing
from batchgen.serve.spec import EndpointSpec, TenantSpec
from batchgen.serve.state import State


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls: `request.state.tenant`."""

    name: str
    spec: TenantSpec = field(default_factory=TenantSpec)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`keys`: None lets everybody in as one tenant, on loopback only (`keys.check_bind`). `wake`: called after a create.
    `has_front_ids`: a server before this one gives each request its `x-request-id`, and puts it on the answer."""

    spec: EndpointSpec
    state: State
    keys: KeyRing | None
    wake: Callable[[], None] = lambda: None
    has_front_ids: bool = False

    def make_tenant(self, name: str) -> Tenant:
        return Tenant(name, self.spec.tenants.get(name, TenantSpec()))
