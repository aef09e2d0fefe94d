#!/usr/bin/env bash
# What only a GPU can show, as one command in stages that each end within minutes:
#
#   benchmarks/run_gpu.sh [--dry-run] OUT [STAGE...]
#
#   install     build and install this clone where it stands, without network
#   info        dlkern info; the device's copy bandwidth and matrix rate
#   launches    every launch configuration against float64, in every dtype
#   tests       the whole test suite; DLKERN_EXAMPLES_TIMES (default 10) times the random cases
#   memcheck racecheck initcheck synccheck    compute-sanitizer over small shapes of every op
#   ops         each op's cases against eager (cuDNN), in CUDA graphs on a cold cache
#   compile     the same against torch.compile
#   models      training steps and inferences, plain, swapped, frozen
#
# Without a STAGE: all of them in this order. A stage that has ended well is not run again (remove build/gpu/STAGE.done
# to have it so): a run that was cut off goes on where it stopped. After every stage OUT holds summary.txt and
# evidence.tar.gz: logs, and under results/<device> the files to commit in benchmarks/results.
# STAGE_SECONDS (default 560) is a stage's limit. DLKERN_COMMIT names the commit where there is no .git.
# --dry-run runs each stage's CPU form: a short one, on a machine without a GPU.
set -uo pipefail

dry=0
if [[ ${1:-} == --dry-run ]]; then dry=1 && shift; fi
if (($# < 1)); then
    sed -n '2,20p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
every=(install info launches tests memcheck racecheck initcheck synccheck ops compile models)
stages=("${@:-${every[@]}}")
cd "$root" || exit 2
work=$root/build/gpu
if ((dry)); then work=$out/work; fi
mkdir -p "$work/evidence"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 DLKERN_EXAMPLES_TIMES=${DLKERN_EXAMPLES_TIMES:-10}
if ((dry)); then export DLKERN_EXAMPLES_TIMES=1; fi

# tests NAME ARGUMENTS...: pytest with an evidence file; in parallel where pytest-xdist is there and N is set
tests() {
    local name=$1 parallel=()
    shift
    if [[ -n ${N:-} ]] && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$N"); fi
    rm -f "$work/evidence/$name".*
    "${under[@]}" "$python" -m pytest -q -p no:cacheprovider --junitxml "$work/$name.xml" \
        --evidence "$work/evidence/$name.json" "${parallel[@]}" "$@"
}

# bench FILE ARGUMENTS...: one benchmark into the results
bench() {
    local file=$1
    shift
    "$python" -m pytest -q -p no:cacheprovider "benchmarks/bench_$file.py" --results-dir "$work/results" "$@"
}

stage_install() {
    if ((dry)); then
        "$python" -c "import dlkern, pathlib; print(pathlib.Path(dlkern.__file__).parent)"
        return
    fi
    DLKERN_REQUIRE_EXTENSION=1 DLKERN_BUILD_CUDA=1 "$python" -m pip install -v --no-deps --no-build-isolation -e .
}

stage_info() {
    "$python" -m dlkern info && "$python" -m dlkern info --json >"$work/info.json" || return 1
    if ((dry)); then
        bench device --min-seconds 0.05
    else
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv
        bench device --min-seconds 2
    fi
}

LAUNCHES=(tests/test_triton_launch.py tests/test_conv_bn_act_triton.py tests/test_depthwise_triton.py
    tests/test_transposed_triton.py tests/test_attention_triton.py tests/test_recurrent_triton.py)

stage_launches() {
    if ((dry)); then
        tests launches "${LAUNCHES[@]}" -k "planes and float32"
    else
        N=8 tests launches "${LAUNCHES[@]}" tests/test_small_shapes.py
    fi
}

stage_tests() {
    if ((dry)); then
        tests tests tests/test_guard.py tests/test_dispatch.py tests/test_small_shapes.py -k "guard or forced or elu"
    else
        N=8 tests tests tests
    fi
}

sanitize() {
    if ((dry)); then
        tests "$1" tests/test_small_shapes.py -k "elu"
        return
    fi
    local -x DLKERN_SANITIZER=$1 PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local under=(compute-sanitizer --tool "$1" --error-exitcode 99 --target-processes all --launch-timeout 120
        --kernel-name-exclude kernel_substring=at:: --log-file "$work/$1.report.txt")
    tests "$1" tests/test_small_shapes.py && return 0
    rm -f "$work/evidence/$1".* # what the sanitizer complains of is no evidence
    return 1
}

stage_memcheck() { sanitize memcheck; }
stage_racecheck() { sanitize racecheck; }
stage_initcheck() { sanitize initcheck; }
stage_synccheck() { sanitize synccheck; }

stage_ops() {
    if ((dry)); then
        bench batch_norm_act -k "8x512x7x7-nchw-training-float32 and cpu and not residual" --min-seconds 0.05
        return
    fi
    local op
    for op in batch_norm_act conv_bn_act depthwise atrous transposed attention recurrent; do
        bench $op -k "not compile" --min-seconds 0.15 || return 1
    done
}

stage_compile() {
    if ((dry)); then
        bench batch_norm_act -k "8x512x7x7-nchw-training-float32 and eager and not residual" --min-seconds 0.05 \
            --results-suffix=-compile
        return
    fi
    local op
    for op in batch_norm_act conv_bn_act depthwise atrous transposed; do
        bench $op -k "compile" --min-seconds 0.15 --results-suffix=-compile || return 1
    done
}

stage_models() {
    if ((dry)); then
        bench models --model torchvision:resnet18 --batch 1 --image-size 32 --min-seconds 0.05 -k "nchw and inference"
    else
        bench models --model torchvision:resnet50 --model torchvision:mobilenet_v2 --dtype float16 --batch 64 \
            --image-size 224 --min-seconds 4 -k channels_last
    fi
}

pack() {
    if compgen -G "$work/evidence/*.json" >/dev/null; then
        "$python" -m benchmarks.support "$work"/evidence/*.json --merge "$work/support.json" 2>&1
    fi
    tar -czf "$out/evidence.tar.gz" -C "$work" .
    cp "$work/summary.txt" "$out/summary.txt"
}

under=(env) # what runs the tests: a sanitizer, where a stage says so
failed=0
for stage in "${stages[@]}"; do
    if [[ $(type -t "stage_$stage") != function ]]; then
        echo "unknown stage $stage; expected some of: ${every[*]}" >&2
        exit 2
    fi
done
for stage in "${stages[@]}"; do
    if [[ -e $work/$stage.done ]]; then
        echo "=== $stage: done before"
        continue
    fi
    echo "=== $stage"
    begun=$SECONDS code=0
    (
        # the stage and whatever it started end together
        "stage_$stage" &
        child=$!
        (sleep "${STAGE_SECONDS:-560}" && echo "the stage's limit is over" && pkill -TERM -P $child && kill $child) 2>/dev/null &
        watch=$!
        wait $child
        code=$?
        pkill -P $watch 2>/dev/null
        kill $watch 2>/dev/null
        exit $code
    ) >"$work/$stage.log" 2>&1 || code=$?
    tail -n 6 "$work/$stage.log"
    verdict=ok
    if ((code != 0)); then verdict="FAILED with exit code $code" failed=$((failed + 1)); else touch "$work/$stage.done"; fi
    echo "$stage: $verdict, $((SECONDS - begun)) s" | tee -a "$work/summary.txt"
    pack
done
echo "$((${#stages[@]} - failed)) of ${#stages[@]} stages ok; $out/evidence.tar.gz"
((failed == 0))
