"""A network service without networks: what Nova requests from Neutron for servers without any.

``openstack server create --nic none`` plugs nothing, but Nova still lists ports and extensions,
and its API fails without an endpoint that answers.
"""

from __future__ import annotations

import falcon

#: Collections of the Networking API v2.0 that are read; all are empty.
_COLLECTIONS = (
    "extensions", "ports", "networks", "subnets", "floatingips", "routers", "segments",
)  # fmt: skip
_GROUP = {
    "id": "00000000-0000-0000-0000-000000000000",
    "name": "default",
    "description": "",
    "security_group_rules": [],
}


class _Empty:
    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        if name == "security-groups":
            # Every server is in a security group: return the project's.
            resp.media = {"security_groups": [{**_GROUP, "project_id": req.get_param("tenant_id")}]}
        elif name in _COLLECTIONS:
            resp.media = {name: []}
        else:
            raise falcon.HTTPNotFound


class _Root:
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        link = {"href": f"{req.prefix}/v2.0/", "rel": "self"}
        resp.media = {"versions": [{"id": "v2.0", "status": "CURRENT", "links": [link]}]}


application = falcon.App()
application.add_route("/", _Root())
application.add_route("/v2.0/{name}", _Empty())
