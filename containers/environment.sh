# The environment: Debian and the locked packages. Its digest is committed; this package comes on it as a layer of its own.
# It runs as root of the checked root file system, without a network; what it is given lies in /environment, the checked wheels in /wheelhouse.
set -eu
umask 022
export PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
install -D -m 644 /environment/90-environment.sh /.singularity.d/env/90-environment.sh
install -D -m 644 -t /opt/coati-bench/locks /environment/wheels.txt /environment/sources.txt

# Byte code: none while sources are built (their order of imports is not fixed), all of it at the end, checked by no time stamp.
# Only compileall may fail: some packages bring files that are no Python of this version.
export PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 PIP_NO_INDEX=1 PIP_NO_CACHE_DIR=1 PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore PIP_FIND_LINKS=/wheelhouse PIP_REQUIRE_HASHES=1
python3 -m venv /opt/venv
python -m pip install -q --no-deps --no-compile --only-binary :all: -r /opt/coati-bench/locks/wheels.txt
python -m pip install -q --no-deps --no-compile --no-build-isolation -r /opt/coati-bench/locks/sources.txt
find /opt/venv -name __pycache__ -prune -exec rm -rf {} +
python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib >/dev/null || echo "some files have no byte code"
rm -rf /tmp/* /root/.cache

# `useradd` writes the day into /etc/shadow, that of SOURCE_DATE_EPOCH if it is told, and leaves copies of what it changes.
useradd --no-log-init --uid 1000 --create-home bench
rm -f /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /etc/subuid- /etc/subgid-
