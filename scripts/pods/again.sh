#!/usr/bin/env bash
# Runs a command, and again while its exit status says that another start goes on (docs/reliability.md).
#
#   scripts/pods/again.sh gaze-jax train --config=... --workdir=...
#
# TRIES=100   starts at most
# WAIT=10     seconds between them: all hosts of a pod end at about the same time, and start again together
# NOTE=FILE   gets the status with which it ends, if another start would not help; for a launcher that starts again
#
# SIGTERM is passed on; the run saves, and this ends with its status instead of starting it again.

tries="${TRIES:-100}" wait_s="${WAIT:-10}" note="${NOTE:-}"
asked="" child=""
trap 'asked=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM

for ((start = 1; start <= tries; start++)); do
  "$@" &
  child=$!
  while :; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break   # a signal ends wait, not the command
  done
  case "$status" in
    0) exit 0 ;;
    # 1 a bug, 2 yours to mend, 3 done but for some, 4 the numbers went wrong, 130 Ctrl-C
    1 | 2 | 3 | 4 | 130)
      [[ -z $note ]] || echo "$status" > "$note"
      exit "$status" ;;
  esac
  [[ -z $asked ]] || exit "$status"
  echo "again.sh: start $start of $tries ended with status $status" >&2
  sleep "$wait_s" &
  child=$!
  wait "$child"
  [[ -z $asked ]] || exit "$status"
done
exit "$status"
