"""Shows IPsec of the kernel and of user-space engines: ``sad``, ``spd``, ``events``, ``top``.

On a terminal they draw tables, in a pipe they write plain lines, with ``--json`` JSON. Later versions of
natcompat may add keys to these. Times are seconds since the epoch, null where there was none. Every object
of ``sad``, ``spd`` and ``events`` has ``engine`` (kernel, or userspace) and ``pid`` (of the process with
user-space IPsec, or null).

``sad --json``
    an array of SAs. Always: ``spi`` (0x and eight digits), ``source``, ``destination``, ``state``
    (mature, or larval: only an SPI so far), ``description`` (protocol and algorithms in the kernel's words),
    ``packets``, ``octets``, ``added``, ``first_used``, ``last_used``, ``sequence`` (of the last packet sent,
    or the highest received), ``replay_drops``, ``window_drops``, ``integrity_drops`` (these four are null
    where the kernel does not say), ``last_received`` and ``last_sent`` (dummy packets included; null in a
    kernel), ``mark`` (0xVALUE/0xMASK or null). Of what natcompat has words for, too:
    ``direction`` (in, out), ``mode`` (tunnel, transport), ``encryption`` and ``integrity`` (names of
    natcompat.ipsec.Encr and Integ), ``encryption_bits``, ``esn``, ``replay_window``, ``local_port`` and
    ``remote_port`` (null: not in UDP), ``reqid``, ``nat_keepalive`` (seconds), ``interface_id``,
    ``selectors``, ``lifetime`` (the limits there are, by the names of natcompat.ipsec.Lifetime). With
    ``--show-keys``: ``encryption_key`` and ``integrity_key`` in hexadecimal digits, a salt at their end
``spd --json``
    an array of policies: ``direction``, ``selector``, ``action`` (protect, bypass, discard), ``mode``,
    ``source`` and ``destination`` (of the tunnel, or null), ``reqid``, ``priority``, ``optional``,
    ``mark``, ``interface_id``, ``added``, ``last_used``
``events --json``
    one object a line: ``time``, ``event``, and for ``acquire``: ``source``, ``destination``, ``reqid``,
    ``selector``, ``sequence``; for ``soft expire`` and ``hard expire``: ``spi``, ``destination``,
    ``reqid``; for ``mapping change``: these, ``old`` and ``new`` ("ADDRESS port NUMBER"); for
    ``integrity failure``: these, ``from`` ("ADDRESS port NUMBER", or null) and ``count``; for ``peer
    silent``: these and ``seconds``; for ``protection restored``: ``description``, ``count``; for ``events
    lost`` nothing more
``top --json``
    one array a line, the busiest SA first, with the columns of the table as keys: ``engine``, ``SPI``,
    ``way``, ``source``, ``destination``, ``UDP``, ``mode``, ``transform``, ``reqid``, ``packets``, ``bytes``,
    ``drops``, ``age``, ``packets/s``, ``bytes/s``
"""
