#!/bin/sh
# plot.sh: pictures with gnuplot, as `make plot` calls it.
#   plot.sh run DIR [LEVEL NAME]   DIR/log.tsv as DIR/loss.png; a dashed line at LEVEL
#   plot.sh bench FILE             every table of `./bench --tsv > FILE` as a picture beside it
# Writes each picture under another name first: what was there stays until the new one is whole.
command -v gnuplot >/dev/null || {
    echo "make plot needs gnuplot: apt-get install gnuplot-nox (or brew install gnuplot);" \
        "the TSV files are plain text for any other plotter"
    exit 1
}
input=$2
[ "$1" = run ] && input=$2/log.tsv
[ -f "$input" ] || { echo "$input is not there: train first, or name RUN=DIR or BENCH=FILE"; exit 1; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# The loss: training as the mean of every n steps, at most 150 points. The first twentieth, where the
# loss falls from 5.5, may lie above the picture.
plot_run() {
    level=
    [ -z "$3" ] || level=", $3 with lines dt 2 title '$3 $4'"
    gnuplot -e "log = '$2/log.tsv'; set terminal pngcairo size 900,540; \
        set output '$work/loss.png'; set xlabel 'step'; set ylabel 'nats per byte'; set grid; \
        set datafile missing 'nan'; stats log using 1 nooutput; last = STATS_max; \
        n = ceil(last / 150.0); top = 0; top(x) = (x > top ? (top = x) : top); \
        stats log using (\$1 > last / 20 ? top(\$2) : 0) nooutput; \
        stats log using (top(\$3)) nooutput; set yrange [*:1.02 * top]; \
        plot log using (n * floor((\$1 - 1) / n) + n / 2.0):2 smooth unique with lines lw 2 \
        title sprintf('training, mean of %d steps', n), log using 1:3 with linespoints lw 2 pt 7 \
        title 'held out' $level" && mv "$work/loss.png" "$2/loss.png" && echo "$2/loss.png"
}

# Tables by name, and after the colons the first and the last column to draw.
plot_bench() {
    for t in step:3:3 layers:3:3 stream:2:2 table1:2:4 memory:2:3 ladder:2:2; do
        name=${t%%:*} to=${t##*:} from=${t#*:}
        from=${from%:*}
        picture=${2%.*}-$name.png
        grep -q "^# $name	" "$2" || continue
        awk -F '\t' -v t="# $name" '/^#/ {if (NF > 1) on = $1 == t; next} on' "$2" >"$work/table"
        gnuplot -e "set terminal pngcairo noenhanced size 900,540; set output '$work/table.png'; \
            set datafile separator '\t'; set title '$name'; set logscale y; set grid y; \
            set style fill solid; set style data histograms; set xtics rotate by -60; \
            set key left autotitle columnhead; \
            plot for [i=$from:$to] '$work/table' using i:xtic(1)" &&
            mv "$work/table.png" "$picture" && echo "$picture"
    done
}

"plot_$1" "$@"
