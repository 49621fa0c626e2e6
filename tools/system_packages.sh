#!/bin/sh
# Makes sure that the system libraries which Blender's Python module and a virtual environment need are there.
# As root on Debian or Ubuntu it installs what is missing; otherwise it names it.
set -eu
missing=""
need() { ldconfig -p | grep -q "$1" || missing="$missing $2"; }
need libX11.so.6 libx11-6
need libXrender.so.1 libxrender1
need libXfixes.so.3 libxfixes3
need libXi.so.6 libxi6
need libXxf86vm.so.1 libxxf86vm1
need libxkbcommon.so.0 libxkbcommon0
need libSM.so.6 libsm6
need libGL.so.1 libgl1
need libEGL.so.1 libegl1
need libgomp.so.1 libgomp1
"$1" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
  echo "Missing system packages:$missing" >&2
  echo "Install them (sudo apt-get install$missing) and run make again." >&2
  exit 1
fi
