# shellcheck shell=bash disable=SC2154 # $work, $packages, $root and $copy are those of the scripts that source it
# A Debian 12 whose systemd runs the units, in systemd-nspawn, with its own network; commands of documents are run in it. For
# tests/packages and tests/first-router, which set $work, the directory for kept files, and call end when they end; it
# removes $copy.

machine=wgkex-test-$$
gateway=gw01.example.org
units=(wgkex-broker wgkex-worker)
debian_packages=systemd,systemd-sysv,iproute2,wireguard-go,wireguard-tools,man-db,curl,batctl

make_debian() {
    [[ ! -e $work/base || $(cat "$work/base.packages") != "$debian_packages" ]] || return 0
    say "making a Debian"
    rm -rf "$work/making" "$work/base"
    debootstrap --variant=minbase --include="$debian_packages" bookworm "$work/making" >"$work/debootstrap.log" ||
        fail "debootstrap failed, see $work/debootstrap.log"
    echo "$debian_packages" >"$work/base.packages"
    mv "$work/making" "$work/base"
}

# Boots the Debian in directory $root, with more options of systemd-nspawn. Its host name is $gateway.
boot() {
    say "booting it"
    echo "$gateway" >"$root/etc/hostname"
    echo "127.0.0.1 localhost $gateway broker.example.org" >"$root/etc/hosts"
    # Without registration at systemd-machined, which may not run on this machine.
    systemd-nspawn --quiet --directory "$root" --machine "$machine" --register=no --keep-unit --private-network "$@" \
        --console=passive --boot </dev/null &>"$work/console.log" &
    nspawn=$!
    wait_for 60 "the first process of the Debian" first_process
    wait_for 120 "a system that runs" inside systemctl is-system-running --quiet
}

first_process() {
    # The file has no newline at its end. Before systemd starts, the child is a helper of nspawn.
    read -r first _ <"/proc/$nspawn/task/$nspawn/children" || true
    [[ $first && $(<"/proc/$first/comm") == systemd ]]
} 2>/dev/null

# Runs a command in the Debian.
inside() {
    nsenter --target "$first" --mount --uts --ipc --net --pid --cgroup --root --wdns=/ \
        env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "$@"
}

# Prints a fenced block of a document: its language, document, section, and number in the section.
block() {
    awk -v language="$1" -v section="$3" -v number="${4-1}" '
        !fenced && /^#+ / { here = $0; sub(/^#+ /, "", here); found = 0 }
        fenced && /^```$/ { fenced = printed = 0; next }
        printed
        !fenced && /^```/ { fenced = 1; printed = here == section && $0 == "```" language && ++found == number }
    ' "$2" | grep . || fail "$2, $3: there is no ${4-1}. block of $1"
}

# Runs the commands of a block unchanged in directory $packages of the Debian, in one shell: document, section, number of the
# block in the section, and pairs of a placeholder and its value.
run_block() {
    local commands line script
    commands=$(block sh "$1" "$2" "$3")
    script="set -euo pipefail; cd $packages; $(declare -f must_be_well)"
    shift 3
    while (($#)); do
        commands=${commands//"$1"/"$2"}
        shift 2
    done
    while IFS= read -r line; do
        [[ $line != '#'* ]] || continue
        script+=$'\n'"printf '\$ %s\n' ${line@Q}; status=0"
        # This command does not end by itself.
        [[ $line != *" --watch"* ]] || line="timeout 5 $line"
        script+=$'\n'"{ $line"$'\n'"} || status=\$?; must_be_well ${line@Q} \$status"
    done <<<"$commands"
    inside bash -c "$script" </dev/null
}

must_be_well() {
    case "$2 $1" in
    '0 '*) ;;
    # Warnings, such as that of an unsynchronized clock.
    '1 '*' doctor'*) ;;
    '124 '*' --watch'*) ;;
    *)
        echo "not so: exit code $2" >&2
        exit 1
        ;;
    esac
}

# Extends a unit by a block, as "systemctl edit" does: unit, document, section, number of the block in the section.
extend_unit() {
    inside mkdir -p "/etc/systemd/system/$1.service.d"
    block ini "${@:2}" | inside tee "/etc/systemd/system/$1.service.d/$4.conf" >/dev/null
    inside systemctl daemon-reload
}

show() {
    inside systemctl show --property "$2" --value "$(name "$1")"
}

has() {
    [[ $(show "$1" "$2") == "$3" ]]
}

name() {
    case $1 in
    broker | worker) echo "wgkex-$1" ;;
    *) echo "$1" ;;
    esac
}

wait_until_ready() {
    wait_for 60 "a broker that is ready" has broker StatusText ready
    wait_for 60 "a worker that is ready" has worker StatusText ready
}

check() {
    local what=$1 output
    shift
    output=$("$@" 2>&1) || fail "not so: $what
$output"
    echo "ok: $what"
}

wait_for() {
    local seconds=$1 what=$2 until
    shift 2
    until=$((SECONDS + seconds))
    until "$@" &>/dev/null; do
        ((SECONDS < until)) || fail "not within $seconds s: $what"
        sleep 0.2
    done
    echo "ok: $what"
}

end() {
    local status=$?
    set +e
    trap '' INT TERM HUP
    if ((status)) && [[ ${first-} ]]; then
        inside systemctl --failed || true
        inside systemctl status --no-pager --lines 40 "${units[@]}" || true
    elif ((status)) && [[ ${nspawn-} ]]; then
        tail -n 20 "$work/console.log" >&2
    fi
    if [[ ${nspawn-} ]]; then
        kill -TERM "$nspawn"
        for _ in {1..100}; do
            [[ -e /proc/$nspawn ]] || break
            sleep 0.1
        done
        kill -KILL "$nspawn" ${first:+"$first"}
        wait "$nspawn"
    fi 2>/dev/null
    [[ ! ${copy-} ]] || rm -rf "$copy"
    exit "$status"
}

say() {
    printf '\n== %s\n' "$*"
}

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}
