"""Writes /etc/syncbn/master.toml: every option of syncbn-master, commented out, from the text of its --help.

    syncbn-master --help | python3 deploy/systemd/make_config.py > master.toml
"""

import re
import sys
from typing import List, NamedTuple, Optional

HEADER = """\
# The configuration of syncbn-master, which "man syncbn-master" describes. Each key is an option of the program without
# its leading hyphens, and stands here with its default, or with an example where the default is no value. An unknown
# key is an error. After a change: systemctl restart syncbn-master. Workers wait meanwhile, and no round is lost.
#
# As it is, the master serves this host alone. To serve a network, put certificates into /etc/syncbn/tls, where root
# alone needs to read them, and set: address, cert-file, key-file, trusted-ca-file, client-cert-auth.
"""
# systemd copies /etc/syncbn/tls/NAME to this place for the service.
CREDENTIAL = "/run/credentials/syncbn-master.service/tls_"
# They concern a command line, not a service.
LEFT_OUT = {"help", "version", "config-file"}


class Option(NamedTuple):
    name: str
    type: Optional[str]
    """None for a switch."""
    default: Optional[str]
    """As the program words it; not always a value."""
    meaning: str


def options(help_text: str) -> List[Option]:
    """Returns the options of a --help in its order, but for those that are left out."""
    found = re.findall(r"^  (?:-\w,)?--([\w-]+)(?: (.*))?\n {20,}(.*)$", help_text, re.MULTILINE)
    result = []
    for name, syntax, meaning in found:
        syntax = re.sub(r"\s*\(Env:\w+\)$", "", syntax)
        kind, _, default = syntax.partition("=")
        default = re.sub(r" \.\.\.$", "", default)
        if name not in LEFT_OUT:
            result.append(Option(name, kind or None, default or None, meaning))
    return result


def example(option: Option) -> str:
    """Returns a value of the option, as TOML writes it: the default, where that is a value."""
    if option.type is None:
        return "false"
    # "127.0.0.1:8080, if it is free" begins with the value.
    default = re.sub(r"^(\S+:\d+), .*", r"\1", option.default or "")
    if re.fullmatch(r"\d+(\.\d+)?", default):
        return default
    if re.fullmatch(r"\S+", default):
        return f'"{default}"'
    if option.type == "N":
        return "1024"
    if option.type == "on|off":
        return '"off"'
    if option.type == "DIR":
        return '"/var/lib/syncbn"'
    if option.type == "FILE":
        return f'"{CREDENTIAL}{option.name.replace("-file", "")}"'
    # A type such as "HOST:PORT, or off" begins with its first form.
    return f'"{option.type.split()[0].split("|")[0]}"'


def config(help_text: str) -> str:
    parts = [HEADER]
    for option in options(help_text):
        meaning = option.meaning[0].upper() + option.meaning[1:]
        default = option.default or ("off" if option.type is None else None)
        told = "" if default is None else f" Default: {default}."
        parts.append(f"# {meaning}.{told}\n#{option.name} = {example(option)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(config(sys.stdin.read()))
