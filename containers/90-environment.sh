# Apptainer reads this from a bare squashfs, which carries no image configuration.
export PATH="/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export VIRTUAL_ENV=/opt/venv LANG="${LANG:-C.UTF-8}"
