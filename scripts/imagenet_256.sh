#!/usr/bin/env bash
# The published class-to-image recipe at 256 px: GPT-B on ImageNet, from images to FID.
#
#   scripts/imagenet_256.sh imagenet/train VIRTUAL_imagenet256_labeled.npz out
#
# Run it again after a stop: every step continues, and finished steps end at once. Further arguments
# go to the training: --training.num_steps 250200 (50 epochs); --dry_run true, after the codes are
# made, prints its memory and hours, and stops there.
#
# NPROC: processes, default all GPUs; see launch.sh, which starts them again after a crash.
# SIZE (b): a file of configs/autoregressive/size.
# TOKENIZER (llamagen_vq16): a released tokenizer, or the folder of your own.
# ENCODE_FLAGS, SAMPLE_FLAGS: more flags of tokenizer.encode and of autoregressive.sample, such as
# SAMPLE_FLAGS="--num_images 10000 --sampling.cfg_scale 1.75".
#
# Cost: not yet run here on a GPU. Disk: 13 GB for the codes, 2 bytes each, 256 of each of 20 crops of
# 1.28 million images; about 2 GB for each kept checkpoint of GPT-B; 10 GB for the samples. Time: the
# training is about a day on 8 A100 as published; see configs/README.md for the other sizes.
# Expected (published): FID 5.46 for GPT-B.
set -euo pipefail
images=$1 reference=$2 out=$3
shift 3
scripts=$(dirname "$0")
dry=
case " $* " in *" --dry_run true "* | *" --dry_run=true "*) dry=yes ;; esac
read -ra encode <<<"${ENCODE_FLAGS:-}"
read -ra sample <<<"${SAMPLE_FLAGS:-}"

# 1. The released tokenizer. Its checksums are written last.
[ -e "$out/vq16/checksums.json" ] || python -m tokenizer.convert --source "${TOKENIZER:-llamagen_vq16}" --out "$out/vq16"
# 2. Ten crops at two ranges of every training image.
"$scripts/launch.sh" tokenizer.encode --tokenizer "$out/vq16" --data "$images" --crop ten --crop_ranges 1.1 1.05 --out "$out/codes" ${encode[@]+"${encode[@]}"}
# 3. 300 epochs.
"$scripts/launch.sh" autoregressive.train --config configs/autoregressive/class_256.yaml --config "configs/autoregressive/size/${SIZE:-b}.yaml" --data.codes "$out/codes" --out "$out/gpt" "$@"
[ -z "$dry" ] || exit 0
# 4 and 5. 50,000 images, scored while they are sampled.
"$scripts/launch.sh" autoregressive.sample --config configs/sampling/class_256.yaml --gpt "$out/gpt" --tokenizer "$out/vq16" --metrics.reference "$reference" --out "$out/samples" ${sample[@]+"${sample[@]}"}
