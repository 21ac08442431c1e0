#!/bin/sh
# Makes tests/pictures/terminal.svg anew, with the virtual environment that tests/run.sh makes.
#
#     sh tests/pictures/run.sh
#
# It works in an empty /srv, which a mount namespace of its own shows it (Linux).
# PYTHON names another interpreter that has what tests/requirements.txt asks for.
set -eu
cd -- "$(dirname -- "$0")/../.."
exec unshare --map-root-user --mount sh -c 'mount -t tmpfs none /srv && exec "$@"' sh \
    "${PYTHON:-.venv/bin/python}" tests/pictures/terminal.py "$@"
