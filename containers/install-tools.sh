#!/usr/bin/env bash
# What building images takes (mmdebstrap, buildah, squashfs-tools) and what runs cells in them (Apptainer), on Debian 12 as root with apt.
# What is there is left alone; elsewhere it says what is missing and ends with exit code 3. Who is not root may have podman or docker instead.
set -euo pipefail
cd "$(dirname "$0")"

missing() { local program; for program in "$@"; do command -v "$program" >/dev/null || echo "$program"; done; }

lacking=$(missing mmdebstrap buildah mksquashfs apptainer | tr '\n' ' ')
[ "$(id -u)" = 0 ] || [ "$lacking" != "apptainer " ] || [ "$(missing podman docker | wc -l)" = 2 ] || lacking=
[ -n "$lacking" ] || { echo "the tools for images are here; nothing to do"; exit 0; }
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install-tools: images need ${lacking% }; seen: $([ "$(id -u)" = 0 ] && echo 'no apt' || echo "uid $(id -u)"); root on Debian 12, or the site's own would be right" >&2
    exit 3
fi
echo "installing what is missing: $lacking"
[ -z "$(missing mmdebstrap buildah mksquashfs)" ] || ./apt-packages.sh mmdebstrap buildah squashfs-tools
[ -z "$(missing apptainer)" ] || { [ -z "$(missing patchelf)" ] || ./apt-packages.sh patchelf; timeout 240 ./install-apptainer.sh; }
