"""Which addresses and hosts a tool may be connected to."""

from __future__ import annotations

import pytest

from agentray.errors import ToolError
from agentray.tools.addresses import address_problem
from agentray.tools.hosts import allowed, host_rule, parse_url, redirect_target

NEVER = [
    "169.254.169.254",
    "::ffff:169.254.169.254",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fd00:c1::a9fe:a9fe",
    "fd00:42::42",
    "fd00:100::100:200",
    "fd00:a9fe:a9fe::1",
    "169.254.170.2",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "169.254.1.1",
    "fe80::1",
    "fe80::1%eth0",
    "0.0.0.0",
    "0.1.2.3",
    "::",
    "224.0.0.1",
    "239.255.255.250",
    "ff02::1",
    "ff0e::1",
    "255.255.255.255",
    "240.0.0.1",
    "192.0.2.1",
    "2001:db8::1",
    "3fff::1",
    "192.88.99.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
    "fec0::1",
    "4000::1",
    "not an address",
]
PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.31.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "fc00::1",
    "fdff::1",
]
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "2606:4700:4700::1111",
    "::ffff:8.8.8.8",
    "172.32.0.1",
    "100.128.0.1",
]


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_never_connected_to(address: str) -> None:
    assert address_problem(address) is not None
    assert address_problem(address, private=True) is not None


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_need_the_operator_to_say_so(address: str) -> None:
    assert address_problem(address) is not None
    assert address_problem(address, private=True) is None


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_connected_to(address: str) -> None:
    assert address_problem(address) is None


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "//example.com/",
        "https:example.com",
        "https:///example.com",
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://example.com\\@evil.example/",
        "https://exa mple.com/",
        "https://example.com/a b",
        "https://example.com/\r\nHost: evil.example",
        "https://example.com/\n",
        "https://example.com/\u2028",
        "https://example.com/ä",
        "https://exa%6dple.com/",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:443x/",
        "https://example..com/",
        "https://-example.com/",
        "https:///",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.0.0.1/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://127.0.0.1.1/",
        "https://example.0x/",
        "https://[::1/",
        "https://[fe80::1%25eth0]/",
        "https://[::1]evil.example/",
    ],
)
def test_addresses_that_parsers_read_differently_are_refused(url: str) -> None:
    with pytest.raises(ToolError) as error:
        parse_url(url)
    assert error.value.fields["reason"] == "refused"
    assert "evil" not in error.value.message


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("https://Example.COM./a?b#c", "https://example.com", "/a?b"),
        ("HTTP://example.com:80", "http://example.com", "/"),
        ("http://example.com:8080/%2e%2E/x", "http://example.com:8080", "/%2e%2E/x"),
        ("https://bücher.example/", "https://xn--bcher-kva.example", "/"),
        ("https://[2606:4700::1111]:8443/", "https://[2606:4700::1111]:8443", "/"),
        ("https://8.8.8.8?q", "https://8.8.8.8", "/?q"),
    ],
)
def test_an_address_is_read_once_and_requested_as_it_is(url: str, origin: str, path: str) -> None:
    found, request = parse_url(url)
    assert str(found) == origin
    assert request.raw_path_qs == path


@pytest.mark.parametrize(
    ("rule", "fits", "misses"),
    [
        ("api.example.com", ["https://api.example.com/"], ["http://api.example.com/"]),
        (
            "*.example.com",
            ["https://a.example.com/", "https://a.b.example.com/"],
            ["https://example.com/", "https://evilexample.com/", "https://a.example.com.evil/"],
        ),
        ("http://host:8080", ["http://host:8080/"], ["http://host/", "https://host:8080/"]),
        ("https://10.0.0.1", ["https://10.0.0.1/"], ["https://10.0.0.2/"]),
    ],
)
def test_a_rule_is_of_one_scheme_host_and_port(
    rule: str, fits: list[str], misses: list[str]
) -> None:
    for url in fits:
        assert allowed(parse_url(url)[0], [host_rule(rule)]), url
    for url in misses:
        assert not allowed(parse_url(url)[0], [host_rule(rule)]), url


@pytest.mark.parametrize(
    "rule",
    ["", "*", "*.", "*.*", "a.*.b", "ftp://a", "https://a/path", "u@a", "*.10.0.0.1", "0x7f.1"],
)
def test_what_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        host_rule(rule)


def test_a_redirect_is_read_as_it_is_written() -> None:
    _, url = parse_url("https://example.com/a/b?c")
    assert redirect_target(url, "../d") == "https://example.com/d"
    assert redirect_target(url, "//other.example/x") == "https://other.example/x"
    with pytest.raises(ToolError):
        # Parsers that drop the tab would go to another host than the one that was checked.
        redirect_target(url, "https://exam\tple.com/")


@pytest.mark.parametrize("location", ["//[evil", "https://[evil]/", "//evil\u2100.example/"])
def test_a_redirect_that_cannot_be_read_is_refused_without_its_text(location: str) -> None:
    _, url = parse_url("https://example.com/a/b?c")
    with pytest.raises(ToolError) as error:
        parse_url(redirect_target(url, location))
    assert error.value.fields["reason"] == "refused"
    assert "evil" not in error.value.message
    assert error.value.__cause__ is None or "evil" not in str(error.value.__cause__)
