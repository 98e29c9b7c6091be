"""Whoever waits is more patient than what it waits for."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from oslo_config import cfg

import cinder_thunder.conf
from cinder_thunder.policy import ranking
from os_brick_thunder.agent.app import Settings
from os_brick_thunder.common import conf
from os_brick_thunder.common.policy import timelimits
from os_brick_thunder.common.policy.timelimits import Options, Wait

DEFAULTS = Options()


@pytest.mark.parametrize(
    "wait", [*timelimits.on_a_compute_host(DEFAULTS), *timelimits.in_a_cloud(DEFAULTS)], ids=str
)
def test_by_default_everybody_waits_long_enough(wait: Wait) -> None:
    assert 0 < wait.takes < wait.patience


def test_every_option_is_a_limit_that_something_waits_for() -> None:
    """No limit can be changed without some wait being held against it."""
    for field in dataclasses.fields(Options):
        value = getattr(DEFAULTS, field.name)
        longer = dataclasses.replace(DEFAULTS, **{field.name: value * 100})
        shorter = dataclasses.replace(DEFAULTS, **{field.name: value / 100})
        found = [
            wait
            for options in (longer, shorter)
            for wait in (*timelimits.on_a_compute_host(options), *timelimits.in_a_cloud(options))
            if wait.is_too_short
        ]
        assert found, field.name


def test_the_options_have_these_defaults() -> None:
    found = {
        option.dest.removeprefix("thunder_"): option.default
        for option in [*conf.CONNECTOR_OPTS, *conf.AGENT_OPTS, *cinder_thunder.conf.backend_opts]
    }
    for field in dataclasses.fields(Options):
        assert found[field.name] == getattr(DEFAULTS, field.name), field.name
    assert ranking.Limits().creating == DEFAULTS.creating_timeout
    assert ranking.Limits().sources == timelimits.SOURCES


def test_an_agent_whose_options_contradict_each_other_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = cfg.ConfigOpts()
    conf.register(options, agent=True)
    options([], default_config_files=[], project="thunder")
    with caplog.at_level(logging.WARNING):
        Settings.of(options.thunder)
    assert caplog.text == ""
    options.set_override("attach_budget", 10.0, group=conf.GROUP)
    with caplog.at_level(logging.WARNING):
        Settings.of(options.thunder)
    assert "attach_budget (10 s) must be less than attach_deadline (10 s)" in caplog.text
