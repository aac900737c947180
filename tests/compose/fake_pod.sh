#!/bin/sh
# Stands in for `pod`: writes down how it was called, and leaves what the real one would leave.
echo "$*" >>"$FAKE_POD_CALLS"
case "$1" in
    create) mkdir -p "$POD_HOME" && : >"$POD_HOME/roster.log" ;;
    invite) echo "pod-invite-for-test"; echo "Shown once" >&2 ;;
    join) mkdir -p "$POD_HOME" && : >"$POD_HOME/roster.log" ;;
    model) [ -z "${FAKE_POD_MODEL_FAILS:-}" ] || { echo "no such model" >&2; exit 1; } ;;
    up) echo "up as process $$" ;;
esac
