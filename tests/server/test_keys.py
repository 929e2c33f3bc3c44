"""The table of API keys: what a file may hold, and whose each key is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.server.keys import MAX_FILE_BYTES, Keys, Tenant

SECRET = "sk-0123456789"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def read(tmp_path: Path, text: str, **settings: Any) -> Keys:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    return Keys(ServerConfig(api_keys_file=str(file), **settings))


def test_whose_a_key_is(tmp_path: Path) -> None:
    """A key and its digest are the same entry."""
    plain = f'- {{name: a, key: "{SECRET}", priority: -3, weight: 2}}'
    hashed = f"- {{name: a, sha256: {DIGEST.upper()}, priority: -3, weight: 2.0}}"
    for text in (plain, hashed, f"{plain}\n{hashed}"):
        keys = read(tmp_path, text + '\n- {name: b-1._B, key: "!*&{}#,:"}', api_key=("c", "d"))
        assert keys.tenant_of(SECRET) == Tenant("a", -3, 2.0, share=0.5)
        assert keys.tenant_of("!*&{}#,:") == Tenant("b-1._B", share=0.25)
        assert (
            keys.tenant_of("c") == keys.tenant_of("d") == Tenant("default", share=0.25, admin=True)
        )
        assert keys.num_keys == 4
        for unknown in ("", SECRET[:-1], SECRET + " ", DIGEST, "caf\xe9", "\udce9", "a"):
            assert keys.tenant_of(unknown) is None


def test_who_may_change_what_others_get(tmp_path: Path) -> None:
    keys = read(tmp_path, f"- {{name: a, key: {SECRET}, admin: true}}\n- {{name: b, key: c}}")
    assert keys.tenant_of(SECRET) == Tenant("a", admin=True, share=0.5)
    assert keys.tenant_of("c") == Tenant("b", share=0.5)
    with pytest.raises(ConfigError, match="'default' has different .* rights") as caught:
        read(tmp_path, f"- {{name: default, key: {SECRET}}}", api_key=("c",))
    assert "admin" in (caught.value.hint or "")


def test_who_needs_a_key(tmp_path: Path) -> None:
    assert not Keys(ServerConfig()).required
    assert Keys(ServerConfig(api_key=("a",))).required
    assert read(tmp_path, "[]").required and read(tmp_path, "[]").tenant_of("") is None


BROKEN = {
    "nothing": ("", "got `null`"),
    "no list": (f"a: {SECRET}", "Expected `array`"),
    "no mapping": (f"- {SECRET}", "[0]: Expected `object`"),
    "no name": (f"- key: {SECRET}", "[0]: Object missing required field `name`"),
    "a strange name": (f"- {{name: 'a {SECRET}', key: x}}", "[0].name"),
    "an empty name": (f"- {{name: '', key: {SECRET}}}", "[0].name"),
    "a name with its line": (f'- {{name: "a\\n", key: {SECRET}}}', "[0].name"),
    "no key": ("- name: a", "[0] needs either a key or a sha256"),
    "both": (f"- {{name: a, key: {SECRET}, sha256: {DIGEST}}}", "[0] needs either"),
    "an empty key": ("- {name: a, key: ''}", "[0].key is empty"),
    "a key with spaces": (f"- {{name: a, key: '{SECRET} x'}}", "[0].key is empty"),
    "a key beyond ASCII": (f"- {{name: a, key: {SECRET}é}}", "[0].key is empty"),
    "a number as key": ("- {name: a, key: 12345678}", "[0].key: Expected `str | null`, got `int`"),
    "a short digest": (f"- {{name: a, sha256: {DIGEST[1:]}}}", "[0].sha256"),
    "an unknown field": (f"- {{name: a, key: b, {SECRET}: 1}}", "a field other than"),
    "a priority of words": (f"- {{name: a, key: {SECRET}, priority: high}}", "[0].priority"),
    "a fraction": (f"- {{name: a, key: {SECRET}, priority: 1.5}}", "[0].priority"),
    "too high": (f"- {{name: a, key: {SECRET}, priority: 1001}}", "[0].priority"),
    "no weight": (f"- {{name: a, key: {SECRET}, weight: 0}}", "[0].weight"),
    "weight below 0": (f"- {{name: a, key: {SECRET}, weight: -1}}", "[0].weight"),
    "weight without end": (f"- {{name: a, key: {SECRET}, weight: .inf}}", "[0].weight"),
    "weight of no number": (f"- {{name: a, key: {SECRET}, weight: .nan}}", "[0].weight"),
    "weight of a switch": (f"- {{name: a, key: {SECRET}, weight: true}}", "[0].weight"),
    "two tenants": (f"[{{name: a, key: {SECRET}}}, {{name: b, sha256: {DIGEST}}}]", "another's"),
    "a right of words": (f"- {{name: a, key: {SECRET}, admin: sure}}", "[0].admin"),
    "two rights": (f"[{{name: a, key: {SECRET}}}, {{name: a, key: b, admin: true}}]", "different"),
    "two weights": (f"[{{name: a, key: {SECRET}}}, {{name: a, key: b, weight: 2}}]", "different"),
    "broken YAML": (f"\n- {{name: a, key: {SECRET}", "line"),
    "an unknown alias": (f"- {{name: a, key: *{SECRET}}}", "line 1 is not valid YAML"),
    "an unknown tag": (f"- {{name: a, key: !{SECRET} }}", "line 1 is not valid YAML"),
    "a date that is none": (f"- {{name: a, key: 2026-99-99, x: {SECRET}}}", "cannot be used"),
    "too deep": ("[" * 100_000 + "]" * 100_000, "nested more than 4 deep"),
    "too deep in lines": ("- " * 100_000, "nested more than 4 deep"),
    "too large": ("#" * (MAX_FILE_BYTES + 1), "larger than 4194304 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_files(tmp_path: Path, name: str) -> None:
    """The error names the place, and never quotes the file."""
    text, words = BROKEN[name]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    said = str(caught.value)
    assert words in said
    assert caught.value.field == "api_keys_file" and caught.value.hint
    assert SECRET not in said and DIGEST not in said


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    for settings, field in (
        ({"api_keys_file": str(tmp_path / "none")}, "api_keys_file"),
        ({"api_keys_file": str(tmp_path)}, "api_keys_file"),
        ({"api_key": (f"{SECRET} x",)}, "api_key"),
        ({"api_key": (SECRET + "é",)}, "api_key"),
        ({"prefix_cache_per_tenant": True}, "prefix_cache_per_tenant"),
    ):
        with pytest.raises(ConfigError) as caught:
            Keys(ServerConfig(**settings))  # type: ignore[arg-type]
        assert caught.value.field == field and SECRET not in str(caught.value)
