#!/bin/bash
# Drives Track4D in a real Blender window without a screen or a GPU: run.sh [trixie|sid] [model.glb] [prompt]
#   needs root, Debian's mirrors and a script that sets up a Blender with a virtual display: SETUP (see docs/blender.md)
#   PYTHON  interpreter with track4d installed     WORK  another work function for the server, as module:function
#   SHOTS   folder for the screenshots              WAIT  seconds that one animation may take
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd); TOP=$(cd "$HERE/../.." && pwd)
SUITE=${1:-trixie}; MODEL=${2:-}; PROMPT=${3:-the monkey is jumping}
SETUP=${SETUP:-$TOP/../shared/tools/blender_gui/setup_blender_gui.sh}
PYTHON=${PYTHON:-$TOP/.venv/bin/python}; WORK=${WORK:-track4d.pipeline:run}; WAIT=${WAIT:-300}; SHOTS=${SHOTS:-$TOP/out/gui_$SUITE}
ROOT=${ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/blender_gui/$SUITE}; DPY=${DPY:-77}; HOME_DIR=$(mktemp -d)
[ -x "$SETUP" ] || { echo "no script that sets up Blender at $SETUP"; exit 77; }

extra=(); [ "$SUITE" = sid ] && extra=(--python 3.14)
ZIP=$("$PYTHON" "$TOP/tools/build_extension.py" "${extra[@]}" | sed 's/  [^ ]* MB$//'); echo "$ZIP"
PYTHONPATH=$TOP/tests/addon "$PYTHON" -c "import sys, pathlib, track4d.service as s; s.serve(pathlib.Path(sys.argv[1]), work=sys.argv[2])" \
  "$HOME_DIR" "$WORK" >"$HOME_DIR/serve.log" 2>&1 &
SERVER=$!; BPID=; XPID=
trap 'kill $SERVER $BPID $XPID 2>/dev/null || true; rm -rf "$HOME_DIR"' EXIT
for _ in $(seq 100); do [ -s "$HOME_DIR/connection.json" ] && break; sleep 0.2; done

mkdir -p "$SHOTS"
[ -x "$ROOT/usr/bin/blender" ] || OUT="$SHOTS" ROOT="$ROOT" DPY=$DPY "$SETUP" "$SUITE" "$ZIP" >&2  # a new system's folder is cleared first
mkdir -p "$ROOT/gui"
rm -rf "$ROOT"/root/.config/blender/*/extensions/{user_default,.local}  # else a wheel of the same version would stay, old as it is
rm -f "$ROOT"/gui/{request,request.part,passed,failed,model.*}
cp "$HOME_DIR/connection.json" "$ROOT/gui/"; echo "$PROMPT" >"$ROOT/gui/prompt"; echo "$WAIT" >"$ROOT/gui/seconds"
[ -z "$MODEL" ] || cp "$MODEL" "$ROOT/gui/model.${MODEL##*.}"
eval "$(KEEP=1 DPY=$DPY OUT="$SHOTS" ROOT="$ROOT" "$SETUP" "$SUITE" "$ZIP" "$HERE/drive_animate.py" | tee /dev/stderr | grep ^BPID=)"

hand() { chroot "$ROOT" env DISPLAY=":$DPY" HOME=/root "$@"; }
while [ ! -e "$ROOT/gui/passed" ] && [ ! -e "$ROOT/gui/failed" ]; do
  kill -0 "$BPID" 2>/dev/null || { echo "Blender ended"; tail -20 "$SHOTS/blender.log"; exit 1; }
  if [ -e "$ROOT/gui/request" ]; then
    read -r what words <"$ROOT/gui/request" || true
    case $what in
      shot) hand xdotool mousemove 200 700 sleep 0.7; hand import -window root "/gui/$words.png" && mv "$ROOT/gui/$words.png" "$SHOTS/" ;;
      click) hand xdotool mousemove $words sleep 0.6 mousemove_relative 3 0 sleep 0.6 mousedown 1 sleep 0.2 mouseup 1 ;;
      doubleclick) hand xdotool mousemove $words sleep 0.3 click --repeat 2 --delay 80 1 sleep 0.3 key ctrl+a ;;
      type) hand xdotool type --delay 30 "$words" && hand xdotool key Return ;;
    esac
    rm "$ROOT/gui/request"
  fi
  sleep 0.2
done
[ -e "$ROOT/gui/failed" ] && { hand import -window root /gui/failed.png && mv "$ROOT/gui/failed.png" "$SHOTS/"; cat "$ROOT/gui/failed"; tail -30 "$SHOTS/blender.log"; exit 1; }
cat "$ROOT/gui/passed"
for _ in $(seq 100); do kill -0 "$BPID" 2>/dev/null || break; sleep 0.1; done
kill -0 "$BPID" 2>/dev/null && { echo "Blender doesn't quit while a job runs"; exit 1; }
tail -5 "$SHOTS/blender.log"; ls "$SHOTS"
