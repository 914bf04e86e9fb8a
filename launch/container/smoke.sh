#!/usr/bin/env bash
# See whether an image works, in a few minutes: launch/container/smoke.sh IMAGE [--gpu]
#
#   launch/container/smoke.sh tpp                # made by docker (or podman: TPP_DOCKER=podman)
#   launch/container/smoke.sh tpp.sif --gpu      # made by apptainer
#   launch/container/smoke.sh --here             # no image: this environment, from this folder
#
# The commands start, DALI and DeepSpeed are imported, and a small run goes from the dense network to
# the pruned one, on the CPU, as whoever calls. --gpu: the cards are looked at, and the run is on one.
set -euo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
show_help() { # the comment at the head
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}
case "${1:-}" in
  -h | --help) show_help && exit ;;
  "")
    echo "error: IMAGE is missing" >&2
    show_help >&2
    exit 2
    ;;
  --here) needs="env" ;;
  -*) fail "$1: IMAGE comes first, or --here" ;;
  *.sif)
    needs=apptainer
    [[ -e "$1" ]] || fail "$1: there is no such file; apptainer build makes it, see docs/cluster.md"
    ;;
  *) needs="${TPP_DOCKER:-docker}" ;;
esac
for word in "${@:2}"; do
  [[ "$word" == --gpu ]] || fail "$word: behind the image only --gpu is understood"
done
command -v "$needs" >/dev/null || fail "$1: $needs is not found here, and starts this image"
image="$1" gpu="${2:-}"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
hidden=(CUDA_VISIBLE_DEVICES=)
if [[ "$gpu" == --gpu ]]; then hidden=(); fi

case "$image" in
  --here) inside=(env "${hidden[@]}") ;;
  *.sif)
    inside=(apptainer exec --bind "$out" --pwd /opt/tpp)
    if [[ "$gpu" == --gpu ]]; then inside+=(--nv); else inside+=(--env CUDA_VISIBLE_DEVICES=); fi
    inside+=("$image")
    ;;
  *)
    chmod 777 "$out" # the image's user is another one
    inside=("${TPP_DOCKER:-docker}" run --rm --volume "$out:$out" --shm-size 2g)
    if [[ "$gpu" == --gpu ]]; then inside+=(--gpus all); fi
    inside+=("$image")
    ;;
esac

step() {
  echo "== $1"
  shift
  "${inside[@]}" "$@" || fail "$image: '$*' ends with $?"
}

step "commands" tpp --version
step "commands" sh -c 'tpp --help >/dev/null && tpp train --help >/dev/null && tpp cards'
step "libraries" python -c 'import nvidia.dali, deepspeed, accelerate, torch
print("DALI", nvidia.dali.__version__, "DeepSpeed", deepspeed.__version__, "PyTorch", torch.__version__)'
step "nobody is root" sh -c 'test "$(id -u)" != 0 || echo "as root: $(id)"'
small=(--config configs/demo.yaml "data.root=$out/data" data.demo.train_per_class=40
  data.demo.val_per_class=10 training.batch_size=40 stages.dense.epochs=1 method.delta=0.1
  method.stabilize_steps=19 method.zero_out_interval=1 stages.tpp_finetune.epochs=1)
step "a run" tpp train "${small[@]}" "output=$out/run" --until tpp_finetune
step "what came out" tpp describe "$out/run/tpp_finetune/model.safetensors"
step "the same by torchrun, two ranks" env TPP_NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29519 \
  bash launch/node.sh torchrun 1x2 python train/main.py "${small[@]}" "output=$out/ranks" --until dense
echo "$image works"
