"""``python -m lab.cloud.accounts``: users and endpoints of the control plane, beside Keystone."""

from __future__ import annotations

import openstack

from lab.cloud.config import ENDPOINTS, PASSWORD, REGION, SERVICE_USERS, credentials


def main() -> None:
    cloud = openstack.connect(**credentials(), load_yaml_config=False, load_envvars=False)
    identity = cloud.identity
    project = identity.create_project(name="service", domain_id="default")
    roles = {role.name: role for role in identity.roles()}
    service_role = roles.get("service") or identity.create_role(name="service")
    for name in SERVICE_USERS:
        user = identity.create_user(name=name, password=PASSWORD, domain_id="default")
        for role in (roles["admin"], service_role):
            identity.assign_project_role_to_user(project, user, role)
    for endpoint in ENDPOINTS:
        service = identity.create_service(name=endpoint.service, type=endpoint.type)
        for interface in ("public", "internal", "admin"):
            identity.create_endpoint(
                service_id=service.id, interface=interface, region_id=REGION, url=endpoint.url
            )


if __name__ == "__main__":
    main()
