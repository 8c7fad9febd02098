#!/bin/sh
# Runs a program, and runs it again if it crashes: at most RESTARTS times (3). For launchers that start a rank
# only once: srun ... restart.sh ./program, mpirun ... restart.sh ./program
#
# It hands SIGTERM and SIGINT on, and ends with the program's last exit code. A driver that is asked to end and saves a
# checkpoint ends with 0, as if it were done. For a launcher that shall start it again then, set CODE_IF_ASKED to the
# exit code that it wants to see instead, such as 143.
set -u

asked=
child=
ask() {
    asked=$1
    if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; fi
}
trap 'ask TERM' TERM
trap 'ask INT' INT

left=${RESTARTS:-3}
while :; do
    "$@" &
    child=$!
    # A signal ends `wait`, but not the program.
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    # 130 and 143: it was asked to end. A code up to 128: it ended by itself.
    if [ "$code" -eq 0 ] && [ -n "$asked" ]; then
        exit "${CODE_IF_ASKED:-0}"
    fi
    if [ "$code" -le 128 ] || [ "$code" -eq 130 ] || [ "$code" -eq 143 ] || [ -n "$asked" ] || [ "$left" -eq 0 ]; then
        exit "$code"
    fi
    left=$((left - 1))
    echo "$1 ended with $code; starting it again, at most $left more times" >&2
done
