#!/bin/sh
# Checks and tests the project, on a machine with Python (pip and venv) and the net.
#
#     sh tests/run.sh [--long] [pytest's arguments]
#
# --long also tests what takes long: each server with each client, rarer cases, real patience, many
# kills, the oldest boto3, the pictures. PYTHON names the interpreter that the virtual environment is made
# with; python3 otherwise.
set -eu
cd -- "$(dirname -- "$0")/.."

venv=.venv
python=${PYTHON:-python3}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "tests/run.sh: $python lacks pip and venv; on Debian or Ubuntu: apt install python3-venv" >&2
    exit 2
fi
bin=$venv/$("$python" -c 'import os; print("Scripts" if os.name == "nt" else "bin", end="")')

# What the environment was made of: another interpreter or other requirements make it anew.
wanted=$("$python" -c 'import sys; print(sys.version)' &&
    cat requirements.txt tests/requirements.txt)
if [ "$wanted" != "$(cat "$venv/made-of" 2>/dev/null || true)" ]; then
    "$python" -m venv --clear "$venv"
    # Compiled when it is imported: most of it never is.
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        -r requirements.txt -r tests/requirements.txt
    printf '%s\n' "$wanted" > "$venv/made-of"
fi

status=0
check() {
    printf '== %s\n' "$*"
    "$bin/python" -m "$@" || status=1
}

# In memory, where there is room, no test waits for a disk that others keep busy.
free_kib=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')
if [ "${free_kib:-0}" -gt 2000000 ]; then
    export TMPDIR="${TMPDIR:-/dev/shm}"
fi

# All of them, whatever one of them says: a failed check hides no failed test.
check ruff check
check ruff format --check
"$bin/python" -m mypy s3FileTransfer.py tests > "$venv/mypy.log" 2>&1 & # while the tests run
mypy=$!
check pytest -n 4 --dist worksteal "$@"
printf '== mypy s3FileTransfer.py tests\n'
wait "$mypy" || status=1
cat "$venv/mypy.log"
exit "$status"
