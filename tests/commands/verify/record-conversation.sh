#!/bin/bash
# record-conversation.sh OUTPUT.pcap
#
# Records one IKEv2 conversation of strongSwan with itself through a NAT, as the responder's
# interface sees it, and writes it to OUTPUT.pcap (Ethernet, microseconds). At the end it prints,
# in Markdown, what is in the file and what made it.
#
#   initiator 192.168.1.2 -- 192.168.1.1 NAT 203.0.113.1 -- 203.0.113.2 responder
#   10.1.0.1 (assigned by IKE) ====== tunnel, ESP in UDP ====== 10.2.0.1
#
# Runs as root on a Linux with ESP in its kernel: a machine, a container, a User Mode Linux guest.
# Everything is in three network namespaces with names of this run's own and in a temporary
# directory; both are removed at the end, on failure too. Needs, on Debian: iproute2 iptables
# tcpdump ethtool iputils-ping strongswan-swanctl charon-systemd libcharon-extra-plugins
# libstrongswan-standard-plugins libstrongswan-extra-plugins.
set -euo pipefail

[ $# -eq 1 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
output=$1
[ "$(id -u)" -eq 0 ] || { echo "$0: must be root" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin
# An iptables that speaks nftables fails on a kernel without nftables
iptables=$(command -v iptables-legacy || command -v iptables)
for tool in ip tcpdump ethtool ping swanctl charon-systemd; do
  command -v "$tool" >/dev/null || { echo "$0: $tool is missing" >&2; exit 1; }
done

directory=$(mktemp -d)
initiator=natt-$$-initiator nat=natt-$$-nat responder=natt-$$-responder
declare -A daemon=()  # process ids of what this script started, by name

stop() { # NAME
  [ -n "${daemon[$1]:-}" ] || return 0
  kill "${daemon[$1]}" 2>/dev/null || true
  wait "${daemon[$1]}" 2>/dev/null || true
  unset "daemon[$1]"
}

cleanup() {
  status=$?
  trap - EXIT
  set +e
  if [ "$status" -ne 0 ]; then
    echo "$0: failed; the logs:" >&2
    tail -n 60 "$directory"/*.log >&2
  fi
  for name in "${!daemon[@]}"; do stop "$name"; done
  for namespace in "$initiator" "$nat" "$responder"; do ip netns delete "$namespace" 2>/dev/null; done
  rm -rf "$directory"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

within() { # SECONDS COMMAND...: repeat the command until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || { echo "$0: timed out waiting for: $*" >&2; return 1; }
    sleep 0.2
  done
}

# --- The network ---

for namespace in "$initiator" "$nat" "$responder"; do
  ip netns add "$namespace"
  ip -n "$namespace" link set lo up
  # strongSwan takes IPv6 addresses that come up for a change of the network and tells its peer of it
  ip netns exec "$namespace" sh -c '
    for all in /proc/sys/net/ipv6/conf/all /proc/sys/net/ipv6/conf/default; do
      [ ! -d $all ] || echo 1 > $all/disable_ipv6
    done'
done
# Fixed MAC addresses: nothing of the recording machine gets into the file
ip -n "$initiator" link add lan address 02:00:00:00:01:02 type veth \
  peer name inside address 02:00:00:00:01:01 netns "$nat"
ip -n "$responder" link add wan address 02:00:00:00:02:02 type veth \
  peer name outside address 02:00:00:00:02:01 netns "$nat"
# Without this, a capture on veth holds unfinished UDP checksums
ip netns exec "$initiator" ethtool -K lan tx off >/dev/null
ip netns exec "$responder" ethtool -K wan tx off >/dev/null
ip -n "$initiator" address add 192.168.1.2/24 dev lan
ip -n "$nat" address add 192.168.1.1/24 dev inside
ip -n "$nat" address add 203.0.113.1/24 dev outside
ip -n "$responder" address add 203.0.113.2/24 dev wan
ip -n "$responder" address add 10.2.0.1/32 dev lo
ip -n "$initiator" link set lan up
ip -n "$nat" link set inside up
ip -n "$nat" link set outside up
ip -n "$responder" link set wan up
ip -n "$initiator" route add default via 192.168.1.1
ip netns exec "$nat" sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
# A port range, since MASQUERADE alone keeps 500 and 4500, which hides wrong assumptions about ports
ip netns exec "$nat" "$iptables" -t nat -A POSTROUTING -o outside -p udp \
  -j MASQUERADE --to-ports 20000-29999

# --- strongSwan ---

configure() { # ROLE LINES-OF-CHARON CONNECTION
  mkdir "$directory/$1"
  cat > "$directory/$1/strongswan.conf" <<END
charon-systemd {
  load_modular = no
  load = random nonce drbg aes sha1 sha2 hmac kdf ctr gcm curve25519 kernel-netlink socket-default vici
  $2
  journal { default = -1 }
  filelog { log { path = $directory/$1.log
                  default = 1
                  flush_line = yes } }
  plugins { vici { socket = unix://$directory/$1/vici } }
}
END
  # The key belongs to this recording alone and protects nothing
  cat > "$directory/$1/swanctl.conf" <<END
connections {
  conversation {
    version = 2
    proposals = aes256-sha256-x25519
    $3
  }
}
pools { clients { addrs = 10.1.0.1/32 } }
secrets { ike { secret = "natcompat conversation" } }
END
}
# keep_alive: seconds without a datagram of ours until a NAT-keepalive; dpd_delay: without one of the peer's
configure initiator 'keep_alive = 1s' '
    local_addrs = 192.168.1.2
    remote_addrs = 203.0.113.2
    vips = 0.0.0.0
    dpd_delay = 5s
    local { auth = psk
            id = initiator.example }
    remote { auth = psk
             id = responder.example }
    children { net { remote_ts = 10.2.0.1/32
                     esp_proposals = aes256gcm16-x25519 } }'
configure responder '' '
    local_addrs = 203.0.113.2
    pools = clients
    local { auth = psk
            id = responder.example }
    remote { auth = psk
             id = initiator.example }
    children { net { local_ts = 10.2.0.1/32
                     esp_proposals = aes256gcm16-x25519 } }'

swan() { # ROLE COMMAND...: swanctl for the daemon of that role
  local role=$1
  shift
  SWANCTL_DIR=$directory/$role STRONGSWAN_CONF=$directory/$role/strongswan.conf \
    swanctl "$@" --uri "unix://$directory/$role/vici"
}

start() { # ROLE NAMESPACE
  STRONGSWAN_CONF=$directory/$1/strongswan.conf \
    ip netns exec "$2" charon-systemd >"$directory/$1.out.log" 2>&1 </dev/null &
  daemon[$1]=$!
  within 30 test -S "$directory/$1/vici"
  swan "$1" --load-all --file "$directory/$1/swanctl.conf" >"$directory/$1.load.log" 2>&1
}
start responder "$responder"
start initiator "$initiator"

# --- The capture ---

capture=$directory/capture.pcap
# -U: every packet is in the file at once, so that count() can look. -Z: no change of user, which
# could not write here.
ip netns exec "$responder" tcpdump -i wan -n -U --immediate-mode -s 0 -Z root -w "$capture" \
  'udp port 500 or udp port 4500' >"$directory/tcpdump.log" 2>&1 </dev/null &
daemon[tcpdump]=$!
within 30 grep -q '^listening on\|, link-type' "$directory/tcpdump.log"

count() { # FILTER: how many packets of the capture match it
  tcpdump -n -r "$capture" "$1" 2>/dev/null | wc -l
}
at_least() { # NUMBER FILTER
  [ "$(count "$2")" -ge "$1" ]
}
logged() { # ROLE FIRST THEN: a line that matches THEN came after one that matches FIRST
  awk -v first="$2" -v then="$3" '$0 ~ first { seen = 1 } seen && $0 ~ then { found = 1 }
    END { exit !found }' "$directory/$1.log"
}
pinged() { # NAMESPACE ARGUMENTS...: every echo request is answered
  ip netns exec "$1" ping -n -q -W 5 -i 0.2 "${@:2}" >>"$directory/ping.log" 2>&1 && \
    tail -n 4 "$directory/ping.log" | grep -q ' 0% packet loss'
}

ike='udp[8:4] = 0' esp='udp[4:2] >= 12 and udp[8:4] != 0' keepalive='udp[4:2] = 9 and udp[8] = 0xff'
to='udp dst port 4500 and dst host 203.0.113.2' from='udp src port 4500 and src host 203.0.113.2'

# --- The conversation ---

swan initiator --initiate --child net >"$directory/initiate.log" 2>&1
pinged "$initiator" -c 8 10.2.0.1
pinged "$initiator" -c 4 -s 1200 10.2.0.1  # large, but no fragments
pinged "$responder" -c 4 -I 10.2.0.1 10.1.0.1
within 30 at_least 3 "$to and $keepalive"
within 30 logged initiator 'sending DPD request' 'parsed INFORMATIONAL response'
# The responder rekeys, so that requests go both ways; then it deletes the old CHILD_SA
swan responder --rekey --child net >"$directory/rekey.log" 2>&1
within 30 logged responder 'sending DELETE for ESP' 'parsed INFORMATIONAL response'
pinged "$initiator" -c 8 -s 300 10.2.0.1
within 30 at_least $(($(count "$to and $keepalive") + 2)) "$to and $keepalive"
swan initiator --terminate --ike conversation >"$directory/terminate.log" 2>&1
within 30 logged initiator 'sending DELETE for IKE_SA|deleting IKE_SA' 'parsed INFORMATIONAL response'

stop tcpdump  # it writes what it still holds

# --- The result: a file that lacks something is none ---

row() { # NAME FILTER-TO FILTER-FROM [one-way]: a row of the table; fails when it should hold more
  local received sent
  received=$(count "$2") sent=$(count "$3")
  printf '| %s | %d | %d |\n' "$1" "$received" "$sent"
  [ "$received" -gt 0 ] && { [ "$sent" -gt 0 ] || [ "${4:-}" = one-way ]; }
}
table=$(
  printf '| UDP payload | to the responder | from the responder |\n|---|---|---|\n'
  row 'IKE on port 500' 'udp dst port 500' 'udp src port 500' &&
  row 'IKE behind the marker on port 4500' "$to and $ike" "$from and $ike" &&
  row 'ESP on port 4500' "$to and $esp" "$from and $esp" &&
  row 'NAT-keepalive on port 4500' "$to and $keepalive" "$from and $keepalive" one-way
) || { printf '%s: incomplete recording:\n%s\n' "$0" "$table" >&2; exit 1; }

cp "$capture" "$output"
echo "$table"
echo
echo "$(count '') packets; $(swan responder --version --daemon | head -n 1); Linux $(uname -r); $(tcpdump --version 2>&1 | head -n 1)"
