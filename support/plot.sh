#!/bin/sh
# plot.sh: pictures with gnuplot, as `make plot` calls it.
#   plot.sh run DIR [LEVEL NAME]   DIR/log.tsv as DIR/loss.png; a dashed line at LEVEL
#   plot.sh bench FILE             every table of `./bench --tsv > FILE` as a picture beside it
# Refuses a picture that is a folder, a device or a pipe. Makes each in a folder of its own beside
# it, or beside the file that it is a link to, and renames it: what was there stays until the new
# one is whole. gnuplot runs in that folder, so that no name of the user's is part of its code.
fail() { echo "plot.sh: $*" >&2; exit 1; }
command -v gnuplot >/dev/null || fail "make plot needs gnuplot: apt-get install gnuplot-nox (or" \
    "brew install gnuplot); the TSV files are plain text for any other plotter"
# With its folder, so that it never begins with a -.
case $2 in */*) input=$2 ;; *) input=./$2 ;; esac
[ "$1" = run ] && input=$input/log.tsv
[ -f "$input" ] || fail "$input is not there: train first, or name RUN=DIR or BENCH=FILE"
case $3 in *[!0-9.eE+-]*) fail "the level is '$3', expected a number" ;; esac
folder=${input%/*} work='' status=0 drawn=0
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# draw PICTURE CODE [TABLE]: what gnuplot makes of the file `data`: the input, or that table of it
draw() {
    target=$1
    [ ! -L "$1" ] || target=$(readlink -f "$1") || fail "cannot follow the link $1"
    if [ -e "$target" ] || [ -L "$1" ]; then
        [ -f "$target" ] || fail "$1 is not a file: move it away"
    fi
    work=$(mktemp -d "${target%/*}/.plot.XXXXXX") || exit 1
    if [ -z "$3" ]; then
        cp "$input" "$work/data"
    else
        awk -F '\t' -v t="# $3" '/^#/ {if (NF > 1) on = $1 == t; next} on' "$input" >"$work/data"
    fi
    if (cd "$work" && gnuplot -e "$2") && mv -f "$work/picture" "$target"; then
        echo "$1"
    else
        echo "plot.sh: there is no new $1" >&2
        status=1
    fi
    rm -rf "$work"
}

# The loss: training as the mean of every n steps, at most 150 points. The first twentieth, where
# the loss falls from 5.5, may lie above the picture.
plot_run() {
    level=
    [ -z "$3" ] || level=", $3 with lines dt 2 title '$3 $(printf %s "$4" | sed "s/'/''/g")'"
    draw "$folder/loss.png" "set terminal pngcairo size 900,540; \
        set output 'picture'; set xlabel 'step'; set ylabel 'nats per byte'; set grid; \
        set datafile missing 'nan'; stats 'data' using 1 nooutput; last = STATS_max; \
        n = ceil(last / 150.0); top = 0; top(x) = (x > top ? (top = x) : top); \
        stats 'data' using (\$1 > last / 20 ? top(\$2) : 0) nooutput; \
        stats 'data' using (top(\$3)) nooutput; set yrange [*:1.02 * top]; \
        plot 'data' using (n * floor((\$1 - 1) / n) + n / 2.0):2 smooth unique with lines lw 2 \
        title sprintf('training, mean of %d steps', n), 'data' using 1:3 with linespoints lw 2 pt 7 \
        title 'held out' $level"
}

# Time and memory of a step by T, a curve for each stack of the table, whichever it has.
by_length="set terminal pngcairo noenhanced size 900,440; set output 'picture'; \
    set datafile separator '\\t'; set multiplot layout 1,2; set logscale x 2; set logscale y; \
    set grid; set key left; set xlabel 'T, bytes of a window'; \
    names = ''; note(s) = (strstrt(names, s.' ') ? 0 : (names = names.s.' ', 0)); \
    stats 'data' every ::1 using (note(strcol(1))) nooutput; \
    set ylabel 'ms a step'; plot for [s in names] 'data' every ::1 \
    using (strcol(1) eq s ? \$2 : NaN):3 with linespoints lw 2 title s; \
    set ylabel 'MB'; unset logscale y; set yrange [0:*]; set key bottom; \
    plot for [s in names] 'data' every ::1 \
    using (strcol(1) eq s ? \$2 : NaN):5 with linespoints lw 2 title s"

# Tables by name, and after the colons the first and the last column to draw.
plot_bench() {
    base=${input##*/}
    if grep -q "^# length	" "$input"; then
        drawn=1
        draw "$folder/${base%.*}-length.png" "$by_length" length
    fi
    for t in step:3:3 layers:3:3 stream:2:2 table1:2:4 memory:2:3 ladder:2:2; do
        name=${t%%:*} to=${t##*:} from=${t#*:}
        from=${from%:*}
        grep -q "^# $name	" "$input" || continue
        drawn=1
        draw "$folder/${base%.*}-$name.png" "set terminal pngcairo noenhanced size 900,540; \
            set output 'picture'; \
            set datafile separator '\t'; set title '$name'; set logscale y; set grid y; \
            set style fill solid; set style data histograms; set xtics rotate by -60; \
            set key left autotitle columnhead; \
            plot for [i=$from:$to] 'data' using i:xtic(1)" "$name"
    done
    [ $drawn = 1 ] || fail "$input holds no table of ./bench --tsv"
}

case $1 in run | bench) "plot_$1" "$@" ;; *) fail "expected run DIR or bench FILE" ;; esac
exit $status
