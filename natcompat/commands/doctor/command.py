"""The command line of ``natcompat doctor``."""

from __future__ import annotations

import click

from natcompat.commands.doctor.examine import examine


@click.command("doctor", short_help="Tell what works on this machine, and what would help.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON; natcompat/commands/doctor/examine.py documents its keys.",
)
@click.option(
    "--clean",
    "only_clean",
    is_flag=True,
    help="Remove what killed processes left behind, and report that alone.",
)
@click.pass_context
def command(context: click.Context, as_json: bool, only_clean: bool) -> int:
    """Tell what works on this machine, why, and what would help.

    For every backend: whether it is viable, the reason, a remedy, and who would do each of the four
    duties (drop runts, divert ESP, strip the marker, insert the marker). Further: which backend is
    chosen here and what NATCOMPAT_BACKEND asks for; whether the kernel would install an ESP SA, by
    address family and algorithm; whether endpoints will be exempt from IPsec policies, and whether
    the kernel sends NAT-keepalives and knows the direction of SAs; privileges, TUN, the guard of
    policies (nf_tables), offloads and why one is off, the way by which IKE is handed back, the holders
    of UDP 500 and 4500, and signs of a sandbox.

    That a kernel accepts the option UDP_ENCAP proves nothing, so ESP is asked for by a request that
    the kernel has to refuse, filters and steering by datagrams over loopback, and TUN by a device in
    a network namespace that ends with the command. The system is not changed, unless --clean is given.

    It needs no privilege. An ordinary user may not see the processes of others, and without
    CAP_NET_ADMIN the kernel does not say which algorithms it has; the report tells which it was.

    With --clean it removes what killed processes of natcompat left in this network namespace: guards of
    lockdown, under which traffic stays blocked, routing rules and routes without a device, and control
    sockets. What belongs to a living process stays. It takes root or CAP_NET_ADMIN.

    \b
    Exit status:
      0  there is a backend that works here; with --clean: nothing is left behind
      1  there is none; with --clean: something could not be removed, and the last
         line says why

    \b
    Examples:
      natcompat doctor
      natcompat doctor --json | jq -r .auto
      natcompat doctor --clean
      NATCOMPAT_BACKEND=linux natcompat doctor
    """
    if only_clean:
        from natcompat.commands.doctor import clean

        removed = clean.clean()
        if as_json:
            from natcompat.commands.report import print_json

            print_json(removed)
        else:
            clean.show(removed)
        return 1 if removed["errors"] else 0
    report = examine()
    if as_json:
        from natcompat.commands.report import print_json

        print_json(report)
    else:
        from natcompat.commands.doctor.report import show

        show(report)
    return 0 if report["auto"] is not None else 1
