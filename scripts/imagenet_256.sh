#!/bin/sh
# The published class-to-image recipe at 256 px: GPT-B on ImageNet, from images to FID.
#
#   sh scripts/imagenet_256.sh imagenet/train VIRTUAL_imagenet256_labeled.npz out
#
# Run it again after a stop: every step continues, and finished steps end at once.
# GPUS (default 8): processes per node. SIZE (default b): a file of configs/autoregressive/size.
# Cost: not yet run here. Codes take 20 crops x 512 bytes per image, 13 GB for ImageNet's 1.28
# million; further arguments go to the training: --dry_run true prints its
# memory and hours.
# Expected (published): FID 5.46 for GPT-B.
set -eu
images=$1 reference=$2 out=$3
shift 3
gpus=${GPUS:-8} size=${SIZE:-b}

# 1. The released tokenizer.
[ -e "$out/vq16/model.safetensors" ] || python -m tokenizer.convert --source llamagen_vq16 --out "$out/vq16"
# 2. Ten crops at two ranges of every training image.
torchrun --nproc-per-node "$gpus" -m tokenizer.encode --tokenizer "$out/vq16" --data "$images" --crop ten --crop_ranges 1.1 1.05 --out "$out/codes"
# 3. 300 epochs.
torchrun --nproc-per-node "$gpus" -m autoregressive.train --config configs/autoregressive/class_256.yaml --config "configs/autoregressive/size/$size.yaml" --data.codes "$out/codes" --out "$out/gpt" "$@"
# 4 and 5. 50,000 images, scored while they are sampled.
torchrun --nproc-per-node "$gpus" -m autoregressive.sample --config configs/sampling/class_256.yaml --gpt "$out/gpt" --tokenizer "$out/vq16" --metrics.reference "$reference" --out "$out/samples"
