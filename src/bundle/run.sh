#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the GPU suite on a machine with a driver alone.
#
#   ./run.sh [--device cuda:0] [PART...]
#
#   native     the native tests
#   sanitizer  the native tests on small shapes under compute-sanitizer: memcheck, racecheck, initcheck and synccheck,
#              or those of them in TOOLS. Calls that fail on purpose, such as an allocation of 2^60 bytes, are no
#              findings. Racecheck gets one host thread: it looks for races within a kernel, and loses track of what
#              several threads launch at once ("Internal Sanitizer Error: ... failure to track a kernel launch").
#   java       the JUnit tests that need a GPU, under -Xcheck:jni; forwards of the soak test in SOAK, by default 8000
#   verify     the command line on the recorded layers of real checkpoints
#   bench      the native micro-benchmark; its arguments in BENCH_ARGS
#   jmh        the JMH benchmarks of calls from Java; its arguments in JMH_ARGS, by default short (2 minutes)
#
# Without a part: native, sanitizer, java, verify. One line a step, PASS, FAIL or SKIP with the reason; the output of a
# step is in logs/ and, where it failed, on the screen. Exit status: 0 nothing failed, 1 something did, 2 bad usage.
# With --device cpu the same steps run on the CPU.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
device=cuda:0
parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift ;;
    native | sanitizer | java | verify | bench | jmh) parts+=("$1") ;;
    *) sed -n '3,22s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(native sanitizer java verify)
logs=${LOGS:-$PWD/logs}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$logs"
native=(env "LD_LIBRARY_PATH=$here/natives/io/octolora/runtime/linux-x86_64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
class_path=$here/natives:$here/lib/cuda-types:$(printf '%s:' "$here"/lib/*.jar)
java=("$here/jre/bin/java" -Dorg.bytedeco.javacpp.cachedir="$scratch/cache" -Djava.io.tmpdir="$scratch" -Xcheck:jni)
failed=0

step() { # name, command...
  local name=$1 log=$logs/${1//[ \/]/_}.log start=$SECONDS status
  shift
  "$@" >"$log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    echo "PASS  $name  ($((SECONDS - start)) s)"
  else
    failed=1
    tail -n 60 "$log"
    echo "FAIL  $name  (status $status, $((SECONDS - start)) s, $log)"
  fi
}

native_part() {
  local test
  for test in "$here"/native/*_test; do
    step "native $(basename "$test")" "${native[@]}" "$test" --device "$device"
    tail -n 1 "$logs/native_$(basename "$test").log"
  done
}

sanitizer_part() {
  local sanitizer test tool threads
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
  if [ "$device" = cpu ]; then
    echo "SKIP  sanitizer: compute-sanitizer watches CUDA devices, and this run is on the CPU"
    return
  elif [ -z "$sanitizer" ]; then
    echo "SKIP  sanitizer: no compute-sanitizer in PATH or /usr/local/cuda/bin"
    return
  fi
  for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
    for test in "$here"/native/*_test; do
      threads=()
      [ "$tool" = racecheck ] && threads=(--one-thread)
      step "sanitizer $tool $(basename "$test")" \
        "${native[@]}" "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 86 \
        "$test" --device "$device" --quick "${threads[@]}"
    done
  done
}

# Passes only where tests ran, none was given up for want of the device, and -Xcheck:jni was silent.
junit() {
  local out=$scratch/junit.log status
  "${java[@]}" --enable-native-access=ALL-UNNAMED -Doctolora.fixtures="$here/fixtures" \
    ${SOAK:+-Doctolora.soak.forwards="$SOAK"} \
    -cp "$class_path$here/test-classes" org.junit.platform.console.ConsoleLauncher execute --disable-banner \
    --disable-ansi-colors --fail-if-no-tests --details=verbose --config "jqwik.database=$scratch/jqwik" \
    --scan-classpath "$here/test-classes" "$@" 2>&1 | tee "$out"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || return "$status"
  grep -aEq '\[ +[1-9][0-9]* tests successful' "$out" || return 3
  grep -aEq '\[ +0 containers aborted' "$out" || return 4
  ! grep -aq 'in native method' "$out" || return 5
}

java_part() {
  local tags=(--include-tag gpu)
  [ "$device" = cpu ] && tags=(--exclude-tag gpu)
  step java junit "${tags[@]}"
  grep -aE 'tests (successful|failed|aborted|skipped)|skipped:|forwards on|one copy|in native method' "$logs/java.log"
  echo "the longest, in milliseconds:"
  awk '/ uniqueId: / { id = $0; gsub(/.*uniqueId: \[[^]]*\]\/|\[|\]|class:|method:|test-template[a-z-]*:/, "", id) }
    / duration: / { print $(NF - 1), id }' "$logs/java.log" | sort -rn | head -n 12
}

# base, recording, threshold or -, adapters
recorded_layers() {
  local base=$here/fixtures/flux/$1 golden=$here/fixtures/flux/golden/$2 adapters=() adapter threshold=()
  [ "$3" = - ] || threshold=(--threshold "$3")
  shift 3
  for adapter in "$@"; do
    adapters+=("$here/fixtures/flux/adapters/${adapter/=/\/diffusers_lora.safetensors=}")
  done
  if ! [ -f "$golden.safetensors" ]; then
    local end
    for end in safetensors json; do
      gzip -dc "$golden.$end.gz" >"$scratch/$(basename "$golden").$end" || return
    done
    golden=$scratch/$(basename "$golden")
  fi
  "${java[@]}" -cp "$class_path" io.octolora.cli.Main verify "$base" "${adapters[@]}" "${threshold[@]}" \
    --golden "$golden.safetensors" --device "$device"
}

verify_part() {
  step "verify bnb8 r4" recorded_layers base_bnb8 bnb8__r4 - r4=1
  step "verify bnb8 r4 threshold 0" recorded_layers base_bnb8 bnb8__r4__t0 0 r4=1
  step "verify bnb8 two adapters" recorded_layers base_bnb8 bnb8__r4+r8_attn_bf16 - r4=0.7 r8_attn_bf16=0.4
  step "verify quanto r4" recorded_layers base_quanto_diffusers quanto_diffusers__r4 - r4=1
  step "verify quanto two adapters" recorded_layers base_quanto_diffusers quanto_diffusers__r4+r8_attn_bf16 - r4=0.7 \
    r8_attn_bf16=0.4
  grep -hE '^OK:' "$logs"/verify_*.log
}

bench_part() {
  # shellcheck disable=SC2086
  step bench "${native[@]}" "$here/native/octolora_bench" --device "$device" ${BENCH_ARGS:-}
  cat "$logs/bench.log"
}

jmh_part() {
  # shellcheck disable=SC2086
  step jmh "${java[@]/-Xcheck:jni/-ea}" -cp "$class_path$here/lib/commons-math3:$here/benchmarks" \
    org.openjdk.jmh.Main 'benchmarks\.gpu\.' -p device="$device" -foe true ${JMH_ARGS:--wi 1 -w 200ms -i 3 -r 200ms}
  sed -n '/^Benchmark .*Score/,$p' "$logs/jmh.log"
}

for part in "${parts[@]}"; do
  "${part}_part"
done
[ $failed -eq 0 ] && echo "PASS  everything on $device" || echo "FAIL  see above"
exit $failed
