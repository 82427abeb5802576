#!/usr/bin/env bash
# Runs the store's tests against a real PostgreSQL of its own: a server of Debian's package on a
# free port of the loopback, in a temporary folder, stopped and deleted at the end.
#
#   tests/store/with_postgres.sh [COMMAND...]      default: python -m pytest -m postgres tests/store
#
# PGBIN names another folder of PostgreSQL programs. The server refuses to run as root, so root
# lends it to the user postgres, whom the package makes.
set -euo pipefail

bin="${PGBIN:-$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)}"
if [ ! -x "$bin/initdb" ]; then
    echo "PostgreSQL is not installed: apt-get install postgresql, or set PGBIN" >&2
    exit 1
fi

folder="$(mktemp -d)"
port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
as_owner() { (cd "$folder" && "$@"); }
if [ "$(id -u)" = 0 ]; then
    chown postgres "$folder"
    as_owner() { (cd "$folder" && runuser -u postgres -- "$@"); }
fi
finish() {
    as_owner "$bin/pg_ctl" --pgdata="$folder/data" --mode=immediate stop >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap finish EXIT

as_owner "$bin/initdb" --pgdata="$folder/data" --username=lab --auth=trust --encoding=UTF8 \
    --locale=C.UTF-8 >/dev/null
as_owner "$bin/pg_ctl" --pgdata="$folder/data" --log="$folder/log" --wait start \
    --options="-c listen_addresses=127.0.0.1 -p $port -k $folder -c fsync=off" >/dev/null
as_owner "$bin/createdb" --host=127.0.0.1 --port="$port" --username=lab lab

export GPTLAB_REQUIRE=postgres
export GPTLAB_TEST_POSTGRES_URL="postgresql://lab@127.0.0.1:$port/lab"
echo "PostgreSQL $("$bin/postgres" --version | grep -o '[0-9.]*' | head -1) at $GPTLAB_TEST_POSTGRES_URL"
if [ $# -eq 0 ]; then
    set -- python -m pytest -m postgres tests/store
fi
"$@"
