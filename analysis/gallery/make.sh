#!/bin/sh
# Draw the README's gallery anew: sh analysis/gallery/make.sh [PROFILE]
# PROFILE: latency profiles without their models: h200 for sim/profiles/h200-*.json (default), or analytic-h200.
# What it runs goes to results/gallery, which is emptied first; pictures and their numbers lie beside this file.
set -eu
cd "$(dirname "$0")/../.."
profile=${1:-h200}
out=results/gallery
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
rm -rf "$out"
mkdir -p "$out"

python -m traces synth code --requests 8819 --seed 1 --output $out/code.csv
python -m traces synth conv --requests 8000 --seed 1 --output $out/conv.csv

# Average token latency against request rate: three models on the profiles, and on an A100-80GB extrapolated from them.
python -m sim sweep sim/grids/rate.yaml --trace $out/code.csv --set profile=$profile --output $out/rate.jsonl
python -m analysis figures --in $out/rate.jsonl --only rate --out $out/drawn
for model in qwen2-vl-7b llava-1.5-7b llava-1.5-13b; do
    python -m sim extrapolate $profile-$model --to a100-80gb --out $out/extrapolated-a100-80gb-$model.json
    python -m sim sweep sim/grids/rate.yaml --trace $out/code.csv --set model=$model --set profile=$out/extrapolated-a100-80gb-$model.json --output $out/rate-a100-$model.jsonl
done
python -m analysis figures --in $out/rate-a100-*.jsonl --only rate --out $out/drawn/a100
mv $out/drawn/a100/rate.png $out/drawn/rate-a100.png
mv $out/drawn/a100/rate.csv $out/drawn/rate-a100.csv

# Modes and switches over time.
python -m sim --policy valora,dlora,cost-aware --profile $profile --workload retrieval --rate 12 --adapter-assign share:0.8 --output $out/modes
python -m analysis figures --in $out/modes --only modes --out $out/drawn

# Operators, as measured.
python -m analysis figures --in kernels/results/operators_h200.csv kernels/results/peers_h200.csv --only operators --out $out/drawn

# What four GPUs sustain.
python -m sim capacity --profile $profile --slo "p99_ttft<1s,p99_tpot<50ms" --trace $out/conv.csv --workload retrieval --policy valora,slora --gpus 1,4 --router least-outstanding,affinity,dlora --requests-per-gpu 1000 --seeds 3 --confidence 1 --output $out/capacity.json
python -m analysis figures --in $out/capacity.json --only routers --out $out/drawn

python -m analysis report $out/rate.jsonl $out/capacity.json --output $out/report.html
for name in rate rate-a100 modes operators routers; do
    cp $out/drawn/$name.png $out/drawn/$name.csv analysis/gallery
done
