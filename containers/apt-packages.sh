#!/usr/bin/env bash
# Packages of the distribution, their services not started, in four minutes at most: apt-packages.sh PACKAGE...
# Needs root and apt; ends with exit code 3, and apt's last words, where that does not work.
set -euo pipefail
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "apt-packages: $* cannot be installed; seen: $([ "$(id -u)" = 0 ] && echo 'no apt' || echo "uid $(id -u)"); root with apt would be right" >&2
    exit 3
fi
{ timeout 60 apt-get update -qq; DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 timeout 180 apt-get install -y -qq --no-install-recommends "$@"; } \
    >/tmp/coati-bench-apt.log 2>&1 || { tail -5 /tmp/coati-bench-apt.log >&2; exit 3; }
