"""Registries map a name to a string `"package.module:NAME"`, so that nothing is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def entry(registry: str, key: str) -> str:
    """Return how an entry of a registry is named in fingerprints and manifests, such as "FAMILIES[janus]"."""
    return f"{registry}[{key}]"


def resolve(place: str) -> Any:
    """Import the module and return the object that a string such as "stages.families.janus:JANUS" names."""
    module, name = place.split(":")
    return getattr(import_module(module), name)
