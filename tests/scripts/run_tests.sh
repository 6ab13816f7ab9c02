#!/bin/sh
# run_tests.sh LABEL PROGRAM RUNNER [ARGUMENT...]: runs a test program (through RUNNER: an emulator, valgrind, or '') once per
# instruction set that it can use here (or those in TFM_ISAS; "best" is the last of them), and adds up. Fails when a test
# fails and when none ran.
label=$1 program=$2 runner=$3
shift 3
directory=$(dirname "$program")
case $program in *.exe) suffix=.exe ;; *) suffix= ;; esac
isas=$($runner "$directory/isas$suffix") || { echo "$label: 0 passed, 1 failed (isas)"; exit 1; }
isas=$(echo "$isas" | tr -d '\r') # by itself: a pipe has the status of its end
case $TFM_ISAS in
'') ;;
best) isas=$(echo "$isas" | tail -n 1) ;;
*) isas=$TFM_ISAS ;;
esac
[ -n "$isas" ] || { echo "$label: 0 passed, 1 failed (no instruction set)"; exit 1; }
passed=0 failed=0 skipped=0
log=$directory/log
for isa in $isas; do
    # shellcheck disable=SC2086
    TFM_ISA=$isa timeout "${TFM_TIMEOUT:-1500}" $runner "$program" "$@" >"$log-$isa.txt" 2>&1
    status=$?
    # Criterion's closing line, or the stand-in's
    line=$(tr -d '\r' <"$log-$isa.txt" | sed -n \
        -e 's/.*Synthesis: Tested: .*Passing: [^0-9]*\([0-9]*\).*Failing: [^0-9]*\([0-9]*\).*Crashing: [^0-9]*\([0-9]*\).*/\1 \2 \3 0/p' \
        -e 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 0 \3/p' | tail -n 1)
    p=$(echo "${line:-0 0 0 0}" | cut -d' ' -f1)
    f=$(echo "${line:-0 0 0 0}" | awk '{ print ($2 > $3) ? $2 : $3 }') # a crash counts as a failure already
    s=$(echo "${line:-0 0 0 0}" | cut -d' ' -f4)
    [ "$s" != 0 ] || s=$(grep -ac "^\[SKIP\]" "$log-$isa.txt") # Criterion names them, but does not count them
    if [ $status -ne 0 ] && [ "$f" = 0 ]; then f=1; fi
    if [ $((p + f + s)) -eq 0 ]; then f=1; fi
    [ "$f" = 0 ] || { grep -av "^\[RUN \]\|^\[PASS\]" "$log-$isa.txt"; echo "($label on $isa: exit status $status)"; }
    echo "  $label on $isa: $p passed, $f failed, $s skipped"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "$label: $passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
