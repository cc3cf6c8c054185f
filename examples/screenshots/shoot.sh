#!/usr/bin/env bash
# Pictures of a finished run's report.html: wide in light and dark, and as on a phone. Needs Chromium; opens no connection.
#
#   examples/screenshots/shoot.sh runs/cpt_then_sft examples/screenshots
set -euo pipefail

report=$(realpath "${1:?usage: shoot.sh RUN OUT}/report.html")
out=$(realpath "${2:?usage: shoot.sh RUN OUT}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

shoot() { # NAME WIDTH HEIGHT PAGE [FLAG]
    "${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --disable-background-networking \
        --disable-component-update --disable-sync --no-first-run --hide-scrollbars \
        --user-data-dir="$scratch/profile" --screenshot="$out/$1.png" --window-size="$2,$3" "${@:5}" "file://$4" 2>/dev/null
    echo "$out/$1.png"
}

# Chromium's windows are at least 500 pixels wide: the phone is a frame inside one
printf '<body style="margin:0"><iframe src="file://%s" style="width:390px;height:1600px;border:0"></iframe></body>' \
    "$report" >"$scratch/phone.html"

shoot light 1100 1600 "$report"
shoot dark 1100 1600 "$report" --blink-settings=preferredColorScheme=0
shoot phone 500 1600 "$scratch/phone.html"
