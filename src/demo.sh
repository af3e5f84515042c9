#!/usr/bin/env bash
# The demo: the built-in dataset, a small GPT-2 from random weights, the ordinary scripts with ordinary flags.
#   ./start_instruct_training.sh demo [flags of src/train_instruct.py...]
# Everything goes to demo/, where data, checkpoints and runs are made anew; nothing else of yours is touched. The model
# of an earlier demo stays until the new one has its first checkpoint.
# It stands here to be read; start_instruct_training.sh finds the environment and runs it.

steps="--max_steps 320"
[[ " $* " != *" --epochs"* ]] || steps=""
training=(--data_dir demo/data --checkpoint_dir demo/checkpoints --tensorboard_dir demo/runs --from_scratch 4,4,128
    --context_length 128 --total_batch_size 1024 $steps --learning_rate 2e-3 --min_lr 2e-4 --warmup_steps 30
    --weight_decay 0.1 --eval_freq 100 --checkpoint_freq 100 --keep_last 1 --log_freq 20 --device cpu "$@")

case " $* " in
    *" -h "* | *" --help "*)
        sed -n '2,5s/^# //p' src/demo.sh
        exit 0 ;;
esac
for flag in "$@"; do
    case "$flag" in
        --dry_run | --resume* | --data_dir* | --checkpoint_dir* | --tensorboard_dir*)
            fail "the demo makes all anew in demo/, so it takes no ${flag%%=*}; src/train_instruct.py does" ;;
    esac
done

show() {
    printf '\n$ %s\n' "$python $*"
    "$python" "$@"
}

# a wrong flag is refused before anything is installed
choose_environment requirements.txt
[ -n "$(lacks "$python")" ] || PYTHONPATH=src "$python" -c \
    'import sys, cli, training.options as o; cli.run(lambda: o.parse_options(sys.argv[1:]) and 0)' "${training[@]}"
fill_environment requirements.txt
[ ! -L demo ] || fail "demo is a link to another folder; move it away"

put_back() {  # what the last demo left, if this one came to nothing
    if [ -e demo/before ] && [ ! -e demo/checkpoints/latest.pt ]; then
        rm -rf demo/checkpoints demo/runs
        mv demo/before/* demo/ 2> /dev/null || true  # there may be none
    fi
    rm -rf demo/before
}

show src/prepare_instruct_dataset.py --dataset src/demo_dataset.jsonl --output_dir demo/data
put_back
mkdir demo/before
for made in demo/checkpoints demo/runs; do
    [ ! -e "$made" ] || mv "$made" demo/before/ || exit 2
done
trap put_back EXIT
trap : HUP TERM  # the run saves, and ends before this
show src/train_instruct.py "${training[@]}"
printf '\nQuestions in wordings that it was not trained on:\n'
show src/evaluate_instruct.py demo/checkpoints/best_model.pt --data_dir demo/data --examples 0 \
    --max_new_tokens 40 --show 8

cat <<END

This model knows 120 facts and nothing else. Chat with it:   ./chat.sh demo
With real data and a real model:                             see README.md, or
  $python src/convert_checkpoint.py import gpt2     (or your own file as checkpoints/best_model.pt)
  $python src/prepare_instruct_dataset.py
  ./start_instruct_training.sh
END
