"""Asks Glance which images exist, as cinder-volume's own user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from keystoneauth1 import exceptions, loading
from oslo_config import cfg
from oslo_log import log as logging

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)

#: Sections of cinder.conf with the service's own user; the first one with the role is used.
GROUPS = ("service_user", "keystone_authtoken")
#: Give up for this round after so many requests without an answer: each may take a minute to time
#: out.
MOST_UNANSWERED = 3
#: Without it, a private image of another project looks like a deleted one.
ROLE = "admin"


class Glance:
    """Reports an image as present or absent only if Glance's answer is unambiguous."""

    def __init__(self, conf: Any, files: Sequence[str], folders: Sequence[str] = ()) -> None:
        """:param conf: Cinder's, with its options for Glance (``glance_api_servers`` and others)
        :param files: Cinder's configuration files
        :param folders: its configuration folders. Files and folders are parsed again for the user,
            as other libraries register options of those sections in ``conf`` in their own ways
        """
        self._conf = conf
        self._users = cfg.ConfigOpts()
        for group in GROUPS:
            loading.register_auth_conf_options(self._users, group)
            loading.register_session_conf_options(self._users, group)
        self._users(
            [], "cinder", default_config_files=list(files), default_config_dirs=list(folders)
        )
        self._plugins: dict[str, Any] = {}
        self._last_error = ""

    def present(self, image_ids: Iterable[str]) -> dict[str, bool]:
        """Whether these images exist in Glance.

        An image for which Glance answers with an error, or not at all, is missing in the result, as
        are those after the last of :data:`MOST_UNANSWERED`. If Glance cannot be asked at all the
        result is empty. One warning in the log says why.
        """
        found: dict[str, bool] = {}
        unanswered = 0
        try:
            ask = self._connect()
            for image_id in image_ids:
                try:
                    status = ask(f"/v2/images/{image_id}").status_code
                except exceptions.ClientException as error:
                    unanswered += 1
                    if unanswered >= MOST_UNANSWERED:
                        raise
                    LOG.warning("Glance did not answer for image %s: %s", image_id, error)
                    continue
                if status in (200, 404):
                    found[image_id] = status == 200
        except (errors.ThunderError, exceptions.ClientException) as error:
            if str(error) != self._last_error:
                self._last_error = str(error)
                LOG.warning(
                    "Cannot ask Glance: replicas of images deleted there are kept: %s", error
                )
        else:
            self._last_error = ""
        return found

    def _connect(self) -> Callable[[str], Any]:
        """A function that gets a path from Glance, as an administrator.

        :raises errors.ThunderError: no user may see all images, or no server answers like Glance
        """
        auth, keystone, token = self._administrator()
        glance = loading.session.Session().load_from_options(
            insecure=self._conf.glance_api_insecure,
            cacert=self._conf.glance_ca_certificates_file,
            cert=self._conf.glance_certfile,
            key=self._conf.glance_keyfile,
            timeout=self._conf.glance_request_timeout or 60,
        )

        def get(url: str) -> Any:
            headers = {"X-Auth-Token": token, "Accept": "application/json"}
            return glance.get(url, headers=headers, authenticated=False, raise_exc=False)

        tried = []
        for server in self._servers(auth, keystone):
            # A later 404 means a deleted image only if this server really is Glance.
            answer = get(f"{server}/v2/images?limit=1")
            if answer.status_code == 200 and _lists_images(answer):
                return lambda path: get(server + path)
            tried.append(f"{server} answers {answer.status_code}")
        raise errors.ThunderError(f"{', '.join(tried) or 'no server'}: see glance_api_servers")

    def _administrator(self) -> tuple[Any, Any, str]:
        """Credentials, a session for Keystone, and a token that may see every image.

        :raises errors.ThunderError: no configured user has the role
        """
        why = []
        for group in GROUPS:
            auth = self._plugins.get(group)
            if auth is None:
                auth = loading.load_auth_from_conf_options(self._users, group)
            if auth is None:
                continue
            self._plugins[group] = auth
            keystone = loading.load_session_from_conf_options(self._users, group)
            access = auth.get_access(keystone)
            if ROLE in {role.lower() for role in access.role_names}:
                return auth, keystone, access.auth_token
            why.append(f"the user of [{group}] has no role {ROLE}")
        reason = "; ".join(why) or f"cinder.conf has no user in {' or '.join(GROUPS)}"
        raise errors.ThunderError(reason)

    def _servers(self, auth: Any, keystone: Any) -> Iterator[str]:
        configured = self._conf.glance_api_servers
        if configured is None:
            kind, _name, interface = self._conf.glance_catalog_info.split(":")
            region = self._conf.glance.region_name
            found = auth.get_endpoint(
                keystone, service_type=kind, interface=interface, region_name=region
            )
            configured = [found] if found else []
        for server in configured:
            url = server if "//" in server else f"http://{server}"
            yield url.rstrip("/").removesuffix("/v2")


def _lists_images(answer: Any) -> bool:
    try:
        return isinstance(answer.json().get("images"), list)
    except (ValueError, AttributeError):
        return False
