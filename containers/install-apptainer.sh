#!/usr/bin/env bash
# Put Apptainer into /opt/apptainer on Debian 12, whose archive has none. Needs root, apt and patchelf; touches no package.
# Debian's unstable has it, built against a newer C library, so that library comes beside it and the two programs are told
# where it lies. A site with its own Apptainer needs none of this.
#
#   containers/install-apptainer.sh [FOLDER WITH THE FOUR .deb FILES]
#
# The mirror is the one that apt is set up with, or the variable MIRROR.
set -euo pipefail
PREFIX=/opt/apptainer
WANTED=(apptainer/sid libc6/trixie libseccomp2/trixie libsqlite3-0/trixie)
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

if command -v apptainer >/dev/null && apptainer --version >/dev/null 2>&1; then
    echo "$(apptainer --version) is here; nothing to do"
    exit 0
fi
[ "$(id -u)" = 0 ] || { echo "install-apptainer: root is needed; seen: uid $(id -u); or ask the site for Apptainer 1.2 or newer" >&2; exit 3; }
for program in patchelf dpkg-deb apt-get; do
    command -v "$program" >/dev/null || { echo "install-apptainer: $program is missing; on Debian: apt install $program" >&2; exit 3; }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

download() { # the four packages, by a private apt that knows the newer releases
    mkdir -p "$work"/{lists,cache/archives}/partial
    local mirror=${MIRROR:-$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)}
    if [ -z "$mirror" ]; then
        echo "install-apptainer: no mirror is known; seen: no URIs in /etc/apt/sources.list.d/debian.sources; MIRROR=http://... would be right" >&2
        exit 3
    fi
    printf 'deb [signed-by=%s] %s %s main\n' "$KEYRING" "$mirror" trixie "$KEYRING" "$mirror" sid >"$work/sources.list"
    cat >"$work/apt.conf" <<CONF
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$work/lists";
Dir::Cache "$work/cache";
APT::Sandbox::User "root";
CONF
    APT_CONFIG=$work/apt.conf apt-get -qq update
    (cd "$work" && APT_CONFIG=$work/apt.conf apt-get -qq download "${WANTED[@]}")
}

if [ $# -ge 1 ]; then cp "$1"/*.deb "$work/"; else download; fi
for file in "$work"/*.deb; do dpkg-deb -x "$file" "$work/root"; done

rm -rf "$PREFIX.new"
mkdir -p "$PREFIX.new"/{bin,lib,var/lib/apptainer/mnt/session}
libraries=$work/root/usr/lib/x86_64-linux-gnu
cp -a "$work/root/usr/bin/apptainer" "$PREFIX.new/bin/"
cp -a "$work/root/etc/apptainer" "$PREFIX.new/etc-apptainer"
mkdir -p "$PREFIX.new/etc" "$PREFIX.new/lib/x86_64-linux-gnu"
mv "$PREFIX.new/etc-apptainer" "$PREFIX.new/etc/apptainer"
cp -a "$libraries/apptainer" "$PREFIX.new/lib/x86_64-linux-gnu/"
for name in ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 libresolv.so.2 librt.so.1 libseccomp.so.2 libsqlite3.so.0; do
    cp -L "$libraries/$name" "$PREFIX.new/lib/"
done
for program in bin/apptainer lib/x86_64-linux-gnu/apptainer/bin/starter; do
    patchelf --set-interpreter "$PREFIX/lib/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$PREFIX/lib" "$PREFIX.new/$program"
done
# the starter takes the folder three above itself for its prefix, which is lib/ here
for name in bin etc var; do ln -s "../$name" "$PREFIX.new/lib/$name"; done
ln -s . "$PREFIX.new/lib/lib"
# root without every capability (in a virtual machine or a container) cannot give them all away
sed -i 's/^root default capabilities = .*/root default capabilities = no/' "$PREFIX.new/etc/apptainer/apptainer.conf"
rm -rf "$PREFIX"
mv "$PREFIX.new" "$PREFIX"
ln -sfn "$PREFIX/bin/apptainer" /usr/local/bin/apptainer
apptainer --version
