#!/bin/sh
# Installs the LLVM 23.1 that the `cuda` backend is linked with, from PyPI, for networks that do not reach the site from
# which the build script of CubeCL would download it.
#
#   scripts/install-llvm.sh [DIRECTORY]     default: ~/.cache/ps/llvm-venv
#   cargo build --release --features cuda
#
# Prints on standard error. It puts a link where that build script looks: into
# ~/.local/share/tracel (or $XDG_DATA_HOME/tracel). Needs Linux on x86_64, python3 with venv and pip, and the network the
# first time.
set -eu

# The version that cubecl-cuda, 0.11, is made for, and the name of its directory.
version=23.1.1.post0
name=tracel-llvm-23.1.0-4
directory=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/ps/llvm-venv}
place=${XDG_DATA_HOME:-$HOME/.local/share}/tracel/$name

say() {
    echo "$@" >&2
}

fail() {
    say "error: $*"
    exit 1
}

[ "$(uname -sm)" = "Linux x86_64" ] || fail "PyPI has this LLVM for Linux on x86_64 only; cargo downloads it for other systems"
command -v python3 >/dev/null || fail "python3 is not installed"

if [ -e "$place/.tracel-llvm-installed" ] && [ ! -L "$place/bin/llvm-config" ]; then
    say "$place has an LLVM that cargo has downloaded; there is nothing to do"
    exit
fi

config() {
    [ -x "$directory/bin/python" ] &&
        "$directory/bin/python" -m pip show mlc-llvm-static 2>/dev/null | grep -q "^Version: $version" &&
        "$directory/bin/python" -m mlc_llvm_static.config --llvm-config 2>/dev/null
}

if ! config >/dev/null; then
    say "installing LLVM $version into $directory (several hundred MB)"
    python3 -m venv "$directory" >&2 ||
        fail "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$directory/bin/python" -m pip install --quiet --retries 10 --timeout 60 "mlc-llvm-static[all]==$version" >&2 ||
        fail "pip could not install mlc-llvm-static==$version"
fi
llvm_config=$(config) || fail "pip did not install mlc-llvm-static $version"
[ -x "$llvm_config" ] || fail "there is no program $llvm_config"

# Only what is missing: cargo compiles anew for newer files.
mkdir -p "$place/bin"
[ "$(readlink "$place/bin/llvm-config")" = "$llvm_config" ] || ln -sfn "$llvm_config" "$place/bin/llvm-config"
[ -e "$place/.tracel-llvm-installed" ] || touch "$place/.tracel-llvm-installed"
say "$("$place/bin/llvm-config" --version) is in $place"
