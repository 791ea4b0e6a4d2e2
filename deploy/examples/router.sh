#!/bin/sh
# The part of a router: sends its public key, and sets up the tunnel to the gateway in the answer.
# Needs wget (curl or uclient-fetch serve as well), wg and ip. Run it once a minute: a router that does not get 200, or whose
# last handshake is older than 3 minutes, sends its key again.
set -eu

if [ $# -ne 4 ]; then
    echo "usage: router.sh URL DOMAIN PRIVATE_KEY_FILE VXLAN_ID, such as router.sh http://broker.example.org ffmuc_welt /etc/wg.key 98" >&2
    exit 2
fi
url=$1 domain=$2 key_file=$3 vxlan_id=$4

[ -s "$key_file" ] || (umask 077 && wg genkey >"$key_file")
key=$(wg pubkey <"$key_file")

# 200: {"Endpoint": {"Address": "gw01.example.org", "Port": "40011", "AllowedIPs": ["fe80::1"], "PublicKey": "..."}}
# Anything else, such as 429 or 503: wget fails, and the router tries again in a minute.
answer=$(wget -q -T 5 -O - --header "Content-Type: application/json" \
    --post-data "{\"domain\": \"$domain\", \"public_key\": \"$key\"}" "$url/api/v2/wg/key/exchange")

field() {
    printf '%s' "$answer" | sed -n "s/.*\"$1\": *\[*\"\([^\"]*\)\".*/\1/p"
}
gateway=$(field AllowedIPs)
gateway=${gateway%/*}

# The address that gateways derive from the key: fe80::, and the MD5 of its text (with a line end) as an EUI-64.
hash=$(echo "$key" | md5sum)
octets() {
    echo "$hash" | cut -c "$1"
}
own=fe80::02$(octets 1-2):$(octets 3-4)ff:fe$(octets 5-6):$(octets 7-10)

ip link show wg-mesh >/dev/null 2>&1 || ip link add wg-mesh type wireguard || wireguard-go wg-mesh >/dev/null
# One gateway at a time.
for peer in $(wg show wg-mesh peers); do
    [ "$peer" = "$(field PublicKey)" ] || wg set wg-mesh peer "$peer" remove
done
wg set wg-mesh private-key "$key_file" peer "$(field PublicKey)" endpoint "$(field Address):$(field Port)" \
    allowed-ips "$gateway/128" persistent-keepalive 25
ip -6 address replace "$own/128" dev wg-mesh
ip link set wg-mesh up
ip -6 route replace "$gateway/128" dev wg-mesh

# BATMAN runs over this interface: batctl meshif bat0 interface add vx-mesh
ip link show vx-mesh >/dev/null 2>&1 && ip link delete vx-mesh
ip link add vx-mesh type vxlan id "$vxlan_id" dstport 8472 local "$own" remote "$gateway" dev wg-mesh
ip link set vx-mesh up
