#!/bin/sh
# A browser for tests/browser: nothing to do when one is installed, else Debian's own, else playwright's.
set -eu

for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done

log=$(mktemp)
trap 'rm -f "$log"' EXIT

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing chromium for the browser tests"
  export DEBIAN_FRONTEND=noninteractive
  if apt-get update -qq >"$log" 2>&1 && apt-get install -y -qq --no-install-recommends chromium >>"$log" 2>&1; then
    exit 0
  fi
  tail -n 3 "$log" >&2
fi

playwright=$(dirname "$0")/../../.venv/bin/playwright
if [ -x "$playwright" ] && "$playwright" install chromium >"$log" 2>&1; then exit 0; fi

echo "the browser tests need chromium: install it (on Debian: apt-get install chromium) and try again" >&2
exit 1
