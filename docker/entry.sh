#!/bin/sh
# Runs one node: the first time it creates its pod or joins one, afterwards it only runs. Works the same in a
# container and as a plain process; every setting is an environment variable, and so are those of `pod up`.
#
#   POD_HOME           where the node keeps its state (required)
#   POD_MEMBER         this member's name
#   POD_NAME           create a pod of this name
#   POD_INVITE_FILES   ... and write an invite for one machine into each of these files (paths without spaces)
#   POD_MODEL          ... and have the pod serve this model
#   POD_SPLIT          ... over at least so many stages
#   POD_INVITE_FILE    or join with the invite in this file, once it is there
#   POD_INVITE         or join with this invite
#   POD_INVITE_WAIT_S  how long to wait for that file (default 300)
#
# With arguments it runs those instead: `docker run -it gpu-pod pod demo`.
set -eu
umask 077
# The first process of a container ignores signals it has no handler for; exec takes this one away again.
trap 'exit 143' TERM INT

fail() {
    echo "entry.sh: $1" >&2
    exit 1
}

is_in_pod() {
    [ -e "$POD_HOME/roster.log" ]
}

# Each step of the creation leaves a note, so that a start after an interruption goes on where it stopped.
once() {
    note="$POD_HOME/entry/$1"
    shift
    [ -e "$note" ] || { "$@" && mkdir -p "${note%/*}" && : >"$note"; }
}

write_invite() {
    # Moved into place, so that nobody reads half of it.
    pod invite --uses 1 --expires 24h >"$1.new" && mv "$1.new" "$1"
}

create() {
    is_in_pod || pod create "$POD_NAME" --member "$POD_MEMBER"
    number=0
    for file in ${POD_INVITE_FILES:-}; do
        number=$((number + 1))
        once "invited-$number" write_invite "$file"
    done
    if [ -n "${POD_MODEL:-}" ]; then
        once model pod model add "$POD_MODEL" ${POD_SPLIT:+--split "$POD_SPLIT"}
    fi
    exec pod up
}

wait_for_invite() {
    waited_s=0
    until [ -s "$1" ]; do
        [ "$waited_s" -lt "${POD_INVITE_WAIT_S:-300}" ] || fail "no invite in $1 after $waited_s s"
        sleep 1
        waited_s=$((waited_s + 1))
    done
}

join() {
    if [ -z "${POD_INVITE:-}" ]; then
        wait_for_invite "$POD_INVITE_FILE"
        POD_INVITE=$(cat "$POD_INVITE_FILE")
    fi
    exec pod join "$POD_INVITE" --member "$POD_MEMBER"
}

[ $# -eq 0 ] || exec "$@"
[ -n "${POD_HOME:-}" ] || fail "set POD_HOME to the directory for this node's state"
if [ -z "${POD_NAME:-}" ] && is_in_pod; then
    exec pod up
fi
[ -n "${POD_MEMBER:-}" ] || fail "set POD_MEMBER to this member's name"
if [ -n "${POD_NAME:-}" ]; then
    create
elif [ -n "${POD_INVITE:-}${POD_INVITE_FILE:-}" ]; then
    join
fi
fail "set POD_NAME to create a pod, or POD_INVITE or POD_INVITE_FILE to join one"
