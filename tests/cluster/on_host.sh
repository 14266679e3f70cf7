#!/bin/sh
# on_host.sh HOST COMMAND...: run COMMAND as if on HOST, a network namespace of that name: its network and its view of it in /sys, its host
# name, and everything in /etc/netns/HOST in place of its namesake in /etc. Control groups stay the machine's own; `ip netns exec` would
# hide them, and slurmd needs them. What is mounted in a shared folder of the machine appears here, too; nothing goes the other way.
set -eu
host=$1
shift
exec unshare --mount --uts --propagation slave -- sh -eu -c '
    hostname "$0"
    for file in /etc/netns/"$0"/*; do
        mount --bind "$file" "/etc/${file##*/}"
    done
    exec nsenter --net="/run/netns/$0" -- sh -eu -c '\''
        aside=$(mktemp -d)
        mount --rbind /sys/fs/cgroup "$aside"
        mount -t sysfs sysfs /sys
        mount --rbind "$aside" /sys/fs/cgroup
        umount -l "$aside"
        rmdir "$aside"
        exec "$@"'\'' sh "$@"' "$host" "$@"
