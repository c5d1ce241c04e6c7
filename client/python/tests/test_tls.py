"""TLS between a worker and its master: an unusable file is named at once, and nothing is retried in vain."""

import subprocess

import pytest

import syncbn


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CA, a server and a client that it has signed, and a stranger; each a pair of NAME.pem and NAME.key."""
    folder = tmp_path_factory.mktemp("tls")
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for name in ("ca", "stranger"):
        openssl(*new, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-subj", f"/CN={name}")
    for name in ("server", "client"):
        signed = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
        openssl(*new, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-subj", f"/CN={name}", *signed)
    (folder / "text.pem").write_text("no certificate")
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    openssl("ec", "-in", folder / "client.key", "-aes128", "-passout", "pass:secret", "-out", folder / "locked.key")
    return folder


@pytest.fixture(scope="module")
def secure(files):
    names = {"cert_file": "server.pem", "key_file": "server.key", "trusted_ca_file": "ca.pem"}
    with syncbn.Master(client_cert_auth=True, **{key: str(files / name) for key, name in names.items()}) as master:
        yield master


def join(target, files, ca="ca.pem", cert="client.pem", key="client.key", join_timeout=300.0):
    paths = {"trusted_ca_file": ca, "cert_file": cert, "key_file": key}
    paths = {name: str(files / path) for name, path in paths.items() if path is not None}
    return syncbn.Worker(target, "tls", 0, 1, join_timeout=join_timeout, **paths)


def test_certificates_that_fit(secure, files):
    with join(secure.target, files) as worker:
        assert worker.all_reduce("sum", [2.0]) == [2.0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ca": "absent.pem"}, ["cannot read the trusted CA", "absent.pem"]),
        ({"ca": "text.pem"}, ["trusted CA", "text.pem", "has no PEM block of a CERTIFICATE"]),
        ({"ca": "broken.pem"}, ["trusted CA", "broken.pem", "has no PEM block of a CERTIFICATE"]),
        ({"cert": "absent.pem"}, ["cannot read the certificate", "absent.pem"]),
        ({"cert": "broken.pem"}, ["the certificate", "broken.pem"]),
        ({"cert": "client.key"}, ["the certificate", "client.key"]),
        ({"key": "absent.key"}, ["cannot read the key", "absent.key"]),
        ({"key": "client.pem"}, ["the key", "client.pem"]),
        ({"key": "locked.key"}, ["the key", "locked.key", "without a passphrase"]),
        ({"key": "stranger.key"}, ["stranger.key", "client.pem", "does not belong to"]),
        ({"key": None}, ["certificate", "key", "missing"]),
        ({"cert": None}, ["certificate", "key", "missing"]),
    ],
)
def test_a_file_of_our_own_that_cannot_be_used_is_named(secure, files, change, words):
    with pytest.raises(syncbn.InvalidArgument) as caught:
        join(secure.target, files, **change)
    for word in words:
        assert word in caught.value.message


def test_a_master_that_is_not_trusted_is_not_tried_again(secure, files):
    with pytest.raises(syncbn.Error) as caught:
        join(secure.target, files, ca="stranger.pem")
    assert caught.value.code == syncbn.Code.UNAUTHENTICATED
    assert "TLS" in caught.value.message and secure.target in caught.value.message


@pytest.mark.parametrize("cert, key", [("stranger.pem", "stranger.key"), (None, None)])
def test_a_worker_that_is_not_trusted_hears_of_tls(secure, files, cert, key):
    with pytest.raises(syncbn.Error) as caught:
        join(secure.target, files, cert=cert, key=key, join_timeout=1.0)
    assert "TLS" in caught.value.message


def test_a_worker_without_tls_at_a_master_with_tls_hears_of_tls(secure):
    with pytest.raises(syncbn.Unavailable) as caught:
        syncbn.Worker(secure.target, "tls", 0, 1, join_timeout=1.0)
    assert "TLS" in caught.value.message
