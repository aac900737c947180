#!/bin/sh
# PostgreSQL for tests/ledger: nothing to do when it is installed, else Debian's own, without starting a service.
# Without it those tests are skipped, unless POD_TEST_POSTGRESQL=required.
set -eu

for initdb in "$(command -v initdb || true)" /usr/lib/postgresql/*/bin/initdb; do
  if [ -x "$initdb" ]; then exit 0; fi
done

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing postgresql for the ledger's tests"
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  # The tests make clusters of their own.
  mkdir -p /etc/postgresql-common
  [ -e /etc/postgresql-common/createcluster.conf ] ||
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
  if apt-get update -qq >"$log" 2>&1 && apt-get install -y -qq --no-install-recommends \
    -o Dpkg::Options::=--force-confold postgresql >>"$log" 2>&1; then
    exit 0
  fi
  tail -n 3 "$log" >&2
fi

echo "NOTE: no PostgreSQL here: its tests are skipped (on Debian: apt-get install postgresql)" >&2
[ "${POD_TEST_POSTGRESQL:-}" != required ]
