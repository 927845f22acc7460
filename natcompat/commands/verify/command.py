"""``natcompat verify``: runs every trial that this machine permits, and reports.

``--json`` prints this; ``"schema": 1`` stands for these keys, and later versions may add some:

``natcompat``, ``passed``
    version; whether there was no difference
``platform``
    ``system``, ``release``, ``machine``, ``python``, and ``root``: whether it ran with user id 0
    (null where there are none)
``trials``
    a list: ``backend``, ``path`` (``loopback``, ``from behind NAT``, ``to behind NAT``), ``version``
    (of IP), ``mode``, ``reason``, ``duties`` (drop_runts, divert_esp, strip_marker, insert_marker:
    kernel, filter, steering or process), ``passed``, ``outcomes``: a list of the keys of
    `natcompat.commands.verify.trials.Outcome`
``replays``
    a list: ``backend``, ``mode``, ``duties``, ``passed``, ``counts``: a list of the keys of
    `natcompat.commands.verify.recorded.Count`
``nat``
    ``nft``, ``iptables`` or ``iptables-legacy``; null without a NAT
``skipped``
    a list: ``what``, ``reason``, ``remedy``
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from natcompat.commands.verify.recorded import replay
from natcompat.commands.verify.report import BEHIND, Verification, show
from natcompat.commands.verify.trials import FAMILY, LOOPBACK, run
from natcompat.commands.verify.values import Trial, TrialPath


def verify(names: tuple[str, ...], *, nat: bool, progress: Callable[[str], object]) -> Verification:
    """Verify the backends called `names` (empty: all viable ones), also through a NAT if `nat`.

    `progress` is told what comes next. Raises `natcompat.errors.BackendUnavailableError` if a
    backend that was named is unknown or not viable.
    """
    from natcompat import backends
    from natcompat.backends.base import families_of
    from natcompat.commands.verify.conversation import load

    verification = Verification()
    if names:
        chosen = [backends.select(name).name for name in dict.fromkeys(names)]
    else:
        chosen = []
        for viability in backends.probe():
            if viability.viable:
                chosen.append(viability.backend)
            elif backends.is_for_this_system(viability.backend):
                verification.skip(f"backend {viability.backend}", viability.reason, viability.remedy)
    versions = [version for version in (4, 6) if _has_loopback(verification, version)]
    with contextlib.ExitStack() as stack:
        network = None
        if nat:
            network = _topology(verification, stack, progress)
        else:
            verification.skip("NAT", "--no-nat was given")
        for name in chosen:
            families = families_of(backends.get(name))
            for version in versions:
                if FAMILY[version] not in families:
                    verification.skip(f"backend {name}, IPv{version}", "its kernel serves the other alone")
                    continue
                progress(f"{name}, loopback, IPv{version}")
                with _bound(version, LOOPBACK[version]) as peer:
                    path = TrialPath(
                        "loopback", LOOPBACK[version], 0, LOOPBACK[version], endpoint_begins=False
                    )
                    verification.trials.append(run(name, version, path, peer))
                if network is not None:
                    verification.trials.extend(_through_nat(verification, network, name, version, progress))
            if 4 in versions:
                progress(f"{name}, recorded conversation")
                verification.replays.append(replay(name, load()))
    return verification


def steps(names: tuple[str, ...], *, nat: bool) -> int:
    """Return the approximate number of calls of `progress` that `verify` makes."""
    from natcompat import backends

    count = len(names) or sum(viability.viable for viability in backends.probe())
    return count * (7 if nat else 3) + nat


def _has_loopback(verification: Verification, version: int) -> bool:
    try:
        with _bound(version, LOOPBACK[version]) as sock:
            sock.sendto(b"", sock.getsockname())
        return True
    except OSError as error:
        verification.skip(
            f"IPv{version}",
            f"{LOOPBACK[version]} cannot be used: {error.strerror}",
            f"Set the loopback interface up with IPv{version} (ip link set lo up, sysctl "
            "net.ipv6.conf.lo.disable_ipv6=0)",
        )
        return False


def _bound(version: int, host: str) -> socket.socket:
    sock = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    try:
        sock.bind((host, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def _topology(
    verification: Verification, stack: contextlib.ExitStack, progress: Callable[[str], object]
) -> Any:
    """Return the network with the NAT; None, with a note in the report, if there can be none."""
    from natcompat.commands.verify.namespaces import Topology
    from natcompat.errors import NatCompatError

    progress("making a NAT between network namespaces")
    try:
        network = stack.enter_context(Topology())
    except NatCompatError as error:
        verification.skip("NAT", error.strerror or "", error.remedy)
        return None
    verification.nat = network.nat
    return network


def _through_nat(
    verification: Verification, network: Any, name: str, version: int, progress: Callable[[str], object]
) -> Iterator[Trial]:
    """Yield a trial with the peer behind the NAT, and one with the endpoint behind the NAT."""
    from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER
    from natcompat.contract import NAT_T_PORT
    from natcompat.errors import BackendUnavailableError

    for title, here, host, there, peer_host in (
        (BEHIND[0], network.responder, RESPONDER, network.initiator, INITIATOR),
        (BEHIND[1], network.initiator, INITIATOR, network.responder, RESPONDER),
    ):
        progress(f"{name}, {title}, IPv{version}")
        path = TrialPath(title, host[version], NAT_T_PORT, peer_host[version], here is network.initiator)
        with there.socket(FAMILY[version]) as peer:
            peer.bind((peer_host[version], 0))
            try:
                yield here.call(run, name, version, path, peer)
            except BackendUnavailableError as error:
                verification.skip(
                    f"backend {name}, {title}, IPv{version}", error.strerror or "", error.remedy
                )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], object]]:
    """Show a progress bar on a terminal, on stderr, so that stdout is for the report alone."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from natcompat.errors import printable

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda step: bar.update(task, advance=1, description=printable(step))


@click.command("verify", short_help="Prove on real sockets that every backend keeps the contract.")
@click.option(
    "--backend", "names", metavar="NAME", multiple=True, help="Verify this backend; may be repeated."
)
@click.option("--no-nat", is_flag=True, help="Stay on loopback: make no network namespaces.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; natcompat/commands/verify/command.py has the keys."
)
def command(names: tuple[str, ...], no_nat: bool, as_json: bool) -> int:
    """Prove on real sockets that every backend keeps the contract.

    For each backend that is viable here, over IPv4 and IPv6, every row of the contract is sent to an
    endpoint and from it: over loopback, and in both directions through a NAT that changes ports,
    between network namespaces. The report tells for each row what arrived, what Solaris does, and who
    did it: the kernel, a filter or steering in the kernel, or this process. Further: that select does
    not wake for what the kernel drops, the largest message and EMSGSIZE above it, ICMP errors, and
    switching off. Then a recorded conversation of two strongSwan daemons goes through an endpoint.

    The NAT needs root or user namespaces, and nft or iptables. What cannot be had is left out, and the
    report says why and what would help; the rest needs no privilege. What the kernel denies to every
    program that uses it in the same way is a limit: it is found on a plain socket alongside, told, and
    not counted as a difference. The namespaces have no names and
    end with the command, however it ends. Nothing else on the system is touched.

    \b
    Exit status:
      0  everything that was looked at is as on Solaris
      1  something differs (the report names backend, path and row), or a backend
         that was asked for is not viable
      2  the command line is wrong

    \b
    Examples:
      natcompat verify
      natcompat verify --backend userspace --backend userspace:in-line --no-nat
      natcompat verify --json | jq '.trials[].outcomes[] | select(.passed | not)'
    """
    with _progress(steps(names, nat=not no_nat)) as progress:
        verification = verify(names, nat=not no_nat, progress=progress)
    if as_json:
        from natcompat.commands.report import print_json

        print_json(verification.as_json())
    else:
        show(verification)
    return 0 if verification.passed else 1
